"""A learner's callbacks: adding, removing, and sending them events."""

import gc
import warnings
import weakref
from contextlib import suppress

import pytest
import torch
from fastcore.foundation import L

from learnloop import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelFitException,
    CancelStepException,
    Learner,
    ProgressCallback,
    Recorder,
)
from learnloop.loop.events import EVENTS
from learnloop.loop.ordering import OrderingError
from tests.toys import Heard, Once, learner, loaders, raise_at

BATCH = ["before_batch", "after_pred", "after_loss", "after_batch"]  # of a validation


class Counter(Callback):
    """How often it heard each of two events."""

    def __init__(self):
        self.batches = self.fits = 0

    def before_batch(self):
        self.batches += 1

    def before_fit(self):
        self.fits += 1


class Other(Counter):
    pass


def note(into, name):
    return lambda cb: into.append(name)


# Sending an event


def test_calling_the_learner_sends_an_event_to_every_handler_in_order():
    heard = []
    late, soon = Callback(before_batch=note(heard, "late")), Callback(before_batch=note(heard, "soon"))
    late.order = 3
    learner([late, soon])("before_batch")
    assert heard == ["soon", "late"]


def test_calling_the_learner_with_several_events_sends_them_in_turn():
    heard = Heard()
    learn = learner(heard)
    heard.events.clear()
    learn(["before_fit", "before_epoch"])
    learn(("after_epoch", "cleanup_fit"))
    assert heard.events == ["before_fit", "before_epoch", "after_epoch", "cleanup_fit"]


def test_calling_the_learner_with_a_name_that_is_no_event_says_so():
    with pytest.raises(ValueError, match=r"`before_bacth` is no event. Did you mean `before_batch`?"):
        learner()("before_bacth")
    with pytest.raises(ValueError, match="is no event"):
        learner()(["before_fit", "nothing"])


def test_calling_the_learner_returns_nothing():
    assert learner(Callback(before_fit=lambda cb: 3))("before_fit") is None


def test_a_cleanup_sent_by_hand_runs_in_reverse_order():
    heard = []
    learn = learner([Callback(cleanup_batch=note(heard, i)) for i in range(3)])
    learn("cleanup_batch")
    assert heard == [2, 1, 0]


def test_after_create_fires_when_all_callbacks_are_there():
    seen = []
    first = Callback(after_create=lambda cb: seen.append(list(cb.learn.cbs)))
    learn = learner([first, Counter()])
    assert seen == [list(learn.cbs)]
    learn.fit(1)
    assert len(seen) == 1


def test_an_event_that_nobody_listens_to_fires_nothing():
    assert learner()("after_step") is None


# Switches


def test_run_filters_all_events_but_cleanups():
    heard = Heard()
    learn = learner(heard)
    heard.events.clear()
    heard.run = False
    learn.fit(1)
    assert {e.split("_")[0] for e in heard.events} == {"cleanup"}
    assert heard.events.count("cleanup_batch") == 3 and heard.events[-1] == "cleanup_fit"


def test_run_is_reset_after_each_fit():
    counter = Counter()
    learn = learner(counter)
    counter.run = False
    learn.fit(1)
    assert (counter.batches, counter.run) == (0, True)
    learn.fit(1)
    assert counter.batches == 3


def test_run_is_reset_after_a_validate_and_after_an_error():
    counter = Counter()
    learn = learner([counter, raise_at("after_train", ValueError())])
    counter.run = False
    learn.validate()
    assert counter.run
    counter.run = False
    with pytest.raises(ValueError):
        learn.fit(1)
    assert counter.run


@pytest.mark.parametrize(("switch", "training"), [("run_train", True), ("run_valid", False)])
def test_run_train_and_run_valid_filter_all_events_of_the_batch_span_but_cleanups(switch, training):
    heard = Heard()
    setattr(heard, switch, False)
    cancels = [raise_at("before_backward", CancelBackwardException), raise_at("before_step", CancelStepException)]
    learner([heard, *cancels], dls=loaders(3, 1)).fit(1)
    phases, phase = {True: [], False: []}, None
    for event in heard.events[2:]:
        phase = {"before_train": True, "before_validate": False, "after_epoch": None}.get(event, phase)
        if phase is not None:
            phases[phase].append(event)
    filtered, others = phases[training], phases[not training]
    name = "train" if training else "validate"
    assert [e for e in filtered if not e.startswith("cleanup_")] == [f"before_{name}", f"after_{name}"]
    assert filtered.count("cleanup_batch") == (3 if training else 1)
    assert "before_batch" in others


def test_a_callback_that_run_train_switches_off_hears_no_cancel_either():
    heard = Heard(["after_cancel_backward", "after_cancel_step", "after_cancel_batch"])
    heard.run_train = False
    cancels = [
        raise_at("before_backward", CancelBackwardException),
        raise_at("before_step", CancelStepException),
        raise_at("after_loss", CancelBatchException),
    ]
    learner([heard, *cancels]).fit(1)
    assert heard.events == []


@pytest.mark.parametrize("switch", ["run", "run_train"])
def test_a_switch_set_in_the_middle_of_a_run_is_obeyed_from_the_next_event_on(switch):
    heard = Heard(["before_batch", "after_batch"])
    learner([heard, Once("after_pred", lambda cb: setattr(heard, switch, False))], dls=loaders(3, 1)).fit(1)
    left = [] if switch == "run" else ["before_batch", "after_batch"]  # those of the validation
    assert heard.events == ["before_batch", *left]


def test_run_valid_set_in_the_middle_of_a_run_is_obeyed():
    heard = Heard(["before_batch"])
    learner([heard, Once("before_train", lambda cb: setattr(heard, "run_valid", False))]).fit(1)
    assert heard.events == ["before_batch"] * 2


def test_a_switch_set_back_on_is_obeyed_too():
    heard = Heard(["before_batch"])
    heard.run_train = False
    learner([heard, Once("before_train", lambda cb: setattr(heard, "run_train", True))]).fit(1)
    assert heard.events == ["before_batch"] * 3


@pytest.mark.parametrize("law", ["order", "run_after"])
def test_a_place_changed_in_the_middle_of_a_run_is_obeyed_from_the_next_event_on(law):
    heard = []
    a = type("First", (Callback,), {"before_batch": lambda self: heard.append("a")})()
    b = type("Second", (Callback,), {"before_batch": lambda self: heard.append("b")})()
    change = Once("after_batch", lambda cb: setattr(a, law, 5 if law == "order" else type(b)))
    learner([a, b, change]).fit(1)
    assert heard == ["a", "b", "b", "a", "b", "a"]


def test_a_handler_set_on_an_instance_in_the_middle_of_a_run_is_heard_from_the_next_event_on():
    counter, heard = Counter(), []
    change = Once("after_batch", lambda cb: setattr(counter, "before_batch", lambda: heard.append(counter.iter)))
    learner([counter, change], dls=loaders(3, None)).fit(1)
    assert (counter.batches, heard) == (1, [1, 2])


def test_a_handler_for_an_event_that_had_none_may_be_set_in_the_middle_of_a_run():
    counter, heard = Counter(), []
    learner([counter, Once("before_train", lambda cb: setattr(counter, "after_step", note(heard, 1).__get__(counter)))])
    counter.learn.fit(1)
    assert heard == [1, 1]


def test_a_handler_deleted_from_an_instance_gives_way_to_the_class_again():
    counter = Counter()
    learn = learner(counter)
    counter.before_batch = lambda: None
    learn.fit(1)
    assert counter.batches == 0
    del counter.before_batch
    learn.fit(1)
    assert counter.batches == 3


def test_a_handler_switched_off_by_none_is_not_called():
    counter = Counter()
    learn = learner(counter)
    counter.before_batch = None
    learn.fit(1)
    assert (counter.batches, counter.fits) == (0, 1)


def test_a_patched_class_is_seen_at_the_next_outermost_run():
    class Patched(Callback):
        pass

    heard = []
    learn = learner(Patched())
    learn.fit(1)
    Patched.before_fit = lambda self: heard.append("fit")
    learn.fit(1)
    Patched.before_fit = lambda self: heard.append("patched again")
    learn.validate()
    assert heard == ["fit", "patched again"]


def test_nothing_is_rebuilt_while_nothing_changes():
    tables = []
    cb = Callback(after_batch=lambda cb: tables.append(cb.learn._train_handlers))
    learner(cb, dls=loaders(3, None)).fit(2)
    assert all(table is tables[0] for table in tables)


# Callbacks that override `__call__`


class Everything(Callback):
    def __init__(self):
        self.events = []

    def __call__(self, event_name):
        self.events.append(event_name)
        return super().__call__(event_name)

    def after_train(self):
        self.events.append("handled")


def test_a_callback_that_overrides_call_receives_every_event():
    everything, heard = Everything(), Heard()
    learner([heard, everything]).fit(1)
    assert [e for e in everything.events if e != "handled"] == heard.events
    i = everything.events.index("after_train")
    assert everything.events[i + 1] == "handled"


def test_a_callback_that_overrides_call_heeds_its_switches():
    everything = Everything()
    everything.run_train = False
    learner(everything).fit(1)
    assert everything.events.count("before_batch") == 1 and everything.events.count("cleanup_batch") == 3


# Adding and removing


def test_a_class_is_instantiated_and_both_ways_of_adding_return_the_learner():
    learn = learner()
    assert learn.add_cb(Counter) is learn and learn.add_cbs([Other, Heard()]) is learn
    assert [type(cb) for cb in learn.cbs] == [Counter, Other, Heard]
    assert all(cb.learn is learn for cb in learn.cbs)


@pytest.mark.parametrize("cbs", [Counter(), [Counter()], (Counter(),), L(Counter()), (c for c in [Counter()])])
def test_callbacks_are_taken_alone_or_in_a_list_of_any_kind(cbs):
    assert len(learner(cbs=None).add_cbs(cbs).cbs) == 1


def test_the_list_of_callbacks_is_an_l_in_the_order_of_adding():
    cbs = [Other(), Counter(), Other()]
    learn = learner(cbs)
    assert isinstance(learn.cbs, L) and list(learn.cbs) == cbs
    assert learn.cbs.attrgot("batches") == [0, 0, 0]


@pytest.mark.parametrize("thing", [3, "Counter", print, object, None, torch.nn.Linear(1, 1)], ids=str)
def test_what_is_no_callback_is_refused_and_nothing_added(thing):
    learn = learner()
    with pytest.raises(TypeError, match="is no Callback; `cbs` takes instances or subclasses of Callback") as caught:
        learn.add_cbs([Counter(), thing])
    assert str(caught.value).endswith("Derive the class from `Callback`.") == isinstance(thing, type)
    assert list(learn.cbs) == []
    assert not hasattr(learn, "counter")


def test_a_class_with_handlers_that_is_no_callback_is_told_to_derive():
    class Handler:
        def before_batch(self):
            pass

    with pytest.raises(TypeError, match="Derive the class from `Callback`"):
        learner(Handler())


def test_callbacks_whose_laws_go_in_a_circle_are_refused_and_none_is_added():
    class First(Callback):
        run_after = "Second"

    class Second(Callback):
        run_after = First

    learn = learner(first := First())
    with pytest.raises(OrderingError, match="in a circle"):
        learn.add_cbs([Counter(), second := Second()])
    assert list(learn.cbs) == [first] and second.learn is None and not hasattr(learn, "counter")


def test_the_same_instance_twice_is_refused():
    counter = Counter()
    learn = learner(counter)
    with pytest.raises(ValueError, match="`Counter` is on this learner already"):
        learn.add_cb(counter)
    with pytest.raises(ValueError, match="already"):
        learner([Other(), (other := Other()), other])
    with pytest.raises(ValueError, match="already"):
        learn.fit(1, cbs=counter)
    assert list(learn.cbs) == [counter]


@pytest.mark.parametrize("name", ["Model", "Opt", "Fit", "Dls", "Loss", "Metrics"])
def test_a_callback_whose_name_would_hide_an_attribute_of_the_learner_is_refused(name):
    cb = type(name, (Callback,), {})()
    learn = learner()
    learn.create_opt()
    with pytest.raises(ValueError, match=rf"`{name}` would hide `learn.{name.lower()}`.*`My{name}`"):
        learn.add_cb(cb)
    assert list(learn.cbs) == [] and cb.learn is None


def test_a_removed_callback_is_on_no_learner_and_hears_nothing():
    counter = Counter()
    learn = learner(counter)
    assert learn.remove_cb(counter) is learn
    learn.fit(1)
    assert counter.learn is None and counter.batches == 0 and not hasattr(learn, "counter")


def test_removing_a_class_removes_all_its_instances_subclasses_too():
    learn = learner([Counter(), Other(), heard := Heard(), Counter()])
    learn.remove_cb(Counter)
    assert list(learn.cbs) == [heard]


def test_removing_one_that_is_not_there_does_nothing():
    counter = Counter()
    learn = learner(counter)
    learn.remove_cb(Counter())
    learn.remove_cbs([Other, Recorder])
    assert list(learn.cbs) == [counter] and counter.learn is learn


def test_two_callbacks_of_one_class_live_side_by_side():
    first, second = Counter(), Counter()
    learn = learner([first, second])
    learn.fit(1)
    assert first.batches == second.batches == 3
    assert list(learn[Counter]) == [first, second]


class Equal(Counter):
    """As a dataclass: equal to another one with the same settings."""

    def __eq__(self, other):
        return isinstance(other, Equal)

    __hash__ = Callback.__hash__


def test_callbacks_that_compare_equal_are_different_callbacks():
    first, second = Equal(), Equal()
    learn = learner([first, second])
    learn.remove_cb(second)
    assert len(learn.cbs) == 1 and learn.cbs[0] is first and first.learn is learn
    learn.fit(1, cbs=second)
    assert (first.fits, second.fits) == (1, 1)
    assert len(learn.cbs) == 1 and learn.cbs[0] is first


def test_a_running_event_goes_on_with_the_equal_of_one_removed_meanwhile():
    first, second = Equal(), Equal()
    learner([Once("before_batch", lambda cb: cb.learn.remove_cb(second)), first, second]).fit(1)
    assert (first.batches, second.batches) == (3, 0)


def test_a_run_that_a_callback_starts_is_heard_by_its_equal():
    class Asks(Equal):
        asks = False

        def after_train(self):
            if self.asks:
                self.learn.validate()

    asking, equal = Asks(), Asks()
    asking.asks = True
    learner([asking, equal], dls=loaders(2, 1)).fit(1)
    assert (asking.batches, equal.batches) == (3, 4)


def test_the_attribute_belongs_to_the_last_added_and_goes_back_when_that_is_removed():
    first, second = Counter(), Counter()
    learn = learner([first, second])
    assert learn.counter is second
    learn.remove_cb(second)
    assert learn.counter is first
    learn.add_cb(second)
    learn.remove_cb(first)
    assert learn.counter is second
    learn.remove_cb(second)
    assert not hasattr(learn, "counter")


def test_indexing_gives_the_callback_of_a_class_or_all_of_them():
    other, heard = Other(), Heard()
    learn = learner([other, heard])
    assert learn[Other] is other and learn[Counter] is other and learn[Heard] is heard
    with pytest.raises(KeyError, match="no Recorder among the callbacks"):
        learn[Recorder]


def test_ordered_cbs_are_those_with_a_handler_as_they_run():
    late, soon = (Callback(before_fit=print, cleanup_fit=print) for _ in range(2))
    soon.order = -1
    learn = learner([late, soon, Callback(after_fit=print)])
    assert list(learn.ordered_cbs("before_fit")) == [soon, late]
    assert list(learn.ordered_cbs("cleanup_fit")) == [late, soon]


def test_ordered_cbs_of_a_name_that_is_no_event_says_so():
    with pytest.raises(ValueError, match=r"Did you mean `after_fit`?"):
        learner().ordered_cbs("after_ftt")


# For a while


def test_added_cbs_are_there_for_a_while_and_just_these_leave():
    learn = learner(stays := Counter())
    goes = Counter()
    with learn.added_cbs([goes, Other]) as inside:
        assert inside is learn and list(learn.cbs)[:2] == [stays, goes] and learn.counter is goes
        assert isinstance(learn.cbs[2], Other)
    assert list(learn.cbs) == [stays] and learn.counter is stays and goes.learn is None


def test_callbacks_of_one_fit_leave_with_it_and_just_these():
    learn = learner(stays := Counter())
    learn.fit(1, cbs=[Counter, goes := Counter()])
    assert list(learn.cbs) == [stays] and goes.learn is None
    assert stays.batches == goes.batches == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, CancelBatchException])
def test_callbacks_of_one_fit_leave_also_after_an_error(error):
    learn, goes = learner(), Counter()
    with pytest.raises(error):
        learn.fit(1, cbs=[goes, raise_at("after_train", error())])
    assert list(learn.cbs) == [] and goes.learn is None


def test_callbacks_of_one_validate_leave_with_it():
    learn, goes = learner(), Counter()
    learn.validate(cbs=goes)
    assert goes.batches == 1 and list(learn.cbs) == []


def test_names_of_a_fits_callbacks_exist_before_anyones_before_fit():
    seen = []
    learn = learner(Callback(before_fit=lambda cb: seen.append(hasattr(cb, "other"))))
    learn.fit(1, cbs=Other)
    learn.fit(1)
    assert seen == [True, False]


def test_a_wrong_callback_for_one_fit_leaves_the_learner_as_it_was():
    learn, goes = learner(), Counter()
    with pytest.raises(TypeError, match="is no Callback"):
        learn.fit(1, cbs=[goes, 3])
    assert list(learn.cbs) == [] and goes.learn is None and learn.task is None and learn.opt is None


def test_removed_cbs_puts_the_same_instances_back_in_the_same_places():
    cbs = [Counter(), Other(), Heard(), Other()]
    learn = learner(cbs)
    with learn.removed_cbs([Other, cbs[0]]) as inside:
        assert inside is learn and list(learn.cbs) == [cbs[2]]
        assert [cb.learn for cb in cbs] == [None, None, learn, None]
        assert not hasattr(learn, "other") and not hasattr(learn, "counter")
    assert list(learn.cbs) == cbs and all(cb.learn is learn for cb in cbs)
    assert learn.other is cbs[3] and learn.counter is cbs[0]


def test_removed_cbs_puts_them_back_after_an_error():
    learn = learner(cbs := [Counter(), Other()])
    with pytest.raises(ValueError), learn.removed_cbs(Counter):
        raise ValueError
    assert list(learn.cbs) == cbs


def test_removed_cbs_runs_no_cleanup_also_inside_open_spans():
    heard = Heard(["before_batch", "cleanup_batch", "cleanup_train"])

    def away(cb):
        with cb.learn.removed_cbs(heard):
            assert heard.events == ["before_batch"] and heard.learn is None

    learner([heard, Once("after_pred", away)], dls=loaders(1, None)).fit(1)
    assert heard.events == ["before_batch", "cleanup_batch", "cleanup_train"]


def test_no_bar_puts_back_the_same_callback():
    learn = learner(default_cbs=True)
    bar = learn[ProgressCallback]
    with learn.no_bar():
        assert not any(isinstance(cb, ProgressCallback) for cb in learn.cbs)
    assert learn[ProgressCallback] is bar


# In the middle of an event


def test_a_running_event_skips_those_removed_meanwhile():
    counter, heard = Counter(), Heard(["after_batch"])
    heard.order = 5
    first = Once("before_batch", lambda cb: cb.learn.remove_cb(counter))
    learner([first, counter, heard]).fit(1)
    assert counter.batches == 0 and len(heard.events) == 3


def test_a_running_event_goes_on_after_one_that_removes_itself():
    counter = Counter()
    learn = learner([Once("before_batch", lambda cb: cb.learn.remove_cb(cb)), counter])
    learn.fit(1)
    assert counter.batches == 3 and list(learn.cbs) == [counter]


def test_one_added_in_the_middle_of_an_event_hears_the_next_one():
    heard = Heard(BATCH)
    learner(Once("before_batch", lambda cb: cb.learn.add_cb(heard)), dls=loaders(1, None)).fit(1)
    assert heard.events == ["after_pred", "after_loss", "after_batch"]


def test_one_removed_and_added_again_in_the_middle_of_an_event_hears_it_no_more():
    counter = Counter()

    def again(cb):
        cb.learn.remove_cb(counter)
        cb.learn.add_cb(counter)

    learner([Once("before_batch", again), counter], dls=loaders(2, None)).fit(1)
    assert counter.batches == 1


def test_a_running_cleanup_skips_those_removed_meanwhile():
    heard = Heard(["cleanup_batch"])
    heard.order = -5
    remover = Once("cleanup_batch", lambda cb: cb.learn.remove_cb(heard))
    learner([heard, remover], dls=loaders(1, None)).fit(1)
    assert heard.events == ["cleanup_batch"]  # once, by the removal inside the open span


def test_one_removed_inside_open_spans_gets_their_cleanups_first_innermost_first():
    seen = []
    leaves = Callback(**{n: lambda cb, n=n: seen.append((n, cb.learn is not None)) for n in EVENTS if "cleanup" in n})
    learner([leaves, Once("after_pred", lambda cb: cb.learn.remove_cb(leaves))]).fit(1)
    assert seen == [(f"cleanup_{s}", True) for s in ("batch", "train", "epoch", "fit")]
    assert leaves.learn is None


def test_one_removed_in_the_step_gets_that_spans_cleanup_too():
    heard = Heard([n for n in EVENTS if n.startswith("cleanup_")])
    learner([heard, Once("before_step", lambda cb: cb.learn.remove_cb(heard))]).fit(1)
    assert heard.events == [f"cleanup_{s}" for s in ("backward", "step", "batch", "train", "epoch", "fit")]


def test_one_that_overrides_call_gets_them_too():
    everything = Everything()
    learner([everything, Once("after_pred", lambda cb: cb.learn.remove_cb(everything))], dls=loaders(1, None)).fit(1)
    assert everything.events[-4:] == ["cleanup_batch", "cleanup_train", "cleanup_epoch", "cleanup_fit"]


def test_one_that_takes_no_part_in_the_task_gets_none():
    heard = Heard()
    heard.tasks = ("predict",)
    learn = learner([heard, Once("after_pred", lambda cb: cb.learn.remove_cb(heard))])
    heard.events.clear()
    learn.fit(1)
    assert heard.events == []


def test_one_removed_in_a_nested_run_gets_those_of_the_runs_that_it_takes_part_in():
    heard = Heard([n for n in EVENTS if n.startswith("cleanup_")])
    heard.tasks = ("fit",)
    asks = Once("after_train", lambda cb: cb.learn.validate())
    leave = Once("after_pred", lambda cb: cb.learn.remove_cb(heard), training=False)
    learner([heard, asks, leave], dls=loaders(1, 1)).fit(1)
    assert heard.events[-4:] == ["cleanup_batch", "cleanup_train", "cleanup_epoch", "cleanup_fit"]
    assert "cleanup_validate" not in heard.events


def test_one_removed_outside_of_runs_gets_no_cleanup():
    learn = learner(heard := Heard())
    learn.fit(1)
    heard.events.clear()
    learn.remove_cb(heard)
    assert heard.events == []


def test_cleanups_of_a_removal_that_fail_do_not_keep_the_callback():
    error = ValueError("mine")
    bad = Callback(cleanup_batch=lambda cb: (_ for _ in ()).throw(error), cleanup_fit=lambda cb: closed.append(1))
    closed = []
    learn = learner([bad, Once("after_pred", lambda cb: cb.learn.remove_cb(bad))])
    with pytest.raises(ValueError) as caught:
        learn.fit(1)
    assert caught.value is error and closed == [1] and bad.learn is None and bad not in learn.cbs


def test_no_cycle_holds_the_frames_of_an_error_in_a_cleanup_of_a_removal():
    class Thing:
        pass

    def fails(cb):
        held = Thing()
        refs.append(weakref.ref(held))
        raise ValueError

    refs, bad = [], Callback(cleanup_fit=fails)
    learn = learner([bad, Once("after_pred", lambda cb: cb.learn.remove_cb(bad))])
    gc.disable()
    try:
        with suppress(ValueError):
            learn.fit(1)
        assert [ref() for ref in refs] == [None]
    finally:
        gc.enable()


def test_a_cleanup_may_remove_a_callback_that_equals_its_own():
    first, second = Equal(), Equal()
    first.cleanup_batch = lambda: learn.remove_cb(second)
    learn = learner([first, second, leave := Once("after_pred", lambda cb: cb.learn.remove_cb(first))])
    learn.fit(1)
    assert list(learn.cbs) == [leave] and second.learn is None


def test_one_that_joins_a_fit_half_way_hears_its_end():
    heard = Heard()
    learner(Once("after_train", lambda cb: cb.learn.add_cb(heard)), dls=loaders(1, None)).fit(1)
    assert heard.events == ["cleanup_train", "after_epoch", "cleanup_epoch", "after_fit", "cleanup_fit"]


# Two learners


def test_two_learners_may_share_a_callback_which_follows_the_one_that_runs():
    counter, seen = Counter(), []
    counter.after_fit = lambda: seen.append(counter.learn)
    one, two = learner(counter), learner(counter)
    one.fit(1)
    two.fit(1)
    one.fit(1)
    assert seen == [one, two, one] and counter.batches == 9


def test_a_running_event_of_one_learner_goes_on_with_what_is_removed_from_another():
    shared = Counter()
    other = learner(shared)
    learner([Callback(before_fit=lambda cb: other.remove_cb(shared)), shared]).fit(1)
    assert shared.fits == 1


def test_removing_a_shared_callback_from_one_learner_leaves_the_other_working():
    counter = Counter()
    one, two = learner(counter), learner(counter)
    one.remove_cb(counter)
    two.fit(1)
    assert counter.batches == 3 and list(one.cbs) == [] and counter.learn is two


# Notes on errors


def error_of(*cbs, error=ValueError, **kwargs):
    """The error that leaves a fit with these callbacks."""
    with pytest.raises(error) as caught:
        learner(list(cbs), **kwargs).fit(2)
    return caught.value


class Fails(Callback):
    """Raises an error at an event of one epoch and batch."""

    def __init__(self, event_name, error, epoch=0, iter=0, training=True):
        self.error, self.where = error, (epoch, iter, training)
        super().__init__(**{event_name: Fails._fail})

    def _fail(self):
        learn = self.learn
        if (learn.epoch, learn.iter, learn.training) == self.where:
            raise self.error


def test_an_error_of_a_handler_keeps_type_arguments_and_traceback():
    error = KeyError("mine", 3)
    caught = error_of(Fails("after_pred", error), error=KeyError)
    assert caught is error and caught.args == ("mine", 3)
    frames = []
    tb = caught.__traceback__
    while tb:
        frames.append(tb.tb_frame.f_code.co_name)
        tb = tb.tb_next
    assert frames[-1] == "_fail"


def test_an_error_of_a_static_method_is_noted_as_its_callbacks():
    class Static(Callback):
        @staticmethod
        def before_fit():
            raise ValueError("mine")

    assert error_of(Static()).__notes__[0].startswith("raised by Static.before_fit")


def test_an_error_without_arguments_stays_without():
    caught = error_of(Fails("after_pred", ValueError()))
    assert caught.args == () and type(caught) is ValueError


def test_its_note_names_callback_event_epoch_batch_phase_and_shapes():
    caught = error_of(Fails("after_loss", ValueError("x"), epoch=1, iter=1))
    assert caught.__notes__ == [
        "raised by Fails.after_loss at epoch 1, batch 1, train\n"
        "  xb: (float32[2, 1] cpu)\n"
        "  yb: (float32[2, 1] cpu)\n"
        "  pred: float32[2, 1] cpu\n"
        "  samples: 2, 3"
    ]


def test_its_note_names_the_validation_and_only_what_is_there():
    caught = error_of(Fails("before_batch", ValueError("x"), training=False))
    assert caught.__notes__ == [
        "raised by Fails.before_batch at epoch 0, batch 0, validate\n"
        "  xb: (float32[2, 1] cpu)\n  yb: (float32[2, 1] cpu)\n  samples: 0, 1"
    ]


def test_outside_of_the_batch_span_the_note_has_no_shapes():
    caught = error_of(raise_at("after_epoch", ValueError("x")))
    assert caught.__notes__ == ["raised by Once.after_epoch at epoch 0"]


def test_outside_of_a_run_the_note_has_no_place():
    learn = learner(Fails("before_batch", ValueError("x"), iter=None, training=False))
    with pytest.raises(ValueError) as caught:
        learn("before_batch")
    assert caught.value.__notes__ == ["raised by Fails.before_batch"]


def test_an_error_is_noted_once_where_it_was_raised():
    inner = Callback(before_validate=lambda cb: (_ for _ in ()).throw(ValueError("x")))
    outer = Once("after_batch", lambda cb: cb.learn.validate())
    caught = error_of(inner, outer)
    assert len(caught.__notes__) == 1 and caught.__notes__[0].startswith("raised by Callback.before_validate")


def test_an_error_of_model_or_loss_is_noted_without_blaming_a_callback():
    def loss(pred, target):
        raise ValueError("mine")

    caught = error_of(Heard(), loss_func=loss)
    assert caught.__notes__ == [
        "raised by the model, the loss or the optimizer at epoch 0, batch 0, train\n"
        "  xb: (float32[2, 1] cpu)\n"
        "  yb: (float32[2, 1] cpu)\n"
        "  pred: float32[2, 1] cpu\n"
        "  samples: 0, 1"
    ]


def test_notes_that_the_error_had_before_stay():
    error = ValueError("x")
    error.add_note("the user's own")
    caught = error_of(Fails("after_pred", error))
    assert caught.__notes__[0] == "the user's own" and caught.__notes__[1].startswith("raised by Fails.after_pred")


def test_a_cancel_gets_no_note():
    cancel = CancelFitException()
    learner(raise_at("after_pred", cancel)).fit(1)
    assert not getattr(cancel, "__notes__", [])


def test_an_error_in_a_cleanup_is_noted_too():
    caught = error_of(raise_at("cleanup_batch", ValueError("x")))
    assert caught.__notes__[0].startswith("raised by Once.cleanup_batch at epoch 0, batch 0, train")


# Without callbacks at all


def test_a_learner_without_callbacks_trains():
    learn = learner()
    before = learn.model.weight.item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.fit(1)
    assert learn.model.weight.item() != before


def test_every_event_by_hand_is_harmless_on_a_fresh_learner():
    learn: Learner = learner()
    for name in EVENTS:
        assert learn(name) is None


def test_removed_cbs_that_come_back_before_their_turn_hear_the_running_event():
    class Away(Callback):
        def after_validate(self):
            with self.learn.removed_cbs(Heard):
                self.learn.validate()

    heard = Heard()
    heard.order = 1
    learner(cbs=[Away(), heard]).fit(1)
    assert heard.events.count("after_validate") == 1


@pytest.mark.parametrize("event", ["after_batch", "cleanup_batch"])
def test_one_that_removes_itself_in_its_cleanup_gets_the_others_and_is_gone(event):
    heard = []

    def leave(cb):
        heard.append("cleanup_batch")
        cb.learn.remove_cb(cb)

    cb = Callback(
        **{event: lambda cb: cb.learn.remove_cb(cb)},
        **{} if event == "cleanup_batch" else {"cleanup_batch": leave},
        cleanup_train=lambda cb: heard.append(f"cleanup_train of {cb.learn.task}"),
        cleanup_fit=lambda cb: heard.append(f"cleanup_fit of {cb.learn.task}"),
    )
    learn = learner(cb)
    learn.fit(2)
    assert heard[-2:] == ["cleanup_train of fit", "cleanup_fit of fit"] and len(heard) == (
        3 if event == "after_batch" else 2
    )
    assert cb.learn is None and cb not in learn.cbs and learn._leaving == ()


# Learners that override `__call__`


class Listening(Learner):
    """Hears what it calls, also where no callback does."""

    def __call__(self, event_name):
        self.__dict__.setdefault("called", []).append(event_name)
        super().__call__(event_name)


def test_a_learner_that_overrides_call_calls_every_event():
    heard = Heard([e for e in EVENTS if e != "after_create" and not e.startswith("cleanup_")])
    learner(heard).fit(2)
    alone = learner(cls=Listening)
    alone.called.clear()  # `after_create` came while it was made
    alone.fit(2)
    assert alone.called == heard.events
