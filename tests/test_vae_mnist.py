"""The VAE script: bounds and likelihoods against oracles, runs, resume, bad input.

    pytest tests/test_vae_mnist.py
"""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import interrupt_after_epoch, numbers, refused, script
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

import common_v1 as common
import vae_mnist as study

SMOKE = ["--dataset", "glyphs", "--train-size", "1000", "--epochs", "1", "--likelihood-images", "9",
         "--hidden", "32", "--device", "cpu"]
CONFIG = {"arch": "mlp", "hidden": [32], "latent_dim": 4, "objective": "elbo", "k": 1}


@pytest.fixture(autouse=True)
def few_samples(monkeypatch, few_test_images):
    monkeypatch.setattr(study, "IMPORTANCE_SAMPLES", 500)
    monkeypatch.setattr(study, "PAIRS", 20)


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


def test_steps_are_in_bfloat16_and_near_float32_and_validation_is_not(monkeypatch):
    model, x, found = study.VAE(CONFIG), torch.rand(64, 1, 28, 28).round(), []
    for on in (False, True):
        monkeypatch.setattr(study.common, "BFLOAT16", on)
        torch.manual_seed(0)
        losses = study.objective(model, x, CONFIG)
        gradient = torch.autograd.grad(losses[0], model.decoder[0].weight)[0]
        torch.manual_seed(0)
        found.append((losses.detach(), gradient, study.losses_in_chunks(model, x, CONFIG)))
    (losses, gradient, validation), (losses_16, gradient_16, validation_16) = found
    assert losses_16.dtype == gradient_16.dtype == torch.float32
    assert validation == validation_16 and not torch.equal(gradient, gradient_16)
    assert torch.allclose(losses, losses_16, rtol=1e-2)
    assert (gradient - gradient_16).norm() < 0.05 * gradient.norm()


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_losses_are_per_image_and_do_not_depend_on_the_batch(objective, monkeypatch):
    config = {**CONFIG, "objective": objective, "k": 3}
    model, x = study.VAE(config), torch.rand(16, 1, 28, 28).round()
    monkeypatch.setattr(study.common, "BFLOAT16", False)  # its rounding may depend on the batch
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
    study.make_optimizer(name, [w], 0.1).step()
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
    optimizer = study.make_optimizer("adam", model.parameters(), 2e-3)
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
    log_px = lambda x: lambda z: study.log_likelihood(model.decoder, z, x)
    parts = list(zip(x.flatten(1).split(10), *(v.split(10) for v in q), strict=True))
    log_w = torch.cat([study.log_weights(log_px(x), *q, 5000) for x, *q in parts], 1).double()
    bounds = [log_w.mean(0)] + [study.log_mean(log_w.view(-1, k, len(x)).transpose(0, 1)).mean(0)
                                for k in (5, 50, 5000)]
    exact, checks = study.quadrature(model.decoder, x.flatten(1), 2, 6.0, 401)
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
    total = np.mean([study.losses_in_chunks(model, x, CONFIG)[0] for _ in range(200)])
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


# --------------------------------------------------------------------------------------------- runs


def test_runs_end_to_end_and_the_report_is_made_of_the_json(tmp_path):
    argv = [*SMOKE, "--out-dir", str(tmp_path)]
    metrics = study.main([*argv, "--latent-dim", "1", "2", "--binarize", "none"])
    metrics |= study.main([*argv, "--latent-dim", "2", "--optimizer", "adam", "adagrad",
                           "--seeds", "0", "1"])
    metrics |= study.main([*argv, "--latent-dim", "2", "--lr", "1e-6"])
    metrics |= study.main([*argv, "--latent-dim", "2", "--arch", "conv"])
    metrics |= study.main([*argv, "--latent-dim", "2", "--objective", "iwae", "--seeds", "0", "1"])
    assert len(metrics) == 10
    root = tmp_path / "vae_mnist/glyphs"
    one = metrics["mlp32_z1_grey_adam_0.001/seed_0"]
    assert one["pixel_entropy"] < one["test_loss"] < 784 * math.log(2)
    assert one["test_loss"] == one["negative_elbo"]
    likelihood = one["likelihood"]
    assert likelihood["exact_subset"] == pytest.approx(likelihood["nll_subset"], abs=1)
    assert one["negative_elbo"] - likelihood["nll"] == pytest.approx(likelihood["gap"])
    for name in ["decoded_line", "codes", "samples", "reconstructions", "losses", "interpolation",
                 "interpolation_confidence"]:
        assert (root / f"mlp32_z1_grey_adam_0.001/seed_0/{name}.png").stat().st_size > 2000
    for name in ["decoded_plane", "kl_per_dimension"]:
        assert (root / f"mlp32_z2_grey_adam_0.001/seed_0/{name}.png").exists()
    text = (root / "report.md").read_text()
    for words in ["adam 0.001 against adagrad 0.001", "by validation loss: 1e-06: ", "at n=2",
                  "iwae 5 against elbo 1:", "95 % interval", "Is the estimate right?"]:
        assert words in text
    before = (root / "report.md").read_bytes()
    (root / "report.md").unlink()
    study.main(["--report-only", "--out-dir", str(tmp_path)])
    assert (root / "report.md").read_bytes() == before
    folder = root / "mlp32_z2_grey_adam_0.001/seed_0"
    (folder / "best_model.pt").unlink()  # a finished run is skipped without its weights
    study.main([*argv, "--latent-dim", "2", "--binarize", "none"])
    assert not (folder / "best_model.pt").exists()


def test_an_interrupted_run_continues_bitwise(tmp_path):
    argv = [*SMOKE, "--epochs", "4", "--latent-dim", "2", "--out-dir"]
    study.main([*argv, str(tmp_path / "whole")])
    interrupt_after_epoch(2, lambda: study.main([*argv, str(tmp_path / "parts")]))
    study.main([*argv, str(tmp_path / "parts")])
    a, b = (tmp_path / d / "vae_mnist/glyphs/mlp32_z2_dynamic_adam_0.001/seed_0"
            for d in ["whole", "parts"])
    assert numbers(a) == numbers(b)
    left, right = (common.load_torch(d / "checkpoint.pt")["model"] for d in (a, b))
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
    order = first.mean((1, 2, 3)).argsort()
    assert not torch.equal(first, second) and not torch.equal(order.sort().values, order)
    total = lambda x: x.flatten(1).sum(1).sort().values
    assert not torch.equal(total(first), total(second))  # pixels are drawn anew


# ---------------------------------------------------------------------------------------- bad input


def test_a_process_from_another_folder_and_one_that_is_refused(tmp_path):
    argv = [*SMOKE, "--latent-dim", "3"]  # more than two: t-SNE
    result = script("vae_mnist.py", *argv, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results/vae_mnist/glyphs/report.md").exists()
    refused(script("vae_mnist.py", *argv, "--train-size", "59000", cwd=tmp_path), "55000")
    refused(script("vae_mnist.py", *argv, "--epochs", "2", cwd=tmp_path), "epochs = 1, not 2")


def test_a_loss_that_is_not_finite_stops_that_run_and_no_other(tmp_path, monkeypatch):
    real, calls = study.objective, []

    def broken(*a):
        calls.append(1)
        return real(*a) * (math.nan if len(calls) == 18 else 1)  # 10 steps, 5 parts of validation
    monkeypatch.setattr(study, "objective", broken)
    with pytest.raises(common.UserError, match="epoch 2, step 3"):
        study.main([*SMOKE, "--latent-dim", "1", "2", "--epochs", "3", "--out-dir", str(tmp_path)])
    root = tmp_path / "vae_mnist/glyphs"
    broken_one, other = (root / f"mlp32_z{d}_dynamic_adam_0.001/seed_0" for d in (1, 2))
    assert len(common.load_torch(broken_one / "checkpoint.pt")["history"]) == 1
    assert (other / "final_metrics.json").exists() and (root / "report.md").exists()


def run(seed=0, loss=100.0, **config):
    """A finished run as the report sees it, with only what the comparisons need."""
    settings = {"dataset": "mnist", "arch": "mlp", "hidden": [500], "latent_dim": 20,
                "binarize": "dynamic", "objective": "elbo", "k": 1, "optimizer": "adam",
                "lr": 0.001, "batch_size": 100, "epochs": 9, "train_size": 55_000, "seed": seed}
    return {"config": settings | config, "metrics": {
        "validation": {"loss": loss}, "negative_elbo": loss, "test_loss": loss,
        "likelihood": {"nll": loss - 3, "gap": 3.0, "gap_standard_error": 0.1, "n": 9},
        "pixel_entropy": 45.0, "environment": {"device": "cpu"}, "active_units": 9,
        "kl_per_dimension": [1.0, 0.01]}}


def test_comparisons_are_of_runs_that_differ_in_one_setting():
    runs = [run(seed, loss + 0.01 * seed, **config) for seed in range(3) for loss, config in [
        (100, {}), (99, {"lr": 0.003}), (96, {"hidden": [500, 500]}),
        (104, {"optimizer": "adagrad", "lr": 0.02}), (90, {"epochs": 99})]]
    groups = study.arranged(runs)
    assert len(groups) == 5 and sum("(epochs 99)" in title for title in groups) == 1
    text = " ".join(study.comparisons(groups))
    assert "mlp500-500 against mlp500: −ELBO a significant difference at n=3 (−4.00" in text
    assert "adam 0.003 against adagrad 0.02: −ELBO a significant difference at n=3 (−5.00" in text
    assert "The best is 0.003, at the edge" in text and "epochs 99" not in text


def test_only_like_is_compared_with_like():
    runs = [run(seed) for seed in range(3)]
    wide = [run(seed, 99, hidden=[400]) for seed in range(3)]
    assert "further hidden layer" not in " ".join(study.comparisons(study.arranged(runs + wide)))
    deep = [run(seed, 96, hidden=[500, 500]) for seed in range(3)]
    text = " ".join(study.comparisons(study.arranged(runs + wide + deep)))
    assert "mlp500-500 against mlp500:" in text and "against mlp400" not in text
    coarse = [run(seed, 90) for seed in range(3)]
    for r in coarse:
        r["metrics"]["bfloat16"] = True
    groups = study.arranged(runs + coarse)
    assert len(groups) == len(study.chosen(groups)) == 2 and not study.comparisons(groups)
    text = " ".join(study.comparisons(study.arranged([*runs, run(7, 96.0, lr=0.003)])))
    assert "without a seed in common: 0.001: 100.00 ± 0.00 (n=3); 0.003: 96.00 (n=1)" in text


def test_the_answer_follows_the_numbers():
    for losses, word in [([99.0] * 3, "reached"), ([101.0] * 3, "not reached"),
                         ([99.5], "reached by one seed"), ([101.0], "not reached by one seed"),
                         ([99.0, 100.0, 101.5], "not to be told from it")]:
        text = study.answer(study.arranged([run(*of) for of in enumerate(losses)]))
        assert f" against 100 (a student project, protocol not stated), {word} in 9 epochs" in text
    other = study.arranged([run(seed, 99, dataset="glyphs") for seed in range(3)])
    assert "Published" not in study.answer(other)
    grey = [run(0, 80, binarize="none", objective="iwae", k=5), run(0, 90, binarize="none")]
    assert "lowest validation loss of 1 (−ELBO) is 90.00" in study.answer(study.arranged(grey))


@pytest.mark.parametrize(("share", "words"), [(0.96, "Almost all"), (0.9, "Not almost all")])
def test_the_verdict_on_interpolation_follows_the_numbers(share, words):
    def like(share, half):
        r = run(0)
        line = [1.0] + 4 * [share] + [half] + 4 * [share] + [1.0]
        r["metrics"]["interpolation"] = {"linear": line, "spherical": line, "pixels": [0.5] * 11,
                                         "real": 0.98, "pairs": 9}
        return r
    text = study.interpolation_table({"a": [like(share, share)], "b": [like(0.6, 0.99)]})[1]
    assert text.startswith(words) and f"{100 * share:.1f} % of the images on the straight" in text
    assert text.endswith("in 0 of 2 variants.")


def test_a_folder_in_the_way_stops_a_sweep_before_it_trains(tmp_path):
    argv = [*SMOKE, "--out-dir", str(tmp_path), "--latent-dim"]
    study.main([*argv, "2"])
    root = tmp_path / "vae_mnist/glyphs"
    (root / "mlp32_z2_dynamic_adam_0.001/seed_0/checkpoint.pt").unlink()
    with pytest.raises(common.UserError, match="no weights"):
        study.main([*argv, "1", "2", "--likelihood-images", "11"])
    assert not (root / "mlp32_z1_dynamic_adam_0.001/seed_0/history.csv").exists()


def test_a_published_run_is_not_trained_again_for_more_likelihood_images(tmp_path):
    argv = [*SMOKE, "--latent-dim", "2", "--out-dir", str(tmp_path)]
    study.main(argv)
    folder = tmp_path / "vae_mnist/glyphs/mlp32_z2_dynamic_adam_0.001/seed_0"
    before = numbers(folder)
    study.main([*argv, "--likelihood-images", "5"])  # what is there is better
    assert numbers(folder) == before
    study.main([*argv, "--likelihood-images", "11"])
    after = numbers(folder)
    assert after.pop("likelihood")["n"] == 11 and before.pop("likelihood")["n"] == 9
    assert after == before
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(common.UserError, match="no weights"):
        study.main([*argv, "--likelihood-images", "12"])
