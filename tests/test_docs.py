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
# of a line that starts many processes the command of one of them
one = lambda command: re.sub(r" :::.*|'$", "", re.sub(r"\$SLURM_ARRAY_TASK_ID|{}", "0", command))
COMMANDS = [(where, one(line.split("#")[0].strip().split("python ")[-1]))
            for where, text in TEXTS.items() for line in text.splitlines()
            if re.search(r"python \w+\.py", line)]


def imbalance_rows() -> tuple[dict, str]:
    """The published rows, and the name of the rare class on the report's page."""
    table = imbalance_study.rows(
        common.finished_runs(ROOT / "results/published/imbalance_study/mnist"))
    return table, imbalance_study.shown_class(table)


def imbalance_table() -> str:
    """The README's table: the models with codes from N(0, I) and with local codes."""
    table, rare = imbalance_rows()
    shown = {imbalance_study.REAL: table[imbalance_study.REAL]}
    for model, sampler in [("vae", "prior"), ("ae", "prior"), ("ga-ae", "prior"), ("vae", "local"),
                           ("ae", "local"), ("ga-ae λ=0", "local"), ("ga-ae", "local")]:
        shown[rare, model, sampler] = table[rare, model, sampler]
    return common.results_table(shown, imbalance_study.NAMES, imbalance_study.COLUMNS)


def vae_rows() -> dict:
    return vae_mnist.rows(common.finished_runs(ROOT / "results/published/vae_mnist/mnist"))


def vae_table() -> str:
    """The README's table: the report's, without optimisers and rates that were tried once."""
    shown = {}
    for name, seeds in vae_rows().items():
        if None in seeds or len(seeds) > 1 or name[0] == "conv":
            shown[name] = seeds
    return common.results_table(shown, vae_mnist.NAMES, vae_mnist.COLUMNS)


def gan_rows() -> dict:
    return gan_vs_vae.rows(gan_vs_vae.all_runs(ROOT / "results/published/gan_vs_vae"))


def best_gans() -> dict:
    """Of each kind and dataset the published row that is best on validation images."""
    table, best = gan_rows(), {}
    for data in ["MNIST bfloat16", "FashionMNIST bfloat16"]:
        for kind in ["GAN", "tuned GAN", "VAE", "VAE-GAN"]:
            name = gan_vs_vae.best_of(table, data, kind)
            best[name] = table[name]
    return best


def gan_table() -> str:
    return common.results_table(best_gans(), gan_vs_vae.NAMES, [
        ("FID", "fid", 2), ("floor", "floor", 3), *gan_vs_vae.MANIFOLD,
        ("copying", "copying", 2), ("−ELBO", "elbo.loss", 2)])


def gan_expect() -> str:
    name, seeds = next(iter(best_gans().items()))
    runs = [run for run in gan_vs_vae.all_runs(ROOT / "results/published/gan_vs_vae")
            if gan_vs_vae.row_name(run["config"]) == name]
    return expect(f"{', '.join(name)}: FID {common.cell(seeds, 'fid', 2)} (floor "
                  f"{common.cell(seeds, 'floor', 2)}), recall "
                  f"{common.cell(seeds, 'recall', 2)}", runs)


def latent_rows() -> dict:
    """The published rows by model and images."""
    table = latent_opt.rows(common.finished_runs(ROOT / "results/published/latent_opt/mnist"))
    return {name[1:]: seeds for name, seeds in table.items()}


def latent_table() -> str:
    return common.results_table(latent_rows(), latent_opt.NAMES[1:], latent_opt.COLUMNS)


def cite_table() -> str:
    """The numbers to cite, each with the command that makes it."""
    lines = [["what", "value", "floor", "n", "epochs", "weights", "command"]]

    def add(what: str, seeds: dict, key: str, digits: int, floor: str, run: dict, command: str):
        metrics = run["metrics"]
        weights = metrics.get("parameters", "–")
        if isinstance(weights, dict):  # of what draws samples
            weights = weights.get("G") or weights["decoder"] + weights["encoder"]
        lines.append([what, common.cell(seeds, key, digits), floor, str(len(seeds)),
                      str(run["config"]["epochs"]), str(weights), f"`{command} --seeds 0 1 2`"])

    vae_runs = common.finished_runs(ROOT / "results/published/vae_mnist/mnist")
    for name, flags in [
            (("mlp 500", "20-D", "binarised", "ELBO", "adam 0.001"), ""),
            (("mlp 200-200", "50-D", "binarised", "IWAE 5", "adam 0.001"),
             " --hidden 200 200 --latent-dim 50 --objective iwae"),
            (("conv", "50-D", "binarised", "ELBO", "adam 0.001"),
             " --arch conv --latent-dim 50 --likelihood-images 250")]:
        run = next(run for run in vae_runs if vae_mnist.row_name(run["config"]) == name)
        for title, key in [("NLL", "likelihood.nll"), ("−ELBO", "negative_elbo")]:
            if title == "NLL" or not flags:
                add(f"{title}, {name[0]}, {name[1]}, {name[3]}", vae_rows()[name], key, 2, "–",
                    run, f"vae_mnist.py{flags}")
    gan_runs = gan_vs_vae.all_runs(ROOT / "results/published/gan_vs_vae")
    for name, seeds in best_gans().items():
        if name[1] == "GAN tuned":
            run = next(run for run in gan_runs if gan_vs_vae.name_of(run) == name)
            dataset = run["config"]["dataset"]
            add(f"FID, tuned GAN, {common.DATASETS[dataset]}", seeds, "fid", 2,
                common.cell(seeds, "floor", 3), run,
                f"gan_vs_vae.py --model tuned-gan --dataset {dataset} --precision bfloat16")
    run = common.finished_runs(ROOT / "results/published/latent_opt/mnist")[0]
    for title, key in [("amortisation gap", "start_gap"),
                       ("approximation gap", "approximation_gap")]:
        add(title, latent_rows()["amortised VAE", "test"], key, 2, "0", run,
            "latent_opt.py --codes 5000")
    return common.markdown_table(lines, 1)


def expect(found: str, runs: list) -> str:
    """A docstring's line: what was found, on what, how long a run took."""
    minutes = np.mean([r["metrics"]["seconds_train"] for r in runs]) / 60
    e = runs[0]["metrics"]["environment"]
    measuring = [r["metrics"].get("seconds_evaluation", 0) / 60 for r in runs]
    more = f" and {np.mean(measuring):.0f} min to measure" if all(measuring) else ""
    return (f"Expect: {found} (n={len(runs)});\n{minutes:.0f} min to train{more} a run; "
            f"{e['device']}, torch {e['torch']}.")


def imbalance_expect() -> str:
    table, rare = imbalance_rows()
    seeds = table[rare, "ga-ae", "local"]
    runs = [run for run in common.finished_runs(
                ROOT / "results/published/imbalance_study/mnist")
            if imbalance_study.rare_class(run["config"]) == rare
            and imbalance_study.model_name(run["config"]) == "ga-ae"]
    return expect(f"ga-ae, {rare}, local codes: lift "
                  f"{common.cell(seeds, 'calibrated_lift', 2)}, FID / floor "
                  f"{common.cell(seeds, 'fid_ratio', 1)}", runs)


def vae_expect() -> str:
    name = ("mlp 500", "20-D", "binarised", "ELBO", "adam 0.001")
    runs = [run for run in common.finished_runs(ROOT / "results/published/vae_mnist/mnist")
            if vae_mnist.row_name(run["config"]) == name]
    seeds = vae_rows()[name]
    return expect("20-D, 500 units, binarised: −ELBO "
                  f"{common.cell(seeds, 'negative_elbo', 2)}, NLL "
                  f"{common.cell(seeds, 'likelihood.nll', 2)} nats", runs)


def latent_expect() -> str:
    vae = latent_rows()["amortised VAE", "test"]
    return expect(f"gaps of the encoder: amortisation {common.cell(vae, 'start_gap', 2)}, "
                  f"approximation {common.cell(vae, 'approximation_gap', 2)} nats",
                  common.finished_runs(ROOT / "results/published/latent_opt/mnist"))


def results_readme() -> str:
    """results/README.md: a row for every published variant."""
    parts = ["# Published results\n\nMade by `python tests/test_docs.py` from the JSON files. "
             "Every run is a folder with its configuration, its metrics and its curves, of seed 0 "
             "pictures too. Weights are not kept.",
             "`classifiers/` holds the weights of the metric classifiers, one for each dataset."]
    published = ROOT / "results/published"
    for root in sorted(file.parent for file in published.rglob("report.md")):
        where = root.relative_to(ROOT / "results").as_posix()
        folders = [root]
        if root.name == "gan_vs_vae":  # one report of two datasets
            folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
        parts += [f"## [{where}]({where}/report.md)", *map(variants, folders)]
    return "\n\n".join(parts) + "\n"


HEADLINES = [("NLL", "likelihood.nll", 2), ("−ELBO", "negative_elbo", 2),
             ("lift, local codes", "samplers.local.calibrated_lift", 2), ("FID", "fid", 2),
             ("log p(x), amortised", "models.vae.gaps.test.log_px.mean", 2)]


def variants(root) -> str:
    """Which command made which variant, and one number of it."""
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
        command = re.sub(r" --(seeds( \d+)+|fresh|out-dir \S+|shard \S+)| pullback", "",
                         runs[0]["metrics"]["environment"]["command"])
        if runs[0]["config"]["precision"] == "bfloat16" and "--precision" not in command:
            command += " --precision bfloat16"
        minutes = [run["metrics"]["seconds_train"] / 60 for run in runs]
        commits = sorted({run["metrics"]["environment"]["commit"] for run in runs})
        lines.append([name, str(len(runs)), f"{title} {common.cell(seeds, key, digits)}",
                      f"`{command} --seeds {' '.join(map(str, sorted(seeds)))}`",
                      ", ".join(commits), f"{np.mean(minutes):.0f}"])
    made = [run["metrics"]["environment"] for runs in groups.values() for run in runs]
    where = "; ".join(f"{key}: {', '.join(sorted({str(one[key]) for one in made}))}"
                      for key in ["device", "threads", "torch"])
    return f"{where}.\n\n{common.markdown_table(lines, 6)}"


TABLES = {"cite": cite_table, "imbalance": imbalance_table, "vae": vae_table,
          "latent": latent_table, "gan": gan_table}
EXPECT = {"imbalance_study.py": imbalance_expect, "vae_mnist.py": vae_expect,
          "latent_opt.py": latent_expect, "gan_vs_vae.py": gan_expect}


def current() -> dict[str, str]:
    """Every file that holds published numbers, as it should be."""
    readme = README
    for name, table in TABLES.items():
        new = table().replace("\\", r"\\")
        readme, found = re.subn(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)",
                                rf"\g<1>{new}\g<2>", readme, flags=re.S)
        assert found == 1, f"README has no place for {name}"
    files = {"README.md": readme, "results/README.md": results_readme()}
    for name, line in EXPECT.items():
        files[name], found = re.subn(
            r"^Expect: .*?\n\n", line() + "\n\n", (ROOT / name).read_text(encoding="utf-8"),
            flags=re.M | re.S)
        assert found == 1, f"{name} has no Expect: line"
    return files


@pytest.mark.parametrize("name", ["README.md", "results/README.md", *EXPECT])
def test_published_numbers_are_those_of_the_json(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == current()[name], "python tests/test_docs.py writes them anew"


@pytest.mark.parametrize("script", [imbalance_study, vae_mnist, latent_opt,
                                    gan_vs_vae])
def test_the_published_report_is_rebuilt_byte_for_byte(tmp_path, script, monkeypatch):
    monkeypatch.setattr(common, "HERE", tmp_path)  # reports link to the README there
    copy = tmp_path / "results/published" / script.__name__
    shutil.copytree(ROOT / "results/published" / script.__name__, copy)
    reports = {file: file.read_bytes() for pattern in ["report.md", "results.csv"]
               for file in copy.rglob(pattern)}
    assert reports
    for file in reports:
        file.unlink()
    datasets = {file.parent.name for file in reports} & {"mnist", "fashion-mnist"}
    for dataset in [None] if script == gan_vs_vae else datasets:
        more = ["--dataset", dataset] if dataset else []
        script.main(["--report-only", "--out-dir", str(copy.parent), *more])
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
