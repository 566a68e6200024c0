"""MLflowCallback against the real package with a store of files."""

import signal
import sys

import pytest

import learnloop as ll
from learnloop.integrations.mlflow import MLflowCallback, allowed
from learnloop.testing import check_callback, toy_learner
from tests.toys import Once, raising

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def files_are_allowed(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.fixture
def uri(tmp_path):
    return (tmp_path / "store").as_uri()


def learner(uri, **kwargs):
    return toy_learner(cbs=MLflowCallback(tracking_uri=uri, **{"every": 4, **kwargs}))


def runs(uri):
    client = mlflow.MlflowClient(tracking_uri=uri)
    ids = [e.experiment_id for e in client.search_experiments() if e.name == "learnloop"]
    return client, client.search_runs(ids)


def history(uri, name):
    client, (run,) = runs(uri)
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


def test_metrics_and_a_description_are_logged(uri):
    learn = learner(uri, run_name="mine")
    learn.fit(2)
    _, (run,) = runs(uri)
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert {k: run.data.params[k] for k in ("model", "opt", "lr", "n_epoch")} == {
        "model": "Sequential",
        "opt": "SGD",
        "lr": "[0.1]",
        "n_epoch": "2",
    }
    assert set(run.data.metrics) == {"epoch", "train_loss", "raw_loss", "lr_0", "mom_0", "wd_0", "valid_loss"}
    assert history(uri, "raw_loss") == [(n, learn.recorder.raw_losses[n - 1]) for n in (4, 8)]
    assert history(uri, "valid_loss") == [(4 * (i + 1), row[1]) for i, row in enumerate(learn.recorder.values)]


def test_several_fits_are_one_run(uri):
    learn = learner(uri)
    learn.fit(1)
    learn.fit(3)
    assert [step for step, _ in history(uri, "raw_loss")] == [4, 8, 12, 16]


def test_an_error_and_an_interrupt_are_its_status(uri):
    with pytest.raises(ZeroDivisionError):
        learner(uri).fit(1, cbs=Once("after_loss", raising(ZeroDivisionError())))
    assert [run.info.status for run in runs(uri)[1]] == ["FAILED"]
    learn = learner(uri)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Once("after_loss", lambda cb: signal.raise_signal(signal.SIGINT)))
    assert sorted(run.info.status for run in runs(uri)[1]) == ["FAILED", "KILLED"]
    learn.resume()
    assert sorted(run.info.status for run in runs(uri)[1]) == ["FAILED", "FINISHED"]


def test_a_run_that_was_begun_before_is_used_and_left_open(uri):
    former = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        mlflow.set_experiment("learnloop")
        with mlflow.start_run() as active:
            toy_learner(cbs=MLflowCallback(every=4)).fit(1)
            assert mlflow.active_run().info.run_id == active.info.run_id
            assert mlflow.get_run(active.info.run_id).info.status == "RUNNING"
    finally:
        mlflow.set_tracking_uri(former)
    assert [step for step, _ in history(uri, "raw_loss")] == [4]


@pytest.mark.parametrize(
    "run", [ll.Learner.validate, ll.Learner.get_preds, lambda learn: learn.lr_find(show_plot=False)]
)
def test_other_runs_write_nothing(uri, tmp_path, run):
    run(learner(uri))
    assert not (tmp_path / "store").exists()


def test_a_store_that_fails_warns_once_and_the_training_goes_on(uri):
    learn = learner(uri, every=1)

    def break_it(cb):
        learn.m_lflow._id = "gone"

    with pytest.warns(UserWarning, match="`MLflowCallback` stopped reporting: MlflowException") as caught:
        learn.fit(2, cbs=Once("before_train", break_it))
    assert len(caught) == 1 and len(learn.recorder.values) == 2


def test_names_are_written_with_the_characters_that_are_allowed():
    assert allowed("f1(macro)") == "f1_macro_" and allowed("valid_loss/a.b-c: d") == "valid_loss/a.b-c: d"


def test_without_the_package_the_message_names_the_extra(monkeypatch, uri):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"`MLflowCallback` needs mlflow: `pip install 'learnloop\[mlflow\]'`"):
        learner(uri).fit(1)


def test_it_keeps_the_promises(uri):
    assert MLflowCallback.reads_only
    make = lambda: MLflowCallback(tracking_uri=uri, every=1)  # noqa: E731
    assert check_callback(make, events=("before_fit", "after_loss", "after_epoch")).broken == {}
