"""The shared module: Fréchet distance against oracles, tables, runs on disk, data folders.

    pytest tests/test_common.py
"""

import gzip
import math

import common

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import nn

# ------------------------------------------------------------------------------ Fréchet distance


def with_moments(n, mean, cov):
    """n vectors whose sample mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return (torch.linalg.cholesky(cov) @ white).T + mean


def test_frechet_of_two_gaussians_in_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 2.25]).double()
    mu = torch.tensor([1.0, -2.0, 0.5]).double()
    x = with_moments(500, torch.zeros(3).double(), a.diag())
    y = with_moments(400, mu, b.diag())
    want = mu.square().sum() + (a.sqrt() - b.sqrt()).square().sum()  # commuting covariances
    assert common.frechet_distance(x, y) == pytest.approx(want.item(), rel=1e-9)


def test_frechet_agrees_with_scipys_square_root():
    mix = torch.randn(12, 12, dtype=torch.float64)
    x, y = torch.randn(900, 12).double() @ mix, torch.randn(700, 12).double() + 0.3
    cov_x, cov_y = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    want = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(cov_x + cov_y - 2 * root)
    assert common.frechet_distance(x, y) == pytest.approx(want, rel=1e-6)


def test_frechet_scales_rotates_and_survives_few_samples():
    x, y = torch.randn(300, 8).double(), torch.randn(200, 8).double() * 1.5 + 1
    base = common.frechet_distance(x, y)
    rotation = torch.linalg.qr(torch.randn(8, 8).double())[0]
    assert common.frechet_distance(3 * x, 3 * y) == pytest.approx(9 * base, rel=1e-9)
    assert common.frechet_distance(x @ rotation, y @ rotation) == pytest.approx(base, rel=1e-9)
    assert common.frechet_distance(y, x) == pytest.approx(base, rel=1e-9)
    assert common.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    few = common.frechet_distance(torch.randn(5, 20), torch.randn(6, 20))
    assert math.isfinite(few) and few > 0


# ---------------------------------------------------------------------------------------- tables


def test_differences_are_paired_t_intervals():
    a, b = np.array([1.0, 2.5, 2.0, 4.0]), np.array([2.0, 3.0, 3.5, 4.5])
    rows = {("net", "x"): {seed: {"m": v} for seed, v in enumerate(a)},
            ("net", "y"): {seed: {"m": v} for seed, v in enumerate(b)} | {9: {"m": 0.0}}}
    half = scipy.stats.t.ppf(0.975, 3) * (a - b).std(ddof=1) / 2
    want = f"-0.875, 95 % interval {-0.875 - half:+.3f} to {-0.875 + half:+.3f}, n=4"
    want = want.replace("-", "−")
    assert common.difference(rows, ("net", "x"), ("net", "y"), "m", 3) == (-1, want, 4)
    assert common.difference(rows, ("net", "x"), ("net", "z"), "m", 3) == (0, "–", 0)
    noisy = {("x",): {0: {"m": 1.0}, 1: {"m": 3.0}}, ("y",): {0: {"m": 2.0}, 1: {"m": 2.0}}}
    assert common.difference(noisy, ("x",), ("y",), "m", 2)[0] == 0
    one = {("x",): {0: {"m": 1.0}}, ("y",): {0: {"m": 2.0}}}
    assert common.difference(one, ("x",), ("y",), "m", 2) == (-1, "−1.00, n=1", 1)


def test_a_cell_is_a_mean_with_the_deviation_of_the_sample():
    seeds = {0: {"m": 1.0}, 1: {"m": 2.0}, 2: {"m": 3.0}, 3: {}}
    assert common.cell(seeds, "m", 1) == "2.0 ± 1.0" and common.cell(seeds, "other", 1) == "–"
    assert common.flat({"a": {"b": 1, "c": {"d": 2.5}}, "e": [1], "f": "x"}) == {
        "a.b": 1, "a.c.d": 2.5}


# ------------------------------------------------------------------------------------------ runs

CONFIG = {"seed": 3, "epochs": 4, "batch_size": 10}


def train(folder, stop_after=None, bests=(5.0, 3.0, 4.0, 3.0), save_every=1):
    """A tiny training; every epoch's noise and batches go into the weights."""
    run = common.Run(folder, CONFIG, save_every=save_every)
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    run.restore(model=model, optimizer=optimizer)
    for epoch in run.epochs():
        for batch in run.batches(35, torch.device("cpu")):
            assert len(batch) == 10
            loss = (model(batch[:, None].float()) - torch.randn(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        row = {"loss": loss.item()} if epoch < 3 else {"loss": loss.item(), "late_loss": 1.0}
        run.log(row, best=bests[epoch - 1])
        if epoch == stop_after:
            return run, model
    return run, model


@pytest.mark.parametrize("save_every", [1, 3])
def test_an_interrupted_run_continues_bitwise(tmp_path, save_every):
    whole, model = train(tmp_path / "whole/seed_3")
    train(tmp_path / "parts/seed_3", stop_after=2, save_every=save_every)
    parts, again = train(tmp_path / "parts/seed_3", save_every=save_every)
    assert torch.equal(model.weight, again.weight) and len(parts.history) == 4
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in parts.history]
    assert whole.load_best(model=model) == parts.load_best(model=again) == 2  # the first of equals
    assert torch.equal(model.weight, again.weight)
    header = (tmp_path / "whole/seed_3/history.csv").read_text().splitlines()[0]
    assert header == "epoch,loss,seconds,late_loss"


def test_the_best_may_be_a_tuple(tmp_path):
    bests = [(True, 1.0), (True, 0.5), (False, 9.0), (False, 9.5)]
    run, model = train(tmp_path / "run/seed_3", bests=bests)
    assert run.load_best(model=model) == 3


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_epoch_before(tmp_path):
    run, model = train(tmp_path / "run/seed_3", stop_after=2)
    with pytest.raises(common.Diverged, match="epoch 3"):
        run.log({"loss": math.nan})
    again = common.Run(tmp_path / "run/seed_3", CONFIG)
    again.restore(model=model)
    assert len(again.history) == 2


def test_folders_of_another_run_and_corrupt_checkpoints_are_refused(tmp_path):
    folder = tmp_path / "run/seed_3"
    _, model = train(folder, stop_after=2)
    with pytest.raises(common.UserError, match="another configuration"):
        common.Run(folder, {**CONFIG, "seed": 4})
    good = (folder / "checkpoint.pt").read_bytes()
    for content in [b"", good[:1000], b"\x80\x04cos\nsystem\n."]:
        (folder / "checkpoint.pt").write_bytes(content)
        with pytest.raises(common.UserError, match=r"checkpoint\.pt is missing, corrupt"):
            common.Run(folder, CONFIG).restore(model=model)
    (folder / "checkpoint.pt").write_bytes(good)
    with pytest.raises(common.UserError, match=r"corrupt or not of this run"):
        common.Run(folder, CONFIG).restore(model=nn.Linear(2, 2))
    assert not common.Run(folder, CONFIG, fresh=True).history and len(list(folder.iterdir())) == 1


def test_weights_of_another_process_are_not_taken_for_the_best(tmp_path):
    run, model = train(tmp_path / "run/seed_3")
    train(tmp_path / "run/seed_3")  # finished: nothing happens
    other = common.Run(tmp_path / "run/seed_3", CONFIG, fresh=True)
    other.restore(model=model)
    for _ in other.epochs():
        list(other.batches(35, torch.device("cpu")))
        other.log({"loss": 1.0}, best=1.0)
        break
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
    path.write_bytes(header + bytes(math.prod(shape)))


def planted(folder, ending="-{}-ubyte"):
    """Files of zeros with MNIST's names and shapes."""
    folder.mkdir(parents=True)
    for stem, kind, shape in common.FILES.values():
        write_idx(folder / (stem + ending.format(kind)), *shape)
    return folder


@pytest.mark.parametrize(("place", "ending"), [
    ("MNIST/raw", "-{}-ubyte"), ("MNIST", "-{}-ubyte"), ("raw", "-{}-ubyte"),
    (".", ".{}-ubyte"), ("MNIST/raw", "-{}-ubyte.gz")])
def test_files_are_found_where_torchvision_or_a_user_left_them(tmp_path, place, ending):
    raw = planted(tmp_path / "data" / place, ending.removesuffix(".gz"))
    if ending.endswith(".gz"):
        for file in list(raw.iterdir()):
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes(), 1))
            file.unlink()
    (tmp_path / "data/MNIST/processed").mkdir(parents=True)
    (tmp_path / "data/MNIST/processed/training.pt").write_text("half")  # is never loaded
    data = common.load_data("mnist", str(tmp_path / "data"))
    assert data.x_train.shape == (60_000, 1, 28, 28) and data.y_test.shape == (10_000,)


@pytest.fixture
def no_network(monkeypatch):
    def full(*a, **k):
        raise OSError(28, "No space left on device")
    full.mirrors = ["https://example.org/"]
    monkeypatch.setattr(common.datasets, "MNIST", full)


def test_foreign_data_is_refused_with_what_was_found(tmp_path, no_network, monkeypatch):
    raw = planted(tmp_path / "tall/MNIST/raw")
    write_idx(raw / "train-images-idx3-ubyte", 100, 56, 28)
    with pytest.raises(common.UserError, match=r"holds \(100, 56, 28\), expected"):
        common.load_data("mnist", str(tmp_path / "tall"))
    (raw / "train-images-idx3-ubyte").write_bytes(b"<html>sign in</html>")
    with pytest.raises(common.UserError, match="cannot be read"):
        common.load_data(None, str(tmp_path / "tall"))
    (raw / "train-images-idx3-ubyte").unlink()
    with pytest.raises(common.UserError, match=r"has no train-images-idx3-ubyte beside 3 other"):
        common.load_data("mnist", str(tmp_path / "tall"))
    (raw / "train-images-idx3-ubyte").symlink_to("/nowhere")
    with pytest.raises(common.UserError, match=r"a link to /nowhere"):
        common.load_data("mnist", str(tmp_path / "tall"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(common.UserError, match="is a file"):
        common.load_data(None, str(tmp_path / "file"))
    (tmp_path / "old/MNIST/processed").mkdir(parents=True)
    (tmp_path / "old/MNIST/processed/test.pt").write_text("old")
    with pytest.raises(common.UserError, match=r"looked for .* found: .*processed/test\.pt"):
        common.load_data("mnist", str(tmp_path / "old"))
    monkeypatch.setenv("HOME", str(tmp_path))
    planted(tmp_path / "good")
    assert common.load_data("mnist", "~/good").name == "mnist"


def test_only_where_nothing_is_named_glyphs_take_mnists_place(tmp_path, no_network, monkeypatch,
                                                             capsys):
    monkeypatch.chdir(tmp_path)
    assert common.load_data(None, "data").name == "glyphs"
    assert "No space left on device" in capsys.readouterr().err  # the true cause
    for dataset, folder in [("mnist", "data"), (None, str(tmp_path / "empty"))]:
        with pytest.raises(common.UserError, match="No space left on device"):
            common.load_data(dataset, folder)
    assert not list(tmp_path.iterdir())  # no empty folders are left


def test_another_dataset_under_mnists_name_is_refused(data):
    shifted = data._replace(y_test=(data.y_test + 1) % 10)
    with pytest.raises(common.UserError, match="are not"):
        common.load_classifier(shifted, torch.device("cpu"))


# -------------------------------------------------------------------------------- finished runs


def test_copies_old_runs_and_two_classifiers_are_not_averaged(tmp_path, capsys):
    def run(name, seed, sha="a", **config):
        config = {"seed": seed, "precision": "float32", **config}
        common.save(tmp_path / name / "config.json", config)
        common.save(tmp_path / name / "final_metrics.json", {"classifier": {"sha256": sha}})
    run("net/seed_0", 0)
    run("net/seed_0_backup", 0)
    common.save(tmp_path / "old/seed_0/config.json", {"seed": 0})
    common.save(tmp_path / "old/seed_0/final_metrics.json", {})
    assert len(common.finished_runs(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "seed_0_backup is a copy" in said and "old/seed_0 is of an older version" in said
    run("net/seed_1", 1, sha="b")
    with pytest.raises(common.UserError, match="two metric classifiers"):
        common.finished_runs(tmp_path)


def test_metrics_that_are_not_finite_are_not_kept(tmp_path):
    run = common.Run(tmp_path / "run/seed_3", CONFIG)
    with pytest.raises(common.Diverged, match="fid is nan"):
        run.finish({"fid": math.nan})
    assert not (run.folder / "final_metrics.json").exists()
    assert run.finish({"fid": 1.0})["fid"] == 1
