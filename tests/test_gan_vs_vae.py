"""GAN against VAE: losses in closed form, what is frozen, planted collapse, runs, resume.

    pytest tests/test_gan_vs_vae.py
"""

import math

import pytest
import torch
from conftest import interrupt_after_epoch, numbers

import common
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


def test_the_step_of_d_leaves_g_alone_and_noise_is_fresh(monkeypatch):
    gan = study.Gan(settings("gan"), torch.device("cpu"))
    seen, steps = [], []
    real = study.step_of

    def watched(optimizer, loss):
        steps.append(real(optimizer, loss))
        if len(steps) == 1:  # D's
            assert all(w.grad is None for w in gan.G.parameters())
        return steps[-1]
    monkeypatch.setattr(study, "step_of", watched)
    gan.G.first.register_forward_hook(lambda m, z, out: seen.append(z[0]))
    gan.step(torch.rand(16, 1, 28, 28), 1)
    assert len(steps) == 2 and len(seen) == 2 and not torch.equal(*seen)


def test_in_eval_mode_an_image_depends_on_its_own_code():
    gan = study.Gan(settings("gan"), torch.device("cpu"))
    gan.step(torch.rand(16, 1, 28, 28), 1)
    study.set_mode(gan, False)
    z = torch.randn(8, 8)
    together = study.draw(gan, z, torch.device("cpu"))
    assert torch.allclose(together[3:4], study.draw(gan, z[3:4], torch.device("cpu")), atol=1e-6)
    study.set_mode(gan, True)
    with pytest.raises(AssertionError, match="eval mode"):
        study.draw(gan, z, torch.device("cpu"))


def test_the_hybrids_vae_is_unchanged_while_frozen_and_trained_before_and_after():
    hybrid = study.VaeGan(settings("vae-gan"), torch.device("cpu"))
    state = lambda *names: [v.clone() for n in names for v in hybrid.modules[n].state_dict(
        ).values()]
    changed = lambda a, b: [not torch.equal(u, v) for u, v in zip(a, b, strict=True)]
    x = torch.rand(16, 1, 28, 28)
    for epoch, moving, still in [(1, "EG", ["H", "D_z", "D_x"]), (2, ["H", "D_z", "D_x"], "EG"),
                                 (3, ["E", "G", "H", "D_z", "D_x"], [])]:
        study.set_mode(hybrid, True)
        before = {n: state(n) for n in [*moving, *still]}
        losses = hybrid.step(x, epoch)
        assert losses.shape == (5,) and losses.isfinite().all()
        assert all(any(changed(before[n], state(n))) for n in moving)
        assert not any(any(changed(before[n], state(n))) for n in still)  # buffers too


# ------------------------------------------------------------------------------------ mode collapse


def test_planted_collapse_is_called_so_and_real_images_are_not(data, classifier):
    judge = study.Judge(data, classifier, 2000)
    x, y = data.x_train[:20_000], data.y_train[:20_000]
    one_class, three = x[y == 3][:1500], x[y < 3][:2000]
    assert study.collapsed(judge.score(x[:1].repeat(2000, 1, 1, 1)))
    assert study.collapsed(judge.score(one_class)) and study.collapsed(judge.score(three))
    assert not study.collapsed(judge.scale["real"])
    assert not study.collapsed(judge.score(data.x_test[2000:4000]))
    assert study.collapsed(judge.scale["pixel_mean"])


# --------------------------------------------------------------------------------------------- runs


def test_runs_end_to_end_and_the_report_is_made_of_the_json(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TUNED", study.TUNED | {"epochs": 1})
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
    assert (base / "report.md").read_text() == text
    assert study.main(argv) == metrics  # finished: skipped


def test_an_interrupted_run_continues_bitwise(tmp_path):
    argv = [*SMOKE, "--model", "vae-gan", "--latent-dim", "4", "--out-dir"]
    study.main([*argv, str(tmp_path / "whole")])
    interrupt_after_epoch(2, lambda: study.main([*argv, str(tmp_path / "parts")]))
    study.main([*argv, str(tmp_path / "parts")])
    a, b = (tmp_path / d / "gan_vs_vae/glyphs/glyphs_VAE-GAN_latent4/seed_0"
            for d in ["whole", "parts"])
    assert numbers(a) == numbers(b)
    left, right = (common.load_torch(d / "checkpoint.pt") for d in (a, b))
    for name in ["G", "E", "H", "D_z", "D_x"]:
        assert all(torch.equal(left[name][k], right[name][k]) for k in left[name])


# ---------------------------------------------------------------------------------------- answers


def run(model, fid, seed=0, history=None, **own):
    """A finished run as the report sees it, with only what the answers need."""
    scores = {"fid": fid, "n": 100, "entropy": 2.3, "classes": 10, "recall": 0.8, "precision": 0.9,
              "scale": {"real": {"fid": 0.1}}, "elbo": own.pop("elbo", {}), **own.pop("scores", {})}
    rows = history or [{"epoch": e, "val_fid": fid, "accuracy_real": 0.7, "accuracy_fake": 0.7,
                        "g_gradient": 1.0} for e in (1, 2)]
    return {"config": {"dataset": "mnist", "model": model, "seed": seed, **own},
            "metrics": scores, "history": rows}


@pytest.mark.parametrize("better", ["hinge", "bce"])
def test_the_first_answer_follows_the_numbers(better):
    gans = {f"{loss}{z}": [run("gan", (2 if loss == better else 9) + 0.1 * seed, seed, loss=loss,
                               z_dim=z) for seed in range(3)]
            for loss in ["hinge", "bce"] for z in [32, 64]}
    text = study.answer_stability(gans)
    ratio = "× 4." if better == "hinge" else "× 0.2"
    assert "FID: loss moves it most (bce against hinge: " + ratio in text
    same = {name: [run("gan", 5 + 0.1 * (-1) ** (seed + len(name)), seed, **{
        k: r["config"][k] for k in ("loss", "z_dim")}) for seed, r in enumerate(runs)]
        for name, runs in gans.items()}
    assert "FID: it cannot be told" in study.answer_stability(same)


def test_the_second_answer_follows_the_numbers():
    good = {"a": [run("gan", 5, loss="bce", z_dim=8)]}
    assert "None of 1 runs" in study.answer_collapse(good)
    bad = {"a": [run("gan", 5, loss="bce", z_dim=8, scores={"classes": 7})]}
    assert "1 of 1 runs: a (seed 0: classes 7 < 10)" in study.answer_collapse(bad)


@pytest.mark.parametrize(("step", "word"), [(-4, "falls with every step"),
                                            (4, "rises with every step")])
def test_the_third_answer_follows_the_numbers(step, word):
    vaes = {str(d): [run("vae", 9, seed, latent_dim=d, elbo={
        "reconstruction": 80 + step * i + 0.1 * seed}) for seed in range(3)]
        for i, d in enumerate([8, 16, 32])}
    text = study.answer_latent(vaes, ["mnist"])
    assert word in text.split("\n\n")[0] and "32 against 8 shows a significant" in text


@pytest.mark.parametrize(("fid", "words"), [(3, "sharper samples and"), (9, "not both")])
def test_the_fourth_answer_follows_the_numbers(fid, words):
    elbo = {"reconstruction": 80.0}
    groups = {"v": [run("vae", 10, latent_dim=8, elbo=elbo)],
              "h": [run("vae-gan", fid, latent_dim=8, elbo=elbo)],
              "g": [run("gan", 2, loss="bce", z_dim=8)]}
    text = study.answer_hybrid(groups)
    assert words in text and f"{fid / 2:.2f} × the FID of the best GAN" in text
