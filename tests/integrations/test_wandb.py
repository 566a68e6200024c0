"""WandbCallback against the real package, offline."""

import json
import struct
import sys

import pytest

import learnloop as ll
from learnloop.integrations.wandb import WandbCallback
from learnloop.testing import check_callback, toy_learner
from tests.toys import Once, raising

wandb = pytest.importorskip("wandb")


@pytest.fixture(scope="module", autouse=True)
def afresh():
    """The package reads settings once per process, and other tests may have had it do so."""
    wandb.teardown()


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    if wandb.run is not None:
        wandb.finish()


def history(folder):
    """What was logged, read from the files of the runs: [(step, {name: value}), …]."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in messages(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                found.append((items["_step"], {k: v for k, v in items.items() if not k.startswith("_")}))
    return found


def messages(log, block=32768):
    """The messages in a log of LevelDB's form behind a header of 7 bytes; each piece: checksum, length, kind, data."""
    at, parts = 7, []
    while at + 7 <= len(log):
        if block - at % block < 7:  # no room for another piece
            at += block - at % block
            continue
        length, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        parts.append(log[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last one
            yield b"".join(parts)
            parts = []


def test_losses_hypers_and_columns_are_logged(tmp_path):
    learn = toy_learner(cbs=WandbCallback(every=2, dir=tmp_path))
    learn.fit(1)
    losses = learn.recorder.raw_losses
    smooth = [loss.item() for loss in learn.recorder.losses]
    hypers = {"lr_0": 0.1, "mom_0": 0, "wd_0": 0}
    assert history(tmp_path) == [
        (2, {"epoch": 0.5, "train_loss": smooth[1], "raw_loss": losses[1], **hypers}),
        (
            4,
            {"epoch": 1, "train_loss": smooth[3], "raw_loss": losses[3], **hypers, "valid_loss": learn.final_record[1]},
        ),
    ]


def test_its_own_run_is_finished_and_several_fits_are_one(tmp_path):
    cb = WandbCallback(every=4, project="toy", dir=tmp_path)
    learn = toy_learner(cbs=cb)
    learn.fit(1)
    assert wandb.run is None
    first = cb.run_id
    learn.fit(1)
    assert cb.run_id == first
    assert [step for step, _ in history(tmp_path)] == [4, 8]
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 1  # of one id


def test_a_run_that_was_begun_before_is_used_and_left_open(tmp_path):
    run = wandb.init(dir=tmp_path)
    run.log({"mine": 1})
    toy_learner(cbs=WandbCallback(every=4)).fit(1)
    assert wandb.run is run and run.config["model"] == "Sequential"
    run.finish()
    assert [step for step, _ in history(tmp_path)] == [0, 5]


def test_it_is_finished_after_an_error():
    with pytest.raises(ZeroDivisionError):
        toy_learner(cbs=WandbCallback()).fit(1, cbs=Once("after_loss", raising(ZeroDivisionError())))
    assert wandb.run is None


def test_histograms_of_gradients_leave_no_hook():
    learn = toy_learner(cbs=WandbCallback(log="all"))
    learn.fit(1)
    assert [len(p._backward_hooks or ()) for p in learn.model.parameters()] == [0] * 4


@pytest.mark.parametrize(
    "run", [ll.Learner.validate, ll.Learner.get_preds, lambda learn: learn.lr_find(show_plot=False)]
)
def test_other_runs_begin_none(tmp_path, run):
    run(toy_learner(cbs=WandbCallback()))
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"`WandbCallback` needs wandb: `pip install 'learnloop\[wandb\]'`"):
        toy_learner(cbs=WandbCallback()).fit(1)


def test_it_keeps_the_promises(tmp_path):
    assert WandbCallback.reads_only
    assert check_callback(lambda: WandbCallback(dir=tmp_path, every=1), events=["after_loss"]).broken == {}
