"""What a training loop costs over a hand-written one, in µs per batch of a network so small that nothing hides it.

A round runs every loop once, in random order, each paired with the loop it is compared to; what is given are medians
over the rounds, and the quartiles of the paired ratios. Time is CPU time of the one thread that computes.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastcore.basics import noop
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import learnloop as ll

N_BATCHES = 100  # in a pass: some 15 ms, short enough that both of a pair see the same machine
BS = 64
LR = 0.01
LISTENERS = 20
EVENTS = ("before_batch", "after_pred", "after_loss", "after_backward", "after_step", "after_batch")
RESULTS = Path(__file__).parent / "results"

loss_func = nn.CrossEntropyLoss()
clock = time.thread_time  # not the wall's: other processes on the machine would be in it


class Batches(list):
    """Batches made beforehand, and a stopwatch: `seconds` is what the last pass over them took."""

    start = seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        self.start = clock()
        yield from super().__iter__()
        self.stop()

    def stop(self) -> None:
        self.seconds = clock() - self.start


class Loop(NamedTuple):
    """A loop that is ready to run over its batches."""

    name: str
    run: Callable[[], Any]  # one pass
    batches: Batches | None  # None: the run as a whole is one number, instead of one per batch


def make_batches(n: int = N_BATCHES) -> Batches:
    g = torch.Generator().manual_seed(0)
    return Batches((torch.randn(BS, 10, generator=g), torch.randint(0, 2, (BS,), generator=g)) for _ in range(n))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))


def listeners(base: type) -> list[Any]:
    """Callbacks with an empty handler for each of EVENTS. Source for each: copies of one function would share code."""
    handlers = "".join(f"    def {event}(self): pass\n" for event in EVENTS)
    scope: dict[str, Any] = {"Base": base}
    for i in range(LISTENERS):
        exec(f"class Listener{i}(Base):\n{handlers}", scope)
    return [scope[f"Listener{i}"]() for i in range(LISTENERS)]


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


def learnloop_empty_fit(batches: Batches) -> Loop:
    return Loop("learnloop, `fit(0)`", partial(quiet_learner(batches).fit, 0), None)


def quiet_learner(batches: Batches, opt_func: Any = torch.optim.SGD, cbs: Any = None) -> ll.Learner:
    """With the default callbacks, the bar removed and rows printed nowhere; a fit validates one batch."""
    dls = ll.DataLoaders(batches, batches[:1], device="cpu")
    learn = ll.Learner(dls, network(), loss_func, opt_func, lr=LR, cbs=cbs, metrics=ll.accuracy)
    learn.remove_cb(ll.ProgressCallback)
    learn.logger = noop
    return learn


# The peers, where they are installed


def fastai(batches: Batches, name: str = "fastai, no bar", cbs: Any = None) -> Loop:
    return Loop(name, partial(fastai_learner(batches, cbs).fit, 1), batches)


def fastai_listening(batches: Batches) -> Loop:
    from fastai.basics import Callback

    return fastai(batches, f"fastai, {LISTENERS} more callbacks", listeners(Callback))


def fastai_validation(batches: Batches) -> Loop:
    return Loop("fastai, no bar", partial(fastai_learner(batches).validate, dl=batches), batches)


def fastai_empty_fit(batches: Batches) -> Loop:
    return Loop("fastai, `fit(0)`", partial(fastai_learner(batches).fit, 0), None)


def fastai_learner(batches: Batches, cbs: Any = None) -> Any:
    """As `quiet_learner`; fastai's bar comes with a module that is not imported here."""
    from fastai.basics import DataLoaders, Learner, OptimWrapper, accuracy, default_device

    default_device(False)  # the CPU; `DataLoaders(device=…)` would ask lists to move themselves
    opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    dls = DataLoaders(batches, batches[:1])
    learn = Learner(dls, network(), loss_func, opt_func, lr=LR, cbs=cbs, metrics=accuracy)
    learn.logger = noop
    return learn


def ignite(batches: Batches, name: str = "Ignite", handlers: Any = ()) -> Loop:
    from ignite.engine import Events, create_supervised_trainer

    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    kept = {"output_transform": lambda x, y, pred, loss: loss.detach()}  # its default reads the loss on the host
    trainer = create_supervised_trainer(model, opt, loss_func, **kept)
    moments = (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED)
    for i, handler in enumerate(handlers):
        trainer.add_event_handler((*moments, Events.ITERATION_COMPLETED)[i % 4], handler)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, batches.stop)  # it never asks for the end of its loader
    return Loop(name, partial(trainer.run, batches, max_epochs=1), batches)


def ignite_listening(batches: Batches) -> Loop:
    handlers = [getattr(cb, event) for event in EVENTS for cb in listeners(object)]
    return ignite(batches, f"Ignite, {len(handlers)} more handlers", handlers)


def ignite_validation(batches: Batches) -> Loop:
    from ignite.engine import Events, create_supervised_evaluator
    from ignite.metrics import Accuracy, Loss

    metrics = {"loss": Loss(loss_func), "accuracy": Accuracy()}
    evaluator = create_supervised_evaluator(network(), metrics=metrics)
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, batches.stop)
    return Loop("Ignite", partial(evaluator.run, batches), batches)


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


def comparisons(peers: bool = True) -> list[Comparison]:
    """Every loop with the one that it is compared to."""
    data = make_batches()
    more = f"{LISTENERS} more callbacks"
    hand, ours, validation = hand_written(data), learnloop(data), hand_written_validation(data)
    return [
        Comparison("train", hand_written(data)._replace(name="hand-written, again"), hand),
        Comparison("train", keeping_losses(data), hand),
        Comparison("train", ours, hand),
        Comparison("train", learnloop(data, "learnloop, its own fused SGD", ll.SGD), hand),
        Comparison(more, calling_handlers(data), hand),
        Comparison(more, learnloop(data, f"learnloop, {more}", cbs=listeners(ll.Callback)), ours),
        Comparison("validate", learnloop_validation(data), validation),
        Comparison("begin and end", learnloop_empty_fit(data), hand),
        *(_of_ignite(data, hand, validation, more) if peers and is_installed("ignite") else []),
        *(_of_fastai(data, hand, validation, more) if peers and is_installed("fastai") else []),
    ]


def _of_ignite(data: Batches, hand: Loop, validation: Loop, more: str) -> list[Comparison]:
    trainer = ignite(data)
    return [
        Comparison("train", trainer, hand),
        Comparison(more, ignite_listening(data), trainer),
        Comparison("validate", ignite_validation(data), validation),
    ]


def _of_fastai(data: Batches, hand: Loop, validation: Loop, more: str) -> list[Comparison]:
    learner = fastai(data)
    return [
        Comparison("train", learner, hand),
        Comparison(more, fastai_listening(data), learner),
        Comparison("validate", fastai_validation(data), validation),
        Comparison("begin and end", fastai_empty_fit(data), hand),
    ]


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


def all_host_reads(peers: bool = True) -> dict[str, float]:
    makers = {"learnloop, train": learnloop, "learnloop, validate": learnloop_validation}
    if peers and is_installed("ignite"):
        makers |= {"Ignite, train": ignite, "Ignite, validate": ignite_validation}
    if peers and is_installed("fastai"):
        makers |= {"fastai, train": fastai, "fastai, validate": fastai_validation}
    return {name: host_reads(make) for name, make in makers.items()}


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# Showing


def report(rounds: int, peers: bool) -> dict[str, Any]:
    """Everything that is measured, as plain data."""
    rows = measure(comparisons(peers), rounds)
    return {
        "date": date.today().isoformat(),
        "cpu": f"{os.cpu_count()} cores {platform.machine().replace('_', '-')}, 1 thread used",
        "versions": {"python": platform.python_version(), **versions()},
        "rounds": rounds,
        "rows": [asdict(row) for row in rows],
        "host_reads_per_batch": all_host_reads(peers),
    }


def versions() -> dict[str, str]:
    packages = [name for name in ("torch", "pytorch-ignite", "fastai") if is_installed(name.removeprefix("pytorch-"))]
    return {name: metadata.version(name) for name in packages}


def as_markdown(found: dict[str, Any]) -> str:
    """The report as a page of tables."""
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = ["# What the loop costs", "", f"{found['date']}; {found['cpu']}; {names}; {found['rounds']} rounds."]
    for section in dict.fromkeys(row["section"] for row in found["rows"]):
        lines += ["", *_table(section, [Row(**row) for row in found["rows"] if row["section"] == section])]
    lines += ["", "| tensors brought to the host | per batch |", "|---|---|"]
    lines += [f"| {name} | {count:g} |" for name, count in found["host_reads_per_batch"].items()]
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
    options = option_parser("Measures the loop beside a hand-written one, Ignite and fastai.", 300).parse_args()
    torch.set_num_threads(1)
    found = report(options.rounds or (20 if options.quick else 300), peers=not options.quick)
    publish("overhead", found, as_markdown(found), options)


def publish(name: str, found: dict[str, Any], page: str, options: argparse.Namespace, to_files: bool = True) -> None:
    """Prints a report, and writes it as a page and as JSON where the options say so."""
    data = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    print(data if options.json else page, end="")
    folder = options.out or (RESULTS if to_files and not options.quick else None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(page)
        (folder / f"{name}.json").write_text(data)


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
