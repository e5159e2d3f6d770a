"""Ways for the decoder's metric G = J^T J to steer local codes, compared; run by hand, no test.

    python imbalance_study.py --model ga-ae --seeds 100
    python tests/steering.py results/imbalance_study/mnist/ga-ae_digit9_2pct/seed_100 > steering.md

Every way draws around the same training codes; only the noise differs, equal in its mean square,
and of the last the neighbours. `pullback`, the study's, takes its first order from the neighbours'
decoded images instead of the Jacobian. They are judged on training images that the run has not seen
(validation and left over), never on test images: a table, lift and FID as in the study.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common_v1 as common
import imbalance_study as study


def parts(z, around, g, at=None, k=10, share=0.5):
    """The centres (n, d) of local_codes, their noise (n, d), and its factor (n, d, k + 1), of the
    codes nearest in `at`.
    """
    at = z if at is None else at
    norm = at.square().sum(1)
    near = torch.cat([torch.addmm(norm, c, at.T, alpha=-2).topk(k + 1, largest=False).indices
                      for c in at[around].split(500)])
    mean = z[near].mean(1)
    factor = (z[near] - mean[:, None]).mT * np.sqrt((1 - share**2) / k)
    noise = (factor @ torch.randn(near.shape, generator=g)[..., None])[..., 0]
    return mean + share * (z[around] - mean), noise, factor


def in_chunks(f, *tensors):
    return torch.cat([f(*c) for c in zip(*[t.split(500) for t in tensors], strict=True)])


def ways(model, z, g, n, temperature):
    """{name: codes (n, d)}, all with noise of the same mean square as that of local codes."""
    around, state = study.evenly(n, len(z), g), g.get_state()
    centre, noise, factor = parts(z, around, g)
    g.set_state(state)
    assert (centre + noise).allclose(study.local_codes(z, around, g), atol=1e-4)
    one = lambda code: model.decode(code[None], temperature).flatten()

    def metric(c):  # (b, d, d)
        j = torch.func.vmap(torch.func.jacfwd(one))(c)
        return j.mT @ j

    G = torch.cat([metric(c) for c in centre.split(100)]).double()
    lam, v = torch.linalg.eigh(G)
    lam = lam.clamp(min=1e-3 * lam.mean())
    white = torch.randn(n, z.shape[1], generator=g)
    along = ((v * lam.rsqrt()[:, None]) @ white.double()[..., None])[..., 0].float()
    inner = factor.double().mT @ G @ factor.double()
    step = inner.diagonal(dim1=1, dim2=2).sum(1).sqrt()  # expected length in decoded pixels
    rank = min(factor.shape[2] - 1, factor.shape[1])
    volume = torch.linalg.eigvalsh(inner)[:, -rank:].clamp(min=1e-12).log().mean(1).div(2).exp()
    same_size = lambda u: u * (noise.square().sum(1).mean() / u.square().sum(1).mean()).sqrt()
    found = {"local": noise}
    for power in (0.5, 1):
        found[f"steps equal in decoded pixels, power {power:g}"] = (
            noise * step.pow(-power).float()[:, None])
        found[f"volumes equal in decoded pixels, power {power:g}"] = (
            noise * volume.pow(-power).float()[:, None])
    found["covariance G^-1"] = along
    found["covariance G^-1, each as long as the local one"] = along * (
        noise.norm(dim=1) / along.norm(dim=1))[:, None]
    codes = {name: centre + same_size(u) for name, u in found.items()}
    g.set_state(state)
    at = in_chunks(lambda c: model.decode(c, temperature).flatten(1), z)
    codes["pullback"] = study.local_codes(z, around, g, at)
    g.set_state(state)
    centre, noise, _ = parts(z, around, g, at)
    return codes | {"neighbours by decoded image": centre + noise}


@torch.no_grad()
def main(folder: Path, samples: int = 20_000) -> str:
    config, device = common.load_json(folder / "config.json"), torch.device("cpu")
    data = common.load_data(config["dataset"], study.parse_args([]).data_dir)
    part, classifier = study.split(data, config), common.load_classifier(data, device)
    unseen = torch.ones(len(data.y_train), dtype=torch.bool)
    unseen[part["train"]] = False
    judge = study.Judge(data._replace(x_test=data.x_train[unseen], y_test=data.y_train[unseen]),
                        part, config, classifier, samples)
    model = study.Autoencoder(config["latent_dim"], config["model"] == "vae").eval()
    common.restore(folder, config, {"model": model}, "best_model.pt")
    temperature = common.load_json(folder / "final_metrics.json")["temperature"]
    z, rows = study.encoded(model, judge.x, device), []
    for name, codes in ways(model, z, common.generator(config["seed"], "steering"),
                            samples, temperature).items():
        scores = judge.score(study.decoded(model, codes, device, temperature))[0]
        coverage = scores["rare"] and scores["rare"]["coverage"] / scores["rare_real"]["coverage"]
        rows.append([name, f"{scores['calibrated_lift']:.3f}", f"{scores['clear_lift']:.3f}",
                     f"{coverage or 0:.3f}", f"{scores['fid'] / judge.floor:.2f}",
                     f"{scores['copying']:.3f}"])
        print(rows[-1], file=sys.stderr)
    best = max((row for row in rows if float(row[4]) <= 3), key=lambda row: float(row[3]))[0]
    about = {**config, "percent": 100 * config["rare_ratio"], "n": samples, "best": best,
             "model": study.label(config)}
    return ("# Ways for the metric G = JᵀJ to steer local codes\n\n"
            "Of {model}, digit {rare_digit} at {percent:g} % of {dataset}, seed {seed}, by `python "
            "tests/steering.py`: {n:,} samples around the same codes, noise of the same mean "
            "square, against training images that the run has not seen. Lift is calibrated. Of "
            "those with FID at most 3 × its floor the highest coverage: {best}. One seed, so "
            "nothing is concluded from small differences.\n\n".format(**about)
            + common.table(["noise or neighbours", "lift", "clear lift", "coverage / real",
                            "FID / floor", "copying"], rows))


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
