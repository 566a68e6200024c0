"""Metrics that scikit-learn and scipy compute, over a whole set; both are imported when one of these is made.

Names ending in `Multi` are for items with several labels (targets 0 or 1, of the predictions' shape), the other
classification metrics for items of one class (targets are class numbers). Arguments that no comment explains are those
of the function of the same name in `sklearn.metrics`.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from learnloop.metrics import name_of
from learnloop.scores import AccumMetric, ActivationType

__all__ = [
    "APScoreBinary",
    "APScoreMulti",
    "BalancedAccuracy",
    "BrierScore",
    "BrierScoreMulti",
    "CohenKappa",
    "ExplainedVariance",
    "F1Score",
    "F1ScoreMulti",
    "FBeta",
    "FBetaMulti",
    "HammingLoss",
    "HammingLossMulti",
    "Jaccard",
    "JaccardMulti",
    "MatthewsCorrCoef",
    "MatthewsCorrCoefMulti",
    "PearsonCorrCoef",
    "Precision",
    "PrecisionMulti",
    "R2Score",
    "Recall",
    "RecallMulti",
    "RocAuc",
    "RocAucBinary",
    "RocAucMulti",
    "SpearmanCorrCoef",
    "optim_metric",
    "skm_to_fastai",
    "skm_to_learnloop",
]

Weights = Any  # one number per item, in the order of the set


def skm_to_fastai(
    func: Callable[..., Any],  # of (targs, preds), as in `sklearn.metrics`
    is_class: bool = True,  # predictions are scores of classes
    thresh: float | None = None,  # for several labels: one is predicted from this probability on
    axis: int = -1,  # of the classes
    activation: str | None = None,  # None: a sigmoid where there is a `thresh` for classes
    **kwargs: Any,  # of `AccumMetric`, and of `func`
) -> AccumMetric:
    """A metric from a function of `sklearn.metrics`, or one like these: `skm_to_fastai(skm.accuracy_score)`."""
    if activation is None:
        activation = ActivationType.Sigmoid if is_class and thresh is not None else ActivationType.No
    dim_argmax = axis if is_class and thresh is None else None
    options = {"to_np": True, "invert_arg": True, **kwargs}
    return AccumMetric(func, dim_argmax=dim_argmax, activation=activation, thresh=thresh, **options)


skm_to_learnloop = skm_to_fastai


def _skm(name: str) -> Callable[..., Any]:
    """A function of `sklearn.metrics`."""
    return getattr(_imported("sklearn.metrics"), name)


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"`{module}` comes with scikit-learn, which is not installed. `pip install scikit-learn`."
        ) from error


def _labels(func: Callable[..., Any], sigmoid: bool, thresh: float | None = None, **kwargs: Any) -> AccumMetric:
    """A metric of several labels: of labels at `thresh`, of probabilities without."""
    activation = ActivationType.Sigmoid if sigmoid else ActivationType.No
    return AccumMetric(func, activation=activation, thresh=thresh, flatten=False, to_np=True, invert_arg=True, **kwargs)


# One class per item


def F1Score(
    axis: int = -1,
    labels: Any = None,
    pos_label: int = 1,
    average: str | None = "binary",
    sample_weight: Weights = None,
) -> AccumMetric:
    """The harmonic mean of precision and recall."""
    return skm_to_fastai(
        _skm("f1_score"), axis=axis, labels=labels, pos_label=pos_label, average=average, sample_weight=sample_weight
    )


def FBeta(
    beta: float,
    axis: int = -1,
    labels: Any = None,
    pos_label: int = 1,
    average: str | None = "binary",
    sample_weight: Weights = None,
) -> AccumMetric:
    """The harmonic mean of precision and recall, recall weighing `beta` times as much."""
    return skm_to_fastai(
        _skm("fbeta_score"),
        beta=beta,
        axis=axis,
        labels=labels,
        pos_label=pos_label,
        average=average,
        sample_weight=sample_weight,
    )


def Precision(
    axis: int = -1,
    labels: Any = None,
    pos_label: int = 1,
    average: str | None = "binary",
    sample_weight: Weights = None,
) -> AccumMetric:
    """The share of right ones among the items predicted to be of a class."""
    return skm_to_fastai(
        _skm("precision_score"),
        axis=axis,
        labels=labels,
        pos_label=pos_label,
        average=average,
        sample_weight=sample_weight,
    )


def Recall(
    axis: int = -1,
    labels: Any = None,
    pos_label: int = 1,
    average: str | None = "binary",
    sample_weight: Weights = None,
) -> AccumMetric:
    """The share of items of a class that were predicted to be."""
    return skm_to_fastai(
        _skm("recall_score"),
        axis=axis,
        labels=labels,
        pos_label=pos_label,
        average=average,
        sample_weight=sample_weight,
    )


def Jaccard(
    axis: int = -1,
    labels: Any = None,
    pos_label: int = 1,
    average: str | None = "binary",
    sample_weight: Weights = None,
) -> AccumMetric:
    """The items of a class both predicted and true, by those predicted or true."""
    return skm_to_fastai(
        _skm("jaccard_score"),
        axis=axis,
        labels=labels,
        pos_label=pos_label,
        average=average,
        sample_weight=sample_weight,
    )


def HammingLoss(axis: int = -1, sample_weight: Weights = None) -> AccumMetric:
    """The share of wrong predictions."""
    return skm_to_fastai(_skm("hamming_loss"), axis=axis, sample_weight=sample_weight)


def BalancedAccuracy(axis: int = -1, sample_weight: Weights = None, adjusted: bool = False) -> AccumMetric:
    """The mean over the classes of their recall."""
    return skm_to_fastai(_skm("balanced_accuracy_score"), axis=axis, sample_weight=sample_weight, adjusted=adjusted)


def CohenKappa(
    axis: int = -1, labels: Any = None, weights: str | None = None, sample_weight: Weights = None
) -> AccumMetric:
    """The agreement beyond chance of predicted and true classes."""
    return skm_to_fastai(
        _skm("cohen_kappa_score"), axis=axis, labels=labels, weights=weights, sample_weight=sample_weight
    )


def MatthewsCorrCoef(sample_weight: Weights = None, **kwargs: Any) -> AccumMetric:
    """The correlation of predicted and true classes; `kwargs` are those of `skm_to_fastai`."""
    return skm_to_fastai(_skm("matthews_corrcoef"), sample_weight=sample_weight, **kwargs)


def RocAuc(
    axis: int = -1,
    average: str | None = "macro",
    sample_weight: Weights = None,
    max_fpr: float | None = None,
    multi_class: str = "ovr",  # each class against the rest, or "ovo": against each other one
) -> AccumMetric:
    """The area under the ROC curve for three classes or more, of their probabilities (after a softmax)."""
    if multi_class not in ("ovr", "ovo"):
        raise ValueError(f'`multi_class` is {multi_class!r}; for `RocAuc` it is "ovr" or "ovo".')
    curve = {"average": average, "sample_weight": sample_weight, "max_fpr": max_fpr, "multi_class": multi_class}
    return skm_to_fastai(_skm("roc_auc_score"), axis=axis, activation=ActivationType.Softmax, flatten=False, **curve)


def RocAucBinary(
    axis: int = -1,
    average: str | None = "macro",
    sample_weight: Weights = None,
    max_fpr: float | None = None,
    multi_class: str = "raise",
) -> AccumMetric:
    """The area under the ROC curve for two classes, of the second's probability (after a softmax)."""
    return skm_to_fastai(
        _skm("roc_auc_score"),
        activation=ActivationType.BinarySoftmax,
        axis=axis,
        average=average,
        sample_weight=sample_weight,
        max_fpr=max_fpr,
        multi_class=multi_class,
    )


def APScoreBinary(
    axis: int = -1, average: str | None = "macro", pos_label: int = 1, sample_weight: Weights = None
) -> AccumMetric:
    """The average precision for two classes, of the second's probability (after a softmax)."""
    return skm_to_fastai(
        _skm("average_precision_score"),
        activation=ActivationType.BinarySoftmax,
        axis=axis,
        average=average,
        pos_label=pos_label,
        sample_weight=sample_weight,
    )


def BrierScore(axis: int = -1, sample_weight: Weights = None, pos_label: int = 1) -> AccumMetric:
    """The mean squared error of the probabilities (after a softmax).

    For two classes that of the class `pos_label`, from 0 to 1; for more the sum over the classes, from 0 to 2.
    """
    _skm("brier_score_loss")
    return skm_to_fastai(
        brier_score_loss,
        axis=axis,
        activation=ActivationType.Softmax,
        flatten=False,
        sample_weight=sample_weight,
        pos_label=pos_label,
    )


def brier_score_loss(targs: np.ndarray, probs: np.ndarray, pos_label: int = 1, sample_weight: Weights = None) -> float:
    """scikit-learn's, for probabilities [items, classes] and class numbers, whether or not each class occurs."""
    score, n_classes = _skm("brier_score_loss"), probs.shape[1]
    if n_classes == 2:
        return score(targs == pos_label, probs[:, pos_label], sample_weight=sample_weight, pos_label=True)
    return score(targs, probs, sample_weight=sample_weight, labels=np.arange(n_classes))


# Several labels per item


def F1ScoreMulti(
    thresh: float = 0.5,
    sigmoid: bool = True,
    labels: Any = None,
    pos_label: int = 1,
    average: str | None = "macro",
    sample_weight: Weights = None,
) -> AccumMetric:
    """`F1Score` of several labels."""
    return _labels(
        _skm("f1_score"),
        sigmoid,
        thresh,
        labels=labels,
        pos_label=pos_label,
        average=average,
        sample_weight=sample_weight,
    )


def FBetaMulti(
    beta: float,
    thresh: float = 0.5,
    sigmoid: bool = True,
    labels: Any = None,
    pos_label: int = 1,
    average: str | None = "macro",
    sample_weight: Weights = None,
) -> AccumMetric:
    """`FBeta` of several labels."""
    return _labels(
        _skm("fbeta_score"),
        sigmoid,
        thresh,
        beta=beta,
        labels=labels,
        pos_label=pos_label,
        average=average,
        sample_weight=sample_weight,
    )


def PrecisionMulti(
    thresh: float = 0.5,
    sigmoid: bool = True,
    labels: Any = None,
    pos_label: int = 1,
    average: str | None = "macro",
    sample_weight: Weights = None,
) -> AccumMetric:
    """`Precision` of several labels."""
    return _labels(
        _skm("precision_score"),
        sigmoid,
        thresh,
        labels=labels,
        pos_label=pos_label,
        average=average,
        sample_weight=sample_weight,
    )


def RecallMulti(
    thresh: float = 0.5,
    sigmoid: bool = True,
    labels: Any = None,
    pos_label: int = 1,
    average: str | None = "macro",
    sample_weight: Weights = None,
) -> AccumMetric:
    """`Recall` of several labels."""
    return _labels(
        _skm("recall_score"),
        sigmoid,
        thresh,
        labels=labels,
        pos_label=pos_label,
        average=average,
        sample_weight=sample_weight,
    )


def JaccardMulti(
    thresh: float = 0.5,
    sigmoid: bool = True,
    labels: Any = None,
    pos_label: int = 1,
    average: str | None = "macro",
    sample_weight: Weights = None,
) -> AccumMetric:
    """`Jaccard` of several labels."""
    return _labels(
        _skm("jaccard_score"),
        sigmoid,
        thresh,
        labels=labels,
        pos_label=pos_label,
        average=average,
        sample_weight=sample_weight,
    )


def HammingLossMulti(thresh: float = 0.5, sigmoid: bool = True, sample_weight: Weights = None) -> AccumMetric:
    """The share of wrong labels."""
    return _labels(_skm("hamming_loss"), sigmoid, thresh, sample_weight=sample_weight)


def RocAucMulti(
    sigmoid: bool = True, average: str | None = "macro", sample_weight: Weights = None, max_fpr: float | None = None
) -> AccumMetric:
    """The area under the ROC curve of each label's probability."""
    return _labels(_skm("roc_auc_score"), sigmoid, average=average, sample_weight=sample_weight, max_fpr=max_fpr)


def APScoreMulti(
    sigmoid: bool = True, average: str | None = "macro", pos_label: int = 1, sample_weight: Weights = None
) -> AccumMetric:
    """The average precision of each label's probability."""
    return _labels(
        _skm("average_precision_score"), sigmoid, average=average, pos_label=pos_label, sample_weight=sample_weight
    )


def MatthewsCorrCoefMulti(thresh: float = 0.5, sigmoid: bool = True, sample_weight: Weights = None) -> AccumMetric:
    """The mean over the labels of the correlation of predicted and true."""
    score = _PerLabel(_skm("matthews_corrcoef"))
    return _labels(score, sigmoid, thresh, sample_weight=sample_weight)


def BrierScoreMulti(sigmoid: bool = True, sample_weight: Weights = None, pos_label: int = 1) -> AccumMetric:
    """The mean over the labels of the squared error of their probabilities."""
    score = _PerLabel(_skm("brier_score_loss"))
    return _labels(score, sigmoid, sample_weight=sample_weight, pos_label=pos_label)


class _PerLabel:
    """The mean over the labels of a score that takes one label at a time."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func, self.__name__ = func, name_of(func)

    def __call__(self, targs: np.ndarray, preds: np.ndarray, **kwargs: Any) -> float:
        columns = zip(targs.T, preds.T, strict=True)
        return float(np.mean([self.func(targ, pred, **kwargs) for targ, pred in columns]))


# Numbers


def R2Score(sample_weight: Weights = None) -> AccumMetric:
    """1 - the squared error by the variance of the targets."""
    return skm_to_fastai(_skm("r2_score"), is_class=False, sample_weight=sample_weight)


def ExplainedVariance(sample_weight: Weights = None) -> AccumMetric:
    """1 - the variance of the errors by the variance of the targets."""
    return skm_to_fastai(_skm("explained_variance_score"), is_class=False, sample_weight=sample_weight)


def PearsonCorrCoef(dim_argmax: int | None = None, **kwargs: Any) -> AccumMetric:
    """The correlation of predictions and targets; `kwargs` are those of `AccumMetric` and `scipy.stats.pearsonr`."""
    _imported("scipy.stats")
    return AccumMetric(pearsonr, dim_argmax=dim_argmax, **{"to_np": True, **kwargs})


def SpearmanCorrCoef(
    dim_argmax: int | None = None, axis: int = 0, nan_policy: str = "propagate", **kwargs: Any
) -> AccumMetric:
    """The correlation of ranks; `kwargs` are those of `AccumMetric` and `scipy.stats.spearmanr`."""
    _imported("scipy.stats")
    options = {"to_np": True, "axis": axis, "nan_policy": nan_policy, **kwargs}
    return AccumMetric(spearmanr, dim_argmax=dim_argmax, **options)


def pearsonr(preds: np.ndarray, targs: np.ndarray, **kwargs: Any) -> float:
    """scipy's coefficient, without its p-value."""
    return _imported("scipy.stats").pearsonr(preds, targs, **kwargs)[0]


def spearmanr(preds: np.ndarray, targs: np.ndarray, **kwargs: Any) -> float:
    """scipy's coefficient, without its p-value."""
    return _imported("scipy.stats").spearmanr(preds, targs, **kwargs)[0]


# The best argument


def optim_metric(
    f: Callable[..., Any],  # of (preds, targs)
    argname: str,  # the argument of `f` to choose, for instance a threshold
    bounds: tuple[float, float],  # where to look for it
    tol: float = 0.01,  # how closely to find it
    do_neg: bool = True,  # the largest value of `f` is the best; False: the smallest
    get_x: bool = False,  # return (value, argument)
) -> Callable[[Any, Any], Any]:
    """The function `f` at the best value of one of its arguments.

    As a metric it is the mean over the batches, each with a best argument of its own; `AccumMetric(optim_metric(…))`
    looks for one over the whole set. Each value that is tried waits for the device.
    """
    _imported("scipy.optimize")
    return _AtBest(f, argname, bounds, tol, -1 if do_neg else 1, get_x)


class _AtBest:
    def __init__(
        self, f: Callable[..., Any], argname: str, bounds: tuple[float, float], tol: float, sign: int, get_x: bool
    ) -> None:
        self.f, self.argname, self.bounds, self.tol, self.sign, self.get_x = f, argname, bounds, tol, sign, get_x
        self.__name__ = f"opt_{name_of(f)}"

    def __call__(self, preds: Any, targs: Any) -> float | tuple[float, float]:
        def cost(x: float) -> float:
            return self.sign * float(self.f(preds, targs, **{self.argname: x}))

        search = _imported("scipy.optimize").minimize_scalar
        found = search(cost, bounds=self.bounds, method="bounded", options={"xatol": self.tol})
        value = self.sign * float(found.fun)
        return (value, float(found.x)) if self.get_x else value
