"""What a study came to: a table of its arms beside the reference, the interactions of pairs, a picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from learnloop import html, plots
from learnloop.experiment.designs import Design, design_of, interaction_arms
from learnloop.experiment.intervals import Difference, paired
from learnloop.experiment.lines import read_lines
from learnloop.experiment.trials import Trial

__all__ = ["ArmRow", "Study"]

TITLES = ("arm", "n", "mean", "spread", "difference", "interval", "")


class ArmRow(NamedTuple):
    """An arm over its seeds."""

    arm: str
    n: int  # trainings that gave a value
    mean: float | None
    spread: float | None  # standard deviation over the seeds; None for less than two
    difference: Difference | None  # to the reference, over the seeds that both have; None for the reference itself


class Study:
    """The trainings of an `ablate`, as a table in a terminal or a cell; `plot()` draws the differences.

    `difference` is the arm less the reference, seed by seed. Its interval covers the true one in `confidence` of all
    studies, for each arm by itself: of twenty arms that do nothing one is expected to look as if it did.
    """

    def __init__(
        self,
        design: Design,
        trials: Iterable[Trial],
        metric: str | None = None,  # its name; None: the last column of the records
        confidence: float = 0.95,
        about: Mapping[str, Any] | None = None,  # when and on what machine
    ):
        arms = list(design.arms)
        self.trials = sorted((t for t in trials if t.arm in design.arms), key=lambda t: (t.seed, arms.index(t.arm)))
        self.design, self.confidence, self.about = design, confidence, dict(about or {})
        self.metric = metric or _last_column(self.trials)

    @classmethod
    def read(cls, path: str | Path, confidence: float = 0.95) -> "Study":
        """The study in a file of `ablate`, whole or not; trains nothing."""
        lines = list(read_lines(Path(path)))
        headers = [line for line in lines if line.get("kind") == "study"]
        if not headers:
            raise ValueError(f"`{path}` holds no study: `ablate(…, path=…)` writes one.")
        about = headers[-1]
        design = design_of(about["design"], about["cbs"])
        return cls(design, stored_trials(lines).values(), about["metric"], confidence, about)

    @property
    def failures(self) -> list[Trial]:
        """Trainings that gave no value, each with its error."""
        return [t for t in self.trials if t.value is None]

    @property
    def rows(self) -> list[ArmRow]:
        """A row per arm, the reference first."""
        return [self._row(arm) for arm in self.design.arms]

    @property
    def interactions(self) -> dict[str, Difference]:
        """By pair, how much more both do together than the sum of what each does alone; for the design 'pairs'."""
        found = {}
        for pair, arms in interaction_arms(self.design).items():
            both, one, other, none = (self._values(arm) for arm in (*arms, self.design.reference))
            seeds = sorted({*both} & {*one} & {*other} & {*none})
            if seeds:
                together = [both[s] - one[s] for s in seeds]
                alone = [other[s] - none[s] for s in seeds]
                found[pair] = paired(together, alone, self.confidence)
        return found

    def _values(self, arm: str) -> dict[int, float]:
        return {t.seed: t.value for t in self.trials if t.arm == arm and t.value is not None}

    def _row(self, arm: str) -> ArmRow:
        import statistics  # not before: it brings fractions and decimals along

        values, reference = self._values(arm), self._values(self.design.reference)
        seeds = [s for s in values if s in reference]
        is_compared = arm != self.design.reference and bool(seeds)
        return ArmRow(
            arm,
            len(values),
            statistics.fmean(values.values()) if values else None,
            statistics.stdev(values.values()) if len(values) > 1 else None,
            paired([values[s] for s in seeds], [reference[s] for s in seeds], self.confidence) if is_compared else None,
        )

    def plot(self, figsize: tuple[float, float] | None = None) -> Any:
        """Each arm's difference to the reference with its interval, and each seed as a dot; returns the figure."""
        compared = [row for row in self.rows if row.difference is not None]
        if not compared:
            raise ValueError("there is no arm to compare: no seed has both a value of the reference and one of an arm.")
        reference = self._values(self.design.reference)
        seeds = [[v - reference[s] for s, v in self._values(row.arm).items() if s in reference] for row in compared]
        fig, (ax,) = plots.subplots(1, figsize=figsize or (6, 1.2 + 0.45 * len(compared)))
        intervals = [row.difference[:3] for row in compared if row.difference is not None]
        plots.plot_differences(ax, [row.arm for row in compared], intervals, seeds)
        ax.set_xlabel(f"{self.metric}, difference to {self.design.reference!r}")
        return fig

    def to_frame(self) -> Any:
        """The trainings as a pandas DataFrame, a row each."""
        import pandas as pd

        return pd.DataFrame([t.fields() for t in self.trials])

    def __repr__(self) -> str:
        return "\n".join([self._title(), *columns([TITLES, *self._cells()]), *self._notes()])

    def _repr_html_(self) -> str:
        notes = "".join(html.paragraph(note) for note in self._notes())
        return html.table(self._cells(), TITLES, self._title()) + notes

    def _title(self) -> str:
        return f"{self.metric}, {self.design.name}, differences to {self.design.reference!r}"

    def _cells(self) -> list[tuple[str, ...]]:
        return [_cells_of(row) for row in self.rows]

    def _notes(self) -> list[str]:
        notes = [
            f"{pair}: {_signed(d.mean)} more than the sum of both, {_interval(d)} {_verdict(d)}".rstrip()
            for pair, d in self.interactions.items()
        ]
        return notes + [f"{t.arm}, seed {t.seed} failed: {t.error}" for t in self.failures]


def stored_trials(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], Trial]:
    """The trainings in the lines of a file by arm and seed, the last of each."""
    names = ("arm", "seed", "value", "row", "seconds", "error")
    found = [Trial(**{n: line.get(n) for n in names}) for line in lines if line.get("kind") == "trial"]  # type: ignore[arg-type]
    return {(t.arm, t.seed): t for t in found}


def _last_column(trials: Iterable[Trial]) -> str:
    rows = [t.row for t in trials if t.row and t.value is not None]
    return next((name for row in rows for name in reversed(list(row)) if name not in ("epoch", "time")), "the metric")


def _cells_of(row: ArmRow) -> tuple[str, ...]:
    numbers = ["" if x is None else f"{x:.4g}" for x in (row.mean, row.spread)]
    d = row.difference
    compared = ("", "", "") if d is None else (_signed(d.mean), _interval(d), _verdict(d))
    return (row.arm, str(row.n), *numbers, *compared)


def _signed(x: float) -> str:
    return f"{x:+.3g}"


def _interval(d: Difference) -> str:
    return f"{_signed(d.low)} to {_signed(d.high)}"


def _verdict(d: Difference) -> str:
    return "may be noise" if d.is_noise else ""


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text in which cells stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
