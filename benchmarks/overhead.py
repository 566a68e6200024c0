"""What a training loop costs over a hand-written one, in µs per batch of a network so small that nothing hides it.

A round runs every loop once, in random order, each paired with the loop it is compared to; what is given are medians
over the rounds, and the quartiles of the paired ratios. Time is CPU time of the one thread that computes. Each library
is measured in a process of its own, as its users run it.
"""

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import random
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peers as others
import torch
from fastcore.basics import noop
from fastcore.foundation import L
from loops import BS as BS
from loops import EVENTS, LISTENERS, LR, Batches, Loop, clock, listeners, loss_func, make_batches, network, tiny_job
from loops import N_BATCHES as N_BATCHES
from machine import cpu, versions
from torch.utils._python_dispatch import TorchDispatchMode

import learnloop as ll

RESULTS = Path(__file__).parent / "results"

PASS = 1200  # batches of a pass: after some 20 the caches are warm again; kept losses are put together every 1024
N_FITS = 20

# By hand


def hand_written(batches: Batches) -> Loop:
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=LR)

    def run() -> None:
        for x, y in batches:
            loss = loss_func(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()

    return Loop("hand-written", run, batches)


def keeping_losses(batches: Batches) -> Loop:
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=LR)

    def run() -> None:
        losses = []
        for x, y in batches:
            loss = loss_func(model(x), y)
            losses.append(loss.detach())
            loss.backward()
            opt.step()
            opt.zero_grad()

    return Loop("hand-written, keeping its losses", run, batches)


def calling_handlers(batches: Batches) -> Loop:
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    handlers = [getattr(cb, event) for event in EVENTS for cb in listeners(object)]

    def run() -> None:
        for x, y in batches:
            loss = loss_func(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            for handler in handlers:
                handler()

    return Loop(f"hand-written, calling {len(handlers)} methods in a `for`", run, batches)


def hand_written_validation(batches: Batches) -> Loop:
    model = network()

    def run() -> tuple[float, float]:
        model.eval()
        loss, right, count = torch.tensor(0.0), torch.tensor(0), 0
        with torch.no_grad():
            for x, y in batches:
                pred = model(x)
                loss += loss_func(pred, y) * len(y)
                right += (pred.argmax(dim=-1) == y).sum()
                count += len(y)
        return loss.item() / count, right.item() / count

    return Loop("hand-written", run, batches)


# learnloop


def learnloop(batches: Batches, name: str = "learnloop", opt_func: Any = torch.optim.SGD, cbs: Any = None) -> Loop:
    return Loop(name, partial(quiet_learner(batches, opt_func, cbs).fit, 1), batches)


def learnloop_validation(batches: Batches) -> Loop:
    return Loop("learnloop", partial(quiet_learner(batches).validate, dl=batches), batches)


def empty_fits(name: str, learn: Any) -> Loop:
    """One after another, as the batches that they are compared to; each is counted as a batch."""
    fits = Batches(range(N_FITS))

    def run() -> None:
        for _ in fits:
            learn.fit(0)

    return Loop(f"{name}, `fit(0)`", run, fits)


def learnloop_with_bar(batches: Batches) -> Loop:
    """Everything that a plain `fit` shows, drawn for a terminal that is not there."""
    learn = quiet_learner(batches, cbs=ll.ProgressCallback())
    learn.logger = print

    def run() -> None:
        with drawing():
            learn.fit(1)

    return Loop("learnloop, with the progress bar", run, batches)


class Terminal(io.TextIOWrapper):
    """Says that it is one, so that bars are drawn, and shows nothing."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    with open(os.devnull, "wb") as nowhere, Terminal(nowhere) as terminal, contextlib.redirect_stdout(terminal):
        yield


def quiet_learner(batches: Batches, opt_func: Any = torch.optim.SGD, cbs: Any = None) -> ll.Learner:
    """With the default callbacks but the bar, and rows printed nowhere; a fit validates one batch."""
    dls = ll.DataLoaders(batches, batches[:1], device="cpu")
    cbs = [ll.TrainEvalCallback(), ll.Recorder(), *L(cbs)]
    learn = ll.Learner(dls, network(), loss_func, opt_func, lr=LR, cbs=cbs, metrics=ll.accuracy, default_cbs=False)
    learn.logger = noop
    return learn


# The peers, where they are installed


def of_peer(peer: others.Peer, batches: Batches, n_listeners: int = 0) -> Loop:
    job = tiny_job(batches, valid=Batches(batches[:1]), listeners=n_listeners)
    name = f"{peer.name}, {n_listeners} more callbacks" if n_listeners else peer.name
    return Loop(name, peer.train(job), batches)


def validation_of_peer(peer: others.Peer, batches: Batches) -> Loop:
    assert peer.validate is not None
    return Loop(peer.name, peer.validate(tiny_job(Batches(batches[:1]), valid=batches)), batches)


# Measuring


@dataclass
class Row:
    """What came out for one loop, beside the one it is compared to. Times in µs, per batch of a pass."""

    section: str
    name: str
    time: float
    over: float  # median of the paired differences
    ratio: float  # median of the paired ratios
    quartiles: tuple[float, float]  # of the paired ratios
    beside: float | None  # what a pass takes outside of its batches, in µs; None where the run is one number


class Comparison(NamedTuple):
    section: str
    loop: Loop
    to: Loop


def comparisons(peer: others.Peer | None = None) -> list[Comparison]:
    """Every loop with the one that it is compared to: ours, or those of a peer."""
    data = make_batches(PASS)
    more = f"{LISTENERS} more callbacks"
    hand, validation = hand_written(data), hand_written_validation(data)
    if peer is not None:
        return _of_peer(peer, data, hand, validation, more)
    ours = learnloop(data)
    return [
        Comparison("train", hand_written(data)._replace(name="hand-written, again"), hand),
        Comparison("train", keeping_losses(data), hand),
        Comparison("train", ours, hand),
        Comparison("train", learnloop_with_bar(data), hand),
        Comparison("train", learnloop(data, "learnloop, its own fused SGD", ll.SGD), hand),
        Comparison(more, calling_handlers(data), hand),
        Comparison(more, learnloop(data, f"learnloop, {more}", cbs=listeners(ll.Callback)), ours),
        Comparison("validate", learnloop_validation(data), validation),
        Comparison("begin and end", empty_fits("learnloop", quiet_learner(data)), hand),
    ]


SECTIONS = ("train", f"{LISTENERS} more callbacks", "validate", "begin and end")


def _of_peer(peer: others.Peer, data: Batches, hand: Loop, validation: Loop, more: str) -> list[Comparison]:
    plain = of_peer(peer, data)
    found = [Comparison("train", plain, hand)]
    if peer.n_handlers:
        found.append(Comparison(more, of_peer(peer, data, LISTENERS), plain))
    if peer.validate is not None:
        found.append(Comparison("validate", validation_of_peer(peer, data), validation))
    if peer.name == "fastai":
        learn = others.fastai_learner(tiny_job(data, valid=Batches(data[:1])))
        found.append(Comparison("begin and end", empty_fits("fastai", learn), hand))
    return found


def measure(todo: list[Comparison], rounds: int) -> list[Row]:
    for _, loop, to in todo:
        loop.run(), to.run()  # the first pass makes optimizers and warms up
    gc.collect()
    gc.freeze()  # a collection during one loop would otherwise go over the objects of all of them
    pairs: list[list[tuple[Any, Any]]] = [[] for _ in todo]
    shuffle = random.Random(0).sample
    for _ in range(rounds):
        for i in shuffle(range(len(todo)), len(todo)):
            times = {which: timed(todo[i][which]) for which in shuffle((1, 2), 2)}
            pairs[i].append((times[1], times[2]))
    gc.unfreeze()
    return [row_of(comparison, found) for comparison, found in zip(todo, pairs, strict=True)]


def timed(loop: Loop) -> tuple[float, float | None]:
    """µs per batch, and µs that the pass took outside of them."""
    start = clock()
    loop.run()
    whole = (clock() - start) * 1e6
    if loop.batches is None:
        return whole, None
    inside = loop.batches.seconds * 1e6
    return inside / len(loop.batches), whole - inside


def row_of(comparison: Comparison, pairs: list[tuple[Any, Any]]) -> Row:
    own, other = [ours[0] for ours, _ in pairs], [others[0] for _, others in pairs]
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    beside = [ours[1] for ours, _ in pairs if ours[1] is not None]
    return Row(
        section=comparison.section,
        name=comparison.loop.name,
        time=statistics.median(own),
        over=statistics.median(a - b for a, b in zip(own, other, strict=True)),
        ratio=statistics.median(ratios),
        quartiles=(low, high),
        beside=statistics.median(beside) if beside else None,
    )


class HostReads(TorchDispatchMode):
    """Counts tensors that are brought to the host, as `.item()` and `float()` do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_reads(make: Callable[[Batches], Loop]) -> float:
    """Tensors brought to the host per batch: what a longer pass reads more than a shorter one."""
    return (_reads_of(make(make_batches(30))) - _reads_of(make(make_batches(10)))) / 20


def _reads_of(loop: Loop) -> int:
    with HostReads() as reads:
        loop.run()
    return reads.count


def all_host_reads(peer: others.Peer | None = None) -> dict[str, float]:
    """Those of our loops, or of a peer's."""
    makers: dict[str, Callable[[Batches], Loop]] = {}
    if peer is None:
        makers = {"learnloop, train": learnloop, "learnloop, validate": learnloop_validation}
    else:
        makers[f"{peer.name}, train"] = partial(of_peer, peer)
        if peer.validate is not None:
            makers[f"{peer.name}, validate"] = partial(validation_of_peer, peer)
    return {name: host_reads(make) for name, make in makers.items()}


def measured(name: str | None, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """The rows of one library, and its host reads; None: of learnloop."""
    torch.set_num_threads(1)
    peer = None if name is None else next(peer for peer in others.PEERS if peer.name == name and peer.is_installed)
    with others.silent():
        return measure(comparisons(peer), rounds), all_host_reads(peer)


# Showing


def report(rounds: int, peers: bool) -> dict[str, Any]:
    """Everything that is measured, as plain data."""
    rows, reads = measured(None, rounds)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as processes:
        for peer in others.installed() if peers else []:
            their_rows, their_reads = processes.submit(measured, peer.name, max(10, rounds // 4)).result()
            rows, reads = rows + their_rows, {**reads, **their_reads}
    return {
        "date": date.today().isoformat(),
        "cpu": cpu(),
        "versions": {**versions(), **({peer.package: peer.version for peer in others.installed()} if peers else {})},
        "rounds": rounds,
        "rows": [asdict(row) for row in sorted(rows, key=lambda row: SECTIONS.index(row.section))],
        "host_reads_per_batch": reads,
        "not measured": others.missing() if peers else {},
    }


def as_markdown(found: dict[str, Any]) -> str:
    """The report as a page of tables."""
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rounds = f"{found['rounds']} rounds, a quarter of them for the peers"
    lines = ["# What the loop costs", "", f"{found['date']}; {found['cpu']}; {names}; {rounds}."]
    for section in dict.fromkeys(row["section"] for row in found["rows"]):
        lines += ["", *_table(section, [Row(**row) for row in found["rows"] if row["section"] == section])]
    lines += ["", "| tensors brought to the host | per batch |", "|---|---|"]
    lines += [f"| {name} | {count:g} |" for name, count in found["host_reads_per_batch"].items()]
    lines += [f"\nNot measured: {name} ({reason})." for name, reason in found["not measured"].items()]
    return "\n".join(lines) + "\n"


def _table(section: str, rows: list[Row]) -> list[str]:
    titles = ["ratio", "quartiles", "µs over", "µs", "µs beside the batches"]
    lines = [f"| {section} | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for row in rows:
        beside = "" if row.beside is None else f"{row.beside:.0f}"
        quartiles = f"{row.quartiles[0]:.2f} to {row.quartiles[1]:.2f}"
        lines.append(f"| {row.name} | {row.ratio:.3f} | {quartiles} | {row.over:.1f} | {row.time:.1f} | {beside} |")
    return lines


def main() -> None:
    options = option_parser("Measures the loop beside a hand-written one and the peers.", 80).parse_args()
    found = report(options.rounds or (20 if options.quick else 80), peers=not options.quick)
    folder = publish("overhead", found, as_markdown(found), options)
    if folder is not None:
        draw(found, folder / "overhead.png")


def draw(found: dict[str, Any], path: Path) -> None:
    """A bar for each loop: µs per training batch over the hand-written one."""
    from matplotlib.figure import Figure

    rows = [Row(**row) for row in found["rows"] if row["section"] == "train"][:1:-1]  # from below; by hand is 0
    figure = Figure(figsize=(8, 0.5 + 0.4 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    colors = ["#2b6cb0" if row.name.startswith("learnloop") else "#a0aec0" for row in rows]
    axes.barh([row.name for row in rows], [row.over for row in rows], color=colors)
    for i, row in enumerate(rows):  # to the right of the bars, also of those that end left of 0
        text = f"{row.over:+.0f} µs, {row.ratio:.2f} times"
        axes.annotate(text, (max(row.over, 0), i), xytext=(4, 0), textcoords="offset points", va="center")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.35)
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("µs per batch over the hand-written loop")
    figure.supxlabel(f"{found['date']}; {found['cpu']}; torch {found['versions']['torch']}", fontsize="x-small")
    figure.savefig(path)


def publish(
    name: str, found: dict[str, Any], page: str, options: argparse.Namespace, to_files: bool = True
) -> Path | None:
    """Prints a report, writes it as a page and as JSON where the options say so, and returns that folder."""
    data = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    print(data if options.json else page, end="")
    folder = options.out or (RESULTS if to_files and not options.quick else None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(page)
        (folder / f"{name}.json").write_text(data)
    return folder


def option_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """What benchmarks with rounds have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, metavar="N", help=f"{rounds}, or 20 with --quick")
    parser.add_argument("--quick", action="store_true", help="few rounds, no peers, no files unless --out says where")
    parser.add_argument("--json", action="store_true", help="print JSON, no tables")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the page and the JSON go")
    return parser


if __name__ == "__main__":
    main()
