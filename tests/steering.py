"""Ways for the decoder's metric G = J^T J to steer local codes, compared; run by hand, no test.

    python imbalance_study.py --model ga-ae --seeds 100
    python tests/steering.py results/imbalance_study/mnist/ga-ae_digit9_2pct/seed_100

Every way draws around the same training codes with the same random numbers; only the noise differs,
and of `pullback` the neighbours. They are judged on training images that the run has not seen
(validation and left over), never on test images: a table, lift and FID as in the study.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import imbalance_study as study


def parts(z, around, g, at=None, k=10, share=0.5):
    """The centres (n, d) of local_codes, their noise (n, d), and its factor (n, d, k + 1)."""
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


def ways(model, z, g, n):
    """{name: codes (n, d)}"""
    around, state = study.evenly(n, len(z), g), g.get_state()
    centre, noise, factor = parts(z, around, g)
    decode = lambda c: model.decode(c).flatten(1)
    stretch = in_chunks(lambda c, v: torch.func.jvp(decode, (c,), (v,))[1].norm(dim=1), centre,
                        noise)  # length of the step in decoded pixels
    one = lambda code: model.decode(code[None]).flatten()

    def metric(c):
        j = torch.func.vmap(torch.func.jacfwd(one))(c)
        return j.mT @ j

    metrics = torch.cat([metric(c) for c in centre.split(100)]).double()
    lam, v = torch.linalg.eigh(metrics)
    lam = lam.clamp(min=1e-3 * lam.mean())
    white = torch.randn(len(z[around]), z.shape[1], generator=g)
    along = ((v * lam.rsqrt()[:, None]) @ white.double()[..., None])[..., 0].float()
    same_size = lambda u: u * (noise.square().sum(1).mean() / u.square().sum(1).mean()).sqrt()
    # volume that the noise covers in decoded pixels, over the dimensions that it has
    inner = factor.double().mT @ metrics @ factor.double()
    volume = torch.linalg.eigvalsh(inner)[:, 1:].clamp(min=1e-12).log().mean(1) / 2
    found = {"local": centre + noise}
    g.set_state(state)
    by_image, its_noise, _ = parts(z, around, g, torch.cat([decode(c) for c in z.split(1000)]))
    found["neighbours by decoded image (pullback)"] = by_image + its_noise
    for power in (0.5, 1):
        found[f"steps equal in pixels, power {power:g}"] = centre + noise * (
            stretch.median() / stretch)[:, None]**power
        found[f"equal decoded volume, power {power:g}"] = centre + noise * (
            power * (volume.median() - volume)).exp().float()[:, None]
    found["noise of covariance G^-1, the same size"] = centre + same_size(along)
    own = along * (noise.norm(dim=1) / along.norm(dim=1))[:, None]
    found["noise of covariance G^-1, each as long as the local one"] = centre + own
    return found


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
                            samples).items():
        scores = judge.score(study.decoded(model, codes, device, temperature))[0]
        coverage = scores["rare"] and scores["rare"]["coverage"] / scores["rare_real"]["coverage"]
        rows.append([name, f"{scores['calibrated_lift']:.3f}", f"{scores['clear_lift']:.3f}",
                     f"{coverage or 0:.3f}", f"{scores['fid'] / judge.floor:.2f}",
                     f"{scores['copying']:.3f}"])
        print(rows[-1], file=sys.stderr)
    return common.table(["noise or neighbours", *study.CRITERIA], rows)


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
