"""Which makes better images, a GAN or a VAE, and what does combining them bring?

Twelve GANs (two losses, three sizes of z, two datasets) meet six VAEs whose decoder is the same
network as the generator. A hybrid follows: a VAE, then a generator of codes against two
discriminators, then all of it together. The features of one classifier measure all runs on a
dataset: FID, precision, recall, coverage, missing classes, copying.

    python gan_vs_vae.py --model gan --loss hinge --z-dim 32 --dataset mnist --epochs 4  # one GAN
    python gan_vs_vae.py --dataset mnist                        # half the lab: three hours or more
    python gan_vs_vae.py                                        # the whole lab
    python gan_vs_vae.py --dataset glyphs --train-size 500 --epochs 1 --samples 500      # smoke

Writes results/gan_vs_vae/<dataset>/<run>/seed_<s>/ (weights, metrics, pictures) and, from every
finished run, results/gan_vs_vae/report.md.

Expect: MNIST bfloat16, GAN bce, z 32: FID 1.01 ± 0.11 (floor 0.07), recall 0.89 ± 0.01 (n=3);
9 min to train a run; cpu: AMD EPYC, torch 2.15.0+cu132.

Differences from the source lab:
 1. FID is in the features of a known classifier, and its floor stands beside it.
 2. The best epoch is that of the lowest FID on validation images (of a hybrid: if it still
    reconstructs); test images are used once.
 3. Generator and VAE decoder are one network, so that the comparison is of the training. Only the
    last layer starts from larger weights in the VAE: with small ones three of four seeds lagged.
 4. The hybrid is built and measured. Mode collapse is decided by thresholds, not by looking.
 5. Beyond the twelve there is one tuned GAN per dataset: five times the learning rate, falling to
    0, three times the epochs, twice the channels, a moving average of G's weights, shifted images
    for D. Shifts and channels came after FashionMNIST's test images had been seen, so that its
    result there is optimistic.

References: Goodfellow et al. 2014, arXiv:1406.2661; Lim and Ye 2017, arXiv:1705.02894 (hinge);
Radford et al. 2016, arXiv:1511.06434 (DCGAN); Kingma and Welling 2014, arXiv:1312.6114; Miyato et
al. 2018, arXiv:1802.05957 (spectral normalisation); Zhao et al. 2020, arXiv:2006.10738 (shifts);
Kynkäänniemi et al. 2019, arXiv:1904.06991 (precision, recall); Naeem et al. 2020, arXiv:2002.09797
(coverage).
"""

import csv
import io
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import Permute

import common

# ---------------------------------------------------------------------------------------- Config

MODELS = ["gan", "tuned-gan", "vae", "vae-gan"]
LOSSES = ["hinge", "bce"]
EPOCHS = 10  # of a GAN, a VAE, and each of the hybrid's three stages; a tuned GAN has 30
BATCH_SIZE = 64
LEARNING_RATE = 2e-4
TRAIN_SIZE = 55_000
SAMPLES = 10_000
TUNED = {"loss": "hinge", "z_dim": 32, "wide": 2, "shift": 2}
CODE_NOISE = 32  # dimensions of the noise that the hybrid's H turns into codes, at least
CODE_RATE = 5  # H and the discriminator of codes learn so many times as fast as the others
ADVERSARIAL = 10.0  # the hybrid's last stage: weight of the adversarial loss beside -ELBO
FROZEN_IMAGES = 0.1  # its second stage: weight of the discriminator of images in H's loss
SLACK = 1.05  # a hybrid may lose 5 % of its VAE's reconstruction on validation images


def parse_args(argv=None):
    parser = common.Parser("gan_vs_vae", __doc__, epochs=EPOCHS, batch_size=BATCH_SIZE,
                           lr=LEARNING_RATE)
    flag, number = parser.add_argument, common.number
    flag("--model", choices=MODELS, nargs="+", default=MODELS,
         help="vae-gan: three stages of --epochs; tuned-gan: 3 x --epochs at 5 x --lr")
    flag("--loss", choices=LOSSES, nargs="+", default=LOSSES, help="gan: its loss")
    flag("--z-dim", type=number(int, 1), nargs="+", default=[32, 64, 128], help="gan: noise")
    flag("--latent-dim", type=number(int, 1), nargs="+",
         help="vae, vae-gan: dimensions of z (not given: 8 16 32 and 8 16)")
    flag("--samples", type=number(int, 100, 10_000), default=SAMPLES, help="images measured")
    return parser.parse_args(argv)


def configurations(args, datasets: list[str]) -> list[dict]:
    """The configuration of every run that the flags ask for, each once."""
    smallest = min(args.train_size or TRAIN_SIZE, args.batch_size)
    if smallest < 2:
        raise common.UserError(f"--train-size or --batch-size {smallest}: BatchNorm compares the "
                               "images of a batch; take at least 2")
    plain = {"epochs": args.epochs, "lr": args.lr}
    longer = {"epochs": 3 * args.epochs, "lr": args.lr}
    settings = {"gan": [], "tuned-gan": [longer | {"lr": 5 * args.lr} | TUNED]}
    for loss, z_dim in itertools.product(args.loss, args.z_dim):
        settings["gan"].append(plain | {"loss": loss, "z_dim": z_dim})
    settings["vae"] = [plain | {"latent_dim": d} for d in args.latent_dim or [8, 16, 32]]
    settings["vae-gan"] = [longer | {"stage_epochs": args.epochs, "latent_dim": d}
                           for d in args.latent_dim or [8, 16]]
    configs = []
    for dataset, model in itertools.product(datasets, args.model):
        for setting, seed in itertools.product(settings[model], args.seeds):
            config = {"dataset": dataset, "model": model, "batch_size": args.batch_size,
                      "train_size": args.train_size or TRAIN_SIZE, "precision": args.precision,
                      "seed": seed, **setting}
            if config not in configs:  # a value may be given twice
                configs.append(config)
    return configs


def row_name(config: dict) -> tuple[str, str, str]:
    """('MNIST', 'GAN hinge', 'z 32'); settings that are not the default follow the first two:
    ('MNIST bfloat16', 'VAE 30 epochs', 'latent 8').
    """
    model, size = config["model"], f"latent {config.get('latent_dim')}"
    name, epochs, lr = model.upper(), EPOCHS, LEARNING_RATE
    if model == "gan":
        name, size = f"GAN {config['loss']}", f"z {config['z_dim']}"
    elif model == "tuned-gan":
        name, size, epochs, lr = "GAN tuned", f"z {config['z_dim']}", 3 * EPOCHS, 5 * lr
    elif model == "vae-gan":
        epochs = 3 * EPOCHS
    if config["epochs"] != epochs:
        name += f" {config['epochs']} epochs"
    changed = common.suffix(config, batch_size=BATCH_SIZE, lr=lr, train_size=TRAIN_SIZE,
                            precision="float32")
    return common.DATASETS[config["dataset"]] + changed.replace("_", " "), name, size


def variant(config: dict) -> str:
    """A run's folder without its seed, named as in the source: 'mnist/MNIST_GAN_hinge_z64'."""
    data, model, size = row_name(config)
    title, *changed = data.split(" ")
    words = [title, *model.split(" "), size.replace(" ", ""), *changed]
    return f"{config['dataset']}/{'_'.join(words)}"


# ----------------------------------------------------------------------------------------- Model


class Generator(nn.Module):
    """Codes (B, d) to images (B, 1, 28, 28) in (0, 1): a GAN's generator and a VAE's decoder."""

    def __init__(self, d: int, width: int = 1):
        super().__init__()
        self.first = nn.Linear(d, 7 * 7 * 64 * width)  # the only layer that depends on d
        self.trunk = nn.Sequential(
            nn.BatchNorm2d(64 * width), nn.ReLU(),  # (B, 64, 7, 7)
            nn.ConvTranspose2d(64 * width, 32 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(32 * width), nn.ReLU(),  # (B, 32, 14, 14)
            # enlarge, then smooth: cheaper than a kernel of four, and no worse
            nn.ConvTranspose2d(32 * width, 16 * width, 2, stride=2),
            nn.BatchNorm2d(16 * width), nn.ReLU(),  # (B, 16, 28, 28)
            nn.Conv2d(16 * width, 1, 3, padding=1))

    def logits(self, z: Tensor) -> Tensor:
        x = self.first(z).unflatten(1, (7, 7, -1))
        return self.trunk(x.permute(0, 3, 1, 2)).float()  # channels last in memory: faster

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(z).sigmoid()


class ConvNet(nn.Sequential):
    """Images (B, 1, 28, 28) to (B, outputs): a VAE's encoder or, with one output, a discriminator.

    A discriminator's logit is above 0 for images that it takes for real.
    """

    def __init__(self, outputs: int, hidden_norm: bool = False, spectral: bool = False,
                 width: int = 1):
        a, b = 24 * width, 48 * width  # channels

        def wrap(layer: nn.Module) -> nn.Module:
            return nn.utils.parametrizations.spectral_norm(layer) if spectral else layer

        super().__init__(
            nn.PixelUnshuffle(2), wrap(nn.Conv2d(4, a, 3, padding=1)), nn.LeakyReLU(0.2),
            # (B, a, 14, 14)
            wrap(nn.Conv2d(a, b, 4, stride=2, padding=1)),
            nn.Identity() if spectral else nn.BatchNorm2d(b), nn.LeakyReLU(0.2),  # (B, b, 7, 7)
            Permute([0, 2, 3, 1]), nn.Flatten(),  # channels last, as they are in memory
            wrap(nn.Linear(b * 49, 256)),
            nn.BatchNorm1d(256) if hidden_norm else nn.Identity(), nn.LeakyReLU(0.2),
            wrap(nn.Linear(256, outputs)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Perceptron(nn.Sequential):
    """The hybrid's generator of codes and its discriminator of codes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(nn.Linear(inputs, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256),
                         nn.LeakyReLU(0.2), nn.Linear(256, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def initialise(net: nn.Module, keep: nn.Module | None = None) -> nn.Module:
    """Weights from N(0, 0.02^2), as in DCGAN, except the layer `keep`. Returns the net."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and layer is not keep:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return net


def last_tenth(average: Tensor, new: Tensor, step: Tensor) -> Tensor:
    """A moving average over about the last tenth of all steps: the newest weighs 10 / (10 + t)."""
    return average + 10 / (10 + step) * (new - average)


def build(config: dict, device: torch.device) -> tuple[dict, dict]:
    """Networks and their Adam optimisers, each by the network's name.

    G: generator or decoder, D: discriminator of images, average: the moving average of a tuned G,
    E: encoder, H: the hybrid's generator of codes, D_z: its discriminator of codes.
    """
    nets, width, latent_dim = {}, config.get("wide", 1), config.get("latent_dim")
    if config["model"] in ("gan", "tuned-gan"):
        nets["G"] = initialise(Generator(config["z_dim"], width))
        # without BatchNorm in its hidden layer D won from the first epoch with one seed of five
        nets["D"] = initialise(ConvNet(1, hidden_norm=True, width=width))
    else:
        nets["E"] = initialise(ConvNet(2 * latent_dim))
        decoder = Generator(latent_dim)
        nets["G"] = initialise(decoder, keep=decoder.trunk[-1])
    if config["model"] == "vae-gan":
        nets["H"] = Perceptron(noise_dim(config), latent_dim)
        nets["D_z"] = Perceptron(latent_dim, 1)
        nets["D"] = ConvNet(1, spectral=True)
    optimizers = {}
    for name, net in nets.items():
        net.to(device, memory_format=torch.channels_last)
        rate = config["lr"] * (CODE_RATE if name in ("H", "D_z") else 1)
        optimizers[name] = torch.optim.Adam(net.parameters(), lr=rate, betas=(0.5, 0.999),
                                            fused=device.type != "mps")
    if config["model"] == "tuned-gan":
        nets["average"] = AveragedModel(nets["G"], avg_fn=last_tenth, use_buffers=True)
        nets["average"].n_averaged += 1  # else torch would begin with a copy after the first step
    return nets, optimizers


def noise_dim(config: dict) -> int:
    """Dimensions of the noise that samples are made of."""
    if config["model"] == "vae-gan":
        return max(CODE_NOISE, config["latent_dim"])
    return config.get("z_dim") or config["latent_dim"]


# ------------------------------------------------------------------------------------- Objective
#
# The game. A step takes networks, their optimisers and a batch of images x (B, 1, 28, 28), changes
# the networks, and returns what it computed by name.


def discriminator_loss(loss: str, real: Tensor, fake: Tensor) -> Tensor:
    """From D's logits of real and of generated images.

    A blind D, whose logits are all 0, has 2 (hinge) or 2 ln 2 (bce).
    """
    if loss == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(loss: str, fake: Tensor) -> Tensor:
    """From D's logits of generated images. Of a blind D it is 0 (hinge) or ln 2 (bce)."""
    if loss == "hinge":
        return -fake.mean()
    return F.softplus(-fake).mean()  # not log(1 - p): where D is sure, that has no gradient


def elbo_losses(E: nn.Module, G: Generator, x: Tensor) -> dict[str, Tensor]:
    """-ELBO and its two parts, nats per image, for grey images as means of Bernoulli pixels."""
    mu, logvar = E(x).chunk(2, dim=1)
    z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()  # the reparameterisation trick
    reconstruction = F.binary_cross_entropy_with_logits(G.logits(z), x, reduction="sum") / len(x)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()
    return {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}


def shifted(x: Tensor, by: int) -> Tensor:
    """Images (B, 1, H, W), each moved by up to `by` pixels in both directions, zeros coming in."""
    n, _, height, width = x.shape
    padded = F.pad(x, (by, by, by, by))
    down = torch.randint(2 * by + 1, (n, 1), device=x.device)
    right = torch.randint(2 * by + 1, (n, 1), device=x.device)
    rows = (down + torch.arange(height, device=x.device))[:, :, None]  # (B, H, 1)
    columns = (right + torch.arange(width, device=x.device))[:, None]  # (B, 1, W)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded[image, :, rows, columns].permute(0, 3, 1, 2)


def autocast(x: Tensor, config: dict):
    """A context in which networks compute in the run's precision."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=config["precision"] == "bfloat16")


@torch.compiler.disable  # only the forward passes are compiled
def update(optimizers: list[torch.optim.Optimizer], loss: Tensor) -> None:
    """A step of Adam down the loss, of the networks of these optimisers alone."""
    weights = []
    for optimizer in optimizers:
        optimizer.zero_grad()
        weights += optimizer.param_groups[0]["params"]
    loss.backward(inputs=weights)
    for optimizer in optimizers:
        optimizer.step()


def gan_step(nets: dict, optimizers: dict, x: Tensor, config: dict) -> dict[str, Tensor]:
    """D learns to tell real from generated images, then G to make images that D takes for real."""
    G, D, size = nets["G"], nets["D"], (len(x), config["z_dim"])

    def judge(images: Tensor) -> Tensor:
        if "shift" in config:  # else D would learn the training images by heart
            images = shifted(images, config["shift"])
        return D(images)

    with autocast(x, config):
        fake = G(torch.randn(size, device=x.device)).detach()  # D's step must not reach G
        real_logits, fake_logits = judge(x), judge(fake)
    d_loss = discriminator_loss(config["loss"], real_logits, fake_logits)
    update([optimizers["D"]], d_loss)

    with autocast(x, config):
        logits = judge(G(torch.randn(size, device=x.device)))  # fresh noise
    g_loss = generator_loss(config["loss"], logits)
    update([optimizers["G"]], g_loss)
    if "average" in nets:
        nets["average"].update_parameters(G)
    return {"d_loss": d_loss, "g_loss": g_loss,
            "accuracy_real": (real_logits > 0).float().mean(),
            "accuracy_fake": (fake_logits < 0).float().mean()}


def vae_step(nets: dict, optimizers: dict, x: Tensor, config: dict) -> dict[str, Tensor]:
    """Encoder and decoder lower -ELBO: the VAE, and the hybrid's first stage."""
    with autocast(x, config):
        losses = elbo_losses(nets["E"], nets["G"], x)
    update([optimizers["E"], optimizers["G"]], losses["loss"])
    return losses


def vae_gan_step(nets: dict, optimizers: dict, x: Tensor, config: dict,
                 vae_learns: bool) -> dict[str, Tensor]:
    """The hybrid's second stage, and its third in which the VAE learns too.

        stage   discriminators   then            by the loss
        1       -                E, G            -ELBO
        2       D, D_z           H               hinge of D_z + 0.1 hinge of D
        3       D, D_z           E, G, H         -ELBO + 10 (hinge of D_z + hinge of D)

    A VAE's codes do not fill N(0, I), so that samples from it are poor. H learns to turn noise into
    codes like the encoder's, and G turns codes into images. D_z tells H's codes from the encoder's,
    D tells the images that G makes of H's codes from real ones.
    """
    E, G, H, D, D_z = nets["E"], nets["G"], nets["H"], nets["D"], nets["D_z"]
    size = (len(x), noise_dim(config))
    with autocast(x, config):
        mu, logvar = E(x).detach().chunk(2, dim=1)
        z_real = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        z_fake = H(torch.randn(size, device=x.device)).detach()
        x_fake = G(z_fake).detach()
        real, fake, real_code, fake_code = D(x), D(x_fake), D_z(z_real), D_z(z_fake)
    d_loss = (discriminator_loss("hinge", real, fake)
              + discriminator_loss("hinge", real_code, fake_code))
    update([optimizers["D"], optimizers["D_z"]], d_loss)

    with autocast(x, config):
        z = H(torch.randn(size, device=x.device))
        code_logits, image_logits = D_z(z), D(G(z))
        losses = elbo_losses(E, G, x) if vae_learns else {}
    image_weight = 1 if vae_learns else FROZEN_IMAGES
    h_loss = (generator_loss("hinge", code_logits)
              + image_weight * generator_loss("hinge", image_logits))
    if vae_learns:
        update([optimizers["E"], optimizers["G"], optimizers["H"]],
               losses["loss"] + ADVERSARIAL * h_loss)
    else:
        update([optimizers["H"]], ADVERSARIAL * h_loss)
    return losses | {"d_loss": d_loss, "h_loss": h_loss,
                     "accuracy_real": (real > 0).float().mean(),
                     "accuracy_fake": (fake < 0).float().mean(),
                     "accuracy_z_real": (real_code > 0).float().mean(),
                     "accuracy_z_fake": (fake_code < 0).float().mean()}


def step(nets: dict, optimizers: dict, x: Tensor, config: dict, stage: int) -> dict[str, Tensor]:
    """One step of any model; `stage` is 1, and of a hybrid 1, 2 or 3."""
    if config["model"] in ("gan", "tuned-gan"):
        return gan_step(nets, optimizers, x, config)
    if stage == 1:
        return vae_step(nets, optimizers, x, config)
    return vae_gan_step(nets, optimizers, x, config, vae_learns=stage == 3)


# ----------------------------------------------------------------------------------------- Train


def train(run: common.Run, x_train: Tensor, x_val: Tensor, val_features: Tensor, classifier,
          args) -> tuple[dict, int]:
    """Train, or continue from the run's checkpoint. Networks of the best epoch, and that epoch.

    Best is the lowest FID of samples against validation features; of a hybrid see `merit`. Raises
    Diverged when a loss is no longer finite.
    """
    config, device, last = run.config, x_train.device, run.config["epochs"]
    torch.manual_seed(common.seed_from(config["seed"], "weights"))
    nets, optimizers = build(config, device)
    run.restore(**nets, **{f"optimizer_{name}": part for name, part in optimizers.items()})
    train_step = common.compiled(step, args.compile, device)
    z_val = torch.randn(min(len(x_val), args.samples), noise_dim(config),
                        generator=common.generator("z", "val"))
    z_shown = torch.randn(16, noise_dim(config), generator=common.generator("z", "shown"))

    for epoch in run.epochs():
        stage = 1 + (epoch - 1) // config.get("stage_epochs", last)
        for name, net in nets.items():
            # after a hybrid's first stage BatchNorm keeps the statistics of the VAE
            net.train(stage == 1 or name not in ("E", "G"))
        if config["model"] == "tuned-gan":  # the rate falls to 0 along a line
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = config["lr"] * (1 - (epoch - 1) / last)
        steps = []
        for batch in run.batches(len(x_train), device):
            found = train_step(nets, optimizers, x_train[batch], config, stage)
            steps.append({key: value.detach().clone() for key, value in found.items()})
        row = {key: torch.stack([one[key] for one in steps]).mean().item() for key in steps[0]}

        for net in nets.values():
            net.eval()
        if "E" in nets:
            torch.manual_seed(common.seed_from(config["seed"], "validation"))
            row |= {f"val_{key}": value for key, value in mean_elbo(nets, x_val).items()}
        features, probs = classifier.predict(draw(nets, z_val, device, stage))
        histogram = class_histogram(probs)
        row |= {"val_entropy": histogram["entropy"], "val_classes": histogram["classes"],
                "val_fid": common.frechet_distance(features, val_features)}
        if epoch in (1, 5, last):
            save_strip(run.folder / f"samples_epoch_{epoch}.png",
                       draw(nets, z_shown, device, stage), 16)
        run.log(row, best=merit(config, epoch, row, run.history))
    best_epoch = run.load_best(**nets)
    for net in nets.values():
        net.eval()
    return nets, best_epoch


def merit(config: dict, epoch: int, row: dict, history: list[dict]) -> tuple:
    """What the best epoch minimises: the FID on validation images.

    A hybrid's best epoch is one of its last stage. All epochs that reconstruct within 5 % of its
    VAE tie, and the FID decides among them; beyond that the reconstruction comes first.
    """
    if config["model"] != "vae-gan":
        return (row["val_fid"],)
    stage = config["stage_epochs"]
    if epoch <= 2 * stage:
        return 1, row["val_fid"]
    allowed = SLACK * history[stage - 1]["val_reconstruction"]
    return 0, max(row["val_reconstruction"], allowed), row["val_fid"]


# ---------------------------------------------------------------------------- Sample and measure


def draw(nets: dict, noise: Tensor, device: torch.device, stage: int = 3) -> Tensor:
    """Images (N, 1, 28, 28) of noise (N, noise_dim), on the CPU.

    A tuned GAN draws with its moving average, a hybrid after its first stage with codes from H.
    """
    generator = nets.get("average", nets["G"])
    assert not generator.training, "images are measured in eval mode: each depends on its own noise"

    def images(z: Tensor) -> Tensor:
        if "H" in nets and stage == 1:  # still a VAE, whose codes may have fewer dimensions
            z = z[:, :nets["H"][-1].out_features]
        elif "H" in nets:
            z = nets["H"](z)
        return generator(z)

    return common.in_chunks(images, noise, device)


@torch.no_grad()
def mean_elbo(nets: dict, x: Tensor) -> dict[str, float]:
    """-ELBO and its parts, nats per image, of many images."""
    totals = {"loss": 0.0, "reconstruction": 0.0, "kl": 0.0}
    for chunk in x.split(1000):
        for key, value in elbo_losses(nets["E"], nets["G"], chunk).items():
            totals[key] += value.double().item() * len(chunk)
    return {key: total / len(x) for key, total in totals.items()}


def class_histogram(probs: Tensor) -> dict:
    """Shares of the ten classes by the classifier's probabilities (N, 10), their entropy in nats
    (at most 2.30), and how many classes have 1 % or more.
    """
    share = probs.argmax(1).bincount(minlength=10).double() / len(probs)
    return {"entropy": torch.special.entr(share).sum().item(),
            "classes": int((share >= 0.01).sum()), "class_share": share.tolist()}


def manifold_metrics(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall and coverage of fake features (M, D) against real ones (N, D).

    Every feature has a ball that reaches to its k-th nearest neighbour of its own set. Precision:
    the share of fake features in a real ball. Recall: of real features in a fake ball. Coverage: of
    real balls with a fake feature in them. Sources: Kynkäänniemi et al. 2019; Naeem et al. 2020.
    """

    def radii(features: Tensor) -> Tensor:
        nearest = []
        for chunk in features.split(1000):  # the first of k + 1 is the feature itself
            distance = common.distances(chunk, features)
            nearest.append(distance.topk(k + 1, largest=False).values[:, k])
        return torch.cat(nearest)

    real_radii, fake_radii = radii(real), radii(fake)
    precise = torch.zeros(len(fake), dtype=torch.bool)
    recalled, covered = [], []
    for chunk, radius in zip(real.split(1000), real_radii.split(1000), strict=True):
        distance = common.distances(chunk, fake)  # (1000, M)
        in_real_ball = distance < radius[:, None]
        precise |= in_real_ball.any(0)
        covered.append(in_real_ball.any(1))
        recalled.append((distance < fake_radii).any(1))
    return {"precision": precise.double().mean().item(),
            "recall": torch.cat(recalled).double().mean().item(),
            "coverage": torch.cat(covered).double().mean().item()}


class Reference:
    """Real images of a dataset, as every run on it is measured against them."""

    def __init__(self, data: common.Data, classifier, samples: int):
        print(f"measuring real images of {data.name} ...", flush=True)
        self.data, self.classifier = data, classifier
        chosen = torch.randperm(len(data.x_test), generator=common.generator("test"))[:samples]
        self.test_features = classifier.test_features[chosen]

        # what real training images score; one set alone would be a noisy floor of the FID
        order = torch.randperm(len(data.x_train), generator=common.generator("real"))
        features, probs = classifier.predict(data.x_train[order[:6 * samples]])
        sets = [part for part in features.split(samples) if len(part) == samples]
        floors = [common.frechet_distance(part, self.test_features) for part in sets]
        real = self.score(features[:samples], probs[:samples])
        real |= {"fid": float(np.mean(floors)), "fid_std": float(np.std(floors, ddof=1)),
                 "sets": len(floors)}
        self.scale = {"real": real, "pixel_entropy": common.pixel_entropy(data.x_test)}

    def score(self, features: Tensor, probs: Tensor) -> dict:
        """FID, precision, recall, coverage and classes of images, by what the classifier says."""
        return {"fid": common.frechet_distance(features, self.test_features),
                **manifold_metrics(self.test_features, features), **class_histogram(probs)}


def evaluate(run: common.Run, nets: dict, best_epoch: int, x_train: Tensor, reference: Reference,
             samples: int) -> dict:
    """The metrics of trained networks, and pictures of them."""
    config, device, x_test = run.config, x_train.device, reference.data.x_test
    print(f"measuring {samples} images ...", flush=True)
    noise = torch.randn(samples, noise_dim(config), generator=common.generator(config["seed"], "z"))
    x = draw(nets, noise, device)
    chosen = torch.randperm(len(x_test), generator=common.generator("copying"))[:2000]
    distance = common.nearest(x[:2000], x_train.cpu())[0].mean()
    test_distance = common.nearest(x_test[chosen], x_train.cpu())[0].mean()
    classifier = reference.classifier
    metrics = {
        **reference.score(*classifier.predict(x)), "copying": (distance / test_distance).item(),
        "n": samples, "scale": reference.scale, "best_epoch": best_epoch,
        "classifier": classifier.identity, **run.timing(),
        "parameters": {name: sum(weight.numel() for weight in net.parameters())
                       for name, net in nets.items()}}
    if "E" in nets:
        torch.manual_seed(common.seed_from(config["seed"], "test"))
        metrics["elbo"] = mean_elbo(nets, x_test.to(device))
    metrics = run.finish(metrics)
    figures(run, nets, reference.data, device)
    return metrics


# ---------------------------------------------------------------------------- Figures and report

COLLAPSE = {"entropy": 2.0, "classes": 10, "recall": 0.2}  # at least; fixed before the runs
NAMES = ["data", "model", "size of z"]
FID = ("FID / floor", "fid_ratio", 1)
MANIFOLD = [("precision", "precision", 2), ("recall", "recall", 2), ("coverage", "coverage", 2)]
ELBO = [("reconstruction", "elbo.reconstruction", 2), ("−ELBO", "elbo.loss", 2)]
GAN_COLUMNS = [FID, *MANIFOLD, ("classes", "classes", 1), ("copying", "copying", 2)]
VAE_COLUMNS = [*GAN_COLUMNS, *ELBO]
FID_COLUMNS = [("FID", "fid", 2), ("floor", "floor", 3), FID, ("best epoch", "best_epoch", 1),
               ("seconds per epoch", "seconds_per_epoch", 1)]
STABILITY = [("spread of FID", "spread", 2), ("D's errors", "errors", 2)]
SIZES = ["z 32", "z 64", "z 128"]
SYSTEMS = ["GAN hinge", "GAN bce"]


def pairs(data: str) -> dict[str, list[tuple]]:
    """The pairs (a, b) of row names that answer the questions about a dataset."""
    mnist, float32 = data.replace("FashionMNIST", "MNIST"), data.replace(" bfloat16", "")
    gan = [((data, "GAN hinge", z), (data, "GAN bce", z)) for z in SIZES]
    gan += [((data, system, "z 128"), (data, system, "z 32")) for system in SYSTEMS]
    if data != mnist:
        gan += [((data, system, z), (mnist, system, z)) for system in SYSTEMS for z in SIZES]
    latent = [((data, "VAE", "latent 16"), (data, "VAE", "latent 8")),
              ((data, "VAE", "latent 32"), (data, "VAE", "latent 16"))]
    # more epochs than the 20 in which a hybrid's E and G learn; published in float32 alone
    hybrid = [((data, "VAE-GAN", size), (other, "VAE 30 epochs", size))
              for size in ["latent 8", "latent 16"] for other in dict.fromkeys([data, float32])]
    return {"gan": gan, "latent": latent, "hybrid": hybrid}


def name_of(run: dict) -> tuple[str, str, str]:
    """A finished run's row name; another number of samples than the default belongs to it."""
    data, model, size = row_name(run["config"])
    if run["metrics"]["n"] != SAMPLES:
        data += f" {run['metrics']['n']} samples"
    return data, model, size


def save_strip(path: Path, x: Tensor, columns: int) -> None:
    """Images (N, 1, 28, 28) in [0, 1] as a PNG, cell beside cell: white on black, as the data."""
    rows = [torch.cat(list(row[:, 0]), dim=1) for row in x.split(columns)]  # (28, 28 * columns)
    picture = (torch.cat(rows) * 255).round().byte()
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, "PNG")
    common.save(path, buffer.getvalue())


def load_strip(path: Path) -> Tensor:
    """The images (N, 1, 28, 28) in [0, 1] of a PNG by save_strip."""
    picture = torch.from_numpy(np.array(Image.open(path))).float() / 255
    return picture.unfold(0, 28, 28).unfold(1, 28, 28).reshape(-1, 1, 28, 28)


@torch.no_grad()
def figures(run: common.Run, nets: dict, data: common.Data, device: torch.device) -> None:
    """A run's pictures: samples, interpolations between codes, losses; of a VAE test images, one of
    each class, above their reconstructions.
    """
    g = common.generator("figures")
    noise = torch.randn(16, noise_dim(run.config), generator=g)
    save_strip(run.folder / "samples.png", draw(nets, noise, device), 16)

    def between(codes: Tensor) -> Tensor:  # five pairs of codes, ten steps each
        t = torch.linspace(0, 1, 10)[:, None]
        return torch.cat([(1 - t) * codes[i] + t * codes[i + 1] for i in range(0, 10, 2)])

    if "E" in nets:
        x = torch.cat([data.x_test[data.y_test == digit][:1] for digit in range(10)])
        codes = nets["E"](x.to(device)).chunk(2, dim=1)[0]
        both = torch.cat([x, nets["G"](codes).cpu()])
        save_strip(run.folder / "reconstructions.png", both, 10)
        path = nets["G"](between(codes.cpu()).to(device)).cpu()
    else:
        path = draw(nets, between(noise), device)
    save_strip(run.folder / "interpolation.png", path, 10)

    plot_losses(run)


def plot_losses(run: common.Run) -> None:
    """losses.png of a run; of a hybrid with its stages."""
    elbo = {"training, nats": ["loss", "reconstruction"],
            "validation, nats": ["val_loss", "val_reconstruction"]}
    panels = {"gan": {"losses of D and G": ["d_loss", "g_loss"]}, "vae": elbo,
              "vae-gan": elbo | {"losses of both D and of H": ["d_loss", "h_loss"]}}
    stages, n = {}, run.config.get("stage_epochs")
    if n:
        stages = {1: "VAE", n + 1: "codes", 2 * n + 1: "all"}
    shown = panels[run.config["model"].removeprefix("tuned-")]
    common.plot_history(run.folder / "losses.png", run.history,
                        shown | {"FID, validation images": ["val_fid"]}, stages)


def all_runs(root: Path) -> list[dict]:
    """The finished runs of all datasets below root, with histories, in the report's order."""
    runs = []
    for dataset in common.DATASETS:
        if any((root / dataset).glob("*/*/final_metrics.json")):
            runs += common.finished_runs(root / dataset)
    if not runs:
        raise common.UserError(f"no finished run in {root}; train first")
    for run in runs:
        with open(run["folder"] / "history.csv", encoding="utf-8") as file:
            run["history"] = [{key: float(value) for key, value in row.items() if value}
                              for row in csv.DictReader(file)]

    def order(run: dict) -> tuple:
        config = run["config"]
        return (list(common.DATASETS).index(config["dataset"]), name_of(run)[0],
                MODELS.index(config["model"]), config.get("loss", ""), config["epochs"],
                config.get("latent_dim") or config["z_dim"])

    return sorted(runs, key=order)


def stability(history: list[dict]) -> dict[str, float]:
    """Of the second half of a GAN's epochs, both comparable between losses.

    spread: the standard deviation of the change of log FID from epoch to epoch; a steady fall has
    none. errors: the share of real and of generated images that D gets wrong, added; 1 is a blind D
    and near 0 it has won.
    """
    half = history[-max(3, len(history) // 2 + 1):]
    changes = np.diff(np.log([row["val_fid"] for row in half]))
    wrong = [2 - row["accuracy_real"] - row["accuracy_fake"] for row in half]
    return {"spread": float(np.std(changes)) if len(changes) > 1 else 0.0,
            "errors": float(np.mean(wrong))}


def rows(runs: list[dict]) -> dict:
    """Row name -> seed -> numbers: the one place where JSON becomes a table."""
    table = {}
    for run in runs:
        metrics, config, history = run["metrics"], run["config"], run["history"]
        name = name_of(run)
        real = metrics["scale"]["real"]
        table.setdefault((name[0], "real images", ""), {None: {
            **real, "floor": real["fid"], "fid_ratio": 1.0, "copying": 1.0,
            "elbo.reconstruction": metrics["scale"]["pixel_entropy"]}})
        measured = {key: value for key, value in metrics.items()
                    if key not in ("scale", "environment", "classifier")}
        numbers = common.flat(measured)
        numbers |= {"floor": real["fid"], "fid_ratio": metrics["fid"] / real["fid"],
                    "val_fid": history[metrics["best_epoch"] - 1]["val_fid"],
                    "val_entropy": history[-1]["val_entropy"],
                    "val_classes": history[-1]["val_classes"]}
        if name[1].startswith("GAN"):
            numbers |= stability(history)
        table.setdefault(name, {})[config["seed"]] = numbers
    return table


def collapsed_runs(table: dict) -> list[str]:
    """How many runs of each kind are called collapsed, by the images of the best epoch or of the
    last, and a table of them.
    """
    lines = [[*NAMES, "seed", *COLLAPSE, "entropy, last epoch", "classes, last epoch"]]
    counts = {}
    for name, seeds in part(table, "GAN", "tuned GAN", "VAE", "VAE-GAN").items():
        for seed, numbers in seeds.items():
            if seed is None:  # real images
                continue
            n_called, n = counts.get(kind(name), (0, 0))
            best = [numbers[key] for key in COLLAPSE]
            last = [numbers["val_entropy"], numbers["val_classes"]]  # no recall was measured there
            least = [*COLLAPSE.values(), COLLAPSE["entropy"], COLLAPSE["classes"]]
            called = any(value < limit for value, limit in zip(best + last, least, strict=True))
            if called:
                lines.append([*name, str(seed), *(f"{value:.3g}" for value in best + last)])
            counts[kind(name)] = n_called + int(called), n + 1
    summary = ", ".join(f"{n_called} of {n} {name}s" for name, (n_called, n) in counts.items())
    table_of_runs = common.markdown_table(lines, len(NAMES)) if len(lines) > 1 else ""
    return [f"Called collapsed: {summary}.", table_of_runs]


def kind(name: tuple) -> str:
    """'GAN', 'tuned GAN', 'VAE' or 'VAE-GAN', and 'real' of real images."""
    return "tuned GAN" if name[1].startswith("GAN tuned") else name[1].split(" ")[0]


def part(table: dict, *kinds: str) -> dict:
    """The rows of real images and of these kinds."""
    return {name: seeds for name, seeds in table.items() if kind(name) in ("real", *kinds)}


def best_of(table: dict, data: str, wanted: str) -> tuple | None:
    """The row of a kind with the lowest mean FID on validation images; None if there is none."""
    means = {}
    for name, seeds in table.items():
        if name[0] == data and kind(name) == wanted:
            means[name] = np.mean([numbers["val_fid"] for numbers in seeds.values()])
    return min(means, key=means.get, default=None)


def answer(table: dict) -> list[str]:
    """For each dataset the best of every kind, and the hybrid beside its VAE."""
    lines, verdicts = [], []
    for data in dict.fromkeys(name[0] for name in table):
        parts = []
        for wanted in ["GAN", "tuned GAN", "VAE", "VAE-GAN"]:
            name = best_of(table, data, wanted)
            if name:
                ratio = common.cell(table[name], "fid_ratio", 1)
                parts.append(f"{name[1]} {name[2]} {ratio}")
        lines.append(f"{data}: FID / floor of the best of each kind: {', '.join(parts)} (ideal 1).")
        a, b = pairs(data)["hybrid"][-1]
        verdicts.append(common.verdict(table, a, b, *FID))
    return lines + [line for line in verdicts if line]


def four_answers(table: dict) -> list[str]:
    """The sections of the four questions: comparisons in words, other columns in a table."""
    least = ", ".join(f"{key} {value:g}" for key, value in COLLAPSE.items())
    chosen = {"gan": [], "latent": [], "hybrid": []}
    for data in dict.fromkeys(name[0] for name in table):
        for question, found in pairs(data).items():
            chosen[question] += found
        gan = best_of(table, data, "GAN")
        if gan:
            chosen["hybrid"] += [((data, "VAE-GAN", d), gan) for d in ["latent 8", "latent 16"]]

    def compared(question: str, columns: list[tuple]) -> list[str]:
        lines = [common.verdict(table, a, b, *FID) for a, b in chosen[question]]
        bullets = "\n".join(f"- {line}" for line in lines if line)
        return [bullets, common.paired_table(table, chosen[question], columns)]

    return [
        "## The four answers",
        "### 1. What moves the quality and the stability of a GAN?", *compared("gan", STABILITY),
        "Spread: how much log FID jumps from epoch to epoch. D's errors: the shares of real and of "
        "generated images that it gets wrong, added; a D that guesses has 1. Each dataset has a "
        "classifier and a floor of its own.",
        "### 2. Do they collapse?",
        f"A run is called collapsed if any number is below these: {least}.",
        *collapsed_runs(table),
        "### 3. What do more latent dimensions do to a VAE?",
        *compared("latent", [*ELBO, MANIFOLD[1]]),
        "### 4. Does the hybrid combine the benefits?",
        "Each hybrid beside a VAE of 30 epochs, and beside the untuned GAN that is best on "
        "validation images.",
        *compared("hybrid", [MANIFOLD[1], *ELBO])]


def loss_figure(path: Path, runs: list[dict], panels: list[tuple]) -> None:
    """Losses by epoch, means over seeds: a row of panels for each dataset.

    A panel is (title, model, columns of the history, the values of a blind discriminator).
    """
    by_name = {}
    for run in runs:
        by_name.setdefault(name_of(run), []).append(run)
    datas = list(dict.fromkeys(name[0] for name in by_name))
    figure = common.Figure(figsize=(5 * len(panels), 3.5 * len(datas)), layout="constrained")
    grid = figure.subplots(len(datas), len(panels), squeeze=False)
    for row, data in enumerate(datas):
        for axes, (title, model, columns, blind) in zip(grid[row], panels, strict=True):
            shown = [name for name in by_name
                     if name[0] == data and f"{name[1]} ".startswith(f"{model} ")]
            for i, name in enumerate(shown):
                for column, style in zip(columns, ["-", "--"], strict=False):
                    losses = [[epoch[column] for epoch in run["history"]] for run in by_name[name]]
                    mean = np.mean(losses, axis=0)
                    axes.plot(range(1, len(mean) + 1), mean, f"C{i}{style}",
                              label=f"{name[1]}, {name[2]}: {column}")
            for value in blind:
                axes.axhline(value, color="k", lw=0.8, ls=":")
            axes.set(title=f"{data}: {title}", xlabel="epoch")
            if shown:
                axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    common.save_figure(path, figure)


def precision_recall(path: Path, table: dict) -> None:
    """Precision against recall, a point for each run, a panel for each dataset."""
    colors = {"GAN": "C0", "tuned GAN": "C3", "VAE": "C1", "VAE-GAN": "C2", "real": "k"}
    datas = list(dict.fromkeys(name[0] for name in table))
    figure = common.Figure(figsize=(4.5 * len(datas), 4), layout="constrained")
    grid = figure.subplots(1, len(datas), squeeze=False, sharex=True, sharey=True)[0]
    for axes, data in zip(grid, datas, strict=True):
        axes.set(title=data, xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02))
        for wanted, color in colors.items():
            seeds = []
            for name, numbers in table.items():
                if name[0] == data and kind(name) == wanted:
                    seeds += numbers.values()
            recalls = [numbers["recall"] for numbers in seeds]
            precisions = [numbers["precision"] for numbers in seeds]
            axes.plot(recalls, precisions, "o", color=color, ms=5, alpha=0.7, label=wanted)
    grid[0].legend(fontsize=8)
    common.save_figure(path, figure)


def pictures(root: Path, runs: list[dict], data: str) -> dict[str, list[Path]]:
    """Strips of the first run of each row: samples of GANs, samples and reconstructions of VAEs and
    hybrids, and the gallery of samples by epoch.
    """
    strips = {"GANs": {}, "VAEs and hybrids": {}, "gallery": {}, "reconstructions": {}}
    done = set()
    for run in runs:
        name, folder = name_of(run), run["folder"]
        if name[0] != data or name in done or not (folder / "samples.png").exists():
            continue
        done.add(name)
        label = ", ".join(name[1:])
        group = "GANs" if name[1].startswith("GAN") else "VAEs and hybrids"
        strips[group][label] = load_strip(folder / "samples.png")
        for epoch in sorted({1, 5, run["config"]["epochs"]}):
            file = folder / f"samples_epoch_{epoch}.png"
            if file.exists():
                strips["gallery"][f"{label}, epoch {epoch}"] = load_strip(file)
        if (folder / "reconstructions.png").exists():
            both = load_strip(folder / "reconstructions.png")
            strips["reconstructions"] |= {"test images": both[:10], label: both[10:]}
    files = {group: [] for group in strips}
    for group, images in strips.items():
        if images:
            path = root / f"{group}_{data}.png".replace(" ", "_")
            columns = 10 if group == "reconstructions" else 16
            common.save_grid(path, torch.cat(list(images.values())), columns, f"{data}: {group}",
                             list(images))
            files[group].append(path)
    return files


BLIND = {"hinge": [2, 0], "bce": [2 * math.log(2), math.log(2)]}  # losses of D and G
GAN_LOSSES = [(f"{loss}, dotted: a blind D", f"GAN {loss}", ["d_loss", "g_loss"], BLIND[loss])
              for loss in LOSSES]
VAE_LOSSES = [("−ELBO, validation, nats", "VAE", ["val_loss"], []),
              ("reconstruction, nats", "VAE", ["val_reconstruction"], []),
              ("KL, nats", "VAE", ["val_kl"], [])]


def plots(root: Path, runs: list[dict], table: dict) -> list[Path]:
    """The source's five plots, precision against recall, and the losses of a hybrid by stage."""
    kinds = {"gan_fid_comparison": ["GAN", "tuned GAN"], "vae_fid_comparison": ["VAE"],
             "fid_gan_vs_vae": ["GAN", "tuned GAN", "VAE", "VAE-GAN"]}
    files = []
    for prefix, panels, wanted in [("gan", GAN_LOSSES, "gan"), ("vae", VAE_LOSSES, "vae")]:
        chosen = [run for run in runs if run["config"]["model"] == wanted]
        if chosen:
            files.append(root / f"{prefix}_loss_comparison.png")
            loss_figure(files[-1], chosen, panels)
    for name, shown in kinds.items():
        chosen = {row: seeds for row, seeds in table.items() if kind(row) in shown}
        if chosen:
            files.append(root / f"{name}.png")
            common.plot_points(files[-1], chosen, "fid_ratio", "FID / floor (1: real images)",
                               band=(0.95, 1.05), log=True)
    files.append(root / "precision_recall.png")
    precision_recall(files[-1], table)
    for run in runs:
        if run["config"]["model"] == "vae-gan" and (run["folder"] / "losses.png").exists():
            return [*files, run["folder"] / "losses.png"]
    return files


def report(root: Path) -> None:
    """Write report.md, results.csv and pictures of the finished runs below root; print the answer
    and the table.
    """
    runs = all_runs(root)
    table = rows(runs)
    datas = list(dict.fromkeys(name[0] for name in table))
    lines = "\n".join(f"- {line}" for line in answer(table))

    def order(name: tuple) -> tuple[int, float]:  # by dataset, then by FID
        mean = np.mean([numbers["fid"] for numbers in table[name].values()])
        return datas.index(name[0]), mean

    by_fid = {name: table[name] for name in sorted(table, key=order)}
    fids = common.results_table(by_fid, NAMES, FID_COLUMNS)
    print(f"\n{lines}\n\n{fids}")

    files = [pictures(root, runs, data) for data in datas]

    def links(*groups: str) -> list[str]:
        found = [file for group in groups for of_data in files for file in of_data[group]]
        return common.image_links(root, found)

    titles = dict.fromkeys(common.DATASETS[run["config"]["dataset"]] for run in runs)
    gans, vaes = part(table, "GAN", "tuned GAN"), part(table, "VAE", "VAE-GAN")
    sections = [
        f"# GAN against VAE on {' and '.join(titles)}",
        "Which makes better images, a GAN or a VAE, and what does combining them bring?",
        "## Summary", f"**Answer.**\n\n{lines}",
        "Every epoch is chosen on validation images; ± is the standard deviation over n seeds. "
        f"Pictures are of the first seed. {common.glossary(root)}"]
    if any(kind(name) != "real" for name in gans):
        sections += ["## Part 1: GANs", common.results_table(gans, NAMES, GAN_COLUMNS),
                     *links("GANs")]
    if any(kind(name) != "real" for name in vaes):
        sections += ["## Part 2: VAEs and hybrids", common.results_table(vaes, NAMES, VAE_COLUMNS),
                     *links("VAEs and hybrids", "reconstructions")]
    sections += [
        "## Gallery of generated images", *links("gallery"),
        "## Analysis plots", *common.image_links(root, plots(root, runs, table)),
        "## FID", fids, *four_answers(table), common.how_made(runs)]
    common.write_report(root, sections, table, NAMES)


# ------------------------------------------------------------------------------------------ main


def load_datasets(args) -> dict[str, common.Data]:
    """The dataset that was named; else MNIST and FashionMNIST, or what can be had of them."""
    data = common.load_data(args.dataset, args.data_dir)
    datasets = {data.name: data}
    if args.dataset is None and data.name == "mnist":
        try:
            datasets["fashion-mnist"] = common.load_data("fashion-mnist", args.data_dir)
        except common.UserError as error:
            print(f"warning: {error}; running MNIST alone", flush=True)
    return datasets


def main(argv=None) -> dict:
    args = parse_args(argv)
    root = Path(args.out_dir) / "gan_vs_vae"
    if args.report_only:
        report(root)
        return {}
    device, datasets = common.pick_device(args.device), load_datasets(args)
    configs = configurations(args, list(datasets))[args.shard]
    common.announce(root, configs, " ".join(datasets), device)
    for config in configs:  # check all of them before anything is written
        common.split(datasets[config["dataset"]], config)
    references = {}

    def train_and_measure(run: common.Run) -> dict:
        data = datasets[run.config["dataset"]]
        if data.name not in references:
            classifier = common.load_classifier(data, device)
            references[data.name] = Reference(data, classifier, args.samples)
        reference = references[data.name]
        indices = common.split(data, run.config)
        x_train, x_val = (data.x_train[indices[key]].to(device) for key in ["train", "val"])
        val_features = reference.classifier.predict(x_val)[0]
        nets, best_epoch = train(run, x_train, x_val, val_features, reference.classifier, args)
        return evaluate(run, nets, best_epoch, x_train, reference, args.samples)

    return common.run_all(configs, root, variant, args, device, train_and_measure, report,
                          measured={"n": args.samples})


if __name__ == "__main__":
    common.guard(main)
