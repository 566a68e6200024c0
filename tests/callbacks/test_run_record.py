"""RunRecord: what stands in its files."""

import json
import os
import pickle
import signal
import subprocess

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import learnloop as ll
from learnloop.callbacks.run_record import RunRecord, code_version, data_fingerprint, settings_of
from learnloop.testing import check_callback, toy_learner
from tests.toys import Once, raising


def learner(folder, *cbs, **kwargs):
    learn = toy_learner(n_train=16, n_valid=8, cbs=cbs, **kwargs)
    learn.path = folder
    return learn


def files(folder):
    return sorted(folder.glob("runs/*.jsonl"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kinds(path):
    return [(line["kind"], line.get("epoch", line.get("how"))) for line in lines(path)]


def only(folder):
    (path,) = files(folder)
    return lines(path)


# What is written


def test_a_fit_has_a_file_with_what_it_was_its_rows_and_its_end(tmp_path):
    learn = learner(tmp_path, RunRecord())
    learn.fit(2)
    (path,) = files(tmp_path)
    assert kinds(path) == [("run", None), ("row", 0), ("row", 1), ("end", "done")]
    about, first, _, end = lines(path)
    assert about["id"] == path.stem and about["at"][:16].replace(":", "-") == path.stem[:16]
    assert first == {"kind": "row", "step": 2, **learn.recorder.history[0]}
    assert end.pop("seconds") >= 0 and end == {"kind": "end", "how": "done", "error": None}


def test_the_first_line_says_what_was_trained_with_what(tmp_path):
    torch.manual_seed(5)
    learn = learner(tmp_path, RunRecord(), metrics=ll.mse)
    learn.fit(1, 0.2, cbs=[ll.EMA(0.9), ll.Callback(before_fit=raising_nothing)])
    about = only(tmp_path)[0]
    assert about["configuration"] == {
        "model": "Sequential",
        "n_params": 17,
        "loss_func": "MSELoss",
        "opt": "SGD",
        "lr": [0.2],
        "n_epoch": 1,
        "n_step": None,
        "batch_size": 8,
        "loss": "torch.nn.modules.loss.MSELoss(reduction='mean')",
        "opt_func": "SGD",
        "groups": [{"lr": 0.2, "mom": 0.0, "wd": 0.0}],
        "metrics": ["mse"],
    }
    assert about["callbacks"] == [
        {"name": "TrainEvalCallback", "settings": {}},
        {
            "name": "Recorder",
            "settings": {"add_time": True, "train_metrics": False, "valid_metrics": True, "beta": 0.98},
        },
        {"name": "RunRecord", "settings": {"path": "runs", "every": None, "samples": 4}},
        {"name": "EMA", "settings": {"decay": 0.9, "warmup": False, "apply_at_end": True}},
        {"name": "Callback", "settings": {"before_fit": f"{__name__}.raising_nothing"}},
    ]
    assert about["seed"] == {"torch": 5, "fit": learn._data_seed, "loaders": 42}
    assert about["environment"]["torch"] == torch.__version__ and about["environment"]["device"] == "cpu"


def raising_nothing(cb):
    """A handler."""


def test_the_loop_is_that_of_the_fit_without_who_hears_nothing_of_it(tmp_path):
    off = ll.GradientClip(2.0)
    off.run = False
    learner(tmp_path, RunRecord(), ll.GradientClip(1.0), off).fit(1, cbs=[ll.EMA(0.9), ll.FetchPredsCallback()])
    found = only(tmp_path)[0]["loop"]
    assert found["before_fit"] == ["TrainEvalCallback", "EMA", "Recorder", "RunRecord"]
    assert found["before_step"] == ["GradientClip"]
    assert found["after_batch"] == ["EMA", "Recorder"]  # without `every` a RunRecord has nothing to do there
    assert found["cleanup_validate"] == ["Recorder", "EMA"]
    assert "before_backward" not in found


def test_settings_are_found_also_where_a_callback_keeps_them_under_other_names():
    assert settings_of(ll.MixUp(0.3)) == {"alpha": 0.3}
    assert settings_of(ll.FreezeUntil(2))["until"] == 2
    assert settings_of(ll.SkipToEpoch(3)) == {"skip_to": 3}
    assert settings_of(ll.MixedPrecision("fp16", init_scale=8.0))["scaling"]["init_scale"] == 8.0
    schedule = settings_of(ll.ParamScheduler({"lr": ll.SchedLin(1.0, 0.5)}))["scheds"]["lr"]
    assert schedule == "CurveSchedule(made_by='SchedLin', curve='sched_lin', args=[1.0, 0.5])"
    assert settings_of(ll.TrainEvalCallback()) == {}


def test_every_writes_batches_too(tmp_path):
    learner(tmp_path, RunRecord(every=2)).fit(1)
    assert [(line["kind"], line.get("step")) for line in only(tmp_path)[1:3]] == [("step", 2), ("row", 2)]


def test_each_fit_has_a_file_of_its_own_also_within_a_second(tmp_path):
    learn = learner(tmp_path, RunRecord())
    learn.fit(1)
    learn.fit(2)
    assert sorted(len(lines(path)) for path in files(tmp_path)) == [3, 4]


def test_a_numberless_row_is_plain_json(tmp_path):
    learner(tmp_path, RunRecord(), lr=1e30).fit(2)
    assert "NaN" not in files(tmp_path)[0].read_text() and only(tmp_path)[2]["valid_loss"] is None


@pytest.mark.parametrize(
    "run", [ll.Learner.validate, ll.Learner.get_preds, lambda learn: learn.lr_find(show_plot=False)]
)
def test_other_runs_have_no_record(tmp_path, run):
    run(learner(tmp_path, RunRecord()))
    assert files(tmp_path) == []


# How it ends


def test_an_error_is_named(tmp_path):
    with pytest.raises(ZeroDivisionError):
        learner(tmp_path, RunRecord(), Once("before_validate", raising(ZeroDivisionError("by\nzero")))).fit(1)
    end = only(tmp_path)[-1]
    assert (end["how"], end["error"]) == ("error", "ZeroDivisionError: by")


def test_a_fit_within_the_handling_of_another_error_is_no_error(tmp_path):
    try:
        raise KeyError("x")
    except KeyError:
        learner(tmp_path, RunRecord()).fit(1)
    assert (only(tmp_path)[-1]["how"], only(tmp_path)[-1]["error"]) == ("done", None)


def test_ctrl_c_is_said_and_a_resumed_fit_goes_on_in_the_same_file(tmp_path):
    learn = learner(tmp_path, RunRecord())
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, cbs=Once("before_validate", lambda cb: signal.raise_signal(signal.SIGINT)))
    assert kinds(files(tmp_path)[0]) == [("run", None), ("end", "interrupted")]
    learn.resume()
    (path,) = files(tmp_path)
    assert kinds(path) == [("run", None), ("resumed", None), ("row", 0), ("row", 1), ("row", 2), ("end", "done")]


def test_a_learner_made_anew_goes_on_in_the_same_file(tmp_path):
    states = []
    take = ll.Callback(before_epoch=lambda cb: states.append(pickle.dumps(cb.learn.state_dict())))
    learner(tmp_path, RunRecord()).fit(3, cbs=take)
    fresh = learner(tmp_path, RunRecord())
    fresh.load_state_dict(pickle.loads(states[1]))
    fresh.resume()
    (path,) = files(tmp_path)
    rows = [("row", 0), ("resumed", None), ("row", 1), ("row", 2)]
    assert kinds(path) == [("run", None), *rows, ("end", "done")]
    assert lines(path)[-1]["seconds"] >= lines(path)[2]["seconds"]


def test_where_the_file_is_gone_a_resumed_fit_writes_all_rows_again(tmp_path):
    learn = learner(tmp_path, RunRecord())
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, cbs=Once("after_validate", lambda cb: signal.raise_signal(signal.SIGINT)))
    files(tmp_path)[0].unlink()
    learn.resume()
    assert kinds(files(tmp_path)[0]) == [("run", None), ("row", 0), ("row", 1), ("row", 2), ("end", "done")]


def test_one_that_joins_a_resumed_fit_writes_the_earlier_rows_too(tmp_path):
    learn = learner(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=Once("before_train", lambda cb: signal.raise_signal(signal.SIGINT)))
    learn.add_cb(RunRecord())
    learn.resume()
    assert kinds(files(tmp_path)[0]) == [("run", None), ("row", 0), ("row", 1), ("end", "done")]


# The code


def test_the_revision_is_gits_and_says_what_is_not_committed(tmp_path, monkeypatch):
    def git(*arguments):
        names = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        return subprocess.run(["git", *names, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision() is None
    git("init")
    (tmp_path / "train.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert revision() == commit
    (tmp_path / "train.py").write_text("2")
    assert revision() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", os.devnull)
    assert revision() is None


def revision():
    from learnloop.callbacks import run_record

    run_record._revision.cache_clear()
    return code_version()["revision"]


# The data


def test_the_data_are_told_by_shape_length_and_some_samples():
    learn = toy_learner(n_train=16, n_valid=8)
    (train, valid) = data_fingerprint(learn, 4)
    assert train.pop("checksum") != valid.pop("checksum")
    assert train == {
        "name": "train",
        "loader": "TensorLoader",
        "batches": 2,
        "batch_size": 8,
        "dataset": "TensorDataset",
        "samples": 16,
        "sample": "(float32[2] cpu, float32[1] cpu)",
        "n_read": 4,
    }
    assert (valid["name"], valid["samples"]) == ("valid", 8)


def test_one_changed_value_in_a_sample_that_is_read_changes_the_checksum():
    one, same, other = toy_learner(), toy_learner(), toy_learner()
    other.dls.train.tensors[1][0] += 1
    marks = [data_fingerprint(learn, 2)[0]["checksum"] for learn in (one, same, other)]
    assert marks[0] == marks[1] != marks[2]


class Items(Dataset):
    """Samples of any kind, of which some may not be read."""

    def __init__(self, items, n=3):
        self.items, self.n, self.read = items, n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read.append(i)
        return self.items(i)


def of(items, **kwargs):
    dataset = Items(items, **kwargs)
    learn = toy_learner()
    learn.dls = ll.DataLoaders(DataLoader(dataset, batch_size=2))
    return data_fingerprint(learn, 4)[0], dataset.read


def test_samples_are_spread_over_the_dataset_and_few():
    assert of(lambda i: i, n=1000)[1] == [0, 333, 666, 999]
    assert of(lambda i: i, n=2)[1] == [0, 1]


def test_augmented_samples_have_the_same_checksum_each_time_and_move_no_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = of(lambda i: {"image": torch.rand(3), "text": "a"})[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert of(lambda i: {"image": torch.rand(3), "text": "a"})[0] == first


def test_data_that_cannot_be_read_are_no_error():
    assert of(lambda i: 1 / 0)[0]["unread"] == "ZeroDivisionError"


def test_slow_data_are_read_for_a_second_at_most(monkeypatch):
    monkeypatch.setattr("learnloop.callbacks.run_record.SECONDS", 0.0)
    assert of(lambda i: i)[1] == [0]


def test_of_a_stream_nothing_is_read():
    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError("was read")

    learn = toy_learner()
    learn.dls = ll.DataLoaders(DataLoader(Stream()), [(torch.zeros(1), torch.zeros(1))])
    stream, batches = data_fingerprint(learn, 4)
    assert (stream["dataset"], stream["samples"], "checksum" in stream) == ("Stream", None, False)
    assert (batches["loader"], batches["samples"], batches["n_read"]) == ("list", 1, 1)


def test_samples_0_reads_none():
    learn = toy_learner()
    assert "checksum" not in data_fingerprint(learn, 0)[0]


# The promises


def test_it_keeps_the_promises():
    assert RunRecord.reads_only
    events = ("before_fit", "before_batch", "after_batch", "after_epoch", "after_fit")  # at all: 30 seconds
    assert check_callback(RunRecord, events=events).broken == {}


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 1])
def test_it_keeps_the_promises_at_every_event(every):
    assert check_callback(lambda: RunRecord(every=every)).broken == {}


def test_the_training_is_the_same_with_it(tmp_path):
    def outcome(*cbs):
        torch.manual_seed(0)
        learn = learner(tmp_path, *cbs)
        learn.fit(2)
        return [p.tolist() for p in learn.model.parameters()], torch.get_rng_state().tolist()

    assert outcome(RunRecord(every=1)) == outcome()


@pytest.mark.parametrize("samples", [-1, 1.5, True])
def test_so_many_samples_are_read_as_a_whole_number_says(samples):
    with pytest.raises(
        ValueError, match=rf"^`samples={samples}`: pass how many samples of a dataset are read, 0 for none\.$"
    ):
        RunRecord(samples=samples)
