"""--compile: a compiled step (CPU) and a captured one (CUDA) train as the eager step does.

    pytest tests/test_steps.py
"""

import functools
import platform
import types

import pytest
import torch

import common_v1 as common
import latent_opt

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: capturing a step is not measured"))]
BASE = {"seed": 0, "epochs": 2, "batch_size": 24, "lr": 1e-3, "latent_dim": 4}
LATENT = BASE | {"sigma": 0.4, "latent_lr": 0.01, "latent_steps": 1, "train_size": 100}


@pytest.fixture
def quick(monkeypatch):
    """torch.compile without code generation, which takes half a minute a step; float64, because
    Adam makes whole steps of float32's rounding errors where a gradient should be zero.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(history: list[dict]) -> list[float]:
    return [v for row in history for k, v in row.items() if k != "seconds"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_fast_step_trains_like_an_eager_one(device, tmp_path, quick):
    """Two epochs, several batch sizes, a rate that changes; the second half after a resume that
    changes the kind of step.
    """
    x = torch.rand(100, 1, 28, 28, device=device)
    train = functools.partial(latent_opt.train, "vae", LATENT)
    found = []
    for kind, (first, second) in {"eager": (False, False), "fast": (True, True),
                                  "mixed": (True, False), "mixed too": (False, True)}.items():
        folder = tmp_path / kind
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            def stop(*a, real=common.save_epoch):
                real(*a)
                raise KeyboardInterrupt
            patch.setattr(common, "save_epoch", stop)
            with pytest.raises(KeyboardInterrupt):
                train(x, x[:20], folder, types.SimpleNamespace(compile=first, tensorboard=False))
        args = types.SimpleNamespace(compile=second, tensorboard=False)
        found.append(losses(train(x, x[:20], folder, args)[-1]))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_memory_serves_the_next_tensor():
    import resource  # not on Windows

    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    common.keep_memory()
    counts = []
    for _ in range(30):
        counts.append(faults())
        tensors = [torch.ones(31 * 2**18) for _ in range(4)]  # 31 MB each, 7,936 pages
        del tensors
    assert counts[-1] - counts[15] < 1000, counts  # once in use, nothing is fetched anew
