"""Scenes of a check: something is raised in each of them, in the right place."""

from contextlib import suppress
from functools import partial

import learnloop as ll
from learnloop.checks.scenes import HEARD, heard_by, scenes
from learnloop.testing import EventLog, toy_learner


def test_in_every_scene_something_is_raised_in_the_right_place():
    learn = toy_learner(n_train=16, n_valid=8)
    for scene in scenes():
        probes = scene.probes()
        run = partial(learn.fit, 2) if scene.run == "fit" else learn.validate
        with suppress(Exception):
            run(cbs=probes)
        assert [probe.left for probe in probes if probe.left > 0] == [], str(scene)


def test_a_side_is_told_only_where_the_event_is_heard():
    both = [(s.event, s.order) for s in scenes({"after_loss"}) if s.run == "fit" and s.training]
    assert {order for event, order in both if event == "after_loss"} == {float("-inf"), float("inf")}
    assert {order for event, order in both if event != "after_loss"} == {float("inf")}


def test_what_is_heard_is_what_has_a_handler_and_everything_for_one_with_a_call_of_its_own():
    assert heard_by([ll.GradientClip(), ll.SkipToEpoch(1)]) >= {"before_step", "before_epoch"}
    assert "after_loss" not in heard_by([ll.GradientClip(), ll.SkipToEpoch(1)])
    assert heard_by([EventLog()]) == {*HEARD}
