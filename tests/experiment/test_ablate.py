"""Ablations: from the arguments to the study, through a file, on executors."""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.testing import toy_learner
from tests.experiment.test_trials import Fails, make_learner

CBS = {"ema": partial(ll.EMA, 0.5), "clip": partial(ll.GradientClip, 0.1)}
FIT = ("fit", 1)


def values(study):
    return {(t.arm, t.seed): t.value for t in study.trials}


def lines(path, kind="trial"):
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == kind]


def test_every_arm_is_trained_with_every_seed():
    found = ll.ablate(make_learner, CBS, FIT, seeds=2)
    assert [(t.arm, t.seed) for t in found.trials] == [
        ("all", 0),
        ("without ema", 0),
        ("without clip", 0),
        ("all", 1),
        ("without ema", 1),
        ("without clip", 1),
    ]
    assert [row.n for row in found.rows] == [2, 2, 2] and found.metric == "valid_loss"


def test_an_arm_comes_to_what_its_callbacks_come_to_by_hand():
    found = values(ll.ablate(make_learner, CBS, FIT, seeds=[7], design="add-one-in"))
    assert found["ema", 7] != found["none", 7]
    with_two = values(ll.ablate(make_learner, {"both": lambda: [make() for make in CBS.values()]}, FIT, seeds=[7]))
    assert with_two["all", 7] == values(ll.ablate(make_learner, CBS, FIT, seeds=[7]))["all", 7]
    assert with_two["without both", 7] == found["none", 7]


def test_an_arm_that_fails_is_named_and_the_others_are_there():
    found = ll.ablate(make_learner, {**CBS, "bad": Fails}, FIT, seeds=2, design="add-one-in")
    assert {t.arm for t in found.failures} == {"bad"} and len(found.failures) == 2
    assert all(values(found)[arm, seed] is not None for arm in ("none", "ema", "clip") for seed in (0, 1))
    assert "bad, seed 1 failed: ZeroDivisionError: of one arm" in str(found)


# The file


class Power:
    """What a metric of this module looks up each time; an earlier call may have ended in the middle."""

    left = 0  # trainings until it fails
    failure = KeyboardInterrupt


def metered(learn):
    Power.left -= 1
    if Power.left < 0:
        raise Power.failure
    return float(learn.final_record[1])


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    path = tmp_path / "study.jsonl"
    monkeypatch.setattr(Power, "left", 4)
    with pytest.raises(KeyboardInterrupt):
        ll.ablate(make_learner, CBS, FIT, 3, metered, path=path)
    assert len(lines(path)) == 4
    Power.left = 5  # so many are left
    found = ll.ablate(make_learner, CBS, FIT, 3, metered, path=path)
    assert values(found) == values(ll.ablate(make_learner, CBS, FIT, 3, "valid_loss"))
    assert values(ll.Study.read(path)) == values(found)
    assert str(ll.Study.read(path)) == str(found)


def test_a_finished_study_trains_nothing_and_writes_nothing(tmp_path):
    path = tmp_path / "study.jsonl"
    first = ll.ablate(make_learner, CBS, FIT, 2, path=path)
    before = path.read_bytes()
    assert values(ll.ablate(make_learner, CBS, FIT, 2, path=path)) == values(first)
    assert path.read_bytes() == before


def test_seeds_and_callbacks_may_be_added(tmp_path):
    path = tmp_path / "study.jsonl"
    add = partial(ll.ablate, make_learner, fit=FIT, design="add-one-in", path=path)
    add({"ema": CBS["ema"]}, seeds=2)
    found = add(CBS, seeds=3)
    assert len(lines(path)) == 4 + 5
    assert len(found.trials) == 9
    assert len(add({"ema": CBS["ema"]}, seeds=1).trials) == 2


def test_a_damaged_last_line_is_trained_again(tmp_path):
    path = tmp_path / "study.jsonl"
    first = ll.ablate(make_learner, CBS, FIT, 1, path=path)
    path.write_bytes(path.read_bytes()[:-20])
    assert len(ll.Study.read(path).trials) == 2
    assert values(ll.ablate(make_learner, CBS, FIT, 1, path=path)) == values(first)


def test_what_failed_is_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "study.jsonl"
    monkeypatch.setattr(Power, "failure", OSError)
    monkeypatch.setattr(Power, "left", 1)
    assert len(ll.ablate(make_learner, CBS, FIT, 1, metered, path=path).failures) == 2
    Power.left = 2
    assert ll.ablate(make_learner, CBS, FIT, 1, metered, path=path).failures == []
    assert len(lines(path)) == 3 + 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fit": ("fit", 2)}, "fit"),
        ({"cbs": {**CBS, "ema": partial(ll.EMA, 0.9)}}, r"`cbs\['ema'\]`"),
        ({"metric": "train_loss"}, "metric"),
        ({"make_learner": toy_learner}, "make_learner"),
    ],
)
def test_another_configuration_is_refused_with_what_changed(tmp_path, change, named):
    call = {"make_learner": make_learner, "cbs": CBS, "fit": FIT, "seeds": 1, "path": tmp_path / "study.jsonl"}
    ll.ablate(**call)
    before = call["path"].read_bytes()
    with pytest.raises(ValueError, match=rf"with another configuration: {named} changed since. Take another `path`"):
        ll.ablate(**{**call, **change})
    assert call["path"].read_bytes() == before


def test_a_file_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"is a file that no study has written\. Take another name"):
        ll.ablate(make_learner, CBS, FIT, 1, path=tmp_path / "data.csv")
    assert (tmp_path / "data.csv").read_text() == "a,b\n"


def test_a_study_that_was_killed_in_its_first_line_begins_anew(tmp_path):
    (tmp_path / "study.jsonl").write_text('{"kind": "stu')
    assert len(ll.ablate(make_learner, CBS, FIT, 1, path=tmp_path / "study.jsonl").trials) == 3


def test_processes_write_the_same_file(tmp_path):
    with ProcessPoolExecutor(2) as executor:
        found = ll.ablate(make_learner, CBS, FIT, 2, executor=executor, path=tmp_path / "study.jsonl")
    assert values(found) == values(ll.ablate(make_learner, CBS, FIT, 2))
    assert values(ll.Study.read(tmp_path / "study.jsonl")) == values(found)


# Wrong arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cbs": [ll.EMA]}, TypeError, "`cbs` is a list; pass names and what makes them"),
        ({"cbs": {"ema": ll.EMA()}}, TypeError, r"`cbs\['ema'\]=EMA` makes no callback: each training needs a new one"),
        ({"fit": 3}, TypeError, "`fit=3`: pass a function of"),
        ({"fit": ("fit_onecycle", 3)}, ValueError, "a Learner has no `fit_onecycle`. Did you mean `fit_one_cycle`?"),
        ({"seeds": 0}, ValueError, "`seeds=0`: pass how many, or several numbers"),
        ({"design": "all"}, ValueError, "`design='all'`: pass 'add-one-in'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_trained(change, error, message):
    call = {"make_learner": pytest.fail, "cbs": CBS, "fit": FIT, **change}
    with pytest.raises(error, match=message):
        ll.ablate(**call)


def test_a_lambda_is_refused_where_it_would_have_to_go_to_another_process():
    with ProcessPoolExecutor(1) as executor, pytest.raises(TypeError, match=r"`cbs\['ema'\]` cannot be sent"):
        ll.ablate(make_learner, {"ema": lambda: ll.EMA()}, FIT, executor=executor)


# What the intervals promise


EFFECT, NOISE, BETWEEN_SEEDS = 0.3, 0.2, 1.0


class Scored(nn.Module):
    """A model with a score that its initialisation draws, far apart from seed to seed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.score = BETWEEN_SEEDS * torch.randn(()).item()

    def forward(self, x):
        return self.layer(x)


class Planted(ll.Callback):
    """Is worth `EFFECT`, give or take what differs from training to training."""

    def after_fit(self):
        self.model.score += EFFECT + NOISE * torch.randn(()).item()


def scored_learner():
    return toy_learner(n_train=2, n_valid=0, bs=2, model=Scored())


def coverage(n_studies, n_seeds=5):
    """How many simulated studies have an interval that covers the planted effect, and how many covers 0."""
    with_effect = covers_zero = 0
    for i in range(n_studies):
        seeds = range(n_seeds * i, n_seeds * (i + 1))
        no_epoch = ("fit", 0)  # the score is in the model from the beginning
        study = ll.ablate(
            scored_learner, {"planted": Planted}, no_epoch, seeds, lambda learn: learn.model.score, "add-one-in"
        )
        d = study.rows[1].difference
        with_effect += d.low <= EFFECT <= d.high
        covers_zero += d.is_noise
    return with_effect, covers_zero


def test_the_interval_covers_a_planted_effect_in_at_least_90_of_100_studies():
    with_effect, covers_zero = coverage(100)
    assert with_effect >= 90
    assert covers_zero < 50  # the effect is smaller than the spread between seeds, and seen all the same


@pytest.mark.slow
def test_the_interval_covers_a_planted_effect_in_95_of_100_studies():
    covered = coverage(1000)[0]
    assert covered == pytest.approx(950, abs=3 * math.sqrt(1000 * 0.95 * 0.05))
