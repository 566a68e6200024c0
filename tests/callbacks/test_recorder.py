"""The Recorder: columns, rows, losses, and what leaves them alone.

Numbers marked as fastai's come from fastai 2.8.12, run on the same data, weights and rate; it smooths in float32.
"""

import math
import signal
import weakref

import matplotlib
import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.testing import toy_learner

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# fastai's, for `line_learner` and two epochs
SMOOTHED = [1.3449987, 1.8236728, 2.1430616, 1.6083663, 1.34957, 1.234301]
ROWS = [[2.1430616, 0.548458, 0.6469498], [1.234301, 0.1222026, 0.2832197]]
TRAIN_MAE = [1.4379722, 0.5536851]


def mae(pred, y):
    return (pred - y).abs().mean()


def line(n):
    x = torch.linspace(0, 1, n)[:, None]
    return x, 2 * x + 1


def line_learner(cbs=None, metrics=mae, recorder=None, valid=True, **kwargs):
    """Three training batches of two and validation batches of 2, 2, 1; starts at y = x / 2, rate 0.1."""
    model = nn.Linear(1, 1)
    model.load_state_dict({"weight": torch.tensor([[0.5]]), "bias": torch.zeros(1)})
    loaders = [ll.TensorLoader(*line(6), bs=2), *([ll.TensorLoader(*line(5), bs=2)] if valid else [])]
    dls = ll.DataLoaders(*loaders, device="cpu")
    learn = ll.Learner(dls, model, nn.MSELoss(), opt_func=ll.SGD, lr=0.1, metrics=metrics, default_cbs=False, **kwargs)
    learn.logger = lambda row: None
    return learn.add_cbs([ll.TrainEvalCallback(), recorder or ll.Recorder(), *([cbs] if cbs else [])])


def trained(n_epoch=2, **kwargs):
    learn = line_learner(**kwargs)
    learn.fit(n_epoch)
    return learn


def cancels(event, error, epoch=0, batch=None, order=0):
    """A callback that cancels in one epoch, or in one training batch of it."""

    def act(cb):
        learn = cb.learn
        if learn.epoch == epoch and (batch is None or (learn.training and learn.iter == batch)):
            raise error

    cb = ll.Callback(**{event: act})
    cb.order = order
    return cb


def record(learn):
    """All that a Recorder holds of a training."""
    r = learn.recorder
    return (
        [list(row) for row in r.values],
        r.history,
        list(r.log),
        r.iters,
        r.lrs,
        r.raw_losses,
        [float(x) for x in r.losses],
    )


# Rows


def test_a_row_holds_smoothed_training_loss_validation_loss_and_metrics_as_in_fastai():
    learn = trained()
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "mae", "time"]
    for row, fastai in zip(learn.recorder.values, ROWS, strict=True):
        assert list(row) == pytest.approx(fastai, abs=3e-6)


def test_metrics_on_the_training_set_have_columns_of_their_own():
    learn = trained(recorder=ll.Recorder(train_metrics=True))
    names = ["epoch", "train_loss", "train_mae", "valid_loss", "valid_mae", "time"]
    assert list(learn.recorder.metric_names) == names
    for row, (loss, *valid), train_mae in zip(learn.recorder.values, ROWS, TRAIN_MAE, strict=True):
        assert list(row) == pytest.approx([loss, train_mae, *valid], abs=3e-6)


@pytest.mark.parametrize(
    ("options", "has_valid", "names"),
    [
        ({}, True, "epoch train_loss valid_loss mae time"),
        ({"add_time": False}, True, "epoch train_loss valid_loss mae"),
        ({"train_metrics": True}, True, "epoch train_loss train_mae valid_loss valid_mae time"),
        ({"valid_metrics": False}, True, "epoch train_loss time"),
        ({"train_metrics": True, "valid_metrics": False}, True, "epoch train_loss mae time"),
        ({}, False, "epoch train_loss time"),
        ({"train_metrics": True}, False, "epoch train_loss mae time"),
    ],
)
def test_every_column_that_is_named_has_a_value_in_each_row(options, has_valid, names):
    learn = trained(recorder=ll.Recorder(**options), valid=has_valid)
    assert " ".join(learn.recorder.metric_names) == names
    for row in learn.recorder.history:
        assert " ".join(row) == names
        assert None not in row.values()


def test_the_logger_gets_each_row_with_epoch_and_time():
    rows, learn = [], line_learner()
    learn.logger = rows.append
    learn.fit(2)
    assert [list(row) for row in rows] == [
        [0, *learn.recorder.values[0], "00:00"],
        [1, *learn.recorder.values[1], "00:00"],
    ]
    assert learn.recorder.log == rows[-1]


def test_the_history_is_a_list_of_dicts_of_numbers():
    learn = trained()
    assert learn.recorder.history[1] == {
        "epoch": 1,
        "train_loss": pytest.approx(1.234301, abs=3e-6),
        "valid_loss": pytest.approx(0.1222026, abs=3e-6),
        "mae": pytest.approx(0.2832197, abs=3e-6),
        "time": "00:00",
    }


def test_the_history_is_a_frame_where_pandas_is_installed():
    pytest.importorskip("pandas")
    frame = trained().recorder.to_frame()
    assert list(frame.columns) == ["epoch", "train_loss", "valid_loss", "mae", "time"]
    assert frame["epoch"].tolist() == [0, 1]
    assert frame["mae"].tolist() == pytest.approx([0.6469498, 0.2832197], abs=3e-6)


def test_final_record_is_the_last_row_of_numbers():
    learn = trained()
    assert learn.final_record == learn.recorder.values[-1]


def test_a_recorder_without_metrics_records_the_losses():
    learn = trained(metrics=None)
    assert list(learn.recorder.values[1]) == pytest.approx([1.234301, 0.1222026], abs=3e-6)


def test_a_new_fit_begins_its_record_anew():
    learn = trained()
    learn.fit(1)
    assert len(learn.recorder.values) == len(learn.recorder.history) == 1
    assert (learn.recorder.iters, len(learn.recorder.losses), len(learn.recorder.lrs)) == ([3], 3, 3)


def test_a_metric_may_be_any_value():
    best = ll.ValueMetric(lambda: "so far", "best")
    learn = trained(metrics=[best, mae])
    assert learn.recorder.history[0]["best"] == "so far"


# Metrics of one phase or of both


def rmse(pred, y):
    return ((pred - y) ** 2).mean().sqrt()


def some(on, train_metrics=False, valid_metrics=True, **kwargs):
    """A fit with `mae` where `on` says, and `rmse` where the Recorder says."""
    recorder = ll.Recorder(train_metrics=train_metrics, valid_metrics=valid_metrics)
    return trained(metrics=[ll.mk_metric(mae, on=on), rmse], recorder=recorder, **kwargs)


@pytest.mark.parametrize(
    ("on", "options", "names"),
    [
        (None, {}, "train_loss valid_loss mae rmse"),
        ("valid", {}, "train_loss valid_loss mae rmse"),
        ("train", {}, "train_loss train_mae valid_loss rmse"),
        ("both", {}, "train_loss train_mae valid_loss mae rmse"),
        ("valid", {"train_metrics": True}, "train_loss train_rmse valid_loss valid_mae valid_rmse"),
        ("train", {"train_metrics": True}, "train_loss train_mae train_rmse valid_loss valid_rmse"),
        ("both", {"train_metrics": True}, "train_loss train_mae train_rmse valid_loss valid_mae valid_rmse"),
        ("valid", {"valid_metrics": False}, "train_loss mae"),
        ("train", {"valid_metrics": False}, "train_loss train_mae"),
        ("both", {"valid_metrics": False}, "train_loss train_mae mae"),
        ("both", {"train_metrics": True, "valid_metrics": False}, "train_loss train_mae rmse mae"),
        ("both", {"valid": False}, "train_loss train_mae"),
        ("valid", {"valid": False}, "train_loss"),
        ("train", {"train_metrics": True, "valid": False}, "train_loss train_mae rmse"),
    ],
)
def test_a_metric_may_say_itself_where_it_is_computed(on, options, names):
    learn = some(on, **options)
    assert list(learn.recorder.metric_names) == ["epoch", *names.split(), "time"]
    for row in learn.recorder.history:
        assert None not in row.values()


def test_a_metric_on_both_has_fastais_numbers_of_both():
    learn = some("both")
    assert [row["train_mae"] for row in learn.recorder.history] == pytest.approx(TRAIN_MAE, abs=3e-6)
    assert [row["mae"] for row in learn.recorder.history] == pytest.approx([row[2] for row in ROWS], abs=3e-6)


def test_a_metric_on_train_has_fastais_numbers_with_and_without_validation():
    for has_valid in (True, False):
        rows = some("train", valid=has_valid).recorder.history
        assert [row["train_mae"] for row in rows] == pytest.approx(TRAIN_MAE, abs=3e-6)


def test_a_metric_on_train_is_left_out_of_validate():
    assert len(some("train").validate()) == 2  # loss and rmse
    assert list(some("both").validate())[:2] == pytest.approx(ROWS[1][1:], abs=3e-6)


def test_a_metric_that_is_on_validation_only_is_never_asked_in_training():
    asked = []

    def counting(pred, y):
        asked.append(learn.training)
        return mae(pred, y)

    learn = line_learner(metrics=[ll.mk_metric(counting, on="valid")], recorder=ll.Recorder(train_metrics=True))
    learn.fit(1)
    assert asked == [False, False, False]


def test_where_no_metric_is_on_train_the_recorder_does_not_hear_training_batches():
    learn = line_learner(metrics=[ll.mk_metric(mae, on="train"), rmse])
    learn.fit(1)
    assert learn.recorder.run_train
    learn.metrics = [ll.mk_metric(mae, on="valid"), rmse]
    learn.fit(1)
    assert not learn.recorder.run_train


def test_a_metric_whose_class_says_where_needs_no_more():
    class OnTrain(ll.AvgMetric):
        on = "train"

    assert "train_mae" in trained(metrics=OnTrain(mae)).recorder.metric_names


def test_a_phase_that_is_none_is_refused_before_anything_begins():
    with pytest.raises(ValueError, match='metric `mae` is on=\'training\'; pass "train", "valid", "both" or None'):
        ll.mk_metric(mae, on="training")
    learn = line_learner()
    learn.metrics[0].on = "test"
    with pytest.raises(ValueError, match="metric `mae` is on='test'"):
        learn.fit(1)
    assert learn.recorder.raw_losses == []


# What metrics hold


class Holding(ll.AvgMetric):
    """Keeps every prediction, as metrics of whole sets do; `refs` tells which of them are alive."""

    def __init__(self, refs):
        self.refs = refs
        super().__init__(mae)

    def reset(self):
        super().reset()
        self.preds = []

    def accumulate(self, learn):
        super().accumulate(learn)
        self.preds.append(learn.pred.clone())
        self.refs.append(weakref.ref(self.preds[-1]))


def n_alive(refs):
    return sum(ref() is not None for ref in refs)


@pytest.mark.parametrize(("on", "n"), [(None, 6), ("train", 6), ("both", 12)])
def test_no_prediction_stays_alive_in_a_metric_after_a_fit(on, n):
    refs = []
    trained(metrics=ll.mk_metric(Holding(refs), on=on))
    assert (len(refs), n_alive(refs)) == (n, 0)


def test_no_prediction_stays_alive_in_a_metric_after_a_validation():
    refs = []
    line_learner(metrics=Holding(refs)).validate()
    assert (len(refs), n_alive(refs)) == (3, 0)


def test_no_prediction_stays_alive_in_a_metric_after_a_fit_that_failed():
    refs = []
    fails = cancels("after_batch", ZeroDivisionError, batch=2)
    learn = line_learner(fails, metrics=ll.mk_metric(Holding(refs), on="both"))
    with pytest.raises(ZeroDivisionError):
        learn.fit(1)
    assert (len(refs), n_alive(refs)) == (2, 0)


def test_the_predictions_of_a_set_are_gone_when_the_next_epoch_trains():
    refs, counts = [], []
    look = ll.Callback(before_train=lambda cb: counts.append((len(refs), n_alive(refs))))
    trained(cbs=look, metrics=Holding(refs))
    assert counts == [(0, 0), (3, 0)]


def test_the_value_of_a_metric_is_read_until_the_end_of_the_epoch():
    values = []
    learn = trained(cbs=ll.Callback(after_epoch=lambda cb: values.append(float(cb.learn.metrics[0].value))))
    assert values == [row["mae"] for row in learn.recorder.history]
    assert learn.metrics[0].value is None


# Losses and rates


def test_the_smoothed_losses_are_those_of_fastai():
    assert [float(loss) for loss in trained().recorder.losses] == pytest.approx(SMOOTHED, abs=3e-6)


def test_the_raw_losses_are_those_of_the_batches():
    learn = line_learner(cbs=ll.Callback(after_loss=lambda cb: cb.training and seen.append(float(cb.loss))))
    seen = []
    learn.fit(2)
    assert learn.recorder.raw_losses == seen
    assert len(seen) == 6


def test_another_beta_smooths_less():
    learn = trained(recorder=ll.Recorder(beta=0.0))
    assert [float(loss) for loss in learn.recorder.losses] == pytest.approx(learn.recorder.raw_losses)


def test_losses_read_half_way_do_not_change_what_is_read_at_the_end():
    peek = ll.Callback(after_batch=lambda cb: (cb.recorder.losses, cb.recorder.smooth_loss.value))
    learn = trained(cbs=peek)
    assert [float(loss) for loss in learn.recorder.losses] == pytest.approx(SMOOTHED, abs=3e-6)


def test_iters_counts_the_recorded_losses_at_the_end_of_each_epoch():
    assert trained().recorder.iters == [3, 6]


def test_lrs_records_the_rate_of_the_last_group():
    learn = line_learner(splitter=lambda model: [[model.weight], [model.bias]])
    learn.fit(1, lr=[0.1, 0.3])
    assert learn.recorder.lrs == [0.3, 0.3, 0.3]


def test_smooth_loss_is_read_from_the_learner_too():
    learn = trained()
    assert float(learn.smooth_loss) == pytest.approx(1.234301, abs=3e-6)


# Cancels


def test_a_cancelled_training_phase_leaves_its_columns_empty():
    learn = trained(
        cbs=cancels("before_batch", ll.CancelTrainException, 0, 1), recorder=ll.Recorder(train_metrics=True)
    )
    first, second = learn.recorder.history
    assert (first["train_loss"], first["train_mae"]) == (None, None)
    assert None not in (first["valid_loss"], first["valid_mae"], *second.values())


def test_a_cancelled_validation_phase_leaves_its_columns_empty():
    learn = trained(cbs=cancels("before_validate", ll.CancelValidException))
    first, second = learn.recorder.history
    assert (first["valid_loss"], first["mae"]) == (None, None)
    assert None not in second.values()


@pytest.mark.parametrize(
    ("event", "error", "row"),
    [
        ("before_train", ll.CancelTrainException, [False, True, True]),
        ("after_train", ll.CancelTrainException, [True, True, True]),
        ("after_train", ll.CancelEpochException, [True, False, False]),
        ("before_validate", ll.CancelValidException, [True, False, False]),
        ("before_validate", ll.CancelEpochException, [True, False, False]),
        ("before_train", ll.CancelEpochException, [False, False, False]),
    ],
)
def test_a_cancel_never_shifts_the_columns(event, error, row):
    learn = trained(cbs=cancels(event, error, order=99))  # after the Recorder has heard the event
    assert [value is not None for value in learn.recorder.values[0]] == row
    assert None not in learn.recorder.values[1]


def test_a_cancel_before_the_recorder_hears_the_end_of_a_phase_leaves_its_columns_empty():
    learn = trained(cbs=cancels("after_train", ll.CancelTrainException))
    assert [value is not None for value in learn.recorder.values[0]] == [False, True, True]


@pytest.mark.parametrize("event", ["before_epoch", "before_train"])
def test_an_epoch_that_was_cancelled_before_a_phase_began_has_no_row(event):
    learn = trained(cbs=cancels(event, ll.CancelEpochException))
    assert [row["epoch"] for row in learn.recorder.history] == [1]
    assert learn.recorder.iters == [3]


def test_a_fit_that_is_cancelled_keeps_the_rows_that_were_done():
    learn = trained(cbs=cancels("before_batch", ll.CancelFitException, 1, 2))
    assert [row["epoch"] for row in learn.recorder.history] == [0]
    assert len(learn.recorder.losses) == 5


def test_a_batch_that_is_cancelled_before_its_loss_is_not_recorded():
    learn = trained(cbs=cancels("after_pred", ll.CancelBatchException, 0, 1), n_epoch=1)
    assert (len(learn.recorder.losses), len(learn.recorder.lrs), learn.recorder.iters) == (2, 2, [2])


def test_a_batch_that_is_cancelled_after_its_loss_is_recorded():
    learn = trained(cbs=cancels("before_backward", ll.CancelBatchException, 0, 1), n_epoch=1)
    assert len(learn.recorder.losses) == 3


def test_a_loss_that_is_set_in_a_cancelled_batch_is_recorded():
    def act(cb):
        if cb.iter == 1:
            cb.learn.loss = torch.tensor(7.0)
            raise ll.CancelBatchException

    learn = trained(cbs=ll.Callback(before_batch=act), n_epoch=1)
    assert learn.recorder.raw_losses[1] == 7.0


def test_a_validation_batch_without_prediction_counts_in_no_metric():
    only_last = ll.Callback(before_batch=only_the_last_validation_batch)
    learn = trained(cbs=only_last, n_epoch=1)
    w, b = learn.model.weight.item(), learn.model.bias.item()
    assert learn.recorder.values[0][2] == pytest.approx(abs(w + b - 3), abs=3e-6)  # of the sample at x = 1 alone


def only_the_last_validation_batch(cb):
    if not cb.training and cb.iter < 2:
        raise ll.CancelBatchException


# Runs beside the training


def test_validate_returns_loss_and_metrics_and_leaves_the_record_alone():
    learn = trained()
    before = record(learn)
    assert list(learn.validate()) == pytest.approx([0.1222026, 0.2832197], abs=3e-6)
    assert record(learn) == before
    assert learn.final_record == learn.recorder.values[-1]


def test_validate_computes_metrics_also_where_the_training_does_not():
    learn = trained(recorder=ll.Recorder(valid_metrics=False))
    assert list(learn.validate()) == pytest.approx([0.1222026, 0.2832197], abs=3e-6)


def test_validate_of_the_training_loader_gives_its_numbers():
    learn = trained()
    loss, _ = learn.validate(0)
    x, y = line(6)
    assert loss == pytest.approx(((learn.model(x) - y) ** 2).mean().item(), abs=3e-6)


@pytest.mark.parametrize("event", ["before_epoch", "before_train", "after_batch", "after_train", "after_epoch"])
@pytest.mark.parametrize("train_metrics", [False, True])
def test_a_nested_validation_leaves_the_record_alone_and_has_its_own_numbers(event, train_metrics):
    found = []
    nested = ll.Callback(**{event: lambda cb: found.append(list(cb.learn.validate()))})
    learn = trained(cbs=nested, recorder=ll.Recorder(train_metrics=train_metrics))
    plain = trained(recorder=ll.Recorder(train_metrics=train_metrics))

    assert record(learn) == record(plain)
    assert all(len(numbers) == 2 for numbers in found)
    if event == "after_epoch":
        assert [numbers[0] for numbers in found] == pytest.approx([0.548458, 0.1222026], abs=3e-6)


def test_a_validation_nested_in_a_validation_leaves_half_way_metrics_alone():
    def act(cb):
        if not cb.training and cb.iter == 1:
            found.append(list(cb.learn.validate()))

    found = []
    learn = trained(cbs=ll.Callback(after_batch=act))
    assert list(learn.recorder.values[1]) == pytest.approx(ROWS[1], abs=3e-6)
    assert found[1] == pytest.approx(ROWS[1][1:], abs=3e-6)


def test_a_learner_that_was_never_trained_can_be_validated():
    learn = line_learner()
    loss, error = learn.validate()
    assert (loss, error) == pytest.approx((3.34375, 1.75), abs=3e-6)
    assert list(learn.recorder.values) == []


def test_what_a_metric_reads_is_not_copied_for_a_nested_validation():
    class Counts(ll.Callback):
        order = 99  # after the Recorder

        def before_fit(self):
            self.n, self.found = 0, []

        def number(self):
            return self.n

        def after_batch(self):
            self.n += 1
            if self.training:
                self.found.append((self.n, list(self.learn.validate())[1]))

    counts = Counts()
    trained(1, cbs=counts, metrics=ll.ValueMetric(counts.number))
    assert counts.found == [(1, 1), (2, 2), (3, 3)]  # it does not hear the validation that it starts itself


# State


def test_a_state_taken_by_a_callback_that_hears_of_a_batch_first_has_that_batch_in_its_metrics():
    def take(cb):
        if cb.training and cb.epoch == 1 and cb.iter == 1:
            states.append(cb.learn.state_dict())

    states = []
    for order in (0, 99):  # before the Recorder, and after it
        cb = ll.Callback(after_batch=take)
        cb.order = order
        whole = trained(cbs=cb, recorder=ll.Recorder(train_metrics=True))

    for state in states:
        fresh = line_learner(recorder=ll.Recorder(train_metrics=True))
        fresh.load_state_dict(state)
        fresh.resume()
        assert fresh.recorder.values == whole.recorder.values
    assert len(states) == 2


def test_taking_a_state_moves_no_metric():
    take = ll.Callback(after_batch=lambda cb: cb.iter == 1 and cb.learn.state_dict())
    recorders = [ll.Recorder(train_metrics=True) for _ in range(2)]
    assert trained(cbs=take, recorder=recorders[0]).recorder.values == trained(recorder=recorders[1]).recorder.values


def test_a_metric_on_train_survives_a_stop_in_the_middle_of_an_epoch():
    def press_ctrl_c(cb):
        if cb.epoch == 1 and cb.iter == 1 and cb.training:
            signal.raise_signal(signal.SIGINT)

    learn = line_learner(cbs=ll.Callback(after_batch=press_ctrl_c), metrics=ll.mk_metric(mae, on="both"))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    learn.resume()
    assert learn.recorder.values == trained(metrics=ll.mk_metric(mae, on="both")).recorder.values


def test_training_metrics_survive_a_stop_in_the_middle_of_an_epoch():
    def press_ctrl_c(cb):
        if cb.epoch == 1 and cb.iter == 1:
            signal.raise_signal(signal.SIGINT)

    whole = trained(recorder=ll.Recorder(train_metrics=True))
    learn = line_learner(cbs=ll.Callback(after_batch=press_ctrl_c), recorder=ll.Recorder(train_metrics=True))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    state = learn.state_dict()

    fresh = line_learner(recorder=ll.Recorder(train_metrics=True))
    fresh.load_state_dict(state)
    fresh.resume()

    assert [list(row) for row in fresh.recorder.values] == [list(row) for row in whole.recorder.values]
    assert fresh.recorder.raw_losses == whole.recorder.raw_losses
    assert fresh.recorder.iters == whole.recorder.iters
    assert [float(x) for x in fresh.recorder.losses] == [float(x) for x in whole.recorder.losses]


def test_the_record_of_a_training_comes_with_a_state():
    learn, fresh = trained(), line_learner()
    fresh.load_state_dict(learn.state_dict())
    assert record(fresh) == record(learn)


# Pictures


def test_the_learning_curve_shows_smoothed_losses_and_validation_at_the_end_of_each_epoch():
    import matplotlib.pyplot as plt

    learn, (_, ax) = trained(), plt.subplots()
    assert learn.recorder.plot_loss(skip_start=0, ax=ax) is ax
    smoothed, valid = ax.lines
    assert smoothed.get_ydata() == pytest.approx(SMOOTHED, abs=3e-6)
    assert (list(valid.get_xdata()), list(valid.get_ydata())) == (
        [3, 6],
        pytest.approx([0.548458, 0.1222026], abs=3e-6),
    )
    plt.close("all")


def test_the_learning_curve_can_leave_out_validation():
    import matplotlib.pyplot as plt

    learn, (_, ax) = trained(), plt.subplots()
    learn.recorder.plot_loss(skip_start=2, with_valid=False, ax=ax)
    assert [list(drawn.get_xdata()) for drawn in ax.lines] == [[2, 3, 4, 5]]
    plt.close("all")


def test_the_learning_curve_leaves_out_validations_that_were_cancelled():
    import matplotlib.pyplot as plt

    learn, (_, ax) = trained(cbs=cancels("before_validate", ll.CancelValidException)), plt.subplots()
    learn.recorder.plot_loss(skip_start=0, ax=ax)
    assert list(ax.lines[1].get_xdata()) == [6]
    plt.close("all")


def test_every_schedule_is_drawn():
    import matplotlib.pyplot as plt

    learn = line_learner()
    learn.fit_one_cycle(2)
    figure = learn.recorder.plot_sched()
    assert [ax.get_ylabel() for ax in figure.axes] == ["lr", "mom"]
    assert list(figure.axes[1].lines[0].get_ydata()) == learn.recorder.hps["mom"]
    assert [ax.get_ylabel() for ax in learn.recorder.plot_sched("lr").axes] == ["lr"]
    plt.close("all")


def test_a_schedule_that_was_not_recorded_cannot_be_drawn():
    learn = line_learner()
    learn.fit_one_cycle(1)
    with pytest.raises(ValueError, match=r"no schedule of wd was recorded; there is lr, mom\."):
        learn.recorder.plot_sched(["lr", "wd"])


def test_without_schedules_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="there is no hyper-parameter to plot"):
        trained().recorder.plot_sched()


# Wrong metrics


def test_a_metric_of_the_wrong_shape_is_named():
    def squares(pred, y):
        return (pred - y) ** 2

    learn = line_learner(metrics=squares)
    with pytest.raises(ValueError, match=r"metric `squares` returned shape \(2, 1\); it needs one number") as caught:
        learn.fit(1)
    assert caught.value.__notes__[0].startswith("raised by Recorder.after_batch at epoch 0, batch 0, validate")
    assert (learn.batch, learn.xb, learn.pred, learn.task) == (None, (None,), None, None)


def test_a_metric_that_returns_no_number_is_named():
    learn = line_learner(metrics=lambda pred, y: None)
    with pytest.raises(TypeError, match="metric `<lambda>` returned None"):
        learn.fit(1)


def test_a_loss_that_is_not_a_number_is_recorded_as_it_is():
    learn = line_learner()
    learn.fit(1, lr=1e30)
    assert not math.isfinite(learn.recorder.values[0][0])


def test_the_toy_learner_has_a_recorder():
    assert isinstance(toy_learner().recorder, ll.Recorder)


# Pictures of everything, and a table


def cycled(**kwargs):
    learn = toy_learner(metrics=[mae, ll.mk_metric(mae_too, on="both")], **kwargs)
    learn.fit_one_cycle(2, 0.01)
    return learn


def mae_too(pred, y):
    return mae(pred, y)


def axes_of(fig):
    return {ax.get_ylabel(): [line.get_label() for line in ax.lines] for ax in fig.axes}


def test_plot_shows_losses_metrics_and_hypers_in_one_figure():
    learn = cycled()
    fig = learn.recorder.plot()
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss", "mae", "mae_too", "lr", "mom"]
    assert list(fig.axes[1].lines[0].get_ydata()) == [row["mae"] for row in learn.recorder.history]
    plt.close("all")


def test_plot_metrics_has_a_line_for_each_set():
    assert axes_of(cycled().recorder.plot_metrics()) == {"mae": ["mae"], "mae_too": ["mae_too", "train_mae_too"]}
    plt.close("all")


def test_plot_metrics_works_after_the_record_was_loaded():
    learn, other = cycled(), toy_learner(metrics=[mae])
    other.recorder.load_state_dict(learn.recorder.state_dict())
    assert axes_of(other.recorder.plot_metrics()) == {"mae": ["mae"]}
    plt.close("all")


def test_without_metrics_there_is_nothing_to_plot():
    learn = toy_learner()
    learn.fit(1)
    with pytest.raises(ValueError, match="no metric was recorded"):
        learn.recorder.plot_metrics()


def test_in_a_cell_it_is_the_table_of_its_rows():
    learn = toy_learner(cbs=[])
    assert "Recorder: no epoch yet" in learn.recorder._repr_html_()
    learn.fit(2)
    shown = learn.recorder._repr_html_()
    assert "<tr><th>epoch</th><th>train_loss</th><th>valid_loss</th><th>time</th></tr>" in shown
    assert f"<td>1</td><td>{learn.recorder.values[1][0]:.6f}</td>" in shown
