"""Writes docs/callbacks.md, a table of all callbacks, from the classes themselves: `python docs/make_callbacks.py`.

Which of them go together is found by trying: a short fit with every pair.
"""

import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Iterator
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch

import learnloop as ll
from learnloop.checks.library import RECURRENT, callbacks, learner_for, made
from learnloop.loop.callback import TASKS, handled_events
from learnloop.loop.events import EVENTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "callbacks.md"
COSTS = ROOT / "benchmarks" / "results" / "callbacks.json"

#: No pair to be tried: what others are made from, what a verb puts on a learner of its own, what needs another network.
NOT_TRIED = {"Callback", "LRFinder", "MixHandler", *RECURRENT}

TEXT = """\
# Callbacks

Made by `docs/make_callbacks.py` from the classes; change those.

`order` is a wish, smaller is earlier; a law holds whatever the order is. *Takes part in* names the values of
`learn.task`. *Cost* is µs per training batch over the same loop without it, on a network so small that nothing hides
it ([benchmarks/results/callbacks.md](../benchmarks/results/callbacks.md)). *Not beside* is what a fit with both
refuses; every pair was tried, and all others train. Not tried are the finder's and the recurrent ones, which need a
network of their own.
"""


# One row


def doc_of(cls: type) -> str:
    """The first line of the docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def events_of(cls: type[ll.Callback]) -> list[str]:
    """What it hears, in firing order."""
    handled = handled_events(object.__new__(cls))
    return [event for event in EVENTS if event in handled]


def laws_of(cls: type[ll.Callback]) -> str:
    """`after X, before Y`."""
    laws = [("after", cls.run_after), ("before", cls.run_before)]
    return "; ".join(
        f"{word} {', '.join(map(_name, _several(targets)))}" for word, targets in laws if _several(targets)
    )


def _several(targets: Any) -> tuple[Any, ...]:
    return tuple(targets) if isinstance(targets, (tuple, list)) else (targets,)


def _name(target: Any) -> str:
    return target if isinstance(target, str) else target.__name__


def tasks_of(cls: type[ll.Callback]) -> str:
    """The tasks, or `all`."""
    return "all" if set(cls.tasks) == set(TASKS) else ", ".join(cls.tasks)


def costs() -> dict[str, list[float]]:
    """µs per batch by callback, one for each way in which it was measured."""
    found: dict[str, list[float]] = {}
    for row in json.loads(COSTS.read_text())["rows"]:
        name = row["name"].partition("(")[0].partition(",")[0]
        found.setdefault(name, []).append(row["over"])
    return found


def cost_of(measured: list[float]) -> str:
    """`29`, or `231, 370` where it was measured twice; nothing below a microsecond or two is told from none."""
    return ", ".join("~0" if us < 2 else f"{us:.0f}" for us in measured)


# What goes together


def refused_pairs() -> dict[str, list[str]]:
    """By name, the callbacks that a fit refuses beside it."""
    names = sorted(name for name in callbacks() if name not in NOT_TRIED)
    refused: dict[str, list[str]] = {name: [] for name in names}
    with _quietly(), torch.compiler.set_stance("force_eager"):  # compiling takes a second each time
        for one, other in combinations_with_replacement(names, 2):
            if not _goes_with(one, other):
                refused[one].append(other)
                if one != other:
                    refused[other].append(one)
    return {name: sorted(others) for name, others in refused.items()}


def _goes_with(one: str, other: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            learner_for([one, other], folder).add_cbs([made(one), made(other)]).fit(2)
        except (TypeError, ValueError):
            return False
    return True


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# The page


def page() -> str:
    """The whole page."""
    measured, refused = costs(), refused_pairs()
    by_file: dict[str, list[str]] = {}
    for name, cls in sorted(callbacks().items()):
        if cls is not ll.Callback:
            by_file.setdefault(cls.__module__.rpartition(".")[2], []).append(name)
    sections = [_section(file, names, measured, refused) for file, names in sorted(by_file.items())]
    return "\n".join([TEXT, *sections])


def _section(file: str, names: list[str], measured: dict[str, list[float]], refused: dict[str, list[str]]) -> str:
    title = "| | order | laws | takes part in | cost | not beside | hears |"
    lines = [f"## {file}", "", title, "|---" * 7 + "|"]
    for name in names:
        cls = callbacks()[name]
        cells = [
            f"**{name}**<br>{doc_of(cls)}",
            f"{cls.order:g}",
            laws_of(cls),
            tasks_of(cls),
            cost_of(measured.get(name, [])),
            ", ".join("another" if other == name else other for other in refused.get(name, [])),
            " ".join(f"`{event}`" for event in events_of(cls)),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page())
