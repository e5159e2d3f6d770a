"""What does an encoder lose against optimising the latents of every image by themselves?

Two models share one decoder and its first weights. The amortised VAE has a convolutional encoder;
latent optimisation gives each training image a free Gaussian over codes, which is fitted together
with the decoder. On test images both codes and encoder are compared under the same decoder: the gap
between the encoder's bound, the best Gaussian's bound and log p(x), which importance sampling
around each image's own optimum estimates. A classifier is the supervised baseline.

    python latent_opt.py                      # both models, the baseline, gaps, log-probabilities
    python latent_opt.py --seeds 0 1 2
    python latent_opt.py --dataset glyphs --train-size 500 --epochs 1 --test-images 20 --codes 100

Writes results/latent_opt/<dataset>/<variant>/seed_<s>/ (weights of chosen epochs, metrics,
log_probabilities.npy, pictures) and results/latent_opt/<dataset>/report.md.

Differences from the source project:
 1. The optimised latents are a Gaussian each, not a point: a point has no bound and no likelihood.
 2. Each starts from its image's posterior under probabilistic PCA, and its Adam counts the steps of
    its own row.
 3. log p(x) by importance sampling with a Laplace proposal; the source does not say how.

References: Kingma and Welling 2014, arXiv:1312.6114; Bojanowski et al. 2018, arXiv:1707.05776
(latent optimisation); Cremer et al. 2018, arXiv:1801.03558 (the two gaps); Tipping and Bishop 1999
(probabilistic PCA).
"""

import csv
import io
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import common

SHOWN_EPOCHS = [1, 5, 10, 20, 30]  # and the last
MODELS = {"vae": "amortised VAE", "latent_opt": "latent optimisation"}

# ------------------------------------------------------------------------------------------- Config


def parse_args(argv=None):
    p = common.Parser(__doc__, epochs=30, batch_size=64, lr=1e-3)
    flag, number = p.add_argument, common.number
    flag("--latent-lr", type=number(float, 0, above=True), default=0.01,
         help="rate of the optimised latents")
    flag("--latent-steps", type=number(int, 1), default=2,
         help="steps of a batch's latents for each step of the decoder")
    flag("--latent-dim", type=number(int, 1), default=200, help="dimensions of z")
    flag("--sigma", type=number(float, 0, above=True), default=0.4,
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
    g = common.generator(*key)
    chosen = []
    for digit in range(10):
        of = (y == digit).nonzero()[:, 0]
        m = n // 10 + (digit < n % 10)
        if m > len(of):
            raise common.UserError(f"{n} stratified images need {m} of class {digit}, there are "
                                   f"{len(of)}; take a smaller --train-size or --test-images")
        chosen.append(of[torch.randperm(len(of), generator=g)[:m]])
    chosen = torch.cat(chosen)
    return chosen[torch.randperm(len(chosen), generator=g)]


def split(data: common.Data, config: dict) -> dict[str, Tensor]:
    """Indices of the training images, stratified, and of 5,000 others for validation."""
    train = stratified(data.y_train, config["train_size"], config["seed"], "split")
    free = torch.ones(len(data.y_train), dtype=torch.bool)
    free[train] = False
    free = free.nonzero()[:, 0]
    if len(free) < 5000:
        raise common.UserError(f"--train-size {config['train_size']} leaves {len(free)} images "
                               f"for validation, which needs 5000; take at most "
                               f"{len(data.y_train) - 5000}")
    order = torch.randperm(len(free), generator=common.generator(config["seed"], "validation"))
    return {"train": train, "val": free[order[:5000]]}


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
        mu, logvar = self.body(x).chunk(2, dim=1)
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
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z)


class Classifier(nn.Module):
    """The supervised baseline: images to logits (B, 10)."""

    def __init__(self):
        super().__init__()

        def block(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]

        self.body = nn.Sequential(*block(1, 32), *block(32, 64), *block(64, 64), nn.Flatten(),
                                  nn.Dropout(0.3), nn.Linear(576, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# ---------------------------------------------------------------------------------------- Objective


def log_likelihood(decoder, z: Tensor, x: Tensor, sigma: float) -> Tensor:
    """log N(x; decoder(z), sigma^2 I) in nats, (B,), of images x at codes z (B, d)."""
    p = x[0].numel()
    square = (decoder(z) - x).flatten(1).square().sum(1)
    return -0.5 * square / sigma**2 - 0.5 * p * math.log(2 * math.pi * sigma**2)


def kl_nats(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, diag e^logvar) || N(0, I)) of each image, (B,), nats."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def negative_elbo(decoder, x: Tensor, mu: Tensor, logvar: Tensor, noise: Tensor,
                  sigma: float) -> Tensor:
    """(-ELBO, -log p(x | z), KL) of each image with noise ~ N(0, I) like mu: (3, B), nats."""
    z = mu + noise * (0.5 * logvar).exp()
    reconstruction, kl = -log_likelihood(decoder, z, x, sigma), kl_nats(mu, logvar)
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
    pull = F.pad(pull, (0, latent_dim - pull.shape[1])).float().to(x.device)
    logvar = torch.where(signal, (sigma**2 / values).log(), 0)
    logvar = F.pad(logvar, (0, latent_dim - len(logvar))).float().to(x.device)
    mean = flat.mean(0).float().to(x.device)
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
        start = pca_posterior(x, d, config["sigma"])
        inference = RowAdam(torch.cat(start(x), 1), config["latent_lr"])
        parameters = list(decoder.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config["lr"], fused=x.device.type != "mps")
    parts = {"decoder": decoder, "inference": inference, "optimizer": optimizer}
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
            inference.step(i, gradients[0])
        for w, gradient in zip(parameters, gradients[1:], strict=True):
            w.grad = gradient
        optimizer.step()
        return losses.detach()

    step = {"vae": step_vae, "latent_opt": step_latent_opt}[kind]
    if args.compile and kind == "vae":  # rows are gathered and scattered: latents stay eager
        step = torch.compile(step)
    board = common.summary_writer(folder / "logs" / kind) if args.tensorboard else None
    title = f"{variant(config)}/seed_{seed} {kind}"
    bar = tqdm(range(1, config["epochs"] + 1), title, initial=len(history), disable=None)
    for epoch in range(len(history) + 1, config["epochs"] + 1):
        began = time.perf_counter()
        order = torch.randperm(n, generator=common.generator(seed, "order", epoch)).to(x.device)
        torch.manual_seed(common.seed_from(seed, "noise", epoch))
        losses = torch.stack([step(i) for i in order.split(config["batch_size"])])
        if not losses.isfinite().all():
            bad = (~losses.isfinite().all(1)).nonzero()[0].item() + 1
            raise common.UserError(f"the loss of {title} is not finite in epoch {epoch}, step "
                                   f"{bad}; {folder} keeps epoch {epoch - 1}; try a lower --lr")
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
        common.save_epoch(folder / kind, config, history, parts, False, board)
        if epoch in shown_epochs(config):
            found = inference.state_dict()  # without Adam's moments of 20,000 rows
            common.save_torch(folder / f"{kind}_epoch_{epoch}.pt", {
                "config": config, "epoch": epoch, "decoder": decoder.state_dict(),
                "inference": found if kind == "vae" else {"table": found["table"]}})
        bar.set_postfix(loss=f"{row['loss']:.2f}", refresh=False)
        bar.update()
    bar.close()
    return decoder.eval().requires_grad_(False), inference, history


def shown_epochs(config: dict) -> list[int]:
    return sorted({e for e in SHOWN_EPOCHS if e <= config["epochs"]} | {config["epochs"]})


def train_classifier(config: dict, x: Tensor, y: Tensor, epochs: int = 12) -> Classifier:
    """The supervised baseline on the same training images, with random shifts of up to 2 pixels."""
    seed, n = config["seed"], len(x)
    torch.manual_seed(common.seed_from(seed, "classifier"))
    model = Classifier().to(x.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02,
                                  fused=x.device.type != "mps")
    steps = max(1, n // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for epoch in range(epochs):
        order = torch.randperm(n, generator=common.generator(seed, "classifier", epoch))
        for i in order[:steps * 128].split(128):
            i = i.to(x.device)
            dy, dx = torch.randint(-2, 3, (2,)).tolist()
            batch = F.pad(x[i], (2, 2, 2, 2))[:, :, 2 + dy:30 + dy, 2 + dx:30 + dx]
            loss = F.cross_entropy(model(batch), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


# ----------------------------------------------------------------------------------------- Evaluate


def infer(decoder, x: Tensor, mu: Tensor, logvar: Tensor, sigma: float, steps: int = 300,
          samples: int = 4, lr: float = 0.1) -> tuple[Tensor, Tensor]:
    """The Gaussian q that maximises each image's ELBO under a fixed decoder, from (mu, logvar).

    Adam with a cosine and a short memory (0.95: gradients shrink by orders of magnitude on the
    way, and 0.999 would leave variances too wide after 300 steps). All images share each step's
    noise, so that the result for one does not depend on the others. The decoder is in eval mode and
    left as it is. Means and log-variances, (B, d) each.
    """
    assert not getattr(decoder, "training", False), "inference needs the decoder in eval mode"
    g, (n, d) = common.generator("inference"), mu.shape
    q = RowAdam(torch.cat([mu, logvar], 1).detach().clone(), lr, 0.95)
    rows = torch.arange(n, device=x.device)
    for t in range(steps):
        q.lr = lr * 0.5 * (1 + math.cos(math.pi * t / steps))
        noise = torch.randn(samples, 1, d, generator=g).to(x.device)
        for i in rows.split(250):
            table = q.table[i].requires_grad_()
            mu, logvar = (v.repeat(samples, 1) for v in table.chunk(2, dim=1))
            loss = negative_elbo(decoder, x[i].repeat(samples, 1, 1, 1), mu, logvar,
                                 noise.expand(-1, len(i), -1).flatten(0, 1), sigma)[0].sum()
            q.step(i, torch.autograd.grad(loss, table)[0])
    mu, logvar = q.table.chunk(2, dim=1)
    return mu, logvar


@torch.no_grad()
def elbo(decoder, x: Tensor, mu: Tensor, logvar: Tensor, sigma: float,
         samples: int = 200) -> Tensor:
    """The ELBO of each image, (B,) float64 on the CPU; every image sees the same noise."""
    g, total = common.generator("elbo"), torch.zeros(len(x), dtype=torch.float64)
    for _ in range(samples):
        noise = torch.randn(1, mu.shape[1], generator=g).to(x.device).expand_as(mu)
        total -= negative_elbo(decoder, x, mu, logvar, noise, sigma)[0].cpu().double()
    return total / samples


def laplace(decoder, x: Tensor, z: Tensor, sigma: float, steps: int = 200) -> tuple:
    """Mode of p(z | x) near z and the Cholesky factor of its precision: (B, d), (B, d, d).

    The precision is I + J^T J / sigma^2 with the decoder's Jacobian (generalised Gauss-Newton):
    always positive definite, and exact for a linear decoder.
    """
    q, d = RowAdam(z.detach().clone(), 0.03, 0.95), z.shape[1]
    rows = torch.arange(len(x), device=x.device)
    for t in range(steps):
        q.lr = 0.03 * 0.5 * (1 + math.cos(math.pi * t / steps))
        table = q.table.clone().requires_grad_()
        loss = (0.5 * table.square().sum(1) - log_likelihood(decoder, table, x, sigma)).sum()
        q.step(rows, torch.autograd.grad(loss, table)[0])
    one = lambda code: decoder(code[None]).flatten()
    factors = []
    for i in range(2):  # a Gauss-Newton step, kept where it helps, then the precision there
        for c, image in zip(q.table.split(20), x.split(20), strict=True):
            j = torch.func.vmap(torch.func.jacfwd(one))(c)  # (<= 20, 784, d)
            precision = torch.eye(d, device=x.device, dtype=z.dtype) + j.mT @ j / sigma**2
            factor = torch.linalg.cholesky(precision)
            if i == 0:
                residual = (image - decoder(c)).flatten(1)[..., None]
                gradient = (j.mT @ residual)[..., 0] / sigma**2 - c
                new = c + torch.cholesky_solve(gradient[..., None], factor)[..., 0]
                value = lambda z, image=image: (log_likelihood(decoder, z, image, sigma)
                                                - 0.5 * z.square().sum(1))
                c.copy_(torch.where((value(new) > value(c))[:, None], new, c))
            else:
                factors.append(factor)
    return q.table, torch.cat(factors)


@torch.no_grad()
def importance_sampling(decoder, x: Tensor, mode: Tensor, factor: Tensor, sigma: float, k: int,
                        widen: float = 1.1, prior: float = 0.1) -> tuple[Tensor, Tensor]:
    """log p(x) and the effective sample size of each image, (B,) float64 on the CPU each.

    Proposal: N(mode, widen * precision^-1) with a share `prior` of codes from N(0, I), weighed as
    a mixture with those very shares. In 200 dimensions 10 % more variance halves the sample's
    worth where the proposal is exact, and 20 % would leave a seventeenth.
    """
    g, d = common.generator("importance"), mode.shape[1]
    n_prior = round(prior * k)
    found, sizes = [], []
    half_log = 0.5 * d * math.log(2 * math.pi)
    for image, m, lower in zip(x, mode, factor, strict=True):
        noise = torch.randn(k, d, generator=g, dtype=m.dtype).to(x.device)
        near = m + math.sqrt(widen) * torch.linalg.solve_triangular(
            lower.T, noise[n_prior:].T, upper=True).T
        z = torch.cat([noise[:n_prior], near])  # (k, d)
        log_prior = -0.5 * z.square().sum(1) - half_log
        log_near = (-0.5 * ((z - m) @ lower).square().sum(1) / widen - half_log
                    + lower.diagonal().log().sum() - 0.5 * d * math.log(widen))
        log_q = log_near
        if n_prior:
            log_q = torch.logaddexp(log_near + math.log(1 - n_prior / k),
                                    log_prior + math.log(n_prior / k))
        log_px = torch.cat([log_likelihood(decoder, c, image[None], sigma) for c in z.split(2500)])
        log_w = (log_px + log_prior - log_q).cpu().double()
        found.append(log_w.logsumexp(0) - math.log(k))
        sizes.append((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp())
    return torch.stack(found), torch.stack(sizes)


def in_chunks(f, x: Tensor, device) -> Tensor:
    """f of many images or codes, on the CPU."""
    with torch.no_grad():
        return torch.cat([f(c.to(device)).cpu() for c in x.split(1000)])


def judge_images(decoder, start, x: Tensor, sigma: float, k: int) -> dict[str, Tensor]:
    """Every number of the gap for images x, from starting q's `start` = (mu, logvar): (B,) each.

    "first" is the ELBO of the start, "elbo" of the optimised q, "log_px" and "ess" are importance
    sampling around the mode; "mu" (B, d) are the optimised means.
    """
    q = infer(decoder, x, *start, sigma)
    log_px, ess = importance_sampling(decoder, x, *laplace(decoder, x, q[0], sigma), sigma, k)
    return {"first": elbo(decoder, x, *start, sigma), "elbo": elbo(decoder, x, *q, sigma),
            "log_px": log_px, "ess": ess, "mu": q[0]}


def summary(values: Tensor) -> dict[str, float]:
    """Mean and its standard error over images."""
    return {"mean": float(values.mean()), "se": float(values.std() / math.sqrt(len(values)))}


def probe(z: Tensor, y: Tensor, z_test: Tensor, y_test: Tensor) -> float:
    """Test accuracy of a linear classifier on codes (logistic regression, standardised)."""
    from sklearn.linear_model import LogisticRegression  # a second to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    return float(model.fit(z.numpy(), y.numpy()).score(z_test.numpy(), y_test.numpy()))


def evaluate(config: dict, args, data, part, trained: dict, real, classifier, folder,
             device) -> dict:
    """final_metrics.json, log_probabilities.npy and .csv, and the pictures of a finished run.

    `real` holds the metric classifier's features of the test and of 10,000 training images.
    """
    sigma, d, start = config["sigma"], config["latent_dim"], time.perf_counter()
    x_train, y_train = data.x_train[part["train"]].to(device), data.y_train[part["train"]]
    test = stratified(data.y_test, min(args.test_images, 10 * int(data.y_test.bincount().min())),
                      "test")
    test = test[data.y_test[test].argsort(stable=True)]  # by digit
    x, y = data.x_test[test].to(device), data.y_test[test]
    some = torch.arange(max(2, len(test) // 5))  # of the training images, in random order
    few = torch.randperm(len(test), generator=common.generator("few"))[:len(some)]
    encoder, pca = trained["vae"][1], pca_posterior(x_train, d, sigma)
    decoders = {name: trained[name][0] for name in MODELS}
    zero = lambda x: (torch.zeros(len(x), d, device=x.device),) * 2
    starts = {"vae": {"zero": zero, "PCA": pca, "encoder": torch.no_grad()(encoder)},
              "latent_opt": {"zero": zero, "PCA": pca}}
    table = trained["latent_opt"][1].table
    seconds = {"train_" + name: sum(row["seconds"] for row in trained[name][2]) for name in MODELS}
    found, metrics = {}, {
        "n_test": len(test), "n_train": len(some), "codes": args.codes, "models": {},
        "fid_floor": common.frechet_distance(real[1], real[0]),
        "largest_log_px": -0.5 * 784 * math.log(2 * math.pi * sigma**2),
        "classifier": {"accuracy": classifier.accuracy, "sha256": classifier.sha256}}
    for name, decoder in decoders.items():
        best = list(starts[name].values())[-1]
        began = time.perf_counter()
        found[name] = judge_images(decoder, best(x), x, sigma, args.codes)
        seconds[f"gap_{name}"] = time.perf_counter() - began
        own = best(x_train[some]) if name == "vae" else tuple(table[some].chunk(2, dim=1))
        on_train = judge_images(decoder, own, x_train[some], sigma, args.codes)
        compared = {}
        for label, begin in starts[name].items():
            for steps in [30, 300]:
                began = time.perf_counter()
                q = infer(decoder, x[few], *begin(x[few]), sigma, steps)
                compared[f"{label}, {steps} steps"] = summary(elbo(decoder, x[few], *q, sigma)) | {
                    "seconds": time.perf_counter() - began}
        codes = table.chunk(2, dim=1) if name == "latent_opt" else [
            torch.cat(v) for v in zip(*[starts["vae"]["encoder"](c) for c in x_train.split(1000)],
                                      strict=True)]
        mu, logvar = (v.cpu() for v in codes)
        g = common.generator(config["seed"], "samples")
        noise = torch.randn(10_000, d, generator=g)
        cov = torch.cov(mu.double().T).view(d, d) + logvar.exp().mean(0).double().diag()
        fitted = mu.mean(0) + noise @ torch.linalg.cholesky(cov).float().T
        fid = {key: common.frechet_distance(classifier.look(in_chunks(decoder, z, device))[0],
                                            real[0])
               for key, z in [("prior", noise), ("gaussian", fitted)]}
        mse = lambda z, x, decoder=decoder: (
            in_chunks(decoder, z, device) - x.cpu()).square().flatten(1).mean(1)
        seen = {"test_optimised": mse(found[name]["mu"], x),
                "train_optimised": mse(on_train["mu"], x_train[some])}
        if name == "vae":
            seen["test_encoder"] = mse(best(x)[0], x)
            seen["train_encoder"] = mse(mu[some], x_train[some])
        gaps = {}
        for where, of in [("test", found[name]), ("train", on_train)]:
            gaps[where] = {
                "elbo_first": summary(of["first"]), "elbo": summary(of["elbo"]),
                "log_px": summary(of["log_px"]), "ess_median": float(of["ess"].median()),
                "ess_smallest": float(of["ess"].min()),
                "approximation_gap": summary(of["log_px"] - of["elbo"]),
                "first_gap": summary(of["elbo"] - of["first"]),
                "better_share": float((of["elbo"] > of["first"]).double().mean())}
        by_digit = [summary(found[name]["log_px"][y == digit]) for digit in range(10)]
        probe_test = best(x)[0] if name == "vae" else found[name]["mu"]
        metrics["models"][name] = {
            "gaps": gaps, "starts": compared, "fid": fid, "log_px_by_digit": by_digit,
            "mean_squared_error": {k: float(v.mean()) for k, v in seen.items()},
            "probe_accuracy": probe(mu, y_train, probe_test.cpu(), y),
            "seconds_per_epoch": float(np.median([row["seconds"] for row in trained[name][2]]))}
    began = time.perf_counter()
    supervised = train_classifier(config, x_train, y_train.to(device))
    seconds["supervised"] = time.perf_counter() - began
    said = in_chunks(supervised, data.x_test, device).argmax(1)
    metrics |= {"supervised_accuracy": float((said == data.y_test).double().mean()),
                "ink": ink_test(x, y, found), "parameters": {
                    "decoder": sum(w.numel() for w in decoders["vae"].parameters()),
                    "encoder": sum(w.numel() for w in encoder.parameters()),
                    "latents": table.numel()},
                **{f"seconds_{k}": v for k, v in seconds.items()},
                "seconds_evaluation": time.perf_counter() - start,
                "environment": common.environment(device)}
    save_log_probabilities(folder, test, y, x, found)
    figures(config, folder, trained, found, y, x[few[:10]], x_train[:10], starts, device)
    history = [{"epoch": a["epoch"], **{f"vae_{k}": v for k, v in a.items() if k != "epoch"},
                **{f"latent_opt_{k}": v for k, v in b.items() if k != "epoch"}}
               for a, b in zip(trained["vae"][2], trained["latent_opt"][2], strict=True)]
    common.save_history(folder / "history.csv", history)
    common.save_json(folder / "final_metrics.json", metrics)
    return metrics


def ink_test(x: Tensor, y: Tensor, found: dict) -> dict[str, dict]:
    """How much of log p(x) stroke area explains, and what the digit adds: shares of variance.

    Least squares on the ink (sum of pixels), then on ink and digit; the F test of the digits' nine
    parameters beyond the ink.
    """
    from scipy.stats import f  # comes with scikit-learn

    ink = x.flatten(1).sum(1).cpu().double()
    one = F.one_hot(y, 10).double()
    results = {}
    for name, of in found.items():
        target, total = of["log_px"], (of["log_px"] - of["log_px"].mean()).square().sum()
        rest = {}
        for key, columns in [("ink", torch.stack([torch.ones_like(ink), ink], 1)),
                             ("both", torch.cat([one, ink[:, None]], 1))]:
            fit = columns @ torch.linalg.lstsq(columns, target[:, None]).solution
            rest[key] = (target - fit[:, 0]).square().sum()
        free = len(y) - 11
        value = float((rest["ink"] - rest["both"]) / 9 / (rest["both"] / max(free, 1)))
        results[name] = {"r2_ink": float(1 - rest["ink"] / total),
                         "r2_ink_and_digit": float(1 - rest["both"] / total), "f": value,
                         "p": float(f.sf(value, 9, max(free, 1)))}
    return results


def save_log_probabilities(folder: Path, test: Tensor, y: Tensor, x: Tensor, found: dict) -> None:
    """log_probabilities.npy: float64 (2 models in MODELS' order, 10 digits, images of a digit),
    padded with NaN where digits differ in number; log_probabilities.csv: an image per line, to
    read.
    """
    per = max(int((y == digit).sum()) for digit in range(10))
    array = np.full((len(found), 10, per), np.nan)
    for i, of in enumerate(found.values()):
        for digit in range(10):
            values = of["log_px"][y == digit].numpy()
            array[i, digit, :len(values)] = values
    with common.atomic(folder / "log_probabilities.npy") as temporary, open(temporary, "wb") as f:
        np.save(f, array)
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["test_index", "digit", "ink", *[f"{name}_{key}" for name in found
                                                  for key in ["first", "elbo", "log_px", "ess"]]])
    ink = x.flatten(1).sum(1).cpu()
    for i in range(len(y)):
        out.writerow([int(test[i]), int(y[i]), f"{ink[i]:.2f}",
                      *[f"{of[key][i]:.4f}" for of in found.values()
                        for key in ["first", "elbo", "log_px", "ess"]]])
    common.save_text(folder / "log_probabilities.csv", text.getvalue())


# ------------------------------------------------------------------------------- Figures and report


def figures(config: dict, folder: Path, trained: dict, found: dict, y: Tensor, x_test: Tensor,
            x_train: Tensor, starts: dict, device) -> None:
    """training_curves.png, log_probabilities.png, and for the shown epochs recon_, samples_,
    latent_opt_recon_ and comparison_epoch_<n>.png."""
    figure = Figure(figsize=(11, 3))
    for axes, key in zip(figure.subplots(1, 3), ["loss", "reconstruction", "kl"], strict=True):
        for name, title in MODELS.items():
            history = trained[name][2]
            axes.plot([r["epoch"] for r in history], [r[key] for r in history], label=title)
        if key == "loss":
            history = trained["vae"][2]
            axes.plot([r["epoch"] for r in history], [r["val_loss"] for r in history], "C0:",
                      label="amortised, validation")
        axes.set(xlabel="epoch", ylabel="nats per image",
                 title={"loss": "−ELBO", "reconstruction": "−log p(x | z)", "kl": "KL"}[key])
        axes.legend(fontsize=8)
    figure.tight_layout()
    common.save_figure(folder / "training_curves.png", figure)

    figure = Figure(figsize=(9, 3.5))
    for axes, (name, of) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        axes.boxplot([of["log_px"][y == digit].numpy() for digit in range(10)], showfliers=False)
        axes.set_xticks(range(1, 11), range(10))
        axes.set(xlabel="digit", ylabel="log p(x) (nats)", title=MODELS[name])
    figure.tight_layout()
    common.save_figure(folder / "log_probabilities.png", figure)

    sigma, d = config["sigma"], config["latent_dim"]
    both = torch.cat([x_train, x_test])
    n = len(x_train)
    z = torch.randn(30, d, generator=common.generator("shown")).to(device)
    encoder, decoder = Encoder(d).to(device), Decoder(d).to(device).eval().requires_grad_(False)
    for epoch in shown_epochs(config):
        rebuilt, samples = {}, []
        for name in MODELS:
            saved = common.load_torch(folder / f"{name}_epoch_{epoch}.pt")
            decoder.load_state_dict(saved["decoder"])
            with torch.no_grad():
                samples.append(decoder(z))
            if name == "vae":
                encoder.load_state_dict(saved["inference"])
                with torch.no_grad():
                    mu = encoder(both)[0]
            else:
                own = saved["inference"]["table"][:n].to(device).chunk(2, dim=1)[0]
                inferred = infer(decoder, x_test, *starts[name]["PCA"](x_test), sigma)[0]
                mu = torch.cat([own, inferred])
            with torch.no_grad():
                rebuilt[name] = decoder(mu)
        at = f"after epoch {epoch}"
        for name, file in [("vae", "recon"), ("latent_opt", "latent_opt_recon")]:
            common.save_grid(folder / f"{file}_epoch_{epoch}.png", torch.cat([
                x_test, rebuilt[name][n:]]), n, f"{MODELS[name]}, {at}: test images above their "
                "reconstructions")
        common.save_grid(folder / f"samples_epoch_{epoch}.png", torch.cat(samples), 10,
                         f"samples from the prior {at}",
                         [name for title in ["amortised", "optimised"] for name in [title, "", ""]])
        rows = [v for i in (slice(None, n), slice(n, None))
                for v in (both[i], rebuilt["vae"][i], rebuilt["latent_opt"][i])]
        common.save_grid(folder / f"comparison_epoch_{epoch}.png", torch.cat(rows), n,
                         f"{at[0].upper()}{at[1:]}", [
                             "train", "amortised", "optimised", "test", "amortised", "optimised"])


def report(root: Path) -> str:
    """Write report.md from every finished run below root; returns the text."""
    runs = common.finished_runs(root)
    if not runs:
        raise common.UserError(f"no finished run in {root}; run without --report-only first")
    name = common.DATASETS[runs[0]["config"]["dataset"]]
    parts = [f"# Amortised inference against latent optimisation on {name}\n\nWhat does an encoder "
             "lose against optimising the latents of every image by themselves?"]
    groups: dict[str, list] = {}
    for run in runs:
        groups.setdefault(variant(run["config"]), []).append(run)
    parts += [section(root, title, group) for title, group in groups.items()]
    rows = [[title, r["config"]["seed"], r["config"]["epochs"], r["config"]["batch_size"],
             f"`{e['command']}`", e["commit"], e["device"], e["torch"],
             f"{r['metrics']['seconds_train_vae'] + r['metrics']['seconds_train_latent_opt']:.0f}",
             f"{r['metrics']['seconds_evaluation']:.0f}"]
            for title, group in groups.items() for r in group
            for e in [r["metrics"]["environment"]]]
    parts.append("## How this was made\n\n" + common.table(
        ["run", "seed", "epochs", "batch", "command", "commit", "device", "torch", "s to train",
         "s to evaluate"], rows))
    text = "\n\n".join(parts) + "\n"
    common.save_text(root / "report.md", text)
    return text


def get(runs: list, *keys) -> list[float]:
    """One metric of every run."""
    found = [run["metrics"] for run in runs]
    for key in keys:
        found = [m[key] for m in found]
    return found


def section(root: Path, title: str, runs: list) -> str:
    """Answers, tables and pictures of the seeds of one configuration."""
    show = lambda *keys, digits=2: common.mean_std(get(runs, "models", *keys), digits)
    gap = lambda name, where, key: show(name, "gaps", where, key, "mean")
    share = lambda name, where: common.mean_std([100 * v for v in get(
        runs, "models", name, "gaps", where, "better_share")], 1)
    n = runs[0]["metrics"]["n_test"]
    better = lambda key, *keys: common.paired(get(runs, "models", "latent_opt", *keys),
                                              get(runs, "models", "vae", *keys), key)
    lines = [f"## {title}, n={len(runs)}",
             f"**Answer.** Under its own decoder the encoder's bound is "
             f"{gap('vae', 'test', 'first_gap')} nats below that of the best Gaussian of each test "
             f"image, and that one {gap('vae', 'test', 'approximation_gap')} below log p(x); the "
             f"optimised q is better for {share('vae', 'test')} % of them. Against the amortised "
             "VAE, latent optimisation shows "
             f"{better(' nats', 'gaps', 'test', 'log_px', 'mean')} in log p(x) of test images, and "
             f"{better('', 'fid', 'prior')} in the FID of prior samples."]
    rows = [[f"{MODELS[name]}, {where}", gap(name, where, "elbo_first"), gap(name, where, "elbo"),
             gap(name, where, "log_px"), gap(name, where, "first_gap"),
             gap(name, where, "approximation_gap"),
             share(name, where), show(name, "gaps", where, "ess_median", digits=0)]
            for name in MODELS for where in ["test", "train"]]
    lines += ["### Where the gap lies", common.table(
        ["", "ELBO of the start", "ELBO optimised", "log p(x)", "amortisation gap",
         "approximation gap", "optimised is better (%)", "median ESS"], rows),
        f"Nats per image, {n:,} test and {runs[0]['metrics']['n_train']} training images, mean ± "
        "standard deviation over seeds; over images the standard errors are about "
        f"{np.mean(get(runs, 'models', 'vae', 'gaps', 'test', 'log_px', 'se')):.1f} (log p(x)) and "
        f"{np.mean(get(runs, 'models', 'vae', 'gaps', 'test', 'first_gap', 'se')):.2f} (gap). The "
        "start is the encoder's q for the amortised VAE; for latent optimisation it is the PCA "
        "start on test images and the trained latents on training images. log p(x) by importance "
        f"sampling with {runs[0]['metrics']['codes']:,} codes; ESS is the effective number of "
        "them. No log p(x) can exceed "
        f"{runs[0]['metrics']['largest_log_px']:.3f}, a perfect reconstruction.",
        f"![Training curves]({runs[0]['folder'].as_posix()}/training_curves.png)"]
    rows = [[f"{MODELS[name]}: {label}", show(name, "starts", label, "mean"),
             show(name, "starts", label, "seconds", digits=1)]
            for name in MODELS for label in runs[0]["metrics"]["models"][name]["starts"]]
    lines += ["### Where to start from", common.table(["decoder: start", "ELBO (nats)", "s"], rows),
              f"ELBO of {runs[0]['metrics']['n_train']} test images after optimising q."]
    rows = [[f"squared error per pixel, test images, codes by {key[5:]}", *[
                 show(name, "mean_squared_error", key, digits=4)
                 if key in runs[0]["metrics"]["models"][name]["mean_squared_error"] else "–"
                 for name in MODELS]] for key in ["test_encoder", "test_optimised"]]
    rows += [[f"FID, {key} samples", *[show(name, "fid", key) for name in MODELS]]
             for key in ["prior", "gaussian"]]
    rows += [["linear probe of the codes, test accuracy (%)", *[common.mean_std(
        [100 * v for v in get(runs, "models", name, "probe_accuracy")]) for name in MODELS]],
        ["s per epoch", *[show(name, "seconds_per_epoch", digits=1) for name in MODELS]]]
    floor = common.mean_std(get(runs, "fid_floor"), 3)
    supervised = common.mean_std([100 * v for v in get(runs, "supervised_accuracy")])
    lines += ["### Reconstructions, samples, codes, cost", common.table(
        ["", *MODELS.values()], rows),
        "FID is in the features of the metric classifier, not Inception's, 10,000 samples against "
        f"10,000 test images, where training images score {floor}; gaussian: one fitted to the "
        "codes of the training images. Probes see the same training images and "
        f"{n:,} test images; the supervised classifier scores {supervised} % on all test images."]
    rows = [[digit, *[common.mean_std([m[digit]["mean"] for m in get(
        runs, "models", name, "log_px_by_digit")]) for name in MODELS],
        *[f"{np.mean([m[digit]['se'] for m in get(runs, 'models', name, 'log_px_by_digit')]):.2f}"
          for name in MODELS]] for digit in range(10)]
    ink = lambda name, key, digits=2: common.mean_std(get(runs, "ink", name, key), digits)
    lines += ["### Which digits are probable", common.table(
        ["digit", *[f"{t}, log p(x)" for t in MODELS.values()],
         *[f"{t}, standard error" for t in MODELS.values()]], rows),
        " ".join(f"{t}: stroke area alone explains {ink(m, 'r2_ink')} of the variance of log p(x) "
                 f"over images, stroke area and digit {ink(m, 'r2_ink_and_digit')} (largest p of "
                 f"the digit {max(get(runs, 'ink', m, 'p')):.1g}): beyond the area the digit "
                 + ("matters." if max(get(runs, "ink", m, "p")) < 0.01 else
                    "adds nothing that can be told from noise.") for m, t in MODELS.items()),
        f"![log p(x) by digit]({runs[0]['folder'].as_posix()}/log_probabilities.png)",
        "### Pictures"]
    for file in sorted((root / runs[0]["folder"]).glob("*_epoch_*.png"),
                       key=lambda f: (int(f.stem.split("_")[-1]), f.stem)):
        lines.append(f"![{file.stem}]({runs[0]['folder'].as_posix()}/{file.name})")
    return "\n\n".join(lines)


# --------------------------------------------------------------------------------------------- main


def main(argv=None) -> dict:
    args = parse_args(argv)
    base = Path(args.out_dir) / "latent_opt"
    if args.report_only:
        roots = [base / d for d in ([args.dataset] if args.dataset else common.DATASETS)]
        for root in [r for r in roots if r.exists()] or roots[:1]:
            report(root)
            print(f"report: {root / 'report.md'}")
        return {}
    device = common.pick_device(args.device)
    data = common.load_data(args.dataset, args.data_dir)
    k, n = args.shard
    runs = grid(args, data.name)[k::n]
    root, parts = base / data.name, [split(data, config) for config in runs]
    folders = [root / variant(c) / f"seed_{c['seed']}" for c in runs]
    common.open_runs(folders, runs, args)
    classifier, metrics = common.load_classifier(data, device), {}
    real = [classifier.look(x)[0] for x in (data.x_test, data.x_train[:10_000])]
    for config, part, folder in zip(runs, parts, folders, strict=True):
        name, file = f"{variant(config)}/seed_{config['seed']}", folder / "final_metrics.json"
        if file.exists():  # finished, whether or not its weights are still here
            metrics[name] = common.load_json(file)
            if metrics[name]["codes"] == args.codes:
                continue
        x, x_val = (data.x_train[part[k]].to(device) for k in ["train", "val"])
        trained = {kind: train(kind, config, x, x_val, folder, args) for kind in MODELS}
        metrics[name] = evaluate(config, args, data, part, trained, real, classifier, folder,
                                 device)
    if runs:
        report(root)
        print(f"report: {root / 'report.md'}")
    return metrics


if __name__ == "__main__":
    common.guard(main)
