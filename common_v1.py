"""What the four studies must share for their numbers to be comparable, and the plumbing nobody
comes to read.

Data, the metric classifier and the metrics, figures, run folders, report tables. Models, objectives
and training loops are not here: each script shows its own. Ranges and units, everywhere: images `x`
are (N, 1, 28, 28) float32 in [0, 1]; labels `y` are (N,) int64 in 0..9; features are (N, D); losses
are nats per image.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")  # torch's own use
warnings.filterwarnings("ignore", message=".*capturable=True, but")  # the warm-up before a capture
HERE = Path(__file__).resolve().parent
DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "glyphs": "glyphs"}


# --------------------------------------------------------------------------------- flags and errors


class UserError(Exception):
    """A mistake the user can mend. Its message is one line: the value, what is allowed, the next
    step.
    """


class Parser(argparse.ArgumentParser):
    """An argument parser with the flags every script has; a bad value is one line and exit status
    2.
    """

    def __init__(self, doc: str, *, epochs: int, batch_size: int,
                 lr: float | list[float], several_datasets: bool = False):
        super().__init__(
            description=doc.strip().splitlines()[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        flag = self.add_argument
        flag("--dataset", choices=DATASETS, nargs="+" if several_datasets else None,
             help=f"if not given: mnist{' and fashion-mnist' if several_datasets else ''} if at "
             "hand or reachable, else glyphs")
        flag("--data-dir", default=os.environ.get("MNIST_DATA_DIR") or "data",
             help="torchvision's layout")
        flag("--out-dir", default="results", help="run folders and reports are written below it")
        flag("--epochs", type=number(int, 1), default=epochs, help="passes over the training set")
        flag("--batch-size", type=number(int, 1), default=batch_size, help="images per step")
        flag("--lr", type=number(float, 0, above=True), default=lr,
             nargs="+" if isinstance(lr, list) else None, help="learning rate at the start")
        flag("--seeds", type=number(int, 0, 2**31), nargs="+", default=[0], help="one run for each")
        flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
             help="auto: the fastest there is")
        flag("--train-size", type=number(int, 1),
             help="train on a seeded subset of N images (smoke runs)")
        flag("--fresh", action="store_true",
             help="discard what the run folders hold and start over")
        flag("--report-only", action="store_true",
             help="train nothing: rebuild the report from the finished runs")
        flag("--shard", type=shard, default="0/1", metavar="K/N",
             help="only every N-th run, from the K-th")
        flag("--compile", action="store_true",
             help="compile the training step (CPU: needs a C++ compiler; gains where layers are "
                  "small, not in convolutions) or capture it (CUDA)")
        flag("--tensorboard", action="store_true", help="also write TensorBoard logs")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(kind: type, low: float, high: float = 1e9, above: bool = False):
    """An argparse type: an int or float in [low, high], or in (low, high] if `above`."""

    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and not (above and value == low):
                return value
        span = f"{'>' if above else '>='} {low} and <= {high:.10g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not "
                                         f"{'an integer' if kind is int else 'a number'} {span}")

    return parse


def shard(text: str) -> slice:
    """An argparse type: 'K/N' with 0 <= K < N, every N-th of a list from the K-th."""
    k, _, n = text.partition("/")
    if k.isdecimal() and n.isdecimal() and int(k) < int(n):
        return slice(int(k), None, int(n))
    raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 0 <= K < N, such as 0/4")


def guard(main) -> None:
    """Run a script's main: errors of the user's are one line and exit status 2, Ctrl-C one line and
    130, SIGTERM (a cluster takes its machine back) 143.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
        return
    except UserError as error:
        message, status = f"error: {error}", 2
    except OSError as error:  # a disk that is full, a folder that cannot be written
        message, status = f"error: {error}; mend it or take another --out-dir", 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and (
                "can't allocate memory" not in str(error)):
            raise
        message, status = "error: not enough memory for a model or batch of this size", 2
    except KeyboardInterrupt:
        message, status = "interrupted; without --fresh the same command continues", 130
    print(message, file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------ device, seeds and steps


def pick_device(name: str) -> torch.device:
    """The device asked for; prints the choice. Raises UserError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name != "auto" and not there[name]:
        raise UserError(f"--device {name}: this machine has none that torch can use; take --device "
                        "auto")
    chosen = name if name != "auto" else next(d for d, ok in there.items() if ok)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA; statistics are float64 on the CPU
    keep_memory()
    print(f"device: {chosen}" + ("" if name != "auto" else " (the fastest here)"))
    return torch.device(chosen)


def keep_memory() -> None:
    """Have glibc (Linux) keep what is freed at the end of its heap, up to a gigabyte, and take
    blocks below 32 MB from there. By itself it gives most of that back to the system, and the next
    tensors fetch it anew, page by page: a tenth of a GAN's step where that was measured.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest that it would choose itself
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products and convolutions without TF32, which keeps ten bits: for log p(x), G."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # of convolutions
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def seed_from(*key: int | str) -> int:
    """One 63-bit seed from a key such as (seed, "train", epoch): a stream for every purpose."""
    entropy = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for that key: what is drawn from it is the same on every device."""
    return torch.Generator().manual_seed(seed_from(*key))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # a compiled or captured step reads it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


BFLOAT16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)


def mixed_precision(forward):
    """`forward`, a net or a method, as a training step runs it: where gradients are recorded on a
    CPU that has instructions for bfloat16, its layers are in it (older versions of torch cannot
    tell), and so is the gradient of their weights. The result has the type of the last argument.
    Weights, optimisers and the statistics of BatchNorm stay float32, as does everything without
    gradients: all that is measured but a step's own losses.
    """
    def mixed(*args: Tensor) -> Tensor:
        on = torch.is_grad_enabled() and BFLOAT16
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            return forward(*args).to(args[-1].dtype)

    return mixed


def fast_step(step, parts: dict, device: torch.device, on: bool):
    """A training step as the device runs it fastest, if `on` (--compile), else as it is.

    step(batch, *plain values) returns a tensor and changes nothing but `parts`, modules and
    optimisers by name. On a CPU it is compiled. On CUDA forward, backward and optimiser are
    captured into one graph for each batch size and plain values; torch's generator goes on through
    its replays as through eager steps. MPS has no graphs, and Adagrad counts its steps on the CPU:
    those stay eager. A step that cannot be captured raises RuntimeError: the process ends, and the
    same command without --compile continues.
    """
    optimizers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]
    fast = on and device.type != "mps" and all(isinstance(o, torch.optim.Adam) for o in optimizers)
    for group in [group for o in optimizers for group in o.param_groups]:
        rate = float(group["lr"])  # perhaps of a checkpoint that was made the other way
        group["lr"] = torch.tensor(rate, dtype=torch.float32, device=device) if fast else rate
        if "capturable" in group:
            group["capturable"] = fast and device.type == "cuda"
    if not fast or device.type == "cpu":
        return torch.compile(step, dynamic=False) if fast else step
    graphs = {}

    def replay(batch: Tensor, *values) -> Tensor:
        key = (batch.shape, *values)
        if key not in graphs:
            graphs[key] = capture(step, batch.clone(), values, parts)
        graph, own_batch, out = graphs[key]
        own_batch.copy_(batch)
        graph.replay()
        return out.clone()

    return replay


def capture(step, batch: Tensor, values: tuple, parts: dict) -> tuple:
    """(CUDA graph of step(batch, *values), the batch it reads, its output). The warm-up that a
    capture needs leaves no trace: `parts` and torch's generator are put back, in place.
    """
    def tensors() -> dict:
        found = {}
        for name, part in parts.items():
            states = [("", part.state_dict())] if isinstance(part, nn.Module) else (
                (id(weight), of) for weight, of in part.state.items())
            found |= {(name, which, key): v for which, of in states for key, v in of.items()}
        return found

    before = {key: v.clone() for key, v in tensors().items()}
    random, stream, graph = torch.cuda.get_rng_state(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(batch, *values)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            out = step(batch, *values)
    finally:
        torch.cuda.synchronize()
        for key, v in tensors().items():  # Adam's state is made in its first step, of zeros
            v.copy_(before[key]) if key in before else v.zero_()
        torch.cuda.set_rng_state(random)
    return graph, batch, out


# --------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    """A dataset in memory: 60,000 training and 10,000 test images with labels (units: see the top).
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_data(dataset: str | None, data_dir: str) -> Data:
    """The named dataset, or without a name MNIST and, where there is none, glyphs (with a warning).

    Raises UserError if a named dataset cannot be had, or if a file on disk is not what it should
    be.
    """
    if dataset == "glyphs":
        return glyphs()
    try:
        return _torchvision_data(dataset or "mnist", data_dir)
    except ConnectionError as error:
        if dataset:
            raise UserError(f"{dataset} is not in {data_dir} and cannot be downloaded ({error}); "
                            "name its folder with --data-dir, or take --dataset glyphs") from None
    print(f"warning: no MNIST in {data_dir} and no network: using the built-in glyphs",
          file=sys.stderr)
    return glyphs()


def _torchvision_data(dataset: str, data_dir: str) -> Data:
    import torchvision.datasets  # a second to import, and glyphs do not need it

    name = DATASETS[dataset]
    cls = getattr(torchvision.datasets, name)
    raw = Path(data_dir) / name / "raw"
    files = {f"{split}-{part}-ubyte": (n, dims) for split, n in [("train", 60_000),
                                                                 ("t10k", 10_000)]
             for part, dims in [("images-idx3", (28, 28)), ("labels-idx1", ())]}
    if not all((raw / file).is_file() for file in files):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                cls(data_dir, download=True)
        except Exception as error:  # the network, a proxy's page instead of the file, a full disk
            raise ConnectionError(" ".join(str(error).split())[:100]) from None
    for file, (n, dims) in files.items():
        header = b"".join(v.to_bytes(4, "big") for v in [0x800 + 1 + len(dims), n, *dims])
        body = (raw / file).read_bytes()
        if body[: len(header)] != header:
            raise UserError(f"{raw / file} does not begin like a {name} file; delete it to "
                            "download it again")
        if len(body) != len(header) + n * math.prod(dims):
            raise UserError(f"{raw / file} has {len(body)} bytes, not "
                            f"{len(header) + n * math.prod(dims)}: truncated or foreign; delete it "
                            "to download it again")
        if not dims and max(body[len(header):]) > 9:
            raise UserError(f"{raw / file} has labels outside 0..9; delete it to download it again")
    train, test = cls(data_dir, train=True), cls(data_dir, train=False)
    x = [split.data[:, None].float() / 255 for split in (train, test)]
    return Data(dataset, x[0], train.targets, x[1], test.targets)


def split(data: Data, config: dict, n_val: int = 5000) -> dict[str, Tensor]:
    """Indices of the run's training images and of n_val others for validation, drawn by its seed.

    Raises UserError if there are too few.
    """
    left = len(data.x_train) - n_val
    if config["train_size"] > left:
        raise UserError(f"--train-size {config['train_size']}: {left} images are left for training "
                        f"after {n_val} for validation; take at most that many")
    order = torch.randperm(len(data.x_train), generator=generator(config["seed"], "split"))
    return {"val": order[:n_val], "train": order[n_val:n_val + config["train_size"]]}


@functools.lru_cache(1)
def glyphs() -> Data:
    """60,000 + 10,000 digits drawn from matplotlib's fonts: random stroke width, affine map and
    bend.

    Needs no file and no network; under ten seconds on two cores. The same for a version of
    matplotlib.
    """
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    fonts = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono",
             "DejaVuSerif", "DejaVuSerif-Bold",
             "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "cmr10",
             "cmss10", "cmtt10"]
    drawn = np.zeros((len(fonts), 3, 10, 64, 64), np.float32)
    for f, font in enumerate(fonts):
        face = ImageFont.truetype(str(folder / f"{font}.ttf"), 52)
        for width in range(3):
            for digit in range(10):
                picture = Image.new("L", (64, 64))
                ImageDraw.Draw(picture).text((32, 32), str(digit), 255, face, "mm",
                                             stroke_width=width)
                drawn[f, width, digit] = np.asarray(picture) / 255
    # soft edges survive shrinking
    base = F.avg_pool2d(torch.from_numpy(drawn).view(-1, 1, 64, 64), 3, 1, 1)
    g = generator(0, "glyphs")
    y = torch.arange(70_000) % 10
    y = torch.cat([y[:60_000][torch.randperm(60_000, generator=g)],
                   y[60_000:][torch.randperm(10_000, generator=g)]])
    which = torch.randint(len(fonts) * 3, (70_000,), generator=g) * 10 + y
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(70_000, *shape, generator=g)
    angle, shear, slant = uniform(-0.6, 0.6), uniform(-0.5, 0.5), uniform(-0.3, 0.3)
    # > 1 shrinks the digit: MNIST leaves a margin too
    sx, sy = uniform(0.9, 1.5), uniform(0.9, 1.35)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([sx * cos, -sx * sin + shear, uniform(-0.15, 0.15),
                         sy * sin + slant, sy * cos, uniform(-0.15, 0.15)], 1).view(-1, 2, 3)
    bend = uniform(-0.3, 0.3, 2, 4, 4)  # a smooth displacement field: no two strokes are alike
    x = torch.empty(70_000, 1, 28, 28)
    for i in range(0, 70_000, 5_000):
        s = slice(i, i + 5_000)
        grid = F.affine_grid(theta[s], [5_000, 1, 28, 28], align_corners=False)
        field = F.interpolate(bend[s], 28, mode="bilinear", align_corners=True)
        x[s] = F.grid_sample(base[which[s]], grid + field.permute(0, 2, 3, 1), align_corners=False)
    x = (x * 255).round().clamp_(0, 255) / 255
    return Data("glyphs", x[:60_000], y[:60_000], x[60_000:], y[60_000:])


# ---------------------------------------------------------------------------- the metric classifier


class MetricClassifier(nn.Module):
    """A small CNN (116,000 parameters) that every metric looks through; always in eval mode outside
    its training.
    """

    def __init__(self, width: int = 24):
        super().__init__()

        def block(i: int, o: int, stride: int = 1, pool: bool = True) -> list[nn.Module]:
            conv = nn.Conv2d(i, o, 3, stride=stride, padding=1, bias=False)
            return [conv, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(o), nn.ReLU()]

        w = width
        # (B, 1, 28, 28) -> (B, w, 14, 14) -> (B, 2w, 7, 7) -> (B, 3w, 4, 4) -> (B, 64)
        self.body = nn.Sequential(
            *block(1, w), *block(w, 2 * w), *block(2 * w, 3 * w, stride=2, pool=False),
            nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(3 * w * 16, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU())
        self.head = nn.Linear(64, 10)
        self.accuracy, self.sha256 = math.nan, ""  # set by load_classifier

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, 10)."""
        return self.head(self.body(x.contiguous(memory_format=torch.channels_last)))

    @torch.inference_mode()
    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the metrics use: penultimate features (N, 64) and class probabilities (N, 10), on
        the CPU.
        """
        assert not self.training, "the metric classifier measures in eval mode"
        device = self.head.weight.device
        f = [self.body(c.to(device, memory_format=torch.channels_last)).cpu()
             for c in x.split(1000)]
        f = torch.cat(f) if f else torch.empty(0, 64)
        return f, torch.cat([self.head(c.to(device)).softmax(1).cpu() for c in f.split(1000)])


def train_classifier(x: Tensor, y: Tensor, device: torch.device, *key: int | str, steps: int,
                     augment: str | None = None) -> MetricClassifier:
    """A classifier of images x (N, 1, 28, 28) with labels y (N,), in eval mode on the device.

    Plain cross-entropy, no label smoothing: p >= 0.9 must mean something. `key` seeds weights and
    batches. augment is "shift" (digits: the batch, by up to two pixels) or "flip" (fashion: half of
    it).
    """
    g, n = generator(*key), len(x)
    batch_size = min(128, n)
    with torch.random.fork_rng():
        torch.manual_seed(seed_from(*key))
        model = MetricClassifier().to(device, memory_format=torch.channels_last).train()
        x, y = x.to(device), y.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.02,
                                      fused=device.type != "mps")
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps,
                                                       pct_start=0.2)
        for step in range(steps):
            at = step % (n // batch_size)
            if at == 0:
                order = torch.randperm(n, generator=g).to(device)
            batch = order[at * batch_size:(at + 1) * batch_size]
            xb, half = x[batch], batch_size // 2
            if augment == "flip":
                xb = torch.cat([xb[:half], xb[half:].flip(3)])
            elif augment == "shift":
                xb = xb.roll(torch.randint(-2, 3, (2,), generator=g).tolist(), (2, 3))
            loss = F.cross_entropy(model(xb), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def load_classifier(data: Data, device: torch.device) -> MetricClassifier:
    """The metric classifier of a dataset, trained on all its training images and cached in
    results/classifiers when it is not there.

    Its `accuracy` is that on the 10,000 test images, its `sha256` that of the weights' file.
    """
    path = HERE / f"results/classifiers/{data.name}.pt"
    if not path.is_file():
        print(f"training the metric classifier for {data.name} (once; 1-2 minutes on two cores)",
              file=sys.stderr)
        model = train_classifier(  # eight epochs
            data.x_train, data.y_train, device, "classifier", data.name,
            steps=8 * (len(data.x_train) // 128),
            augment="flip" if data.name == "fashion-mnist" else "shift")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_torch(path, {k: v.cpu().half() if v.is_floating_point() else v.cpu()
                          for k, v in model.state_dict().items()})
    model = MetricClassifier()
    try:
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k,
                               v in load_torch(path).items()})
    except (RuntimeError, AttributeError):
        raise UserError(f"{path} does not hold a metric classifier; delete it to train it "
                        "again") from None
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    model.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    model.accuracy = (model.look(data.x_test)[1].argmax(1) == data.y_test).double().mean().item()
    return model


# ------------------------------------------------------------------------------------------ metrics


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features a (N, D) and b (M, D): "FID", in
    squared feature units.

    |mu_a - mu_b|^2 + tr(Sa + Sb - 2 (Sa^1/2 Sb Sa^1/2)^1/2), covariances with N - 1, float64. The
    square root is taken by symmetric eigenvalues, so it is real and works for fewer samples than
    dimensions. Biased up for small N, M: report the floor. Source: Dowson and Landau 1982; Heusel
    et al. 2017 (arXiv:1706.08500). Raises ValueError unless both are matrices with D columns and at
    least two rows.
    """
    _check_features(a, b, 2)
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = torch.cov(a.T).view(a.shape[1], -1), torch.cov(b.T).view(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with kernel (x.y / D + 1)^3 of features (N, D), (M, D): "KID", over all
    pairs.

    Zero on average for equal distributions, so sometimes negative; not scale-invariant.
    Source: Binkowski et al. 2018 (arXiv:1801.01401). Raises ValueError as frechet_distance.
    """
    _check_features(a, b, 2)
    a, b = a.cpu().double(), b.cpu().double()

    def total(u: Tensor, v: Tensor) -> float:
        return sum(float((c @ v.T / u.shape[1] + 1).pow_(3).sum()) for c in u.split(2000))

    def off_diagonal(u: Tensor) -> float:
        return (total(u, u) - float((u.square().sum(1) / u.shape[1]
                                     + 1).pow(3).sum())) / (len(u) * (len(u) - 1))

    return off_diagonal(a) + off_diagonal(b) - 2 * total(a, b) / (len(a) * len(b))


def manifold_metrics(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of fake features (M, D) against real ones (N, D).

    A ball around each point reaches to its k-th nearest neighbour of its own set (strictly inside
    counts). For equal distributions density is 1 and coverage 1 - 2^-k (N = M) on average. Chunked:
    memory stays below 1 GB. Source: Kynkäänniemi et al. 2019 (arXiv:1904.06991); Naeem et al. 2020
    (arXiv:2002.09797). Raises ValueError unless both have more than k rows.
    """
    _check_features(real, fake, k + 1)
    real, fake = real.cpu().double(), fake.cpu().double()

    def distances(u: Tensor, v: Tensor) -> Tensor:  # exact: by products, small ones would cancel
        return torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist")

    def radii(u: Tensor) -> Tensor:  # the point itself is at distance 0, hence k + 1
        return torch.cat([distances(c, u).topk(k + 1, largest=False).values[:, k]
                          for c in u.split(1000)])

    r_real, r_fake = radii(real), radii(fake)
    balls = torch.zeros(len(fake))  # how many real balls hold each fake point
    covered, recalled = [], []
    for c, r in zip(real.split(1000), r_real.split(1000), strict=True):
        distance = distances(c, fake)  # (<= 1000, M)
        inside = distance < r[:, None]
        balls += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distance < r_fake).any(1))
    share = lambda hits: float(torch.cat(hits).double().mean())
    return {"precision": float((balls > 0).double().mean()), "recall": share(recalled),
            "density": float(balls.double().mean()) / k, "coverage": share(covered)}


def _check_features(a: Tensor, b: Tensor, rows: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < rows:
        raise ValueError(f"features must be (N, D) and (M, D) with N, M >= {rows}, not "
                         f"{tuple(a.shape)} and {tuple(b.shape)}")


def class_share(probs: Tensor, held_out_probs: Tensor, held_out_y: Tensor,
                draws: int = 4000) -> dict[str, np.ndarray]:
    """Class shares of images from classifier probabilities (N, 10), corrected for the classifier's
    confusion.

    The confusion is measured on labelled real images (M, 10), (M,) that are not among those judged.
    With C[t, c] = P(says c | is t), the counted shares q obey q = pi C: pi is solved for (Rogan and
    Gladen 1978, ten classes at once), clipped to [0, 1]. The 95 % interval covers both counts: it
    is the range of pi under Dirichlet posteriors of q and of C's rows (one pseudo-count each,
    spread evenly). Returns arrays (10,): "counted" (arg-max), "share", "low", "high", and
    "confusion", 1.96 standard deviations by the confusion's count alone. It corrects
    for images like the real ones; blends that no real image resembles are beyond it. Raises
    ValueError for no images, or if a class is missing from the labelled ones.
    """
    said = np.bincount(probs.argmax(1).cpu().numpy(), minlength=10).astype(float)
    confusion = np.zeros((10, 10))
    np.add.at(confusion, (held_out_y.cpu().numpy(), held_out_probs.argmax(1).cpu().numpy()), 1)
    if not len(probs) or not confusion.sum(1).all():
        raise ValueError("class_share needs images, and labelled images of every class")
    rng = np.random.default_rng(0)
    solve = lambda q, c: np.linalg.solve(np.swapaxes(c, -1, -2), q[..., None])[..., 0].clip(0, 1)
    counted = said / said.sum()
    rows = np.stack([rng.dirichlet(row + 0.1, draws) for row in confusion], 1)  # (draws, 10, 10)
    low, high = np.quantile(solve(rng.dirichlet(said + 0.1, draws), rows), [0.025, 0.975], axis=0)
    return {"counted": counted, "share": solve(counted, confusion / confusion.sum(1,
                                                                                  keepdims=True)),
            "low": low, "high": high, "confusion": 1.96 * solve(counted[None], rows).std(0)}


def nearest(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image (or vector) its L2 distance to the nearest of `reference` and that one's index,
    (N,) each.
    """
    a, b = x.flatten(1), reference.flatten(1)
    norm = b.square().sum(1)
    found = [torch.addmm(norm, c, b.T, alpha=-2).min(1) for c in a.split(1000)]
    index = torch.cat([f.indices for f in found])
    # recomputed: the expansion above cancels for near copies
    return (a - b[index]).norm(dim=1), index


# --------------------------------------------------------------------------------------- likelihood


@torch.no_grad()
def laplace(decoder, x: Tensor, mu: Tensor, residual, weight, widen: float = 1.2, rounds: int = 3,
            codes: int = 8, directions: int = 40) -> tuple[Tensor, Tensor]:
    """A Gaussian proposal for p(z | x) with a prior N(0, I): its mean, (B, d), and the Cholesky
    factor of its precision, (B, d, d), from the mean mu (B, d) of a diagonal q.

    x is (B, P), decoder maps codes (N, d) to outputs (N, P); of log p(x | z), residual(output, x)
    is the gradient by the output and weight(output) minus the second derivative, (N, P) each. The
    precision is I + E[J^T W J] / widen with the decoder's Jacobian J (generalised Gauss-Newton):
    always positive definite, and wider than the posterior only where the image informs the code. A
    Laplace approximation takes J at the mode; here it is averaged over codes of the Gaussian
    itself, and the mean follows the averaged gradient. That is exact for a linear decoder too, and
    on validation images the median effective sample size was 4 to 8 times that of the mode's
    curvature. Only the `directions` of the largest curvature are averaged. An image's result does
    not depend on its batch-mates. Source: Khan et al. 2018, arXiv:1806.04854 (variational online
    Gauss-Newton).
    """
    g, d, means, factors = generator("proposal"), mu.shape[1], [], []
    noise = torch.randn(rounds, codes // 2, d, generator=g, dtype=mu.dtype).to(x.device)
    noise = torch.cat([noise, -noise], 1).mT  # (rounds, d, S), the same for all images
    eye, vmap = torch.eye(d, device=x.device, dtype=mu.dtype), torch.func.vmap
    one = lambda code: decoder(code[None])[0]
    along = vmap(lambda code, basis: vmap(
        lambda v: torch.func.jvp(one, (code,), (v,))[1], 1, 1)(basis))  # J times the basis
    for m, image in zip(mu.split(20), x.split(20), strict=True):
        j = along(m, eye.expand(len(m), d, d)) * weight(decoder(m)).sqrt()[..., None]  # (B, P, d)
        curvature = j.mT @ j
        basis = torch.linalg.eigh(curvature)[1][..., -directions:]  # (B, d, r)
        rest = curvature - basis @ (basis.mT @ curvature @ basis) @ basis.mT
        for t in range(rounds):
            factor = torch.linalg.cholesky(eye + curvature)
            away = torch.linalg.solve_triangular(
                factor.mT, noise[t].expand(len(m), -1, -1), upper=True)  # (B, d, S)
            z = (m[..., None] + away).mT.flatten(0, 1)  # (B S, d)
            output, pull = torch.func.vjp(decoder, z)
            j = along(z, basis.repeat_interleave(codes, 0)) * weight(output).sqrt()[..., None]
            j = j.reshape(len(m), -1, basis.shape[2])  # (B, S P, r)
            gradient = pull(residual(output, image.repeat_interleave(codes, 0)))[0]
            gradient = gradient.view(len(m), codes, d).mean(1) - m  # the noise is symmetric
            rate = (t + 1) ** -0.5
            new = rest + basis @ (j.mT @ j / codes) @ basis.mT
            curvature = (1 - rate) * curvature + rate * new
            m = m + rate * torch.linalg.solve(eye + curvature, gradient[..., None])[..., 0]
        means.append(m)
        factors.append(torch.linalg.cholesky(eye + curvature / widen))
    return torch.cat(means), torch.cat(factors)


@torch.no_grad()
def importance_sampling(log_px, mean: Tensor, factor: Tensor, k: int, prior: float = 0.1,
                        rows: int = 5000) -> tuple[Tensor, Tensor]:
    """log p(x) and the effective sample size of B images, (B,) float64 on the CPU each.

    log_px maps codes (K, B, d) to log p(x | z), (K, B). Of the k codes of an image a share `prior`
    is from N(0, I), the rest from N(mean, (L L^T)^-1) for the factor L; all are weighed by that
    mixture, in its exact shares. At most `rows` images are decoded at a time. A lower bound in
    expectation; a small effective sample size says that it may be loose. Source: Hesterberg 1995
    (defensive mixtures).
    """
    (n, d), log_w = mean.shape, []
    edges = torch.linspace(0, k, math.ceil(k / max(1, rows // n)) + 1).round().long().tolist()
    of_prior = round(prior * k)
    take = [round(of_prior * edge / k) for edge in edges]  # of the prior, up to each edge
    share = lambda count: math.log(count / k) if count else -math.inf
    for i in range(len(edges) - 1):
        from_prior = take[i + 1] - take[i]
        noise = torch.randn(edges[i + 1] - edges[i], n, d, device=mean.device, dtype=mean.dtype)
        near = mean + torch.linalg.solve_triangular(
            factor.mT, noise[from_prior:].permute(1, 2, 0), upper=True).permute(2, 0, 1)
        z = torch.cat([noise[:from_prior], near])
        log_prior = -0.5 * z.square().sum(-1)  # its constant and that of the proposal cancel
        away = torch.einsum("kbd,bde->kbe", z - mean, factor)
        log_q = -0.5 * away.square().sum(-1) + factor.diagonal(dim1=1, dim2=2).log().sum(1)
        joint, log_q, log_prior = (
            v.cpu().double() for v in (log_px(z) + log_prior, log_q, log_prior))
        log_w.append(joint - torch.logaddexp(log_q + share(k - of_prior),
                                             log_prior + share(of_prior)))
    log_w = torch.cat(log_w)
    return (log_w.logsumexp(0) - math.log(k),
            (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp())


# ------------------------------------------------------------------------------------- runs on disk


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it if the block ends well: no reader sees half a
    file. The folder must be there: one that was removed meanwhile is an error, not made anew.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # which file it was
    finally:
        temporary.unlink(missing_ok=True)


def save_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path: Path, value: dict) -> None:
    """Indented JSON; a NaN or an infinity is a bug of ours and raises ValueError."""
    save_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def load_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is corrupt; --fresh starts that run over") from None


def save_torch(path: Path, value: dict) -> None:
    """Plain types and tensors only, so that load_torch need not execute anything."""
    buffer = io.BytesIO()  # torch turns a full disk into a RuntimeError, a plain write does not
    torch.save(value, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_torch(path: Path) -> dict:
    try:
        with zipfile.ZipFile(path) as file:  # torch itself does not look at the checksums
            if file.testzip():
                raise ValueError
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception:  # a bad zip, a refused pickle, a short read: many types
        raise UserError(f"{path} is corrupt or foreign; --fresh starts a run over, and a "
                        "classifier is trained again once its file is deleted") from None


def open_runs(folders: Sequence[Path], configs: Sequence[dict], args) -> None:
    """Make the runs' folders with their config.json; with --fresh, empty.

    Nothing is written or removed unless every folder there holds a run with its configuration and
    what the flags ask for is installed. Raises UserError. An empty --shard is said.
    """
    code_version()  # of the code that trains, whatever is committed meanwhile
    if not folders:
        print(f"no run in shard {args.shard.start}/{args.shard.step}")
    if args.tensorboard:
        summary_writer(None)
    for folder, config in zip(folders, configs, strict=True):
        file = folder / "config.json"
        there = load_json(file) if file.exists() and not args.fresh else config
        for key in [*config, *there]:
            if config.get(key) != there.get(key):
                raise UserError(f"{folder} holds a run with {key} = {there.get(key)}, not "
                                f"{config.get(key)}; --fresh replaces it, another --out-dir keeps "
                                "it")
    for folder, config in zip(folders, configs, strict=True):
        if args.fresh and folder.exists():
            try:
                shutil.rmtree(folder)
            except OSError as error:  # names the file alone, without its folder
                raise UserError(f"{folder} cannot be removed ({error.strerror}: {error.filename}); "
                                "take another --out-dir") from None
        folder.mkdir(parents=True, exist_ok=True)
        for half in folder.rglob(".*-*"):  # what a process was writing when it was killed
            half.unlink()
        if not (folder / "config.json").exists():
            save_json(folder / "config.json", config)


def restore(folder: Path, config: dict, parts: dict, name: str = "checkpoint.pt") -> list[dict]:
    """Put the states of a run's checkpoint, or best_model.pt, into `parts` (modules, optimisers by
    name); its history. Without a checkpoint the parts stay as they are and the history is empty.
    """
    file = folder / name
    if name == "checkpoint.pt" and not file.exists():
        return []
    saved = load_torch(file)
    try:
        if saved["config"] != config:
            raise ValueError
        for part, value in parts.items():
            value.load_state_dict(saved[part])
        return saved.get("history", [])
    except torch.OutOfMemoryError:
        raise
    except Exception:
        raise UserError(f"{file} is not of this run; --fresh starts it over") from None


def save_epoch(folder: Path, config: dict, history: list[dict], parts: dict, best: bool,
               board=None) -> None:
    """After an epoch: if it is the best so far best_model.pt (modules only), history.csv, a line in
    training.log, the scalars on the TensorBoard writer, if any. Last checkpoint.pt: an epoch that
    it holds has left nothing undone.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    row = history[-1]
    if best:
        modules = {k: v for k, v in states.items() if isinstance(parts[k], nn.Module)}
        save_torch(folder / "best_model.pt", {"config": config, "epoch": row["epoch"], **modules})
    save_history(folder / "history.csv", history)
    with open(folder / "training.log", "a", encoding="utf-8") as log:
        print(" ".join(f"{k}={v:.4g}" for k, v in row.items()), file=log)
    for key, value in row.items() if board else ():
        board.add_scalar(key, value, row["epoch"])
    save_torch(folder / "checkpoint.pt", {"config": config, "history": history, **states})


def write_reports(report, base: Path, dataset: str | None) -> dict:
    """Call `report(folder)` for the dataset's folder, or without a name for each with a result."""
    roots = [base / d for d in ([dataset] if dataset else DATASETS)]
    for root in [r for r in roots if any(r.glob("*/seed_*/final_metrics.json"))] or roots[:1]:
        report(root)
        print(f"report: {root / 'report.md'}")
    return {}


def finished_runs(root: Path) -> list[dict]:
    """Every finished run below root/<variant>/seed_<s>: its config, metrics, history and folder."""
    runs = []
    for file in sorted(root.glob("*/seed_*/final_metrics.json")):
        with open(file.with_name("history.csv"), encoding="utf-8") as rows:
            try:
                history = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(rows)]
            except (TypeError, ValueError):
                history = []
        config, metrics = load_json(file.with_name("config.json")), load_json(file)
        if len(history) != config["epochs"]:
            raise UserError(f"{rows.name} is corrupt; --fresh starts that run over")
        runs.append({"config": config, "metrics": metrics, "history": history,
                     "folder": file.parent.relative_to(root)})
    return runs


def diverged(title: str, folder: Path, epoch: int, losses: Tensor) -> UserError:
    """The error for a loss that is not finite: one of the steps' (steps, ...) of this epoch or, if
    those are, what came after the last.
    """
    bad = (~losses.flatten(1).isfinite().all(1)).nonzero().flatten().tolist() or [len(losses) - 1]
    kept = f"{folder} keeps epoch {epoch - 1}; " if epoch > 1 else ""
    return UserError(f"the loss of {title} is not finite in epoch {epoch}, step {bad[0] + 1}; "
                     f"{kept}try a lower rate, with --fresh")


def save_history(path: Path, history: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    save_text(path, text.getvalue())


@functools.cache
def code_version() -> str:
    """The commit, "-dirty" if a script differs from it (results may be half-way through renewal),
    when this was first called.
    """
    git = lambda *of: subprocess.run(["git", *of], cwd=HERE, text=True, capture_output=True)
    try:
        commit = git("describe", "--always").stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", ":(glob)*.py").returncode == 1
        return commit + "-dirty" * changed if commit else "unknown"  # a copy without .git
    except OSError:  # no git on this machine
        return "unknown"


def environment(device: torch.device) -> dict:
    """Where and how a number was made. These fields and seconds are all that may differ between
    equal runs.
    """
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": code_version(),
            "device": f"{device.type}: {name}", "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "numpy": np.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d")}


def summary_writer(folder: Path | None):
    """A TensorBoard writer, or for None only the check. Raises UserError if there is no package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(str(folder)) if folder else None


# ------------------------------------------------------------------------ figures and report tables


def save_figure(path: Path, figure: Figure) -> None:
    """PNG of at most 256 colours, a third of the size, without a date or a version in it, so that
    the same numbers give the same bytes.
    """
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, bbox_inches="tight", metadata={"Software": None})
    with atomic(path) as temporary:
        Image.open(buffer).convert("RGB").quantize(256).save(temporary, "PNG", optimize=True)


def save_grid(path: Path, x: Tensor, columns: int, title: str, notes: Sequence[str] = (),
              framed: Tensor | None = None) -> None:
    """Images (N, 1, 28, 28) in rows of `columns`, black on white like ink; `notes` label the rows,
    those `framed` (N,) have a border.
    """
    rows = -(-len(x) // columns)
    tiles = torch.zeros(rows * columns, 30, 30)
    if framed is not None:
        tiles[:len(x)][framed] = 0.5
    tiles[: len(x), 1:-1, 1:-1] = x[:, 0].cpu()
    picture = 1 - tiles.view(rows, columns, 30, 30).transpose(1, 2).reshape(rows * 30, -1)
    figure = Figure(figsize=(max(columns * 0.42, 3), rows * 0.42 + 0.3))
    axes = figure.add_axes((0, 0, 1, rows * 0.42 / (rows * 0.42 + 0.3)))
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([30 * row + 15 for row in range(len(notes))], notes, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save_figure(path, figure)


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """'0.97 ± 0.03' (standard deviation over seeds, n - 1), or '0.97' for one value and '–' for
    none.
    """
    if not values:
        return "–"
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A markdown table; the first column is text, the others numbers, their hyphens minus signs."""
    cells = [[re.sub(r"(?<!\w)-(?=\d)", "−", str(cell)) for cell in row] for row in rows]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *cells]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def precision(metrics: dict) -> str:
    """Of the products and convolutions of a run's training passes (see `pick_device` for TF32)."""
    if metrics.get("bfloat16"):
        return "bfloat16"
    return "TF32" if metrics["environment"]["device"].startswith("cuda") else "float32"


def by_configuration(runs: list[dict], variant, *measured: str) -> dict[str, list[dict]]:
    """Runs that differ in the seed alone, by name: variant(config) and, where that is shared, what
    else differs. Of the metrics, those `measured` (such as a number of samples) must agree too, and
    the precision of training.
    """
    groups: dict[str, tuple[dict, list]] = {}
    for run in runs:
        same = run["config"] | {key: run["metrics"][key] for key in measured}
        same["precision"] = precision(run["metrics"])
        del same["seed"]
        groups.setdefault(str(same), (same, []))[1].append(run)
    named = {}
    for same, of in groups.values():
        name = variant(of[0]["config"])
        alike = [other for other, rs in groups.values() if variant(rs[0]["config"]) == name]
        own = [f"{k} {v}" for k, v in same.items() if any(other.get(k) != v for other in alike)]
        named[f"{name} ({', '.join(own)})" if own else name] = of
    return named


def get(runs: list[dict], *keys) -> list:
    """One metric of every run: get(runs, "validation", "loss")."""
    found = [run["metrics"] for run in runs]
    for key in keys:
        found = [metrics[key] for metrics in found]
    return found


def show(runs: list[dict], *keys, digits: int = 2) -> str:
    """One metric over the runs' seeds, as `mean_std`."""
    return mean_std(get(runs, *keys), digits)


def same_seeds(a: list[dict], b: list[dict]) -> tuple[list[dict], list[dict]]:
    """The runs of either whose seed the other has too, in the order of the seeds."""
    of = [{run["config"]["seed"]: run for run in runs} for runs in (a, b)]
    seeds = sorted(set(of[0]) & set(of[1]))
    return [of[0][s] for s in seeds], [of[1][s] for s in seeds]


def how_made(groups: dict[str, list[dict]]) -> str:
    """The last section of every report: a row for runs made alike, commands without --seeds."""
    rows: dict[tuple, list] = {}
    for name, runs in groups.items():
        for run in runs:
            c, e = run["config"], run["metrics"]["environment"]
            command = re.sub(r" --seeds( \d+)+", "", e["command"])
            rows.setdefault((name, c["epochs"], c["batch_size"], c["lr"], f"`{command}`",
                             e["commit"], e["device"], e["threads"], e["torch"],
                             precision(run["metrics"])), []).append(run)
    return "## How this was made\n\n" + table(
        ["run", "epochs", "batch", "rate", "command", "commit", "device", "threads", "torch",
         "training passes", "seeds", "s to train"],
        [[*key, " ".join(str(r["config"]["seed"]) for r in rs), show(rs, "seconds_train", digits=0)]
         for key, rs in rows.items()])


class Difference(NamedTuple):
    """A mean difference over n pairs and half of its t-interval (95 %), infinite for one pair; as
    text, what that supports.
    """

    mean: float
    half: float
    n: int
    digits: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes zero, else 0."""
        return int(np.sign(self.mean)) if abs(self.mean) > self.half else 0

    def signed(self, value: float) -> str:
        return f"{value:+.{self.digits}f}".replace("-", "−")

    def interval(self) -> str:
        return f"{self.signed(self.mean - self.half)} to {self.signed(self.mean + self.half)}"

    def cell(self) -> str:
        """For a table: mean and interval, the mean bold if that excludes zero; of one pair n=1."""
        bold = "**" * abs(self.sign)
        return (f"{bold}{self.signed(self.mean)}{bold} "
                f"({self.interval() if self.n > 1 else 'n=1'})")

    def __str__(self) -> str:
        mean = self.signed(self.mean)
        if self.n < 2:
            return f"{mean} (n={self.n}: no conclusion)"
        return (f"{'a' if self.sign else 'no'} significant difference at n={self.n} ({mean}, 95 % "
                f"interval {self.interval()})")


def paired(a: Sequence[float], b: Sequence[float], digits: int = 2,
           level: float = 0.95) -> Difference:
    """The mean difference a - b over paired seeds, with a t-interval of this level."""
    from scipy.stats import t  # comes with scikit-learn

    d, n = np.subtract(a, b), len(a)
    half = t.ppf((1 + level) / 2, n - 1) * d.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return Difference(d.mean(), half, n, digits)
