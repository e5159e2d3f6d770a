"""The shared module: Fréchet distance against oracles, tables, runs on disk, data folders."""

import functools
import gzip
import math
import signal

import common

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from conftest import DATA_DIR, check_resume
from torch import nn


def test_frechet_of_two_gaussians_in_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 2.25])  # variances
    shift = torch.tensor([1.0, -2.0, 0.5])
    white = math.sqrt(2.5) * torch.cat([torch.eye(3), -torch.eye(3)])  # covariance I, mean 0
    x, y = white * a.sqrt(), white * b.sqrt() + shift
    want = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()  # commuting covariances
    assert common.frechet_distance(x, y) == pytest.approx(want.item(), rel=1e-6)


def test_frechet_agrees_with_scipys_square_root_and_survives_few_samples():
    mix = torch.randn(12, 12, dtype=torch.float64)
    x, y = torch.randn(900, 12).double() @ mix, torch.randn(700, 12).double() + 0.3
    cov_x, cov_y = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    want = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(cov_x + cov_y - 2 * root)
    assert common.frechet_distance(x, y) == pytest.approx(want, rel=1e-6)
    assert common.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert 0 < common.frechet_distance(x[:5], y[:6]) < math.inf  # covariances without full rank


def test_nearest_is_exact_for_copies():
    x = torch.rand(50, 1, 28, 28)
    distance, index = common.nearest(x[:7], x)
    assert index.tolist() == list(range(7)) and distance.max() == 0
    want = torch.cdist(x[:7].flatten(1), x[7:].flatten(1)).min(1)
    assert torch.allclose(common.nearest(x[:7], x[7:])[0], want.values, atol=1e-4)


@pytest.mark.parametrize(("name", "accuracy", "most_false"), [
    ("mnist", 0.994, 0.002), ("fashion-mnist", 0.93, 0.02), ("glyphs", 0.97, 0.002)])
def test_the_committed_classifiers_rarely_see_a_class_that_is_not_there(name, accuracy, most_false):
    if name != "glyphs" and not DATA_DIR:
        pytest.skip("needs real data: set MNIST_DATA_DIR")
    data = common.load_data(name, DATA_DIR)
    classifier = common.load_classifier(data, torch.device("cpu"))
    said, y = classifier.test_probs.argmax(1), data.y_test
    false = [(said[y != digit] == digit).double().mean().item() for digit in range(10)]
    assert classifier.accuracy >= accuracy and max(false) <= most_false
    assert (common.HERE / f"results/classifiers/{name}.pt").stat().st_size <= 500_000


def test_differences_are_paired_t_intervals():
    a, b = np.array([1.0, 2.5, 2.0, 4.0]), np.array([2.0, 3.0, 3.5, 4.5])
    rows = {("net", "x"): {seed: {"m": v} for seed, v in enumerate(a)},
            ("net", "y"): {seed: {"m": v} for seed, v in enumerate(b)} | {9: {"m": 0.0}}}
    half = scipy.stats.t.ppf(0.975, 3) * (a - b).std(ddof=1) / 2
    want = f"-0.875, 95 % interval {-0.875 - half:+.3f} to {-0.875 + half:+.3f}, n=4"
    want = want.replace("-", "−")
    assert common.difference(rows, ("net", "x"), ("net", "y"), "m", 3) == (-1, want, 4)
    assert common.difference(rows, ("net", "x"), ("net", "z"), "m", 3) == (0, "–", 0)
    assert common.cell(rows["net", "y"], "m", 1) == "2.6 ± 1.7"


# ------------------------------------------------------------------------------------------ runs

CONFIG = {"seed": 3, "epochs": 4, "batch_size": 10}


def train(folder, bests=(5.0, 3.0, 4.0, 3.0), save_every=1):
    """A tiny training; every epoch's noise and batches go into the weights."""
    run = common.Run(folder, CONFIG, save_every=save_every)
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    run.restore(model=model, optimizer=optimizer)
    orders = []
    for epoch in run.epochs():
        batches = run.batches(35, torch.device("cpu"))
        orders.append(torch.cat(batches).tolist())
        for batch in batches:
            loss = (model(batch[:, None].float()) - torch.randn(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.log({"loss": loss.item()}, best=bests[epoch - 1])
    assert all(len(order) == len(set(order)) == 30 for order in orders)  # no image twice
    assert len(set(map(tuple, orders))) == len(orders)  # each epoch in an order of its own
    return run, model


@pytest.mark.parametrize(("save_every", "bests", "best"), [
    (1, (5.0, 3.0, 4.0, 3.0), 2),  # the first of equals
    (3, ((True, 1.0), (True, 0.5), (False, 9.0), (False, 9.5)), 3)])
def test_an_interrupted_run_continues_bitwise(tmp_path, save_every, bests, best):
    check_resume(tmp_path, lambda folder: train(folder, bests, save_every), after_epoch=2)
    run, model = train(tmp_path / "parts", bests, save_every)  # finished: nothing to do
    assert len(run.history) == 4 and run.load_best(model=model) == best


def test_folders_of_another_run_and_corrupt_checkpoints_are_refused(tmp_path):
    folder = tmp_path / "run/seed_3"
    _, model = train(folder)
    with pytest.raises(common.UserError, match="another configuration"):
        common.Run(folder, {**CONFIG, "seed": 4})
    good = (folder / "checkpoint.pt").read_bytes()
    for content, part in [(b"", model), (good[:1000], model), (b"\x80\x04cos\nsystem\n.", model),
                          (good, nn.Linear(2, 2))]:
        (folder / "checkpoint.pt").write_bytes(content)
        with pytest.raises(common.UserError, match=r"checkpoint\.pt is missing, corrupt"):
            common.Run(folder, CONFIG).restore(model=part)
    assert not common.Run(folder, CONFIG, fresh=True).history and len(list(folder.iterdir())) == 1


def test_weights_of_another_process_are_not_taken_for_the_best(tmp_path):
    run, model = train(tmp_path / "run/seed_3")
    common.Run(tmp_path / "run/seed_3", CONFIG, fresh=True)  # another process begins anew
    train(tmp_path / "run/seed_3", bests=(1.0, 2.0, 3.0, 4.0))
    with pytest.raises(common.UserError, match="another process trains"):
        run.load_best(model=model)


def test_a_file_that_cannot_be_written_is_named_and_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(common.UserError, match=r"file.config\.json cannot be written"):
        common.Run(tmp_path / "file", CONFIG)

    def full(*a):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(common.os, "replace", full)
    with pytest.raises(common.UserError, match="No space left"):
        common.save(tmp_path / "file", "half")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["not a folder"]


def test_metrics_that_are_not_finite_are_not_kept_and_equal_codes_are_drawn(tmp_path):
    common.plot_codes(tmp_path / "codes.png", np.zeros((50, 3)), np.arange(50) % 10, "collapsed")
    run = common.Run(tmp_path / "run/seed_3", CONFIG)
    with pytest.raises(common.Diverged, match="fid is nan"):
        run.finish({"fid": math.nan})
    assert not (run.folder / "final_metrics.json").exists()
    assert run.finish({"fid": 1.0})["fid"] == 1


def test_a_mistake_is_a_traceback_an_error_or_ctrl_c_a_line(capsys, monkeypatch):
    monkeypatch.setattr(common.shutil, "which", lambda compiler: None)
    compile_it = functools.partial(common.compiled, math.sqrt, True, torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        common.guard(lambda: 1 / 0)
    for main, status in [(compile_it, "2"), (lambda: signal.raise_signal(signal.SIGINT), "130")]:
        with pytest.raises(SystemExit, match=status):
            common.guard(main)
        assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------------------ data


def test_glyphs_are_images_of_ten_classes_and_always_the_same():
    data = common.glyphs()
    assert data.x_train.shape == (60_000, 1, 28, 28) and data.x_test.shape == (10_000, 1, 28, 28)
    assert data.y_train.bincount().min() > 5_500 and data.y_test.bincount().min() > 900
    assert data.x_train.min() == 0 and data.x_train.max() == 1
    assert torch.equal(common.glyphs.__wrapped__().x_test, data.x_test)


def write_idx(path, *shape):
    """A file of zeros with the header of unsigned bytes of this shape."""
    header = b"".join(n.to_bytes(4, "big") for n in [0x800 + len(shape), *shape])
    content = header + bytes(math.prod(shape))
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def planted(folder, ending="-{}-ubyte"):
    """Files of zeros with MNIST's names and shapes."""
    folder.mkdir(parents=True)
    for stem, kind, shape in common.FILES.values():
        write_idx(folder / (stem + ending.format(kind)), *shape)
    return folder


@pytest.mark.parametrize(("place", "ending"), [
    ("MNIST/raw", "-{}-ubyte"), ("MNIST", "-{}-ubyte"), ("raw", "-{}-ubyte"),
    (".", ".{}-ubyte"), ("MNIST/raw", "-{}-ubyte.gz")])
def test_files_are_found_wherever_they_were_left(tmp_path, monkeypatch, place, ending):
    monkeypatch.setenv("HOME", str(tmp_path))
    planted(tmp_path / "data" / place, ending)
    (tmp_path / "data/MNIST/processed").mkdir(parents=True)
    (tmp_path / "data/MNIST/processed/training.pt").write_text("half")  # is never loaded
    data = common.load_data("mnist", "~/data")
    assert data.x_train.shape == (60_000, 1, 28, 28) and data.y_test.shape == (10_000,)


@pytest.fixture
def no_network(monkeypatch):
    def full(*a, **k):
        raise OSError(28, "No space left on device")
    full.mirrors = ["https://example.org/"]
    monkeypatch.setattr(common.datasets, "MNIST", full)


def refused(folder, words, dataset="mnist"):
    with pytest.raises(common.UserError, match=words):
        common.load_data(dataset, str(folder))


def test_foreign_data_is_refused_with_what_was_found(tmp_path, no_network):
    raw = planted(tmp_path / "tall/MNIST/raw")
    images = raw / "train-images-idx3-ubyte"
    write_idx(images, 100, 56, 28)
    refused(tmp_path / "tall", r"holds \(100, 56, 28\), expected")
    images.write_bytes(b"<html>sign in</html>")
    refused(tmp_path / "tall", "cannot be read", dataset=None)
    images.unlink()
    refused(tmp_path / "tall", "has no train-images-idx3-ubyte beside 3 other")
    images.symlink_to("/nowhere")
    refused(tmp_path / "tall", "a link to /nowhere")
    (tmp_path / "file").write_text("no folder")
    refused(tmp_path / "file", "is a file", dataset=None)
    common.save(tmp_path / "old/MNIST/processed/test.pt", "old")
    refused(tmp_path / "old", r"looked for .* found: .*processed/test\.pt")


def test_glyphs_only_where_nothing_is_named(tmp_path, no_network, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert common.load_data(None, "data").name == "glyphs"
    assert "No space left on device" in capsys.readouterr().err  # the true cause
    refused("data", "No space left on device")
    refused(tmp_path / "empty", "No space left on device", dataset=None)
    assert not list(tmp_path.iterdir())  # no empty folders are left


def test_another_dataset_under_mnists_name_is_refused(data):
    shifted = data._replace(y_test=(data.y_test + 1) % 10)
    with pytest.raises(common.UserError, match="are not"):
        common.load_classifier(shifted, torch.device("cpu"))


def test_copies_old_runs_and_two_classifiers_are_not_averaged(tmp_path, capsys):
    def run(name, sha="a", **config):
        common.save(tmp_path / name / "config.json", config)
        common.save(tmp_path / name / "final_metrics.json", {"classifier": {"sha256": sha}})
    run("net/seed_0", seed=0, precision="float32")
    run("net/seed_0_backup", seed=0, precision="float32")
    run("old/seed_0", seed=0)
    assert len(common.finished_runs(tmp_path)) == 1
    assert capsys.readouterr().out.count("left out") == 2
    run("net/seed_1", "b", seed=1, precision="float32")
    with pytest.raises(common.UserError, match="two metric classifiers"):
        common.finished_runs(tmp_path)
