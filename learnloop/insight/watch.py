"""Who writes what: every handler of a run watched, by comparing before and after, and by what it sets and reads."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from learnloop.insight.marks import changed, look
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelException
from learnloop.loop.dispatch import owner_of

#: Names of the learner's by which others are meant.
_MEANT = {"x": "xb", "y": "yb", "_raw_loss": "loss_grad", "_loss_grad": "loss_grad", "_loss": "loss"}


class Seen:
    """One call of a handler."""

    def __init__(self, cb: Any, event: str):
        self.cb, self.event = cb, event
        self.writes: set[str] = set()
        self.reads: set[str] = set()
        self.cancels: str | None = None  # the cancel exception that it raised
        self.assigned: dict[str, list[Any]] = {}  # what was assigned, after what was there before


class Watch:
    """Watches a learner from `watch.begin()` on, until its class and its attributes are put back."""

    def __init__(self, learn: Any, folder: Path):
        self.learn, self.folder = learn, folder  # where files that were saved would lie
        self.seen: list[Seen] = []
        self.fired: set[str] = set()
        self._now: Seen | None = None
        self._looked: tuple[str, dict[str, Any]] | None = None  # an event, and how things were after a handler of it
        self._saved: set[str] = set()

    def begin(self) -> None:
        """Gives the learner a class that tells, and its modules a `train` that does."""
        learn = self.learn
        object.__setattr__(learn, "__class__", _watched(type(learn), self))
        for module in learn.model.modules() if isinstance(learn.model, nn.Module) else ():
            vars(module)["train"] = _noting_modes(self, module)
        learn._rebuild()

    def watch_opt(self, opt: Any) -> None:
        """Notes settings of the optimizer too that are what they were."""
        for name, what in (("set_hyper", None), ("set_hypers", None), ("zero_grad", "gradients")):
            if hasattr(opt, name):
                vars(opt)[name] = _noting_call(self, getattr(opt, name), what)

    @staticmethod
    def leave_opt(opt: Any) -> None:
        """Takes that off again."""
        for name in ("set_hyper", "set_hypers", "zero_grad"):
            vars(opt).pop(name, None)

    # What happens meanwhile

    def wrapped(self, event: str, handler: Any) -> Any:
        """The handler, watched; it is still that of its callback."""
        return MethodType(lambda cb: self._call(cb, event, handler), owner_of(handler))

    def _call(self, cb: Any, event: str, handler: Callable[[], Any]) -> Any:
        learn = self.learn
        if cb.acts_outside:
            self.fired.add(event)
            return None
        if learn._depth:  # of a run nested in another one only what its caller finds changed counts
            return handler()
        seen, outer = Seen(cb, event), self._now
        self.seen.append(seen)
        self.fired.add(event)
        before = self._looked[1] if self._looked is not None and self._looked[0] == event else look(learn)
        self._now, self._looked = seen, None
        try:
            return handler()
        except CancelException as error:
            seen.cancels = type(error).__name__
            raise
        finally:
            self._now = outer
            after = look(learn)
            self._looked = event, after
            seen.writes |= {n for n in changed(before, after) if not n.startswith(f"{cb.name}.")} | _set(seen.assigned)

    def begins(self, event: Any) -> None:
        """An event fires; since the last one the loop has moved on."""
        self._looked = None
        if not self.learn._depth and isinstance(event, str):
            self.fired.add(event)

    def note(self, what: str) -> None:
        """Something is set in the handler that runs."""
        if self._now is not None and not self.learn._depth:
            self._now.writes.add(what)

    def assigning(self, name: str, former: Any, value: Any, module: str) -> None:
        if self._now is None or name.startswith("_") or self.learn._depth or _is_own(module):
            return
        self._now.assigned.setdefault(name, [former]).append(value)

    def reading(self, name: str, frame: Any) -> None:
        name = _MEANT.get(name, name)
        if self._now is None or name.startswith("_") or self.learn._depth:
            return
        module = frame.f_globals.get("__name__", "")
        is_delegated = frame.f_code is Callback.__getattr__.__code__
        if is_delegated or not _is_own(module):
            self._now.reads.add(name)

    # Files of the learner's own

    def save(self, file: Any) -> Path:
        """Where the file would be; it is empty, so that it can be looked for."""
        path = self.folder / Path(file).name
        path.touch()
        self._saved.add(str(file))
        self.note("a file")
        return path

    def load(self, file: Any) -> bool:
        """Whether that was saved meanwhile; it would be loaded."""
        if str(file) not in self._saved:
            return False
        self.note("parameters")
        return True


def _is_own(module: str) -> bool:
    """Whether the learner's own code is at work there: what that changes shows by comparing."""
    return module.startswith("learnloop.loop.") or module == "learnloop.learner"


def _watched(kind: Any, watch: Watch) -> Any:
    """The learner's class for the time of one run: it tells what is read and set, and writes no file."""

    class Watched(kind):
        def __getattribute__(self, name: str) -> Any:
            if watch._now is not None and not name.startswith("__") and not callable(getattr(kind, name, None)):
                watch.reading(name, sys._getframe(1))
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            if watch._now is not None:
                watch.assigning(name, vars(self).get(name), value, sys._getframe(1).f_globals.get("__name__", ""))
            super().__setattr__(name, value)

        def __call__(self, event_name: Any) -> None:
            watch.begins(event_name)
            super().__call__(event_name)

        def _rebuild(self) -> None:
            super()._rebuild()
            for table in (self._train_handlers, self._valid_handlers, self._cleanup_handlers):
                for event, handlers in table.items():
                    handlers[:] = [watch.wrapped(event, handler) for handler in handlers]

        def _predict(self) -> None:
            with _as_written(self.model):
                super()._predict()

        def save(self, file: Any, *args: Any, **kwargs: Any) -> Path:
            return watch.save(file)

        def export(self, fname: Any = None, *args: Any, **kwargs: Any) -> Path:
            return watch.save(fname or "export")

        def load(self, file: Any, *args: Any, **kwargs: Any) -> Any:
            return self if watch.load(file) else super().load(file, *args, **kwargs)

    Watched.__name__, Watched.__qualname__, Watched.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Watched


def _as_written(model: Any) -> AbstractContextManager[Any]:
    """A context in which a compiled model runs as it was written: compiling it would take longer than all else."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    is_compiled = any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in modules)
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def _noting_modes(watch: Watch, module: nn.Module) -> Callable[[bool], nn.Module]:
    def train(mode: bool = True) -> nn.Module:
        watch.note("model.training")
        return type(module).train(module, mode)

    return train


def _noting_call(watch: Watch, method: Callable[..., Any], what: str | None) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in [what] if what else [f"opt.{n}" for n in (*args[:1], *kwargs)]:
            watch.note(name)
        return method(*args, **kwargs)

    return call


def _set(assigned: dict[str, list[Any]]) -> set[str]:
    """What was set; not what was changed and put back by the same handler."""
    return {
        name
        for name, (former, *values) in assigned.items()
        if values[-1] is not former or all(value is former for value in values)
    }
