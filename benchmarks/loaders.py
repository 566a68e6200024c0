"""Batches per second of `TensorLoader` with `BatchTransform`'s functions, beside a torch `DataLoader` over a dataset.

Images of 28 by 28 pixels in memory, each flipped and cropped at random: a batch at a time by ours, a sample at a time
in the dataset, without workers and with two. Both are iterated by hand and by a `Learner` whose network does nothing.
Wall-clock time, because workers compute beside; given are medians over the rounds.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from typing import Any

import overhead
import torch
from fastcore.basics import noop
from machine import cpu, versions
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import learnloop as ll

BS = 128
PADDING = 2
FUNCTIONS = (ll.transforms.flip, partial(ll.transforms.crop, padding=PADDING))


class Augmented(Dataset):
    """Samples, each flipped and cropped when it is asked for."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.x[i]
        if torch.rand(()) < 0.5:
            x = x.flip(-1)
        top, left = torch.randint(0, 2 * PADDING + 1, (2,)).tolist()
        padded = F.pad(x[None], (PADDING,) * 4, mode="reflect")[0]
        return padded[:, top : top + x.shape[1], left : left + x.shape[2]], self.y[i]


class Nothing(nn.Module):
    """A network whose output is one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


def first(pred: Tensor, y: Tensor) -> Tensor:
    """A loss that costs nothing."""
    return pred


def through_learner(train: Any, keyed: bool = True, cbs: Any = None) -> Callable[[], Any]:
    """An epoch of a fit that computes next to nothing."""
    dls = ll.DataLoaders(train, device="cpu", keyed=keyed)
    cbs = [ll.TrainEvalCallback(), ll.Recorder(), *([] if cbs is None else [cbs])]
    learn = ll.Learner(dls, Nothing(), first, torch.optim.SGD, cbs=cbs, default_cbs=False)
    learn.logger = noop
    return partial(learn.fit, 1)


def augmented_by_batch(loader: Iterable[Any]) -> Callable[[], Any]:
    def run() -> None:
        for x, _ in loader:
            for function in FUNCTIONS:
                x = function(x)

    return run


def iterated(loader: Iterable[Any]) -> Callable[[], Any]:
    def run() -> None:
        for _ in loader:
            pass

    return run


def makers(x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    """By the name of a row: one pass over all samples."""
    ours = partial(ll.TensorLoader, x, y, bs=BS, shuffle=True)
    found = {
        "TensorLoader and its functions, by hand": augmented_by_batch(ours()),
        "TensorLoader and BatchTransform, in a fit": through_learner(ours(), cbs=ll.BatchTransform(*FUNCTIONS)),
    }
    for n in (0, 2):
        theirs = partial(DataLoader, Augmented(x, y), batch_size=BS, shuffle=True, num_workers=n)
        name = f"torch DataLoader, {n} workers"
        found[f"{name}, by hand"] = iterated(theirs())
        found[f"{name}, in a fit, keyed"] = through_learner(theirs())
        found[f"{name}, in a fit, `keyed=False`"] = through_learner(theirs(), keyed=False)
    return found


@dataclass
class Row:
    """Batches per second: the median and the quartiles."""

    name: str
    rate: float
    quartiles: tuple[float, float]


def measure(runs: dict[str, Callable[[], Any]], n_batches: int, rounds: int) -> list[Row]:
    rates: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(0).sample
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name in shuffle(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            rates[name].append(n_batches / (time.perf_counter() - start))
    return [row_of(name, found) for name, found in rates.items()]


def row_of(name: str, rates: list[float]) -> Row:
    low, middle, high = statistics.quantiles(rates, n=4)
    return Row(name, middle, (low, high))


def report(rounds: int, n: int) -> dict[str, Any]:
    """Everything that is measured, as plain data."""
    x, y = torch.rand(n, 1, 28, 28), torch.arange(n) % 10
    rows = measure(makers(x, y), -(-n // BS), rounds)
    about = {"date": date.today().isoformat(), "cpu": cpu(), "versions": versions()}
    return {**about, "rounds": rounds, "samples": n, "rows": [asdict(row) for row in rows]}


def as_markdown(found: dict[str, Any]) -> str:
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = ["# What loaders yield", "", f"{found['date']}; {found['cpu']}; {names}; {found['rounds']} rounds."]
    lines += ["", f"{found['samples']:,} images of 28 by 28 pixels, batches of {BS}, flipped and cropped at random."]
    lines += ["", "| | batches per second | quartiles |", "|---|---:|---:|"]
    for row in (Row(**row) for row in found["rows"]):
        lines.append(f"| {row.name} | {row.rate:,.0f} | {row.quartiles[0]:,.0f} to {row.quartiles[1]:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = overhead.option_parser("Measures loaders with augmentation.", 20)
    parser.add_argument("--n", type=int, metavar="N", help="images, default 20,000, or 1,000 with --quick")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = options.rounds or (3 if options.quick else 20)
    found = report(rounds, options.n or (1_000 if options.quick else 20_000))
    overhead.publish("loaders", found, as_markdown(found), options)


if __name__ == "__main__":
    main()
