"""What can be left behind: on a learner, on its model, in the process; and how values of two runs are compared."""

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastcore.foundation import L
from torch import Tensor, nn

from learnloop.learner import Learner
from learnloop.loop.callback import Callback

_SETTINGS = ("model", "loss_func", "logger", "dls", "opt_func", "splitter", "path", "create_mbar", "run", "task")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OPEN_FILES = "/proc/self/fd"
_HAS_OPEN_FILES = os.path.isdir(_OPEN_FILES)
_ENDING = ("the number of threads", "the number of open files")


def traces(learn: Learner) -> dict[str, Any]:
    """Everything that a run and a callback must leave as it was, by the name that a report gives it."""
    return {
        **{f"`learn.{name}`": learn.__dict__.get(name) for name in _SETTINGS},
        "`learn.metrics`": [id(m) for m in learn.metrics],
        "`learn.cbs`": [id(cb) for cb in learn.cbs],
        "the callbacks' `run`": [cb.run for cb in learn.cbs],
        "the batch (none)": [learn.batch, learn.xb, learn.yb, learn.pred],
        "the hooks on the model": hooks(learn),
        "which parameters are trained": [p.requires_grad for p in learn._parameters()],
        "gradient mode": torch.is_grad_enabled(),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "torch's default dtype": torch.get_default_dtype(),
        "the handlers of signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "the number of threads": threading.active_count(),
        "the number of open files": len(os.listdir(_OPEN_FILES)) if _HAS_OPEN_FILES else None,
    }


def traces_after(before: dict[str, Any], learn: Learner) -> dict[str, Any]:
    """The same once more; threads that are on their way to their end, and their files, have two seconds for it.

    Fewer of them than before are none that are left: what others had begun has ended meanwhile.
    """
    deadline = time.monotonic() + 2.0
    now = traces(learn)
    while any((now[name] or 0) > (before[name] or 0) for name in _ENDING) and time.monotonic() < deadline:
        time.sleep(0.01)
        now = traces(learn)
    return {**now, **{name: max(now[name] or 0, before[name] or 0) for name in _ENDING if before[name] is not None}}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is another now."""
    return [name for name, value in before.items() if not (value is after[name] or value == after[name])]


def kept_by_the_loop(learn: Learner) -> set[str]:
    """Attributes that a learner may have after a run: those that its classes declare."""
    return {name for cls in type(learn).__mro__ for name in (*vars(cls), *getattr(cls, "__annotations__", ()))}


def hooks(learn: Learner) -> list[Any]:
    """How many hooks each module and parameter has, and whether a module's `forward` was replaced."""
    modules = [(*(len(getattr(m, n)) for n in _HOOKS), "forward" in vars(m)) for m in modules_of(learn)]
    tensors = [(len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())) for p in learn._parameters()]
    return [*modules, *tensors]


def modules_of(learn: Learner) -> list[nn.Module]:
    """Every module; none of a model that is a plain function."""
    return list(learn.model.modules()) if isinstance(learn.model, nn.Module) else []


def modes(learn: Learner) -> list[bool]:
    """Of every module, whether it is in training mode."""
    return [module.training for module in modules_of(learn)]


def train_mode(learn: Learner) -> None:
    """Puts every module in training mode."""
    for module in modules_of(learn):
        module.training = True


def tensors_of(learn: Learner) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    if not isinstance(learn.model, nn.Module):
        return {}
    return {**dict(learn.model.named_parameters()), **dict(learn.model.named_buffers())}


def attributes_with(cb: Callback, is_meant: Callable[[Tensor], bool]) -> list[str]:
    """Attributes of a callback in which such a tensor lies, however deep in lists and dicts."""
    own = {name: value for name, value in vars(cb).items() if name != "learn"}
    return [f"{type(cb).__name__}.{name}" for name, value in own.items() if any(map(is_meant, _tensors_in(value)))]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, set, L)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


# What came out of a run


def numbers(learn: Learner) -> list[float]:
    """Losses and weights."""
    return learn._kept.since(0) + [x for p in learn._parameters() for x in p.detach().flatten().tolist()]


def outcome(learn: Learner) -> list[Any]:
    """Losses, weights and the record's rows."""
    recorder = learn.__dict__.get("recorder")
    return [numbers(learn), [] if recorder is None else [list(row) for row in recorder.values]]


def equal(a: Any, b: Any) -> bool:
    """Equality of plain data with tensors in it; a NaN equals itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b or (a != a and b != b))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """A state as another process would read it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
