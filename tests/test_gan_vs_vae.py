"""GAN against VAE: losses in closed form, what a step may touch, planted collapse, runs, resume."""

import copy
import functools
import math
import types

import common

import numpy as np
import pytest
import torch
from conftest import SMOKES, check_elbo, check_report, check_resume
from scipy.spatial.distance import cdist

import gan_vs_vae as study

SMOKE = SMOKES["gan_vs_vae"]
CPU = torch.device("cpu")
ARGS = types.SimpleNamespace(compile=False, samples=100)


def settings(model, **own):
    config = {"dataset": "glyphs", "model": model, "epochs": 1, "batch_size": 32, "lr": 1e-3,
              "train_size": 64, "precision": "float32", "seed": 0}
    config |= {"gan": {"loss": "hinge", "z_dim": 8}, "tuned-gan": study.TUNED,
               "vae": {"latent_dim": 4}, "vae-gan": {"latent_dim": 4, "stage_epochs": 1}}[model]
    return config | own


@pytest.fixture
def images():
    return torch.rand(16, 1, 28, 28)


@pytest.mark.parametrize(("loss", "d", "g"), [
    ("hinge", 2, 0), ("bce", 2 * math.log(2), math.log(2))])
def test_losses_of_a_blind_discriminator_and_their_gradients(loss, d, g):
    real, fake = torch.zeros(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    d_loss, g_loss = study.discriminator_loss(loss, real, fake), study.generator_loss(loss, fake)
    assert (d_loss.item(), g_loss.item()) == pytest.approx((d, g))
    to_real, to_fake = torch.autograd.grad(d_loss, (real, fake))
    assert (to_real < 0).all() and (to_fake > 0).all()  # D wants real up and fake down
    assert (torch.autograd.grad(g_loss, fake)[0] < 0).all()


@pytest.mark.parametrize(("model", "step", "attached"), [
    ("gan", "gan_step", [False, False, True]),  # real, fake, and the fake that G learns from
    ("vae-gan", "discriminators_step", [False, False])])
def test_what_d_learns_from_is_detached_and_noise_is_fresh(model, step, attached, images):
    nets, optimizers = study.build(settings(model), CPU)
    seen, noises = [], []
    for name in {"D", "D_z"} & set(nets):
        nets[name].register_forward_pre_hook(lambda m, x: seen.append(x[0].requires_grad))
    nets["G"].first.register_forward_hook(lambda m, z, out: noises.append(z[0]))
    getattr(study, step)(nets, optimizers, images, settings(model))
    assert seen == attached * (2 if "D_z" in nets else 1)
    assert len(noises) == 1 or not torch.equal(*noises)


def test_an_update_is_adams_on_the_gradient_of_its_own_weights():
    nets, optimizers = study.build(settings("gan"), CPU)
    twins, z = copy.deepcopy(nets), torch.randn(8, 8)
    study.update([optimizers["G"]], -nets["D"](nets["G"](z)).mean())
    (-twins["D"](twins["G"](z)).mean()).backward()
    torch.optim.Adam(twins["G"].parameters(), lr=1e-3, betas=(0.5, 0.999), foreach=False).step()
    for a, b in zip(nets["G"].parameters(), twins["G"].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert all(weight.grad is None for weight in nets["D"].parameters())


@torch.no_grad()
def test_the_elbo_against_torch_distributions():
    nets, _ = study.build(settings("vae"), CPU)
    E, G = nets["E"].eval(), nets["G"].eval()
    E[-1].weight.data *= 200
    check_elbo(lambda x: study.elbo_losses(E, G, x).values(), lambda x: E(x).chunk(2, dim=1),
               G.logits)
    check_elbo(lambda x: map(torch.tensor, study.mean_elbo(nets, x).values()),
               lambda x: E(x).chunk(2, dim=1), G.logits)


@pytest.mark.parametrize(("steps", "weight"), [(0, 10 / 11), (989, 0.01)])
def test_the_moving_average_is_that_of_the_last_tenth_of_the_steps(steps, weight, images):
    nets, optimizers = study.build(settings("tuned-gan"), CPU)
    nets["average"].n_averaged += steps
    old = nets["average"].module.first.weight.clone()
    study.gan_step(nets, optimizers, images, settings("tuned-gan"))
    want = (1 - weight) * old + weight * nets["G"].first.weight
    assert torch.allclose(nets["average"].module.first.weight, want, atol=1e-7)
    mean = nets["average"].module.trunk[0].running_mean  # BatchNorm's statistics too
    assert torch.allclose(mean, weight * nets["G"].trunk[0].running_mean, atol=1e-6)


def test_only_a_tuned_discriminator_sees_images_moved_each_by_its_own(monkeypatch, images):
    x = torch.rand(32, 1, 28, 28).requires_grad_()
    moved = study.shifted(x, 3)
    windows = torch.nn.functional.pad(x, (3,) * 4).unfold(2, 28, 1).unfold(3, 28, 1)
    same = (windows == moved[:, :, None, None]).flatten(4).all(4)  # (32, 1, 7, 7): every place
    image, _, down, right = same.nonzero().T
    assert image.tolist() == [*range(32)]  # each at one place
    assert len(down.unique()) == len(right.unique()) == 7 and not torch.equal(down, right)
    assert torch.autograd.grad(moved.sum(), x)[0].unique().tolist() == [0, 1]
    calls = []
    monkeypatch.setattr(study, "shifted", lambda x, by: (calls.append(by), x)[1])
    for model in ["gan", "tuned-gan"]:
        study.gan_step(*study.build(settings(model), CPU), images, settings(model))
    assert calls == [2] * 3  # real, generated for D, generated for G


@pytest.mark.parametrize(("model", "stage"), [("gan", 1), ("tuned-gan", 1), ("vae", 1),
                                              ("vae-gan", 2), ("vae-gan", 3)])
def test_every_step_on_every_device_in_both_precisions(monkeypatch, device, model, stage):
    if device == "meta":  # which fused Adam does not know
        monkeypatch.setattr(study, "update", lambda chosen, loss: loss.backward())
    x, found = torch.rand(16, 1, 28, 28, device=device), []
    for precision in ["float32", "bfloat16"]:
        config = settings(model, precision=precision)
        torch.manual_seed(0)
        nets, optimizers = study.build(config, CPU)
        for net in nets.values():
            getattr(net, "module", net).to(device)  # the moving average counts on the CPU
        losses = study.step(nets, optimizers, x, config, stage)
        with common.autocast(x, config):
            outputs = [nets[name](torch.rand(16, 4, device=device)) for name in {"D_z"} & set(nets)]
        for tensor in [*losses.values(), *outputs]:
            assert tensor.device.type == device and tensor.dtype == torch.float32
        found.append(losses.get("loss", losses.get("d_loss")))
    if device != "meta":
        exact, low = (loss.item() for loss in found)
        assert exact != low and exact == pytest.approx(low, rel=0.02)


def test_a_compiled_step_is_the_eager_one(monkeypatch, images):
    # without code generation, which takes half a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    config, losses = settings("tuned-gan"), []
    for on in [False, True]:
        torch.manual_seed(0)
        nets, optimizers = study.build(config, CPU)
        step = common.compiled(study.step, on, CPU)
        step(nets, optimizers, images, config, 1)
        found = step(nets, optimizers, images, config, 1)
        losses.append({key: value.item() for key, value in found.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)


def test_the_hybrids_vae_is_unchanged_while_frozen_and_trained_before_and_after(images):
    config = settings("vae-gan")
    nets, optimizers = study.build(config, CPU)
    assert [optimizers[name].param_groups[0]["lr"] for name in "EGHD"] == [1e-3, 1e-3, 5e-3, 1e-3]
    for stage, moving in [(1, "E G"), (2, "H D_z D"), (3, "E G H D_z D")]:
        for name in ["E", "G"]:
            nets[name].train(stage == 1)
        before = copy.deepcopy({name: net.state_dict() for name, net in nets.items()})
        losses = study.step(nets, optimizers, images, config, stage)
        assert ("loss" in losses, "d_loss" in losses) == (stage != 2, stage > 1)
        for name, net in nets.items():  # buffers too
            same = [torch.equal(value, before[name][key]) for key, value in
                    net.state_dict().items()]
            assert all(same) == (name not in moving.split())


# ----------------------------------------------------------------------------- metrics and collapse


def test_manifold_metrics_on_equal_disjoint_and_collapsed_sets():
    found = [study.manifold_metrics(torch.randn(600, 4), torch.randn(600, 4)) for _ in range(8)]
    assert np.mean([f["coverage"] for f in found]) == pytest.approx(1 - 2**-5, abs=0.01)
    real = torch.randn(300, 4)
    assert set(study.manifold_metrics(real, real + 100).values()) == {0.0}
    one = study.manifold_metrics(real, real[:1].repeat(300, 1))
    assert one["precision"] == 1 and one["recall"] == 0 and one["coverage"] < 0.1


def test_manifold_metrics_against_a_naive_count():
    real, fake, k = torch.randn(40, 3), torch.randn(30, 3) * 1.3, 3
    distance = cdist(real, fake)
    in_real = distance < np.sort(cdist(real, real), 1)[:, k, None]
    in_fake = distance < np.sort(cdist(fake, fake), 1)[:, k]
    assert study.manifold_metrics(real, fake, k) == pytest.approx({
        "precision": in_real.any(0).mean(), "recall": in_fake.any(1).mean(),
        "coverage": in_real.any(1).mean()})


def test_the_floor_and_planted_collapse(data, classifier):
    reference = study.Reference(data, classifier, 500)
    real, x, y = reference.scale["real"], data.x_train[:5000], data.y_train[:5000]
    assert real["sets"] == 6 and 0 < real["fid_std"] < real["fid"]

    def below(images):
        numbers = reference.score(*classifier.predict(images))
        return [key for key, least in study.COLLAPSE.items() if numbers[key] < least]
    assert not below(data.x_test[2000:2500])
    one_each = torch.cat([x[y == digit][:1] for digit in range(10)]).repeat(50, 1, 1, 1)
    assert below(one_each) == ["recall"]
    for images in [x[:1].repeat(500, 1, 1, 1), x[y == 3][:400], x[y < 3][:500]]:
        assert "classes" in below(images)


def test_runs_end_to_end_and_the_report_is_made_of_files(tmp_path, small_sets):
    argv = [*SMOKE, "--out-dir", str(tmp_path)]
    metrics = study.main(argv)
    assert len(metrics) == 4
    check_report(study, tmp_path, argv, metrics)


@pytest.mark.parametrize("model", ["vae-gan", "tuned-gan"])
def test_bitwise_resume_and_decay_of_rates(tmp_path, monkeypatch, model, images, classifier):
    rates, real = [], study.step

    def watched(nets, optimizers, *a):
        rates.append(optimizers["G"].param_groups[0]["lr"])
        return real(nets, optimizers, *a)
    monkeypatch.setattr(study, "step", watched)
    features, _ = classifier.predict(images)
    config = settings(model, epochs=3, batch_size=8, lr=3e-3)
    check_resume(tmp_path, lambda folder: study.train(
        common.Run(folder, config), images, images, features, classifier, ARGS), after_epoch=2)
    by_epoch = [3e-3, 2e-3, 1e-3] if model == "tuned-gan" else [3e-3] * 3
    assert rates[::2] == pytest.approx(by_epoch * 2)  # two steps an epoch, and trained twice


def test_the_best_epoch_of_a_hybrid_is_fine_tuned_and_still_reconstructs():
    def best(fids, reconstructions):
        history, merits = [], []
        for fid, nats in zip(fids, reconstructions, strict=True):
            row = {"val_fid": fid, "val_reconstruction": nats}
            merits.append(study.merit(settings("vae-gan", stage_epochs=2), len(history) + 1, row,
                                      history))
            history.append(row)
        return 1 + merits.index(min(merits))
    fids, nats = [9, 1, 2, 2, 3, 8], [90, 80, 80, 80, 100, 83]
    assert [best(fids[:n], nats[:n]) for n in (1, 2, 4, 5, 6)] == [1, 2, 2, 5, 6]
    assert best([9, 1, 2, 2, 9, 8], [90, 80, 80, 80, 100, 140]) == 5  # it loses the least


def test_mnist_alone_runs_where_fashion_mnist_cannot_be_had(monkeypatch, capsys):
    def load(name, folder):
        if name == "fashion-mnist":
            raise common.UserError("no FashionMNIST here")
        return types.SimpleNamespace(name="mnist")
    monkeypatch.setattr(common, "load_data", load)
    assert list(study.load_datasets(study.parse_args([]))) == ["mnist"]
    assert "no FashionMNIST here" in capsys.readouterr().out


def test_the_best_row_is_that_of_validation():
    low, full = ("MNIST bfloat16", "VAE", "latent 4"), ("MNIST", "VAE", "latent 8")
    table = {low: {0: {"val_fid": 2.0, "fid": 1.0}}, full: {0: {"val_fid": 1.0, "fid": 3.0}}}
    assert study.best_of(table, "MNIST", "VAE") == full  # of all precisions
    assert study.best_of(table, "MNIST bfloat16", "VAE") == low
