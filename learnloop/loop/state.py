"""What a run is: taken as plain data, put back, and set aside while another run goes on inside."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastcore.foundation import L
from torch import Tensor, nn

from learnloop.data.keyed import draw_seed, preserved_randomness, random_states, set_random_states

VERSION = 1
#: The loop's numbers that a resume brings back.
COUNTERS = ("train_iter", "opt_iter", "pct_train", "n_epoch", "n_step", "valid_every", "_data_seed")
#: What a run inside another one, or one that is not a fit, leaves as it found it.
ASIDE = (
    *("dl", "dl_name", "iter", "n_iter", "epoch", "n_epoch", "n_step", "training", "task", "batch", "xb", "yb", "pred"),
    *("final_record", "stepped", "_loss", "_loss_grad", "_raw_loss", "_last_loss", "_output_loss", "_device"),
    *("_moves", "_caller", "_n_inp", "_data_seed", "_pass_random", "_seeds_drawn"),
)
_KIND = "__kind__"
_MANY = 64  # numbers in a list that is stored as a tensor: each by itself costs a file as much as a hundred together
#: What every state has.
_PARTS = {
    *("version", "model", "buffers", "modes", "trainable", "grads", "opt", "opt_kind", "counters", "position"),
    *("identity", "kept", "pass_random", "callbacks", "random"),
}


# Plain data: what `torch.load(weights_only=True)` reads


def plain(value: Any, where: str = "the state") -> Any:
    """A copy of `value` in host memory, of tensors, numbers, strings, None, lists, tuples and dicts alone.

    `L`, `Path`, numpy scalars and arrays, random generators of numpy and long lists of numbers become tagged dicts that
    `unplain` turns back.
    Anything else raises a TypeError that names `where`.
    """
    return _converted(value, where, lambda t: t.detach().to("cpu", copy=True))


def check_plain(value: Any, where: str) -> None:
    """Raises what `plain` would raise, without copying a tensor."""
    _converted(value, where, lambda t: t)


def _converted(value: Any, where: str, tensor: Callable[[Tensor], Tensor]) -> Any:
    def inside(v: Any) -> Any:
        return _converted(v, where, tensor)

    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str):
        return value
    if isinstance(value, Tensor):
        copied = tensor(value).as_subclass(Tensor)  # other classes are not read back with `weights_only=True`
        return copied if value.device.type == "cpu" else _tagged("tensor", copied, device=str(value.device))
    if kind in (list, tuple):
        kinds = set(map(type, value))
        if len(value) > _MANY and kinds in ({int}, {float}) and (numbers := _numbers(value)) is not None:
            return _tagged(f"numbers in a {kind.__name__}", numbers)
        return kind(value) if kinds <= {int, float} else kind(inside(v) for v in value)
    if isinstance(value, dict):
        items = {_key(k, where): inside(v) for k, v in value.items()}
        return items if _KIND not in items else _tagged("dict", items)
    if isinstance(value, L):
        return _tagged("L", [inside(v) for v in value])
    if isinstance(value, Path):
        return _tagged("path", str(value))
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.fields is None and not value.dtype.hasobject:
        data = torch.frombuffer(bytearray(value.tobytes()) or bytearray(1), dtype=torch.uint8)[: value.nbytes]
        kind_of_numpy = "array" if isinstance(value, np.ndarray) else "scalar"
        return _tagged(kind_of_numpy, data, dtype=value.dtype.str, shape=list(value.shape))
    if isinstance(value, np.random.Generator):
        return _tagged("generator", inside(value.bit_generator.state))
    raise TypeError(
        f"{where} is a {kind.__name__}, which cannot be stored: a state holds tensors, numbers, strings, None, lists, "
        "tuples and dicts. Store something simpler, or write `state_dict()` and `load_state_dict()` for the callback."
    )


def _numbers(value: Any) -> Tensor | None:
    """Integers or floats, each to the bit; None for integers that are too large."""
    try:
        return torch.tensor(value, dtype=torch.float64 if type(value[0]) is float else torch.int64)
    except (OverflowError, RuntimeError, ValueError):
        return None


def _key(key: Any, where: str) -> Any:
    if type(key) in (str, int, float, bool):
        return key
    raise TypeError(f"{where} has the key {key!r}; keys are strings or numbers.")


def _tagged(kind: str, value: Any, **more: Any) -> dict[str, Any]:
    return {_KIND: kind, "value": value, **more}


def unplain(value: Any) -> Any:
    """What `plain` was given."""
    if isinstance(value, (list, tuple)):
        return type(value)(unplain(v) for v in value)
    if isinstance(value, Tensor):
        return value.clone()
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return {k: unplain(v) for k, v in value.items()}
    return _UNTAG[value[_KIND]](value)


def _generator(tagged: dict[str, Any]) -> "np.random.Generator":  # quoted: numpy imports that module when asked
    state = unplain(tagged["value"])
    bits = getattr(np.random, state["bit_generator"])()
    bits.state = state
    return np.random.Generator(bits)


def _array(tagged: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(tagged["value"].numpy().tobytes(), np.dtype(tagged["dtype"]))
    return flat.reshape(tagged["shape"]).copy()


def _tensor(tagged: dict[str, Any]) -> Tensor:
    """On its device, where this machine has that one."""
    device = torch.device(tagged["device"])
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is None or here.type != device.type or (device.index or 0) >= torch.accelerator.device_count():
        return tagged["value"].clone()
    return tagged["value"].to(device)


_UNTAG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "L": lambda t: L(unplain(t["value"])),
    "path": lambda t: Path(t["value"]),
    "dict": lambda t: {k: unplain(v) for k, v in t["value"].items()},
    "array": _array,
    "numbers in a list": lambda t: t["value"].tolist(),
    "numbers in a tuple": lambda t: tuple(t["value"].tolist()),
    "scalar": lambda t: _array(t)[()],
    "generator": _generator,
    "tensor": _tensor,
}


def same(a: Any, b: Any) -> bool:
    """Whether two pieces of plain data are the same to the bit, NaN included."""
    if isinstance(a, Tensor):
        is_alike = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return is_alike and torch.equal(_bits(a), _bits(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# The whole run


def capture(learn: Any) -> dict[str, Any]:
    """Everything a run is, as plain data in host memory; `restore` puts it back."""
    with ExitStack() as stack:
        for cb in reversed(learn.cbs):  # those that put in other weights last take them out first
            stack.enter_context(cb.trained_weights())
        return _captured(learn)


def _captured(learn: Any) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": plain(_model_state(learn.model), "the model's state"),
        "buffers": [plain(getattr(m, name)) for m, name in _unsaved_buffers(learn.model)],
        "modes": [m.training for m in _modules(learn.model)],
        "trainable": [p.requires_grad for p in _parameters(learn.model)],
        "grads": [plain(p.grad) for p in _parameters(learn.model)],
        "opt": None if learn.opt is None else plain(learn.opt.state_dict(), "the optimizer's state"),
        "opt_kind": _kind_of_opt(learn.opt),
        "counters": plain({n: learn.__dict__[n] for n in COUNTERS if n in learn.__dict__}),  # none before the first fit
        "position": plain(learn._position()),
        "identity": learn._identity,
        "kept": plain(learn._kept.state_dict()),
        "pass_random": plain(learn._pass_random),
        **(learn._validation_start or capture_moving(learn)),  # a validation is begun again, with all that follows it
    }


def capture_or_point(learn: Any) -> dict[str, Any]:
    """`capture`; but between a stop and its resume, as long as nobody moved the weights, a copy of the stop's state."""
    point = learn._point
    return copy.deepcopy(point) if learn.task is None and _has_weights(learn, point) else capture(learn)


def _has_weights(learn: Any, state: dict[str, Any] | None) -> bool:
    if state is None or _differences(_model_state(learn.model), state["model"]):
        return False
    saved = unplain(state["model"])
    here = _model_state(learn.model).items()
    return all(torch.equal(value.cpu(), saved[name].cpu()) for name, value in here if isinstance(value, Tensor))


def capture_moving(learn: Any) -> dict[str, Any]:
    """The part of a run that a validation moves: the callbacks' own state and the random generators."""
    return {"callbacks": callback_states(learn), "random": plain(random_states())}


def callback_states(learn: Any) -> list[list[Any]]:
    """[class name, state, may it be left out] of every callback of a class that has something to keep, as listed."""
    states = [[type(cb).__name__, _plain_items(cb, cb.state_dict()), bool(cb.reads_only)] for cb in learn.cbs]
    keeping = {name for name, state, _ in states if state}
    return [entry for entry in states if entry[0] in keeping]


def _plain_items(cb: Any, state: dict[str, Any]) -> dict[str, Any]:
    return {k: plain(v, f"`{type(cb).__name__}.{k}`") for k, v in state.items()}


def check_callback_states(learn: Any) -> None:
    """Raises a TypeError that names callback and attribute, if a state cannot be stored."""
    for cb in learn.cbs:
        for name, value in cb.state_dict().items():
            check_plain(value, f"`{type(cb).__name__}.{name}`")


def restore(learn: Any, state: dict[str, Any]) -> None:
    """Puts back what `capture` took. A state that does not fit is refused before anything is changed."""
    check_fits(learn, state)
    if state["opt"] is not None:
        learn.opt.load_state_dict(unplain(state["opt"]))  # first: it refuses what does not fit before it changes
    if isinstance(learn.model, nn.Module):
        learn.model.load_state_dict(unplain(state["model"]))
    for (module, name), value in zip(_unsaved_buffers(learn.model), state["buffers"], strict=True):
        buffer, here = unplain(value), getattr(module, name)
        setattr(module, name, buffer if buffer is None or here is None else buffer.to(here.device))
    for module, training in zip(_modules(learn.model), state["modes"], strict=True):
        module.training = training
    saved = zip(_parameters(learn.model), state["trainable"], state["grads"], strict=True)
    for p, trainable, grad in saved:
        p.requires_grad_(trainable)
        p.grad = None if grad is None else unplain(grad).to(p.device, p.dtype)
    learn.__dict__.update(unplain(state["counters"]))
    learn._kept.load_state_dict(unplain(state["kept"]))
    learn._pass_random = unplain(state["pass_random"])
    for cb, cb_state in _matched(learn, state["callbacks"]):
        if cb_state:
            cb.load_state_dict(unplain(cb_state))
    set_random_states(unplain(state["random"]))


def check_fits(learn: Any, state: dict[str, Any]) -> None:
    """ValueError that says what differs, where a state is not one of this learner's."""
    if not isinstance(state, dict) or state.get("version") != VERSION or not state.keys() >= _PARTS:
        raise ValueError("this is no state of a learner: `load_state_dict` takes what `state_dict()` returned.")
    problems = _differences(_model_state(learn.model), state["model"])
    problems += _other_number("modules", state["modes"], _modules(learn.model))
    problems += _other_number("buffers", state["buffers"], _unsaved_buffers(learn.model))
    problems += _other_number("parameters", state["trainable"], _parameters(learn.model))
    if state["opt"] is not None and learn.opt is None:
        problems.append("an optimizer saved, none here: call `learn.create_opt()`")
    elif state["opt"] is not None and state["opt_kind"] != _kind_of_opt(learn.opt):
        problems.append(f"the optimizer is {state['opt_kind']} saved and {_kind_of_opt(learn.opt)} here")
    problems += _missing_callbacks(learn, state["callbacks"])
    if problems:
        raise ValueError("the state does not fit this learner: " + "; ".join(problems[:5]) + ".")


def _differences(here: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    problems = [f"`{k}` saved but not in the model" for k in saved if k not in here]
    problems += [f"`{k}` in the model but not saved" for k in here if k not in saved]
    for name, value in here.items():
        if isinstance(value, Tensor) and name in saved and _shape(saved[name]) != value.shape:
            problems.append(f"`{name}` is {list(_shape(saved[name]))} saved and {list(value.shape)} here")
    return problems


def _shape(saved: Any) -> torch.Size:
    """Of a tensor that may have been on an accelerator."""
    return (saved["value"] if isinstance(saved, dict) else saved).shape


def _other_number(of: str, saved: list[Any], here: Iterator[Any]) -> list[str]:
    n = len(list(here))
    return [] if n == len(saved) else [f"{len(saved)} {of} saved, {n} here"]


def _kind_of_opt(opt: Any) -> str | None:
    """The class of an optimizer, and of the one or those that it wraps."""
    if opt is None or not hasattr(opt, "opt"):
        return None if opt is None else type(opt).__name__
    inner = opt.opt if isinstance(opt.opt, tuple) else (opt.opt,)
    return f"{type(opt).__name__} of {' and '.join(str(_kind_of_opt(o)) for o in inner)}"


def _missing_callbacks(learn: Any, saved: list[list[Any]]) -> list[str]:
    here = [type(cb).__name__ for cb in learn.cbs]
    wanted = [name for name, _, may_be_left_out in saved if not may_be_left_out]
    missing = sorted({n for n in wanted if wanted.count(n) > here.count(n)})
    return [f"callback {name} has a saved state but is not on the learner: add it first" for name in missing]


def _matched(learn: Any, saved: list[list[Any]]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Saved states with their callbacks: by class name, several of one class in the order of the list."""
    left = list(learn.cbs)
    for name, cb_state, _ in saved:
        cb = next((cb for cb in left if type(cb).__name__ == name), None)
        if cb is not None:  # one that only reads may be left out
            left.remove(cb)
            yield cb, cb_state


def _model_state(model: Any) -> dict[str, Any]:
    return model.state_dict() if isinstance(model, nn.Module) else {}


def _modules(model: Any) -> Iterator[nn.Module]:
    return model.modules() if isinstance(model, nn.Module) else iter(())


def _unsaved_buffers(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """Buffers that the model's own state leaves out: registered with `persistent=False`."""
    for module in _modules(model):
        yield from ((module, name) for name in sorted(module._non_persistent_buffers_set))


def _parameters(model: Any) -> Iterator[nn.Parameter]:
    return model.parameters() if isinstance(model, nn.Module) else iter(())


# Runs beside the training


@contextmanager
def set_aside(learn: Any) -> Iterator[None]:
    """The loop's numbers, the model's mode module by module and the random generators, put back also after an error.

    What drew a seed on purpose (`_seeds_drawn`) moves the global generator of torch all the same.
    """
    attributes = {n: learn.__dict__[n] for n in ASIDE if n in learn.__dict__}
    modes = [(m, m.training) for m in _modules(learn.model)]
    learn._seeds_drawn = n_drawn = 0
    with preserved_randomness():
        try:
            yield
        finally:
            n_drawn = learn._seeds_drawn
            for name in ASIDE:
                learn.__dict__.pop(name, None)
            learn.__dict__.update(attributes)
            for module, training in modes:
                module.training = training
    for _ in range(n_drawn):
        draw_seed()
