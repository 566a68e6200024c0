"""Who writes what: every handler of a run watched, by comparing before and after, and by what it sets and reads."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelException
from learnloop.loop.dispatch import owner_of

#: Names of the learner's by which others are meant.
_MEANT = {"x": "xb", "y": "yb", "_raw_loss": "loss_grad", "_loss_grad": "loss_grad", "_loss": "loss"}
_SAMPLED = 16  # numbers of a tensor, its first, by which a change shows that went past torch's own count of changes
_MANY = 100  # entries of a container that are looked at


class Seen:
    """One call of a handler, or a handler that was left alone."""

    def __init__(self, cb: Any, event: str, phase: str):
        self.cb, self.event, self.phase = cb, event, phase  # 'train', 'validate' or '' outside of phases
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
        seen, outer = Seen(cb, event, _phase(learn)), self._now
        self.seen.append(seen)
        self.fired.add(event)
        before = self._looked[1] if self._looked is not None and self._looked[0] == event else _look(learn)
        self._now, self._looked = seen, None
        try:
            return handler()
        except CancelException as error:
            seen.cancels = type(error).__name__
            raise
        finally:
            self._now = outer
            after = _look(learn)
            self._looked = event, after
            seen.writes |= {n for n in _changed(before, after) if not n.startswith(f"{cb.name}.")} | _set(seen.assigned)

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


def _phase(learn: Any) -> str:
    spans = [span.name for span in learn._open_spans]
    return "train" if "train" in spans else "validate" if "validate" in spans else ""


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


# What there is to be seen


def _changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    found = {name for name in before.keys() | after.keys() if [before.get(name)] != [after.get(name)]}
    return {name for name in found if name not in ("loss", "loss_grad") or not _was_only_read(before, after, name)}


def _was_only_read(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    """A loss comes into being when it is read; only one that was changed after that was written."""
    mark = after.get(name)
    return before.get(name) is None and isinstance(mark, _Mark) and mark.version == 0


def _look(learn: Any) -> dict[str, Any]:
    """A mark for everything that a handler can write, by name; two marks differ where that was written."""
    own, model, opt = vars(learn), learn.model, learn.opt
    found = {n: _mark(v) for n, v in own.items() if _is_shown(n) and not isinstance(v, Callback)}
    found |= {"loss": _mark(own.get("_loss")), "loss_grad": _mark(own.get("_loss_grad"))}
    found["cbs"] = _mark(list(learn.cbs))
    found["metrics"] = _mark(list(learn.metrics)) if hasattr(learn, "metrics") else None
    if isinstance(model, nn.Module):
        found |= _of_model(model)
    if opt is not None:
        found |= _of_opt(opt)
    for cb in learn.cbs:
        found |= {f"{cb.name}.{n}": _mark(v) for n, v in _public(cb)}
    found["random state"] = hash((random.getstate(), _numpy_state(), bytes(torch.get_rng_state().numpy())))
    devices = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    found["autocast"] = [torch.is_autocast_enabled(device) for device in devices]
    return found


def _is_shown(name: str) -> bool:
    return not name.startswith("_") and name not in ("learn", "batch")  # what is in a batch is in xb and yb


def _public(cb: Any) -> Iterator[tuple[str, Any]]:
    """Attributes, and what lies behind a property that can be set."""
    for name, value in vars(cb).items():
        if _is_shown(name):
            yield name, value
        elif getattr(getattr(type(cb), name[1:], None), "fset", None) is not None:
            yield name[1:], value


def _numpy_state() -> Any:
    state: Any = np.random.get_state(legacy=True)
    return state[1].tobytes(), *state[2:]


def _of_model(model: nn.Module) -> dict[str, Any]:
    params, modules = list(model.parameters()), list(model.modules())
    return {
        "parameters": [_Mark(p) for p in params],
        "buffers": [_Mark(b) for b in model.buffers()],
        "gradients": [_mark(p.grad) for p in params],
        "requires_grad": [p.requires_grad for p in params],
        "model.training": [m.training for m in modules],
        "hooks": [_hooks(m) for m in modules],
        **{f"model.{name}": value for name, value in _own_attributes(modules)},
    }


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FORWARD = {"forward": "forward", "_compiled_call_impl": "forward"}


def _hooks(module: nn.Module) -> list[list[int]]:
    return [list(getattr(module, name)) for name in _HOOKS]


def _own_attributes(modules: list[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Attributes that modules have beside parameters, buffers and children: what they carry, and how they run."""
    found: dict[str, list[Any]] = {}
    for module in modules:
        for name, value in vars(module).items():
            shown = _FORWARD.get(name, name)
            if not shown.startswith("_") and name not in ("training", "train"):
                found.setdefault(shown, []).append(_mark(value))
    yield from found.items()


def _of_opt(opt: Any) -> dict[str, Any]:
    hypers = list(getattr(opt, "hypers", ()))
    names = dict.fromkeys(name for group in hypers for name in group)
    state = [(id(p), _of_state(s)) for p, s in getattr(opt, "state", {}).items() if s]
    return {**{f"opt.{n}": [group.get(n) for group in hypers] for n in names}, "opt.state": state}


def _of_state(state: Any) -> list[Any]:
    values = state.values() if isinstance(state, dict) else [state]
    return [(id(v), v._version) if isinstance(v, Tensor) else v for v in values]


class _Same:
    """Equal to a mark of the very same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


class _Mark(_Same):
    """Equal to a mark of the same tensor with the same numbers in the same place."""

    def __init__(self, value: Tensor):
        super().__init__(value)
        self.version = None if value.is_inference() else value._version
        self.numbers = _sample(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Mark) or self.value is not other.value:
            return False
        return self.version == other.version and self.numbers == other.numbers

    __hash__ = None


def _mark(value: Any, depth: int = 2) -> Any:
    if isinstance(value, Tensor):
        return _Mark(value)
    if depth and isinstance(value, (list, tuple)) and len(value) <= _MANY:
        return [type(value), *(_mark(v, depth - 1) for v in value)]
    if depth and isinstance(value, dict) and len(value) <= _MANY:
        return {key: _mark(v, depth - 1) for key, v in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else _Same(value)


def _sample(t: Tensor) -> tuple[Any, ...]:
    """The place of a tensor in memory and some of its numbers: `p.data` is written past the count of changes."""
    if t.layout is not torch.strided or t.is_meta or not t.numel():
        return ()
    row = t.detach()
    while row.ndim > 1:
        row = row[0]
    some = row.reshape(-1)[:_SAMPLED].contiguous().cpu()
    return t.data_ptr(), t.stride(), bytes(some.view(torch.uint8).numpy())
