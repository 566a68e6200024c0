"""Several validation sets in one fit: their events, their columns, when they are run, and what leaves them.

Numbers marked as fastai's come from fastai 2.8.12, which trained on the same data, weights and rate and then ran
`Learner.validate(dl=…)` on each set.
"""

import random
import signal

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import learnloop as ll
from learnloop.data.keyed import random_states
from tests.toys import Heard

matplotlib.use("Agg")


def mae(pred, y):
    return (pred - y).abs().mean()


def line(n, shift=0.0):
    x = torch.linspace(0, 1, n)[:, None]
    return x, 2 * x + 1 + shift


def loader(n, shift=0.0):
    """Points of a line in batches of two."""
    return ll.TensorLoader(*line(n, shift), bs=2)


def two_more(**kwargs):
    """Three batches to train, three of `valid`, two each of `noisy` and `old`."""
    sets = {"noisy": loader(4, 1.0), "old": loader(3, -0.5)}
    return ll.DataLoaders(loader(6), loader(5), sets, **{"device": "cpu", **kwargs})


def learner(dls=None, cbs=(), recorder=None, metrics=mae, **kwargs):
    """Starts at y = x / 2, rate 0.1."""
    model = nn.Linear(1, 1)
    model.load_state_dict({"weight": torch.tensor([[0.5]]), "bias": torch.zeros(1)})
    options = {"opt_func": ll.SGD, "lr": 0.1, "metrics": metrics, "default_cbs": False, **kwargs}
    learn = ll.Learner(two_more() if dls is None else dls, model, nn.MSELoss(), **options)
    learn.logger = lambda row: None
    return learn.add_cbs([ll.TrainEvalCallback(), recorder or ll.Recorder(), *cbs])


def trained(n_epoch=2, **kwargs):
    learn = learner(**kwargs)
    learn.fit(n_epoch)
    return learn


def column(learn, name):
    return [row[name] for row in learn.recorder.history]


def epochs_with(learn, name):
    """The epochs in which a column has a value."""
    return [row["epoch"] for row in learn.recorder.history if row[name] is not None]


# fastai's, after one epoch and after two: loss and error of valid, noisy and old
VALID = [[0.5484580, 0.6469498], [0.1222026, 0.2832197]]
NOISY = [[2.8567924, 1.6469498], [1.5415449, 1.2052219]]
OLD = [[0.1948128, 0.3888054], [0.1936762, 0.3650704]]


# Events


class Named(ll.Callback):
    """Writes down events of validation with the set that is running."""

    order = -1000

    def __init__(self):
        super().__init__(**{name: self._note(name) for name in self.EVENTS})
        self.seen = []

    EVENTS = ("before_validate", "before_batch", "after_cancel_validate", "after_validate", "cleanup_validate")

    @staticmethod
    def _note(name):
        return lambda cb: cb.learn.training or cb.seen.append(f"{name} {cb.learn.dl_name}")


def test_each_set_is_validated_in_a_span_of_its_own_in_the_order_in_which_they_were_named():
    dls = ll.DataLoaders(loader(2), loader(2), {"noisy": loader(2)}, device="cpu")
    heard = Heard()
    learner(dls, [heard]).fit(1)
    batch = ["before_batch", "after_pred", "after_loss"]
    backward = ["before_backward", "after_backward", "cleanup_backward"]
    step = ["before_step", "after_step", "cleanup_step"]
    end = ["after_batch", "cleanup_batch"]
    validate = ["before_validate", *batch, *end, "after_validate", "cleanup_validate"]
    assert heard.events == [
        *("before_fit", "before_epoch"),
        *("before_train", *batch, *backward, *step, *end, "after_train", "cleanup_train"),
        *validate,
        *validate,
        *("after_epoch", "cleanup_epoch", "after_fit", "cleanup_fit"),
    ]


def test_a_callback_knows_which_set_is_running():
    seen = Named()
    learn = learner(cbs=[seen])
    learn.fit(1)
    assert seen.seen == [
        "before_validate valid",
        *["before_batch valid"] * 3,
        "after_validate valid",
        "cleanup_validate valid",
        "before_validate noisy",
        *["before_batch noisy"] * 2,
        "after_validate noisy",
        "cleanup_validate noisy",
        "before_validate old",
        *["before_batch old"] * 2,
        "after_validate old",
        "cleanup_validate old",
    ]
    assert learn.dl_name is None


def test_while_it_trains_the_set_is_train():
    seen = []
    trained(1, cbs=[ll.Callback(before_train=lambda cb: seen.append(cb.dl_name))])
    assert seen == ["train"]


def test_the_phase_of_each_set_has_its_loader_and_its_length():
    seen, dls = [], two_more()
    trained(1, dls=dls, cbs=[ll.Callback(before_validate=lambda cb: seen.append((cb.dl, cb.n_iter, cb.training)))])
    assert seen == [(dls.valid, 3, False), (dls.noisy, 2, False), (dls.old, 2, False)]


def test_a_loader_without_a_name_is_not_validated_by_a_fit():
    seen = Named()
    dls = ll.DataLoaders(loader(2), loader(2), loader(4), {"noisy": loader(2)}, device="cpu")
    learn = learner(dls, [seen])
    learn.fit(1)
    assert [e for e in seen.seen if e.startswith("before_v")] == ["before_validate valid", "before_validate noisy"]
    assert len(learn.validate(2)) == 2


# Columns


def test_the_columns_of_a_set_begin_with_its_name():
    names = "epoch train_loss valid_loss mae noisy_loss noisy_mae old_loss old_mae time"
    assert " ".join(trained().recorder.metric_names) == names


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"add_time": False}, "epoch train_loss valid_loss mae noisy_loss noisy_mae"),
        (
            {"train_metrics": True},
            "epoch train_loss train_mae valid_loss valid_mae noisy_loss noisy_mae time",
        ),
        ({"valid_metrics": False}, "epoch train_loss time"),
        ({"train_metrics": True, "valid_metrics": False}, "epoch train_loss mae time"),
    ],
)
def test_every_column_that_is_named_has_a_value(options, names):
    dls = ll.DataLoaders(loader(6), loader(5), {"noisy": loader(4, 1.0)}, device="cpu")
    learn = trained(dls=dls, recorder=ll.Recorder(**options))
    assert " ".join(learn.recorder.metric_names) == names
    for row in learn.recorder.history:
        assert " ".join(row) == names and None not in row.values()


def test_sets_in_the_place_of_valid_all_have_their_names():
    dls = ll.DataLoaders(loader(6), {"clean": loader(5), "noisy": loader(4, 1.0)}, device="cpu")
    learn = trained(dls=dls)
    assert " ".join(learn.recorder.metric_names) == ("epoch train_loss clean_loss clean_mae noisy_loss noisy_mae time")
    assert list(learn.recorder.values[1][1:3]) == pytest.approx(VALID[1], abs=3e-6)
    assert learn.validate() == learn.validate("clean")


def test_the_values_are_those_of_fastai():
    for row, *sets in zip(trained().recorder.values, VALID, NOISY, OLD, strict=True):
        assert list(row[1:]) == pytest.approx([number for of_set in sets for number in of_set], abs=3e-6)


def test_the_values_are_those_of_a_validation_of_each_set_by_hand():
    learn = trained()
    found = [*learn.validate(), *learn.validate("noisy"), *learn.validate("old")]
    assert list(learn.recorder.values[-1][1:]) == found
    with torch.no_grad():
        x, y = line(4, 1.0)
        pred = learn.model(x)
    assert found[2:4] == pytest.approx([((pred - y) ** 2).mean().item(), mae(pred, y).item()], abs=1e-6)


def test_a_metric_of_whole_sets_is_computed_on_each_apart_and_holds_none_of_them_afterwards():
    def largest_error(preds, targs):
        return (preds - targs).abs().max().item()

    metric = ll.AccumMetric(largest_error)
    learn = trained(metrics=metric)
    for name, points in (("", line(5)), ("noisy_", line(4, 1.0)), ("old_", line(3, -0.5))):
        with torch.no_grad():
            expected = largest_error(learn.model(points[0]), points[1])
        assert learn.recorder.history[-1][f"{name}largest_error"] == pytest.approx(expected, abs=1e-6)
    assert (metric.preds, metric.targs) == ([], [])


def test_the_columns_of_valid_do_not_depend_on_the_other_sets():
    alone = trained(dls=ll.DataLoaders(loader(6), loader(5), device="cpu"))
    assert [list(row) for row in alone.recorder.values] == [list(row[:3]) for row in trained().recorder.values]


def test_final_record_is_the_whole_row_of_numbers():
    learn = trained()
    assert learn.final_record == learn.recorder.values[-1]
    assert len(learn.final_record) == 7


def test_after_each_set_final_record_holds_its_numbers():
    seen = []
    trained(1, cbs=[ll.Callback(cleanup_validate=lambda cb: seen.append(list(cb.final_record)))])
    assert seen == [pytest.approx(of_set[0], abs=3e-6) for of_set in (VALID, NOISY, OLD)]


def test_the_record_of_a_fit_without_named_sets_is_as_ever():
    learn = trained(dls=ll.DataLoaders(loader(6), loader(5), device="cpu"))
    assert list(learn.recorder.metric_names) == ["epoch", "train_loss", "valid_loss", "mae", "time"]


class Keeps(ll.Callback):
    """The best value of a column, read as trackers read it."""

    order = 60

    def __init__(self, name):
        self.monitored, self.best = name, None

    def before_fit(self):
        self.place = list(self.recorder.metric_names).index(self.monitored)

    def after_epoch(self):
        value = self.recorder.log[self.place]
        if value is not None and (self.best is None or value < self.best[1]):
            self.best = self.learn.epoch, value


@pytest.mark.parametrize("name", ["valid_loss", "noisy_mae", "old_loss"])
def test_a_tracker_finds_the_columns_of_any_set(name):
    tracker = Keeps(name)
    learn = trained(4, dls=two_more(every={"old": 3}), cbs=[tracker])
    there = [(row[name], row["epoch"]) for row in learn.recorder.history if row[name] is not None]
    assert tracker.best == min(there)[::-1]


# When


def test_a_set_may_be_validated_every_few_epochs_and_always_after_the_last():
    learn = trained(6, dls=two_more(every={"noisy": 2, "old": 5}))
    assert epochs_with(learn, "valid_loss") == [0, 1, 2, 3, 4, 5]
    assert epochs_with(learn, "noisy_loss") == epochs_with(learn, "noisy_mae") == [1, 3, 5]
    assert epochs_with(learn, "old_loss") == [4, 5]
    assert [len(row) for row in learn.recorder.values] == [7] * 6


def test_the_main_set_may_be_validated_less_often_too():
    seen = Named()
    learn = trained(4, dls=ll.DataLoaders(loader(6), loader(5), every={"valid": 3}, device="cpu"), cbs=[seen])
    assert epochs_with(learn, "mae") == epochs_with(learn, "valid_loss") == [2, 3]
    assert seen.seen.count("before_validate valid") == 2


def test_a_set_that_is_not_due_fires_no_events():
    seen = Named()
    trained(2, dls=two_more(every={"old": 2}), cbs=[seen])
    spans = [e.removeprefix("before_validate ") for e in seen.seen if e.startswith("before_v")]
    assert spans == ["valid", "noisy", "valid", "noisy", "old"]


def test_in_a_fit_of_steps_an_epoch_is_a_stretch():
    learn = learner(two_more(every={"old": 2}))
    learn.fit(n_step=7, valid_every=2)
    assert epochs_with(learn, "noisy_loss") == [0, 1, 2, 3]
    assert epochs_with(learn, "old_loss") == [1, 3]


def test_epochs_are_counted_from_the_first_also_where_the_fit_begins_later():
    learn = learner(two_more(every={"old": 3}))
    learn.fit(5, start_epoch=1)
    assert epochs_with(learn, "old_loss") == [2, 4]


def test_an_epoch_without_any_validation_has_a_row():
    every = {"valid": 2, "noisy": 2, "old": 2}
    learn = trained(2, dls=two_more(every=every))
    assert list(learn.recorder.values[0][1:]) == [None] * 6
    assert None not in learn.recorder.values[1]


# Validating by name


@pytest.mark.parametrize(("name", "number"), [("train", 0), ("valid", 1), ("noisy", 2), ("old", 3)])
def test_validate_takes_a_name_or_a_number(name, number):
    learn = trained()
    assert learn.validate(name) == learn.validate(number)


def test_validate_by_name_gives_fastais_numbers():
    learn = trained()
    assert list(learn.validate("old")) == pytest.approx(OLD[1], abs=3e-6)


def test_validate_of_an_unknown_name_says_which_there_are():
    message = "there is no loader `nosy`; there is train, valid, noisy, old. Did you mean `noisy`?"
    with pytest.raises(KeyError) as caught:
        learner().validate("nosy")
    assert caught.value.args == (message,)


def test_a_loader_that_is_passed_has_no_name():
    seen = Named()
    learner(cbs=[seen]).validate("noisy", dl=loader(2))
    assert seen.seen[0] == "before_validate None"


def test_a_validation_nested_in_the_one_of_a_set_leaves_it_alone():
    def act(cb):
        learn = cb.learn
        if learn.dl_name == "noisy" and learn.iter == 0:
            found.append((list(learn.validate("old")), learn.dl_name))

    found = []
    learn = trained(cbs=[ll.Callback(after_batch=act)])
    assert learn.recorder.values == trained().recorder.values
    assert found == [(pytest.approx(of_set, abs=3e-6), "noisy") for of_set in OLD]


def test_a_set_validated_by_hand_in_a_fit_moves_no_column():
    by_hand = ll.Callback(after_train=lambda cb: cb.learn._do_epoch_validate(0))
    assert trained(cbs=[by_hand]).recorder.values == trained().recorder.values


# Cancels


def cancel_in(name, error, event="before_validate", order=0):
    """Cancels in the validation of one set in the first epoch."""

    def act(cb):
        if cb.learn.epoch == 0 and cb.learn.dl_name == name and not cb.learn.training:
            raise error

    cb = ll.Callback(**{event: act})
    cb.order = order
    return cb


@pytest.mark.parametrize("order", [0, 99])
@pytest.mark.parametrize("event", ["before_validate", "before_batch", "after_batch"])
def test_a_cancelled_validation_leaves_only_that_set(event, order):
    learn = trained(cbs=[cancel_in("noisy", ll.CancelValidException, event, order)])
    assert epochs_with(learn, "valid_loss") == epochs_with(learn, "old_mae") == [0, 1]
    assert epochs_with(learn, "noisy_loss") == epochs_with(learn, "noisy_mae") == [1]


def test_a_cancelled_set_fires_its_own_events_and_the_next_one_begins():
    seen = Named()
    trained(1, cbs=[seen, cancel_in("noisy", ll.CancelValidException)])
    assert seen.seen[6:] == [
        "before_validate noisy",
        "after_cancel_validate noisy",
        "after_validate noisy",
        "cleanup_validate noisy",
        "before_validate old",
        *["before_batch old"] * 2,
        "after_validate old",
        "cleanup_validate old",
    ]


def test_a_cancelled_epoch_leaves_all_sets():
    seen = Named()
    learn = trained(cbs=[seen, cancel_in("noisy", ll.CancelEpochException)])
    assert seen.seen[6:9] == ["before_validate noisy", "cleanup_validate noisy", "before_validate valid"]
    assert [value is not None for value in learn.recorder.values[0]] == [True, True, True, *[False] * 4]
    assert None not in learn.recorder.values[1]


def test_a_cancelled_fit_leaves_all_sets_and_keeps_no_row():
    seen = Named()
    learn = trained(cbs=[seen, cancel_in("noisy", ll.CancelFitException)])
    assert seen.seen[6:] == ["before_validate noisy", "cleanup_validate noisy"]
    assert len(learn.recorder.values) == 0


# Nothing else moves


class Noisy(Dataset):
    """Samples that differ every time they are read."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.tensor([i / 8]) + 0.1 * torch.randn(1), torch.tensor([i / 4 + random.random() + np.random.rand()])


def net():
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def noisy_learner(dls, cbs=(), recorder=None):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    learn = ll.Learner(dls, net(), nn.MSELoss(), metrics=mae, default_cbs=False)
    learn.logger = lambda row: None
    return learn.add_cbs([ll.TrainEvalCallback(), recorder or ll.Recorder(train_metrics=True), *cbs])


def noisy_loaders(*names, every=None):
    """Loaders whose order and samples are random, also those of the validation sets."""
    loaders = [DataLoader(Noisy(), 4, shuffle=True) for _ in range(2 + len(names))]
    return ll.DataLoaders(*loaders[:2], dict(zip(names, loaders[2:], strict=True)), every=every, device="cpu")


def test_further_sets_change_neither_weights_nor_the_columns_of_the_others():
    def fitted(dls):
        learn = noisy_learner(dls)
        learn.fit(3)
        return [p.tolist() for p in learn.model.state_dict().values()], [row[:4] for row in learn.recorder.values]

    assert fitted(noisy_loaders("noisy", "old", every={"old": 2})) == fitted(noisy_loaders())


# Ctrl-C


class StopAt(ll.Callback):
    """Presses Ctrl-C at an event of the fit, by its number from `before_fit`."""

    order = 1000

    def __init__(self, number=None):
        self.number, self.n, self.names = number, 0, []

    def __call__(self, event_name):
        if self.learn.task == "fit":
            self.names.append(f"{event_name} {self.learn.dl_name}")
            if self.n == self.number:
                signal.raise_signal(signal.SIGINT)
            self.n += 1


def outcome(learn):
    """What two runs must have in common to the bit."""
    r = learn.recorder
    return {
        "weights": [p.tolist() for p in learn.model.state_dict().values()],
        "rows": [list(row) for row in r.values],
        "history": [{**row, "time": None} for row in r.history],
        "losses": (r.raw_losses, [float(loss) for loss in r.losses], r.iters),
        "random": repr(random_states()),
    }


FITS = {"epochs": lambda learn: learn.fit(2), "steps": lambda learn: learn.fit(n_step=4, valid_every=2)}


@pytest.mark.parametrize("fit", FITS)
def test_a_fit_stopped_at_any_event_of_any_set_and_resumed_ends_as_if_it_had_not_been(fit):
    def stoppable(number=None):
        return noisy_learner(noisy_loaders("noisy", "old", every={"old": 2}), [StopAt(number)])

    whole = stoppable()
    FITS[fit](whole)
    names = whole.cbs[-1].names
    last = len(names) - names[::-1].index("cleanup_epoch old")  # after it there is nothing left to go on with
    for number in [i for i, name in enumerate(names[:last]) if name.endswith(("valid", "noisy", "old"))]:
        learn = stoppable(number)
        with pytest.raises(KeyboardInterrupt):
            FITS[fit](learn)
        learn.resume()
        assert outcome(learn) == outcome(whole), f"stopped at {names[number]}, event {number}"


def test_a_stop_in_a_later_set_begins_the_validation_again():
    seen = Named()
    learn = learner(cbs=[seen])
    stop = ll.Callback(
        before_batch=lambda cb: cb.dl_name == "noisy" and not cb.interrupted and signal.raise_signal(signal.SIGINT)
    )
    with learn.added_cbs(stop), pytest.raises(KeyboardInterrupt, match="stopped in the validation of epoch 0"):
        learn.fit(1)
    stopped = list(seen.seen)
    assert stopped[6:] == ["before_validate noisy", "before_batch noisy", "cleanup_validate noisy"]
    learn.resume()
    assert seen.seen[len(stopped) :][:7] == [*stopped[:6], "before_validate noisy"]


# Messages


def test_an_error_says_in_the_validation_of_which_set():
    learn = learner(cbs=[cancel_in("noisy", ZeroDivisionError, "before_batch")])
    with pytest.raises(ZeroDivisionError) as caught:
        learn.fit(1)
    assert caught.value.__notes__[0].splitlines()[0].endswith("at epoch 0, batch 0, validate of `noisy`")


def test_an_empty_set_is_named_before_anything_begins():
    heard = Heard()
    learn = learner(ll.DataLoaders(loader(2), loader(2), {"noisy": []}, device="cpu"), [heard])
    with pytest.raises(ValueError, match="the loader `noisy` is empty: list has 0 batches"):
        learn.fit(1)
    assert heard.events == []


def test_a_set_that_can_be_read_only_once_is_named():
    once = iter([line(2)])
    learn = learner(ll.DataLoaders(loader(2), loader(2), {"noisy": once}, device="cpu"))
    with pytest.raises(ValueError, match="the loader `noisy` yielded no batch in epoch 1"):
        learn.fit(2)


def test_a_loader_that_fails_is_named():
    class Fails:
        def __iter__(self):
            yield line(2)
            raise OSError("no such file")

    learn = learner(ll.DataLoaders(loader(2), loader(2), {"noisy": Fails()}, device="cpu"))
    with pytest.raises(OSError) as caught:
        learn.fit(1)
    assert caught.value.__notes__[0].startswith("raised by the loader `noisy`, on its way to the next batch,")


# Shown


def test_the_table_has_empty_cells_where_a_set_was_not_due(capsys):
    learn = learner(two_more(every={"old": 2}), [ll.ProgressCallback()])
    learn.fit(2)
    assert capsys.readouterr().out.splitlines() == [
        "epoch     train_loss  valid_loss  mae       noisy_loss  noisy_mae  old_loss  old_mae   time",
        "0         2.143064    0.548458    0.646950  2.856792    1.646950                       00:00",
        "1         1.234302    0.122203    0.283220  1.541545    1.205222   0.193676  0.365070  00:00",
    ]


def test_the_learning_curve_has_a_line_for_each_set_and_no_point_where_it_was_not_due():
    import matplotlib.pyplot as plt

    learn, (_, ax) = trained(4, dls=two_more(every={"old": 3})), plt.subplots()
    learn.recorder.plot_loss(skip_start=0, ax=ax)
    drawn = {drawn.get_label(): (list(drawn.get_xdata()), list(drawn.get_ydata())) for drawn in ax.lines[1:]}
    assert drawn == {
        "valid": ([3, 6, 9, 12], column(learn, "valid_loss")),
        "noisy": ([3, 6, 9, 12], column(learn, "noisy_loss")),
        "old": ([9, 12], column(learn, "old_loss")[2:]),
    }
    plt.close("all")


def test_the_learning_curve_without_validation_has_none_of_them():
    import matplotlib.pyplot as plt

    learn, (_, ax) = trained(), plt.subplots()
    learn.recorder.plot_loss(skip_start=0, with_valid=False, ax=ax)
    assert len(ax.lines) == 1
    plt.close("all")
