"""Runs from outside, runs inside runs, the end of a run, and what randomness they may use."""

import random
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnloop import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
    DataLoaders,
    Recorder,
    TrainEvalCallback,
)
from learnloop.loop.events import EVENTS
from learnloop.loop.runs import run_undone
from tests.toys import Heard, Once, learner, loaders, raise_at, raising, tensor_loader, weights

FIT_EVENTS = [e for e in EVENTS if not e.startswith("after_cancel_") and e != "after_create"]
VALIDATE = [
    *("before_validate", "before_batch", "after_pred", "after_loss", "after_batch", "cleanup_batch"),
    *("after_validate", "cleanup_validate"),
]
OUTER = ["after_epoch", "cleanup_epoch", "after_fit", "cleanup_fit"]


def with_log(*cbs, **kwargs):
    heard = Heard()
    learn = learner([heard, *cbs], **kwargs)
    heard.events.clear()
    return learn, heard


# validate from outside


def test_validate_runs_as_fit_epoch_and_validate_spans():
    learn, heard = with_log()
    learn.validate()
    assert heard.events == ["before_fit", "before_epoch", *VALIDATE, *OUTER]


def test_validate_returns_loss_and_metrics_of_the_validation_set():
    learn = learner(Recorder(), metrics=[lambda pred, y: (pred - y).abs().mean()])
    with torch.no_grad():
        ((x, y),) = learn.dls.valid
        pred = learn.model(x)
    loss, metric = learn.validate()
    assert float(loss) == pytest.approx(F.mse_loss(pred, y).item())
    assert float(metric) == pytest.approx((pred - y).abs().mean().item())


def test_validate_takes_another_loader_or_its_number():
    learn, heard = with_log()
    learn.validate(ds_idx=0)
    learn.validate(dl=tensor_loader(5))
    assert heard.events.count("after_batch") == 2 + 5


def test_validate_without_a_validation_loader_says_so():
    with pytest.raises(ValueError, match="there is no validation loader"):
        learner(dls=loaders(2, None)).validate()


@pytest.mark.parametrize(
    ("event_name", "cancel", "then"),
    [
        ("before_validate", CancelValidException, ["after_cancel_validate", *VALIDATE[-2:], *OUTER]),
        ("before_validate", CancelEpochException, ["cleanup_validate", "after_cancel_epoch", *OUTER]),
        ("before_validate", CancelFitException, ["cleanup_validate", "cleanup_epoch", "after_cancel_fit", *OUTER[2:]]),
        ("before_epoch", CancelEpochException, ["after_cancel_epoch", *OUTER]),
        ("before_fit", CancelFitException, ["after_cancel_fit", *OUTER[2:]]),
    ],
)
def test_the_three_cancels_are_in_scope_in_a_validate(event_name, cancel, then):
    learn, heard = with_log(raise_at(event_name, cancel))
    learn.validate()
    assert heard.events[heard.events.index(event_name) + 1 :] == then


def test_a_cancel_of_the_training_is_not_in_scope_in_a_validate():
    learn, heard = with_log(raise_at("after_pred", CancelTrainException))
    with pytest.raises(CancelTrainException, match="where no train span is running"):
        learn.validate()
    with pytest.raises(CancelTrainException, match="mine") as caught:
        learn.validate(cbs=raise_at("after_pred", CancelTrainException("mine")))
    assert caught.value.args == ("mine",)
    assert "where no train span is running" in caught.value.__notes__[0]
    assert heard.events[-4:] == ["cleanup_batch", "cleanup_validate", "cleanup_epoch", "cleanup_fit"]


NUMBERS = ("epoch", "n_epoch", "iter", "n_iter", "train_iter", "opt_iter", "pct_train", "n_step", "training", "task")


def test_validate_changes_no_counter_record_or_epoch_of_the_last_fit():
    learn = learner(Recorder(), dls=loaders(3, 1))
    learn.logger = lambda row: None
    learn.fit(2)
    recorder = learn.recorder
    before = [getattr(learn, n) for n in NUMBERS], list(recorder.values), recorder.raw_losses, learn.final_record
    learn.validate()
    learn.validate(dl=tensor_loader(7))
    after = [getattr(learn, n) for n in NUMBERS], list(recorder.values), recorder.raw_losses, learn.final_record
    assert after == before


def test_after_a_validate_on_a_fresh_learner_there_is_still_no_dl():
    learn = learner()
    learn.validate()
    assert not hasattr(learn, "dl") and learn.opt is None and learn.epoch == 0


def test_the_task_is_named_during_a_run_and_none_outside():
    seen = []
    learn = learner(Callback(before_validate=lambda cb: seen.append(cb.task)))
    learn.validate()
    learn.fit(1)
    assert seen == ["validate", "fit"] and learn.task is None


def test_a_callback_of_two_learners_follows_the_one_that_runs():
    seen = []
    cb = Callback(after_fit=lambda cb: seen.append(cb.learn))
    first, second = learner(cb), learner(cb)
    first.fit(1)
    second.fit(1)
    assert [id(learn) for learn in seen] == [id(first), id(second)]


@pytest.mark.parametrize("error", [None, ValueError])
def test_validate_restores_the_modes_it_found_module_by_module(error):
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(), nn.Sequential(nn.Dropout()))
    learn = learner([TrainEvalCallback(), *([raise_at("after_pred", error)] if error else [])], model=model)
    model.train()
    model[1].eval()
    before = [m.training for m in model.modules()]
    seen = []
    learn.add_cb(Callback(before_batch=lambda cb: seen.append([m.training for m in model.modules()])))
    if error:
        with pytest.raises(error):
            learn.validate()
    else:
        learn.validate()
    assert [m.training for m in model.modules()] == before == [True, True, False, True, True]
    assert seen == [[False] * 5]


def test_validate_computes_no_gradients():
    seen = []
    learner(Callback(after_loss=lambda cb: seen.append((cb.pred.requires_grad, torch.is_grad_enabled())))).validate()
    assert seen == [(False, False)] and torch.is_grad_enabled()


# with learn


def test_with_learn_enters_and_leaves_the_two_outer_spans():
    learn, heard = with_log()
    with learn as inside:
        assert inside is learn and heard.events == ["before_fit", "before_epoch"]
    assert heard.events[2:] == OUTER and learn.task is None


def test_with_learn_a_validation_inside_is_one_phase():
    learn, heard = with_log()
    with learn:
        learn.validate()
    assert heard.events == ["before_fit", "before_epoch", *VALIDATE, *OUTER]


def test_with_learn_an_error_fires_cleanups_only():
    learn, heard = with_log()
    error = ValueError("mine")
    with pytest.raises(ValueError) as caught, learn:
        raise error
    assert caught.value is error and heard.events[2:] == ["cleanup_epoch", "cleanup_fit"] and learn.task is None


@pytest.mark.parametrize(
    ("cancel", "then"),
    [
        (CancelEpochException, ["after_cancel_epoch", *OUTER]),
        (CancelFitException, ["cleanup_epoch", "after_cancel_fit", *OUTER[2:]]),
    ],
)
def test_with_learn_a_cancel_inside_is_absorbed_by_its_span(cancel, then):
    learn, heard = with_log()
    with learn:
        raise cancel
    assert heard.events[2:] == then and learn.task is None


def test_with_learn_a_cancel_whose_span_is_not_running_goes_on():
    learn, heard = with_log()
    with pytest.raises(CancelBatchException), learn:
        raise CancelBatchException
    assert heard.events[2:] == ["cleanup_epoch", "cleanup_fit"]


@pytest.mark.parametrize(
    ("event_name", "cancel", "cleanups"),
    [
        ("before_fit", CancelFitException, ["cleanup_fit"]),
        ("before_epoch", CancelEpochException, ["cleanup_epoch", "cleanup_fit"]),
        ("before_epoch", CancelFitException, ["cleanup_epoch", "cleanup_fit"]),
    ],
)
def test_with_learn_a_cancel_while_entering_is_raised_after_the_cleanups(event_name, cancel, cleanups):
    learn, heard = with_log(raise_at(event_name, cancel))
    with pytest.raises(cancel), learn:
        raise AssertionError("never entered")
    after = heard.events[heard.events.index(event_name) + 1 :]
    assert [e for e in after if e.startswith("cleanup_")] == cleanups and after[-1] == "cleanup_fit"
    assert learn.task is None
    with learn:
        pass


def test_with_learn_inside_a_run_raises():
    def enter(cb):
        with pytest.raises(RuntimeError, match="while a run is active"), cb.learn:
            pass

    learn, heard = with_log(Once("after_pred", enter))
    learn.fit(1)
    assert heard.events[-1] == "cleanup_fit"


def test_with_learn_lets_go_of_the_batch():
    learn = learner()
    with learn:
        learn.one_batch(0, next(iter(learn.dls.valid)))
        assert learn.pred is not None
    assert learn.pred is None and learn.xb == (None,)


# Nested runs


def nested_at(event_name, action=lambda cb: cb.learn.validate(), training=None):
    return Once(event_name, action, training)


@pytest.mark.parametrize("event_name", FIT_EVENTS)
def test_a_validate_inside_any_event_of_a_fit_is_one_validate_span_and_nothing_else(event_name):
    plain, without = with_log()
    plain.fit(1)
    learn, heard = with_log(nested_at(event_name))
    learn.fit(1)
    at = without.events.index(event_name) + (0 if event_name.startswith("cleanup_") else 1)  # the log hears those last
    assert heard.events == [*without.events[:at], *VALIDATE, *without.events[at:]]


STATE = (
    *("dl", "iter", "n_iter", "epoch", "n_epoch", "training", "task", "batch", "xb", "yb", "pred", "loss"),
    *("final_record", "stepped", "train_iter", "opt_iter", "pct_train"),
)


def state_of(learn):
    values = {name: getattr(learn, name, "absent") for name in STATE}
    values["loss_grad"] = getattr(learn, "loss_grad", "absent")
    values["modes"] = [m.training for m in learn.model.modules()]
    values["random"] = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return values


def assert_same(after, before):
    for name, value in before.items():
        assert after[name] is value or after[name] == value, name


class Moves(Callback):
    """Draws random numbers, and writes to the learner what the loop keeps there."""

    def before_batch(self):
        torch.rand(1), random.random(), np.random.rand()

    def after_batch(self):
        self.learn.pred, self.learn.loss = "moved", torch.tensor(99.0)


@pytest.mark.parametrize("fails", [False, True], ids=["", "error"])
@pytest.mark.parametrize("event_name", FIT_EVENTS)
def test_a_nested_run_puts_the_loops_state_back(event_name, fails):
    states = []

    def nest(cb):
        learn = cb.learn
        states.append(state_of(learn))
        if fails:
            with pytest.raises(ValueError, match="inside"):
                learn.validate(dl=tensor_loader(3), cbs=[Moves(), raise_at("after_loss", ValueError("inside"))])
        else:
            learn.validate(dl=tensor_loader(3), cbs=Moves())
        states.append(state_of(learn))

    cbs = [TrainEvalCallback(), Recorder(), nested_at(event_name, nest)]
    learn = learner(cbs, model=nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1)))
    learn.logger = lambda row: None
    learn.fit(1)
    assert_same(states[1], states[0])
    assert len(learn.cbs) == 3 and learn.train_iter == 2


def test_a_nested_run_leaves_no_attribute_behind():
    learn = learner(Once("after_batch", lambda cb: cb.learn.validate()))
    plain = learner()
    plain.fit(1)
    learn.fit(1)
    assert {*vars(learn)} - {*vars(plain)} == {"once"}


def test_a_nested_run_leaves_gradients_of_the_batch_alone():
    """It begins between backward and step."""
    learn = learner(nested_at("after_backward"))
    twin = learner()
    learn.fit(1)
    twin.fit(1)
    assert weights(learn).equal(weights(twin))


def test_a_callback_does_not_hear_the_events_of_a_nested_run_that_it_started_itself():
    class Starts(Callback):
        def __init__(self):
            self.batches, self.cleanups = [], []

        def before_batch(self):
            self.batches.append(self.training)

        def cleanup_validate(self):
            self.cleanups.append("cleanup")

        def after_train(self):
            self.learn.validate(dl=tensor_loader(4))

    starts = Starts()
    learn, heard = with_log(starts)
    learn.fit(1)
    assert starts.batches == [True, True, False] and starts.cleanups == ["cleanup"]
    assert heard.events.count("before_batch") == 2 + 4 + 1


def test_it_hears_those_that_others_start():
    second = Callback(after_train=lambda cb: cb.learn.validate(), before_batch=lambda cb: seen.append("second"))
    seen = []
    learn, _ = with_log(second, dls=loaders(1, 1))
    learn.add_cb(Once("before_epoch", lambda cb: cb.learn.validate()))
    learn.fit(1)
    assert seen == ["second"] * 3  # the other's validation, the training, the fit's own validation


def test_a_run_nested_in_a_nested_run_is_heard_by_neither_of_its_starters():
    heard_by = {"outer": 0, "inner": 0}

    def hears(name, start):
        def before_batch(cb):
            heard_by[name] += 1

        return Callback(before_batch=before_batch, **start)

    outer = hears("outer", {"after_train": lambda cb: cb.learn.validate()})
    inner = hears("inner", {"before_validate": lambda cb: cb.learn.validate(dl=tensor_loader(5))})
    learn, heard = with_log(outer, inner, dls=loaders(1, 1))
    learn.fit(1)
    # `inner` starts one in each validation: in outer's own, which outer does not hear, and in the fit's.
    assert heard.events.count("before_batch") == 1 + (5 + 1) + (5 + 1)
    assert heard_by == {"outer": 1 + 5 + 1, "inner": 1 + 1 + 1}


def test_a_run_knows_how_deep_it_is_nested():
    depths = []

    def notes(event_name, then=None):
        return Once(event_name, lambda cb: (depths.append(cb.learn._depth), then and cb.learn.validate(cbs=then)))

    innermost = notes("after_batch")
    learner([notes("after_train", notes("before_validate", innermost)), notes("after_fit")]).fit(1)
    assert depths == [0, 1, 2, 0]


def test_after_a_nested_run_its_starter_hears_again_also_after_an_error():
    def nest(cb):
        with pytest.raises(ValueError):
            cb.learn.validate(cbs=raise_at("before_validate", ValueError))

    starter = Once("before_batch", nest)
    starter.after_batch = lambda: seen.append(1)
    seen = []
    learner(starter).fit(1)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("cancel", [CancelValidException, CancelBatchException])
def test_cancels_of_a_nested_run_are_absorbed_in_it(cancel):
    learn, heard = with_log(nested_at("after_train", lambda cb: cb.learn.validate(cbs=raise_at("after_pred", cancel))))
    learn.fit(1)
    name = "validate" if cancel is CancelValidException else "batch"
    assert heard.events.count(f"after_cancel_{name}") == 1 and heard.events[-2:] == ["after_fit", "cleanup_fit"]


def test_a_cancel_of_the_fit_in_a_nested_run_ends_the_outer_fit():
    learn, heard = with_log(
        nested_at("after_train", lambda cb: cb.learn.validate(cbs=raise_at("after_pred", CancelFitException)))
    )
    learn.fit(3)
    assert heard.events[-8:] == [
        *("after_pred", "cleanup_batch", "cleanup_validate", "cleanup_train", "cleanup_epoch"),
        *("after_cancel_fit", "after_fit", "cleanup_fit"),
    ]


class InFitsOnly(Heard):
    tasks = ("fit",)


@pytest.mark.parametrize("kind", [InFitsOnly, Heard])
def test_one_removed_inside_a_nested_run_gets_the_cleanups_of_the_spans_it_took_part_in(kind):
    heard = kind()
    nest = Once("after_loss", lambda cb: cb.learn.validate())
    remove = Once("before_validate", lambda cb: cb.learn.remove_cb(heard))
    learner([heard, nest, remove]).fit(1)
    nested = ["before_validate", "cleanup_validate"] if kind is Heard else []
    assert heard.events[-7:] == [
        *["before_batch", "after_pred", "after_loss"][len(nested) :],
        *nested,
        *["cleanup_batch", "cleanup_train", "cleanup_epoch", "cleanup_fit"],
    ]


def test_one_removed_inside_a_nested_run_that_it_started_gets_the_cleanups_of_the_outer_spans():
    events = ("cleanup_batch", "cleanup_train", "cleanup_epoch", "cleanup_fit", "cleanup_validate")

    def nest(cb):
        cb.learn.validate(cbs=Once("before_batch", lambda other: other.learn.remove_cb(cb)))

    nesting = Callback(after_loss=nest, **{name: (lambda cb, name=name: heard.append(name)) for name in events})
    heard = []
    learner([nesting]).fit(1)
    assert heard == ["cleanup_batch", "cleanup_train", "cleanup_epoch", "cleanup_fit"]


def test_after_a_fit_with_a_nested_run_one_that_is_removed_in_a_validation_gets_its_cleanups():
    class InValidationsOnly(Heard):
        tasks = ("validate",)

    heard = InValidationsOnly()
    learn = learner([heard, nested_at("after_loss")])
    learn.fit(1)
    learn.validate(cbs=Once("before_batch", lambda cb: cb.learn.remove_cb(heard)))
    assert heard.events[-4:] == ["cleanup_batch", "cleanup_validate", "cleanup_epoch", "cleanup_fit"]


def test_callbacks_of_a_nested_run_leave_with_it():
    goes = Heard()
    learn, _ = with_log(nested_at("after_train", lambda cb: cb.learn.validate(cbs=goes)))
    learn.fit(1)
    assert goes.events == VALIDATE and goes.learn is None and len(learn.cbs) == 2


def test_switches_are_not_reset_by_a_nested_run():
    switched = Heard(["before_batch"])

    def nest(cb):
        switched.run = False
        cb.learn.validate()

    learner([switched, nested_at("before_train", nest)]).fit(1)
    assert switched.events == [] and switched.run


def test_a_validate_returns_its_own_numbers_in_the_middle_of_a_fit():
    values = []
    learn = learner([Recorder(), nested_at("after_step", lambda cb: values.append(float(cb.learn.validate()[0])))])
    learn.logger = lambda row: None
    learn.fit(1)
    assert len(values) == 1 and values[0] > 0
    assert len(learn.recorder.values) == 1 and len(learn.recorder.raw_losses) == 2


# The end of a run


def test_at_the_end_of_a_fit_everything_of_it_is_over_in_turn():
    joined, stays, seen = Callback(), Callback(), []

    def look(name):
        def handler(cb):
            seen.append((name, cb.learn.pred is not None, stays.run, joined in cb.learn.cbs, cb.learn.task))

        return handler

    watcher = Callback(after_fit=look("after_fit"), cleanup_fit=look("cleanup_fit"))
    learn = learner([watcher, stays])
    stays.run = False
    learn.fit(1, cbs=joined)
    look("end")(watcher)
    assert seen == [
        ("after_fit", True, False, True, "fit"),
        ("cleanup_fit", True, False, True, "fit"),
        ("end", False, True, False, None),
    ]


@pytest.mark.parametrize("run", ["validate", "with"])
def test_so_it_is_at_the_end_of_every_outermost_run_with_a_fit_span(run):
    stays = Callback()
    learn = learner(stays)
    stays.run = False
    if run == "validate":
        learn.validate()
    else:
        with learn:
            learn.one_batch(0, next(iter(learn.dls.valid)))
    assert stays.run and learn.pred is None and learn.task is None


def test_the_model_ends_a_fit_in_eval_mode_and_a_validate_as_it_was():
    learn = learner(TrainEvalCallback())
    learn.fit(1)
    assert not learn.model.training
    learn.model.train()
    learn.validate()
    assert learn.model.training


def test_a_model_with_a_reset_method_is_reset_in_before_fit():
    class Model(nn.Linear):
        resets = 0

        def reset(self):
            self.resets += 1

    learn = learner(TrainEvalCallback(), model=Model(1, 1))
    learn.fit(2)
    assert learn.model.resets == 1


# Randomness: callbacks that only read, and runs that training does not need, change no weights


def noisy_data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(12, 1, generator=generator)
    return DataLoaders(
        DataLoader(TensorDataset(x, 2 * x + 1), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(x, 2 * x + 1), batch_size=4),
        device="cpu",
    )


def noisy_weights(*cbs, n_epoch=2):
    """The weights after a fit with dropout and shuffled data."""
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(), nn.Linear(8, 1))
    learn = learner([TrainEvalCallback(), *cbs], dls=noisy_data(), model=model, seed=1)
    learn.fit(n_epoch)
    return weights(learn)


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    first = noisy_weights()
    assert first.equal(noisy_weights())
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(), nn.Linear(8, 1))
    learn = learner(TrainEvalCallback(), dls=noisy_data(), model=model, seed=2)
    learn.fit(2)
    assert not weights(learn).equal(first)


@pytest.mark.parametrize("event_name", FIT_EVENTS)
def test_a_validate_at_any_event_changes_no_weights(event_name):
    assert noisy_weights(Callback(**{event_name: lambda cb: cb.learn.validate()})).equal(noisy_weights())


def test_a_nested_run_that_draws_random_numbers_changes_no_weights():
    nest = Callback(after_batch=lambda cb: cb.learn.validate(cbs=Moves()))
    assert noisy_weights(nest).equal(noisy_weights())


def test_a_validate_over_the_shuffled_training_set_changes_no_weights():
    assert noisy_weights(nested_at("before_train", lambda cb: cb.learn.validate(ds_idx=0))).equal(noisy_weights())


@pytest.mark.parametrize("cb", [Recorder, Heard, lambda: Callback(after_loss=lambda cb: (cb.loss, cb.loss_grad))])
def test_adding_or_removing_a_callback_that_only_reads_changes_no_weights(cb):
    def removed(learner_cb):
        learner_cb.learn.remove_cb(there)

    there = cb()
    plain = noisy_weights()
    silent = Callback(before_fit=lambda cb: setattr(cb.learn, "logger", lambda row: None))
    assert noisy_weights(silent, cb()).equal(plain)
    assert noisy_weights(silent, there, Once("before_step", removed)).equal(plain)


def test_a_validate_before_a_fit_changes_nothing_in_it():
    def fit(validates):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(), nn.Linear(8, 1))
        learn = learner(TrainEvalCallback(), dls=noisy_data(), model=model, seed=1)
        for _ in range(validates):
            learn.validate()
        learn.fit(1)
        return weights(learn)

    assert fit(0).equal(fit(2))


def test_outer_runs_leave_the_random_generators_where_they_were():
    learn = learner(Callback(after_pred=lambda cb: torch.rand(1)))
    before = torch.get_rng_state()
    learn.validate()
    assert torch.get_rng_state().equal(before)


def test_raising_in_every_place_of_a_nested_run_leaves_the_fit_usable():
    for event_name in VALIDATE:
        inner = Callback(**{event_name: raising(ValueError("inside"))})

        def nest(cb, inner=inner):
            with pytest.raises(ValueError, match="inside"):
                cb.learn.validate(cbs=inner)

        learn, heard = with_log(nested_at("before_step", nest))
        learn.fit(1)
        assert learn.opt_iter == 2 and heard.events[-1] == "cleanup_fit"


def test_an_inner_run_from_outside_fires_the_events_of_its_phase_alone():
    heard = Heard(["before_fit", "before_epoch", "before_validate", "after_validate"])
    learn = learner(heard)
    preds, _ = learn.get_preds(inner=True)
    assert heard.events == ["before_validate", "after_validate"]
    assert preds.equal(learn.get_preds()[0]) and learn.task is None


def test_gradients_are_as_enabled_after_a_run_as_before_it():
    def fails(cb):
        torch.set_grad_enabled(False)  # as where a signal cuts torch's own `no_grad`
        raise OSError

    with torch.enable_grad():
        with pytest.raises(OSError):
            learner(Callback(after_loss=fails)).fit(1)
        assert torch.is_grad_enabled()


def test_a_second_ctrl_c_does_not_cut_the_end_of_a_run():
    class Guest(Callback):
        @property
        def name(self):
            if self.learn is None:  # it is asked before it joins and after it has left
                signal.raise_signal(signal.SIGINT)
            return "guest"

    learn = learner()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Guest())
    assert learn.task is None and not hasattr(learn, "guest")


@pytest.mark.parametrize("extra", [None, Callback()], ids=["alone", "with one that came for the run"])
@pytest.mark.parametrize("setting", [{"run": False}, {"tasks": ("validate",)}], ids=str)
def test_one_that_took_no_part_in_a_run_hears_what_is_sent_by_hand_after_it(setting, extra):
    heard = Heard(["before_batch"])
    learn = learner(heard)
    vars(heard).update(setting)
    learn.fit(1, cbs=extra)
    learn("before_batch")
    assert heard.events == ["before_batch"]


# Runs that are undone


class Alike(Callback):
    """One that equals every other of its class."""

    def __eq__(self, other):
        return type(other) is Alike

    __hash__ = Callback.__hash__


def test_an_undone_run_ends_with_the_very_callbacks_with_which_it_began():
    leaves, stays, joins = Alike(), Alike(), Alike()
    learn = learner([leaves, stays])
    learn.create_opt()

    def swap():
        learn.remove_cb(leaves)
        learn.add_cb(joins)

    run_undone(learn, "fit", None, swap)
    assert [id(cb) for cb in learn.cbs] == [id(leaves), id(stays)]
    assert leaves.learn is learn and joins.learn is None


def test_an_undone_run_leaves_counters_as_they_were_and_none_that_it_made():
    learn = learner()
    learn.create_opt()
    learn.train_iter = 7
    seen = []

    def body():
        learn.train_iter, learn.dl = 8, learn.dls.train
        seen.append(learn.task)

    run_undone(learn, "lr_find", None, body)
    assert seen == ["lr_find"] and learn.train_iter == 7 and not hasattr(learn, "dl")


def test_an_undone_run_puts_parts_back_before_their_values():
    learn = learner()
    learn.create_opt()
    weight, value = learn.model.weight, learn.model.weight.tolist()

    def body():
        weight.data.add_(1)
        learn.model.weight = nn.Parameter(torch.zeros(1, 1))

    run_undone(learn, "fit", None, body, lambda: setattr(learn.model, "weight", weight))
    assert learn.model.weight is weight and weight.tolist() == value


def test_ctrl_c_while_a_run_is_undone_is_raised_when_it_is():
    learn = learner()
    learn.create_opt()
    weight, value = learn.model.weight, learn.model.weight.tolist()
    with pytest.raises(KeyboardInterrupt):
        run_undone(learn, "fit", None, lambda: weight.data.add_(1), lambda: signal.raise_signal(signal.SIGINT))
    assert weight.tolist() == value
