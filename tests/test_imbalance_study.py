"""The imbalance study: objectives and samplers against oracles, runs, resume, bad input."""

import math

import common

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMOKES, check_elbo, check_precisions, check_report, check_resume

import imbalance_study as study

SMOKE = SMOKES["imbalance_study"]
VAE, AE = {"model": "vae", "beta": 1.0}, {"model": "ae"}
GA_AE = {"model": "ga-ae", "code_penalty": 0.01, "geometry": 5.0}


def test_the_objective_of_a_vae_against_torch_distributions():
    model = study.Autoencoder(4, True)
    model.encoder[-1].weight.data *= 100
    check_elbo(lambda x: study.objective(model, x, VAE), lambda x: model.encode(x).chunk(2, 1),
               model.to_logits)


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


@pytest.mark.parametrize("config", [VAE, AE, GA_AE], ids=lambda config: config["model"])
def test_the_objective_on_every_device_in_both_precisions(config, device, monkeypatch):
    def in_float32(*a, real=study.distortion):
        assert device == "meta" or not torch.is_autocast_enabled(device)
        return real(*a)
    monkeypatch.setattr(study, "distortion", in_float32)
    model = study.Autoencoder(4, config["model"] == "vae").to(device)
    x, z = torch.rand(32, 1, 28, 28, device=device), torch.randn(1, 4, device=device)
    check_precisions(lambda: [study.objective(model, x, config), model.encode(x),
                              model.to_logits(z)], list(model.parameters()), device)


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
    for sampler, mean, covariance in [("gaussian", mixture.mean(0), mixture.T.cov()),
                                      ("prior", torch.zeros(3), torch.eye(3))]:
        codes = study.draw_codes(sampler, 50_000, mixture, seed=0)
        assert torch.allclose(codes.T.cov(), covariance, atol=0.08)
        assert torch.allclose(codes.mean(0), mean, atol=0.05)


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

    def decode(z):
        return (100 * z[:, 0])[:, None, None, None].expand(-1, 1, 28, 28)
    more, labels = study.additions(arm, x, y, z, decode, seed=0)
    assert torch.cat([y, labels]).bincount().tolist() == [40] * 10
    assert more.shape[1:] == (1, 28, 28)
    assert torch.allclose(more[:, 0, 14, 14], labels / 10, atol=1e-5)  # neighbours are their own
    assert len(study.additions("none", x, y, z, decode, 0)[0]) == 0


# ----------------------------------------------------------------------------------------- metrics


def test_class_share_recovers_planted_mixtures_through_bad_classifiers():
    """Over 40 random classifiers and mixtures: 95 % intervals hold the truth."""
    rng, inside, errors = np.random.default_rng(0), [], []
    y_held_out = np.repeat(np.arange(10), 500)
    for _ in range(40):
        confusion = 0.7 * np.eye(10) + 0.3 * rng.dirichlet(np.ones(10), 10)
        pi = rng.dirichlet(np.ones(10))
        y = rng.choice(10, 20_000, p=pi)
        said, said_held_out = (rng.multinomial(1, confusion[labels]) for labels in [y, y_held_out])
        counted, share, low, high = study.class_shares(
            *map(torch.from_numpy, [said, said_held_out, y_held_out]))
        inside.append((low <= pi) & (pi <= high))
        errors.append([np.abs(shares - pi).max() for shares in [share, counted]])
    assert 0.92 <= np.mean(inside) <= 0.98
    assert np.mean(errors, 0)[0] < np.mean(errors, 0)[1] / 2


@pytest.fixture(scope="module")
def reference(data, classifier):
    """Of 5,000 training images: copying is the only metric that looks at them one by one."""
    config = {"rare_digit": 9, "rare_ratio": 0.02, "train_size": 5000, "seed": 0}
    train = study.split(data, config)["train"]
    return study.Reference(data, train, config, classifier, 5000)


def planted(data, reference, share):
    """Real test images of the half that is no reference, first nines with this share."""
    rest = reference.halves[1]
    is_nine = data.y_test[rest] == 9
    nines, others = rest[is_nine], rest[~is_nine]
    if share == 1:
        return data.x_test[nines]
    n_nines = round(len(others) * share / (1 - share))
    return data.x_test[torch.cat([nines[:n_nines], others])]


@pytest.mark.parametrize(("share", "lift"), [(0.02, 1), (1, 50), (0, 0), (0.1, 5)])
def test_the_lift_of_planted_sets_of_real_images(data, reference, share, lift):
    found = reference.score(planted(data, reference, share))[0]
    assert found["calibrated_lift_low"] <= lift <= found["calibrated_lift_high"]
    assert found["calibrated_lift"] == pytest.approx(lift, abs=0.15 + 0.02 * lift)
    assert found["rare_lift"] == pytest.approx(lift, abs=0.2 + 0.02 * lift)
    assert found["clear_lift"] == pytest.approx(lift, abs=0.2 + 0.02 * lift)


def test_real_images_score_what_they_should(reference):
    for real in reference.real:  # each by the errors on the other half
        assert real["calibrated_lift_low"] < 1 < real["calibrated_lift_high"]
        assert real["calibrated_lift"] == pytest.approx(1, abs=0.15)
        assert real["clear_lift"] == pytest.approx(1, abs=0.05)
    assert 0 <= reference.coverage.false_share < 0.05  # hardly any other is called a nine


def test_planted_failures_move_the_metric_that_should_notice(data, reference):
    real = planted(data, reference, 0.1)[::3]
    base = reference.score(real)[0]
    noise = reference.score((real + 0.5 * torch.randn_like(real)).clamp(0, 1))[0]
    blur = reference.score(F.avg_pool2d(real, 3, 1, 1))[0]
    repeated = reference.score(real[:1].repeat(len(real), 1, 1, 1))[0]  # a nine: they come first
    copies = reference.score(reference.x_train[:len(real)])[0]
    dropped = reference.score(planted(data, reference, 0))[0]
    assert dropped["calibrated_lift"] < 0.1
    assert repeated["fid"] > 20 * base["fid"] and repeated["rare"]["coverage"] < 0.1
    assert noise["fid"] > 3 * base["fid"] and blur["fid"] > 3 * base["fid"]
    assert blur["rare"]["coverage"] < 0.9 * base["rare"]["coverage"]
    assert copies["copying"] < 0.01 and base["copying"] == pytest.approx(1, abs=0.05)
    assert base["rare"]["coverage"] == pytest.approx(base["rare_real"]["coverage"], abs=0.05)


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


def test_a_run_end_to_end_downstream_and_the_report(tmp_path, small_sets):
    argv = [*SMOKE, "--out-dir", str(tmp_path), "--downstream", "--downstream-steps", "2"]
    metrics = study.main(argv)
    ((name, scores),) = metrics.items()
    assert set(scores["samplers"]) == set(study.SAMPLERS)
    folder = tmp_path / "imbalance_study/glyphs" / name
    for picture in ["samples.png", "codes.png", "losses.png"]:
        assert (folder / picture).stat().st_size > 2000
    arms = common.load_json(folder / "downstream.json")["arms"]
    assert list(arms) == ["none", "shifts", "local"]
    (folder / "best_model.pt").unlink()
    check_report(study, tmp_path, argv, metrics)  # finished: needs no weights
    with pytest.raises(common.UserError, match=r"best_model\.pt is missing"):  # other steps do
        study.main([*argv, "--downstream-steps", "9"])
    with pytest.raises(common.UserError, match=r"samplers\.prior\.n 2000, this command 2100"):
        study.main([*argv, "--samples", "2100"])


def test_geometry_at_every_fourth_step_and_bitwise_resume(tmp_path, monkeypatch):
    times, real = [], study.objective

    def spy(model, x, config, geometry_times=1):
        if torch.is_grad_enabled():
            times.append(geometry_times)
        return real(model, x, config, geometry_times)
    monkeypatch.setattr(study, "objective", spy)
    config = {**GA_AE, "latent_dim": 4, "epochs": 3, "batch_size": 16, "lr": 1e-3, "seed": 0,
              "precision": "float32"}
    x = torch.rand(128, 1, 28, 28)
    check_resume(tmp_path, lambda folder: study.train(
        common.Run(folder, config), x[:96], x[96:], use_compile=False))
    assert times == [4, 0, 0, 0, 4, 0] * 6  # three epochs, twice


def test_bad_input_writes_nothing(tmp_path):
    argv = [*SMOKE, "--out-dir", str(tmp_path), "--train-size", "50000"]
    for ratios in [["0.02", "0.5"], ["0.000001"]]:
        with pytest.raises(common.UserError, match=r"possible is 2e-05 to 0\.11"):
            study.main([*argv, "--rare-ratio", *ratios])
    with pytest.raises(common.UserError, match="no finished run"):
        study.main([*argv, "--report-only"])
    assert not list(tmp_path.iterdir())
