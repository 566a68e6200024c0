"""What a step of an optimizer costs, beside torch's: 160 tensors with 25 million values on one thread.

A round runs every optimizer once, in random order, each directly beside the one that it is compared to, all on the same
parameters and gradients. Given are medians over the rounds, and the quartiles of the paired ratios.
"""

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import cpu, versions
from torch import nn

import learnloop as ll

N_TENSORS, SHAPE = 160, (400, 390)  # 24,960,000 values
LR = 1e-4
RESULTS = Path(__file__).parent / "results"


class Comparison(NamedTuple):
    section: str
    name: str
    step: Callable[[], Any]
    to: Callable[[], Any]


class Row(NamedTuple):
    """Times in ms; ratios of pairs of steps that ran side by side."""

    section: str
    name: str
    time: float
    ratio: float
    quartiles: tuple[float, float]


def parameters(n_tensors: int, shape: tuple[int, ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for _ in range(n_tensors)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def comparisons(params: list[nn.Parameter], peers: bool = True) -> list[Comparison]:
    """Every optimizer with the foreach form of torch's."""
    torch_adamw = torch.optim.AdamW(params, LR, foreach=True).step
    torch_sgd = torch.optim.SGD(params, LR, momentum=0.9, foreach=True).step
    torch_radam = torch.optim.RAdam(params, LR, foreach=True).step
    found = [
        Comparison("AdamW", "torch, foreach, again", torch.optim.AdamW(params, LR, foreach=True).step, torch_adamw),
        Comparison("AdamW", "torch, fused", torch.optim.AdamW(params, LR, fused=True).step, torch_adamw),
        Comparison("AdamW", "learnloop `Adam`", ll.Adam(params, LR).step, torch_adamw),
        Comparison("AdamW", "learnloop `Adam` of steppers", ll.Adam(params, LR, fused=False).step, torch_adamw),
        Comparison("SGD with momentum", "learnloop `SGD`", ll.SGD(params, LR, mom=0.9).step, torch_sgd),
        Comparison(
            "SGD with momentum", "learnloop `SGD` of steppers", ll.SGD(params, LR, mom=0.9, fused=False).step, torch_sgd
        ),
        Comparison("RAdam", "learnloop `RAdam`", ll.RAdam(params, LR, wd=0.0).step, torch_radam),
    ]
    return found + (_of_fastai(params, torch_adamw, torch_sgd, torch_radam) if peers else [])


def _of_fastai(params: list[nn.Parameter], adamw: Any, sgd: Any, radam: Any) -> list[Comparison]:
    if importlib.util.find_spec("fastai") is None:
        return []
    from fastai.optimizer import SGD, Adam, RAdam

    return [
        Comparison("AdamW", "fastai `Adam`", Adam(params, LR).step, adamw),
        Comparison("SGD with momentum", "fastai `SGD`", SGD(params, LR, mom=0.9).step, sgd),
        Comparison("RAdam", "fastai `RAdam`", RAdam(params, LR).step, radam),
    ]


def measure(todo: list[Comparison], rounds: int) -> list[Row]:
    for one in todo:
        one.step(), one.to()  # the first step makes the state
    pairs: list[list[tuple[float, float]]] = [[] for _ in todo]
    shuffle = random.Random(0).sample
    for _ in range(rounds):
        for i in shuffle(range(len(todo)), len(todo)):
            times = {which: timed(todo[i][which]) for which in shuffle((2, 3), 2)}
            pairs[i].append((times[2], times[3]))
    return [row_of(one, found) for one, found in zip(todo, pairs, strict=True)]


def timed(step: Callable[[], Any]) -> float:
    start = time.thread_time()  # not the wall's: other processes on the machine would be in it
    step()
    return (time.thread_time() - start) * 1e3


def row_of(one: Comparison, pairs: list[tuple[float, float]]) -> Row:
    ratios = [own / other for own, other in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    time_of_own = statistics.median(own for own, _ in pairs)
    return Row(one.section, one.name, time_of_own, statistics.median(ratios), (low, high))


def as_markdown(rows: list[Row], rounds: int) -> str:
    """The rows as a page of tables."""
    names = ", ".join(f"{name} {version}" for name, version in versions("fastai").items())
    lines = ["# What a step costs", "", f"{date.today().isoformat()}; {cpu()}; {names}; {rounds} rounds."]
    lines += ["", f"{N_TENSORS} tensors of {SHAPE[0]} by {SHAPE[1]} values; ratios to torch's foreach form."]
    for section in dict.fromkeys(row.section for row in rows):
        lines += ["", f"| {section} | ratio | quartiles | ms |", "|---|---:|---:|---:|"]
        for row in (row for row in rows if row.section == section):
            low, high = row.quartiles
            lines.append(f"| {row.name} | {row.ratio:.2f} | {low:.2f} to {high:.2f} | {row.time:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures optimizers beside torch's, and fastai's where installed.")
    parser.add_argument("--rounds", type=int, default=30, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FOLDER", nargs="?", const=RESULTS, help="where optimizers.md goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    page = as_markdown(measure(comparisons(parameters(N_TENSORS, SHAPE)), options.rounds), options.rounds)
    print(page, end="")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "optimizers.md").write_text(page)


if __name__ == "__main__":
    main()
