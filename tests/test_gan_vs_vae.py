"""GAN against VAE: losses in closed form, what a step may touch, planted collapse, runs, resume.

    pytest tests/test_gan_vs_vae.py
"""

import contextlib
import copy
import functools
import math
import types

import common

import numpy as np
import pytest
import torch
from conftest import interrupt_after_epoch

import gan_vs_vae as study

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


# ---------------------------------------------------------------------------------- losses, models


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
def test_the_elbo_against_torch_distributions(images):
    nets, x = study.build(settings("vae"), CPU)[0], images.round()
    E, G = nets["E"].eval(), nets["G"].eval()
    E[-1].weight.data *= 200  # codes far from the prior
    torch.manual_seed(0)
    losses = study.elbo_losses(E, G, x)
    mu, logvar = E(x).chunk(2, dim=1)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    torch.manual_seed(0)
    z = mu + torch.randn_like(mu) * q.scale
    nats = -torch.distributions.Bernoulli(logits=G.logits(z)).log_prob(x).flatten(1).sum(1)
    assert losses["kl"].item() == pytest.approx(kl.sum(1).mean().item(), rel=1e-4)
    assert losses["reconstruction"].item() == pytest.approx(nats.mean().item(), rel=1e-5)
    assert torch.equal(losses["loss"], losses["reconstruction"] + losses["kl"])
    torch.manual_seed(0)
    assert study.mean_elbo(nets, x) == pytest.approx({k: v.item() for k, v in losses.items()})


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
    moved, around = study.shifted(x, 3), torch.nn.functional.pad(x, (3,) * 4)
    places = set()
    for a in range(7):
        for b in range(7):
            same = (moved == around[:, :, a:a + 28, b:b + 28]).flatten(1).all(1)
            places |= {(i, a, b) for i in same.nonzero()[:, 0].tolist()}
    assert len(places) == 32  # each image at one place
    assert {a for _, a, _ in places} == {b for _, _, b in places} == set(range(7))
    assert torch.autograd.grad(moved.sum(), x)[0].unique().tolist() == [0, 1]
    calls = []
    monkeypatch.setattr(study, "shifted", lambda x, by: (calls.append(by), x)[1])
    for model in ["gan", "tuned-gan"]:
        study.gan_step(*study.build(settings(model), CPU), images, settings(model))
    assert calls == [2] * 3  # real, generated for D, generated for G


def test_in_eval_mode_an_image_depends_on_its_own_code(images):
    nets, optimizers = study.build(settings("gan"), CPU)
    study.gan_step(nets, optimizers, images, settings("gan"))
    z = torch.randn(8, 8)
    with pytest.raises(AssertionError, match="eval mode"):
        study.draw(nets, z, CPU)
    nets["G"].eval()
    together = study.draw(nets, z, CPU)
    assert torch.allclose(together[3:4], study.draw(nets, z[3:4], CPU), atol=1e-6)


DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("model", "stage"), [("gan", 1), ("tuned-gan", 1), ("vae", 1),
                                              ("vae-gan", 2), ("vae-gan", 3)])
def test_every_step_stays_on_its_device(monkeypatch, device, model, stage):
    config = settings(model)
    nets, optimizers = study.build(config, CPU)
    for net in nets.values():
        getattr(net, "module", net).to(device)  # the moving average counts on the CPU
    if device == "meta":  # which autocast and fused Adam do not know
        monkeypatch.setattr(common, "autocast", lambda x, config: contextlib.nullcontext())
        monkeypatch.setattr(study, "update", lambda chosen, loss: loss.backward())
    losses = study.step(nets, optimizers, torch.rand(16, 1, 28, 28, device=device), config, stage)
    assert {value.device.type for value in losses.values()} == {device}


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


@pytest.mark.parametrize(("model", "stage"), [("gan", 1), ("vae", 1), ("vae-gan", 3)])
def test_bfloat16_is_of_the_networks_alone(model, stage, images):
    losses = {}
    for precision in ["float32", "bfloat16"]:
        config = settings(model, precision=precision)
        torch.manual_seed(0)
        nets, optimizers = study.build(config, CPU)
        losses[precision] = study.step(nets, optimizers, images, config, stage)
        assert {value.dtype for value in losses[precision].values()} == {torch.float32}
        assert next(nets["G"].parameters()).dtype == torch.float32
        if "D_z" in nets:
            with common.autocast(images, config):
                assert nets["D_z"](torch.rand(16, 4)).dtype == torch.float32
    key = "d_loss" if model == "gan" else "loss"
    full, half = (losses[precision][key].item() for precision in ["float32", "bfloat16"])
    assert full != half == pytest.approx(full, rel=0.02)


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
    distance = lambda a, b: np.linalg.norm(a.numpy()[:, None] - b.numpy()[None], axis=2)
    d = distance(real, fake)
    in_real = d < np.sort(distance(real, real), 1)[:, k, None]
    in_fake = d < np.sort(distance(fake, fake), 1)[:, k]
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


# --------------------------------------------------------------------------------------------- runs


def test_runs_end_to_end_and_the_report_is_made_of_files(tmp_path, small_sets):
    argv = ["--dataset", "glyphs", "--train-size", "64", "--epochs", "1", "--samples", "100",
            "--device", "cpu", "--z-dim", "8", "--loss", "hinge", "--latent-dim", "4",
            "--out-dir", str(tmp_path)]
    metrics = study.main(argv)
    assert len(metrics) == 4
    root = tmp_path / "gan_vs_vae"
    files = {file: file.read_bytes() for file in root.glob("*.*")}
    links = [line for line in (root / "report.md").read_text().splitlines() if line[:2] == "!["]
    assert len(links) >= 8
    for line in links:
        assert (root / line.split("](")[1][:-1]).exists(), line
    assert study.main(argv) == metrics  # finished: skipped, and the report is written again
    assert all(file.read_bytes() == content for file, content in files.items())
    with pytest.raises(common.UserError, match="has n 100, this command 200"):
        study.main([*argv, "--samples", "200"])
    config = next(root.glob("glyphs/*/seed_0/final_metrics.json"))
    other = common.load_json(config)
    other["classifier"]["sha256"] = "another"
    common.save(config, other)
    with pytest.raises(common.UserError, match="classifiers"):
        study.main(["--report-only", "--out-dir", str(tmp_path)])


@pytest.mark.parametrize("model", ["vae-gan", "tuned-gan"])
def test_an_interrupted_run_continues_bitwise(tmp_path, model, images, classifier):
    def trained(folder):
        run = common.Run(tmp_path / folder, settings(model, epochs=3, batch_size=8))
        study.train(run, images, images, classifier.predict(images)[0], classifier, ARGS)
        history = [row | {"seconds": 0} for row in run.history]
        return history, torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)
    history, whole = trained("whole")
    interrupt_after_epoch(2, lambda: trained("parts"))
    again, parts = trained("parts")
    assert history == again and len(history) == 3
    for name in set(whole) - {"progress"}:
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=0)


def test_every_epoch_sees_each_image_once_in_a_new_order_and_the_tuned_rates_decay(
        tmp_path, monkeypatch, classifier):
    seen, rates, real = [], [], study.gan_step

    def watched(nets, optimizers, x, config):
        seen.append((255 * x[:, 0, 0, 0]).round().int().tolist())
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()])
        return real(nets, optimizers, x, config)
    monkeypatch.setattr(study, "gan_step", watched)
    x = torch.rand(32, 1, 28, 28)
    x[:, 0, 0, 0] = torch.arange(32) / 255  # its own number in a corner
    run = common.Run(tmp_path / "run", settings("tuned-gan", epochs=4, lr=4e-3, batch_size=16))
    study.train(run, x, x, classifier.predict(x)[0], classifier, ARGS)
    epochs = [a + b for a, b in zip(seen[::2], seen[1::2], strict=True)]
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert np.allclose(rates[::2], [[4e-3] * 2, [3e-3] * 2, [2e-3] * 2, [1e-3] * 2])


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
    with pytest.raises(common.UserError):
        study.load_datasets(study.parse_args(["--dataset", "fashion-mnist"]))


# ------------------------------------------------------------------------------------------- report


def finished(model, **own):
    """A finished run as the report sees it."""
    config = settings(model, dataset="mnist", batch_size=64, train_size=55_000,
                      **study.epochs_and_rate(model, 10, 2e-4)) | own
    images = {"fid": 0.1, "entropy": 2.3, "classes": 10, "recall": 0.9, "precision": 0.9}
    scale = {"real": images, "pixel_entropy": 45.0}
    epoch = {"val_fid": 1.0, "accuracy_real": 0.6, "accuracy_fake": 0.8}
    return {"config": config, "history": [epoch.copy() for _ in range(6)],
            "metrics": images | {"n": 10_000, "best_epoch": 1, "scale": scale}}


def test_rows_and_folders_are_named_by_values():
    vae = finished("vae", epochs=30, precision="bfloat16")["config"]
    assert study.row_name(vae) == ("MNIST bfloat16", "VAE 30 epochs", "latent 4")
    assert study.variant(vae) == "mnist/MNIST_VAE_30_epochs_latent4_bfloat16"
    assert study.row_name(finished("tuned-gan")["config"]) == ("MNIST", "GAN tuned", "z 32")
    hybrid = finished("vae-gan", lr=1e-3)["config"]
    assert study.row_name(hybrid) == ("MNIST lr0.001", "VAE-GAN", "latent 4")


def test_the_report_follows_the_numbers():
    runs = []
    for seed in range(3):
        for fid, run in enumerate([
                finished("gan", seed=seed, z_dim=32, precision="bfloat16"),
                finished("gan", seed=seed, z_dim=32, precision="bfloat16", loss="bce"),
                finished("vae-gan", seed=seed, latent_dim=8, precision="bfloat16"),
                finished("vae", seed=seed, latent_dim=8, epochs=30)]):  # float32
            run["metrics"]["fid"] = run["history"][0]["val_fid"] = 1 + fid + 0.01 * seed
            runs.append(run)
    runs[2]["metrics"]["recall"] = 0.1
    table = study.rows(runs)
    hinge, hybrid = (study.row_name(runs[i]["config"]) for i in [0, 2])
    assert study.best_of(table, "MNIST", "GAN") == hinge
    assert study.best_of(table, "MNIST bfloat16", "VAE") is None
    found = {name: [pair for pair in chosen if pair[0] in table and pair[1] in table]
             for name, chosen in study.pairs(table).items()}
    assert found["hybrids"] == [(hybrid, ("MNIST", "VAE 30 epochs", "latent 8")), (hybrid, hinge)]
    assert found["GANs"] == [(hinge, ("MNIST bfloat16", "GAN bce", "z 32"))]
    assert "GAN hinge z 32 bfloat16 10.1 ± 0.1" in study.answer(table)
    assert study.collapsed(table) == {hybrid: {0: table[hybrid][0]}}
    assert table[hinge][0]["errors"] == pytest.approx(0.6)
    assert list(table).count(("MNIST", "real images", "")) == 1
