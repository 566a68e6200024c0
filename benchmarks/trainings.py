"""Whole trainings beside the hand-written loop: time per epoch, memory at most, and what is left of them in memory.

Three tasks: a tiny network, convolutions on Fashion-MNIST, an LSTM on English text. All loops have the same network,
samples, loss and plain torch optimizer, and validate after each epoch with loss and accuracy. Times are CPU time of the
process, in rounds that run every loop once, in random order, next to the hand-written one; given are medians of the
paired ratios and their quartiles. Memory is that of processes of their own.
"""

import argparse
import gc
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import overhead
import peers
import torch
from fastcore.basics import noop
from loops import Job, right
from machine import cpu, versions
from networks import strided_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import learnloop as ll

N_VALID = 6  # of how many samples one is for validation

# The tasks


class Task(NamedTuple):
    """Samples in memory and what learns from them."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    make_model: Callable[[], nn.Module]
    bs: int
    opt_func: Any
    lr: float

    def job(self, n_epoch: int, loader: Callable[..., Any]) -> Job:
        torch.manual_seed(0)
        train, valid = loader(*self.train, bs=self.bs, shuffle=True), loader(*self.valid, bs=2 * self.bs)
        return Job(self.make_model(), nn.CrossEntropyLoss(), train, valid, self.opt_func, self.lr, n_epoch)


def torch_loader(x: Tensor, y: Tensor, bs: int, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=bs, shuffle=shuffle)


def tiny(n: int | None) -> Task:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n or 12_800, 10, generator=g)
    return Task(*split(x, (x.sum(1) > 0).long()), tiny_network, 64, torch.optim.SGD, 0.01)


def tiny_network() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))


def images(n: int | None) -> Task:
    """Fashion-MNIST, or random images of its shape where it is not there."""
    try:
        data = ll.datasets.fashion_mnist(download=False)
        x, y = (data.x_train - 0.286) / 0.353, data.y_train
    except OSError:
        x, y = torch.rand(60_000, 1, 28, 28), torch.arange(60_000) % 10
    return Task(*split(x[: n or 12_000], y[: n or 12_000]), strided_net, 64, torch.optim.SGD, 0.05)


def text(n: int | None) -> Task:
    """The documentation of python's language: from 32 words each time the ones that follow."""
    words = re.findall(r"\n|\w+|[^\w\s]", " ".join(topics[name].lower() for name in sorted(topics)))
    numbers = {word: i for i, (word, _) in enumerate(Counter(words).most_common(1000), 1)}  # 0: all others
    ids = torch.tensor([numbers.get(word, 0) for word in words[: 32 * (n or 2400) + 1]])
    x, y = ids[:-1].view(-1, 32), ids[1:].view(-1, 32)
    return Task(*split(x, y), LanguageModel, 32, torch.optim.Adam, 0.003)


class LanguageModel(nn.Module):
    """Scores for the next word at each place of (samples, words): (samples, 1001, words)."""

    def __init__(self, n_words: int = 1001, width: int = 64):
        super().__init__()
        self.words = nn.Embedding(n_words, width)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.scores = nn.Linear(width, n_words)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.rnn(self.words(x))[0]).transpose(1, 2)


def split(x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    n = len(x) // N_VALID
    return (x[n:], y[n:]), (x[:n], y[:n])


TASKS: dict[str, Callable[[int | None], Task]] = {"tiny network": tiny, "Fashion-MNIST": images, "LSTM on text": text}

# The loops


def by_hand(job: Job) -> Callable[[], Any]:
    model, opt = job.model, job.optimizer()

    def run() -> None:
        for _ in range(job.n_epoch):
            model.train()
            for x, y in job.train:
                loss = job.loss_func(model(x), y)
                loss.backward()
                opt.step()
                opt.zero_grad()
            validate_by_hand(job)

    return run


def validate_by_hand(job: Job) -> tuple[float, float]:
    job.model.eval()
    loss, n_right, count = torch.tensor(0.0), torch.tensor(0), 0
    with torch.no_grad():
        for x, y in job.valid:
            pred = job.model(x)
            loss += job.loss_func(pred, y) * y.numel()
            n_right += right(pred, y).sum()
            count += y.numel()
    return loss.item() / count, n_right.item() / count


def learnloop(job: Job) -> Callable[[], Any]:
    """With the default callbacks but the bar, and rows printed nowhere."""
    dls = ll.DataLoaders(job.train, job.valid, device="cpu")
    metric = partial(ll.accuracy, axis=1)
    learn = ll.Learner(dls, job.model, job.loss_func, job.opt_func, lr=job.lr, metrics=metric)
    learn.remove_cb(ll.ProgressCallback)
    learn.logger = noop
    return partial(learn.fit, job.n_epoch)


BY_HAND = "hand-written"
OURS = {
    BY_HAND: (by_hand, torch_loader),
    "hand-written, again": (by_hand, torch_loader),
    "learnloop": (learnloop, torch_loader),
    "learnloop, TensorLoader": (learnloop, ll.TensorLoader),
}


def makers(found: Iterable[peers.Peer] = ()) -> dict[str, Callable[[Task, int], Callable[[], Any]]]:
    """By the name of a loop: from a task and epochs a function that trains."""
    loops = {**OURS, **{peer.name: (peer.train, torch_loader) for peer in found}}
    return {name: partial(_made, make, loader) for name, (make, loader) in loops.items()}


def _made(make: Callable[[Job], Any], loader: Callable[..., Any], task: Task, n_epoch: int) -> Callable[[], Any]:
    return make(task.job(n_epoch, loader))


# Times


@dataclass
class Row:
    """What came out for one loop and task. Seconds and ratios per epoch; memory in MB, see `alone`."""

    task: str
    name: str
    seconds: float
    ratio: float
    quartiles: tuple[float, float]
    memory: dict[str, float] | None = None


def measure(title: str, task: Task, rounds: int, epochs: int, with_peers: bool = True) -> list[Row]:
    """Every loop beside the hand-written one. Each round goes on with the same networks."""
    runs = {name: make(task, epochs) for name, make in makers(peers.installed() if with_peers else ()).items()}
    for run in runs.values():
        run()  # the first one makes optimizers and warms up
    gc.collect()
    gc.freeze()
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in runs if name != BY_HAND}
    shuffle = random.Random(0).sample
    for _ in range(rounds):
        for name in shuffle(list(pairs), len(pairs)):
            times = {one: timed(runs[one]) / epochs for one in shuffle([name, BY_HAND], 2)}
            pairs[name].append((times[name], times[BY_HAND]))
    gc.unfreeze()
    hand = [(seconds, seconds) for found in pairs.values() for _, seconds in found]
    return [row_of(title, name, found) for name, found in {BY_HAND: hand, **pairs}.items()]


def timed(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def row_of(title: str, name: str, pairs: list[tuple[float, float]]) -> Row:
    ratios = [own / other for own, other in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Row(title, name, statistics.median(own for own, _ in pairs), statistics.median(ratios), (low, high))


# Memory, in a process per loop


def alone(title: str, name: str, epochs: int, n: int | None) -> dict[str, float]:
    """MB at most; tensors that are there after the training and were not before, and the MB in them."""
    make = makers(peer for peer in peers.PEERS if peer.name == name and peer.is_installed)[name]
    run = make(TASKS[title](n), epochs)
    gc.collect()
    count, size = tensors()
    run()
    gc.collect()
    after = tensors()
    return {"peak": peak_mb(), "tensors": after[0] - count, "kept": after[1] - size}


def peak_mb() -> float:
    """The most memory that this process had. `ru_maxrss` begins with that of the process which started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def tensors() -> tuple[int, float]:
    """How many there are, and the MB that they hold."""
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]  # no fake ones of a compiler
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return len(found), sum(storages.values()) / 1e6


def in_a_process(title: str, name: str, epochs: int, n: int | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--alone", title, name, "--epochs", str(epochs)]
    done = subprocess.run([*command, *(["--n", str(n)] if n else [])], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"`{' '.join(command)}` failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# Showing


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, as plain data."""
    rounds = options.rounds or (2 if options.quick else 15)
    rows = [row for title in TASKS if options.only in title for row in rows_of(title, rounds, options)]
    return {
        "date": date.today().isoformat(),
        "cpu": cpu(),
        "versions": {**versions(), **({} if options.quick else {p.package: p.version for p in peers.installed()})},
        "rounds": rounds,
        "epochs": options.epochs,
        "rows": [asdict(row) for row in rows],
        "not measured": {} if options.quick else peers.missing(),
    }


def rows_of(title: str, rounds: int, options: argparse.Namespace) -> list[Row]:
    with peers.silent():
        rows = measure(title, TASKS[title](options.n), rounds, options.epochs, with_peers=not options.quick)
    if not options.quick:
        for row in rows[:1] + rows[2:]:  # the second is the hand-written loop again
            row.memory = in_a_process(title, row.name, options.epochs, options.n)
    return rows


def as_markdown(found: dict[str, Any]) -> str:
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rounds = f"{found['rounds']} rounds of {found['epochs']} epochs"
    lines = ["# What trainings take", "", f"{found['date']}; {found['cpu']}; {names}; {rounds}."]
    rows = [Row(**row) for row in found["rows"]]
    for title in dict.fromkeys(row.task for row in rows):
        lines += ["", *_table(title, [row for row in rows if row.task == title])]
    lines += [f"\nNot measured: {name} ({reason})." for name, reason in found["not measured"].items()]
    return "\n".join(lines) + "\n"


def _table(title: str, rows: list[Row]) -> list[str]:
    titles = ["ratio", "quartiles", "s per epoch", "MB at most", "tensors left", "MB in them"]
    lines = [f"| {title} | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for row in rows:
        quartiles = f"{row.quartiles[0]:.2f} to {row.quartiles[1]:.2f}"
        cells = [f"{row.ratio:.3f}", "" if row.name == BY_HAND else quartiles, f"{row.seconds:.3f}"]
        cells += [""] * 3 if row.memory is None else _cells_of(row.memory)
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def _cells_of(memory: dict[str, float]) -> list[str]:
    return [
        f"{memory['peak']:.0f}",
        f"{memory['tensors']:.0f}",
        f"{memory['kept']:.2f}",
    ]


def main() -> None:
    parser = overhead.option_parser("Measures whole trainings beside hand-written ones and the peers.", 15)
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="of each training, default 2")
    parser.add_argument("--n", type=int, metavar="N", help="so many samples only")
    parser.add_argument("--only", default="", metavar="TASK", help="tasks whose name has this in it; writes no files")
    parser.add_argument("--alone", nargs=2, metavar=("TASK", "LOOP"), help="the memory of this one, in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        with peers.silent():
            print(json.dumps(alone(*options.alone, options.epochs, options.n)))
        return
    found = report(options)
    overhead.publish("trainings", found, as_markdown(found), options, to_files=not options.only)


if __name__ == "__main__":
    main()
