"""Checkpoints: a fit that was killed, stopped or failed goes on in another learner as if nothing had happened."""

import copy
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnloop import (
    Callback,
    CancelFitException,
    Checkpoint,
    DataLoaders,
    Learner,
    Recorder,
    TensorLoader,
    TrainEvalCallback,
    accuracy,
)
from learnloop.callbacks.checkpoints import parse_every
from learnloop.stored import read_run, runs_in
from learnloop.testing import check_callback, toy_learner
from tests.loop.test_fits import (
    Accumulate,
    Counting,
    Foreign,
    Noisy,
    Stream,
    X,
    Y,
    model,
    outcome,
    tensors,
    torch_loaders,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread_and_the_handlers_of_before():
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    torch.set_num_threads(former)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert [t.name for t in threading.enumerate() if t.name == "learnloop checkpoint"] == []


class Dead(BaseException):
    """Ends a fit as a kill does: nothing of ours is written after it."""


class At(Callback):
    """Does something at an event, by its number from `before_fit`."""

    order, reads_only = 2000, True

    def __init__(self, number, action):
        self.number, self.action, self.count = number, action, -1

    def __call__(self, event_name):
        self.count += 1
        if self.count == self.number and self.learn.task == "fit":
            self.action()


def die():
    raise Dead


class Own:
    """A loader that says where it stands, as torchdata's do."""

    def __init__(self):
        self.generator, self.read = torch.Generator().manual_seed(3), 0

    def __iter__(self):
        if self.read == 0:
            self.order = torch.randperm(len(X), generator=self.generator).split(6)
        while self.read < len(self.order):
            self.read += 1
            yield X[self.order[self.read - 1]], Y[self.order[self.read - 1]]
        self.read = 0

    def state_dict(self):
        return {"generator": self.generator.get_state(), "read": self.read, "order": list(self.order)}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.read, self.order = state["read"], state["order"]


class Snapshot(Callback):
    """Draws the weights back to where they were when the fit began."""

    _stateattrs = ("start",)

    def before_fit(self):
        self.start = [p.detach().clone() for p in self.learn.model.parameters()]

    def after_loss(self):
        far = sum(((p - s) ** 2).sum() for p, s in zip(self.learn.model.parameters(), self.start, strict=True))
        self.learn.loss_grad = self.learn.loss_grad + 0.1 * far


class Stopping(Callback):
    """Ends the fit when it has seen so many epochs."""

    _stateattrs = ("count",)

    def before_fit(self):
        self.count = 0

    def after_epoch(self):
        self.count += 1
        if self.count == 2:
            raise CancelFitException


class Looking(Callback):
    """Validates in the middle of the training."""

    reads_only = True

    def after_batch(self):
        if self.training and self.iter == 1:
            self.learn.validate()


def several_sets():
    valid = {"noisy": DataLoader(Noisy(), 10), "plain": TensorLoader(X, Y, bs=7)}
    return DataLoaders(DataLoader(Noisy(), 6, shuffle=True), TensorLoader(X, Y, bs=10), valid, every={"plain": 2})


class Case:
    """A learner to be made anew in each process, and the call that each of them repeats."""

    def __init__(self, dls=tensors, verb="fit", *args, cbs=lambda: [], learner=None, **kwargs):
        self.dls, self.verb, self.args, self.cbs, self.kwargs = dls, verb, args or (2,), cbs, kwargs
        self.options = learner or {}

    def learner(self):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        cbs = [TrainEvalCallback(), Recorder(train_metrics=True), *self.cbs()]
        options = {"metrics": accuracy, "cbs": cbs, "default_cbs": False, **self.options}
        learn = Learner(self.dls(), model(), nn.CrossEntropyLoss(), **options)
        learn.logger = lambda row: None
        return learn

    def run(self, learn, *cbs, **kwargs):
        getattr(learn, self.verb)(*self.args, cbs=[*cbs], **self.kwargs, **kwargs)
        return learn

    def killed(self, folder, number, every="2step"):
        """What a process leaves that is killed at an event."""
        with suppress(Dead):
            self.run(self.learner(), Checkpoint(every, path=folder), At(number, die), resume=True)

    def resumed(self, folder):
        """The learner of a process that goes on, with other weights and random states to begin with."""
        learn = self.learner()
        learn.logger = print
        for p in learn.model.parameters():
            p.data.neg_()
        torch.rand(3), np.random.rand(), random.random()
        return self.run(learn, Checkpoint("2step", path=folder), resume=True)


CASES = {
    "tensors": Case(),
    "torch loaders": Case(torch_loaders, cbs=lambda: [Counting()]),
    "one cycle": Case(torch_loaders, "fit_one_cycle", 2, 0.1),
    "flat and cosine": Case(tensors, "fit_flat_cos", 2, 0.1),
    "cycles": Case(tensors, "fit_sgdr", 2, 1, 0.1),
    "steps": Case(torch_loaders, "fit", None, n_step=9, valid_every=5),
    "foreign loader": Case(lambda: DataLoaders(Foreign(), Foreign())),
    "iterable dataset": Case(lambda: DataLoaders(DataLoader(Stream(), 6), DataLoader(Stream(), 10))),
    "a loader with a state of its own": Case(lambda: DataLoaders(Own(), TensorLoader(X, Y, bs=10))),
    "several validation sets": Case(several_sets, "fit", 3),
    "accumulation": Case(cbs=lambda: [Accumulate()]),
    "a snapshot of the first weights": Case(cbs=lambda: [Snapshot()]),
    "stopped early": Case(tensors, "fit", 4, cbs=lambda: [Stopping()]),
    "a validation in the middle": Case(torch_loaders, cbs=lambda: [Looking()]),
    "torch's optimizer": Case(learner={"opt_func": partial(torch.optim.SGD, momentum=0.9)}),
}


# Going on exactly


@pytest.mark.parametrize("name", CASES)
def test_a_fit_that_was_killed_goes_on_in_a_new_learner_as_if_it_had_not_been(name, tmp_path):
    case = CASES[name]
    whole = outcome(case.run(case.learner()))
    for number in range(20, 130, 18):
        folder = tmp_path / str(number)
        case.killed(folder, number)
        if runs_in(folder):
            assert outcome(case.resumed(folder)) == whole, f"killed at event {number}"


@pytest.mark.parametrize("name", ["torch loaders", "one cycle", "steps", "foreign loader", "several validation sets"])
def test_a_second_and_a_third_kill_change_nothing(name, tmp_path):
    case = CASES[name]
    case.killed(tmp_path, 50)
    for _ in range(2):
        case.killed(tmp_path, 31)
    assert outcome(case.resumed(tmp_path)) == outcome(case.run(case.learner()))


@pytest.mark.parametrize("persistent", [False, True])
def test_data_workers_change_nothing(persistent, tmp_path):
    case = Case(partial(torch_loaders, num_workers=2, persistent_workers=persistent))
    case.killed(tmp_path, 60)
    assert outcome(case.resumed(tmp_path)) == outcome(Case(torch_loaders).run(Case(torch_loaders).learner()))


@pytest.mark.parametrize(("workers", "dataset"), [(0, Noisy()), (2, TensorDataset(X, Y))])
def test_a_loader_of_torchdata_goes_on_by_its_own_state(workers, dataset, tmp_path, capsys):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    train = partial(loader, dataset, 6, shuffle=True, num_workers=workers)
    case = Case(lambda: DataLoaders(train(), TensorLoader(X, Y, bs=10)))
    whole = outcome(case.run(case.learner()))
    for number in (30, 80):
        folder = tmp_path / str(number)
        case.killed(folder, number)
        assert outcome(case.resumed(folder)) == whole
        assert "the loader goes on by its own state" in capsys.readouterr().out


def test_a_checkpoint_changes_nothing_of_a_training(tmp_path):
    case = CASES["torch loaders"]
    whole = outcome(case.run(case.learner()))
    assert outcome(case.run(case.learner(), Checkpoint("1step", path=tmp_path))) == whole


def test_a_checkpoint_keeps_the_promises_of_a_callback():
    assert check_callback(lambda: Checkpoint("1step"), events=["after_batch"]).broken == {}


# What it goes on from


def said(capsys):
    return capsys.readouterr().out.splitlines()


def toy(folder, every="1ep", **kwargs):
    learn = toy_learner(cbs=Checkpoint(every, path=folder), **kwargs)
    learn.logger = lambda row: None
    return learn


def weights(learn):
    return [p.tolist() for p in learn.model.parameters()]


def test_without_a_checkpoint_yet_the_fit_begins_at_its_start_and_says_so(tmp_path, capsys):
    learn = toy(tmp_path)
    learn.fit(1, resume=True)
    assert said(capsys) == [f"no checkpoint in `{tmp_path}` yet: the fit begins at its start"]
    assert learn.train_iter == 4


def test_the_default_folder_is_beside_the_learners_models(tmp_path):
    learn = toy_learner(cbs=Checkpoint(), path=tmp_path)
    learn.fit(1)
    assert [p.suffix for p in runs_in(tmp_path / "models" / "checkpoints")] == [".ckpt"]


def test_resume_without_a_checkpoint_among_the_callbacks_is_refused():
    with pytest.raises(ValueError, match=r'there is none. Add `Checkpoint\("1ep"\)` to the learner or to `cbs`'):
        toy_learner().fit(1, resume=True)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no `.*nothing` to resume. `resume=True` begins without"):
        toy_learner().fit(1, resume=tmp_path / "nothing")


@pytest.mark.parametrize("which", ["file", "folder", "text"])
def test_a_path_is_gone_on_from_without_a_checkpoint_among_the_callbacks(which, tmp_path):
    learn = toy(tmp_path)
    learn.fit(2)
    place = {"file": runs_in(tmp_path)[0], "folder": tmp_path, "text": str(runs_in(tmp_path)[0])}[which]
    other = toy_learner()
    other.fit(2, resume=place)
    assert weights(other) == weights(learn)


def test_one_line_says_where_it_goes_on_and_how_the_data_does(tmp_path, capsys):
    for dls, then in (
        (tensors, "nothing before it is read again"),
        (torch_loaders, "nothing before it is read again"),
        (lambda: DataLoaders(DataLoader(Stream(), 6)), "the data is read again up to it"),
        (lambda: DataLoaders(Foreign()), "the data is read again up to it"),
        (lambda: DataLoaders(Own()), "the loader goes on by its own state"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        case = Case(dls)
        case.killed(folder, 30)
        capsys.readouterr()
        case.run(case.learner(), Checkpoint(path=folder), resume=True)
        (path,) = [p for p in runs_in(folder) if p.name.startswith("000000")]
        assert said(capsys)[0] == f"goes on from `{path}`: epoch 0, batch 2; {then}"


def test_a_loader_that_starts_at_any_batch_reads_nothing_before_it(tmp_path):
    read = []

    class Reading(Noisy):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    case = Case(lambda: DataLoaders(DataLoader(Reading(), 5)), "fit", 1)
    case.killed(tmp_path, 30)
    read.clear()
    case.run(case.learner(), Checkpoint(path=tmp_path), resume=True)
    assert read == list(range(10, 20))


def test_a_fit_that_had_ended_is_loaded_and_not_trained_again(tmp_path, capsys):
    learn = toy(tmp_path)
    learn.fit(2)
    other = toy(tmp_path)
    batches = []
    other.add_cb(Callback(before_batch=batches.append))
    other.cbs[-1].reads_only = True
    other.fit(2, resume=True)
    assert said(capsys) == [f"goes on from `{runs_in(tmp_path)[-1]}`: that fit had come to its end"]
    assert weights(other) == weights(learn) and batches == []
    assert len(runs_in(tmp_path)) == 2


def test_a_fit_of_no_epoch_stores_nothing(tmp_path):
    toy(tmp_path).fit(0)
    assert runs_in(tmp_path) == []
    toy(tmp_path).fit(0, resume=True)


def test_a_damaged_newest_file_is_named_and_the_one_before_it_is_gone_on_from(tmp_path):
    learn = toy(tmp_path, "1step")
    learn.fit(2)
    newest = runs_in(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    other = toy(tmp_path)
    with pytest.warns(UserWarning, match=rf"`{newest}` is cut short or damaged.* The one before it is tried"):
        other.fit(2, resume=True)
    assert weights(other) == weights(learn)


# One folder, one fit


def test_a_second_fit_in_the_folder_goes_on_counting_and_is_the_one_to_resume(tmp_path):
    learn = toy(tmp_path)
    learn.fit(2)
    learn.fit(2)
    assert [int(p.name[:6]) for p in runs_in(tmp_path)] == [1, 2, 3]
    other = toy(tmp_path)
    other.fit(2, resume=True)
    assert weights(other) == weights(learn)


def test_a_learner_that_has_only_loaded_the_state_of_a_fit_may_resume_it(tmp_path):
    learn, other = toy(tmp_path), toy(tmp_path)
    learn.fit(1)
    other.create_opt()
    other.load_state_dict(learn.state_dict())
    other.fit(1, resume=True)
    assert weights(other) == weights(learn)


def test_the_next_fit_does_not_take_the_one_before_it_for_its_own(tmp_path):
    learn = toy(tmp_path)
    learn.fit(1, resume=True)
    with pytest.raises(ValueError, match=r"is of the fit that this learner has just ended. Give each fit a folder"):
        learn.fit(1, resume=True)


def test_a_fit_that_failed_is_gone_on_from_in_the_same_process(tmp_path):
    whole = toy(tmp_path / "whole")
    whole.fit(2)
    learn = toy(tmp_path / "failed", "3step")
    with learn.added_cbs(At(80, die)), pytest.raises(Dead):
        learn.fit(2)
    learn.fit(2, resume=True)
    assert weights(learn) == weights(whole)


def test_a_fit_that_failed_after_one_that_ended_is_gone_on_from_too(tmp_path):
    learn = toy(tmp_path, "3step")
    learn.fit(1)
    with learn.added_cbs(At(80, die)), pytest.raises(Dead):
        learn.fit(2)
    learn.fit(2, resume=True)
    assert (learn.epoch, learn.pct_train) == (1, 1.0)


def test_two_checkpoints_do_not_share_a_folder(tmp_path):
    learn = toy_learner(cbs=[Checkpoint("1ep"), Checkpoint("10min")], path=tmp_path)
    with pytest.raises(ValueError, match=r"two Checkpoints would write to `.*checkpoints`. Give one of them another"):
        learn.fit(1)


def test_two_checkpoints_in_folders_of_their_own_both_store(tmp_path):
    toy_learner(cbs=[Checkpoint(path=tmp_path / "a"), Checkpoint("2step", path=tmp_path / "b")]).fit(1)
    assert [len(runs_in(tmp_path / name)) for name in "ab"] == [1, 3]


def test_two_learners_store_beside_each_other(tmp_path):
    one, two = toy(tmp_path / "1"), toy(tmp_path / "2", lr=0.01)
    one.add_cb(Callback(after_epoch=lambda cb: two.fit(1)))
    one.fit(2)
    two_again, one_again = toy(tmp_path / "2", lr=0.01), toy(tmp_path / "1")
    two_again.fit(1, resume=True)
    assert weights(two_again) == weights(two)
    one_again.add_cb(Callback(after_epoch=lambda cb: None))
    one_again.fit(2, resume=True)
    assert weights(one_again) == weights(one)


def test_a_checkpoint_that_another_learner_uses_next_begins_a_run_of_its_own(tmp_path):
    shared = Checkpoint()
    for name in ("a", "b"):
        toy_learner(cbs=shared, path=tmp_path / name).fit(1)
    names = [runs_in(tmp_path / name / "models" / "checkpoints")[0].stem for name in ("a", "b")]
    assert [name[:6] for name in names] == ["000000", "000000"] and names[0] != names[1]


# What does not match


def one_layer(**kwargs):
    return {"model": nn.Linear(2, 1), **kwargs}


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        (one_layer(), {}, "`0.weight` saved but not in the model"),
        ({"n_train": 40}, {}, "32 samples for training then and 40 now"),
        ({"bs": 4}, {}, "4 training batches then and 8 now"),
        ({"lr": 0.5}, {}, "`lr=0.1` then and `lr=0.5` now"),
        ({}, {"wd": 0.1}, "`wd=None` then and `wd=0.1` now"),
        ({}, {"n_epoch": 3}, "`n_epoch=2` then and `n_epoch=3` now"),
        ({}, {"cbs": Counting}, "callback Counting was not there then"),
    ],
)
def test_a_resume_that_does_not_match_says_what_and_stops(options, call, message, tmp_path):
    toy(tmp_path).fit(2)
    learn = toy(tmp_path, **options)
    start = weights(learn)
    with pytest.raises(ValueError) as caught:
        learn.fit(**{"n_epoch": 2, **call}, resume=True)
    assert message in str(caught.value)
    assert weights(learn) == start


def test_another_schedule_is_named(tmp_path):
    toy(tmp_path).fit_one_cycle(2, 0.1)
    with pytest.raises(
        ValueError, match=r"the schedule of `lr` of ParamScheduler is another. Repeat the call as it was"
    ):
        toy(tmp_path).fit_one_cycle(2, 0.2, resume=True)


def test_a_callback_that_is_missing_is_named(tmp_path):
    learn = toy(tmp_path)
    learn.fit(2, cbs=Callback(after_loss=lambda cb: None))
    with pytest.raises(ValueError, match="callback Callback was there then and is not now: add it first"):
        toy(tmp_path).fit(2, resume=True)


def test_a_resume_that_was_refused_does_not_mark_the_next_fit(tmp_path):
    toy(tmp_path).fit(2)
    learn = toy(tmp_path)
    with pytest.raises(ValueError, match="another fit"):
        learn.fit(3, resume=True)
    learn.fit(2)
    assert len({p.stem[7:] for p in runs_in(tmp_path)}) == 2


def test_weights_are_no_checkpoint(tmp_path):
    path = toy_learner(path=tmp_path).save("weights")
    with pytest.raises(ValueError, match=r"weights\.pth"):
        toy_learner().fit(1, resume=path)


# When


def numbers(folder):
    return [read_run(p).state["counters"]["opt_iter"] for p in runs_in(folder)]


@pytest.mark.parametrize(
    ("every", "updates"),
    [("1ep", [4, 8, 12]), ("2ep", [8, 12]), ("5step", [5, 10, 12]), ("10min", [12]), ("1h", [12])],
)
def test_files_are_written_when_they_are_due_and_at_the_end(every, updates, tmp_path):
    learn = toy_learner(cbs=Checkpoint(every, keep=None, path=tmp_path))
    learn.fit(3)
    assert numbers(tmp_path) == updates


def test_seconds_are_counted_by_the_clock(tmp_path):
    learn = toy_learner(cbs=Checkpoint("1s", keep=None, path=tmp_path))
    learn.fit(1, cbs=Callback(after_batch=lambda cb: time.sleep(0.6) if cb.training else None))
    assert numbers(tmp_path) == [2, 4, 4]


def test_steps_are_whole_multiples_after_a_resume_too(tmp_path):
    learn = toy_learner(cbs=Checkpoint("3step", keep=None, path=tmp_path))
    with learn.added_cbs(At(95, die)), pytest.raises(Dead):
        learn.fit(3)
    assert numbers(tmp_path) == [3, 6]
    toy_learner(cbs=Checkpoint("3step", keep=None, path=tmp_path)).fit(3, resume=True)
    assert numbers(tmp_path) == [3, 6, 9, 12, 12]


@pytest.mark.parametrize(
    ("every", "parsed"), [("1ep", (1, "ep")), (" 500 step", (500, "step")), ("10min", (10, "min"))]
)
def test_how_often_is_a_number_and_a_unit(every, parsed):
    assert parse_every(every) == parsed


@pytest.mark.parametrize("every", ["", "ep", "0ep", "-1ep", "1.5ep", "10m", 500, None])
def test_what_is_no_number_and_unit_is_refused(every):
    with pytest.raises(ValueError, match=r'write "1ep", "500step", "10min", "30s" or "2h"'):
        Checkpoint(every)


@pytest.mark.parametrize("keep", [0, -1, True, 1.5, "3"])
def test_a_number_of_files_that_is_none_is_refused(keep):
    with pytest.raises(ValueError, match=f"`keep={keep!r}`: pass how many files to keep"):
        Checkpoint(keep=keep)


# Ctrl-C and SIGTERM


def stopped(learn, n_epoch, number, signum, error):
    with learn.added_cbs(At(number, partial(signal.raise_signal, signum))), pytest.raises(error) as caught:
        learn.fit(n_epoch)
    return caught.value


@pytest.mark.parametrize("number", [0, 20, 47, 75, 92])
def test_ctrl_c_stores_the_place_and_another_process_goes_on_from_it(number, tmp_path):
    case = CASES["torch loaders"]
    learn = case.learner().add_cb(Checkpoint("9ep", path=tmp_path))
    stopped(learn, 2, number, signal.SIGINT, KeyboardInterrupt)
    assert outcome(case.resumed(tmp_path)) == outcome(case.run(case.learner()))


def test_resume_in_the_same_process_stays_in_the_same_run(tmp_path):
    learn = toy(tmp_path, "1step")
    stopped(learn, 2, 40, signal.SIGINT, KeyboardInterrupt)
    learn.resume()
    assert len({p.stem[7:] for p in runs_in(tmp_path)}) == 1
    assert [n for n, *_ in journal_lines(tmp_path)] == list(range(1, 9))


def journal_lines(folder):
    data = (folder / "journal").read_bytes()[16:]
    return [(int.from_bytes(data[i : i + 8], "little"), data[i + 8 : i + 20]) for i in range(0, len(data), 20)]


def test_sigterm_stores_the_place_and_ends_with_143(tmp_path, capsys):
    learn = toy_learner(cbs=Checkpoint("9ep", path=tmp_path))
    learn.logger = lambda row: None
    error = stopped(learn, 2, 30, signal.SIGTERM, SystemExit)
    (path,) = runs_in(tmp_path)
    assert error.code == 143
    assert said(capsys) == [f"SIGTERM: stopped; the same call with `resume=True` goes on from `{path}`"]
    whole, other = toy_learner(), toy(tmp_path)
    whole.fit(2)
    other.fit(2, resume=True)
    assert weights(other) == weights(whole)


def test_the_batch_is_finished_and_every_cleanup_run_before_sigterm_ends_it(tmp_path):
    learn = toy(tmp_path)
    heard = []
    learn.add_cb(Callback(after_step=lambda cb: heard.append("step"), cleanup_fit=lambda cb: heard.append("cleanup")))
    learn.add_cb(Callback(after_pred=lambda cb: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit):
        learn.fit(1)
    assert heard == ["step", "cleanup"]


def test_sigterm_in_a_validation_is_resumed_at_its_start(tmp_path, capsys):
    learn = toy(tmp_path, "9ep")
    learn.add_cb(Callback(after_pred=lambda cb: None if cb.training else signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit):
        learn.fit(1)
    other = toy(tmp_path)
    other.add_cb(Callback(after_pred=lambda cb: None))
    other.fit(1, resume=True)
    assert said(capsys)[-1] == f"goes on from `{runs_in(tmp_path)[0]}`: epoch 0 (its validation)"
    whole = toy_learner()
    whole.fit(1)
    assert list(map(list, other.recorder.values)) == list(map(list, whole.recorder.values))


def test_an_earlier_handler_of_sigterm_is_put_back(tmp_path):
    sent = []
    former = signal.signal(signal.SIGTERM, lambda *args: sent.append(1))
    try:
        toy(tmp_path).fit(1)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert sent == [1]


def test_in_another_thread_no_handler_is_set(tmp_path):
    seen = []
    learn = toy(tmp_path)
    learn.add_cb(Callback(after_batch=lambda cb: seen.append(signal.getsignal(signal.SIGTERM))))
    thread = threading.Thread(target=learn.fit, args=(1,))
    thread.start()
    thread.join()
    assert {*seen} == {signal.getsignal(signal.SIGTERM)}
    assert len(runs_in(tmp_path)) == 1


SCRIPT = """
import sys, time, torch
from torch import nn
from torch.utils.data import DataLoader
from learnloop import Callback, Checkpoint, DataLoaders, Learner
from tests.loop.test_fits import Noisy, model, noisy_collate
torch.set_num_threads(1)
torch.manual_seed(0)
dls = DataLoaders(DataLoader(Noisy(), 5, shuffle=True, num_workers=2, collate_fn=noisy_collate))
learn = Learner(dls, model(), nn.CrossEntropyLoss())
slow = Callback(after_batch=lambda cb: (print("batch", flush=True), time.sleep(float(sys.argv[2]))))
learn.fit_one_cycle(2, 0.1, cbs=[Checkpoint(path=sys.argv[1]), slow], resume=True)
print([p.tolist() for p in learn.model.parameters()], learn.recorder.raw_losses)
"""


def process(folder, seconds):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    code = [sys.executable, "-c", SCRIPT, str(folder), str(seconds)]
    return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_a_process_with_data_workers_that_is_sent_sigterm_ends_with_143_and_another_goes_on(tmp_path):
    whole = process(tmp_path / "whole", 0)
    first = process(tmp_path / "run", 0.2)
    while first.stdout.readline() != "batch\n":
        pass
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 143, errors
    second, _ = process(tmp_path / "run", 0).communicate(timeout=60)
    assert "goes on from" in second
    assert second.splitlines()[-1] == whole.communicate(timeout=60)[0].splitlines()[-1]


# Disks and errors


def spoil(folder):
    """Puts a file where the folder was."""
    folder.rename(folder.with_name("aside"))
    folder.touch()


def mend(folder):
    folder.unlink()
    folder.mkdir(exist_ok=True)  # a file on its way may have made it already
    for path in folder.with_name("aside").iterdir():
        path.rename(folder / path.name)
    folder.with_name("aside").rmdir()


def at_batch(number, action):
    return Callback(after_batch=lambda cb: action() if cb.training and cb.train_iter == number else None)


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_batch(tmp_path):
    (tmp_path / "file").touch()
    learn = toy(tmp_path / "file" / "runs")
    with pytest.raises(OSError, match="no checkpoint could be written there"):
        learn.fit(1)
    assert learn.train_iter == 0


def test_a_first_file_that_fails_is_an_error_and_the_training_is_intact(tmp_path):
    folder = tmp_path / "runs"
    learn, whole = toy(folder, "3step"), toy(tmp_path / "whole", "3step")
    cbs = lambda number: at_batch(number, lambda: spoil(folder))  # noqa: E731
    whole.fit(2, cbs=cbs(99))
    with pytest.raises(FileExistsError) as caught:
        learn.fit(2, cbs=cbs(2))
    assert caught.value.filename == str(folder / runs_name(0, learn))
    assert any("`learn.resume()` goes on from there" in note for note in caught.value.__notes__)
    mend(folder)
    learn.resume()
    assert weights(learn) == weights(whole)
    assert learn.recorder.raw_losses == whole.recorder.raw_losses


def runs_name(number, learn):
    (checkpoint,) = [cb for cb in learn.cbs if isinstance(cb, Checkpoint)]
    return f"{number:06d}-{checkpoint.run_id}.ckpt"


def test_a_later_file_that_fails_is_a_warning_and_the_training_goes_on(tmp_path):
    folder = tmp_path / "runs"
    learn, whole = toy(folder, "2step"), toy_learner()
    whole.fit(2)
    with pytest.warns(UserWarning, match=r"the checkpoint was not written: .*File exists"):
        learn.fit(2, cbs=[at_batch(3, lambda: spoil(folder)), at_batch(7, lambda: mend(folder))])
    assert weights(learn) == weights(whole)
    assert numbers(folder)[-1] == 8


def test_where_the_newest_file_is_missing_at_the_end_the_fit_says_so(tmp_path):
    folder = tmp_path / "runs"
    learn, whole = toy(folder, "2step"), toy_learner()
    whole.fit(2)
    with pytest.warns(UserWarning, match="the checkpoint was not written"), pytest.raises(FileExistsError):
        learn.fit(2, cbs=at_batch(3, lambda: spoil(folder)))
    assert weights(learn) == weights(whole)
    mend(folder)
    assert numbers(folder) == [2]


def test_an_error_in_the_training_comes_first_and_one_of_the_disk_is_noted_on_it(tmp_path):
    folder = tmp_path / "runs"
    learn = toy(folder, "2step")

    def fail():
        raise ZeroDivisionError("mine")

    cbs = [at_batch(3, lambda: spoil(folder)), at_batch(5, fail)]
    with pytest.warns(UserWarning, match="not written"), pytest.raises(ZeroDivisionError, match="mine") as caught:
        learn.fit(2, cbs=cbs)
    assert any("also raised: FileExistsError" in note for note in caught.value.__notes__)


def test_what_was_being_written_when_the_training_failed_is_whole(tmp_path):
    learn = toy(tmp_path, "1step", model=nn.Sequential(nn.Linear(2, 3000), nn.Linear(3000, 1)))
    with learn.added_cbs(at_batch(3, die)), pytest.raises(Dead):
        learn.fit(1)
    assert numbers(tmp_path) == [1, 2]


def test_ctrl_c_with_a_disk_that_fails_is_a_warning_and_still_ctrl_c(tmp_path):
    folder = tmp_path / "runs"
    learn, whole = toy(folder, "9ep"), toy_learner()
    whole.fit(2)
    with pytest.warns(UserWarning, match="the checkpoint was not written"), pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=at_batch(2, lambda: (spoil(folder), signal.raise_signal(signal.SIGINT))))
    mend(folder)
    learn._call.cbs[0].reads_only = True
    learn._call.cbs[0].after_batch = lambda: None
    learn.resume()
    assert weights(learn) == weights(whole)


# Copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cb: pickle.loads(pickle.dumps(cb))])
def test_a_checkpoint_can_be_copied_in_the_middle_of_a_fit_and_its_copy_is_closed(copied, tmp_path):
    checkpoint, copies = Checkpoint("1step", path=tmp_path), []

    def take():
        checkpoint.learn = None
        copies.append(copied(checkpoint))
        checkpoint.learn = learn

    learn = toy_learner(cbs=[checkpoint, At(60, take)])
    learn.fit(2)
    assert (copies[0].every, copies[0].path, copies[0]._journal, copies[0]._sigterm) == ("1step", tmp_path, None, None)
    assert len(numbers(tmp_path)) == 3


def test_a_learner_that_was_stopped_with_a_checkpoint_can_be_copied_and_the_copy_goes_on(tmp_path):
    whole = tuned(None)
    learn = tuning(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tune(learn, At(20, partial(signal.raise_signal, signal.SIGINT)))
    other = copy.deepcopy(learn)
    other.resume()
    assert weights(other) == weights(whole)
    assert weights(learn) != weights(whole)
    learn.resume()
    assert weights(learn) == weights(whole)


# Verbs that make several fits


def tuning(folder):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    checkpoint = [] if folder is None else [Checkpoint("2step", path=folder)]
    return toy_learner(model=layers, splitter=body_and_head, cbs=checkpoint)


def body_and_head(layers):
    return [layers[0].parameters(), layers[2].parameters()]


def tune(learn, *cbs, epochs=2, **kwargs):
    learn.fine_tune(epochs, 0.1, cbs=[*cbs], **kwargs)
    return learn


def tuned(folder, *cbs, **kwargs):
    return tune(tuning(folder), *cbs, resume=folder is not None, **kwargs)


@pytest.mark.parametrize("number", [20, 50, 75, 80, 110])
def test_fine_tune_goes_on_in_the_phase_in_which_it_was_killed(number, tmp_path):
    whole = tuned(None)
    with suppress(Dead):
        tuned(tmp_path, At(number, die))
    learn = tuned(tmp_path)
    assert weights(learn) == weights(whole)
    assert [p.requires_grad for p in learn.model.parameters()] == [True] * 4


def test_fine_tune_skips_the_phase_that_is_finished(tmp_path, capsys):
    epochs = []

    class Epochs(Callback):
        reads_only = True

        def before_epoch(self):
            epochs.append((self.epoch, self.n_epoch, self.learn.model[0].weight.requires_grad))

    with suppress(Dead):
        tuned(tmp_path, At(110, die))
    tuned(tmp_path, Epochs())
    assert epochs == [(0, 2, True), (1, 2, True)]


def test_the_phases_of_fine_tune_are_numbered_in_the_files(tmp_path):
    tuned(tmp_path)
    assert [read_run(p).phase for p in runs_in(tmp_path)] == [1, 1, 1]


def test_another_fine_tune_is_refused(tmp_path):
    with suppress(Dead):
        tuned(tmp_path, At(110, die))
    with pytest.raises(ValueError, match="`n_epoch=2` then and `n_epoch=3` now"):
        tuned(tmp_path, epochs=3)


def test_ctrl_c_in_the_first_phase_is_resumed_with_the_phases_after_it(tmp_path):
    learn = tuning(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tune(learn, At(20, partial(signal.raise_signal, signal.SIGINT)))
    learn.resume()
    assert weights(learn) == weights(tuned(None))
    with pytest.raises(RuntimeError, match="nothing to resume"):
        learn.resume()
