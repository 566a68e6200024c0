"""Tensors from whatever holds numbers, arrays from tensors, one batch from many."""

from collections.abc import Iterable
from numbers import Number
from typing import Any

import numpy as np
import torch
from fastcore.foundation import L
from torch import Tensor

from learnloop.data.batches import elements, first_tensor, rebuilt

__all__ = ["tensor", "to_concat", "to_np", "unsqueeze"]


def tensor(
    x: Any,  # a number, a sequence, an array, anything that numpy takes (pandas, images), a tensor
    *rest: Any,  # more of them: all together are one sequence
    dtype: torch.dtype | None = None,  # None: as torch infers it, but float32 for 64-bit floats and 16-bit images
    device: torch.device | str | None = None,
    requires_grad: bool = False,
    pin_memory: bool = False,
) -> Tensor:
    """A tensor from numbers: `tensor(1, 2, 3)`.

    A tensor comes back as it is, and an array shares its memory, where nothing has to change.
    """
    made = _made((x, *rest) if rest else x, dtype)
    if dtype is None and made.dtype in (torch.float64, torch.uint16):
        dtype = torch.float32
    made = made.to(device=device, dtype=dtype)
    if pin_memory:
        made = made.pin_memory()
    return made.detach().requires_grad_() if requires_grad and not made.requires_grad else made


def _made(x: Any, dtype: torch.dtype | None) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if isinstance(x, L):
        x = list(x)
    if isinstance(x, Number) or (isinstance(x, (tuple, list)) and not (x and isinstance(x[0], np.ndarray))):
        return torch.tensor(x, dtype=dtype)
    array = x if isinstance(x, np.ndarray) else np.array(x)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"`tensor` got a {type(x).__name__} that holds no numbers; pass numbers, or a list or array.")
    is_shareable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.as_tensor(array if is_shareable else array.copy())


def unsqueeze(
    x: Tensor,
    dim: int = -1,  # where they are added: -1 at the end, 0 at the front
    n: int = 1,  # how many
) -> Tensor:
    """The tensor with `n` more dimensions of size 1."""
    for _ in range(n):
        x = x.unsqueeze(dim)
    return x


def to_np(batch: Any) -> Any:
    """The batch with arrays of numpy in place of tensors; bfloat16, which numpy lacks, becomes float32."""

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return rebuilt(x, convert)
        return (x.float() if x.dtype is torch.bfloat16 else x).numpy(force=True)

    return convert(batch)


def to_concat(batches: Iterable[Any], dim: int = 0) -> Any:
    """Batches of one structure as one: tensors are concatenated along `dim`, those without a dimension stacked.

    Where shapes forbid it, as with texts of several lengths, an `L` of the rows stands for the tensor. Lists without a
    tensor are joined end to end, and anything else is collected in an `L`.
    """
    batches = list(batches)
    if not batches:
        return batches
    first = batches[0]
    if isinstance(first, Tensor):
        return _tensors_joined(batches, dim)
    if isinstance(first, (list, L)) and first_tensor(first) is None:
        return type(first)(x for batch in batches for x in batch)
    if elements(first) is None:
        return L(batches)
    columns = zip(*map(elements, batches), strict=True)
    return rebuilt(first, lambda _: to_concat(next(columns), dim))


def _tensors_joined(tensors: list[Tensor], dim: int) -> Any:
    if all(t.ndim == 0 for t in tensors):
        return torch.stack(tensors)
    rest = {t.movedim(dim, 0).shape[1:] for t in tensors if t.shape != (0,)}  # torch lets an empty vector join any
    if len(rest) < 2:
        return torch.cat(tensors, dim)
    return L(row for t in tensors for row in t.unbind(dim))
