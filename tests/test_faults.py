"""Faults: processes killed at random moments, shards at once, bad command lines, extremes.

    pytest tests/test_faults.py              # command lines, as in the suite
    pytest tests/test_faults.py -m faults    # all of it, ten minutes
"""

import random
import shutil
import subprocess
import sys
import time

import common

import numpy as np
import pytest
from conftest import ROOT, numbers, script

import gan_vs_vae
import imbalance_study
import latent_opt
import vae_mnist

SMALL = ["--dataset", "glyphs", "--train-size", "200", "--epochs", "2", "--device", "cpu"]
SMOKE = {
    vae_mnist: [*SMALL, "--hidden", "16", "--latent-dim", "2", "--likelihood-images", "4"],
    imbalance_study: [*SMALL, "--model", "ae", "--samples", "2000", "--sampler", "prior",
                      "--rare-ratio", "0.1"],
    latent_opt: [*SMALL, "--test-images", "20", "--codes", "50", "--latent-dim", "8"],
    gan_vs_vae: [*SMALL, "--model", "gan", "--loss", "hinge", "--z-dim", "4", "--samples", "300"]}
every_script = pytest.mark.parametrize("study", SMOKE, ids=lambda study: study.__name__)


def start(*argv: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "vae_mnist.py"), *argv], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def results(base) -> dict:
    """The metrics of every run below a folder, without time, host and command."""
    return {str(file.parent.relative_to(base)): numbers(file.parent)
            for file in base.rglob("final_metrics.json")}


# ------------------------------------------------------------------ one script for the class Run


@pytest.mark.faults
def test_kill_9_at_random_moments(tmp_path):
    argv, rng = SMOKE[vae_mnist], random.Random(0)
    began = time.perf_counter()
    whole = script("vae_mnist.py", *argv, "--out-dir", str(tmp_path / "whole"))
    seconds, wanted = time.perf_counter() - began, results(tmp_path / "whole")
    assert whole.returncode == 0 and wanted, whole.stderr
    for i in range(6):
        process = start(*argv, "--out-dir", str(tmp_path / "killed"))
        time.sleep(rng.uniform(0.4, 1) * seconds)
        process.kill()
        process.communicate()
        again = script("vae_mnist.py", *argv, "--out-dir", str(tmp_path / "killed"))
        assert again.returncode == 0 and results(tmp_path / "killed") == wanted, again.stderr
        if i % 2:  # else the next one finds a finished run
            shutil.rmtree(tmp_path / "killed")


@pytest.mark.faults
def test_shards_at_once_make_the_whole(tmp_path):
    argv = [*SMOKE[vae_mnist], "--seeds", "0", "1"]
    parts = [start(*argv, "--shard", f"{k}/2", "--out-dir", str(tmp_path / "parts"))
             for k in range(2)]
    for part in parts:
        _, errors = part.communicate(timeout=600)
        assert part.returncode == 0, errors
    vae_mnist.main([*argv, "--out-dir", str(tmp_path / "whole")])
    vae_mnist.main(["--report-only", "--dataset", "glyphs", "--out-dir", str(tmp_path / "parts")])
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


# ------------------------------------------------------------------------------------ command lines

ODD = ["nan", "inf", "-inf", "1e309", "-1", "0", "1", "2.5", "", " ", "ü", "a b", "9" * 40,
       "1e-400", "0x10", "1/2", "3/3", "-1/2", "None", "--", "\n", "💥"]


def actions(study) -> list:
    """The flags of a script."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Parser, "parse_args",
                      lambda self, argv: kept.extend(self._actions))
        study.parse_args([])
    return [action for action in kept if "--help" not in action.option_strings]


def command_line(flags: list, rng: random.Random) -> list[str]:
    argv = []
    for action in rng.sample(flags, rng.randint(1, 5)):
        argv.append(rng.choice(action.option_strings))
        if action.nargs != 0:
            values = [*ODD, *[str(c) for c in action.choices or []] * 3]
            argv += rng.choices(values, k=rng.choice([0, 1, 1, 1, 2, 3]))
    return argv


@every_script
def test_a_bad_command_line_is_one_line_and_status_2(study, capsys):
    rng, flags, outcomes = random.Random(study.__name__), actions(study), []
    for _ in range(250):
        argv = command_line(flags, rng)
        try:
            study.parse_args(argv)
            outcomes.append("parsed")
        except SystemExit as stop:
            errors = capsys.readouterr().err
            assert stop.code == 2 and errors.count("\n") == 1, (argv, errors)
            outcomes.append("refused")
    assert outcomes.count("refused") > 50 and outcomes.count("parsed") > 10
    for flag in [action.option_strings[0] for action in flags if action.type]:
        for value in ["nan", "1e309", "", "-1", "9" * 40, "ü"]:  # no number
            with pytest.raises(SystemExit):
                study.parse_args([flag, value])
            message = capsys.readouterr().err
            assert flag in message and message.count("\n") == 1, (flag, value)


@pytest.mark.faults
@every_script
def test_generated_command_lines_as_processes(tmp_path, study):
    rng, flags = random.Random(f"{study.__name__} processes"), actions(study)
    for i in range(3):
        folder = tmp_path / f"folder {i} ü"
        argv = [a for a in command_line(flags, rng) if a not in ("--compile", "--tensorboard")]
        argv += [*SMOKE[study], "--out-dir", str(folder)]
        result = script(f"{study.__name__}.py", *argv, cwd=tmp_path,
                        MNIST_DATA_DIR=str(tmp_path / "none"))
        assert result.returncode in (0, 2) and "Traceback" not in result.stderr, argv
        if result.returncode == 2:
            assert result.stderr.strip().count("\n") <= 1, (argv, result.stderr)
            assert not list(folder.rglob("*.pt")), argv


# ----------------------------------------------------------------------------------------- extremes

EXTREMES = {
    vae_mnist: ["--train-size 1", "--latent-dim 1", "--latent-dim 1000", "--seeds 3 3"],
    imbalance_study: ["--train-size 10", "--batch-size 5000", "--latent-dim 1"],
    latent_opt: ["--train-size 10", "--batch-size 5000", "--latent-dim 1"],
    gan_vs_vae: ["--train-size 1", "--batch-size 1", "--z-dim 1",
                 "--model vae-gan --latent-dim 1"]}


@pytest.mark.faults
@pytest.mark.parametrize(("study", "extreme"), [(s, e) for s in EXTREMES for e in EXTREMES[s]],
                         ids=lambda value: getattr(value, "__name__", value))
def test_extremes_run_or_are_refused(tmp_path, study, extreme):
    argv = [*SMOKE[study], *extreme.split(), "--epochs", "1", "--out-dir", str(tmp_path)]
    try:
        metrics = study.main(argv)
    except common.UserError as error:
        assert "--" in str(error), "the next step is named"
        return
    assert len(metrics) == 1 and np.isfinite(list(common.flat(metrics).values())).all()
