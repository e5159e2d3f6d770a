"""What does an encoder lose against optimising the latents of every image by themselves?

Two models have the same kind of decoder with the same first weights. The amortised VAE has an
encoder that maps every image to a Gaussian over codes. Latent optimisation has no encoder: each
training image owns a Gaussian, a row of a table that is fitted together with the decoder. Three
numbers are compared on test images: the bound of a start (the encoder's Gaussian, or that of PCA),
the bound of the best Gaussian, and log p(x). A classifier is the supervised baseline.

    python latent_opt.py                      # both models, the baseline, gaps, log-probabilities
    python latent_opt.py --seeds 0 1 2
    python latent_opt.py --dataset glyphs --train-size 500 --epochs 1 --test-images 20 --codes 100

Writes results/latent_opt/<dataset>/<variant>/seed_<s>/ (weights of chosen epochs, metrics,
log_probabilities.npy, pictures) and results/latent_opt/<dataset>/report.md.

Expect: gaps of the encoder: amortisation 4.26 ± 0.13, approximation 3.23 ± 0.06 nats (n=3);
8 min to train and 32 min to measure a run; cpu: AMD EPYC, torch 2.15.0+cu132.

Differences from the source project:
 1. The optimised latents are a Gaussian each, not a point: a point has no bound and no likelihood.
 2. They start from probabilistic PCA, and Adam counts the steps of each row by itself.
 3. Each batch's latents take two steps for one of the decoder's (--latent-steps).
 4. log p(x) is estimated by importance sampling. The source does not say how.
 5. Samples are decoder means: pixel noise of 0.4 would drown them.

References: Kingma and Welling 2014, arXiv:1312.6114; Bojanowski et al. 2018, arXiv:1707.05776
(latent optimisation); Cremer et al. 2018, arXiv:1801.03558 (the two gaps); Tipping and Bishop 1999
(probabilistic PCA); Kingma and Ba 2015, arXiv:1412.6980 (Adam).
"""

import functools
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import common  # before torch: it sets how torch's threads wait

import numpy as np
import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------- Config

MODELS = {"vae": "amortised VAE", "latent_opt": "latent optimisation"}
EPOCHS = 30
SHOWN_EPOCHS = [1, 5, 10, 20, 30]  # weights and pictures are saved at these and at the last
BATCH_SIZE = 64
TRAIN_SIZE = 20_000
LEARNING_RATE = 1e-3
LATENT_RATE = 0.01  # learning rate of the latents
LATENT_STEPS = 2  # steps of a batch's latents for each step of the decoder
N_VAL = 5000
N_SHOWN = 10  # pictured training images, and one test image of each digit
INFERENCE_STEPS = 300  # to the best Gaussian of an image
SUPERVISED_EPOCHS = 12


def parse_args(argv=None):
    parser = common.Parser("latent_opt", __doc__, epochs=EPOCHS, batch_size=BATCH_SIZE,
                           lr=LEARNING_RATE)
    flag, number = parser.add_argument, common.number
    flag("--latent-lr", type=number(float, 1e-9, 100), default=LATENT_RATE, help="of the latents")
    flag("--latent-steps", type=number(int, 1), default=LATENT_STEPS, help="for one of the decoder")
    flag("--latent-dim", type=number(int, 1, 784), default=200, help="dimensions of z")
    flag("--sigma", type=number(float, 1e-3), default=0.4, help="of a pixel given z")
    flag("--test-images", type=number(int, 20), default=1000,
         help="stratified test images that are measured, and a fifth as many of training")
    flag("--codes", type=number(int, 20), default=2000, help="importance samples per image")
    return parser.parse_args(argv)


def configurations(args, dataset: str) -> list[dict]:
    """The configuration of every run that the flags ask for: one for each seed."""
    configs = []
    for seed in dict.fromkeys(args.seeds):  # each once
        configs.append({
            "dataset": dataset, "latent_dim": args.latent_dim, "sigma": args.sigma,
            "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr,
            "latent_lr": args.latent_lr, "latent_steps": args.latent_steps, "seed": seed,
            "train_size": args.train_size or TRAIN_SIZE, "precision": args.precision})
    return configs


def variant(config: dict) -> str:
    """A run's folder without its seed: 'd200_sigma0.4', and settings that are not the default."""
    return f"d{config['latent_dim']}_sigma{config['sigma']:g}" + common.suffix(
        config, latent_lr=LATENT_RATE, latent_steps=LATENT_STEPS, epochs=EPOCHS,
        batch_size=BATCH_SIZE, lr=LEARNING_RATE, train_size=TRAIN_SIZE, precision="float32")


def stratified(y: Tensor, n: int, *key: int | str) -> Tensor:
    """Indices of n images, a tenth of each class, in random order. UserError if that cannot be."""
    largest = 10 * int(y.bincount().min())
    if n % 10 or n > largest:
        raise common.UserError(f"{n} images cannot be a tenth of each class: --train-size and "
                               f"--test-images are multiples of ten, here at most {largest}")
    g = common.generator(*key)
    chosen = []
    for digit in range(10):  # so that no digit is rarer by chance
        members = (y == digit).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=g)
        chosen.append(members[order[:n // 10]])
    return torch.cat(chosen)[torch.randperm(n, generator=g)]


def split(data: common.Data, config: dict, n_test: int) -> dict[str, Tensor]:
    """Indices of the training images, stratified, of 5,000 others for validation, and of the test
    images that are measured: stratified, sorted by digit, the same for every seed.
    """
    train = stratified(data.y_train, config["train_size"], config["seed"], "split")
    others = np.setdiff1d(np.arange(len(data.y_train)), train)
    if len(others) < N_VAL:
        raise common.UserError(f"--train-size {len(train)} leaves {len(others)} images for "
                               f"validation, which needs {N_VAL}; take fewer")
    order = torch.randperm(len(others), generator=common.generator(config["seed"], "validation"))
    test = stratified(data.y_test, n_test, "test")
    by_digit = data.y_test[test].argsort(stable=True)  # ten strata of equal size
    return {"train": train, "val": torch.from_numpy(others)[order[:N_VAL]], "test": test[by_digit]}


# ----------------------------------------------------------------------------------------- Model
#
# Everywhere q is a Gaussian over codes for each image, (B, 2 d): means, then log-variances.


class Encoder(nn.Module):
    """The amortised q(z | x): images (B, 1, 28, 28) to q (B, 2 d)."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.SiLU(),  # (B, 16, 14, 14)
            nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.SiLU(), nn.Flatten(),  # (B, 32 * 7 * 7)
            nn.Linear(1568, 256), nn.SiLU(), nn.Linear(256, 2 * latent_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).float()


class Decoder(nn.Module):
    """Mean of p(x | z) = N(x_hat, sigma^2 I): codes (B, d) to (B, 1, 28, 28) in (0, 1).

    There is no BatchNorm and no dropout: images of a batch do not affect each other.
    """

    def __init__(self, latent_dim: int, sigma: float):
        super().__init__()
        self.sigma = sigma
        self.body = nn.Sequential(
            nn.Linear(latent_dim, 256), nn.SiLU(), nn.Linear(256, 1568), nn.SiLU(),
            nn.Unflatten(1, (32, 7, 7)),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.SiLU(),  # (B, 16, 14, 14)
            # cheaper on a CPU than a second transposed convolution
            nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z).float()


class Model(NamedTuple):
    """One of the two models in training."""

    decoder: Decoder
    inference: nn.Module  # the encoder, or the table of the training images' q: a RowAdam
    start: Callable  # the first q of any images: the encoder, or PCA
    optimizer: torch.optim.Optimizer  # of all weights that are not latents


# ------------------------------------------------------------------------------------- Objective


def log_likelihood(x_hat: Tensor, x: Tensor, sigma: float) -> Tensor:
    """log N(x; x_hat, sigma^2 I), nats, (B,): a density of images x (B, 1, 28, 28)."""
    n_pixels = x[0].numel()
    square = (x_hat - x).flatten(1).square().sum(1)
    return -0.5 * square / sigma**2 - 0.5 * n_pixels * math.log(2 * math.pi * sigma**2)


def negative_elbo(decoder, x: Tensor, q: Tensor, noise: Tensor | None = None) -> Tensor:
    """(-ELBO, -log p(x | z), KL) of each image, (3, B), nats: the KL exact, the rest by one code.

    noise (B, d) is from N(0, I), drawn here if it is not given.
    """
    mu, logvar = q.chunk(2, dim=1)
    if noise is None:
        noise = torch.randn_like(mu)
    z = mu + noise * (0.5 * logvar).exp()  # the reparameterisation trick
    reconstruction = -log_likelihood(decoder(z), x, decoder.sigma)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)  # KL(q || N(0, I)), exact
    return torch.stack([reconstruction + kl, reconstruction, kl])


class RowAdam(nn.Module):
    """Adam on the rows of a table (N, D): a step touches the rows given to it and no other.

    Every row counts its own steps for the bias correction, which SparseAdam does not. Source:
    Kingma and Ba 2015, algorithm 1.
    """

    def __init__(self, table: Tensor, lr: float, beta2: float = 0.999):
        super().__init__()
        self.lr, self.beta2 = lr, beta2
        self.register_buffer("table", table)  # buffers are saved with the state
        self.register_buffer("mean", torch.zeros_like(table))
        self.register_buffer("square", torch.zeros_like(table))
        self.register_buffer("count", torch.zeros(len(table), 1, device=table.device))

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """One step of the rows (B,) along their gradient (B, D)."""
        self.count[rows] += 1
        self.mean[rows] = 0.9 * self.mean[rows] + 0.1 * gradient
        self.square[rows] = self.beta2 * self.square[rows] + (1 - self.beta2) * gradient.square()

        # both averages began at zero: divide by the weight that they have gathered
        count = self.count[rows]
        scale = (self.square[rows] / (1 - self.beta2**count)).sqrt() + 1e-8
        self.table[rows] -= self.lr * self.mean[rows] / (1 - 0.9**count) / scale


def amortised_step(model: Model, x: Tensor, rows: Tensor, config: dict,
                   losses_of=negative_elbo) -> Tensor:
    """Encoder and decoder take a step. Returns (3, B), nats. losses_of may be compiled.

    The images' rows (B,) in the training set are not needed: that is what an encoder is for.
    """
    with common.autocast(x, config):
        losses = losses_of(model.decoder, x, model.inference(x))
    model.optimizer.zero_grad()
    losses[0].mean().backward()
    model.optimizer.step()
    return losses.detach().clone()


def latent_step(model: Model, x: Tensor, rows: Tensor, config: dict,
                losses_of=negative_elbo) -> Tensor:
    """The latents of a batch take their steps. Down the loss of the last one the decoder takes its
    own.

    x (B, 1, 28, 28) are the images of these rows (B,) of the latents. Returns (3, B), nats.
    """
    latents = model.inference
    model.optimizer.zero_grad()
    for step in range(1, config["latent_steps"] + 1):
        q = latents.table[rows].requires_grad_()
        with common.autocast(x, config):
            losses = losses_of(model.decoder, x, q)
        weights = [q]
        if step == config["latent_steps"]:
            weights += model.decoder.parameters()
        losses[0].mean().backward(inputs=weights)
        latents.step(rows, q.grad * len(x))  # undo the mean: each row has a loss of its own
    model.optimizer.step()
    return losses.detach().clone()


def pca_posterior(x: Tensor, latent_dim: int, sigma: float):
    """The posterior of probabilistic PCA with this noise: a function of images that returns q.
    Directions with less variance than the noise stay at the prior.

    x (N, 1, 28, 28) are the images it is fitted to. Source: Tipping and Bishop 1999, eq. 6 and 7.
    """
    pixels = x.flatten(1).cpu().double()  # not every device has float64 and eigh
    values, vectors = torch.linalg.eigh(torch.cov(pixels.T))
    values = values.flip(0)[:latent_dim]  # the largest first
    vectors = vectors.flip(1)[:, :latent_dim]  # (784, d)
    signal = (values - sigma**2).clamp(min=0)  # variance beyond the noise
    scale = torch.where(signal > 0, signal.sqrt() / values, 0)
    logvar = torch.where(signal > 0, (sigma**2 / values).log(), 0).to(x)
    projection = (vectors * scale).to(x)
    mean = pixels.mean(0).to(x)

    def posterior(images: Tensor) -> Tensor:
        mu = (images.flatten(1) - mean) @ projection
        return torch.cat([mu, logvar.expand(len(images), -1)], dim=1)

    return posterior


# ----------------------------------------------------------------------------------------- Train


def build(kind: str, config: dict, x_train: Tensor) -> Model:
    """The model "vae" or "latent_opt" before training. Their decoders have the same weights."""
    device, d, sigma = x_train.device, config["latent_dim"], config["sigma"]
    torch.manual_seed(common.seed_from(config["seed"], "decoder"))
    decoder = Decoder(d, sigma).to(device, memory_format=torch.channels_last)
    weights = list(decoder.parameters())
    if kind == "vae":
        torch.manual_seed(common.seed_from(config["seed"], "encoder"))
        start = inference = Encoder(d).to(device, memory_format=torch.channels_last)
        weights += inference.parameters()
    else:
        start = pca_posterior(x_train, d, sigma)
        inference = RowAdam(start(x_train), config["latent_lr"])
    optimizer = torch.optim.Adam(weights, lr=config["lr"], fused=device.type != "mps")
    return Model(decoder, inference, start, optimizer)


def train(run: common.Run, models: dict[str, Model], x_train: Tensor, x_val: Tensor,
          x_shown: Tensor, use_compile: bool) -> None:
    """Train both models, or continue, with the same batches. The last epoch is used."""
    config, device = run.config, x_train.device
    run.save_every = 10  # the latents of all images and their moments are 92 MB
    parts = {}
    for kind, model in models.items():
        parts |= {f"{kind}_decoder": model.decoder, f"{kind}_inference": model.inference,
                  f"{kind}_optimizer": model.optimizer}
    run.restore(**parts)
    losses_of = common.compiled(negative_elbo, use_compile, device)

    for epoch in run.epochs():
        row = {}
        for kind, step in [("vae", amortised_step), ("latent_opt", latent_step)]:
            torch.manual_seed(common.seed_from(config["seed"], "noise", epoch))
            began = time.perf_counter()
            losses = []
            for rows in run.batches(len(x_train), device, drop_last=False):
                losses.append(step(models[kind], x_train[rows], rows, config, losses_of))
            loss, reconstruction, kl = torch.cat(losses, dim=1).mean(1).tolist()
            row |= {f"{kind}_loss": loss, f"{kind}_reconstruction": reconstruction,
                    f"{kind}_kl": kl, f"{kind}_seconds": time.perf_counter() - began}

        vae = models["vae"]
        torch.manual_seed(common.seed_from(config["seed"], "validation"))
        with torch.no_grad():  # only the encoder has q of images that it was not trained on
            val_losses = negative_elbo(vae.decoder, x_val, vae.inference(x_val))
        row["vae_val_loss"] = val_losses[0].mean().item()
        if epoch in [*SHOWN_EPOCHS, config["epochs"]]:
            save_shown(run.folder, epoch, models, x_shown)
        run.log(row)


def save_shown(folder: Path, epoch: int, models: dict[str, Model], x: Tensor) -> None:
    """Weights of an epoch and pictures: of x (training images, then test images), of samples."""
    vae, latent_opt, x_test = models["vae"], models["latent_opt"], x[N_SHOWN:]
    trained_q = latent_opt.inference.table[:N_SHOWN].clone()  # all of the table would be 30 MB
    test_q = infer(latent_opt.decoder, x_test, latent_opt.start(x_test))
    common.save(folder / f"vae_epoch_{epoch}.pt", {
        "epoch": epoch, "decoder": vae.decoder.state_dict(), "encoder": vae.inference.state_dict()})
    common.save(folder / f"latent_opt_epoch_{epoch}.pt", {
        "epoch": epoch, "decoder": latent_opt.decoder.state_dict(), "latents": trained_q})

    with torch.no_grad():
        vae_mu, _ = vae.start(x).chunk(2, dim=1)
        latent_mu, _ = torch.cat([trained_q, test_q]).chunk(2, dim=1)
        noise = torch.randn(30, vae_mu.shape[1], generator=common.generator("shown")).to(x.device)
        by_vae, by_latents = vae.decoder(vae_mu), latent_opt.decoder(latent_mu)
        samples = torch.cat([vae.decoder(noise), latent_opt.decoder(noise)])
    n, title = N_SHOWN, f"epoch {epoch}: test images above their reconstructions"
    common.save_grid(folder / f"recon_epoch_{epoch}.png", torch.cat([x[n:], by_vae[n:]]), n, title)
    common.save_grid(folder / f"latent_opt_recon_epoch_{epoch}.png",
                     torch.cat([x[n:], by_latents[n:]]), n, title)
    common.save_grid(folder / f"samples_epoch_{epoch}.png", samples, 10,
                     f"samples from the prior, epoch {epoch}",
                     ["amortised", "", "", "optimised", "", ""])
    both = torch.cat([x[:n], by_vae[:n], by_latents[:n], x[n:], by_vae[n:], by_latents[n:]])
    common.save_grid(folder / f"comparison_epoch_{epoch}.png", both, n,
                     f"epoch {epoch}: original, amortised, optimised",
                     ["training", "amortised", "optimised", "test", "amortised", "optimised"])


# --------------------------------------------------------------------------- Sample and measure


def infer(decoder, x: Tensor, q: Tensor, title: str = "best Gaussians") -> Tensor:
    """The q of each image with the best ELBO under a fixed decoder, found from a start q.

    Adam with a cosine and a short memory (0.95: gradients shrink by orders of magnitude on the
    way, and 0.999 would leave variances too wide). All images share each step's noise, so that the
    result for one does not depend on the others.
    """
    g = common.generator("inference")
    latents = RowAdam(q.detach().clone(), lr=0.1, beta2=0.95)
    all_rows = torch.arange(len(x), device=x.device)
    for step in common.progress(range(INFERENCE_STEPS), title):
        latents.lr = 0.05 * (1 + math.cos(math.pi * step / INFERENCE_STEPS))  # from 0.1 to 0
        noise = torch.randn(4, 1, q.shape[1] // 2, generator=g).to(x.device)
        for rows in all_rows.split(250):
            # four codes for each image steady the gradient; that it is a sum, Adam ignores
            table = latents.table[rows].requires_grad_()
            images = x[rows].repeat(4, 1, 1, 1)  # (4 B, 1, 28, 28)
            shared_noise = noise.expand(-1, len(rows), -1).flatten(0, 1)  # (4 B, d)
            losses = negative_elbo(decoder, images, table.repeat(4, 1), shared_noise)
            gradient = torch.autograd.grad(losses[0].sum(), table)[0]
            latents.step(rows, gradient)
    return latents.table


@torch.no_grad()
def elbo(decoder, x: Tensor, q: Tensor, samples: int = 200) -> Tensor:
    """The ELBO of each image, (B,) float64 on the CPU; the same noise for any q of an image."""
    g = common.generator("elbo")
    total = torch.zeros(len(x), dtype=torch.float64)
    for _ in range(samples):
        noise = torch.randn(len(x), q.shape[1] // 2, generator=g).to(x.device)
        total -= negative_elbo(decoder, x, q, noise)[0].cpu().double()
    return total / samples


def log_px(decoder, x: Tensor, mu: Tensor, k: int, title: str = "log p(x)"):
    """log p(x) of each image by importance sampling with k codes, and the effective sample size:
    (B,) float64 on the CPU each.

    p(x) is the mean of p(x | z) p(z) / r(z) over codes from any r. Here r is a Gaussian near the
    image's posterior for nine codes in ten, found from the mean mu (B, d) of its best q, and the
    prior for one in ten.
    """

    def output_gradient(x_hat: Tensor, pixels: Tensor) -> Tensor:
        return (pixels - x_hat) / decoder.sigma**2  # gradient of log p(x | z) by x_hat

    def output_curvature(x_hat: Tensor) -> Tensor:
        return torch.full_like(x_hat, 1 / decoder.sigma**2)  # minus its second derivative

    def log_px_given_z(images: Tensor, z: Tensor) -> Tensor:  # codes (K, B, d) to (K, B)
        x_hat = decoder(z.flatten(0, 1))
        repeated = images.repeat(len(z), 1, 1, 1)
        return log_likelihood(x_hat, repeated, decoder.sigma).view(z.shape[:2])

    torch.manual_seed(common.seed_from("log p(x)"))  # the same noise, whatever was drawn before
    decode = nn.Sequential(decoder, nn.Flatten())
    values, effective_sizes = [], []
    for rows in common.progress(torch.arange(len(x)).split(20), title):
        images = x[rows]
        mean, factor = common.laplace(decode, images.flatten(1), mu[rows], output_gradient,
                                      output_curvature)
        value, size = common.importance_sampling(functools.partial(log_px_given_z, images), mean,
                                                 factor, k, rows=1000)
        values.append(value)
        effective_sizes.append(size)
    return torch.cat(values), torch.cat(effective_sizes)


def measure(decoder, x: Tensor, start: Tensor, k: int, title: str) -> tuple[dict, Tensor]:
    """The numbers of the gap for images x from a start q, (B,) each, and the best q.

    "start" and "elbo" are the bounds of the two q, "log_px" and "ess" are importance sampling.
    """
    best = infer(decoder, x, start, f"{title}: best Gaussians")
    best_mu, _ = best.chunk(2, dim=1)
    value, effective_size = log_px(decoder, x, best_mu, k, f"{title}: log p(x)")
    start_bound, best_bound = elbo(decoder, x, start), elbo(decoder, x, best)
    numbers = {"start": start_bound, "elbo": best_bound, "log_px": value, "ess": effective_size,
               "start_gap": best_bound - start_bound, "approximation_gap": value - best_bound}
    return numbers, best


def mean_and_error(values: Tensor, strata: int = 1) -> dict[str, float]:
    """Mean of values (B,) and its standard error. Each stratum is an equal part of their order."""
    variance = values.view(strata, -1).var(dim=1).mean() / len(values)
    return {"mean": values.mean().item(), "se": variance.sqrt().item()}


def summary(numbers: dict, strata: int = 1) -> dict:
    """The numbers of `measure`: means over images with their standard errors, nats."""
    means = {}
    for key in ["start", "elbo", "log_px", "start_gap", "approximation_gap"]:
        means[key] = mean_and_error(numbers[key], strata)
    size = numbers["ess"]
    return {**means, "ess_median": size.median().item(),
            "ess_below_50": (size < 50).double().mean().item()}


def fid_of_samples(decoder: Decoder, config: dict, classifier, device: torch.device) -> float:
    """FID of as many decoded codes from the prior as there are test images."""
    g = common.generator(config["seed"], "samples")
    noise = torch.randn(len(classifier.test_features), config["latent_dim"], generator=g)
    features, _ = classifier.predict(common.in_chunks(decoder, noise, device))
    return common.frechet_distance(features, classifier.test_features)


def probe(z: Tensor, y: Tensor, z_test: Tensor, y_test: Tensor) -> float:
    """Test accuracy of a linear classifier on codes (logistic regression)."""
    from sklearn.linear_model import LogisticRegression  # slow to import

    model = LogisticRegression(C=0.1, max_iter=300).fit(z.numpy(), y.numpy())
    return float(model.score(z_test.numpy(), y_test.numpy()))


def explained_by_stroke_area(x: Tensor, values: Tensor) -> float:
    """R^2 of a parabola in the stroke area, the sum of an image's pixels, for its value (B,)."""
    area, values = x.flatten(1).sum(1).cpu().numpy(), values.numpy()
    parabola = np.polynomial.Polynomial.fit(area, values, 2)
    return float(1 - (values - parabola(area)).var() / values.var())


def measure_model(kind: str, model: Model, images: common.Data, config: dict, codes: int,
                  classifier) -> tuple[dict, dict]:
    """A model's metrics, and the numbers of `measure` for the test images."""
    decoder, device, x_test = model.decoder, images.x_train.device, images.x_test
    x_train = images.x_train[:len(x_test) // 5]  # they are in random order
    start_q = common.in_chunks(model.start, x_test, device).to(device)
    if kind == "vae":
        train_q = common.in_chunks(model.start, images.x_train, device).to(device)
    else:
        train_q = model.inference.table
    on_test, best_q = measure(decoder, x_test, start_q, codes, f"{kind}, test images")
    on_train, _ = measure(decoder, x_train, train_q[:len(x_train)], codes,
                          f"{kind}, training images")

    print(f"{kind}: samples and probe ...", flush=True)
    best_mu, _ = best_q.cpu().chunk(2, dim=1)
    train_mu, _ = train_q.cpu().chunk(2, dim=1)
    probed_mu = best_mu
    if kind == "vae":  # test codes are made as those of the training images were
        probed_mu, _ = start_q.cpu().chunk(2, dim=1)
    x_hat = common.in_chunks(decoder, best_mu, device)
    metrics = {
        "gaps": {"test": summary(on_test, strata=10), "train": summary(on_train)},
        "fid": {"prior": fid_of_samples(decoder, config, classifier, device)},
        "squared_error": {"optimised": (x_hat - x_test.cpu()).square().mean().item()},
        "probe_accuracy": probe(train_mu, images.y_train, probed_mu, images.y_test),
        "log_px_by_digit": [mean_and_error(values) for values in on_test["log_px"].view(10, -1)],
        "stroke_area_r2": explained_by_stroke_area(x_test, on_test["log_px"])}
    return metrics, on_test


def supervised_accuracy(images: common.Data, seed: int) -> float:
    """Test accuracy of a classifier that is trained on the same images."""
    steps = SUPERVISED_EPOCHS * max(1, len(images.x_train) // 128)
    classifier = common.train_classifier(images.x_train, images.y_train, images.x_train.device,
                                         seed, "classifier", steps=steps, augment="shift")
    _, probs = classifier.predict(images.x_test)
    return (probs.argmax(1) == images.y_test).double().mean().item()


def save_log_probabilities(folder: Path, test: Tensor, y: Tensor, on_test: dict) -> None:
    """log_probabilities.npy, (2 models, 10 digits, images), and .csv, a line for each image."""
    by_digit = [on_test[kind]["log_px"].view(10, -1).numpy() for kind in MODELS]
    buffer = io.BytesIO()
    np.save(buffer, np.stack(by_digit))
    common.save(folder / "log_probabilities.npy", buffer.getvalue())

    lines = []
    for i in range(len(y)):
        line = {"test_index": int(test[i]), "digit": int(y[i])}
        for kind in MODELS:
            for key in ["start", "elbo", "log_px", "ess"]:
                line[f"{kind}_{key}"] = round(float(on_test[kind][key][i]), 4)
        lines.append(line)
    common.save(folder / "log_probabilities.csv", lines)


# ---------------------------------------------------------------------------- Figures and report

NAMES = ["setting", "model", "images"]
LOG_PX = ("log p(x)", "log_px", 2)
APPROXIMATION_GAP = ("approximation gap", "approximation_gap", 2)
SQUARED_ERROR = ("squared error", "squared_error.optimised", 4)
FID = ("FID", "fid.prior", 2)
COLUMNS = [LOG_PX, ("gap of the start", "start_gap", 2), APPROXIMATION_GAP,
           ("median ESS", "ess_median", 0), SQUARED_ERROR, FID,
           ("probe accuracy", "probe_accuracy", 3), ("seconds per epoch", "seconds_per_epoch", 1)]
PAIRS = [(("latent optimisation", "test"), ("amortised VAE", "test")),
         (("amortised VAE", "training"), ("amortised VAE", "test")),
         (("latent optimisation", "training"), ("latent optimisation", "test"))]


def log_probability_boxes(folder: Path, on_test: dict) -> None:
    """log_probabilities.png: log p(x) of test images by digit."""
    figure = common.Figure(figsize=(9, 3.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), MODELS, strict=True):
        by_digit = on_test[kind]["log_px"].view(10, -1)
        axes.boxplot(by_digit.T.numpy(), flierprops={"markersize": 2})
        axes.set_xticks(range(1, 11), range(10))
        axes.set(xlabel="digit", ylabel="log p(x), nats", title=MODELS[kind])
    common.save_figure(folder / "log_probabilities.png", figure)


def rows(runs: list[dict]) -> dict:
    """Row name -> seed -> numbers: the one place where JSON becomes a table."""
    table = {}
    for run in runs:
        metrics, setting, seed = run["metrics"], variant(run["config"]), run["config"]["seed"]
        table.setdefault((setting, "real images, supervised", "test"), {})[seed] = {
            "fid.prior": metrics["fid_floor"],
            "probe_accuracy": metrics["supervised_accuracy_subset"]}
        for kind, title in MODELS.items():
            model = metrics["models"][kind]
            on_train, on_test = model["gaps"]["train"], {**model, **model["gaps"]["test"]}
            del on_test["gaps"]
            for images, numbers in [("test", on_test), ("training", on_train)]:
                flat = common.flat(numbers).items()
                named = {key.removesuffix(".mean"): value for key, value in flat}
                table.setdefault((setting, title, images), {})[seed] = named
    return table


def answer(table: dict, setting: str) -> list[str]:
    """The two gaps, comparisons, the share of stroke area."""
    vae, latents = (setting, MODELS["vae"], "test"), (setting, MODELS["latent_opt"], "test")
    amortisation = common.cell(table[vae], "start_gap", 2)
    approximation = common.cell(table[vae], "approximation_gap", 2)
    explained = common.cell(table[vae], "stroke_area_r2", 2)
    lines = [f"On test images the encoder loses {amortisation} nats by amortisation and "
             f"{approximation} nats by the shape of a diagonal Gaussian (ideal 0)."]
    for column in [LOG_PX, SQUARED_ERROR, FID]:
        lines.append(common.verdict(table, latents, vae, *column))
    lines.append(f"Stroke area explains {explained} of the variance of the amortised VAE's "
                 "log p(x) over images (R²).")
    return lines


def report(root: Path) -> None:
    """Write report.md and results.csv of the finished runs below root. Prints answer and table."""
    runs = common.finished_runs(root)
    table = rows(runs)
    settings = [variant(run["config"]) for run in runs]
    setting = max(settings, key=settings.count)  # the page's: the one with the most seeds
    shown = {name: seeds for name, seeds in table.items() if name[0] == setting}
    lines = "\n".join(f"- {line}" for line in answer(table, setting))
    results = common.results_table(shown, NAMES, COLUMNS)
    print(f"\n{lines}\n\n{results}")

    first = runs[settings.index(setting)]
    epochs, metrics = first["config"]["epochs"], first["metrics"]
    pictures = ["training_curves.png", "log_probabilities.png", f"comparison_epoch_{epochs}.png",
                f"samples_epoch_{epochs}.png"]
    pairs = [((setting, *a), (setting, *b)) for a, b in PAIRS]
    below_50 = common.cell(table[setting, MODELS["latent_opt"], "test"], "ess_below_50", 2)
    common.write_report(root, [
        f"# Amortised inference against latent optimisation on {common.DATASETS[root.name]}",
        "What does an encoder lose against optimising the latents of every image by themselves?",
        f"**Answer.**\n\n{lines}", results,
        f"Nats per image, of {metrics['n_test']} test and {metrics['n_train']} training images, "
        f"{metrics['codes']} importance samples each. ± is the standard deviation over n seeds. "
        "The amortised VAE starts from its encoder: the gap of the start is the amortisation gap. "
        "Latent optimisation starts from PCA on test images, from its trained latents on training "
        f"images. A share of {below_50} of its test images has an ESS below 50: their log p(x) may "
        f"be too low. {common.glossary(root)}",
        common.paired_table(table, pairs, [LOG_PX, APPROXIMATION_GAP, FID]),
        *common.image_links(root, [first["folder"] / name for name in pictures]),
        common.how_made(runs)], table, NAMES)


# ------------------------------------------------------------------------------------------ main


def train_and_measure(run: common.Run, data: common.Data, classifier, args,
                      device: torch.device) -> dict:
    """Both models of a run, their metrics and pictures. Returns the metrics."""
    config = run.config
    indices = split(data, config, args.test_images)
    train_rows, test_rows = indices["train"], indices["test"]
    images = common.Data(data.name, data.x_train[train_rows].to(device), data.y_train[train_rows],
                         data.x_test[test_rows].to(device), data.y_test[test_rows])
    x_val = data.x_train[indices["val"]].to(device)
    shown = stratified(data.y_test, N_SHOWN, "shown")
    x_shown = torch.cat([images.x_train[:N_SHOWN], data.x_test[shown].to(device)])

    models = {kind: build(kind, config, images.x_train) for kind in MODELS}
    train(run, models, images.x_train, x_val, x_shown, args.compile)

    began = time.perf_counter()
    metrics, on_test = {}, {}
    for kind, model in models.items():
        model.decoder.requires_grad_(False)
        metrics[kind], on_test[kind] = measure_model(kind, model, images, config, args.codes,
                                                     classifier)
        seconds = [row[f"{kind}_seconds"] for row in run.history]
        metrics[kind] |= {"seconds_per_epoch": float(np.median(seconds)),
                          "seconds_train": sum(seconds)}
    save_log_probabilities(run.folder, test_rows, images.y_test, on_test)
    train_features, _ = classifier.predict(data.x_train[:10_000])
    result = run.finish({
        "n_test": args.test_images, "n_train": min(args.test_images // 5, config["train_size"]),
        "codes": args.codes, "models": metrics,
        "supervised_accuracy_subset": supervised_accuracy(images, config["seed"]),
        "fid_floor": common.frechet_distance(train_features, classifier.test_features),
        "classifier": classifier.identity, "seconds_train": run.timing()["seconds_train"],
        "seconds_evaluation": time.perf_counter() - began})
    common.plot_history(run.folder / "training_curves.png", run.history, {
        "−ELBO, nats": ["vae_loss", "vae_val_loss", "latent_opt_loss"],
        "−log p(x | z), nats": ["vae_reconstruction", "latent_opt_reconstruction"],
        "KL, nats": ["vae_kl", "latent_opt_kl"]})
    log_probability_boxes(run.folder, on_test)
    return result


def main(argv=None) -> dict:
    args = parse_args(argv)
    if args.report_only:
        report(Path(args.out_dir) / "latent_opt" / (args.dataset or "mnist"))
        return {}
    device, data, root, configs = common.begin("latent_opt", args, configurations)
    for config in configs:  # check all of them before anything is written
        split(data, config, args.test_images)
    classifier = common.load_classifier(data, device)
    return common.run_all(
        configs, root, variant, args, device,
        lambda run: train_and_measure(run, data, classifier, args, device), report,
        measured={"codes": args.codes, "n_test": args.test_images})


if __name__ == "__main__":
    common.guard(main)
