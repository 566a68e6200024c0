"""What a study shows."""

import json
import math

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import learnloop as ll
from learnloop.experiment.designs import design_of
from learnloop.experiment.study import Study
from learnloop.experiment.trials import Trial


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def study(design="add-one-in", cbs=("a", "b"), **values):
    """Of values per arm, one per seed; None is a failure."""
    trials = [
        Trial(arm.replace("_", " "), seed, v, {"epoch": 0, "accuracy": v}, error=None if v is not None else "broke")
        for arm, of_arm in values.items()
        for seed, v in enumerate(of_arm)
    ]
    return Study(design_of(design, list(cbs)), trials)


PLAIN = study(none=[0.5, 0.6, 0.7], a=[0.6, 0.71, 0.8], b=[0.5, 0.59, 0.72])


def test_a_row_has_mean_spread_and_the_paired_difference():
    none, a, _ = PLAIN.rows
    assert none[:4] == ("none", 3, pytest.approx(0.6), pytest.approx(0.1)) and none.difference is None
    assert a.difference.mean == pytest.approx(0.31 / 3)
    # t of 2 degrees, 4.3027, times the standard error of 0.1, 0.11, 0.1
    assert a.difference.high - a.difference.mean == pytest.approx(4.3026527 * math.sqrt(3.33333e-5 / 3), rel=1e-4)


def test_it_is_a_table_that_says_what_may_be_noise():
    assert str(PLAIN).splitlines() == [
        "accuracy, add-one-in, differences to 'none'",
        "arm   n  mean    spread  difference  interval",
        "none  3  0.6     0.1",
        "a     3  0.7033  0.1002  +0.103      +0.089 to +0.118",
        "b     3  0.6033  0.1106  +0.00333    -0.0346 to +0.0413  may be noise",
    ]
    assert "<td>+0.089 to +0.118</td>" in PLAIN._repr_html_()


def test_only_seeds_that_both_arms_have_are_compared():
    found = study(none=[0.5, None, 0.7], a=[0.6, 0.9, 0.8], b=[None, None, None])
    assert found.rows[1].n == 3 and found.rows[1].difference.n == 2
    assert found.rows[2][1:] == (0, None, None, None)


def test_failures_are_named_below_the_table_and_escaped_in_a_cell():
    found = study(none=[0.5], a=[None])
    found.trials[1] = Trial("a", 0, error="ValueError: <b>")
    assert str(found).splitlines()[-1] == "a, seed 0 failed: ValueError: <b>"
    assert "failed: ValueError: &lt;b&gt;" in found._repr_html_()
    assert [t.arm for t in found.failures] == ["a"]


def test_the_interaction_of_a_pair_is_what_it_does_beyond_the_sum():
    found = study("pairs", none=[1.0, 2.0], a=[2.0, 3.0], b=[4.0, 5.1], **{"a + b": [10.0, 11.0]})
    (pair,) = found.interactions
    # (10 - 2) - (4 - 1) = 5 and (11 - 3) - (5.1 - 2) = 4.9
    assert pair == "a + b" and found.interactions[pair].mean == pytest.approx(4.95)
    assert "a + b: +4.95 more than the sum of both" in str(found)
    assert PLAIN.interactions == {}


def test_the_picture_has_an_interval_and_a_dot_per_seed_for_each_arm():
    (ax,) = PLAIN.plot().axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_xlabel() == "accuracy, difference to 'none'"
    intervals = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_ls() == "-"]
    assert list(intervals[0]) == [PLAIN.rows[1].difference.low, PLAIN.rows[1].difference.high]
    dots = [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "."]
    assert dots[0] == pytest.approx([0.1, 0.11, 0.1])


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="there is no arm to compare"):
        study(none=[None], a=[0.5]).plot()


def test_it_is_a_frame_too():
    pytest.importorskip("pandas")
    assert list(PLAIN.to_frame()["arm"]) == ["none", "a", "b"] * 3


def test_a_file_without_a_study_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"kind": "run"}))
    with pytest.raises(ValueError, match=r"holds no study: `ablate\(…, path=…\)` writes one"):
        ll.Study.read(path)
