"""One order of callbacks from wishes and laws."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnloop import Callback, OrderingError, Recorder
from learnloop.loop.events import EVENTS
from learnloop.loop.ordering import in_order, in_places, laws_of
from tests.toys import learner


class A(Callback):
    order = 1


class B(Callback):
    order = 2


class C(Callback):
    order = 3


class D(Callback):
    order = 4


def made(name, *bases, **attributes):
    """An instance of a new class of that name."""
    return type(name, bases or (Callback,), attributes)()


def names(cbs):
    return " ".join(type(cb).__name__ for cb in in_order(cbs))


#: Of classes whose instances compare equal to every callback.
EQUAL = {"__eq__": lambda self, other: isinstance(other, Callback), "__hash__": Callback.__hash__}


# Wishes


def test_callbacks_run_by_order():
    assert names([C(), A(), B()]) == "A B C"


def test_order_may_be_any_number():
    assert names([made("Half", order=1.5), B(), A(), made("Minus", order=-3)]) == "Minus A Half B"


def test_ties_run_as_added():
    first, second, third = A(), A(), A()
    assert in_order([second, first, third]) == [second, first, third]


def test_the_given_list_is_left_alone():
    cbs = [B(), A()]
    in_order(cbs)
    assert [type(cb) for cb in cbs] == [B, A]


# Laws


def test_a_law_that_already_holds_moves_nothing():
    early = made("Early", order=0, run_before=C)
    late = made("Late", order=9, run_after=A)
    assert names([late, D(), C(), B(), A(), early]) == "Early A B C D Late"


def test_who_declares_run_before_moves_directly_before_its_target():
    assert names([A(), B(), C(), D(), made("Mover", order=9, run_before=C)]) == "A B Mover C D"


def test_who_declares_run_after_moves_directly_after_its_target():
    assert names([A(), B(), C(), D(), made("Mover", order=0, run_after=B)]) == "A B Mover C D"


def test_run_before_several_moves_before_the_first_of_them():
    assert names([A(), B(), C(), D(), made("Mover", order=9, run_before=(D, B))]) == "A Mover B C D"


def test_run_after_several_moves_after_the_last_of_them():
    assert names([A(), B(), C(), D(), made("Mover", order=0, run_after=(A, C))]) == "A B C Mover D"


def test_run_before_a_class_with_several_instances_moves_before_the_first():
    assert names([A(), B(), B(), made("Mover", order=9, run_before=B)]) == "A Mover B B"


@pytest.mark.parametrize("law", ["run_before", "run_after"])
def test_several_at_one_target_keep_their_order_among_themselves(law):
    order = 9 if law == "run_before" else 0
    movers = [made(name, order=order, **{law: B}) for name in ("M", "N", "O")]
    middle = {"run_before": "A M N O B C", "run_after": "A B M N O C"}[law]
    assert names([*movers, A(), B(), C()]) == middle
    assert names([A(), B(), C(), *movers]) == middle


def test_several_at_one_target_are_sorted_by_their_own_order():
    movers = [made("Late", order=9, run_before=B), made("Soon", order=8, run_before=B)]
    assert names([A(), B(), *movers]) == "A Soon Late B"


def test_what_a_law_names_stays_where_order_puts_it():
    a, b, c, d = A(), B(), C(), D()
    before, after = made("Before", order=9, run_before=B), made("After", order=0, run_after=C)
    ordered = in_order([before, after, a, b, c, d])
    assert [cb for cb in ordered if cb not in (before, after)] == [a, b, c, d]


def test_what_a_law_names_is_moved_by_laws_of_its_own():
    target = made("Target", order=5, run_before=A)
    mover = made("Mover", order=9, run_before=type(target))
    assert names([mover, A(), B(), target]) == "Mover Target A B"
    assert names([target, B(), A(), mover]) == "Mover Target A B"


def test_a_chain_of_laws_follows_the_one_it_ends_in():
    first = made("First", order=9, run_before=B)
    second = made("Second", order=0, run_after=type(first))
    third = made("Third", order=0, run_after=type(second))
    for cbs in itertools.permutations([first, second, third, A(), B()]):
        assert names(cbs) == "A First Second Third B"


def test_who_moves_before_one_that_moved_stands_directly_before_it():
    moved = made("Moved", order=2, run_before=A), made("Other", order=3, run_before=A)
    assert names([A(), *moved, made("Mover", order=4, run_before="Moved")]) == "Mover Moved Other A"


def test_who_moves_after_one_that_moved_stands_directly_after_it():
    moved = made("Moved", order=0, run_after=D), made("Other", order=1, run_after=D)
    assert names([D(), *moved, made("Mover", order=2, run_after="Moved")]) == "D Moved Mover Other"


def test_a_law_holds_for_callbacks_that_compare_equal_too():
    assert names([made("One", **EQUAL), made("Two", run_before="One", **EQUAL)]) == "Two One"


def test_a_law_moves_nobody_who_compares_equal_to_the_one_that_declares_it():
    first, last = made("First", order=0, run_before="Second", **EQUAL), made("Third", order=2, **EQUAL)
    assert names([first, made("Second", order=1, **EQUAL), last]) == "First Second Third"


def test_one_that_declares_both_laws_stands_between():
    assert names([A(), B(), C(), D(), made("Mover", order=9, run_after=B, run_before=C)]) == "A B Mover C D"
    assert names([A(), B(), C(), D(), made("Mover", order=0, run_after=B, run_before=D)]) == "A B Mover C D"


def test_where_both_laws_of_one_leave_no_place_between_the_laws_win_over_order():
    late = made("Late", order=9)
    mover = made("Mover", order=5, run_before=A, run_after=type(late))
    for cbs in itertools.permutations([A(), B(), mover, late]):
        ordered = names(cbs).split()
        assert ordered.index("Late") < ordered.index("Mover") < ordered.index("A")


# Who is named by a law


@pytest.mark.parametrize("target", [A, "A", "a", (A,), ["A"], ("Absent", A), {A}], ids=str)
def test_targets_are_classes_or_names_alone_or_several(target):
    assert names([made("Mover", order=0, run_after=target), B(), A()]) == "A Mover B"


@pytest.mark.parametrize("law", [None, (), "Absent", ("Absent", D)], ids=str)
def test_a_law_about_an_absent_class_is_void(law):
    assert names([B(), A(), made("Mover", order=0, run_after=law)]) == "Mover A B"


@pytest.mark.parametrize("by", ["class", "name"])
def test_subclasses_count(by):
    child = made("Child", A, order=5)
    mover = made("Mover", order=0, run_after=A if by == "class" else "A")
    assert names([mover, child, B()]) == "B Child Mover"


def test_a_law_is_inherited():
    parent = type("Parent", (Callback,), {"order": 0, "run_after": B})
    assert names([made("Child", parent), A(), B(), C()]) == "A B Child C"


def test_a_law_never_binds_two_instances_of_the_class_that_declares_it():
    cls = type("Both", (Callback,), {"order": 5, "run_before": Callback})
    first, second = cls(), cls()
    assert in_order([first, A(), second])[:2] == [first, second]


def test_a_law_never_binds_the_declaring_class_and_its_subclass():
    cls = type("Parent", (Callback,), {"order": 5, "run_before": Callback})
    parent, child = cls(), made("Child", cls)
    assert in_order([A(), parent, child])[:2] == [parent, child]
    assert in_order([A(), child, parent])[:2] == [child, parent]


def test_a_law_may_be_set_on_an_instance():
    mover = A()
    mover.run_after = C
    assert names([mover, A(), B(), C(), D()]) == "A B C A D"


def test_laws_of_says_whom_a_callback_binds():
    mover, a, b = made("Mover", run_before=(A, "b")), A(), B()
    assert [(law.first, law.second, str(law)) for law in laws_of(mover, [a, b, mover])] == [
        (mover, a, "Mover.run_before = A"),
        (mover, b, "Mover.run_before = b"),
    ]


# Circles


class Clip(Callback):
    pass


class Scale(Callback):
    run_after = Clip
    run_before = Clip


class Early(Callback):
    order = 1
    run_after = "Late"


class Late(Callback):
    order = 2
    run_after = Early


def test_a_circle_names_every_edge_and_the_attribute_that_made_it():
    with pytest.raises(OrderingError) as caught:
        in_order([Clip(), A(), Scale()])
    assert str(caught.value) == (
        "these callbacks each want to run before the next, in a circle: "
        "Clip → Scale (Scale.run_after = Clip) → Clip (Scale.run_before = Clip). Remove one of these rules."
    )


def test_a_circle_of_two_that_each_want_to_be_last():
    with pytest.raises(OrderingError) as caught:
        in_order([Late(), Early()])
    assert str(caught.value).endswith(
        "in a circle: Late → Early (Early.run_after = Late) → Late (Late.run_after = Early). Remove one of these rules."
    )


def test_a_circle_of_three_names_all_three_edges_and_nobody_outside():
    one = made("One", run_before="Two")
    two = made("Two", run_before="Three")
    three = made("Three", run_before="One")
    waiting = made("Waiting", run_after="One")
    with pytest.raises(OrderingError) as caught:
        in_order([waiting, one, A(), two, three])
    text = str(caught.value)
    for edge in ("Two (One.run_before = Two)", "Three (Two.run_before = Three)", "One (Three.run_before = One)"):
        assert f" → {edge}" in text
    assert "Waiting" not in text


@pytest.mark.parametrize("law", [(), "One"], ids=["free", "bound"])
def test_a_circle_of_callbacks_that_compare_equal_names_those_that_make_it(law):
    outside = made("Outside", order=0, run_before=law, **EQUAL)
    one = made("One", order=1, run_before="Two", **EQUAL)
    two = made("Two", order=2, run_before="One", **EQUAL)
    with pytest.raises(OrderingError) as caught:
        in_order([outside, one, two])
    assert "in a circle: One → Two (One.run_before = Two) → One (Two.run_before = One). " in str(caught.value)


def test_an_ordering_error_is_a_value_error():
    assert issubclass(OrderingError, ValueError)


def state_of(learn):
    return list(learn.cbs), {n: list(map(repr, learn.ordered_cbs(n))) for n in EVENTS}, sorted(vars(learn))


@pytest.mark.parametrize("add", ["add_cb", "add_cbs", "added_cbs", "fit"])
def test_a_circle_leaves_the_learner_as_it_was(add):
    learn = learner([Clip(), A()])
    before, scale = state_of(learn), Scale()
    with pytest.raises(OrderingError):
        if add == "added_cbs":
            with learn.added_cbs([B(), scale]):
                raise AssertionError("never entered")
        elif add == "fit":
            learn.fit(1, cbs=[B(), scale])
        else:
            getattr(learn, add)(scale if add == "add_cb" else [B(), scale])
    assert state_of(learn)[:2] == before[:2]
    assert scale.learn is None
    assert not hasattr(learn, "scale") and not hasattr(learn, "b")
    learn.fit(1)


@pytest.mark.parametrize("attribute", ["run_before", "run_after"])
def test_a_circle_made_on_an_instance_leaves_the_learner_as_it_was(attribute):
    heard = []
    a, b = A(before_fit=lambda cb: heard.append("a")), B(before_fit=lambda cb: heard.append("b"))
    learn = learner([a, b])
    setattr(b, attribute, A)
    before, heard_before = state_of(learn), {"run_before": ["b", "a"], "run_after": ["a", "b"]}[attribute]
    with pytest.raises(OrderingError, match="in a circle"):
        setattr(a, attribute, B)
    assert state_of(learn) == before
    assert getattr(a, attribute) == () and attribute not in vars(a)
    learn.fit(1)
    assert heard == heard_before


def test_a_circle_made_by_a_second_value_leaves_the_first_one():
    a, b = A(), B(before_fit=print)
    learner([a, b, C()])
    a.run_after = C
    b.run_after = A
    with pytest.raises(OrderingError):
        a.run_after = B
    assert a.run_after is C


def test_a_circle_made_by_deleting_leaves_the_learner_as_it_was():
    a, b = A(), made("Last", run_after=A)
    learn = learner([a, b])
    b.run_after = ()
    a.run_after = "Last"
    before = state_of(learn)
    with pytest.raises(OrderingError):
        del b.run_after
    assert b.run_after == ()
    assert state_of(learn) == before


# On a learner


class First(Callback):
    order = 1


class Second(Callback):
    order = 2


def test_the_order_is_the_same_for_every_event_and_reversed_for_cleanups():
    heard = []

    def numbered(i):
        return Callback(**{n: lambda cb, n=n: heard.append((n, i)) for n in EVENTS})

    cbs = [numbered(i) for i in range(3)]
    cbs[0].order = 5
    learner(cbs).fit(1)
    in_turn = {n: [i for name, i in heard if name == n] for n in EVENTS}
    for name, numbers in in_turn.items():
        if name.startswith("after_cancel_") or name == "after_create":
            continue
        once = [0, 2, 1] if name.startswith("cleanup_") else [1, 2, 0]
        assert numbers == once * (len(numbers) // 3), name


def test_ordered_cbs_lists_who_hears_an_event_in_its_order():
    late, soon = Callback(before_fit=print, cleanup_fit=print), Callback(before_fit=print, cleanup_fit=print)
    late.order = 7
    deaf = A()
    learn = learner([late, deaf, soon])
    assert list(learn.ordered_cbs("before_fit")) == [soon, late]
    assert list(learn.ordered_cbs("cleanup_fit")) == [late, soon]
    assert list(learn.ordered_cbs("after_fit")) == []


def test_a_law_about_a_callback_of_the_library_holds():
    mover = made("Mover", order=0, run_after=Recorder, after_batch=lambda self: None)
    learn = learner(mover, default_cbs=True)
    ordered = list(learn.ordered_cbs("after_batch"))
    assert ordered.index(mover) == ordered.index(learn.recorder) + 1


# For any callbacks


@st.composite
def callback_lists(draw):
    """Up to six callbacks of classes P0…P5 with laws about one another."""
    n = draw(st.integers(1, 6))
    cbs = []
    for i in range(n):
        targets = st.lists(st.sampled_from([f"P{j}" for j in range(n)]), max_size=2)
        attributes = {"order": draw(st.integers(0, 3))}
        if draw(st.booleans()):
            attributes["run_before"] = tuple(draw(targets))
        if draw(st.booleans()):
            attributes["run_after"] = tuple(draw(targets))
        cbs.append(made(f"P{i}", **attributes))
    return cbs


@settings(max_examples=150, deadline=None)
@given(callback_lists())
def test_an_order_keeps_every_law_and_exists_unless_there_is_a_circle(cbs):
    edges = [(law.first, law.second) for cb in cbs for law in laws_of(cb, cbs)]
    try:
        ordered = in_order(cbs)
    except OrderingError:
        assert has_circle(cbs, edges)
        return
    assert not has_circle(cbs, edges)
    assert sorted(map(id, ordered)) == sorted(map(id, cbs))
    assert all(ordered.index(first) < ordered.index(second) for first, second in edges)
    by_wish = sorted(cbs, key=lambda cb: cb.order)
    if all(by_wish.index(first) < by_wish.index(second) for first, second in edges):
        assert ordered == by_wish


def has_circle(cbs, edges):
    left = list(cbs)
    while left:
        free = [cb for cb in left if not any(second is cb and first in left for first, second in edges)]
        if not free:
            return True
        left = [cb for cb in left if cb not in free]
    return False


# Reasons


def reasons(cbs):
    """`Class: why` for each place."""
    return [f"{type(placed.cb).__name__}: {placed}" for placed in in_places(cbs)]


def test_where_no_law_moves_anybody_order_is_the_reason():
    Kept = made("Kept", order=2.5, run_after=B)
    assert reasons([Kept, A(), B()]) == ["A: order 1", "B: order 2", "Kept: order 2.5"]


def test_who_is_moved_by_a_law_has_it_as_the_reason():
    first, last = made("First", order=9, run_before="A"), made("Last", order=0, run_after=(A, B))
    assert reasons([first, last, A(), B()]) == [
        "First: First.run_before = A",
        "A: order 1",
        "B: order 2",
        "Last: Last.run_after = B",
    ]


def test_who_has_to_wait_for_one_that_was_moved_has_that_law_as_the_reason():
    moved, waits = made("Moved", order=0, run_after=C), made("Waits", order=1, run_after="Moved")
    assert reasons([moved, waits, C()]) == [
        "C: order 3",
        "Moved: Moved.run_after = C",
        "Waits: Waits.run_after = Moved",
    ]


def test_who_moves_itself_has_its_own_law_as_the_reason_also_before_one_that_moves_before_it():
    behind, before = made("Behind", order=0, run_after=A), made("Before", order=9, run_before="Behind")
    assert reasons([behind, A(), before]) == [
        "A: order 1",
        "Before: Before.run_before = Behind",
        "Behind: Behind.run_after = A",
    ]


def test_who_does_not_move_has_order_as_the_reason_also_beside_one_that_compares_equal():
    assert reasons([made("One", order=1, **EQUAL), made("Two", order=2, run_before="One", **EQUAL)]) == [
        "Two: Two.run_before = One",
        "One: order 1",
    ]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_of_those_that_it_waits_for_the_last_is_the_reason(n):
    movers = [made(f"Mover{i}", order=9 + i, run_before=A, run_after=B) for i in range(1, n + 1)]
    assert reasons([A(), B(), *movers]) == [
        "B: order 2",
        *(f"Mover{i}: Mover{i}.run_after = B" for i in range(1, n + 1)),
        f"A: Mover{n}.run_before = A",
    ]


def test_who_compares_equal_to_one_that_waits_has_a_reason_of_its_own():
    mover, last = made("Mover", order=9, run_before=A, run_after=B), made("Last", order=20, **EQUAL)
    assert reasons([A(), B(), mover, last]) == [
        "B: order 2",
        "Mover: Mover.run_after = B",
        "A: Mover.run_before = A",
        "Last: order 20",
    ]


def test_a_circle_is_refused_there_too():
    with pytest.raises(OrderingError):
        in_places([made("X", run_before="Y"), made("Y", run_before="X")])


def test_a_place_knows_the_laws_that_bind_its_callback():
    a, b = A(), made("After", run_after=A)
    assert [[str(law) for law in placed.laws] for placed in in_places([a, b, C()])] == [
        ["After.run_after = A"],
        ["After.run_after = A"],
        [],
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "before", "after"]), st.integers(0, 5)), max_size=6))
def test_places_are_those_of_the_order(drawn):
    cbs = [
        made(f"K{i}", order=order, **({f"run_{law}": f"K{target}"} if law and target != i else {}))
        for i, (order, law, target) in enumerate(drawn)
    ]
    try:
        expected = in_order(cbs)
    except OrderingError:
        return
    assert [placed.cb for placed in in_places(cbs)] == expected
