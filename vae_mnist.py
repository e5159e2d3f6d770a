"""How good is the variational autoencoder of Kingma and Welling, measured by the right likelihood?

A VAE maximises a lower bound of log p(x): an encoder proposes codes z for an image x, a decoder
gives a Bernoulli probability for every pixel. How far the bound is from log p(x) is measured here:
by importance sampling with 5,000 codes an image, and exactly for one and two dimensions.

    python vae_mnist.py                                        # the 20-D, 500-unit Bernoulli VAE
    python vae_mnist.py --latent-dim 1 2 64 --binarize none    # the latent-dimension study
    python vae_mnist.py --hidden 200 200 --latent-dim 50 --objective iwae
    python vae_mnist.py --dataset glyphs --train-size 1000 --epochs 1 --likelihood-images 9  # smoke

Writes results/vae_mnist/<dataset>/<variant>/seed_<s>/ (weights, metrics, pictures) and, from every
finished run, results/vae_mnist/<dataset>/report.md.

Expect: 20-D, 500 units, binarised: −ELBO 95.90 ± 0.08, NLL 90.82 ± 0.06 nats (n=3);
9 min to train a run; cpu: AMD EPYC, torch 2.15.0+cu132.

Differences from the papers and from the two student projects that this rebuilds:
 1. We train for a fixed number of epochs, the rate decays to 0 by a cosine, and the epoch with the
    lowest validation loss is kept. Kingma and Welling and Burda et al. train far longer.
 2. Weights have torch's default initialisation and no decay. Kingma and Welling draw them from
    N(0, 0.01) and have a Gaussian prior on them.
 3. Every number says whether the pixels were binarised. The projects do not say: theirs are a
    bound of about 100 (20-D) and a validation loss of 100.35 (64-D).

References: Kingma and Welling 2014, arXiv:1312.6114; Burda et al. 2016, arXiv:1509.00519 (IWAE,
active units, the 2 x 200 net); He et al. 2016, arXiv:1603.05027 (residual blocks); Duchi et al.
2011 (Adagrad).
"""

import functools
import io
import itertools
import math
from pathlib import Path

import common  # before torch: it sets how torch's threads wait

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import save_image

# ---------------------------------------------------------------------------------------- Config

EPOCHS = 100
BATCH_SIZE = 100
TRAIN_SIZE = 55_000  # of the 60,000; the others are for validation
IMPORTANCE_SAMPLES = 5000  # codes for each estimate of log p(x)
LOSSES = ["loss", "reconstruction", "kl"]  # what `objective` returns


def parse_args(argv=None):
    parser = common.Parser("vae_mnist", __doc__, epochs=EPOCHS, batch_size=BATCH_SIZE, lr=[1e-3])
    flag, number = parser.add_argument, common.number
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
         help="test images whose log p(x) is estimated, 0.1 s each on two cores")
    return parser.parse_args(argv)


def configurations(args, dataset: str) -> list[dict]:
    """The configuration of every run that the flags ask for."""
    fixed = {"dataset": dataset, "arch": args.arch, "binarize": args.binarize,
             "objective": args.objective, "batch_size": args.batch_size, "epochs": args.epochs,
             "precision": args.precision}
    fixed["hidden"] = args.hidden if args.arch == "mlp" else []
    fixed["k"] = args.k if args.objective == "iwae" else 1
    fixed["train_size"] = args.train_size or TRAIN_SIZE
    configs = []
    sweep = itertools.product(args.latent_dim, args.optimizer, args.lr, args.seeds)
    for latent_dim, optimizer, lr, seed in dict.fromkeys(sweep):  # each once
        configs.append({**fixed, "latent_dim": latent_dim, "optimizer": optimizer, "lr": lr,
                        "seed": seed})
    return configs


def row_name(config: dict) -> tuple[str, ...]:
    """A run without its seed, as tables name it: ('mlp 500', '20-D', 'binarised', 'ELBO', …)."""
    net, pixels, bound = config["arch"], "binarised", "ELBO"
    if net == "mlp":
        net += " " + "-".join(map(str, config["hidden"]))
    if config["binarize"] == "none":
        pixels = "grey"
    if config["objective"] == "iwae":
        bound = f"IWAE {config['k']}"
    training = f"{config['optimizer']} {config['lr']:g}"
    training += common.suffix(config, epochs=EPOCHS, batch_size=BATCH_SIZE, train_size=TRAIN_SIZE,
                              precision="float32").replace("_", " ")
    return net, f"{config['latent_dim']}-D", pixels, bound, training


def variant(config: dict) -> str:
    """A run's folder without its seed: 'mlp-500_20-D_binarised_ELBO_adam-0.001'."""
    return "_".join(row_name(config)).replace(" ", "-")


# ----------------------------------------------------------------------------------------- Model


def mlp(latent_dim: int, hidden: list[int]) -> tuple[nn.Module, nn.Module]:
    """tanh layers; the decoder mirrors the encoder. 784 -> hidden -> 2 d and d -> hidden -> 784."""
    encoder, decoder = [nn.Flatten()], []
    for inputs, outputs in itertools.pairwise([784, *hidden]):
        encoder += [nn.Linear(inputs, outputs), nn.Tanh()]
    encoder.append(nn.Linear(hidden[-1], 2 * latent_dim))
    for inputs, outputs in itertools.pairwise([latent_dim, *hidden[::-1]]):
        decoder += [nn.Linear(inputs, outputs), nn.Tanh()]
    decoder.append(nn.Linear(hidden[0], 784))
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


class Residual(nn.Module):
    """x + f(x) with two 3 x 3 convolutions, each after its nonlinearity; (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def conv(latent_dim: int) -> tuple[nn.Module, nn.Module]:
    """Strided convolutions, a residual block at 7 x 7 (twice as wide in the decoder), no norms."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.SiLU(),  # (B, 16, 14, 14)
        nn.Conv2d(16, 32, 4, stride=2, padding=1), Residual(32), nn.SiLU(),  # (B, 32, 7, 7)
        nn.Flatten(), nn.Linear(32 * 7 * 7, 256), nn.SiLU(), nn.Linear(256, 2 * latent_dim))
    decoder = nn.Sequential(
        nn.Linear(latent_dim, 256), nn.SiLU(), nn.Linear(256, 64 * 7 * 7),
        nn.Unflatten(1, (64, 7, 7)), Residual(64), nn.SiLU(),
        nn.ConvTranspose2d(64, 16, 4, stride=2, padding=1), nn.SiLU(),  # (B, 16, 14, 14)
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Flatten())  # (B, 784)
    return encoder, decoder


class VAE(nn.Module):
    """q(z | x) = N(mu, diag(exp(logvar))), p(z) = N(0, I), p(x | z) = Bernoulli for every pixel."""

    def __init__(self, config: dict):
        super().__init__()
        if config["arch"] == "conv":
            self.encoder, self.decoder = conv(config["latent_dim"])
        else:
            self.encoder, self.decoder = mlp(config["latent_dim"], config["hidden"])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x) for images x (B, 1, 28, 28), (B, d) each."""
        return self.encoder(x).float().chunk(2, dim=1)

    def to_logits(self, z: Tensor) -> Tensor:
        """Logits of the pixels, (B, 784), for codes z (B, d)."""
        return self.decoder(z).float()

    def decode(self, z: Tensor) -> Tensor:
        """Probabilities of the pixels, images (B, 1, 28, 28), for codes z (B, d)."""
        return self.to_logits(z).sigmoid().view(-1, 1, 28, 28)


# ------------------------------------------------------------------------------------- Objective


def log_likelihood(to_logits, z: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) in nats, (K, B), of images x (B, 784) at codes z (K, B, d).

    to_logits maps codes (N, d) to the logits of the pixels, (N, 784). For grey x this is the usual
    cross-entropy, which is no likelihood of grey data.
    """
    logits = to_logits(z.flatten(0, 1)).view(*z.shape[:2], -1)  # (K, B, 784)
    # x log p + (1 - x) log(1 - p) with p = sigmoid(logits), in a form that does not overflow
    return (logits * x - F.softplus(logits)).sum(-1)


def kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z | x) || N(0, I)) of every image and latent dimension, (B, d), nats."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def log_weights(log_px, mu: Tensor, logvar: Tensor, k: int) -> Tensor:
    """log of the weights p(x | z) p(z) / q(z | x) at k codes from q(z | x), (k, B), nats.

    log_px maps codes (k, B, d) to log p(x | z), (k, B). The mean of the log-weights estimates the
    ELBO, the log of the mean weight estimates log p(x). Source: Burda et al. 2016, eq. 8.
    """
    noise = torch.randn(k, *mu.shape, device=mu.device, dtype=mu.dtype)
    z = mu + noise * (0.5 * logvar).exp()  # (k, B, d)
    # both densities without their (2 pi)^(-d/2), which cancels
    log_prior = -0.5 * z.square().sum(-1)
    log_q = -0.5 * (noise.square() + logvar).sum(-1)
    return log_px(z) + log_prior - log_q


def log_mean_weight(log_w: Tensor) -> Tensor:
    """The IWAE bound, (k, B) -> (B,): it grows to log p(x) as k grows."""
    return log_w.logsumexp(0) - math.log(len(log_w))


def objective(model: VAE, x: Tensor, config: dict) -> Tensor:
    """(loss, reconstruction, KL) of images x (B, 1, 28, 28): a tensor (3,), nats per image.

    elbo: loss = reconstruction + KL, with the KL in closed form. iwae: loss = minus the bound with
    k codes. It is tighter, so the loss is lower than reconstruction + KL.
    """
    mu, logvar = model.encode(x)  # (B, d) each
    kl = kl_per_dimension(mu, logvar).sum(1).mean()

    def log_px(z: Tensor) -> Tensor:
        return log_likelihood(model.to_logits, z, x.flatten(1))

    if config["objective"] == "elbo":
        # one code from q(z | x); written as mu + noise * sigma, gradients reach mu and logvar
        # (the reparameterisation trick)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        reconstruction = -log_px(z[None]).mean()  # z[None]: one code, (1, B, d)
        return torch.stack([reconstruction + kl, reconstruction, kl])

    log_w = log_weights(log_px, mu, logvar, config["k"])
    loss = -log_mean_weight(log_w).mean()
    # only to be shown: -ELBO = reconstruction + KL, and the mean log-weight is the ELBO
    negative_elbo = -log_w.mean()
    return torch.stack([loss, negative_elbo - kl, kl])


# ----------------------------------------------------------------------------------------- Train


def binarize(x: Tensor, *key: int | str) -> Tensor:
    """Pixels 0 or 1, drawn once with probability x for that key; the same on every device."""
    return (torch.rand(x.shape, generator=common.generator("binarize", *key)) < x).float()


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam or Adagrad with torch's defaults, fused (faster) where every torch from 2.6 on can."""
    device = next(model.parameters()).device.type
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, fused=device != "mps")
    return torch.optim.Adagrad(model.parameters(), lr=lr, fused=device == "cpu")


def train(run: common.Run, x_train: Tensor, x_val: Tensor, use_compile: bool) -> VAE:
    """Train, or continue from the run's checkpoint. Returns the model of the best epoch.

    Best is the lowest validation loss. Raises Diverged when a loss is no longer finite.
    """
    config, device = run.config, x_train.device
    torch.manual_seed(common.seed_from(config["seed"], "weights"))
    model = VAE(config).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(config["optimizer"], model, config["lr"])
    schedule = common.cosine_schedule(optimizer, config["epochs"])
    run.restore(model=model, optimizer=optimizer, schedule=schedule)
    loss_function = common.compiled(objective, use_compile, device)

    def step(x: Tensor) -> Tensor:
        if config["binarize"] == "dynamic":
            x = torch.bernoulli(x)  # new pixels for every batch
        # the networks alone may be in bfloat16: they return float32 for the loss
        with common.autocast(x_train, config):
            losses = loss_function(model, x, config)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()
        return losses.detach().clone()  # a compiled function on CUDA reuses its output

    for _ in run.epochs():
        step_losses = []
        for batch in run.batches(len(x_train), device):
            step_losses.append(step(x_train[batch]))
        schedule.step()
        train_losses = torch.stack(step_losses).mean(0).tolist()
        # the same noise in every epoch, so that only the model changes the validation loss
        torch.manual_seed(common.seed_from(config["seed"], "validation"))
        val_losses = mean_losses(model, x_val, config)
        row = {}
        for i, name in enumerate(LOSSES):
            row[f"train_{name}"] = train_losses[i]
            row[f"val_{name}"] = val_losses[i]
        run.log(row, best=row["val_loss"])
    run.load_best(model=model)
    return model


@torch.no_grad()
def mean_losses(model: VAE, x: Tensor, config: dict) -> list[float]:
    """(loss, reconstruction, KL) of many images, nats per image."""
    total = torch.zeros(3, dtype=torch.float64)
    for chunk in x.split(1000):
        total += objective(model, chunk, config).cpu().double() * len(chunk)
    return (total / len(x)).tolist()


# ---------------------------------------------------------------------------- Sample and measure


def sample(model: VAE, n: int, config: dict, device: torch.device) -> Tensor:
    """Decoded means (n, 1, 28, 28) of codes from the prior N(0, I)."""
    g = common.generator(config["seed"], "prior")
    return common.in_chunks(model.decode, torch.randn(n, config["latent_dim"], generator=g), device)


@torch.no_grad()
def quadrature(to_logits, x: Tensor, d: int, reach: float, points: int) -> Tensor:
    """Exact log p(x) of images x (B, P) for d = 1 or 2, (B,) float64.

    p(x) is the integral of p(x | z) p(z): the sum over a grid of codes, `points` per axis over
    [-reach, reach], times the volume of a cell. Its error falls faster than any power of the
    spacing once that is below the posterior's width.
    """
    axis = torch.linspace(-reach, reach, points)
    grid = torch.cartesian_prod(*[axis] * d).view(-1, d)  # (G, d), for d = 1 too
    log_volume = d * math.log(2 * reach / (points - 1))
    log_p = torch.full((len(x),), -math.inf, dtype=torch.float64)
    for z in grid.split(5_000_000 // max(x.shape)):  # a part at a time: memory
        logits = to_logits(z.to(x.device)).flatten(1)  # (g, P)
        # log_likelihood of every image at every code, as one product of matrices
        log_px = logits @ x.T - F.softplus(logits).sum(1, keepdim=True)  # (g, B)
        log_prior = -0.5 * (z.double().square().sum(1) + d * math.log(2 * math.pi))
        log_joint = log_px.cpu().double() + (log_prior + log_volume)[:, None]
        log_p = torch.logaddexp(log_p, log_joint.logsumexp(0))
    return log_p


def exact_likelihood(model: VAE, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """`quadrature` of images x (B, 784) on a grid that fits their q(z | x), mu and logvar (B, d).

    The grid reaches beyond every posterior and is as fine as the narrowest, within bounds that
    only a net that has collapsed comes to.
    """
    d = mu.shape[1]
    sigma = (0.5 * logvar).exp().clamp(min=1e-6)
    reach = (mu.abs() + 8 * sigma).max().item()
    reach = min(max(8.0, reach), 1e6)
    most_steps = 10_000 if d == 1 else 800
    steps = min(math.ceil(2 * reach / sigma.min().item()), most_steps)
    return quadrature(model.to_logits, x, d, reach, 2 * steps + 1)


@torch.no_grad()
def start_codes(model: VAE, x: Tensor, mu: Tensor) -> Tensor:
    """Where to look for the posterior of images x (B, 784): at the encoder's mean mu (B, d), or at
    the best of 4,000 other codes where that is likelier.

    In few dimensions an unusual image may be encoded far from its best code. The other codes are
    drawn twice as wide as the prior, because the best ones of unusual images lie far out.
    """
    z = 2 * torch.randn(4000, mu.shape[1], generator=common.generator("start")).to(x.device)
    logits = model.to_logits(z)
    log_px = x @ logits.T - F.softplus(logits).sum(1)  # (B, 4000)
    best, index = (log_px - 0.5 * z.square().sum(1)).max(1)
    at_mu = log_likelihood(model.to_logits, mu[None], x)[0] - 0.5 * mu.square().sum(1)
    is_better = best > at_mu
    return torch.where(is_better[:, None], z[index], mu)


def sampled_likelihood(model: VAE, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    """By sampling codes of images x (B, 784): the ELBO (1,000 codes each), log p(x)
    (IMPORTANCE_SAMPLES codes), nats, and the effective number of the latter; (B,) float64 each.
    """
    log_px = functools.partial(log_likelihood, model.to_logits, x=x)
    elbos = []
    for _ in range(20):
        log_w = log_weights(log_px, mu, logvar, 50)
        elbos.append(log_w.mean(0).cpu().double())

    def output_gradient(logits: Tensor, x: Tensor) -> Tensor:  # of log p(x | z)
        return x - logits.sigmoid()

    def output_curvature(logits: Tensor) -> Tensor:  # minus its second derivative
        return logits.sigmoid() * (-logits).sigmoid()

    proposal = common.laplace(model.to_logits, x, start_codes(model, x, mu), output_gradient,
                              output_curvature)
    log_p, effective = common.importance_sampling(log_px, *proposal, IMPORTANCE_SAMPLES)
    return torch.stack(elbos).mean(0), log_p, effective


@torch.no_grad()
def estimate_likelihood(model: VAE, x: Tensor, negative_elbo: float) -> dict:
    """log p(x) of test images x by importance sampling, and for d <= 2 exactly; nats.

    "nll" is for the whole test set: its -ELBO less the mean "gap" between log p(x) and the ELBO of
    these images.
    """
    x = x.flatten(1)
    parts = []
    for images in common.progress(x.split(100), f"log p(x) of {len(x)} images"):
        q = model.encode(images.view(-1, 1, 28, 28))
        parts.append([*q, *sampled_likelihood(model, images, *q)])
    mu, logvar, elbo, log_p, effective = (
        torch.cat(column).cpu() for column in zip(*parts, strict=True))
    metrics = {"n": len(x), "k": IMPORTANCE_SAMPLES}
    metrics["nll_subset"] = -log_p.mean().item()
    metrics["ess_median"] = effective.median().item()
    metrics["ess_below_10"] = (effective < 10).double().mean().item()
    gap = log_p - elbo
    if mu.shape[1] <= 2:
        exact = exact_likelihood(model, x, mu, logvar)
        metrics["exact_subset"] = -exact.mean().item()
        metrics["largest_difference"] = (exact - log_p).abs().max().item()
        gap = exact - elbo
    metrics["gap"] = gap.mean().item()
    metrics["gap_standard_error"] = gap.std().item() / math.sqrt(len(x))
    metrics["nll"] = negative_elbo - metrics["gap"]
    return metrics


def interpolate(data: common.Data, mu: Tensor) -> Tensor:
    """Codes on the line between two test images of different classes, of six pairs, (6, 11, d).

    mu (10000, d) are the codes of the test images.
    """
    order = torch.randperm(len(mu), generator=common.generator("interpolation"))
    first, second = order.view(2, -1)
    differ = data.y_test[first] != data.y_test[second]
    a, b = mu[first[differ][:6]], mu[second[differ][:6]]
    t = torch.linspace(0, 1, 11)[:, None]  # of the way from a to b
    return (1 - t) * a[:, None] + t * b[:, None]


def evaluate(run: common.Run, model: VAE, data: common.Data, classifier, fid_floor: float,
             n_likelihood: int, device: torch.device) -> dict:
    """The metrics of a trained model, and its pictures."""
    config = run.config
    x_test = data.x_test
    if config["binarize"] == "dynamic":
        x_test = binarize(x_test, "test")
    x_test = x_test.to(device)
    print("measuring the bound and samples ...", flush=True)
    best = run.history[run.best_epoch - 1]
    metrics = {"best_epoch": run.best_epoch}
    metrics["validation"] = {name: best[f"val_{name}"] for name in LOSSES}
    metrics["parameters"] = sum(weight.numel() for weight in model.parameters())

    # the bound of the test images: ten codes an image, so that the noise is below 0.02 nats
    torch.manual_seed(common.seed_from(config["seed"], "test"))
    elbo_config = config | {"objective": "elbo"}
    passes = [mean_losses(model, x_test, elbo_config) for _ in range(10)]
    _, reconstruction, kl = np.mean(passes, 0).tolist()
    negative_elbo = reconstruction + kl
    metrics |= {"negative_elbo": negative_elbo, "reconstruction": reconstruction, "kl": kl}
    if config["objective"] == "iwae":
        metrics["negative_iwae"] = mean_losses(model, x_test, config)[0]
    metrics["pixel_entropy"] = common.pixel_entropy(data.x_test)

    # what the bound hides
    order = torch.randperm(len(x_test), generator=common.generator("likelihood"))
    chosen = x_test[order[:n_likelihood].to(device)]
    metrics["likelihood"] = estimate_likelihood(model, chosen, negative_elbo)

    # how the latent dimensions are used
    mu, logvar = common.in_chunks(model.encoder, x_test, device).chunk(2, dim=1)  # (10000, d) each
    metrics["kl_per_dimension"] = kl_per_dimension(mu, logvar).mean(0).tolist()
    metrics["active_units"] = int((mu.var(0) > 0.01).sum())

    # samples against grey test images
    samples = sample(model, len(x_test), config, device)
    features = classifier.predict(samples)[0]
    metrics["fid"] = common.frechet_distance(features, classifier.test_features)
    metrics["fid_floor"] = fid_floor
    metrics |= {"classifier": classifier.identity, **run.timing()}
    metrics = run.finish(metrics)
    figures(run, model, data, x_test, mu, samples)
    return metrics


# ---------------------------------------------------------------------------- Figures and report

NAMES = ["net", "latent", "pixels", "bound", "training"]  # the parts of a row's name
COLUMNS = [
    ("validation", "validation.loss", 2), ("−ELBO", "negative_elbo", 2),
    ("NLL", "likelihood.nll", 2), ("gap", "likelihood.gap", 2),
    ("estimate − exact", "estimate_error", 3), ("active units", "active_units", 0),
    ("FID / floor", "fid_ratio", 1)]
DIFFERENCES = [("−ELBO", "negative_elbo", 2), ("NLL", "likelihood.nll", 2),
               ("FID / floor", "fid_ratio", 1)]
REAL = ("real test images", "", "grey", "", "")
SOURCES = ("On MNIST the student projects report a bound of about 100 (20-D) and a validation loss "
           "of 100.35 (64-D), Burda et al. an NLL of 86.76 (mlp 200-200, ELBO) and 85.54 (IWAE 5).")
PAIRS = [  # the first: each optimiser at its best rate on validation images
    (("mlp 500", "20-D", "binarised", "ELBO", "adam 0.003"),
     ("mlp 500", "20-D", "binarised", "ELBO", "adagrad 0.02")),
    (("mlp 500-500", "20-D", "binarised", "ELBO", "adam 0.001"),
     ("mlp 500", "20-D", "binarised", "ELBO", "adam 0.001")),
    (("mlp 200-200", "50-D", "binarised", "IWAE 5", "adam 0.001"),
     ("mlp 200-200", "50-D", "binarised", "ELBO", "adam 0.001"))]


def figures(run: common.Run, model: VAE, data: common.Data, x_test: Tensor, mu: Tensor,
            samples: Tensor) -> None:
    """Every picture of a run. mu (10000, d) are the codes of the test images x_test."""
    folder, d = run.folder, run.config["latent_dim"]
    name = ", ".join(row_name(run.config))
    decode = functools.partial(common.in_chunks, model.decode, device=x_test.device)

    # rows of twenty: two test images of each digit, their reconstructions, five rows of samples
    two_each = torch.cat([(data.y_test == digit).nonzero()[:2, 0] for digit in range(10)])
    images = torch.cat([x_test.cpu()[two_each], decode(mu[two_each]), samples[:100]])
    twice_as_large = F.interpolate(images, scale_factor=2)
    picture = io.BytesIO()
    save_image(1 - twice_as_large, picture, "png", nrow=20, padding=0)
    common.save(folder / "samples.png", picture.getvalue())

    panels = {f"{title}, nats": [f"train_{title}", f"val_{title}"] for title in LOSSES}
    common.plot_history(folder / "losses.png", run.history, panels)
    common.plot_codes(folder / "codes.png", mu.numpy(), data.y_test.numpy(), f"{name}: codes")
    common.save_grid(folder / "interpolation.png", decode(interpolate(data, mu).flatten(0, 1)), 11,
                     f"{name}: on the line between the codes of two test images")

    z = torch.special.ndtri((torch.arange(20) + 0.5) / 20)  # twenty quantiles of the prior
    if d == 1:
        z = z[:, None]
    elif d == 2:  # a plane: from left to right, and from below to above
        down, across = torch.meshgrid(z.flip(0), z, indexing="ij")
        z = torch.stack([across, down], dim=-1).flatten(0, 1)
    if d <= 2:
        common.save_grid(folder / "decoded.png", decode(z), 20,
                         "decoded codes: from the 2.5 % to the 97.5 % quantile of the prior")


def rows(runs: list[dict]) -> dict:
    """Row name -> seed -> numbers: the one place where JSON becomes a table."""
    table = {}
    for run in runs:
        config, name = run["config"], row_name(run["config"])
        numbers = common.flat(run["metrics"])
        numbers["fid_ratio"] = numbers["fid"] / numbers["fid_floor"]
        if config["latent_dim"] <= 2:
            estimate, exact = numbers["likelihood.nll_subset"], numbers["likelihood.exact_subset"]
            numbers["estimate_error"] = estimate - exact
        if config["binarize"] == "none":
            del numbers["likelihood.nll"]  # a cross-entropy is no likelihood of grey pixels
        table.setdefault(name, {})[config["seed"]] = numbers
    # the least that a model of grey pixels can reach
    real = {"negative_elbo": runs[-1]["metrics"]["pixel_entropy"], "fid_ratio": 1.0}
    return {REAL: {None: real}, **dict(sorted(table.items()))}


def best_row(table: dict, pixels: str) -> tuple | None:
    """The row of "binarised" or of "grey" pixels with the lowest validation loss, if any."""
    best, lowest = None, math.inf
    for name, seeds in table.items():
        if name[2] == pixels and name != REAL:
            loss = np.mean([numbers["validation.loss"] for numbers in seeds.values()])
            if loss < lowest:
                best, lowest = name, loss
    return best


def answer(table: dict) -> list[str]:
    """At most five lines, each a number or one comparison."""
    lines = []
    floor = common.cell(table[REAL], "negative_elbo", 2)
    for pixels, title, key, ideal in [("binarised", "NLL", "likelihood.nll", ""),
                                      ("grey", "−ELBO", "negative_elbo", f" (floor {floor})")]:
        best = best_row(table, pixels)
        if best:
            value = common.cell(table[best], key, 2)
            lines.append(f"Lowest validation loss: {', '.join(best)}. "
                         f"Test {title} {value} nats{ideal}, n={len(table[best])}.")
    for a, b in PAIRS:
        lines.append(common.verdict(table, a, b, "NLL", "likelihood.nll", 2))
    return list(filter(None, lines))


def pictures(root: Path, table: dict, runs: list[dict]) -> list[str]:
    """The report's pictures: those of all nets, drawn here, and some of single runs."""
    folders = {}  # of the first seed that has pictures
    for run in runs:
        if (run["folder"] / "samples.png").exists():
            folders.setdefault(row_name(run["config"]), run["folder"])

    strips = []  # twenty samples of each net, cut from its picture
    for folder in folders.values():
        picture = 1 - np.array(Image.open(folder / "samples.png"))[:, :, 0] / 255
        row = picture[4 * 28:6 * 28:2, ::2]  # (28, 20 * 28): it was twice as large
        strips += np.split(row, 20, axis=1)
    labels = [", ".join(name) for name in folders]
    if strips:
        images = torch.tensor(np.stack(strips))[:, None]
        common.save_grid(root / "samples.png", images, 20, "samples", labels)
    common.plot_points(root / "negative_elbo.png", table, "negative_elbo", "−ELBO, nats per image")

    files = [root / "samples.png", root / "negative_elbo.png"]
    best = [best_row(table, "binarised"), best_row(table, "grey")]
    for name, folder in folders.items():
        files += folder.glob("decoded.png")
        if name in best:
            files += [folder / "samples.png", folder / "codes.png", folder / "interpolation.png"]
    return common.image_links(root, files)


def report(root: Path) -> None:
    """Write report.md, results.csv and pictures of the finished runs below root; print the top."""
    runs = common.finished_runs(root)
    table = rows(runs)
    lines = "\n".join(f"- {line}" for line in answer(table))
    results = common.results_table(table, NAMES, COLUMNS)
    print(f"\n{lines}\n\n{results}")
    common.write_report(root, [
        f"# Variational autoencoders on {common.DATASETS[root.name]}",
        "How good is a VAE, and how much does its bound hide?",
        f"**Answer.**\n\n{lines}",
        results,
        f"Losses are nats per image, mean ± standard deviation over n seeds. {SOURCES} "
        f"{common.glossary(root)}",
        common.paired_table(table, PAIRS, DIFFERENCES),
        *pictures(root, table, runs),
        common.how_made(runs)], table, NAMES)


# ------------------------------------------------------------------------------------------ main


def main(argv=None) -> dict:
    args = parse_args(argv)
    if args.report_only:
        report(Path(args.out_dir) / "vae_mnist" / (args.dataset or "mnist"))
        return {}
    device, data, root, configs = common.begin("vae_mnist", args, configurations)
    classifier = common.load_classifier(data, device)
    # what 10,000 real images score
    train_features = classifier.predict(data.x_train[:10_000])[0]
    fid_floor = common.frechet_distance(train_features, classifier.test_features)

    def train_and_measure(run: common.Run) -> dict:
        indices = common.split(data, run.config)
        x_train, x_val = data.x_train[indices["train"]], data.x_train[indices["val"]]
        if run.config["binarize"] == "dynamic":
            x_val = binarize(x_val, run.config["seed"], "val")
        model = train(run, x_train.to(device), x_val.to(device), args.compile)
        return evaluate(run, model, data, classifier, fid_floor, args.likelihood_images, device)

    return common.run_all(configs, root, variant, args, device, train_and_measure, report,
                          measured={"likelihood.n": args.likelihood_images})


if __name__ == "__main__":
    common.guard(main)
