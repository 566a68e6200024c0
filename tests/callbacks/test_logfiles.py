"""CSVLogger and JSONLLogger: what stands in their files, and when."""

import copy
import json
import math
import pickle
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch

import learnloop as ll
from learnloop.callbacks.logfiles import csv_line, json_line
from learnloop.testing import check_callback, toy_learner
from tests.resuming import _run
from tests.toys import Once, raise_at, raising

#: Losses of the toy learner at a rate of 0.1; the rows of the Recorder, which has tests of its own.
TITLES = "epoch,train_loss,valid_loss,time"


def learner(folder, *cbs, **kwargs):
    learn = toy_learner(n_train=16, n_valid=8, cbs=cbs, **kwargs)
    learn.path = folder
    return learn


def expected_csv(learn):
    return [TITLES, *(",".join(str(x) for x in row.values()) for row in learn.recorder.history)]


def lines(path):
    return Path(path).read_text().splitlines()


def records(path):
    return [json.loads(line) for line in lines(path)]


# CSV


def test_a_line_of_titles_and_a_line_per_epoch(tmp_path):
    learn = learner(tmp_path, ll.CSVLogger())
    learn.fit(2)
    assert lines(tmp_path / "history.csv") == [
        "epoch,train_loss,valid_loss,time",
        "0,2.105666160583496,1.1869009733200073,00:00",
        "1,1.6626839637756348,0.8932910561561584,00:00",
    ]


def test_it_is_read_back_as_a_table(tmp_path):
    logger = ll.CSVLogger()
    learn = learner(tmp_path, logger)
    learn.fit(2)
    pd.testing.assert_frame_equal(logger.read_log(), learn.recorder.to_frame(), check_dtype=False)


def test_cells_with_commas_are_quoted_and_missing_numbers_are_empty():
    assert csv_line(["epoch", "a,b", None, 0.5, math.nan]) == 'epoch,"a,b",,0.5,nan'


def test_the_folder_is_made(tmp_path):
    learner(tmp_path, ll.CSVLogger("logs/deep/history.csv")).fit(1)
    assert len(lines(tmp_path / "logs/deep/history.csv")) == 2


def test_a_fit_begins_the_file_anew(tmp_path):
    learn = learner(tmp_path, ll.CSVLogger())
    learn.fit(2)
    learn.fit(1)
    assert lines(tmp_path / "history.csv") == expected_csv(learn)


def test_with_append_each_fit_adds_titles_and_rows(tmp_path):
    learn = learner(tmp_path, ll.CSVLogger(append=True))
    learn.fit(1)
    first = expected_csv(learn)
    learn.fit(1)
    assert lines(tmp_path / "history.csv") == first + expected_csv(learn)


@pytest.mark.parametrize(
    "run", [ll.Learner.validate, ll.Learner.get_preds, lambda learn: learn.lr_find(show_plot=False)]
)
def test_other_runs_leave_the_file_alone(tmp_path, run):
    learn = learner(tmp_path, ll.CSVLogger(), ll.JSONLLogger())
    learn.fit(1)
    before = [(tmp_path / name).read_bytes() for name in ("history.csv", "history.jsonl")]
    run(learn)
    assert [(tmp_path / name).read_bytes() for name in ("history.csv", "history.jsonl")] == before


def test_rows_can_be_read_while_the_training_goes_on(tmp_path):
    seen = []
    look = ll.Callback(before_epoch=lambda cb: seen.append(len(lines(tmp_path / "history.csv"))))
    learner(tmp_path, ll.CSVLogger(), look).fit(3)
    assert seen == [1, 2, 3]


def test_the_logger_of_the_learner_is_the_same_during_the_fit_and_after_it(tmp_path):
    learn = learner(tmp_path, ll.CSVLogger())
    shown, seen = [], []
    learn.logger = shown.append
    learn.fit(1, cbs=ll.Callback(before_batch=lambda cb: seen.append(cb.learn.logger == shown.append)))
    assert all(seen) and learn.logger == shown.append and len(shown) == 1


def test_rows_of_other_validation_sets_have_their_columns(tmp_path):
    learn = learner(tmp_path, ll.CSVLogger())
    learn.dls = ll.DataLoaders(learn.dls.train, learn.dls.valid, {"noisy": learn.dls.valid}, every={"noisy": 2})
    learn.fit(2)
    frame = pd.read_csv(tmp_path / "history.csv")
    assert list(frame) == ["epoch", "train_loss", "valid_loss", "noisy_loss", "time"]
    assert frame.noisy_loss.isna().tolist() == [True, False]


def test_a_cancelled_epoch_leaves_no_row_and_a_cancelled_validation_an_empty_cell(tmp_path):
    learn = learner(tmp_path, ll.CSVLogger(), raise_at("before_validate", ll.CancelValidException()))
    learn.fit(2)
    assert pd.read_csv(tmp_path / "history.csv").valid_loss.isna().tolist() == [True, False]
    learn = learner(tmp_path, ll.CSVLogger(), raise_at("before_epoch", ll.CancelEpochException()))
    learn.fit(2)
    assert pd.read_csv(tmp_path / "history.csv").epoch.tolist() == [1]


def test_it_says_that_it_needs_the_recorder(tmp_path):
    learn = learner(tmp_path, ll.CSVLogger())
    learn.remove_cb(ll.Recorder)
    with pytest.raises(RuntimeError, match=r"`CSVLogger` writes the rows of the Recorder: `learn.add_cb\(Recorder"):
        learn.fit(1)


def test_a_folder_that_cannot_be_made_is_said_before_the_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        learner(tmp_path, ll.CSVLogger("file/history.csv")).fit(1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
@pytest.mark.parametrize("logger", [ll.CSVLogger, ll.JSONLLogger])
def test_a_disk_that_fills_up_warns_once_and_the_training_goes_on(tmp_path, logger):
    cb = logger("log")
    learn = learner(tmp_path, cb)

    def fill(probe):
        cb.log._file.close()
        cb.log._file = open("/dev/full", "wb")  # noqa: SIM115

    with pytest.warns(UserWarning, match=rf"`{logger.__name__}` stopped reporting: OSError.*No space left") as caught:
        learn.fit(3, cbs=Once("before_train", fill))
    assert len(learn.recorder.values) == 3
    assert len([w for w in caught if "reporting" in str(w.message)]) == 1


# Lines of JSON


def test_a_line_per_fit_per_row_and_per_so_many_batches(tmp_path):
    learn = learner(tmp_path, ll.JSONLLogger(every=2))
    learn.fit(2)
    found = records(tmp_path / "history.jsonl")
    assert [(r["kind"], r.get("step"), r.get("epoch")) for r in found] == [
        ("fit", None, None),
        ("step", 2, 1.0),
        ("epoch", 2, 0),
        ("step", 4, 2.0),
        ("epoch", 4, 1),
    ]
    assert found[3] == {
        "kind": "step",
        "step": 4,
        "epoch": 2.0,
        "train_loss": 1.6626839637756348,
        "raw_loss": learn.recorder.raw_losses[3],
        "lr_0": 0.1,
        "mom_0": 0.0,
        "wd_0": 0.0,
    }
    assert found[4] == {"kind": "epoch", "step": 4, **learn.recorder.history[1]}


def test_the_line_of_a_fit_describes_it(tmp_path):
    learner(tmp_path, ll.JSONLLogger()).fit(2)
    found = records(tmp_path / "history.jsonl")[0]
    assert found.pop("at")[:2] == "20"
    assert found == {
        "kind": "fit",
        "model": "Sequential",
        "n_params": 17,
        "loss_func": "MSELoss",
        "opt": "SGD",
        "lr": [0.1],
        "n_epoch": 2,
        "n_step": None,
        "batch_size": 8,
        "device": "cpu",
        "callbacks": ["TrainEvalCallback", "Recorder", "JSONLLogger"],
    }


def test_lines_can_be_read_as_soon_as_they_are_written(tmp_path):
    seen = []
    look = ll.Callback(after_batch=lambda cb: cb.training and seen.append(len(records(tmp_path / "history.jsonl"))))
    look.order = 1000
    learner(tmp_path, ll.JSONLLogger(every=1), look).fit(1)
    assert seen == [2, 3]


def test_steps_go_on_over_several_fits(tmp_path):
    learn = learner(tmp_path, ll.JSONLLogger(every=2, append=True))
    learn.fit(1)
    learn.fit(1)
    assert [r["step"] for r in records(tmp_path / "history.jsonl") if r["kind"] == "step"] == [2, 4]


def test_every_none_writes_rows_only(tmp_path):
    learner(tmp_path, ll.JSONLLogger(every=None)).fit(1)
    assert [r["kind"] for r in records(tmp_path / "history.jsonl")] == ["fit", "epoch"]


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_another_every_is_refused(every):
    with pytest.raises(ValueError, match=f"`every={every}`: pass a number of batches, 1 or more, or None"):
        ll.JSONLLogger(every=every)


def test_numbers_that_are_not_finite_are_null():
    assert json_line({"a": math.nan, "b": [math.inf, 1], "c": {"d": -math.inf}, "e": Path("x")}) == (
        '{"a": null, "b": [null, 1], "c": {"d": null}, "e": "x"}'
    )


# Stops and resumes


@pytest.mark.parametrize("append", [False, True])
def test_a_resumed_fit_leaves_the_lines_of_one_without_a_stop(tmp_path, append):
    def text_after(number):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        cbs = lambda: (ll.CSVLogger(append=append), ll.JSONLLogger(every=1, append=append))  # noqa: E731
        seen = _run(lambda: learner(folder, *cbs()), lambda learn: learn.fit(2), number)[1]
        found = records(folder / "history.jsonl")
        found[0].pop("at"), found[0].pop("callbacks")
        return (lines(folder / "history.csv"), found), seen

    whole, seen = text_after(None)
    for number in range(0, len(seen) - 8, 5):
        assert text_after(number)[0] == whole, f"stopped in {seen[number]}, event {number}"


def test_rows_after_the_state_that_is_resumed_are_replaced_and_those_of_other_fits_stay(tmp_path):
    states = []
    learn = learner(tmp_path, ll.CSVLogger(append=True), ll.JSONLLogger(every=None, append=True))
    take = ll.Callback(before_epoch=lambda cb: states.append(copy.deepcopy(cb.learn.state_dict())))
    learn.fit(3, cbs=take)
    first = lines(tmp_path / "history.csv")
    other = learner(tmp_path, ll.CSVLogger(append=True), ll.JSONLLogger(every=None, append=True))
    other.fit(1)
    fresh = learner(tmp_path, ll.CSVLogger(append=True), ll.JSONLLogger(every=None, append=True))
    fresh.load_state_dict(states[1])
    fresh.resume()
    assert lines(tmp_path / "history.csv") == expected_csv(other) + first
    kinds = [(r["kind"], r.get("epoch")) for r in records(tmp_path / "history.jsonl")]
    assert kinds == [("fit", None), ("epoch", 0), ("fit", None), ("epoch", 0), ("epoch", 1), ("epoch", 2)]


def test_a_logger_that_joins_a_resumed_fit_writes_the_earlier_rows_too(tmp_path):
    learn = learner(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, cbs=Once("before_validate", lambda cb: _press_ctrl_c()))
    learn.add_cb(ll.CSVLogger())
    learn.resume()
    assert lines(tmp_path / "history.csv") == expected_csv(learn)
    assert len(learn.recorder.history) == 3


def test_where_the_file_is_gone_a_resumed_fit_writes_all_rows_again(tmp_path):
    learn = learner(tmp_path, ll.CSVLogger())
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, cbs=Once("after_validate", lambda cb: _press_ctrl_c()))
    (tmp_path / "history.csv").unlink()
    learn.resume()
    assert lines(tmp_path / "history.csv") == expected_csv(learn)


def _press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("make", [ll.CSVLogger, ll.JSONLLogger])
def test_the_file_is_closed_after_an_error(tmp_path, make):
    logger = make()
    with pytest.raises(ZeroDivisionError):
        learner(tmp_path, logger, Once("after_loss", raising(ZeroDivisionError()))).fit(1)
    assert logger.log._file is None


def test_a_logger_can_be_copied_and_pickled_while_its_file_is_open(tmp_path):
    copies = []
    learn = learner(tmp_path, ll.CSVLogger(), ll.JSONLLogger())
    learn.fit(1, cbs=Once("before_epoch", lambda cb: copies.extend(copy.copy(c.log) for c in cb.learn.cbs[2:4])))
    assert [c._file for c in copies] == [None, None]
    assert pickle.loads(pickle.dumps(copies[0])).place == copies[0].place


# The promises


@pytest.mark.parametrize("make", [ll.CSVLogger, lambda: ll.JSONLLogger(every=1)])
def test_they_keep_the_promises(make):
    assert check_callback(make).broken == {}


READING = [ll.CSVLogger, lambda: ll.JSONLLogger(every=1), ll.ShowGraphCallback]


@pytest.mark.parametrize("make", READING)
def test_callbacks_that_only_read_leave_weights_and_random_states_alone(tmp_path, make):
    def outcome(*cbs):
        torch.manual_seed(0)
        learn = learner(tmp_path, *cbs)
        learn.fit(2)
        return [p.tolist() for p in learn.model.parameters()], torch.get_rng_state().tolist()

    cb = make()
    assert cb.reads_only
    assert outcome(cb) == outcome()
