"""Real SIGINTs at random moments of a fit: does every cleanup run once, can the learner be used, is a resume exact?

    python benchmarks/interrupts.py [count]

A thread sends the signals with `os.kill`, to data workers too, as a terminal does. In a third of the runs two workers
read the data; in a third of all runs a second signal follows the first within milliseconds. Runs are made until `count`
fits were hit: a signal that comes before the fit has begun, or after it has ended, is not counted.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from learnloop import Callback, DataLoaders, Learner, Recorder, TrainEvalCallback

SPANS = ("fit", "epoch", "train", "validate", "batch", "backward", "step")
X, Y = torch.randn(256, 16, generator=torch.Generator().manual_seed(1)), torch.arange(256) % 4
TWO_WITHIN = 0.003  # seconds from the first signal to the second, at most
MISSED = ("ended before the signal", "signal outside of the fit")


class Noisy(Dataset):
    """Samples that differ every time they are read."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X[i] + 0.1 * torch.randn(16) + 0.1 * np.random.randn(), Y[i]


class Ledger(Callback):
    """Keeps books on spans: what `before_X` opened, `cleanup_X` closes, once and innermost first."""

    order = -1000

    def __init__(self) -> None:
        self.is_open: list[str] = []
        self.unopened = 0  # cleanups of a span whose `before_X` was cut before it came here
        self.wrong: list[str] = []

    def opens(self, span: str) -> None:
        self.is_open.append(span)

    def closes(self, span: str) -> None:
        busy_until = time.perf_counter() + 2e-4  # long enough for a second signal to fall into
        while time.perf_counter() < busy_until:
            pass
        if self.is_open[-1:] == [span]:
            self.is_open.pop()
        elif span in self.is_open:
            self.wrong.append(f"cleanup_{span} came before that of {self.is_open[-1]}")
        else:
            self.unopened += 1

    def problems(self, allowed: int) -> list[str]:
        """What is wrong with the books at the end of a run, with so many cleanups allowed that nothing opened."""
        never = [f"cleanup_{span} never ran" for span in self.is_open]
        twice = ["a cleanup ran twice"] if self.unopened > allowed else []
        return [*self.wrong, *never, *twice]


for _span in SPANS:
    setattr(Ledger, f"before_{_span}", lambda self, span=_span: self.opens(span))
    setattr(Ledger, f"cleanup_{_span}", lambda self, span=_span: self.closes(span))


class Shooter:
    """Sends SIGINT to this process and its children, so many seconds after `start`."""

    def __init__(self, *delays: float):
        self.thread = threading.Thread(target=self._shoot, args=(delays,), daemon=True)

    def _shoot(self, delays: tuple[float, ...]) -> None:
        for delay in delays:
            time.sleep(delay)
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    def wait(self) -> None:
        """Until all signals are sent, and those that came too late for the fit are spent."""
        is_pending = True
        while is_pending:
            try:
                self.thread.join()
                time.sleep(0.01)  # sent is not yet received
                is_pending = False
            except KeyboardInterrupt:
                pass


def make_learner(n_workers: int) -> Learner:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    train = DataLoader(Noisy(), 16, shuffle=True, num_workers=n_workers)
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 4))
    cbs = [TrainEvalCallback(), Recorder(), Ledger()]
    dls = DataLoaders(train, DataLoader(Noisy(), 64))
    learn = Learner(dls, model, nn.CrossEntropyLoss(), cbs=cbs, default_cbs=False)
    learn.logger = lambda row: None
    return learn


def train(learn: Learner) -> None:
    learn.fit_one_cycle(2, 0.05)


def outcome(learn: Learner) -> Any:
    """Weights and losses."""
    return [p.clone() for p in learn.model.state_dict().values()], learn.recorder.raw_losses


def is_same(a: Any, b: Any) -> bool:
    """To the bit."""
    return all(map(torch.equal, a[0], b[0])) and a[1] == b[1]


def one_run(n_workers: int, delays: list[float], expected: Any) -> tuple[str, list[str]]:
    """How a fit ended that was shot at after these delays, and what was wrong with it."""
    learn, shooter = make_learner(n_workers), Shooter(*delays)
    how = _shot_at(learn, shooter)
    shooter.wait()
    problems = learn.ledger.problems(allowed=len(delays) - 1) + _left_behind(learn)
    learn.ledger.unopened = 0
    if how == "stopped":
        learn.resume()
    if how not in ("cut by the second", MISSED[1]) and not is_same(outcome(learn), expected):
        problems.append("other weights or losses than without a signal")
    learn.fit(1)
    return how, problems + learn.ledger.problems(allowed=0) + _left_behind(learn)


def _shot_at(learn: Learner, shooter: Shooter) -> str:
    """How a fit ended; a second signal may come when the first has already left it."""
    try:
        try:
            shooter.thread.start()
            train(learn)
            how = MISSED[0]
        except KeyboardInterrupt as interrupt:
            how = _kind_of(interrupt)
        shooter.wait()
    except KeyboardInterrupt as late:
        how = _kind_of(late.__context__ or late)
    return how


def _kind_of(interrupt: BaseException) -> str:
    text = str(interrupt)
    if "`learn.resume()`" in text:
        return "stopped"
    if "ending already" in text:
        return "came at the very end"
    return "cut by the second" if "second Ctrl-C" in text else MISSED[1]


def _left_behind(learn: Learner) -> list[str]:
    """What a run must not leave, however it ended."""
    left = {
        "data workers are still there": multiprocessing.active_children(),
        "the SIGINT handler was not put back": signal.getsignal(signal.SIGINT) != signal.default_int_handler,
        "a run is still active": learn.task is not None or learn._open_spans,
        "a batch is kept alive": learn.batch is not None or learn.xb != (None,),
    }
    return [problem for problem, is_left in left.items() if is_left]


def without_a_signal(n_workers: int) -> tuple[Any, float]:
    """Weights and losses of a fit, and the least time of three, in seconds."""
    seconds = []
    for _ in range(3):
        learn = make_learner(n_workers)
        start = time.perf_counter()
        train(learn)
        seconds.append(time.perf_counter() - start)
    return outcome(learn), min(seconds)


def main(count: int, seed: int) -> int:
    torch.set_num_threads(1)
    rng, table, wrong = random.Random(seed), Counter(), []
    expected, seconds = {}, {}
    for n_workers in (0, 2):
        expected[n_workers], seconds[n_workers] = without_a_signal(n_workers)
    if not is_same(expected[0], expected[2]):
        wrong.append("workers change the data")
    while sum(table.values()) < count:
        i = sum(table.values())
        n_workers, n_signals = (0, 0, 2)[i % 3], (1, 1, 2)[i // 3 % 3]
        delays = [rng.uniform(0, seconds[n_workers]), rng.uniform(0, TWO_WITHIN)][:n_signals]
        how, problems = one_run(n_workers, delays, expected[n_workers])
        table[n_workers, n_signals, how] += how not in MISSED
        wrong += [f"{n_workers} workers, signals after {delays}: {how}, but {problem}" for problem in problems]
    print(f"{'workers':>7}  {'signals':>7}  {'how it ended':<22}  fits")
    for (n_workers, n_signals, how), n in sorted((+table).items()):
        print(f"{n_workers:>7}  {n_signals:>7}  {how:<22}  {n:>4}")
    print(f"{count} fits hit, {len(wrong)} problems")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=300, help="how many fits")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    sys.exit(main(arguments.count, arguments.seed))
