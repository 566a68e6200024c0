"""One training of a study, and many of them on executors."""

import random
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.experiment.trials import Recipe, Trial, check_picklable, run_trial, run_trials
from learnloop.testing import toy_learner


def make_learner():
    """Weights drawn anew from the global generator, data shuffled by a seed drawn per fit."""
    learn = toy_learner(model=nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)))
    learn.dls.seed = None
    return learn


class Draws(ll.Callback):
    """Moves every global generator in each batch, as augmentation does."""

    def before_batch(self):
        torch.rand(3), np.random.rand(), random.random()


class KeepsBatches(ll.Callback):
    """Keeps the first weights and all training batches on the learner."""

    order, run_valid = 100, False

    def before_fit(self):
        self.learn.seen = [self.model[0].weight.tolist()]

    def before_batch(self):
        self.learn.seen.append(self.x.tolist())


class Fails(ll.Callback):
    def after_epoch(self):
        raise ZeroDivisionError("of one arm")


class Kills(ll.Callback):
    """Ends the worker without a word."""

    def before_fit(self):
        import os

        os._exit(1)


def seen_by(*factories, fit=("fit", 2), seed=3):
    """Weights and batches of a trial."""
    found = []

    def metric(learn):
        found.append(learn.seen)
        return 0.0

    cbs = {str(i): factory for i, factory in enumerate([*factories, KeepsBatches])}
    trial = run_trial(Recipe(make_learner, cbs, fit, metric), "arm", seed)
    assert trial.error is None
    return found[0]


RECIPE = Recipe(make_learner, {}, ("fit", 1), None)


@pytest.mark.parametrize("fit", [("fit", 2), ("fine_tune", 2)])
def test_a_seed_gives_every_arm_the_same_weights_and_the_same_data(fit):
    alone = seen_by(fit=fit)
    assert seen_by(Draws, fit=fit) == alone
    assert seen_by(fit=fit, seed=4)[0] != alone[0]
    assert sorted(map(str, seen_by(fit=fit, seed=4)[1:])) != sorted(map(str, alone[1:]))


def test_a_trial_leaves_the_random_generators_alone():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(2).tolist(), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    run_trial(RECIPE, "arm", 1)
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected


@pytest.mark.parametrize(
    "fit",
    [
        "fit_two",
        ("fit", 2),
        ("fit", {"n_epoch": 2}),
        lambda learn, cbs: learn.fit(2, cbs=cbs),
    ],
)
def test_a_fit_is_a_function_or_a_verb_with_its_arguments(fit, monkeypatch):
    monkeypatch.setattr(ll.Learner, "fit_two", lambda learn, cbs: learn.fit(2, cbs=cbs), raising=False)
    trial = run_trial(Recipe(make_learner, {}, fit, None), "arm", 0)
    assert (trial.error, trial.row["epoch"]) == (None, 1)


@pytest.mark.parametrize(
    ("metric", "column"), [(None, "valid_loss"), ("train_loss", "train_loss"), ("valid_loss", "valid_loss")]
)
def test_the_metric_is_a_column_of_the_last_row(metric, column):
    trial = run_trial(Recipe(make_learner, {}, ("fit", 2), metric), "arm", 0)
    assert trial.value == trial.row[column] and trial.row["epoch"] == 1


def test_the_metric_may_be_a_function_of_the_learner():
    assert run_trial(Recipe(make_learner, {}, ("fit", 1), lambda learn: learn.opt_iter), "arm", 0).value == 4.0


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(make_learner, {"a": Fails}, ("fit", 1), None), "ZeroDivisionError: of one arm"),
        (Recipe(make_learner, {}, ("fit", 1), "acuracy"), "ValueError: `metric='acuracy'`: the record has train_loss"),
        (Recipe(make_learner, {}, ("fit", 1), lambda learn: float("nan")), "the metric is nan"),
        (Recipe(lambda: 1 / 0, {}, ("fit", 1), None), "ZeroDivisionError: division by zero"),
    ],
)
def test_what_fails_is_told(recipe, said):
    trial = run_trial(recipe, "arm", 0)
    assert trial.value is None and trial.error.startswith(said)


def test_ctrl_c_is_no_failure_of_an_arm():
    def interrupt(learn, cbs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(Recipe(make_learner, {}, interrupt, None), "arm", 0)


# Many


def values(found):
    return {(t.arm, t.seed): t.value for t, has_run in found if has_run}


JOBS = [(RECIPE, "none", seed) for seed in range(4)]


@pytest.mark.parametrize("make", [lambda: ProcessPoolExecutor(2), lambda: ThreadPoolExecutor(3)])
def test_executors_come_to_the_same_numbers(make):
    here = values(run_trials(JOBS, None))
    with make() as executor:
        assert values(run_trials(JOBS, executor)) == here
    assert len({*here.values()}) == 4


def test_a_dask_cluster_comes_to_the_same_numbers():
    distributed = pytest.importorskip("distributed")
    jobs = [(Recipe(make_learner, {}, ("fit", 1), lambda learn: learn.final_record[1]), "none", s) for s in range(3)]
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        found = values(run_trials(jobs, client.get_executor()))
    assert found == values(run_trials(jobs, None))


def test_a_worker_that_dies_takes_no_other_result_with_it():
    jobs = [(RECIPE, "none", 0), (Recipe(make_learner, {"a": Kills}, ("fit", 1), None), "a", 0)]
    with ProcessPoolExecutor(1) as executor:
        found = {t.arm: (t, has_run) for t, has_run in run_trials(jobs, executor)}
    assert found["none"][0].value is not None and found["none"][1]
    trial, has_run = found["a"]
    assert not has_run and trial.error.startswith("the worker did not answer: BrokenProcessPool")


def test_what_still_waits_is_cancelled_when_nobody_asks_for_more():
    class Slow:
        """Answers the first job only."""

        def __init__(self):
            self.futures = []

        def submit(self, function, *args):
            future = Future()
            self.futures.append(future)
            if len(self.futures) == 1:
                future.set_result(Trial("none", 0, 1.0))
            return future

    executor = Slow()
    trials = run_trials(JOBS, executor)
    next(trials)
    trials.close()
    assert [future.cancelled() for future in executor.futures] == [False, True, True, True]


def test_what_cannot_go_to_a_process_is_refused_with_its_name():
    with ProcessPoolExecutor(1) as executor, pytest.raises(TypeError) as error:
        check_picklable(executor, make_learner=make_learner, fit=lambda learn, cbs: None)
    assert str(error.value).startswith("`fit` cannot be sent to another process: ")
    assert "Write a function at the top level of a module" in str(error.value)


def test_what_stays_in_this_process_may_be_anything():
    check_picklable(None, fit=lambda learn, cbs: None)
    check_picklable(ThreadPoolExecutor(1), fit=lambda learn, cbs: None)
