"""Pure functions over batches of any shape: where they lie, how they are split, how a model is called with them.

A batch is a tensor, or a tuple, list, mapping, dataclass or namedtuple of batches, or any object with a method `to`.
Functions that change a batch return the very same object where there was nothing to change.
"""

import copy
import dataclasses
import inspect
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from fastcore.basics import detuplify, tuplify
from fastcore.foundation import L
from torch import Tensor, nn
from torch.distributions import Distribution

__all__ = [
    "accepted_keywords",
    "default_device",
    "describe",
    "detuplify",
    "elements",
    "exact_device",
    "find_bs",
    "find_device",
    "first_tensor",
    "get_model",
    "leaves",
    "model_caller",
    "n_beside",
    "on_device",
    "pick_loss",
    "pick_pred",
    "rebuilt",
    "split",
    "tensors_in",
    "to_cpu",
    "to_detach",
    "to_device",
    "to_float",
    "to_half",
    "tuplify",
]

Device = torch.device | str | int
TARGET_KEYS = ("labels", "label", "target")
SHOWN = 8  # elements of one container that `describe` names
SINGLES = 1024  # numbers, one of each batch, that are kept one by one at most
PINNED = 1 << 20  # bytes that they may keep from being used again

# -- devices


_use_accelerator: bool | None = None  # what `default_device` was told last; None: if there is one


def default_device(use: bool | int | None = -1) -> torch.device:
    """The accelerator torch sees, with its index, else the CPU.

    `use` says so for all later calls too: False the CPU, True an accelerator (RuntimeError where there is none), None
    whichever is there, as in the beginning; -1 leaves that as it is.
    """
    global _use_accelerator
    if use not in (-1, None, True, False):
        raise ValueError(f"`default_device(use={use!r})`: pass True, False, None or -1; a device goes to `to_device`.")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if use == 1 and accelerator is None:
        raise RuntimeError("`default_device(use=True)`: torch sees no accelerator here. Pass None or False.")
    if use != -1:
        _use_accelerator = use if use is None else bool(use)
    return torch.device("cpu") if accelerator is None or _use_accelerator is False else exact_device(accelerator)


def exact_device(device: Device) -> torch.device:
    """The device as tensors name it: `cuda` becomes `cuda:0` (or whichever is current), `cpu:0` becomes `cpu`."""
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        return torch.device(device.type)
    if device.index is not None:
        return device
    current = getattr(torch.get_device_module(device), "current_device", None)  # mps has one device and no such name
    return torch.device(device.type, current() if current else 0)


def on_device(batch: Any, device: Device) -> bool:
    """Whether everything that could be moved is on `device`; quickest when that comes from `exact_device`.

    An object that can only be asked to move (`to`, but no tensors to look at) counts as being elsewhere.
    """
    if type(batch) is tuple:  # the usual batch, looked at once per batch: 0.2 µs for two tensors
        try:
            for x in batch:
                if x.device != device:
                    break
            else:
                return True
        except AttributeError:
            pass
    device = exact_device(device)
    return all(x.device == device if isinstance(x, Tensor) else not hasattr(x, "to") for x in leaves(batch))


def to_device(batch: Any, device: Device | None = None, non_blocking: bool = False) -> Any:
    """The batch on `device` (default: `default_device()`), the same object if it is there already."""
    device = default_device() if device is None else device

    def move(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=non_blocking)
        if hasattr(x, "to") and not isinstance(x, (dict, UserDict)):  # BatchEncoding.to would change the loader's own
            return x.to(device)
        return rebuilt(x, move)

    return move(batch)


def to_cpu(batch: Any) -> Any:
    """The batch in host memory."""
    return to_device(batch, "cpu")


def find_device(batch: Any) -> torch.device | None:
    """The device of the first tensor, None where there is no tensor."""
    tensor = first_tensor(batch)
    return None if tensor is None else tensor.device


# -- contents


def to_detach(batch: Any, cpu: bool = True) -> Any:
    """The batch without graphs, in host memory if `cpu`."""

    def detach(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return rebuilt(x, detach)
        x = x.detach() if x.requires_grad else x
        return x.cpu() if cpu else x

    return detach(batch)


def to_float(batch: Any) -> Any:
    """The batch with its floating point tensors in float32."""
    return _cast(batch, torch.float32)


def to_half(batch: Any) -> Any:
    """The batch with its floating point tensors in float16."""
    return _cast(batch, torch.float16)


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch in nested order."""
    return (x for x in leaves(batch) if isinstance(x, Tensor))


def first_tensor(batch: Any) -> Tensor | None:
    """The first tensor in nested order, None where there is none."""
    return next(tensors_in(batch), None)


def find_bs(batch: Any) -> int:
    """The first dimension of the first tensor (or array) that has one; `len(batch)` where there is none."""
    if type(batch) is tuple and batch and isinstance(batch[0], Tensor) and batch[0].ndim:
        return batch[0].shape[0]
    for x in leaves(batch):
        if getattr(x, "shape", None):
            return x.shape[0]
    return len(batch)


def n_beside(pred: Any) -> int:
    """How many single numbers to keep that were computed from predictions like this, before they are put together.

    Each keeps the memory that was freed around it, about that of its prediction, from being used again.
    """
    return max(1, min(SINGLES, PINNED // (sum(getattr(x, "nbytes", 0) for x in leaves(pred)) or 1)))


def describe(batch: Any) -> str:
    """Types, shapes and devices in one line, no values: `(float32[64, 10] cpu, int64[64] cpu)`."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)} {batch.device}"
    if isinstance(batch, (tuple, list, L)):
        parts = [describe(x) for x in islice(batch, SHOWN)]
        left, right = "()" if isinstance(batch, tuple) else "[]"
    elif (keyed := _keyed(batch)) is not None:
        parts = [f"{key}: {describe(x)}" for key, x in islice(keyed.items(), SHOWN)]
        batch, left, right = keyed, "{", "}"
    else:
        return type(batch).__name__
    more = [f"{len(batch) - SHOWN} more"] if len(batch) > SHOWN else []
    return left + ", ".join(parts + more) + right


# -- inputs and targets


def split(batch: Any, n_inp: int | None = None, targets: str | Sequence[str] | None = None) -> tuple[tuple, tuple]:
    """`(xb, yb)` of a batch.

    Tuples and lists: the first `n_inp` elements are `xb` (default: all but the last, or the only one); of a namedtuple
    `targets` may name those that are `yb`, and all others are `xb`. Mappings and dataclasses are one input; `targets`
    names the keys whose values are `yb` (default: those of labels, label, target that are there; a named one that is
    not raises ValueError). Everything else is one input.
    """
    if targets is not None and hasattr(batch, "_fields"):
        fields = dict(zip(batch._fields, batch, strict=True))
        yb = _named_targets(fields, targets)
        return tuple(value for name, value in fields.items() if name not in yb), tuple(yb.values())
    if isinstance(batch, (tuple, list, L)):
        n = n_inp if n_inp is not None else max(len(batch) - 1, 1)
        return tuple(batch[:n]), tuple(batch[n:])
    keyed = _keyed(batch)
    if keyed is None:
        return (batch,), ()
    if targets is None:
        return (batch,), tuple(keyed[key] for key in TARGET_KEYS if key in keyed)
    return (batch,), tuple(_named_targets(keyed, targets).values())


def _named_targets(keyed: Mapping, targets: str | Sequence[str]) -> dict[str, Any]:
    """The named values in the order of the names; ValueError for a name that is not there."""
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    for name in names:
        if name not in keyed:
            raise ValueError(
                f"`targets` names {name!r}, but the batch has {', '.join(map(repr, keyed))}. "
                "Pass `targets` the keys that hold the targets."
            )
    return {name: keyed[name] for name in names}


# -- the model


def get_model(model: Any) -> Any:
    """The user's own model inside torch's wrappers: data parallel, distributed, compiled."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        else:
            return model


def accepted_keywords(model: Callable) -> frozenset[str] | None:
    """The names that the model's `forward` (or the function itself) takes as keywords; None if it takes any."""
    parameters = _parameters(model)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def model_caller(model: Callable, sample_xb: tuple) -> Callable[[tuple], Any]:
    """How `model` is called with inputs like `sample_xb`, decided once: a function of `xb` for the whole pass.

    One mapping or dataclass: with the keywords that the model accepts, or with the object itself where the model knows
    none of its keys. Everything else: `model(*xb)`, also for a later `xb` that a callback replaced.
    TypeError where the model needs an argument that the sample does not have.
    """
    keyed = _keyed(sample_xb[0]) if len(sample_xb) == 1 else None
    if keyed is None or not _takes_keywords(model, keyed):
        return lambda xb: model(*xb)
    names = accepted_keywords(model)

    def call(xb: tuple) -> Any:
        keyed = _keyed(xb[0]) if len(xb) == 1 else None
        if keyed is None:
            return model(*xb)
        return model(**(keyed if names is None else {k: v for k, v in keyed.items() if k in names}))

    return call


def pick_pred(output: Any) -> Any:
    """The `logits` of a model's output, as key or attribute, where it has them; else the output itself."""
    logits = _named(output, "logits")
    return output if logits is None else logits


def pick_loss(output: Any) -> Tensor | None:
    """The `loss` of a model's output, as key or attribute; None where there is none."""
    loss = _named(output, "loss")
    return loss if isinstance(loss, Tensor) else None


# -- how batches are taken apart and put together


def _keyed(batch: Any) -> Mapping | None:
    """What has names in a batch: a mapping itself, a dataclass as the dict of its fields; None for all others."""
    if isinstance(batch, Mapping):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return None


def elements(batch: Any) -> Any:
    """What a container holds, in the order in which `rebuilt` goes over it; None for what is no container."""
    if isinstance(batch, (tuple, list, L)):
        return batch
    keyed = _keyed(batch)
    return None if keyed is None else keyed.values()


def leaves(batch: Any) -> Iterator[Any]:
    """What is in a batch, in nested order, without the containers."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list, L)):
        for x in batch:
            yield from leaves(x)
    elif (keyed := _keyed(batch)) is not None:
        for x in keyed.values():
            yield from leaves(x)
    else:
        yield batch


def rebuilt(batch: Any, func: Callable[[Any], Any]) -> Any:
    """The batch with `func` applied to each element of the container; itself if that changes none, or it is none."""
    if isinstance(batch, (tuple, list, L)):
        items = [func(x) for x in batch]
        if all(new is old for new, old in zip(items, batch, strict=True)):
            return batch
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    keyed = _keyed(batch)
    if keyed is None:
        return batch
    changed = {key: new for key, old in keyed.items() if (new := func(old)) is not old}
    if not changed:
        return batch
    return _mapping_with(keyed, changed) if keyed is batch else _dataclass_with(batch, changed)


def _mapping_with(batch: Mapping, changed: dict) -> Mapping:
    """A mapping of the same type with other values; a dict where the type cannot be made from one."""
    if isinstance(batch, (dict, UserDict)):  # these copy their items, other mappings might share them with the copy
        new = copy.copy(batch)
        for key, value in changed.items():
            new[key] = value
        return new
    items = {**batch, **changed}
    try:
        return type(batch)(items)  # type: ignore[call-arg]
    except Exception:  # whatever a foreign constructor objects to
        return items


def _dataclass_with(batch: Any, changed: dict) -> Any:
    """A copy with other values. `dataclasses.replace` would run `__post_init__` again and refuse `init=False`."""
    new = copy.copy(batch)
    for name, value in changed.items():
        object.__setattr__(new, name, value)  # frozen ones too
    return new


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return rebuilt(x, cast)
        return x.to(dtype) if x.is_floating_point() else x

    return cast(batch)


# -- how models are looked at


def _named(output: Any, name: str) -> Any:
    """`output[name]` or `output.name`, None where it has neither."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, Mapping):
        return output.get(name)
    if isinstance(output, Distribution):  # its `logits` are a parameter, the distribution is the prediction
        return None
    return getattr(output, name, None)


def _parameters(model: Callable) -> list[inspect.Parameter]:
    model = get_model(model)  # the wrappers' `forward(*args, **kwargs)` says nothing
    return list(inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters.values())


def _takes_keywords(model: Callable, keyed: Mapping) -> bool:
    """Whether the model wants the values of `keyed` by name, not `keyed` itself; TypeError if neither can work."""
    parameters, names = _parameters(model), accepted_keywords(model)
    by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [name for name in required if name not in by_name or name not in keyed]
    known = any(name in keyed for name in by_name)
    if not missing:
        return known or names is None
    if known or len(required) > 1:
        inner = get_model(model)
        label = f"{type(inner).__name__}.forward" if isinstance(inner, nn.Module) else getattr(inner, "__name__", inner)
        raise TypeError(
            f"`{label}` needs {', '.join(f'`{name}`' for name in missing)}, but the batch has "
            f"{', '.join(map(repr, keyed))}. Name the parameters like the keys, or take the whole batch in one."
        )
    return False
