"""README and docstrings: commands parse, files exist, numbers are those of the published JSON.

    pytest tests/test_docs.py
    python tests/test_docs.py        # write the numbers anew, after new published runs
"""

import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT

import common
import gan_vs_vae
import imbalance_study
import latent_opt
import vae_mnist

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"imbalance_study.py": imbalance_study, "latent_opt.py": latent_opt,
           "gan_vs_vae.py": gan_vs_vae, "vae_mnist.py": vae_mnist}
TEXTS = {"README.md": README, **{name: script.__doc__ for name, script in SCRIPTS.items()}}
COMMANDS = [(where, line.split("#")[0].strip().split("python ")[-1])
            for where, text in TEXTS.items() for line in text.splitlines()
            if re.search(r"python \w+\.py", line)]


def imbalance_runs() -> dict[str, list]:
    runs = common.finished_runs(ROOT / "results/published/imbalance_study/mnist")
    return {m: [r for r in runs if imbalance_study.label(r["config"]) == m]
            for m in ["vae", "ae", "ga-ae λ=0", "ga-ae"]}


def imbalance_table() -> str:
    """The README's table: each model with its own sampler and, for fairness, with `local`."""
    rows, models = [], imbalance_runs()
    for sampler, m in [("prior", "vae"), ("prior", "ae"), ("local", "vae"), ("local", "ae"),
                       ("local", "ga-ae λ=0"), ("local", "ga-ae")]:
        scores = [r["metrics"]["samplers"][sampler] for r in models[m]]
        source = imbalance_study.SOURCE_LIFT.get(m, "–")
        own = imbalance_study.HEADLINE.get(m) == sampler
        show = lambda key, of=scores: common.mean_std([s[key] for s in of])
        rows.append([f"{m}, {sampler}", len(scores), show("calibrated_lift"),
                     source if own else "–", show("clear_lift"),
                     common.mean_std([s["rare"]["coverage"] / s["rare_real"]["coverage"]
                                      for s in scores if s["rare"]]),
                     show("fid"), show("copying")])
    floor = common.mean_std([r["metrics"]["fid_floor"] for rs in models.values() for r in rs])
    return common.table(["model, sampler", "n", "calibrated lift", "source expected", "clear lift",
                         "rare coverage / real", f"FID (floor {floor})", "copying"], rows)


def imbalance_expect() -> str:
    runs = imbalance_runs()["ga-ae"]
    show = lambda key: common.mean_std([r["metrics"]["samplers"]["local"][key] for r in runs])
    minutes = np.mean([r["metrics"]["seconds_train"] for r in runs]) / 60
    e = runs[0]["metrics"]["environment"]
    return (f"Expect: ga-ae calibrated lift {show('calibrated_lift')}, FID {show('fid')} "
            f"(n={len(runs)});\n{minutes:.0f} min to train a run; {e['device']}, "
            f"torch {e['torch']}.")


def regenerated(text: str, name: str, new: str) -> str:
    """The text with what stands between a name's two markers replaced."""
    return re.sub(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)",
                  lambda m: m[1] + new + m[2], text, flags=re.S)


def current() -> dict[str, str]:
    """Every file that holds published numbers, as it should be."""
    study = (ROOT / "imbalance_study.py").read_text(encoding="utf-8")
    return {"README.md": regenerated(README, "imbalance", imbalance_table()),
            "imbalance_study.py": re.sub(
                r"^Expect: .*?\n\n", imbalance_expect() + "\n\n", study, flags=re.M | re.S)}


@pytest.mark.parametrize("name", ["README.md", "imbalance_study.py"])
def test_published_numbers_are_those_of_the_json(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "Expect: " in text or "<!-- /imbalance -->" in text
    assert text == current()[name], "python tests/test_docs.py writes them anew"


@pytest.mark.parametrize("script", [imbalance_study, vae_mnist])
def test_the_published_report_is_rebuilt_byte_for_byte(tmp_path, script):
    copy = tmp_path / script.__name__
    shutil.copytree(ROOT / "results/published" / script.__name__, copy)
    reports = {file: file.read_bytes() for file in copy.rglob("report.md")}
    assert reports
    for file in reports:
        file.unlink()
    script.main(["--report-only", "--out-dir", str(tmp_path)])
    assert reports == {file: file.read_bytes() for file in reports}


@pytest.mark.parametrize(("where", "command"), COMMANDS)
def test_every_command_parses(where, command):
    name, *argv = shlex.split(command)
    SCRIPTS[name].parse_args(argv)


def test_there_are_commands_and_the_files_named_exist():
    assert len(COMMANDS) >= 6
    for name in re.findall(r"`([\w./-]+\.(?:py|txt|md))`", README):
        assert name == "report.md" or (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if line.endswith("-m pytest"))
    assert command.startswith("python3 -m venv ")
    assert "-m pytest$' README.md" in (ROOT / ".ci/run").read_text(encoding="utf-8")


if __name__ == "__main__":
    for name, text in current().items():
        (ROOT / name).write_text(text, encoding="utf-8")
