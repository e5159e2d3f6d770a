"""The VAE script: bounds and likelihoods against oracles, whole runs, resume, bad input.

    pytest tests/test_vae_mnist.py
"""

import copy
import itertools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, interrupt_after_epoch, numbers, refused, script
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

import common
import vae_mnist as study

SMOKE = ["--dataset", "glyphs", "--train-size", "1000", "--epochs", "1", "--likelihood-images", "9",
         "--hidden", "32", "--device", "cpu"]
CONFIG = {"arch": "mlp", "hidden": [32], "latent_dim": 4, "objective": "elbo", "k": 1,
          "binarize": "dynamic", "optimizer": "adam"}


@pytest.fixture(autouse=True)
def few_samples(monkeypatch, few_test_images):
    monkeypatch.setattr(study, "IMPORTANCE_SAMPLES", 500)
    monkeypatch.setattr(study, "N_PAIRS", 20)


# --------------------------------------------------------------------------------- model, objective


@pytest.mark.parametrize(("arch", "hidden", "d", "count"), [
    ("mlp", [500], 20, 815_824), ("mlp", [500], 1, 787_286), ("mlp", [500], 2, 788_788),
    ("mlp", [500], 64, 881_912), ("mlp", [500, 500], 20, 1_316_824),
    ("mlp", [200, 200], 50, 425_284), ("conv", [], 20, 1_340_777), ("conv", [], 64, 1_374_657)])
def test_the_published_nets_have_their_parameters(arch, hidden, d, count):
    model = study.VAE({"arch": arch, "hidden": hidden, "latent_dim": d})
    assert sum(w.numel() for w in model.parameters()) == count


@pytest.mark.parametrize("arch", ["mlp", "conv"])
def test_shapes_and_ranges(arch):
    model = study.VAE({**CONFIG, "arch": arch})
    mu, logvar = model.encode(torch.rand(3, 1, 28, 28))
    x = model.decode(mu)
    assert mu.shape == logvar.shape == (3, 4) and x.shape == (3, 1, 28, 28)
    assert x.min() > 0 and x.max() < 1


def test_kl_and_log_likelihood_against_torch_distributions():
    mu, logvar = 3 * torch.randn(64, 5), 4 * torch.randn(64, 5)
    want = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    assert torch.allclose(study.kl_per_dimension(mu, logvar), want, rtol=1e-4, atol=1e-5)
    decoder, x, z = nn.Linear(5, 12), torch.rand(8, 12).round(), torch.randn(3, 8, 5)
    want = Bernoulli(logits=decoder(z)).log_prob(x).sum(-1)
    assert torch.allclose(study.log_likelihood(decoder, z, x), want, atol=1e-4)


def test_bfloat16_is_near_float32_and_losses_stay_float32():
    model, x, found = study.VAE(CONFIG), torch.rand(64, 1, 28, 28).round(), []
    for on in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, on):
            losses = study.objective(model, x, CONFIG)
        found.append((losses.detach(), torch.autograd.grad(losses[0], model.decoder[0].weight)[0]))
    (losses, gradient), (losses_16, gradient_16) = found
    assert losses_16.dtype == gradient_16.dtype == torch.float32
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


def test_a_compiled_objective_trains_like_the_eager_one(monkeypatch):
    def without_code_generation(function, real=torch.compile, **k):  # which takes half a minute
        return real(function, backend="eager")
    monkeypatch.setattr(torch, "compile", without_code_generation)
    model, x, found = study.VAE(CONFIG), torch.rand(10, 1, 28, 28), []
    for on in (False, True):
        torch.manual_seed(0)
        losses = common.compiled(study.objective, on, torch.device("cpu"))(model, x, CONFIG)
        found.append(torch.autograd.grad(losses[0], list(model.parameters())))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_losses_are_per_image_and_do_not_depend_on_the_batch(objective, monkeypatch):
    config = {**CONFIG, "objective": objective, "k": 3}
    model, x = study.VAE(config), torch.rand(16, 1, 28, 28).round()
    noise = torch.randn(3, 16, 4)
    parts = []
    for half in (0, 1):  # the same noise for an image, whatever batch it is in
        mine = noise.chunk(2, 1)[half]
        monkeypatch.setattr(torch, "randn_like", lambda mu, mine=mine: mine[0])
        monkeypatch.setattr(torch, "randn", lambda *a, mine=mine, **k: mine)
        parts.append(study.objective(model, x.chunk(2)[half], config))
    monkeypatch.setattr(torch, "randn_like", lambda mu: noise[0])
    monkeypatch.setattr(torch, "randn", lambda *a, **k: noise)
    whole = study.objective(model, x, config)
    assert torch.allclose(whole, (parts[0] + parts[1]) / 2, rtol=1e-5)
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


@pytest.fixture(scope="module")
def trained(data):
    """A small two-dimensional VAE after a minute at most, and 100 binarised test images."""
    config = {**CONFIG, "hidden": [128], "latent_dim": 2, "binarize": "dynamic"}
    torch.manual_seed(0)
    model = study.VAE(config)
    optimizer = study.make_optimizer("adam", model, 2e-3)
    for _ in range(2):
        for x in data.x_train[torch.randperm(20_000)].split(100):
            loss = study.objective(model, torch.bernoulli(x), config)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False), study.binarize(data.x_test[:100], "test")


def test_elbo_iwae_and_exact_are_in_order(trained):
    model, x = trained
    q = model.encode(x)
    log_px = lambda x: lambda z: study.log_likelihood(model.to_logits, z, x)
    parts = list(zip(x.flatten(1).split(10), *(v.split(10) for v in q), strict=True))
    log_w = torch.cat([study.log_weights(log_px(x), *q, 5000) for x, *q in parts], 1).double()
    bounds = [log_w.mean(0)]
    for k in (5, 50, 5000):
        bounds.append(study.log_mean_weight(log_w.view(-1, k, len(x)).transpose(0, 1)).mean(0))
    exact, checks = study.quadrature(model.to_logits, x.flatten(1), 2, 6.0, 401)
    assert checks["refinement_change"] < 1e-3 and checks["outer_mass"] < 1e-3
    for loose, tight in itertools.pairwise([*bounds, exact]):
        difference = tight - loose
        assert difference.mean() > -3 * difference.std() / math.sqrt(len(x))
    assert (bounds[1] - bounds[0]).mean() > 0.05  # the bound hides something
    found = study.estimate_likelihood(model, x, 2, 0.0)
    assert found["nll_subset"] == pytest.approx(-exact.mean().item(), abs=0.05)
    assert found["exact_subset"] == pytest.approx(-exact.mean().item(), abs=0.01)
    assert found["gap"] == pytest.approx((exact - bounds[0]).mean().item(), abs=0.1)
    assert 50 < found["ess_median"] <= 5000
    lost = copy.deepcopy(model)  # an encoder that says the same of every image
    lost.encoder[-1].weight.zero_()
    again = study.estimate_likelihood(lost, x, 2, 0.0)
    assert again["nll_subset"] == pytest.approx(-exact.mean().item(), abs=0.2)
    torch.manual_seed(1)  # the closed-form KL and the sampled one agree
    total = np.mean([study.mean_losses(model, x, CONFIG)[0] for _ in range(200)])
    assert total == pytest.approx(-bounds[0].mean().item(), abs=0.1)


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
def test_probabilities_of_all_images_of_12_pixels_sum_to_1(d):
    decoder = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, 12)).requires_grad_(False)
    decoder[2].weight *= 3
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=12)))
    log_px, checks = study.quadrature(decoder, x, d, 8.0, 201)
    assert log_px.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert checks["refinement_change"] < 1e-3 and checks["outer_mass"] < 1e-3
    log_px, checks = study.quadrature(decoder, x, d, 1.5, 201)
    assert log_px.exp().sum() < 0.9 and checks["outer_mass"] > 0.1  # a range too short is seen


def test_spherical_interpolation():
    a, b, t = torch.randn(50, 6), torch.randn(50, 6), torch.linspace(0, 1, 5)
    path = study.slerp(a, b, t)
    assert torch.allclose(path[:, 0], a, atol=1e-5) and torch.allclose(path[:, -1], b, atol=1e-5)
    unit = study.slerp(nn.functional.normalize(a), nn.functional.normalize(b), t)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(50, 5), atol=1e-5)
    assert torch.allclose(study.slerp(a[:, :1], b[:, :1], t), study.lerp(a[:, :1], b[:, :1], t))
    flat = study.slerp(a[:, :2], b[:, :2], t).norm(dim=-1)
    longest = torch.maximum(a[:, :2].norm(dim=1), b[:, :2].norm(dim=1))
    assert (flat <= longest[:, None] + 1e-4).all()  # nearly opposite codes do not fly away


# -------------------------------------------------------------------------------------------- runs


def test_runs_end_to_end_and_the_report_is_made_of_the_files(tmp_path, capsys):
    argv = [*SMOKE, "--out-dir", str(tmp_path)]
    metrics = study.main([*argv, "--latent-dim", "1", "2", "--binarize", "none"])
    metrics |= study.main([*argv, "--latent-dim", "2", "--optimizer", "adam", "adagrad",
                           "--seeds", "0", "1"])
    metrics |= study.main([*argv, "--latent-dim", "3", "--arch", "conv", "--objective", "iwae",
                           "--precision", "bfloat16"])
    root = tmp_path / "vae_mnist/glyphs"
    assert len(metrics) == 7 == len(list(root.glob("*/*/final_metrics.json")))
    grey = metrics["mlp-32_1-D_grey_ELBO_adam-0.001-epochs1-n1000/seed_0"]
    assert grey["pixel_entropy"] < grey["negative_elbo"] < 784 * math.log(2)
    likelihood = grey["likelihood"]
    assert likelihood["exact_subset"] == pytest.approx(likelihood["nll_subset"], abs=1)
    assert grey["negative_elbo"] - likelihood["nll"] == pytest.approx(likelihood["gap"])
    assert {"real", "pixels"} <= set(grey["interpolation"])
    for name, run in metrics.items():  # grey pixels say nothing of codes of binarised images
        assert "grey" in name or set(run["interpolation"]) == {"pairs", "linear", "spherical"}
    for name in ["codes", "samples", "losses", "interpolation"]:
        pictures = list(root.glob(f"*/*/{name}.png"))
        assert len(pictures) == 7 and all(file.stat().st_size > 2000 for file in pictures)
    assert len(list(root.glob("*/*/decoded.png"))) == 6

    files = {file: file.read_bytes() for file in [*root.glob("*.md"), *root.glob("*.csv")]}
    for file in files:
        file.unlink()
    capsys.readouterr()
    study.main(["--report-only", "--dataset", "glyphs", "--out-dir", str(tmp_path)])
    assert len(files) == 2 and files == {file: file.read_bytes() for file in files}
    assert str(root / "report.md") in capsys.readouterr().out
    assert study.main([*argv, "--latent-dim", "1", "--binarize", "none"]).popitem()[1] == grey


def test_an_interrupted_run_continues_bitwise(tmp_path):
    argv = [*SMOKE, "--epochs", "4", "--latent-dim", "2", "--out-dir"]
    study.main([*argv, str(tmp_path / "whole")])
    interrupt_after_epoch(2, lambda: study.main([*argv, str(tmp_path / "parts")]))
    study.main([*argv, str(tmp_path / "parts")])
    a, b = (next((tmp_path / d).glob("vae_mnist/glyphs/*/seed_0")) for d in ["whole", "parts"])
    assert numbers(a) == numbers(b)
    left, right = (torch.load(d / "checkpoint.pt")["model"] for d in (a, b))
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_batches_are_shuffled_and_drawn_anew_in_every_epoch(tmp_path, monkeypatch):
    seen, real = [], study.objective

    def spy(model, x, config):
        if torch.is_grad_enabled():
            seen.append(x.clone())
        return real(model, x, config)
    monkeypatch.setattr(study, "objective", spy)
    study.main([*SMOKE, "--epochs", "2", "--latent-dim", "2", "--out-dir", str(tmp_path)])
    first, second = torch.cat(seen[:10]), torch.cat(seen[10:])
    assert len(first) == 1000 and set(first.unique().tolist()) == {0.0, 1.0}
    ink = first.mean((1, 2, 3))
    assert not torch.equal(first, second) and not torch.equal(ink.sort().values, ink)
    total = lambda x: x.flatten(1).sum(1).sort().values
    assert not torch.equal(total(first), total(second))  # pixels are drawn anew


def test_more_epochs_and_copied_folders_do_not_collide(tmp_path):
    argv = [*SMOKE, "--latent-dim", "2", "--out-dir", str(tmp_path)]
    names = {*study.main(argv), *study.main([*argv, "--epochs", "2"])}
    assert len(names) == 2


def test_a_loss_that_is_not_finite_stops_that_run_and_no_other(tmp_path, monkeypatch):
    real, calls = study.objective, []

    def broken(*a):
        calls.append(1)
        return real(*a) * (math.nan if len(calls) == 18 else 1)  # 10 steps, 5 parts of validation
    monkeypatch.setattr(study, "objective", broken)
    with pytest.raises(common.UserError, match=r"1 of 2 runs diverged: .*1-D.*seed_0"):
        study.main([*SMOKE, "--latent-dim", "1", "2", "--epochs", "3", "--out-dir", str(tmp_path)])
    root = tmp_path / "vae_mnist/glyphs"
    assert len(next(root.glob("*1-D*/seed_0/history.csv")).read_text().splitlines()) == 2
    assert list(root.glob("*2-D*/seed_0/final_metrics.json")) and (root / "report.md").exists()


# ----------------------------------------------------------------------------------------- report


def run(seed=0, loss=100.0, **config):
    """A finished run as the report sees it."""
    settings = {"dataset": "mnist", "arch": "mlp", "hidden": [500], "latent_dim": 20,
                "binarize": "dynamic", "objective": "elbo", "k": 1, "optimizer": "adam",
                "lr": 0.001, "batch_size": 100, "epochs": 100, "train_size": 55_000, "seed": seed,
                "precision": "float32"}
    return {"config": settings | config, "metrics": {
        "validation": {"loss": loss}, "negative_elbo": loss - 1, "fid": 2.0, "fid_floor": 0.1,
        "likelihood": {"nll": loss - 4}, "pixel_entropy": 45.0,
        "interpolation": {"linear": [0.9, 0.5, 0.9], "spherical": [0.9, 0.6, 0.9]}}}


def test_rows_are_named_by_every_setting_and_numbers_are_those_of_the_json():
    copy = run(0)  # a copied folder is not another seed
    table = study.rows([run(0), copy, run(1, 98.0), run(0, 90.0, epochs=50),
                        run(0, 80, binarize="none")])
    assert [len(seeds) for seeds in table.values()] == [1, 2, 1, 1]
    name = ("mlp 500", "20-D", "binarised", "ELBO", "adam 0.001")
    assert set(table) == {study.REAL, name, (*name[:4], "adam 0.001 epochs50"),
                          ("mlp 500", "20-D", "grey", "ELBO", "adam 0.001")}
    assert table[name][1]["likelihood.nll"] == 94 and table[name][0]["fid_ratio"] == 20
    assert table[name][0]["published"] == "−ELBO 100"
    assert "likelihood.nll" not in table["mlp 500", "20-D", "grey", "ELBO", "adam 0.001"][0]


def test_the_best_is_named_by_validation_alone():
    better = run(0, 95.0, optimizer="adagrad")
    better["metrics"]["likelihood"]["nll"] = 99.0  # on test images it is worse
    table = study.rows([run(0), run(1), better, run(0, 80, binarize="none")])
    assert [name[-1] for name in study.best_rows(table)] == ["adagrad 0.001", "adam 0.001"]
    assert 1 <= len(study.answer(table)) <= 6


# ------------------------------------------------------------------------------ bad input, faults


def test_a_process_from_another_folder_and_one_that_is_refused(tmp_path):
    argv = [*SMOKE, "--latent-dim", "3"]  # more than two: t-SNE
    result = script("vae_mnist.py", *argv, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results/vae_mnist/glyphs/report.md").exists()
    assert "epoch 1/1" in result.stdout and "results: results" in result.stdout
    refused(script("vae_mnist.py", *argv, "--train-size", "59000", cwd=tmp_path), "55000")


def test_a_mistake_in_the_code_is_a_traceback():
    with pytest.raises(FileNotFoundError):
        common.guard(lambda: Path("/no/such/file").read_text())


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_the_same_command_continues(tmp_path, sent):
    argv = [*SMOKE, "--latent-dim", "2", "--epochs", "3", "--out-dir", str(tmp_path / "killed")]
    heard = lambda: signal.signal(sent, signal.SIG_DFL)  # a job in the background ignores Ctrl-C
    process = subprocess.Popen([sys.executable, str(ROOT / "vae_mnist.py"), *argv], text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, preexec_fn=heard)
    while not list(tmp_path.rglob("checkpoint.pt")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + sent and errors.count("\n") == 1, errors
    study.main(argv)
    study.main([*argv[:-1], str(tmp_path / "whole")])
    a, b = (next((tmp_path / d).glob("vae_mnist/glyphs/*/seed_0")) for d in ["killed", "whole"])
    assert numbers(a) == numbers(b)


def test_after_kill_9_the_same_command_continues(tmp_path):
    argv = [*SMOKE, "--latent-dim", "2", "--epochs", "300", "--out-dir", str(tmp_path)]
    process = subprocess.Popen([sys.executable, str(ROOT / "vae_mnist.py"), *argv],
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(tmp_path.rglob("checkpoint.pt")) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    folder = next(tmp_path.rglob("checkpoint.pt")).parent
    run = common.Run(folder, json.loads((folder / "config.json").read_text()))
    run.restore(model=study.VAE(run.config))
    assert 1 <= len(run.history) < 300
