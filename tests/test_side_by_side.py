"""Several learners in one process, in several threads; learners that are copied, pickled, or forked away.

Everything that a training needs is on its learner. What learners of one process share is the global random generators:
models that draw from them (dropout, initialisation) get other numbers beside each other, each as random as alone.
"""

import copy
import io
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import learnloop as ll
from learnloop.data import keyed

N = 32


class Noisy(Dataset):
    """Augmented samples: each draws from the generators of torch and numpy."""

    def __init__(self, pause=0.0):
        t = torch.linspace(-1, 1, N)[:, None]
        self.x, self.y, self.pause = torch.cat([t, t**2], 1), 2 * t - t**2, pause

    def __len__(self):
        return N

    def __getitem__(self, i):
        noise = torch.randn(2) * 0.1
        time.sleep(self.pause)
        return self.x[i] + noise + np.random.normal() * 0.1, self.y[i]


def network(*middle):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), *middle, nn.Tanh(), nn.Linear(4, 1))


def callbacks():
    return [
        *(ll.MixedPrecision("bf16"), ll.GradientAccumulation(8), ll.GradientClip(), ll.SAM(), ll.MicroBatch()),
        *(ll.EMA(), ll.ActivationStats(), ll.GradientStats(), ll.SpikeGuard(), ll.SaveModelCallback()),
        *(ll.CSVLogger(), ll.JSONLLogger(), ll.Checkpoint("5step", keep=2), ll.TerminateOnNaNCallback()),
        *(ll.EarlyStoppingCallback(patience=9), ll.ParamScheduler({"lr": ll.SchedLin(0.1, 0.01)})),
    ]


def learner(path, seed=1, cbs=None, pause=0.0, model=None, **loader):
    data = Noisy(pause)
    train = DataLoader(data, batch_size=4, shuffle=True, **loader)
    dls = ll.DataLoaders(train, ll.TensorLoader(data.x, data.y, bs=8), device="cpu")
    dls.seed = seed
    cbs = callbacks() if cbs is None else cbs
    model = network() if model is None else model
    learn = ll.Learner(dls, model, nn.MSELoss(), ll.Adam, 0.01, cbs=cbs, path=path, metrics=ll.mae)
    learn.remove_cb(ll.ProgressCallback)
    learn.logger = quiet
    return learn


def quiet(row):
    """A logger that can be pickled."""


def outcome(learn):
    """Weights, statistics and record, to the bit."""
    rows = [list(row)[:-1] if learn.recorder.add_time else list(row) for row in learn.recorder.values]
    return {k: v.tolist() for k, v in learn.model.state_dict().items()}, learn.recorder.raw_losses, rows


def trained(learn, n_epoch=1):
    learn.fit(n_epoch)
    return outcome(learn)


def in_threads(*actions):
    """Results of functions that begin at the same time, each in a thread of its own."""
    results, barrier = [None] * len(actions), threading.Barrier(len(actions))

    def run(i):
        barrier.wait()
        try:
            results[i] = actions[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    return results


# Side by side


def test_two_threads_train_as_if_alone(tmp_path):
    alone = [trained(learner(tmp_path / f"alone {seed}", seed)) for seed in (1, 2)]
    first, second = (learner(tmp_path / f"{seed}", seed, pause=1e-4) for seed in (1, 2))
    found = in_threads(lambda: trained(first), lambda: trained(second))
    assert found == alone and alone[0] != alone[1]


def test_beside_validations_predictions_and_finders_too(tmp_path):
    alone = trained(learner(tmp_path / "alone", cbs=[]))
    other, learn = learner(tmp_path / "other", 2, cbs=[]), learner(tmp_path / "one", cbs=[], pause=1e-4)

    def look():
        other.create_opt()
        for _ in range(3):
            other.validate()
            other.get_preds()
            other.lr_find(num_it=8, show_plot=False)

    assert in_threads(lambda: trained(learn), look)[0] == alone


def test_the_global_generators_are_afterwards_what_they_were(tmp_path):
    bits = np.random.get_bit_generator()
    learners = [learner(tmp_path / f"{seed}", seed, cbs=[], pause=1e-4) for seed in (1, 2, 3)]
    in_threads(*(lambda learn=learn: trained(learn) for learn in learners))
    assert np.random.get_bit_generator() is bits


def test_with_workers_in_both_threads(tmp_path):
    alone = trained(learner(tmp_path / "alone", cbs=[]), 1)
    learners = [learner(tmp_path / f"{i}", cbs=[], num_workers=1) for i in (1, 2)]
    assert in_threads(*(lambda learn=learn: trained(learn, 1) for learn in learners)) == [alone, alone]


def test_threads_may_share_their_loaders(tmp_path):
    alone = trained(learner(tmp_path / "alone", cbs=[]))
    learners = [learner(tmp_path / f"{i}", cbs=[], pause=1e-4) for i in (1, 2)]
    generator = torch.Generator().manual_seed(0)
    shared = DataLoader(Noisy(1e-4), batch_size=4, shuffle=True, generator=generator)
    for learn in learners:
        learn.dls.loaders[0] = shared
    found = in_threads(*(lambda learn=learn: trained(learn) for learn in learners))
    assert found[0] == found[1] and found[0] != alone


def test_a_fit_inside_of_another_learners_fit(tmp_path):
    alone = [trained(learner(tmp_path / f"alone {seed}", seed)) for seed in (1, 2)]
    inner = learner(tmp_path / "inner", 2)
    inside = ll.Callback(after_epoch=lambda cb: inner.fit(1))
    outer = learner(tmp_path / "outer", 1)
    outer.add_cb(inside)
    assert [trained(outer), outcome(inner)] == alone


def test_an_error_in_one_thread_is_not_the_others(tmp_path):
    alone = trained(learner(tmp_path / "alone", 1))
    fails = learner(tmp_path / "fails", 2)
    fails.add_cb(ll.Callback(after_loss=lambda cb: 1 / 0 if cb.learn.train_iter == 3 else None))
    learn = learner(tmp_path / "one", 1, pause=1e-4)
    error, found = in_threads(lambda: trained(fails), lambda: trained(learn))
    assert isinstance(error, ZeroDivisionError) and found == alone


# Copies


def pickled(learn):
    return pickle.loads(pickle.dumps(learn))


def saved(learn):
    file = io.BytesIO()
    torch.save(learn, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_after_a_fit_goes_on_as_the_learner_itself(copied, tmp_path):
    learn = learner(tmp_path / "one")
    learn.fit(1)
    other = copied(learn)
    other.path = tmp_path / "other"
    assert not any(a is b for a in learn.cbs for b in other.cbs)
    assert all(cb.learn is other for cb in other.cbs)
    assert {p.data_ptr() for p in learn.model.parameters()}.isdisjoint(p.data_ptr() for p in other.model.parameters())
    torch.manual_seed(0)
    expected = trained(learn)
    torch.manual_seed(0)
    assert trained(other) == expected


TAKEN = []


class Takes(ll.Callback):
    """Takes a copy of the learner before a step in the middle of an epoch."""

    order = 100

    def __init__(self, copied):
        self.copied = copied

    def before_step(self):
        if self.learn.train_iter == 5 and self.learn.epoch == 0 and not TAKEN:
            TAKEN.append(self.copied(self.learn))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_from_the_middle_of_a_fit_can_be_fitted_and_the_fit_goes_on(copied, tmp_path):
    learn, without = learner(tmp_path / "one", cbs=[*callbacks(), Takes(copied)]), learner(tmp_path / "without")
    assert trained(learn) == trained(without)
    other = TAKEN.pop()
    other.path = tmp_path / "other"
    other.remove_cb(Takes)
    assert other.task is None and (other.xb, other.pred) == ((None,), None)
    other.fit(1)
    assert other.train_iter == N // 4
    learn.remove_cb(Takes)
    assert trained(learn) == trained(without)


# Processes


def in_fork(action):
    """What a function gives in a forked process."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(read)
            with os.fdopen(write, "wb") as file:
                pickle.dump(action(), file)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        result = pickle.load(file)
    assert os.waitpid(process, 0)[1] == 0
    return result


def test_a_fork_after_a_fit_trains_on_by_itself(tmp_path):
    learn = learner(tmp_path / "one")
    learn.add_cb(ll.Notify())
    learn.fit(1)
    torch.manual_seed(0)

    def go_on():
        learn.path = tmp_path / "fork"
        return trained(learn)

    found = in_fork(go_on)
    learn.path = tmp_path / "on"
    assert trained(learn) == found
    assert (tmp_path / "fork" / "history.csv").read_text().count("\n") == 2
    assert (tmp_path / "one" / "history.csv").read_text().count("\n") == 2


def test_a_fork_does_not_wait_for_what_a_thread_of_the_other_process_was_doing():
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with keyed._Seeded()(1):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(30)
    loader = ll.DataLoaders(DataLoader(Noisy(), batch_size=4)).train

    def read():
        return len(list(keyed.batches(loader, keyed.Key(0, 0))))

    try:
        assert in_fork(read) == N // 4
    finally:
        leave.set()
        thread.join()
