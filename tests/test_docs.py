"""README: its commands parse, the files and flags it names exist.

    pytest tests/test_docs.py
"""

import re
import shlex

import pytest
from conftest import ROOT

import imbalance_study

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"imbalance_study.py": imbalance_study}
TEXTS = {"README.md": README, **{name: script.__doc__ for name, script in SCRIPTS.items()}}
COMMANDS = [(where, line.split("#")[0].strip().split("python ")[-1])
            for where, text in TEXTS.items() for line in text.splitlines()
            if re.search(r"python \w+\.py", line)]


@pytest.mark.parametrize(("where", "command"), COMMANDS)
def test_every_command_parses(where, command):
    name, *argv = shlex.split(command)
    SCRIPTS[name].parse_args(argv)


def test_there_are_commands_and_the_files_named_exist():
    assert len(COMMANDS) >= 6
    for name in re.findall(r"`([\w./-]+\.(?:py|txt|md))`", README):
        assert name == "report.md" or (ROOT / name).exists(), name


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if line.endswith("-m pytest"))
    assert command.startswith("python3 -m venv ")
    assert "-m pytest$' README.md" in (ROOT / ".ci/run").read_text(encoding="utf-8")
