"""GAN against VAE: losses in closed form, what a step may touch, planted collapse, runs, resume.

    pytest tests/test_gan_vs_vae.py
"""

import contextlib
import functools
import math
import types

import numpy as np
import pytest
import torch
from conftest import interrupt_after_epoch, numbers

import common
import gan_vs_vae as study

CPU = torch.device("cpu")
SMOKE = ["--dataset", "glyphs", "--train-size", "300", "--epochs", "1", "--samples", "300",
         "--device", "cpu"]


def settings(model, **own):
    config = {"dataset": "glyphs", "model": model, "epochs": 1, "batch_size": 32, "lr": 1e-3,
              "train_size": 64, "precision": "float32", "seed": 0}
    config |= {"gan": {"loss": "hinge", "z_dim": 8}, "tuned-gan": study.TUNED,
               "vae": {"latent_dim": 4}, "vae-gan": {"latent_dim": 4, "stage_epochs": 1}}[model]
    return config | own


# ---------------------------------------------------------------------------------- losses, models


@pytest.mark.parametrize(("loss", "d", "g"), [
    ("hinge", 2, 0), ("bce", 2 * math.log(2), math.log(2))])
def test_losses_of_a_blind_discriminator_and_their_gradients(loss, d, g):
    real, fake = torch.zeros(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    of_d = study.discriminator_loss(loss, real, fake)
    assert of_d.item() == pytest.approx(d)
    assert study.generator_loss(loss, fake).item() == pytest.approx(g)
    to_real, to_fake = torch.autograd.grad(of_d, (real, fake))
    assert (to_real < 0).all() and (to_fake > 0).all()  # D wants real up and fake down
    assert (torch.autograd.grad(study.generator_loss(loss, fake), fake)[0] < 0).all()


def test_generator_and_vae_decoder_are_one_network_after_the_first_layer():
    gan, vae = (study.build(settings(model), CPU)[0] for model in ["gan", "vae"])
    assert str(gan["G"].trunk) == str(vae["G"].trunk)


def test_the_step_of_d_leaves_g_alone_and_noise_is_fresh(monkeypatch):
    nets, optimizers = study.build(settings("gan"), CPU)
    updated, noises, attached = [], [], []
    real = study.update

    def watched(chosen, loss):
        real(chosen, loss)
        if not updated:
            assert all(weight.grad is None for weight in nets["G"].parameters())
        updated.append(chosen)
    monkeypatch.setattr(study, "update", watched)
    nets["D"].register_forward_pre_hook(lambda m, args: attached.append(args[0].requires_grad))
    nets["G"].first.register_forward_hook(lambda m, z, out: noises.append(z[0]))
    study.gan_step(nets, optimizers, torch.rand(16, 1, 28, 28), settings("gan"))
    assert updated == [[optimizers["D"]], [optimizers["G"]]]
    assert len(noises) == 2 and not torch.equal(*noises)
    assert attached == [False, False, True]  # real, detached fake, and the fake that G learns from


def test_an_update_is_adams_on_the_gradient_of_its_own_weights():
    nets, optimizers = study.build(settings("gan"), CPU)
    twins = study.build(settings("gan"), CPU)[0]
    for name, twin in twins.items():
        twin.load_state_dict(nets[name].state_dict())
    z = torch.randn(8, 8)
    study.update([optimizers["G"]], -nets["D"](nets["G"](z)).mean())
    (-twins["D"](twins["G"](z)).mean()).backward()
    torch.optim.Adam(twins["G"].parameters(), lr=1e-3, betas=(0.5, 0.999), foreach=False).step()
    for a, b in zip(nets["G"].parameters(), twins["G"].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert all(weight.grad is None for weight in nets["D"].parameters())


@torch.no_grad()
def test_the_elbo_against_torch_distributions():
    nets, x = study.build(settings("vae"), CPU)[0], torch.rand(6, 1, 28, 28).round()
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
def test_the_moving_average_is_that_of_the_last_tenth_of_the_steps(steps, weight):
    nets, optimizers = study.build(settings("tuned-gan"), CPU)
    nets["average"].n_averaged += steps
    old = nets["average"].module.first.weight.clone()
    study.gan_step(nets, optimizers, torch.rand(16, 1, 28, 28), settings("tuned-gan"))
    want = (1 - weight) * old + weight * nets["G"].first.weight
    assert torch.allclose(nets["average"].module.first.weight, want, atol=1e-7)
    mean = nets["average"].module.trunk[0].running_mean  # BatchNorm's statistics too
    assert torch.allclose(mean, weight * nets["G"].trunk[0].running_mean, atol=1e-6)


def test_only_a_tuned_discriminator_sees_images_moved_each_by_its_own(monkeypatch):
    x = torch.rand(32, 1, 28, 28).requires_grad_()
    moved = study.shifted(x, 3)
    wide, found = torch.nn.functional.pad(x, (3,) * 4), []
    for image, around in zip(moved, wide, strict=True):
        found += [(a, b) for a in range(7) for b in range(7)
                  if torch.equal(image, around[:, a:a + 28, b:b + 28])]
    assert len(found) == 32 and len(set(found)) > 10
    assert {v for place in found for v in place} == set(range(7))
    assert torch.autograd.grad(moved.sum(), x)[0].unique().tolist() == [0, 1]
    calls = []
    monkeypatch.setattr(study, "shifted", lambda x, by: (calls.append(by), x)[1])
    for model in ["gan", "tuned-gan"]:
        study.gan_step(*study.build(settings(model), CPU), torch.rand(16, 1, 28, 28),
                       settings(model))
    assert calls == [2] * 3  # real, generated for D, generated for G


def test_in_eval_mode_an_image_depends_on_its_own_code():
    nets, optimizers = study.build(settings("gan"), CPU)
    study.gan_step(nets, optimizers, torch.rand(16, 1, 28, 28), settings("gan"))
    z = torch.randn(8, 8)
    with pytest.raises(AssertionError, match="eval mode"):
        study.draw(nets, z, CPU)
    nets["G"].eval()
    together = study.draw(nets, z, CPU)
    assert torch.allclose(together[3:4], study.draw(nets, z[3:4], CPU), atol=1e-6)


DEVICES = ["meta", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "stage"), [("gan", 1), ("tuned-gan", 1), ("vae", 1),
                                              ("vae-gan", 2), ("vae-gan", 3)])
def test_every_step_stays_on_its_device_and_its_losses_are_float32(
        monkeypatch, device, precision, model, stage):
    config = settings(model, precision=precision)
    nets, optimizers = study.build(config, CPU)
    for net in nets.values():
        getattr(net, "module", net).to(device)  # the moving average counts on the CPU
    if device == "meta":  # which autocast and fused Adam do not know
        monkeypatch.setattr(study, "autocast", lambda x, config: contextlib.nullcontext())
        monkeypatch.setattr(study, "update", lambda chosen, loss: loss.backward())
    losses = study.step(nets, optimizers, torch.rand(16, 1, 28, 28, device=device), config, stage)
    for value in losses.values():
        assert value.device.type == device and value.dtype == torch.float32


@pytest.mark.parametrize(("model", "stage"), [("tuned-gan", 1), ("vae-gan", 3)])
def test_a_compiled_step_is_the_eager_one(monkeypatch, model, stage):
    # without code generation, which takes half a minute a step
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    x, found = torch.rand(16, 1, 28, 28), []
    for on in [False, True]:
        torch.manual_seed(0)
        nets, optimizers = study.build(settings(model), CPU)
        step = common.compiled(study.step, on, CPU)
        for _ in range(2):
            found.append(step(nets, optimizers, x, settings(model), stage))
    for eager, fast in zip(found[:2], found[2:], strict=True):
        assert {k: v.item() for k, v in fast.items()} == pytest.approx(
            {k: v.item() for k, v in eager.items()}, rel=1e-4, abs=1e-6)


def test_bfloat16_is_of_training_and_near_float32():
    x, found = torch.rand(64, 1, 28, 28), {}
    for precision in ["float32", "bfloat16"]:
        config = settings("vae", precision=precision)
        torch.manual_seed(0)
        nets, optimizers = study.build(config, CPU)
        losses = study.vae_step(nets, optimizers, x, config)
        assert losses["loss"].dtype == torch.float32
        assert next(nets["E"].parameters()).dtype == torch.float32
        found[precision] = losses["loss"].item()
    assert found["float32"] != found["bfloat16"] == pytest.approx(found["float32"], rel=0.01)


def test_the_hybrids_vae_is_unchanged_while_frozen_and_trained_before_and_after():
    config = settings("vae-gan")
    nets, optimizers = study.build(config, CPU)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    assert rates == {"E": 1e-3, "G": 1e-3, "D": 1e-3, "H": 5e-3, "D_z": 5e-3}
    x = torch.rand(16, 1, 28, 28)
    for stage, moving in [(1, ["E", "G"]), (2, ["H", "D_z", "D"]),
                          (3, ["E", "G", "H", "D_z", "D"])]:
        for name in ["E", "G"]:
            nets[name].train(stage == 1)
        before = {name: [v.clone() for v in net.state_dict().values()]
                  for name, net in nets.items()}
        losses = study.step(nets, optimizers, x, config, stage)
        assert all(value.isfinite() for value in losses.values())
        assert ("loss" in losses, "d_loss" in losses) == (stage != 2, stage > 1)
        for name, net in nets.items():  # buffers too
            changed = [not torch.equal(a, b)
                       for a, b in zip(before[name], net.state_dict().values(), strict=True)]
            assert any(changed) == (name in moving)


# ----------------------------------------------------------------------------- metrics and collapse


def test_manifold_metrics_on_equal_disjoint_and_collapsed_sets():
    found = [study.manifold_metrics(torch.randn(600, 4), torch.randn(600, 4)) for _ in range(8)]
    assert np.mean([f["coverage"] for f in found]) == pytest.approx(1 - 2**-5, abs=0.01)
    apart = study.manifold_metrics(torch.randn(100, 4), torch.randn(100, 4) + 100)
    assert set(apart.values()) == {0.0}
    real = torch.randn(300, 4)
    one = study.manifold_metrics(real, real[:1].repeat(300, 1))
    assert one["precision"] == 1 and one["recall"] == 0 and one["coverage"] < 0.1


def test_manifold_metrics_against_a_naive_count():
    real, fake, k = torch.randn(40, 3), torch.randn(30, 3) * 1.3, 3
    distance = lambda a, b: np.linalg.norm(a.numpy()[:, None] - b.numpy()[None], axis=2)
    real_radius = np.sort(distance(real, real), 1)[:, k]
    fake_radius = np.sort(distance(fake, fake), 1)[:, k]
    d = distance(real, fake)
    want = {"precision": (d < real_radius[:, None]).any(0).mean(),
            "recall": (d < fake_radius).any(1).mean(),
            "coverage": (d < real_radius[:, None]).any(1).mean()}
    assert study.manifold_metrics(real, fake, k) == pytest.approx(want)


def below(scores):
    return [key for key, least in study.COLLAPSE.items() if scores[key] < least]


def test_the_floor_and_planted_collapse(data, classifier):
    reference = study.Reference(data, classifier, 2000)
    real, x, y = reference.scale["real"], data.x_train[:20_000], data.y_train[:20_000]
    assert real["sets"] == 6 and 0 < real["fid_std"] < real["fid"] and not below(real)
    score = lambda images: reference.score(*classifier.predict(images))
    assert not below(score(data.x_test[2000:4000]))
    one_each = torch.cat([x[y == digit][:1] for digit in range(10)]).repeat(200, 1, 1, 1)
    assert below(score(one_each)) == ["recall"]
    for images in [x[:1].repeat(2000, 1, 1, 1), x[y == 3][:1500], x[y < 3][:2000]]:
        assert "classes" in below(score(images))


# --------------------------------------------------------------------------------------------- runs


def test_runs_end_to_end_and_the_report_is_made_of_files(tmp_path, small_sets):
    argv = [*SMOKE, "--z-dim", "8", "--loss", "hinge", "--latent-dim", "4", "--out-dir",
            str(tmp_path)]
    metrics = study.main(argv)
    assert len(metrics) == 4
    root = tmp_path / "gan_vs_vae"
    files = {file: file.read_bytes() for file in [*root.glob("*.png"), *root.glob("*.csv"),
                                                  root / "report.md"]}
    links = [line for line in (root / "report.md").read_text().splitlines() if line[:2] == "!["]
    assert len(links) >= 8
    for line in links:
        assert (root / line.split("](")[1][:-1]).exists(), line
    study.main(["--report-only", "--out-dir", str(tmp_path)])
    assert all(file.read_bytes() == content for file, content in files.items())
    assert study.main(argv) == metrics  # finished: skipped
    with pytest.raises(common.UserError, match="has n 300, this command 200"):
        study.main([*argv, "--samples", "200"])
    config = next(root.glob("glyphs/*/seed_0/final_metrics.json"))
    other = common.load_json(config)
    other["classifier"]["sha256"] = "another"
    common.save(config, other)
    with pytest.raises(common.UserError, match="classifiers"):
        study.main(["--report-only", "--out-dir", str(tmp_path)])


@pytest.mark.parametrize("model", ["vae-gan", "tuned-gan"])
def test_an_interrupted_run_continues_bitwise(tmp_path, model, small_sets):
    argv = [*SMOKE, "--train-size", "100", "--model", model, "--latent-dim", "4", "--out-dir"]
    study.main([*argv, str(tmp_path / "whole")])
    interrupt_after_epoch(2, lambda: study.main([*argv, str(tmp_path / "parts")]))
    study.main([*argv, str(tmp_path / "parts")])
    a, b = (next((tmp_path / d).glob("gan_vs_vae/glyphs/*/seed_0")) for d in ["whole", "parts"])
    assert numbers(a) == numbers(b)
    left, right = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (a, b))
    for name in study.build(settings(model), CPU)[0]:
        assert all(torch.equal(left[name][key], right[name][key]) for key in left[name])


def test_every_epoch_sees_each_image_once_in_a_new_order_and_the_tuned_rates_decay(
        tmp_path, monkeypatch, classifier):
    seen, rates, real = [], [], study.gan_step

    def watched(nets, optimizers, x, config):
        seen.append((255 * x[:, 0, 0, 0]).round().int().tolist())
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()])
        return real(nets, optimizers, x, config)
    monkeypatch.setattr(study, "gan_step", watched)
    x = torch.rand(64, 1, 28, 28)
    x[:, 0, 0, 0] = torch.arange(64) / 255  # its own number in a corner
    run = common.Run(tmp_path / "run", settings("tuned-gan", epochs=4, lr=4e-3))
    args = types.SimpleNamespace(compile=False, samples=100)
    study.train(run, x, x, classifier.predict(x)[0], classifier, args)
    epochs = [a + b for a, b in zip(seen[::2], seen[1::2], strict=True)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert torch.tensor(rates[::2]).allclose(
        torch.tensor([[4e-3, 4e-3]]) * torch.tensor([[1], [0.75], [0.5], [0.25]]))


def test_the_best_epoch_of_a_hybrid_is_fine_tuned_and_still_reconstructs():
    config = settings("vae-gan", epochs=6, stage_epochs=2)

    def best(fids, reconstructions):
        history, merits = [], []
        for fid, nats in zip(fids, reconstructions, strict=True):
            row = {"val_fid": fid, "val_reconstruction": nats}
            merits.append(study.merit(config, len(history) + 1, row, history))
            history.append(row)
        return 1 + min(range(len(merits)), key=merits.__getitem__)
    fids, nats = [9, 1, 2, 2, 3, 8], [90, 80, 80, 80, 100, 83]
    assert [best(fids[:n], nats[:n]) for n in (1, 2, 4, 5, 6)] == [1, 2, 2, 5, 6]
    assert best([9, 1, 2, 2, 9, 8], [90, 80, 80, 80, 100, 140]) == 5  # it loses the least


def test_mnist_alone_runs_where_fashion_mnist_cannot_be_had(monkeypatch, capsys):
    def load(name, folder):
        if name == "fashion-mnist":
            raise common.UserError("no FashionMNIST here")
        return common.glyphs()._replace(name="mnist")
    monkeypatch.setattr(common, "load_data", load)
    assert list(study.load_datasets(study.parse_args([]))) == ["mnist"]
    assert "no FashionMNIST here; running MNIST alone" in capsys.readouterr().out
    with pytest.raises(common.UserError):
        study.load_datasets(study.parse_args(["--dataset", "fashion-mnist"]))


# ------------------------------------------------------------------------------------------- report


def finished(model, fid=1.0, seed=0, history=None, **own):
    """A finished run as the report sees it."""
    config = settings(model, dataset="mnist", batch_size=64, train_size=55_000, seed=seed,
                      epochs=30 if model in ("tuned-gan", "vae-gan") else 10,
                      lr=1e-3 if model == "tuned-gan" else 2e-4) | own
    epoch = {"val_fid": fid, "val_entropy": 2.3, "val_classes": 10, "accuracy_real": 0.7,
             "accuracy_fake": 0.7}
    metrics = {"fid": fid, "n": 10_000, "best_epoch": 1, "entropy": 2.3, "classes": 10,
               "recall": 0.8, "precision": 0.9, "coverage": 0.9, "copying": 1.0,
               "elbo": {"loss": 100.0, "reconstruction": 80.0},
               "scale": {"real": {"fid": 0.1, "entropy": 2.3, "classes": 10, "recall": 0.9,
                                  "precision": 0.9}, "pixel_entropy": 45.0}}
    return {"config": config, "metrics": metrics, "history": history or [epoch] * 6}


def test_rows_and_folders_are_named_by_values():
    names = {study.row_name(finished(model, **own)["config"]) for model, own in [
        ("gan", {}), ("gan", {"precision": "bfloat16"}), ("vae", {"epochs": 30}),
        ("tuned-gan", {}), ("vae-gan", {"lr": 1e-3})]}
    assert names == {("MNIST", "GAN hinge", "z 8"), ("MNIST bfloat16", "GAN hinge", "z 8"),
                     ("MNIST", "VAE 30 epochs", "latent 4"), ("MNIST", "GAN tuned", "z 32"),
                     ("MNIST lr0.001", "VAE-GAN", "latent 4")}
    config = finished("vae", epochs=30, precision="bfloat16")["config"]
    assert study.variant(config) == "mnist/MNIST_VAE_30_epochs_latent4_bfloat16"


def test_answers_follow_the_numbers():
    runs = []
    for seed in range(3):
        for z, fid in [(32, 1.0), (128, 2.0)]:
            runs.append(finished("gan", fid + 0.01 * seed, seed, z_dim=z))
            runs.append(finished("gan", 3 * fid + 0.02 * seed, seed, z_dim=z, loss="bce"))
        runs.append(finished("vae", 9.0, seed, latent_dim=8, epochs=30))
        runs.append(finished("vae-gan", 2.0 + 0.1 * seed, seed, latent_dim=8))
    runs[-1]["metrics"]["recall"] = 0.1
    table = study.rows(runs)
    text = "\n".join(study.four_answers(table))
    for line in ["MNIST, z 32: GAN hinge has a lower FID / floor than GAN bce",
                 "MNIST, GAN hinge: z 128 has a higher FID / floor than z 32",
                 "MNIST, latent 8: VAE-GAN has a lower FID / floor than VAE 30 epochs",
                 "VAE-GAN latent 8 has a higher FID / floor than GAN hinge z 32"]:
        assert line in text
    counts, collapsed = study.collapsed_runs(table)
    assert counts == "Called collapsed: 0 of 12 GANs, 0 of 3 VAEs, 1 of 3 VAE-GANs."
    assert len(collapsed.splitlines()) == 3 and "VAE-GAN" in collapsed
    assert "GAN hinge z 32 10.1 ± 0.1" in study.answer(table)[0]


def test_a_steady_fall_of_fid_is_no_instability():
    rows = [{"val_fid": 100 * 0.9**e, "accuracy_real": 0.6, "accuracy_fake": 0.8}
            for e in range(10)]
    assert study.stability(rows) == pytest.approx({"spread": 0, "errors": 0.6}, abs=1e-9)
    for e, row in enumerate(rows):
        row["val_fid"] *= math.exp(0.3 * (-1) ** e)
    assert study.stability(rows)["spread"] > 0.5
