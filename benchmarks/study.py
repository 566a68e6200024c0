"""What label smoothing, mixup, EMA and one cycle are worth on Fashion-MNIST, each alone and every two together.

`ablate` trains 11 arms with the same seeds. An interrupted study goes on when it is started again; once everything is
there only the report is written anew.
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from networks import strided_net
from torch import Tensor, nn

import learnloop as ll

RESULTS = Path(__file__).parent / "results"
EPOCHS, LR, BS = 2, 0.01, 128


class LabelSmoothing(ll.Callback):
    """Trains with a smoothed cross entropy; validation keeps the learner's own loss."""

    run_before = ll.MixUp  # which wraps the loss that it finds

    def __init__(self, eps: float = 0.1):
        self.eps, self.former = eps, None

    def before_train(self) -> None:
        self.former, self.learn.loss_func = self.learn.loss_func, nn.CrossEntropyLoss(label_smoothing=self.eps)

    def cleanup_train(self) -> None:
        if self.former is not None:
            self.learn.loss_func, self.former = self.former, None


def one_cycle() -> ll.ParamScheduler:
    """The schedule of `fit_one_cycle`, as a callback like the others."""
    rate, moms = ll.combined_cos(0.25, LR / 25, LR, LR / 1e5), ll.combined_cos(0.25, 0.95, 0.85, 0.95)
    return ll.ParamScheduler({"lr": rate, "mom": moms})


CBS = {
    "label smoothing": LabelSmoothing,
    "mixup": partial(ll.MixUp, 0.2),
    "EMA": partial(ll.EMA, 0.99),
    "one cycle": one_cycle,
}


@cache
def images() -> tuple[Tensor, ...]:
    """All of Fashion-MNIST with mean 0 and deviation 1, read once per process."""
    data = ll.datasets.fashion_mnist()
    mean, std = data.x_train.mean(), data.x_train.std()
    return (data.x_train - mean) / std, data.y_train, (data.x_valid - mean) / std, data.y_valid


def make_learner() -> ll.Learner:
    """24,058 parameters, Adam at a rate of 0.01."""
    x_train, y_train, x_valid, y_valid = images()
    dls = ll.DataLoaders(
        ll.TensorLoader(x_train, y_train, bs=BS, shuffle=True), ll.TensorLoader(x_valid, y_valid, bs=1000), device="cpu"
    )
    return ll.Learner(dls, strided_net(), nn.CrossEntropyLoss(), metrics=ll.accuracy)


def study(path: Path, seeds: int, executor: Any = None) -> ll.Study:
    """Trains what is not in the file yet."""
    fit = ("fit", EPOCHS, LR)
    return ll.ablate(make_learner, CBS, fit, seeds, "accuracy", "pairs", executor, path)


def report(found: ll.Study) -> str:
    """Tables, and what can be said of them."""
    machine, n = found.about["environment"], len({t.seed for t in found.trials})
    about = f"{found.about['at'][:10]}; {machine['cpu']}, 1 thread a training; python {machine['python']}, torch "
    seconds = sum(t.seconds for t in found.trials)
    lines = [
        *("# What label smoothing, mixup, EMA and one cycle are worth", ""),
        f"{about}{machine['torch']}; {n} seeds; the trainings took {seconds / 60:.0f} minutes in all.",
        "",
        f"Accuracy in % on the 10,000 images for validation, after {EPOCHS} epochs on 60,000; a network of 24,058",
        f"parameters, Adam at a rate of {LR}. Made by `make study`, from [study.jsonl](study.jsonl).",
        "",
        "![differences and their intervals](study.png)",
        "",
        "| | mean | spread | difference to none | 95 % interval | |",
        "|---|---:|---:|---:|---|---|",
        *map(arm_line, found.rows),
        "",
        "What two do together beyond the sum of what each does alone:",
        "",
        "| | beyond the sum | 95 % interval | |",
        "|---|---:|---|---|",
        *(f"| {pair} | {100 * d.mean:+.2f} | {interval(d)} | {verdict(d)} |" for pair, d in found.interactions.items()),
        "",
        said(found),
    ]
    return "\n".join(lines) + "\n"


def arm_line(row: Any) -> str:
    numbers = f"| {row.arm} | {100 * row.mean:.2f} | {100 * row.spread:.2f}"
    d = row.difference
    return f"{numbers} | | | |" if d is None else f"{numbers} | {100 * d.mean:+.2f} | {interval(d)} | {verdict(d)} |"


def interval(d: Any) -> str:
    return f"{100 * d.low:+.2f} to {100 * d.high:+.2f}"


def verdict(d: Any) -> str:
    return "may be noise" if d.is_noise else ""


def said(found: ll.Study) -> str:
    """Which differences are more than noise, and how far that goes."""
    compared = [(row.arm, row.difference) for row in found.rows if row.difference is not None]
    groups = {
        "Better than none": [arm for arm, d in compared if d.low > 0],
        "Worse than none": [arm for arm, d in compared if d.high < 0],
        "Perhaps only noise": [arm for arm, d in compared if d.is_noise],
    }
    n = len(compared) + len(found.interactions)
    none, steadiest = found.rows[0], min(found.rows, key=lambda row: row.spread)
    found_out = [f"{title}: {', '.join(arms)}." for title, arms in groups.items() if arms]
    return "\n".join(
        [
            *found_out,
            "",
            f"Seeds spread by {100 * none.spread:.2f} without any of them, and by {100 * steadiest.spread:.2f} with "
            f"{steadiest.arm}. Every line is",
            "compared with the same trainings of none: one of those that is unusually good or bad is in all of them.",
            "",
            f"Each interval is that of its line by itself: of {n} that are nothing, one in twenty would miss 0, so a",
            "line whose interval only just misses it proves little. They tell of other seeds, not of other data: the",
            "images for validation are the same in every training. And they hold for this network, at this rate, after",
            f"{EPOCHS} epochs; mixup and label smoothing are made for trainings long enough to learn images by heart.",
        ]
    )


@contextmanager
def workers(n: int) -> Iterator[Any]:
    """Processes with a thread each, started afresh: a forked one may wait for threads that it has not got."""
    if n < 2:
        yield None
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n, spawn, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        yield executor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="trainings at once")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for study.jsonl, study.md and study.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "study.jsonl"
    with workers(options.workers) as executor:
        study(path, options.seeds, executor)
    found = ll.Study.read(path)  # with the day of its last training
    print(found)
    (options.out / "study.md").write_text(report(found))
    found.plot().savefig(options.out / "study.png", dpi=100)


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    main()
