"""Checks every pair of public callbacks: each passes, or is refused with a reason when it is put together.

A pair trains, gives the same numbers in either order of adding, comes through cancels and errors, loses one of the two
in the middle, and resumes exactly. `--with NAME` takes the pairs of one callback alone.
"""

import argparse
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch

from learnloop.checks.library import callbacks
from learnloop.checks.pairs import Pair, all_pairs, check_pair, summary


def checked(names: tuple[str, str]) -> Pair:
    """One pair, in a process of its own kind: one thread, eager, without the output of the callbacks."""
    torch.set_num_threads(1)
    logging.getLogger("learnloop").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):  # compiling takes a second each time
        warnings.simplefilter("ignore")
        return check_pair(*names)


def harmlessness(names: tuple[str, str]) -> int:
    """First those that both change the training; last those that read only, and the one that takes long."""
    return sum(callbacks()[name].reads_only for name in names) + 3 * ("Compile" in names)


def noted(pairs: Iterable[Pair], n: int) -> Iterator[Pair]:
    """The same, with a line for each that did not pass and for each hundredth, as they come."""
    for i, pair in enumerate(pairs, 1):
        if pair.broken or pair.refusal or i % 100 == 0:
            print(f"{i} of {n}: {pair}", flush=True)
        yield pair


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the summary; 1 if a pair failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with", dest="name", help="only pairs with this callback")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    os.environ.setdefault("MPLBACKEND", "Agg")
    wanted = sorted((pair for pair in all_pairs() if options.name in (None, *pair)), key=harmlessness)
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        pairs = list(noted(pool.imap(checked, wanted, chunksize=4), len(wanted)))
    print("\n".join([f"in {time.perf_counter() - began:.0f} s", *summary(pairs)]))
    return int(any(pair.broken for pair in pairs))


if __name__ == "__main__":
    sys.exit(main())
