"""Faults: killed processes, corrupt files, no room on the disk, bad command lines, extremes.

    pytest tests/test_faults.py              # the fast part, as in the suite
    pytest tests/test_faults.py -m faults    # the whole, an hour: 50 kills, every script
"""

import functools
import http.server
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, interrupt_after_epoch, numbers, script

import common_v1 as common
import gan_vs_vae
import imbalance_study
import latent_opt
import vae_mnist

SMALL = ["--dataset", "glyphs", "--train-size", "200", "--epochs", "2", "--device", "cpu"]
SMOKE = {
    "vae_mnist": [*SMALL, "--hidden", "16", "--latent-dim", "2", "--likelihood-images", "4"],
    "imbalance_study": [*SMALL, "--model", "ae", "--samples", "2000", "--sampler", "prior",
                        "--rare-ratio", "0.1"],
    "latent_opt": [*SMALL, "--test-images", "20", "--codes", "50", "--latent-dim", "8"],
    "gan_vs_vae": [*SMALL, "--model", "gan", "--loss", "hinge", "--z-dim", "4", "--samples", "300"]}
STUDIES = {"vae_mnist": vae_mnist, "imbalance_study": imbalance_study, "latent_opt": latent_opt,
           "gan_vs_vae": gan_vs_vae}


def start(name: str, *argv: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / f"{name}.py"), *argv],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def results(base) -> dict:
    """The metrics of every run below a folder, without time, host and command."""
    return {str(file.parent.relative_to(base)): numbers(file.parent)
            for file in sorted(base.rglob("final_metrics.json"))}


def wait_for(base, name: str, process: subprocess.Popen) -> None:
    """Until a file of that name is below base, or the process has ended."""
    while not list(base.rglob(name)) and process.poll() is None:
        time.sleep(0.02)


# ------------------------------------------------------------------------------ killed, interrupted


def test_after_kill_9_the_same_command_gives_the_same_numbers(tmp_path):
    argv = [*SMOKE["vae_mnist"], "--epochs", "3"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for what in ["checkpoint.pt", "losses.png"]:  # in training, in evaluation
        process = start("vae_mnist", *argv, "--out-dir", str(killed))
        wait_for(killed, what, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not results(killed)
    for base in (killed, whole):
        vae_mnist.main([*argv, "--out-dir", str(base)])
    assert results(killed) == results(whole) != {}
    assert not list(killed.rglob(".*-*"))  # no half-written file is left


@pytest.mark.parametrize(("sent", "status", "said"), [
    (signal.SIGINT, 130, "same command continues"), (signal.SIGTERM, 143, "")])
def test_a_signal_ends_the_process_and_the_checkpoint_stands(tmp_path, sent, status, said):
    heard = lambda: signal.signal(sent, signal.SIG_DFL)  # a job in the background ignores Ctrl-C
    process = start("vae_mnist", *SMOKE["vae_mnist"], "--epochs", "5000", "--out-dir",
                    str(tmp_path), preexec_fn=heard)
    wait_for(tmp_path, "checkpoint.pt", process)
    process.send_signal(sent)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, errors
    assert len(errors.splitlines()) == bool(said) and said in errors
    assert common.load_torch(next(tmp_path.rglob("checkpoint.pt")))["history"]


@pytest.mark.faults
@pytest.mark.parametrize("name", SMOKE)
def test_kill_9_at_random_moments(tmp_path, name):
    began = time.perf_counter()
    whole = script(f"{name}.py", *SMOKE[name], "--out-dir", str(tmp_path / "whole"))
    seconds, wanted = time.perf_counter() - began, results(tmp_path / "whole")
    assert whole.returncode == 0 and wanted, whole.stderr
    rng, at = random.Random(name), {}
    for i in range(13):
        base = tmp_path / str(i)
        process = start(name, *SMOKE[name], "--out-dir", str(base))
        time.sleep(rng.uniform(0.2, 1) * seconds)
        process.kill()
        process.communicate()
        files = {file.name for file in base.rglob("*.*")}
        reached = next((f for f in ["report.md", "final_metrics.json", "losses.png",
                                    "checkpoint.pt", "config.json"] if f in files), "nothing")
        at[reached] = at.get(reached, 0) + 1
        again = script(f"{name}.py", *SMOKE[name], "--out-dir", str(base))
        assert again.returncode == 0, again.stderr
        assert results(base) == wanted, reached
        shutil.rmtree(base)
    print(f"{name}: killed with these on disk: {at}")


# ----------------------------------------------------------------------------------------- the disk


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_without_room_for_a_checkpoint_one_line_says_so(tmp_path):
    process = start("vae_mnist", *SMOKE["vae_mnist"], "--hidden", "64", "--out-dir", str(tmp_path),
                    preexec_fn=small_files)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and len(errors.splitlines()) == 1, errors
    assert "File too large" in errors and "best_model.pt" in errors
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob(".*-*"))


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    argv = [*SMOKE["vae_mnist"], "--out-dir", str(tmp_path)]
    vae_mnist.main(argv)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    def full(*a):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(common.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        vae_mnist.main([*argv, "--seeds", "0", "1"])
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_read_only_folder_is_one_line_and_stays(tmp_path):
    argv = [*SMOKE["vae_mnist"], "--out-dir", str(tmp_path)]
    vae_mnist.main(argv)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    folders = [tmp_path, *(folder for folder in tmp_path.rglob("*") if folder.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    # root may write everywhere, unless it gives up that right
    without = ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []
    command = [*without, sys.executable, str(ROOT / "vae_mnist.py"), *argv]
    try:
        for more in [["--seeds", "1"], ["--fresh"]]:
            result = subprocess.run([*command, *more], text=True, capture_output=True, timeout=120)
            assert result.returncode == 2 and "Permission denied" in result.stderr, result.stderr
            assert len(result.stderr.splitlines()) == 1 and str(tmp_path) in result.stderr
    finally:  # or pytest could not remove them
        for folder in folders:
            folder.chmod(0o755)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_a_folder_removed_meanwhile_is_one_line(tmp_path, monkeypatch, capsys):
    argv, real = [*SMOKE["vae_mnist"], "--out-dir", str(tmp_path)], common.save_epoch
    other = vae_mnist.main([*argv, "--seeds", "1"])
    def remove(folder, *a):
        real(folder, *a)
        shutil.rmtree(folder)
    monkeypatch.setattr(common, "save_epoch", remove)
    with pytest.raises(SystemExit) as stop:
        common.guard(lambda: vae_mnist.main(argv))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1 and "seed_0" in message
    assert other and len(results(tmp_path)) == 1


# ------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory):
    """A run of two epochs that was interrupted after the first: its folder and arguments."""
    base = tmp_path_factory.mktemp("half")
    argv = [*SMOKE["vae_mnist"], "--out-dir", str(base)]
    interrupt_after_epoch(1, lambda: vae_mnist.main(argv))
    return next(base.rglob("checkpoint.pt")).parent, argv


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_broken_checkpoints_are_refused_and_kept(half_trained):
    folder, argv = half_trained
    file = folder / "checkpoint.pt"
    good = file.read_bytes()
    saved = common.load_torch(file)
    broken = [good[:len(good) * tenth // 10] for tenth in range(10)]
    rng = random.Random(0)
    for _ in range(100):
        place = rng.randrange(len(good))
        flipped = bytearray(good)
        flipped[place] ^= 1 << rng.randrange(8)
        broken.append(bytes(flipped))
    refusals = 0
    for content in broken:
        file.write_bytes(content)
        try:
            assert equal(common.load_torch(file), saved)  # the bit was in no one's way
        except common.UserError as error:
            refusals += 1
            assert "checkpoint.pt" in str(error) and "--fresh" in str(error)
    assert refusals >= 100
    with pytest.raises(common.UserError, match=r"checkpoint.pt is corrupt"):
        file.write_bytes(broken[5])
        vae_mnist.main(argv)
    assert file.read_bytes() == broken[5]
    file.write_bytes(good)


class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_foreign_checkpoints_are_refused_and_never_executed(half_trained, tmp_path, monkeypatch):
    folder, argv = half_trained
    monkeypatch.chdir(tmp_path)
    good = (folder / "checkpoint.pt").read_bytes()
    saved = common.load_torch(folder / "checkpoint.pt")
    torch.save({**saved, "model": Malice()}, tmp_path / "malice.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malice()))
    common.save_torch(tmp_path / "config.pt", {**saved, "config": {**saved["config"], "lr": 1.0}})
    common.save_torch(tmp_path / "other.pt", {"config": saved["config"], "history": [], "G": {}})
    common.save_torch(tmp_path / "classifier.pt", {"weight": torch.zeros(3)})
    for foreign in sorted(tmp_path.glob("*.pt")):
        for name in ["checkpoint.pt", "best_model.pt"]:
            kept = (folder / name).read_bytes()
            shutil.copy(foreign, folder / name)
            if name == "best_model.pt":  # read once the run has ended
                with pytest.raises(common.UserError, match=name):
                    common.restore(folder, saved["config"], {"model": vae_mnist.VAE(
                        saved["config"])}, name)
            else:
                with pytest.raises(common.UserError, match=name):
                    vae_mnist.main(argv)
            assert (folder / name).read_bytes() == foreign.read_bytes()
            (folder / name).write_bytes(kept)
    assert not (tmp_path / "executed").exists()
    assert (folder / "checkpoint.pt").read_bytes() == good


def test_corrupt_results_are_named(half_trained, tmp_path):
    folder, argv = half_trained
    base = tmp_path / "vae_mnist/glyphs/v/seed_0"
    shutil.copytree(folder, base)
    report = ["--report-only", "--out-dir", str(tmp_path)]
    (base / "final_metrics.json").write_text("{")
    with pytest.raises(common.UserError, match=r"final_metrics\.json is corrupt"):
        vae_mnist.main(report)
    (base / "final_metrics.json").write_text("{}")
    for text in ["epoch,train_loss\n1,one\n", "", "epoch,train_loss\n1,2.5\n"]:  # not all epochs
        (base / "history.csv").write_text(text)
        with pytest.raises(common.UserError, match=r"history\.csv is corrupt"):
            vae_mnist.main(report)
    (folder / "config.json").write_text("\x00\x00")
    with pytest.raises(common.UserError, match=r"config\.json is corrupt"):
        vae_mnist.main(argv)


def test_truncated_and_foreign_datasets_are_named(tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    good = {"train-images-idx3-ubyte": (3, 60_000), "train-labels-idx1-ubyte": (1, 60_000),
            "t10k-images-idx3-ubyte": (3, 10_000), "t10k-labels-idx1-ubyte": (1, 10_000)}
    head = lambda dims, n: b"".join(v.to_bytes(4, "big")
                                    for v in [0x800 + dims, n, 28, 28][: 1 + dims])
    for name, (dims, n) in good.items():
        (raw / name).write_bytes(head(dims, n) + bytes(n * (784 if dims == 3 else 1)))
    common.load_data("mnist", str(tmp_path))
    for name, content, word in [
            ("t10k-labels-idx1-ubyte", None, "truncated"),
            ("train-labels-idx1-ubyte", head(1, 60_000) + bytes([11]) * 60_000, "outside 0..9"),
            ("train-labels-idx1-ubyte", head(1, 59_999) + bytes(59_999), "does not begin"),
            ("t10k-labels-idx1-ubyte", head(3, 10_000) + bytes(10_000), "does not begin"),
            ("train-images-idx3-ubyte", b"", "does not begin"),
            ("t10k-images-idx3-ubyte", b"<html>sign in</html>", "does not begin")]:
        kept = (raw / name).read_bytes()
        (raw / name).write_bytes(kept[:-100] if content is None else content)
        with pytest.raises(common.UserError, match=f"{name}.*{word}"):
            common.load_data("mnist", str(tmp_path))
        (raw / name).write_bytes(kept)


@pytest.mark.parametrize("cut", [False, True])
def test_a_captive_portal_or_a_cut_download_is_no_dataset(tmp_path, monkeypatch, cut):
    import torchvision.datasets

    class Portal(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100000" if cut else "20")
            self.end_headers()
            self.wfile.write(b"<html>sign in</html>")

        def log_message(self, *a):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Portal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors",
                        [f"http://127.0.0.1:{server.server_port}/"])
    for _ in range(2):  # what the first attempt left behind does not pass for data either
        with pytest.raises(common.UserError, match="cannot be downloaded"):
            common.load_data("mnist", str(tmp_path))
    assert common.load_data(None, str(tmp_path)).name == "glyphs"
    server.shutdown()


# ------------------------------------------------------------------------------------------- shards


@pytest.mark.faults  # test_imbalance_study.py has shards one after another
@pytest.mark.parametrize("name", SMOKE)
def test_shards_at_once_make_the_whole(tmp_path, name):
    argv = [*SMOKE[name], "--seeds", "0", "1"]
    parts = [start(name, *argv, "--shard", f"{k}/2", "--out-dir", str(tmp_path / "parts"))
             for k in range(2)]
    for part in parts:
        _, errors = part.communicate(timeout=600)
        assert part.returncode == 0, errors
    STUDIES[name].main([*argv, "--out-dir", str(tmp_path / "whole")])
    STUDIES[name].main(["--report-only", "--out-dir", str(tmp_path / "parts")])
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    if name != "latent_opt":  # whose tables have seconds in their midst
        last_column = lambda base: re.sub(r"[^|]*\|$", "", next(base.rglob("report.md")).read_text(
            ).split("## How this was made")[0], flags=re.MULTILINE)
        assert last_column(tmp_path / "parts") == last_column(tmp_path / "whole")


# ------------------------------------------------------------------------------------ command lines

ODD = ["nan", "inf", "-inf", "1e309", "-1", "0", "1", "2.5", "", " ", "ü", "a b", "9" * 40,
       "1e-400", "0x10", "1/2", "3/3", "-1/2", "None", "--", "\n", "💥"]


@functools.cache
def actions(name: str) -> list:
    """The flags of a script."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Parser, "parse_args", lambda self, argv: kept.extend(self._actions))
        STUDIES[name].parse_args([])
    return [action for action in kept if "--help" not in action.option_strings]


def command_line(name: str, rng: random.Random) -> list[str]:
    argv = []
    for action in rng.sample(actions(name), rng.randint(1, 5)):
        argv.append(rng.choice(action.option_strings))
        if action.nargs != 0:
            values = [*ODD, *[str(c) for c in action.choices or []] * 3]
            argv += rng.choices(values, k=rng.choice([0, 1, 1, 1, 2, 3]))
    return argv


@pytest.mark.parametrize("name", SMOKE)
def test_a_bad_command_line_is_one_line_and_status_2(name, capsys):
    rng, outcomes = random.Random(name), []
    for _ in range(250):
        argv = command_line(name, rng)
        try:
            STUDIES[name].parse_args(argv)
            outcomes.append("parsed")
        except SystemExit as stop:
            errors = capsys.readouterr().err
            assert stop.code == 2 and errors.count("\n") == 1, (argv, errors)
            outcomes.append("refused")
    assert outcomes.count("refused") > 50 and outcomes.count("parsed") > 10
    flags = {a.option_strings[0]: a.type for a in actions(name) if a.type}
    for flag in flags:  # every number's flag refuses what is no number
        for value in ["nan", "1e309", "", "-1", "9" * 40, "ü"]:
            with pytest.raises(SystemExit):
                STUDIES[name].parse_args([flag, value])
            message = capsys.readouterr().err
            assert flag in message and message.count("\n") == 1, (flag, value)


@pytest.mark.faults
@pytest.mark.parametrize("name", SMOKE)
def test_generated_command_lines_as_processes(tmp_path, name):
    rng, statuses = random.Random(f"{name} processes"), []
    for i in range(10):
        folder = tmp_path / f"folder {i} ü"
        argv = [a for a in command_line(name, rng) if a not in ("--compile", "--tensorboard")]
        argv += [*SMOKE[name], "--out-dir", str(folder)] if i % 2 else ["--out-dir", str(folder)]
        if "--epochs" not in argv:
            argv += SMALL
        result = subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *argv], text=True,
                                capture_output=True, timeout=900, cwd=tmp_path,
                                env={**os.environ, "MNIST_DATA_DIR": str(tmp_path / "none")})
        statuses.append(result.returncode)
        assert "Traceback" not in result.stderr, (argv, result.stderr)
        assert result.returncode in (0, 2), (argv, result.stderr)
        if result.returncode == 2:
            assert result.stderr.strip().count("\n") <= 1, (argv, result.stderr)
            assert not list(folder.rglob("*.pt")), argv
    print(f"{name}: exit statuses {statuses}")


# ----------------------------------------------------------------------------------------- extremes

EXTREMES = {
    "vae_mnist": [["--train-size", "1"], ["--train-size", "10", "--batch-size", "100"],
                  ["--latent-dim", "1"], ["--latent-dim", "1000"], ["--seeds", "3", "3"]],
    "imbalance_study": [["--train-size", "10"], ["--train-size", "1"], ["--batch-size", "5000"],
                        ["--latent-dim", "1"], ["--latent-dim", "1000"], ["--seeds", "3", "3"]],
    "latent_opt": [["--train-size", "10"], ["--train-size", "1"], ["--batch-size", "5000"],
                   ["--latent-dim", "1"], ["--latent-dim", "1000"], ["--seeds", "3", "3"]],
    "gan_vs_vae": [["--train-size", "10"], ["--train-size", "1"], ["--batch-size", "1"],
                   ["--batch-size", "5000"], ["--z-dim", "1", "1000"],
                   ["--model", "vae", "--latent-dim", "1", "1000"], ["--model", "vae-gan",
                    "--latent-dim", "1"], ["--seeds", "3", "3"]]}


@pytest.mark.faults
@pytest.mark.parametrize(("name", "extreme"), [(n, e) for n in EXTREMES for e in EXTREMES[n]],
                         ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_extremes_run_or_are_refused(tmp_path, name, extreme):
    argv = [*SMOKE[name], *extreme, "--epochs", "1", "--out-dir", str(tmp_path)]
    try:
        metrics = STUDIES[name].main(argv)
    except common.UserError as error:
        assert "--" in str(error), "the next step is named"
        return
    found = np.array([v for m in metrics.values() for v in [
        m.get("test_loss", m.get("fid", m.get("supervised_accuracy", 0.0)))]])
    assert metrics and np.isfinite(found).all()
    assert len(metrics) == (2 if extreme[-2:] == ["1", "1000"] else 1)
