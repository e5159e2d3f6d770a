"""Fixtures, and what is checked of every script: ELBO, devices and precisions, resume, report."""

import contextlib
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import common

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = os.environ.get("MNIST_DATA_DIR", "")
SMALL = ["--dataset", "glyphs", "--epochs", "1", "--device", "cpu", "--train-size"]
SMOKES = {  # a run of seconds of each script
    "vae_mnist": [*SMALL, "500", "--likelihood-images", "9", "--hidden", "32"],
    "imbalance_study": [*SMALL, "400", "--rare-ratio", "0.05", "--samples", "2000",
                        "--model", "ga-ae"],
    "latent_opt": [*SMALL, "100", "--test-images", "20", "--codes", "40", "--latent-dim", "8"],
    "gan_vs_vae": [*SMALL, "64", "--samples", "100", "--loss", "hinge", "--z-dim", "8",
                   "--latent-dim", "4"]}


@pytest.fixture(autouse=True)
def known_noise():
    torch.manual_seed(0)


@pytest.fixture
def small_sets(monkeypatch):
    """Whole runs load 1,000 training images, half of them for validation, and 400 test images."""
    def fewer(*a, real=common.load_data):
        data = real(*a)
        return common.Data(data.name, data.x_train[:1000], data.y_train[:1000],
                           data.x_test[:400], data.y_test[:400])
    monkeypatch.setattr(common, "load_data", fewer)
    monkeypatch.setattr(common, "split", functools.partial(common.split, n_val=500))


@pytest.fixture(scope="session")
def data():
    """Real MNIST if it is at hand (in CI it is), glyphs otherwise."""
    return common.load_data("mnist", DATA_DIR) if DATA_DIR else common.glyphs()


@pytest.fixture(scope="session")
def classifier(data):
    return common.load_classifier(data, torch.device("cpu"))


@pytest.fixture(params=["meta", "cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))])
def device(request, monkeypatch):
    """On meta nothing is computed, but a tensor that was left on the CPU is an error."""
    if request.param == "meta":  # which autocast does not know
        monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    return request.param


def check_elbo(losses_of, encode, to_logits) -> None:
    """losses_of(x) begins with loss, reconstruction and KL, nats per image: those that
    torch.distributions has of q(z | x) and of Bernoulli pixels, for the same noise.
    """
    x = torch.rand(16, 1, 28, 28).round()
    torch.manual_seed(1)
    loss, reconstruction, kl, *_ = losses_of(x)
    mu, logvar = encode(x)
    q = Normal(mu, (0.5 * logvar).exp())
    torch.manual_seed(1)
    logits = to_logits(mu + torch.randn_like(mu) * q.stddev)
    log_px = Bernoulli(logits=logits.view_as(x)).log_prob(x).sum() / 16
    want = kl_divergence(q, Normal(0.0, 1.0)).sum() / 16
    assert kl.item() == pytest.approx(want.item(), rel=1e-4) and kl > 1  # codes far from N(0, I)
    assert reconstruction.item() == pytest.approx(-log_px.item(), rel=1e-5)
    assert loss.item() == pytest.approx((reconstruction + kl).item())


def check_precisions(compute, weights: list, device: str) -> None:
    """Losses, outputs of networks, and the gradients of the first loss stay on the device in
    float32; in bfloat16 losses and gradients are near. compute() returns [losses, *outputs].
    """
    found = []
    for is_low in [False, True]:
        torch.manual_seed(0)
        with torch.autocast(device, torch.bfloat16, enabled=is_low):
            losses, *outputs = compute()
        gradients = torch.autograd.grad(losses[0], weights)
        for tensor in [losses, *outputs, *gradients]:
            assert tensor.device.type == device and tensor.dtype == torch.float32
        found.append((losses, torch.cat([gradient.flatten() for gradient in gradients])))
    if device != "meta":
        (losses, gradient), (low_losses, low_gradient) = found
        assert torch.allclose(losses, low_losses, rtol=0.02)
        assert 0 < (gradient - low_gradient).norm() < 0.05 * gradient.norm()


def timeless(content):
    """Metrics or a checkpoint without what may differ between equal runs: time, host, command."""
    if isinstance(content, list | tuple):
        return [timeless(item) for item in content]
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items()
                if "seconds" not in str(key) and key != "environment"}
    return content


def check_resume(tmp_path: Path, train, after_epoch: int = 1) -> None:
    """train(folder) with a Ctrl-C after an epoch, then once more, leaves bitwise the same files
    as without: weights, optimizers, history.
    """
    def interrupted(run, *a, log=common.Run.log, **k):
        log(run, *a, **k)
        if len(run.history) == after_epoch:
            raise KeyboardInterrupt
    train(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "log", interrupted)
        train(tmp_path / "parts")
    train(tmp_path / "parts")
    for file in (tmp_path / "whole").glob("*.pt"):
        whole = torch.load(file, weights_only=True)
        parts = torch.load(tmp_path / "parts" / file.name, weights_only=True)
        torch.testing.assert_close(timeless(whole), timeless(parts), rtol=0, atol=0)


def check_report(study, out_dir: Path, argv: list[str], metrics: dict) -> None:
    """A finished run is not trained again; the pictures of its report exist; and --report-only
    makes everything beside the report once more, byte for byte.
    """
    root = next(out_dir.rglob("report.md")).parent
    assert study.main(argv).items() <= metrics.items()
    files = {file: file.read_bytes() for file in root.iterdir() if file.is_file()}
    pictures = re.findall(r"!\[.*\]\((.*)\)", files[root / "report.md"].decode())
    assert pictures and all((root / picture).exists() for picture in pictures)
    for file in files:
        file.unlink()
    study.main(["--report-only", "--dataset", "glyphs", "--out-dir", str(out_dir)])
    assert files == {file: file.read_bytes() for file in root.iterdir() if file.is_file()}


def start(name: str, *argv: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    """A script as a process, as a user starts it."""
    return subprocess.Popen([sys.executable, str(ROOT / name), *argv], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, **environment})
