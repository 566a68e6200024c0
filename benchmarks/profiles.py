"""What a profile says, and what it costs: on Fashion-MNIST its parts beside the wall's clock, the fit with and without.

A round trains the same network twice over the same batches, with `ProfileCallback` and without, in random order. Given
are medians: the sum of the parts by what a clock of the loader's own saw pass, and the paired ratios of CPU time.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import torch
from fastcore.basics import noop
from networks import residual_net, strided_net
from overhead import option_parser, publish
from torch import nn

import learnloop as ll

BS, N_BATCHES = 128, 20
NETWORKS: dict[str, Callable[[], nn.Module]] = {"residual_net": residual_net, "strided_net": strided_net}


class Timed:
    """A loader that notes when its last pass began and ended: by the wall's clock, and in CPU time."""

    def __init__(self, loader: Any):
        self.loader = loader
        self.wall = self.cpu = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        wall, cpu = time.perf_counter(), time.thread_time()
        yield from self.loader
        self.wall, self.cpu = time.perf_counter() - wall, time.thread_time() - cpu


def learner(network: Callable[[], nn.Module]) -> ll.Learner:
    data = ll.datasets.fashion_mnist()
    n = BS * N_BATCHES
    x, y = (data.x_train[:n] - 0.286) / 0.353, data.y_train[:n]
    dls = ll.DataLoaders(Timed(ll.TensorLoader(x, y, bs=BS, shuffle=True)), device="cpu")
    torch.manual_seed(0)
    learn = ll.Learner(dls, network(), nn.CrossEntropyLoss(), cbs=[ll.GradientClip()])
    learn.remove_cb(ll.ProgressCallback)
    learn.logger = noop
    return learn


def measured(learn: ll.Learner, cbs: Any) -> Timed:
    learn.fit(1, cbs=cbs)
    return learn.dls.train


def compare(network: Callable[[], nn.Module], rounds: int, host_reads: bool) -> dict[str, Any]:
    """Medians over the rounds: the sum of the parts by the wall, and the cost of measuring."""
    learn = learner(network)
    measured(learn, None)
    sums, ratios, times = [], [], []
    for _ in range(rounds):
        cpu = {}
        for with_profile in random.sample([True, False], 2):
            cb = ll.ProfileCallback(host_reads=host_reads)
            seen = measured(learn, cb if with_profile else None)
            cpu[with_profile] = seen.cpu
            if cb.report is not None:
                sums.append(cb.report.sum_of_parts * cb.report.n_batch / 1e3 / seen.wall)
            else:
                times.append(seen.wall * 1e3 / N_BATCHES)
        ratios.append(cpu[True] / cpu[False])
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ms": statistics.median(times),
        "sum": statistics.median(sums),
        "sum_range": (min(sums), max(sums)),
        "ratio": statistics.median(ratios),
        "quartiles": (low, high),
    }


def report(rounds: int) -> dict[str, Any]:
    rows = [
        {"network": name, "host_reads": host_reads, **compare(network, rounds, host_reads)}
        for name, network in NETWORKS.items()
        for host_reads in (True, False)
    ]
    return {"date": date.today().isoformat(), "torch": torch.__version__, "rounds": rounds, "rows": rows}


def as_markdown(found: dict[str, Any]) -> str:
    lines = ["# What a profile says, and costs", ""]
    lines += [
        f"{found['date']}; torch {found['torch']}, 1 thread; {found['rounds']} rounds of {N_BATCHES} batches.",
        "",
    ]
    lines += ["| network | host reads | ms a batch | parts by wall | from, to | time with by without | quartiles |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for row in found["rows"]:
        low, high = row["sum_range"]
        quartiles = f"{row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f}"
        counted = "counted" if row["host_reads"] else "not counted"
        lines.append(
            f"| {row['network']} | {counted} | {row['ms']:.1f} | {row['sum']:.3f} | {low:.3f} to {high:.3f} "
            f"| {row['ratio']:.3f} | {quartiles} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = option_parser("Measures what a profile says beside the wall's clock, and what it costs.", 15).parse_args()
    torch.set_num_threads(1)
    found = report(options.rounds or (4 if options.quick else 15))
    publish("profiles", found, as_markdown(found), options)


if __name__ == "__main__":
    main()
