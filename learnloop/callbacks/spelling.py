"""Settings written down as plain data that JSON holds, the same in every process: no addresses, no long lists."""

import inspect
import re
import types
import zlib
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["arguments_of", "checksum", "name_of", "spelled"]

SHOWN = 8  # items of a long list that are written out; of the others there is a checksum
DEPTH = 5  # of things inside of things
_URL = re.compile(r"(\w[\w+.-]*://)([^/\s@]*@)?([^/\s]*)\S*")


def spelled(value: Any, depth: int = DEPTH) -> Any:
    """A setting in numbers, strings, lists and dicts; functions by name, objects by class and arguments.

    Of an address only the host is kept: the rest may be a secret.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (str, PurePath)):
        return _URL.sub(r"\1\3/…", str(value))
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return _numbers(value)
    if depth == 0:
        return name_of(type(value))
    if isinstance(value, Mapping):
        return {str(spelled(k, 0)): spelled(v, depth - 1) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return _shortened(sorted((spelled(v, depth - 1) for v in value), key=repr))
    if isinstance(value, (list, tuple, range)):
        return _shortened([spelled(v, depth - 1) for v in value])
    return _thing(value, depth)


def _thing(value: Any, depth: int) -> Any:
    if isinstance(value, Enum):
        return spelled(value.value, depth)
    if isinstance(value, np.ufunc):
        return f"numpy.{value.__name__}"
    if isinstance(value, slice):
        return f"slice({value.start!r}, {value.stop!r}, {value.step!r})"
    if isinstance(value, partial):
        return _call(name_of(value.func), [spelled(a, depth - 1) for a in value.args], spelled(value.keywords, depth))
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        return name_of(value)
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value)
    return _call(name_of(type(value)), [], arguments_of(value, depth - 1))


def _call(name: str, args: list[Any], kwargs: Mapping[str, Any]) -> str:
    return f"{name}({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})"


def _numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()  # which has no bfloat16
    else:
        array = np.asarray(value)
    if array.size <= SHOWN:
        return array.tolist()
    return f"{type(value).__name__} {tuple(array.shape)} {value.dtype}, checksum {checksum(array.tobytes()):08x}"


def _shortened(items: list[Any]) -> list[Any]:
    if len(items) <= SHOWN:
        return items
    return [*items[:SHOWN], f"… {len(items)} in all, checksum {checksum(repr(items).encode()):08x}"]


def name_of(thing: Any) -> str:
    """`module.name` of a function or class; only the name where that is a public one of this package or built in."""
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    module = getattr(thing, "__module__", None) or ""
    return name if module.partition(".")[0] in ("learnloop", "builtins", "") else f"{module}.{name}"


def arguments_of(thing: Any, depth: int = DEPTH) -> dict[str, Any]:
    """The arguments that an object was made with, where it keeps them under their names."""
    own = getattr(thing, "__dict__", {})
    try:
        names = list(inspect.signature(type(thing).__init__).parameters)[1:]
    except (TypeError, ValueError):  # made by C, without a signature
        return {}
    return {n: spelled(own[n], depth) for n in names if n in own}


def checksum(data: bytes) -> int:
    """32 bits."""
    return zlib.crc32(data)
