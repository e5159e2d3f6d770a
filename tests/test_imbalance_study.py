"""The imbalance study: objectives and samplers against oracles, runs, resume, bad input.

    pytest tests/test_imbalance_study.py
"""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import interrupt_after_epoch, numbers, refused, script
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

import common_v1 as common
import imbalance_study as study

SMOKE = ["--dataset", "glyphs", "--train-size", "1000", "--epochs", "1", "--samples", "2000",
         "--device", "cpu"]

# ---------------------------------------------------------------------------------------- objective


def test_kl_and_reconstruction_against_torch_distributions():
    mu, logvar = 3 * torch.randn(64, 5), 4 * torch.randn(64, 5)
    want = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert study.kl_nats(mu, logvar).item() == pytest.approx(want.item(), rel=1e-5)
    logits, x = torch.randn(8, 1, 28, 28), torch.rand(8, 1, 28, 28).round()
    want = -Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1).mean()
    assert study.bernoulli_nats(logits, x).item() == pytest.approx(want.item(), rel=1e-5)


def test_the_objective_is_the_negative_elbo_and_per_image():
    model = study.Autoencoder(4, True)
    x, config = torch.rand(16, 1, 28, 28), {"model": "vae", "beta": 1.0}
    total, reconstruction, code, _ = study.objective(model, x, config)
    assert total.item() == pytest.approx((reconstruction + code).item()) and code > 0
    logits = model.decoder(model.encode(x)[0])
    halves = (study.bernoulli_nats(logits[:8], x[:8]) + study.bernoulli_nats(logits[8:], x[8:])) / 2
    assert study.bernoulli_nats(logits, x).item() == pytest.approx(halves.item(), rel=1e-5)
    assert reconstruction > 300  # summed over 784 pixels of about ln 2 each, not averaged


def linear(weight):
    return lambda z: z @ weight.T


def test_distortion_in_closed_form_for_linear_decoders():
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
    model, x = study.Autoencoder(4, False), torch.rand(32, 1, 28, 28)
    config = {"model": "ga-ae", "code_penalty": 0.01, "geometry": 5.0}
    found = []
    for times in [0, 1, 2]:
        torch.manual_seed(0)
        found.append(study.objective(model, x, config, times))
        total, reconstruction, code, bent = found[-1]
        assert total.item() == pytest.approx((reconstruction + code + 5 * bent).item())
    assert found[0][3] == 0 and found[1][3] > 0
    assert found[2][3].item() == pytest.approx(2 * found[1][3].item())


def jacobian_of_first(decoder, z):
    return torch.autograd.functional.jacobian(lambda c: decoder(torch.cat([c, z[1:]]))[0], z[:1])


def test_the_jacobian_of_one_sample_is_its_own_and_batchnorm_would_fail():
    z, other = torch.randn(8, 4), torch.randn(8, 4)
    other[0] = z[0]
    model = study.Autoencoder(4, False).train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    same = [jacobian_of_first(model.decode, v) for v in (z, other)]
    assert torch.allclose(*same, atol=1e-6)
    coupled = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.SiLU(),
                            nn.Linear(16, 9)).train()
    assert not torch.allclose(*[jacobian_of_first(coupled, v) for v in (z, other)], atol=1e-3)


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
    assert torch.equal(model.decode(z), model.decode(z, 1.0))
    sharp, plain = model.decode(z, 0.5), model.decode(z)
    assert ((sharp - 0.5).abs() >= (plain - 0.5).abs() - 1e-6).all()


@pytest.mark.parametrize("sampler", ["gmm", "local"])
def test_samplers_recover_the_weight_of_a_small_cluster(mixture, sampler):
    codes = study.draw_codes(sampler, 20_000, mixture, seed=0)
    share = (codes.mean(1) > 5).double().mean().item()
    assert abs(share - 0.02) < 3 * math.sqrt(0.02 * 0.98 / 20_000) + 1e-3
    assert codes[codes.mean(1) < 5].std(0).mean().item() == pytest.approx(1, abs=0.1)


def test_local_sources_are_evenly_spaced_and_shared(mixture):
    for n, size, first in [(20_000, 50_000, 1000), (7, 3, 1), (500, 500, 20)]:
        at = study.evenly(n, size, torch.Generator().manual_seed(0))
        assert len(at) == n and at.min() >= 0 and at.max() < size
        assert abs((at < first).sum().item() - n * first / size) < 1  # the rare ones come first
        assert at.bincount().max() <= -(-n // size)
        assert n < 10 or not torch.equal(at, at.sort().values)


def test_pullback_noise_is_as_long_everywhere_in_decoded_images(mixture):
    z = torch.cat([mixture[100:2100], 0.5 * mixture[100:2100] + 20])
    stretch = lambda z: torch.where(z.mean(1, keepdim=True) < 10, z, 6 * z)  # the second part
    zero = common.generator(0, "sampler", "local")
    at = study.evenly(4000, len(z), zero)
    draws = {s: study.draw_codes(s, 4000, z, 0, stretch) for s in ("local", "pullback")}
    assert torch.equal(draws["local"], study.local_codes(z, at, zero))
    assert not torch.equal(draws["local"], study.draw_codes("local", 4000, z, 1))
    norm = z.square().sum(1)
    near = z[torch.addmm(norm, z, z.T, alpha=-2).topk(11, largest=False).indices]
    centre = (near.mean(1) + 0.5 * (z - near.mean(1)))[at]
    noise = {s: codes - centre for s, codes in draws.items()}
    ratio = (noise["pullback"].norm(dim=1) / noise["local"].norm(dim=1))
    spread = stretch(near.flatten(0, 1)).view(-1, 11, 3).var(1).sum(1).sqrt()[at]
    assert torch.allclose(ratio * spread, (ratio * spread).mean().expand(4000), rtol=1e-3)
    assert torch.allclose(noise["pullback"].norm(), noise["local"].norm(), rtol=1e-4)
    assert ratio[at < 2000].mean() > 2.5 * ratio[at >= 2000].mean()


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
    assert not torch.equal(*[study.local_codes(z, torch.arange(9), torch.Generator().manual_seed(
        2), at=z * torch.tensor(of)) for of in [[1.0, 1, 1], [1.0, 1, 0]]])
    codes = torch.randn(3000, 32, generator=g)
    drawn = study.local_codes(codes, torch.arange(3000).repeat(3), g)
    assert (drawn.var(0).sum() / codes.var(0).sum()).item() == pytest.approx(1, abs=0.08)
    flat = torch.cat([z, torch.zeros(400, 5)], 1)  # no noise in directions without codes
    assert study.local_codes(flat, torch.arange(400), g)[:, 3:].abs().max() == 0
    assert study.local_codes(z[:1], torch.tensor([0, 0]), g).allclose(z[:1])  # no neighbour


# --------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("digit", [0, 1, 9])
def test_the_split_has_exactly_the_rare_images_asked_for(data, digit):
    config = {"rare_digit": digit, "rare_ratio": 0.02, "train_size": 50_000, "seed": 3}
    part = study.split(data, config)
    y, y_val = data.y_train[part["train"]], data.y_train[part["val"]]
    assert (len(y), (y == digit).sum()) == (50_000, 1000)
    assert (len(y_val), (y_val == digit).sum()) == (3000, 60)
    assert len(set(part["train"].tolist()) | set(part["val"].tolist())) == 53_000
    assert not torch.equal(part["train"], study.split(data, {**config, "seed": 4})["train"])


def test_glyphs_are_deterministic_varied_digits():
    first = common.glyphs()
    common.glyphs.cache_clear()
    again = common.glyphs()
    assert torch.equal(first.x_train, again.x_train) and torch.equal(first.y_test, again.y_test)
    assert first.x_train.shape == (60_000, 1, 28, 28) and first.x_test.shape == (10_000, 1, 28, 28)
    assert first.x_train.min() >= 0 and first.x_train.max() <= 1
    assert first.y_train.bincount().tolist() == [6000] * 10
    assert len(first.x_train[:2000].unique(dim=0)) == 2000


# --------------------------------------------------------------------------------------------- runs


def test_a_run_end_to_end_writes_what_it_should(tmp_path):
    argv = [*SMOKE, "--out-dir", str(tmp_path)]
    metrics = study.main([*argv, "--model", "vae", "ga-ae", "--sampler", *study.SAMPLERS])
    assert set(metrics) == {"vae_digit9_2pct/seed_0", "ga-ae_digit9_2pct/seed_0"}
    root = tmp_path / "imbalance_study/glyphs"
    folder = root / "ga-ae_digit9_2pct/seed_0"
    for name in ["config.json", "history.csv", "final_metrics.json", "checkpoint.pt", "tsne.png",
                 "best_model.pt", "training.log", "losses.png", "samples_local.png"]:
        assert (folder / name).stat().st_size > 0, name
    scores = metrics["ga-ae_digit9_2pct/seed_0"]["samplers"]
    assert set(scores) == set(study.SAMPLERS) and scores["local"]["n"] == 2000
    assert {s for s in scores if "temperature_1" in scores[s]} == {"local"}
    before = (root / "report.md").read_bytes()
    assert b"glyphs" in before and b"local" in before
    (root / "report.md").unlink()
    study.main([*argv, "--report-only"])
    assert (root / "report.md").read_bytes() == before
    for weights in ["best_model.pt", "checkpoint.pt"]:
        (folder / weights).unlink()
    study.main([*argv, "--model", "ga-ae"])  # finished: skipped, even without its weights
    assert not (folder / "checkpoint.pt").exists()
    assert (root / "report.md").read_bytes() == before


def test_an_interrupted_run_continues_bitwise(tmp_path):
    argv = [*SMOKE, "--model", "ga-ae", "--sampler", "local", "--epochs", "4"]
    study.main([*argv, "--out-dir", str(tmp_path / "whole")])
    interrupt_after_epoch(2, lambda: study.main([*argv, "--out-dir", str(tmp_path / "parts")]))
    study.main([*argv, "--out-dir", str(tmp_path / "parts")])
    a, b = (tmp_path / d / "imbalance_study/glyphs/ga-ae_digit9_2pct/seed_0"
            for d in ["whole", "parts"])
    assert numbers(a) == numbers(b)
    left, right = (common.load_torch(d / "checkpoint.pt")["model"] for d in (a, b))
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert len((b / "history.csv").read_text().splitlines()) == 5


def test_the_order_of_the_batches_is_shuffled_in_every_epoch(tmp_path, monkeypatch):
    seen, real = [], study.objective
    def spy(model, x, config, times=1):
        if model.training and torch.is_grad_enabled():
            seen.append(x.clone())
        return real(model, x, config, times)
    monkeypatch.setattr(study, "objective", spy)
    study.main([*SMOKE, "--model", "ae", "--sampler", "prior", "--epochs", "2", "--out-dir",
                str(tmp_path)])
    first, second = torch.cat(seen[:7]), torch.cat(seen[7:])
    assert not torch.equal(first, second)
    data = common.glyphs()
    part = study.split(data, {"rare_digit": 9, "rare_ratio": 0.02, "train_size": 1000, "seed": 0})
    assert not torch.equal(first, data.x_train[part["train"]][:len(first)])


def test_an_extra_evaluation_changes_no_training_number(tmp_path):
    argv = [*SMOKE, "--model", "vae", "--sampler", "prior", "--out-dir", str(tmp_path)]
    study.main(argv)
    folder = tmp_path / "imbalance_study/glyphs/vae_digit9_2pct/seed_0"
    before = numbers(folder)
    study.main([*argv, "--sampler", "prior", "gaussian"])
    after = numbers(folder)
    assert after["samplers"].pop("gaussian") and after == before


def test_shards_make_the_whole(tmp_path):
    runs = study.grid(study.parse_args(["--seeds", "0", "1", "--geometry", "0", "5"]), "glyphs")
    assert len(runs) == 8
    both = [r for k in range(3) for r in runs[k::3]]
    assert sorted(map(str, both)) == sorted(map(str, runs))


# ---------------------------------------------------------------------------------------- bad input


def test_a_ratio_without_enough_images_names_the_largest(tmp_path):
    result = script("imbalance_study.py", *SMOKE, "--train-size", "50000", "--rare-ratio",
                    "0.5", "--out-dir", str(tmp_path / "out"))
    refused(result, "largest possible is 0.1132")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused(tmp_path):
    with pytest.raises(common.UserError, match="--device cuda"):
        study.main([*SMOKE[:-2], "--device", "cuda", "--out-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_another_configuration_and_a_corrupt_checkpoint_are_refused(tmp_path):
    argv = [*SMOKE, "--model", "ae", "--sampler", "prior", "--out-dir", str(tmp_path)]
    study.main(argv)
    folder = tmp_path / "imbalance_study/glyphs/ae_digit9_2pct/seed_0"
    kept = (folder / "best_model.pt").read_bytes()
    with pytest.raises(common.UserError, match=r"lr = 0.002, not 0.5.*--fresh"):
        study.main([*argv, "--lr", "0.5"])
    (folder / "final_metrics.json").unlink()  # a finished run needs no checkpoint
    (folder / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(common.UserError, match=r"checkpoint.pt is corrupt.*--fresh"):
        study.main(argv)
    assert (folder / "best_model.pt").read_bytes() == kept
    assert study.main([*argv, "--fresh"])


def test_nothing_is_written_or_lost_when_something_is_wrong(tmp_path, monkeypatch, capsys):
    argv = [*SMOKE, "--model", "ae", "--sampler", "prior", "--out-dir", str(tmp_path)]
    study.main(argv)
    root = tmp_path / "imbalance_study/glyphs"
    folder = root / "ae_digit9_2pct/seed_0"
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(common.UserError, match="measured on 2000 samples, not 2100"):
        study.main([*argv, "--samples", "2100"])
    with pytest.raises(common.UserError, match=r"lr = 0\.002, not 0\.5"):
        study.main([*argv, "--model", "vae", "ae", "--lr", "0.5"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(common.UserError, match="pip install tensorboard"):
        study.main([*argv, "--fresh", "--tensorboard"])
    assert study.main([*argv, "--seeds", "7", "--shard", "5/6"]) == {}
    assert "no run in shard 5/6" in capsys.readouterr().out
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert [f.name for f in root.iterdir() if f.is_dir()] == ["ae_digit9_2pct"]
    (folder / "best_model.pt").unlink()
    with pytest.raises(common.UserError, match="no weights to measure gaussian"):
        study.main([*argv, "--sampler", "gaussian"])


def test_one_latent_dimension_and_a_common_rare_class(tmp_path):
    argv = [*SMOKE, "--model", "ae", "--sampler", "local", "--out-dir", str(tmp_path)]
    metrics = study.main([*argv, "--latent-dim", "1", "--rare-ratio", "0.5"])
    assert metrics["ae_digit9_50pct/seed_0"]["n_train_rare"] == 500
    grid = study.main([*argv, "--rare-digit", "9", "3", "3", "--rare-ratio", "0.1", "0.2"])
    assert len(grid) == 4  # in the same report
    text = (tmp_path / "imbalance_study/glyphs/report.md").read_text()
    for words in ["**Digit 3 at 10 %, latent_dim 32, 1,000 training images, 1 epochs.**",
                  "| digit 9 at 20 %, latent_dim 32: ae, local |",
                  "| digit 9 at 50 %, latent_dim 1: ae, local |",
                  "![By digit, at 10 %, latent_dim 32]", "![By digit, at 20 %, latent_dim 32]",
                  "**By share, digit 9, latent_dim 32**", "**By share, digit 3, latent_dim 32**"]:
        assert words in text
    assert "By digit, at 50 %" not in text
    assert all((tmp_path / "imbalance_study/glyphs" / name).exists()
               for name in re.findall(r"\]\(([^)]+)\)", text))


# --------------------------------------------------------------------------------------- downstream


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
    assert study.additions("none", x, y, None, None, 0)[0].shape == (0, 1, 28, 28)
    near = z - 4.9 * y[:, None]  # classes that lie in each other: neighbours are still their own
    seen = []
    study.additions("local", x, y, near, lambda codes: (seen.append(codes), decode(codes))[1], 0)
    other = near.clone()
    other[y != 2] += 100
    study.additions("local", x, y, other, lambda codes: (seen.append(codes), decode(codes))[1], 0)
    assert torch.equal(*[codes[labels == 2] for codes in seen])


def test_downstream_uses_the_imbalanced_images_alone_and_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "DOWNSTREAM_STEPS", 12)
    argv = [*SMOKE, "--sampler", "local", "--model", "ae", "ga-ae", "--downstream", "--out-dir"]
    data = common.glyphs()
    data = data._replace(x_test=data.x_test[:1000], y_test=data.y_test[:1000])
    config = study.grid(study.parse_args(argv[:-1]), "glyphs")[0]
    mine = torch.cat(list(study.split(data, config).values()))
    blind = data._replace(x_train=torch.full_like(data.x_train, math.nan),
                          x_test=data.x_test.flip(0), y_test=data.y_test.flip(0))
    blind.x_train[mine] = data.x_train[mine]
    real, calls, stop_at = common.train_classifier, [], [0]

    def watched(x, y, device, *key, **more):
        if len(calls) == stop_at[0] > 0:
            raise KeyboardInterrupt
        calls.append((x, y, key, more))
        return real(x, y, device, *key, **more)
    monkeypatch.setattr(common, "train_classifier", watched)
    monkeypatch.setattr(common, "load_data", lambda *a: data)
    study.main([*argv, str(tmp_path / "a")])
    seeing, calls[:], stop_at[0] = list(calls), [], 2
    assert len(seeing) == 5  # nothing, shifts, SMOTE, ae; ga-ae
    monkeypatch.setattr(common, "load_data", lambda *a: blind)
    with pytest.raises(KeyboardInterrupt):
        study.main([*argv, str(tmp_path / "b")])
    stop_at[0] = 0
    study.main([*argv, str(tmp_path / "b")])
    assert len(calls) == 5  # two were there
    for (x, y, *how), (x_b, y_b, *how_b) in zip(seeing, calls, strict=True):
        assert torch.equal(x, x_b) and torch.equal(y, y_b) and how == how_b == list(seeing[0][2:])
    root = tmp_path / "a/imbalance_study/glyphs"
    text = (root / "report.md").read_text()
    assert "No model's images are shown to be better in balanced accuracy than adding" in text
    calls.clear()
    study.main([*argv, str(tmp_path / "a"), "--fresh"])
    assert len(calls) == 5
    for folder in root.glob("*ae_digit9_2pct/seed_0"):
        (folder / "downstream.json").unlink()
        (folder / "best_model.pt").unlink()
    with pytest.raises(common.UserError, match="no weights for --downstream"):
        study.main([*argv, str(tmp_path / "a")])


@pytest.mark.parametrize("gain", [5, 0])
def test_the_downstream_answer_follows_the_numbers(tmp_path, gain):
    models = {"ae": []}
    for seed in range(3):
        c = {"rare_digit": 9, "rare_ratio": 0.02, "train_size": 100, "seed": seed}
        folder = tmp_path / f"ae/seed_{seed}"
        folder.mkdir(parents=True)
        models["ae"].append({"config": c, "folder": folder.relative_to(tmp_path)})
        for file, more in [(study.baseline_file(tmp_path, "none", c), 0),
                           (study.baseline_file(tmp_path, "shifts", c), 0.01),
                           (folder / "downstream_smote.json", 0.02),
                           (folder / "downstream.json", 0.01 * gain + 0.002 * seed)]:
            file.parent.mkdir(exist_ok=True)
            common.save_json(file, {"steps": 9, **dict.fromkeys(
                study.DOWNSTREAM, 0.8 + 0.001 * seed + more)})
    text = study.downstream_section(tmp_path, models, "digit 9 at 2 %")[0]
    assert ("ae, local codes: better in balanced accuracy than adding each of nothing, shifted "
            in text) == bool(gain)
    assert ("No model's images are shown to be better" in text) != bool(gain)
    assert gain or ("ae, local codes, are in balanced accuracy not to be told from nothing, worse "
                    "than shifted copies or SMOTE between ae codes; in recall of the rare class "
                    "not to be told from nothing, worse than") in text
    assert study.downstream_section(tmp_path / "elsewhere", models, "") == ("", [])


@pytest.mark.parametrize(("lifts", "half", "noise"), [
    ([1.04, 1.05, 1.06], 0.01, False), ([1.0, 1.05, 1.1], 0.01, True),  # of the seeds
    ([1.04, 1.05, 1.06], 0.06, False), ([1.04, 1.05, 1.06], 0.1, True),  # of the confusion too
    ([1.05], 0.06, True), ([1.05], 0.01, False)])  # of one
def test_a_verdict_that_noise_decides_is_called_so(lifts, half, noise):
    runs = [{"metrics": {"samplers": {"local": {
        "calibrated_lift": v, "calibrated_lift_low": v - half, "calibrated_lift_high": v + half,
        "calibrated_lift_confusion": half / 2,
        "fid": 0.1, "copying": 0.8, "clear_lift": 1.0,
        "rare": {"coverage": 0.9}, "rare_real": {"coverage": 0.9}}}, "fid_floor": 0.1},
        "config": {"dataset": "mnist", "model": "ae", "rare_digit": 9, "rare_ratio": 0.02}}
        for v in lifts]
    assert study.judged("calibrated lift", runs, "local") == (True, noise)
    row = study.results_table([("ae", "local", runs)]).splitlines()[2].split("|")
    assert "✓" in row[6] and ("≈" in row[6]) == noise
    others = "".join(row[7:])  # the same for all seeds; one seed alone tells nothing
    assert others.count("≈") == (4 if len(lifts) == 1 else 0)


def test_differences_are_paired_by_seed_and_the_answer_names_them():
    def runs(lift, coverage, samplers):
        scores = lambda seed, more: {
            "calibrated_lift": lift + 0.01 * seed, "clear_lift": 1.0, "fid": 0.2 + more,
            "rare": {"coverage": coverage + more + 0.001 * seed, "kid": 0.1},
            "rare_real": {"coverage": 1.0}, "copying": 0.8, "rare_lift": 1.0,
            "calibrated_lift_low": 1, "calibrated_lift_high": 1.2, "calibrated_lift_confusion": 0.1}
        return [{"config": {"seed": seed, "model": "ga-ae"}, "metrics": {
            "samplers": {s: scores(seed, 0.1 * i) for i, s in enumerate(samplers)},
            "fid_floor": 0.1}} for seed in range(3)]
    models = {"ga-ae λ=0": runs(1.3, 0.7, ["local"]),
              "ga-ae": runs(1.1, 0.7, ["local", "pullback"])}
    found = dict(study.comparisons(models))
    assert list(found) == ["ga-ae, local against ga-ae λ=0, local",
                           "ga-ae, pullback against ga-ae, local"]
    d = found["ga-ae, local against ga-ae λ=0, local"]["lift's distance from 1"]
    assert d.mean == pytest.approx(-0.2) and d.sign == -1 and d.n == 3
    text = study.answer("Digit 9", models)
    assert ("ga-ae, local against ga-ae λ=0, local (n=3): better lift's distance from 1 (−0.200, "
            "−0.200 to −0.200).") in text
    assert "ga-ae, pullback against ga-ae, local (n=3): better rare coverage / real (+0.100" in text
    assert "; worse FID (+0.100" in text
    table = study.differences_table(models)
    assert "| ga-ae, local against ga-ae λ=0, local | 3 | **−0.200** (−0.200 to −0.200)" in table
    assert study.differences_table({"vae": models["ga-ae λ=0"]}) == ""
    models["ga-ae"][0]["config"]["code_penalty"] = 1  # then they differ in more than λ
    assert list(dict(study.comparisons(models))) == ["ga-ae, pullback against ga-ae, local"]


@pytest.mark.parametrize(("lift", "n", "said"), [
    (1.0, 3, "it is kept by ga-ae."), (1.3, 3, "it is lost by ga-ae (misses calibrated lift)."),
    (1.1, 3, "it is undecided for ga-ae (misses calibrated lift within noise)."),
    (1.07, 3, "it is kept by ga-ae (within noise: calibrated lift)."),
    (1.0, 1, "With local codes it is undecided for ga-ae (n=1).")])
def test_the_verdict_follows_the_numbers(lift, n, said):
    models = {"ga-ae": [{"config": {"seed": seed, "model": "ga-ae"}, "metrics": {
        "samplers": {"local": {
            "calibrated_lift": lift + 0.01 * seed, "clear_lift": 1.0, "fid": 0.1, "copying": 0.8,
            "rare": {"coverage": 1.0}, "rare_real": {"coverage": 1.0}, "rare_lift": 1.0,
            "calibrated_lift_low": lift - 0.05, "calibrated_lift_high": lift + 0.05,
            "calibrated_lift_confusion": 0.02}}, "fid_floor": 0.1}} for seed in range(n)]}
    assert said in study.answer("Digit 9", models)


def test_what_other_code_measured_is_named(tmp_path):
    config = {"model": "ae", "rare_digit": 9, "rare_ratio": 0.02, "seed": 0}
    run = {"config": config, "folder": Path("run"), "metrics": {
        "environment": {"commit": "a"},
        "samplers": {"prior": {}, "local": {"environment": {"commit": "a"}},
                     "pullback": {"environment": {"commit": "b"}}}}}
    (tmp_path / "run").mkdir()
    said = "Measured later, with `--sampler` or `--downstream`: "
    assert study.measured_later(tmp_path, [run, {**run, "config": config | {"seed": 1}}]) == (
        said + "pullback of ae_digit9_2pct, seeds 0 1, at commit b.")
    del run["metrics"]["samplers"]["pullback"]
    assert study.measured_later(tmp_path, [run]) == ""
    common.save_json(tmp_path / "run/downstream.json", {"environment": {"commit": "c"}})
    assert study.measured_later(tmp_path, [run]) == (
        said + "downstream of ae_digit9_2pct, seeds 0, at commit c.")


def test_n_is_the_number_of_seeds_that_have_a_value():
    scores = {"fid": 0.1, "calibrated_lift": 1.0, "calibrated_lift_low": 0.9, "copying": 1.0,
              "calibrated_lift_high": 1.1, "calibrated_lift_confusion": 0.1, "clear_lift": 1.0}
    known = {**scores, "rare": {"coverage": 0.9}, "rare_real": {"coverage": 0.9}}
    few = {**scores, "rare": None, "n_rare": 3}  # too few images called rare
    runs = [{"metrics": {"samplers": of, "fid_floor": 0.1},
             "config": {"dataset": "mnist", "model": "ae", "rare_digit": 9, "rare_ratio": 0.02}}
            for of in [{"local": known}, {"local": few}, {"prior": known}]]
    row = study.results_table([("ae", "local", runs)]).splitlines()[2].split("|")
    assert row[2].strip() == "2" and "(n=1)" in row[9] and "(n=1)" not in row[6]


def test_a_process_from_another_folder_and_an_unwritable_one(tmp_path):
    result = script("imbalance_study.py", *SMOKE, "--model", "ae", "--sampler", "prior",
                    cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results/imbalance_study/glyphs/report.md").exists()
    (tmp_path / "file").write_text("in the way")
    refused(script("imbalance_study.py", *SMOKE, "--out-dir", str(tmp_path / "file")), "file")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    argv = [*SMOKE, "--model", "ae", "--sampler", "prior", "--epochs", "3", "--out-dir",
            str(tmp_path)]
    real, calls = study.objective, []
    def broken(*a):
        calls.append(1)
        return real(*a) * (math.nan if len(calls) == 11 else 1)  # 7 steps and a validation an epoch
    monkeypatch.setattr(study, "objective", broken)
    with pytest.raises(common.UserError, match="epoch 2, step 3"):
        study.main(argv)
    folder = tmp_path / "imbalance_study/glyphs/ae_digit9_2pct/seed_0"
    assert len(common.load_torch(folder / "checkpoint.pt")["history"]) == 1


def test_no_network_and_no_data_means_glyphs_with_a_warning(tmp_path, monkeypatch, capsys):
    import torchvision.datasets
    def offline(*a, **k):
        raise RuntimeError("no network")
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", offline)
    assert common.load_data(None, str(tmp_path)).name == "glyphs"
    assert "glyphs" in capsys.readouterr().err
    with pytest.raises(common.UserError, match="--data-dir"):
        common.load_data("mnist", str(tmp_path))
