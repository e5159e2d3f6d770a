"""The VAE script: bounds and likelihoods against oracles, whole runs, resume, signals.

    pytest tests/test_vae_mnist.py
"""

import functools
import itertools
import math
import signal
import subprocess
import sys
import time

import common

import numpy as np
import pytest
import torch
from conftest import ROOT, interrupt_after_epoch
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

import vae_mnist as study

SMOKE = ["--dataset", "glyphs", "--train-size", "500", "--epochs", "1", "--likelihood-images", "9",
         "--hidden", "32", "--device", "cpu"]
CONFIG = {"dataset": "mnist", "arch": "mlp", "hidden": [32], "latent_dim": 4, "objective": "elbo",
          "k": 1, "binarize": "dynamic", "optimizer": "adam", "lr": 0.001, "batch_size": 100,
          "epochs": 100, "train_size": 55_000, "precision": "float32", "seed": 0}


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    """Whole runs load 1,000 training images, half of them for validation, and 200 test images."""
    def fewer(*a, real=common.load_data):
        data = real(*a)
        return common.Data(data.name, data.x_train[:1000], data.y_train[:1000],
                           data.x_test[:200], data.y_test[:200])
    monkeypatch.setattr(common, "load_data", fewer)
    monkeypatch.setattr(common, "split", functools.partial(common.split, n_val=500))
    monkeypatch.setattr(study, "IMPORTANCE_SAMPLES", 500)


# --------------------------------------------------------------------------------- model, objective


@pytest.mark.parametrize(("arch", "hidden", "d", "count"), [
    ("mlp", [500], 20, 815_824), ("mlp", [500], 1, 787_286), ("mlp", [500, 500], 20, 1_316_824),
    ("mlp", [200, 200], 50, 425_284), ("conv", [], 64, 1_374_657)])
def test_the_published_nets_have_their_parameters(arch, hidden, d, count):
    model = study.VAE({"arch": arch, "hidden": hidden, "latent_dim": d})
    assert sum(w.numel() for w in model.parameters()) == count


def test_kl_and_log_likelihood_against_torch_distributions():
    mu, logvar = 3 * torch.randn(64, 5), 4 * torch.randn(64, 5)
    want = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    assert torch.allclose(study.kl_per_dimension(mu, logvar), want, rtol=1e-4, atol=1e-5)
    decoder, x, z = nn.Linear(5, 12), torch.rand(8, 12).round(), torch.randn(3, 8, 5)
    want = Bernoulli(logits=decoder(z)).log_prob(x).sum(-1)
    assert torch.allclose(study.log_likelihood(decoder, z, x), want, atol=1e-4)


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_bfloat16_is_near_float32_and_losses_stay_float32(objective):
    config = {**CONFIG, "objective": objective, "k": 3}
    model, x, found = study.VAE(config), torch.rand(64, 1, 28, 28).round(), []
    for on in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, on):
            outputs = [*model.encode(x), model.to_logits(torch.zeros(1, 4))]
            losses = study.objective(model, x, config)
        assert all(output.dtype == torch.float32 for output in [*outputs, losses])
        found.append((losses.detach(), torch.autograd.grad(losses[0], model.decoder[0].weight)[0]))
    (losses, gradient), (losses_16, gradient_16) = found
    assert torch.allclose(losses, losses_16, rtol=1e-2) and not torch.equal(gradient, gradient_16)
    assert (gradient - gradient_16).norm() < 0.05 * gradient.norm()


DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arch", ["mlp", "conv"])
@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_a_step_leaves_no_tensor_on_another_device(arch, objective, device):
    config = {**CONFIG, "arch": arch, "objective": objective, "k": 3}
    model = study.VAE(config).to(device)
    x = torch.bernoulli(torch.rand(5, 1, 28, 28, device=device))
    losses = study.objective(model, x, config)
    losses[0].backward()
    assert losses.device.type == device and losses.shape == (3,)
    assert all(weight.grad.device.type == device for weight in model.parameters())
    assert model.decode(model.encode(x)[0]).shape == x.shape


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_losses_are_per_image_and_do_not_depend_on_the_batch(objective, monkeypatch):
    config = {**CONFIG, "objective": objective, "k": 3}
    model, x, noise = study.VAE(config), torch.rand(16, 1, 28, 28).round(), torch.randn(3, 16, 4)

    def losses(images: slice) -> torch.Tensor:  # the same noise for an image, whatever its batch
        monkeypatch.setattr(torch, "randn_like", lambda mu: noise[0, images])
        monkeypatch.setattr(torch, "randn", lambda *a, **k: noise[:, images])
        return study.objective(model, x[images], config)
    whole, halves = losses(slice(16)), losses(slice(8)) + losses(slice(8, 16))
    assert torch.allclose(whole, halves / 2, rtol=1e-5)
    assert whole[0] > 300  # summed over 784 pixels of about ln 2 each, not averaged
    if objective == "elbo":
        assert whole[0].item() == pytest.approx((whole[1] + whole[2]).item())


@pytest.mark.parametrize(("name", "step"), [
    ("adam", lambda w, g: w - 0.1 * g / (g.abs() + 1e-8)),
    ("adagrad", lambda w, g: w - 0.1 * g / (g.square().sqrt() + 1e-10))])
def test_one_step_of_an_optimizer_by_hand(name, step):
    w, g = nn.Parameter(torch.randn(7)), torch.randn(7)
    want = step(w.detach().clone(), g)
    w.grad = g
    study.make_optimizer(name, nn.ParameterList([w]), 0.1).step()
    assert torch.allclose(w, want, atol=1e-6)


def test_test_images_are_binarised_once_with_their_mean_kept():
    x = torch.rand(200, 1, 28, 28)
    a, b = study.binarize(x, "test"), study.binarize(x, "test")
    assert torch.equal(a, b) and set(a.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(a, study.binarize(x, 1, "val"))
    assert abs((a - x).mean().item()) < 4 * math.sqrt(1 / 6 / x.numel())


# ------------------------------------------------------------------------------------- likelihoods


def test_elbo_iwae_sampled_and_exact_likelihood_are_in_order(data):
    config = {**CONFIG, "hidden": [64], "latent_dim": 2}
    model = study.VAE(config)
    optimizer = study.make_optimizer("adam", model, 3e-3)
    for x in data.x_train[:20_000].split(100):
        loss = study.objective(model, torch.bernoulli(x), config)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)
    x = study.binarize(data.x_test[:30], "test")
    q = model.encode(x)
    log_px = functools.partial(study.log_likelihood, model.to_logits, x=x.flatten(1))
    log_w = torch.cat([study.log_weights(log_px, *q, 100) for _ in range(20)]).double()
    bounds = [log_w.mean(0)]
    for k in (5, 50, 2000):
        bounds.append(study.log_mean_weight(log_w.view(-1, k, len(x)).transpose(0, 1)).mean(0))
    exact = study.quadrature(model.to_logits, x.flatten(1), 2, 6.0, 401)
    for loose, tight in itertools.pairwise([*bounds, exact]):
        difference = tight - loose
        assert difference.mean() > -3 * difference.std() / math.sqrt(len(x))
    assert (bounds[1] - bounds[0]).mean() > 0.05  # the bound hides something
    other_grid = study.exact_likelihood(model, x.flatten(1), *q)
    assert torch.allclose(other_grid, exact, atol=1e-3)
    found = study.estimate_likelihood(model, x, 0.0)
    want = exact.mean().item()
    assert found["nll_subset"] == pytest.approx(-want, abs=0.1)
    assert found["exact_subset"] == pytest.approx(-other_grid.mean().item())
    assert found["gap"] == pytest.approx((exact - bounds[0]).mean().item(), abs=0.2)
    assert 25 < found["ess_median"] <= 500
    lost = torch.zeros(30, 2)  # an encoder that says the same of every image
    again = study.sampled_likelihood(model, x.flatten(1), lost, lost)[1].mean().item()
    assert again == pytest.approx(want, abs=0.2)
    # the closed-form KL and the sampled one agree
    total = np.mean([study.mean_losses(model, x, config)[0] for _ in range(200)])
    assert total == pytest.approx(-bounds[0].mean().item(), abs=0.2)


def test_the_exact_posterior_gives_weights_without_variance():
    x = np.random.default_rng(0).normal(size=(400, 12)) @ np.diag(np.linspace(3, 0.3, 12))
    pca = PCA(3).fit(x)
    s2 = pca.noise_variance_
    w = torch.from_numpy(pca.components_.T * np.sqrt(pca.explained_variance_ - s2))  # (12, 3)
    m = w.square().sum(0) + s2  # W^T W + s2 I, diagonal: columns of W are orthogonal
    x, mean = torch.from_numpy(x[:50]), torch.from_numpy(pca.mean_)
    mu, logvar = (x - mean) @ w / m, (s2 / m).log().expand(50, 3)
    log_px = lambda z: MultivariateNormal(mean, s2 * torch.eye(12).double()).log_prob(x - z @ w.T)
    want = torch.from_numpy(pca.score_samples(x.numpy()))
    log_w = study.log_weights(log_px, mu, logvar, 20)
    assert torch.allclose(log_w, want.expand(20, 50), atol=1e-9)
    proposal = common.laplace(lambda z: z @ w.T, x, torch.zeros(50, 3).double(), lambda output, x:
                              (x - mean - output) / s2, lambda output: torch.full_like(
                                  output, 1 / s2), widen=1)
    assert torch.allclose(proposal[0], mu)
    got, ess = common.importance_sampling(log_px, *proposal, 50, prior=0)
    assert torch.allclose(got, want, atol=1e-9) and torch.allclose(ess, torch.tensor(50.0).double())
    got, ess = common.importance_sampling(log_px, *proposal, 5000)
    assert torch.allclose(got, want, atol=0.1) and ess.mean() > 0.8 * 5000


@pytest.mark.parametrize("d", [1, 2])
def test_probabilities_of_all_images_of_8_pixels_sum_to_1(d):
    decoder = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, 8)).requires_grad_(False)
    decoder[2].weight *= 3
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)))
    log_px = study.quadrature(decoder, x, d, 8.0, 201)
    assert log_px.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(study.quadrature(decoder, x, d, 8.0, 101), log_px, atol=1e-3)
    assert study.quadrature(decoder, x, d, 1.5, 101).exp().sum() < 0.9  # the range is too short


# -------------------------------------------------------------------------------------------- runs


def test_runs_end_to_end_and_the_report_is_made_of_the_files(tmp_path, capsys):
    argv = [*SMOKE, "--out-dir", str(tmp_path)]
    metrics = study.main([*argv, "--latent-dim", "1", "--binarize", "none"])
    metrics |= study.main([*argv, "--latent-dim", "2", "--optimizer", "adam", "adagrad"])
    metrics |= study.main([*argv, "--latent-dim", "3", "--arch", "conv", "--objective", "iwae",
                           "--k", "2", "--precision", "bfloat16", "--train-size", "100",
                           "--likelihood-images", "2"])  # the slowest: a single step
    root = tmp_path / "vae_mnist/glyphs"
    assert len(metrics) == 4
    grey = metrics["mlp-32_1-D_grey_ELBO_adam-0.001-epochs1-n500/seed_0"]
    likelihood = grey["likelihood"]
    assert grey["pixel_entropy"] < grey["negative_elbo"] < 784 * math.log(2)
    assert likelihood["exact_subset"] == pytest.approx(likelihood["nll_subset"], abs=1)
    assert grey["negative_elbo"] - likelihood["nll"] == pytest.approx(likelihood["gap"])
    for name, count in [("codes", 4), ("samples", 4), ("interpolation", 4), ("decoded", 3)]:
        assert len(list(root.glob(f"*/*/{name}.png"))) == count
    files = {file: file.read_bytes() for file in [root / "report.md", root / "results.csv"]}
    for file in files:
        file.unlink()
    study.main(["--report-only", "--dataset", "glyphs", "--out-dir", str(tmp_path)])
    assert files == {file: file.read_bytes() for file in files}
    assert str(root / "report.md") in capsys.readouterr().out
    # what is finished is not trained again
    assert study.main([*argv, "--latent-dim", "1", "--binarize", "none"]).popitem()[1] == grey


def test_main_puts_the_images_on_the_device(tmp_path, monkeypatch):
    def train(run, x_train, x_val, use_compile):
        assert x_train.device.type == x_val.device.type == "meta"
        raise common.Diverged("seen")
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(common, "pick_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(common, "load_classifier", lambda data, device, real=common.load_classifier:
                        real(data, torch.device("cpu")))
    with pytest.raises(common.UserError, match="1 of 1 runs diverged"):
        study.main([*SMOKE, "--out-dir", str(tmp_path)])


def test_training_shuffles_draws_pixels_anew_and_continues_bitwise(tmp_path, monkeypatch):
    seen, real = [], study.objective

    def spy(model, x, config):
        if torch.is_grad_enabled():
            seen.append(x[:, 0, 0])
        return real(model, x, config)
    monkeypatch.setattr(study, "objective", spy)
    shade = torch.arange(300) / 300  # every pixel of an image has its own
    x = shade[:, None, None, None].expand(-1, 1, 28, 28)

    def train(name: str, **config):
        run = common.Run(tmp_path / name, {**CONFIG, "epochs": 4, **config})
        model = study.train(run, x, x[:100], False)
        return list(model.parameters()), [{**row, "seconds": 0} for row in run.history]
    train("grey", binarize="none")
    epochs = torch.cat(seen)[:, 0].view(4, 300)
    assert torch.equal(epochs.sort().values, shade.expand(4, 300))  # each image once
    assert not torch.equal(epochs[0], shade) and not torch.equal(epochs[0], epochs[1])

    seen.clear()
    weights, history = train("whole")
    epochs = torch.cat(seen).view(4, 300, 28)
    assert set(epochs.unique().tolist()) == {0.0, 1.0}
    assert len({epoch.sum().item() for epoch in epochs}) > 1  # drawn anew
    interrupt_after_epoch(2, lambda: train("parts"))
    again = train("parts")
    assert history == again[1] and all(map(torch.equal, weights, again[0]))


def test_a_loss_that_is_not_finite_stops_that_run_and_no_other(tmp_path, monkeypatch):
    real, calls = study.objective, []

    def broken(*a):
        calls.append(1)
        return real(*a) * (math.nan if len(calls) == 8 else 1)  # 5 steps, a validation
    monkeypatch.setattr(study, "objective", broken)
    with pytest.raises(common.UserError, match=r"1 of 2 runs diverged: .*1-D.*seed_0"):
        study.main([*SMOKE, "--latent-dim", "1", "2", "--epochs", "3", "--out-dir", str(tmp_path)])
    root = tmp_path / "vae_mnist/glyphs"
    assert len(next(root.glob("*1-D*/seed_0/history.csv")).read_text().splitlines()) == 2
    assert list(root.glob("*2-D*/seed_0/final_metrics.json")) and (root / "report.md").exists()


# ----------------------------------------------------------------------------------------- report


def finished(seed=0, loss=100.0, **config):
    """A finished run as the report sees it."""
    return {"config": {**CONFIG, "seed": seed, **config}, "metrics": {
        "validation": {"loss": loss}, "negative_elbo": loss - 1, "fid": 2.0, "fid_floor": 0.1,
        "likelihood": {"nll": loss - 4}, "pixel_entropy": 45.0}}


def test_rows_are_named_by_every_setting_and_the_best_by_validation():
    better = finished(0, 95.0, optimizer="adagrad")
    better["metrics"]["likelihood"]["nll"] = 99.0  # on test images it is worse
    table = study.rows([finished(0), finished(1, 98.0), better, finished(0, 80, binarize="none")])
    name = ("mlp 32", "4-D", "binarised", "ELBO", "adam 0.001")
    grey = ("mlp 32", "4-D", "grey", "ELBO", "adam 0.001")
    adagrad = (*name[:4], "adagrad 0.001")
    assert list(table) == [study.REAL, adagrad, name, grey] and list(table[name]) == [0, 1]
    assert table[name][1]["likelihood.nll"] == 94 and table[name][0]["fid_ratio"] == 20
    assert "likelihood.nll" not in table[grey][0]
    assert study.best_row(table, "binarised") == adagrad
    assert study.best_row(table, "grey") == grey and len(study.answer(table)) == 2
    for key, value in [("arch", "conv"), ("hidden", [9]), ("latent_dim", 9), ("binarize", "none"),
                       ("objective", "iwae"), ("optimizer", "adagrad"), ("lr", 1), ("epochs", 9),
                       ("batch_size", 9), ("train_size", 9), ("precision", "bfloat16")]:
        assert study.variant({**CONFIG, key: value}) != study.variant(CONFIG)


# -------------------------------------------------------------------------------------- processes


def test_a_mistake_is_a_traceback_and_ctrl_c_a_line(capsys):
    with pytest.raises(ZeroDivisionError):
        common.guard(lambda: 1 / 0)
    with pytest.raises(SystemExit, match="130"):
        common.guard(lambda: signal.raise_signal(signal.SIGINT))
    assert capsys.readouterr().err.count("\n") == 1


def test_processes_from_another_folder_and_one_that_is_terminated(tmp_path):
    def start(*argv: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, str(ROOT / "vae_mnist.py"), *SMOKE, *argv],
                                cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)
    whole = start("--latent-dim", "1")
    stopped = start("--latent-dim", "2", "--epochs", "300")
    while not list(tmp_path.rglob("*2-D*/seed_0/checkpoint.pt")) and stopped.poll() is None:
        time.sleep(0.02)
    stopped.terminate()
    _, errors = stopped.communicate(timeout=100)
    assert stopped.returncode == 143 and errors.count("\n") == 1, errors
    folder = next(tmp_path.rglob("*2-D*/seed_0/checkpoint.pt")).parent
    run = common.Run(folder, common.load_json(folder / "config.json"))
    run.restore(model=study.VAE(run.config))
    assert 1 <= len(run.history) < 300

    output, errors = whole.communicate()
    assert whole.returncode == 0, errors
    assert (tmp_path / "results/vae_mnist/glyphs/report.md").exists()
    assert "epoch 1/1" in output and "results: results" in output
