"""Schedules as functions of progress. Numbers marked fastai were printed by fastai 2.8.12."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnloop.optim.schedules import (
    SchedCos,
    SchedExp,
    SchedLin,
    SchedNo,
    SchedPoly,
    annealer,
    combine_scheds,
    combined_cos,
    even_mults,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
)

GRID = [i / 8 for i in range(9)]


@annealer
def SchedJump(start, end, pos):
    return start if pos < 0.5 else end


# fastai's numbers, from 0.2 to 2
@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (SchedLin(0.2, 2.0), [0.2, 0.425, 0.65, 0.875, 1.1, 1.325, 1.55, 1.775, 2.0]),
        (
            SchedCos(0.2, 2.0),
            [0.2, 0.268508421, 0.463603897, 0.755584911, 1.1, 1.444415089, 1.736396103, 1.931491579, 2.0],
        ),
        (SchedNo(0.2, 2.0), [0.2] * 9),
        (
            SchedExp(0.2, 2.0),
            [0.2, 0.266704286, 0.355655882, 0.474274741, 0.632455532, 0.843393007, 1.12468265, 1.499788419, 2.0],
        ),
        (SchedPoly(0.2, 2.0, 2), [0.2, 0.228125, 0.3125, 0.453125, 0.65, 0.903125, 1.2125, 1.578125, 2.0]),
    ],
    ids=repr,
)
def test_a_curve_has_the_numbers_of_fastai(schedule, values):
    assert [schedule(pos) for pos in GRID] == pytest.approx(values, abs=1e-9)


def test_one_cycle_has_the_numbers_of_fastai():
    values = [0.1, 0.55, 1.0, 0.9336826, 0.7525, 0.505, 0.2575, 0.0763174, 0.01]
    assert [combined_cos(0.25, 0.1, 1.0, 0.01)(pos) for pos in GRID] == pytest.approx(values, abs=1e-7)


def test_the_functions_take_start_end_and_progress():
    values = [f(3.0, 0.1, 0.5) for f in (sched_lin, sched_cos, sched_no, sched_exp)]
    assert values == pytest.approx([1.55, 1.55, 3.0, 0.5477226])


@given(st.floats(1e-8, 1e3), st.floats(1e-8, 1e3))
def test_curves_begin_and_end_exactly(start, end):
    for schedule in (SchedLin(start, end), SchedCos(start, end), SchedExp(start, end), SchedPoly(start, end, 3)):
        assert (schedule(0.0), schedule(1.0)) == (start, end)


@given(st.floats(1e-8, 1e3), st.floats(0, 1))
def test_equal_ends_give_a_constant(value, pos):
    assert SchedLin(value, value)(pos) == SchedCos(value, value)(pos) == value


@pytest.mark.parametrize("made_by", [SchedLin, SchedCos, SchedExp])
def test_ends_may_be_arrays_with_one_value_per_group(made_by):
    start, end = np.array([0.1, 1.0]), np.array([1.0, 10.0])
    middle = made_by(start, end)(0.25)
    assert middle.tolist() == pytest.approx([made_by(0.1, 1.0)(0.25), made_by(1.0, 10.0)(0.25)])
    assert made_by(start, end)(1.0).tolist() == [1.0, 10.0]


def test_annealer_makes_a_schedule_of_a_curve():
    assert [SchedJump(1.0, 9.0)(pos) for pos in (0, 0.4, 0.5, 1)] == [1.0, 1.0, 9.0, 9.0]


def test_a_schedule_shows_how_it_was_made():
    assert repr(combine_scheds([0.5, 0.5], [SchedPoly(0, 1, 2), SchedJump(1, 2)])) == (
        "combine_scheds([0.5, 0.5], [SchedPoly(0, 1, 2), SchedJump(1, 2)])"
    )


def test_schedules_can_be_pickled():
    schedule = combine_scheds([0.25, 0.75], [SchedJump(0.0, 1.0), SchedCos(1.0, 0.0)])
    again = pickle.loads(pickle.dumps(schedule))
    assert [again(pos) for pos in GRID] == [schedule(pos) for pos in GRID]


def test_at_a_join_the_later_schedule_holds():
    schedule = combine_scheds([0.5, 0.5], [SchedLin(0.0, 1.0), SchedLin(5.0, 6.0)])
    assert [schedule(pos) for pos in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.5, 5.0, 5.5, 6.0]


def test_the_end_of_a_combination_is_the_end_of_its_last_schedule():
    assert combine_scheds([0.1] * 10, [SchedLin(0.0, 0.3)] * 10)(1.0) == 0.3
    assert combine_scheds([1.0, 0.0], [SchedLin(0.0, 1.0), SchedLin(7.0, 8.0)])(1.0) == 8.0


def test_a_combination_computes_in_double_precision():
    schedule = combine_scheds([0.3, 0.7], [SchedLin(0.0, 1.0), SchedLin(0.0, 1.0)])
    assert schedule(0.3 + 7e-9) == pytest.approx(1e-8, rel=1e-6)


def test_parts_may_miss_one_by_a_rounding_error():
    assert sum([0.7, 0.2, 0.1]) != 1
    assert combine_scheds([0.7, 0.2, 0.1], [SchedNo(1, 1), SchedNo(2, 2), SchedNo(3, 3)])(0.95) == 3


@pytest.mark.parametrize("pcts", [[0.3, 0.3], [-0.5, 1.5], [0.5, float("nan")], [1.0]])
def test_parts_that_do_not_fit_are_named(pcts):
    with pytest.raises(ValueError, match=r"combine_scheds got .*\[") as error:
        combine_scheds(pcts, [SchedLin(0, 1), SchedLin(1, 0)])
    assert str(pcts) in str(error.value)


def test_even_mults_go_by_equal_factors_and_end_exactly():
    assert even_mults(1e-4, 1e-1, 4) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert even_mults(1e-4, 0.3, 4)[-1] == 0.3
    assert even_mults(1e-4, 0.3, 1) == 0.3


def test_even_mults_from_zero_are_refused():
    with pytest.raises(ValueError, match="no factor leads"):
        even_mults(0, 1.0, 3)
