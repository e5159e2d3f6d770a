"""README and docstrings: commands parse, files exist, numbers are those of the published JSON.

    pytest tests/test_docs.py
    python tests/test_docs.py        # write the numbers anew, after new published runs
"""

import functools
import re
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python tests/test_docs.py
import common

import numpy as np
import pytest
from conftest import ROOT

import gan_vs_vae
import imbalance_study
import latent_opt
import vae_mnist

SCRIPTS = {script.__name__: script
           for script in [imbalance_study, vae_mnist, gan_vs_vae, latent_opt]}
PUBLISHED = ROOT / "results/published"
README = (ROOT / "README.md").read_text(encoding="utf-8")
VAE = ("mlp 500", "20-D", "binarised", "ELBO", "adam 0.001")
IWAE = ("mlp 200-200", "50-D", "binarised", "IWAE 5", "adam 0.001")
CONV = ("conv", "50-D", "binarised", "ELBO", "adam 0.001")


@functools.cache
def published_runs(script) -> list[dict]:
    """The published runs on MNIST; of gan_vs_vae on both datasets."""
    if script == gan_vs_vae:
        return gan_vs_vae.all_runs(PUBLISHED / "gan_vs_vae")
    return common.finished_runs(PUBLISHED / script.__name__ / "mnist")


@functools.cache
def published_rows(script) -> dict:
    return script.rows(published_runs(script))


# ------------------------------------------------------------------------------ README's tables


def best_gans() -> list[tuple]:
    """Of each kind and dataset the row that is best on validation images."""
    rows = published_rows(gan_vs_vae)
    return [gan_vs_vae.best_of(rows, data, kind)
            for data in ["MNIST bfloat16", "FashionMNIST bfloat16"]
            for kind in ["GAN", "GAN tuned", "VAE", "VAE-GAN"]]


ENCODER = ("d200_sigma0.4", "amortised VAE", "test")
LATENT = ("d200_sigma0.4", "latent optimisation", "test")
TABLES = {  # heading: script, rows, titles of the parts of their names, columns that are left out
    "The imbalance study": (
        imbalance_study, [("9 at 2 %", model, sampler) for model, sampler in [
            ("vae", "prior"), ("ae", "prior"), ("ga-ae", "prior"), ("vae", "local"),
            ("ae", "local"), ("ga-ae λ=0", "local"), ("ga-ae", "local")]],
        ["", "model", "sampler"], []),
    "The variational autoencoder": (
        vae_mnist, [("mlp 500", "1-D", "grey", *VAE[3:]), ("mlp 500", "2-D", "grey", *VAE[3:]),
                    ("mlp 500", "64-D", "grey", *VAE[3:]), VAE, ("mlp 500-500", *VAE[1:]),
                    (*IWAE[:3], *VAE[3:]), IWAE, CONV],
        ["net", "latent", "pixels", "bound", ""], ["validation", "estimate − exact",
                                                   "active units"]),
    "GAN against VAE": (
        gan_vs_vae, best_gans(), gan_vs_vae.NAMES, ["copying", "classes", "reconstruction"]),
    "Amortised inference against latent optimisation": (
        latent_opt, [ENCODER, LATENT], ["", "model", ""], ["median ESS", "seconds per epoch"])}


def readme_table(script, names: list[tuple], titles: list[str], left_out: list[str]) -> str:
    """A results table of some rows, by the parts of their names that have a title."""
    rows, shown = published_rows(script), {}
    if script == gan_vs_vae:
        columns = [gan_vs_vae.FID, *gan_vs_vae.VAE_COLUMNS]
    else:
        columns = script.COLUMNS
    for name in names:
        parts = [part for part, title in zip(name, titles, strict=True) if title]
        shown[tuple(parts)] = rows[name]
    return common.results_table(shown, [title for title in titles if title],
                                [column for column in columns if column[0] not in left_out])


def cite_table() -> str:
    """The numbers to cite, each with the command that makes it."""
    vae, gan, latent = map(published_rows, [vae_mnist, gan_vs_vae, latent_opt])
    mnist, fashion = [gan[name] for name in best_gans() if name[1] == "GAN tuned"]
    gans = "gan_vs_vae.py --model tuned-gan --precision bfloat16 --dataset"
    lines = [["what", "command", "value", "floor", "n", "epochs", "weights"]]
    for what, seeds, key, epochs, weights, command in [
            ("NLL, mlp 500, 20-D", vae[VAE], "likelihood.nll", 100, "816 k", "vae_mnist.py"),
            ("−ELBO, mlp 500, 20-D", vae[VAE], "negative_elbo", 100, "816 k", "vae_mnist.py"),
            ("NLL, mlp 200-200, IWAE 5", vae[IWAE], "likelihood.nll", 100, "425 k",
             "vae_mnist.py --hidden 200 200 --latent-dim 50 --objective iwae"),
            ("NLL, conv, 50-D", vae[CONV], "likelihood.nll", 100, "1,364 k",
             "vae_mnist.py --arch conv --latent-dim 50 --likelihood-images 250"),
            ("FID, tuned GAN, MNIST", mnist, "fid", 30, "347 k", f"{gans} mnist"),
            ("FID, tuned GAN, FashionMNIST", fashion, "fid", 30, "347 k", f"{gans} fashion-mnist"),
            ("amortisation gap", latent[ENCODER], "start_gap", 30, "976 k",
             "latent_opt.py --codes 5000")]:
        floor = common.cell(seeds, "floor", 3) if key == "fid" else "–"
        lines.append([what, f"`{command} --seeds 0 1 2`", common.cell(seeds, key, 2), floor,
                      str(len(seeds)), str(epochs), weights])
    return common.markdown_table(lines, 2)


# -------------------------------------------------------- docstrings and the list of published runs


EXPECT = {  # of a docstring: the row, and what is said of its numbers
    imbalance_study: (
        ("9 at 2 %", "ga-ae", "local"), "ga-ae, 9 at 2 %, local codes: lift {}, FID / floor {}",
        [("calibrated_lift", 2), ("fid_ratio", 1)]),
    vae_mnist: (
        VAE, "20-D, 500 units, binarised: −ELBO {}, NLL {} nats",
        [("negative_elbo", 2), ("likelihood.nll", 2)]),
    gan_vs_vae: (
        best_gans()[0], f"{', '.join(best_gans()[0])}: FID {{}} (floor {{}}), recall {{}}",
        [("fid", 2), ("floor", 2), ("recall", 2)]),
    latent_opt: (
        ENCODER, "gaps of the encoder: amortisation {}, approximation {} nats",
        [("start_gap", 2), ("approximation_gap", 2)])}


def expect_line(script) -> str:
    """A docstring's line: what was found, on what, how long a run took."""
    name, text, columns = EXPECT[script]
    row = published_rows(script)[name]
    text = text.format(*[common.cell(row, key, digits) for key, digits in columns])
    runs = [run for run in published_runs(script) if name in script.rows([run])]
    minutes = np.mean([run["metrics"]["seconds_train"] for run in runs]) / 60
    made = runs[0]["metrics"]["environment"]
    more = ""
    if script == latent_opt:
        seconds = [run["metrics"]["seconds_evaluation"] for run in runs]
        more = f" and {np.mean(seconds) / 60:.0f} min to measure"
    return (f"Expect: {text} (n={len(runs)});\n{minutes:.0f} min to train{more} a run; "
            f"{made['device']}, torch {made['torch']}.")


HEADLINES = [("NLL", "likelihood.nll", 2), ("−ELBO", "negative_elbo", 2),
             ("lift, local codes", "samplers.local.calibrated_lift", 2), ("FID", "fid", 2),
             ("log p(x), amortised", "models.vae.gaps.test.log_px.mean", 2)]


def variants(root) -> str:
    """A row for every published variant below a folder: its command and one number of it."""
    groups = {}
    for run in common.finished_runs(root):
        groups.setdefault(run["folder"].parent.name, []).append(run)
    lines = [["variant", "n", "headline", "command", "commits", "minutes a run"]]
    for name, runs in groups.items():
        seeds = {run["config"]["seed"]: common.flat(run["metrics"]) for run in runs}
        grey = runs[0]["config"].get("binarize") == "none"  # whose log p(x) is no likelihood
        title, key, digits = next(
            (title, key, digits) for title, key, digits in HEADLINES
            if key in seeds[min(seeds)] and not (grey and title == "NLL"))
        command = common.command_of(runs[0])
        commits = {run["metrics"]["environment"]["commit"] for run in runs}
        minutes = [run["metrics"]["seconds_train"] / 60 for run in runs]
        lines.append([name, str(len(runs)), f"{title} {common.cell(seeds, key, digits)}",
                      f"`{command} --seeds {' '.join(map(str, sorted(seeds)))}`",
                      ", ".join(sorted(commits)), f"{np.mean(minutes):.0f}"])
    made = [run["metrics"]["environment"] for runs in groups.values() for run in runs]
    where = "; ".join(f"{key}: {', '.join(sorted({str(one[key]) for one in made}))}"
                      for key in ["device", "threads", "torch"])
    return f"{where}.\n\n{common.markdown_table(lines, 6)}"


def results_readme() -> str:
    """results/README.md: a row for every published variant."""
    parts = ["# Published results\n\nMade by `python tests/test_docs.py` from the JSON files. "
             "Every run is a folder with its configuration, its metrics and its curves, of seed 0 "
             "pictures too. Weights are not kept.",
             "`classifiers/` holds the weights of the metric classifiers, one for each dataset."]
    for root in sorted(file.parent for file in PUBLISHED.rglob("report.md")):
        where = root.relative_to(ROOT / "results").as_posix()
        folders = [root]
        if root.name == "gan_vs_vae":  # one report of two datasets
            folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
        parts += [f"## [{where}]({where}/report.md)", *map(variants, folders)]
    return "\n\n".join(parts) + "\n"


@functools.cache
def current() -> dict[str, str]:
    """Every file that holds published numbers, as it should be."""
    readme = README
    tables = {heading: readme_table(*parts) for heading, parts in TABLES.items()}
    for heading, table in {**tables, "Numbers to cite": cite_table()}.items():
        before, rest = readme.split(f"\n## {heading}\n")
        old = re.search(r"(\|[^\n]*\n)+", rest).group()  # the first table below its heading
        readme = f"{before}\n## {heading}\n{rest.replace(old, table + chr(10), 1)}"
    files = {"README.md": readme, "results/README.md": results_readme()}
    for name, script in SCRIPTS.items():
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        files[f"{name}.py"], found = re.subn(r"^Expect: .*?\n\n", expect_line(script) + "\n\n",
                                             text, flags=re.M | re.S)
        assert found == 1, f"{name} has no Expect: line"
    return files


@pytest.mark.parametrize("name", ["README.md", "results/README.md", *[f"{s}.py" for s in SCRIPTS]])
def test_published_numbers_are_those_of_the_json(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == current()[name], "python tests/test_docs.py writes them anew"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_published_report_is_rebuilt_byte_for_byte(tmp_path, name, monkeypatch):
    monkeypatch.setattr(common, "HERE", tmp_path)  # reports link to the README there
    copy = tmp_path / "results/published" / name
    shutil.copytree(PUBLISHED / name, copy)
    reports = {file: file.read_bytes() for pattern in ["report.md", "results.csv"]
               for file in copy.rglob(pattern)}
    for file in reports:
        file.unlink()
    for dataset in {file.parent.name for file in reports}:
        more = [] if dataset == name else ["--dataset", dataset]
        SCRIPTS[name].main(["--report-only", "--out-dir", str(copy.parent), *more])
    assert reports == {file: file.read_bytes() for file in reports} != {}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_published_folders_are_named_by_their_settings(script):
    for run in published_runs(script):
        assert run["folder"].parent.as_posix().endswith(f"/{script.variant(run['config'])}")


# ------------------------------------------------------------------------------ commands and files

TEXTS = {"README.md": README, **{name: script.__doc__ for name, script in SCRIPTS.items()}}
COMMANDS = [line.split("python ")[-1].split("#")[0].split(" :::")[0].rstrip("' ")
            for text in TEXTS.values() for line in text.splitlines()
            if re.search(r"python \w+\.py", line)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    # of a line that starts many processes the command of one of them
    name, *argv = shlex.split(command.replace("$SLURM_ARRAY_TASK_ID", "0").replace("{}", "0"))
    SCRIPTS[name.removesuffix(".py")].parse_args(argv)


def test_there_are_commands_and_the_files_named_exist():
    assert len(COMMANDS) >= 6
    for name in re.findall(r"`([\w./-]+\.(?:py|txt|md))`|\]\((?!http)([^)#]+)\)", README):
        file = "".join(name)
        assert file == "report.md" or (ROOT / file).exists(), file


if __name__ == "__main__":
    for name, text in current().items():
        (ROOT / name).write_text(text, encoding="utf-8")
