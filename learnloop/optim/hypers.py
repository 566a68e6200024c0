"""Values of hypers: checked, spread over parameter groups, and dicts that pass on what is written into them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from learnloop.optim.schedules import even_mults

#: Hypers that mean the same everywhere: at least the first number, and below the second.
BOUNDS = {
    "lr": (0.0, math.inf),
    "wd": (0.0, math.inf),
    "eps": (0.0, math.inf),
    "mom": (0.0, 1.0),
    "sqr_mom": (0.0, 1.0),
}


def spread(name: str, value: Any, n: int) -> list[Any]:
    """A value for each of `n` groups, from one for all, a list, `slice(end)` or `slice(start, end)`.

    `slice(end)` is `end / 10` for all groups but the last; `slice(start, end)` grows by equal factors. ValueError for
    another number of values, and for one that the hyper cannot have.
    """
    if type(value) is not float:  # what a schedule sets in every batch
        value = _of_slice(name, value, n) if isinstance(value, slice) else host_number(value)
    if isinstance(value, (float, str, bytes, Mapping)) or not isinstance(value, Iterable):
        return [checked(name, value)] * n
    values = [checked(name, host_number(v)) for v in value]
    if len(values) not in (1, n):
        raise ValueError(
            f"`{name}` got {len(values)} values, but there are {n} parameter groups; pass one value or {n}."
        )
    return values if len(values) == n else values * n


def _of_slice(name: str, value: slice, n: int) -> Any:
    if value.stop is None or value.step is not None:
        raise ValueError(f"`{name}` got {value}; use slice(end) or slice(start, end).")
    if not value.start:
        return [value.stop / 10] * (n - 1) + [value.stop]
    if value.start * value.stop <= 0:
        raise ValueError(f"`{name}` got {value}: no factor leads from one to the other; use two numbers above 0.")
    return even_mults(value.start, value.stop, n)


def checked(name: str, value: Any) -> Any:
    """The value itself; TypeError for no number, ValueError for one out of bounds; unknown names may be anything."""
    if name not in BOUNDS:
        return value
    low, high = BOUNDS[name]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}={value!r}`: pass a number, a list with one for each group, or a slice.")
    if not low <= float(value) < high:  # written so that not-a-number is refused too
        above = "" if high == math.inf else f" and below {high:g}"
        raise ValueError(f"`{name}={value!r}`: pass a finite number from {low:g} on{above}.")
    return value


def host_number(value: Any) -> Any:
    """A numpy or torch scalar as a plain number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def merged(groups: Sequence[Mapping[str, Any]], name: str, values: Sequence[Any]) -> list[Any]:
    """`values`, one per group, but where a group has a value of its own that one."""
    return [group.get(name, value) for group, value in zip(groups, values, strict=True)]


class LinkedDict(dict[str, Any]):
    """A dict that also hands each item set in it to `write(name, value)`."""

    def __init__(self, write: Callable[[str, Any], None], items: Mapping[str, Any]):
        super().__init__(items)
        self._write = write

    def __setitem__(self, name: str, value: Any) -> None:
        self._write(name, value)
        super().__setitem__(name, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy belongs to no optimizer
