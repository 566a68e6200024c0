"""Where the time of a training goes: part by part and callback by callback, as a table, a picture and a trace."""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from learnloop import html, plots
from learnloop.callbacks.execution import Compile
from learnloop.insight.timing import LOOP, MOVING, PARTS, DeviceTimes, HostReads, Interval, Part, Stopwatch, Wrapping
from learnloop.loop.callback import Callback
from learnloop.loop.fits import FitCall, run_trial

#: The order of the loop's parts in the table; callbacks follow, the longest first.
ORDER = ("loader", MOVING, *PARTS.values(), "zero_grad", LOOP)
WAITS_TOO_LONG = 0.4  # part of the time from which a loader is said to keep the model waiting


@dataclass(frozen=True)
class PartTime:
    """What one part took, per training batch."""

    title: str  # `forward`, `Recorder.after_batch`
    ms: float  # of the host; what runs inside it is left out
    share: float  # of the whole time, 0 to 1
    calls: float
    device_ms: float | None = None  # on an accelerator; None without one
    host_reads: float | None = None  # calls that bring a tensor to the host; None where they were not counted


@dataclass(frozen=True, repr=False)
class Profile:
    """What was measured; it shows itself as text in a terminal, as a table in a notebook."""

    device: str  # 'cpu', 'cuda:0'
    n_batch: int  # training batches that were measured
    seconds: float  # from the first of them to the end of the last, by a clock of its own
    parts: dict[str, PartTime]  # by title, in the order of the table
    host_reads: dict[tuple[str, str], float] | None = None  # (part, call and line) -> calls per batch
    others: dict[str, float] = field(default_factory=dict)  # seconds of validation, and of what is between the phases
    intervals: tuple[Interval, ...] = ()  # of the first batches, for the trace
    notes: tuple[str, ...] = ()

    @property
    def ms(self) -> float:
        """Milliseconds per training batch."""
        return self.seconds * 1e3 / max(1, self.n_batch)

    @property
    def sum_of_parts(self) -> float:
        """Milliseconds per training batch, all parts together."""
        return sum(p.ms for p in self.parts.values())

    @property
    def waiting(self) -> float:
        """The part of the time in which the loop waited for the loader, 0 to 1."""
        return self.parts["loader"].share if "loader" in self.parts else 0.0

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, one row per part."""
        return [_row(part) for part in self.parts.values()]

    def _title(self) -> str:
        return f"{self.n_batch} training batches on {self.device}, {self.ms:.3g} ms each"

    def lines(self) -> list[str]:
        """What stands below the table."""
        found = [
            f"parts together: {self.sum_of_parts:.3g} ms, {self.sum_of_parts / max(self.ms, 1e-12):.1%} of the time"
        ]
        found += [f"{name}: {seconds:.3g} s" for name, seconds in self.others.items()]
        for (part, call), n in sorted((self.host_reads or {}).items(), key=lambda item: -item[1])[:8]:
            found.append(f"brought to the host, {n:.3g} times a batch: {call}, by {part}")
        if self.waiting > WAITS_TOO_LONG:
            found.append(
                f"the model waits for the loader {self.waiting:.0%} of the time: more workers, or faster reading"
            )
        return [*found, *self.notes]

    def __str__(self) -> str:
        columns = self._columns()
        cells = [tuple(row[i] for i in columns) for row in (COLUMNS, *self.rows())]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        ]
        return "\n".join([self._title(), "", *lines, "", *self.lines()])

    __repr__ = __str__

    def _columns(self) -> list[int]:
        """The columns in which there is something."""
        rows = self.rows()
        return [i for i in range(len(COLUMNS)) if i < 4 or any(row[i] for row in rows)]

    def _repr_html_(self) -> str:
        columns = self._columns()
        rows = [[row[i] for i in columns] for row in self.rows()]
        return html.table(rows, [COLUMNS[i] for i in columns], self._title()) + html.code("\n".join(self.lines()))

    def plot(self, figsize: tuple[float, float] | None = None) -> Any:
        """Milliseconds of each part, and the last of the kept batches on a line of time; returns the figure."""
        training = sorted((i for i in self.intervals if i.part.phase == "train"), key=lambda i: (i.start, -i.end))
        last = max((i.batch for i in training), default=0)
        shown = [i for i in training if last - 3 < i.batch]
        origin = min((i.start for i in shown), default=0)
        bars = [
            (("device: " if i.on_device else "") + i.part.title, (i.start - origin) / 1e6, (i.end - i.start) / 1e6)
            for i in shown
        ]
        return plots.plot_profile({p.title: p.ms for p in self.parts.values()}, bars, self._title(), figsize)

    def to_chrome(self, path: str | Path) -> Path:
        """Writes the kept batches as a trace for chrome://tracing or ui.perfetto.dev, and returns the path.

        Source: Trace Event Format, complete events (`X`) in µs.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": trace_events(self.intervals), "displayTimeUnit": "ms"}))
        return path


COLUMNS = ("part", "ms/batch", "share", "calls", "device ms", "to the host")


def _row(p: PartTime) -> tuple[str, ...]:
    device = "" if p.device_ms is None else f"{p.device_ms:.3f}"
    reads = "" if not p.host_reads else f"{p.host_reads:.3g}"
    return (p.title, f"{p.ms:.3f}", f"{p.share:.1%}", f"{p.calls:.3g}", device, reads)


def trace_events(intervals: Iterable[Interval]) -> list[dict[str, Any]]:
    """Intervals as events of Chrome's trace format: the host is thread 0, the device thread 1."""
    pid, intervals = os.getpid(), list(intervals)
    origin = min((i.start for i in intervals), default=0)
    names = {0: "host", 1: "device"} if any(i.on_device for i in intervals) else {0: "host"}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        for tid, name in names.items()
    ]
    for i in intervals:
        times = {"ts": (i.start - origin) / 1e3, "dur": (i.end - i.start) / 1e3}
        kind = {"name": i.part.title, "cat": f"{i.part.phase},{'callback' if i.part.event else 'loop'}"}
        place = {"pid": pid, "tid": int(i.on_device), "args": {"batch": i.batch}}
        events.append({"ph": "X", **kind, **times, **place})
    return events


class ProfileCallback(Callback):
    """Measures where the time of a fit goes: loader, forward, loss, backward, step, every callback by event.

    Around the learner's own methods, the optimizer's `zero_grad` and every handler it puts a stopwatch in `before_fit`,
    and takes all of it off in `cleanup_fit`; `report` is what it measured. On CUDA the times of the device come from
    events around the parts, and nothing waits. Cost per batch: about 1 µs for each part and each handler, and 2 µs for
    each call of a torch function while `host_reads` are counted.
    """

    order, reads_only = -100_000, True
    acts_outside = True  # it replaces the tables of handlers, which a dry run does too
    tasks = ("fit", "lr_find")
    name = "profiler"  # `learn.profile` is the verb

    def __init__(
        self,
        warmup: int = 0,  # training batches that are left out at the beginning
        keep: int = 50,  # batches whose every interval is kept, for the trace and the picture
        host_reads: bool = True,  # count calls that bring a tensor to the host; never of a compiled model
    ):
        self.warmup, self.keep, self.host_reads = warmup, keep, host_reads
        self.report: Profile | None = None  # of the last fit
        self._drop()

    def _drop(self) -> None:
        self._stopwatch: Any = None
        self._wrapping: Any = None
        self._on_device: Any = None
        self._reads: Any = None
        self._wall = self._train_start = 0.0

    def before_fit(self) -> None:
        learn = self.learn
        self._drop()
        self.report = None
        where = learn._find_device()
        self._stopwatch = Stopwatch(self.keep)
        self._on_device = DeviceTimes() if where.type == "cuda" else None
        self._wrapping = Wrapping(self, self._stopwatch, self._on_device, self._begin_batch)
        self._where = str(where)
        self._stopwatch.enter(Part("between", LOOP))
        self._wrapping.install()
        if self.host_reads and not is_compiled(learn):
            self._reads = HostReads(self._stopwatch, where.type)
            self._reads.__enter__()

    def _begin_batch(self) -> None:
        """Where a batch begins: after those of the warm-up everything starts anew."""
        if self.warmup and self.learn.training and self.learn.train_iter == self.warmup and not self.learn._depth:
            self._stopwatch.restart()
            self._wall, self._train_start = 0.0, time.perf_counter()
            if self._on_device is not None:
                self._on_device.restart()
            if self._reads is not None:
                self._reads.counts.clear()

    def before_train(self) -> None:
        self._train_start = time.perf_counter()

    def cleanup_train(self) -> None:
        if self._wrapping is not None and not self.learn._depth:
            self._wall += time.perf_counter() - self._train_start

    def cleanup_fit(self) -> None:
        if self._wrapping is None:
            return
        if self._reads is not None:
            self._reads.__exit__(None, None, None)
        self._wrapping.remove()
        while self._stopwatch.stack:
            self._stopwatch.leave()
        self.report = self._made_report()
        self._drop()

    def _made_report(self) -> Profile:
        watch = self._stopwatch
        on_device = [] if self._on_device is None else self._on_device.collect()
        n = watch.batches.get("train", 0)
        reads = None if self._reads is None else self._reads.counts
        others = {"validation": "validate", "between the phases": "between"}
        return Profile(
            device=self._where,
            n_batch=n,
            seconds=self._wall,
            parts=part_times(watch, on_device, reads, n, self._wall),
            host_reads=None if reads is None else {(p.title, c): k / max(n, 1) for (p, c), k in reads.items() if p},
            others={title: s for title, phase in others.items() if (s := seconds_of(watch, phase)) > 0},
            intervals=tuple(i for i in [*watch.intervals, *on_device] if i.batch <= self.keep),
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterable[str]:
        deaf = [repr(cb) for cb in self.learn.cbs if not self.learn._takes_part(cb, self.learn.task, [])]
        if deaf:
            how = "which act in a whole fit only: `fit(cbs=ProfileCallback())` measures them"
            yield f"left out: {', '.join(deaf)}, {how}"
        if self.host_reads and self._reads is None:
            yield "what is brought to the host was not counted: the model is compiled"


def part_times(
    watch: Stopwatch, on_device: list[Interval], reads: dict[Any, int] | None, n: int, seconds: float
) -> dict[str, PartTime]:
    """The parts of training, by title: those of the loop in its order, then callbacks, the longest first."""
    parts = [part for part in watch.times if part.phase == "train"]
    parts.sort(key=lambda p: (bool(p.event), ORDER.index(p.name) if not p.event else -watch.times[p]))
    device: dict[Part, float] = {}
    for i in on_device:
        device[i.part] = device.get(i.part, 0.0) + (i.end - i.start) / 1e6
    counted: dict[Part, int] = {}
    for (part, _), k in (reads or {}).items():
        counted[part] = counted.get(part, 0) + k
    per_batch, whole = 1 / max(n, 1), max(seconds * 1e9, 1e-12)
    return {
        p.title: PartTime(
            title=p.title,
            ms=watch.times[p] * per_batch / 1e6,
            share=watch.times[p] / whole,
            calls=watch.calls.get(p, 0) * per_batch,
            device_ms=device[p] * per_batch if p in device else None,
            host_reads=None if reads is None else counted.get(p, 0) * per_batch,
        )
        for p in parts
    }


def seconds_of(watch: Stopwatch, phase: str) -> float:
    return sum(t for part, t in watch.times.items() if part.phase == phase) / 1e9


def is_compiled(learn: Any) -> bool:
    """Whether torch has compiled the model, or will: it would compile what counts along with it."""
    modules = learn.model.modules() if isinstance(learn.model, nn.Module) else ()
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules)
    return compiled or any(isinstance(cb, Compile) for cb in learn.cbs)


def profile(learn: Any, n: int, warmup: int, host_reads: bool = True) -> Profile:
    """Trains for `n` updates after a warm-up, measures them, and undoes all of it."""
    for name, value, least in (("n", n, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}={value!r}`: pass a whole number of batches, {least} or more.")
    measuring = ProfileCallback(warmup, host_reads=host_reads)
    former, recorder = learn.opt, learn.__dict__.get("recorder")
    shown = None if recorder is None else recorder._trial
    call = FitCall(None, cbs=measuring, n_step=n + warmup).checked(learn, "profile")
    try:
        with learn.no_logging(), learn.no_mbar():
            run_trial(learn, "lr_find", call)
    finally:
        learn.opt = former
        if recorder is not None:
            recorder._show(shown)
    return measuring.report  # type: ignore[return-value]
