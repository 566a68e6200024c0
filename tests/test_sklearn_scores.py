"""Metrics of scikit-learn and scipy: fastai's numbers, theirs, and what is said where they are not installed.

Numbers marked as fastai's come from fastai 2.8.12 with scikit-learn 1.9.1, run on the same inputs.
"""

import copy
import inspect
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from learnloop import sklearn_scores
from learnloop.metrics import mk_metric
from learnloop.scores import AccumMetric, accuracy_multi, mae
from learnloop.sklearn_scores import (
    APScoreBinary,
    APScoreMulti,
    BalancedAccuracy,
    BrierScore,
    BrierScoreMulti,
    CohenKappa,
    ExplainedVariance,
    F1Score,
    F1ScoreMulti,
    FBeta,
    FBetaMulti,
    HammingLoss,
    HammingLossMulti,
    Jaccard,
    JaccardMulti,
    MatthewsCorrCoef,
    MatthewsCorrCoefMulti,
    PearsonCorrCoef,
    Precision,
    PrecisionMulti,
    R2Score,
    Recall,
    RecallMulti,
    RocAuc,
    RocAucBinary,
    RocAucMulti,
    SpearmanCorrCoef,
    optim_metric,
    skm_to_fastai,
    skm_to_learnloop,
)
from tests.waves import classes, labels, numbers

skm = pytest.importorskip("sklearn.metrics")


def over(metric, batches):
    """The metric's value over these (pred, y)."""
    for pred, y in batches:
        metric.accumulate(SimpleNamespace(pred=pred, yb=(y,)))
    return metric.value


def number(value):
    return pytest.approx(value, abs=1e-5)


def whole(batches):
    """Predictions and targets of all batches."""
    return tuple(torch.cat(tensors) for tensors in zip(*batches, strict=True))


FASTAI = [
    (F1Score, {}, classes(2), "f1_score", 0.6315789),
    (F1Score, {"average": "macro"}, classes(3), "f1_score", 0.3394522),
    (FBeta, {"beta": 2}, classes(2), "fbeta_score", 0.6122449),
    (Precision, {}, classes(2), "precision_score", 0.6666667),
    (Recall, {}, classes(2), "recall_score", 0.6000000),
    (Jaccard, {}, classes(2), "jaccard_score", 0.4615385),
    (HammingLoss, {}, classes(3), "hamming_loss", 0.6500000),
    (RocAuc, {}, classes(3), "roc_auc_score", 0.5019841),
    (RocAuc, {"multi_class": "ovo"}, classes(3), "roc_auc_score", 0.5000000),
    (RocAucBinary, {}, classes(2), "roc_auc_score", 0.5950000),
    (APScoreBinary, {}, classes(2), "average_precision_score", 0.7581527),
    (BalancedAccuracy, {}, classes(3), "balanced_accuracy_score", 0.3472222),
    (CohenKappa, {}, classes(3), "cohen_kappa_score", 0.0151515),
    (CohenKappa, {"weights": "quadratic"}, classes(3), "cohen_kappa_score", 0.1319444),
    (MatthewsCorrCoef, {}, classes(3), "matthews_corrcoef", 0.0152092),
    (F1ScoreMulti, {}, labels(), "f1_score", 0.5600414),
    (F1ScoreMulti, {"sigmoid": False, "thresh": 0.2}, labels(), "f1_score", 0.5325815),
    (FBetaMulti, {"beta": 0.5}, labels(), "fbeta_score", 0.5833333),
    (PrecisionMulti, {"thresh": 0.4}, labels(), "precision_score", 0.5739316),
    (RecallMulti, {}, labels(), "recall_score", 0.5277778),
    (JaccardMulti, {}, labels(), "jaccard_score", 0.3902778),
    (HammingLossMulti, {}, labels(), "hamming_loss", 0.4666667),
    (RocAucMulti, {}, labels(), "roc_auc_score", 0.5151389),
    (APScoreMulti, {}, labels(), "average_precision_score", 0.6088089),
    (R2Score, {}, numbers(), "r2_score", 0.7453698),
    (ExplainedVariance, {}, numbers(), "explained_variance_score", 0.7470587),
    (PearsonCorrCoef, {}, numbers(), "pearsonr", 0.8769255),
    (SpearmanCorrCoef, {}, numbers(), "spearmanr", 0.9605163),
]
UNLIKE_FASTAI = [BrierScore, BrierScoreMulti, MatthewsCorrCoefMulti]  # which scores labels, or raises
FACTORIES = [*dict.fromkeys(case[0] for case in FASTAI), *UNLIKE_FASTAI]


@pytest.mark.parametrize(("make", "kwargs", "batches", "name", "expected"), FASTAI)
def test_values_and_names_are_fastais(make, kwargs, batches, name, expected):
    metric = make(**kwargs)
    value = over(metric, batches)
    assert (metric.name, type(value)) == (name, float)
    assert value == number(expected)


def test_every_metric_here_is_compared():
    made = {
        name
        for name in sklearn_scores.__all__
        if inspect.signature(getattr(sklearn_scores, name)).return_annotation is AccumMetric
    }
    assert made - {"skm_to_fastai", "skm_to_learnloop"} == {make.__name__ for make in FACTORIES}


@pytest.mark.parametrize("make", FACTORIES)
def test_they_can_be_copied_and_pickled(make):
    metric = make(**({"beta": 1} if make in (FBeta, FBetaMulti) else {}))
    assert pickle.loads(pickle.dumps(copy.deepcopy(metric))).name == metric.name


@pytest.mark.parametrize("make", FACTORIES)
def test_one_that_was_not_called_is_refused(make):
    with pytest.raises(
        TypeError, match=rf"`{make.__name__}`, which makes a metric when called: `{make.__name__}\(…\)`"
    ):
        mk_metric(make)


# -- probabilities


def test_the_brier_score_is_of_the_second_classs_probability():
    pred, y = whole(classes(2))
    expected = (pred.softmax(-1)[:, 1] - y).square().mean().item()
    assert over(BrierScore(), classes(2)) == number(expected)
    assert skm.brier_score_loss(y, pred.softmax(-1)[:, 1]) == number(expected)


def test_the_brier_score_of_many_classes_is_the_sum_over_them():
    pred, y = whole(classes(3))
    expected = (pred.softmax(-1) - torch.nn.functional.one_hot(y)).square().sum(1).mean().item()
    assert over(BrierScore(), classes(3)) == number(expected)


@pytest.mark.parametrize(("n_classes", "expected"), [(2, 0.25), (3, 2 / 3)])
def test_the_brier_score_needs_not_every_class(n_classes, expected):
    assert over(BrierScore(), [(torch.zeros(4, n_classes), torch.zeros(4).long())]) == number(expected)


def test_the_brier_score_of_labels_is_the_mean_over_them():
    pred, y = whole(labels())
    expected = (pred.sigmoid() - y).square().mean().item()
    assert over(BrierScoreMulti(), labels()) == number(expected)
    assert over(BrierScoreMulti(sigmoid=False), [(pred.sigmoid(), y)]) == number(expected)


def test_the_brier_score_of_labels_needs_not_both_values():
    assert over(BrierScoreMulti(), [(torch.zeros(4, 2), torch.ones(4, 2))]) == number(0.25)
    assert over(BrierScoreMulti(), [(torch.zeros(4, 2) - 9, torch.zeros(4, 2))]) == number(0.0)


def test_the_correlation_of_labels_is_the_mean_over_them():
    pred, y = whole(labels())
    expected = sum(skm.matthews_corrcoef(y[:, i], pred[:, i] >= 0) for i in range(3)) / 3
    assert over(MatthewsCorrCoefMulti(), labels()) == number(expected)


def test_a_roc_curve_is_one_against_one_or_the_rest():
    with pytest.raises(ValueError, match='`multi_class` is \'raise\'; for `RocAuc` it is "ovr" or "ovo"'):
        RocAuc(multi_class="raise")


def test_items_may_have_weights():
    weights = torch.arange(20).numpy()
    pred, y = whole(classes(2))
    expected = skm.f1_score(y, pred.argmax(-1), sample_weight=weights)
    assert over(F1Score(sample_weight=weights), classes(2)) == number(expected)


# -- any function


def test_any_function_of_scikit_learn_becomes_a_metric():
    assert over(skm_to_fastai(skm.accuracy_score), classes(3)) == number(0.35)  # fastai's
    assert over(skm_to_fastai(skm.mean_absolute_error, is_class=False), numbers()) == number(0.3153147)  # fastai's
    one_label = [(pred[:, :1], y[:, :1]) for pred, y in labels()]
    assert over(skm_to_fastai(skm.accuracy_score, thresh=0.4), one_label) == number(0.55)  # fastai's


def test_classes_may_lie_along_the_first_dimension():
    pred, y = whole(classes(3))
    assert over(skm_to_fastai(skm.accuracy_score, axis=0), [(pred.T, y)]) == number(0.35)


def test_it_has_a_second_name():
    assert skm_to_learnloop is skm_to_fastai


# -- the best argument


def test_the_best_threshold_is_fastais():
    value, thresh = optim_metric(accuracy_multi, "thresh", (0.2, 0.8), get_x=True)(*whole(labels()))
    assert (value, thresh) == (number(0.5333334), number(0.6629192))  # fastai's
    assert optim_metric(accuracy_multi, "thresh", (0.2, 0.8))(*whole(labels())) == number(0.5333334)


def test_the_smallest_value_may_be_the_best():
    def shifted(preds, targs, shift):
        return mae(preds + shift, targs)

    value, shift = optim_metric(shifted, "shift", (-1, 1), do_neg=False, get_x=True)(*whole(labels()))
    assert (value, shift) == (number(1.2699066), pytest.approx(0.4889, abs=1e-4))  # fastai's


def test_the_search_is_as_close_as_asked():
    def parabola(preds, targs, x):
        return -(abs(x - 0.123456) ** 1.5)

    _, x = optim_metric(parabola, "x", (-1, 1), tol=1e-6, get_x=True)(None, None)
    assert x == pytest.approx(0.123456, abs=1e-6)


def test_it_is_a_metric_of_a_batch_or_of_the_set():
    best = optim_metric(accuracy_multi, "thresh", (0.2, 0.8))
    assert mk_metric(best).name == AccumMetric(best).name == "opt_accuracy_multi"
    assert over(AccumMetric(best), labels()) == number(0.5333334)
    assert pickle.loads(pickle.dumps(best)).argname == "thresh"


# -- without scikit-learn


def test_it_is_imported_when_a_metric_is_made_and_named_when_it_is_missing():
    code = """if True:
        import sys
        import learnloop.sklearn_scores as scores
        assert not {"sklearn", "scipy"} & set(sys.modules)
        sys.modules["sklearn"] = sys.modules["scipy"] = None
        for make in (scores.F1Score, scores.BrierScore, scores.SpearmanCorrCoef):
            try:
                make()
            except ImportError as error:
                print(error)
    """
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    install = "comes with scikit-learn, which is not installed. `pip install scikit-learn`."
    assert printed.splitlines() == [
        f"`{name}` {install}" for name in ("sklearn.metrics", "sklearn.metrics", "scipy.stats")
    ]
