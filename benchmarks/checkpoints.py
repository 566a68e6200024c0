"""What a checkpoint every 50 batches costs, its journal included, on the network of `examples/fashion_mnist.py`.

    python benchmarks/checkpoints.py [--rounds N] [--out FOLDER]

Each round trains for 938 batches of 64, an epoch of Fashion-MNIST, with a checkpoint every 50 updates and without any,
in random order; what is given is the median of the paired ratios, with quartiles. A second training without anything,
measured the same way, shows the noise. CPU time counts the thread that writes, which wall-clock time sees only where it
is waited for.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from learnloop import Checkpoint, DataLoaders, Learner, Recorder, TensorLoader, TrainEvalCallback
from learnloop.data.datasets import fashion_mnist

STEPS, EVERY, BS = 938, 50, 64


def images() -> tuple[torch.Tensor, torch.Tensor, str]:
    """Training data, and what it is."""
    try:
        data = fashion_mnist(download=False)
        return data.x_train, data.y_train, "Fashion-MNIST"
    except OSError:
        return torch.rand(10_000, 1, 28, 28), torch.arange(10_000) % 10, "random images of the shape of Fashion-MNIST"


def block(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


def make_learner(x: torch.Tensor, y: torch.Tensor) -> Learner:
    torch.manual_seed(0)
    layers = [block(1, 16), block(16, 32), block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    dls = DataLoaders(TensorLoader(x, y, bs=BS, shuffle=True))
    cbs = [TrainEvalCallback(), Recorder()]
    learn = Learner(dls, nn.Sequential(*layers), nn.CrossEntropyLoss(), cbs=cbs, default_cbs=False)
    learn.logger = lambda row: None
    return learn


KINDS = ("plain", "plain again", "checkpoints")


def seconds(kind: str, x: torch.Tensor, y: torch.Tensor, folder: Path) -> tuple[float, float]:
    """Wall-clock and CPU time of one training, with what belongs to its end."""
    cbs = [Checkpoint(f"{EVERY}step", path=folder)] if kind == "checkpoints" else []
    learn = make_learner(x, y)
    began, cpu = time.perf_counter(), time.process_time()
    learn.fit_one_cycle(n_step=STEPS, lr_max=0.01, cbs=cbs)
    return time.perf_counter() - began, time.process_time() - cpu


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    x, y, title = images()
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for n in range(rounds + 1):
        for kind in random.sample(KINDS, len(KINDS)):
            found = seconds(kind, x, y, folder)
            if n:  # the first is to warm up
                times[kind].append(found)
    return {
        "data": title,
        "rounds": rounds,
        "batch_ms": 1000 * statistics.median(wall for wall, _ in times["plain"]) / STEPS,
        "file_kb": max(folder.glob("*.ckpt")).stat().st_size / 1000,
        "wall": {kind: quartiles(times, kind, 0) for kind in KINDS[1:]},
        "cpu": {kind: quartiles(times, kind, 1) for kind in KINDS[1:]},
    }


def quartiles(times: dict[str, list[tuple[float, float]]], kind: str, which: int) -> list[float]:
    """Of the ratios to the training without anything in the same round."""
    ratios = [a[which] / b[which] for a, b in zip(times[kind], times["plain"], strict=True)]
    return statistics.quantiles(ratios, n=4)


def as_markdown(found: dict[str, Any]) -> str:
    titles = {"plain again": "nothing, again (the noise)", "checkpoints": f"a checkpoint every {EVERY} batches"}
    cells = {k: [f"{q[1]:.3f} | {q[0]:.3f} to {q[2]:.3f}" for q in (found["cpu"][k], found["wall"][k])] for k in titles}
    lines = [
        "# What checkpoints cost",
        "",
        f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"threads: {torch.get_num_threads()}. {found['data']}, {STEPS} batches of {BS}, {found['batch_ms']:.1f} ms "
        f"each without anything; files of {found['file_kb']:.0f} KB; {found['rounds']} rounds. Medians of ratios.",
        "",
        "| with | CPU time | quartiles | wall-clock time | quartiles |",
        "|---|---:|---:|---:|---:|",
        *(f"| {titles[kind]} | {' | '.join(cells[kind])} |" for kind in titles),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="a folder for checkpoints.md and checkpoints.json")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(chosen.rounds, Path(folder))
    text = as_markdown(found)
    print(text)
    if chosen.out is not None:
        (chosen.out / "checkpoints.md").write_text(text)
        (chosen.out / "checkpoints.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
