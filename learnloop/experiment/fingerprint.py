"""What a training is made of, in plain data, so that an interrupted study can tell whether it goes on with the same."""

import hashlib
import json
import platform
import types
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from learnloop.callbacks.spelling import name_of, spelled

__all__ = ["configuration", "differences", "fingerprint"]


def configuration(make_learner: Any, factories: Mapping[str, Any], fit: Any, metric: Any) -> dict[str, Any]:
    """All that decides what a training comes to, but its seed; functions by name, code, defaults and closure.

    What functions look up in their module is not followed.
    """
    return {
        "make_learner": described(make_learner),
        "cbs": {name: described(factory) for name, factory in factories.items()},
        "fit": described(fit),
        "metric": described(metric),
        "python": ".".join(platform.python_version_tuple()[:2]),  # code is another in each
        "torch": torch.__version__,
    }


def fingerprint(configuration: Mapping[str, Any]) -> str:
    """16 characters that are others where anything is."""
    return _mark(json.dumps(configuration, sort_keys=True))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of what is another, `cbs` one by one."""
    names = [n for n in now if n != "cbs" and before.get(n) != now[n]]
    old, new = before.get("cbs", {}), now["cbs"]
    return names + [f"`cbs[{n!r}]`" for n in dict.fromkeys([*old, *new]) if old.get(n) != new.get(n)]


def described(thing: Any, depth: int = 6) -> Any:
    """A function, or what else a study is given, in plain data; `depth` bounds functions that close over each other."""
    inner = partial(described, depth=depth - 1)
    if depth == 0:
        return name_of(thing)
    if isinstance(thing, partial):
        return [inner(thing.func), inner(thing.args), inner(thing.keywords)]
    if isinstance(thing, (list, tuple)):
        return [inner(item) for item in thing]
    if isinstance(thing, Mapping):
        return {str(name): inner(value) for name, value in thing.items()}
    if isinstance(thing, types.MethodType):
        return [name_of(thing), inner(thing.__self__)]
    if isinstance(thing, types.FunctionType):
        return [name_of(thing), _mark(repr(_code(thing.__code__))), inner(_kept(thing))]
    return spelled(thing)


def _kept(function: types.FunctionType) -> list[Any]:
    """What a function has with it: closure and defaults."""
    inside = [cell.cell_contents for cell in function.__closure__ or () if cell.cell_contents is not function]
    return [*inside, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]


def _code(code: types.CodeType) -> Any:
    """Instructions, names and constants; neither comments nor the place in a file."""
    constants = [_code(c) if isinstance(c, types.CodeType) else spelled(c) for c in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, constants


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
