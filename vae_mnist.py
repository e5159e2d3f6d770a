"""How good is the variational autoencoder of Kingma and Welling, measured by the right likelihood?

A VAE maximises a lower bound of log p(x): an encoder proposes codes z for an image x, a decoder
gives a Bernoulli probability for every pixel. The bound hides something. How much is measured here:
log p(x) by importance sampling with 5,000 codes an image, and exactly for one and two dimensions.

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
    validation loss. Kingma and Welling and Burda et al. train far longer.
 2. No weight decay, torch's initialisation. Kingma and Welling: N(0, 0.01), a prior on weights.
 3. Every number says whether the pixels were binarised. The sources do not say.
 4. 5,000 of the 60,000 training images are for validation, and test images are scored once.

References: Kingma and Welling 2014, arXiv:1312.6114; Burda et al. 2016, arXiv:1509.00519 (IWAE,
active units, the 2 x 200 net); He et al. 2016, arXiv:1603.05027 (residual blocks); White 2016,
arXiv:1609.04468 (spherical interpolation); Duchi et al. 2011 (Adagrad).
"""

import itertools
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from torch import Tensor, nn
from torchvision.utils import save_image

import common

# ---------------------------------------------------------------------------------------- Config

EPOCHS = 100
BATCH_SIZE = 100
TRAIN_SIZE = 55_000  # of the 60,000; the others are for validation
IMPORTANCE_SAMPLES = 5000  # codes for each estimate of log p(x)
PAIRS = 1000  # of test images to interpolate between
STEPS = torch.linspace(0, 1, 11)  # of an interpolation: both ends and nine images between them


def parse_args(argv=None):
    parser = common.Parser(__doc__, epochs=EPOCHS, batch_size=BATCH_SIZE, lr=[1e-3])
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
    configs = []
    for latent_dim, optimizer, lr, seed in itertools.product(
            args.latent_dim, args.optimizer, args.lr, args.seeds):
        configs.append({
            "dataset": dataset, "arch": args.arch,
            "hidden": args.hidden if args.arch == "mlp" else [], "latent_dim": latent_dim,
            "binarize": args.binarize, "objective": args.objective,
            "k": args.k if args.objective == "iwae" else 1, "optimizer": optimizer, "lr": lr,
            "batch_size": args.batch_size, "epochs": args.epochs,
            "train_size": args.train_size or TRAIN_SIZE, "precision": args.precision,
            "seed": seed})
    return configs


def row_name(config: dict) -> tuple[str, ...]:
    """A run without its seed, as tables name it: ('mlp 500', '20-D', 'binarised', 'ELBO', …)."""
    net = " ".join([config["arch"], "-".join(map(str, config["hidden"]))]).strip()
    pixels = "grey" if config["binarize"] == "none" else "binarised"
    bound = "ELBO" if config["objective"] == "elbo" else f"IWAE {config['k']}"
    changed = common.suffix(config, epochs=EPOCHS, batch_size=BATCH_SIZE, train_size=TRAIN_SIZE,
                            precision="float32").replace("_", " ")
    return (net, f"{config['latent_dim']}-D", pixels, bound,
            f"{config['optimizer']} {config['lr']:g}{changed}")


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
        nn.Flatten(), nn.Linear(1568, 256), nn.SiLU(), nn.Linear(256, 2 * latent_dim))
    decoder = nn.Sequential(
        nn.Linear(latent_dim, 256), nn.SiLU(), nn.Linear(256, 3136),
        nn.Unflatten(1, (64, 7, 7)), Residual(64), nn.SiLU(),
        nn.ConvTranspose2d(64, 16, 4, stride=2, padding=1), nn.SiLU(),  # (B, 16, 14, 14)
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Flatten())  # (B, 784)
    return encoder, decoder


class VAE(nn.Module):
    """q(z | x) = N(mu, diag(exp(logvar))), p(z) = N(0, I), p(x | z) = Bernoulli for every pixel."""

    def __init__(self, config: dict):
        super().__init__()
        d = config["latent_dim"]
        nets = conv(d) if config["arch"] == "conv" else mlp(d, config["hidden"])
        self.encoder, self.decoder = nets

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x) for images x (B, 1, 28, 28), (B, d) each."""
        return self.encoder(x).float().chunk(2, dim=1)

    def logits(self, z: Tensor) -> Tensor:
        """Of the pixels' probabilities, (B, 784), for codes z (B, d)."""
        return self.decoder(z).float()

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 1, 28, 28) of the pixels' probabilities, for codes z (B, d)."""
        return self.logits(z).sigmoid().view(-1, 1, 28, 28)


# ------------------------------------------------------------------------------------- Objective


def log_likelihood(decoder, z: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) in nats, (K, B), of images x (B, 784) at codes z (K, B, d).

    decoder maps codes (N, d) to logits (N, 784). For grey x this is the usual cross-entropy, which
    is no likelihood of grey data.
    """
    logits = decoder(z.flatten(0, 1)).view(*z.shape[:2], -1)  # (K, B, 784)
    # x log s(l) + (1 - x) log(1 - s(l)) with the sigmoid s, in a form that does not overflow
    return (logits * x - F.softplus(logits)).sum(-1)


def kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z | x) || N(0, I)) of every image and latent dimension, (B, d), nats."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def log_weights(log_px, mu: Tensor, logvar: Tensor, k: int) -> Tensor:
    """log of the weights p(x | z) p(z) / q(z | x) at k codes from q(z | x), (k, B), nats.

    log_px maps codes (k, B, d) to log p(x | z), (k, B). The mean of the log-weights is an estimate
    of the ELBO, the log of the mean weight one of log p(x). Source: Burda et al. 2016, eq. 8.
    """
    noise = torch.randn(k, *mu.shape, device=mu.device, dtype=mu.dtype)
    z = mu + noise * (0.5 * logvar).exp()  # (k, B, d)
    # both densities without their (2 pi)^(-d/2), which cancels
    log_prior = -0.5 * z.square().sum(-1)
    log_q = -0.5 * (noise.square() + logvar).sum(-1)
    return log_px(z) + log_prior - log_q


def log_mean(log_w: Tensor) -> Tensor:
    """log of the mean weight over k, (k, B) -> (B,): the IWAE bound, log p(x) as k grows."""
    return log_w.logsumexp(0) - math.log(len(log_w))


def objective(model: VAE, x: Tensor, config: dict) -> Tensor:
    """(loss, reconstruction, KL) of images x (B, 1, 28, 28): a tensor (3,), nats per image.

    elbo: loss = reconstruction + KL, with the KL in closed form. iwae: minus the bound with k
    codes, which is lower than that sum, because the bound is tighter.
    """
    mu, logvar = model.encode(x)  # (B, d) each
    kl = kl_per_dimension(mu, logvar).sum(1).mean()

    def log_px(z: Tensor) -> Tensor:
        return log_likelihood(model.logits, z, x.flatten(1))

    if config["objective"] == "elbo":
        # one code from q(z | x), written so that gradients reach mu and logvar
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        reconstruction = -log_px(z[None]).mean()
        return torch.stack([reconstruction + kl, reconstruction, kl])
    log_w = log_weights(log_px, mu, logvar, config["k"])
    loss = -log_mean(log_w).mean()
    # the mean log-weight is an ELBO too: what it holds beside the KL is the reconstruction
    reconstruction = -log_w.mean() - kl
    return torch.stack([loss, reconstruction.detach(), kl.detach()])


# ----------------------------------------------------------------------------------------- Train


def binarize(x: Tensor, *key: int | str) -> Tensor:
    """Pixels 0 or 1, drawn once with probability x for that key; the same on every device."""
    return (torch.rand(x.shape, generator=common.generator("binarize", *key)) < x).float()


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam or Adagrad with torch's defaults; fused, which is faster, where torch can."""
    device = next(model.parameters()).device.type
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, fused=device != "mps")
    return torch.optim.Adagrad(model.parameters(), lr=lr, fused=device == "cpu")


def train(run: common.Run, x_train: Tensor, x_val: Tensor, compile: bool) -> tuple[VAE, int]:
    """Train, or continue from the run's checkpoint. The model of the best epoch, and that epoch.

    Best is the lowest validation loss. Raises Diverged when a loss is no longer finite.
    """
    config, device = run.config, x_train.device
    torch.manual_seed(common.seed_from(config["seed"], "weights"))
    model = VAE(config).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(config["optimizer"], model, config["lr"])
    run.restore(model=model, optimizer=optimizer)
    loss_function = common.compiled(objective, compile, device)

    def step(x: Tensor) -> Tensor:
        if config["binarize"] == "dynamic":
            x = torch.bernoulli(x)  # new pixels for every batch
        # the networks alone may be in bfloat16: they return float32 for the loss
        with torch.autocast(device.type, torch.bfloat16, config["precision"] == "bfloat16"):
            losses = loss_function(model, x, config)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()
        return losses.detach().clone()  # a compiled step on CUDA reuses its output

    for epoch in run.epochs():
        rate = common.cosine(config["lr"], epoch, config["epochs"])
        common.set_rate(optimizer, rate)
        losses = []
        for batch in run.batches(len(x_train), device):
            losses.append(step(x_train[batch]))
        losses = torch.stack(losses).mean(0).tolist()
        # the same noise in every epoch: a difference is the model's
        torch.manual_seed(common.seed_from(config["seed"], "validation"))
        val_losses = mean_losses(model, x_val, config)
        row = {}
        for i, name in enumerate(["loss", "reconstruction", "kl"]):
            row |= {f"train_{name}": losses[i], f"val_{name}": val_losses[i]}
        run.log(row, best=row["val_loss"])
    best_epoch = run.load_best(model=model)
    return model.eval(), best_epoch


@torch.no_grad()
def mean_losses(model: VAE, x: Tensor, config: dict) -> list[float]:
    """(loss, reconstruction, KL) of many images, nats per image."""
    total = torch.zeros(3, dtype=torch.float64)
    for chunk in x.split(1000):
        total += objective(model, chunk, config).cpu().double() * len(chunk)
    return (total / len(x)).tolist()


# ---------------------------------------------------------------------------- Sample and measure


@torch.no_grad()
def in_chunks(function, x: Tensor, device: torch.device) -> Tensor:
    """function(x), a thousand rows at a time on the device; the result is on the CPU."""
    return torch.cat([function(chunk.to(device)).cpu() for chunk in x.split(1000)])


@torch.no_grad()
def quadrature(decoder, x: Tensor, d: int, reach: float, points: int) -> tuple[Tensor, dict]:
    """Exact log p(x) of images x (B, P) for d = 1 or 2, (B,) float64, and two checks of it.

    The trapezoidal rule on `points` (odd) per axis over [-reach, reach] converges faster than any
    power of the spacing once that is below the posterior's width. Checks, the largest over images:
    "refinement_change" against every second point (nats), and "outer_mass", the posterior's share
    in the outer tenth of the range.
    """
    axis = torch.linspace(-reach, reach, points)
    z = torch.cartesian_prod(*[axis] * d).view(-1, d)  # (G, d)
    is_even = torch.cartesian_prod(*[torch.arange(points) % 2 == 0] * d).view(-1, d).all(1)
    is_outer = z.abs().amax(1) > 0.9 * reach
    log_cell = d * math.log(2 * reach / (points - 1))  # log of a grid cell's volume
    fine = torch.full((len(x),), -math.inf, dtype=torch.float64)
    coarse, outer = fine.clone(), fine.clone()
    for part in torch.arange(len(z)).split(max(1, 5_000_000 // len(x))):
        logits = decoder(z[part].to(x.device)).flatten(1)  # (g, P)
        log_px = logits @ x.T - F.softplus(logits).sum(1, keepdim=True)  # (g, B)
        log_prior = -0.5 * (z[part].double().square().sum(1) + d * math.log(2 * math.pi))
        joint = log_px.cpu().double() + (log_cell + log_prior)[:, None]
        fine = torch.logaddexp(fine, joint.logsumexp(0))
        coarse = torch.logaddexp(coarse, joint[is_even[part]].logsumexp(0))
        outer = torch.logaddexp(outer, joint[is_outer[part]].logsumexp(0))
    coarse += d * math.log(2)  # its cells are twice as wide
    return fine, {"refinement_change": float((fine - coarse).abs().max()),
                  "outer_mass": float((outer - fine).exp().max())}


@torch.no_grad()
def start_codes(model: VAE, x: Tensor, mu: Tensor) -> Tensor:
    """Where to look for the posterior of images x (B, 784): at the encoder's mean mu (B, d), or at
    the best of 4,000 other codes where that is likelier.

    In few dimensions an unusual image may be encoded far from its best code. The other codes are
    drawn twice as wide as the prior, because the best ones of unusual images lie far out.
    """
    z = 2 * torch.randn(4000, mu.shape[1], generator=common.generator("start")).to(x.device)
    logits = model.logits(z)
    log_joint = x @ logits.T - F.softplus(logits).sum(1) - 0.5 * z.square().sum(1)  # (B, 4000)
    best, index = log_joint.max(1)
    at_mu = log_likelihood(model.logits, mu[None], x)[0] - 0.5 * mu.square().sum(1)
    return torch.where((best > at_mu)[:, None], z[index], mu)


def estimate_likelihood(model: VAE, x: Tensor, d: int, negative_elbo: float) -> dict:
    """log p(x) of test images x by importance sampling, and for d <= 2 exactly; nats.

    "nll" is for the whole test set: its -ELBO less the mean "gap" between log p(x) and the ELBO of
    these images. For the gap their ELBO is taken with 1,000 codes each.
    """
    parts = []
    for images in common.progress(x.flatten(1).split(100), f"log p(x) of {len(x)} images"):

        def log_px(z: Tensor, images: Tensor = images) -> Tensor:
            return log_likelihood(model.logits, z, images)

        with torch.no_grad():
            mu, logvar = model.encode(images.view(-1, 1, 28, 28))
            elbos = []
            for _ in range(20):
                elbos.append(log_weights(log_px, mu, logvar, 50).mean(0).cpu().double())
            start = start_codes(model, images, mu)
        # of the Bernoulli: its gradient by the logits, and its variance
        proposal = common.laplace(
            model.logits, images, start, residual=lambda logits, x: x - logits.sigmoid(),
            weight=lambda logits: logits.sigmoid() * (-logits).sigmoid())
        estimate, ess = common.importance_sampling(log_px, *proposal, IMPORTANCE_SAMPLES)
        parts.append([mu.cpu(), logvar.cpu(), torch.stack(elbos).mean(0), estimate, ess])
    mu, logvar, elbo, estimate, ess = (torch.cat(column) for column in zip(*parts, strict=True))
    found = {"n": len(x), "k": IMPORTANCE_SAMPLES, "nll_subset": -estimate.mean().item(),
             "ess_median": ess.median().item(), "ess_below_10": (ess < 10).double().mean().item()}
    gap = estimate - elbo
    if d <= 2:
        sigma = (0.5 * logvar).exp()
        reach = max(8.0, float((mu.abs() + 8 * sigma).max()))
        points = min(math.ceil(2 * reach / float(sigma.min())), 10_000 if d == 1 else 800)
        exact, checks = quadrature(model.logits, x.flatten(1), d, reach, 2 * points + 1)
        gap = exact - elbo
        found |= checks | {"exact_subset": -exact.mean().item(),
                           "largest_difference": (exact - estimate).abs().max().item()}
    return found | {"nll": negative_elbo - gap.mean().item(), "gap": gap.mean().item(),
                    "gap_standard_error": gap.std().item() / math.sqrt(len(x))}


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Linear interpolation of (N, ...), t in [0, 1] of shape (T,): (N, T, ...)."""
    t = t.view(1, -1, *[1] * (a.ndim - 1))
    return (1 - t) * a[:, None] + t * b[:, None]


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation of codes (N, d), t in [0, 1] of shape (T,): (N, T, d).

    The direction turns along the arc, the length changes linearly. (White 2016 mixes the codes
    themselves, whose length explodes between opposite ones.) Along one line through the origin,
    always for d = 1, there is no arc: there it is linear.
    """
    u, v = F.normalize(a, dim=1), F.normalize(b, dim=1)
    angle = (u * v).sum(1).clamp(-1, 1).acos()[:, None, None]
    t_column = t[:, None]
    direction = ((1 - t_column) * angle).sin() * u[:, None] + (t_column * angle).sin() * v[:, None]
    length = (1 - t_column) * a.norm(dim=1)[:, None, None] + t_column * b.norm(dim=1)[:, None, None]
    arc = direction / angle.sin() * length
    return torch.where(angle.sin() > 1e-4, arc, lerp(a, b, t))


def interpolate(data: common.Data, mu: Tensor, decode, classifier, grey: bool) -> tuple[dict, dict]:
    """How sure is the classifier of images between two test images of different classes?

    Shares with p >= 0.9 at each of the eleven steps, by path: "linear" and "spherical" between the
    codes mu (10000, d), "pixels" between the images themselves and "real" for the test images,
    these two where the model is of grey pixels too. Also, of the first six pairs, the images
    (6, 11, 1, 28, 28) of each path, and whether the classifier is sure of them, (6, 11).
    """
    order = torch.randperm(len(data.x_test), generator=common.generator("interpolation"))
    a, b = order[:len(order) // 2], order[len(order) // 2:]
    differs = data.y_test[a] != data.y_test[b]
    a, b = a[differs][:PAIRS], b[differs][:PAIRS]

    def is_sure(x: Tensor) -> Tensor:
        return classifier.predict(x)[1].amax(1) >= 0.9

    paths = {"linear": decode(lerp(mu[a], mu[b], STEPS).flatten(0, 1)),
             "spherical": decode(slerp(mu[a], mu[b], STEPS).flatten(0, 1))}
    shares, pictures = {"pairs": len(a)}, {}
    if grey:
        ends = torch.cat([data.x_test[a], data.x_test[b]])
        shares["real"] = is_sure(ends).double().mean().item()
        paths["pixels"] = lerp(data.x_test[a], data.x_test[b], STEPS).flatten(0, 1)
    for name, x in paths.items():
        sure = is_sure(x).view(len(a), len(STEPS))
        shares[name] = sure.double().mean(0).tolist()
        pictures[name] = x.view(len(a), len(STEPS), 1, 28, 28)[:6], sure[:6]
    return shares, pictures


def evaluate(run: common.Run, model: VAE, best_epoch: int, data: common.Data, classifier,
             real_features: list[Tensor], n_likelihood: int, device: torch.device) -> dict:
    """The metrics of a trained model, and its pictures. Test images are used here only.

    real_features are those of the test images and of 10,000 training images.
    """
    assert not model.training, "models are measured in eval mode"
    config = run.config
    grey, d = config["binarize"] == "none", config["latent_dim"]
    x_test = (data.x_test if grey else binarize(data.x_test, "test")).to(device)
    best = run.history[best_epoch - 1]

    def decode(z: Tensor) -> Tensor:
        return in_chunks(model.decode, z, device)

    # the bound of the test images: ten codes an image, so that the noise is below 0.02 nats
    torch.manual_seed(common.seed_from(config["seed"], "test"))
    elbo_config = {**config, "objective": "elbo"}
    passes = [mean_losses(model, x_test, elbo_config) for _ in range(10)]
    negative_elbo, reconstruction, kl = np.mean(passes, 0).tolist()
    test_loss = negative_elbo
    if config["objective"] == "iwae":
        test_loss = mean_losses(model, x_test, config)[0]

    # samples are decoded means, compared with grey test images in the classifier's features
    mu, logvar = in_chunks(model.encoder, x_test, device).chunk(2, dim=1)  # (10000, d) each
    z = torch.randn(len(x_test), d, generator=common.generator(config["seed"], "prior"))
    samples = decode(z)
    shares, paths = interpolate(data, mu, decode, classifier, grey)

    order = torch.randperm(len(x_test), generator=common.generator("likelihood"))
    chosen = order[:n_likelihood].to(device)
    likelihood = estimate_likelihood(model, x_test[chosen], d, negative_elbo)
    figures(run, data, x_test.cpu(), mu, samples, decode, paths)
    p = data.x_test.double()  # as probabilities; their entropy bounds a grey cross-entropy
    return {
        "protocol": "grey pixels, cross-entropy" if grey else
        "pixels drawn anew for every batch, validation and test images once",
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "best_epoch": best_epoch,
        "train": {key: best[f"train_{key}"] for key in ["loss", "reconstruction", "kl"]},
        "validation": {key: best[f"val_{key}"] for key in ["loss", "reconstruction", "kl"]},
        "test_loss": test_loss, "negative_elbo": negative_elbo,
        "reconstruction": reconstruction, "kl": kl,
        "pixel_entropy": entropy(p).sum().item() / len(p),
        "independent_pixels": entropy(p.mean(0)).sum().item(),
        "likelihood": likelihood,
        "kl_per_dimension": kl_per_dimension(mu, logvar).mean(0).tolist(),
        "active_units": int((mu.var(0) > 0.01).sum()),
        "fid": common.frechet_distance(classifier.predict(samples)[0], real_features[0]),
        "fid_floor": common.frechet_distance(real_features[1], real_features[0]),
        "interpolation": shares,
        "classifier": {"accuracy": classifier.accuracy, "sha256": classifier.sha256},
        "seconds_per_epoch": float(np.median([row["seconds"] for row in run.history])),
        "seconds_train": sum(row["seconds"] for row in run.history)}


def entropy(p: Tensor) -> Tensor:
    """Of Bernoulli variables with the probabilities p, in nats."""
    return torch.special.entr(p) + torch.special.entr(1 - p)


# ---------------------------------------------------------------------------- Figures and report

NAMES = ["net", "latent", "pixels", "bound", "optimiser"]  # the parts of a row's name
COLUMNS = [
    ("validation", "validation.loss", 2), ("−ELBO", "negative_elbo", 2),
    ("NLL", "likelihood.nll", 2), ("published", "published", 0), ("gap", "likelihood.gap", 2),
    ("active units", "active_units", 0), ("FID / floor", "fid_ratio", 0)]
DIFFERENCES = [("−ELBO", "negative_elbo", 2), ("NLL", "likelihood.nll", 2),
               ("FID / floor", "fid_ratio", 1)]
MLP = ("mlp 500", "20-D", "binarised", "ELBO")
BURDA = ("mlp 200-200", "50-D", "binarised")
PAIRS_OF_ROWS = [  # each optimiser at its best rate on validation images
    ((*MLP, "adam 0.003"), (*MLP, "adagrad 0.02")),
    (("mlp 500-500", *MLP[1:], "adam 0.001"), (*MLP, "adam 0.001")),
    ((*BURDA, "IWAE 5", "adam 0.001"), (*BURDA, "ELBO", "adam 0.001"))]
PUBLISHED = {  # by student projects, which do not state their protocol, and by Burda et al. 2016
    (*MLP, "adam 0.001"): "−ELBO 100",
    ("mlp 500", "64-D", "grey", "ELBO", "adam 0.001"): "validation 100.35",
    (*BURDA, "ELBO", "adam 0.001"): "NLL 86.76",
    (*BURDA, "IWAE 5", "adam 0.001"): "NLL 85.54"}
REAL = ("real test images", "", "grey", "", "")
INDEPENDENT = ("independent pixels", "", "", "", "")


def figures(run: common.Run, data: common.Data, x_test: Tensor, mu: Tensor, samples: Tensor, decode,
            paths: dict) -> None:
    """Every picture of a run. mu (10000, d) are the codes of the test images."""
    folder, d = run.folder, run.config["latent_dim"]
    name = ", ".join(row_name(run.config))
    two_each = torch.cat([(data.y_test == digit).nonzero()[:2, 0] for digit in range(10)])
    images, reconstructions = x_test[two_each], decode(mu[two_each])
    common.save_grid(folder / "reconstructions.png", torch.cat([images, reconstructions]), 20,
                     f"{name}: test images above their reconstructions")
    common.save_grid(folder / "samples.png", samples[:100], 20,
                     f"{name}: decoded means of codes from the prior")
    # three rows of twenty, pixel by pixel: the report shows these of many runs
    save_image(torch.cat([images, reconstructions, samples[:20]]), folder / "strips.png", nrow=20,
               padding=0)
    common.plot_history(folder / "losses.png", run.history, {
        "loss": ["train_loss", "val_loss"],
        "reconstruction": ["train_reconstruction", "val_reconstruction"],
        "KL": ["train_kl", "val_kl"]})
    common.plot_codes(folder / "codes.png", mu.numpy(), data.y_test.numpy(), f"{name}: codes")

    quantiles = torch.special.ndtri((torch.arange(20) + 0.5) / 20)  # equally likely intervals
    if d == 1:
        common.save_grid(folder / "decoded_line.png", decode(quantiles[:, None]), 20,
                         "decoded line: z from the 2.5 % to the 97.5 % quantile of the prior")
    elif d == 2:
        plane = torch.stack([quantiles.repeat(20), quantiles.flip(0).repeat_interleave(20)], 1)
        common.save_grid(folder / "decoded_plane.png", decode(plane), 20,
                         "decoded plane: quantiles of the prior, 2.5 % to 97.5 % on each axis")

    # six pairs of images, a row for each path between them
    x = torch.stack([images for images, _ in paths.values()], 1).flatten(0, 2)
    sure = torch.stack([sure for _, sure in paths.values()], 1).flatten()
    common.save_grid(folder / "interpolation.png", x, len(STEPS),
                     f"{name}: between two test images (framed: p < 0.9)", [*paths] * 6,
                     framed=~sure)


def rows(runs: list[dict]) -> dict:
    """Row name -> seed -> numbers: the one place where JSON becomes a table."""
    table = {REAL: {}, INDEPENDENT: {}}
    for run in sorted(runs, key=lambda run: row_name(run["config"])):
        name, numbers = row_name(run["config"]), common.flat(run["metrics"])
        numbers["fid_ratio"] = numbers["fid"] / numbers["fid_floor"]
        for path in ["linear", "spherical"]:
            shares = run["metrics"]["interpolation"][path]
            numbers[f"{path}_half_way"] = shares[len(shares) // 2]
        if "likelihood.exact_subset" in numbers:
            numbers["estimate_error"] = abs(
                numbers["likelihood.nll_subset"] - numbers["likelihood.exact_subset"])
        if run["config"]["binarize"] == "none":
            del numbers["likelihood.nll"]  # a cross-entropy is no likelihood of grey pixels
        if run["config"]["dataset"] == "mnist" and name in PUBLISHED:
            numbers["published"] = PUBLISHED[name]
        table.setdefault(name, {})[run["config"]["seed"]] = numbers
        # the least that a model of grey pixels can reach, and what one without codes does
        table[REAL][None] = {"negative_elbo": numbers["pixel_entropy"], "fid_ratio": 1.0}
        table[INDEPENDENT][None] = {"negative_elbo": numbers["independent_pixels"]}
    return table


def best_rows(table: dict) -> dict[str, tuple]:
    """The row of each protocol with the lowest validation loss: test images have no say."""
    best = {}
    for pixels in ["binarised", "grey"]:
        losses = {}
        for name, seeds in table.items():
            if name[2] == pixels and name != REAL:
                losses[name] = np.mean([numbers["validation.loss"] for numbers in seeds.values()])
        if losses:
            best[pixels] = min(losses, key=losses.get)
    return best


def answer(table: dict) -> list[str]:
    """At most six lines, each a number beside its ideal, or one comparison."""
    lines, best = [], best_rows(table)
    for pixels, name in best.items():
        seeds = table[name]
        score = f"NLL {common.cell(seeds, 'likelihood.nll', 2)} nats"
        if pixels == "grey":
            score = (f"−ELBO {common.cell(seeds, 'negative_elbo', 2)} nats (floor "
                     f"{common.cell(table[REAL], 'negative_elbo', 2)})")
        lines.append(f"Lowest validation loss: {', '.join(name)}. Test {score}, n={len(seeds)}.")
    for a, b in PAIRS_OF_ROWS:
        lines.append(common.verdict(table, a, b, "NLL", "likelihood.nll", 2))
    name = next(iter(best.values()))
    lines.append(f"Half-way between two codes of {', '.join(name)} the classifier is sure of "
                 f"{common.cell(table[name], 'linear_half_way', 2)} of the images on a line, "
                 f"{common.cell(table[name], 'spherical_half_way', 2)} on an arc (ideal 1).")
    return [line for line in lines if line]


def strip(folder: Path, row: int) -> Tensor:
    """A row of a run's strips.png, (20, 1, 28, 28): 0 test images, 1 reconstructions, 2 samples."""
    pixels = torch.from_numpy(imread(folder / "strips.png")[..., 0])  # (3 * 28, 20 * 28)
    return pixels[28 * row:28 * row + 28].view(28, 20, 28).transpose(0, 1)[:, None]


def report(root: Path) -> None:
    """Write report.md, results.csv and pictures of the finished runs below root; print the answer
    and the table.
    """
    runs = common.finished_runs(root)
    table, folders = rows(runs), {}
    for run in runs:
        if (run["folder"] / "strips.png").exists():
            folders.setdefault(row_name(run["config"]), run["folder"])
    labels = [", ".join(name) for name in folders]
    for row, what in [(1, "reconstructions"), (2, "samples")]:
        strips = [strip(folder, row) for folder in folders.values()]
        common.save_grid(root / f"{what}.png", torch.cat(strips), 20, what, labels)
    common.plot_points(root / "negative_elbo.png", table, "negative_elbo", "−ELBO, nats per image")
    shown = [root / "samples.png", root / "reconstructions.png", root / "negative_elbo.png"]
    for name, folder in folders.items():
        shown += sorted(folder.glob("decoded_*.png"))
        if name in best_rows(table).values():
            shown += [folder / "codes.png", folder / "interpolation.png"]

    lines = "\n".join(f"- {line}" for line in answer(table))
    results = common.results_table(table, NAMES, COLUMNS)
    readme = Path(os.path.relpath(common.HERE / "README.md", root)).as_posix()
    sections = [
        f"# Variational autoencoders on {common.DATASETS[root.name]}",
        "How good is a VAE, and how much does its bound hide?", f"**Answer.**\n\n{lines}", results,
        "Losses are nats per image, mean ± standard deviation over n seeds. "
        f"[What the columns mean]({readme}#what-the-numbers-mean).",
        common.paired_table(table, PAIRS_OF_ROWS, DIFFERENCES)]
    errors = []
    for seeds in table.values():
        errors += [numbers["estimate_error"] for numbers in seeds.values()
                   if "estimate_error" in numbers]
    if errors:
        sections.append("For one and two dimensions log p(x) is known exactly. The estimate is off "
                        f"by at most {max(errors):.3f} nats in the mean of a run.")
    for file in shown:
        path = file.relative_to(root).as_posix()
        sections.append(f"![{path.removesuffix('.png')}]({path})")
    common.save_text(root / "report.md", "\n\n".join([*sections, common.how_made(runs)]))
    common.save_results(root / "results.csv", table, NAMES)
    print(f"\n{lines}\n\n{results}\n\nreport: {root / 'report.md'}", flush=True)


# ------------------------------------------------------------------------------------------ main


def main(argv=None) -> dict:
    args = parse_args(argv)
    root = Path(args.out_dir) / "vae_mnist"
    if args.report_only:
        report(root / (args.dataset or "mnist"))
        return {}
    device = common.pick_device(args.device)
    data = common.load_data(args.dataset, args.data_dir)
    root = root / data.name
    configs = configurations(args, data.name)[args.shard]
    splits = [common.split(data, config) for config in configs]
    print(f"vae_mnist: {len(configs)} runs on {data.name} and {device}; results in {root}",
          flush=True)
    environment = common.environment(device)  # before training: the commit that is run
    classifier = common.load_classifier(data, device)
    real_features = [classifier.predict(x)[0] for x in (data.x_test, data.x_train[:10_000])]
    runs = []
    for config in configs:
        folder = root / variant(config) / f"seed_{config['seed']}"
        runs.append(common.Run(folder, config, args.fresh, tensorboard=args.tensorboard))

    results, diverged = {}, []
    for run, part in zip(runs, splits, strict=True):
        file = run.folder / "final_metrics.json"
        if file.exists():
            print(f"{run.name}: finished before; --fresh would train it again", flush=True)
            results[run.name] = common.load_json(file)
            continue
        x_train, x_val = data.x_train[part["train"]], data.x_train[part["val"]]
        if run.config["binarize"] == "dynamic":
            x_val = binarize(x_val, run.config["seed"], "val")
        try:
            model, best_epoch = train(run, x_train.to(device), x_val.to(device), args.compile)
        except common.Diverged as error:  # a rate too high must not cost the rest of a sweep
            print(f"warning: {error}", flush=True)
            diverged.append(run.name)
            continue
        metrics = evaluate(run, model, best_epoch, data, classifier, real_features,
                           args.likelihood_images, device)
        results[run.name] = metrics | {"environment": environment}
        common.save_json(file, results[run.name])
    if results:
        report(root)
    if diverged:
        raise common.UserError(f"{len(diverged)} of {len(runs)} runs diverged: "
                               f"{', '.join(diverged)}; try a lower --lr with --fresh")
    return results


if __name__ == "__main__":
    common.guard(main)
