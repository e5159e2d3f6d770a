"""What does an encoder lose against optimising the latents of every image by themselves?

Two models have decoders of one kind and the same first weights, each trained with its own codes.
The amortised VAE has a convolutional encoder; latent optimisation gives each training image a free
Gaussian over codes, which is fitted together with the decoder. On test images, under each model's
own decoder: the gap between the bound of its start (the encoder's, or that of PCA), the best
Gaussian's bound and log p(x), which importance sampling around each image's own optimum estimates.
A classifier is the supervised baseline.

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
 4. log p(x) by importance sampling with a full Gaussian, whose curvature is averaged over its own
    codes rather than taken at the mode, and a tenth of codes from the prior; the source does not
    say how.
 5. Samples are decoder means: pixel noise of 0.4 would drown them.

References: Kingma and Welling 2014, arXiv:1312.6114; Bojanowski et al. 2018, arXiv:1707.05776
(latent optimisation); Cremer et al. 2018, arXiv:1801.03558 (the two gaps); Khan et al.
2018, arXiv:1806.04854 (the curvature of the proposal); Tipping and Bishop 1999 (probabilistic PCA).
"""

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
from common_v1 import get

INFERENCE_STEPS = 300
SUPERVISED_EPOCHS = 12
MODELS = {"vae": "amortised VAE", "latent_opt": "latent optimisation"}

# ------------------------------------------------------------------------------------------- Config


def parse_args(argv=None):
    p = common.Parser(__doc__, epochs=30, batch_size=64, lr=1e-3)
    flag, number = p.add_argument, common.number
    flag("--latent-lr", type=number(float, 0, above=True), default=0.01,
         help="rate of the optimised latents")
    flag("--latent-steps", type=number(int, 1), default=2,
         help="steps of a batch's latents for each step of the decoder")
    flag("--latent-dim", type=number(int, 1, 784), default=200, help="dimensions of z")
    flag("--sigma", type=number(float, 1e-3), default=0.4,
         help="standard deviation of a pixel given z")
    flag("--test-images", type=number(int, 20), default=1000,
         help="stratified test images whose gaps and log p(x) are measured; a fifth as many of "
         "training")
    flag("--codes", type=number(int, 20), default=5000, help="importance samples per image")
    return p.parse_args(argv)


def grid(args, dataset: str) -> list[dict]:
    """The configuration of every run asked for: one for each seed."""
    return [{"dataset": dataset, "latent_dim": args.latent_dim, "sigma": args.sigma,
             "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr,
             "latent_lr": args.latent_lr, "latent_steps": args.latent_steps,
             "train_size": args.train_size or 20_000, "seed": seed}
            for seed in dict.fromkeys(args.seeds)]


def variant(config: dict) -> str:
    """A run's folder: 'd200_sigma0.4'."""
    return f"d{config['latent_dim']}_sigma{config['sigma']:g}"


def stratified(y: Tensor, n: int, *key: int | str) -> Tensor:
    """Indices of n images, as many of each class as of any other, in random order.

    Raises UserError if a class has too few.
    """
    g, chosen = common.generator(*key), []
    for digit in range(10):
        of = (y == digit).nonzero()[:, 0]
        m = n // 10 + (digit < n % 10)
        if not 0 < m <= len(of):
            raise common.UserError(f"{n} stratified images need {m} of class {digit}, between 1 "
                                   f"and {len(of)} are there; take another --train-size or "
                                   "--test-images")
        chosen.append(of[torch.randperm(len(of), generator=g)[:m]])
    return torch.cat(chosen)[torch.randperm(n, generator=g)]


def split(data: common.Data, config: dict, n_test: int) -> dict[str, Tensor]:
    """Indices of the training images, stratified, of 5,000 others for validation, and of the test
    images whose gaps are measured: stratified, sorted by digit, the same for every seed.
    """
    train = stratified(data.y_train, config["train_size"], config["seed"], "split")
    free = (~torch.isin(torch.arange(len(data.y_train)), train)).nonzero()[:, 0]
    if len(free) < 5000:
        raise common.UserError(f"--train-size {config['train_size']} leaves {len(free)} images "
                               f"for validation, which needs 5000; take at most "
                               f"{len(data.y_train) - 5000}")
    order = torch.randperm(len(free), generator=common.generator(config["seed"], "validation"))
    test = stratified(data.y_test, n_test, "test")
    return {"train": train, "val": free[order[:5000]],
            "test": test[data.y_test[test].argsort(stable=True)]}


# -------------------------------------------------------------------------------------------- Model


class Encoder(nn.Module):
    """q(z | x): images (B, 1, 28, 28) to mean and log-variance, (B, d) each."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.SiLU(),  # (B, 16, 14, 14)
            nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.SiLU(), nn.Flatten(),  # (B, 32 * 7 * 7)
            nn.Linear(1568, 256), nn.SiLU(), nn.Linear(256, 2 * latent_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x).chunk(2, dim=1)


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
        return self.body(z)


# ---------------------------------------------------------------------------------------- Objective


def log_likelihood(x_hat: Tensor, x: Tensor, sigma: float) -> Tensor:
    """log N(x; x_hat, sigma^2 I) in nats, (B,), of images x (B, 1, 28, 28) or one for all x_hat."""
    square = (x_hat - x).flatten(1).square().sum(1)
    return -0.5 * square / sigma**2 - 0.5 * x[0].numel() * math.log(2 * math.pi * sigma**2)


def kl_nats(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, diag e^logvar) || N(0, I)) of each image, (B,), nats."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def negative_elbo(decoder, x: Tensor, mu: Tensor, logvar: Tensor, noise: Tensor,
                  sigma: float) -> Tensor:
    """(-ELBO, -log p(x | z), KL) of each image with noise ~ N(0, I) like mu: (3, B), nats."""
    z = mu + noise * (0.5 * logvar).exp()
    reconstruction, kl = -log_likelihood(decoder(z), x, sigma), kl_nats(mu, logvar)
    return torch.stack([reconstruction + kl, reconstruction, kl])


class RowAdam:
    """Adam on the rows of a table (N, D): a step touches the rows given to it and no other.

    Every row counts its own steps for the bias correction, which SparseAdam does not. Source:
    Kingma and Ba 2015, arXiv:1412.6980, algorithm 1. Eager: rows are gathered and scattered.
    """

    def __init__(self, table: Tensor, lr: float, beta2: float = 0.999):
        self.lr, self.table, self.beta2 = lr, table, beta2
        self.mean, self.square = torch.zeros_like(table), torch.zeros_like(table)
        self.count = torch.zeros(len(table), 1, device=table.device)

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """One step of the rows (B,) along their gradient (B, D)."""
        count = self.count[rows] + 1
        mean = 0.9 * self.mean[rows] + 0.1 * gradient
        square = self.beta2 * self.square[rows] + (1 - self.beta2) * gradient.square()
        self.count[rows], self.mean[rows], self.square[rows] = count, mean, square
        scale = (square / (1 - self.beta2**count)).sqrt_().add_(1e-8)
        self.table[rows] -= self.lr * mean / (1 - 0.9**count) / scale

    def state_dict(self) -> dict:
        return {k: getattr(self, k) for k in ["table", "mean", "square", "count"]}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)


def pca_posterior(x: Tensor, latent_dim: int, sigma: float):
    """The posterior of probabilistic PCA with this noise: a function of images, (B, d) mean and
    log-variance. Directions with less variance than the noise stay at the prior.

    x (N, 1, 28, 28) are the images it is fitted to. Source: Tipping and Bishop 1999, eq. 6 and 7.
    """
    flat = x.flatten(1).cpu().double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    values, vectors = values.flip(0)[:latent_dim], vectors.flip(1)[:, :latent_dim]
    signal = values > sigma**2
    pull = (vectors * torch.where(signal, (values - sigma**2).clamp(min=0).sqrt() / values, 0))
    logvar = torch.where(signal, (sigma**2 / values).log(), 0)
    mean, pull, logvar = (v.float().to(x.device) for v in (flat.mean(0), pull, logvar))
    return lambda x: ((x.flatten(1) - mean) @ pull, logvar.expand(len(x), -1))


# -------------------------------------------------------------------------------------------- Train


def train(kind: str, config: dict, x: Tensor, x_val: Tensor, folder: Path, args) -> tuple:
    """Train "vae" or "latent_opt", or continue; (decoder, encoder or latents, history).

    Latents are a RowAdam whose table holds the mean and the log-variance of every training image,
    (N, 2 d). Every epoch seeds its own streams. Raises UserError when a loss is not finite.
    """
    seed, n, d = config["seed"], len(x), config["latent_dim"]
    torch.manual_seed(common.seed_from(seed, "decoder"))  # the same first weights for both
    decoder = Decoder(d).to(x.device, memory_format=torch.channels_last)
    if kind == "vae":
        torch.manual_seed(common.seed_from(seed, "encoder"))
        inference = Encoder(d).to(x.device, memory_format=torch.channels_last)
        parameters = [*decoder.parameters(), *inference.parameters()]
    else:
        inference = RowAdam(torch.cat(pca_posterior(x, d, config["sigma"])(x), 1),
                            config["latent_lr"])
        parameters = list(decoder.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config["lr"], fused=x.device.type != "mps")
    parts = {"decoder": decoder, "inference": inference, "optimizer": optimizer}
    (folder / kind).mkdir(exist_ok=True)
    history = common.restore(folder / kind, config, parts)

    def step_vae(i: Tensor) -> Tensor:
        batch = x[i]
        mu, logvar = inference(batch)
        losses = negative_elbo(decoder, batch, mu, logvar, torch.randn_like(mu),
                               config["sigma"]).mean(1)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()
        return losses.detach()

    def step_latent_opt(i: Tensor) -> Tensor:
        batch = x[i]
        for k in range(config["latent_steps"]):
            last = k == config["latent_steps"] - 1
            q = inference.table[i].requires_grad_()
            mu, logvar = q.chunk(2, dim=1)
            losses = negative_elbo(decoder, batch, mu, logvar, torch.randn_like(mu),
                                   config["sigma"]).mean(1)
            gradients = torch.autograd.grad(losses[0], [q, *parameters] if last else [q])
            inference.step(i, gradients[0] * len(i))  # of each image's own loss
        for w, gradient in zip(parameters, gradients[1:], strict=True):
            w.grad = gradient
        optimizer.step()
        return losses.detach()

    # latents stay eager: each step moves other rows
    step = step_latent_opt if kind == "latent_opt" else common.fast_step(
        step_vae, parts, x.device, args.compile)
    board = common.summary_writer(folder / "logs" / kind) if args.tensorboard else None
    title = f"{variant(config)}/seed_{seed} {kind}"
    bar = tqdm(range(1, config["epochs"] + 1), title, initial=len(history), disable=None)
    for epoch in range(len(history) + 1, config["epochs"] + 1):
        began = time.perf_counter()
        order = torch.randperm(n, generator=common.generator(seed, "order", epoch)).to(x.device)
        torch.manual_seed(common.seed_from(seed, "noise", epoch))
        losses = torch.stack([step(i) for i in order.split(config["batch_size"])])
        if not losses.isfinite().all():
            raise common.diverged(title, folder, epoch, losses)
        row = {"epoch": epoch, **dict(zip(["loss", "reconstruction", "kl"],
                                          losses.mean(0).tolist(), strict=True))}
        row["seconds"] = time.perf_counter() - began
        if kind == "vae":
            torch.manual_seed(common.seed_from(seed, "validation"))
            with torch.no_grad():
                mu, logvar = inference(x_val)
                row["val_loss"] = negative_elbo(decoder, x_val, mu, logvar, torch.randn_like(mu),
                                                config["sigma"])[0].mean().item()
        history.append(row)
        if epoch in shown_epochs(config):  # before the checkpoint: an epoch done has its file
            common.save_torch(folder / f"{kind}_epoch_{epoch}.pt", {
                "config": config, "epoch": epoch, "decoder": decoder.state_dict(), "inference":
                inference.state_dict() if kind == "vae" else {"table": inference.table}})
        common.save_epoch(folder / kind, config, history, parts, False, board)
        bar.set_postfix(loss=f"{row['loss']:.2f}", refresh=False)
        bar.update()
    bar.close()
    return decoder.eval().requires_grad_(False), inference, history


def shown_epochs(config: dict) -> list[int]:
    return sorted({e for e in [1, 5, 10, 20, 30] if e <= config["epochs"]} | {config["epochs"]})


# ----------------------------------------------------------------------------------------- Evaluate


def infer(decoder, x: Tensor, mu: Tensor, logvar: Tensor, sigma: float,
          steps: int | None = None) -> tuple[Tensor, Tensor]:
    """The diagonal Gaussian of each image with the best ELBO under a fixed decoder, from a start.

    Adam with a cosine and a short memory (0.95: gradients shrink by orders of magnitude on the
    way, and 0.999 would leave variances too wide after 300 steps). All images share each step's
    noise, so that the result for one does not depend on the others. The decoder is in eval mode and
    left as it is. Means and log-variances, (B, d) each.
    """
    assert not getattr(decoder, "training", False), "inference needs the decoder in eval mode"
    g, (n, d), steps = common.generator("inference"), mu.shape, steps or INFERENCE_STEPS
    q = RowAdam(torch.cat([mu, logvar], 1).detach().clone(), lr=0.1, beta2=0.95)
    rows = torch.arange(n, device=x.device)
    for t in range(steps):
        q.lr = 0.1 * 0.5 * (1 + math.cos(math.pi * t / steps))
        noise = torch.randn(4, 1, d, generator=g).to(x.device)
        for i in rows.split(250):
            table = q.table[i].requires_grad_()
            mu, logvar = (v.repeat(4, 1) for v in table.chunk(2, dim=1))
            loss = negative_elbo(decoder, x[i].repeat(4, 1, 1, 1), mu, logvar,
                                 noise.expand(-1, len(i), -1).flatten(0, 1), sigma)[0].sum()
            q.step(i, torch.autograd.grad(loss, table)[0])
    return q.table.chunk(2, dim=1)


@torch.no_grad()
def elbo(decoder, x: Tensor, mu: Tensor, logvar: Tensor, sigma: float,
         samples: int = 200) -> Tensor:
    """The ELBO of each image, (B,) float64 on the CPU; the same noise for any q of an image."""
    g, total = common.generator("elbo"), torch.zeros(len(x), dtype=torch.float64)
    for _ in range(samples):
        noise = torch.randn(mu.shape, generator=g).to(x.device)
        total -= negative_elbo(decoder, x, mu, logvar, noise, sigma)[0].cpu().double()
    return total / samples


def log_px(decoder, x: Tensor, mu: Tensor, sigma: float, k: int) -> tuple[Tensor, Tensor]:
    """log p(x) of each image by importance sampling around the mean mu (B, d) of its best q, and
    the effective sample size: (B,) float64 on the CPU each.
    """
    torch.manual_seed(common.seed_from("log p(x)"))  # whatever was drawn before
    found = []
    for c, m in zip(x.split(20), mu.split(20), strict=True):
        proposal = common.laplace(lambda z: decoder(z).flatten(1), c.flatten(1), m,
                                  lambda x_hat, x: (x - x_hat) / sigma**2,
                                  lambda x_hat: torch.full_like(x_hat, 1 / sigma**2))
        log_likelihood_of = lambda z, c=c: log_likelihood(
            decoder(z.flatten(0, 1)), c.repeat(len(z), 1, 1, 1), sigma).view(z.shape[:2])
        found.append(common.importance_sampling(log_likelihood_of, *proposal, k, rows=1000))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def in_chunks(f, x: Tensor, device) -> Tensor:
    """f of many images or codes, on the CPU."""
    with torch.no_grad():
        return torch.cat([f(c.to(device)).cpu() for c in x.split(1000)])


def measure(decoder, start, x: Tensor, sigma: float, k: int) -> dict[str, Tensor]:
    """Every number of the gap for images x, from the q `start` = (mu, logvar): (B,) each, nats.

    "start" is the ELBO of that q, "elbo" of the optimised one, "log_px" and "ess" are importance
    sampling around it; "mu" (B, d) are the optimised means.
    """
    began = time.perf_counter()
    q = infer(decoder, x, *start, sigma)
    q[0].cpu()  # the clock waits for the device
    seconds = time.perf_counter() - began
    with common.full_precision():
        value, ess = log_px(decoder, x, q[0], sigma, k)
        return {"start": elbo(decoder, x, *start, sigma), "elbo": elbo(decoder, x, *q, sigma),
                "log_px": value, "ess": ess, "mu": q[0], "seconds": torch.tensor(seconds)}


def gaps(found: dict[str, Tensor], y: Tensor | None = None) -> dict:
    """The gaps of `measure`, as numbers: means over images with their standard errors, nats; of
    images that are stratified by labels y (B,) the error of a stratified mean.
    """
    def summary(values: Tensor) -> dict[str, float]:
        parts = [values] if y is None else [values[y == digit] for digit in y.unique()]
        variance = sum(len(v) * v.var() for v in parts) / len(values) ** 2
        return {"mean": float(values.mean()), "se": float(variance.sqrt())}

    start, elbo, log_px, ess = (found[key] for key in ["start", "elbo", "log_px", "ess"])
    share = lambda condition: float(condition.double().mean())
    return {"start": summary(start), "elbo": summary(elbo), "log_px": summary(log_px),
            "start_gap": summary(elbo - start), "approximation_gap": summary(log_px - elbo),
            "better_share": share(elbo > start), "ess_median": float(ess.median()),
            "ess_below_50": share(ess < 50), "below_elbo_share": share(log_px < elbo),
            "sampling_error": float((1 / ess).sum().sqrt() / len(ess))}


def compare_starts(decoder, starts: dict, x: Tensor, sigma: float) -> dict[str, dict]:
    """Mean ELBO of images x after 30 and all steps from each start: {start: {steps: nats}}."""
    return {name: {str(steps): float(elbo(decoder, x, *infer(decoder, x, *start(x), sigma, steps),
                                          sigma).mean()) for steps in (30, INFERENCE_STEPS)}
            for name, start in starts.items()}


def digit_mean(values: Tensor, control: Tensor, control_all: Tensor) -> dict[str, float]:
    """Mean over a digit of what is known for some of its images, values (n,), and its standard
    error, with the help of a control that is known for those (n,) and for all of them (N,).

    The regression estimator: mean + b (mean of the control over all - over these), whose variance
    is that of the residual over n plus that of b times the control over N. Source: Cochran 1977,
    chapter 12 (double sampling).
    """
    centred, enough = control - control.mean(), len(values) >= 10  # else the plain mean
    b = (centred * values).sum() / centred.square().sum() * enough
    rest = values - values.mean() - b * centred
    free = max(1, len(values) - 1 - enough)
    return {"mean": float(values.mean() + b * (control_all.mean() - control.mean())),
            "se": float((rest.square().sum() / free / len(values)
                         + b**2 * control_all.var() / len(control_all)).sqrt())}


def fid_of_samples(config: dict, decoder, mu: Tensor, logvar: Tensor, classifier, f_test: Tensor,
                   device) -> dict[str, float]:
    """FID of as many decoded codes as test images, from the prior and from a Gaussian with the
    moments of the training images' codes, mean and variances (N, d) of each.
    """
    d = mu.shape[1]
    noise = torch.randn(len(f_test), d, generator=common.generator(config["seed"], "samples"))
    cov = torch.cov(mu.double().T).view(d, d) + logvar.exp().mean(0).double().diag()
    fitted = mu.mean(0) + noise @ torch.linalg.cholesky(cov).float().T
    look = lambda z: classifier.look(in_chunks(decoder, z, device))[0]
    return {name: common.frechet_distance(look(z), f_test)
            for name, z in [("prior", noise), ("gaussian", fitted)]}


def probe(z: Tensor, y: Tensor, z_test: Tensor, y_test: Tensor) -> float:
    """Test accuracy of a linear classifier on codes (logistic regression)."""
    from sklearn.linear_model import LogisticRegression  # a second to import

    model = LogisticRegression(C=0.1, max_iter=300).fit(z.numpy(), y.numpy())
    return float(model.score(z_test.numpy(), y_test.numpy()))


def ink_test(ink: Tensor, y: Tensor, log_px: Tensor) -> dict:
    """How much of the variance of log p(x) stroke area (the sum of pixels), the digit and both
    explain; whether the digit adds to the area (F test; p is 1 without more images than columns).

    Least squares on the area and its square; on the digit; on those with a slope for each digit.
    """
    from scipy.stats import f  # comes with scikit-learn

    t = ((ink - ink.mean()) / ink.std()).double()
    one, target = F.one_hot(y, 10).double(), log_px.double() - log_px.double().mean()
    square, total, rest = t.square()[:, None], target.square().sum(), {}
    for key, columns in {"ink": torch.cat([torch.ones_like(square), t[:, None], square], 1),
                         "digit": one,
                         "both": torch.cat([one, one * t[:, None], square], 1)}.items():
        fit = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution
        rest[key] = (target - (columns @ fit)[:, 0]).square().sum()
    free = len(y) - 21
    p = f.sf(float((rest["ink"] - rest["both"]) / 18 / (rest["both"] / free)), 18, free)
    return {**{f"r2_{key}": float(1 - left / total) for key, left in rest.items()},
            "p": float(p) if free > 0 else 1.0, "slope": float((t * target).sum() / (len(t) - 1))}


def evaluate(config: dict, args, data, part, trained: dict, real, classifier, folder,
             device) -> dict:
    """final_metrics.json, log_probabilities.npy and .csv, and the pictures of a finished run.

    `real` holds the metric classifier's features of the test and of 10,000 training images. The
    last epoch is used; nothing is selected, validation images only draw a curve.
    """
    began, sigma, d = time.perf_counter(), config["sigma"], config["latent_dim"]
    x_train, y_train = data.x_train[part["train"]].to(device), data.y_train[part["train"]]
    x, y = data.x_test[part["test"]].to(device), data.y_test[part["test"]]
    some = torch.arange(min(len(x) // 5, len(x_train)))  # training images, random order
    order = torch.randperm(len(x), generator=common.generator("few"))
    few, ink = order[:len(some)], x.flatten(1).sum(1).cpu()

    encode = torch.no_grad()(lambda x: torch.cat(
        [trained["vae"][1].body(c) for c in x.split(1000)]).chunk(2, dim=1))
    pca, table = pca_posterior(x_train, d, sigma), trained["latent_opt"][1].table
    zero = lambda x: (torch.zeros(len(x), d, device=x.device),) * 2
    starts = {"vae": {"zero": zero, "PCA": pca, "encoder": encode},
              "latent_opt": {"zero": zero, "PCA": pca}}
    control = torch.cat([elbo(trained["vae"][0], c, *encode(c), sigma, 10)
                         for c in data.x_test.to(device).split(1000)])
    found, models = {}, {}
    for name in MODELS:
        decoder, start = trained[name][0], list(starts[name].values())[-1]
        q_train = encode(x_train) if name == "vae" else table.chunk(2, dim=1)
        found[name] = of = measure(decoder, start(x), x, sigma, args.codes)
        on_train = measure(decoder, [v[some] for v in q_train], x_train[some], sigma, args.codes)
        error = lambda z, x: float((in_chunks(decoder, z, device) - x.cpu()).square().mean())
        mu, logvar = (v.cpu() for v in q_train)
        models[name] = {
            "gaps": {"test": gaps(of, y), "train": gaps(on_train)},
            "starts": compare_starts(decoder, starts[name], x[few], sigma),
            "fid": fid_of_samples(config, decoder, mu, logvar, classifier, real[0], device),
            "squared_error": {"start": error(start(x)[0], x), "optimised": error(of["mu"], x),
                              "training images": error(mu[some], x_train[some])},
            "probe_accuracy": probe(mu, y_train, (start(x)[0] if name == "vae" else of["mu"]).cpu(),
                                    y),
            "log_px_by_digit": [
                digit_mean(of["log_px"][y == digit], control[part["test"]][y == digit],
                           control[data.y_test == digit]) for digit in range(10)],
            "ink": ink_test(ink, y, of["log_px"]), "seconds_to_infer": float(of["seconds"]),
            "seconds_per_epoch": float(np.median([row["seconds"] for row in trained[name][2]])),
            "seconds_train": sum(row["seconds"] for row in trained[name][2])}
    timed = time.perf_counter()
    encode(x)[0].cpu()  # the clock waits for the device
    models["vae"]["seconds_to_encode"] = time.perf_counter() - timed
    timed = time.perf_counter()
    supervised = common.train_classifier(
        x_train, y_train, device, config["seed"], "classifier",
        steps=SUPERVISED_EPOCHS * max(1, len(x_train) // 128), augment="shift")
    seconds_supervised = time.perf_counter() - timed
    right = supervised.look(data.x_test)[1].argmax(1) == data.y_test
    metrics = {
        "n_test": len(x), "n_train": len(some), "codes": args.codes, "models": models,
        "supervised_accuracy": float(right.double().mean()),
        "supervised_accuracy_subset": float(right[part["test"]].double().mean()),
        "fid_floor": common.frechet_distance(real[1], real[0]),
        "parameters": {"decoder": sum(w.numel() for w in trained["vae"][0].parameters()),
                       "encoder": sum(w.numel() for w in trained["vae"][1].parameters()),
                       "latents": table.numel()},
        "classifier": {"accuracy": classifier.accuracy, "sha256": classifier.sha256},
        "seconds_train": sum(m["seconds_train"] for m in models.values()),
        "seconds_supervised": seconds_supervised,
        "seconds_evaluation": time.perf_counter() - began,
        "environment": common.environment(device)}
    save_log_probabilities(folder, part["test"], y, ink, found)
    figures(config, folder, trained, found, y, x[order[:10]], x_train[:10], pca, device)
    common.save_history(folder / "history.csv", [
        {"epoch": a["epoch"], **{f"vae_{k}": v for k, v in a.items() if k != "epoch"},
         **{f"latent_opt_{k}": v for k, v in b.items() if k != "epoch"}}
        for a, b in zip(trained["vae"][2], trained["latent_opt"][2], strict=True)])
    return metrics


def save_log_probabilities(folder: Path, test: Tensor, y: Tensor, ink: Tensor,
                           found: dict) -> None:
    """log_probabilities.npy: float64 (2 models in MODELS' order, 10 digits, images of a digit),
    padded with NaN where digits differ in number; log_probabilities.csv: an image per line.
    """
    array = np.full((len(found), 10, int(y.bincount().max())), np.nan)
    for i, of in enumerate(found.values()):
        for digit in range(10):
            array[i, digit, :(y == digit).sum()] = of["log_px"][y == digit].numpy()
    with common.atomic(folder / "log_probabilities.npy") as temporary, open(temporary, "wb") as f:
        np.save(f, array)
    common.save_history(folder / "log_probabilities.csv", [
        {"test_index": int(test[i]), "digit": int(y[i]), "ink": round(float(ink[i]), 2),
         **{f"{name}_{key}": round(float(of[key][i]), 4) for name, of in found.items()
            for key in ["start", "elbo", "log_px", "ess"]}} for i in range(len(y))])


# ------------------------------------------------------------------------------- Figures and report


def figures(config: dict, folder: Path, trained: dict, found: dict, y: Tensor, x_test: Tensor,
            x_train: Tensor, pca, device) -> None:
    """training_curves.png, log_probabilities.png, and for the shown epochs recon_, samples_,
    latent_opt_recon_ and comparison_epoch_<n>.png.
    """
    figure = Figure(figsize=(11, 3))
    titles = {"loss": "−ELBO", "reconstruction": "−log p(x | z)", "kl": "KL"}
    epochs = range(1, config["epochs"] + 1)
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for name, label in MODELS.items():
            axes.plot(epochs, [row[key] for row in trained[name][2]], label=label)
        if key == "loss":
            axes.plot(epochs, [row["val_loss"] for row in trained["vae"][2]], "C0:",
                      label="amortised, validation")
        late = [row[key] for *_, history in trained.values() for row in history[1:] or history]
        margin = 0.05 * (max(late) - min(late)) + 1e-6  # the first epoch would flatten the rest
        axes.set(xlabel="epoch", ylabel="nats per image", title=title,
                 ylim=(min(late) - margin, max(late) + margin))
        axes.legend(fontsize=8)
    figure.tight_layout()
    common.save_figure(folder / "training_curves.png", figure)

    figure = Figure(figsize=(9, 3.5))
    for axes, (name, of) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        axes.boxplot([of["log_px"][y == digit].numpy() for digit in range(10)],
                     flierprops={"markersize": 2})
        axes.set_xticks(range(1, 11), range(10))
        axes.set(xlabel="digit", ylabel="log p(x) (nats)", title=MODELS[name])
    figure.tight_layout()
    common.save_figure(folder / "log_probabilities.png", figure)

    d, n, both = config["latent_dim"], len(x_train), torch.cat([x_train, x_test])
    z = torch.randn(30, d, generator=common.generator("shown")).to(device)
    encoder, decoder = (net.to(device).eval().requires_grad_(False)
                        for net in (Encoder(d), Decoder(d)))
    for epoch in shown_epochs(config):
        rebuilt, samples, at = {}, [], f"after epoch {epoch}"
        for name, file in [("vae", "recon"), ("latent_opt", "latent_opt_recon")]:
            saved = common.load_torch(folder / f"{name}_epoch_{epoch}.pt")
            decoder.load_state_dict(saved["decoder"])
            if name == "vae":
                encoder.load_state_dict(saved["inference"])
                mu = encoder(both)[0]
            else:
                own = saved["inference"]["table"][:n, :d].to(device)
                mu = torch.cat([own, infer(decoder, x_test, *pca(x_test), config["sigma"])[0]])
            rebuilt[name] = decoder(mu)
            samples.append(decoder(z))
            common.save_grid(folder / f"{file}_epoch_{epoch}.png", torch.cat([
                x_test, rebuilt[name][n:]]), len(x_test),
                f"{MODELS[name]}, {at}: test images above their reconstructions")
        common.save_grid(folder / f"samples_epoch_{epoch}.png", torch.cat(samples), 10,
                         f"samples from the prior {at}",
                         ["amortised", "", "", "optimised", "", ""])
        rows = [v for i in (slice(None, n), slice(n, None))
                for v in (both[i], rebuilt["vae"][i], rebuilt["latent_opt"][i])]
        common.save_grid(folder / f"comparison_epoch_{epoch}.png", torch.cat(rows), n,
                         f"A{at[1:]}: original, amortised, optimised",
                         ["train", "amortised", "optimised", "test", "amortised", "optimised"])


def report(root: Path) -> None:
    """Write report.md from every finished run below root."""
    runs = common.finished_runs(root)
    if not runs:
        raise common.UserError(f"no finished run in {root}; run without --report-only first")
    name = common.DATASETS[runs[0]["config"]["dataset"]]
    parts = [f"# Amortised inference against latent optimisation on {name}\n\nWhat does an encoder "
             "lose against optimising the latents of every image by themselves?"]
    groups = common.by_configuration(runs, variant, "codes", "n_test")
    for title, of in groups.items():
        c = of[0]["config"]
        parts += [f"## d = {c['latent_dim']}, σ = {c['sigma']:g}, {c['epochs']} epochs of "
                  f"{c['train_size']:,} images, n={len(of)}{title[len(variant(c)):]}", answer(of),
                  gap_section(of), starts_section(of), quality_section(of), digits_section(of),
                  pictures_section(of)]
    common.save_text(root / "report.md", "\n\n".join([*parts, common.how_made(groups)]) + "\n")


def show(runs: list, *keys, digits: int = 2, times: float = 1) -> str:
    """One metric of the models over seeds, as 'mean ± std'."""
    return common.mean_std([times * v for v in get(runs, "models", *keys)], digits)


def answer(runs: list) -> str:
    gap = lambda key: show(runs, "vae", "gaps", "test", key, "mean")
    share = show(runs, "vae", "gaps", "test", "better_share", digits=1, times=100)
    found = common.paired(*[get(runs, "models", "vae", "gaps", "test", key, "mean")
                            for key in ["start_gap", "approximation_gap"]])
    said = {1: "the amortisation gap is the larger", -1: "the approximation gap is the larger",
            0: "which is the larger cannot be told"}[found.sign]
    c = runs[0]["config"]
    return (f"**Answer.** On test images the encoder's bound is {gap('start_gap')} nats below that "
            "of the best diagonal Gaussian for each image under the same decoder (the amortisation "
            f"gap; that Gaussian is better for {share} % of the images), and that bound "
            f"{gap('approximation_gap')} nats below log p(x) (the approximation gap); {said}: "
            f"{found}.\n\n" + comparison(runs) + "\n\n"
            "Squared errors are per pixel, of decoded means; FID is of decoder means. The models "
            "are compared after equal epochs, not at their best: after "
            f"{c['epochs'] * c['latent_steps']} small steps each, the latents of training images "
            f"are still {show(runs, 'latent_opt', 'gaps', 'train', 'start_gap', 'mean')} nats "
            "short of their own optimum.")


def comparison(runs: list) -> str:
    """Latent optimisation against the amortised VAE, a row per question, paired by seed."""
    rows, floor = [], common.mean_std(sorted(set(get(runs, "fid_floor"))))
    optimised = ("squared_error", "optimised")
    for what, keys, of_vae, better, digits in [
            ("log p(x) of test images, as many of each digit, nats",
             ("gaps", "test", "log_px", "mean"), None, 1, 2),
            ("squared error of test images, optimised against the encoder's codes",
             optimised, ("squared_error", "start"), -1, 4),
            ("squared error of test images, both optimised", optimised, None, -1, 4),
            (f"FID of prior samples (floor {floor})", ("fid", "prior"), None, -1, 2),
            (f"FID of samples from a Gaussian fitted to the codes (floor {floor})",
             ("fid", "gaussian"), None, -1, 2)]:
        a = get(runs, "models", "latent_opt", *keys)
        b = get(runs, "models", "vae", *(of_vae or keys))
        found = common.paired(a, b, digits=digits)
        best = {1: MODELS["latent_opt"], -1: MODELS["vae"],
                0: "one seed: not tested" if found.n < 2 else "not told apart"}
        rows.append([what, common.mean_std(b, digits), common.mean_std(a, digits),
                     found.cell(), best[better * found.sign]])
    return common.table(["", *MODELS.values(), "difference, 95 % interval", "better"], rows)


def gap_section(runs: list) -> str:
    def with_interval(name, where, key):
        se = get(runs, "models", name, "gaps", where, key, "se")
        return f"{show(runs, name, 'gaps', where, key, 'mean')} [{1.96 * np.mean(se):.2f}]"

    keys = ["start", "elbo", "log_px", "start_gap", "approximation_gap"]
    rows = [[f"{MODELS[name]}, {where}", *[with_interval(name, where, key) for key in keys],
             show(runs, name, "gaps", where, "ess_median", digits=0),
             show(runs, name, "gaps", where, "ess_below_50", digits=1, times=100)]
            for name in MODELS for where in ["test", "train"]]
    m = runs[0]["metrics"]
    of = [v["gaps"][where] for name in MODELS for v in get(runs, "models", name)
          for where in ["test", "train"]]
    error, below = (max(v[key] for v in of) for key in ["sampling_error", "below_elbo_share"])
    worst = min(v["ess_median"] for v in of)
    return "### Where the gap lies\n\n" + common.table(
        ["", "ELBO of the start", "ELBO optimised", "log p(x)", "gap of the start",
         "approximation gap", "median ESS", "ESS < 50 (%)"], rows) + (
        f"\n\nNats per image of {m['n_test']:,} test images, as many of each digit, and of "
        f"{m['n_train']} training images; ± is the standard deviation over seeds, [] the 95 % "
        "half-width over images, which more seeds do not shrink for test images, the same for all "
        "seeds. The start is the encoder's Gaussian for the amortised VAE, so that its gap is the "
        "amortisation gap; for latent optimisation it is that of PCA on test images and the "
        "trained latents on training images. Optimising is "
        f"{INFERENCE_STEPS} steps of Adam with 4 codes. log p(x) is by importance sampling with "
        f"{m['codes']:,} codes, a lower bound in expectation and so is the "
        "approximation gap. A small effective sample size (ESS) means a looser one: the median is "
        f"{worst:.0f} or more{'' if worst >= 50 else ', less than the 50 aimed at'}, and the "
        f"sampling error of a mean {error:.2f} nats at most. The estimate is below the optimised "
        f"bound, as log p(x) cannot be, for {'none' if not below else f'{100 * below:.1f} %'} of "
        "the images.")


def starts_section(runs: list) -> str:
    rows, said = [], []
    for name, title in MODELS.items():
        last = {}
        for start in runs[0]["metrics"]["models"][name]["starts"]:
            few, found = (get(runs, "models", name, "starts", start, str(steps))
                          for steps in (30, INFERENCE_STEPS))
            rows.append([f"{title}: {start}", common.mean_std(few), common.mean_std(found)])
            last[start] = np.mean(found)
        best, worst = max(last, key=last.get), min(last, key=last.get)
        below = last[best] - last[worst]
        said.append(f"{title}: " + (
            f"{best} is the best start, {worst} ends {below:.2f} nats below it" if below > 0.01
            else "all starts end within 0.01 nats of each other"))
    return "### Where to start from\n\n" + common.table(
        ["decoder: start", *[f"ELBO after {steps} steps" for steps in (30, INFERENCE_STEPS)]],
        rows) + (f"\n\nNats, {runs[0]['metrics']['n_train']} test images. After {INFERENCE_STEPS} "
                 f"steps, {'; '.join(said)}.")


def quality_section(runs: list) -> str:
    m, c, last = runs[0]["metrics"], runs[0]["config"], [run["history"][-1] for run in runs]
    rows = [[f"{what} of training images, last epoch (nats)",
             *[common.mean_std([row[f"{name}_{key}"] for row in last]) for name in MODELS]]
            for key, what in [("reconstruction", "−log p(x given z)"), ("kl", "KL")]]
    both = lambda *keys, **options: [show(runs, name, *keys, **options) for name in MODELS]
    rows += [["squared error, test images, from the encoder's means / PCA means",
              *both("squared_error", "start", digits=4)],
             [f"squared error, {m['n_train']} training images, codes as trained",
              *both("squared_error", "training images", digits=4)],
             ["linear probe of the codes, accuracy (%)",
              *both("probe_accuracy", times=100, digits=1)],
             ["s per epoch (median)", *both("seconds_per_epoch", digits=1)],
             [f"s to infer {m['n_test']:,} test images",
              f"{show(runs, 'vae', 'seconds_to_encode')} (encoder)",
              f"{show(runs, 'latent_opt', 'seconds_to_infer', digits=0)} (optimising)"],
             ["parameters besides the decoder", f"{m['parameters']['encoder']:,} (encoder)",
              f"{m['parameters']['latents']:,} (latents)"]]
    ratio = [b / a for a, b in zip(*[get(runs, "models", name, "seconds_per_epoch")
                                     for name in MODELS], strict=True)]
    accuracy = lambda key: common.mean_std([100 * v for v in get(runs, key)])
    fid = lambda name, key: get(runs, "models", name, "fid", key)
    fitted = "; ".join(f"{title} {common.paired(fid(name, 'gaussian'), fid(name, 'prior'))}"
                       for name, title in MODELS.items())
    half = np.mean([196 * math.sqrt(p * (1 - p) / m["n_test"])
                    for name in MODELS for p in get(runs, "models", name, "probe_accuracy")])
    return "### Reconstructions, samples, codes, cost\n\n" + common.table(
        ["", *MODELS.values()], rows) + (
        "\n\nFID of the fitted Gaussian less that of the prior (negative: the fitted one samples "
        f"better): {fitted}. FID is in the features of the metric classifier, not Inception's. "
        f"Probes are tested on {m['n_test']:,} images (95 % half-width {half:.1f} points); for "
        f"latent optimisation those codes took {INFERENCE_STEPS} steps, the training codes "
        f"{c['epochs'] * c['latent_steps']}, which may cost it accuracy. The supervised "
        "classifier scores "
        f"{accuracy('supervised_accuracy_subset')} % on the same and "
        f"{accuracy('supervised_accuracy')} % on all test images, after "
        f"{common.mean_std(get(runs, 'seconds_supervised'), 0)} s. An epoch of latent optimisation "
        f"costs {common.mean_std(ratio)} × one of the amortised VAE.")


def digits_section(runs: list) -> str:
    said = []
    of = lambda name, digit, key: get(runs, "models", name, "log_px_by_digit", digit, key)
    rows = [[digit, *[cell for name in MODELS for cell in [
        common.mean_std(of(name, digit, "mean")), f"{np.mean(of(name, digit, 'se')):.2f}"]]]
        for digit in range(10)]

    def extreme(name, sign):
        """The most (1) or least (-1) probable digit, and those within two standard errors of it."""
        mean = [sign * np.mean(of(name, digit, "mean")) for digit in range(10)]
        error = [np.mean(of(name, digit, "se")) for digit in range(10)]
        first = int(np.argmax(mean))
        near = " ".join(str(d) for d in range(10) if d != first
                        and mean[first] - mean[d] < 2 * math.hypot(error[first], error[d]))
        return f"{first} (or {near}: within the error)" if near else str(first)

    for name, title in MODELS.items():
        p = max(get(runs, "models", name, "ink", "p"))
        slope = np.mean(get(runs, "models", name, "ink", "slope"))
        share = lambda key: show(runs, name, "ink", key, digits=0, times=100)
        said.append(
            f"{title}: most probable is {extreme(name, 1)}, least {extreme(name, -1)}. Images with "
            f"more ink are {'less' if slope < 0 else 'more'} probable: stroke area explains "
            f"{share('r2_ink')} % of the variance of log p(x) over images, the digit "
            f"{share('r2_digit')} %, both {share('r2_both')} %. "
            + ("Whether the digit counts beyond that, these images cannot tell." if p >= 0.01 else
               "The digit counts beyond stroke area "
               f"(p {'< 1e-16' if p < 1e-16 else f'= {p:.1g}'})."))
    return "### Which digits are probable\n\n" + common.table(
        ["digit", *[f"{t}{what}" for t in MODELS.values()
                    for what in [", log p(x)", ", s.e. over images"]]],
        rows) + "\n\n" + "\n\n".join(said) + (
        "\n\nStroke area is the sum of an image's pixels. Means of ten or more measured "
        "images also use the encoder's bound of all test images of the digit (a regression "
        "estimate). Every "
        "image's value is in each run's log_probabilities.csv, and as an array (2 models, 10 "
        "digits, images of a digit) in log_probabilities.npy.")


def pictures_section(runs: list) -> str:
    folder = runs[0]["folder"].as_posix()
    names = ["training_curves", "log_probabilities", *[
        f"{kind}_epoch_{epoch}" for epoch in sorted({1, runs[0]["config"]["epochs"]})
        for kind in ["comparison", "samples"]]]
    return f"### Pictures, seed {runs[0]['config']['seed']}\n\n" + "\n\n".join(
        f"![{name}]({folder}/{name}.png)" for name in names)


# --------------------------------------------------------------------------------------------- main


def finished(folder: Path, args) -> dict:
    """final_metrics.json of a finished run, whether or not its weights are still here; else empty.

    Raises UserError if more is asked for than was measured and cannot be.
    """
    file = folder / "final_metrics.json"
    there = common.load_json(file) if file.exists() else {}
    if there and (there["codes"] < args.codes or there["n_test"] < args.test_images):
        measured = f"{folder} was measured on {there['n_test']} images with {there['codes']} codes"
        if there["codes"] > args.codes or there["n_test"] > args.test_images:
            raise common.UserError(f"{measured}; ask for at least as many of both")
        if not all((folder / kind / "checkpoint.pt").exists() for kind in MODELS):
            raise common.UserError(f"{measured} and has no weights to measure more; --fresh trains "
                                   "it again")
    return there


def main(argv=None) -> dict:
    args = parse_args(argv)
    base = Path(args.out_dir) / "latent_opt"
    if args.report_only:
        return common.write_reports(report, base, args.dataset)
    device, data = common.pick_device(args.device), common.load_data(args.dataset, args.data_dir)
    runs = grid(args, data.name)[args.shard]
    names = [f"{variant(c)}/seed_{c['seed']}" for c in runs]
    folders = [base / data.name / name for name in names]
    parts = [split(data, config, args.test_images) for config in runs]
    common.open_runs(folders, runs, args)
    classifier = common.load_classifier(data, device)
    real = [classifier.look(x)[0] for x in (data.x_test, data.x_train[:10_000])]
    metrics = {name: finished(folder, args) for name, folder in zip(names, folders, strict=True)}
    for name, config, part, folder in zip(names, runs, parts, folders, strict=True):
        there = metrics[name]
        if there and there["codes"] >= args.codes and there["n_test"] >= args.test_images:
            continue
        x, x_val = (data.x_train[part[k]].to(device) for k in ["train", "val"])
        trained = {kind: train(kind, config, x, x_val, folder, args) for kind in MODELS}
        metrics[name] = evaluate(config, args, data, part, trained, real, classifier, folder,
                                 device)
        if there:  # of the training
            metrics[name]["environment"] = there["environment"]
        common.save_json(folder / "final_metrics.json", metrics[name])
    if runs:
        common.write_reports(report, base, data.name)
    return metrics


if __name__ == "__main__":
    common.guard(main)
