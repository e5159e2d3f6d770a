"""The VAE script: bounds and likelihoods against oracles, whole runs, resume, signals."""

import functools
import itertools
import math
import time

import common

import numpy as np
import pytest
import torch
from conftest import SMOKES, check_elbo, check_precisions, check_report, check_resume, start
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import MultivariateNormal

import vae_mnist as study

SMOKE = SMOKES["vae_mnist"]
CONFIG = {"dataset": "mnist", "arch": "mlp", "hidden": [32], "latent_dim": 4, "objective": "elbo",
          "k": 1, "binarize": "dynamic", "optimizer": "adam", "lr": 0.001, "batch_size": 100,
          "epochs": 100, "train_size": 55_000, "precision": "float32", "seed": 0}


@pytest.fixture(autouse=True)
def few_codes(monkeypatch):
    monkeypatch.setattr(study, "IMPORTANCE_SAMPLES", 500)


@pytest.mark.parametrize(("arch", "hidden", "d", "count"), [
    ("mlp", [500], 20, 815_824), ("mlp", [200, 200], 50, 425_284), ("conv", [], 64, 1_374_657)])
def test_the_published_nets_have_their_parameters(arch, hidden, d, count):
    model = study.VAE({"arch": arch, "hidden": hidden, "latent_dim": d})
    assert sum(w.numel() for w in model.parameters()) == count


def test_the_elbo_against_torch_distributions():
    model = study.VAE(CONFIG)
    model.encoder[-1].weight.data *= 30
    check_elbo(lambda x: study.objective(model, x, CONFIG), model.encode, model.to_logits)


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
@pytest.mark.parametrize("arch", ["mlp", "conv"])
def test_the_objective_on_every_device_in_both_precisions(arch, objective, device):
    config = {**CONFIG, "arch": arch, "objective": objective, "k": 3}
    model = study.VAE(config).to(device)
    x = torch.bernoulli(torch.rand(32, 1, 28, 28, device=device))
    z = torch.randn(1, 4, device=device)
    check_precisions(lambda: [study.objective(model, x, config), *model.encode(x),
                              model.to_logits(z)], list(model.parameters()), device)


@pytest.mark.parametrize(("name", "moved"), [("adam", 0.2), ("adagrad", 0.1 + 0.1 / math.sqrt(2))])
def test_two_steps_down_one_gradient_in_closed_form(name, moved):
    weight, gradient = nn.Parameter(torch.zeros(7)), torch.randn(7)
    optimizer = study.make_optimizer(name, nn.ParameterList([weight]), 0.1)
    for _ in range(2):
        weight.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(weight, -moved * gradient.sign(), atol=1e-5)


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
    # the objectives are these bounds per image, the ELBO with its KL in closed form
    for objective, bound in [("elbo", bounds[0]), ("iwae", bounds[1])]:
        config |= {"objective": objective, "k": 5}
        losses = np.mean([study.mean_losses(model, x, config) for _ in range(200)], 0)
        assert losses[0] == pytest.approx(-bound.mean().item(), abs=0.2)
        assert losses[1] + losses[2] == pytest.approx(-bounds[0].mean().item(), abs=0.2)


def test_the_exact_posterior_gives_weights_without_variance():
    x = np.random.default_rng(0).normal(size=(400, 12)) @ np.diag(np.linspace(3, 0.3, 12))
    pca = PCA(3).fit(x)
    s2 = pca.noise_variance_
    w = torch.from_numpy(pca.components_.T * np.sqrt(pca.explained_variance_ - s2))  # (12, 3)
    m = w.square().sum(0) + s2  # W^T W + s2 I, diagonal: columns of W are orthogonal
    x, mean = torch.from_numpy(x[:50]), torch.from_numpy(pca.mean_)
    mu, logvar = (x - mean) @ w / m, (s2 / m).log().expand(50, 3)

    def log_px(z):
        return MultivariateNormal(mean, s2 * torch.eye(12).double()).log_prob(x - z @ w.T)
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


def test_runs_end_to_end_and_the_report_is_made_of_the_files(tmp_path, small_sets):
    argv = [*SMOKE, "--out-dir", str(tmp_path)]
    on_a_line = [*argv, "--latent-dim", "1", "--binarize", "none"]
    metrics = study.main(on_a_line)
    (grey,) = metrics.values()
    study.main([*argv, "--latent-dim", "2", "--optimizer", "adam", "adagrad"])
    study.main([*argv, "--latent-dim", "3", "--arch", "conv", "--objective", "iwae", "--k", "2",
                "--precision", "bfloat16", "--train-size", "100",
                "--likelihood-images", "2"])  # the slowest: a single step
    likelihood = grey["likelihood"]
    assert grey["pixel_entropy"] < grey["negative_elbo"] < 784 * math.log(2)
    assert likelihood["exact_subset"] == pytest.approx(likelihood["nll_subset"], abs=1)
    assert grey["negative_elbo"] - likelihood["nll"] == pytest.approx(likelihood["gap"])
    for name, count in [("codes", 4), ("samples", 4), ("interpolation", 4), ("decoded", 3)]:
        assert len(list(tmp_path.glob(f"vae_mnist/glyphs/*/*/{name}.png"))) == count
    check_report(study, tmp_path, on_a_line, metrics)


def test_main_puts_the_images_on_the_device(tmp_path, monkeypatch, small_sets, classifier):
    def train(run, x_train, x_val, use_compile):
        assert x_train.device.type == x_val.device.type == "meta"
        raise common.Diverged("seen")
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(common, "pick_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(common, "load_classifier", lambda data, device: classifier)
    with pytest.raises(common.UserError, match="1 of 1 runs diverged"):
        study.main([*SMOKE, "--out-dir", str(tmp_path)])


def test_training_draws_pixels_anew_and_continues_bitwise(tmp_path, monkeypatch):
    sums, real = [], study.objective

    def spy(model, x, config):
        if torch.is_grad_enabled():
            sums.append(x.sum().item())
            assert set(x.unique().tolist()) == {0.0, 1.0}
        return real(model, x, config)
    monkeypatch.setattr(study, "objective", spy)
    x = torch.rand(300, 1, 28, 28)

    def train(folder):
        study.train(common.Run(folder, {**CONFIG, "epochs": 4}), x, x[:100], False)
    check_resume(tmp_path, train, after_epoch=2)
    epochs = torch.tensor(sums[:12]).view(4, 3).sum(1)
    assert len(epochs.unique()) == 4  # fixed pixels would have the same sum in every order


def test_a_loss_that_is_not_finite_stops_that_run_and_no_other(tmp_path, monkeypatch, small_sets):
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


def test_processes_from_another_folder_and_one_that_is_terminated(tmp_path):
    # what the user has set for figures, and a locale that cannot spell the folder's name
    settings = {"MPLBACKEND": "Qt4Agg", "LC_ALL": "C", "PYTHONUTF8": "0",
                "PYTHONCOERCECLOCALE": "0", "MATPLOTLIBRC": str(tmp_path)}
    (tmp_path / "matplotlibrc").write_text("text.usetex: True")
    whole = start("vae_mnist.py", *SMOKE, "--latent-dim", "1", "--out-dir", "ü", cwd=tmp_path,
                  **settings)
    stopped = start("vae_mnist.py", *SMOKE, "--latent-dim", "2", "--epochs", "300", cwd=tmp_path)
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
    assert (tmp_path / "ü/vae_mnist/glyphs/report.md").exists() and "epoch 1/1" in output


def test_the_best_row_is_that_of_validation_and_every_setting_names_its_folder():
    adam, adagrad = (("mlp 500", "20-D", "binarised", "ELBO", name) for name in ["adam", "adagrad"])
    table = {study.REAL: {None: {}}, adam: {0: {"validation.loss": 99.0, "likelihood.nll": 91.0}},
             adagrad: {0: {"validation.loss": 100.0, "likelihood.nll": 90.0}}}
    assert study.best_row(table, "binarised") == adam and study.best_row(table, "grey") is None
    for key, value in [("arch", "conv"), ("hidden", [9]), ("latent_dim", 9), ("binarize", "none"),
                       ("objective", "iwae"), ("optimizer", "adagrad"), ("lr", 1), ("epochs", 9),
                       ("batch_size", 9), ("train_size", 9), ("precision", "bfloat16")]:
        assert study.variant({**CONFIG, key: value}) != study.variant(CONFIG)
