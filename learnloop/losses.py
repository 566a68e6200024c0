"""Losses that fit predictions and targets of any shape, and know how predictions are read.

`activation` makes probabilities of a model's output, `decodes` makes targets of those. `reduction` may change later.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "BCELossFlat",
    "BCEWithLogitsLossFlat",
    "BaseLoss",
    "CrossEntropyLossFlat",
    "DiceLoss",
    "FocalLoss",
    "FocalLossFlat",
    "L1LossFlat",
    "LabelSmoothingCrossEntropy",
    "LabelSmoothingCrossEntropyFlat",
    "MSELossFlat",
    "NoneReduce",
    "per_sample",
    "reduce_loss",
    "unreduced",
]

REDUCTIONS = ("mean", "sum", "none")
_SMALL_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32}

Loss = Callable[..., Tensor]


# One value, or one per element


def reduce_loss(loss: Tensor, reduction: str = "mean") -> Tensor:
    """The mean or the sum of a loss, or the loss itself for "none"."""
    _check_reduction(reduction)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


@contextmanager
def unreduced(
    loss_func: Loss,
    replace: Callable[[Loss], Any] | None = None,  # puts a loss in place of `loss_func`, where its owner should use it
) -> Iterator[Loss]:
    """A context that gives `loss_func` with one value per target instead of their mean or sum.

    A loss with an attribute `reduction` is changed and put back; of any other, a partial with `reduction="none"` is
    given, and handed to `replace`, which gets `loss_func` back at the end. TypeError where it takes no `reduction`.
    """
    if hasattr(loss_func, "reduction"):
        former, loss_func.reduction = loss_func.reduction, "none"
        try:
            yield loss_func
        finally:
            loss_func.reduction = former
        return
    _check_takes_reduction(loss_func)
    replace = replace or (lambda _: None)
    single = partial(loss_func, reduction="none")
    try:
        replace(single)
        yield single
    finally:
        replace(loss_func)


def per_sample(
    loss: Tensor,  # what an unreduced loss gave
    n: int,  # samples in the batch
) -> Tensor:
    """One number per sample, from one or several values for each; ValueError where `loss` has none."""
    if loss.ndim == 0 or loss.numel() % n:
        raise ValueError(
            f'`loss_func` gave shape {tuple(loss.shape)} for {n} samples even with reduction="none", which is no loss '
            "per sample. Give it a `reduction` that it follows."
        )
    return loss if loss.shape == (n,) else loss.reshape(n, -1).mean(1)


#: fastai's name for it: `with NoneReduce(loss_func) as lf: …`
NoneReduce = unreduced


# How classes are read, shared by the losses over them; `self.axis` is the dimension of the classes


def _probabilities(self: Any, x: Tensor) -> Tensor:
    """The softmax of the model's output over the classes."""
    return F.softmax(x, dim=self.axis)


def _likeliest(self: Any, x: Tensor) -> Tensor:
    """The number of the class with the largest entry."""
    return x.argmax(dim=self.axis)


# Losses over flattened tensors


class BaseLoss(nn.Module):
    """`loss_cls(*args, **kwargs)` on predictions and targets that were flattened first.

    `is_2d`: predictions become (n, classes), and targets (n,), or (n, classes) where they are probabilities; else both
    become (n,). Unreduced losses come in the order of the targets. Without `flatten`, both are handed on as they are,
    but for losses that are not 2d `axis` is moved to the end. ValueError where they do not fit.
    """

    def __init__(
        self,
        loss_cls: Callable[..., Loss],  # what makes the loss, as a class of torch.nn
        *args: Any,  # for `loss_cls`
        axis: int = -1,  # the dimension of the classes in the predictions
        flatten: bool = True,
        floatify: bool = False,  # targets take the precision of the predictions, at least float32
        is_2d: bool = True,  # predictions have a dimension that targets do not have: the classes
        **kwargs: Any,  # for `loss_cls`
    ):
        super().__init__()
        self.axis, self.flatten, self.floatify, self.is_2d = axis, flatten, floatify, is_2d
        self.func = loss_cls(*args, **kwargs)
        if hasattr(self.func, "reduction"):
            _check_reduction_of(self.func, self.func.reduction)

    @property
    def reduction(self) -> str:
        """How the values of a batch become one: "mean", "sum", or "none", which keeps them."""
        return self.func.reduction  # type: ignore[attr-defined]

    @reduction.setter
    def reduction(self, reduction: str) -> None:
        _check_reduction_of(self.func, reduction)
        self.func.reduction = reduction  # type: ignore[attr-defined]

    def forward(self, inp: Tensor, targ: Tensor, **kwargs: Any) -> Tensor:
        if not (isinstance(inp, Tensor) and isinstance(targ, Tensor)):
            raise TypeError(
                f"{type(self).__name__} takes tensors, and got {type(inp).__name__} and {type(targ).__name__} as "
                "predictions and targets. Write a function of these that calls this loss for each part."
            )
        return self.func(*self._shaped(inp, self._typed(inp, targ)), **kwargs)

    def _typed(self, inp: Tensor, targ: Tensor) -> Tensor:
        if self.floatify and (targ.dtype != inp.dtype or not targ.is_floating_point()):
            # Not down to float16: a target of a regression may be larger than that can hold.
            return targ.to(torch.promote_types(inp.dtype, torch.float32))
        return targ.long() if targ.dtype in _SMALL_INTEGERS else targ

    def _shaped(self, inp: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_2d:
            return _flat_classes(inp, targ, self.axis) if self.flatten else (inp, targ)
        if self.flatten:
            return _flat(inp, targ)
        return inp.movedim(self.axis, -1), targ.movedim(self.axis, -1)

    def activation(self, x: Tensor) -> Tensor:
        """The model's output, unchanged."""
        return x

    def decodes(self, x: Tensor) -> Tensor:
        """What `activation` made, unchanged."""
        return x

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.func!r}, axis={self.axis})"


class CrossEntropyLossFlat(BaseLoss):
    """`nn.CrossEntropyLoss` with the classes along `axis`; targets are class numbers, or probabilities."""

    y_int = True  # targets can be class numbers, which MixUp cannot blend
    activation, decodes = _probabilities, _likeliest

    def __init__(
        self,
        *args: Any,  # as **kwargs
        axis: int = -1,  # the dimension of the classes
        **kwargs: Any,  # weight, ignore_index, reduction, label_smoothing; flatten, floatify
    ):
        super().__init__(nn.CrossEntropyLoss, *args, axis=axis, **kwargs)


class BCEWithLogitsLossFlat(BaseLoss):
    """`nn.BCEWithLogitsLoss` over all numbers of a batch; targets are 0, 1 or between.

    With a `weight` or `pos_weight` that holds a number per class nothing is flattened.
    """

    def __init__(
        self,
        *args: Any,  # as **kwargs
        axis: int = -1,  # the dimension of the classes, for weights per class
        floatify: bool = True,
        thresh: float = 0.5,  # a probability above this is decoded as True
        flatten: bool | None = None,  # None: where there are no weights per class
        **kwargs: Any,  # weight, reduction, pos_weight
    ):
        super().__init__(nn.BCEWithLogitsLoss, *args, axis=axis, floatify=floatify, is_2d=False, **kwargs)
        self.thresh = thresh
        weights = {n: getattr(self.func, n) for n in ("weight", "pos_weight")}
        weighted = [n for n, weight in weights.items() if weight is not None and weight.numel() > 1]
        if flatten and weighted:
            raise ValueError(
                f"`{weighted[0]}` holds a number per class, and `flatten` loses the classes. Leave that out."
            )
        self.flatten = not weighted if flatten is None else flatten

    def activation(self, x: Tensor) -> Tensor:
        """The sigmoid of the model's output."""
        return torch.sigmoid(x)

    def decodes(self, x: Tensor) -> Tensor:
        """Whether each probability is above `thresh`."""
        return x > self.thresh


class BCELossFlat(BaseLoss):
    """`nn.BCELoss` over all numbers of a batch; predictions are probabilities."""

    def __init__(
        self,
        *args: Any,  # as **kwargs
        axis: int = -1,
        floatify: bool = True,
        **kwargs: Any,  # weight, reduction; flatten
    ):
        super().__init__(nn.BCELoss, *args, axis=axis, floatify=floatify, is_2d=False, **kwargs)


class MSELossFlat(BaseLoss):
    """`nn.MSELoss` over all numbers of a batch: (n, 1) and (n,) fit, and are not broadcast to (n, n)."""

    def __init__(
        self,
        *args: Any,  # as **kwargs
        axis: int = -1,
        floatify: bool = True,
        **kwargs: Any,  # reduction; flatten
    ):
        super().__init__(nn.MSELoss, *args, axis=axis, floatify=floatify, is_2d=False, **kwargs)


class L1LossFlat(BaseLoss):
    """`nn.L1Loss` over all numbers of a batch: (n, 1) and (n,) fit, and are not broadcast to (n, n)."""

    def __init__(
        self,
        *args: Any,  # as **kwargs
        axis: int = -1,
        floatify: bool = True,
        **kwargs: Any,  # reduction; flatten
    ):
        super().__init__(nn.L1Loss, *args, axis=axis, floatify=floatify, is_2d=False, **kwargs)


# Losses of our own


class _Reducing(nn.Module):
    """A loss with a `reduction` that refuses what it does not know."""

    def __init__(self, reduction: str):
        super().__init__()
        self.reduction = reduction

    @property
    def reduction(self) -> str:
        """How the values of a batch become one: "mean", "sum", or "none", which keeps them."""
        return self._reduction

    @reduction.setter
    def reduction(self, reduction: str) -> None:
        _check_reduction(reduction)
        self._reduction = reduction


class LabelSmoothingCrossEntropy(_Reducing):
    """Cross entropy in which all classes together get `eps` of each target (Szegedy et al., arXiv 1512.00567).

    Predictions are (n, classes, …), targets class numbers (n, …), or probabilities. As in fastai, `weight` counts for
    the target's own share only; that of `nn.CrossEntropyLoss(label_smoothing=…)` counts for both.
    """

    weight: Tensor | None
    y_int = True
    axis = 1
    activation, decodes = _probabilities, _likeliest

    def __init__(
        self,
        eps: float = 0.1,  # 0: plain cross entropy; 1: the target does not matter
        weight: Tensor | None = None,  # (classes,)
        reduction: str = "mean",
    ):
        super().__init__(reduction)
        if not 0 <= eps <= 1:
            raise ValueError(f"`eps` is {eps}, but it is a share of the target, from 0 to 1. The default is 0.1.")
        self.eps = eps
        self.register_buffer("weight", weight)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        target = target if _are_probabilities(target, output) else target.long()
        loss = partial(F.cross_entropy, output, target, reduction=self.reduction)
        if self.weight is None:
            return loss(label_smoothing=self.eps)
        return torch.lerp(loss(weight=self.weight), loss(label_smoothing=1.0), self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, reduction={self.reduction!r}"


class LabelSmoothingCrossEntropyFlat(BaseLoss):
    """`LabelSmoothingCrossEntropy` with the classes along `axis`."""

    y_int = True
    activation, decodes = _probabilities, _likeliest

    def __init__(
        self,
        eps: float = 0.1,
        weight: Tensor | None = None,  # (classes,)
        reduction: str = "mean",
        *,
        axis: int = -1,  # the dimension of the classes
        **kwargs: Any,  # flatten, floatify
    ):
        super().__init__(LabelSmoothingCrossEntropy, eps, weight, reduction, axis=axis, **kwargs)


class FocalLoss(_Reducing):
    """Cross entropy that counts less where the model is sure and right (Lin et al., arXiv 1708.02002).

    Predictions are (n, classes, …), targets class numbers (n, …), or probabilities. As in fastai, `weight` is in the
    cross entropy from which the probability of the target is taken, and the mean is over targets, not over weights.
    """

    weight: Tensor | None
    y_int = True

    def __init__(
        self,
        gamma: float = 2.0,  # 0: plain cross entropy; larger: easy examples count less
        weight: Tensor | None = None,  # (classes,)
        reduction: str = "mean",
    ):
        super().__init__(reduction)
        if not gamma >= 0:
            raise ValueError(f"`gamma` is {gamma}; it is 0 or more, and below 0 easy examples would count most.")
        self.gamma = gamma
        self.register_buffer("weight", weight)

    def forward(self, inp: Tensor, targ: Tensor) -> Tensor:
        entropy = F.cross_entropy(inp, targ, weight=self.weight, reduction="none")
        # 1 - p of the target; never 0, where a gamma below 1 has no gradient
        doubt = (-torch.expm1(-entropy)).clamp(min=torch.finfo(entropy.dtype).tiny)
        return reduce_loss(doubt**self.gamma * entropy, self.reduction)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, reduction={self.reduction!r}"


class FocalLossFlat(BaseLoss):
    """`FocalLoss` with the classes along `axis`."""

    y_int = True
    activation, decodes = _probabilities, _likeliest

    def __init__(
        self,
        gamma: float = 2.0,
        weight: Tensor | None = None,  # (classes,)
        reduction: str = "mean",
        *,
        axis: int = -1,  # the dimension of the classes
        **kwargs: Any,  # flatten, floatify
    ):
        super().__init__(FocalLoss, gamma, weight, reduction, axis=axis, **kwargs)


class DiceLoss(_Reducing):
    """1 - the Dice score of each class in each image, for segmentation (Milletari et al., arXiv 1606.04797).

    Predictions are (n, classes, height, width) with the classes along `axis`, or have any other number of dimensions
    from three on; targets are class numbers (n, height, width). A number that is no class belongs to none.
    `reduction="none"` gives (n, classes).
    """

    activation, decodes = _probabilities, _likeliest

    def __init__(
        self,
        axis: int = 1,  # the dimension of the classes
        smooth: float = 1e-6,  # added above and below the fraction, which is 0/0 for a class that is not there
        reduction: str = "sum",
        square_in_union: bool = False,  # squared probabilities below the fraction, as in the paper
    ):
        super().__init__(reduction)
        self.axis, self.smooth, self.square_in_union = axis, smooth, square_in_union

    def forward(self, pred: Tensor, targ: Tensor) -> Tensor:
        self._check_shapes(pred, targ)
        prob = self.activation(pred).movedim(self.axis, 1).flatten(2)
        mask = targ.flatten(1).unsqueeze(1) == torch.arange(prob.shape[1], device=targ.device).view(1, -1, 1)
        both = (prob * mask).sum(dim=2)
        each = (prob**2 + mask if self.square_in_union else prob + mask).sum(dim=2)
        return reduce_loss(1 - (2 * both + self.smooth) / (each + self.smooth), self.reduction)

    def _check_shapes(self, pred: Tensor, targ: Tensor) -> None:
        wanted = list(pred.shape)
        if pred.ndim < 3 or not -pred.ndim <= self.axis < pred.ndim or self.axis in (0, -pred.ndim):
            raise ValueError(
                f"DiceLoss takes predictions with dimensions for batch, classes (`axis={self.axis}`) and places, "
                f"and got shape {tuple(wanted)}."
            )
        del wanted[self.axis]
        if list(targ.shape) != wanted:
            raise ValueError(
                f"DiceLoss got targets of shape {tuple(targ.shape)} for predictions of shape {tuple(pred.shape)} with "
                f"`axis={self.axis}`. Pass class numbers, not one-hot, of shape {tuple(wanted)}."
            )

    def extra_repr(self) -> str:
        return f"axis={self.axis}, reduction={self.reduction!r}"


# Shapes


def _flat(inp: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
    """Both as vectors."""
    if inp.numel() != targ.numel():
        raise ValueError(
            f"the predictions have shape {tuple(inp.shape)} and the targets {tuple(targ.shape)}: not as many numbers. "
            "This loss needs one target for each number that is predicted."
        )
    return inp.reshape(-1), targ.reshape(-1)


def _flat_classes(inp: Tensor, targ: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Predictions as (n, classes), targets as (n,), or (n, classes) where they are probabilities; both in one order."""
    if inp.ndim == 2 and targ.ndim == 1 and axis in (-1, 1) and len(inp) == len(targ):
        return inp, targ  # the usual batch, at once: what follows takes as long as a small loss itself
    if not -inp.ndim <= axis < inp.ndim:
        raise ValueError(f"`axis={axis}` is no dimension of the predictions, which have shape {tuple(inp.shape)}.")
    # Only the classes move: targets, which lack that dimension, keep the order of all others.
    rows = inp.movedim(axis, -1)
    if _are_probabilities(targ, inp):
        return rows.reshape(-1, rows.shape[-1]), targ.movedim(axis, -1).reshape(-1, rows.shape[-1])
    if targ.numel() != rows.shape[:-1].numel():
        raise ValueError(
            f"the predictions have shape {tuple(inp.shape)}, that is {rows.shape[-1]} classes along `axis={axis}` for "
            f"{rows.shape[:-1].numel()} targets, and the targets have shape {tuple(targ.shape)}. Pass one class number "
            "for each, or set `axis` to the dimension of the classes."
        )
    return rows.reshape(-1, rows.shape[-1]), targ.reshape(-1)


def _are_probabilities(targ: Tensor, inp: Tensor) -> bool:
    return targ.is_floating_point() and targ.shape == inp.shape


# Reductions


def _check_reduction(reduction: Any, known: tuple[str, ...] = REDUCTIONS) -> None:
    if reduction not in known:
        raise ValueError(f"`reduction` is {reduction!r}; it is one of {', '.join(map(repr, known))}.")


def _check_reduction_of(func: Any, reduction: Any) -> None:
    """Refuses what torch's own losses would refuse at the first batch; others may know words of their own."""
    if type(func).__module__ == nn.MSELoss.__module__:
        _check_reduction(reduction, (*REDUCTIONS, "batchmean") if isinstance(func, nn.KLDivLoss) else REDUCTIONS)


def _check_takes_reduction(loss_func: Any) -> None:
    try:
        parameters = inspect.signature(getattr(loss_func, "forward", loss_func)).parameters.values()
    except ValueError:  # a builtin that does not say
        return
    if not any(p.name == "reduction" or p.kind is p.VAR_KEYWORD for p in parameters):
        name = getattr(loss_func, "__name__", type(loss_func).__name__)
        raise TypeError(
            f"`{name}` has no `reduction`, so it cannot give one loss per target. "
            'Let it take `reduction="mean"` and pass that on, for instance to `reduce_loss`.'
        )
