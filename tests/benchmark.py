"""Speed, by hand: our training against the usual way, and the cost of the metrics.

    python tests/benchmark.py                    # everything, on the fastest device (10 minutes)
    python tests/benchmark.py vae --epochs 5     # one table; more epochs

Ratios are of whole epochs in the same run, on the same model, batch and number of steps; run it on
a machine that does nothing else. The usual way is a DataLoader with ToTensor and an eager step that
asks for the loss every time, in float32. Ours are in float32, in bfloat16, and compiled.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import gan_vs_vae
import imbalance_study
import vae_mnist

VAE = {"dataset": "mnist", "arch": "mlp", "hidden": [400], "latent_dim": 20, "binarize": "none",
       "objective": "elbo", "k": 1, "optimizer": "adam", "lr": 1e-3, "batch_size": 128,
       "train_size": 60_000, "seed": 0}
GAN = {"dataset": "mnist", "model": "gan", "loss": "bce", "z_dim": 64, "lr": 2e-4,
       "batch_size": 128, "train_size": 60_000, "seed": 0}


def clock(run, device: torch.device) -> float:
    """Seconds that run() takes."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def speed(title: str, usual, ours, epochs: int, device: torch.device) -> None:
    """A table of seconds per epoch, of usual(epochs) and of ours(epochs, precision, use_compile).

    What the first epoch takes besides, such as compilation, does not count.
    """
    ways = {"usual": usual,
            "ours": lambda n: ours(n, "float32", False),
            "ours, bfloat16": lambda n: ours(n, "bfloat16", False),
            "ours, --compile": lambda n: ours(n, "float32", True)}
    lines, seconds = [["", "s per epoch", "× faster"]], []
    for name, run in ways.items():
        run(1)
        one = clock(lambda: run(1), device)
        more = clock(lambda: run(1 + epochs), device)
        seconds.append((more - one) / epochs)
        lines.append([name, f"{seconds[-1]:.2f}", f"{seconds[0] / seconds[-1]:.2f}"])
    print(f"## {title}, {torch.get_num_threads()} threads, {device}\n\n"
          f"{common.markdown_table(lines, 1)}\n", flush=True)


def loader(data_dir: str) -> DataLoader:
    dataset = datasets.MNIST(data_dir, transform=transforms.ToTensor())
    return DataLoader(dataset, 128, shuffle=True, drop_last=True)


def vae(args, device: torch.device, data: common.Data) -> None:
    x_train, x_val = data.x_train.to(device), data.x_test.to(device)

    def usual(epochs: int) -> None:
        model = vae_mnist.VAE(VAE).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=VAE["lr"])
        for _ in range(epochs):
            for x, _ in loader(args.data_dir):
                x = x.to(device)
                mu, logvar = model.encode(x)
                z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
                reconstruction = F.binary_cross_entropy(model.decode(z), x, reduction="sum")
                kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
                loss = (reconstruction + kl) / len(x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()
            with torch.no_grad():
                vae_mnist.mean_losses(model, x_val, VAE)

    def ours(epochs: int, precision: str, use_compile: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run = common.Run(Path(folder), {**VAE, "epochs": epochs, "precision": precision})
            vae_mnist.train(run, x_train, x_val, use_compile)

    speed("VAE 784-400-20-400-784, batch 128, Adam", usual, ours, args.epochs, device)


def dcgan(args, device: torch.device, data: common.Data) -> None:
    x_train = data.x_train.to(device)

    def usual(epochs: int) -> None:
        nets, _ = gan_vs_vae.build(GAN, device)
        G, D = nets["G"], nets["D"]
        optimizer_G = torch.optim.Adam(G.parameters(), lr=2e-4, betas=(0.5, 0.999))
        optimizer_D = torch.optim.Adam(D.parameters(), lr=2e-4, betas=(0.5, 0.999))
        bce = nn.BCEWithLogitsLoss()
        for _ in range(epochs):
            for x, _ in loader(args.data_dir):
                x = x.to(device)
                fake = G(torch.randn(len(x), GAN["z_dim"], device=device)).detach()
                real_logits, fake_logits = D(x), D(fake)
                loss_d = (bce(real_logits, torch.ones_like(real_logits))
                          + bce(fake_logits, torch.zeros_like(fake_logits)))
                optimizer_D.zero_grad()
                loss_d.backward()
                optimizer_D.step()
                fake_logits = D(G(torch.randn(len(x), GAN["z_dim"], device=device)))
                loss_g = bce(fake_logits, torch.ones_like(fake_logits))
                optimizer_G.zero_grad()
                loss_g.backward()
                optimizer_G.step()
                loss_d.item(), loss_g.item()

    def ours(epochs: int, precision: str, use_compile: bool) -> None:
        """As gan_vs_vae.train, without its sampling and FID after every epoch."""
        nets, optimizers = gan_vs_vae.build(GAN, device)
        step = common.compiled(gan_vs_vae.step, use_compile, device)
        for _ in range(epochs):
            order = torch.randperm(len(x_train), device=device)
            for batch in order[:len(order) // 128 * 128].split(128):
                step(nets, optimizers, x_train[batch], {**GAN, "precision": precision}, 1)

    speed("DCGAN, batch 128, Adam", usual, ours, args.epochs, device)


def metrics(args, device: torch.device, data: common.Data) -> None:
    classifier = common.load_classifier(data, device)
    features, probs = classifier.predict(data.x_train)
    test_features = classifier.test_features
    lines = [["seconds for n images", "FID", "precision, recall, coverage", "class shares"]]
    for n in [1000, 10_000, 60_000]:
        runs = [lambda: common.frechet_distance(features[:n], test_features),
                lambda: gan_vs_vae.manifold_metrics(test_features, features[:n]),
                lambda: imbalance_study.class_shares(probs[:n], classifier.test_probs, data.y_test)]
        lines.append([f"{n:,}", *[f"{clock(run, device):.2f}" for run in runs]])
    print(f"## Metrics against 10,000 images\n\n{common.markdown_table(lines, 1)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["vae", "dcgan", "metrics"])
    parser.add_argument("--data-dir", default=os.environ.get("MNIST_DATA_DIR") or "data")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    data = common.load_data("mnist", args.data_dir)
    for name in args.what:
        {"vae": vae, "dcgan": dcgan, "metrics": metrics}[name](args, device, data)


if __name__ == "__main__":
    main()
