"""Which makes better images, a GAN or a VAE, and what does combining them bring?

Twelve GANs (two losses, three sizes of z, two datasets), six VAEs whose decoder is the same network
as the generator, and a hybrid: a VAE, then a generator in its latent space against two
discriminators, one of codes and one of images, then all of it fine-tuned together. Every run is
measured by the same features: FID beside its floor, precision and recall, classes, copying.

    python gan_vs_vae.py                                     # the whole lab
    python gan_vs_vae.py --model gan --loss hinge --z-dim 32 --dataset mnist
    python gan_vs_vae.py --dataset glyphs --train-size 500 --epochs 1 --samples 500         # smoke

Writes results/gan_vs_vae/<dataset>/<run>/seed_<s>/ (weights, metrics, pictures) and, from every
finished run, results/gan_vs_vae/report.md.

Differences from the source lab:
 1. FID in the features of a known classifier, with its floor; the best epoch is chosen by the FID
    of 5,000 samples against 5,000 validation images, test images are used once.
 2. Generator and VAE decoder are one network, so that the comparison is of the training.
 3. The hybrid is built and measured. Mode collapse is decided by thresholds, not by looking.

References: Goodfellow et al. 2014, arXiv:1406.2661; Lim and Ye 2017, arXiv:1705.02894 (hinge);
Radford et al. 2016, arXiv:1511.06434 (DCGAN); Kingma and Welling 2014, arXiv:1312.6114; Miyato et
al. 2018, arXiv:1802.05957 (spectral normalisation).
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

import common

N_VAL = 5000
NOISE_DIM = 32  # of the hybrid's generator of codes
ADVERSARIAL = 10.0  # nats per unit of the hybrid's image discriminator while fine-tuning
TUNED = {"loss": "hinge", "z_dim": 64, "lr": 1e-3, "epochs": 30}
# a run is called collapsed if any of these fails; fixed before the runs
COLLAPSE = {"entropy": 2.0, "classes": 10, "recall": 0.2}  # nats of at most 2.30; of 10; share

# ------------------------------------------------------------------------------------------- Config


def parse_args(argv=None):
    p = common.Parser(__doc__, epochs=10, batch_size=128, lr=2e-4, several_datasets=True)
    flag, number = p.add_argument, common.number
    flag("--model", choices=["gan", "vae", "vae-gan", "tuned-gan"], nargs="+",
         default=["gan", "vae", "vae-gan", "tuned-gan"], help="what to train")
    flag("--loss", choices=["hinge", "bce"], nargs="+", default=["hinge", "bce"], help="gan")
    flag("--z-dim", type=number(int, 1), nargs="+", default=[32, 64, 128], help="gan: noise")
    flag("--latent-dim", type=number(int, 1), nargs="+",
         help="vae, vae-gan: dimensions of z (if not given: 8 16 32 and 8 16)")
    flag("--samples", type=number(int, 100), default=10_000, help="images measured per run")
    return p.parse_args(argv)


def grid(args, datasets: list[str]) -> list[dict]:
    """The configuration of every run asked for."""
    unique = lambda values: list(dict.fromkeys(values))
    runs = []
    for dataset in datasets:
        for model in unique(args.model):
            if model == "gan":
                own = [{"loss": loss, "z_dim": z} for loss in unique(args.loss)
                       for z in unique(args.z_dim)]
            elif model == "tuned-gan":
                own = [TUNED]
            else:
                given = args.latent_dim or ([8, 16, 32] if model == "vae" else [8, 16])
                own = [{"latent_dim": d} for d in unique(given)]
            runs += [{"dataset": dataset, "model": model, "epochs": args.epochs,
                      "batch_size": args.batch_size, "lr": args.lr,
                      "train_size": args.train_size or 60_000 - N_VAL, **of, "seed": seed}
                     for of in own for seed in unique(args.seeds)]
    return runs


def variant(config: dict) -> str:
    """A run's name and folder, as in the source: 'MNIST_GAN_hinge_z64', 'MNIST_VAE_latent16'."""
    dataset = common.DATASETS[config["dataset"]]
    if config["model"] == "gan":
        return f"{dataset}_GAN_{config['loss']}_z{config['z_dim']}"
    if config["model"] == "tuned-gan":
        return f"{dataset}_GAN_tuned"
    return f"{dataset}_{config['model'].upper()}_latent{config['latent_dim']}"


def split(data: common.Data, config: dict) -> dict[str, Tensor]:
    """Indices of the run's training images and of 5,000 others for validation, by its seed."""
    if config["train_size"] > len(data.x_train) - N_VAL:
        raise common.UserError(f"--train-size {config['train_size']}: "
                               f"{len(data.x_train) - N_VAL} images are left for training after "
                               f"{N_VAL} for validation; take at most that many")
    order = torch.randperm(len(data.x_train), generator=common.generator(config["seed"], "split"))
    return {"val": order[:N_VAL], "train": order[N_VAL:N_VAL + config["train_size"]]}


# -------------------------------------------------------------------------------------------- Model


class Generator(nn.Module):
    """Codes (B, d) to images (B, 1, 28, 28) in (0, 1): the GAN's generator and the VAE's decoder.

    Only the first layer depends on d. In eval mode an image depends on its own code alone.
    """

    def __init__(self, d: int):
        super().__init__()
        self.first = nn.Linear(d, 64 * 7 * 7)
        self.trunk = nn.Sequential(
            nn.Unflatten(1, (64, 7, 7)), nn.BatchNorm2d(64), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1))  # (B, 32, 14, 14), then logits

    def logits(self, z: Tensor) -> Tensor:
        return self.trunk(self.first(z))

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(z).sigmoid()


def convolutions(outputs: int, norm: str) -> nn.Sequential:
    """Images to (B, outputs); norm is "batch" or "spectral"."""
    wrap = nn.utils.parametrizations.spectral_norm if norm == "spectral" else lambda layer: layer
    return nn.Sequential(
        wrap(nn.Conv2d(1, 32, 4, stride=2, padding=1)), nn.LeakyReLU(0.2),  # (B, 32, 14, 14)
        wrap(nn.Conv2d(32, 64, 4, stride=2, padding=1)),  # (B, 64, 7, 7)
        *([nn.BatchNorm2d(64)] if norm == "batch" else []), nn.LeakyReLU(0.2), nn.Flatten(),
        wrap(nn.Linear(3136, outputs)))


class Discriminator(nn.Module):
    """Images (B, 1, 28, 28) to logits (B,): positive for real."""

    def __init__(self, norm: str = "batch"):
        super().__init__()
        self.body = convolutions(1, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[:, 0]


class Encoder(nn.Module):
    """q(z | x): mean and log-variance, (B, d) each."""

    def __init__(self, d: int):
        super().__init__()
        self.body = convolutions(2 * d, "batch")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.body(x).chunk(2, dim=1)
        return mu, logvar


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    """The hybrid's generator of codes and its discriminator of codes."""
    return nn.Sequential(nn.Linear(inputs, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256),
                         nn.LeakyReLU(0.2), nn.Linear(256, outputs))


# ---------------------------------------------------------------------------------------- Objective


def d_loss(loss: str, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from its logits: 2 (hinge) or 2 ln 2 (bce) when it is blind."""
    if loss == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def g_loss(loss: str, fake: Tensor) -> Tensor:
    """The generator's loss: 0 (hinge) or ln 2 (bce, non-saturating) when D is blind."""
    return -fake.mean() if loss == "hinge" else F.softplus(-fake).mean()


def elbo_losses(encoder: Encoder, decoder: Generator, x: Tensor) -> Tensor:
    """(-ELBO, reconstruction, KL) of grey images, (3,), nats per image; the Bernoulli one."""
    mu, logvar = encoder(x)
    z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
    logits = decoder.logits(z)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()
    return torch.stack([reconstruction + kl, reconstruction, kl])


# -------------------------------------------------------------------------------------------- Train


def step_of(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """One step down the loss; the norm of the gradient."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([
        w.grad for group in optimizer.param_groups for w in group["params"]])
    optimizer.step()
    return norm


class Gan:
    """A generator and a discriminator that take turns."""

    names = ("d_loss", "g_loss", "d_gradient", "g_gradient", "accuracy_real", "accuracy_fake")

    def __init__(self, config: dict, device):
        tuned = config["model"] == "tuned-gan"
        self.loss, self.z_dim = config["loss"], config["z_dim"]
        self.G = Generator(self.z_dim).to(device, memory_format=torch.channels_last)
        self.D = Discriminator("spectral" if tuned else "batch").to(
            device, memory_format=torch.channels_last)
        self.modules = {"G": self.G, "D": self.D}
        self.average = None
        if tuned:
            self.average = torch.optim.swa_utils.AveragedModel(
                self.G, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999),
                use_buffers=True)
            self.modules["average"] = self.average
        adam = lambda m: torch.optim.Adam(m.parameters(), lr=config["lr"], betas=(0.5, 0.999),
                                          fused=device.type != "mps")
        self.optimizers = {"optimizer_G": adam(self.G), "optimizer_D": adam(self.D)}

    def step(self, x: Tensor, epoch: int) -> Tensor:
        """A step of D, then one of G with fresh noise; (6,) as `names`."""
        noise = lambda: torch.randn(len(x), self.z_dim, device=x.device)
        fake = self.G(noise()).detach()  # D's step must not reach G
        real_logits, fake_logits = self.D(x), self.D(fake)
        loss_d = d_loss(self.loss, real_logits, fake_logits)
        d_norm = step_of(self.optimizers["optimizer_D"], loss_d)
        loss_g = g_loss(self.loss, self.D(self.G(noise())))
        g_norm = step_of(self.optimizers["optimizer_G"], loss_g)
        if self.average:
            self.average.update_parameters(self.G)
        return torch.stack([loss_d, loss_g, d_norm, g_norm, (real_logits > 0).float().mean(),
                            (fake_logits < 0).float().mean()]).detach()

    def sample(self, z: Tensor) -> Tensor:
        return (self.average or self.G)(z)


class Vae:
    """An encoder and a decoder."""

    names = ("loss", "reconstruction", "kl")

    def __init__(self, config: dict, device):
        self.z_dim = config["latent_dim"]
        self.E = Encoder(self.z_dim).to(device, memory_format=torch.channels_last)
        self.G = Generator(self.z_dim).to(device, memory_format=torch.channels_last)
        self.modules = {"G": self.G, "E": self.E}
        self.optimizers = {"optimizer": torch.optim.Adam(
            [*self.E.parameters(), *self.G.parameters()], lr=config["lr"], betas=(0.5, 0.999),
            fused=device.type != "mps")}

    def step(self, x: Tensor, epoch: int) -> Tensor:
        losses = elbo_losses(self.E, self.G, x)
        step_of(self.optimizers["optimizer"], losses[0])
        return losses.detach()

    def sample(self, z: Tensor) -> Tensor:
        return self.G(z)


class VaeGan:
    """A VAE (first third of the epochs); with it frozen, a generator of codes H against two
    discriminators, of codes and of images (second third); all of it together (last third).
    """

    names = ("loss", "reconstruction", "kl", "d_loss", "h_loss")

    def __init__(self, config: dict, device):
        vae = Vae(config, device)
        self.E, self.G, d, self.z_dim = vae.E, vae.G, config["latent_dim"], NOISE_DIM
        self.H, self.D_z = (perceptron(*sizes).to(device) for sizes in [(NOISE_DIM, d), (d, 1)])
        self.D_x = Discriminator("spectral").to(device, memory_format=torch.channels_last)
        self.modules = {"G": self.G, "E": self.E, "H": self.H, "D_z": self.D_z, "D_x": self.D_x}
        adam = lambda *ms: torch.optim.Adam([w for m in ms for w in m.parameters()],
                                            lr=config["lr"], betas=(0.5, 0.999),
                                            fused=device.type != "mps")
        self.optimizers = {**vae.optimizers, "optimizer_H": adam(self.H),
                           "optimizer_D": adam(self.D_z, self.D_x)}
        self.epochs = config["epochs"]  # of each stage

    def step(self, x: Tensor, epoch: int) -> Tensor:
        stage = (epoch - 1) // self.epochs
        if stage == 0:
            losses = elbo_losses(self.E, self.G, x)
            step_of(self.optimizers["optimizer"], losses[0])
            return F.pad(losses.detach(), (0, 2))
        frozen = stage == 1
        for m in (self.E, self.G):  # frozen means BatchNorm's statistics too
            m.train(not frozen).requires_grad_(not frozen)
        noise = lambda: torch.randn(len(x), self.z_dim, device=x.device)
        with torch.no_grad():
            mu, logvar = self.E(x)
            z_real = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            z_fake = self.H(noise())
            x_fake = self.G(z_fake)
        loss_d = (d_loss("hinge", self.D_z(z_real)[:, 0], self.D_z(z_fake)[:, 0])
                  + d_loss("hinge", self.D_x(x), self.D_x(x_fake)))
        step_of(self.optimizers["optimizer_D"], loss_d)
        z_fake = self.H(noise())
        on_images = g_loss("hinge", self.D_x(self.G(z_fake)))
        loss_h = g_loss("hinge", self.D_z(z_fake)[:, 0]) + on_images
        if frozen:
            step_of(self.optimizers["optimizer_H"], loss_h)
            with torch.no_grad():
                losses = elbo_losses(self.E, self.G, x)
        else:
            losses = elbo_losses(self.E, self.G, x)
            both = [*self.E.parameters(), *self.G.parameters()]
            own = torch.autograd.grad(losses[0] + ADVERSARIAL * on_images, both, retain_graph=True)
            step_of(self.optimizers["optimizer_H"], loss_h)
            for w, gradient in zip(both, own, strict=True):
                w.grad = gradient
            self.optimizers["optimizer"].step()
        return torch.cat([losses.detach(), torch.stack([loss_d, loss_h]).detach()])

    def sample(self, z: Tensor) -> Tensor:
        return self.G(self.H(z))


SYSTEMS = {"gan": Gan, "tuned-gan": Gan, "vae": Vae, "vae-gan": VaeGan}


def n_epochs(config: dict) -> int:
    """Epochs in all: the hybrid has three stages."""
    return config["epochs"] * (3 if config["model"] == "vae-gan" else 1)


def train(config: dict, x: Tensor, f_val: Tensor, classifier, folder: Path, args) -> tuple:
    """Train, or continue from the folder's checkpoint; the system with the best epoch's weights,
    and the history.

    Best is by the FID of 5,000 samples against validation features f_val; of the hybrid, among the
    fine-tuned epochs. Every epoch seeds its own streams. Raises UserError when a loss is not
    finite.
    """
    seed, n, batch_size = config["seed"], len(x), config["batch_size"]
    torch.manual_seed(common.seed_from(seed, "weights"))
    system = SYSTEMS[config["model"]](config, x.device)
    parts = {**system.modules, **system.optimizers}
    history = common.restore(folder, config, parts)
    board = common.summary_writer(folder / "logs") if args.tensorboard else None
    steps, last = max(1, n // batch_size), n_epochs(config)
    z_val = torch.randn(min(N_VAL, args.samples), system.z_dim,
                        generator=common.generator("z", "val"))
    z_shown = torch.randn(64, system.z_dim, generator=common.generator("z", "shown"))
    title = f"{variant(config)}/seed_{seed}"
    bar = tqdm(range(1, last + 1), title, initial=len(history), disable=None)
    step = torch.compile(system.step) if args.compile else system.step
    for epoch in range(len(history) + 1, last + 1):
        start = time.perf_counter()
        set_mode(system, True)
        order = torch.randperm(n, generator=common.generator(seed, "order", epoch)).to(x.device)
        torch.manual_seed(common.seed_from(seed, "noise", epoch))
        losses = torch.stack([step(x[i], epoch) for i in order[:steps * batch_size].split(
            batch_size)])
        if not losses.isfinite().all():
            bad = (~losses.isfinite().all(1)).nonzero()[0].item() + 1
            raise common.UserError(f"the loss of {title} is not finite in epoch {epoch}, step "
                                   f"{bad}; {folder} keeps epoch {epoch - 1}; try a lower --lr")
        seconds = time.perf_counter() - start
        set_mode(system, False)
        fid = common.frechet_distance(classifier.look(draw(system, z_val, x.device))[0], f_val)
        history.append({"epoch": epoch, **dict(zip(system.names, losses.mean(0).tolist(),
                                                   strict=True)),
                        "val_fid": fid, "seconds": seconds})
        done = [h["val_fid"] for h in history if chosen_from(config, h["epoch"])]
        best = bool(done) and chosen_from(config, epoch) and fid <= min(done)
        if epoch in (1, 5, last):
            common.save_grid(folder / f"samples_epoch_{epoch}.png", draw(system, z_shown, x.device),
                             8, f"{variant(config)}, epoch {epoch}")
        common.save_epoch(folder, config, history, parts, best, board)
        bar.set_postfix(fid=f"{fid:.2f}", refresh=False)
        bar.update()
    bar.close()
    saved = common.load_torch(folder / "best_model.pt")
    for name, module in system.modules.items():
        module.load_state_dict(saved[name])
    set_mode(system, False)
    return system, history


def chosen_from(config: dict, epoch: int) -> bool:
    """Whether the best epoch may be this one: of the hybrid, only fine-tuned ones."""
    return config["model"] != "vae-gan" or epoch > 2 * config["epochs"]


def set_mode(system, training: bool) -> None:
    for module in system.modules.values():
        module.train(training)


@torch.no_grad()
def draw(system, z: Tensor, device) -> Tensor:
    """Images of noise z, (N, 1, 28, 28) on the CPU; in eval mode, so one by one the same."""
    assert not system.G.training, "generators are measured in eval mode"
    return torch.cat([system.sample(c.to(device)).cpu() for c in z.split(1000)])


# ----------------------------------------------------------------------------------------- Evaluate


class Judge:
    """Real test images of a dataset, as every run of it is measured against them."""

    def __init__(self, data: common.Data, classifier, samples: int):
        self.data, self.look, self.n = data, classifier.look, samples
        self.f_test = self.look(data.x_test)[0][:samples]
        self.classifier = {"accuracy": classifier.accuracy, "sha256": classifier.sha256}
        order = torch.randperm(len(data.x_train), generator=common.generator("real"))[:samples]
        real, mean = data.x_train[order], data.x_train.mean(0, keepdim=True)
        p = data.x_test.double()
        self.scale = {  # what a table needs to be read
            "real": self.score(real), "pixel_mean": self.score(mean.repeat(samples, 1, 1, 1)),
            "pixel_entropy": float((torch.special.entr(p) + torch.special.entr(1 - p)).sum()
                                   / len(p))}

    def score(self, x: Tensor) -> dict:
        """FID, precision, recall, density, coverage and the class histogram of images x."""
        f, probs = self.look(x)
        share = np.bincount(probs.argmax(1), minlength=10) / len(x)
        nonzero = share[share > 0]
        return {"fid": common.frechet_distance(f, self.f_test),
                **common.manifold_metrics(self.f_test, f), "class_share": share.tolist(),
                "entropy": abs(float((nonzero * np.log(nonzero)).sum())),
                "classes": int((share >= 0.01).sum())}  # a tenth of an even share


def collapsed(scores: dict) -> list[str]:
    """Which of the thresholds a run fails; empty for a run that has not collapsed."""
    return [f"{key} {scores[key]:.2g} < {low:g}" for key, low in COLLAPSE.items()
            if scores[key] < low]


def evaluate(config: dict, args, data, part, system, history, judge: Judge, folder, device) -> dict:
    """final_metrics.json and the pictures of a trained system. Test images are used here only."""
    z = torch.randn(args.samples, system.z_dim, generator=common.generator(config["seed"], "z"))
    start = time.perf_counter()
    x_gen = draw(system, z, device)
    seconds = time.perf_counter() - start
    x_train = data.x_train[part["train"]]
    test_distance = common.nearest(data.x_test[:2000], x_train)[0].mean()
    allowed = [h for h in history if chosen_from(config, h["epoch"])]
    best = min(allowed, key=lambda h: h["val_fid"])
    late = [h["val_fid"] for h in history[-max(2, len(history) // 2):]]
    metrics = {
        **judge.score(x_gen), "scale": judge.scale, "n": args.samples,
        "copying": float(common.nearest(x_gen[:2000], x_train)[0].mean() / test_distance),
        "best_epoch": best["epoch"], "val_fid": best["val_fid"], "last": history[-1],
        "fid_spread": float(np.std(np.log(late), ddof=1)) if len(late) > 1 else None,
        "parameters": {k: sum(w.numel() for w in m.parameters())
                       for k, m in system.modules.items()},
        "classifier": judge.classifier, "seconds_to_sample": seconds,
        "seconds_per_epoch": float(np.median([h["seconds"] for h in history])),
        "seconds_train": sum(h["seconds"] for h in history),
        "environment": common.environment(device)}
    if "E" in system.modules:
        torch.manual_seed(common.seed_from(config["seed"], "test"))
        with torch.no_grad():
            losses = torch.stack([elbo_losses(system.E, system.G, c.to(device)).cpu().double()
                                  * len(c) for c in data.x_test.split(1000)]).sum(0)
        metrics["elbo"] = dict(zip(["loss", "reconstruction", "kl"],
                                   (losses / len(data.x_test)).tolist(), strict=True))
    figures(config, folder, history, data, system, device)
    common.save_json(folder / "final_metrics.json", metrics)
    return metrics


# ------------------------------------------------------------------------------- Figures and report


def figures(config: dict, folder: Path, history: list, data, system, device) -> None:
    """samples.png, interpolation.png, losses.png; with an encoder reconstructions.png."""
    name, g = variant(config), common.generator("figures")
    z = torch.randn(64, system.z_dim, generator=g)
    common.save_grid(folder / "samples.png", draw(system, z, device), 8, f"{name}: samples")
    x = torch.cat([data.x_test[data.y_test == digit][:1] for digit in range(10)])
    t = torch.linspace(0, 1, 10)[:, None]
    if "E" in system.modules:
        with torch.no_grad():
            mu = system.E(x.to(device))[0]
            x_hat = system.G(mu).cpu()
            between = torch.cat([(1 - t).to(device) * mu[i] + t.to(device) * mu[i + 1]
                                 for i in range(0, 10, 2)])
            path = system.G(between).cpu()
        common.save_grid(folder / "reconstructions.png", torch.cat([x, x_hat]), 10,
                         f"{name}: test images above their reconstructions")
        what = "between test images"
    else:
        path = draw(system, torch.cat([(1 - t) * z[i] + t * z[i + 1] for i in range(0, 10, 2)]),
                    device)
        what = "between two z"
    common.save_grid(folder / "interpolation.png", path, 10, f"{name}: {what}")
    figure = Figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    for key in system.names:
        if "accuracy" not in key and "gradient" not in key:
            left.plot([h["epoch"] for h in history], [h[key] for h in history], ".-", label=key)
    left.set(xlabel="epoch", title="losses")
    left.legend(fontsize=8)
    right.plot([h["epoch"] for h in history], [h["val_fid"] for h in history], ".-")
    right.set(xlabel="epoch", title="FID on validation images", yscale="log")
    figure.tight_layout()
    common.save_figure(folder / "losses.png", figure)


def get(runs: list, *keys: str) -> list:
    """One metric of every run."""
    found = [run["metrics"] for run in runs]
    for key in keys:
        found = [m[key] for m in found]
    return found


def show(runs: list, *keys: str, digits: int = 2) -> str:
    return common.mean_std(get(runs, *keys), digits)


def all_runs(base: Path) -> dict[str, list]:
    """Finished runs of every dataset by name; runs that differ in more than the seed apart."""
    groups: dict[tuple, list] = {}
    for dataset in common.DATASETS:
        for run in common.finished_runs(base / dataset):
            run["folder"] = Path(dataset) / run["folder"]
            same = {k: v for k, v in run["config"].items() if k != "seed"}
            groups.setdefault((str(same), run["metrics"]["n"]), []).append(run)
    order = lambda c: (list(common.DATASETS).index(c["dataset"]), list(SYSTEMS).index(c["model"]),
                       c.get("loss", ""), c.get("z_dim", 0), c.get("latent_dim", 0))
    named: dict[str, list] = {}
    for runs in sorted(groups.values(), key=lambda runs: order(runs[0]["config"])):
        c, title = runs[0]["config"], variant(runs[0]["config"])
        if title in named:
            title += f" ({c['epochs']} epochs of {c['train_size']}, {runs[0]['metrics']['n']})"
        named[title] = runs
    return named


def report(base: Path) -> str:
    """Write report.md and its plots from every finished run below base; returns the text."""
    groups = all_runs(base)
    if not groups:
        raise common.UserError(f"no finished run in {base}; run without --report-only first")
    of = lambda *models: {name: runs for name, runs in groups.items()
                          if runs[0]["config"]["model"] in models}
    gans, vaes, hybrids = of("gan", "tuned-gan"), of("vae"), of("vae-gan")
    datasets = list(dict.fromkeys(runs[0]["config"]["dataset"] for runs in groups.values()))
    lines = [f"# GAN against VAE on {' and '.join(common.DATASETS[d] for d in datasets)}",
             "Which makes better images, a GAN or a VAE, and what does combining them bring?",
             answer_models(groups, datasets), "## Summary",
             f"{len(gans)} GANs, {len(vaes)} VAEs, {len(hybrids)} hybrids; "
             f"{sum(map(len, groups.values()))} runs."]
    for title, part in [("Part 1: GANs", gans), ("Part 2: VAEs and hybrids", vaes | hybrids)]:
        if part:
            lines += [f"## {title}", results_table(part, datasets if part is gans else [])]
        for name, runs in part.items():
            lines += run_section(name, runs)
    lines += ["## Gallery of generated images", *[
        f"![{name}]({runs[0]['folder'].as_posix()}/samples.png)" for name, runs in groups.items()]]
    lines += ["## Analysis plots", *plots(base, groups, datasets)]
    lines += ["## FID", fid_table(groups, datasets), "## The four questions",
              "### 1. What moves the quality and the stability of a GAN most?",
              answer_stability(gans), "### 2. Mode collapse?", answer_collapse(groups),
              "### 3. How does the latent dimension affect a VAE?", answer_latent(vaes, datasets),
              "### 4. Does the hybrid combine the benefits?", answer_hybrid(groups)]
    rows = [[name, r["config"]["seed"], r["config"]["epochs"], f"`{e['command']}`", e["commit"],
             e["device"], e["torch"], f"{r['metrics']['seconds_train']:.0f}"]
            for name, runs in groups.items() for r in runs for e in [r["metrics"]["environment"]]]
    lines += ["## How this was made", common.table(
        ["run", "seed", "epochs", "command", "commit", "device", "torch", "s to train"], rows)]
    text = "\n\n".join(lines) + "\n"
    common.save_text(base / "report.md", text)
    return text


def scale_rows(groups: dict, datasets: list) -> list[list]:
    """A row of real training images and one of the pixel mean for each dataset."""
    rows = []
    for dataset in datasets:
        m = next(r for runs in groups.values() for r in runs
                 if r["config"]["dataset"] == dataset)["metrics"]
        for key in ["real", "pixel_mean"]:
            s = m["scale"][key]
            rows.append([f"{common.DATASETS[dataset]}: {key.replace('_', ' ')}", "",
                         f"{s['fid']:.3f}", *[f"{s[k]:.2f}" for k in [
                             "precision", "recall", "density", "coverage", "entropy"]],
                         s["classes"], *[""] * 3])
    return rows


def results_table(groups: dict, datasets: list) -> str:
    rows = [[name, len(runs), show(runs, "fid"), *[show(runs, k) for k in [
        "precision", "recall", "density", "coverage", "entropy"]],
        show(runs, "classes", digits=0), show(runs, "copying"), show(runs, "best_epoch", digits=0),
        show(runs, "seconds_per_epoch", digits=1)] for name, runs in groups.items()]
    n = next(iter(groups.values()))[0]["metrics"]["n"]
    return common.table(["run", "n", "FID", "precision", "recall", "density", "coverage",
                         "entropy", "classes", "copying", "best epoch", "s per epoch"],
                        scale_rows(groups, datasets) + rows) + (
        f"\n\nFID is in the features of the metric classifier, not Inception's, {n:,} samples "
        "against as many test images; the real row is the floor. Entropy of the class histogram "
        "in nats (at most 2.30); a class is present with 1 % of the samples. The best epoch is "
        "that of the lowest FID on validation images. Copying: mean distance to the nearest "
        "training image over that of test images.")


def run_section(name: str, runs: list) -> list[str]:
    """The source's section of a run: its settings, its last losses and its pictures."""
    c, folder = runs[0]["config"], runs[0]["folder"].as_posix()
    own = {k: v for k, v in c.items() if k in ("loss", "z_dim", "latent_dim", "lr", "epochs")}
    last = runs[0]["metrics"]["last"]
    losses = ", ".join(f"{k} {common.mean_std([r['metrics']['last'][k] for r in runs])}"
                       for k in last if k not in ("epoch", "seconds"))
    lines = [f"### {name}", f"{', '.join(f'{k} {v}' for k, v in own.items())}; last epoch: "
             f"{losses}."]
    if "elbo" in runs[0]["metrics"]:
        lines.append(f"Test −ELBO {show(runs, 'elbo', 'loss')} nats (reconstruction "
                     f"{show(runs, 'elbo', 'reconstruction')}, KL {show(runs, 'elbo', 'kl')}; "
                     "floor of the reconstruction, the mean pixel entropy, "
                     f"{runs[0]['metrics']['scale']['pixel_entropy']:.2f}).")
    pictures = ["reconstructions", "interpolation"] if "elbo" in runs[0]["metrics"] else [
        "interpolation"]
    epochs = sorted({e for e in (1, 5) if e <= n_epochs(c)} | {n_epochs(c)})
    return [*lines, *[f"![{name}: {p}]({folder}/{p}.png)" for p in [
        *[f"samples_epoch_{e}" for e in epochs], *pictures, "losses"]]]


def floors(groups: dict, datasets: list) -> dict[str, float]:
    """FID of as many real training images, by dataset."""
    return {d: next(r for runs in groups.values() for r in runs if r["config"]["dataset"] == d)[
        "metrics"]["scale"]["real"]["fid"] for d in datasets}


def fid_table(groups: dict, datasets: list) -> str:
    rows = []
    for dataset, floor in floors(groups, datasets).items():
        of = [(name, runs) for name, runs in groups.items()
              if runs[0]["config"]["dataset"] == dataset]
        for name, runs in sorted(of, key=lambda g: np.mean(get(g[1], "fid"))):
            rows.append([name, len(runs), show(runs, "fid"), f"{floor:.3f}",
                         f"{np.mean(get(runs, 'fid')) / floor:.0f}"])
    return common.table(["run", "n", "FID", "floor", "FID / floor"], rows)


def plots(base: Path, groups: dict, datasets: list) -> list[str]:
    """gan_loss_comparison, gan_fid_comparison, vae_loss_comparison, vae_fid_comparison,
    fid_gan_vs_vae and precision_recall, as PNG; their lines of the report.
    """
    short = lambda name: name.split("_", 1)[1].replace("latent", "").replace("_", " ")
    of = lambda dataset, *models: {name: runs for name, runs in groups.items() if
                                   runs[0]["config"]["dataset"] == dataset
                                   and runs[0]["config"]["model"] in models}
    floor, made = floors(groups, datasets), []

    def panels(name: str, models: list[str], draw_one) -> None:
        if not any(of(d, *models) for d in datasets):
            return
        figure = Figure(figsize=(6 * len(datasets), 4))
        for axes, dataset in zip(np.atleast_1d(figure.subplots(1, len(datasets))), datasets,
                                 strict=True):
            axes.set_title(common.DATASETS[dataset])
            draw_one(axes, dataset, of(dataset, *models))
        figure.tight_layout()
        common.save_figure(base / f"{name}.png", figure)
        made.append(f"![{name}]({name}.png)")

    def losses(keys):
        def draw_one(axes, dataset, runs_of):
            for i, (name, runs) in enumerate(runs_of.items()):
                for key, style in zip(keys, ["-", "--", ":"], strict=False):
                    h = runs[0]["history"]
                    axes.plot([r["epoch"] for r in h], [r[key] for r in h], style, color=f"C{i}",
                              label=short(name) if style == "-" else None)
            axes.set(xlabel="epoch", ylabel=" (−), ".join(keys[:2]) + " (- -)"
                     + (f", {keys[2]} (··)" if len(keys) > 2 else ""))
            if runs_of:
                axes.legend(fontsize=7)
        return draw_one

    def bars(axes, dataset, runs_of):
        names = list(runs_of)
        for i, name in enumerate(names):
            axes.plot([i] * len(runs_of[name]), get(runs_of[name], "fid"), "o")
        axes.axhline(floor[dataset], color="k", ls=":", label="floor (real images)")
        axes.set_xticks(range(len(names)), [short(n) for n in names], rotation=45, ha="right",
                        fontsize=8)
        axes.set(ylabel="FID, a point per seed", yscale="log")
        axes.legend(fontsize=8)

    def scatter(axes, dataset, runs_of):
        for i, (name, runs) in enumerate(runs_of.items()):
            marker = {"gan": "o", "tuned-gan": "*", "vae": "s", "vae-gan": "^"}[
                runs[0]["config"]["model"]]
            axes.plot(get(runs, "recall"), get(runs, "precision"), marker, color=f"C{i % 10}",
                      label=short(name))
        real = next(iter(runs_of.values()))[0]["metrics"]["scale"]["real"]
        axes.plot(real["recall"], real["precision"], "kP", label="real images")
        axes.set(xlabel="recall", ylabel="precision")
        axes.legend(fontsize=6)

    panels("gan_loss_comparison", ["gan"], losses(["d_loss", "g_loss"]))
    panels("gan_fid_comparison", ["gan", "tuned-gan"], bars)
    panels("vae_loss_comparison", ["vae"], losses(["loss", "reconstruction", "kl"]))
    panels("vae_fid_comparison", ["vae"], bars)
    panels("fid_gan_vs_vae", ["gan", "tuned-gan", "vae", "vae-gan"], bars)
    panels("precision_recall", ["gan", "tuned-gan", "vae", "vae-gan"], scatter)
    return made


def best_of(groups: dict, dataset: str, *models: str) -> tuple[str, list] | None:
    """The name and runs with the lowest mean test FID."""
    there = [(name, runs) for name, runs in groups.items()
             if runs[0]["config"]["dataset"] == dataset and runs[0]["config"]["model"] in models]
    return min(there, key=lambda g: np.mean(get(g[1], "fid")), default=None)


def answer_models(groups: dict, datasets: list) -> str:
    said = []
    for dataset in datasets:
        gan, vae = (best_of(groups, dataset, model) for model in ("gan", "vae"))
        if gan and vae:
            a, b = (np.mean(get(runs, "fid")) for _, runs in (gan, vae))
            said.append(f"On {common.DATASETS[dataset]} the best GAN ({gan[0]}, FID "
                        f"{show(gan[1], 'fid')}) has {a / b:.2f} × the FID of the best VAE "
                        f"({vae[0]}, {show(vae[1], 'fid')}).")
    return "**Answer.** " + (" ".join(said) or "There is no pair of a GAN and a VAE yet.")


def effects(gans: dict, factor: str, measure) -> dict[str, tuple[float, float, int]]:
    """Mean differences of log `measure` between values of a factor, over runs that are otherwise
    the same (paired by the rest of the settings and the seed): {"a against b": (mean, half of the
    95 % t-interval, pairs)}.
    """
    from scipy.stats import t  # comes with scikit-learn

    by_value: dict = {}
    for runs in gans.values():
        for run in runs:
            if run["config"]["model"] == "gan":
                rest = str({k: v for k, v in run["config"].items() if k != factor})
                by_value.setdefault(run["config"][factor], {})[rest] = run
    found, settings = {}, list(by_value)
    for i, a in enumerate(settings):
        for b in settings[i + 1:]:
            both = sorted(set(by_value[a]) & set(by_value[b]))
            d = [math.log(measure(by_value[b][k]) / measure(by_value[a][k])) for k in both]
            if len(d) > 1:
                half = t.ppf(0.975, len(d) - 1) * np.std(d, ddof=1) / math.sqrt(len(d))
                found[f"{b} against {a}"] = (float(np.mean(d)), float(half), len(d))
    return found


def answer_stability(gans: dict) -> str:
    """Effect sizes on FID and on what is comparable between losses, never raw losses."""
    late = lambda run, key: [h[key] for h in run["history"][-max(2, len(run["history"]) // 2):]]
    measures = {
        "FID": lambda r: r["metrics"]["fid"] / r["metrics"]["scale"]["real"]["fid"],
        "spread of FID over epochs": lambda r: max(np.std(np.log(late(r, "val_fid"))), 1e-6),
        "D's error on real and fake": lambda r: max(
            2 - np.mean(late(r, "accuracy_real")) - np.mean(late(r, "accuracy_fake")), 1e-6),
        "G's gradient norm": lambda r: np.mean(late(r, "g_gradient"))}
    rows, winners = [], {}
    for what, measure in measures.items():
        for factor in ["loss", "z_dim", "dataset"]:
            for pair, (mean, half, n) in effects(gans, factor, measure).items():
                certain = abs(mean) > half
                rows.append([what, f"{factor}: {pair}", f"{math.exp(mean):.2f}",
                             f"{math.exp(mean - half):.2f}–{math.exp(mean + half):.2f}", n,
                             "yes" if certain else "no"])
                if certain and abs(mean) > abs(winners.get(what, ("", "", 0))[2]):
                    winners[what] = (factor, pair, mean)
    if not rows:
        return "It cannot be told: no two GANs differ in one setting alone, twice."
    said = [f"{what}: {winners[what][0]} moves it most ({winners[what][1]}: × "
            f"{math.exp(winners[what][2]):.2f})" if what in winners else
            f"{what}: it cannot be told at this n" for what in measures]
    return "; ".join(said) + ".\n\n" + common.table(
        ["measure", "change", "ratio", "95 % interval", "pairs", "told from 1"], rows) + (
        "\n\nRatios of runs that differ in that setting alone, paired over the other settings and "
        "the seeds; FID over each dataset's floor. Intervals are not corrected for their number.")


def answer_collapse(groups: dict) -> str:
    limits = ", ".join(f"{key} < {low:g}" for key, low in COLLAPSE.items())
    found = [f"{name} (seed {r['config']['seed']}: {', '.join(collapsed(r['metrics']))})"
             for name, runs in groups.items() for r in runs if collapsed(r["metrics"])]
    n = sum(map(len, groups.values()))
    return (f"Called collapse, by thresholds fixed before the runs: any of {limits}. "
            + (f"{len(found)} of {n} runs: {'; '.join(found)}." if found else
               f"None of {n} runs."))


def answer_latent(vaes: dict, datasets: list) -> str:
    said = []
    for dataset in datasets:
        runs_of = sorted((runs for runs in vaes.values()
                          if runs[0]["config"]["dataset"] == dataset),
                         key=lambda runs: runs[0]["config"]["latent_dim"])
        if len(runs_of) < 2:
            continue
        low, high = runs_of[0], runs_of[-1]
        dims = [runs[0]["config"]["latent_dim"] for runs in (low, high)]
        seeds = [{r["config"]["seed"]: r for r in runs} for runs in (low, high)]
        both = sorted(set(seeds[0]) & set(seeds[1]))
        for what, keys in [("reconstruction (nats)", ("elbo", "reconstruction")),
                           ("FID", ("fid",))]:
            trend = "; ".join(f"{runs[0]['config']['latent_dim']}: {show(runs, *keys)}"
                              for runs in runs_of)
            means = [np.mean(get(runs, *keys)) for runs in runs_of]
            order = ("falls with every step" if np.all(np.diff(means) < 0) else
                     "rises with every step" if np.all(np.diff(means) > 0) else
                     "is not monotonic")
            test = common.paired(*[get([of[s] for s in both], *keys) for of in seeds[::-1]])
            said.append(f"{common.DATASETS[dataset]}, {what} by latent dimension: {trend}. It "
                        f"{order}; {dims[1]} against {dims[0]} shows {test}.")
    return "\n\n".join(said) or "It cannot be told: no two VAEs of a dataset differ in it."


def answer_hybrid(groups: dict) -> str:
    said = []
    for name, runs in groups.items():
        c = runs[0]["config"]
        if c["model"] != "vae-gan":
            continue
        parent = next((rs for rs in groups.values() if rs[0]["config"] == {
            **c, "model": "vae", "seed": rs[0]["config"]["seed"]}), None)
        gan = best_of(groups, c["dataset"], "gan")
        text = [f"{name}: FID {show(runs, 'fid')}, test reconstruction "
                f"{show(runs, 'elbo', 'reconstruction')} nats"]
        if parent:
            fid, rec = (np.mean(get(runs, *k)) / np.mean(get(parent, *k))
                        for k in [("fid",), ("elbo", "reconstruction")])
            text.append(f"{fid:.2f} × the FID of its VAE and {rec:.2f} × its reconstruction: "
                        + ("sharper samples and reconstructions within 10 %" if
                           fid <= 0.5 and rec <= 1.1 else
                           "not both (half the FID, reconstruction within 10 %)"))
        if gan:
            text.append(f"{np.mean(get(runs, 'fid')) / np.mean(get(gan[1], 'fid')):.2f} × the FID "
                        f"of the best GAN, {gan[0]}")
        said.append("; ".join(text) + ".")
    return "\n\n".join(said) or "It cannot be told: no hybrid has been trained."


# --------------------------------------------------------------------------------------------- main


def load(args) -> list[common.Data]:
    """The datasets asked for; by default both, or glyphs where there is no MNIST."""
    if args.dataset:
        return [common.load_data(name, args.data_dir) for name in dict.fromkeys(args.dataset)]
    first = common.load_data(None, args.data_dir)
    if first.name != "mnist":
        return [first]
    return [first, common.load_data("fashion-mnist", args.data_dir)]


def main(argv=None) -> dict:
    args = parse_args(argv)
    base = Path(args.out_dir) / "gan_vs_vae"
    if args.report_only:
        report(base)
        print(f"report: {base / 'report.md'}")
        return {}
    device = common.pick_device(args.device)
    datas = {data.name: data for data in load(args)}
    runs = grid(args, list(datas))[args.shard]
    parts = [split(datas[c["dataset"]], c) for c in runs]
    folders = [base / c["dataset"] / variant(c) / f"seed_{c['seed']}" for c in runs]
    common.open_runs(folders, runs, args)
    metrics, judges, failed = {}, {}, []
    for config, part, folder in zip(runs, parts, folders, strict=True):
        name, file = f"{variant(config)}/seed_{config['seed']}", folder / "final_metrics.json"
        if file.exists():  # finished, whether or not its weights are still here
            metrics[name] = common.load_json(file)
            if metrics[name]["n"] == args.samples:
                continue
            raise common.UserError(f"{folder} was measured on {metrics[name]['n']} samples, not "
                                   f"{args.samples}; --fresh replaces it, another --out-dir keeps "
                                   "it")
        data = datas[config["dataset"]]
        if data.name not in judges:
            classifier = common.load_classifier(data, device)
            judges[data.name] = classifier, Judge(data, classifier, args.samples)
        classifier, judge = judges[data.name]
        f_val = classifier.look(data.x_train[part["val"]])[0]
        try:
            system, history = train(config, data.x_train[part["train"]].to(device), f_val,
                                    classifier, folder, args)
        except common.UserError as error:  # one run that diverges must not cost the others
            failed.append(str(error))
            continue
        metrics[name] = evaluate(config, args, data, part, system, history, judge, folder, device)
    if metrics:
        report(base)
        print(f"report: {base / 'report.md'}")
    if failed:
        raise common.UserError("; ".join(failed))
    return metrics


if __name__ == "__main__":
    common.guard(main)
