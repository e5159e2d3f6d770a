"""What does an encoder lose against optimising the latents of every image by themselves?

Two models have the same kind of decoder with the same first weights. The amortised VAE has an
encoder that maps every image to a Gaussian over codes. Latent optimisation has no encoder: each
training image owns a Gaussian, a row of a table that is fitted together with the decoder. On test
images, under each model's own decoder, three numbers are compared: the bound of a start (the
encoder's Gaussian, or that of PCA), the bound of the best Gaussian, and log p(x). A classifier is
the supervised baseline.

    python latent_opt.py                      # both models, the baseline, gaps, log-probabilities
    python latent_opt.py --seeds 0 1 2
    python latent_opt.py --dataset glyphs --train-size 500 --epochs 1 --test-images 20 --codes 100

Writes results/latent_opt/<dataset>/<variant>/seed_<s>/ (weights of chosen epochs, metrics,
log_probabilities.npy, pictures) and results/latent_opt/<dataset>/report.md.

Expect: gaps of the encoder: amortisation 4.26 ± 0.13, approximation 3.23 ± 0.06 nats (n=3);
8 min to train and 32 min to measure a run; cpu: AMD EPYC, torch 2.15.0+cu132.

Differences from the source project:
 1. The optimised latents are a Gaussian each, not a point: a point has no bound and no likelihood.
 2. Each starts from its image's posterior under probabilistic PCA, and its Adam counts the steps of
    its own row.
 3. Each batch's latents take two steps for one of the decoder's (--latent-steps).
 4. log p(x) is estimated by importance sampling around each image's own optimum. The source does
    not say how.
 5. Samples are decoder means: pixel noise of 0.4 would drown them.

References: Kingma and Welling 2014, arXiv:1312.6114; Bojanowski et al. 2018, arXiv:1707.05776
(latent optimisation); Cremer et al. 2018, arXiv:1801.03558 (the two gaps); Tipping and Bishop 1999
(probabilistic PCA); Kingma and Ba 2015, arXiv:1412.6980 (Adam).
"""

import io
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import common

# ---------------------------------------------------------------------------------------- Config

MODELS = {"vae": "amortised VAE", "latent_opt": "latent optimisation"}
EPOCHS = 30
SHOWN_EPOCHS = [1, 5, 10, 20, 30]  # weights and pictures are saved at these and at the last
BATCH_SIZE = 64
TRAIN_SIZE = 20_000
LEARNING_RATE = 1e-3
N_VAL = 5000
N_SHOWN = 10  # pictured training images, and one test image of each digit
INFERENCE_STEPS = 300  # to the best Gaussian of an image
SUPERVISED_EPOCHS = 12


def parse_args(argv=None):
    parser = common.Parser("latent_opt", __doc__, epochs=EPOCHS, batch_size=BATCH_SIZE,
                           lr=LEARNING_RATE)
    flag, number = parser.add_argument, common.number
    flag("--latent-lr", type=number(float, 1e-9, 100), default=0.01, help="rate of the latents")
    flag("--latent-steps", type=number(int, 1), default=2,
         help="steps of a batch's latents for each step of the decoder")
    flag("--latent-dim", type=number(int, 1, 784), default=200, help="dimensions of z")
    flag("--sigma", type=number(float, 1e-3), default=0.4,
         help="standard deviation of a pixel given z")
    flag("--test-images", type=number(int, 20), default=1000,
         help="stratified test images that are measured, and a fifth as many of training")
    flag("--codes", type=number(int, 20), default=2000, help="importance samples per image")
    return parser.parse_args(argv)


def configurations(args, dataset: str) -> list[dict]:
    """The configuration of every run that the flags ask for: one for each seed."""
    return [{"dataset": dataset, "latent_dim": args.latent_dim, "sigma": args.sigma,
             "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr,
             "latent_lr": args.latent_lr, "latent_steps": args.latent_steps,
             "train_size": args.train_size or TRAIN_SIZE, "precision": args.precision,
             "seed": seed} for seed in dict.fromkeys(args.seeds)]


def variant(config: dict) -> str:
    """A run's folder without its seed: 'd200_sigma0.4', and settings that are not the default."""
    name = f"d{config['latent_dim']}_sigma{config['sigma']:g}"
    if config["latent_lr"] != 0.01:
        name += f"_latentlr{config['latent_lr']:g}"
    if config["latent_steps"] != 2:
        name += f"_latentsteps{config['latent_steps']}"
    return name + common.suffix(config, epochs=EPOCHS, batch_size=BATCH_SIZE, lr=LEARNING_RATE,
                                train_size=TRAIN_SIZE, precision="float32")


def stratified(y: Tensor, n: int, *key: int | str) -> Tensor:
    """Indices of n images, as many of each class as of any other, in random order.

    Raises UserError if a class has too few.
    """
    g, chosen = common.generator(*key), []
    for digit in range(10):
        members = (y == digit).nonzero()[:, 0]
        wanted = n // 10
        if digit < n % 10:  # n is not a multiple of ten: the first digits get one image more
            wanted += 1
        if not 0 < wanted <= len(members):
            raise common.UserError(f"{n} stratified images need {wanted} of class {digit}, there "
                                   f"are {len(members)}; take another --train-size or "
                                   "--test-images")
        chosen.append(members[torch.randperm(len(members), generator=g)[:wanted]])
    return torch.cat(chosen)[torch.randperm(n, generator=g)]


def split(data: common.Data, config: dict, n_test: int) -> dict[str, Tensor]:
    """Indices of the training images, stratified, of 5,000 others for validation, and of the test
    images that are measured: stratified, sorted by digit, the same for every seed.
    """
    train = stratified(data.y_train, config["train_size"], config["seed"], "split")
    others = torch.ones(len(data.y_train), dtype=torch.bool)
    others[train] = False
    others = others.nonzero()[:, 0]
    if len(others) < N_VAL:
        raise common.UserError(f"--train-size {config['train_size']} leaves {len(others)} images "
                               f"for validation, which needs {N_VAL}; take at most "
                               f"{len(data.y_train) - N_VAL}")
    order = torch.randperm(len(others), generator=common.generator(config["seed"], "validation"))
    test = stratified(data.y_test, n_test, "test")
    return {"train": train, "val": others[order[:N_VAL]],
            "test": test[data.y_test[test].argsort(stable=True)]}


# ----------------------------------------------------------------------------------------- Model


class Encoder(nn.Module):
    """q(z | x): images (B, 1, 28, 28) to mean and log-variance, (B, d) each."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.SiLU(),  # (B, 16, 14, 14)
            nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.SiLU(), nn.Flatten(),  # (B, 32 * 7 * 7)
            nn.Linear(1568, 256), nn.SiLU(), nn.Linear(256, 2 * latent_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.body(x).float().chunk(2, dim=1)
        return mu, logvar


class Decoder(nn.Module):
    """Mean of p(x | z) = N(x_hat, sigma^2 I): codes (B, d) to (B, 1, 28, 28) in (0, 1).

    No layer couples the images of a batch, and none keeps statistics.
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(latent_dim, 256), nn.SiLU(), nn.Linear(256, 1568), nn.SiLU(),
            nn.Unflatten(1, (32, 7, 7)),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.SiLU(),  # (B, 16, 14, 14)
            # cheaper on a CPU than a second transposed convolution
            nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z).float()


# ------------------------------------------------------------------------------------- Objective


def log_likelihood(x_hat: Tensor, x: Tensor, sigma: float) -> Tensor:
    """log N(x; x_hat, sigma^2 I), nats, (B,): a density of images x (B, 1, 28, 28)."""
    square = (x_hat - x).flatten(1).square().sum(1)
    return -0.5 * square / sigma**2 - 0.5 * x[0].numel() * math.log(2 * math.pi * sigma**2)


def kl_nats(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, diag e^logvar) || N(0, I)) of each image, (B,), nats."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def negative_elbo(decoder, x: Tensor, mu: Tensor, logvar: Tensor, noise: Tensor,
                  sigma: float) -> Tensor:
    """(-ELBO, -log p(x | z), KL) of each image, (3, B), nats: the KL exact, the rest by one code.

    mu and logvar are q(z | x) of each image, and noise is from N(0, I), (B, d) each.
    """
    z = mu + noise * (0.5 * logvar).exp()  # the reparameterisation trick
    reconstruction = -log_likelihood(decoder(z), x, sigma)
    kl = kl_nats(mu, logvar)
    return torch.stack([reconstruction + kl, reconstruction, kl])


def amortised_losses(decoder: Decoder, encoder: Encoder, x: Tensor, sigma: float) -> Tensor:
    """`negative_elbo` with the encoder's Gaussians, (3, B)."""
    mu, logvar = encoder(x)
    return negative_elbo(decoder, x, mu, logvar, torch.randn_like(mu), sigma)


class RowAdam:
    """Adam on the rows of a table (N, D): a step touches the rows given to it and no other.

    Every row counts its own steps for the bias correction, which SparseAdam does not. Source:
    Kingma and Ba 2015, algorithm 1.
    """

    def __init__(self, table: Tensor, lr: float, beta2: float = 0.999):
        self.table, self.lr, self.beta2 = table, lr, beta2
        self.mean, self.square = torch.zeros_like(table), torch.zeros_like(table)
        self.count = torch.zeros(len(table), 1, device=table.device)

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """One step of the rows (B,) along their gradient (B, D)."""
        count = self.count[rows] + 1
        mean = 0.9 * self.mean[rows] + 0.1 * gradient
        square = self.beta2 * self.square[rows] + (1 - self.beta2) * gradient.square()
        self.count[rows], self.mean[rows], self.square[rows] = count, mean, square
        scale = (square / (1 - self.beta2**count)).sqrt() + 1e-8
        self.table[rows] -= self.lr * mean / (1 - 0.9**count) / scale

    def state_dict(self) -> dict:
        return {"table": self.table, "mean": self.mean, "square": self.square, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def autocast(x: Tensor, config: dict):
    """A context in which networks compute in the run's precision."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=config["precision"] == "bfloat16")


def amortised_step(decoder: Decoder, encoder: Encoder, optimizer, x: Tensor, config: dict,
                   losses_of=amortised_losses) -> Tensor:
    """Encoder and decoder take a step. Returns (3, B), nats. losses_of may be compiled."""
    with autocast(x, config):
        losses = losses_of(decoder, encoder, x, config["sigma"])
    optimizer.zero_grad()
    losses[0].mean().backward()
    optimizer.step()
    return losses.detach().clone()


def latent_step(decoder: Decoder, latents: RowAdam, optimizer, x: Tensor, rows: Tensor,
                config: dict) -> Tensor:
    """The latents of a batch take their steps; in the last of them the decoder takes one too, down
    the same loss, before either has moved.

    x (B, 1, 28, 28) are the images of these rows (B,) of the table. Returns (3, B), nats.
    """
    optimizer.zero_grad()
    for step in range(1, config["latent_steps"] + 1):
        q = latents.table[rows].requires_grad_()
        mu, logvar = q.chunk(2, dim=1)
        with autocast(x, config):
            losses = negative_elbo(decoder, x, mu, logvar, torch.randn_like(mu), config["sigma"])
        learning = [q]
        if step == config["latent_steps"]:
            learning += decoder.parameters()
        losses[0].mean().backward(inputs=learning)
        latents.step(rows, q.grad * len(x))  # undo the mean: each row has a loss of its own
    optimizer.step()
    return losses.detach()


def pca_posterior(x: Tensor, latent_dim: int, sigma: float):
    """The posterior of probabilistic PCA with this noise: a function of images that returns mean
    and log-variance, (B, d) each. Directions with less variance than the noise stay at the prior.

    x (N, 1, 28, 28) are the images it is fitted to. Source: Tipping and Bishop 1999, eq. 6 and 7.
    """
    pixels = x.flatten(1).cpu().double()
    values, vectors = torch.linalg.eigh(torch.cov(pixels.T))
    values, vectors = values.flip(0)[:latent_dim], vectors.flip(1)[:, :latent_dim]  # largest first
    is_signal = values > sigma**2
    scale = torch.where(is_signal, (values - sigma**2).clamp(min=0).sqrt() / values, 0)
    logvar = torch.where(is_signal, (sigma**2 / values).log(), 0).float().to(x.device)
    projection = (vectors * scale).float().to(x.device)  # (784, d)
    mean = pixels.mean(0).float().to(x.device)

    def posterior(images: Tensor) -> tuple[Tensor, Tensor]:
        mu = (images.flatten(1) - mean) @ projection
        return mu, logvar.expand(len(images), -1)

    return posterior


# ----------------------------------------------------------------------------------------- Train


def train(run: common.Run, kind: str, x_train: Tensor, x_val: Tensor, x_shown: Tensor,
          use_compile: bool) -> tuple:
    """Train "vae" or "latent_opt", or continue; the decoder, and the encoder or the latents.

    The latents are a RowAdam whose table holds mean and log-variance of every training image,
    (N, 2 d). x_shown are the pictured training images, then the test images. The last epoch is
    used: nothing is selected. Raises Diverged when a loss is no longer finite.
    """
    config, device = run.config, x_train.device
    d, sigma = config["latent_dim"], config["sigma"]
    torch.manual_seed(common.seed_from(config["seed"], "decoder"))  # the same for both models
    decoder = Decoder(d).to(device, memory_format=torch.channels_last)
    weights = list(decoder.parameters())
    pca = pca_posterior(x_train, d, sigma)
    if kind == "vae":
        torch.manual_seed(common.seed_from(config["seed"], "encoder"))
        inference = Encoder(d).to(device, memory_format=torch.channels_last)
        weights += inference.parameters()
    else:
        inference = RowAdam(torch.cat(pca(x_train), dim=1), config["latent_lr"])
    optimizer = torch.optim.Adam(weights, lr=config["lr"], fused=device.type != "mps")
    run.restore(decoder=decoder, inference=inference, optimizer=optimizer)
    losses_of = common.compiled(amortised_losses, use_compile, device)

    for epoch in run.epochs():
        losses = []
        for rows in run.batches(len(x_train), device, drop_last=False):
            x = x_train[rows]
            if kind == "vae":
                losses.append(amortised_step(decoder, inference, optimizer, x, config, losses_of))
            else:
                losses.append(latent_step(decoder, inference, optimizer, x, rows, config))
        means = torch.cat(losses, dim=1).mean(1).tolist()  # every image counts alike
        row = dict(zip(["loss", "reconstruction", "kl"], means, strict=True))
        if kind == "vae":  # the others have no latents for validation images
            torch.manual_seed(common.seed_from(config["seed"], "validation"))
            with torch.no_grad():
                val_losses = amortised_losses(decoder, inference, x_val, sigma)
            row["val_loss"] = val_losses[0].mean().item()
        if epoch in (*SHOWN_EPOCHS, config["epochs"]):
            save_shown(run.folder, kind, epoch, decoder.eval(), inference, x_shown, pca, sigma)
            decoder.train()
        run.log(row)
    return decoder.eval().requires_grad_(False), inference


def save_shown(folder: Path, kind: str, epoch: int, decoder: Decoder, inference, x: Tensor, pca,
               sigma: float) -> None:
    """Weights, the pictured images x as the model sees them and samples: <kind>_epoch_<n>.pt, and a
    picture of the test images above their reconstructions.
    """
    saved = {"epoch": epoch, "decoder": decoder.state_dict()}
    if kind == "vae":
        saved["encoder"] = inference.state_dict()
        with torch.no_grad():
            mu, _ = inference(x)
    else:
        d = inference.table.shape[1] // 2
        trained, x_test = inference.table[:N_SHOWN], x[N_SHOWN:]
        saved["latents"] = trained.clone()  # of the pictured images: the table would be 30 MB
        fitted, _ = infer(decoder, x_test, *pca(x_test), sigma)
        mu = torch.cat([trained[:, :d], fitted])
    noise = torch.randn(30, mu.shape[1], generator=common.generator("shown")).to(x.device)
    with torch.no_grad():
        saved["shown"], saved["samples"] = decoder(mu).cpu(), decoder(noise).cpu()
    common.save(folder.parent / f"{kind}_epoch_{epoch}.pt", saved)
    name = "recon" if kind == "vae" else "latent_opt_recon"
    both = torch.cat([x[N_SHOWN:].cpu(), saved["shown"][N_SHOWN:]])
    common.save_grid(folder.parent / f"{name}_epoch_{epoch}.png", both, N_SHOWN,
                     f"{MODELS[kind]}, epoch {epoch}: test images above their reconstructions")


# --------------------------------------------------------------------------------------- Measure


def infer(decoder, x: Tensor, mu: Tensor, logvar: Tensor, sigma: float,
          steps: int | None = None, title: str = "") -> tuple[Tensor, Tensor]:
    """The diagonal Gaussian of each image with the best ELBO under a fixed decoder, from a start.

    Adam with a cosine and a short memory (0.95: gradients shrink by orders of magnitude on the
    way, and 0.999 would leave variances too wide). All images share each step's noise, so that the
    result for one does not depend on the others. Means and log-variances, (B, d) each. `title`
    heads a progress bar.
    """
    assert not getattr(decoder, "training", False), "inference needs the decoder in eval mode"
    g, steps = common.generator("inference"), steps or INFERENCE_STEPS
    q = RowAdam(torch.cat([mu, logvar], dim=1).detach().clone(), lr=0.1, beta2=0.95)
    all_rows = torch.arange(len(x), device=x.device)
    for step in common.progress(range(steps), title) if title else range(steps):
        q.lr = 0.1 * 0.5 * (1 + math.cos(math.pi * step / steps))
        noise = torch.randn(4, 1, mu.shape[1], generator=g).to(x.device)
        for rows in all_rows.split(250):
            table = q.table[rows].requires_grad_()
            means, logvars = table.repeat(4, 1).chunk(2, dim=1)  # four codes for each image
            codes_noise = noise.expand(-1, len(rows), -1).flatten(0, 1)
            losses = negative_elbo(decoder, x[rows].repeat(4, 1, 1, 1), means, logvars,
                                   codes_noise, sigma)
            q.step(rows, torch.autograd.grad(losses[0].sum(), table)[0])
    best_mu, best_logvar = q.table.chunk(2, dim=1)
    return best_mu, best_logvar


@torch.no_grad()
def elbo(decoder, x: Tensor, mu: Tensor, logvar: Tensor, sigma: float,
         samples: int = 200) -> Tensor:
    """The ELBO of each image, (B,) float64 on the CPU; the same noise for any q of an image."""
    g, total = common.generator("elbo"), torch.zeros(len(x), dtype=torch.float64)
    for _ in range(samples):
        noise = torch.randn(mu.shape, generator=g).to(x.device)
        total -= negative_elbo(decoder, x, mu, logvar, noise, sigma)[0].cpu().double()
    return total / samples


def log_px(decoder, x: Tensor, mu: Tensor, sigma: float, k: int,
           title: str = "") -> tuple[Tensor, Tensor]:
    """log p(x) of each image by importance sampling with k codes, and the effective sample size:
    (B,) float64 on the CPU each.

    p(x) is the mean of p(x | z) p(z) / r(z) over codes from any r. Here r is a Gaussian near the
    image's posterior for nine codes in ten, found from the mean mu (B, d) of its best q, and the
    prior for one in ten.
    """
    torch.manual_seed(common.seed_from("log p(x)"))  # the same noise, whatever was drawn before

    def decode(z: Tensor) -> Tensor:
        return decoder(z).flatten(1)

    def residual(x_hat: Tensor, pixels: Tensor) -> Tensor:  # gradient of log p(x | z) by x_hat
        return (pixels - x_hat) / sigma**2

    def curvature(x_hat: Tensor) -> Tensor:  # minus its second derivative
        return torch.full_like(x_hat, 1 / sigma**2)

    chunks = list(zip(x.split(20), mu.split(20), strict=True))
    values, effective_sizes = [], []
    for images, starts in common.progress(chunks, title) if title else chunks:
        def log_px_given_z(z: Tensor, images=images) -> Tensor:  # codes (K, B, d) to (K, B)
            repeated = images.repeat(len(z), 1, 1, 1)
            return log_likelihood(decoder(z.flatten(0, 1)), repeated, sigma).view(z.shape[:2])

        mean, factor = common.laplace(decode, images.flatten(1), starts, residual, curvature)
        value, size = common.importance_sampling(log_px_given_z, mean, factor, k, rows=1000)
        values.append(value)
        effective_sizes.append(size)
    return torch.cat(values), torch.cat(effective_sizes)


def measure(decoder, start: tuple[Tensor, Tensor], x: Tensor, sigma: float, k: int,
            title: str) -> dict:
    """Every number of the gap for images x, from Gaussians start = (mu, logvar), (B, d) each.

    "start" is its ELBO, "elbo" that of the best Gaussian, "log_px" and "ess" are importance
    sampling around it, "mu" (B, d) its means, "seconds" the time to find it.
    """
    began = time.perf_counter()
    q = infer(decoder, x, *start, sigma, title=f"{title}: best Gaussians")
    q[0].cpu()  # the clock waits for the device
    seconds = time.perf_counter() - began
    value, size = log_px(decoder, x, q[0], sigma, k, f"{title}: log p(x)")
    return {"start": elbo(decoder, x, *start, sigma), "elbo": elbo(decoder, x, *q, sigma),
            "log_px": value, "ess": size, "mu": q[0], "seconds": seconds}


def gaps(found: dict, y: Tensor | None = None) -> dict:
    """The numbers of `measure`: means over images with their standard errors, nats.

    Of images that are stratified by labels y (B,) the error is that of a stratified mean.
    """

    def summary(values: Tensor) -> dict[str, float]:
        strata = [values]
        if y is not None:
            strata = [values[y == digit] for digit in y.unique()]
        variance = sum(len(v) * v.var() for v in strata) / len(values) ** 2
        return {"mean": values.mean().item(), "se": variance.sqrt().item()}

    start, best, value, size = (found[key] for key in ["start", "elbo", "log_px", "ess"])
    return {"start": summary(start), "elbo": summary(best), "log_px": summary(value),
            "start_gap": summary(best - start), "approximation_gap": summary(value - best),
            "ess_median": size.median().item(),
            "ess_below_50": (size < 50).double().mean().item()}


def fid_of_samples(config: dict, decoder: Decoder, mu: Tensor, logvar: Tensor, classifier,
                   device: torch.device) -> dict[str, float]:
    """FID of as many decoded codes as test images, from the prior and from a Gaussian with the
    moments of the training images' codes, whose means and log-variances are (N, d) each.
    """
    n, d = len(classifier.test_features), mu.shape[1]
    noise = torch.randn(n, d, generator=common.generator(config["seed"], "samples"))
    covariance = torch.cov(mu.double().T).view(d, d) + logvar.exp().mean(0).double().diag()
    fitted = mu.mean(0) + noise @ torch.linalg.cholesky(covariance).float().T
    fids = {}
    for name, codes in [("prior", noise), ("gaussian", fitted)]:
        features, _ = classifier.predict(common.in_chunks(decoder, codes, device))
        fids[name] = common.frechet_distance(features, classifier.test_features)
    return fids


def probe(z: Tensor, y: Tensor, z_test: Tensor, y_test: Tensor) -> float:
    """Test accuracy of a linear classifier on codes (logistic regression)."""
    from sklearn.linear_model import LogisticRegression  # takes a second

    model = LogisticRegression(C=0.1, max_iter=300).fit(z.numpy(), y.numpy())
    return float(model.score(z_test.numpy(), y_test.numpy()))


def explained_by_stroke_area(area: Tensor, values: Tensor) -> float:
    """R^2 of a parabola in the stroke area (the sum of an image's pixels) for log p(x)."""
    standard = ((area - area.mean()) / area.std()).double().numpy()
    coefficients = np.polyfit(standard, values.numpy(), 2)
    rest = values.numpy() - np.polyval(coefficients, standard)
    return float(1 - rest.var() / values.numpy().var())


def evaluate(run: common.Run, trained: dict, histories: dict, x_shown: Tensor,
             data: common.Data, indices: dict[str, Tensor], classifier, args,
             device: torch.device) -> dict:
    """The metrics of both models, log_probabilities.npy and .csv, and the pictures of a run."""
    config, sigma = run.config, run.config["sigma"]
    began = time.perf_counter()
    x_train, y_train = data.x_train[indices["train"]].to(device), data.y_train[indices["train"]]
    x, y = data.x_test[indices["test"]].to(device), data.y_test[indices["test"]]
    n_train = min(len(x) // 5, len(x_train))  # training images are in random order
    area = x.flatten(1).sum(1).cpu()
    pca = pca_posterior(x_train, config["latent_dim"], sigma)
    found, models = {}, {}
    for kind, (decoder, inference) in trained.items():
        if kind == "vae":
            with torch.no_grad():
                test_start = inference(x)
                codes = [inference(chunk) for chunk in x_train.split(1000)]
            mu, logvar = (torch.cat(parts) for parts in zip(*codes, strict=True))
        else:
            test_start = pca(x)
            mu, logvar = inference.table.chunk(2, dim=1)
        found[kind] = measure(decoder, test_start, x, sigma, args.codes, f"{kind}, test images")
        on_train = measure(decoder, (mu[:n_train], logvar[:n_train]), x_train[:n_train], sigma,
                           args.codes, f"{kind}, training images")
        print(f"{kind}: samples and probe ...", flush=True)

        def squared_error(codes: Tensor, images: Tensor, decoder=decoder) -> float:
            x_hat = common.in_chunks(decoder, codes, device)
            return (x_hat - images.cpu()).square().mean().item()

        mu, logvar, best_mu = mu.cpu(), logvar.cpu(), found[kind]["mu"].cpu()
        by_digit = [found[kind]["log_px"][y == digit] for digit in range(10)]
        seconds = [row["seconds"] for row in histories[kind]]
        models[kind] = {
            "gaps": {"test": gaps(found[kind], y), "train": gaps(on_train)},
            "fid": fid_of_samples(config, decoder, mu, logvar, classifier, device),
            "squared_error": {"start": squared_error(test_start[0].cpu(), x),
                              "optimised": squared_error(best_mu, x),
                              "training images": squared_error(mu[:n_train], x_train[:n_train])},
            "probe_accuracy": probe(
                mu, y_train, test_start[0].cpu() if kind == "vae" else best_mu, y),
            "log_px_by_digit": [{"mean": values.mean().item(),
                                 "se": (values.std() / math.sqrt(len(values))).item()}
                                for values in by_digit],
            "stroke_area_r2": explained_by_stroke_area(area, found[kind]["log_px"]),
            "seconds_to_infer": found[kind]["seconds"],
            "seconds_per_epoch": float(np.median(seconds)), "seconds_train": sum(seconds)}
    supervised = common.train_classifier(
        x_train, y_train, device, config["seed"], "classifier",
        steps=SUPERVISED_EPOCHS * max(1, len(x_train) // 128), augment="shift")
    is_right = supervised.predict(data.x_test)[1].argmax(1) == data.y_test
    train_features, _ = classifier.predict(data.x_train[:10_000])
    save_log_probabilities(run.folder, indices["test"], y, area, found)
    metrics = run.finish({
        "n_test": len(x), "n_train": n_train, "codes": args.codes, "models": models,
        "supervised_accuracy": is_right.double().mean().item(),
        "supervised_accuracy_subset": is_right[indices["test"]].double().mean().item(),
        "fid_floor": common.frechet_distance(train_features, classifier.test_features),
        "parameters": {"decoder": sum(w.numel() for w in trained["vae"][0].parameters()),
                       "encoder": sum(w.numel() for w in trained["vae"][1].parameters()),
                       "latents": trained["latent_opt"][1].table.numel()},
        "classifier": classifier.identity,
        "seconds_train": sum(model["seconds_train"] for model in models.values()),
        "seconds_evaluation": time.perf_counter() - began})
    log_probability_boxes(run.folder, found, y)
    figures(run, histories, x_shown.cpu())
    return metrics


def save_log_probabilities(folder: Path, test: Tensor, y: Tensor, area: Tensor,
                           found: dict) -> None:
    """log_probabilities.npy: float64 (2 models in MODELS' order, 10 digits, images of a digit),
    padded with NaN where digits differ in number; log_probabilities.csv: an image per line.
    """
    array = np.full((len(found), 10, int(y.bincount().max())), np.nan)
    lines = [{"test_index": int(test[i]), "digit": int(y[i]), "area": round(float(area[i]), 2)}
             for i in range(len(y))]
    for model, (kind, numbers) in enumerate(found.items()):
        for digit in range(10):
            values = numbers["log_px"][y == digit].numpy()
            array[model, digit, :len(values)] = values
        for i, line in enumerate(lines):
            for key in ["start", "elbo", "log_px", "ess"]:
                line[f"{kind}_{key}"] = round(float(numbers[key][i]), 4)
    buffer = io.BytesIO()
    np.save(buffer, array)
    common.save(folder / "log_probabilities.npy", buffer.getvalue())
    common.save(folder / "log_probabilities.csv", lines)


# ---------------------------------------------------------------------------- Figures and report

NAMES = ["setting", "model", "images"]
COLUMNS = [
    ("log p(x)", "log_px", 2), ("gap of the start", "start_gap", 2),
    ("approximation gap", "approximation_gap", 2), ("median ESS", "ess", 0),
    ("squared error", "squared_error", 4), ("FID", "fid", 2), ("probe accuracy", "probe", 3),
    ("seconds per epoch", "seconds_per_epoch", 1)]
LOG_PX, SQUARED_ERROR, FID = COLUMNS[0], COLUMNS[4], COLUMNS[5]
DIFFERENCES = [LOG_PX, COLUMNS[2], FID]
PAIRS = [(("latent optimisation", "test"), ("amortised VAE", "test")),
         (("amortised VAE", "training"), ("amortised VAE", "test")),
         (("latent optimisation", "training"), ("latent optimisation", "test"))]


def training_curves(folder: Path, history: list[dict]) -> None:
    """training_curves.png of the history of both models."""
    common.plot_history(folder / "training_curves.png", history, {
        "−ELBO, nats": ["vae_loss", "vae_val_loss", "latent_opt_loss"],
        "−log p(x | z), nats": ["vae_reconstruction", "latent_opt_reconstruction"],
        "KL, nats": ["vae_kl", "latent_opt_kl"]})


def log_probability_boxes(folder: Path, found: dict, y: Tensor) -> None:
    """log_probabilities.png: log p(x) of test images with labels y (B,), by digit."""
    figure = common.Figure(figsize=(9, 3.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), MODELS, strict=True):
        values = [found[kind]["log_px"][y == digit].numpy() for digit in range(10)]
        axes.boxplot(values, flierprops={"markersize": 2})
        axes.set_xticks(range(1, 11), range(10))
        axes.set(xlabel="digit", ylabel="log p(x), nats", title=MODELS[kind])
    common.save_figure(folder / "log_probabilities.png", figure)


def figures(run: common.Run, histories: dict, x: Tensor) -> None:
    """history.csv and curves of both models; for each shown epoch samples_epoch_<n>.png and
    comparison_epoch_<n>.png.
    """
    history = []
    for vae, latents in zip(histories["vae"], histories["latent_opt"], strict=True):
        row = {"epoch": vae["epoch"]}
        row |= {f"vae_{key}": value for key, value in vae.items() if key != "epoch"}
        row |= {f"latent_opt_{key}": value for key, value in latents.items() if key != "epoch"}
        history.append(row)
    common.save(run.folder / "history.csv", history)
    training_curves(run.folder, history)

    for epoch in sorted({*SHOWN_EPOCHS, run.config["epochs"]}):
        files = [run.folder / f"{kind}_epoch_{epoch}.pt" for kind in MODELS]
        if not files[0].exists():  # a shorter run
            continue
        vae, latents = (torch.load(file, map_location="cpu", weights_only=True)
                        for file in files)
        common.save_grid(run.folder / f"samples_epoch_{epoch}.png",
                         torch.cat([vae["samples"], latents["samples"]]), 10,
                         f"samples from the prior, epoch {epoch}",
                         ["amortised", "", "", "optimised", "", ""])
        rows = []
        for part in [slice(None, N_SHOWN), slice(N_SHOWN, None)]:
            rows += [x[part], vae["shown"][part], latents["shown"][part]]
        common.save_grid(run.folder / f"comparison_epoch_{epoch}.png", torch.cat(rows), N_SHOWN,
                         f"epoch {epoch}: original, amortised, optimised",
                         ["training", "amortised", "optimised", "test", "amortised", "optimised"])


def rows(runs: list[dict]) -> dict:
    """Row name -> seed -> numbers: the one place where JSON becomes a table."""
    table = {}
    for run in runs:
        metrics, setting = run["metrics"], variant(run["config"]).replace("_", " ")
        seed = run["config"]["seed"]
        real = {"fid": metrics["fid_floor"], "probe": metrics["supervised_accuracy_subset"]}
        table.setdefault((setting, "real images, supervised", "test"), {})[seed] = real
        for kind, title in MODELS.items():
            model = metrics["models"][kind]
            for part, images in [("test", "test"), ("train", "training")]:
                found = model["gaps"][part]
                numbers = {"ess": found["ess_median"], "ess_below_50": found["ess_below_50"]}
                for key in ["start", "elbo", "log_px", "start_gap", "approximation_gap"]:
                    numbers[key], numbers[f"{key}_se"] = found[key]["mean"], found[key]["se"]
                if part == "test":
                    numbers |= {"squared_error": model["squared_error"]["optimised"],
                                "squared_error_start": model["squared_error"]["start"],
                                "fid": model["fid"]["prior"], "fid_gaussian":
                                model["fid"]["gaussian"], "probe": model["probe_accuracy"],
                                "seconds_per_epoch": model["seconds_per_epoch"],
                                "stroke_area_r2": model["stroke_area_r2"]}
                    for digit, values in enumerate(model["log_px_by_digit"]):
                        numbers[f"log_px_{digit}"] = values["mean"]
                table.setdefault((setting, title, images), {})[seed] = numbers
    return table


def answer(table: dict, setting: str) -> list[str]:
    """At most six lines: the two gaps, comparisons, the digits."""
    vae = table[setting, MODELS["vae"], "test"]
    lines = [f"What the encoder loses on test images: {common.cell(vae, 'start_gap', 2)} nats by "
             f"amortisation, {common.cell(vae, 'approximation_gap', 2)} nats by the shape of a "
             "diagonal Gaussian (ideal 0)."]
    a, b = ((setting, *name) for name in PAIRS[0])
    for column in [LOG_PX, SQUARED_ERROR, FID]:
        lines.append(common.verdict(table, a, b, *column))
    by_digit = [np.mean([numbers[f"log_px_{digit}"] for numbers in vae.values()])
                for digit in range(10)]
    most, least = int(np.argmax(by_digit)), int(np.argmin(by_digit))
    lines.append(
        f"Mean log p(x) by digit, amortised VAE: highest for {most} ({by_digit[most]:.1f} nats), "
        f"lowest for {least} ({by_digit[least]:.1f} nats). Stroke area explains "
        f"{common.cell(vae, 'stroke_area_r2', 2)} of its variance over images (R²).")
    return [line.replace("-", "−") for line in lines]


def report(root: Path) -> None:
    """Write report.md and results.csv of the finished runs below root; print the answer and the
    table.
    """
    runs = common.finished_runs(root)
    table = rows(runs)
    settings = {}
    for run in runs:
        settings.setdefault(variant(run["config"]).replace("_", " "), []).append(run)
    setting = max(settings, key=lambda name: len(settings[name]))  # the page's: of the most seeds
    shown = {name: seeds for name, seeds in table.items() if name[0] == setting}
    lines = "\n".join(f"- {line}" for line in answer(table, setting))
    results = common.results_table(shown, NAMES, COLUMNS)
    print(f"\n{lines}\n\n{results}")
    folder, epochs = settings[setting][0]["folder"], settings[setting][0]["config"]["epochs"]
    names = ["training_curves", "log_probabilities", f"comparison_epoch_{epochs}",
             f"samples_epoch_{epochs}"]
    counts = settings[setting][0]["metrics"]
    below_50 = np.mean([run["metrics"]["models"]["latent_opt"]["gaps"]["test"]["ess_below_50"]
                        for run in settings[setting]])
    pairs = [((setting, *a), (setting, *b)) for a, b in PAIRS]
    common.write_report(root, [
        f"# Amortised inference against latent optimisation on {common.DATASETS[root.name]}",
        "What does an encoder lose against optimising the latents of every image by themselves?",
        f"**Answer.**\n\n{lines}", results,
        f"Nats per image, of {counts['n_test']} test and {counts['n_train']} training images, "
        f"{counts['codes']} importance samples each; ± is the standard deviation over n seeds. The "
        "start of the amortised VAE is the encoder's Gaussian: its gap is the amortisation gap. "
        "Latent optimisation starts from PCA on test images and has its trained latents on "
        "training images. Its probe learns from the trained latents and is tested on optimised "
        f"ones. Its ESS is below 50 for {100 * below_50:.0f} % of the test images, whose log p(x) "
        "may be too low. Standard errors over images and means by digit are in `results.csv`. "
        f"{common.glossary(root)}",
        common.paired_table(table, pairs, DIFFERENCES),
        *common.image_links(root, [folder / f"{name}.png" for name in names]),
        common.how_made(runs)], table, NAMES)


# ------------------------------------------------------------------------------------------ main


def main(argv=None) -> dict:
    args = parse_args(argv)
    if args.report_only:
        report(Path(args.out_dir) / "latent_opt" / (args.dataset or "mnist"))
        return {}
    device, data, root, configs = common.begin("latent_opt", args, configurations)
    for config in configs:  # check all of them before anything is written
        split(data, config, args.test_images)
    classifier = common.load_classifier(data, device)

    def train_and_measure(run: common.Run) -> dict:
        indices = split(data, run.config, args.test_images)
        x_train, x_val = (data.x_train[indices[key]].to(device) for key in ["train", "val"])
        shown = data.x_test[stratified(data.y_test, N_SHOWN, "shown")]
        x_shown = torch.cat([x_train[:N_SHOWN], shown.to(device)])
        trained, histories = {}, {}
        for kind in MODELS:
            part = common.Run(run.folder / kind, run.config, save_every=10,
                              tensorboard=args.tensorboard)
            part.epochs_to_come = 2 * run.epochs_to_come
            if kind == "vae":
                part.epochs_to_come += run.config["epochs"]
            trained[kind] = train(part, kind, x_train, x_val, x_shown, args.compile)
            histories[kind] = part.history
        return evaluate(run, trained, histories, x_shown, data, indices, classifier, args, device)

    return common.run_all(configs, root, variant, args, device, train_and_measure, report,
                          measured={"codes": args.codes, "n_test": args.test_images})


if __name__ == "__main__":
    common.guard(main)
