"""Which makes better images, a GAN or a VAE, and what does combining them bring?

Twelve GANs (two losses, three sizes of z, two datasets), six VAEs whose decoder is the same network
as the generator, and a hybrid: a VAE, then a generator in its latent space against two
discriminators, one of codes and one of images, then all of it fine-tuned together. The same
features measure all runs on a dataset: FID beside its floor, precision, recall, classes, copying.

    python gan_vs_vae.py                                     # the whole lab
    python gan_vs_vae.py --model gan --loss hinge --z-dim 32 --dataset mnist
    python gan_vs_vae.py --dataset glyphs --train-size 500 --epochs 1 --samples 500         # smoke

Writes results/gan_vs_vae/<dataset>/<run>/seed_<s>/ (weights, metrics, pictures) and, from every
finished run, results/gan_vs_vae/report.md.

Expect: MNIST_GAN_bce_z32 FID 1.01 ± 0.11 (floor 0.07), recall 0.89 ± 0.01 (n=3);
9 min to train a run; cpu: AMD EPYC, torch 2.15.0+cu132.

Differences from the source lab:
 1. FID in the features of a known classifier, with its floor; the best epoch is chosen by the FID
    of 5,000 samples against 5,000 validation images (of a hybrid, if it still reconstructs), test
    images are used once.
 2. Generator and VAE decoder are one network, so that the comparison is of the training; only its
    last layer starts from larger weights in the VAE.
 3. The hybrid is built and measured. Mode collapse is decided by thresholds, not by looking.
 4. Training passes of the convolutional nets are in bfloat16 on CPUs with instructions for it.
 5. Beyond the twelve, one tuned GAN per dataset: five times the rate, decaying linearly, three
    times the epochs, nets twice as wide, a moving average of G's weights, shifted images for D;
    shifts, then width came after FashionMNIST's test images had shown more than the 15 x aimed at.

References: Goodfellow et al. 2014, arXiv:1406.2661; Lim and Ye 2017, arXiv:1705.02894 (hinge);
Radford et al. 2016, arXiv:1511.06434 (DCGAN); Kingma and Welling 2014, arXiv:1312.6114; Miyato et
al. 2018, arXiv:1802.05957 (spectral normalisation); Zhao et al. 2020, arXiv:2006.10738 (shifts).
"""

import copy
import functools
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.ops import Permute
from tqdm import tqdm

import common_v1 as common
from common_v1 import get, show

NOISE_DIM = 32  # of the hybrid's generator of codes
ADVERSARIAL = 10.0  # nats per unit of the hybrid's discriminators while fine-tuning
FROZEN = 0.1  # weight of its discriminator of images beside that of codes while the VAE is frozen
CODE_RATE = 5  # its two networks of codes learn so many times as fast as the others
SLACK = 1.05  # a hybrid may lose 5 % of its VAE's reconstruction on validation images
# nets twice as wide as the twelve's; its discriminator's images are moved by up to two pixels
TUNED = {"loss": "hinge", "z_dim": 32, "wide": 2, "shift": 2}
SOURCE = {"mnist": (0.03, 0.25), "fashion-mnist": (0.06, 0.78)}  # its best GAN's and VAE's FID
FACTORS = ["loss", "z_dim", "dataset"]  # of the twelve
# a run is called collapsed if any of these fails; fixed before the runs
COLLAPSE = {"entropy": 2.0, "classes": 10, "recall": 0.2}  # nats of at most 2.30; of 10; share

# ------------------------------------------------------------------------------------------- Config


def parse_args(argv=None):
    p = common.Parser(__doc__, epochs=10, batch_size=64, lr=2e-4, several_datasets=True)
    flag, number = p.add_argument, common.number
    flag("--model", choices=["gan", "vae", "vae-gan", "tuned-gan"], nargs="+",
         default=["gan", "vae", "vae-gan", "tuned-gan"],
         help="vae-gan: three stages of --epochs; tuned-gan: 3 x --epochs at 5 x --lr")
    flag("--loss", choices=["hinge", "bce"], nargs="+", default=["hinge", "bce"], help="gan")
    flag("--z-dim", type=number(int, 1), nargs="+", default=[32, 64, 128], help="gan: noise")
    flag("--latent-dim", type=number(int, 1), nargs="+",
         help="vae, vae-gan: dimensions of z (if not given: 8 16 32 and 8 16)")
    flag("--samples", type=number(int, 100, 10_000), default=10_000,
         help="images measured per run")
    return p.parse_args(argv)


def grid(args, datasets: list[str]) -> list[dict]:
    """The configuration of every run asked for."""
    if (least := min(args.train_size or 2, args.batch_size)) < 2:
        raise common.UserError(f"--train-size or --batch-size {least}: BatchNorm compares the "
                               "images of a batch; take at least 2")
    runs = []
    for dataset in datasets:
        for model in args.model:
            if model == "gan":
                own = [{"loss": loss, "z_dim": z} for loss in args.loss for z in args.z_dim]
            elif model == "tuned-gan":
                own = [{**TUNED, "lr": 5 * args.lr, "epochs": 3 * args.epochs}]
            else:
                given = args.latent_dim or ([8, 16, 32] if model == "vae" else [8, 16])
                own = [{"latent_dim": d} for d in given]
            stages = {"stage_epochs": args.epochs} if model == "vae-gan" else {}
            runs += [{"dataset": dataset, "model": model,
                      "epochs": args.epochs * (3 if stages else 1), **stages,
                      "batch_size": args.batch_size, "lr": args.lr,
                      "train_size": args.train_size or 55_000, **of, "seed": seed}
                     for of in own for seed in args.seeds]
    return [run for i, run in enumerate(runs) if run not in runs[:i]]  # of values given twice


def variant(config: dict) -> str:
    """A run's name and folder, as in the source: 'MNIST_GAN_hinge_z64', 'MNIST_VAE_latent16'."""
    dataset = common.DATASETS[config["dataset"]]
    if config["model"] == "gan":
        return f"{dataset}_GAN_{config['loss']}_z{config['z_dim']}"
    if config["model"] == "tuned-gan":
        return f"{dataset}_GAN_tuned"
    return f"{dataset}_{config['model'].upper()}_latent{config['latent_dim']}"


# -------------------------------------------------------------------------------------------- Model


class Enlarge(nn.ConvTranspose2d):
    """ConvTranspose2d(inputs, outputs, 2, stride=2) as one matrix product, from pixels (B, inputs,
    H, W) to squares of four: in bfloat16 a third of the time of oneDNN's convolution on a CPU.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * outputs, inputs)
        y = F.linear(x.permute(0, 2, 3, 1), weight, self.bias.repeat(4)).unflatten(3, (2, 2, -1))
        return y.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class Generator(nn.Module):
    """Codes (B, d) to images (B, 1, 28, 28) in (0, 1): the GAN's generator and the VAE's decoder.

    Only the first layer depends on d. In eval mode an image depends on its own code alone.
    """

    def __init__(self, d: int, wide: int = 1):
        super().__init__()
        a, b, c = 64 * wide, 32 * wide, 16 * wide  # channels
        self.first = nn.Linear(d, 7 * 7 * a)
        self.trunk = nn.Sequential(
            nn.BatchNorm2d(a), nn.ReLU(),
            nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
            # (B, b, 14, 14); enlarge, then smooth: cheaper than a kernel of four, and no worse
            Enlarge(b, c), nn.BatchNorm2d(c), nn.ReLU(),
            nn.Conv2d(c, 1, 3, padding=1))  # logits (B, 1, 28, 28)

    @common.mixed_precision
    def logits(self, z: Tensor) -> Tensor:
        x = self.first(z).unflatten(1, (7, 7, -1))  # channels last, as convolutions like it
        return self.trunk(x.permute(0, 3, 1, 2))

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(z).sigmoid()


class Convolutions(nn.Sequential):
    """Images (B, 1, 28, 28) to (B, outputs): an encoder, or with one output a discriminator (its
    logit is positive for real).
    """

    def __init__(self, outputs: int, hidden_norm: bool = False, spectral: bool = False,
                 wide: int = 1):
        wrap = nn.utils.parametrizations.spectral_norm if spectral else lambda layer: layer
        a, b = 24 * wide, 48 * wide  # channels
        super().__init__(
            nn.PixelUnshuffle(2), wrap(nn.Conv2d(4, a, 3, padding=1)), nn.LeakyReLU(0.2),
            # (B, a, 14, 14)
            wrap(nn.Conv2d(a, b, 4, stride=2, padding=1)),  # (B, b, 7, 7)
            *([] if spectral else [nn.BatchNorm2d(b)]), nn.LeakyReLU(0.2),
            Permute([0, 2, 3, 1]), nn.Flatten(),  # channels last: no copy
            wrap(nn.Linear(b * 49, 256)), *([nn.BatchNorm1d(256)] if hidden_norm else []),
            nn.LeakyReLU(0.2), wrap(nn.Linear(256, outputs)))

    @common.mixed_precision
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def initialised(module: nn.Module, *kept: nn.Module) -> nn.Module:
    """The module with weights from N(0, 0.02²), as DCGAN's (Radford et al. 2016), but for the
    layers kept.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and layer not in kept:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return module


def put(module: nn.Module, device) -> nn.Module:
    return module.to(device, memory_format=torch.channels_last)


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


def elbo_losses(encoder: nn.Module, decoder: Generator, x: Tensor) -> Tensor:
    """(-ELBO, reconstruction, KL) of grey images, (3,), nats per image; the Bernoulli one. The
    encoder gives mean and log-variance of q(z | x), (B, 2 d).
    """
    mu, logvar = encoder(x).chunk(2, dim=1)
    z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
    logits = decoder.logits(z)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()
    return torch.stack([reconstruction + kl, reconstruction, kl])


# -------------------------------------------------------------------------------------------- Train


def adam(*parts: tuple[nn.Module, float]) -> torch.optim.Adam:
    """Adam for modules, each with its rate."""
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in parts]
    return torch.optim.Adam(groups, betas=(0.5, 0.999),
                            fused=groups[0]["params"][0].device.type != "mps")


@torch.compiler.disable  # it would take the weights that need a gradient for always the same
def step_of(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """One step down the loss; the norm of the gradient. Parameters it does not reach stay, and no
    gradient of others is computed.
    """
    weights = [w for group in optimizer.param_groups for w in group["params"] if w.requires_grad]
    optimizer.zero_grad()
    loss.backward(inputs=weights)
    norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
    optimizer.step()
    return norm


def shifted(x: Tensor, by: int) -> Tensor:
    """Images (B, 1, H, W), each moved by its own up to `by` pixels either way, zeros coming in."""
    (n, _, *size), pad = x.shape, F.pad(x, (by,) * 4)
    rows, columns = (torch.randint(2 * by + 1, (n, 1), device=x.device)
                     + torch.arange(length, device=x.device) for length in size)
    each = torch.arange(n, device=x.device)[:, None, None]
    return pad[each, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


class Gan:
    """A generator and a discriminator that take turns. Tuned, both are wider, D sees every image
    shifted (else it learns the training images by heart), and samples are those of a moving average
    of G.
    """

    names = ("d_loss", "g_loss", "d_gradient", "g_gradient", "accuracy_real", "accuracy_fake")

    def __init__(self, config: dict, device):
        self.loss, self.z_dim, self.average = config["loss"], config["z_dim"], None
        self.shift, wide = config.get("shift", 0), config.get("wide", 1)
        self.G = put(initialised(Generator(self.z_dim, wide)), device)
        # without BatchNorm in its hidden layer D won from the first epoch on with one seed of five
        self.D = put(initialised(Convolutions(1, hidden_norm=True, wide=wide)), device)
        self.modules = {"G": self.G, "D": self.D}
        if config["model"] == "tuned-gan":
            self.average = copy.deepcopy(self.G)
            self.modules["average"] = self.average
        self.optimizers = {"optimizer_G": adam((self.G, config["lr"])),
                           "optimizer_D": adam((self.D, config["lr"]))}

    def step(self, x: Tensor, stage: int) -> Tensor:
        """A step of D, then one of G with fresh noise; (6,) as `names`."""
        noise = lambda: torch.randn(len(x), self.z_dim, device=x.device)
        judged = lambda x: self.D(shifted(x, self.shift) if self.shift else x)
        fake = self.G(noise()).detach()  # D's step must not reach G
        real_logits, fake_logits = judged(x), judged(fake)
        loss_d = d_loss(self.loss, real_logits, fake_logits)
        d_norm = step_of(self.optimizers["optimizer_D"], loss_d)
        loss_g = g_loss(self.loss, judged(self.G(noise())))
        g_norm = step_of(self.optimizers["optimizer_G"], loss_g)
        if self.average:  # BatchNorm's statistics too, not its step counts
            own, new = ([v for v in m.state_dict().values() if v.is_floating_point()]
                        for m in (self.average, self.G))
            n = self.G.trunk[0].num_batches_tracked / 2  # G runs twice a step
            for value, update in zip(own, new, strict=True):  # about the last tenth of all steps
                value.lerp_(update, 10 / (10 + n))
        return torch.stack([loss_d, loss_g, d_norm, g_norm, (real_logits > 0).float().mean(),
                            (fake_logits < 0).float().mean()]).detach()

    def sample(self, z: Tensor) -> Tensor:
        return (self.average or self.G)(z)


class Vae:
    """An encoder and a decoder."""

    names = ("loss", "reconstruction", "kl", "gradient")

    def __init__(self, config: dict, device):
        self.z_dim = config["latent_dim"]
        self.E = put(initialised(Convolutions(2 * self.z_dim)), device)
        G = Generator(self.z_dim)  # with a last layer as small, three of four seeds lagged behind
        self.G = put(initialised(G, G.trunk[-1]), device)
        self.modules = {"G": self.G, "E": self.E}
        self.optimizers = {"optimizer": adam((self.E, config["lr"]), (self.G, config["lr"]))}

    def step(self, x: Tensor, stage: int) -> Tensor:
        losses = elbo_losses(self.E, self.G, x)
        norm = step_of(self.optimizers["optimizer"], losses[0])
        return torch.cat([losses, norm[None]]).detach()

    def sample(self, z: Tensor) -> Tensor:
        return self.G(z)


class VaeGan:
    """A VAE (first third of the epochs); with it frozen, a generator of codes H against two
    discriminators, of codes and of images (second third); all of it together (last third).
    """

    names = ("loss", "reconstruction", "kl", "gradient", "d_loss", "h_loss", "d_gradient",
             "accuracy_real", "accuracy_fake", "accuracy_z_real", "accuracy_z_fake")

    def __init__(self, config: dict, device):
        vae = Vae(config, device)  # with the same seed that very run's, batches and noise too
        self.E, self.G, self.d = vae.E, vae.G, config["latent_dim"]
        self.z_dim = max(NOISE_DIM, self.d)
        self.H, self.D_z = (perceptron(*sizes).to(device)
                            for sizes in [(self.z_dim, self.d), (self.d, 1)])
        self.D_x = put(Convolutions(1, spectral=True), device)
        self.modules = {"G": self.G, "E": self.E, "H": self.H, "D_z": self.D_z, "D_x": self.D_x}
        rate = config["lr"]
        self.optimizers = {
            "optimizer": adam((self.E, rate), (self.G, rate), (self.H, CODE_RATE * rate)),
            "optimizer_D": adam((self.D_z, CODE_RATE * rate), (self.D_x, rate))}
        self.stage = 2  # whose samples a finished system draws

    def step(self, x: Tensor, stage: int) -> Tensor:
        if stage == 0:
            losses = elbo_losses(self.E, self.G, x)
            norm = step_of(self.optimizers["optimizer"], losses[0])
            return F.pad(torch.cat([losses, norm[None]]).detach(), (0, 7))
        noise = lambda: torch.randn(len(x), self.z_dim, device=x.device)
        # detached, not without gradients: so the nets run as in training
        mu, logvar = self.E(x).detach().chunk(2, dim=1)
        z_real = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        z_fake = self.H(noise()).detach()
        x_fake = self.G(z_fake).detach()
        logits = [self.D_x(x), self.D_x(x_fake), self.D_z(z_real), self.D_z(z_fake)]
        loss_d = d_loss("hinge", *logits[:2]) + d_loss("hinge", *logits[2:])
        d_norm = step_of(self.optimizers["optimizer_D"], loss_d)
        z_fake = self.H(noise())
        on_images = FROZEN if stage == 1 else 1
        loss_h = (g_loss("hinge", self.D_z(z_fake))
                  + on_images * g_loss("hinge", self.D_x(self.G(z_fake))))
        losses = elbo_losses(self.E, self.G, x) if stage == 2 else loss_h.new_zeros(3)
        norm = step_of(self.optimizers["optimizer"], losses[0] + ADVERSARIAL * loss_h)
        right = [((v > 0) == real).float().mean()
                 for v, real in zip(logits, [True, False] * 2, strict=True)]
        return torch.cat([losses, torch.stack([norm, loss_d, loss_h, d_norm, *right])]).detach()

    def sample(self, z: Tensor) -> Tensor:
        return self.G(z[:, :self.d] if self.stage == 0 else self.H(z))


SYSTEMS = {"gan": Gan, "tuned-gan": Gan, "vae": Vae, "vae-gan": VaeGan}


def shown_epochs(config: dict) -> list[int]:
    """Epochs with a grid of samples: 1, 5, the last, and the end of each stage of a hybrid."""
    last = config["epochs"]
    stage = config.get("stage_epochs", last)
    return sorted({e for e in (1, 5) if e <= last} | set(range(stage, last + 1, stage)))


def train(config: dict, x: Tensor, x_val: Tensor, f_val: Tensor, classifier, folder: Path,
          args) -> tuple:
    """Train, or continue from the folder's checkpoint; the system with the best epoch's weights,
    that epoch's row of the history, and the history.

    Best is by the FID of 5,000 samples against validation features f_val (see `merit`). Every epoch
    seeds its own streams. Raises UserError when a loss is not finite.
    """
    seed, n, batch_size = config["seed"], len(x), config["batch_size"]
    torch.manual_seed(common.seed_from(seed, "weights"))
    system = SYSTEMS[config["model"]](config, x.device)
    parts = {**system.modules, **system.optimizers}
    history = common.restore(folder, config, parts)
    board = common.summary_writer(folder / "logs") if args.tensorboard else None
    steps, last = max(1, n // batch_size), config["epochs"]
    z_val = torch.randn(min(len(x_val), args.samples), system.z_dim,
                        generator=common.generator("z", "val"))
    z_shown = torch.randn(64, system.z_dim, generator=common.generator("z", "shown"))
    title = f"{variant(config)}/seed_{seed}"
    bar = tqdm(range(1, last + 1), title, initial=len(history), disable=None)
    step = common.fast_step(system.step, parts, x.device, args.compile)
    for epoch in range(len(history) + 1, last + 1):
        start = time.perf_counter()
        if config["model"] == "tuned-gan":
            for optimizer in system.optimizers.values():
                common.set_rate(optimizer, config["lr"] * (1 - (epoch - 1) / last))
        system.stage = (epoch - 1) // config.get("stage_epochs", last)
        set_mode(system, True, system.stage)
        order = torch.randperm(n, generator=common.generator(seed, "order", epoch)).to(x.device)
        torch.manual_seed(common.seed_from(seed, "noise", epoch))
        losses = torch.stack([step(x[i], system.stage) for i in order[:steps * batch_size].split(
            batch_size)])
        if not losses.isfinite().all():
            raise common.diverged(title, folder, epoch, losses)
        seconds = time.perf_counter() - start
        set_mode(system, False)
        row = {"epoch": epoch, **dict(zip(system.names, losses.mean(0).tolist(), strict=True))}
        if "E" in system.modules:
            torch.manual_seed(common.seed_from(seed, "validation"))
            names = ["val_loss", "val_reconstruction", "val_kl"]
            row |= dict(zip(names, elbo_of(system, x_val), strict=True))
        f_gen, probs = classifier.look(draw(system, z_val, x.device))
        if not f_gen.isfinite().all():  # the last step of an epoch has no loss after it
            raise common.diverged(title, folder, epoch, losses)
        row |= {f"val_{k}": v for k, v in class_histogram(probs).items() if k != "class_share"}
        row |= {"val_fid": common.frechet_distance(f_gen, f_val), "seconds": seconds}
        history.append(row)
        best = min(history, key=lambda row: merit(config, row, history))["epoch"] == epoch
        if epoch in shown_epochs(config):
            common.save_grid(folder / f"samples_epoch_{epoch}.png", draw(system, z_shown, x.device),
                             8, f"{variant(config)}, epoch {epoch}")
        common.save_epoch(folder, config, history, parts, best, board)
        bar.set_postfix(fid=f"{row['val_fid']:.2f}", refresh=False)
        bar.update()
    bar.close()
    common.restore(folder, config, system.modules, "best_model.pt")
    set_mode(system, False)
    return system, min(history, key=lambda row: merit(config, row, history)), history


def merit(config: dict, row: dict, history: list) -> tuple:
    """What the best epoch minimises: the FID on validation images; of a hybrid, first that it is
    fine-tuned, then the reconstruction of validation images where it is beyond SLACK of its VAE's.
    """
    if config["model"] != "vae-gan":
        return (row["val_fid"],)
    stage = config["stage_epochs"]
    vae = history[min(stage, len(history)) - 1]
    return (row["epoch"] <= 2 * stage, max(
        row["val_reconstruction"], SLACK * vae["val_reconstruction"]), row["val_fid"])


@torch.no_grad()
def elbo_of(system, x: Tensor) -> list[float]:
    """(-ELBO, reconstruction, KL) of many images, nats per image."""
    parts = [elbo_losses(system.E, system.G, c).cpu().double() * len(c) for c in x.split(1000)]
    return (torch.stack(parts).sum(0) / len(x)).tolist()


def set_mode(system, training: bool, stage: int = 0) -> None:
    """For training or not; after its first stage the VAE in a hybrid keeps its BatchNorm statistics
    for every kind of batch, and in the second stage it is frozen.
    """
    for name, module in system.modules.items():
        in_vae = name in ("E", "G")
        module.train(training and not (in_vae and stage > 0))
        module.requires_grad_(not (in_vae and stage == 1))


@torch.no_grad()
def draw(system, z: Tensor, device) -> Tensor:
    """Images of noise z, (N, 1, 28, 28) on the CPU; in eval mode, so one by one the same."""
    assert not system.G.training, "generators are measured in eval mode"
    return torch.cat([system.sample(c.to(device)).cpu() for c in z.split(1000)])


# ----------------------------------------------------------------------------------------- Evaluate


class Judge:
    """Real images of a dataset, as every run of it is measured against them."""

    def __init__(self, data: common.Data, classifier, samples: int):
        self.data, self.classifier, self.look = data, classifier, classifier.look
        some = torch.randperm(len(data.x_test), generator=common.generator("test"))[:samples]
        self.f_test, self.samples = self.look(data.x_test[some])[0], samples

    @functools.cached_property
    def scale(self) -> dict:
        """What a table needs to be read: scores of real images and of the pixel mean."""
        order = torch.randperm(len(self.data.x_train), generator=common.generator("real"))
        x, p, n = self.data.x_train[order], self.data.x_test.double(), self.samples
        entropy = torch.special.entr(p) + torch.special.entr(1 - p)
        return {"real": self.score(x[:n]) | floor(self.look(x[:6 * n])[0], self.f_test),
                "pixel_mean": self.score(x.mean(0, keepdim=True).repeat(n, 1, 1, 1)),
                "pixel_entropy": float(entropy.sum() / len(p))}

    def score(self, x: Tensor) -> dict:
        """FID, precision, recall, density, coverage and the class histogram of images x."""
        f, probs = self.look(x)
        return {"fid": common.frechet_distance(f, self.f_test),
                **common.manifold_metrics(self.f_test, f), **class_histogram(probs)}


def class_histogram(probs: Tensor) -> dict:
    """Shares of the ten classes by arg-max, their entropy in nats, how many have 1 % or more."""
    share = np.bincount(probs.argmax(1), minlength=10) / len(probs)
    nonzero = share[share > 0]
    return {"entropy": abs(float((nonzero * np.log(nonzero)).sum())),
            "classes": int((share >= 0.01).sum()), "class_share": share.tolist()}


def floor(f_train: Tensor, f: Tensor) -> dict:
    """The FID of real images: mean, spread and number of disjoint sets of training features, each
    as large as f, against f. One set alone is a noisy floor.
    """
    fids = [common.frechet_distance(c, f) for c in f_train.split(len(f)) if len(c) == len(f)]
    return {"fid": float(np.mean(fids)), "fid_std": float(np.std(fids, ddof=1)), "sets": len(fids)}


def collapsed(scores: dict, of: str = "") -> list[str]:
    """The thresholds that a run fails, or of="val_" an epoch's row of the history (no recall)."""
    return [f"{key} {scores[of + key]:.4g} < {low:g}" for key, low in COLLAPSE.items()
            if of + key in scores and scores[of + key] < low]


def evaluate(config: dict, system, x: Tensor, f_val: Tensor, best: dict, history: list,
             judge: Judge, samples: int, folder: Path) -> dict:
    """final_metrics.json and pictures of a system trained on x; its first use of test images."""
    device, x_train, x_test = x.device, x.cpu(), judge.data.x_test
    z = torch.randn(samples, system.z_dim, generator=common.generator(config["seed"], "z"))
    start = time.perf_counter()
    x_gen = draw(system, z, device)
    seconds = time.perf_counter() - start
    some = torch.randperm(len(x_test), generator=common.generator("copying"))[:2000]
    test_distance = common.nearest(x_test[some], x_train)[0].mean()
    metrics = {
        **judge.score(x_gen), "scale": judge.scale, "n": samples,
        "copying": float(common.nearest(x_gen[:2000], x_train)[0].mean() / test_distance),
        "best": best, "last": history[-1],
        "val_fid_floor": common.frechet_distance(judge.look(x_train[:len(f_val)])[0], f_val),
        "parameters": {k: sum(w.numel() for w in m.parameters())
                       for k, m in system.modules.items()},
        "classifier": {k: getattr(judge.classifier, k) for k in ["accuracy", "sha256"]},
        "seconds_to_sample": seconds,
        "seconds_per_epoch": float(np.median([  # of a hybrid in its last stage
            h["seconds"] for h in history[-config.get("stage_epochs", config["epochs"]):]])),
        "seconds_train": sum(h["seconds"] for h in history),
        "bfloat16": device.type == "cpu" and common.BFLOAT16,
        "environment": common.environment(device)}
    if "E" in system.modules:
        torch.manual_seed(common.seed_from(config["seed"], "test"))
        metrics["elbo"] = dict(zip(["loss", "reconstruction", "kl"],
                                   elbo_of(system, x_test.to(device)), strict=True))
    figures(config, system, judge.data, history, metrics, folder, device)
    common.save_json(folder / "final_metrics.json", metrics)
    return metrics


# ------------------------------------------------------------------------------- Figures and report


def figures(config: dict, system, data, history: list, metrics: dict, folder: Path, device):
    """samples.png, interpolation.png, losses.png; with an encoder reconstructions.png."""
    name = variant(config)
    z = torch.randn(64, system.z_dim, generator=common.generator("figures"))
    common.save_grid(folder / "samples.png", draw(system, z, device), 8, f"{name}: samples")
    x = torch.cat([data.x_test[data.y_test == digit][:1] for digit in range(10)])
    t = torch.linspace(0, 1, 10)[:, None]
    between = lambda z: torch.cat([(1 - t) * z[i] + t * z[i + 1] for i in range(0, 10, 2)])
    if "E" in system.modules:
        with torch.no_grad():
            mu = system.E(x.to(device)).chunk(2, dim=1)[0]
            x_hat, path = system.G(mu).cpu(), system.G(between(mu.cpu()).to(device)).cpu()
        common.save_grid(folder / "reconstructions.png", torch.cat([x, x_hat]), 10,
                         f"{name}: test images above their reconstructions")
        ends = "test images"
    else:
        path, ends = draw(system, between(z), device), "z"
    common.save_grid(folder / "interpolation.png", path, 10, f"{name}: between two {ends}")
    shown = [("loss", "reconstruction"), ("d_loss", "g_loss", "h_loss"), ("val_fid",)]
    shown = [found for keys in shown if (found := [k for k in keys if k in history[0]])]
    figure = Figure(figsize=(11, 3))
    for axes, keys in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for key in keys:  # a hybrid has no discriminators in stage 1, and no ELBO to lower in 2
            axes.plot([h["epoch"] for h in history], [h[key] or math.nan for h in history], ".-",
                      label=key)
        axes.set(xlabel="epoch")
        axes.axvline(metrics["best"]["epoch"], color="k", lw=0.8, ls=":")
        if keys == ["val_fid"]:
            axes.axhline(metrics["val_fid_floor"], color="0.5", ls=":", label="floor")
            axes.set(title="FID on validation images", yscale="log")
        axes.legend(fontsize=8)
    figure.tight_layout()
    common.save_figure(folder / "losses.png", figure)


def all_runs(base: Path) -> dict[str, list]:
    """Finished runs of every dataset by name; runs that differ in more than the seed apart."""
    order = lambda run: (list(SYSTEMS).index(run["config"]["model"]),
                         run["config"].get("loss", ""), size(run))
    runs = [run | {"folder": Path(dataset) / run["folder"]} for dataset in common.DATASETS
            for run in sorted(common.finished_runs(base / dataset), key=order)]
    return common.by_configuration(runs, variant, "n")


def size(run: dict) -> int:
    """Dimensions of z."""
    return run["config"].get("z_dim") or run["config"]["latent_dim"]


def pick(groups: dict, dataset: str | None, *models: str) -> dict[str, list]:
    """The groups of a dataset (or of every one) and of these models (or of every one)."""
    return {name: runs for name, runs in groups.items() for c in [runs[0]["config"]]
            if dataset in (None, c["dataset"]) and (not models or c["model"] in models)}


def best_of(groups: dict, dataset: str, model: str) -> tuple[str, list] | None:
    """Name and runs of the lowest mean validation FID, among those with the most seeds."""
    return min(pick(groups, dataset, model).items(), default=None,
               key=lambda g: (-len(g[1]), np.mean(get(g[1], "best", "val_fid"))))


def rest(run: dict, *varied: str) -> str:
    """What runs must share to be compared, but for their seed and what is varied."""
    both = {k: v for k, v in run["config"].items() if k not in ("seed", *varied)}
    return str((both, run["metrics"]["n"], common.precision(run["metrics"])))


def often(hits: list) -> str:
    return f"{sum(map(bool, hits))} of {len(hits)} seed{'s' * (len(hits) > 1)}"


def called(runs: list) -> str:
    """', called collapsed for ...'; empty if no seed is."""
    why = [collapsed(run["metrics"]) for run in runs]
    reasons = "; ".join(sorted({reason for of in why for reason in of}))
    return f", called collapsed for {often(why)} ({reasons})" if reasons else ""


def report(base: Path) -> str:
    """Write report.md and its plots from every finished run below base; returns the text."""
    groups = all_runs(base)
    if not groups:
        raise common.UserError(f"no finished run in {base}; run without --report-only first")
    datasets = list(dict.fromkeys(runs[0]["config"]["dataset"] for runs in groups.values()))
    of = lambda *models: len(pick(groups, None, *models))
    lines = [f"# GAN against VAE on {' and '.join(common.DATASETS[d] for d in datasets)}",
             "Which makes better images, a GAN or a VAE, and what does combining them bring?",
             answer(groups, datasets), "## Summary",
             f"GANs: {of('gan')}, tuned GANs: {of('tuned-gan')}, VAEs: {of('vae')}, hybrids: "
             f"{of('vae-gan')}; runs of all seeds: {sum(map(len, groups.values()))}. Every "
             "measured image is made in eval mode, by the raw weights of the best epoch, of a "
             "tuned GAN by their moving average. Pictures are those of a run's first seed. Nets, "
             "rates and weights of losses were chosen by the FID of validation images, of seed 100"
             + "; the tuned GANs' shifts and then their width came after FashionMNIST's "
             "test images had shown more than 15 times the floor" * bool(of("tuned-gan")) + "."
             + f" A hybrid's networks of codes learn at {CODE_RATE} times the rate given."
             * bool(of("vae-gan"))]
    begun = sorted(f"{folder.parent.name}/{folder.name}" for dataset in common.DATASETS
                   for folder in (base / dataset).glob("*/seed_*")  # or diverged, or going on
                   if not (folder / "final_metrics.json").exists())
    if begun:
        lines.append(f"Begun or waiting, without a result here: {', '.join(begun)}.")
    lines.append(results_table(groups))
    for title, *models in [("Part 1: GANs", "gan", "tuned-gan"),
                           ("Part 2: VAEs and hybrids", "vae", "vae-gan")]:
        part = pick(groups, None, *models)
        lines += [f"## {title}"] * bool(part)
        for name, runs in part.items():
            lines += run_section(name, runs)
    lines += ["## Gallery of generated images", *[
        f"![{name}]({runs[0]['folder'].as_posix()}/samples.png)" for name, runs in groups.items()],
              "## Analysis plots", *plots(base, groups, datasets),
              "## FID", fid_table(groups, datasets), "## The four questions",
              "Intervals are 95 % t-intervals over paired seeds; those of the third and the fourth "
              "answer are not corrected for their number.",
              "### 1. What moves the quality and the stability of a GAN most?",
              answer_stability(groups), "### 2. Mode collapse?", answer_collapse(groups),
              "### 3. How does the latent dimension affect a VAE?", answer_latent(groups),
              "### 4. Does the hybrid combine the benefits?", answer_hybrid(groups),
              common.how_made(groups)]
    text = "\n\n".join(lines) + "\n"
    common.save_text(base / "report.md", text)
    print(f"report: {base / 'report.md'}")
    return text


def answer(groups: dict, datasets: list) -> str:
    """The first sentences: the best of each kind, chosen by FID on validation images."""
    said = []
    for dataset in datasets:
        best = [best_of(groups, dataset, model) or ("", []) for model in SYSTEMS]
        gan, tuned, vae, hybrid = (runs for _, runs in best)
        said.append(f"- {common.DATASETS[dataset]}: " + "; ".join(
            f"{name} {show(runs, 'fid')} (n={len(runs)}, {runs[0]['config']['epochs']} epochs"
            f"{'' if runs is vae else called(runs)})" for name, runs in best if runs) + ".")
        if pairs := pairs_of(gan, vae):
            logs = over(pairs, "fid")
            said.append(f"    - The untuned GAN's is {ratio(logs)} the VAE's (n={len(pairs)})")
            if dataset in SOURCE:
                hits = [a["metrics"]["fid"] <= b["metrics"]["fid"] / 6 for a, b in pairs]
                of_gan, of_vae = SOURCE[dataset]
                said[-1] += (f", within the 1/6 aimed at for {often(hits)}; the source claims "
                             f"1/{of_vae / of_gan:.0f}")
            said[-1] += ("." if logs.mean <= 0 else "; the VAE's is lower." if logs.sign else
                         "; which is lower cannot be told.")
        if tuned and dataset in SOURCE:
            over_floor = np.divide(get(tuned, "fid"), get(tuned, "scale", "real", "fid"))
            goal = {"mnist": 10, "fashion-mnist": 15}[dataset]
            said.append(f"    - The tuned GAN's is {over_floor.mean():.1f} × the floor, within the "
                        f"{goal} × aimed at for {often(over_floor <= goal)}.")
        if hybrid and (pairs := with_parents(groups, hybrid)):
            said.append(f"    - The hybrid's is {ratio(over(pairs, 'fid'))} that of its VAE, "
                        f"{variant(pairs[0][1]['config'])}, its reconstruction loss "
                        f"{ratio(over(pairs, 'elbo', 'reconstruction'))} (n={len(pairs)}).")
    return "\n".join(["**Answer.** FID of the best of each kind, by that of validation images, "
                      "among those with the most seeds:", "", *said])


def results_table(groups: dict) -> str:
    """A row per run, after one of real training images and one of the pixel mean per dataset."""
    rows, scales = [], {}
    ns = sorted({r["metrics"]["n"] for runs in groups.values() for r in runs})
    for (r, *_) in groups.values():
        title = common.DATASETS[r["config"]["dataset"]]
        n = f" ({r['metrics']['n']:,} samples)" * (len(ns) > 1)
        scales[title + n] = r["metrics"]["scale"]
    keys = ["precision", "recall", "density", "coverage", "entropy"]
    for name, scale in scales.items():
        for title, s in ("real", scale["real"]), ("pixel mean", scale["pixel_mean"]):
            rows.append([f"{name}: {title}", "", f"{s['fid']:.3f}",
                         *[f"{s[k]:.2f}" for k in keys], s["classes"], *[""] * 4])
    for name, runs in groups.items():
        elbo = (f"{show(runs, 'elbo', 'reconstruction')} + {show(runs, 'elbo', 'kl')} = "
                f"{show(runs, 'elbo', 'loss')}" if "elbo" in runs[0]["metrics"] else "–")
        rows.append([name, len(runs), show(runs, "fid"), *[show(runs, k) for k in keys],
                     span(get(runs, "classes"), 0), show(runs, "copying"), elbo,
                     span(get(runs, "best", "epoch"), 0),
                     show(runs, "seconds_per_epoch", digits=1)])
    entropy = "; ".join(f"{d} {scale['pixel_entropy']:.2f}" for d, scale in scales.items())
    sets = "; ".join(f"{d}: {scale['real']['sets']}, spread {scale['real']['fid_std']:.3f}"
                     for d, scale in scales.items())
    return common.table(
        ["run", "n", "FID", *keys, "classes", "copying", "reconstruction + KL = −ELBO",
         "best epoch", "s per epoch"], rows) + (
        "\n\n± is the standard deviation over n seeds, 9–10 their range. FID is in the features of "
        f"each dataset's metric classifier, not Inception's, {' or '.join(f'{n:,}' for n in ns)} "
        "samples against as many test images; that of real training images is the floor, the mean "
        f"over disjoint sets of as many ({sets}). Entropy of the class histogram in nats (at most "
        "2.30); a class is present with 1 % of the samples. The best epoch is that of the lowest "
        "FID of at most as many samples on validation images, of a hybrid among fine-tuned ones "
        f"that lose at most {100 * SLACK - 100:.0f} % in reconstruction (of those that lose the "
        "least, if all lose more). Copying: mean distance to the nearest training image over that "
        "of test images. −ELBO of test images in nats; its floor, the mean pixel entropy: "
        f"{entropy}. Seconds per epoch are medians, of a hybrid those of its last stage; they "
        "depend on what else the machine does.")


def span(values: list, digits: int = 2) -> str:
    """'0.27 to 0.55', or one number if all are equal; of whole numbers '9–10'."""
    ends = dict.fromkeys([f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"])
    return (" to " if digits else "–").join(ends)


def run_section(name: str, runs: list) -> list[str]:
    """The source's section of a run: its settings, its last epoch and its pictures."""
    c, folder = runs[0]["config"], runs[0]["folder"].as_posix()
    own = [f"{k} {c[k]}" for k in ["lr", "loss", "z_dim", "latent_dim", "wide", "shift"] if k in c]
    last = ", ".join(f"{k} {show(runs, 'last', k)}" for k in runs[0]["metrics"]["last"]
                     if "loss" in k or k in ("reconstruction", "kl", "val_fid"))
    share = np.mean(get(runs, "class_share"), 0)
    pictures = [*[f"samples_epoch_{e}" for e in shown_epochs(c)],
                *(["reconstructions"] if "elbo" in runs[0]["metrics"] else []),
                "interpolation", "losses"]
    return [f"### {name}", f"{', '.join(own)}, {c['epochs']} epochs."
            f" Last epoch: {last}. Classes 0–9 among the samples (%): "
            f"{' '.join(f'{100 * s:.0f}' for s in share)}.",
            *[f"![{name}: {p}]({folder}/{p}.png)" for p in pictures]]


def fid_table(groups: dict, datasets: list) -> str:
    """A row per run, by dataset and FID."""
    rows = []
    for name, runs in sorted(groups.items(), key=lambda group: (
            datasets.index(group[1][0]["config"]["dataset"]), np.mean(get(group[1], "fid")))):
        floor = np.mean(get(runs, "scale", "real", "fid"))
        rows.append([name, len(runs), show(runs, "fid"), f"{floor:.3f}",
                     f"{np.mean(get(runs, 'fid')) / floor:.1f}"])
    return common.table(["run", "n", "FID", "floor", "FID / floor"], rows)


def plots(base: Path, groups: dict, datasets: list) -> list[str]:
    """Make the plots over all runs (PNG); their lines of the report."""
    made = []

    def panels(name: str, models: list[str], draw_one, parts=("",)) -> None:
        """A row for each dataset, a column for each of `parts`."""
        there = {d: of for d in datasets if (of := pick(groups, d, *models))}
        if not there:
            return
        figure = Figure(figsize=(4.5 * len(parts) + 1.5, 4 * len(there)))
        rows = figure.subplots(len(there), len(parts), squeeze=False)
        for row, (dataset, of) in zip(rows, there.items(), strict=True):
            for axes, part in zip(row, parts, strict=True):
                axes.set_title(f"{common.DATASETS[dataset]}{f': {part}' if part else ''}")
                draw_one(axes, part, of)
            if axes.get_legend_handles_labels()[0]:  # beside the last one, where it hides nothing
                axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), handlelength=4)
        figure.tight_layout()
        common.save_figure(base / f"{name}.png", figure)
        made.append(f"![{name}]({name}.png)")

    short = lambda name: name.split("_", 1)[1].replace("latent", "").replace("_", " ")
    color = lambda runs: {"gan": "C0", "tuned-gan": "C3", "vae": "C1", "vae-gan": "C2"}[
        runs[0]["config"]["model"]]

    def losses(axes, key, of):
        sizes = sorted({size(runs[0]) for runs in of.values()})
        for name, runs in of.items():
            mean = np.mean([[h[key] for h in r["history"]] for r in runs], 0)
            axes.plot(range(1, len(mean) + 1), mean, "o--" if "_bce_" in name else "o-", ms=3,
                      color=f"C{sizes.index(size(runs[0]))}", label=short(name))
        axes.set(xlabel="epoch", ylabel="mean over seeds")

    def fids(axes, _, of):
        for i, runs in enumerate(of.values()):
            axes.plot([i] * len(runs), get(runs, "fid"), "o", color=color(runs))
        floor = np.mean([v for runs in of.values() for v in get(runs, "scale", "real", "fid")])
        axes.axhline(floor, color="k", ls=":")
        axes.text(0.01, 1.05 * floor, "floor (real images)", fontsize=8,
                  transform=axes.get_yaxis_transform())  # a legend would hide points
        axes.set_xticks(range(len(of)), map(short, of), rotation=45, ha="right", fontsize=8)
        axes.set(ylabel="FID, a point per seed", yscale="log")

    def scatter(axes, _, of):
        for i, (name, runs) in enumerate(of.items()):
            axes.plot(get(runs, "recall"), get(runs, "precision"), "osD^v<>PX*+x"[i % 12],
                      color=color(runs), ms=5, mfc="none", label=short(name))
        real = next(iter(of.values()))[0]["metrics"]["scale"]["real"]
        axes.plot(real["recall"], real["precision"], "kP", label="real images")
        low = min(p for runs in of.values() for p in get(runs, "precision"))
        axes.set(xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02), ylim=(low - 0.03, 1.02))

    panels("gan_loss_comparison", ["gan"], losses, ["d_loss", "g_loss"])
    panels("gan_fid_comparison", ["gan", "tuned-gan"], fids)
    panels("vae_loss_comparison", ["vae"], losses, ["loss", "reconstruction", "kl"])
    panels("vae_fid_comparison", ["vae"], fids)
    panels("fid_gan_vs_vae", list(SYSTEMS), fids)
    panels("precision_recall", list(SYSTEMS), scatter)
    return made


def effects(groups: dict, measure) -> dict[tuple[str, str], tuple[common.Difference, list]]:
    """The effect on log `measure` of each change of one setting, {(setting, "b against a")}: that
    of the mean over the cells of the grid that are otherwise the same, paired by seed (the cells
    and seeds that give the most pairs), and of each cell. The intervals are 95 % for all changes
    together (Bonferroni).
    """
    cells = {(*[runs[0]["config"][k] for k in FACTORS], rest(runs[0], *FACTORS)):
             {r["config"]["seed"]: math.log(measure(r)) for r in runs}
             for runs in pick(groups, None, "gan").values()}
    differences = {}
    for i, factor in enumerate(FACTORS):
        for a, b in itertools.combinations(dict.fromkeys(cell[i] for cell in cells), 2):
            twins = [(cells[cell], cells[other]) for cell in cells if cell[i] == a
                     and (other := (*cell[:i], b, *cell[i + 1:])) in cells]
            having = lambda seeds: [(u, v) for u, v in twins if seeds <= u.keys() & v.keys()]
            seeds = max((u.keys() & v.keys() for u, v in twins), default=set(),
                        key=lambda seeds: (len(seeds) * (n := len(having(seeds))), n))
            if seeds:
                differences[factor, f"{b} against {a}"] = np.array(
                    [[v[seed] - u[seed] for seed in sorted(seeds)] for u, v in having(seeds)])
    level = 1 - 0.05 / max(1, len(differences))
    return {key: (common.paired(d.mean(0), np.zeros(d.shape[1]), level=level), d.mean(1))
            for key, d in differences.items()}  # d: (cells, seeds)


def answer_stability(groups: dict) -> str:
    """Effect sizes on FID and on what is comparable between losses, never raw losses."""
    def changes(run: dict, key: str) -> float:
        """Spread of the change from epoch to epoch, of the log: a steady trend is no spread."""
        logs = [math.log(h[key]) for h in run["history"][-max(3, len(run["history"]) // 2 + 1):]]
        return max(float(np.std(np.diff(logs))), 1e-3) if len(logs) > 1 else 1.0

    wrong = lambda h: 2 - h["accuracy_real"] - h["accuracy_fake"]
    measures = {
        "FID over its floor": lambda r: r["metrics"]["fid"] / r["metrics"]["scale"]["real"]["fid"],
        "spread of FID over epochs": lambda r: changes(r, "val_fid"),
        "spread of G's gradient norm over epochs": lambda r: changes(r, "g_gradient"),
        "D's errors on real and fake": lambda r: max(  # two in a hundred or fewer: D has won
            np.mean([wrong(h) for h in r["history"][len(r["history"]) // 2:]]), 0.02)}
    rows, said = [], []
    for what, measure in measures.items():
        found = effects(groups, measure)
        rows += [[what, f"{factor}: {pair}", ratio(e), span(np.exp(cells)), len(cells), e.n]
                 for (factor, pair), (e, cells) in found.items()]
        # a dataset has a classifier and a scale of its own, and is no setting
        found = {key: e for key, (e, _) in found.items() if key[0] != "dataset"}
        told = {key: e for key, e in found.items() if e.sign}
        if not told:
            said.append(f"{what}: it cannot be told at this n")
            continue
        (factor, pair), top = max(told.items(), key=lambda kv: abs(kv[1].mean))
        rivals = sorted({k[0] for k, e in found.items()
                         if k[0] != factor and abs(e.mean) + e.half > abs(top.mean) - top.half})
        doubt = (", the only one compared" if len({k[0] for k in found}) == 1 else
                 f", whether more than {' and '.join(rivals)} cannot be told" if rivals else "")
        said.append(f"{what}: {factor} moves it {'' if doubt else 'most '}"
                    f"({pair}: × {math.exp(top.mean):.2f}){doubt}")
    if not rows:
        return "It cannot be told: no two GANs of one seed differ in one setting alone."
    return ("One seed tells nothing. " * all(row[-1] == 1 for row in rows) + "; ".join(said)
            + ".\n\n" + common.table(
        ["measure", "change", "ratio", "range over cells", "cells", "seeds"], rows) + (
        "\n\nRatios between GANs of the same seed that differ in that setting alone, over the "
        "cells of the grid that have the same seeds. The intervals are of the cells' "
        "mean over seeds, and those of a measure hold together with 95 % (Bonferroni); bold where "
        "they exclude 1. A change of dataset is one of classifier and scale too. Spread: standard "
        "deviation of the change of the logarithm from epoch to epoch, second half of the "
        "training. D's errors: the share of real images and the share of generated ones that it "
        "gets wrong, added; near 0 it has won, and values below 0.02 count as 0.02. FID is over "
        "each dataset's floor, because each has its own classifier."))


def answer_collapse(groups: dict) -> str:
    """Of the systems that have an adversary."""
    each = lambda *models: [(name, run) for name, runs in pick(groups, None, *models).items()
                            for run in runs]
    adversarial, vaes = each("gan", "tuned-gan", "vae-gan"), each("vae")
    if not adversarial:
        return "It cannot be told: no run has an adversary."
    found, late = [], []  # at the best epoch; at the last one alone
    for name, run in adversarial:
        metrics = run["metrics"]
        of_best, of_last = collapsed(metrics), collapsed(metrics["last"], "val_")
        if of_best or of_last:
            (found if of_best else late).append(
                f"{name} (seed {run['config']['seed']}: {', '.join(of_best or of_last)})")
    n = len(adversarial)
    missing = sum(run["metrics"]["classes"] < COLLAPSE["classes"] for _, run in adversarial)
    recalls = {title: [run["metrics"]["recall"] for _, run in vaes
                       if run["config"]["dataset"] == d] for d, title in common.DATASETS.items()}
    limits = ", ".join(f"{key} < {low:g}" for key, low in COLLAPSE.items())
    return (f"Called collapse, by thresholds fixed before the runs: any of {limits}. "
            + (f"{len(found)} of {n} runs with an adversary at its best epoch: {'; '.join(found)}. "
               f"Classes are missing in {missing} of them." if found else
               f"None of {n} runs with an adversary at its best epoch.")
            + (f" By the last epoch's samples besides: {'; '.join(late)}." if late else
               " None besides by the samples of its last epoch (entropy and classes).")
            + (" For comparison, the same thresholds are missed by "
               f"{sum(bool(collapsed(run['metrics'])) for _, run in vaes)} of {len(vaes)} runs of "
               "VAEs; their recall: "
               + ", ".join(f"{title} {span(of)}" for title, of in recalls.items() if of) + "."
               if vaes else ""))


def answer_latent(groups: dict) -> str:
    """Reconstruction and FID by latent dimension; whether the one follows the other."""
    rows, told = [], {"follows": [], "does not follow": [], "cannot be told to follow": []}
    keys, alike = [("elbo", "reconstruction"), ("fid",)], {}
    for runs in pick(groups, None, "vae").values():  # by latent dimension
        alike.setdefault(rest(runs[0], "latent_dim"), []).append(runs)
    for runs_of in alike.values():
        for before, runs in itertools.pairwise([[], *runs_of] if len(runs_of) > 1 else []):
            c, both = runs[0]["config"], common.same_seeds(runs, before)
            name = common.DATASETS[c["dataset"]]
            steps = [common.paired(*(get(of, *key) for of in both)) if both[0] else None
                     for key in keys]
            if before:
                r, f = (step.sign if step else 0 for step in steps)
                told["cannot be told to follow" if 0 in (r, f) else "follows" if r == f else
                     "does not follow"].append(
                         f"{name} {before[0]['config']['latent_dim']} to {c['latent_dim']}")
            rows.append([f"{name}, {c['latent_dim']}", len(runs),
                         *[cell for key, step in zip(keys, steps, strict=True)
                           for cell in (show(runs, *key), step.cell() if step else "")]])
    if not rows:
        return "It cannot be told: no two VAEs of a dataset differ in it."
    return ("From one dimension to the next, FID " + "; ".join(
        f"{words} the reconstruction: {', '.join(steps)}" for words, steps in told.items() if steps)
        + ".\n\n" + common.table(
            ["latent dimension", "n", "reconstruction (nats)", "against the one above", "FID",
             "against the one above"], rows) + (
        "\n\nDifferences over the seeds of both, bold where the interval excludes zero."))


def with_parents(groups: dict, runs: list) -> list[tuple[dict, dict]]:
    """(hybrid, the VAE of the same settings and seed), where there is one."""
    c = runs[0]["config"]
    vae = {k: v for k, v in c.items() if k != "stage_epochs"} | {
        "model": "vae", "epochs": c["stage_epochs"]}
    return pairs_of(runs, [r for rs in groups.values() for r in rs
                           if r["config"] == vae | {"seed": r["config"]["seed"]}])


def pairs_of(a: list, b: list) -> list[tuple[dict, dict]]:
    """Runs of the same seed, trained in the same precision, measured on as many samples."""
    key = lambda r: (r["config"]["seed"], r["metrics"]["n"], common.precision(r["metrics"]))
    other = {key(r): r for r in b}
    return [(r, other[key(r)]) for r in a if key(r) in other]


def over(pairs: list[tuple[dict, dict]], *keys) -> common.Difference:
    """The logarithm of a metric's ratio."""
    return common.paired(*(np.log(get(of, *keys)) for of in zip(*pairs, strict=True)))


def ratio(logs: common.Difference) -> str:
    """exp of a difference of logarithms, bold if its interval excludes 1: '0.47 × (0.31–0.71)'."""
    ends = [math.exp(min(logs.mean + end, 700)) for end in (-logs.half, logs.half)]
    low, high = (f"{end:.2f}" if end < 1000 else "> 1000" for end in ends)
    bold = "**" * abs(logs.sign)
    return f"{bold}{math.exp(logs.mean):.2f} ×{bold}" + f" ({low}–{high})" * (logs.n > 1)


def answer_hybrid(groups: dict) -> str:
    """Every hybrid beside the VAE it began as and the best GANs."""
    said, rows, metrics = [], [], lambda pair: [run["metrics"] for run in pair]
    for name, runs in pick(groups, None, "vae-gan").items():
        c = runs[0]["config"]
        row = [f"{name}, {c['epochs']} epochs", len(runs), " / ".join(common.mean_std([
            r["history"][stage * c["stage_epochs"] - 1]["val_fid"] for r in runs])
            for stage in (1, 2, 3)), show(runs, "fid")]
        if pairs := with_parents(groups, runs):
            change, loss = over(pairs, "fid"), over(pairs, "elbo", "reconstruction")
            half = [a["fid"] <= 0.5 * b["fid"] for a, b in map(metrics, pairs)]
            kept = [a["elbo"]["reconstruction"] <= 1.1 * b["elbo"]["reconstruction"]
                    for a, b in map(metrics, pairs)]
            verdict = {(True, True): "both as hoped", (True, False): "better samples, paid for",
                       (False, True): "it still reconstructs, but " + {
                           1: "its samples are worse", -1: "gains too little",
                           0: "whether its samples are better cannot be told"}[change.sign],
                       (False, False): "neither"}
            outcomes = set(zip(half, kept, strict=True))
            said.append(f"{name}: " + "at one seed " * (len(pairs) == 1)
                        + (verdict[outcomes.pop()] if len(outcomes) == 1 else "the seeds disagree")
                        + called(runs))
            row += [f"{ratio(change)}; at most half for {often(half)}",
                    f"{ratio(loss)}; within 10 % for {often(kept)}",
                    " against ".join(show(list(of), "recall") for of in zip(*pairs, strict=True))]
        else:
            said.append(f"{name}: no VAE to compare it with{called(runs)}")
            row += [""] * 3
        for model in ["gan", "tuned-gan"]:
            gan, of = best_of(groups, c["dataset"], model) or ("", [])
            both = pairs_of(runs, of)
            row.append(f"{ratio(over(both, 'fid'))} {gan}, {of[0]['config']['epochs']} epochs"
                       if both else "–")
        rows.append(row)
    if not said:
        return "It cannot be told: no hybrid has been trained."
    return "; ".join(said) + ".\n\n" + common.table(
        ["hybrid", "n", "validation FID after each stage", "FID", "over its VAE's",
         "reconstruction over its VAE's", "recall against its VAE's",
         "FID over the best untuned GAN's", "over the best tuned GAN's"], rows) + (
        "\n\nRatios are geometric means over the seeds of both, bold where their interval "
        "excludes 1. Its VAE is the run with the epochs of one stage, at its best. Unlike the "
        "GANs, a hybrid also reconstructs.")


# --------------------------------------------------------------------------------------------- main


def main(argv=None) -> dict:
    args = parse_args(argv)
    base = Path(args.out_dir) / "gan_vs_vae"
    if args.report_only:
        report(base)
        return {}
    device = common.pick_device(args.device)
    datas = [common.load_data(name, args.data_dir) for name in args.dataset or [None]]
    if not args.dataset and datas[0].name == "mnist":  # else there is neither
        datas.append(common.load_data("fashion-mnist", args.data_dir))
    datas = {data.name: data for data in datas}
    runs = grid(args, list(datas))[args.shard]
    parts = [common.split(datas[c["dataset"]], c) for c in runs]
    folders = [base / c["dataset"] / variant(c) / f"seed_{c['seed']}" for c in runs]
    judge_of = functools.cache(lambda name: Judge(
        datas[name], common.load_classifier(datas[name], device), args.samples))
    metrics, failed = {}, []
    done = {file.parent: common.load_json(file) for folder in folders if not args.fresh
            and (file := folder / "final_metrics.json").exists()}  # whether or not weights are here
    for folder, there in done.items():
        if there["n"] != args.samples:
            raise common.UserError(
                f"{folder} was measured on {there['n']} samples, not {args.samples}; --fresh "
                "replaces it, another --out-dir keeps it")
    common.open_runs(folders, runs, args)
    for config, part, folder in zip(runs, parts, folders, strict=True):
        name = f"{variant(config)}/seed_{config['seed']}"
        if folder in done:
            metrics[name] = done[folder]
            continue
        judge = judge_of(config["dataset"])
        x, x_val = (judge.data.x_train[part[k]].to(device) for k in ["train", "val"])
        f_val = judge.look(x_val)[0]
        try:
            system, best, history = train(config, x, x_val, f_val, judge.classifier, folder, args)
        except common.UserError as error:  # one run that diverges must not cost the others
            failed.append(str(error))
            continue
        metrics[name] = evaluate(config, system, x, f_val, best, history, judge, args.samples,
                                 folder)
    if metrics:
        report(base)
    if failed:
        raise common.UserError("; ".join(failed))
    return metrics


if __name__ == "__main__":
    common.guard(main)
