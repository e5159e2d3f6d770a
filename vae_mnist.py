"""How good is the variational autoencoder of Kingma and Welling, measured by the right likelihood?

A VAE maximises a lower bound of log p(x): an encoder proposes codes z, a decoder gives a Bernoulli
probability for every pixel. Here with any number of latent dimensions, hidden layers or a
convolutional net, with the ELBO or the tighter IWAE bound, with Adam or Adagrad. What the bound
hides is measured: log p(x) by importance sampling with 5,000 codes, and for one and two dimensions
by quadrature.

    python vae_mnist.py                                        # the 20-D, 500-unit Bernoulli VAE
    python vae_mnist.py --latent-dim 1 2 64 --binarize none    # the latent-dimension study
    python vae_mnist.py --optimizer adagrad --lr 0.01 0.02 0.1 --seeds 0 1 2
    python vae_mnist.py --dataset glyphs --train-size 1000 --epochs 1 --likelihood-images 9  # smoke

Writes results/vae_mnist/<dataset>/<variant>/seed_<s>/ (weights, metrics, pictures) and, from every
finished run, results/vae_mnist/<dataset>/report.md.

Expect: 20-D, 500 units, binarised: −ELBO 95.90 ± 0.08, NLL 90.82 ± 0.06 nats (n=3);
9 min to train a run; cpu: AMD EPYC, torch 2.15.0+cu132.

Differences from the papers and the two source projects:
 1. Fixed number of epochs, a rate that decays to 0 by a cosine, the epoch with the lowest
    validation loss; Kingma and Welling and Burda et al. train far longer.
 2. No weight decay, torch's initialisation (Kingma and Welling: N(0, 0.01), a prior on weights).
 3. Every number says whether the pixels were binarised. The sources do not say.
 4. 5,000 of the 60,000 training images are for validation, and test images are scored once.
 5. Training passes are in bfloat16 on CPUs with instructions for it; those above in float32.

References: Kingma and Welling 2014, arXiv:1312.6114; Burda et al. 2016, arXiv:1509.00519 (IWAE,
active units, the 2 x 200 net); Khan et al. 2018, arXiv:1806.04854 (the curvature of the proposal);
He et al. 2016, arXiv:1603.05027 (residual blocks); White 2016, arXiv:1609.04468 (spherical
interpolation); Duchi et al. 2011 (Adagrad).
"""

import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import common_v1 as common
from common_v1 import get, show

IMPORTANCE_SAMPLES = 5000
PAIRS = 1000  # of test images to interpolate between
STEPS = torch.linspace(0, 1, 11)  # of an interpolation: both ends and nine images between them

# ------------------------------------------------------------------------------------------- Config


def parse_args(argv=None):
    p = common.Parser(__doc__, epochs=100, batch_size=100, lr=[1e-3])
    flag, number = p.add_argument, common.number
    flag("--arch", choices=["mlp", "conv"], default="mlp", help="conv is a small residual net")
    flag("--hidden", type=number(int, 1), nargs="+", default=[500],
         help="mlp: units of each hidden layer")
    flag("--latent-dim", type=number(int, 1), nargs="+", default=[20], help="dimensions of z")
    flag("--binarize", choices=["none", "dynamic"], default="dynamic",
         help="dynamic: pixels drawn anew for every batch; test images once")
    flag("--objective", choices=["elbo", "iwae"], default="elbo", help="the bound to maximise")
    flag("--k", type=number(int, 2), default=5, help="iwae: codes per image")
    flag("--optimizer", choices=["adam", "adagrad"], nargs="+", default=["adam"])
    flag("--likelihood-images", type=number(int, 2, 10_000), default=1000,
         help="test images whose log p(x) is estimated (5,000 codes each)")
    return p.parse_args(argv)


def grid(args, dataset: str) -> list[dict]:
    """The configuration of every run asked for."""
    lists = args.latent_dim, args.optimizer, args.lr, args.seeds
    return [{"dataset": dataset, "arch": args.arch,
             "hidden": args.hidden if args.arch == "mlp" else [], "latent_dim": d,
             "binarize": args.binarize, "objective": args.objective,
             "k": args.k if args.objective == "iwae" else 1, "optimizer": optimizer, "lr": lr,
             "batch_size": args.batch_size, "epochs": args.epochs,
             "train_size": args.train_size or 55_000, "seed": seed}
            for d, optimizer, lr, seed in itertools.product(*map(dict.fromkeys, lists))]


def network(config: dict) -> str:
    """'mlp500', 'mlp200-200' or 'conv'."""
    return config["arch"] + "-".join(map(str, config["hidden"]))


def variant(config: dict) -> str:
    """A run's folder, such as 'mlp200-200_z50_dynamic_iwae5_adam_0.001'."""
    pixels = "grey" if config["binarize"] == "none" else "dynamic"
    bound = [f"iwae{config['k']}"] if config["objective"] == "iwae" else []
    return "_".join([network(config), f"z{config['latent_dim']}", pixels, *bound,
                     config["optimizer"], f"{config['lr']:g}"])


# -------------------------------------------------------------------------------------------- Model


class Residual(nn.Module):
    """x + f(x) with two 3 x 3 convolutions, each after its nonlinearity; (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        conv = lambda: nn.Conv2d(channels, channels, 3, padding=1)
        self.body = nn.Sequential(nn.SiLU(), conv(), nn.SiLU(), conv())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def mlp(latent_dim: int, hidden: list[int]) -> tuple[nn.Module, nn.Module]:
    """tanh layers; the decoder mirrors the encoder. 784 -> hidden -> 2 d and d -> hidden -> 784."""
    def layers(*sizes: int) -> list[nn.Module]:
        return [m for a, b in itertools.pairwise(sizes)
                for m in (nn.Linear(a, b), nn.Tanh())]

    encoder = nn.Sequential(nn.Flatten(), *layers(784, *hidden),
                            nn.Linear(hidden[-1], 2 * latent_dim))
    decoder = nn.Sequential(*layers(latent_dim, *hidden[::-1]), nn.Linear(hidden[0], 784))
    return encoder, decoder


def conv(latent_dim: int) -> tuple[nn.Module, nn.Module]:
    """Strided convolutions, a residual block at 7 x 7 (twice as wide in the decoder), no norms."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.SiLU(),  # (B, 16, 14, 14)
        nn.Conv2d(16, 32, 4, stride=2, padding=1), Residual(32), nn.SiLU(),  # (B, 32, 7, 7)
        nn.Flatten(), nn.Linear(1568, 256), nn.SiLU(), nn.Linear(256, 2 * latent_dim))
    decoder = nn.Sequential(
        nn.Linear(latent_dim, 256), nn.SiLU(), nn.Linear(256, 3136),
        nn.Unflatten(1, (64, 7, 7)), Residual(64), nn.SiLU(),
        nn.ConvTranspose2d(64, 16, 4, stride=2, padding=1), nn.SiLU(),  # (B, 16, 14, 14)
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Flatten())  # logits (B, 784)
    return encoder, decoder


class VAE(nn.Module):
    """q(z | x) = N(mu, diag e^logvar), p(z) = N(0, I), p(x | z) a Bernoulli for every pixel."""

    def __init__(self, config: dict):
        super().__init__()
        d = config["latent_dim"]
        self.encoder, self.decoder = (
            conv(d) if config["arch"] == "conv" else mlp(d, config["hidden"]))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), (B, d) each."""
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Pixel means (B, 1, 28, 28) in (0, 1)."""
        return self.decoder(z).sigmoid().view(-1, 1, 28, 28)


# ---------------------------------------------------------------------------------------- Objective


def log_likelihood(decoder, z: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) in nats, (K, B), of images x (B, P) at codes z (K, B, d); decoder gives logits.

    For grey x it is the usual cross-entropy, which is no likelihood of grey data.
    """
    logits = decoder(z.flatten(0, 1)).view(*z.shape[:2], -1)  # (K, B, P)
    return (logits * x - F.softplus(logits)).sum(-1)


def log_weights(log_px, mu: Tensor, logvar: Tensor, k: int) -> Tensor:
    """log p(x | z) + log p(z) - log q(z | x) at k codes from q(z | x), (k, B), in nats.

    `log_px` maps codes (k, B, d) to log p(x | z), (k, B). Source: Burda et al. 2016, eq. 8.
    """
    noise = torch.randn(k, *mu.shape, device=mu.device, dtype=mu.dtype)
    z = mu + noise * (0.5 * logvar).exp()
    # the two normalising constants cancel
    return log_px(z) - 0.5 * z.square().sum(-1) + 0.5 * (noise.square() + logvar).sum(-1)


def log_mean(log_w: Tensor) -> Tensor:
    """log of the mean weight over k, (k, B) -> (B,): the IWAE bound, log p(x) as k grows."""
    return log_w.logsumexp(0) - math.log(len(log_w))


def kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z | x) || N(0, I)) of every image and latent dimension, (B, d), nats."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def objective(model: VAE, x: Tensor, config: dict) -> Tensor:
    """(loss, reconstruction, KL) of images x (B, 1, 28, 28), (3,), nats per image.

    elbo: loss = reconstruction + KL, the KL in closed form. iwae: minus the bound with k codes,
    which is lower than the sum of the two, because it is tighter.
    """
    encoder, decoder = map(common.mixed_precision, [model.encoder, model.decoder])
    mu, logvar = encoder(x).chunk(2, dim=1)
    log_px = lambda z: log_likelihood(decoder, z, x.flatten(1))
    kl = kl_per_dimension(mu, logvar).sum(1).mean()
    if config["objective"] == "elbo":
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        reconstruction = -log_px(z[None]).mean()
        return torch.stack([reconstruction + kl, reconstruction, kl])
    log_w = log_weights(log_px, mu, logvar, config["k"])
    loss = -log_mean(log_w).mean()
    return torch.stack([loss, -log_w.detach().mean() - kl.detach(), kl.detach()])


def binarize(x: Tensor, *key: int | str) -> Tensor:
    """Pixels 0 or 1, drawn once with probability x for that key; the same on every device."""
    return (torch.rand(x.shape, generator=common.generator("binarize", *key)) < x).float()


# -------------------------------------------------------------------------------------------- Train


def make_optimizer(name: str, parameters, lr: float) -> torch.optim.Optimizer:
    """Adam or Adagrad with torch's defaults; fused where torch can."""
    parameters = list(parameters)
    device = parameters[0].device.type
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=device != "mps")
    return torch.optim.Adagrad(parameters, lr=lr, fused=device == "cpu")


def train(config: dict, x: Tensor, x_val: Tensor, folder: Path, args) -> tuple[VAE, list]:
    """Train, or continue from the folder's checkpoint; the best epoch's model and the history.

    Best is by validation loss. Every epoch seeds its own streams, so a run that was interrupted
    continues as if it had not been. Raises UserError when a loss is no longer finite.
    """
    seed, n, batch_size = config["seed"], len(x), config["batch_size"]
    torch.manual_seed(common.seed_from(seed, "weights"))
    model = VAE(config).to(x.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(config["optimizer"], model.parameters(), config["lr"])
    parts = {"model": model, "optimizer": optimizer}
    history = common.restore(folder, config, parts)

    def step(batch: Tensor) -> Tensor:
        if config["binarize"] == "dynamic":
            batch = torch.bernoulli(batch)
        losses = objective(model, batch, config)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()
        return losses.detach()

    step = common.fast_step(step, parts, x.device, args.compile)
    board = common.summary_writer(folder / "logs") if args.tensorboard else None
    steps = max(1, n // batch_size)  # a last, smaller batch is left out
    title = f"{variant(config)}/seed_{seed}"
    bar = tqdm(range(1, config["epochs"] + 1), title, initial=len(history), disable=None)
    for epoch in range(len(history) + 1, config["epochs"] + 1):
        start = time.perf_counter()
        cosine = math.cos(math.pi * (epoch - 1) / config["epochs"])
        common.set_rate(optimizer, config["lr"] * 0.5 * (1 + cosine))
        order = torch.randperm(n, generator=common.generator(seed, "order", epoch)).to(x.device)
        torch.manual_seed(common.seed_from(seed, "noise", epoch))
        losses = torch.stack([step(x[i]) for i in order[:steps * batch_size].split(batch_size)])
        assert not losses.requires_grad, "an epoch's losses must not hold every step's graph"
        finite = losses.isfinite().all().item()  # waits for the device
        seconds = time.perf_counter() - start
        torch.manual_seed(common.seed_from(seed, "validation"))  # the same noise in every epoch
        val = losses_in_chunks(model, x_val, config)
        if not (finite and math.isfinite(val[0])):
            raise common.diverged(title, folder, epoch, losses)
        names = [f"{of}_{k}" for of in ["train", "val"] for k in ["loss", "reconstruction", "kl"]]
        row = dict(zip(names, [*losses.mean(0).tolist(), *val], strict=True))
        history.append({"epoch": epoch, **row, "seconds": seconds})
        best = min(history, key=lambda row: row["val_loss"])["epoch"] == epoch
        common.save_epoch(folder, config, history, parts, best, board)
        bar.set_postfix(train=f"{losses[:, 0].mean():.2f}", val=f"{val[0]:.2f}", refresh=False)
        bar.update()
    bar.close()
    common.restore(folder, config, {"model": model}, "best_model.pt")
    return model.eval(), history


# ----------------------------------------------------------------------------------------- Evaluate


@common.full_precision()
@torch.no_grad()
def losses_in_chunks(model: VAE, x: Tensor, config: dict) -> list[float]:
    """(loss, reconstruction, KL) of many images, nats per image."""
    parts = [objective(model, c, config).cpu().double() * len(c) for c in x.split(1000)]
    return (torch.stack(parts).sum(0) / len(x)).tolist()


@torch.no_grad()
def quadrature(decoder, x: Tensor, d: int, reach: float, points: int) -> tuple[Tensor, dict]:
    """Exact log p(x) of images x (B, P) for d = 1 or 2, (B,) float64, and two checks of it.

    The trapezoidal rule on `points` (odd) per axis over [-reach, reach] converges faster than any
    power of the spacing once that is below the posterior's width. Checks, the largest over images:
    "refinement_change" against every second point (nats), and "outer_mass", the posterior's share
    in the outer tenth of the range.
    """
    axis = torch.linspace(-reach, reach, points)
    z = torch.cartesian_prod(*[axis] * d).view(-1, d)
    coarse = torch.cartesian_prod(*[torch.arange(points) % 2 == 0] * d).view(-1, d).all(1)
    outer = z.abs().amax(1) > 0.9 * reach
    log_cell = d * math.log(2 * reach / (points - 1))
    every = torch.ones_like(coarse)
    total = torch.full((3, len(x)), -math.inf, dtype=torch.float64)
    for i in torch.arange(len(z)).split(max(1, 5_000_000 // len(x))):
        logits = decoder(z[i].to(x.device)).flatten(1)  # (G, P)
        part = (logits @ x.T - F.softplus(logits).sum(1, keepdim=True)).cpu().double()
        log_prior = -0.5 * (z[i].double().square().sum(1) + d * math.log(2 * math.pi))
        part += (log_cell + log_prior)[:, None]
        for row, keep in enumerate([every, coarse, outer]):
            if keep[i].any():
                total[row] = torch.logaddexp(total[row], part[keep[i]].logsumexp(0))
    fine, half, rim = total
    return fine, {"refinement_change": float((fine - half - d * math.log(2)).abs().max()),
                  "outer_mass": float((rim - fine).exp().max())}


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation of codes (N, d), t in [0, 1] of shape (T,): (N, T, d).

    The direction turns along the arc, the length changes linearly (White 2016 mixes the codes
    themselves, whose length explodes between opposite ones). Along one line through the origin,
    always for d = 1, there is no arc: linear.
    """
    u, v = F.normalize(a, dim=1), F.normalize(b, dim=1)
    omega, t = (u * v).sum(1).clamp(-1, 1).acos()[:, None, None], t[:, None]
    arc = (((1 - t) * omega).sin() * u[:, None] + (t * omega).sin() * v[:, None]) / omega.sin()
    length = (1 - t) * a.norm(dim=1)[:, None, None] + t * b.norm(dim=1)[:, None, None]
    return torch.where(omega.sin() > 1e-4, arc * length, lerp(a, b, t[:, 0]))


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Linear interpolation of (N, ...), t of shape (T,): (N, T, ...)."""
    t = t.view(1, -1, *[1] * (a.ndim - 1))
    return (1 - t) * a[:, None] + t * b[:, None]


def interpolate(data: common.Data, mu: Tensor, decode, classifier) -> tuple[dict, dict]:
    """Share with p >= 0.9 at each step from one test image to another of another class.

    {"linear", "spherical", "pixels"}: (11,) each; "real": the share among those test images;
    "pairs": their number. mu (10000, d) are the test images' codes. Also, of the first six, the
    images (6, 11, 1, 28, 28) and whether the classifier is sure of them, (6, 11).
    """
    order = torch.randperm(len(data.x_test), generator=common.generator("interpolation"))
    a, b = order[:len(order) // 2], order[len(order) // 2:]
    other = data.y_test[a] != data.y_test[b]
    a, b = a[other][:PAIRS], b[other][:PAIRS]
    x_a, x_b = data.x_test[a], data.x_test[b]
    sure = lambda x: classifier.look(x)[1].amax(1) >= 0.9
    shares = {"real": float(sure(torch.cat([x_a, x_b])).double().mean()), "pairs": len(a)}
    shown = {}
    for name, x in [("linear", decode(lerp(mu[a], mu[b], STEPS).flatten(0, 1))),
                    ("spherical", decode(slerp(mu[a], mu[b], STEPS).flatten(0, 1))),
                    ("pixels", lerp(x_a, x_b, STEPS).flatten(0, 1))]:
        is_sure = sure(x).view(len(a), -1)
        shares[name] = is_sure.double().mean(0).tolist()
        shown[name] = x.view(len(a), len(STEPS), 1, 28, 28)[:6], is_sure[:6]
    return shares, shown


def start_codes(model: VAE, x: Tensor, mu: Tensor) -> Tensor:
    """Where to look for the posterior of images x (B, P): at the encoder's mean mu (B, d), or at
    the best of 4,000 codes where that is likelier. In few dimensions an unusual image may be
    encoded far from its best code; the codes are drawn twice as wide as the prior, because the best
    ones of unusual images lie far out.
    """
    z = 2 * torch.randn(4000, mu.shape[1], generator=common.generator("start")).to(x.device)
    logits = model.decoder(z)
    joint = x @ logits.T - F.softplus(logits).sum(1) - 0.5 * z.square().sum(1)  # (B, 4000)
    best, at = joint.max(1)
    own = log_likelihood(model.decoder, mu[None], x)[0] - 0.5 * mu.square().sum(1)
    return torch.where((best > own)[:, None], z[at], mu)


@common.full_precision()
def estimate_likelihood(model: VAE, x: Tensor, d: int, negative_elbo: float) -> dict:
    """log p(x) of test images x by importance sampling, and for d <= 2 exactly; nats.

    "nll" is for the whole test set: its -ELBO less the mean gap of these images ("gap", with its
    standard error over them). For the gap their ELBO is taken with 1,000 codes each.
    """
    began = time.perf_counter()
    parts = []
    for c in x.flatten(1).split(100):
        log_px = lambda z, c=c: log_likelihood(model.decoder, z, c)
        with torch.no_grad():
            mu, logvar = model.encode(c.view(-1, 1, 28, 28))
            bound = [log_weights(log_px, mu, logvar, 50).mean(0).cpu().double() for _ in range(20)]
            start = start_codes(model, c, mu)
        proposal = common.laplace(model.decoder, c, start, lambda logits, x: x - logits.sigmoid(),
                                  lambda logits: logits.sigmoid() * (-logits).sigmoid())
        value, ess = common.importance_sampling(log_px, *proposal, IMPORTANCE_SAMPLES)
        parts.append({"sigma": (0.5 * logvar).exp().cpu(), "mu": mu.cpu(), "log_px": value,
                      "ess": ess, "elbo": torch.stack(bound).mean(0)})
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    gap = found["log_px"] - found["elbo"]
    results = {
        "n": len(x), "k": IMPORTANCE_SAMPLES, "nll_subset": -float(found["log_px"].mean()),
        "ess_median": float(found["ess"].median()),
        "ess_below_10": float((found["ess"] < 10).double().mean())}
    if d <= 2:
        mu, sigma = found["mu"], found["sigma"]
        reach = max(8.0, float((mu.abs() + 8 * sigma).max()))
        points = min(math.ceil(2 * reach / float(sigma.min())), 10_000 if d == 1 else 800)
        exact, checks = quadrature(model.decoder, x.flatten(1), d, reach, 2 * points + 1)
        gap = exact - found["elbo"]
        results |= checks | {"exact_subset": -float(exact.mean()), "largest_difference": float(
            (exact - found["log_px"]).abs().max())}
    return results | {"nll": negative_elbo - float(gap.mean()), "gap": float(gap.mean()),
                      "gap_standard_error": float(gap.std() / math.sqrt(len(x))),
                      "seconds": time.perf_counter() - began}


def evaluate(config: dict, args, data, real, model, history, classifier, folder, device) -> dict:
    """final_metrics.json and the pictures of a trained model. Test images are used here only.

    `real` holds the classifier's features of the test images and of 10,000 training images.
    """
    assert not model.training, "models are measured in eval mode"
    grey, d = config["binarize"] == "none", config["latent_dim"]
    x_test = (data.x_test if grey else binarize(data.x_test, "test")).to(device)
    in_chunks = torch.no_grad()(
        lambda f, x: torch.cat([f(c.to(device)).cpu() for c in x.split(1000)]))
    decode = lambda z: in_chunks(model.decode, z)

    torch.manual_seed(common.seed_from(config["seed"], "test"))
    as_elbo = {**config, "objective": "elbo"}  # ten codes an image: the noise is below 0.02 nats
    test = np.mean([losses_in_chunks(model, x_test, as_elbo) for _ in range(10)], 0).tolist()
    own = test[0] if config["objective"] == "elbo" else losses_in_chunks(model, x_test, config)[0]
    mu, logvar = in_chunks(model.encoder, x_test).chunk(2, dim=1)
    order = torch.randperm(len(x_test), generator=common.generator("likelihood"))
    some = order[:args.likelihood_images].to(device)
    z = torch.randn(len(x_test), d, generator=common.generator(config["seed"], "prior"))
    x_gen = decode(z)
    shares, shown = interpolate(data, mu, decode, classifier)
    best = min(history, key=lambda row: row["val_loss"])
    p = data.x_test.double()
    entropy = lambda p: torch.special.entr(p) + torch.special.entr(1 - p)
    metrics = {
        "protocol": "grey pixels, cross-entropy" if grey else
        "pixels drawn anew for every batch, validation and test images once",
        "parameters": sum(w.numel() for w in model.parameters()), "best_epoch": best["epoch"],
        "train": {k[6:]: v for k, v in best.items() if k.startswith("train_")},
        "validation": {k[4:]: v for k, v in best.items() if k.startswith("val_")},
        "test_loss": own, "negative_elbo": test[0], "reconstruction": test[1], "kl": test[2],
        "pixel_entropy": float(entropy(p).sum() / len(p)),
        "independent_pixels": float(entropy(p.mean(0)).sum()),
        "likelihood": estimate_likelihood(model, x_test[some], d, test[0]),
        "kl_per_dimension": kl_per_dimension(mu, logvar).mean(0).tolist(),
        "active_units": int((mu.var(0) > 0.01).sum()),
        "fid": common.frechet_distance(classifier.look(x_gen)[0], real[0]),
        "fid_floor": common.frechet_distance(real[1], real[0]), "interpolation": shares,
        "classifier": {"accuracy": classifier.accuracy, "sha256": classifier.sha256},
        "seconds_per_epoch": float(np.median([row["seconds"] for row in history])),
        "seconds_train": sum(row["seconds"] for row in history),
        "bfloat16": device.type == "cpu" and common.BFLOAT16,
        "environment": common.environment(device)}
    figures(config, folder, history, metrics, data, x_test, x_gen, mu, decode, shown)
    return metrics


# ------------------------------------------------------------------------------- Figures and report


def figures(config: dict, folder: Path, history: list, metrics: dict, data, x_test: Tensor,
            x_gen: Tensor, mu: Tensor, decode, shown: dict) -> None:
    """Every picture of a run (see the names below)."""
    name, d = variant(config), config["latent_dim"]
    some = torch.cat([(data.y_test == digit).nonzero()[:2, 0] for digit in range(10)])
    common.save_grid(folder / "reconstructions.png", torch.cat([x_test[some].cpu(),
                     decode(mu[some])]), 20, f"{name}: test images above their reconstructions")
    common.save_grid(folder / "samples.png", x_gen[:100], 20,
                     f"{name}: decoded means of codes from the prior")

    figure = Figure(figsize=(11, 3))
    floor = f" (floor {metrics['pixel_entropy']:.2f})" if config["binarize"] == "none" else ""
    titles = {"loss": f"loss{floor}", "reconstruction": "reconstruction", "kl": "KL"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for which in ["train", "val"]:
            axes.plot([row["epoch"] for row in history], [row[f"{which}_{key}"] for row in history],
                      label=which)
        late = [row[f"{w}_{key}"] for row in history[len(history) // 20:] for w in ["train", "val"]]
        margin = 0.05 * (max(late) - min(late)) + 1e-6  # the first epochs would flatten the rest
        axes.set(xlabel="epoch", ylabel="nats per image", title=title,
                 ylim=(min(late) - margin, max(late) + margin))
        axes.axvline(metrics["best_epoch"], color="k", lw=0.8, ls=":", label="best epoch")
        axes.legend()
    figure.tight_layout()
    common.save_figure(folder / "losses.png", figure)

    if d > 1:
        figure = Figure(figsize=(7, 2.8))
        axes = figure.subplots()
        axes.bar(np.arange(1, d + 1), np.sort(metrics["kl_per_dimension"])[::-1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="latent dimension, sorted", ylabel="KL (nats)",
                 title=f"{name}: {metrics['active_units']} active units")
        common.save_figure(folder / "kl_per_dimension.png", figure)

    axis = torch.special.ndtri((torch.arange(20) + 0.5) / 20)  # quantiles: all weigh the same
    if d == 1:
        common.save_grid(folder / "decoded_line.png", decode(axis[:, None]), 20,
                         "decoded line: z from the prior's 2.5 % to its 97.5 % quantile")
    elif d == 2:
        plane = torch.stack([axis.repeat(20), axis.flip(0).repeat_interleave(20)], 1)
        common.save_grid(folder / "decoded_plane.png", decode(plane), 20,
                         "decoded plane: prior quantiles, 2.5 % to 97.5 % on each axis")
    codes_figure(folder / "codes.png", name, mu, data.y_test)

    kinds = ["linear", "spherical", "pixels"]
    x, is_sure = (torch.cat([shown[k][j][i] for i in range(6) for k in kinds]) for j in (0, 1))
    common.save_grid(folder / "interpolation.png", x, len(STEPS), f"{name}: between two test "
                     "images; framed: p < 0.9", kinds * 6, ~is_sure)
    figure = Figure(figsize=(5, 3.2))
    axes, shares = figure.subplots(), metrics["interpolation"]
    for k, style in zip(kinds, ["o-", "s--", "^-"], strict=True):
        axes.plot(STEPS, shares[k], style, ms=4, label=k)
    axes.axhline(shares["real"], color="k", ls=":", label="real test images")
    axes.set(xlabel="place on the path", ylabel="share with p ≥ 0.9", ylim=(0, 1.02), title=name)
    axes.legend()
    common.save_figure(folder / "interpolation_confidence.png", figure)


def codes_figure(path: Path, name: str, mu: Tensor, y: Tensor) -> None:
    """Code means of test images by class: histograms for d = 1, the plane for 2, else t-SNE."""
    figure, at, d = Figure(figsize=(5.5, 5)), mu.numpy(), mu.shape[1]
    axes = figure.subplots()
    axes.set_title(f"{name}: codes of test images")
    if d == 1:
        bins = np.linspace(at.min(), at.max(), 80)
        for digit in range(10):
            count, _ = np.histogram(at[y == digit, 0], bins)
            axes.fill_between(bins[1:], -digit, 0.9 * count / count.max() - digit, step="pre",
                              color=f"C{digit}")
        for edge in (-1.96, 1.96):
            axes.axvline(edge, color="k", lw=0.8, ls=":")
        axes.set(yticks=-np.arange(10), yticklabels=range(10), ylabel="class",
                 xlabel="z (dotted: 95 % of the prior)")
    else:
        if d > 2:
            from sklearn.manifold import TSNE  # a second to import
            at, y = TSNE(random_state=0).fit_transform(at[:2000].astype(np.float64)), y[:2000]
            axes.set(xticks=[], yticks=[], title=f"{name}: t-SNE of 2,000 test images' codes")
        for digit in range(10):
            axes.plot(*at[y == digit].T, ".", ms=3, color=f"C{digit}", alpha=0.6, label=digit)
        axes.legend(markerscale=4, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_aspect("equal")
    common.save_figure(path, figure)


def report(root: Path) -> None:
    """Write report.md from every finished run below root."""
    runs = common.finished_runs(root)
    if not runs:
        raise common.UserError(f"no finished run in {root}; run without --report-only first")
    groups = arranged(runs)
    name = common.DATASETS[runs[0]["config"]["dataset"]]
    lines = [f"# Variational autoencoders on {name}\n\nHow good is a VAE, measured by the "
             "likelihood that its bound hides?", answer(groups)]
    for protocol, title in [("dynamic", "Binarised pixels"), ("none", "Grey pixels")]:
        if of := {v: rs for v, rs in groups.items() if rs[0]["config"]["binarize"] == protocol}:
            lines += [f"## {title}", *tables(of, protocol == "none")]
    lines += [COLUMNS, *comparisons(groups), *exact_table(groups), *interpolation_table(groups),
              "## Pictures", "Of runs that differ in optimiser or rate alone one is shown; the "
              "others have the same pictures in their folders."]
    files = ["samples.png", "reconstructions.png", "decoded_line.png", "decoded_plane.png",
             "codes.png", "losses.png", "kl_per_dimension.png", "interpolation.png",
             "interpolation_confidence.png"]
    for v, rs in chosen(groups).items():
        folder = rs[0]["folder"]
        lines += [f"### {v}, seed {rs[0]['config']['seed']}",
                  *[f"![{v}: {f}]({folder.as_posix()}/{f})" for f in files
                    if (root / folder / f).exists()]]
    common.save_text(root / "report.md", "\n\n".join([*lines, common.how_made(groups)]) + "\n")


COLUMNS = """Nats per image; n seeds, ± their standard deviation.

- Validation: the minimum over epochs of the run's own bound, on 5,000 images that differ from seed
  to seed, and its epoch.
- −ELBO: of the test images at that epoch, once, ten codes each; of a model trained on the IWAE
  bound, that bound in brackets.
- NLL: −ELBO less the mean gap between the ELBO and log p(x) of as many test images as the second
  table says (± the standard error of that gap over them). log p(x) by importance sampling with
  5,000 codes from a Gaussian fitted to each image's posterior and, a tenth of them, from the prior;
  for d ≤ 2 by quadrature.
  Burda et al. sampled from the encoder. Either is an upper bound of the NLL in expectation, looser
  where ESS, the effective number of codes, is small, so figures at equal K need not agree.
- Active units: dimensions whose code means have a variance above 0.01 over test images (Burda et
  al. 2016). Some may carry next to nothing: used are those with more than 0.1 nats of KL.
- FID: in the features of the metric classifier, not Inception's; 10,000 decoded means against the
  10,000 grey test images; its floor is that of 10,000 training images.
- Grey pixels: a cross-entropy, no likelihood of the data; the gap is that of the same formula. Its
  floor is the mean pixel entropy of test images; the baseline is a model of independent pixels with
  the test images' means."""


BURDA, STUDENT = "Burda et al. 2016, thousands of epochs", "a student project, protocol not stated"
PUBLISHED = {"mlp500_z20_dynamic": ("−ELBO", 100.0, STUDENT, "negative_elbo"),
             "mlp200-200_z50_dynamic": ("NLL", 86.76, BURDA, "likelihood", "nll"),
             "mlp200-200_z50_dynamic_iwae5": ("NLL", 85.54, BURDA, "likelihood", "nll"),
             "mlp500_z64_grey": ("validation", 100.35, STUDENT, "validation", "loss"),
             "conv_z64_grey": ("validation", 100.35, STUDENT, "validation", "loss")}


def published(config: dict) -> tuple | None:
    """What others report for such a net on MNIST: what, its figure, who, our metric's keys."""
    return PUBLISHED.get(variant(config).rsplit("_", 2)[0] if config["dataset"] == "mnist" else "")


def arranged(runs: list) -> dict[str, list]:
    """Runs that differ in the seed alone, by name, alike ones next to each other."""
    order = lambda c: (c["binarize"], c["arch"], c["hidden"], c["latent_dim"], c["objective"])
    return dict(sorted(common.by_configuration(runs, variant).items(),
                       key=lambda g: (order(g[1][0]["config"]), g[0])))


def alike(groups, *keys: str) -> list[list]:
    """The groups that differ in these settings alone (and the seed), together."""
    found: dict[str, list] = {}
    for rs in groups:
        same = {k: v for k, v in rs[0]["config"].items() if k not in (*keys, "seed")}
        found.setdefault(f"{same} {common.precision(rs[0]['metrics'])}", []).append(rs)
    return list(found.values())


def chosen(groups: dict[str, list]) -> dict[str, list]:
    """Of groups alike but in optimiser or rate: the most seeds, then the least validation loss."""
    best = [min(of, key=lambda rs: (-len(rs), np.mean(get(rs, "validation", "loss"))))
            for of in alike(groups.values(), "optimizer", "lr")]
    return {v: rs for v, rs in groups.items() if rs in best}


def likelihood_images(runs: list) -> str:
    """How many test images log p(x) is of; '250, 1,000' where seeds differ."""
    return ", ".join(f"{n:,}" for n in sorted(set(get(runs, "likelihood", "n"))))


def answer(groups: dict[str, list]) -> str:
    """The best of each protocol, and what becomes of the published figures."""
    said, against = [], []
    of = lambda **settings: [(v, rs) for v, rs in groups.items()
                             if settings.items() <= rs[0]["config"].items()]
    if binarised := of(binarize="dynamic"):
        v, best = min(binarised, key=lambda of: np.mean(get(of[1], "likelihood", "nll")))
        error = np.mean(get(best, "likelihood", "gap_standard_error"))
        said.append(f"On binarised pixels the lowest NLL of {len(binarised)} variants is "
                    f"{show(best, 'likelihood', 'nll')} nats (± {error:.2f} for "
                    f"{likelihood_images(best)} images; n={len(best)}), that of `{v}`; its ELBO "
                    f"hides {show(best, 'likelihood', 'gap')} nats.")
    if grey := of(binarize="none", objective="elbo"):
        v, best = min(grey, key=lambda of: np.mean(get(of[1], "validation", "loss")))
        said.append(f"On grey pixels the lowest validation loss of {len(grey)} (−ELBO) is "
                    f"{show(best, 'validation', 'loss')} (n={len(best)}), that of `{v}`: test "
                    f"{show(best, 'test_loss')}, floor {best[0]['metrics']['pixel_entropy']:.2f}.")
    for v, rs in chosen(groups).items():
        if known := published(rs[0]["config"]):
            what, figure, who, *keys = known
            found = common.paired(get(rs, *keys), [figure] * len(rs))
            word = {1: "not reached", -1: "reached", 0: "not to be told from it"}[found.sign]
            if len(rs) == 1:
                word = f"{'reached' if found.mean <= 0 else 'not reached'} by one seed"
            against.append(f"`{v}` {what} {show(rs, *keys)} (n={len(rs)}) against {figure:g} "
                           f"({who}), {word} in {rs[0]['config']['epochs']} epochs")
    return "**Answer.** " + " ".join(said) + (
        f" Published figures: {'; '.join(against)}." if against else "")


def tables(groups: dict[str, list], grey: bool) -> list[str]:
    """A row per configuration: what it reaches; what it costs and uses, how sure its NLL is."""
    reached, costs = [], []
    for v, rs in groups.items():
        m, epochs = rs[0]["metrics"], get(rs, "best_epoch")
        error = f" (± {np.mean(get(rs, 'likelihood', 'gap_standard_error')):.2f})"
        bound = f" ({show(rs, 'test_loss')})" if rs[0]["config"]["objective"] == "iwae" else ""
        reached.append([
            v, len(rs), show(rs, "validation", "loss"),
            "–".join(map(str, sorted({min(epochs), max(epochs)}))),
            show(rs, "negative_elbo") + bound,
            *([] if grey else [show(rs, "likelihood", "nll") + error]),
            show(rs, "likelihood", "gap") + error])
        few = 100 * np.mean(get(rs, "likelihood", "ess_below_10"))
        used = [sum(kl > 0.1 for kl in of) for of in get(rs, "kl_per_dimension")]
        costs.append([
            v, f"{m['parameters']:,}", show(rs, "seconds_per_epoch", digits=1),
            show(rs, "reconstruction"), show(rs, "kl"),
            f"{show(rs, 'active_units', digits=0)} ({common.mean_std(used, 0)})", show(rs, "fid"),
            likelihood_images(rs),
            f"{show(rs, 'likelihood', 'ess_median', digits=0)} ({few:.1f} %)"])
    mean = lambda key: np.mean(get([r for rs in groups.values() for r in rs], key))
    floor = (f" (floor {mean('pixel_entropy'):.2f}, baseline {mean('independent_pixels'):.2f})"
             if grey else "")
    return [common.table(["run", "n", "validation", "epoch", f"−ELBO{floor}",
                          *([] if grey else ["NLL"]), "gap"], reached),
            common.table(["run", "parameters", "s per epoch", "reconstruction", "KL",
                          "active units (used)", f"FID (floor {mean('fid_floor'):.3f})",
                          "images for log p(x)", "ESS (below 10)"], costs)]


def where(config: dict, *differs: str) -> str:
    """'mlp500, d = 20, dynamic, adam 0.001' less what differs, to say what a comparison is of."""
    parts = {"net": network(config), "latent_dim": f"d = {config['latent_dim']}",
             "binarize": "grey" if config["binarize"] == "none" else "dynamic",
             "lr": f"{config['optimizer']} {config['lr']:g}"}
    if config["objective"] == "iwae":
        parts["objective"] = f"iwae {config['k']}"
    return ", ".join(part for key, part in parts.items() if key not in differs)


def comparisons(groups: dict[str, list]) -> list[str]:
    """The source's questions, answered by runs paired by seed that differ in one setting."""
    every, at_best, said = list(groups.values()), [], []
    rate = lambda rs: rs[0]["config"]["lr"]
    for tried in alike(every, "lr"):
        tried.sort(key=rate)
        seeds = set.intersection(*[{r["config"]["seed"] for r in rs} for rs in tried])
        scores = lambda rs: get(  # of the seeds that every rate has, if there are any
            [r for r in rs if not seeds or r["config"]["seed"] in seeds], "validation", "loss")
        best = min(tried, key=lambda rs: np.mean(scores(rs)))
        at_best.append(best)
        if len(tried) > 1:
            c, edge = best[0]["config"], best in (tried[0], tried[-1])
            found = [f"{rate(rs):g}: {common.mean_std(scores(rs))} (n={len(scores(rs))})"
                     for rs in tried]
            said.append(f"Rates of {c['optimizer']} ({where(c, 'lr')}), by validation loss"
                        f"{'' if seeds else ', without a seed in common'}: {'; '.join(found)}. "
                        f"The best is {c['lr']:g}{', at the edge of those tried' * edge}.")
    for question, keys, among in [
            ("Adagrad or Adam, each at the best of the rates tried, both decaying to 0?",
             ["optimizer", "lr"], at_best),
            ("Does a further hidden layer help?", ["hidden"], every),
            ("Does the tighter bound help?", ["objective", "k"], every)]:
        name = lambda c: network(c) if keys == ["hidden"] else " ".join(str(c[k]) for k in keys)
        for b, a in [pair for of in alike(among, *keys) for pair in itertools.combinations(of, 2)]:
            c, other = a[0]["config"], b[0]["config"]
            a, b = common.same_seeds(a, b)
            if not a or c["hidden"][:len(other["hidden"])] != other["hidden"]:
                continue  # no seed in common, or further layers on others
            measures = {"−ELBO": ["negative_elbo"]}
            if c["binarize"] == "dynamic":
                measures["NLL"] = ["likelihood", "nll"]
            found = [f"{what} {common.paired(get(a, *at), get(b, *at))}"
                     for what, at in measures.items()]
            said.append(f"**{question}** ({where(other, *keys)}) {name(c)} against {name(other)}: "
                        f"{', '.join(found)}.")
    for of in alike(every, "latent_dim"):
        if len(of) > 1:
            found = [f"d = {rs[0]['config']['latent_dim']}: {show(rs, 'negative_elbo')} "
                     f"(n={len(rs)}, {show(rs, 'active_units', digits=0)} active)" for rs in of]
            said.append(f"**Latent dimensions** ({where(of[0][0]['config'], 'latent_dim')}), "
                        f"−ELBO: {'; '.join(found)}.")
    return ["## Comparisons", *said, "Differences in nats, paired by seed; a negative one favours "
            "the first. Intervals are not corrected for the number of comparisons."] if said else []


def exact_table(groups: dict[str, list]) -> list[str]:
    found = [(v, r["config"]["seed"], r["metrics"]["likelihood"]) for v, rs in groups.items()
             for r in rs if r["config"]["latent_dim"] <= 2]
    if not found:
        return []
    difference = lambda m: m["nll_subset"] - m["exact_subset"]
    worst = max(abs(difference(m)) for *_, m in found)
    return ["## Is the estimate right?",
            f"For d ≤ 2 {'yes' if worst <= 0.05 else 'not everywhere'}: the largest difference of "
            f"a mean is {worst:.3f} nats ({'within' if worst <= 0.05 else 'not within'} 0.05). For "
            "larger d there is no exact value, and the effective sample size is the only check "
            "here.", common.table(
                ["run", "seed", "images", "−ELBO", "exact", "importance sampling", "difference",
                 "largest of an image", "change on refining", "mass at the rim"],
                [[v, seed, f"{m['n']:,}", f"{m['exact_subset'] + m['gap']:.2f}",
                  f"{m['exact_subset']:.3f}", f"{m['nll_subset']:.3f}", f"{difference(m):+.3f}",
                  f"{m['largest_difference']:.2f}", f"{m['refinement_change']:.0e}",
                  f"{m['outer_mass']:.0e}"] for v, seed, m in found]),
            "Mean −log p(x) of the same test images by quadrature over the latent space and by "
            "importance sampling, in nats; with grey pixels the cross-entropy takes the place of "
            "−log p(x | z). The rim is the outer tenth of the range integrated over."]


def interpolation_table(groups: dict[str, list]) -> list[str]:
    middle = lambda rs, key: [100 * float(np.mean(v[1:-1])) for v in get(rs, "interpolation", key)]
    half = lambda rs, key: [100 * v[len(v) // 2] for v in get(rs, "interpolation", key)]
    ends = lambda rs: [50 * (v[0] + v[-1]) for v in get(rs, "interpolation", "linear")]
    rows = [[v, len(rs), *[common.mean_std(values, 1) for values in [
        middle(rs, "linear"), half(rs, "linear"), middle(rs, "spherical"), half(rs, "spherical"),
        ends(rs)]]] for v, rs in groups.items()]
    v, best = max(groups.items(), key=lambda of: np.mean(middle(of[1], "linear")))
    at = lambda found: f"{np.mean(found):.1f} %"
    verdict = "Almost all" if np.mean(middle(best, "linear")) >= 95 else "Not almost all"
    beaten = sum(np.mean(middle(rs, "pixels")) > np.mean(middle(rs, "linear"))
                 for rs in groups.values())
    return ["## Are almost all intermediate codes meaningful?",
            f"{verdict} (95 % would be), if meaningful is what the classifier is sure of (p ≥ "
            f"0.9). In the best case, `{v}`, it is sure of "
            f"{at(middle(best, 'linear'))} of the images on the straight line between two codes, "
            f"half-way of {at(half(best, 'linear'))}, half-way on the arc of "
            f"{at(half(best, 'spherical'))}; of mixed pixels {at(middle(best, 'pixels'))}, "
            f"half-way {at(half(best, 'pixels'))}; of real images "
            f"{at([100 * s for s in get(best, 'interpolation', 'real')])}. Mixed pixels do better "
            f"than straight lines between codes in {beaten} of {len(groups)} variants"
            + (", for near an end they are nearly a real image: sure is not the same as meaningful."
               if beaten else "."), common.table(
                ["run", "n", "linear", "half-way", "spherical", "half-way", "both ends decoded"],
                rows),
            "Share (%) that the metric classifier is sure of, between two test images of "
            f"different classes, {best[0]['metrics']['interpolation']['pairs']:,} pairs; mean of "
            "nine steps, and the one half-way."]


# --------------------------------------------------------------------------------------------- main


def finished(folder: Path, args) -> dict:
    """final_metrics.json of a finished run, whether or not its weights are still here; else empty.

    Raises UserError if the likelihood of more images is asked for and there are no weights.
    """
    file = folder / "final_metrics.json"
    metrics = common.load_json(file) if file.exists() else {}
    if metrics and metrics["likelihood"]["n"] < args.likelihood_images and not all(
            (folder / name).exists() for name in ["checkpoint.pt", "best_model.pt"]):
        raise common.UserError(f"{folder} has the likelihood of {metrics['likelihood']['n']} "
                               "images and no weights to measure more; --fresh trains it again")
    return metrics


def main(argv=None) -> dict:
    args = parse_args(argv)
    base = Path(args.out_dir) / "vae_mnist"
    if args.report_only:
        return common.write_reports(report, base, args.dataset)
    device, data = common.pick_device(args.device), common.load_data(args.dataset, args.data_dir)
    runs = grid(args, data.name)[args.shard]
    names = [f"{variant(c)}/seed_{c['seed']}" for c in runs]
    folders = [base / data.name / name for name in names]
    parts = [common.split(data, config) for config in runs]
    common.open_runs(folders, runs, args)
    classifier = common.load_classifier(data, device)
    real = [classifier.look(x)[0] for x in (data.x_test, data.x_train[:10_000])]
    metrics = {name: finished(folder, args) for name, folder in zip(names, folders, strict=True)}
    failed = []
    for name, config, part, folder in zip(names, runs, parts, folders, strict=True):
        there = metrics[name]
        if there and there["likelihood"]["n"] >= args.likelihood_images:
            continue
        x, x_val = (data.x_train[part[k]] for k in ["train", "val"])
        if config["binarize"] == "dynamic":
            x_val = binarize(x_val, config["seed"], "val")
        try:
            model, history = train(config, x.to(device), x_val.to(device), folder, args)
        except common.UserError as error:  # a rate too high must not cost the rest of a sweep
            failed.append(str(error))
            continue
        metrics[name] = evaluate(config, args, data, real, model, history, classifier, folder,
                                 device)
        if there:  # of the training
            metrics[name] |= {key: there[key] for key in ["bfloat16", "environment"]}
        common.save_json(folder / "final_metrics.json", metrics[name])
    if any(metrics.values()):
        common.write_reports(report, base, data.name)
    if failed:
        raise common.UserError("; ".join(failed))
    return metrics


if __name__ == "__main__":
    common.guard(main)
