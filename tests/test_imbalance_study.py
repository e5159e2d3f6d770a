"""The imbalance study: objectives and samplers against oracles, runs, resume, bad input.

    pytest tests/test_imbalance_study.py
"""

import contextlib
import math

import common

import numpy as np
import pytest
import torch
from conftest import interrupt_after_epoch, refused, script
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

import imbalance_study as study

SMOKE = ["--dataset", "glyphs", "--train-size", "400", "--rare-ratio", "0.05", "--epochs", "1",
         "--samples", "2000", "--device", "cpu"]
VAE, AE = {"model": "vae", "beta": 1.0}, {"model": "ae"}
GA_AE = {"model": "ga-ae", "code_penalty": 0.01, "geometry": 5.0}

# ---------------------------------------------------------------------------------------- objective


def test_the_objective_of_a_vae_is_that_of_torch_distributions_per_image():
    model, x = study.Autoencoder(4, True), torch.rand(16, 1, 28, 28).round()
    model.encoder[-1].weight.data *= 100  # far from N(0, I)
    torch.manual_seed(1)
    loss, reconstruction, kl, _ = study.objective(model, x, VAE)
    mu, logvar = model.encode(x).chunk(2, 1)
    q = Normal(mu, (0.5 * logvar).exp())
    torch.manual_seed(1)
    logits = model.to_logits(q.mean + torch.randn(16, 4) * q.stddev)
    log_likelihood = Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1).mean()
    want = kl_divergence(q, Normal(0.0, 1.0)).sum(1).mean()
    assert kl.item() == pytest.approx(want.item(), rel=1e-5) and kl > 1
    assert reconstruction.item() == pytest.approx(-log_likelihood.item(), rel=1e-5)
    assert loss.item() == pytest.approx((reconstruction + kl).item())


def test_distortion_in_closed_form_for_linear_decoders():
    z = torch.randn(100_000, 4).double()
    frame = torch.linalg.qr(torch.randn(30, 4).double())[0]
    s = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    want = 4 * s.pow(4).sum() / s.square().sum().square() - 1
    assert study.distortion(lambda z: z @ (3 * frame).T, z).item() == pytest.approx(0, abs=0.02)
    assert study.distortion(lambda z: z @ (s * frame).T, z).item() == pytest.approx(
        want.item(), rel=0.02)


def test_hutchinson_agrees_with_the_full_jacobian():
    model, z = study.Autoencoder(6, False), torch.randn(20, 6)
    exact = study.exact_distortion(model, z)
    many = z.repeat(25, 1)  # many probes, so that the ratio of means is hardly biased
    estimates = [study.distortion(model.decode, many).item() for _ in range(10)]
    error = np.std(estimates, ddof=1) / math.sqrt(10)
    assert abs(np.mean(estimates) - exact) < 4 * error + 0.01 * (1 + exact)


def test_the_distortion_trains_both_nets_and_counts_as_often_as_asked():
    model, x, found = study.Autoencoder(4, False), torch.rand(32, 1, 28, 28), []
    for times in [0, 1, 2]:
        torch.manual_seed(0)
        found.append(study.objective(model, x, GA_AE, times))
        loss, reconstruction, code_term, distortion = found[-1]
        assert loss.item() == pytest.approx((reconstruction + code_term + 5 * distortion).item())
    assert found[0][3] == 0 and found[1][3] > 0
    assert found[2][3].item() == pytest.approx(2 * found[1][3].item())
    found[1][3].backward()
    for weight in [*model.encoder.parameters(), model.decoder[0].weight]:
        assert weight.grad.abs().sum() > 0


def test_one_image_does_not_depend_on_the_others_of_its_batch():
    model, z = study.Autoencoder(4, False).train(), torch.randn(8, 4)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert torch.allclose(model.decode(z)[:1], model.decode(z[:1]), atol=1e-6)


DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [VAE, AE, GA_AE], ids=lambda c: c["model"])
def test_a_step_leaves_no_tensor_on_another_device(config, device, monkeypatch):
    if device == "meta":  # which autocast does not know
        monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    model = study.Autoencoder(4, config["model"] == "vae").to(device)
    losses = study.objective(model, torch.rand(32, 1, 28, 28, device=device), config)
    losses[0].backward()
    assert losses.device.type == device and losses.shape == (4,)
    assert all(weight.grad.device.type == device for weight in model.parameters())


@pytest.mark.parametrize("config", [VAE, GA_AE], ids=lambda c: c["model"])
def test_bfloat16_is_near_float32_and_the_geometry_is_float32(config, monkeypatch):
    def in_float32(*a, real=study.distortion):
        assert not torch.is_autocast_enabled("cpu")
        return real(*a)
    monkeypatch.setattr(study, "distortion", in_float32)
    model, x, found = study.Autoencoder(4, config["model"] == "vae"), torch.rand(64, 1, 28, 28), []
    for on in [False, True]:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, on):
            found.append(study.objective(model, x, config))
            assert model.encode(x).dtype == model.to_logits(x[:, 0, 0, :4]).dtype == torch.float32
    assert torch.allclose(*found, rtol=0.02) and not torch.equal(*found)


# ----------------------------------------------------------------------------------------- samplers


@pytest.fixture(scope="module")
def mixture():
    """Codes (5000, 3), of which the first 2 % are a small far cluster."""
    z = torch.randn(5000, 3, generator=torch.Generator().manual_seed(1))
    z[:100] = 0.3 * z[:100] + 8
    return z


@pytest.mark.parametrize("planted", [0.6, 2.0])
def test_the_temperature_that_matches_the_contrast_of_images(planted):
    logits = 3 * torch.randn(200, 1, 28, 28)
    x = (logits / planted).sigmoid()
    assert study.match_contrast(logits, x) == pytest.approx(planted, rel=1e-4)


@pytest.mark.parametrize(("sampler", "error"), [("gmm", 0.004), ("local", 1e-4)])
def test_samplers_recover_the_weight_of_a_small_cluster(mixture, sampler, error):
    codes = study.draw_codes(sampler, 20_000, mixture, seed=0)
    is_far = codes.mean(1) > 5
    assert is_far.double().mean().item() == pytest.approx(0.02, abs=error)
    assert not is_far[:400].all()  # shuffled
    assert codes[~is_far].std(0).mean().item() == pytest.approx(1, abs=0.1)


def test_gaussian_and_prior_samplers_have_the_right_moments(mixture):
    codes = study.draw_codes("gaussian", 50_000, mixture, seed=0)
    assert torch.allclose(torch.cov(codes.T), torch.cov(mixture.T), atol=0.08)
    assert torch.allclose(codes.mean(0), mixture.mean(0), atol=0.05)
    codes = study.draw_codes("prior", 50_000, mixture, seed=0)
    assert torch.allclose(torch.cov(codes.T), torch.eye(3), atol=0.05)


def test_local_codes_have_the_moments_of_their_neighbourhood():
    z = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    codes = study.local_codes(z, torch.full((100_000,), 7), g, k=20, share=0.6)
    near = z[(z - z[7]).norm(dim=1).argsort()[:21]]
    mean = near.mean(0) + 0.6 * (z[7] - near.mean(0))
    assert torch.allclose(codes.mean(0), mean, atol=7e-3)
    assert torch.allclose(codes.T.cov(), 0.64 * near.T.cov(), atol=7e-3)
    many = torch.randn(3000, 32, generator=g)
    drawn = study.local_codes(many, torch.arange(3000).repeat(3), g)
    assert (drawn.var(0).sum() / many.var(0).sum()).item() == pytest.approx(1, abs=0.08)
    flat = torch.cat([z, torch.zeros(400, 5)], 1)  # no noise in directions without codes
    assert study.local_codes(flat, torch.arange(400), g)[:, 3:].abs().max() == 0
    assert study.local_codes(z[:1], torch.tensor([0, 0]), g).allclose(z[:1])  # no neighbour


@pytest.mark.parametrize("arm", ["shifts", "smote", "local"])
def test_additions_make_the_classes_equal_and_look_like_their_class(arm):
    y = torch.cat([torch.full((n,), c) for c, n in enumerate([40, 30, 25] + [40] * 7)])
    z = torch.randn(len(y), 3)  # classes that lie in each other: only the first number tells them
    z[:, 0] = y / 1000
    x = (y[:, None, None, None] / 10).expand(-1, 1, 28, 28).clone()
    decode = lambda z: (100 * z[:, 0])[:, None, None, None].expand(-1, 1, 28, 28)
    more, labels = study.additions(arm, x, y, z, decode, seed=0)
    assert torch.cat([y, labels]).bincount().tolist() == [40] * 10
    assert more.shape[1:] == (1, 28, 28)
    assert torch.allclose(more[:, 0, 14, 14], labels / 10, atol=1e-5)  # neighbours are their own
    assert len(study.additions("none", x, y, z, decode, 0)[0]) == 0


# --------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("digit", [1, 9])
def test_the_split_has_exactly_the_rare_images_asked_for(data, digit):
    config = {"rare_digit": digit, "rare_ratio": 0.02, "train_size": 50_000, "seed": 3}
    part = study.split(data, config)
    y, y_val = data.y_train[part["train"]], data.y_train[part["val"]]
    assert (len(y), (y == digit).sum(), (y[:1000] == digit).all()) == (50_000, 1000, True)
    assert (len(y_val), (y_val == digit).sum()) == (3000, 60)
    assert len(set(part["train"].tolist()) | set(part["val"].tolist())) == 53_000
    assert not torch.equal(part["train"], study.split(data, {**config, "seed": 4})["train"])


def test_a_run_end_to_end_downstream_and_the_report(tmp_path, few_test_images):
    argv = [*SMOKE, "--model", "ga-ae", "--out-dir", str(tmp_path)]
    downstream = ["--downstream", "--downstream-steps", "2"]
    ((name, metrics),) = study.main([*argv, *downstream]).items()
    assert set(metrics["samplers"]) == set(study.SAMPLERS)
    root = tmp_path / "imbalance_study/glyphs"
    for file in ["samples.png", "codes.png", "losses.png"]:
        assert (root / name / file).stat().st_size > 2000
    arms = common.load_json(root / name / "downstream.json")["arms"]
    assert list(arms) == ["none", "shifts", "local"]
    files = {file: file.read_bytes() for file in [*root.glob("*.md"), *root.glob("*.csv")]}
    for line in (root / "report.md").read_text().splitlines():
        if line.startswith("!["):
            assert (root / line.split("(")[1].rstrip(")")).exists(), line
    study.main(["--report-only", "--dataset", "glyphs", "--out-dir", str(tmp_path)])
    assert len(files) == 2 and files == {file: file.read_bytes() for file in files}

    with pytest.raises(common.UserError, match=r"samplers\.prior\.n 2000, this command 2100"):
        study.main([*argv, "--samples", "2100"])
    (root / name / "best_model.pt").unlink()
    study.main([*argv, *downstream])  # finished: nothing to do
    with pytest.raises(common.UserError, match=r"best_model\.pt is missing"):  # other steps
        study.main([*argv, "--downstream", "--downstream-steps", "9"])


TRAINING = {**GA_AE, "latent_dim": 4, "epochs": 3, "batch_size": 16, "lr": 1e-3, "seed": 0,
            "precision": "float32"}


def trained(folder) -> common.Run:
    """A run of a GA-AE with six steps an epoch, trained or continued."""
    run = common.Run(folder, TRAINING)
    x = torch.rand(128, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    study.train(run, x[:96], x[96:], use_compile=False)
    return run


def test_an_interrupted_run_continues_bitwise(tmp_path):
    interrupt_after_epoch(1, lambda: trained(tmp_path / "parts"))
    for whole, part in zip(trained(tmp_path / "whole").history, trained(tmp_path / "parts").history,
                           strict=True):
        assert {**whole, "seconds": 0} == {**part, "seconds": 0}
    left, right = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in
                   ["whole", "parts"])
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_the_geometry_is_taken_at_every_fourth_step_of_shuffled_batches(tmp_path, monkeypatch):
    seen, times, real = [], [], study.objective

    def spy(model, x, config, geometry_times=1):
        if torch.is_grad_enabled():
            seen.append(x.clone())
            times.append(geometry_times)
        return real(model, x, config, geometry_times)
    monkeypatch.setattr(study, "objective", spy)
    trained(tmp_path)
    assert times == [4, 0, 0, 0, 4, 0] * 3
    assert not torch.equal(torch.cat(seen[:6]), torch.cat(seen[6:12]))


def test_every_configuration_is_there_once():
    args = study.parse_args(["--seeds", "0", "1", "--geometry", "0", "5"])
    assert len(study.configurations(args, "glyphs")) == 8  # the geometry makes no second VAE


# ------------------------------------------------------------------------------- report, bad input


def finished(seed=0, lift=1.0, model="ga-ae", digit=9, **settings):
    """A finished run as the report sees it."""
    config = {"dataset": "mnist", "model": model, "rare_digit": digit, "rare_ratio": 0.02,
              "train_size": 50_000, "epochs": 30, "batch_size": 128, "lr": 2e-3, "latent_dim": 32,
              "precision": "float32", "seed": seed, **settings}
    scores = {"n": 20_000, "calibrated_lift": lift + 0.01 * seed, "calibrated_lift_low": lift - 0.1,
              "calibrated_lift_high": lift + 0.1, "clear_lift": lift, "fid": 0.2, "copying": 1.3,
              "rare": {"coverage": 0.8}, "rare_real": {"coverage": 1.0}, "class_share": [0.1] * 10}
    return {"config": config, "metrics": {
        "fid_floor": 0.1, "flatness": {"distortion": 1.0}, "real": [scores, scores],
        "train_share": [0.1] * 9 + [0.02], "samplers": {"prior": scores, "local": scores}}}


def test_rows_are_named_by_values_and_criteria_have_two_sides():
    runs = [finished(), finished(1), finished(0, geometry=0.0), finished(0, digit=3),
            finished(0, precision="bfloat16")]
    table = study.rows(runs)
    assert study.shown_class(table) == "9 at 2 %"
    assert ("9 at 2 %", "ga-ae λ=0", "local") in table
    assert ("9 at 2 % bfloat16", "ga-ae", "local") in table
    row = table["9 at 2 %", "ga-ae", "local"]
    assert set(row) == {0, 1} and row[0]["fid_ratio"] == 2 and row[0]["coverage_ratio"] == 0.8
    assert row[0]["lift_of_9"] == 5
    met = [": missed" not in part for part in study.judged(row).split(", ")]
    assert met == [True, True, False, True, False]  # lift, clear lift, coverage, FID, copying
    assert study.variant(runs[2]["config"]) == "ga-ae_lambda0_digit9_2pct"
    assert study.variant(runs[4]["config"]) == "ga-ae_digit9_2pct_bfloat16"


def test_an_answer_is_at_most_six_lines():
    one = study.rows([finished()])
    assert len(study.answer(one, "9 at 2 %")) == 2  # local codes, prior codes
    many = study.rows([finished(seed, model=model, **settings) for seed in range(3)
                       for model, settings in [("ga-ae", {}), ("ga-ae", {"geometry": 0.0}),
                                               ("ae", {}), ("vae", {"lift": 3.0})]])
    lines = study.answer(many, "9 at 2 %")
    assert len(lines) == 6 and "vae 3.01 ± 0.01" in lines[3]


def test_bad_input_is_one_line_and_writes_nothing(tmp_path):
    refused(script("imbalance_study.py", "--report-only", cwd=tmp_path), "no finished run")
    argv = [*SMOKE, "--model", "ae", "--out-dir", str(tmp_path / "out"), "--train-size", "50000"]
    for ratios in [["0.02", "0.5"], ["0.000001"]]:
        with pytest.raises(common.UserError, match=r"possible is 2e-05 to 0\.11"):
            study.main([*argv, "--rare-ratio", *ratios])
    assert not list(tmp_path.iterdir())
