"""What a checkpoint every 50 batches costs, its journal included, on a small convolutional network and Fashion-MNIST.

    python benchmarks/checkpoints.py [--fits N] [--out FOLDER]

Trainings of three epochs in groups of three blocks of 50 batches, in random order: two without anything, and one with a
line of the journal for each batch and one file, which is written while the block goes on. Given are medians, over all
groups, of the ratios to one of the two bare blocks: so what else the machine does meets all three alike. CPU time
counts the thread that writes; wall-clock time sees it where it takes the processor away from the training.
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

from learnloop import Callback, Checkpoint, DataLoaders, Learner, Recorder, TensorLoader, TrainEvalCallback
from learnloop.data.datasets import fashion_mnist

EVERY, BS = 50, 64
GROUPS = 18  # in a training, which then has about three epochs
KINDS = ("bare", "bare again", "checkpoint")


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


class Blocks(Callback):
    """Switches a Checkpoint on and off from block to block, and takes the times."""

    order = 2000  # after the Checkpoint

    def __init__(self, checkpoint: Checkpoint, groups: int):
        self.checkpoint = checkpoint
        self.kinds = ["warm up", *(kind for _ in range(groups) for kind in random.sample(KINDS, len(KINDS)))]
        self.times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in ("warm up", *KINDS)}

    def before_fit(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def after_batch(self) -> None:
        block, done = divmod(self.learn.train_iter, EVERY)
        if done == 10 and self.kinds[block] in ("warm up", "checkpoint"):
            self.learn.at_boundary(self.checkpoint.save)
        if not done:
            now = time.perf_counter(), time.process_time()
            self.times[self.kinds[block - 1]].append((now[0] - self.began[0], now[1] - self.began[1]))
            self.checkpoint.run = self.kinds[min(block, len(self.kinds) - 1)] == "checkpoint"
            self.began = time.perf_counter(), time.process_time()


def measure(fits: int, folder: Path) -> dict[str, Any]:
    x, y, title = images()
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for n in range(fits):
        checkpoint = Checkpoint("9h", path=folder / str(n))
        blocks = Blocks(checkpoint, GROUPS)
        make_learner(x, y).fit_one_cycle(n_step=EVERY * len(blocks.kinds), lr_max=0.01, cbs=[checkpoint, blocks])
        for kind in KINDS:
            times[kind] += blocks.times[kind]
    return {
        "data": title,
        "groups": fits * GROUPS,
        "batch_ms": 1000 * statistics.median(wall for wall, _ in times["bare"]) / EVERY,
        "file_kb": max(folder.glob("0/*.ckpt")).stat().st_size / 1000,
        "wall": {kind: quartiles(times, kind, 0) for kind in KINDS[1:]},
        "cpu": {kind: quartiles(times, kind, 1) for kind in KINDS[1:]},
    }


def quartiles(times: dict[str, list[tuple[float, float]]], kind: str, which: int) -> list[float]:
    """Of the ratios to the bare block of the same group."""
    ratios = [a[which] / b[which] for a, b in zip(times[kind], times["bare"], strict=True)]
    return statistics.quantiles(ratios, n=4)


def as_markdown(found: dict[str, Any]) -> str:
    titles = {"bare again": "nothing, again (the noise)", "checkpoint": f"a checkpoint every {EVERY} batches"}
    cells = {k: [f"{q[1]:.3f} | {q[0]:.3f} to {q[2]:.3f}" for q in (found["cpu"][k], found["wall"][k])] for k in titles}
    lines = [
        "# What checkpoints cost",
        "",
        f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"threads: {torch.get_num_threads()}. {found['data']}, batches of {BS}, {found['batch_ms']:.1f} ms each alone; "
        f"files of {found['file_kb']:.0f} KB; {found['groups']} groups. Medians of paired ratios.",
        "",
        "| with | CPU time | quartiles | wall-clock time | quartiles |",
        "|---|---:|---:|---:|---:|",
        *(f"| {titles[kind]} | {' | '.join(cells[kind])} |" for kind in titles),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fits", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="a folder for checkpoints.md and checkpoints.json")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(chosen.fits, Path(folder))
    text = as_markdown(found)
    print(text)
    if chosen.out is not None:
        (chosen.out / "checkpoints.md").write_text(text)
        (chosen.out / "checkpoints.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
