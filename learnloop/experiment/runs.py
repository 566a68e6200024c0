"""Records of fits, read again: listed, compared, drawn over each other."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learnloop import html, plots
from learnloop.experiment.lines import read_lines
from learnloop.experiment.study import columns

__all__ = ["Comparison", "Run", "Runs", "compare", "read_run", "runs"]


@dataclass(frozen=True, repr=False)
class Run:
    """One fit, as a `RunRecord` kept it."""

    path: Path
    id: str
    at: str  # when it began, in local time with its offset
    about: Mapping[str, Any]  # configuration, callbacks, loop, code, data, seed, environment
    history: Sequence[Mapping[str, Any]] = ()  # a row per epoch
    steps: Sequence[Mapping[str, Any]] = ()  # numbers of single batches, where they were kept
    n_resumed: int = 0
    how: str | None = None  # 'done', 'interrupted', 'error', 'removed'; None: killed, or it goes on
    error: str | None = None
    seconds: float | None = None  # of training; None without an end

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that was set, by names like `configuration.lr` and `callbacks.MixUp.alpha`."""
        return dict(_flat(self.about))

    @property
    def last(self) -> dict[str, Any]:
        """The numbers of the last row."""
        row = self.history[-1] if self.history else {}
        return {name: value for name, value in row.items() if name not in ("epoch", "time")}

    def __repr__(self) -> str:
        return "\n".join("  ".join(filter(None, cells)) for cells in _rows_of(self))

    def _repr_html_(self) -> str:
        return html.table(_rows_of(self), caption=f"run {self.id}")


class Runs(list[Run]):
    """Runs, newest first; shown as a table. `damaged` are files in their folder that hold none."""

    def __init__(self, runs: Iterable[Run] = (), damaged: Iterable[Path] = ()):
        super().__init__(runs)
        self.damaged = list(damaged)

    def __repr__(self) -> str:
        table = columns([_TITLES, *map(_line, self)]) if self else ["no runs"]
        return "\n".join([*table, *self._notes()])

    def _repr_html_(self) -> str:
        return html.table(map(_line, self), _TITLES) + "".join(map(html.paragraph, self._notes()))

    def _notes(self) -> list[str]:
        return [f"{path.name} holds no run" for path in self.damaged]


_TITLES = ("run", "model", "callbacks", "epochs", "last row", "end", "time")
#: On every learner, and therefore left out of the list.
_USUAL = ("TrainEvalCallback", "Recorder", "ProgressCallback", "RunRecord")


def runs(folder: str | Path = "runs") -> Runs:
    """The records in a folder of `RunRecord`, newest first; FileNotFoundError where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder `{folder}`. A fit with `cbs=RunRecord({str(folder)!r})` makes it.")
    found = {path: read_run(path) for path in folder.glob("*.jsonl")}
    read = [run for run in found.values() if run is not None]
    newest_first = sorted(read, key=lambda run: (run.at, run.id), reverse=True)
    return Runs(newest_first, sorted(path for path, run in found.items() if run is None))


def read_run(path: str | Path) -> Run | None:
    """The run in a file, whole or not; None where it holds none. Lines that were cut short are left out."""
    lines = list(read_lines(Path(path)))
    about = next((line for line in lines if line.get("kind") == "run" and {"id", "at"} <= line.keys()), None)
    if about is None:
        return None
    last = lines[-1]
    end = {n: last.get(n) for n in ("how", "error", "seconds")} if last.get("kind") == "end" else {}
    return Run(
        Path(path),
        str(about["id"]),
        str(about["at"]),
        {k: v for k, v in about.items() if k not in ("kind", "id", "at")},
        [_without(line, "kind", "step") for line in lines if line.get("kind") == "row"],
        [_without(line, "kind") for line in lines if line.get("kind") == "step"],
        sum(line.get("kind") == "resumed" for line in lines),
        **end,
    )


def _without(line: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in names}


def _flat(about: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings one by one; what is in lists by its name, or by its number."""
    for part in ("configuration", "code", "seed", "environment"):
        for name, value in about.get(part, {}).items():
            yield f"{part}.{name}", value
    for cb in about.get("callbacks", ()):
        yield f"callbacks.{cb['name']}", True
        for name, value in cb["settings"].items():
            yield f"callbacks.{cb['name']}.{name}", value
    for loader in about.get("data", ()):
        for name, value in loader.items():
            yield f"data.{loader['name']}.{name}", value


def _line(run: Run) -> tuple[str, ...]:
    names = [cb["name"] for cb in run.about.get("callbacks", ()) if cb["name"] not in _USUAL]
    end = run.how or "none"
    return (
        run.id,
        str(run.about.get("configuration", {}).get("model", "")),
        ", ".join(names),
        str(len(run.history)),
        _numbers(run.last),
        f"{end}: {run.error}" if run.error else end,
        _clock(run.seconds),
    )


def _numbers(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in row.items() if value is not None)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 60 else time.strftime("%H:%M:%S", time.gmtime(seconds))


def _rows_of(run: Run) -> list[tuple[str, str]]:
    """What a run shows of itself."""
    resumed = f", resumed {run.n_resumed} times" if run.n_resumed else ""
    rows = [("run", run.id), ("began", run.at + resumed), ("end", run.how or "none"), ("error", run.error or "")]
    rows += [("seconds", _shown(run.seconds)), ("epochs", str(len(run.history))), ("last row", _numbers(run.last))]
    return [(name, value) for name, value in [*rows, *((k, _shown(v)) for k, v in run.settings.items())] if value]


# Several beside each other


class Comparison:
    """What is different in several runs, and what came out; `plot()` draws them over each other."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = list(runs)

    @property
    def settings(self) -> dict[str, list[Any]]:
        """By name a value for each run, None where it has none; of the settings that are not the same in all."""
        return _different([run.settings for run in self.runs])

    @property
    def results(self) -> dict[str, list[Any]]:
        """By name a value for each run: the columns of the last row, how many epochs, how it ended, seconds."""
        found = [{**r.last, "epochs": len(r.history), "end": r.how, "seconds": r.seconds} for r in self.runs]
        return {name: [row.get(name) for row in found] for name in dict.fromkeys(n for row in found for n in row)}

    def plot(self, columns: str | Sequence[str] | None = None, figsize: tuple[float, float] | None = None) -> Any:
        """Columns of the rows over the epochs, a line per run; returns the figure."""
        return plots.plot_histories({run.id: run.history for run in self.runs}, columns, figsize=figsize)

    def __repr__(self) -> str:
        return "\n".join(columns([self._titles(), *self._cells()]))

    def _repr_html_(self) -> str:
        return html.table(self._cells(), self._titles())

    def _titles(self) -> list[str]:
        return ["", *(run.id for run in self.runs)]

    def _cells(self) -> list[list[str]]:
        both = [*self.settings.items(), *self.results.items()]
        return [[name, *map(_shown, values)] for name, values in both]


def _different(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for of_run in settings for name in of_run)
    values = {name: [of_run.get(name) for of_run in settings] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def compare(runs: Sequence[Run | str | Path]) -> Comparison:
    """Runs beside each other: what differs in their settings, and their results. Runs, or files of `RunRecord`."""
    found = [_as_run(run) for run in runs]
    if len(found) < 2:
        raise ValueError(f"`compare` got {len(found)} run; pass two or more, such as `runs()[:3]`.")
    return Comparison(found)


def _as_run(run: Run | str | Path) -> Run:
    if isinstance(run, Run):
        return run
    if not isinstance(run, (str, Path)):
        raise TypeError(f"`compare` takes runs or their files, and got a {type(run).__name__}: `compare(runs()[:3])`.")
    read = read_run(run)
    if read is None:
        raise ValueError(f"`{run}` holds no run: a RunRecord writes one.")
    return read
