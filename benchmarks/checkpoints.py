"""What a checkpoint every 50 batches costs, its journal included, on Fashion-MNIST.

    python benchmarks/checkpoints.py [--fits N] [--out FOLDER]

Of two convolutional networks: that of `examples/fashion_mnist.py`, and a tiny one whose batches take so little time
that it shows what a file costs by itself. Trainings in groups of three blocks of 50 batches, in random order: two
without anything, and one with a line of the journal for each batch and one file, which is written while the block goes
on. Given are medians, over all groups, of the ratios to one of the two bare blocks: so what else the machine does meets
all three alike. CPU time counts the thread that writes; wall-clock time sees it where it takes the processor away from
the training.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import cpu
from networks import residual_net, strided_net
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from learnloop import Callback, Checkpoint, DataLoaders, Learner, Recorder, TensorLoader, TrainEvalCallback
from learnloop.data.datasets import fashion_mnist

EVERY = 50
GROUPS = 9  # in a training
#: By title: the network, images in a batch, trainings of it to one that is asked for.
NETWORKS = {
    "the network of `examples/fashion_mnist.py`": (residual_net, 128, 1),
    "a tiny convolutional network": (strided_net, 64, 8),
}
KINDS = ("bare", "bare again", "checkpoint")


def images() -> tuple[torch.Tensor, torch.Tensor, str]:
    """Training data, and what it is."""
    try:
        data = fashion_mnist(download=False)
        return data.x_train, data.y_train, "Fashion-MNIST"
    except OSError:
        return torch.rand(10_000, 1, 28, 28), torch.arange(10_000) % 10, "random images of the shape of Fashion-MNIST"


def make_learner(x: torch.Tensor, y: torch.Tensor, make_network: Callable[[], nn.Module], bs: int) -> Learner:
    torch.manual_seed(0)
    dls = DataLoaders(TensorLoader(x, y, bs=bs, shuffle=True))
    cbs = [TrainEvalCallback(), Recorder()]
    learn = Learner(dls, make_network(), nn.CrossEntropyLoss(), cbs=cbs, default_cbs=False)
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


def measure(make_network: Callable[[], nn.Module], bs: int, fits: int, folder: Path) -> dict[str, Any]:
    x, y, data = images()
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for n in range(fits):
        checkpoint = Checkpoint("9h", path=folder / str(n))
        blocks = Blocks(checkpoint, GROUPS)
        learn = make_learner(x, y, make_network, bs)
        learn.fit_one_cycle(n_step=EVERY * len(blocks.kinds), lr_max=0.01, cbs=[checkpoint, blocks])
        for kind in KINDS:
            times[kind] += blocks.times[kind]
    return {
        "data": data,
        "bs": bs,
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


def as_markdown(all_found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# What checkpoints cost",
        "",
        f"{date.today()}; {cpu(torch.get_num_threads())}; python {platform.python_version()}, "
        f"torch {torch.__version__}. Medians of paired ratios, by `python benchmarks/checkpoints.py`.",
    ]
    for title, found in all_found.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", *_table(found)]
    return "\n".join(lines) + "\n"


def _table(found: dict[str, Any]) -> list[str]:
    titles = {"bare again": "nothing, again (the noise)", "checkpoint": f"a checkpoint every {EVERY} batches"}
    cells = {k: [f"{q[1]:.3f} | {q[0]:.3f} to {q[2]:.3f}" for q in (found["cpu"][k], found["wall"][k])] for k in titles}
    return [
        f"{found['data']}, batches of {found['bs']}, {found['batch_ms']:.1f} ms each alone; files of "
        f"{found['file_kb']:.0f} KB; {found['groups']} groups.",
        "",
        "| with | CPU time | quartiles | wall-clock time | quartiles |",
        "|---|---:|---:|---:|---:|",
        *(f"| {titles[kind]} | {' | '.join(cells[kind])} |" for kind in titles),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fits", type=int, default=2, help="trainings of each network; of the tiny one x 8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="a folder for checkpoints.md and checkpoints.json")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    random.seed(0)
    found = {}
    for title, (make_network, bs, times) in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[title] = measure(make_network, bs, chosen.fits * times, Path(folder))
    text = as_markdown(found)
    print(text)
    if chosen.out is not None:
        (chosen.out / "checkpoints.md").write_text(text)
        (chosen.out / "checkpoints.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
