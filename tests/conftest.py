"""Fixtures: real MNIST where MNIST_DATA_DIR names it, glyphs otherwise; the metric classifier."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

DATA_DIR = os.environ.get("MNIST_DATA_DIR", "")


@pytest.fixture(autouse=True)
def known_noise():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data():
    """Real MNIST if it is at hand (in CI it is), glyphs otherwise."""
    return common.load_data("mnist", DATA_DIR) if DATA_DIR else common.glyphs()


@pytest.fixture(scope="session")
def classifier(data):
    return common.load_classifier(data, torch.device("cpu"))


@pytest.fixture(scope="session")
def seen(data, classifier):
    """What the classifier makes of the test set: features (10000, 64), probabilities (10000, 10).
    """
    return classifier.look(data.x_test)
