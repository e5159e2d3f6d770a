"""The imbalance study: objectives and samplers against oracles, runs, resume, bad input.

    pytest tests/test_imbalance_study.py
"""

import contextlib
import math

import numpy as np
import pytest
import torch
from conftest import interrupt_after_epoch, numbers, refused, script
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

import common
import imbalance_study as study

SMOKE = ["--dataset", "glyphs", "--train-size", "1000", "--epochs", "1", "--samples", "2000",
         "--device", "cpu"]
CONFIG = {"model": "ga-ae", "code_penalty": 0.01, "geometry": 5.0}
VAE = {"model": "vae", "beta": 1.0}

# ---------------------------------------------------------------------------------------- objective


def test_kl_and_reconstruction_against_torch_distributions():
    mu, logvar = 3 * torch.randn(64, 5), 4 * torch.randn(64, 5)
    want = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert study.kl_nats(mu, logvar).item() == pytest.approx(want.item(), rel=1e-5)
    logits, x = torch.randn(8, 1, 28, 28), torch.rand(8, 1, 28, 28).round()
    want = -Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1).mean()
    assert study.bernoulli_nats(logits, x).item() == pytest.approx(want.item(), rel=1e-5)


def test_the_objective_is_the_negative_elbo_and_per_image():
    model, x = study.Autoencoder(4, True), torch.rand(16, 1, 28, 28)
    loss, reconstruction, code_term, _ = study.objective(model, x, VAE)
    assert loss.item() == pytest.approx((reconstruction + code_term).item()) and code_term > 0
    logits = model.to_logits(model.encode(x)[0])
    halves = (study.bernoulli_nats(logits[:8], x[:8]) + study.bernoulli_nats(logits[8:], x[8:])) / 2
    assert study.bernoulli_nats(logits, x).item() == pytest.approx(halves.item(), rel=1e-5)
    assert reconstruction > 300  # summed over 784 pixels of about ln 2 each, not averaged


def test_distortion_in_closed_form_for_linear_decoders():
    def linear(weight):
        return lambda z: z @ weight.T
    z = torch.randn(100_000, 4).double()
    isometry = 3 * torch.linalg.qr(torch.randn(30, 4).double())[0]
    s = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    stretched = torch.linalg.qr(torch.randn(30, 4).double())[0] * s
    want = 4 * s.pow(4).sum() / s.square().sum().square() - 1
    assert study.distortion(linear(isometry), z).item() == pytest.approx(0, abs=0.02)
    assert study.distortion(linear(stretched), z).item() == pytest.approx(want.item(), rel=0.02)


def test_hutchinson_agrees_with_the_full_jacobian():
    model = study.Autoencoder(6, False)
    z = torch.randn(20, 6)
    exact = study.flatness(model, z)["distortion"]
    z_many = z.repeat(25, 1)  # many probes, so that the ratio of means is hardly biased
    estimates = [study.distortion(model.decode, z_many).item() for _ in range(20)]
    error = np.std(estimates, ddof=1) / math.sqrt(20)
    assert abs(np.mean(estimates) - exact) < 4 * error + 0.01 * (1 + exact)


def test_distortion_trains_the_decoder_and_the_encoder():
    model = study.Autoencoder(4, False)
    study.distortion(model.decode, model.encode(torch.rand(8, 1, 28, 28))[0]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    assert model.decoder[0].weight.grad.abs().sum() > 0


def test_the_distortion_counts_as_often_as_asked():
    model, x, found = study.Autoencoder(4, False), torch.rand(32, 1, 28, 28), []
    for times in [0, 1, 2]:
        torch.manual_seed(0)
        found.append(study.objective(model, x, CONFIG, times))
        loss, reconstruction, code_term, bent = found[-1]
        assert loss.item() == pytest.approx((reconstruction + code_term + 5 * bent).item())
    assert found[0][3] == 0 and found[1][3] > 0
    assert found[2][3].item() == pytest.approx(2 * found[1][3].item())


def test_the_jacobian_of_one_sample_is_its_own_and_batchnorm_would_fail():
    def jacobian_of_first(decoder, z):
        return torch.autograd.functional.jacobian(
            lambda code: decoder(torch.cat([code, z[1:]]))[0], z[:1])
    z, other = torch.randn(8, 4), torch.randn(8, 4)
    other[0] = z[0]
    model = study.Autoencoder(4, False).train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    same = [jacobian_of_first(model.decode, v) for v in (z, other)]
    assert torch.allclose(*same, atol=1e-6)
    coupled = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.SiLU(),
                            nn.Linear(16, 9)).train()
    assert not torch.allclose(*[jacobian_of_first(coupled, v) for v in (z, other)], atol=1e-3)


DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [VAE, {"model": "ae"}, CONFIG], ids=lambda c: c["model"])
def test_a_step_leaves_no_tensor_on_another_device(config, device, monkeypatch):
    if device == "meta":  # which autocast does not know
        monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    model = study.Autoencoder(4, config["model"] == "vae").to(device)
    losses = study.objective(model, torch.rand(32, 1, 28, 28, device=device), config)
    losses[0].backward()
    assert losses.device.type == device and losses.shape == (4,)
    assert all(weight.grad.device.type == device for weight in model.parameters())


@pytest.mark.parametrize("config", [VAE, CONFIG], ids=lambda c: c["model"])
def test_bfloat16_is_near_float32_and_the_geometry_is_float32(config):
    model, x, found = study.Autoencoder(4, config["model"] == "vae"), torch.rand(64, 1, 28, 28), []
    for on in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, on):
            losses = study.objective(model, x, config)
        found.append((losses.detach(), torch.autograd.grad(losses[0], model.decoder[0].weight)[0]))
    (losses, gradient), (losses_16, gradient_16) = found
    assert losses_16.dtype == gradient_16.dtype == torch.float32
    assert torch.allclose(losses, losses_16, rtol=0.02) and not torch.equal(gradient, gradient_16)


# ----------------------------------------------------------------------------------------- samplers


@pytest.fixture(scope="module")
def mixture():
    """Codes (5000, 3) with a small far cluster of 2 %."""
    z = torch.randn(5000, 3, generator=torch.Generator().manual_seed(1))
    z[:100] = 0.3 * z[:100] + 8
    return z


@pytest.mark.parametrize("planted", [0.6, 1.0, 2.0])
def test_the_temperature_that_matches_the_contrast_of_images(planted):
    logits = 3 * torch.randn(200, 1, 28, 28)
    x = (logits / planted).sigmoid()
    assert study.match_contrast(logits, x) == pytest.approx(planted, rel=1e-4)
    model, z = study.Autoencoder(4, False), torch.randn(5, 4)
    sharp, plain = model.decode(z, 0.5), model.decode(z)
    assert ((sharp - 0.5).abs() >= (plain - 0.5).abs() - 1e-6).all()


@pytest.mark.parametrize("sampler", ["gmm", "local"])
def test_samplers_recover_the_weight_of_a_small_cluster(mixture, sampler):
    codes = study.draw_codes(sampler, 20_000, mixture, seed=0)
    share = (codes.mean(1) > 5).double().mean().item()
    assert abs(share - 0.02) < 3 * math.sqrt(0.02 * 0.98 / 20_000) + 1e-3
    assert codes[codes.mean(1) < 5].std(0).mean().item() == pytest.approx(1, abs=0.1)


def test_sources_are_evenly_spaced():
    for n, size, first in [(20_000, 50_000, 1000), (7, 3, 1), (500, 500, 20)]:
        at = study.evenly_spaced(n, size, torch.Generator().manual_seed(0))
        assert len(at) == n and at.min() >= 0 and at.max() < size
        assert abs((at < first).sum().item() - n * first / size) < 1  # the rare ones come first
        assert at.bincount().max() <= -(-n // size)
        assert n < 10 or not torch.equal(at, at.sort().values)


def test_gaussian_and_prior_samplers_have_the_right_moments(mixture):
    codes = study.draw_codes("gaussian", 50_000, mixture, seed=0)
    assert torch.allclose(torch.cov(codes.T), torch.cov(mixture.T), atol=0.08)
    assert torch.allclose(codes.mean(0), mixture.mean(0), atol=0.05)
    codes = study.draw_codes("prior", 50_000, mixture, seed=0)
    assert torch.allclose(torch.cov(codes.T), torch.eye(3), atol=0.05)


def test_local_codes_have_the_moments_of_their_neighbourhood():
    z = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    codes = study.local_codes(z, torch.full((200_000,), 7), g, k=20, share=0.6)
    near = z[(z - z[7]).norm(dim=1).argsort()[:21]]
    mean = near.mean(0) + 0.6 * (z[7] - near.mean(0))
    assert torch.allclose(codes.mean(0), mean, atol=5e-3)
    assert torch.allclose(codes.T.cov(), 0.64 * near.T.cov(), atol=5e-3)
    codes = torch.randn(3000, 32, generator=g)
    drawn = study.local_codes(codes, torch.arange(3000).repeat(3), g)
    assert (drawn.var(0).sum() / codes.var(0).sum()).item() == pytest.approx(1, abs=0.08)
    flat = torch.cat([z, torch.zeros(400, 5)], 1)  # no noise in directions without codes
    assert study.local_codes(flat, torch.arange(400), g)[:, 3:].abs().max() == 0
    assert study.local_codes(z[:1], torch.tensor([0, 0]), g).allclose(z[:1])  # no neighbour


@pytest.mark.parametrize("arm", ["shifts", "smote", "local"])
def test_additions_make_the_classes_equal_and_look_like_their_class(arm):
    y = torch.cat([torch.full((n,), c) for c, n in enumerate([40, 30, 25] + [40] * 7)])
    z = torch.randn(len(y), 3) * 0.1 + 5 * y[:, None]  # classes far from each other
    x = (y[:, None, None, None] / 10).expand(-1, 1, 28, 28).clone()
    decode = lambda z: (z.mean(1).round() / 50)[:, None, None, None].expand(-1, 1, 28, 28)
    more, labels = study.additions(arm, x, y, z, decode, seed=0)
    assert torch.cat([y, labels]).bincount().tolist() == [40] * 10
    assert more.shape[1:] == (1, 28, 28)
    assert torch.allclose(more[:, 0, 14, 14], labels / 10, atol=0.03)
    assert study.additions("none", x, y, z, decode, 0)[0].shape == (0, 1, 28, 28)
    near = z - 4.9 * y[:, None]  # classes that lie in each other: neighbours are still their own
    seen = []
    study.additions("local", x, y, near, lambda codes: (seen.append(codes), decode(codes))[1], 0)
    other = near.clone()
    other[y != 2] += 100
    study.additions("local", x, y, other, lambda codes: (seen.append(codes), decode(codes))[1], 0)
    assert torch.equal(*[codes[labels == 2] for codes in seen])


# --------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("digit", [1, 9])
def test_the_split_has_exactly_the_rare_images_asked_for(data, digit):
    config = {"rare_digit": digit, "rare_ratio": 0.02, "train_size": 50_000, "seed": 3}
    part = study.split(data, config)
    y, y_val = data.y_train[part["train"]], data.y_train[part["val"]]
    assert (len(y), (y == digit).sum()) == (50_000, 1000)
    assert (len(y_val), (y_val == digit).sum()) == (3000, 60)
    assert len(set(part["train"].tolist()) | set(part["val"].tolist())) == 53_000
    assert not torch.equal(part["train"], study.split(data, {**config, "seed": 4})["train"])


def test_runs_end_to_end_downstream_and_the_report(tmp_path, few_test_images, capsys):
    argv = [*SMOKE, "--out-dir", str(tmp_path), "--rare-ratio", "0.05"]
    downstream = ["--downstream", "--downstream-steps", "8"]
    metrics = study.main([*argv, "--model", "ae", "ga-ae", "--geometry", "0", "5", *downstream])
    name = "ga-ae_digit9_5pct_epochs1_n1000/seed_0"
    assert len(metrics) == 3 and name in metrics
    assert set(metrics[name]["samplers"]) == set(study.SAMPLERS)
    root = tmp_path / "imbalance_study/glyphs"
    for file in ["samples.png", "codes.png", "losses.png"]:
        assert (root / name / file).stat().st_size > 2000
    arms = common.load_json(root / name / "downstream.json")
    assert list(arms["arms"]) == ["none", "shifts", "local"] and arms["steps"] == 8
    of_ae = common.load_json(root / name.replace("ga-ae", "ae") / "downstream.json")["arms"]
    assert "smote" in of_ae and of_ae["shifts"] == arms["arms"]["shifts"]  # paired
    files = {file: file.read_bytes() for file in [*root.glob("*.md"), *root.glob("*.csv")]}
    text = (root / "report.md").read_text()
    for line in text.splitlines():
        if line.startswith("!["):
            assert (root / line.split("(")[1].rstrip(")")).exists(), line
    study.main(["--report-only", "--dataset", "glyphs", "--out-dir", str(tmp_path)])
    assert len(files) == 2 and files == {file: file.read_bytes() for file in files}

    (root / name / "best_model.pt").unlink()
    study.main([*argv, "--model", "ga-ae", *downstream])  # finished: nothing to do
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(common.UserError, match=r"samplers\.prior\.n 2000, this command 2100"):
        study.main([*argv, "--model", "ga-ae", "--samples", "2100"])
    with pytest.raises(common.UserError, match=r"best_model\.pt is missing"):  # other steps
        study.main([*argv, "--model", "ga-ae", "--downstream", "--downstream-steps", "9"])


def test_an_interrupted_run_continues_bitwise(tmp_path, few_test_images):
    argv = [*SMOKE, "--model", "ga-ae", "--sampler", "local", "--epochs", "3"]
    study.main([*argv, "--out-dir", str(tmp_path / "whole")])
    interrupt_after_epoch(2, lambda: study.main([*argv, "--out-dir", str(tmp_path / "parts")]))
    study.main([*argv, "--out-dir", str(tmp_path / "parts")])
    a, b = (next((tmp_path / d).glob("imbalance_study/glyphs/*/seed_0")) for d in
            ["whole", "parts"])
    assert numbers(a) == numbers(b)
    left, right = (torch.load(d / "checkpoint.pt")["model"] for d in (a, b))
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_the_geometry_is_taken_at_every_fourth_step_of_shuffled_batches(
        tmp_path, monkeypatch, few_test_images):
    seen, times, real = [], [], study.objective

    def spy(model, x, config, geometry_times=1):
        if torch.is_grad_enabled():
            seen.append(x.clone())
            times.append(geometry_times)
        return real(model, x, config, geometry_times)
    monkeypatch.setattr(study, "objective", spy)
    study.main([*SMOKE, "--model", "ga-ae", "--sampler", "prior", "--epochs", "2", "--out-dir",
                str(tmp_path)])
    assert times == [4, 0, 0, 0, 4, 0, 0] * 2
    assert not torch.equal(torch.cat(seen[:7]), torch.cat(seen[7:]))


def test_shards_make_the_whole():
    args = study.parse_args(["--seeds", "0", "1", "--geometry", "0", "5"])
    configs = study.configurations(args, "glyphs")
    assert len(configs) == 8
    both = [config for k in range(3) for config in configs[k::3]]
    assert sorted(map(str, both)) == sorted(map(str, configs))


# ------------------------------------------------------------------------------------------- report


def finished(seed=0, lift=1.0, model="ga-ae", digit=9, **settings):
    """A finished run as the report sees it."""
    config = {"dataset": "mnist", "model": model, "rare_digit": digit, "rare_ratio": 0.02,
              "train_size": 50_000, "epochs": 30, "batch_size": 128, "lr": 2e-3, "latent_dim": 32,
              "precision": "float32", "seed": seed, **settings}
    scores = {"n": 20_000, "calibrated_lift": lift + 0.01 * seed, "calibrated_lift_low": lift - 0.1,
              "calibrated_lift_high": lift + 0.1, "clear_lift": lift, "fid": 0.2, "copying": 1.3,
              "rare": {"coverage": 0.8}, "rare_real": {"coverage": 1.0}}
    return {"config": config, "metrics": {
        "fid_floor": 0.1, "flatness": {"distortion": 1.0}, "real": [scores, scores],
        "samplers": {"prior": scores, "local": scores}}}


def test_rows_are_named_by_values_and_criteria_have_two_sides():
    runs = [finished(), finished(1), finished(0, geometry=0.0), finished(0, digit=3),
            finished(0, precision="bfloat16")]
    table = study.rows(runs)
    assert study.shown_class(table) == "9 at 2 %"
    assert ("9 at 2 %", "ga-ae λ=0", "local") in table
    assert ("9 at 2 % bfloat16", "ga-ae", "local") in table
    row = table["9 at 2 %", "ga-ae", "local"]
    assert set(row) == {0, 1} and row[0]["fid_ratio"] == 2 and row[0]["coverage_ratio"] == 0.8
    met = study.judged(row)
    assert not met["coverage 0.80 (at least 0.95)"]
    assert met["FID / floor 2.0 (0 to 3)"] and not met["copying 1.30 (0.75 to 1.25)"]
    assert study.variant(runs[2]["config"]) == "ga-ae_lambda0_digit9_2pct"
    assert study.variant(runs[4]["config"]) == "ga-ae_digit9_2pct_bfloat16"


def test_an_answer_is_at_most_seven_lines():
    one = study.rows([finished()])
    assert len(study.answer(one, "9 at 2 %", True)) == 4  # two samplers, an interval, the source
    many = study.rows([finished(seed, lift, model) for seed in range(3) for lift, model in
                       [(1.0, "ga-ae"), (0.5, "ae"), (3.0, "vae")]])
    lines = study.answer(many, "9 at 2 %", True)
    assert 3 <= len(lines) <= 7 and "vae 3.01 ± 0.01" in lines[0]


# ------------------------------------------------------------------------------ bad input, faults


def test_a_process_from_another_folder_and_bad_input_writes_nothing(tmp_path):
    argv = [*SMOKE, "--model", "ae", "--sampler", "prior"]
    result = script("imbalance_study.py", *argv, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results/imbalance_study/glyphs/report.md").exists()
    bad = [*argv, "--out-dir", str(tmp_path / "out"), "--train-size", "50000"]
    with pytest.raises(common.UserError, match=r"the largest possible is 0\.11"):
        study.main([*bad, "--rare-ratio", "0.02", "0.5"])
    with pytest.raises(common.UserError, match="rounds to no image"):
        study.main([*bad, "--rare-ratio", "0.000001"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    refused(script("imbalance_study.py", *argv, "--out-dir", str(tmp_path / "file")), "file")


def test_a_loss_that_is_not_finite_stops_that_run_and_no_other(
        tmp_path, monkeypatch, few_test_images):
    real, calls = study.objective, []

    def broken(*a):
        calls.append(1)
        return real(*a) * (math.nan if len(calls) == 11 else 1)  # 7 steps and a validation an epoch
    monkeypatch.setattr(study, "objective", broken)
    with pytest.raises(common.UserError, match=r"1 of 2 runs diverged: ae.*seed_0"):
        study.main([*SMOKE, "--model", "ae", "vae", "--sampler", "prior", "--epochs", "2",
                    "--out-dir", str(tmp_path)])
    root = tmp_path / "imbalance_study/glyphs"
    assert len(next(root.glob("ae*/seed_0/history.csv")).read_text().splitlines()) == 2
    assert list(root.glob("vae*/seed_0/final_metrics.json")) and (root / "report.md").exists()
