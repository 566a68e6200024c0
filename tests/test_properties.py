"""Any callbacks, whatever they raise, add and remove: the loop keeps its grammar, and the learner can train again."""

import random

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import learnloop as ll
from learnloop.loop.cancel import CancelException
from learnloop.loop.events import EVENTS
from learnloop.loop.ordering import OrderingError
from learnloop.testing import toy_learner
from tests.grammar import Raised, Wrong, check

CANCELS = {
    "fit": ll.CancelFitException,
    "epoch": ll.CancelEpochException,
    "train": ll.CancelTrainException,
    "validate": ll.CancelValidException,
    "batch": ll.CancelBatchException,
    "backward": ll.CancelBackwardException,
    "step": ll.CancelStepException,
}
SIZES = {"fit": 2, "train": 2, "validate": 1}


class Oops(Exception):
    """The plain error of a callback."""


class Log:
    """What happened: events and what was raised in them; and who heard which firing of an event."""

    def __init__(self):
        self.trace = []  # events and Raised, for the grammar
        self.firings = []  # [event, [who heard it, in order]]
        self.n_removing = 0  # removals that are running, one inside the other: what is heard in them is no firing

    def raises(self, kind):
        if not self.n_removing:
            self.trace.append(Raised(kind))

    def fires(self, event):
        self.trace.append(event)
        self.firings.append([event, []])


class First(ll.Callback):
    """Hears every event before everyone else, and notes that it fires."""

    order = -1e6

    def __init__(self, log):
        self.log = log

    def __call__(self, event_name):
        if not event_name.startswith("cleanup_"):
            self.log.fires(event_name)


class Last(First):
    """Hears every cleanup before everyone else: they come in reverse order."""

    order = 1e6

    def __call__(self, event_name):
        if event_name.startswith("cleanup_"):
            self.log.fires(event_name)


class Actor(ll.Callback):
    """Does what was planned at the n-th hearing of an event: raises, adds another callback, removes one."""

    def __init__(self, log, plan, troupe):
        self.log, self.plan, self.troupe = log, dict(plan), troupe
        self.heard = []

    def __call__(self, event_name):
        if self.log is None:
            return
        self.heard.append(event_name)
        if not self.log.n_removing and self.log.firings:  # a removal may come before anything fires
            self.log.firings[-1][1].append(self)
        act = self.plan.pop((event_name, self.heard.count(event_name)), None)
        if act is not None:
            self.do(*act)

    def do(self, what, which):
        if what == "raise":
            self.log.raises(which)
            raise CANCELS.get(which, Oops)("planned")
        elif what == "add":
            added = Actor(self.log, {}, self.troupe)
            added.order = which
            self.troupe.append(added)
            self.learn.add_cb(added)
        else:
            present = [cb for cb in self.learn.cbs if isinstance(cb, Actor)]
            self.remove(present[which % len(present)])

    def remove(self, cb):
        self.log.n_removing += 1
        try:
            self.learn.remove_cb(cb)
        except Exception:
            self.log.n_removing -= 1
            self.log.raises("error")  # by its cleanups, which cannot cancel
            raise
        self.log.n_removing -= 1


# What hypothesis makes up

HEARINGS = st.tuples(st.sampled_from(EVENTS[1:]), st.integers(1, 3))
ACTS = st.one_of(
    st.tuples(st.just("raise"), st.sampled_from([*CANCELS, "error"])),
    st.tuples(st.just("add"), st.integers(-2, 2)),
    st.tuples(st.just("remove"), st.integers(0, 5)),
)
LAWS = st.none() | st.tuples(st.sampled_from(["run_before", "run_after"]), st.integers(0, 4))
PARTS = st.tuples(st.integers(-2, 2), LAWS, st.dictionaries(HEARINGS, ACTS, max_size=3))
TROUPES = st.lists(PARTS, min_size=1, max_size=5)


def troupe_of(parts, log):
    """Callbacks, each of a class of its own: `Actor0`, `Actor1`, …"""
    troupe = []
    for i, (order, law, plan) in enumerate(parts):
        laws = {} if law is None else {law[0]: f"Actor{law[1]}"}
        troupe.append(type(f"Actor{i}", (Actor,), {"order": order, **laws})(log, plan, troupe))
    return troupe


def laws_between(cbs):
    """(first, second) for each law that binds two of them."""
    for cb in cbs:
        for other in cbs:
            if other is not cb and type(other).__name__ == cb.run_before:
                yield cb, other
            elif other is not cb and type(other).__name__ == cb.run_after:
                yield other, cb


# One trial


def numbers_of_a_fit(learn):
    """Losses and weights of one epoch from the weights of a new learner, with the same random numbers."""
    fresh = toy_learner(n_train=16, n_valid=8)
    learn.model.load_state_dict(fresh.model.state_dict())
    for p in learn.model.parameters():
        p.grad = None
    random.seed(0)
    torch.manual_seed(0)
    learn.fit(1, reset_opt=True)
    weights = [x for p in learn.model.parameters() for x in p.detach().flatten().tolist()]
    return learn.recorder.raw_losses, weights, list(map(list, learn.recorder.values))


EXPECTED = numbers_of_a_fit(toy_learner(n_train=16, n_valid=8))


def try_out(parts):
    """A disturbed fit and a clean one; AssertionError where a promise is broken."""
    log = Log()
    troupe = troupe_of(parts, log)
    learn = toy_learner(n_train=16, n_valid=8)
    try:
        learn.add_cbs([First(log), Last(log), *troupe])
    except OrderingError:
        assert len(learn.cbs) == 2
        assume(False)
    error = None
    try:
        learn.fit(2)
    except (Oops, CancelException, RuntimeError) as raised:
        error = raised.with_traceback(None)
    reader = check(log.trace, **SIZES)
    assert_left_by(error, reader.left)
    assert_in_order(log, troupe)
    assert_cleaned_up(troupe)
    assert_at_rest(learn)
    assert_trains_again(learn, log, troupe)


def assert_left_by(error, left):
    """What left the fit is what the grammar lets leave it."""
    if left in CANCELS:
        assert type(error) is CANCELS[left] and f"no {left} span is running" in str([error, error.__notes__])
    elif left == "error":  # a cancel in a cleanup is a RuntimeError
        assert type(error) in (Oops, RuntimeError)
    else:
        assert error is None


def assert_in_order(log, troupe):
    laws = list(laws_between(troupe))
    for event, heard in log.firings:
        heard = heard[::-1] if event.startswith("cleanup_") else heard
        for first, second in laws:
            if first in heard and second in heard:
                assert heard.index(first) < heard.index(second), f"{first} and {second} in {event}"
        if not laws:
            orders = [cb.order for cb in heard]
            assert orders == sorted(orders), event


def assert_cleaned_up(troupe):
    """Whoever heard the beginning of a span hears its cleanup."""
    for cb in troupe:
        for span in CANCELS:
            begun, cleaned = cb.heard.count(f"before_{span}"), cb.heard.count(f"cleanup_{span}")
            assert begun <= cleaned, f"{cb} heard before_{span} {begun} times and cleanup_{span} {cleaned} times"


def assert_at_rest(learn):
    assert (learn.task, learn.batch, learn.xb, learn.yb, learn.pred) == (None, None, (None,), (None,), None)
    assert learn._open_spans == [] and learn.dl is None
    assert torch.is_grad_enabled()
    assert all(cb.learn is learn for cb in learn.cbs)


def assert_trains_again(learn, log, troupe):
    for cb in troupe:
        cb.plan = {}
        assert cb.learn in (learn, None) and (cb in learn.cbs) is (cb.learn is learn)
    log.trace.clear()
    assert numbers_of_a_fit(learn) == EXPECTED
    assert check(log.trace, **{**SIZES, "fit": 1}).left is None


DETERMINED = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.filter_too_much]
)


@settings(DETERMINED, max_examples=100)
@given(TROUPES)
def test_whatever_callbacks_raise_add_and_remove_the_loop_keeps_its_grammar_and_trains_again(parts):
    try_out(parts)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(DETERMINED, max_examples=1000, derandomize=False)
@given(TROUPES)
def test_so_it_is_with_a_thousand_sets_of_callbacks_drawn_by_chance(parts):
    try_out(parts)


# The grammar itself

BATCH = "before_batch after_pred after_loss {} after_batch cleanup_batch"
STEP = "before_backward after_backward cleanup_backward before_step after_step cleanup_step"
TRAIN = f"before_train {BATCH.format(STEP)} after_train cleanup_train"
VALIDATE = f"before_validate {BATCH.format('')} after_validate cleanup_validate"
FIT = f"before_fit before_epoch {TRAIN} {VALIDATE} after_epoch cleanup_epoch after_fit cleanup_fit"


def test_a_plain_fit_is_in_the_grammar():
    assert check(FIT.split(), fit=1, train=1, validate=1).left is None


@pytest.mark.parametrize("event", FIT.split())
def test_a_fit_in_which_an_event_is_missing_is_not(event):
    events = FIT.split()
    events.remove(event)
    with pytest.raises(Wrong):
        check(events)


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("before_train", "before_train before_train"),
        ("after_pred after_loss", "after_loss after_pred"),
        ("before_train", "before_train after_cancel_train"),
        (f"{TRAIN} {VALIDATE}", f"{VALIDATE} {TRAIN}"),
        ("after_validate cleanup_validate", "cleanup_validate after_validate"),
    ],
)
def test_events_out_of_place_are_not(former, now):
    with pytest.raises(Wrong):
        check(FIT.replace(former, now, 1).split())


def test_a_fit_of_fewer_epochs_or_batches_than_there_are_is_not():
    for wrong in ({"fit": 2}, {"train": 2}, {"validate": 2}):
        with pytest.raises(Wrong, match="after 1 spans"):
            check(FIT.split(), **wrong)


def test_a_cancel_leaves_its_span_by_its_own_events_and_inner_ones_by_cleanups_alone():
    head, tail = "before_fit before_epoch before_train before_batch after_pred after_loss before_backward", VALIDATE
    cancelled = "cleanup_backward {} after_epoch cleanup_epoch after_fit cleanup_fit"
    right = f"cleanup_batch after_cancel_train after_train cleanup_train {tail}"
    check([*head.split(), Raised("train"), *cancelled.format(right).split()])
    for wrong in (
        f"after_batch cleanup_batch after_cancel_train after_train cleanup_train {tail}",
        f"cleanup_batch after_train cleanup_train {tail}",
        f"cleanup_batch after_cancel_train cleanup_train {tail}",
        "cleanup_batch after_cancel_train after_train cleanup_train",
        f"after_cancel_train after_train cleanup_train {tail}",
    ):
        with pytest.raises(Wrong):
            check([*head.split(), Raised("train"), *cancelled.format(wrong).split()])


def test_an_error_leaves_everything_by_cleanups_alone():
    head, cleanups = ["before_fit", "before_epoch", Raised("error")], ["cleanup_epoch", "cleanup_fit"]
    assert check([*head, *cleanups]).left == "error"
    with pytest.raises(Wrong):
        check([*head, "after_epoch", *cleanups])


def test_what_is_cancelled_in_a_cleanup_is_an_error():
    trace = ["before_fit", "before_epoch", Raised("epoch"), "after_cancel_epoch", "after_epoch", "cleanup_epoch"]
    assert check([*trace, Raised("fit"), "cleanup_fit"]).left == "error"
    with pytest.raises(Wrong):
        check([*trace, Raised("fit"), "after_cancel_fit", "after_fit", "cleanup_fit"])
