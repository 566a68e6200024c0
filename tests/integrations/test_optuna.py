"""OptunaPruning, with the real package."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import learnloop as ll
from learnloop.integrations.optuna import OptunaPruning
from learnloop.testing import EventLog, check_callback, toy_learner

optuna = pytest.importorskip("optuna")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class PruneAt(optuna.pruners.BasePruner):
    """Prunes at a step."""

    def __init__(self, step):
        self.step = step

    def prune(self, study, trial):
        return trial.last_step >= self.step


def study(pruner=None, **kwargs):
    return optuna.create_study(pruner=pruner or optuna.pruners.NopPruner(), **kwargs)


def learner(*cbs):
    return toy_learner(n_train=16, n_valid=8, cbs=cbs, metrics=ll.accuracy_multi)


def test_each_epoch_is_reported():
    trial = study().ask()
    learn = learner(OptunaPruning(trial))
    learn.fit(3)
    reported = trial.study.get_trials()[0].intermediate_values
    assert reported == {row["epoch"]: pytest.approx(row["valid_loss"]) for row in learn.recorder.history}
    assert len(reported) == 3


def test_several_fits_are_steps_of_one_trial():
    trial = study().ask()
    learn = learner(OptunaPruning(trial))
    learn.fit(2)
    learn.fit(1)
    assert list(trial.study.get_trials()[0].intermediate_values) == [0, 1, 2]


def test_a_pruned_trial_ends_in_order_and_the_study_takes_it():
    log, learners = EventLog(), []

    def objective(trial):
        learners.append(learner(OptunaPruning(trial), log))
        learners[-1].fit(5)
        return learners[-1].final_record[1]

    found = study(PruneAt(1))
    found.optimize(objective, n_trials=1)
    assert found.trials[0].state.name == "PRUNED"
    assert len(learners[0].recorder.history) == 2
    assert log.events[-4:] == ["cleanup_epoch", "after_cancel_fit", "after_fit", "cleanup_fit"]
    assert learners[0].task is None


def test_what_leaves_the_fit_says_where_it_was():
    cb = OptunaPruning(study(PruneAt(0)).ask())
    learn = learner(cb)
    with pytest.raises(optuna.TrialPruned, match=r"pruned after 1 epochs, at valid_loss \d"):
        learn.fit(3)
    cb.trial = study().ask()
    learn.fit(1)


def test_an_epoch_without_a_value_is_not_reported():
    trial = study().ask()
    cancel = ll.Callback(before_validate=lambda cb: _cancel_first(cb))
    learner(OptunaPruning(trial), cancel).fit(2)
    assert len(trial.study.get_trials()[0].intermediate_values) == 1


def _cancel_first(cb):
    if cb.epoch == 0:
        raise ll.CancelValidException


def test_a_study_in_the_other_direction_warns():
    trial = study(direction="maximize").ask()
    with pytest.warns(UserWarning, match="the study is to maximize, and by its name `valid_loss` is to be minimized"):
        learner(OptunaPruning(trial)).fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(OptunaPruning(study(direction="maximize").ask(), monitor="accuracy_multi")).fit(1)


def test_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match="OptunaPruning monitors `acc`, but this fit records"):
        learner(OptunaPruning(study().ask(), monitor="acc")).fit(1)


def test_it_keeps_the_promises():
    trial = study().ask()
    events = ("before_fit", "before_batch", "after_batch", "after_epoch", "after_fit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trial takes each step once
        assert check_callback(lambda: OptunaPruning(trial), events=events).broken == {}


def test_the_example_prunes_and_finds_something(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / "optuna_study.py", "--trials", "12", "--epochs", "3"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, pruned, best = done.stdout.splitlines()
    assert int(pruned.split()[0]) >= 2 and pruned.endswith("of 12 trials pruned")
    assert float(best.split()[2]) > 0.9
