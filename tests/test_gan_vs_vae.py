"""GAN against VAE: losses in closed form, what is frozen, planted collapse, runs, resume.

    pytest tests/test_gan_vs_vae.py
"""

import argparse
import math

import pytest
import torch
from conftest import interrupt_after_epoch, numbers

import common_v1 as common
import gan_vs_vae as study

SMOKE = ["--dataset", "glyphs", "--train-size", "300", "--epochs", "1", "--samples", "300",
         "--device", "cpu"]


def settings(model, **own):
    return {"dataset": "glyphs", "model": model, "epochs": 1, "batch_size": 32, "lr": 1e-3,
            "train_size": 64, "loss": "hinge", "z_dim": 8, "latent_dim": 4, "seed": 0} | own


# ---------------------------------------------------------------------------------- losses, models


@pytest.mark.parametrize(("loss", "d", "g"), [
    ("hinge", 2, 0), ("bce", 2 * math.log(2), math.log(2))])
def test_losses_of_a_blind_discriminator_and_their_gradients(loss, d, g):
    real, fake = torch.zeros(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    of_d = study.d_loss(loss, real, fake)
    assert of_d.item() == pytest.approx(d)
    assert study.g_loss(loss, fake).item() == pytest.approx(g)
    to_real, to_fake = torch.autograd.grad(of_d, (real, fake))
    assert (to_real < 0).all() and (to_fake > 0).all()  # D wants real up and fake down
    assert (torch.autograd.grad(study.g_loss(loss, fake), fake)[0] < 0).all()  # G wants fake up


def test_generator_and_vae_decoder_are_one_network_after_the_first_layer():
    device = torch.device("cpu")
    gan, vae = study.Gan(settings("gan"), device), study.Vae(settings("vae"), device)
    assert str(gan.G.trunk) == str(vae.G.trunk)
    count = lambda m: sum(w.numel() for w in m.parameters())
    assert count(study.Gan(settings("gan", z_dim=16), device).G) == count(
        study.Vae(settings("vae", latent_dim=16), device).G)


def test_enlarging_is_a_transposed_convolution():
    layer, x = study.Enlarge(5, 3), torch.randn(2, 5, 4, 6)
    both = [f(layer, x) for f in (study.Enlarge.forward, torch.nn.ConvTranspose2d.forward)]
    assert torch.allclose(*both, atol=1e-6)
    by = torch.randn_like(both[0])
    ours, theirs = (torch.autograd.grad(y, list(layer.parameters()), by) for y in both)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_the_step_of_d_leaves_g_alone_and_noise_is_fresh(monkeypatch):
    gan = study.Gan(settings("gan"), torch.device("cpu"))
    seen, steps, attached = [], [], []
    real = study.step_of
    gan.D.register_forward_pre_hook(lambda m, args: attached.append(args[0].requires_grad))

    def watched(optimizer, loss):
        steps.append(real(optimizer, loss))
        if len(steps) == 1:  # D's
            assert all(w.grad is None for w in gan.G.parameters())
        return steps[-1]
    monkeypatch.setattr(study, "step_of", watched)
    gan.G.first.register_forward_hook(lambda m, z, out: seen.append(z[0]))
    gan.step(torch.rand(16, 1, 28, 28), 0)
    assert len(steps) == 2 and len(seen) == 2 and not torch.equal(*seen)
    assert attached == [False, False, True]  # real, detached fake, and the fake that G learns from


def test_a_step_is_adams_on_the_gradient_of_its_own_weights():
    config = {"model": "gan", "loss": "hinge", "z_dim": 4, "lr": 1e-3}
    gan, twin = study.Gan(config, "cpu"), study.Gan(config, "cpu")
    twin.G.load_state_dict(gan.G.state_dict())
    twin.D.load_state_dict(gan.D.state_dict())
    z = torch.randn(8, 4)
    norm = study.step_of(gan.optimizers["optimizer_G"], -gan.D(gan.G(z)).mean())
    (-twin.D(twin.G(z)).mean()).backward()
    gradients = [w.grad.clone() for w in twin.G.parameters()]
    torch.optim.Adam(twin.G.parameters(), lr=1e-3, betas=(0.5, 0.999), foreach=False).step()
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in gradients)),
                                        rel=1e-4)
    for a, b in zip(gan.G.parameters(), twin.G.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert all(w.grad is None for w in gan.D.parameters())


@torch.no_grad()
def test_the_elbo_against_torch_distributions():
    vae, x = study.Vae(settings("vae"), "cpu"), torch.rand(6, 1, 28, 28).round()
    vae.E[-1].weight.data *= 200  # codes far from the prior
    study.set_mode(vae, False)
    torch.manual_seed(0)
    loss, reconstruction, kl = study.elbo_losses(vae.E, vae.G, x).tolist()
    mu, logvar = vae.E(x).chunk(2, dim=1)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    torch.manual_seed(0)
    z = mu + torch.randn_like(mu) * q.scale
    nats = -torch.distributions.Bernoulli(logits=vae.G.logits(z)).log_prob(x).flatten(1).sum(1)
    assert kl == pytest.approx(want.sum(1).mean().item(), rel=1e-4)
    assert reconstruction == pytest.approx(nats.mean().item(), rel=1e-5)
    assert loss == pytest.approx(reconstruction + kl)


@pytest.mark.parametrize(("steps", "weight"), [(0, 10 / 11), (989, 0.01)])
def test_the_moving_average_is_that_of_the_last_tenth_of_the_steps(steps, weight):
    gan = study.Gan(settings("tuned-gan"), torch.device("cpu"))
    gan.G.trunk[0].num_batches_tracked += 2 * steps
    old = gan.average.first.weight.clone()
    gan.step(torch.rand(16, 1, 28, 28), 0)
    want = (1 - weight) * old + weight * gan.G.first.weight
    assert torch.allclose(gan.average.first.weight, want, atol=1e-7)
    assert not torch.equal(gan.average.first.weight, old)


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
    argv = ["--loss", "hinge", "--z-dim", "32", "--model", "gan", "tuned-gan"]
    plain, tuned = [study.Gan(config, torch.device("cpu"))
                    for config in study.grid(study.parse_args(argv), ["glyphs"])]
    for gan in [plain, tuned]:
        gan.step(torch.rand(16, 1, 28, 28), 0)
    assert calls == [2] * 3  # real, generated for D, generated for G
    assert tuned.G.first.weight.numel() == 2 * plain.G.first.weight.numel()
    assert tuned.D[1].out_channels == 2 * plain.D[1].out_channels


def test_in_eval_mode_an_image_depends_on_its_own_code():
    gan = study.Gan(settings("gan"), torch.device("cpu"))
    gan.step(torch.rand(16, 1, 28, 28), 0)
    study.set_mode(gan, False)
    z = torch.randn(8, 8)
    together = study.draw(gan, z, torch.device("cpu"))
    assert torch.allclose(together[3:4], study.draw(gan, z[3:4], torch.device("cpu")), atol=1e-6)
    study.set_mode(gan, True)
    with pytest.raises(AssertionError, match="eval mode"):
        study.draw(gan, z, torch.device("cpu"))


@pytest.mark.parametrize(("net", "shape"), [
    (study.Generator, (64, 8)), (study.Convolutions, (64, 1, 28, 28))])
def test_bfloat16_is_of_training_alone_and_near_float32(monkeypatch, net, shape):
    found = {}
    for on in (False, True):
        monkeypatch.setattr(study.common, "BFLOAT16", on)
        torch.manual_seed(0)
        module, x = net(8), torch.rand(shape)
        with torch.no_grad():
            measured = module.eval()(x)
        trained = module.train()(x)
        assert trained.dtype == measured.dtype == torch.float32
        weight = next(module.parameters())
        found[on] = measured, trained, *torch.autograd.grad(trained.square().sum(), weight)
    (a, b, c), (d, e, f) = found[False], found[True]
    assert torch.equal(a, d) and not torch.equal(b, e)
    assert (b - e).norm() < 0.02 * b.norm() and (c - f).norm() < 0.1 * c.norm()


def test_what_is_measured_is_in_float32(monkeypatch):
    vae, x, z, found = study.Vae(settings("vae"), "cpu"), torch.rand(8, 1, 28, 28), torch.randn(
        8, settings("vae")["latent_dim"]), []
    study.set_mode(vae, False)
    for on in (False, True):
        monkeypatch.setattr(study.common, "BFLOAT16", on)
        torch.manual_seed(0)
        found.append((study.elbo_of(vae, x), study.draw(vae, z, "cpu").tolist()))
    assert found[0] == found[1]


def test_the_hybrids_networks_of_codes_learn_faster():
    hybrid, p = study.VaeGan(settings("vae-gan"), torch.device("cpu")), settings("vae-gan")["lr"]
    rate = {id(w): g["lr"] for o in hybrid.optimizers.values() for g in o.param_groups
            for w in g["params"]}
    for name, module in hybrid.modules.items():
        want = study.CODE_RATE * p if name in ("H", "D_z") else p
        assert {rate[id(w)] for w in module.parameters()} == {want}


def test_the_hybrids_vae_is_unchanged_while_frozen_and_trained_before_and_after():
    hybrid = study.VaeGan(settings("vae-gan"), torch.device("cpu"))
    state = lambda *names: [v.clone() for n in names for v in hybrid.modules[n].state_dict(
        ).values()]
    changed = lambda a, b: [not torch.equal(u, v) for u, v in zip(a, b, strict=True)]
    x = torch.rand(16, 1, 28, 28)
    for stage, moving, still in [(0, "EG", ["H", "D_z", "D_x"]), (1, ["H", "D_z", "D_x"], "EG"),
                                 (2, ["E", "G", "H", "D_z", "D_x"], [])]:
        study.set_mode(hybrid, True, stage)
        before = {n: state(n) for n in [*moving, *still]}
        losses = hybrid.step(x, stage)
        assert losses.shape == (len(hybrid.names),) and losses.isfinite().all()
        assert all(any(changed(before[n], state(n))) for n in moving)
        assert not any(any(changed(before[n], state(n))) for n in still)  # buffers too


# ------------------------------------------------------------------------------------ mode collapse


def test_the_floor_is_a_mean_over_disjoint_sets_of_real_images():
    g = torch.Generator().manual_seed(0)
    f = torch.randn(3500, 4, generator=g)
    found = study.floor(f[500:], f[:500])
    one = common.frechet_distance(f[500:1000], f[:500])
    assert found["sets"] == 6 and found["fid"] > 0 and found["fid_std"] > 0
    assert abs(found["fid"] - one) < 4 * found["fid_std"] and found["fid"] != one


def test_planted_collapse_is_called_so_and_real_images_are_not(data, classifier):
    judge = study.Judge(data, classifier, 2000)
    x, y = data.x_train[:20_000], data.y_train[:20_000]
    one_class, three = x[y == 3][:1500], x[y < 3][:2000]
    one_each = torch.cat([x[y == digit][:1] for digit in range(10)]).repeat(200, 1, 1, 1)
    assert [why.split()[0] for why in study.collapsed(judge.score(one_each))] == ["recall"]
    assert study.collapsed(judge.score(x[:1].repeat(2000, 1, 1, 1)))
    assert study.collapsed(judge.score(one_class)) and study.collapsed(judge.score(three))
    assert not study.collapsed(judge.scale["real"])
    assert not study.collapsed(judge.score(data.x_test[2000:4000]))
    assert study.collapsed(judge.scale["pixel_mean"])


# --------------------------------------------------------------------------------------------- runs


def test_runs_end_to_end_and_the_report_is_made_of_the_json(tmp_path):
    argv = [*SMOKE, "--z-dim", "8", "--latent-dim", "4", "--out-dir", str(tmp_path)]
    metrics = study.main(argv)
    assert set(metrics) == {f"glyphs_{name}/seed_0" for name in [
        "GAN_hinge_z8", "GAN_bce_z8", "VAE_latent4", "VAE-GAN_latent4", "GAN_tuned"]}
    base = tmp_path / "gan_vs_vae"
    text = (base / "report.md").read_text()
    for name in ["gan_loss_comparison", "gan_fid_comparison", "vae_loss_comparison",
                 "vae_fid_comparison", "fid_gan_vs_vae", "precision_recall"]:
        assert (base / f"{name}.png").exists() and f"({name}.png)" in text
    for file in [line.split("](")[1][:-1] for line in text.splitlines() if line[:2] == "!["]:
        assert (base / file).exists(), file
    (base / "report.md").unlink()
    study.main(["--report-only", "--out-dir", str(tmp_path)])
    assert (base / "report.md").read_text() == text and "without a result" not in text
    (base / "glyphs/glyphs_VAE_latent5/seed_3").mkdir(parents=True)
    assert ("Begun or waiting, without a result here: glyphs_VAE_latent5/seed_3."
            in study.report(base))
    assert study.main(argv) == metrics  # finished: skipped


@pytest.mark.parametrize(("model", "name"), [("vae-gan", "glyphs_VAE-GAN_latent4"),
                                             ("tuned-gan", "glyphs_GAN_tuned")])
def test_an_interrupted_run_continues_bitwise(tmp_path, model, name):
    argv = [*SMOKE, "--model", model, "--latent-dim", "4", "--out-dir"]
    study.main([*argv, str(tmp_path / "whole")])
    interrupt_after_epoch(2, lambda: study.main([*argv, str(tmp_path / "parts")]))
    study.main([*argv, str(tmp_path / "parts")])
    a, b = (tmp_path / d / "gan_vs_vae/glyphs" / name / "seed_0" for d in ["whole", "parts"])
    assert numbers(a) == numbers(b)
    left, right = (common.load_torch(d / "checkpoint.pt") for d in (a, b))
    parts = {"vae-gan": ["G", "E", "H", "D_z", "D_x"], "tuned-gan": ["G", "D", "average"]}[model]
    for part in parts:
        assert all(torch.equal(left[part][k], right[part][k]) for k in left[part])


def test_every_epoch_sees_each_image_once_in_a_new_order_and_the_tuned_rates_decay(
        tmp_path, monkeypatch, classifier):
    seen, rates, step = [], [], study.Gan.step

    def watched(self, x, stage):
        seen.append((255 * x[:, 0, 0, 0]).round().int().tolist())
        rates.append([self.optimizers[k].param_groups[0]["lr"] for k in self.optimizers])
        return step(self, x, stage)

    monkeypatch.setattr(study.Gan, "step", watched)
    x = torch.rand(64, 1, 28, 28)
    x[:, 0, 0, 0] = torch.arange(64) / 255  # its own number in a corner
    config = settings("tuned-gan", epochs=4, lr=4e-3)
    args = argparse.Namespace(tensorboard=False, compile=False, samples=100)
    study.train(config, x, x, classifier.look(x)[0], classifier, tmp_path, args)
    epochs = [a + b for a, b in zip(seen[::2], seen[1::2], strict=True)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert torch.tensor(rates[::2]).allclose(
        torch.tensor([[4e-3, 4e-3]]) * torch.tensor([[1], [0.75], [0.5], [0.25]]))


def test_the_best_epoch_of_a_hybrid_is_fine_tuned_and_still_reconstructs():
    config = settings("vae-gan", epochs=6, stage_epochs=2)
    rows = [{"epoch": e, "val_fid": fid, "val_reconstruction": r} for e, fid, r in [
        (1, 9, 90), (2, 1, 80), (3, 2, 80), (4, 2, 80), (5, 3, 100), (6, 8, 83)]]
    best = lambda rows: min(rows, key=lambda row: study.merit(config, row, rows))["epoch"]
    assert [best(rows[:n]) for n in (1, 2, 4, 5, 6)] == [1, 2, 2, 5, 6]
    rows[-1]["val_reconstruction"], rows[-2]["val_fid"] = 140, 9  # none is within the slack
    assert best(rows) == 5  # the one that loses the least, not the lowest FID


# ---------------------------------------------------------------------------------------- answers


def run(model, fid, seed=0, history=None, **own):
    """A finished run as the report sees it, with only what the answers need."""
    scores = {"fid": fid, "n": 100, "entropy": 2.3, "classes": 10, "recall": 0.8, "precision": 0.9,
              "environment": {"device": "cpu"},
              "scale": {"real": {"fid": 0.1}}, "best": {"val_fid": own.pop("val_fid", fid)},
              "last": {"val_entropy": 2.3, "val_classes": 10} | own.pop("last", {}),
              "elbo": own.pop("elbo", {}), **own.pop("scores", {})}
    rows = history or [{"epoch": e, "val_fid": fid, "accuracy_real": 0.7, "accuracy_fake": 0.7,
                        "g_gradient": 1.0} for e in (1, 2)]
    return {"config": {"dataset": "mnist", "model": model, "seed": seed, "epochs": 10} | own,
            "metrics": scores, "history": rows}


@pytest.mark.parametrize(("fid", "k"), [(1, 1), (9, 0), (11, 0)])
def test_the_first_sentence_follows_the_numbers(fid, k):
    groups = {"g": [run("gan", fid, val_fid=2)], "other": [run("gan", 0.5, val_fid=3)],
              "v": [run("vae", 10)], "t": [run("tuned-gan", fid)]}
    text = study.answer(groups, ["mnist"])
    assert (f"The untuned GAN's is {fid / 10:.2f} × the VAE's (n=1), within the 1/6 aimed at for "
            f"{k} of 1 seed;") in text  # not other
    assert ("which is lower cannot be told" in text) == (fid > 10)  # by one seed
    thrice = {"g": [run("gan", fid, seed) for seed in range(3)],
              "v": [run("vae", 10, seed) for seed in range(3)]}
    assert ("; the VAE's is lower." in study.answer(thrice, ["mnist"])) == (fid > 10)
    assert f"within the 10 × aimed at for {k} of 1 seed." in text
    groups["g"].append(run("gan", 20, 1, val_fid=9))  # no seed of the VAE; more of them than other
    assert f"The untuned GAN's is {fid / 10:.2f} × the VAE's" in study.answer(groups, ["mnist"])
    groups["v"][0]["metrics"]["n"] = 50  # fewer samples: a higher FID
    assert "The untuned GAN's" not in study.answer(groups, ["mnist"])


def test_a_cell_of_other_seeds_leaves_the_effects_of_the_rest():
    gans = {f"{loss}{z}": [run("gan", fid * (1 + 0.1 * seed), seed, loss=loss, z_dim=z)
                           for seed in seeds]
            for loss, fid in [("hinge", 2), ("bce", 6)]
            for z, seeds in [(32, [0, 1, 2]), (64, [0, 1, 2]), (256, [7])]}
    found = study.effects(gans, lambda r: r["metrics"]["fid"])
    effect, cells = found["loss", "bce against hinge"]
    assert effect.n == 3 and len(cells) == 2 and effect.mean == pytest.approx(math.log(3))
    assert ("z_dim", "64 against 32") in found and ("z_dim", "256 against 32") not in found


@pytest.mark.parametrize("better", ["hinge", "bce"])
def test_the_first_answer_follows_the_numbers(better):
    gans = {f"{loss}{z}": [run("gan", (2 if loss == better else 9) + 0.1 * seed + z / 1e3, seed,
                               loss=loss, z_dim=z) for seed in range(3)]
            for loss in ["hinge", "bce"] for z in [32, 64, 128]}
    text = study.answer_stability(gans)
    ratio = "× 4." if better == "hinge" else "× 0.2"
    assert "FID over its floor: loss moves it most (bce against hinge: " + ratio in text
    short = {"one epoch": [run("gan", 900, loss=better, z_dim=32, epochs=1)]}
    numbers_of = lambda text: text.split("Ratios")[0]
    assert numbers_of(study.answer_stability(gans | short)) == numbers_of(text)  # no twin
    for i, runs in enumerate(gans.values()):
        for r in runs:
            r["metrics"]["fid"] = 5 + 0.1 * (-1) ** (i + r["config"]["seed"])
    assert "FID over its floor: it cannot be told" in study.answer_stability(gans)
    for runs in gans.values():  # a clear mean that one of the three seeds contradicts
        for r in runs:
            against = r["config"]["seed"] == 2
            r["metrics"]["fid"] = {"hinge": 2, "bce": 1.9 if against else 9}[r["config"]["loss"]]
    assert "FID over its floor: it cannot be told" in study.answer_stability(gans)
    assert "One seed" not in study.answer_stability(gans)
    once = {name: runs[:1] for name, runs in gans.items()}
    assert study.answer_stability(once | {"hinge32": gans["hinge32"], "bce32": gans["bce32"]}
                                  ).startswith("One seed tells nothing. ")  # in the other cells
    text = study.answer_stability(once)
    assert text.startswith("One seed tells nothing. ") and "moves it" not in text
    as_much = {name: [r | {"metrics": r["metrics"] | {"fid": {
        "hinge32": 1, "hinge64": 4, "bce32": 4.1, "bce64": 16.2}[name] * (
            1 + 0.02 * r["config"]["seed"] * (name == "hinge64"))}} for r in runs]
        for name, runs in gans.items() if "128" not in name}
    assert "whether more than" in study.answer_stability(as_much)


@pytest.mark.parametrize(("steady", "words"), [(True, "cannot be told"), (False, "loss moves it")])
def test_a_steady_fall_of_fid_is_no_instability(steady, words):
    def history(loss, z):
        wobble = 0 if steady or loss == "bce" else 0.3 + z / 1e4
        return [{"epoch": e, "val_fid": 100 * 0.9**e * math.exp(wobble * (-1) ** e),
                 "accuracy_real": 0.7, "accuracy_fake": 0.7, "g_gradient": 1.0}
                for e in range(1, 11)]
    gans = {f"{loss}{z}": [run("gan", 5, seed, loss=loss, z_dim=z, history=history(loss, z))
                           for seed in range(2)]
            for loss in ["hinge", "bce"] for z in [32, 64, 128]}
    text = study.answer_stability(gans).split("; ")[1]
    assert text.startswith("spread of FID over epochs: ") and words in text


def test_the_second_answer_follows_the_numbers():
    good = {"a": [run("gan", 5, loss="bce", z_dim=8)]}
    text = study.answer_collapse(good)
    assert "None of 1 runs" in text and "None besides by the samples" in text
    late = {"a": [run("gan", 5, loss="bce", z_dim=8, last={"val_classes": 4})]}
    assert "last epoch's samples besides: a (seed 0: classes 4 < 10)" in study.answer_collapse(late)
    bad = {"a": [run("gan", 5, loss="bce", z_dim=8, scores={"classes": 7})]}
    assert ("1 of 1 runs with an adversary at its best epoch: a (seed 0: classes 7 < 10)"
            in study.answer_collapse(bad))


@pytest.mark.parametrize(("step", "sign"), [(-4, "−"), (4, "+")])
def test_the_third_answer_follows_the_numbers(step, sign):
    vaes = {str(d): [run("vae", 9, seed, latent_dim=d, elbo={
        "reconstruction": 80 + step * i + 0.1 * seed}) for seed in range(3)]
        for i, d in enumerate([8, 16, 32])}
    text = study.answer_latent(vaes)
    assert f"| **{sign}4.00** ({sign}4.00" in text.split("| MNIST, 16 |")[1].split("| MNIST")[0]
    assert text.startswith("From one dimension to the next, FID cannot be told to follow the "
                           "reconstruction: MNIST 8 to 16, MNIST 16 to 32.")
    short = {"short": [run("vae", 9, 7, latent_dim=64, epochs=3,
                           elbo={"reconstruction": 5.0})]}
    assert study.answer_latent(vaes | short) == study.answer_latent(vaes)  # not comparable
    one = study.answer_latent({k: runs[:1] for k, runs in vaes.items()})
    assert "4.00 (n=1)" in one and "cannot be told to follow" in one
    for fid, word in [(step, "follows"), (-step, "does not follow")]:
        for i, runs in enumerate(vaes.values()):
            for r in runs:
                r["metrics"]["fid"] = 20 + fid * i + 0.1 * r["config"]["seed"]
        assert (f"FID {word} the reconstruction: MNIST 8 to 16, MNIST 16 to 32."
                in study.answer_latent(vaes))
    for r in vaes["32"]:  # as in the smallest: it follows in one of the two steps
        r["metrics"]["fid"] = 20 + 0.1 * r["config"]["seed"]
    assert ("FID follows the reconstruction: MNIST 16 to 32; does not follow the reconstruction: "
            "MNIST 8 to 16.") in study.answer_latent(vaes)


@pytest.mark.parametrize(("fid", "rec", "words"), [
    (3, 80, "at most half for 3 of 3 seeds | 1.00 × (1.00–1.00); within 10 % for 3"),
    (13, 80, "it still reconstructs, but its samples are worse"), (8, 80, "but gains too little"),
    (9, 80, "; at most half for 0 of 3 seeds"), (3, 99, "; within 10 % for 0 of 3 seeds")])
def test_the_fourth_answer_follows_the_numbers(fid, rec, words):
    def hybrid(fid, seed):
        return run("vae-gan", fid, seed, latent_dim=8, epochs=30, stage_epochs=10,
                   elbo={"reconstruction": rec}, history=[{"val_fid": e} for e in range(1, 31)])

    groups = {"v": [run("vae", 10, s, latent_dim=8, elbo={"reconstruction": 80.0})
                    for s in range(3)],
              "h": [hybrid(fid, s) for s in range(3)],
              "g": [run("gan", 2, s, loss="bce", z_dim=8) for s in range(3)]}
    text = study.answer_hybrid(groups)
    assert words in text and f"| **{fid / 2:.2f} ×** ({fid / 2:.2f}–{fid / 2:.2f}) g, 10" in text
    assert "| 10.00 ± 0.00 / 20.00 ± 0.00 / 30.00 ± 0.00 |" in text
    assert text.startswith("h: both as hoped.") == (fid == 3 and rec == 80)
    first = study.answer(groups, ["mnist"])
    assert f"The hybrid's is **{fid / 10:.2f} ×** ({fid / 10:.2f}–{fid / 10:.2f}) that of" in first
    assert f"({rec / 80:.2f}–{rec / 80:.2f}) (n=3)." in first
    groups["h"][0]["metrics"]["recall"] = 0.1
    for text in [study.answer(groups, ["mnist"]), study.answer_hybrid(groups)]:
        assert ", called collapsed for 1 of 3 seeds (recall 0.1 < 0.2)" in text
    once = {name: runs[:1] for name, runs in groups.items()}
    assert ("cannot be told" in study.answer_hybrid(once)) == (fid > 5 and rec == 80)
    groups["h"][1]["metrics"]["fid"] = 40 if fid < 5 else 1
    text = study.answer_hybrid(groups)
    assert "h: the seeds disagree" in text
    assert f"at most half for {2 if fid < 5 else 1} of 3" in text
