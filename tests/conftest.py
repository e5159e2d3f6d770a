"""Fixtures: real MNIST where MNIST_DATA_DIR names it, glyphs otherwise; the metric classifier."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import common

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

DATA_DIR = os.environ.get("MNIST_DATA_DIR", "")


@pytest.fixture(autouse=True)
def known_noise():
    torch.manual_seed(0)


@pytest.fixture
def few_test_images(monkeypatch):
    """Whole runs load 1,000 of the 10,000 test images, to be quick."""
    def fewer(*a, real=common.load_data):
        data = real(*a)
        return data._replace(x_test=data.x_test[:1000], y_test=data.y_test[:1000])
    monkeypatch.setattr(common, "load_data", fewer)


@pytest.fixture
def small_sets(monkeypatch, few_test_images):
    """Besides, 500 validation images: not where a process continues what was begun in this one."""
    monkeypatch.setattr(common, "split", functools.partial(common.split, n_val=500))


@pytest.fixture(scope="session")
def data():
    """Real MNIST if it is at hand (in CI it is), glyphs otherwise."""
    return common.load_data("mnist", DATA_DIR) if DATA_DIR else common.glyphs()


@pytest.fixture(scope="session")
def classifier(data):
    return common.load_classifier(data, torch.device("cpu"))


def numbers(folder: Path) -> dict:
    """A run's metrics without what may differ between equal runs: time, host and command."""
    metrics = json.loads((folder / "final_metrics.json").read_text())
    drop = lambda d: {k: drop(v) if isinstance(v, dict) else v for k, v in d.items()
                      if not k.startswith("seconds") and k != "environment"}
    return drop(metrics)


def interrupt_after_epoch(n: int, run) -> None:
    """Call `run`, with a Ctrl-C once n epochs are on disk."""
    calls, log = [], common.Run.log

    def interrupted(*a, **k):
        log(*a, **k)
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "log", interrupted)
        run()


def script(name: str, *argv: str, cwd: Path = ROOT, **environment: str):
    """A script as a process, as a user starts it."""
    return subprocess.run([sys.executable, str(ROOT / name), *argv], cwd=cwd,
                          capture_output=True, text=True, env={**os.environ, **environment})


def refused(result, *words: str) -> None:
    """A process ended with one line of error that has the words, and exit status 2."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words), result.stderr
