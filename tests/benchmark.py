"""Speed, by hand: our training against the usual way, against the machine's limit, and the metrics.

    python tests/benchmark.py                    # everything, on the fastest device (10 minutes)
    python tests/benchmark.py vae --epochs 5     # one table; more epochs

Ratios are of whole epochs in the same run, on the same model, batch and number of steps; run it on
a machine that does nothing else. The usual way is a DataLoader with ToTensor, an eager step that
asks for the loss every time, and a pass over the test set after every epoch, in float32, in a
process of its own. Ours are in float32, in bfloat16, and compiled.
"""

import argparse
import ctypes
import functools
import math
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import gan_vs_vae
import imbalance_study
import vae_mnist

VAE = {"dataset": "mnist", "arch": "mlp", "hidden": [400], "latent_dim": 20, "binarize": "none",
       "objective": "elbo", "k": 1, "optimizer": "adam", "lr": 1e-3, "batch_size": 128,
       "train_size": 60_000, "precision": "float32", "seed": 0}
GAN = {"dataset": "mnist", "model": "gan", "loss": "bce", "z_dim": 64, "lr": 2e-4,
       "batch_size": 128, "train_size": 60_000, "precision": "float32", "seed": 0}


def sync(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock(run, epochs: int, device) -> tuple[float, float, float]:
    """Seconds of an epoch, seconds that only the first call took, and what run(epochs) returned."""
    seconds = []
    for n in [1, 1, 1 + epochs]:
        sync(device)
        began = time.perf_counter()
        value = run(n)
        sync(device)
        seconds.append(time.perf_counter() - began)
    return (seconds[2] - seconds[1]) / epochs, seconds[0] - seconds[1], value


def loaders(data_dir: str) -> list[DataLoader]:
    return [DataLoader(datasets.MNIST(data_dir, train=train, transform=transforms.ToTensor()), 128,
                       shuffle=train, drop_last=train) for train in (True, False)]


def usual_vae(data_dir: str, device, epochs: int) -> float:
    """Test loss after so many epochs, nats per image."""
    train, test = loaders(data_dir)
    torch.manual_seed(0)
    model = vae_mnist.VAE(VAE).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=VAE["lr"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs)))

    def loss_of(x):
        mu, logvar = model.encode(x)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        reconstruction = F.binary_cross_entropy(model.decode(z), x, reduction="sum")
        return reconstruction - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    for _ in range(epochs):
        model.train()
        total = 0.0
        for x, _y in train:
            x = x.to(device)
            optimizer.zero_grad()
            loss = loss_of(x) / len(x)
            loss.backward()
            total += loss.item()
            optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            total = sum(loss_of(x.to(device)).item() for x, _y in test) / len(test.dataset)
    return total


def our_vae(x, x_test, epochs: int, compiled: bool, precision: str = "float32") -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = common.Run(Path(folder), {**VAE, "epochs": epochs, "precision": precision})
        vae_mnist.train(run, x, x_test, compiled)
    return run.history[-1]["val_loss"]


def usual_gan(data_dir: str, device, epochs: int) -> float:
    train, _ = loaders(data_dir)
    torch.manual_seed(0)
    G = nn.Sequential(
        nn.Linear(GAN["z_dim"], 3136), nn.Unflatten(1, (64, 7, 7)), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1), nn.Sigmoid()).to(device)
    D = nn.Sequential(
        nn.PixelUnshuffle(2), nn.Conv2d(4, 24, 3, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(24, 48, 4, stride=2, padding=1), nn.BatchNorm2d(48), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(48 * 49, 256), nn.BatchNorm1d(256), nn.LeakyReLU(0.2),
        nn.Linear(256, 1)).to(device)
    ours, _ = gan_vs_vae.build(GAN, device)
    assert all([w.shape for w in a.parameters()] == [w.shape for w in b.parameters()]
               for a, b in [(G, ours["G"]), (D, ours["D"])]), "not the same networks"
    optimizer_G, optimizer_D = (torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999))
                                for m in (G, D))
    bce = nn.BCEWithLogitsLoss()
    for _ in range(epochs):
        for x, _y in train:
            x, ones = x.to(device), torch.ones(len(x), 1, device=device)
            fake = G(torch.randn(len(x), GAN["z_dim"], device=device))
            optimizer_D.zero_grad()
            loss_d = bce(D(x), ones) + bce(D(fake.detach()), 0 * ones)
            loss_d.backward()
            optimizer_D.step()
            optimizer_G.zero_grad()
            loss_g = bce(D(G(torch.randn(len(x), GAN["z_dim"], device=device))), ones)
            loss_g.backward()
            optimizer_G.step()
            last = loss_d.item() + loss_g.item()
    return last


def our_gan(x, epochs: int, compiled: bool, precision: str = "float32") -> float:
    """As gan_vs_vae.train, without its sampling and FID after every epoch."""
    torch.manual_seed(0)
    nets, optimizers = gan_vs_vae.build(GAN, x.device)
    step = common.compiled(gan_vs_vae.step, compiled, x.device)
    config = GAN | {"precision": precision}
    for _ in range(epochs):
        order = torch.randperm(len(x)).to(x.device)[:len(x) // 128 * 128]
        losses = []
        for batch in order.split(128):
            found = step(nets, optimizers, x[batch], config, 1)
            losses.append((found["d_loss"] + found["g_loss"]).detach().clone())
    return torch.stack(losses[-100:]).mean().item()


def limit(step, weights: int, seconds: float, device) -> str:
    """Operations and bytes of a step, and the rate against a matrix product of this machine."""
    a = torch.randn(2048, 2048, device=device)
    best = math.inf
    for _ in range(5):
        sync(device)
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    peak = 2 * 2048**3 / best
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    # weights read twice, gradients written and read, weights and two moments read and written
    moved = 4 * weights * 10
    return (f"{flops / 1e9:.2f} GFLOP and {moved / 1e6:.0f} MB of weights and moments a step; "
            f"{flops / seconds / 1e9:.0f} GFLOP/s, {100 * flops / seconds / peak:.0f} % of the "
            f"{peak / 1e9:.0f} GFLOP/s of a float32 product of 2048 x 2048")


def apart(run, epochs: int, device) -> tuple[float, float, float]:
    """`clock` in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"),
                             torch.set_float32_matmul_precision, ("high",)) as pool:  # TF32 too
        return pool.submit(clock, run, epochs, device).result()


def speed(name: str, usual, ours: dict, steps: int, step, weights: int, epochs: int,
          device) -> None:
    """A table of seconds per epoch: the usual way, then each of ours by title."""
    rows, times = [["", "s per epoch", "× faster", "s more in the first call", "last loss"]], {}
    ways = [("usual", apart, usual), *((title, clock, run) for title, run in ours.items())]
    for title, how, run in ways:
        try:
            epoch, before, loss = how(run, epochs, device)
        except Exception as error:
            rows.append([title, f"failed: {str(error).splitlines()[0][:60]}", *[""] * 3])
            continue
        times[title] = epoch
        rows.append([title, f"{epoch:.2f}", f"{times['usual'] / epoch:.2f}", f"{before:.1f}",
                     f"{loss:.2f}"])
    print(f"## {name}, {torch.get_num_threads()} threads, {device}\n\n"
          + common.markdown_table(rows, 1))
    print("\n" + limit(step, weights, times["ours"] / steps, device) + "\n")


def vae(args, device, data) -> None:
    x, x_test = data.x_train.to(device), data.x_test.to(device)
    model = vae_mnist.VAE(VAE).to(device)
    step = lambda: vae_mnist.objective(model, x[:128], VAE)[0].backward()
    speed("VAE 784-400-20-400-784, batch 128, Adam",
          functools.partial(usual_vae, args.data_dir, device),
          {"ours": lambda n: our_vae(x, x_test, n, False),
           "ours, bfloat16": lambda n: our_vae(x, x_test, n, False, "bfloat16"),
           "ours, --compile": lambda n: our_vae(x, x_test, n, True)}, len(x) // 128, step,
          sum(w.numel() for w in model.parameters()), args.epochs, device)


def dcgan(args, device, data) -> None:
    x = data.x_train.to(device)
    nets, optimizers = gan_vs_vae.build(GAN, device)
    weights = sum(w.numel() for net in nets.values() for w in net.parameters())
    speed("DCGAN, batch 128, Adam", functools.partial(usual_gan, args.data_dir, device),
          {"ours": lambda n: our_gan(x, n, False),
           "ours, bfloat16": lambda n: our_gan(x, n, False, "bfloat16"),
           "ours, --compile": lambda n: our_gan(x, n, True)}, len(x) // 128,
          lambda: gan_vs_vae.step(nets, optimizers, x[:128], GAN, 1), weights, args.epochs, device)


def peak_memory(run) -> tuple[float, float]:
    """Seconds, and the most memory that was in use beyond what was before, in MB (Linux)."""
    status = lambda key: next(
        int(line.split()[1]) / 1e3 for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key))
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would count as before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began = status("VmRSS"), time.perf_counter()
    run()
    return time.perf_counter() - began, status("VmHWM") - before


def metrics(args, device, data) -> None:
    classifier = common.load_classifier(data, device)
    features, probs = classifier.predict(data.x_train)
    test, probs_test = classifier.test_features, classifier.test_probs
    lines = []
    for n in [1000, 5000, 20_000, 60_000]:
        runs = {"classifier": lambda: classifier.predict(data.x_train[:n]),
                "FID": lambda: common.frechet_distance(features[:n], test),
                "precision, recall, coverage": lambda: gan_vs_vae.manifold_metrics(
                    test, features[:n]),
                "class shares": lambda: imbalance_study.class_shares(
                    probs[:n], probs_test, data.y_test),
                "copying, 2,000 images": lambda: common.nearest(
                    data.x_test[:2000], data.x_train[:n])}
        cost = {name: peak_memory(run) for name, run in runs.items()}
        lines.append([f"{n:,}", *[f"{s:.2f} s, {mb:.0f} MB" for s, mb in cost.values()]])
    print("## Metrics of n images against 10,000\n\n"
          + common.markdown_table([["n", *cost], *lines], 1))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", nargs="*", default=["vae", "dcgan", "metrics"])
    p.add_argument("--data-dir", default=os.environ.get("MNIST_DATA_DIR") or "data")
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--device", default="auto")
    args = p.parse_args()
    device = common.pick_device(args.device)
    data = common.load_data("mnist", args.data_dir)
    for name in args.what:
        {"vae": vae, "dcgan": dcgan, "metrics": metrics}[name](args, device, data)


if __name__ == "__main__":
    main()
