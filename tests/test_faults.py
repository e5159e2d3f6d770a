"""Faults: processes killed at random moments, shards at once, bad command lines, extremes.

    pytest tests/test_faults.py              # command lines, as in the suite
    pytest tests/test_faults.py -m faults    # all of it, ten minutes
"""

import random
import shutil
import time

import common

import numpy as np
import pytest
from conftest import SMOKES, start, timeless

import gan_vs_vae
import imbalance_study
import latent_opt
import vae_mnist

every_script = pytest.mark.parametrize(
    "study", [vae_mnist, imbalance_study, latent_opt, gan_vs_vae], ids=lambda study: study.__name__)


def begin(folder, *argv: str):
    more = ["--latent-dim", "1", "--epochs", "2", "--out-dir", str(folder), *argv]
    return start("vae_mnist.py", *SMOKES["vae_mnist"], *more)


def results(*processes, folder) -> dict:
    """The metrics of every run below a folder once the processes have ended."""
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    return {str(file.parent.relative_to(folder)): timeless(common.load_json(file))
            for file in folder.rglob("final_metrics.json")}


@pytest.mark.faults
def test_kill_9_at_random_moments(tmp_path):
    rng, began = random.Random(0), time.perf_counter()
    wanted = results(begin(tmp_path / "whole"), folder=tmp_path / "whole")
    seconds = time.perf_counter() - began
    for i in range(6):
        process = begin(tmp_path / "killed")
        time.sleep(rng.uniform(0.4, 1) * seconds)
        process.kill()
        process.communicate()
        assert results(begin(tmp_path / "killed"), folder=tmp_path / "killed") == wanted != {}
        if i % 2:  # else the next one finds a finished run
            shutil.rmtree(tmp_path / "killed")


@pytest.mark.faults
def test_shards_at_once_make_the_whole(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = results(begin(whole, "--seeds", "0", "1"), folder=whole)
    shards = [begin(parts, "--seeds", "0", "1", "--shard", f"{k}/2") for k in range(2)]
    assert results(*shards, folder=parts) == wanted and len(wanted) == 2


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


EXTREMES = ["--train-size 1", "--train-size 10 --batch-size 5000", "--train-size 20 --batch-size 1",
            "--latent-dim 1 --seeds 3 3"]


@pytest.mark.faults
@every_script
def test_extremes_and_generated_command_lines_run_or_are_refused(tmp_path, study):
    rng = random.Random(f"{study.__name__} runs")
    flags = [action for action in actions(study) if action.dest not in ("compile", "tensorboard")]
    smoke = SMOKES[study.__name__]
    lines = [[*smoke, *extreme.split()] for extreme in EXTREMES]
    lines += [[*command_line(flags, rng), *smoke] for _ in range(2)]
    for i, line in enumerate(lines):
        try:
            metrics = study.main([*line, "--out-dir", str(tmp_path / f"{i} ü")])
        except common.UserError as error:
            assert "--" in str(error), "the next step is named"
        except SystemExit as stop:
            assert stop.code == 2, line
        else:
            assert np.isfinite(list(common.flat(metrics).values())).all(), line
