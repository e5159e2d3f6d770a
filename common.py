"""What the four studies share so that their numbers can be compared, and the plumbing.

Models, objectives and training loops are not here: each script shows its own. Everywhere, images x
are (N, 1, 28, 28) float32 in [0, 1], labels y (N,) int64 in 0..9, features (N, 64) float32 of the
metric classifier, and losses nats per image.
"""

import argparse
import csv
import functools
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = "agg"  # figures are drawn off screen, whatever the user has set
# torch's threads sleep while they wait: beside another busy program an epoch of the imbalance study
# takes 3.0 s instead of 4.9. torch reads it once, when it is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's MPS lacks runs on the CPU
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, LogLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision import datasets
from torchvision.utils import make_grid
from tqdm import tqdm

matplotlib.rcdefaults()  # a user's matplotlibrc would change the pictures
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")  # torch's own use
HERE = Path(__file__).resolve().parent
DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "glyphs": "glyphs"}


# ------------------------------------------------------------------------------- Flags and errors


class UserError(Exception):
    """A mistake that the user can mend: one line with the value, what is allowed, the next step."""


class Diverged(UserError):
    """A loss is no longer finite. That ends its run; the other runs of a sweep go on."""


class Parser(argparse.ArgumentParser):
    """The flags that every script has. A bad value is one line and exit status 2."""

    def __init__(self, study: str, doc: str, epochs: int, batch_size: int, lr):
        super().__init__(f"{study}.py", description=doc.splitlines()[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        flag = self.add_argument
        data_dir = os.environ.get("MNIST_DATA_DIR") or "data"
        flag("--dataset", choices=DATASETS, help="not given: MNIST (gan_vs_vae: both), or glyphs")
        flag("--data-dir", default=data_dir, help="torchvision's folder, filled on first use")
        flag("--out-dir", default="results", help="run folders and reports go below it")
        flag("--epochs", type=number(int, 1), default=epochs, help="passes over the training set")
        flag("--batch-size", type=number(int, 1), default=batch_size, help="images per step")
        flag("--lr", type=number(float, 1e-9, 100), default=lr, help="learning rate at the start",
             nargs="+" if isinstance(lr, list) else None)
        flag("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0], help="one run for each")
        flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
             help="auto: the fastest there is; CUDA_VISIBLE_DEVICES=1 names one of several GPUs")
        flag("--precision", choices=["float32", "bfloat16"], default="float32",
             help="of the networks in training; everything measured is float32")
        flag("--train-size", type=number(int, 1), help="train on N images, drawn by the seed")
        flag("--fresh", action="store_true", help="delete the run folders and start over")
        flag("--report-only", action="store_true", help="no training: the report of finished runs")
        flag("--shard", type=shard, default="0/1", metavar="K/N", help="every Nth run from the Kth")
        flag("--compile", action="store_true", help="torch.compile; a CPU needs a C++ compiler")
        flag("--tensorboard", action="store_true", help="write logs for TensorBoard too")

    def parse_args(self, argv=None):
        """The flags; "command" is what was typed, or what a notebook passed to main."""
        argv = sys.argv[1:] if argv is None else argv
        args = super().parse_args(argv)
        args.command = shlex.join([self.prog, *argv])
        return args

    def error(self, message: str):
        if "'cuda:" in message:
            message = f"{message}; CUDA_VISIBLE_DEVICES=1 with --device cuda names the second GPU"
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(kind: type, low: float, high: float = 1e9):
    """An argparse type: an int or a float from low to high."""

    def parse(text: str):
        if "," in text:
            raise argparse.ArgumentTypeError(f"{text!r}: values are separated by spaces")
        value = kind(text)
        if not low <= value <= high:  # a nan is refused too
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low:g} to {high:.10g}"  # argparse says it
    return parse


def shard(text: str) -> slice:
    """An argparse type: "1/4" is every fourth run, beginning with the second."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 0 <= K < N, such as 0/4")
    return slice(int(k), None, int(n))


def guard(main) -> None:
    """Run a script's main; a UserError, Ctrl-C and SIGTERM are one line instead of a traceback."""

    def stopped(signal_number: int, _) -> None:
        print("stopped; the same command (without --fresh) continues", file=sys.stderr)
        sys.exit(128 + signal_number)  # 130 for Ctrl-C, 143 for SIGTERM

    for stream in [sys.stdout, sys.stderr]:
        if hasattr(stream, "reconfigure"):  # a console that cannot show a letter must not end a run
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is None:  # closed: tqdm needs one
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    signal.signal(signal.SIGINT, stopped)
    signal.signal(signal.SIGTERM, stopped)  # how a cluster takes its machine back
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


# --------------------------------------------------------------------- Device, seeds and progress


def pick_device(name: str) -> torch.device:
    """The device asked for, "auto": the fastest. Raises UserError if this machine has none."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.append("mps")
    if torch.cuda.is_available():
        available.append("cuda")
    if name == "auto":
        name = available[-1]
    if name not in available:
        raise UserError(f"--device {name}: torch finds only {', '.join(available)} here")
    torch.backends.cudnn.allow_tf32 = False  # it keeps ten bits: not what float32 means
    return torch.device(name)


def seed_from(*key: int | str) -> int:
    """A 63-bit seed from a key such as (seed, "noise", epoch): a stream for every purpose."""
    entropy = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for that key: it draws the same numbers whatever the device."""
    return torch.Generator().manual_seed(seed_from(*key))


def cosine_schedule(optimizer: torch.optim.Optimizer, epochs: int):
    """The learning rate falls to 0 by half a cosine. Call its step() after every epoch."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs)))


def compiled(function, on: bool, device: torch.device):
    """torch.compile(function) if `on`. On CUDA its outputs are reused: clone what you keep."""
    compilers = [os.environ.get("CXX", "g++"), "clang++", "c++"]
    if on and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError("--compile needs a C++ compiler and finds none; install g++ or clang++, or "
                        "give the command without --compile")
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(function, mode=mode) if on else function


def autocast(x: Tensor, config: dict):
    """A context in which networks compute in the run's precision; their outputs are .float()."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=config["precision"] == "bfloat16")


def progress(items, title: str):
    """Iterate behind a progress bar; in a log file one line says what begins."""
    if not sys.stderr.isatty():
        print(f"{title} ...", flush=True)
    return tqdm(items, title, disable=None, leave=False)


@torch.no_grad()
def in_chunks(function, x: Tensor, device: torch.device) -> Tensor:
    """function(x), a thousand rows at a time on the device; the result is on the CPU."""
    return torch.cat([function(chunk.to(device)).cpu() for chunk in x.split(1000)])


# ------------------------------------------------------------------------------------------- Data


class Data(NamedTuple):
    """A dataset in memory: 60,000 training and 10,000 test images with their labels."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


FILES = {  # of a dataset: how they are called, and their shape
    "x_train": ("train-images", "idx3", (60_000, 28, 28)),
    "y_train": ("train-labels", "idx1", (60_000,)),
    "x_test": ("t10k-images", "idx3", (10_000, 28, 28)),
    "y_test": ("t10k-labels", "idx1", (10_000,))}


def find_files(name: str, folder: Path) -> dict[str, Path]:
    """The files of a dataset that lie in a folder or below it, as torchvision or a user left them:
    unpacked or not, in <name>/raw, <name>, raw or the folder itself.
    """
    for place in [folder / name / "raw", folder / name, folder / "raw", folder]:
        files = {}
        for key, (stem, kind, _) in FILES.items():
            file_name = f"{stem}[-.]{kind}-ubyte"
            matches = [*place.glob(file_name), *place.glob(f"{file_name}.gz")]
            if matches:
                files[key] = matches[0]
        if files:
            return files
    return {}


def read_idx(path: Path, wanted: tuple) -> Tensor:
    """The uint8 tensor of a file in MNIST's format, packed or not. UserError if it is another."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        n_dims = content[3]
        shape = tuple(np.frombuffer(content, ">u4", n_dims, 4).tolist())
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_dims).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        link = f" (a link to {path.readlink()})" if path.is_symlink() else ""
        raise UserError(f"{path}{link} cannot be read: {error}; mend it, or take another "
                        "--data-dir") from None
    if shape != wanted:
        raise UserError(f"{path} holds {shape}, expected {wanted}; take another --data-dir")
    return torch.from_numpy(values.copy())


def download(name: str, folder: Path) -> None:
    """Fetch a dataset into a folder. UserError with the cause if that fails."""
    dataset = getattr(datasets, name)
    print(f"downloading {name} from {dataset.mirrors[0]} to {folder / name / 'raw'}", flush=True)
    made = [path for path in [folder / name / "raw", folder / name, folder] if not path.exists()]
    cause = "what is there has another format"  # torchvision's before 0.9: it downloads nothing
    socket.setdefaulttimeout(20)  # seconds: a proxy may accept and never answer
    is_complete = False
    try:
        dataset(str(folder), download=True)
        is_complete = bool(find_files(name, folder))
    except Exception as error:  # no network, a full disk: torchvision raises many
        cause = " ".join(f"it cannot be downloaded ({type(error).__name__}: {error})".split())
    finally:
        socket.setdefaulttimeout(None)
        if not is_complete:  # after Ctrl-C too: leave no half of a file and no empty folder
            for path in made:
                shutil.rmtree(path, ignore_errors=True)
    if not is_complete:
        there = sorted(str(path.relative_to(folder)) for path in folder.glob("**/*"))[:6]
        raise UserError(
            f"no {name} in {folder}: {cause}; looked for train-images-idx3-ubyte and three more, "
            f"packed or not, in {name}/raw, {name}, raw and the folder itself; found: "
            f"{', '.join(there) or 'nothing'}; take another --data-dir, or --dataset glyphs, which "
            "needs no file")


def read_data(dataset: str, folder: Path) -> Data:
    """MNIST or FashionMNIST from a folder, downloaded if none of its files is there."""
    name = DATASETS[dataset]
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--data-dir {folder} is a file, not a folder")
    if not find_files(name, folder):
        download(name, folder)
    files = find_files(name, folder)
    for key, (stem, kind, _) in FILES.items():
        if key not in files:
            place = next(iter(files.values())).parent
            raise UserError(f"{place} has no {stem}-{kind}-ubyte beside {len(files)} other files "
                            f"of {name}; add it, or take another --data-dir")
    parts = {key: read_idx(path, FILES[key][2]) for key, path in files.items()}
    return Data(dataset, parts["x_train"][:, None].float() / 255, parts["y_train"].long(),
                parts["x_test"][:, None].float() / 255, parts["y_test"].long())


def load_data(dataset: str | None, data_dir: str) -> Data:
    """The named dataset; where neither it nor a folder is named, MNIST or else glyphs.

    Raises UserError with the true cause if that cannot be had.
    """
    if dataset == "glyphs":
        return glyphs()
    try:
        return read_data(dataset or "mnist", Path(data_dir).expanduser())
    except UserError as error:
        if dataset or data_dir != "data":
            raise
        print(f"warning: {error}; using the built-in glyphs", file=sys.stderr)
        return glyphs()


def split(data: Data, config: dict, n_val: int = 5000) -> dict[str, Tensor]:
    """Indices of the run's training images and of n_val others for validation, by its seed."""
    if config["train_size"] + n_val > len(data.x_train):
        raise UserError(f"--train-size {config['train_size']} and {n_val} for validation are more "
                        f"than the {len(data.x_train)} training images; take fewer")
    order = torch.randperm(len(data.x_train), generator=generator(config["seed"], "split"))
    return {"val": order[:n_val], "train": order[n_val:n_val + config["train_size"]]}


@functools.lru_cache(1)
def glyphs() -> Data:
    """60,000 + 10,000 digits drawn from matplotlib's fonts; needs no file and no network."""
    names = ("DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif "
             "DejaVuSerif-Bold DejaVuSerif-Italic STIXGeneral STIXGeneralItalic STIXGeneralBol "
             "cmr10 cmss10 cmtt10")
    faces = []  # each digit in 13 fonts
    for name in names.split():
        file = Path(matplotlib.get_data_path(), f"fonts/ttf/{name}.ttf")
        font = ImageFont.truetype(str(file), 52)
        for digit in "0123456789":
            picture = Image.new("L", (64, 64))
            ImageDraw.Draw(picture).text((32, 32), digit, 255, font, "mm", stroke_width=1)
            faces.append(np.asarray(picture, np.float32) / 255)
    faces = torch.from_numpy(np.stack(faces))[:, None]  # (130, 1, 64, 64)
    faces = F.avg_pool2d(faces, 3, 1, 1)  # soft edges survive shrinking

    g = generator(0, "glyphs")
    face = torch.randint(len(faces), (70_000,), generator=g)
    # an affine map for each image: turned, slanted, shifted, smaller or larger
    change = torch.randn(70_000, 2, 3, generator=g).clamp(-2, 2) * torch.tensor([0.2, 0.2, 0.1])
    affine = torch.eye(2, 3) + change
    x = []
    for part, maps in zip(face.split(5000), affine.split(5000), strict=True):
        grid = F.affine_grid(maps, [5000, 1, 28, 28], align_corners=False)
        x.append(F.grid_sample(faces[part], grid, align_corners=False))
    x = (torch.cat(x) * 255).round().clamp(0, 255) / 255
    y = face % 10
    return Data("glyphs", x[:60_000], y[:60_000], x[60_000:], y[60_000:])


# ----------------------------------------------------------------- The metric classifier, metrics


class MetricClassifier(nn.Module):
    """A small CNN (116,000 weights). Its 64 penultimate features are what the metrics compare."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.MaxPool2d(2),
            nn.BatchNorm2d(24), nn.ReLU(),  # (B, 24, 14, 14)
            nn.Conv2d(24, 48, 3, padding=1, bias=False), nn.MaxPool2d(2),
            nn.BatchNorm2d(48), nn.ReLU(),  # (B, 48, 7, 7)
            nn.Conv2d(48, 72, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(72), nn.ReLU(),  # (B, 72, 4, 4)
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(72 * 16, 64, bias=False),
            nn.BatchNorm1d(64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, 10)."""
        return self.head(self.body(x.contiguous(memory_format=torch.channels_last)))

    @torch.inference_mode()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 64) and class probabilities (N, 10) of images, on the CPU."""
        assert not self.training, "the metric classifier measures in eval mode"
        device = self.head.weight.device
        features, probs = [], []
        for chunk in x.split(1000):
            features.append(self.body(chunk.to(device, memory_format=torch.channels_last)).cpu())
            probs.append(self.head(features[-1].to(device)).softmax(1).cpu())
        return torch.cat(features), torch.cat(probs)


def train_classifier(x: Tensor, y: Tensor, device: torch.device, *key: int | str, steps: int,
                     augment: str | None = None) -> MetricClassifier:
    """A classifier of images x with labels y, in eval mode on the device.

    `key` seeds weights and batches. augment "shift" moves every batch by up to two pixels (digits),
    "flip" mirrors half of it (clothes). Plain cross-entropy: p >= 0.9 must mean something.
    """
    g = generator(*key)
    batch_size = min(128, len(x))
    with torch.random.fork_rng():
        torch.manual_seed(seed_from(*key))
        model = MetricClassifier().to(device, memory_format=torch.channels_last).train()
        x, y = x.to(device), y.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.02,
                                      fused=device.type != "mps")
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps,
                                                       pct_start=0.2)
        half = batch_size // 2
        for step in progress(range(steps), "training a classifier"):
            start = step * batch_size % (len(x) // batch_size * batch_size)
            if start == 0:  # a new epoch
                order = torch.randperm(len(x), generator=g).to(device)
            batch = order[start:start + batch_size]
            images = x[batch]
            if augment == "flip":
                images = torch.cat([images[:half], images[half:].flip(3)])
            elif augment == "shift":
                images = images.roll(torch.randint(-2, 3, (2,), generator=g).tolist(), (2, 3))
            loss = F.cross_entropy(model(images), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def load_classifier(data: Data, device: torch.device) -> MetricClassifier:
    """The metric classifier of a dataset from results/classifiers; trained once if it is missing.

    `test_features` and `test_probs` are its predictions for the test images, `accuracy` is theirs.
    `sha256` is that of its file: the numbers of two classifiers do not compare.
    """
    path = HERE / f"results/classifiers/{data.name}.pt"
    if not path.is_file():
        try:  # can it be kept? better known before
            save(path.with_suffix(".txt"), "training\n")
            path.with_suffix(".txt").unlink()
        except UserError as error:
            raise UserError(f"no {path}, and {error}; or copy the scripts elsewhere") from None
        print(f"no {path}: training it, a minute or two on two cores", flush=True)
        model = train_classifier(data.x_train, data.y_train, device, "classifier", data.name,
                                 steps=8 * (len(data.x_train) // 128),  # eight epochs
                                 augment="flip" if data.name == "fashion-mnist" else "shift")
        save(path, model.half().cpu().state_dict())  # half the size, the same accuracy
    model = MetricClassifier()
    model.load_state_dict(torch.load(path, weights_only=True))
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    model.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    model.test_features, model.test_probs = model.predict(data.x_test)
    model.accuracy = (model.test_probs.argmax(1) == data.y_test).double().mean().item()
    model.identity = {"accuracy": model.accuracy, "sha256": model.sha256}
    if model.accuracy < 0.8:
        raise UserError(f"these images are not {DATASETS[data.name]}: its classifier, right for "
                        f"nine in ten and more, is right for {100 * model.accuracy:.0f} % of "
                        "them; take another --data-dir")
    return model


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance ("FID") of features a (N, D) and b (M, D), in squared feature units.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), covariances with N - 1, float64.
    Biased upwards for small N and M: report its floor, the distance of two sets of real images.
    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500.
    """
    a, b = a.cpu().double(), b.cpu().double()
    if not a.isfinite().all():
        return math.nan  # of a run that diverged
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # symmetric eigenvalues keep the square root real, also with fewer samples than dimensions
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * cross)


def within_reach(real: Tensor, fake: Tensor, k: int = 5) -> Tensor:
    """(N, M) bool: is a fake feature (M, D) nearer to a real one (N, D) than its k-th real one?

    Distances are exact: by products of matrices, as torch would take them, small ones cancel.
    """
    real, fake, exact = real.double(), fake.double(), "donot_use_mm_for_euclid_dist"
    parts = []
    for chunk in real.split(1000):
        # the nearest of all is the feature itself, hence k + 1
        near = torch.cdist(chunk, real, compute_mode=exact).topk(k + 1, largest=False).values
        parts.append(torch.cdist(chunk, fake, compute_mode=exact) < near[:, k:])
    return torch.cat(parts)


def pixel_entropy(x: Tensor) -> float:
    """The entropy of the pixels of grey images (N, 1, 28, 28), nats per image.

    No model of grey pixels has a Bernoulli cross-entropy below it.
    """
    p = x.double()
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    return entropy.sum().item() / len(x)


def nearest(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (L2) of each image to the nearest reference image, and that one's index, (N,)."""
    a, b = x.flatten(1), reference.flatten(1)
    norm = b.square().sum(1)
    parts = [torch.addmm(norm, chunk, b.T, alpha=-2).argmin(1) for chunk in a.split(1000)]
    index = torch.cat(parts)
    return (a - b[index]).norm(dim=1), index  # exact: products alone would cancel for near copies


# ------------------------------------------------------------------------------------- Likelihood


@torch.no_grad()
def laplace(decoder, x: Tensor, mu: Tensor, output_gradient, output_curvature,
            widen: float = 1.2) -> tuple[Tensor, Tensor]:
    """Gaussian proposals for p(z | x) of images x (B, P) under the prior N(0, I).

    Returns the means (B, d) and the Cholesky factors of the precisions (B, d, d). mu (B, d) is
    where to begin. decoder maps codes (N, d) to outputs (N, P); for log p(x | z),
    output_gradient(output, x) is the gradient by the output and output_curvature(output) minus
    the second derivative, both (N, P).

    A Laplace approximation takes gradient and curvature at the posterior's mode. Here both are
    averaged over codes from the current Gaussian, in rounds of variational Gauss-Newton. On
    validation images the effective sample size was 4 to 8 times that of the mode's curvature. In
    many dimensions only the 40 directions of the largest curvature are averaged, four times as fast
    with 200. Source: Khan et al. 2018, arXiv:1806.04854.
    """
    d, rounds, codes, directions = mu.shape[1], 3, 8, 40
    identity = torch.eye(d, device=x.device, dtype=mu.dtype)
    noise = torch.randn(rounds, codes // 2, d, generator=generator("proposal"), dtype=mu.dtype)
    noise = torch.cat([noise, -noise], 1).mT.to(x.device)  # (rounds, d, codes), for every image

    def jacobian(code: Tensor, basis: Tensor) -> Tensor:
        """Derivatives of the decoder at a code (d,) along the columns of a basis (d, r): (P, r)."""
        start = torch.zeros_like(basis[0])
        return torch.func.jacfwd(lambda step: decoder((code + basis @ step)[None])[0])(start)

    def curvature_at(z: Tensor, basis: Tensor) -> Tensor:
        """The mean of J^T W J in each image's basis (n, d, r) over its codes in z (n K, d).

        It is the curvature of -log p(x | z) without its second term, and never negative; (n, r, r).
        """
        n_codes = len(z) // len(basis)
        j = torch.func.vmap(jacobian)(z, basis.repeat_interleave(n_codes, 0))  # (n K, P, r)
        scaled = j * output_curvature(decoder(z)).sqrt()[..., None]
        scaled = scaled.reshape(len(basis), -1, basis.shape[2])
        return scaled.mT @ scaled / n_codes

    means, factors = [], []
    for image, mean in zip(x.split(20), mu.split(20), strict=True):  # Jacobians need memory
        n = len(image)
        curvature = curvature_at(mean, identity.expand(n, d, d))
        basis = torch.linalg.eigh(curvature).eigenvectors[..., -directions:]  # (n, d, r)
        unaveraged = curvature - basis @ (basis.mT @ curvature @ basis) @ basis.mT
        for t in range(rounds):
            # with the precision L L^T, mean + L^-T noise are codes of the current Gaussian
            factor = torch.linalg.cholesky(identity + curvature)
            away = torch.linalg.solve_triangular(factor.mT, noise[t].expand(n, -1, -1), upper=True)
            z = (mean[..., None] + away).mT.flatten(0, 1)  # (n codes, d)

            output, pull_back = torch.func.vjp(decoder, z)
            gradient = pull_back(
                output_gradient(output, image.repeat_interleave(codes, 0)))[0]
            gradient = gradient.view(n, codes, d).mean(1) - mean  # the prior's is -z
            rate = (t + 1) ** -0.5
            averaged = unaveraged + basis @ curvature_at(z, basis) @ basis.mT
            curvature = (1 - rate) * curvature + rate * averaged
            newton = torch.linalg.solve(identity + curvature, gradient[..., None])[..., 0]
            mean = mean + rate * newton
        means.append(mean)
        # a little wider than the posterior, but nowhere wider than the prior
        factors.append(torch.linalg.cholesky(identity + curvature / widen))
    return torch.cat(means), torch.cat(factors)


@torch.no_grad()
def importance_sampling(log_px, mean: Tensor, factor: Tensor, k: int, prior: float = 0.1,
                        rows: int = 5000) -> tuple[Tensor, Tensor]:
    """log p(x) and the effective sample size of B images by k codes each, (B,) float64 each.

    log_px maps codes (K, B, d) to log p(x | z), (K, B). A share `prior` of the codes is from
    N(0, I), the others from N(mean, (L L^T)^-1) with the factor L. All are weighed by this mixture,
    so that no weight is huge. About `rows` codes are decoded at a time. In expectation a lower
    bound, loose where the effective sample size is small. Source: Hesterberg 1995.
    """
    n, d = mean.shape
    log_joint, log_near, log_prior, n_prior = [], [], [], 0
    at_a_time = max(1, rows // n)
    for start in range(0, k, at_a_time):
        count = min(at_a_time, k - start)
        from_prior = round(prior * count)
        n_prior += from_prior
        noise = torch.randn(count, n, d, device=mean.device, dtype=mean.dtype)
        away = torch.linalg.solve_triangular(
            factor.mT, noise[from_prior:].permute(1, 2, 0), upper=True)  # (B, d, codes)
        z = torch.cat([noise[:from_prior], mean + away.permute(2, 0, 1)])  # (count, B, d)

        # log-densities less the constant that they have in common
        prior_density = -0.5 * z.square().sum(-1)
        whitened = torch.einsum("kbd,bde->kbe", z - mean, factor)
        determinant = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        log_joint.append((log_px(z) + prior_density).cpu().double())
        log_near.append((determinant - 0.5 * whitened.square().sum(-1)).cpu().double())
        log_prior.append(prior_density.cpu().double())
    shares = torch.tensor([k - n_prior, n_prior]).double().div(k).log()
    log_q = torch.logaddexp(torch.cat(log_near) + shares[0], torch.cat(log_prior) + shares[1])
    log_w = torch.cat(log_joint) - log_q  # (k, B)
    effective = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()
    return log_w.logsumexp(0) - math.log(k), effective


# ------------------------------------------------------------------------------------ Runs on disk


class Run:
    """One training run on disk: its folder, resume and log. The training stays in the script.

    In this order: restore, in each of epochs() batches() and log, load_best, finish. config has
    "seed", "epochs" and "batch_size", and identifies the run. A large state may be saved every
    `save_every` epochs. Raises UserError if the folder holds a run of another configuration.
    """

    def __init__(self, folder: Path, config: dict, fresh: bool = False, save_every: int = 1,
                 tensorboard: bool = False):
        self.folder, self.config, self.save_every = folder, config, save_every
        self.name = "/".join(folder.parts[-2:])
        self.history, self.best, self.best_epoch = [], None, 0
        self.epochs_to_come = 0  # of the runs after this one
        self.environment = {}
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)  # what cannot be deleted is seen by save
        file = folder / "config.json"
        if file.exists() and load_json(file) != config:
            raise UserError(f"{folder} holds a run of another configuration; --fresh replaces it, "
                            "another --out-dir keeps it")
        save(file, config)
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: pip install tensorboard first") from None
            self.board = SummaryWriter(str(folder / "logs"))

    def restore(self, **parts) -> None:
        """Put the checkpoint, if there is one, into the parts: whatever has a state_dict."""
        self.parts = parts
        if (self.folder / "checkpoint.pt").exists():
            saved = self.load("checkpoint.pt", parts)
            self.history, self.best, self.best_epoch = saved["progress"]

    def load_best(self, **parts) -> int:
        """Put the weights of the best epoch into the parts. Returns that epoch."""
        if self.load("best_model.pt", parts)["epoch"] != self.best_epoch:
            raise UserError(f"another process trains in {self.folder}: wait for it, then repeat; "
                            "--fresh starts the run over")
        return self.best_epoch

    def load(self, name: str, parts: dict) -> dict:
        try:  # weights_only: nothing in the file is executed
            saved = torch.load(self.folder / name, map_location="cpu", weights_only=True)
            for key, part in parts.items():
                part.load_state_dict(saved[key])
        except Exception as error:  # a bad zip, a refused pickle, another net: torch raises many
            raise UserError(f"{self.folder / name} is missing, corrupt or not of this run "
                            f"({type(error).__name__}); --fresh starts it over") from None
        return saved

    def epochs(self):
        """The epochs still to train, from 1, behind a progress bar. Each seeds torch's noise."""
        first, last = len(self.history) + 1, self.config["epochs"]
        if first <= last:
            print(f"training {self.name}, epochs {first} to {last}", flush=True)
        with tqdm(total=last, initial=first - 1, disable=None, leave=False) as self.bar:
            for epoch in range(first, last + 1):
                torch.manual_seed(seed_from(self.config["seed"], "noise", epoch))
                self.start = time.perf_counter()
                yield epoch

    def batches(self, n: int, device: torch.device, drop_last: bool = True) -> tuple[Tensor, ...]:
        """The indices of each batch of n images, shuffled by (seed, epoch)."""
        g = generator(self.config["seed"], "order", len(self.history) + 1)
        order = torch.randperm(n, generator=g).to(device)
        size = min(self.config["batch_size"], n)
        if drop_last:  # a smaller one would count as much as the others
            order = order[:n // size * size]
        return order.split(size)

    def log(self, row: dict[str, float], best=None) -> None:
        """End an epoch: history, log, checkpoint, and best_model.pt if `best`, a number or a tuple,
        is the lowest so far. Raises Diverged if a number is not finite.
        """
        epoch, last = len(self.history) + 1, self.config["epochs"]
        seconds = time.perf_counter() - self.start  # of training and validation
        row = {"epoch": epoch, **row, "seconds": seconds}
        if not all(map(math.isfinite, row.values())):
            raise Diverged(f"a loss of {self.name} is not finite in epoch {epoch}; its folder "
                           "keeps the epoch before; try a lower --lr with --fresh")
        self.history.append(row)
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if best is not None and (self.best is None or best < self.best):
            self.best, self.best_epoch = best, epoch
            weights = {k: v for k, v in states.items() if isinstance(self.parts[k], nn.Module)}
            save(self.folder / "best_model.pt", {"epoch": epoch, **weights})
        save(self.folder / "history.csv", self.history)
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, epoch)

        losses = [f"{key} {row[key]:.2f}" for key in row if key.endswith(("loss", "fid"))]
        line = f"epoch {epoch}/{last}  {'  '.join(losses)}"
        self.bar.set_description(line, refresh=False)
        self.bar.update()
        if self.bar.disable:  # not a terminal but a log file
            line += f"  {seconds:.1f} s, {(last - epoch) * seconds / 60:.0f} min left"
            if self.epochs_to_come:
                left = (last - epoch + self.epochs_to_come) * seconds / 60
                line += f", about {left:.0f} for all runs"
            print(line, flush=True)
        if epoch % self.save_every == 0 or epoch == last:  # the last write of an epoch
            done = self.history, self.best, self.best_epoch
            save(self.folder / "checkpoint.pt", {"progress": done, **states})

    def timing(self) -> dict[str, float]:
        """Seconds of training, validation included: of all epochs, and the median of an epoch."""
        seconds = [row["seconds"] for row in self.history]
        return {"seconds_train": sum(seconds), "seconds_per_epoch": float(np.median(seconds))}

    def finish(self, metrics: dict) -> dict:
        """Write final_metrics.json: before any picture is drawn. Returns what it holds.

        Raises Diverged if a number is not finite: the model has collapsed.
        """
        metrics = {**metrics, "environment": self.environment}
        for key, value in flat(metrics).items():
            if not math.isfinite(value):
                raise Diverged(f"{self.name} has collapsed: {key} is {value}; try a lower --lr "
                               "with --fresh")
        save(self.folder / "final_metrics.json", metrics)
        return metrics


def begin(study: str, args, configurations) -> tuple[torch.device, Data, Path, list[dict]]:
    """Device, data, the study's folder and the configurations of this shard, as the flags say.

    Prints the first line.
    """
    device = pick_device(args.device)
    data = load_data(args.dataset, args.data_dir)
    root = Path(args.out_dir) / study / data.name
    configs = configurations(args, data.name)[args.shard]
    announce(root, configs, data.name, device)
    return device, data, root, configs


def announce(root: Path, configs: list[dict], data: str, device: torch.device) -> None:
    """The first line: how many runs, of which data, where the results go, on which device."""
    print(f"runs: {len(configs)}, data: {data}, device: {device}, threads: "
          f"{torch.get_num_threads()}, results: {root}", flush=True)


def run_all(configs: list[dict], root: Path, variant, args, device: torch.device,
            train_and_measure, report, measured: dict) -> dict:
    """Each configuration's metrics, from its folder if it is finished, else train_and_measure(run).

    variant(config) names the folder. A run that diverges does not stop the others; report(root)
    comes last. Raises UserError if a run diverged, or if a finished one was not measured as
    `measured` says: a value by the name that it has in `flat` metrics.
    """
    epochs_to_come = 0  # of the runs that are not finished
    for config in configs:
        file = root / variant(config) / f"seed_{config['seed']}/final_metrics.json"
        if args.fresh or not file.exists():
            epochs_to_come += config["epochs"]
            continue
        numbers = flat(load_json(file))
        for key, value in measured.items():
            if numbers.get(key) != value:
                raise UserError(f"{file} has {key} {numbers.get(key, 'missing')}, this command "
                                f"{value}; --fresh trains that run again, another --out-dir "
                                "keeps it")
    made = environment(device, args.command)  # before training: the commit that is run
    results, diverged = {}, []
    for config in configs:
        run = Run(root / variant(config) / f"seed_{config['seed']}", config, args.fresh,
                  tensorboard=args.tensorboard)
        run.environment = made
        file = run.folder / "final_metrics.json"
        if file.exists():
            print(f"{run.name}: finished before; --fresh would train it again", flush=True)
            results[run.name] = load_json(file)
            continue
        epochs_to_come -= config["epochs"]
        run.epochs_to_come = epochs_to_come
        try:
            results[run.name] = train_and_measure(run)
        except Diverged as error:
            print(f"warning: {error}", flush=True)
            diverged.append(run.name)
    if results:
        report(root)
    if diverged:
        raise UserError(f"{len(diverged)} of {len(configs)} runs diverged: {', '.join(diverged)}; "
                        "try a lower --lr with --fresh")
    return results


def save(path: Path, content) -> None:
    """Write a file whole or not at all: a dict as .json, rows as .csv, tensors as .pt, else text or
    bytes as they are. Raises UserError if the disk is full or read-only.
    """
    buffer = io.BytesIO()
    if path.suffix == ".json":
        content = json.dumps(content, indent=1, allow_nan=False) + "\n"
    elif path.suffix == ".csv":  # a column for every key; empty where a row lacks it
        columns = {}
        for row in content:
            columns |= row
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(content)
        content = text.getvalue()
    elif path.suffix == ".pt":
        torch.save(content, buffer)
        content = buffer.getvalue()
    # the process's number in the name: two processes on one folder do no harm
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):  # surrogates: of a path that the locale cannot spell
            content = content.encode("utf-8", "surrogateescape")
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; make room, or take another "
                        "--out-dir") from None
    finally:
        if temporary.exists():  # also after Ctrl-C
            temporary.unlink()


def load_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def environment(device: torch.device, command: str) -> dict:
    """Where and how numbers were made. Only this and the seconds may differ between equal runs."""
    name = platform.processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        models = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
        name = models[0] if models else name
    failed, commit = subprocess.getstatusoutput(f'git -C "{HERE}" rev-parse --short HEAD')
    return {"command": command, "commit": "unknown" if failed else commit,
            "device": f"{device.type}: {name}", "threads": torch.get_num_threads(),
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def finished_runs(root: Path) -> list[dict]:
    """The config, metrics and folder of every finished run below root. UserError if none is.

    A run is what its config says: a copy of its folder is no second run.
    """
    runs, configs = [], []
    for file in sorted(root.glob("*/*/final_metrics.json")):
        config = load_json(file.with_name("config.json"))
        if "precision" not in config:
            print(f"warning: {file.parent} is of an older version, left out", flush=True)
        elif config in configs:
            print(f"warning: {file.parent} is a copy of another run, left out", flush=True)
        else:
            configs.append(config)
            runs.append({"config": config, "metrics": load_json(file), "folder": file.parent})
    if not runs:
        raise UserError(f"no finished run in {root}; train first, or name another --dataset")
    classifiers = {run["metrics"]["classifier"]["sha256"]: run["folder"] for run in runs}
    if len(classifiers) > 1:
        raise UserError("two metric classifiers, whose numbers do not compare: that of "
                        f"{' and that of '.join(map(str, classifiers.values()))}; move one away")
    return runs


def flat(metrics: dict, prefix: str = "") -> dict[str, float]:
    """Every number of a run's metrics by its dotted name, such as "likelihood.nll"."""
    numbers = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            numbers[prefix + key] = value
    return numbers


def suffix(config: dict, **defaults) -> str:
    """The end of a run's name, such as '_epochs30_n500': its settings that are not the default."""
    short = {"epochs": "epochs", "batch_size": "batch", "lr": "lr", "latent_dim": "d",
             "latent_lr": "latentlr", "latent_steps": "latentsteps", "train_size": "n",
             "precision": ""}
    changed = [key for key in defaults if config[key] != defaults[key]]
    return "".join(f"_{short[key]}{config[key]}" for key in changed)


# ----------------------------------------------------------------------------------------- Tables
#
# A script's rows(runs) returns row name, a tuple of texts -> seed -> numbers by key, such as
# {("mlp 500", "20-D"): {0: {"fid": 1.2}, 1: {"fid": 1.3}}}. The row of real images has the seed
# None. A column is (title, key, digits).


def markdown_table(lines: list[list[str]], n_text: int) -> str:
    """The first line is the header, the first n_text columns are text. Reads as plain text too."""
    rule = [":--"] * n_text + ["--:"] * (len(lines[0]) - n_text)
    columns = []
    for i, cells in enumerate(zip(lines[0], rule, *lines[1:], strict=True)):
        width = max(map(len, cells))
        columns.append([c.ljust(width) if i < n_text else c.rjust(width) for c in cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True))


def cell(seeds: dict, key: str, digits: int) -> str:
    """'0.97 ± 0.03': mean and standard deviation (n - 1) over a row's seeds; "–" without any."""
    values = [numbers[key] for numbers in seeds.values() if key in numbers]
    if not values:
        return "–"
    text = f"{round(float(np.mean(values)), digits) + 0.0:.{digits}f}"  # no -0.00
    if np.ptp(values) > 0:  # more than one, and not all the same
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text.replace("-", "−")


def results_table(rows: dict, names: list[str], columns: list[tuple]) -> str:
    """A line for each row: its name, n seeds, and a cell for every column."""
    lines = [[*names, "n", *(title for title, _, _ in columns)]]
    for name, seeds in rows.items():
        cells = [cell(seeds, key, digits) for _, key, digits in columns]
        lines.append([*name, "" if None in seeds else str(len(seeds)), *cells])
    return markdown_table(lines, len(names))


def difference(rows: dict, a: tuple, b: tuple, key: str, digits: int) -> tuple[int, str, int]:
    """The sign of a - b, '−0.23, 95 % interval −0.30 to −0.16, n=3', and n, by the seeds of both.

    The sign is 0 if the t-interval includes zero. A single seed is judged by its value.
    """
    from scipy.stats import ttest_rel  # slow to import

    seeds_a, seeds_b = rows.get(a, {}), rows.get(b, {})
    seeds = [seed for seed in seeds_a if key in seeds_a[seed] and key in seeds_b.get(seed, {})]
    if not seeds:
        return 0, "–", 0
    values_a = np.array([seeds_a[seed][key] for seed in seeds])
    values_b = np.array([seeds_b[seed][key] for seed in seeds])
    low = high = mean = (values_a - values_b).mean()
    interval = ""
    if len(seeds) > 1:
        low, high = ttest_rel(values_a, values_b).confidence_interval(0.95)
        interval = f"95 % interval {low:+.{digits}f} to {high:+.{digits}f}, "
    text = f"{mean:+.{digits}f}, {interval}n={len(seeds)}".replace("-", "−")
    sign = 0
    if low > 0:
        sign = 1
    elif high < 0:
        sign = -1
    return sign, text, len(seeds)


def contrast(a: tuple, b: tuple) -> tuple[str, str, str]:
    """What two row names share, and what each has alone."""
    pairs = list(zip(a, b, strict=True))
    shared = ", ".join(part for part, other in pairs if part == other)
    only_a = " ".join(part for part, other in pairs if part != other)
    only_b = " ".join(other for part, other in pairs if part != other)
    return shared, only_a, only_b


def paired_table(rows: dict, pairs: list[tuple], columns: list[tuple]) -> str:
    """A line for each pair (a, b) of row names and a `difference` for each column, bold if its
    interval excludes zero. Pairs without a seed in common are left out.
    """
    lines = [["difference, paired by seed", *(title for title, _, _ in columns)]]
    for a, b in pairs:
        shared, only_a, only_b = contrast(a, b)
        cells = []
        for _, key, digits in columns:
            sign, text, n = difference(rows, a, b, key, digits)
            cells.append(f"**{text}**" if sign and n > 1 else text)
        if set(cells) != {"–"}:
            lines.append([f"{shared}: {only_a} − {only_b}", *cells])
    return markdown_table(lines, 1) if len(lines) > 1 else ""


def verdict(rows: dict, a: tuple, b: tuple, title: str, key: str, digits: int) -> str:
    """'A has a lower FID than B (−0.23, …)', or that they cannot be told apart; '' of no seed."""
    sign, text, n = difference(rows, a, b, key, digits)
    shared, only_a, only_b = contrast(a, b)
    finding = f"{only_a} and {only_b} cannot be told apart in {title}"
    if sign:
        finding = f"{only_a} has a {'lower' if sign < 0 else 'higher'} {title} than {only_b}"
    return f"{shared}: {finding} ({text})." if n else ""


def command_of(run: dict) -> str:
    """The command that makes a finished run again, without seeds and --out-dir."""
    return re.sub(r" --(seeds( \d+)+|fresh|out-dir ('[^']*'|\S+)|shard \S+)", "",
                  run["metrics"]["environment"]["command"])


def how_made(runs: list[dict]) -> str:
    """The end of a report: device, versions, minutes and commands, each said once."""
    made = [run["metrics"]["environment"] | run["config"] for run in runs]

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(one[key]) for one in made}))

    minutes = [run["metrics"]["seconds_train"] / 60 for run in runs]
    commands = sorted({command_of(run) for run in runs})
    if len(commands) > 5:
        commands = [*commands[:5], f"... {len(commands) - 5} others, in each final_metrics.json"]
    span = f"{min(minutes):.1f}"
    if len(minutes) > 1:
        span += f" to {max(minutes):.1f}"
    return (f"Trained in {all_of('precision')}, {span} minutes a run. Device: {all_of('device')}, "
            f"threads: {all_of('threads')}, torch: {all_of('torch')}, commits: "
            f"{all_of('commit')}. Commands, without seeds:\n\n```\n"
            + "\n".join(commands) + "\n```\n")


def glossary(root: Path) -> str:
    """A link from root to the README's definitions."""
    readme = Path(os.path.relpath(HERE / "README.md", root)).as_posix()
    return f"[What the columns mean]({readme}#what-the-numbers-mean)."


def image_links(root: Path, files: list[Path]) -> list[str]:
    """The pictures below root as lines of Markdown."""
    paths = [file.relative_to(root).as_posix() for file in files if file.exists()]
    return [f"![{path.removesuffix('.png')}]({path})" for path in paths]


def write_report(root: Path, sections: list[str], rows: dict, names: list[str]) -> None:
    """report.md of the sections that are not empty, and results.csv: a line for each row and seed
    with every number. Prints where they are.
    """
    lines = []
    for name, seeds in rows.items():
        for seed, numbers in seeds.items():
            lines.append({**dict(zip(names, name, strict=True)), "seed": seed, **numbers})
    save(root / "results.csv", lines)
    save(root / "report.md", "\n\n".join(filter(None, sections)))
    print(f"\nreport: {root / 'report.md'}", flush=True)


# ---------------------------------------------------------------------------------------- Figures


def save_figure(path: Path, figure: Figure, mode: str = "RGB") -> None:
    """PNG without a date or a version in it: the same numbers give the same bytes.

    mode "L" keeps shades of grey alone, in half the bytes.
    """
    drawn, picture = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=100, bbox_inches="tight")
    Image.open(drawn).convert(mode).save(picture, "PNG")
    save(path, picture.getvalue())


def save_grid(path: Path, x: Tensor, columns: int, title: str, row_labels=()) -> None:
    """Images (N, 1, 28, 28) in [0, 1] in rows of `columns`, black on white like ink."""
    picture = 1 - make_grid(x.cpu(), columns, padding=2)[0]
    height, width = picture.shape
    figure = Figure(figsize=(0.014 * width, 0.014 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks(30 * np.arange(len(row_labels)) + 16, row_labels, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save_figure(path, figure, "L")


def plot_history(path: Path, history: list[dict], panels: dict[str, list[str]],
                 stages: dict[int, str] | None = None) -> None:
    """Columns of the history by epoch: a panel for each title, a line for each of its columns.

    stages: the name of each stage of the training by its first epoch.
    """
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    history = history[len(history) // 20:]  # the first epochs would flatten the rest
    for axes, (title, columns) in zip(all_axes, panels.items(), strict=True):
        for column in columns:
            values = [row.get(column, math.nan) for row in history]  # a gap where not computed
            axes.plot([row["epoch"] for row in history], values, label=column)
        for epoch, name in (stages or {}).items():
            axes.axvline(epoch, color="0.7", lw=0.8)
            axes.text(epoch, 1, f" {name}", fontsize=8, va="top",
                      transform=axes.get_xaxis_transform())
        axes.set(xlabel="epoch", title=title)
        axes.legend(fontsize=8)
    save_figure(path, figure)


def plot_codes(path: Path, codes: np.ndarray, labels: np.ndarray, title: str) -> None:
    """Codes (N, d) by class: violins for d = 1, the plane for d = 2, else t-SNE of 1,000 codes."""
    figure = Figure(figsize=(5.5, 5))
    axes = figure.subplots()
    axes.set_title(title, fontsize=9)
    if codes.shape[1] == 1:
        axes.violinplot([codes[labels == label, 0] for label in range(10)], range(10), widths=0.9)
        axes.set(xticks=range(10), xlabel="class", ylabel="z")
    else:
        if codes.shape[1] > 2 and np.ptp(codes, axis=0).max() > 1e-6:  # not all the same
            from sklearn.manifold import TSNE  # slow to import
            print("t-SNE of 1,000 codes ...", flush=True)
            codes, labels = codes[:1000].astype(np.float64), labels[:1000]
            perplexity = min(30, (len(codes) - 1) / 3)
            codes = TSNE(random_state=0, perplexity=perplexity).fit_transform(codes)
            axes.set(xticks=[], yticks=[], xlabel="t-SNE")
        points = axes.scatter(*codes[:, :2].T, c=labels, cmap="tab10", s=3, alpha=0.6)
        axes.legend(*points.legend_elements(), loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_aspect("equal")
    save_figure(path, figure)


def plot_points(path: Path, rows: dict, key: str, title: str, band=None) -> None:
    """A number of every seed, in a line for each row.

    With a band (low, high), where the number is good, the axis is logarithmic: what is below 0.01
    stands at 0.01.
    """
    figure = Figure(figsize=(6, 1 + 0.28 * len(rows)))
    axes = figure.subplots()
    labels = []
    for name, seeds in rows.items():
        if None not in seeds:  # not the row of real images
            values = [numbers[key] for numbers in seeds.values() if key in numbers]
            shown = np.maximum(values, 0.01) if band else values
            axes.plot(shown, [len(labels)] * len(values), "C0o", alpha=0.5)
            labels.append(f"{', '.join(name)} (n={len(values)})")
    if band:
        axes.axvspan(*band, color="0.9")
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        is_narrow = high < 10 * low
        axes.xaxis.set_major_locator(AutoLocator() if is_narrow else LogLocator(subs=[1, 2, 5]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(title)
    axes.grid(axis="x", alpha=0.3)
    save_figure(path, figure)
