"""Latent optimisation: bounds and proposals against closed forms, runs, resume, bad input.

    pytest tests/test_latent_opt.py
"""

import contextlib
import csv
import math

import numpy as np
import pytest
import torch
from conftest import interrupt_after_epoch, numbers, refused, script
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import common
import latent_opt as study

SMOKE = ["--dataset", "glyphs", "--train-size", "300", "--epochs", "1", "--test-images", "20",
         "--codes", "100", "--latent-dim", "12", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_steps(request, monkeypatch, few_test_images):
    """Whole runs need not infer well."""
    if "tmp_path" in request.fixturenames:
        monkeypatch.setattr(study, "INFERENCE_STEPS", 40)
        monkeypatch.setattr(study, "N_VAL", 200)
        monkeypatch.setattr(study, "SUPERVISED_EPOCHS", 1)


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


def config_of(*flags: str) -> dict:
    return study.configurations(study.parse_args([*SMOKE, *flags]), "glyphs")[0]


def trained(folder, kind, x, *flags):
    run = common.Run(folder / kind, config_of(*flags))
    return study.train(run, kind, x, x, x[:20], False)


def test_both_models_start_from_the_same_decoder(tmp_path):
    x = torch.rand(64, 1, 28, 28)
    vae, latent = (trained(tmp_path, kind, x, "--lr", "1e-9", "--latent-lr", "1e-9")[0]
                   for kind in study.MODELS)
    for a, b in zip(vae.parameters(), latent.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


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
    folder = next(root.glob("*/seed_0"))
    for epoch in (1, 2):
        for name in ["recon", "latent_opt_recon", "samples", "comparison"]:
            assert (folder / f"{name}_epoch_{epoch}.png").stat().st_size > 2000
    latents = torch.load(folder / "latent_opt_epoch_2.pt", weights_only=True)["latents"]
    assert latents.shape == (10, 24)  # of the pictured images alone
    values = np.load(folder / "log_probabilities.npy")
    assert values.shape == (2, 10, 2) and values.dtype == np.float64
    assert np.isfinite(values).all() and (values <= -2.076).all()
    with open(folder / "log_probabilities.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert sorted(float(r["vae_log_px"]) for r in rows) == pytest.approx(
        sorted(values[0].flatten()), abs=1e-4)
    for model in metrics[f"{folder.parent.name}/seed_0"]["models"].values():
        for gaps in model["gaps"].values():
            assert gaps["elbo"]["mean"] >= gaps["start"]["mean"] - 0.5
            assert gaps["log_px"]["mean"] >= gaps["elbo"]["mean"] - 1
    before = (root / "report.md").read_bytes()
    study.main(["--report-only", "--dataset", "glyphs", "--out-dir", str(tmp_path)])
    assert (root / "report.md").read_bytes() == before
    assert study.main(argv) == metrics  # finished: skipped
    with pytest.raises(common.UserError, match="--fresh"):
        study.main([*argv, "--codes", "150"])


def test_an_interrupted_run_continues_bitwise(tmp_path):
    argv = [*SMOKE, "--epochs", "3", "--out-dir"]
    study.main([*argv, str(tmp_path / "whole")])
    interrupt_after_epoch(1, lambda: study.main([*argv, str(tmp_path / "parts")]))
    interrupt_after_epoch(4, lambda: study.main([*argv, str(tmp_path / "parts")]))  # latents, 2
    study.main([*argv, str(tmp_path / "parts")])
    a, b = (next((tmp_path / d).glob("latent_opt/glyphs/*/seed_0")) for d in ["whole", "parts"])
    assert numbers(a) == numbers(b)
    left, right = (torch.load(d / "latent_opt/checkpoint.pt", weights_only=True)["inference"]
                   for d in (a, b))
    assert all(torch.equal(left[k], right[k]) for k in ["table", "mean", "square", "count"])


def test_a_step_touches_the_latents_of_its_batch_alone(tmp_path, monkeypatch):
    x, seen, step = torch.rand(70, 1, 28, 28), [], study.RowAdam.step

    def watched(self, rows, gradient):
        before = self.table.clone()
        step(self, rows, gradient)
        changed = (self.table != before).any(1)
        if len(self.table) == 70:  # not those of pictured test images
            seen.append((sorted(rows.tolist()), changed.nonzero()[:, 0].tolist()))
    monkeypatch.setattr(study.RowAdam, "step", watched)
    trained(tmp_path, "latent_opt", x)
    assert len(seen) == 4 and all(rows == changed for rows, changed in seen)
    assert sorted(seen[0][0] + seen[2][0]) == [*range(70)]  # two steps each; the last batch has 6


def test_every_image_counts_alike_in_the_mean_of_an_epoch(tmp_path, monkeypatch):
    # 64 images of loss 1 and a last batch of 6 images of loss 8
    monkeypatch.setattr(study, "latent_step", lambda *a: torch.full((3, len(a[3])), 1.0 if
                                                                    len(a[3]) == 64 else 8.0))
    run = common.Run(tmp_path / "latent_opt", config_of())
    x = torch.rand(70, 1, 28, 28)
    study.train(run, "latent_opt", x, x, x[:20], False)
    assert run.history[0]["loss"] == pytest.approx((64 + 6 * 8) / 70)


def test_stroke_area_explains_what_it_made():
    area = 100 + 20 * torch.rand(1000)
    values = -0.01 * area.double().square()
    assert study.explained_by_stroke_area(area, values) == pytest.approx(1)
    noise = values.std() * torch.randn(1000).double()
    assert study.explained_by_stroke_area(area, values + noise) == pytest.approx(0.5, abs=0.05)


DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_stay_on_their_device_and_losses_are_float32(monkeypatch, device, precision):
    if device == "meta":  # which autocast does not know
        monkeypatch.setattr(study, "autocast", lambda x, config: contextlib.nullcontext())
    config = config_of("--precision", precision)
    decoder, encoder = study.Decoder(12).to(device), study.Encoder(12).to(device)
    x = torch.rand(8, 1, 28, 28, device=device)
    with study.autocast(x, config):
        losses = study.amortised_losses(decoder, encoder, x, 0.4)
    losses[0].mean().backward()
    latents = study.RowAdam(torch.zeros(8, 24, device=device), 0.01)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-3, foreach=True)
    rows = torch.arange(8, device=device)
    for found in [losses, study.latent_step(decoder, latents, optimizer, x, rows, config)]:
        assert found.device.type == device and found.dtype == torch.float32


def test_the_error_of_a_stratified_mean_is_that_within_the_strata():
    y = torch.arange(10).repeat_interleave(100)
    found, zero = [], torch.zeros(1000)
    for _ in range(300):
        values = 5.0 * y + torch.randn(1000)
        found.append(study.gaps({"start": zero, "elbo": zero, "log_px": values,
                                 "ess": zero + 1}, y)["log_px"])
    errors = np.std([of["mean"] for of in found])
    assert errors == pytest.approx(np.mean([of["se"] for of in found]), rel=0.2)


# ---------------------------------------------------------------------------------------- bad input


def test_a_process_that_is_refused(tmp_path):
    result = script("latent_opt.py", *SMOKE, "--train-size", "60000", cwd=tmp_path)
    refused(result, "--train-size")
    assert not (tmp_path / "results").exists()
