"""The metrics against closed forms, independent implementations and planted failures.

    pytest tests/test_metrics.py
"""

import common

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA_DIR

import imbalance_study as study


def test_nearest_is_exact_for_copies():
    x = torch.rand(50, 1, 28, 28)
    distance, index = common.nearest(x[:7], x)
    assert index.tolist() == list(range(7)) and distance.max() == 0
    want = torch.cdist(x[:7].flatten(1), x[7:].flatten(1)).min(1)
    assert torch.allclose(common.nearest(x[:7], x[7:])[0], want.values, atol=1e-4)


# ---------------------------------------------------------------------- the classifier and the lift


@pytest.mark.parametrize(("name", "accuracy"), [
    ("mnist", 0.994), ("fashion-mnist", 0.93), ("glyphs", 0.97)])
def test_the_committed_classifiers_are_good_enough(name, accuracy):
    if name != "glyphs" and not DATA_DIR:
        pytest.skip("needs real data: set MNIST_DATA_DIR")
    data = common.load_data(name, DATA_DIR)
    assert common.load_classifier(data, torch.device("cpu")).accuracy >= accuracy


def test_the_committed_classifier_rarely_sees_a_class_that_is_not_there(data, classifier):
    said, y = classifier.test_probs.argmax(1), data.y_test
    wrong = [((said == c) & (y != c)).sum().item() / (y != c).sum().item() for c in range(10)]
    assert max(wrong) <= 0.002
    path = common.HERE / f"results/classifiers/{data.name}.pt"
    assert path.stat().st_size <= 500_000 and len(classifier.sha256) == 64


def test_the_classifier_does_not_couple_the_images_of_a_batch(data, classifier):
    alone = classifier.predict(data.x_test[:1])[0]
    assert torch.allclose(alone[0], classifier.predict(data.x_test[:100])[0][0], atol=1e-5)


def test_class_share_recovers_planted_mixtures_through_bad_classifiers():
    """Over 40 random classifiers and mixtures: 95 % intervals hold the truth."""
    rng, eye, inside, errors = np.random.default_rng(0), torch.eye(10), [], []
    for _ in range(40):
        confusion = 0.7 * np.eye(10) + 0.3 * rng.dirichlet(np.ones(10), 10)
        says = lambda y: eye[np.concatenate([  # y sorted
            np.repeat(np.arange(10), rng.multinomial((y == t).sum(), confusion[t]))
            for t in range(10)])]
        pi, y_held_out = rng.dirichlet(np.ones(10)), np.repeat(np.arange(10), 500)
        y = np.sort(rng.choice(10, 20_000, p=pi))
        counted, share, low, high = study.class_shares(
            says(y), says(y_held_out), torch.from_numpy(y_held_out))
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
    """Real test images of the half that is no reference, with this share of nines."""
    rest = reference.halves[1].numpy()
    nine = data.y_test.numpy()[rest] == 9
    nines, others = rest[nine], rest[~nine]
    if share == 1:
        return data.x_test[nines]
    n = round(len(others) * share / (1 - share))
    return data.x_test[np.concatenate([nines[:n], others])]


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
    assert 0 <= reference.coverage.false_share < 0.05  # hardly any other image is called a nine


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
