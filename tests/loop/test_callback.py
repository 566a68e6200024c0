"""What a callback is."""

import copy
import linecache
import pickle
import warnings

import pytest
import torch
from torch import nn

from learnloop import Callback, Recorder
from learnloop.loop.callback import TASKS, check_alone, handled_events, state_attributes
from tests.toys import Heard, learner


class Plain(Callback):
    pass


class Answers(Callback):
    def before_batch(self):
        return "answer"

    def after_fit(self):
        return "end"


def subclass(**body):
    """A subclass `Timer` with these attributes."""
    return type("Timer", (Callback,), body)


def nothing(self):
    pass


# Reading


class Line(nn.Linear):
    kind = "line"
    epoch = "the model's"


def test_reading_looks_on_the_callback_then_the_learner_then_the_model():
    cb = Plain()
    learn = learner(cb, model=Line(1, 1))
    cb.mine = 1
    assert cb.mine == 1
    assert cb.dls is learn.dls and cb.epoch == 0
    assert cb.kind == "line" and cb.in_features == 1


def test_the_learner_reads_from_the_model_too():
    assert learner(model=Line(1, 1)).kind == "line"


def test_a_callback_without_a_learner_reads_only_itself():
    assert not hasattr(Plain(), "dls")
    assert Plain().learn is None


def test_a_missing_attribute_says_where_it_was_looked_for_and_the_nearest_spelling():
    cb = Plain()
    learner(cb)
    with pytest.raises(AttributeError) as caught:
        cb.loss_fun  # noqa: B018
    assert str(caught.value) == (
        "`loss_fun` is neither on the callback `Plain`, nor on the learner, nor on the model `Linear`. "
        "Did you mean `loss_func`?"
    )
    assert caught.value.name == "loss_fun"


def test_the_nearest_spelling_may_be_the_models_or_the_callbacks_own():
    cb = Plain()
    learner(cb)
    cb.threshold = 1
    with pytest.raises(AttributeError, match=r"Did you mean `in_features`?"):
        cb.in_featuers  # noqa: B018
    with pytest.raises(AttributeError, match=r"Did you mean `threshold`?"):
        cb.treshold  # noqa: B018


def test_a_missing_attribute_with_nothing_like_it_makes_no_guess():
    cb = Plain()
    learner(cb)
    with pytest.raises(AttributeError, match=r"nor on the model `Linear`\.$"):
        cb.qqqqqq  # noqa: B018


def test_a_missing_attribute_of_a_callback_on_no_learner_says_so():
    with pytest.raises(AttributeError, match="`Plain` has no attribute `dls`; it is on no learner"):
        Plain().dls  # noqa: B018


def test_a_missing_attribute_of_the_learner_says_where_it_was_looked_for():
    with pytest.raises(
        AttributeError, match=r"`epoc` is neither on the learner nor on the model `Linear`. Did you mean "
    ):
        learner().epoc  # noqa: B018


def test_hasattr_works_through_callback_learner_and_model():
    cb = Plain()
    learn = learner(cb)
    for thing in (cb, learn):
        assert not hasattr(thing, "lr_finder") and not hasattr(thing, "dl")
        assert getattr(thing, "nowhere", "default") == "default"


def test_a_missing_attribute_error_can_be_pickled():
    cb = Plain()
    learner(cb)
    with pytest.raises(AttributeError) as caught:
        cb.nowhere  # noqa: B018
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_attribute_error_inside_a_property_is_the_one_that_is_raised():
    class Model(nn.Linear):
        @property
        def depth(self):
            return self.no_such_layer

    class Reads(Callback):
        @property
        def rate(self):
            return self.mdoel

        @property
        def own(self):
            raise AttributeError("not yet")

    cb = Reads()
    learner(cb, model=Model(1, 1))
    with pytest.raises(AttributeError, match="`mdoel` is neither on the callback"):
        cb.rate  # noqa: B018
    with pytest.raises(AttributeError, match=r"^not yet$"):
        cb.own  # noqa: B018
    with pytest.raises(AttributeError, match="`smooth_loss` is there once a training batch was recorded"):
        cb.smooth_loss  # noqa: B018
    assert not hasattr(cb, "own") and not hasattr(cb, "smooth_loss") and not hasattr(cb, "depth")


def test_handlers_are_never_found_through_delegation():
    class Model(nn.Linear):
        def before_batch(self):
            raise AssertionError("a model's method is no handler")

    cb = Plain()
    learn = learner(cb, model=Model(1, 1))
    assert not hasattr(cb, "before_batch")
    assert cb("before_batch") is None
    learn.fit(1)


# Writing


def test_writing_goes_through_the_owner():
    class Doubles(Callback):
        def after_pred(self):
            self.learn.pred = self.pred * 0 + 3

    seen = []
    after = Callback(after_pred=lambda cb: seen.append(cb.pred.flatten().tolist()))
    learner([Doubles(), after]).validate()
    assert seen == [[3, 3]]


def test_a_plain_assignment_that_hides_a_learner_attribute_warns_and_changes_nothing_there():
    class Wrong(Callback):
        def after_pred(self):
            self.pred = None

    learn = learner(Wrong())
    preds = Callback(after_loss=lambda cb: kept.append(cb.learn.pred))
    kept = []
    learn.add_cb(preds)
    with pytest.warns(UserWarning, match=r"`self\.pred = …` in Wrong hides the learner's `pred`") as warned:
        learn.validate()
    assert "Write `self.learn.pred = …`" in str(warned[0].message)
    assert warned[0].filename == __file__
    assert isinstance(kept[0], torch.Tensor)


@pytest.mark.parametrize("name", ["xb", "loss", "loss_grad", "opt_iter", "fit", "smooth_loss"])
def test_hiding_an_attribute_a_property_or_a_method_of_the_learner_warns(name):
    cb = Plain()
    learner(cb)
    with pytest.warns(UserWarning, match=f"hides the learner's `{name}`"):
        setattr(cb, name, 1)


def test_assignments_that_hide_nothing_are_silent():
    class Own(Callback):
        lr = 3  # its own, on purpose

    cb = Own()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cb.model = "set before it was on a learner"
        learner(cb)
        cb.count, cb.lr, cb.order, cb.weight = 1, 4, 2, 3
    assert cb.model == "set before it was on a learner"


def test_the_model_is_not_asked_whether_a_name_is_hidden():
    class Model(nn.Linear):
        def __getattr__(self, name):
            if name == "tally":
                raise AssertionError("asked")
            return super().__getattr__(name)

    cb = Plain()
    learner(cb, model=Model(1, 1))
    cb.tally = 1


@pytest.mark.parametrize("is_on_a_learner", [True, False])
def test_what_was_set_on_it_can_be_deleted_and_the_class_speaks_again(is_on_a_learner):
    cb = Plain()
    if is_on_a_learner:
        learner(cb)
    cb.mine, cb.order = 1, 3
    del cb.mine, cb.order
    assert not hasattr(cb, "mine") and cb.order == 0


def test_a_switch_that_is_deleted_counts_no_more_at_once():
    heard = Heard(["after_batch"])
    learn = learner(heard)
    heard.run = False
    del heard.run
    learn("after_batch")
    assert heard.events == ["after_batch"]


# Names of handlers


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("after_bacth", "after_batch"),
        ("before_ftt", "before_fit"),
        ("before_batchs", "before_batch"),
        ("cleanup_fi", "cleanup_fit"),
        ("after_cancel_tran", "after_cancel_train"),
    ],
)
def test_a_handler_one_edit_or_swap_away_from_an_event_is_refused_when_the_class_is_defined(name, meant):
    with pytest.raises(TypeError) as caught:
        subclass(**{name: nothing})
    assert str(caught.value) == (
        f"`Timer.{name}` looks like a handler, but no event has that name. Did you mean `{meant}`?"
    )


def test_a_handler_further_away_from_every_event_warns():
    with pytest.warns(UserWarning) as warned:
        subclass(before_everything=nothing)
    assert str(warned[0].message) == (
        "`Timer.before_everything` looks like a handler, but no event has that name, so nothing calls it. "
        'If that is meant, set `_not_events = ("before_everything",)`.'
    )


def test_such_a_warning_points_to_where_the_class_or_the_attribute_is_written():
    with pytest.warns(UserWarning) as warned:

        class Wrong(Callback):
            before_everything = nothing

        Plain().after_everything = nothing
    lines = [linecache.getline(w.filename, w.lineno).strip() for w in warned]
    assert lines == ["class Wrong(Callback):", "Plain().after_everything = nothing"]


@pytest.mark.parametrize("name", ["before_call", "after_bacth", "cleanup_x"])
def test_not_events_silences_both(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls = subclass(_not_events=(name,), **{name: nothing})
        type("Child", (cls,), {name: nothing})
    assert not handled_events(cls())


@pytest.mark.parametrize("wrap", [staticmethod, classmethod])
def test_static_and_class_methods_are_checked_too(wrap):
    with pytest.raises(TypeError, match=r"Did you mean `after_batch`?"):
        subclass(after_bacth=wrap(nothing))


def test_what_is_no_method_or_has_no_such_prefix_is_not_checked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subclass(after_bacth=3, afterbatch=nothing, _before_fit=nothing, step=nothing)
        Plain().after_bacth = 3


def test_a_misspelt_handler_set_on_an_instance_is_refused():
    with pytest.raises(TypeError, match=r"`Plain.after_bacth` looks like a handler"):
        Plain().after_bacth = print


@pytest.mark.parametrize(
    ("former", "today"), [("begin_fit", "before_fit"), ("on_epoch_end", "after_epoch"), ("begin_batch", "before_batch")]
)
def test_former_names_are_refused_with_todays_name(former, today):
    with pytest.raises(TypeError, match=f"`Timer.{former}`: .*today it is `{today}`"):
        subclass(**{former: nothing})
    with pytest.raises(TypeError, match=f"today it is `{today}`"):
        Callback(**{former: nothing})


def test_what_stands_beside_the_bases_of_a_class_reaches_them():
    class Titled:
        def __init_subclass__(cls, title, **kwargs):
            super().__init_subclass__(**kwargs)
            cls.title = title

    class Timer(Callback, Titled, title="a timer"):
        pass

    assert Timer.title == "a timer"


# Built from functions


def test_functions_are_called_with_the_callback():
    got = []
    cb = Callback(before_fit=got.append, after_fit=lambda cb: got.append(cb.model))
    learn = learner(cb)
    learn.fit(1)
    assert got == [cb, learn.model]


def test_a_subclass_may_be_built_from_functions_too():
    got = []
    cb = Plain(before_fit=got.append)
    learner(cb).fit(1)
    assert got == [cb]


@pytest.mark.parametrize("name", ["before_bacth", "zzz", "order", "before_call", "name"])
def test_every_name_that_is_no_event_is_refused(name):
    with pytest.raises(TypeError, match=f"`{name}` is no event"):
        Callback(**{name: nothing})


def test_a_handler_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="`before_fit=3` is no function"):
        Callback(before_fit=3)


# Calling by hand


def test_called_by_hand_it_returns_what_its_handler_returns():
    assert Answers()("before_batch") == "answer"
    assert Answers()("after_fit") == "end"
    assert Answers()("before_fit") is None


def test_called_by_hand_it_heeds_its_switches():
    cb = Answers()
    learn = learner(cb)
    learn.training, cb.run_train = True, False
    assert cb("before_batch") is None and cb("after_fit") == "end"
    learn.training, cb.run_valid = False, True
    assert cb("before_batch") == "answer"
    cb.run_valid = False
    assert cb("before_batch") is None
    cb.run = False
    assert cb("after_fit") is None


def test_called_by_hand_on_no_learner_it_is_as_in_training():
    cb = Answers()
    cb.run_valid = False
    assert cb("before_batch") == "answer"
    cb.run_train = False
    assert cb("before_batch") is None


def test_called_by_hand_a_cleanup_runs_whatever_the_switches_say():
    cb = Callback(cleanup_batch=lambda cb: "clean")
    learner(cb)
    cb.run = cb.run_train = cb.run_valid = False
    assert cb("cleanup_batch") == "clean"


def test_called_by_hand_its_error_is_the_handlers_own():
    error = ValueError("mine")

    class Fails(Callback):
        def before_fit(self):
            raise error

    with pytest.raises(ValueError) as caught:
        Fails()("before_fit")
    assert caught.value is error


# Tasks


def test_by_default_it_is_taken_for_one_that_changes_the_training_and_nothing_outside():
    assert (Callback.reads_only, Callback.acts_outside) == (False, False)


def test_by_default_it_takes_part_in_every_task():
    assert Callback.tasks == TASKS == ("fit", "lr_find", "validate", "predict")


@pytest.mark.parametrize("tasks", ["fit", ("fit",), ("fit", "predict")], ids=str)
def test_it_takes_part_only_in_its_tasks_cleanups_included(tasks):
    heard = Heard()
    heard.tasks = tasks
    learn = learner(heard)
    heard.events.clear()
    learn.validate()
    assert heard.events == []
    learn.fit(1)
    assert heard.events[0] == "before_fit" and heard.events[-1] == "cleanup_fit"


def test_its_tasks_may_leave_out_the_fit():
    heard = Heard()
    heard.tasks = ("validate",)
    learn = learner(heard)
    heard.events.clear()
    learn.fit(1)
    assert heard.events == []
    learn.validate()
    assert heard.events[:2] == ["before_fit", "before_epoch"]


def test_an_unknown_task_is_refused_when_the_class_is_defined():
    with pytest.raises(ValueError, match=r"`Timer.tasks` names \['train'\]; tasks are fit, lr_find, validate, predict"):
        subclass(tasks=("fit", "train"))


def test_where_two_of_a_kind_are_at_work_both_are_named():
    first, second = Answers(), Answers()
    learn = learner([first, Plain()])
    check_alone(Answers, learn, "answer")
    learn.add_cb(second)
    with pytest.raises(ValueError, match=r"^\[Answers, Answers\] would each answer\. Keep one of them\.$"):
        check_alone(Answers, learn, "answer")
    second.run = False
    check_alone(Answers, learn, "answer")


# Name, state, copies


class MixUp(Callback):
    pass


class GradientClipCallback(Callback):
    pass


def test_its_name_is_the_class_name_in_snake_case_without_callback():
    assert MixUp().name == "mix_up"
    assert GradientClipCallback().name == "gradient_clip"
    assert Callback().name == "callback"
    assert Recorder().name == "recorder"


def test_it_is_shown_by_its_class_name():
    assert repr(MixUp()) == "MixUp"


class Counts(Callback):
    _stateattrs = ("count",)


class CountsMore(Counts):
    _stateattrs = ("more", "count")


class CountsOne(Counts):
    _stateattrs = "one"


def test_state_attributes_are_those_of_the_class_and_its_bases_each_once():
    assert state_attributes(CountsMore) == ("count", "more")
    assert state_attributes(CountsOne) == ("count", "one")
    assert state_attributes(Plain) == ()


def test_its_state_is_what_is_named_and_set():
    cb = CountsMore()
    cb.more, cb.other = 2, 3
    assert cb.state_dict() == {"more": 2}
    cb.count = 1
    fresh = CountsMore()
    fresh.load_state_dict(cb.state_dict())
    assert (fresh.count, fresh.more) == (1, 2)


def test_loading_state_never_warns_and_never_delegates():
    cb = Counts()
    learner(cb)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cb.load_state_dict({"count": 3, "epoch": 7})
    assert (cb.count, cb.epoch, cb.learn.epoch) == (3, 7, 0)


def test_it_can_be_copied_and_pickled():
    cb = MixUp()
    cb.alpha = 0.4
    assert copy.deepcopy(cb).alpha == copy.copy(cb).alpha == pickle.loads(pickle.dumps(cb)).alpha == 0.4


def test_a_copy_of_one_built_from_functions_hears_for_itself():
    got = []
    cb = Callback(before_fit=got.append)
    twin = copy.deepcopy(cb)
    twin("before_fit")
    assert got == [twin]


def test_handled_events_are_its_own_and_inherited_ones():
    class Child(Answers):
        before_fit = nothing
        after_fit = None  # switched off

    assert handled_events(Answers()) == {"before_batch", "after_fit"}
    assert handled_events(Child()) == {"before_batch", "before_fit"}
    assert handled_events(Plain(after_step=nothing)) == {"after_step"}


def test_in_a_cell_it_shows_itself_and_not_the_learner():
    class Limit(Callback):
        """Stops at <n>."""

        def __init__(self, n):
            self.n, self.seen = n, []

        def after_batch(self):
            pass

    cb = Limit(3)
    learner(cbs=cb)
    assert cb._repr_html_() == (
        "<table><caption>Limit: Stops at &lt;n&gt;.</caption><tbody><tr><td>hears</td><td>after_batch</td></tr>"
        "<tr><td>order</td><td>0</td></tr><tr><td>n</td><td>3</td></tr></tbody></table>"
    )


def test_of_its_docstring_a_cell_shows_the_first_line():
    class Limit(Callback):
        """Stops at once.

        In the middle of an epoch too.
        """

    assert "<caption>Limit: Stops at once.</caption>" in Limit()._repr_html_()
