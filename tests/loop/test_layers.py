"""Functions around a step of a learner's loop."""

from learnloop.loop.layers import put_around, take_away
from tests.toys import learner


def naming(calls, name):
    def layer(inner):
        calls.append(f"{name} begins")
        inner()
        calls.append(f"{name} ends")

    return layer


def test_a_layer_runs_where_the_step_would_and_the_last_one_is_outermost():
    calls, learn = [], learner()
    put_around(learn, "_step", naming(calls, "first"))
    put_around(learn, "_step", naming(calls, "second"))
    learn.fit(1)
    assert calls == ["second begins", "first begins", "first ends", "second ends"] * 2
    assert learn.opt_iter == 2


def test_a_layer_may_leave_the_step_out():
    learn = learner()
    put_around(learn, "_step", lambda inner: None)
    learn.fit(1)
    assert learn.opt_iter == 0


def test_layers_are_taken_away_in_any_order_and_leave_nothing():
    calls, learn = [], learner()
    first, second = naming(calls, "first"), naming(calls, "second")
    put_around(learn, "_step", first)
    put_around(learn, "_step", second)
    take_away(learn, "_step", first)
    learn.fit(1)
    assert calls == ["second begins", "second ends"] * 2
    take_away(learn, "_step", second)
    assert "_step" not in vars(learn)


def test_taking_away_what_is_not_there_does_nothing():
    learn = learner()
    take_away(learn, "_step", print)
    learn.fit(1)
    assert learn.opt_iter == 2
