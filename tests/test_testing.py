"""What `learnloop.testing` gives to tests: a tiny learner, a log of events, and a check of callbacks."""

import random
import re

import numpy as np
import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.testing import EventLog, check_callback, toy_learner


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


# toy_learner


def test_a_toy_learner_trains_with_the_same_numbers_every_time():
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        learn = toy_learner()
        learn.fit(2)
        losses.append(learn.recorder.raw_losses)

    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_making_a_toy_learner_moves_no_random_generator():
    before = random_states()
    toy_learner()
    assert random_states() == before


def test_a_toy_learner_prints_nothing(capsys):
    toy_learner().fit(1)
    assert capsys.readouterr() == ("", "")


def test_a_toy_learner_has_the_sizes_that_were_asked_for():
    learn = toy_learner(n_train=10, n_valid=4, bs=4)
    assert [len(x) for x, _ in learn.dls.train] == [4, 4, 2]
    assert [len(x) for x, _ in learn.dls.valid] == [4]
    assert len(toy_learner(n_valid=0).dls) == 1


def test_a_toy_learner_takes_a_model_callbacks_and_what_a_learner_takes():
    model, log = nn.Linear(2, 1), EventLog()
    learn = toy_learner(model=model, cbs=log, metrics=ll.AvgLoss(), lr=0.5, opt_func=ll.Adam)

    assert learn.model is model
    assert [type(cb) for cb in learn.cbs] == [ll.TrainEvalCallback, ll.Recorder, EventLog]
    assert (learn.lr, learn.opt_func, learn.metrics[0].name) == (0.5, ll.Adam, "loss")
    assert list(toy_learner(default_cbs=False).cbs) == []


# EventLog


def test_the_log_notes_every_event_in_firing_order():
    log = EventLog()
    toy_learner(n_train=8, n_valid=8, cbs=log).fit(1)
    log.check("""
        after_create
        before_fit
          before_epoch
            before_train
              before_batch after_pred after_loss
                before_backward after_backward cleanup_backward
                before_step after_step cleanup_step
              after_batch cleanup_batch
            after_train cleanup_train
            before_validate
              before_batch after_pred after_loss after_batch cleanup_batch
            after_validate cleanup_validate
          after_epoch cleanup_epoch
        after_fit cleanup_fit
    """)


def test_the_log_leaves_out_cleanups_on_request():
    log = EventLog(cleanups=False)
    with toy_learner(cbs=log):
        pass
    assert log.events == ["after_create", "before_fit", "before_epoch", "after_epoch", "after_fit"]


def test_the_log_notes_attributes_beside_the_names_and_none_for_those_that_are_not_there():
    log = EventLog("epoch", "iter", "no_such_thing", cleanups=False)
    toy_learner(n_train=8, n_valid=0, cbs=log).fit(1)
    assert log.events[3:6] == [
        ("before_train", 0, None, None),
        ("before_batch", 0, 0, None),
        ("after_pred", 0, 0, None),
    ]


def test_the_log_keeps_no_graph():
    log = EventLog("pred", cleanups=False)
    toy_learner(cbs=log).fit(1)
    preds = [pred for name, pred in log.events if name == "after_loss"]
    assert len(preds) == 6
    assert not any(pred.requires_grad for pred in preds)


@pytest.mark.parametrize(("order", "events"), [(-1, ["before_fit", "before_epoch"]), (1, ["before_fit"])])
def test_the_order_of_the_log_says_whether_it_hears_what_another_callback_cancels(order, events):
    log = EventLog(order=order, cleanups=False)
    learn = toy_learner(default_cbs=False)
    learn.add_cbs([log, ll.SkipToEpoch(9)])
    learn.cbs[1].order = 0

    learn.fit(1)

    assert log.events[: len(events) + 1] == [*events, "after_cancel_epoch"]


def test_a_difference_is_shown_as_one():
    log = EventLog(cleanups=False)
    with toy_learner(cbs=log):
        pass
    with pytest.raises(AssertionError) as caught:
        log.check("after_create before_fit before_train after_epoch after_fit")
    assert str(caught.value).splitlines()[-5:] == [
        " before_fit",
        "-before_train",
        "+before_epoch",
        " after_epoch",
        " after_fit",
    ]


# check_callback: what is in order


class Clip(ll.Callback):
    """As a user writes it: reads the model, changes gradients, keeps a number."""

    _stateattrs = ("norms",)

    def before_fit(self):
        self.norms = []

    def after_backward(self):
        self.norms.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)))


def half_cosine():
    return ll.ParamScheduler({"lr": ll.SchedCos(0.1, 0.01), "mom": ll.SchedNo(0.9, 0.9)})


def skip_first_epoch():
    return ll.SkipToEpoch(1)


def nothing_but_a_function():
    return ll.Callback(before_batch=lambda cb: None)


@pytest.mark.parametrize(
    "make",
    [
        *(ll.TrainEvalCallback, ll.Recorder, ll.ProgressCallback, half_cosine, skip_first_epoch),
        *(EventLog, Clip, nothing_but_a_function),
    ],
)
def test_callbacks_that_keep_every_promise(make):
    report = check_callback(make)
    assert report.broken == {}
    assert report.n_runs > 400


def test_the_report_has_a_line_for_each_promise():
    report = check_callback(ll.Callback, events=["after_loss"])
    title, *lines = repr(report).splitlines()
    assert re.fullmatch(r"Callback keeps every promise \(\d+ runs, \d+\.\d s\)", title)
    assert lines == [
        "  kept    trains",
        "  kept    leaves all clean after any cancel and error",
        "  kept    is removed without a trace",
        "  kept    can be stored",
        "  kept    resumes exactly",
        "  kept    has one place in the order",
        "  kept    works in mixed precision",
        "  kept    works with accumulated gradients",
        "  -       only reads: does not say so",
        "  0       host reads per training batch",
    ]


def test_checking_moves_no_random_generator_and_prints_nothing(capsys):
    before = random_states()
    check_callback(ll.ProgressCallback, events=["before_fit"])
    assert random_states() == before
    assert capsys.readouterr() == ("", "")


def test_another_learner_can_be_checked_with():
    made = []

    def make_learner():
        made.append(toy_learner(n_train=8, n_valid=8, opt_func=ll.Adam))
        return made[-1]

    check_callback(Clip, make_learner, events=["before_fit"])
    assert len(made) > 3


# check_callback: what is not


class OpensWithoutCleanup(ll.Callback):
    def before_train(self):
        self.former, self.learn.loss_func = self.loss_func, nn.L1Loss()

    def after_train(self):
        self.learn.loss_func = self.former


class LeavesHook(ll.Callback):
    def before_fit(self):
        self.hook = self.model.register_forward_hook(lambda *args: None)

    def after_fit(self):
        self.hook.remove()


class KeepsBatch(ll.Callback):
    def before_batch(self):
        self.inputs = {"last": [self.learn.xb]}


class KeepsGraph(ll.Callback):
    def after_loss(self):
        self.total = self.learn.loss_grad * 2


class KeepsBatchOutOfSight(ll.Callback):
    def before_batch(self):
        xb = self.learn.xb
        self.show = lambda: xb


class NamesTheLearner(ll.Callback):
    def before_fit(self):
        self.learn.mine = 1


class SwallowsInCleanup(ll.Callback):
    def cleanup_batch(self):
        if self.learn.pred is None:
            raise ZeroDivisionError("no pred")


class AddsAnother(ll.Callback):
    def before_fit(self):
        self.learn.add_cb(ll.Callback())


class Redirects(ll.Callback):
    def before_epoch(self):
        self.former, self.learn.logger = self.logger, print

    def after_epoch(self):
        self.learn.logger = self.former


class TurnsGradientsOff(ll.Callback):
    def before_backward(self):
        torch.set_grad_enabled(False)

    def after_backward(self):
        torch.set_grad_enabled(True)


class Remembers(ll.Callback):
    scale = 1.0

    def after_loss(self):
        self.learn.loss_grad = self.learn.loss_grad * self.scale
        self.scale = self.scale / 2


class Misspells(ll.Callback):
    _stateattrs = ("numbr",)

    def before_fit(self):
        self.number = 1


class CannotBeStored(ll.Callback):
    def state_dict(self):
        return {"module": nn.Linear(1, 1)} if self.learn.task is None else {}


class Forgets(ll.Callback):
    n = 0

    def state_dict(self):
        return {"n": self.n}

    def before_fit(self):
        self.n = 1

    def load_state_dict(self, state):
        pass


class CountsForItself(ll.Callback):
    def before_fit(self):
        self.n = 0

    def after_loss(self):
        self.n += self.training
        self.learn.loss_grad = self.learn.loss_grad / (1 + self.n)


class TakesTheFirstWeights(ll.Callback):
    def before_fit(self):
        self.first = [p.detach().clone() for p in self.model.parameters()]

    def after_loss(self):
        far = sum(((p - f) ** 2).sum() for p, f in zip(self.model.parameters(), self.first, strict=True))
        self.learn.loss_grad = self.learn.loss_grad + far


class CannotGoOn(ll.Callback):
    def before_fit(self):
        if self.learn._resuming is not None:
            raise ZeroDivisionError("begun in the middle")


class FailsAtOnce(ll.Callback):
    def before_epoch(self):
        raise ZeroDivisionError("at once")


@pytest.mark.parametrize(
    ("make", "promise"),
    [
        (OpensWithoutCleanup, "leaves `learn.loss_func` as it was"),
        (LeavesHook, "leaves the hooks on the model as it was"),
        (KeepsBatch, "keeps no `xb` of a batch in `KeepsBatch.inputs`"),
        (KeepsGraph, "keeps no graph in `KeepsGraph.total`"),
        (KeepsBatchOutOfSight, "keeps no `xb` of a batch alive"),
        (NamesTheLearner, "leaves no `learn.mine` behind"),
        (SwallowsInCleanup, "raises nothing in a cleanup: ZeroDivisionError: no pred"),
        (AddsAnother, "leaves `learn.cbs` as it was"),
        (Redirects, "leaves `learn.logger` as it was"),
        (TurnsGradientsOff, "raises nothing where others cancel: ValueError: `loss_grad` has no graph"),
        (Remembers, "trains again with the numbers of a first fit"),
        (Misspells, "has every attribute that its `_stateattrs` name"),
        (CannotBeStored, "its state can be stored and loaded"),
        (Forgets, "its state survives being stored and loaded"),
        (CountsForItself, "ends with the same numbers when it is resumed by a learner made anew: stopped in training"),
        (TakesTheFirstWeights, "ends with the same numbers when it is resumed by a learner made anew"),
        (CannotGoOn, "can be resumed by a learner made anew: stopped in training: ZeroDivisionError"),
        (FailsAtOnce, "works in a plain fit"),
    ],
)
def test_a_broken_promise_is_named(make, promise):
    with pytest.raises(AssertionError, match=re.escape(f"          {promise}")):
        check_callback(make, events=["before_train", "before_batch", "before_backward", "after_batch"])
    assert torch.is_grad_enabled()


def test_every_broken_promise_is_named_with_the_first_places_where_it_is_broken():
    class Careless(OpensWithoutCleanup):
        _stateattrs = ("nothing_of_that_name",)

        def before_fit(self):
            self.learn.mine = 1

    with pytest.raises(AssertionError) as caught:
        check_callback(Careless, events=["before_train", "after_train"])

    lines = str(caught.value).splitlines()
    assert lines[0].startswith("Careless breaks 3 of 9 promises (")
    loss_func = next(line for line in lines if "loss_func" in line)
    assert "fit with CancelFitException in before_train, raised after it; " in loss_func
    assert re.search(r"; and \d+ more$", loss_func)


def test_an_instance_is_refused():
    with pytest.raises(TypeError, match="pass the class, or a function that makes one"):
        check_callback(ll.TrainEvalCallback())


def test_something_can_be_raised_at_known_events_only():
    with pytest.raises(ValueError, match="Did you mean `after_batch`"):
        check_callback(ll.Callback, events=["after_bacth"])


def test_the_names_for_tests_are_not_among_those_of_the_package():
    assert not {"toy_learner", "EventLog", "check_callback"} & {*ll.__all__}
