"""Where the time of a run goes: a stopwatch for parts inside parts, and what is put around a learner's own for it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from learnloop.loop.layers import Layer, put_around, take_away

clock = time.perf_counter_ns


class Part(NamedTuple):
    """What takes time: a part of the loop, or a callback in an event."""

    phase: str  # 'train', 'validate' or 'between'
    name: str  # 'loader', 'to device', 'forward', 'loss', 'backward', 'step', 'zero_grad', 'loop' or a callback
    event: str = ""  # the event that a callback hears; empty for parts of the loop

    @property
    def title(self) -> str:
        return f"{self.name}.{self.event}" if self.event else self.name


#: Methods of a learner, and the part that each of them is.
PARTS = {
    "_predict": "forward",
    "_compute_loss": "loss",
    "_backward": "backward",
    "_step": "step",
}
LOOP, LOADER, MOVING = "loop", "loader", "to device"


class Interval(NamedTuple):
    """One time that a part ran, in ns of the host's clock, or on the device."""

    part: Part
    start: int
    end: int
    batch: int  # number of batches begun before
    on_device: bool = False


class Stopwatch:
    """Sums up the time of parts; what runs inside another part counts for itself only. All times in ns."""

    def __init__(self, keep: int):
        self.keep = keep  # batches of which every interval is kept
        self.stack: list[tuple[Part, int]] = []  # the parts that run now, and when they began
        self.restart()

    def restart(self) -> None:
        """Forgets what it measured; the parts that run go on."""
        self.times: dict[Part, int] = {}
        self.calls: dict[Part, int] = {}
        self.batches: dict[str, int] = {}  # by phase
        self.intervals: list[Interval] = []
        self.n_batch = 0
        self.begin = self.last = clock()

    def enter(self, part: Part) -> None:
        now = clock()
        if self.stack:
            outer = self.stack[-1][0]
            self.times[outer] = self.times.get(outer, 0) + now - self.last
        self.stack.append((part, now))
        self.last = now

    def leave(self) -> None:
        now = clock()
        if not self.stack:  # it was taken off inside of this part
            return
        part, start = self.stack.pop()
        self.times[part] = self.times.get(part, 0) + now - self.last
        self.calls[part] = self.calls.get(part, 0) + 1
        self.last = now
        if self.n_batch <= self.keep:
            self.intervals.append(Interval(part, max(start, self.begin), now, self.n_batch))

    @property
    def running(self) -> Part | None:
        """The innermost part that runs now."""
        return self.stack[-1][0] if self.stack else None


class TimedHandler:
    """A handler in a learner's table that is timed; in every other respect it is the handler."""

    __slots__ = ("__self__", "handler", "part", "phase", "watch")

    def __init__(self, handler: Any, watch: Stopwatch, event: str, phase: Callable[[], str]):
        self.handler, self.watch, self.phase = handler, watch, phase
        self.__self__ = getattr(handler, "__self__", None)
        self.part = Part("", repr(self.__self__), event)

    def __call__(self) -> Any:
        self.watch.enter(Part(self.phase(), *self.part[1:]))
        try:
            return self.handler()
        finally:
            self.watch.leave()

    def __eq__(self, other: object) -> bool:
        return self.handler == (other.handler if isinstance(other, TimedHandler) else other)

    def __hash__(self) -> int:
        return hash(self.handler)


class DeviceTimes:
    """Times on a CUDA device, from events recorded around parts; nothing waits for it until `collect`."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.origin = torch.cuda.Event(enable_timing=True)
        self.origin.record()
        self.host_origin = clock()
        self.pairs: list[tuple[Part, int, Any, Any]] = []
        self.intervals: list[Interval] = []

    @contextmanager
    def around(self, part: Part, batch: int) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        try:
            yield
        finally:
            end.record()
            self.pairs.append((part, batch, start, end))
            if len(self.pairs) > 4000:
                self.collect()

    def restart(self) -> None:
        self.pairs, self.intervals = [], []

    def collect(self) -> list[Interval]:
        """Every interval so far, on the host's clock; waits for the device."""
        torch.cuda.synchronize()
        for part, batch, start, end in self.pairs:
            times = [self.host_origin + int(self.origin.elapsed_time(event) * 1e6) for event in (start, end)]
            self.intervals.append(Interval(part, times[0], times[1], batch, True))
        self.pairs = []
        return self.intervals


#: What brings a tensor to the host, and so waits for an accelerator.
_WAITING = {
    *("item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "allclose", "unique", "masked_select"),
    *("__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__"),
}
_TORCH = str(Path(torch.__file__).parent)


class HostReads(TorchFunctionMode):
    """Counts calls that bring a tensor to the host, by the part that runs and the line of source.

    On an accelerator these wait for it. In a run on the CPU it counts what would wait there, but for the loader's.
    """

    def __init__(self, watch: Stopwatch, device: str):
        super().__init__()
        self.watch, self.device = watch, device
        self.counts: dict[tuple[Part | None, str], int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if (name in _WAITING or name == "to") and args and self._waits(name, args[0], result):
            key = self.watch.running, f"{name} in {_line()}"
            self.counts[key] = self.counts.get(key, 0) + 1
        return result

    def _waits(self, name: str, tensor: Any, result: Any) -> bool:
        if not isinstance(tensor, Tensor):
            return False
        if self.device == "cpu":
            running = self.watch.running
            return name != "to" and running is not None and running.name != LOADER
        return tensor.device.type == self.device and (name != "to" or result.device.type == "cpu")


def _line() -> str:
    """The innermost line of source that is neither torch's nor ours here: `train.py:33`."""
    frame = sys._getframe(2)
    while frame is not None and (frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == __file__):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else "?"


class Wrapping:
    """Puts timing around the loop's own methods, the optimizer's `zero_grad` and every handler of one learner."""

    def __init__(self, cb: Any, watch: Stopwatch, device: DeviceTimes | None, began: Callable[[], Any]):
        self.cb, self.learn = cb, cb.learn  # the callback that measures, which is not measured
        self.watch, self.device, self.began = watch, device, began
        self.phase = "between"
        self.opt = self.learn.opt
        self.put: list[tuple[Any, str]] = []
        self.layers: list[tuple[str, Layer]] = []

    def install(self) -> None:
        learn = self.learn
        self._put(learn, "all_batches", self._all_batches(learn.all_batches))
        self._put(learn, "one_batch", self._one_batch(learn.one_batch))
        self._put(learn, "_moved", self._timed(learn._moved, MOVING))
        for method, name in PARTS.items():
            self._put_around(method, name)
        if hasattr(self.opt, "zero_grad") and hasattr(self.opt, "__dict__"):
            self._put(self.opt, "zero_grad", self._timed(self.opt.zero_grad, "zero_grad"))
        self._put(learn, "_rebuild", self._rebuild(learn._rebuild))
        learn._rebuild()

    def _put(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        owner.__dict__[name] = function
        self.put.append((owner, name))

    def _put_around(self, method: str, name: str) -> None:
        """Not in its place: others may put something around the same step, and take it away earlier or later."""

        def layer(inner: Callable[[], None]) -> None:
            self._timed(inner, name)()

        put_around(self.learn, method, layer)
        self.layers.append((method, layer))

    def remove(self) -> None:
        """Takes everything off again; the second time does nothing."""
        for method, layer in self.layers:
            take_away(self.learn, method, layer)
        self.layers = []
        for owner, name in self.put:
            owner.__dict__.pop(name, None)
        if self.put:
            self.put = []
            self.learn._rebuild()

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        watch, device = self.watch, self.device

        def timed(*args: Any, **kwargs: Any) -> Any:
            part = Part(self.phase, name)
            watch.enter(part)
            try:
                if device is None:
                    return function(*args, **kwargs)
                with device.around(part, watch.n_batch):
                    return function(*args, **kwargs)
            finally:
                watch.leave()

        return timed

    def _all_batches(self, function: Callable[[], Any]) -> Callable[[], Any]:
        def all_batches() -> None:
            outer, self.phase = self.phase, "train" if self.learn.training else "validate"
            self.watch.enter(Part(self.phase, LOADER))  # whatever is no batch waits for one
            try:
                function()
            finally:
                self.watch.leave()
                self.phase = outer

        return all_batches

    def _one_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def one_batch(i: int, batch: Any) -> None:
            watch, waiting = self.watch, Part(self.phase, LOADER)
            was_waiting = watch.running == waiting
            if was_waiting:
                watch.leave()
            self.began()
            watch.n_batch += 1
            watch.batches[self.phase] = watch.batches.get(self.phase, 0) + 1
            watch.enter(Part(self.phase, LOOP))
            try:
                function(i, batch)
            finally:
                watch.leave()
                if was_waiting:
                    watch.enter(waiting)

        return one_batch

    def _rebuild(self, function: Callable[[], None]) -> Callable[[], None]:
        learn = self.learn

        def rebuild() -> None:
            function()
            for table in (learn._train_handlers, learn._valid_handlers, learn._cleanup_handlers):
                for event, handlers in table.items():
                    handlers[:] = [self._timed_handler(handler, event) for handler in handlers]

        return rebuild

    def _timed_handler(self, handler: Any, event: str) -> Any:
        is_own = getattr(handler, "__self__", None) is self.cb
        return handler if is_own else TimedHandler(handler, self.watch, event, lambda: self.phase)
