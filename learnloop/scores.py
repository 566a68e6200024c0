"""Scores over whole sets and the metrics known by name; those of scikit-learn are in `sklearn_scores.py`."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from fastcore.basics import detuplify
from torch import Tensor
from torch.nn import functional as F

from learnloop.data.batches import describe, find_bs
from learnloop.metrics import AvgLoss, Metric, flatten_check, name_of

__all__ = [
    "AccumMetric",
    "ActivationType",
    "CorpusBLEUMetric",
    "Dice",
    "DiceMulti",
    "JaccardCoeff",
    "JaccardCoeffMulti",
    "LossMetric",
    "LossMetrics",
    "Perplexity",
    "accuracy_multi",
    "corpus_bleu",
    "exp_rmspe",
    "foreground_acc",
    "mae",
    "mse",
    "msle",
    "rmse",
    "top_k_accuracy",
]

MAX_N = 4  # the longest n-gram that BLEU counts


# -- functions of predictions and targets


def top_k_accuracy(inp: Tensor, targ: Tensor, k: int = 5, axis: int = -1) -> Tensor:
    """The share of items whose target is among the `k` largest predictions along `axis`."""
    if k > inp.shape[axis]:
        raise ValueError(
            f"`k` is {k}, but there are {inp.shape[axis]} classes. Pass fewer: `partial(top_k_accuracy, k=…)`."
        )
    top = inp.topk(k, dim=axis).indices.movedim(axis, -1)
    _, targ = flatten_check(top[..., 0], targ)
    return (top.reshape(-1, k) == targ[:, None]).any(dim=1).float().mean()


def accuracy_multi(inp: Tensor, targ: Tensor, thresh: float = 0.5, sigmoid: bool = True) -> Tensor:
    """The share of right labels, where each item has several: both of the same shape, targets 0 or 1.

    A label is predicted above `thresh`, after a sigmoid if `sigmoid`.
    """
    inp, targ = flatten_check(inp, targ)
    return (((inp.sigmoid() if sigmoid else inp) > thresh) == targ.bool()).float().mean()


def mse(inp: Tensor, targ: Tensor) -> Tensor:
    """The mean squared error."""
    return F.mse_loss(*flatten_check(inp, targ))


def mae(inp: Tensor, targ: Tensor) -> Tensor:
    """The mean absolute error."""
    inp, targ = flatten_check(inp, targ)
    return (inp - targ).abs().mean()


def msle(inp: Tensor, targ: Tensor) -> Tensor:
    """The mean squared error of log(1 + x)."""
    inp, targ = flatten_check(inp, targ)
    return F.mse_loss(inp.log1p(), targ.log1p())


def foreground_acc(inp: Tensor, targ: Tensor, bkg_idx: int = 0, axis: int = 1) -> Tensor:
    """`accuracy` over what is not background: targets other than `bkg_idx`; NaN for a batch without any.

    Targets have the shape of the predictions without `axis`, or with one element there.
    """
    pred, targ = flatten_check(inp.argmax(dim=axis), targ)
    foreground = targ != bkg_idx
    return ((pred == targ) & foreground).sum() / foreground.sum()  # indexing with a mask would wait for the device


# -- means over the elements of a set


def _squared_errors(inp: Tensor, targ: Tensor) -> Tensor:
    return (inp - targ).square()


def _squared_exp_errors(inp: Tensor, targ: Tensor) -> Tensor:
    return (1 - (inp - targ).exp()).square()  # ((e^t - e^p) / e^t)^2


def rmse(inp: Tensor, targ: Tensor) -> Tensor:
    """The root of the mean squared error; as a metric, the root of the mean over the whole set."""
    return _squared_errors(*flatten_check(inp, targ)).mean().sqrt()


def exp_rmspe(inp: Tensor, targ: Tensor) -> Tensor:
    """The root of the mean squared relative error of e^x; as a metric, the root of the mean over the whole set."""
    return _squared_exp_errors(*flatten_check(inp, targ)).mean().sqrt()


class _Mean(Metric):
    """A mean over a set: what batches add to `total` and `count`, kept on the device in double precision."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def accumulate(self, learn: Any) -> None:
        if not len(learn.yb):
            return
        total, count = self._of_batch(learn)
        total = total.detach().to(_double(total.device))
        self.total = total if self.total is None else self.total + total
        self.count += count

    def _of_batch(self, learn: Any) -> tuple[Tensor, int]:
        raise NotImplementedError

    @property
    def _mean(self) -> Tensor | None:
        return None if self.total is None else self.total / self.count


class _RootMean(_Mean):
    """The root of the mean of `errors(pred, targ)` over all elements."""

    def __init__(self, func: Callable[..., Tensor], errors: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.func, self.errors = func, errors

    def _of_batch(self, learn: Any) -> tuple[Tensor, int]:
        errors = self.errors(*flatten_check(learn.pred.detach(), detuplify(learn.yb)))
        return errors.sum(dtype=_double(errors.device)), errors.numel()

    @property
    def value(self) -> Tensor | None:
        return None if self._mean is None else self._mean.sqrt()

    @property
    def name(self) -> str:
        return name_of(self.func)


# `mk_metric` asks for it, because a mean of roots is not the root of the mean; each learner gets a metric of its own
vars(rmse)["as_metric"] = lambda: _RootMean(rmse, _squared_errors)
vars(exp_rmspe)["as_metric"] = lambda: _RootMean(exp_rmspe, _squared_exp_errors)


class LossMetric(_Mean):
    """The mean of an attribute of `learn.loss_func`, for instance one term of a loss, weighted with the batch size."""

    def __init__(
        self,
        attr: str,  # of the loss function, which sets it in every call
        nm: str | None = None,  # the column's title; None: `attr`
    ) -> None:
        super().__init__()
        self.attr, self.nm = attr, nm

    def _of_batch(self, learn: Any) -> tuple[Tensor, int]:
        if not hasattr(learn.loss_func, self.attr):
            raise ValueError(
                f"`LossMetric` reads `{self.attr}`, which {name_of(learn.loss_func)} does not have. "
                f"Set `self.{self.attr}` in the loss."
            )
        size = find_bs(learn.yb)
        return torch.as_tensor(getattr(learn.loss_func, self.attr)) * size, size

    @property
    def value(self) -> Tensor | None:
        return self._mean

    @property
    def name(self) -> str:
        return self.attr if self.nm is None else self.nm


def LossMetrics(attrs: str | Sequence[str], nms: str | Sequence[str] | None = None) -> list[LossMetric]:
    """A `LossMetric` for each of `attrs`, titled by `nms`; both as lists or with commas: `"kl,reconstruction"`."""
    attrs = attrs.split(",") if isinstance(attrs, str) else attrs
    nms = nms.split(",") if isinstance(nms, str) else attrs if nms is None else nms
    if len(attrs) != len(nms):
        raise ValueError(f"`attrs` names {len(attrs)} terms of the loss, `nms` {len(nms)}. Give each one title.")
    return [LossMetric(attr, nm) for attr, nm in zip(attrs, nms, strict=True)]


class Perplexity(AvgLoss):
    """e to the mean loss, which is the perplexity of a language model where the loss is the cross-entropy."""

    @property
    def value(self) -> Tensor | None:
        mean = super().value
        return None if mean is None else torch.as_tensor(mean).exp()

    @property
    def name(self) -> str:
        return "perplexity"


# -- overlap of predicted and target regions


class _Overlap(Metric):
    """The overlap of predicted and target classes over a set, averaged over the classes that occur in it.

    Predictions have scores along `axis`, targets are class numbers. `value` is a float, None where no class occurs.
    """

    _count: Callable[[Tensor, Tensor, int], Tensor]  # [2, classes]: elements in both; those predicted plus those true
    _share: Callable[[float, float], float]  # of one class, from these two

    def __init__(self, axis: int = 1) -> None:
        self.axis = axis
        self.reset()

    def reset(self) -> None:
        self.counts: Tensor | None = None  # as `_count` makes it, summed over the batches; on the device

    def accumulate(self, learn: Any) -> None:
        if not len(learn.yb):
            return
        pred, targ = flatten_check(learn.pred.argmax(dim=self.axis), detuplify(learn.yb))
        counts = self._count(pred, targ.long(), learn.pred.shape[self.axis])
        self.counts = counts if self.counts is None else self.counts + counts

    @property
    def value(self) -> float | None:
        pairs = [] if self.counts is None else zip(*self.counts.tolist(), strict=True)
        shares = [self._share(inter, total) for inter, total in pairs if total]
        return sum(shares) / len(shares) if shares else None


def _binary_counts(pred: Tensor, targ: Tensor, n_classes: int) -> Tensor:
    """Of class 1 alone."""
    return torch.stack([(pred * targ).sum(), (pred + targ).sum()])[:, None]


def _class_counts(pred: Tensor, targ: Tensor, n_classes: int) -> Tensor:
    """Of each class; targets that are none of them, as 255 for "ignore", count as missed."""

    def counted(classes: Tensor) -> Tensor:
        known = torch.where((classes >= 0) & (classes < n_classes), classes, n_classes)
        counts = torch.zeros(n_classes + 1, dtype=torch.long, device=classes.device)
        return counts.scatter_add_(0, known, torch.ones_like(known))[:n_classes]  # `bincount` would wait

    return torch.stack([counted(torch.where(pred == targ, pred, n_classes)), counted(pred) + counted(targ)])


def _dice(inter: float, total: float) -> float:
    return 2 * inter / total


def _jaccard(inter: float, total: float) -> float:
    return inter / (total - inter)


class Dice(_Overlap):
    """The Dice coefficient, 2 |A and B| / (|A| + |B|), of class 1 against class 0 in segmentation."""

    _count, _share = staticmethod(_binary_counts), staticmethod(_dice)


class DiceMulti(_Overlap):
    """The mean over the classes of their Dice coefficients."""

    _count, _share = staticmethod(_class_counts), staticmethod(_dice)


class JaccardCoeff(_Overlap):
    """The Jaccard coefficient, |A and B| / |A or B|, of class 1 against class 0 in segmentation."""

    _count, _share = staticmethod(_binary_counts), staticmethod(_jaccard)


class JaccardCoeffMulti(_Overlap):
    """The mean over the classes of their Jaccard coefficients: mIoU."""

    _count, _share = staticmethod(_class_counts), staticmethod(_jaccard)


# -- functions of a whole set


class ActivationType(StrEnum):
    """What an `AccumMetric` makes of predictions first."""

    No = "no"
    Sigmoid = "sigmoid"
    Softmax = "softmax"
    BinarySoftmax = "binarysoftmax"  # the probability of the last class

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"`activation` is {value!r}; it is one of {', '.join(repr(str(known)) for known in cls)}.")


class AccumMetric(Metric):
    """`func` of all predictions and targets of a set at once.

    Both are copied and stay on their device until the next `reset`, so memory grows with the set: 8 bytes for an item
    after an argmax, 4 for each number of a prediction kept whole. `value` joins them once, which takes as much again.
    """

    def __init__(
        self,
        func: Callable[..., Any],  # of (preds, targs) and `kwargs`
        dim_argmax: int | None = None,  # predictions become the index of the largest along this dimension
        activation: str = ActivationType.No,  # a softmax goes along `dim_argmax`, or the last; no argmax follows
        thresh: float | None = None,  # predictions become whether they are at least this, after the activation
        to_np: bool = False,  # call `func` with numpy arrays
        invert_arg: bool = False,  # call `func` with (targs, preds)
        flatten: bool = True,  # both become vectors
        name: str | None = None,  # the column's title; None: the name of `func`
        **kwargs: Any,
    ) -> None:
        self.func, self.dim_argmax, self.activation = func, dim_argmax, ActivationType(activation)
        self.thresh, self.to_np, self.invert_arg, self.flatten = thresh, to_np, invert_arg, flatten
        self.kwargs = kwargs
        self._name = name_of(func) if name is None else name
        self.reset()

    def reset(self) -> None:
        self.preds: list[Tensor] = []  # a tensor per batch since the last read, after one for all before it
        self.targs: list[Tensor] = []

    def accumulate(self, learn: Any) -> None:
        if not len(learn.yb):
            return
        pred, targ = learn.pred, detuplify(learn.yb)
        for what, tensor in (("the prediction", pred), ("the target", targ)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"metric `{self.name}` needs one tensor, but {what} is {describe(tensor)}.")
        preds, targs = _kept(self._decoded(_single(pred.detach())), pred), _kept(_single(targ), targ)
        preds, targs = flatten_check(preds, targs) if self.flatten else (preds, targs)
        self.preds.append(preds)
        self.targs.append(targs)

    def _decoded(self, pred: Tensor) -> Tensor:
        """A batch's predictions after activation or argmax, and threshold."""
        dim = -1 if self.dim_argmax is None else self.dim_argmax
        if self.activation == ActivationType.Softmax:
            pred = pred.softmax(dim)
        elif self.activation == ActivationType.BinarySoftmax:
            if pred.shape[dim] < 2:  # a softmax of one score is 1
                raise ValueError(f"metric `{self.name}` needs the scores of two classes, but got {describe(pred)}.")
            pred = pred.softmax(dim).select(dim, -1).contiguous()  # a view would keep the other classes in memory
        elif self.activation == ActivationType.Sigmoid:
            pred = pred.sigmoid()
        elif self.dim_argmax is not None:
            pred = pred.argmax(dim)
        return pred if self.thresh is None else pred >= self.thresh

    @property
    def value(self) -> Any:
        if not self.preds:
            return None
        self.preds, self.targs = _joined(self.preds), _joined(self.targs)
        return self(self.preds[0], self.targs[0])

    def __call__(self, preds: Tensor, targs: Tensor) -> Any:
        """The score of predictions as they are, without activation, argmax or threshold; the set is left alone."""
        args: tuple[Any, Any] = flatten_check(preds, targs) if self.flatten else (preds, targs)
        if self.to_np:
            args = (args[0].numpy(force=True), args[1].numpy(force=True))
        score = self.func(*(args[::-1] if self.invert_arg else args), **self.kwargs)
        return score.item() if isinstance(score, np.generic) else score

    @property
    def name(self) -> str:
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    def state_dict(self) -> dict[str, Any]:
        return {"preds": [pred.clone() for pred in self.preds], "targs": [targ.clone() for targ in self.targs]}


def _joined(batches: list[Tensor]) -> list[Tensor]:
    return [torch.cat(batches)] if len(batches) > 1 else batches


def _single(tensor: Tensor) -> Tensor:
    """Half precision widened: numpy knows no bfloat16, and probabilities would be coarse."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _kept(tensor: Tensor, source: Tensor) -> Tensor:
    """A copy where the tensor lies in the memory of `source`, which model or loader may write the next batch to."""
    shared = tensor.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    return tensor.clone() if shared else tensor


def _double(device: torch.device) -> torch.dtype:
    """Double precision, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


# -- text


class CorpusBLEUMetric(Metric):
    """`corpus_bleu` of the most likely tokens: predictions [items, length, tokens], targets [items, length].

    Token numbers stay on their device until `value` is read.
    """

    def __init__(
        self,
        vocab_sz: int = 5000,  # not needed, whatever the vocabulary; for calls written for fastai
        axis: int = -1,  # of the tokens' scores
    ) -> None:
        self.axis = axis
        self.reset()

    def reset(self) -> None:
        self.preds: list[Tensor] = []
        self.targs: list[Tensor] = []

    def accumulate(self, learn: Any) -> None:
        if not len(learn.yb):
            return
        self.preds.append(learn.pred.argmax(dim=self.axis))
        self.targs.append(detuplify(learn.yb).clone())

    @property
    def value(self) -> float | None:
        return corpus_bleu(_rows(self.preds), _rows(self.targs))


def corpus_bleu(preds: Iterable[Sequence[int]], targs: Iterable[Sequence[int]]) -> float | None:
    """BLEU of sentences against one reference each, from n-grams of 1 to 4 tokens; None where there are no 4-grams.

    Papineni et al. 2002; n-grams of a length without a match are smoothed as in method 3 of Chen and Cherry 2014
    (aclanthology.org/W14-3346).
    """
    matched, counted, n_pred, n_targ = [0.0] * MAX_N, [0] * MAX_N, 0, 0
    for pred, targ in zip(preds, targs, strict=True):
        n_pred, n_targ = n_pred + len(pred), n_targ + len(targ)
        n_missing = 0  # lengths without a match in this sentence
        for i in range(MAX_N):
            found, in_pred = _n_grams(pred, i + 1), max(len(pred) - i, 0)
            matches = (found & _n_grams(targ, i + 1)).total()
            n_missing += not matches
            matched[i] += matches or 0.5**n_missing
            counted[i] += in_pred
    if not all(counted):
        return None
    precision = math.prod(m / c for m, c in zip(matched, counted, strict=True)) ** (1 / MAX_N)
    return precision * min(1.0, math.exp(1 - n_targ / n_pred))


def _n_grams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _rows(batches: list[Tensor]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tolist()]
