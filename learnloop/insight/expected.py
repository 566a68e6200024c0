"""What a loss should be: of predictions that know nothing, and of those that know everything. Pure functions."""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Kind(Enum):
    """What a loss takes as predictions."""

    CLASSES = "a number per class"
    LABELS = "a number per label"
    PROBABILITIES = "a probability per label"
    LOG_PROBABILITIES = "a log probability per class"
    NUMBERS = "numbers like the targets"


#: Parts of names of losses, in lower case without underscores, the more special first.
_NAMES = (
    (("bcewithlogits", "binarycrossentropywithlogits", "multilabelsoftmargin"), Kind.LABELS),
    (("bce", "binarycrossentropy"), Kind.PROBABILITIES),
    (("crossentropy", "focal"), Kind.CLASSES),
    (("mse", "l1", "huber", "mae", "squarederror"), Kind.NUMBERS),
)


def name_of(loss_func: Any) -> str:
    """`CrossEntropyLoss`, `cross_entropy`; of a partial that of its function."""
    while isinstance(loss_func, partial):
        loss_func = loss_func.func
    return getattr(loss_func, "__name__", None) or type(loss_func).__name__


def kind_of(loss_func: Any) -> Kind | None:
    """What a loss takes, by its name; None where that does not say."""
    name = name_of(loss_func).lower().replace("_", "")
    if name in ("nllloss", "nllloss2d", "nllloss"):
        return Kind.LOG_PROBABILITIES
    return next((kind for parts, kind in _NAMES if any(part in name for part in parts)), None)


def knowing_nothing(kind: Kind, pred: Tensor, target: Any) -> Tensor:
    """Predictions of the shape of `pred` that are the same for every sample."""
    if kind is Kind.NUMBERS:
        mean = target.to(pred.dtype).mean(0, keepdim=True)
        return mean.expand(target.shape).reshape(pred.shape)
    if kind is Kind.PROBABILITIES:
        return torch.full_like(pred, 0.5)
    if kind is Kind.LOG_PROBABILITIES:
        return torch.zeros_like(pred).log_softmax(1)
    return torch.zeros_like(pred)  # equal logits


def knowing_all(loss_func: Callable[..., Any], kind: Kind | None, pred: Tensor, target: Any) -> float:
    """The lowest loss there can be, which label smoothing keeps above 0; 0 where that is not known."""
    is_plain = pred.ndim == 2 and target.ndim == 1 and not target.is_floating_point()
    if kind is not Kind.CLASSES or not is_plain or int(target.min()) < 0:
        return 0.0
    right = torch.zeros_like(pred).scatter_(1, target[:, None], 1.0)
    return min(float(loss_func(right * scale, target)) for scale in (1, 2, 3, 4, 5, 6, 8, 10, 15, 20))
