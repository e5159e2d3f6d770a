"""Latent optimisation: bounds and proposals against closed forms, runs, resume, bad input.

    pytest tests/test_latent_opt.py
"""

import csv
import math

import numpy as np
import pytest
import torch
from conftest import interrupt_after_epoch, numbers, refused, script
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import common_v1 as common
import latent_opt as study

SMOKE = ["--dataset", "glyphs", "--train-size", "300", "--epochs", "1", "--test-images", "20",
         "--codes", "100", "--latent-dim", "12", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_steps(request, monkeypatch, few_test_images):
    """Whole runs need not infer well."""
    if "tmp_path" in request.fixturenames:
        monkeypatch.setattr(study, "INFERENCE_STEPS", 40)


def proposal(decoder, x, mu, **options):
    return common.laplace(lambda z: decoder(z).flatten(1), x.flatten(1), mu,
                          lambda x_hat, x: (x - x_hat) / 0.4**2,
                          lambda x_hat: torch.full_like(x_hat, 1 / 0.4**2), **options)


class Linear(nn.Module):
    """A linear decoder of 784 pixels with its exact posterior: probabilistic PCA, float64."""

    def __init__(self, d: int, sigma: float):
        super().__init__()
        self.w = nn.Parameter(0.1 * torch.randn(784, d).double(), requires_grad=False)
        self.offset, self.sigma = torch.rand(784).double(), sigma

    def forward(self, z):
        return (z @ self.w.T + self.offset).view(-1, 1, 28, 28)

    def log_px(self, x):
        cov = self.w @ self.w.T + self.sigma**2 * torch.eye(784).double()
        return MultivariateNormal(self.offset, cov).log_prob(x.flatten(1))

    def precision(self):
        return torch.eye(self.w.shape[1]).double() + self.w.T @ self.w / self.sigma**2

    def mode(self, x):
        right = (x.flatten(1) - self.offset) @ self.w / self.sigma**2
        return torch.linalg.solve(self.precision(), right.T).T


# ---------------------------------------------------------------------------------- closed forms


def test_sigma_is_a_standard_deviation_and_the_constant_is_there():
    x = torch.rand(3, 1, 28, 28)
    perfect = study.log_likelihood(x, x, 0.4)
    assert torch.allclose(perfect, torch.tensor(-2.076), atol=1e-3)  # -361.26 were it the variance
    want = Normal(torch.zeros(784), 0.4).log_prob(x.flatten(1)).sum(1)
    got = study.log_likelihood(torch.zeros(3, 1, 28, 28), x, 0.4)
    assert torch.allclose(got, want, rtol=1e-5)


def test_kl_against_torch_distributions():
    mu, logvar = 3 * torch.randn(16, 5), 4 * torch.randn(16, 5)
    want = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(study.kl_nats(mu, logvar), want, rtol=1e-4)


def test_laplace_is_exact_for_a_linear_decoder_at_200_dimensions():
    decoder = Linear(200, 0.4)
    x = decoder(torch.randn(4, 200).double()) + 0.4 * torch.randn(4, 1, 28, 28).double()
    zero = torch.zeros(4, 200).double()
    mode, factor = proposal(decoder, x, zero, widen=1)
    assert torch.allclose(mode, decoder.mode(x), atol=1e-6)
    assert torch.allclose(factor @ factor.mT, decoder.precision().expand(4, -1, -1), atol=1e-8)
    want = decoder.log_px(x)
    log_likelihood = lambda z: study.log_likelihood(
        decoder(z.flatten(0, 1)), x.repeat(len(z), 1, 1, 1), 0.4).view(z.shape[:2])
    got, ess = common.importance_sampling(log_likelihood, mode, factor, 20, prior=0)
    assert torch.allclose(got, want, atol=1e-6)
    assert torch.allclose(ess, torch.tensor(20.0).double(), rtol=1e-6)
    got, ess = study.log_px(decoder, x, mode, 0.4, 5000)
    assert torch.allclose(got, want, atol=0.3) and ess.min() > 100


def test_log_p_of_a_nonlinear_decoder_against_quadrature():
    decoder = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 784), nn.Sigmoid(),
                            nn.Unflatten(1, (1, 28, 28))).requires_grad_(False).eval()
    decoder[0].weight *= 3
    decoder[2].weight *= 3
    x = decoder(torch.randn(5, 1)) + 0.4 * torch.randn(5, 1, 28, 28)
    grid = torch.linspace(-7, 7, 20_001)[:, None]
    x_hat = decoder(grid)
    log_prior = Normal(0.0, 1.0).log_prob(grid[:, 0]).double()
    want = torch.stack([(study.log_likelihood(x_hat, image[None], 0.4).double()
                         + log_prior).logsumexp(0) + math.log(14 / 20_000) for image in x])
    zero = torch.zeros(5, 1)
    q = study.infer(decoder, x, zero, zero, 0.4)
    got, _ = study.log_px(decoder, x, q[0], 0.4, 5000)
    assert torch.allclose(got, want, atol=0.1)
    assert (study.elbo(decoder, x, *q, 0.4) < want + 0.1).all()


def test_the_optimised_gaussian_is_the_best_one_and_bounds_log_p():
    decoder = Linear(3, 0.4).eval()
    x = decoder(torch.randn(6, 3).double())
    zero = torch.zeros(6, 3).double()
    mu, logvar = study.infer(decoder, x, zero, zero, 0.4)
    assert torch.allclose(mu, decoder.mode(x), atol=0.05)
    best = -decoder.precision().diagonal().log()  # the reverse KL's diagonal Gaussian
    assert torch.allclose(logvar, best.expand(6, 3), atol=0.1)
    bound, start = (study.elbo(decoder, x, *q, 0.4) for q in [(mu, logvar), (zero, zero)])
    assert (bound > start).all() and (bound < decoder.log_px(x) + 0.3).all()


def test_the_pca_start_is_the_posterior_of_probabilistic_pca():
    w = 3 * torch.linalg.qr(torch.randn(784, 2))[0]
    x = (torch.randn(4000, 2) @ w.T + 0.4 * torch.randn(4000, 784)).view(-1, 1, 28, 28)
    mu, logvar = study.pca_posterior(x, 4, 0.4)(x)
    want = math.log(0.16 / (9 + 0.16))
    assert logvar[0, :2].tolist() == pytest.approx([want, want], abs=0.15)
    assert mu[:, :2].var(0).tolist() == pytest.approx([1, 1], abs=0.15)  # less the posterior's


# ---------------------------------------------------------------------------------- latents, rows


def test_row_adam_is_adam_and_touches_only_its_rows():
    table, gradients = torch.randn(5, 3), torch.randn(4, 2, 3)
    mine = study.RowAdam(table.clone(), 0.01)
    theirs = nn.Parameter(table[[1, 3]].clone())
    adam = torch.optim.Adam([theirs], lr=0.01)
    for gradient in gradients:
        mine.step(torch.tensor([1, 3]), gradient)
        theirs.grad = gradient
        adam.step()
    assert torch.allclose(mine.table[[1, 3]], theirs, atol=1e-6)
    others = [0, 2, 4]
    assert torch.equal(mine.table[others], table[others])
    assert not mine.mean[others].any() and not mine.count[others].any()


def test_inference_leaves_the_decoder_and_depends_on_no_batch_mate():
    decoder = study.Decoder(8).eval().requires_grad_(False)
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    x, zero = torch.rand(6, 1, 28, 28), torch.zeros(6, 8)
    together = study.infer(decoder, x, zero, zero, 0.4, steps=40)
    alone = study.infer(decoder, x[2:3], zero[:1], zero[:1], 0.4, steps=40)
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a[2:3], b, atol=1e-3)
    few = (proposal(decoder, x[i], zero[i]) for i in [slice(None), slice(2, 3)])
    for a, b in zip(*few, strict=True):
        assert torch.allclose(a[2:3], b, atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in decoder.state_dict().items())
    with pytest.raises(AssertionError, match="eval mode"):
        study.infer(decoder.train(), x, zero, zero, 0.4, steps=1)


def test_both_models_start_from_the_same_decoder(tmp_path, monkeypatch):
    args = study.parse_args([*SMOKE, "--lr", "1e-30", "--latent-lr", "1e-30"])
    config = study.grid(args, "glyphs")[0]
    x = torch.rand(64, 1, 28, 28)
    vae, latent = (study.train(kind, config, x, x, tmp_path, args)[0].state_dict()
                   for kind in study.MODELS)
    assert all(torch.equal(vae[k], latent[k]) for k in vae)


def test_the_training_images_are_stratified(data):
    config = {"train_size": 20_000, "seed": 1}
    part = study.split(data, config, 1000)
    assert data.y_test[part["test"]].tolist() == sorted([*range(10)] * 100)
    assert data.y_train[part["train"]].bincount().tolist() == [2000] * 10
    assert len(set(part["train"].tolist()) | set(part["val"].tolist())) == 25_000
    assert not torch.equal(part["train"], study.split(
        data, {**config, "seed": 2}, 1000)["train"])
    with pytest.raises(common.UserError, match="need 0 of class"):
        study.split(data, {**config, "train_size": 9}, 1000)


# --------------------------------------------------------------------------------------------- runs


def test_a_run_end_to_end_writes_what_it_should(tmp_path):
    argv = [*SMOKE, "--epochs", "2", "--seeds", "0", "1", "--out-dir", str(tmp_path)]
    metrics = study.main(argv)
    root = tmp_path / "latent_opt/glyphs"
    folder = root / "d12_sigma0.4/seed_0"
    for epoch in (1, 2):
        for name in ["recon", "latent_opt_recon", "samples", "comparison"]:
            assert (folder / f"{name}_epoch_{epoch}.png").stat().st_size > 2000
        assert (folder / f"vae_epoch_{epoch}.pt").exists()
        assert (folder / f"latent_opt_epoch_{epoch}.pt").exists()
    assert (folder / "training_curves.png").exists()
    values = np.load(folder / "log_probabilities.npy")
    assert values.shape == (2, 10, 2) and values.dtype == np.float64
    assert np.isfinite(values).all() and (values <= -2.076).all()
    with open(folder / "log_probabilities.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert sorted(float(r["vae_log_px"]) for r in rows) == pytest.approx(
        sorted(values[0].flatten()), abs=1e-4)
    for model in metrics["d12_sigma0.4/seed_0"]["models"].values():
        for gaps in model["gaps"].values():
            assert gaps["elbo"]["mean"] >= gaps["start"]["mean"] - 0.5
            assert gaps["log_px"]["mean"] >= gaps["elbo"]["mean"] - 1
    text = (root / "report.md").read_text()
    assert "no significant difference at n=2" in text or "significant difference at n=2" in text
    before = (root / "report.md").read_bytes()
    (root / "report.md").unlink()
    study.main(["--report-only", "--out-dir", str(tmp_path)])
    assert (root / "report.md").read_bytes() == before


def test_an_interrupted_run_continues_bitwise(tmp_path):
    argv = [*SMOKE, "--epochs", "3", "--out-dir"]
    study.main([*argv, str(tmp_path / "whole")])
    interrupt_after_epoch(1, lambda: study.main([*argv, str(tmp_path / "parts")]))
    interrupt_after_epoch(3, lambda: study.main([*argv, str(tmp_path / "parts")]))  # latents, 1
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):  # in evaluation
        patch.setattr(study, "save_log_probabilities", lambda *a: 1 / 0)
        study.main([*argv, str(tmp_path / "parts")])
    study.main([*argv, str(tmp_path / "parts")])
    a, b = (tmp_path / d / "latent_opt/glyphs/d12_sigma0.4/seed_0" for d in ["whole", "parts"])
    assert numbers(a) == numbers(b)
    left, right = (common.load_torch(d / "latent_opt/checkpoint.pt")["inference"] for d in (a, b))
    assert all(torch.equal(left[k], right[k]) for k in ["table", "mean", "square", "count"])


def test_a_step_touches_the_latents_of_its_batch_alone(tmp_path):
    args = study.parse_args(["--latent-dim", "3", "--epochs", "1", "--batch-size", "4"])
    config = study.grid(args, "glyphs")[0]
    x, tables = torch.rand(8, 1, 28, 28), []
    start = torch.cat(study.pca_posterior(x, 3, 0.4)(x), 1)
    step = study.RowAdam.step

    def watched(self, rows, gradient):
        before = self.table.clone()
        step(self, rows, gradient)
        changed = (self.table != before).any(1)
        tables.append((sorted(rows.tolist()), changed.nonzero()[:, 0].tolist()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.RowAdam, "step", watched)
        study.train("latent_opt", config, x, x, tmp_path, args)
    assert len(tables) == 4 and all(rows == changed for rows, changed in tables)
    assert len({tuple(rows) for rows, _ in tables}) == 2 and tables[0][0] != [0, 1, 2, 3]
    assert start.shape == (8, 6)


def test_the_mean_of_a_digit_with_a_control_covers_the_truth():
    errors, plain, said = [], [], []
    for _ in range(300):
        control = 20 * torch.randn(1000).double()
        values = 0.8 * control + 4 * torch.randn(1000).double() - 50  # the truth: -50
        of = study.digit_mean(values[:100], control[:100], control)
        errors.append(of["mean"] + 50)
        said.append(of["se"])
        plain.append(float(values[:100].mean()) + 50)
    assert np.std(errors) == pytest.approx(np.mean(said), rel=0.15)
    assert np.std(errors) < 0.6 * np.std(plain) and abs(np.mean(errors)) < 0.2


@pytest.mark.parametrize("planted", [0.0, 3.0])
def test_the_digit_counts_beyond_ink_only_where_it_does(planted):
    y, ink = torch.arange(10).repeat(100), 100 + 20 * torch.rand(1000)
    log_px = -0.01 * ink.square() + torch.randn(1000) + planted * (y == 4)
    found = study.ink_test(ink, y, log_px)
    assert (found["p"] < 1e-6) == bool(planted) and found["r2_ink"] > 0.9
    assert 1 >= found["r2_both"] >= max(found["r2_ink"], found["r2_digit"]) and found["slope"] < 0
    few = torch.arange(10).repeat(2)  # as many images as columns: nothing can be told
    assert study.ink_test(ink[:20], few, log_px[:20])["p"] == 1


def test_the_error_of_a_stratified_mean_is_that_within_the_strata():
    y = torch.arange(10).repeat_interleave(100)
    found, zero = [], torch.zeros(1000)
    for _ in range(300):
        values = 5.0 * y + torch.randn(1000)
        found.append(study.gaps({"start": zero, "elbo": zero, "log_px": values,
                                 "ess": zero + 1}, y)["log_px"])
    errors = np.std([of["mean"] for of in found])
    assert errors == pytest.approx(np.mean([of["se"] for of in found]), rel=0.2)


def test_a_finished_run_is_kept_unless_more_is_asked_for(tmp_path):
    argv = [*SMOKE, "--out-dir", str(tmp_path)]
    study.main(argv)
    folder = tmp_path / "latent_opt/glyphs/d12_sigma0.4/seed_0"
    before = (folder / "final_metrics.json").read_bytes()
    study.main([*argv, "--codes", "50"])
    assert (folder / "final_metrics.json").read_bytes() == before
    with pytest.raises(common.UserError, match="at least as many of both"):
        study.main([*argv, "--codes", "50", "--test-images", "30"])
    (folder / "vae/checkpoint.pt").unlink()
    with pytest.raises(common.UserError, match="no weights"):
        study.main([*argv, "--codes", "150"])


# ---------------------------------------------------------------------------------------- bad input


def test_a_process_that_is_refused(tmp_path):
    result = script("latent_opt.py", *SMOKE, "--train-size", "60000", cwd=tmp_path)
    refused(result, "leaves 0 images")
    assert not (tmp_path / "results").exists()
