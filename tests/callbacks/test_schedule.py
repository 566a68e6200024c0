"""ParamScheduler and SkipToEpoch. Numbers marked as fastai's come from fastai 2.8.12, run on the same data."""

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.testing import EventLog, toy_learner


def scheduled(scheds, n_epoch=2, **kwargs):
    """A learner after a fit of three batches an epoch with these schedules."""
    learn = toy_learner(n_train=24, **kwargs)
    learn.fit(n_epoch, cbs=ll.ParamScheduler(scheds))
    return learn


class Endless:
    """A loader without a length."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter([(torch.ones(4, 2), torch.ones(4, 1))] * self.n)


# ParamScheduler


def test_a_schedule_sets_the_hyper_before_each_training_batch():
    rates = []
    note = ll.Callback(before_backward=lambda cb: rates.append(cb.opt.hypers[-1]["lr"]))
    scheduled({"lr": ll.SchedLin(0.1, 0.0)}, cbs=note)
    assert rates == pytest.approx([0.1, 0.0833333, 0.0666667, 0.05, 0.0333333, 0.0166667], abs=1e-7)  # fastai's


def test_what_was_set_is_recorded_in_hps_and_the_rate_in_lrs_too():
    learn = scheduled({"lr": ll.SchedLin(0.1, 0.0), "mom": ll.SchedNo(0.9, 0.9)})
    assert learn.recorder.hps["mom"] == [0.9] * 6
    assert learn.recorder.hps["lr"] == learn.recorder.lrs
    assert len(learn.recorder.lrs) == 6


def test_one_cycle_moves_rate_and_momentum_as_in_fastai():
    learn = toy_learner(n_train=24)
    learn.fit_one_cycle(2, 0.1)
    fastai = {
        "lr": [0.004, 0.076, 0.0969847, 0.0750002, 0.0413182, 0.0116987],
        "mom": [0.95, 0.875, 0.8530154, 0.875, 0.9086824, 0.9383022],
    }
    assert list(learn.recorder.hps) == ["lr", "mom"]
    for name, values in fastai.items():
        assert learn.recorder.hps[name] == pytest.approx(values, abs=5e-7)


def test_validation_batches_move_no_schedule():
    learn = scheduled({"lr": ll.SchedLin(0.1, 0.0)}, n_epoch=1)
    assert len(learn.recorder.hps["lr"]) == 3


def test_a_schedule_may_return_one_value_for_each_group():
    learn = toy_learner(n_train=8, splitter=lambda m: [list(m[0].parameters()), list(m[2].parameters())])
    learn.fit(1, cbs=ll.ParamScheduler({"lr": lambda pct: [0.01, 0.02]}))
    assert [h["lr"] for h in learn.opt.hypers] == [0.01, 0.02]
    assert learn.recorder.hps["lr"] == [0.02]  # of the last group


def test_the_schedule_of_n_steps_ends_after_the_last_update():
    learn = toy_learner(n_train=24)
    learn.fit(n_step=4, valid_every=2, cbs=ll.ParamScheduler({"lr": lambda pct: pct}))
    assert learn.recorder.hps["lr"] == [0.0, 0.25, 0.5, 0.75]


def test_a_new_fit_records_its_schedules_anew():
    learn, scheduler = toy_learner(n_train=24), ll.ParamScheduler({"lr": ll.SchedNo(0.1, 0.1)})
    learn.add_cb(scheduler)
    learn.fit(2)
    learn.fit(1)
    assert learn.recorder.hps == {"lr": [0.1] * 3}


def test_what_was_set_before_an_error_is_recorded():
    def fails(cb):
        if cb.iter == 2:
            raise ZeroDivisionError

    learn = toy_learner(n_train=24, cbs=ll.Callback(before_batch=fails))
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, cbs=ll.ParamScheduler({"lr": ll.SchedNo(0.1, 0.1)}))
    assert learn.recorder.hps == {"lr": [0.1] * 2}


def test_it_works_without_a_recorder():
    learn = toy_learner(default_cbs=False)
    learn.fit(1, cbs=ll.ParamScheduler({"lr": ll.SchedNo(0.3, 0.3)}))
    assert learn.opt.hypers[-1]["lr"] == 0.3


@pytest.mark.parametrize("scheds", [ll.SchedNo(0.1, 0.1), [("lr", ll.SchedNo(0.1, 0.1))], {"lr": 0.1}])
def test_anything_but_a_dict_of_functions_is_refused(scheds):
    with pytest.raises(TypeError, match="pass a dict from hyper to schedule"):
        ll.ParamScheduler(scheds)


def test_a_schedule_over_a_loader_without_length_is_refused_before_the_first_batch():
    log = EventLog("train_iter", cleanups=False)
    learn = ll.Learner(ll.DataLoaders(Endless(4), device="cpu"), nn.Linear(2, 1), nn.MSELoss(), default_cbs=False)
    learn.add_cb(log)
    weight = learn.model.weight.clone()

    with pytest.raises(ValueError, match=r"the training loader has no length[\s\S]*`fit\(n_step=…\)`"):
        learn.fit(1, cbs=ll.ParamScheduler({"lr": ll.SchedLin(1, 0)}))

    log.check([("before_fit", 0)])
    assert torch.equal(learn.model.weight, weight)
    assert list(learn.cbs) == [log]


def test_a_schedule_over_a_loader_without_length_works_with_a_number_of_steps():
    learn = ll.Learner(ll.DataLoaders(Endless(4), device="cpu"), nn.Linear(2, 1), nn.MSELoss(), default_cbs=False)
    learn.add_cb(ll.Recorder)
    learn.logger = lambda row: None
    learn.fit(n_step=5, cbs=ll.ParamScheduler({"lr": ll.SchedLin(1, 0)}))
    assert learn.recorder.hps["lr"] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_an_error_in_a_schedule_names_the_scheduler():
    def broken(pct):
        raise ZeroDivisionError("in the schedule")

    with pytest.raises(ZeroDivisionError, match="in the schedule") as caught:
        scheduled({"lr": broken})
    assert caught.value.__notes__[0].startswith("raised by ParamScheduler.before_batch at epoch 0, batch 0, train")


# SkipToEpoch


def test_epochs_before_the_given_one_are_cancelled():
    log = EventLog("epoch", cleanups=False)
    learn = toy_learner(n_train=8, n_valid=0, cbs=[log, ll.SkipToEpoch(2)])
    learn.fit(3)
    phases = [(name, epoch) for name, epoch in log.events if name in ("after_cancel_epoch", "before_train")]
    assert phases == [("after_cancel_epoch", 0), ("after_cancel_epoch", 1), ("before_train", 2)]


def test_a_skipped_epoch_has_no_row():
    learn = toy_learner(cbs=ll.SkipToEpoch(1))
    learn.fit(3)
    assert [row["epoch"] for row in learn.recorder.history] == [1, 2]


def test_skipping_none_trains_all():
    learn = toy_learner(cbs=ll.SkipToEpoch(0))
    learn.fit(2)
    assert len(learn.recorder.values) == 2


def test_the_schedule_goes_on_where_the_skipped_epochs_end():
    learn = toy_learner(n_train=16, cbs=ll.SkipToEpoch(1))
    learn.fit(2, cbs=ll.ParamScheduler({"lr": lambda pct: pct}))
    assert learn.recorder.hps["lr"] == [0.5, 0.75]
