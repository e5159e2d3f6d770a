"""Faults: processes killed at random moments, bad command lines, shards at once, extremes.

    pytest tests/test_faults.py              # command lines, as in the suite
    pytest tests/test_faults.py -m faults    # the whole, an hour: 50 kills, every script
"""

import functools
import os
import random
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, numbers, script

import common
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


# ------------------------------------------------------------------------------ killed, interrupted


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
    STUDIES[name].main(["--report-only", "--dataset", "glyphs",
                        "--out-dir", str(tmp_path / "parts")])
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
        patch.setattr(common.Parser, "parse_args",
                      lambda self, argv: kept.extend(self._actions))
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
        m.get("negative_elbo", m.get("fid", m.get("supervised_accuracy", 0.0)))]])
    assert metrics and np.isfinite(found).all()
    assert len(metrics) == (2 if extreme[-2:] == ["1", "1000"] else 1)
