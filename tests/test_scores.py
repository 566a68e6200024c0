"""Scores and the metrics known by name: their numbers, that they are those of the whole set, and their state.

Numbers marked as fastai's come from fastai 2.8.12, run on the same inputs.
"""

import copy
import math
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from learnloop import Learner, Recorder
from learnloop.metrics import ForeignMetric, Metric, mk_metric
from learnloop.scores import (
    AccumMetric,
    CorpusBLEUMetric,
    Dice,
    DiceMulti,
    JaccardCoeff,
    JaccardCoeffMulti,
    LossMetric,
    LossMetrics,
    Perplexity,
    accuracy_multi,
    corpus_bleu,
    exp_rmspe,
    foreground_acc,
    mae,
    mse,
    msle,
    rmse,
    top_k_accuracy,
)
from tests.toys import Once, learner, loaders
from tests.waves import classes, images, labels, numbers, positive


def batch(pred, y, **kwargs):
    """What a metric reads of a learner."""
    return SimpleNamespace(pred=pred, yb=() if y is None else (y,), **kwargs)


def over(metric, batches):
    """The metric's value over these (pred, y)."""
    metric = mk_metric(metric)
    metric.reset()
    for pred, y in batches:
        metric.accumulate(batch(pred, y))
    return metric.value


def number(value):
    return pytest.approx(value, abs=1e-5)


def sentences(*sizes):
    """One-hot predictions and token numbers, wrong in every fifth place."""
    for n in sizes:
        y = (torch.arange(n * 7) * 5 // 3 + n).view(n, 7) % 9
        pred = torch.where(torch.arange(n * 7).view(n, 7) % 5 == 0, (y + 1) % 9, y)
        yield torch.nn.functional.one_hot(pred, 9).float(), y


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for an accelerator."""

    waiting = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.bincount)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += by_mask or func.overloadpacket in self.waiting
        return func(*args, **(kwargs or {}))


# -- functions


@pytest.mark.parametrize(
    ("metric", "batches", "expected"),  # fastai's
    [
        (partial(top_k_accuracy, k=2), classes(4), 0.4500000),
        (accuracy_multi, labels(), 0.5333334),
        (partial(accuracy_multi, thresh=0.3, sigmoid=False), labels(), 0.5333334),
        (mse, numbers(2), 0.1277823),
        (mae, numbers(2), 0.3225221),
        (msle, positive(), 0.0868679),
        (rmse, numbers(2), 0.3574664),
        (exp_rmspe, numbers(2), 0.3725657),
        (foreground_acc, images(3), 0.3777126),
        (foreground_acc, [(pred, y[:, None]) for pred, y in images(3)], 0.3777126),
    ],
)
def test_functions_give_fastais_numbers(metric, batches, expected):
    assert float(over(metric, batches)) == number(expected)


def test_top_k_along_another_axis():
    pred = torch.tensor([[[5.0, 0.0]], [[1.0, 2.0]], [[3.0, 1.0]]]).movedim(0, 1)  # [1, 3 classes, 2 pixels]
    assert top_k_accuracy(pred, torch.tensor([[2, 0]]), k=2, axis=1).item() == 0.5


def test_top_k_names_a_k_beyond_the_classes():
    with pytest.raises(ValueError, match="`k` is 5, but there are 3 classes"):
        top_k_accuracy(torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize("func", [mse, mae, msle, rmse, exp_rmspe, accuracy_multi])
def test_as_many_predictions_as_targets_are_needed(func):
    with pytest.raises(ValueError, match=r"predictions have shape \(4, 1\) and the targets \(3,\)"):
        func(torch.zeros(4, 1), torch.zeros(3))


def test_whole_numbers_may_be_targets():
    assert mse(torch.tensor([0.5, 2.0]), torch.tensor([1, 2])).item() == 0.125


def test_foreground_accuracy_without_foreground_is_not_a_number():
    assert foreground_acc(torch.zeros(1, 2, 3), torch.zeros(1, 3)).isnan()


# -- roots


def test_a_root_is_taken_of_the_mean_over_the_set():
    batches = [(torch.tensor([1.0]), torch.tensor([0.0])), (torch.tensor([0.0, 0.0, 7.0]), torch.zeros(3))]
    assert over(rmse, batches).item() == number(math.sqrt(50 / 4))


def test_elements_weigh_the_same_where_batches_differ_in_shape():
    batches = [(torch.ones(2, 1), torch.zeros(2, 1)), (torch.zeros(2, 9), torch.zeros(2, 9))]
    assert over(rmse, batches).item() == number(math.sqrt(2 / 20))


def test_a_root_as_a_function_is_that_of_its_arguments():
    assert rmse(torch.tensor([3.0, 4.0]), torch.zeros(2)).item() == number(math.sqrt(12.5))
    assert exp_rmspe(torch.tensor([math.log(3.0)]), torch.zeros(1)).item() == number(2.0)


def test_learners_do_not_share_the_metric_of_a_root():
    assert mk_metric(rmse) is not mk_metric(rmse)
    assert [mk_metric(rmse).name, mk_metric(exp_rmspe).name] == ["rmse", "exp_rmspe"]


# -- overlap


@pytest.mark.parametrize(
    ("metric", "batches", "expected"),  # fastai's
    [
        (Dice(), images(2), 0.5897436),
        (JaccardCoeff(), images(2), 0.4181818),
        (DiceMulti(), images(3), 0.3347546),
        (JaccardCoeffMulti(), images(3), 0.2024977),
        (DiceMulti(), [(torch.cat([p, p[:, :1] - 9], 1), y) for p, y in images(3)], 0.3347546),  # a class nowhere
        (DiceMulti(axis=-1), [(p.movedim(1, -1), y) for p, y in images(3)], 0.3347546),
    ],
)
def test_overlaps_are_fastais(metric, batches, expected):
    assert over(metric, batches) == number(expected)


def test_the_overlap_of_nothing_with_nothing_is_none():
    assert over(Dice(), [(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))]) is None


def test_targets_outside_the_classes_are_missed():
    pred = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])  # 1 1 0
    assert over(DiceMulti(), [(pred, torch.tensor([1, 255, 0]))]) == number((1 + 2 / 3) / 2)


def test_counts_are_exact_beyond_what_single_precision_holds():
    metric = Dice()
    metric.accumulate(batch(torch.tensor([[0.0, 1.0]]), torch.tensor([1])))
    metric.counts += 2**25
    metric.accumulate(batch(torch.tensor([[0.0, 1.0]]), torch.tensor([1])))
    assert metric.counts.flatten().tolist() == [2**25 + 2, 2**25 + 4]


# -- losses


def test_perplexity_is_fastais():
    metric = Perplexity()
    for n, loss in ((4, 0.7), (4, 0.5), (3, 0.9)):
        metric.accumulate(batch(None, torch.zeros(n), loss=torch.tensor(loss)))
    assert metric.value.item() == number(1.9774699)  # fastai's
    assert metric.name == "perplexity"


def test_a_term_of_the_loss_is_averaged_over_items():
    metric, loss_func = LossMetric("kl"), SimpleNamespace()
    for n, loss in ((4, 0.7), (4, 0.5), (3, 0.9)):
        loss_func.kl = torch.tensor(loss, requires_grad=True)
        metric.accumulate(batch(None, torch.zeros(n), loss_func=loss_func))
    assert metric.value.item() == number(0.6818182)  # fastai's
    assert not metric.value.requires_grad


def test_a_term_may_be_a_python_number():
    metric = LossMetric("kl")
    metric.accumulate(batch(None, torch.zeros(3), loss_func=SimpleNamespace(kl=0.25)))
    assert metric.value.item() == 0.25


def test_a_term_that_the_loss_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"`LossMetric` reads `kl`, which MSELoss does not have. Set `self.kl`"):
        LossMetric("kl").accumulate(batch(None, torch.zeros(1), loss_func=torch.nn.MSELoss()))


def test_terms_are_listed_with_commas_or_as_lists():
    assert [m.name for m in LossMetrics("a,b")] == ["a", "b"]
    assert [(m.attr, m.name) for m in LossMetrics(["a", "b"], "c,d")] == [("a", "c"), ("b", "d")]


def test_each_term_needs_a_title():
    with pytest.raises(ValueError, match="names 2 terms of the loss, `nms` 1"):
        LossMetrics("a,b", "c")


# -- text


def test_bleu_is_fastais():
    assert over(CorpusBLEUMetric(vocab_sz=9), sentences(2, 3)) == number(0.4565033)
    assert CorpusBLEUMetric().name == "corpus_bleu"


def test_bleu_smooths_lengths_without_a_match():
    y = (torch.arange(12) * 5 // 3).view(2, 6) % 9
    pred = torch.where(torch.arange(12).view(2, 6) % 3 == 2, (y + 1) % 9, y)
    assert corpus_bleu(pred.tolist(), y.tolist()) == number(0.2295749)  # fastai's


def test_bleu_is_lower_for_short_predictions():
    y = ((torch.arange(14) * 5 // 3 + 2).view(2, 7) % 9).tolist()
    assert corpus_bleu([row[:6] for row in y], y) == number(0.8464817)  # fastai's
    assert corpus_bleu(y, y) == number(1.0)


def test_bleu_of_less_than_four_tokens_is_none():
    assert corpus_bleu([[1, 2, 3]], [[1, 2, 3]]) is None
    assert over(CorpusBLEUMetric(), []) is None


# -- whole sets


def wrong(preds, targs):
    return (preds != targs).sum()


def spread(preds, targs):
    return (preds.max() - preds.min()).item()


def first_row(preds, targs):
    return preds[0].tolist()


def test_a_function_sees_the_whole_set():
    assert over(AccumMetric(wrong, dim_argmax=-1), classes(3)).item() == 13  # fastai's: 0.35 of 20 are right


def test_an_argmax_may_be_along_the_first_dimension():
    pred, y = torch.tensor([[1.0, 0.0, 3.0], [2.0, -1.0, 1.0]]), torch.tensor([1, 0, 0])
    assert over(AccumMetric(wrong, dim_argmax=0), [(pred, y)]).item() == 0


def test_a_threshold_may_be_zero():
    assert over(
        AccumMetric(first_row, thresh=0.0, flatten=False), [(torch.tensor([[-1.0, 0.0, 2.0]]), torch.zeros(1))]
    ) == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("no", [0.0, 1.0]), ("sigmoid", [0.5, 0.7310586]), ("softmax", [0.2689414, 0.7310586])],
)
def test_activations(activation, expected):
    metric = AccumMetric(first_row, activation=activation, flatten=False)
    assert over(metric, [(torch.tensor([[0.0, 1.0]]), torch.zeros(1))]) == number(expected)


def test_a_binary_softmax_gives_the_last_classs_probability():
    metric = AccumMetric(lambda preds, targs: preds.tolist(), activation="binarysoftmax", dim_argmax=-1)
    assert over(metric, [(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.zeros(2))]) == number([0.7310586, 0.5])


def test_a_binary_softmax_of_one_score_is_refused():
    with pytest.raises(ValueError, match=r"`wrong` needs the scores of two classes, but got float32\[4, 1\]"):
        over(AccumMetric(wrong, activation="binarysoftmax"), [(torch.zeros(4, 1), torch.zeros(4))])


def test_an_unknown_activation_is_refused_at_once():
    with pytest.raises(ValueError, match="`activation` is 'relu'; it is one of 'no', 'sigmoid', 'softmax', 'binary"):
        AccumMetric(wrong, activation="relu")


def test_arguments_may_be_swapped_named_and_numpy():
    def func(targs, preds, scale):
        assert type(targs).__module__ == "numpy"
        return (preds - targs).sum() * scale

    value = over(AccumMetric(func, to_np=True, invert_arg=True, scale=2), [(torch.tensor([3.0]), torch.tensor([1.0]))])
    assert (value, type(value)) == (4.0, float)


def test_bfloat16_is_widened():
    pred = torch.ones(2, 1, dtype=torch.bfloat16)
    assert over(AccumMetric(lambda p, t: p.sum(), to_np=True), [(pred, pred)]) == 2.0


def test_called_with_a_set_it_gives_its_score_and_keeps_what_it_has():
    metric = AccumMetric(wrong)
    metric.accumulate(batch(torch.tensor([1, 2]), torch.tensor([1, 1])))
    assert metric(torch.tensor([[0], [0]]), torch.tensor([1, 1])).item() == 2
    assert metric.value.item() == 1


def test_a_metric_takes_another_name():
    metric = AccumMetric(wrong, name="mistakes")
    assert metric.name == "mistakes"
    metric.name = "errors"
    assert (metric.name, AccumMetric(partial(wrong)).name) == ("errors", "wrong")


def test_predictions_are_kept_as_they_were():
    metric, pred, y = AccumMetric(spread), torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.0])
    metric.accumulate(batch(pred, y))
    pred.zero_(), y.fill_(9)
    assert metric.value == 1.0
    assert metric.targs[0].tolist() == [0, 0]


def test_predictions_are_kept_without_their_graph():
    metric = AccumMetric(spread)
    metric.accumulate(batch(torch.ones(2, 1, requires_grad=True) * 2, torch.zeros(2)))
    assert not metric.preds[0].requires_grad


def test_the_set_is_joined_once():
    metric = AccumMetric(wrong, dim_argmax=-1)
    over(metric, classes(3))
    joined = metric.preds[0]
    assert metric.value.item() == 13
    assert metric.preds[0] is joined
    assert [len(joined), len(metric.preds)] == [20, 1]


def test_a_model_with_two_outputs_needs_a_function_of_its_own():
    with pytest.raises(TypeError, match=r"`wrong` needs one tensor, but the prediction is \(float32\[2\] cpu, float"):
        AccumMetric(wrong).accumulate(batch((torch.zeros(2), torch.zeros(2)), torch.zeros(2)))


# -- what all have in common

MAKERS = {
    "rmse": (lambda: mk_metric(rmse), numbers()),
    "dice": (Dice, images(2)),
    "dice_multi": (DiceMulti, images(3)),
    "accum": (lambda: AccumMetric(wrong, dim_argmax=-1), classes(3)),
    "bleu": (CorpusBLEUMetric, list(sentences(2, 3))),
}
every_metric = pytest.mark.parametrize(("make", "batches"), MAKERS.values(), ids=MAKERS)


@every_metric
def test_nothing_accumulated_is_none(make, batches):
    assert over(make(), [(pred, None) for pred, _ in batches]) is None


@every_metric
def test_reset_forgets(make, batches):
    metric = make()
    expected = over(metric, batches)
    over(metric, batches[:1])
    assert over(metric, batches) == expected


@every_metric
def test_a_metric_put_back_half_way_ends_with_the_same_number(make, batches, tmp_path):
    metric, other = make(), make()
    expected = over(make(), batches)
    over(metric, batches[:1])
    torch.save(metric.state_dict(), tmp_path / "state.pt")
    over(metric, batches)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for pred, y in batches[1:]:
        other.accumulate(batch(pred, y))
    assert other.value == expected


@every_metric
def test_a_metric_can_be_copied_and_pickled(make, batches):
    metric = pickle.loads(pickle.dumps(copy.deepcopy(make())))
    assert over(metric, batches) == over(make(), batches)


@every_metric
def test_accumulating_never_makes_the_host_wait(make, batches):
    metric = make()
    with HostReads() as reads:
        for pred, y in batches:
            metric.accumulate(batch(pred, y))
    assert reads.count == 0


@pytest.mark.parametrize("func", [top_k_accuracy, accuracy_multi, mse, mae, msle, foreground_acc])
def test_functions_never_make_the_host_wait(func):
    if func is top_k_accuracy:
        func = partial(func, k=2)
    pred, y = images(2)[0] if func is foreground_acc else labels()[0]
    with HostReads() as reads:
        func(pred, y[:, 0].long() if isinstance(func, partial) else y)
    assert reads.count == 0


def test_a_learner_records_them_under_their_names():
    learn = learner(metrics=[rmse, mae, AccumMetric(spread), torch.nn.MSELoss()], cbs=Recorder())
    with learn.no_logging():
        learn.fit(1, lr=0.0)
    (row,) = learn.recorder.values
    assert list(learn.recorder.metric_names)[3:7] == ["rmse", "mae", "spread", "MSELoss"]
    assert row[2] == pytest.approx(math.sqrt(row[1]), rel=1e-5)
    assert row[5] == pytest.approx(row[1], rel=1e-5)


def test_a_training_that_goes_on_half_way_has_the_same_numbers(tmp_path):
    def metrics():
        return [rmse, AccumMetric(spread)]

    def row(learn):
        return list(learn.recorder.values[0])

    def store(cb):
        torch.save(cb.learn.state_dict(), tmp_path / "state.pt")

    def made(*cbs):
        return learner(metrics=metrics(), cbs=[Recorder(train_metrics=True), *cbs], dls=loaders(n_train=3))

    store_once = Once("after_batch", store)
    store_once.order = Recorder.order + 1  # it takes in the batch before the state is taken
    whole, other = made(store_once), made()
    with whole.no_logging(), other.no_logging():
        whole.fit(1)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        other.resume()
    assert row(other) == row(whole)


# -- metrics of torchmetrics and their like


class Largest:
    """What torchmetrics and torcheval agree on, without either."""

    def __init__(self):
        self.largest, self.device = torch.tensor(0.0), "cpu"

    def reset(self):
        self.largest = torch.tensor(0.0)

    def update(self, pred, y):
        self.largest = torch.maximum(self.largest, (pred - y).max())

    def compute(self):
        return self.largest

    def state_dict(self):
        return {"largest": self.largest}

    def load_state_dict(self, state):
        self.largest = state["largest"]


def test_an_object_that_updates_and_computes_is_a_metric():
    metric = mk_metric(Largest)
    assert (metric.name, metric.value) == ("largest", None)
    assert over(metric, [(torch.tensor([3.0]), torch.tensor([1.0])), (torch.ones(1), torch.ones(1))]).item() == 2.0


def test_its_own_state_is_stored():
    metric, other = mk_metric(Largest()), mk_metric(Largest())
    over(metric, [(torch.tensor([3.0]), torch.tensor([1.0]))])
    other.load_state_dict(metric.state_dict())
    assert other.value.item() == 2.0


def test_a_function_that_makes_a_metric_is_to_be_called():
    def Largest3(k: int = 3) -> AccumMetric:
        return AccumMetric(spread)

    for wrong_one in (Largest3, partial(Largest3, k=2)):
        with pytest.raises(TypeError, match=r"holds `Largest3`, which makes a metric when called: `Largest3\(…\)`"):
            mk_metric(wrong_one)


def test_a_users_metric_with_these_names_stays_what_it_is():
    class Own(Metric):
        def update(self): ...
        def compute(self): ...

    assert type(mk_metric(Own)) is Own


class TestTorchmetrics:
    @pytest.fixture
    def tm(self):
        return pytest.importorskip("torchmetrics")

    def test_one_is_a_metric_as_it_is(self, tm):
        metric = mk_metric(tm.Accuracy(task="multiclass", num_classes=3))
        assert type(metric) is ForeignMetric
        assert metric.name == "multiclass_accuracy"
        assert over(metric, classes(3)).item() == number(0.35)  # fastai's accuracy

    @pytest.mark.parametrize(
        ("ours", "theirs", "kwargs", "batches"),
        [
            (rmse, "MeanSquaredError", {"squared": False}, numbers()),
            (mae, "MeanAbsoluteError", {}, numbers()),
            (msle, "MeanSquaredLogError", {}, positive()),
            (partial(top_k_accuracy, k=2), "Accuracy", {"top_k": 2, "average": "micro", "num_classes": 4}, classes(4)),
            (JaccardCoeffMulti(), "JaccardIndex", {"num_classes": 3}, images(3)),
            (DiceMulti(), "F1Score", {"num_classes": 3, "average": "macro"}, images(3)),
        ],
    )
    def test_both_compute_the_same(self, tm, ours, theirs, kwargs, batches):
        task = {"task": "multiclass"} if "num_classes" in kwargs else {}
        expected = over(getattr(tm, theirs)(**task, **kwargs), batches)
        assert float(over(ours, batches)) == number(expected.item())

    @pytest.mark.parametrize(
        "make",
        [
            lambda tm: tm.Accuracy(task="multiclass", num_classes=3),
            lambda tm: tm.AUROC(task="multiclass", num_classes=3),  # a list of all predictions
            lambda tm: tm.Accuracy("multiclass", num_classes=3) + tm.AUROC("multiclass", num_classes=3),
        ],
        ids=["sums", "lists", "parts"],
    )
    def test_one_put_back_half_way_ends_with_the_same_number(self, tm, make, tmp_path, recwarn):
        metric, other = mk_metric(make(tm)), mk_metric(make(tm))
        over(metric, classes(3)[:2])
        torch.save(metric.state_dict(), tmp_path / "state.pt")
        over(metric, classes(3)[:1])
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert other.value == over(make(tm), classes(3)[:2])
        other.accumulate(batch(*classes(3)[2]))
        assert other.value == over(make(tm), classes(3))
        assert not [warning for warning in recwarn if "before the ``update``" in str(warning.message)]

    def test_several_at_once_are_to_be_listed(self, tm):
        with pytest.raises(TypeError, match=r"a MetricCollection, but each column is one metric. Pass `\[\*coll"):
            mk_metric(tm.MetricCollection([tm.MeanSquaredError()]))

    def test_one_number_is_needed(self, tm):
        metric = tm.Accuracy(task="multiclass", num_classes=3, average=None)
        with pytest.raises(ValueError, match=r"`multiclass_accuracy` computed shape \(3,\); a column holds one number"):
            over(metric, classes(3))

    def test_its_state_goes_to_the_device_of_the_predictions(self, tm):
        metric = mk_metric(tm.MeanSquaredError())
        metric.accumulate(batch(torch.ones(2, device="meta"), torch.ones(2, device="meta")))
        assert metric.metric.device.type == "meta"

    def test_no_graph_is_kept(self, tm):
        metric = mk_metric(tm.AUROC(task="binary"))
        metric.accumulate(batch(torch.rand(2, requires_grad=True), torch.tensor([0, 1])))
        assert not metric.metric.preds[0].requires_grad

    def test_a_learner_takes_one(self, tm):
        learn = learner(metrics=[tm.MeanSquaredError(), tm.R2Score], cbs=Recorder())
        assert isinstance(learn, Learner)
        with learn.no_logging():
            learn.fit(2)
        assert list(learn.recorder.metric_names)[3:5] == ["mean_squared_error", "r2_score"]
        assert [row[2] for row in learn.recorder.values] == pytest.approx([row[1] for row in learn.recorder.values])
