"""A learner that is looked at: its first training batch, and what that gives before any update."""

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from learnloop.data.batches import to_detach
from learnloop.insight.expected import Kind, kind_of, knowing_nothing, name_of
from learnloop.insight.findings import NotApplicable
from learnloop.insight.trials import Probe, Ready, read, train


class Subject:
    """A learner that is looked at, with what several checks need; each is made when it is first asked for."""

    def __init__(self, learn: Any, seconds: float):
        self.learn, self.seconds = learn, seconds  # the longest that one training may take

    @cached_property
    def batch(self) -> Any:
        """The first training batch, as its loader gives it."""
        first = read(self.learn, self.learn._loader(0), 1)
        if not first:
            raise ValueError("the training loader is empty: it yields no batch.")
        return first[0]

    def ready(self, n: int = 1) -> Ready:
        """The first training batch, `n` times."""
        return Ready([self.batch] * n, self.learn)

    @cached_property
    def start(self) -> "Start":
        """What the first training batch gives before any update."""
        found: list[Start] = []
        train(self.learn, self.ready(), 1, Probe(after_loss=lambda learn: found.append(Start(learn))))
        return found[0]


class Start:
    """Prediction, targets and loss of a training batch, without graphs."""

    def __init__(self, learn: Any):
        self.last = _last_operation(learn.pred)  # that made the prediction
        self.pred, self.yb = to_detach(learn.pred, cpu=False), to_detach(learn.yb, cpu=False)
        self.loss = None if learn._raw_loss is None else float(learn._raw_loss.detach())
        self.loss_func = learn.loss_func
        self.kind = _kind(self.loss_func, self.pred, self.yb)

    @property
    def is_plain(self) -> bool:
        """Whether there is one tensor of predictions and one of targets."""
        return isinstance(self.pred, Tensor) and len(self.yb) == 1 and isinstance(self.yb[0], Tensor)

    def expected(self) -> float:
        """The loss of predictions that know nothing."""
        if self.kind is None or not isinstance(self.pred, Tensor):
            raise NotApplicable(
                f"what `{name_of(self.loss_func)}` gives for predictions that know nothing is not known."
            )
        if self.loss_func is None:
            return math.log(self.pred.shape[-1])
        if self.kind is Kind.NUMBERS and not (self.is_plain and self.pred.numel() == self.yb[0].numel()):
            raise NotApplicable("predictions and targets are not one tensor each, of the same size.")
        target = self.yb[0] if self.yb else None
        with torch.no_grad():
            return float(self.loss_func(knowing_nothing(self.kind, self.pred, target), *self.yb))


def _kind(loss_func: Any, pred: Any, yb: Any) -> Kind | None:
    if loss_func is not None:
        return kind_of(loss_func)
    # The model's own loss: class numbers beside a row of numbers are taken for a cross-entropy.
    are_classes = isinstance(pred, Tensor) and len(yb) == 1 and isinstance(yb[0], Tensor) and yb[0].dtype == torch.int64
    return Kind.CLASSES if are_classes and pred.ndim == yb[0].ndim + 1 else None


def _last_operation(pred: Any) -> str:
    """What made a prediction, as `Softmax`; operations that only change its shape left out. Empty where unknown."""
    node = getattr(pred, "grad_fn", None)
    while node is not None:
        name = node.name().removesuffix("Backward0").removesuffix("Backward1")
        if name.lower() not in _SHAPING or not node.next_functions:
            return name
        node = node.next_functions[0][0]
    return ""


_SHAPING = {"view", "unsafeview", "squeeze", "unsqueeze", "reshape", "flatten", "alias", "tocopy", "clone", "select"}
