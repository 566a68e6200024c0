"""Ten thousand batches with all loggers on: what grows; and what a notifier costs whose server never answers.

    python benchmarks/loggers.py

Growth is that of the process between two places of one long fit, beside the same fit without loggers, which keeps its
losses and so grows a little by itself. Trackers of experiments take part where they are installed.
"""

import contextlib
import io
import os
import random
import socket
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import overhead
import torch

import learnloop as ll
from learnloop.integrations.mlflow import MLflowCallback
from learnloop.integrations.tensorboard import TensorBoardCallback
from learnloop.integrations.trackio import TrackioCallback
from learnloop.integrations.wandb import WandbCallback

N_BATCHES, N_EPOCHS, FROM_EPOCH = 500, 20, 4  # 10,000 batches; the first 2,000 are a warm-up
#: Package -> its callback.
TRACKERS: dict[str, Callable[[], ll.Callback]] = {
    "tensorboard": lambda: TensorBoardCallback("tensorboard", trace_model=False),
    "wandb": lambda: WandbCallback(mode="offline", dir=".", every=100),
    "mlflow": lambda: MLflowCallback(tracking_uri="sqlite:///mlflow.db", every=100),
    "trackio": lambda: TrackioCallback("learnloop-benchmark", every=100),
}


class Held(NamedTuple):
    """What the process holds."""

    memory: int  # KiB, resident
    threads: int
    files: int


def held() -> Held:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    return Held(pages * os.sysconf("SC_PAGE_SIZE") // 1024, threading.active_count(), files)


def loggers() -> dict[str, Callable[[], ll.Callback]]:
    """Every logger that is here."""
    own: dict[str, Callable[[], ll.Callback]] = {
        "CSVLogger": ll.CSVLogger,
        "JSONLLogger": lambda: ll.JSONLLogger(every=1),
        "ShowGraphCallback": ll.ShowGraphCallback,
        "Notify": lambda: ll.Notify(every=1),
    }
    return {**own, **{name: make for name, make in TRACKERS.items() if find_spec(name)}}


def growth(cbs: list[ll.Callback]) -> tuple[Held, Held]:
    """After 2,000 batches, and after 10,000."""
    seen: dict[int, Held] = {}
    learn = overhead.quiet_learner(overhead.make_batches(N_BATCHES), cbs=cbs)
    watch = ll.Callback(after_epoch=lambda cb: seen.setdefault(cb.learn.epoch + 1, held()))
    learn.fit(N_EPOCHS, cbs=watch)
    return seen[FROM_EPOCH], seen[N_EPOCHS]


# A server that never answers


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """An address where connections are made and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Stopwatch(ll.Callback):
    """Seconds by the clock of each epoch but the first; what follows the last one is the wait for the server."""

    order = 5000

    def before_fit(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def after_epoch(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def cost_of_hanging(rounds: int) -> tuple[list[float], float]:
    """Quartiles of the paired ratios of an epoch of 500 batches that sends a message to one that does not; and by how
    many seconds the end of the fit is later.
    """
    ratios, ends = [], []
    for _ in range(rounds):
        times = {}
        for is_on in random.sample([True, False], 2):
            watch = Stopwatch()
            learn = overhead.quiet_learner(overhead.make_batches(N_BATCHES), cbs=watch)
            learn.fit(6, cbs=[ll.Notify(every=1)] if is_on else None)
            times[is_on] = statistics.median(watch.seconds[1:])
            if is_on:
                ends.append(time.perf_counter() - watch.last)
        ratios.append(times[True] / times[False])
    return statistics.quantiles(ratios, n=4), statistics.median(ends)


def main() -> None:
    parser = overhead.option_parser("Measures what loggers leave behind, and what a notifier costs.", 20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    nowhere = io.StringIO()
    made = loggers()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), silent_server() as url:
        os.environ["WEBHOOK_URL"] = url
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bare = growth([])
            full = growth([make() for make in made.values()])
            quartiles, end = cost_of_hanging(options.rounds or 20)
    print(f"10,000 batches with {', '.join(made)}.")
    print(f"{'':24}{'memory (KiB)':>16}{'threads':>10}{'files':>10}")
    for title, (before, after) in {"without them": bare, "with them": full}.items():
        print(f"{title + ', at 2,000':24}{before.memory:16,}{before.threads:10}{before.files:10}")
        print(f"{title + ', at 10,000':24}{after.memory:16,}{after.threads:10}{after.files:10}")
    print(f"a server that never answers: an epoch takes {quartiles[1]:.4f} of one that sends nothing ", end="")
    print(f"({quartiles[0]:.4f} to {quartiles[2]:.4f}); the fit ends {end:.2f} s later")


if __name__ == "__main__":
    main()
