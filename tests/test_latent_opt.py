"""Latent optimisation: bounds and proposals against closed forms, runs, resume, bad input."""

import math

import common

import numpy as np
import pytest
import torch
from conftest import SMOKES, check_report, check_resume
from torch import nn
from torch.distributions import LowRankMultivariateNormal, Normal, kl_divergence

import latent_opt as study

SMOKE = SMOKES["latent_opt"]


class Linear(nn.Module):
    """A linear decoder of 784 pixels with its exact posterior: probabilistic PCA, float64."""

    def __init__(self, d: int):
        super().__init__()
        self.w, self.offset = 0.1 * torch.randn(784, d).double(), torch.rand(784).double()
        self.sigma = 0.4
        self.precision = torch.eye(d).double() + self.w.T @ self.w / 0.16

    def forward(self, z):
        return (z @ self.w.T + self.offset).view(-1, 1, 28, 28)

    def log_px(self, x):
        noise = torch.full((784,), 0.16).double()
        return LowRankMultivariateNormal(self.offset, self.w, noise).log_prob(x.flatten(1))

    def mode(self, x):
        right = (x.flatten(1) - self.offset) @ self.w / 0.16
        return torch.linalg.solve(self.precision, right.T).T


def test_the_elbo_against_torch_distributions():
    decoder, x = study.Decoder(5, 0.4), torch.rand(16, 1, 28, 28)
    mu, logvar, noise = 3 * torch.randn(16, 5), torch.randn(16, 5), torch.randn(16, 5)
    loss, reconstruction, kl = study.negative_elbo(decoder, x, torch.cat([mu, logvar], 1), noise)
    q = Normal(mu, (0.5 * logvar).exp())
    assert torch.allclose(kl, kl_divergence(q, Normal(0.0, 1.0)).sum(1), rtol=1e-4)
    p = Normal(decoder(mu + noise * q.scale), 0.4)  # sigma is a standard deviation
    assert torch.allclose(reconstruction, -p.log_prob(x).sum((1, 2, 3)), rtol=1e-5)
    assert torch.equal(loss, reconstruction + kl)


def test_log_p_of_a_linear_decoder_at_200_dimensions():
    decoder = Linear(200)
    x = decoder(torch.randn(2, 200).double()) + 0.4 * torch.randn(2, 1, 28, 28).double()
    got, ess = study.log_px(decoder, x, torch.zeros(2, 200).double(), 2000)
    assert torch.allclose(got, decoder.log_px(x), atol=0.3) and ess.min() > 40


def test_log_p_of_a_nonlinear_decoder_against_quadrature():
    decoder = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 784), nn.Sigmoid(),
                            nn.Unflatten(1, (1, 28, 28))).requires_grad_(False)
    decoder[0].weight *= 3
    decoder[2].weight *= 3
    decoder.sigma = 0.4
    x = decoder(torch.randn(3, 1)) + 0.4 * torch.randn(3, 1, 28, 28)
    grid = torch.linspace(-7, 7, 4001)[:, None]
    x_hat = decoder(grid)
    log_prior = Normal(0.0, 1.0).log_prob(grid[:, 0]).double()
    want = torch.stack([(study.log_likelihood(x_hat, image[None], 0.4).double()
                         + log_prior).logsumexp(0) + math.log(14 / 4000) for image in x])
    found, _ = study.measure(decoder, x, torch.zeros(3, 2), 2000, "test")
    assert torch.allclose(found["log_px"], want, atol=0.1)
    assert (found["start"] < found["elbo"]).all() and (found["elbo"] < want + 0.1).all()
    gaps = found["start_gap"] + found["approximation_gap"]
    assert torch.allclose(gaps, found["log_px"] - found["start"])


def test_the_optimised_gaussian_is_the_best_one():
    decoder = Linear(3)
    x = decoder(torch.randn(6, 3).double())
    mu, logvar = study.infer(decoder, x, torch.zeros(6, 6).double()).chunk(2, dim=1)
    assert torch.allclose(mu, decoder.mode(x), atol=0.05)
    best = -decoder.precision.diagonal().log()  # the reverse KL's diagonal Gaussian
    assert torch.allclose(logvar, best.expand(6, 3), atol=0.1)


def test_the_pca_start_is_the_posterior_of_probabilistic_pca():
    w = 3 * torch.linalg.qr(torch.randn(784, 2))[0]
    x = (torch.randn(2000, 2) @ w.T + 0.4 * torch.randn(2000, 784)).view(-1, 1, 28, 28)
    mu, logvar = study.pca_posterior(x, 2, 0.4)(x).chunk(2, dim=1)
    want = math.log(0.16 / (9 + 0.16))
    assert logvar[0].tolist() == pytest.approx([want, want], abs=0.2)
    assert mu.var(0).tolist() == pytest.approx([1, 1], abs=0.15)  # less the posterior's
    x[:, :, 14:] = 0.0  # pixels without variance
    q = study.pca_posterior(x, 784, 0.4)(x)
    assert q.isfinite().all() and not q[:, 783].any() and not q[:, -1].any()  # as the prior


def test_stroke_area_explains_what_it_made():
    x = torch.rand(1000, 1, 1, 1).expand(-1, 1, 2, 2)
    values = -x.sum((1, 2, 3)).double().square()
    assert study.explained_by_stroke_area(x, values) == pytest.approx(1)
    noise = values.std() * torch.randn(1000).double()
    assert study.explained_by_stroke_area(x, values + noise) == pytest.approx(0.5, abs=0.1)


def test_the_error_of_a_stratified_mean_is_that_within_the_strata():
    values = 5.0 * torch.arange(10).repeat_interleave(100) + torch.randn(300, 1000)
    found = [study.mean_and_error(draw, strata=10) for draw in values]
    assert np.std([one["mean"] for one in found]) == pytest.approx(found[0]["se"], rel=0.2)
    assert found[0]["se"] == pytest.approx(1 / math.sqrt(1000), rel=0.1)


# ------------------------------------------------------------------------------ latents, training


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


def test_inference_depends_on_no_batch_mate(monkeypatch):
    monkeypatch.setattr(study, "INFERENCE_STEPS", 10)
    decoder, x, start = study.Decoder(8, 0.4), torch.rand(6, 1, 28, 28), torch.zeros(6, 16)
    together, alone = study.infer(decoder, x, start), study.infer(decoder, x[2:3], start[:1])
    assert torch.allclose(together[2:3], alone, atol=1e-3)
    assert not start.any() and all(weight.grad is None for weight in decoder.parameters())


def test_the_images_are_stratified(data):
    config = {"train_size": 20_000, "seed": 1}
    part = study.split(data, config, 1000)
    assert data.y_test[part["test"]].tolist() == sorted([*range(10)] * 100)
    assert data.y_train[part["train"]].bincount().tolist() == [2000] * 10
    assert len(set(part["train"].tolist()) | set(part["val"].tolist())) == 25_000
    other = study.split(data, {**config, "seed": 2}, 1000)
    assert not torch.equal(part["train"], other["train"])
    assert torch.equal(part["test"], other["test"])


def trained(folder, x, *flags) -> tuple[common.Run, dict]:
    config = study.configurations(study.parse_args([*SMOKE, *flags]), "glyphs")[0]
    run = common.Run(folder, config)
    models = {kind: study.build(kind, config, x) for kind in study.MODELS}
    study.train(run, models, x, x[:5], x[:20], False)
    return run, models


@pytest.fixture
def quick(monkeypatch, small_sets):
    """Runs need not infer well."""
    monkeypatch.setattr(study, "INFERENCE_STEPS", 2)
    monkeypatch.setattr(study, "SHOWN_EPOCHS", [])
    monkeypatch.setattr(study, "N_VAL", 100)
    monkeypatch.setattr(study, "SUPERVISED_EPOCHS", 1)


def test_an_epoch_of_both_models(tmp_path, monkeypatch, quick):
    """Each image with its own latents; both models from the same weights, by the same noise."""
    x, draws = torch.rand(70, 1, 28, 28), []

    def planted(model, images, rows, *a):  # 64 images of loss 1, a last batch of 6 with loss 8
        assert torch.equal(images, x[rows])
        draws.append(torch.rand(()).item())
        return torch.full((3, len(images)), 1.0 if len(images) == 64 else 8.0)
    monkeypatch.setattr(study, "amortised_step", planted)
    monkeypatch.setattr(study, "latent_step", planted)
    run, models = trained(tmp_path, x)
    assert run.history[0]["latent_opt_loss"] == pytest.approx((64 + 6 * 8) / 70)
    assert draws[:2] == draws[2:]
    a, b = (model.decoder.state_dict() for model in models.values())
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_an_interrupted_training_continues_bitwise(tmp_path, monkeypatch, quick):
    x = torch.rand(70, 1, 28, 28)
    save_always = property(lambda run: 1, lambda run, value: None)
    monkeypatch.setattr(common.Run, "save_every", save_always, raising=False)
    check_resume(tmp_path, lambda folder: trained(folder, x, "--epochs", "3"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_stay_on_their_device_and_losses_are_float32(monkeypatch, device, precision):
    monkeypatch.setattr(study, "INFERENCE_STEPS", 2)
    config = {"precision": precision, "latent_steps": 2}
    x, rows = torch.rand(8, 1, 28, 28, device=device), torch.arange(8, device=device)
    decoder, encoder = study.Decoder(12, 0.4).to(device), study.Encoder(12).to(device)
    latents = study.RowAdam(torch.zeros(9, 24, device=device), 0.01)
    adam = torch.optim.Adam([*decoder.parameters(), *encoder.parameters()], foreach=True)
    with common.autocast(x, config):
        q = encoder(x)
        outputs = [q, decoder(q[:, :12])]
    vae, latent_opt = (study.Model(decoder, part, None, adam) for part in [encoder, latents])
    losses, steps = [study.amortised_step(vae, x, rows, config)], []
    next(decoder.parameters()).register_hook(lambda gradient: steps.append(1))
    losses.append(study.latent_step(latent_opt, x, rows, config))
    assert len(steps) == 1  # of the decoder, for two of the latents
    for tensor in [*outputs, *losses, study.infer(decoder, x, q)]:
        assert tensor.device.type == device and tensor.dtype == torch.float32
    assert not any(tensor.requires_grad for tensor in losses)
    if device != "meta":
        assert latents.count[:, 0].tolist() == [2.0] * 8 + [0.0]  # only the rows of the batch


def test_a_run_end_to_end_writes_what_it_should(tmp_path, quick):
    argv = [*SMOKE, "--out-dir", str(tmp_path)]
    metrics = study.main(argv)
    folder = next(tmp_path.glob("latent_opt/glyphs/*/seed_0"))
    for name in ["recon", "latent_opt_recon", "samples", "comparison"]:
        assert (folder / f"{name}_epoch_1.png").stat().st_size > 2000
    latents = torch.load(folder / "latent_opt_epoch_1.pt", weights_only=True)["latents"]
    assert latents.shape == (10, 16)  # of the pictured images alone
    values = np.load(folder / "log_probabilities.npy")
    assert values.shape == (2, 10, 2) and values.dtype == np.float64
    check_report(study, tmp_path, argv, metrics)


def test_a_size_that_is_refused(tmp_path):
    for flags in [["--train-size", "60000"], ["--test-images", "25"]]:
        with pytest.raises(common.UserError, match="multiples of ten"):
            study.main([*SMOKE, *flags, "--out-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
