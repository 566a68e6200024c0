"""Which batches a phase sees: loaders of every kind, and passes in `fit(n_step=…)`."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from learnloop import Callback, CancelBatchException, CancelStepException, CancelTrainException, DataLoaders, Recorder
from learnloop.data.keyed import end_workers
from learnloop.loop.passes import SAMPLE, Passes, how_data_goes_on, place, sample_numbers, waits
from tests.toys import Heard, learner, loaders, raise_at, raising, tensor_loader


class Stream:
    """A loader without a length."""

    def __init__(self, n_batch):
        self.n_batch = n_batch

    def __iter__(self):
        return iter(list(tensor_loader(self.n_batch)) if self.n_batch else [])


#: Eight points of a line, whose x are their numbers.
POINTS = TensorDataset(torch.arange(8.0)[:, None], 2 * torch.arange(8.0)[:, None] + 1)


class Stepped(IterableDataset):
    def __iter__(self):
        return iter([(torch.tensor([float(i)]), torch.tensor([2.0 * i + 1])) for i in range(4)])


def over(train, *valid):
    return DataLoaders(train, *valid, device="cpu")


# Loaders without len


@pytest.mark.parametrize(
    "loader", [Stream(3), DataLoader(Stepped(), batch_size=2)], ids=["iterable", "IterableDataset"]
)
def test_a_loader_without_len_trains_and_validates(loader):
    seen = []
    look = Callback(before_train=lambda cb: seen.append(cb.n_iter), before_validate=lambda cb: seen.append(cb.n_iter))
    learn = learner([look, heard := Heard(["after_batch"])], dls=over(loader, loader))
    learn.fit(2)
    per_pass = 3 if isinstance(loader, Stream) else 2
    assert seen == [None] * 4
    assert len(heard.events) == 4 * per_pass and learn.opt_iter == learn.train_iter == 2 * per_pass


def test_without_len_pct_train_moves_from_epoch_to_epoch():
    seen = []
    learner(Callback(after_batch=lambda cb: seen.append(cb.pct_train)), dls=over(Stream(2))).fit(2)
    assert seen == [0.0, 0.0, 0.5, 0.5]


class Says(Stream):
    """A loader that has not as many batches as it says."""

    def __len__(self):
        return 2


def test_a_loader_with_more_batches_than_it_says_leads_pct_train_no_further_than_the_epochs_end():
    seen = []
    learner(Callback(after_batch=lambda cb: seen.append(cb.pct_train)), dls=over(Says(4))).fit(2)
    assert seen == [0.25, 0.5, 0.5, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_batches_made_beforehand_in_a_list_are_a_loader():
    batches = list(tensor_loader(3))
    learn = learner(dls=over(batches, batches))
    learn.fit(2)
    assert learn.opt_iter == 6


# Empty loaders


@pytest.mark.parametrize("which", ["training", "validation"])
def test_an_empty_loader_is_refused_before_anything_begins(which):
    empty = DataLoader(TensorDataset(torch.zeros(1, 1), torch.zeros(1, 1)), batch_size=2, drop_last=True)
    dls = over(empty, tensor_loader(1)) if which == "training" else over(tensor_loader(1), empty)
    learn = learner(heard := Heard(), dls=dls)
    heard.events.clear()
    with pytest.raises(ValueError, match=f"the {which} loader is empty: DataLoader has 0 batches"):
        learn.fit(1, cbs=Callback())
    assert heard.events == [] and learn.opt is None and learn.task is None and list(learn.cbs) == [heard]


@pytest.mark.parametrize("which", ["training", "validation"])
def test_a_loader_without_len_that_yields_nothing_raises_at_the_end_of_its_phase(which):
    dls = over(Stream(0), Stream(1)) if which == "training" else over(Stream(1), Stream(0))
    learn = learner(heard := Heard(), dls=dls)
    with pytest.raises(
        ValueError, match=f"the {which} loader yielded no batch in epoch 0: the Stream is empty, or an "
    ):
        learn.fit(1)
    assert heard.events[-1] == "cleanup_fit" and learn.task is None


def test_an_iterator_that_can_be_read_only_once_raises_in_the_second_epoch():
    learn = learner(dls=over(iter(list(tensor_loader(2)))))
    with pytest.raises(
        ValueError, match=r"the training loader yielded no batch in epoch 1.*read only once.*every epoch"
    ):
        learn.fit(2)
    assert learn.train_iter == 2


def test_an_iterator_that_can_be_read_only_once_is_enough_for_one_epoch():
    learn = learner(dls=over(iter(list(tensor_loader(2)))))
    learn.fit(1)
    assert learn.opt_iter == 2


def test_a_phase_cancelled_before_its_first_batch_is_not_taken_for_empty():
    learn = learner(raise_at("before_batch", CancelTrainException))
    learn.fit(1)


def test_a_loader_that_fails_at_the_beginning_of_an_epoch_is_noted_with_batch_number_0():
    class Second(Stream):
        epoch = 0

        def __iter__(self):
            self.epoch += 1
            if self.epoch == 2:
                raise OSError("gone")
            return super().__iter__()

    with pytest.raises(OSError, match="gone") as caught:
        learner(dls=over(Second(2))).fit(2)
    assert caught.value.__notes__[0].endswith("number 0 of epoch 1, train")


def test_a_loader_that_fails_is_noted_with_the_phase():
    def broken():
        yield from tensor_loader(1)
        raise OSError("disk")

    for training, dls in ((True, over(broken())), (False, over(tensor_loader(1), broken()))):
        with pytest.raises(OSError, match="disk") as caught:
            learner(dls=dls).fit(1)
        phase = "training" if training else "validation"
        assert caught.value.__notes__[0].startswith(f"raised by the {phase} loader")


# Batches without targets


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        ({"x": torch.zeros(2, 1), "height": torch.zeros(2, 1)}, "({x: float32[2, 1] cpu, height: float32[2, 1] cpu})"),
        (torch.zeros(2, 1), "(float32[2, 1] cpu)"),
        (np.zeros((2, 1)), "(ndarray)"),
    ],
)
def test_a_fit_over_batches_without_targets_warns_that_it_trained_nothing_and_shows_one(batch, shown):
    learn = learner(dls=over([batch]), model=lambda x: x)
    with pytest.warns(UserWarning) as caught:
        learn.fit(1)
    assert [str(w.message) for w in caught] == [
        f"nothing was trained: there is no loss, because batches like {shown} have no targets. Say where they are: "
        "`DataLoaders(…, targets=…)` names the keys of a mapping, `n_inp=…` splits a tuple."
    ]


@pytest.mark.parametrize("event_name", ["before_batch", "after_pred"])
@pytest.mark.filterwarnings("error")
def test_a_callback_that_brings_targets_or_cancels_says_itself_what_is_trained(event_name):
    def supply(cb):
        cb.learn.yb = (cb.x,)

    learner(Callback(**{event_name: supply}), dls=over([torch.zeros(2, 1)])).fit(1)
    learner(Callback(**{event_name: raising(CancelBatchException)})).fit(1)


# fit(n_step=…, valid_every=…)


def steps(n_step, valid_every=None, cbs=(), dls=None):
    """What happened in a fit of `n_step` updates: a letter per training batch (t), validation (V) and epoch (E)."""
    letters = []
    note = Callback(
        before_batch=lambda cb: letters.append("t") if cb.training else None,
        before_validate=lambda cb: letters.append("V"),
        before_epoch=lambda cb: letters.append("E"),
    )
    learn = learner([*cbs, note], dls=dls)
    learn.fit(n_step=n_step, valid_every=valid_every)
    return "".join(letters), learn


def test_n_step_counts_updates_and_an_epoch_is_the_stretch_between_two_validations():
    letters, learn = steps(5, 2, dls=loaders(3, 1))
    assert letters == "EttVEttVEtV"
    assert (learn.opt_iter, learn.train_iter, learn.n_epoch, learn.pct_train) == (5, 5, 3, 1.0)


def test_without_valid_every_there_is_one_validation_at_the_end():
    letters, learn = steps(7, dls=loaders(3, 1))
    assert letters == "EtttttttV" and learn.n_epoch == 1


def test_the_loader_is_begun_again_inside_an_epoch_as_needed():
    letters, learn = steps(5, 4, dls=loaders(2, None))
    assert letters == "EttttEt" and learn.opt_iter == 5


def test_with_n_step_pct_train_counts_updates():
    seen = []
    look = Callback(
        before_batch=lambda cb: seen.append(cb.pct_train), before_train=lambda cb: seen.append(cb.pct_train)
    )
    steps(4, 2, cbs=[look], dls=loaders(3, None))
    assert seen == [0.0, 0.0, 0.25, 0.5, 0.5, 0.75]


def test_with_n_step_n_iter_is_the_loaders_length():
    seen = []
    steps(4, 4, cbs=[Callback(before_batch=lambda cb: seen.append((cb.iter, cb.n_iter)))], dls=loaders(2, None))
    assert seen == [(0, 2), (1, 2), (2, 2), (3, 2)]


class Closed:
    """A loader of two batches whose iterators note that they were closed."""

    def __init__(self):
        self.closed = []

    def __iter__(self):
        return ClosedIterator(self.closed)


class ClosedIterator:
    def __init__(self, closed):
        self.batches, self.closed = iter(tensor_loader(2)), closed

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)

    def close(self):
        self.closed.append(self)


def test_every_pass_over_the_loader_is_closed():
    loader = Closed()
    learner(dls=over(loader)).fit(n_step=5)
    assert len(set(map(id, loader.closed))) == 3


def test_a_dry_run_closes_the_loader_that_it_has_read_a_part_of():
    loader = Closed()
    learner(dls=over(loader)).dry_run()
    assert len(set(map(id, loader.closed))) == 1


def test_n_step_works_over_a_loader_without_len():
    letters, learn = steps(5, 3, dls=over(Stream(2), Stream(1)))
    assert letters == "EtttVEttV" and learn.pct_train == 1.0


def test_steps_that_are_cancelled_do_not_count():
    """As where gradients are accumulated over two batches."""

    class EverySecond(Callback):
        def before_step(self):
            if self.train_iter % 2 == 0:
                raise CancelStepException

    letters, learn = steps(3, 2, cbs=[EverySecond()], dls=loaders(5, 1))
    assert letters == "EttttVEttV" and learn.opt_iter == 3


def test_cancelled_batches_do_not_count_as_updates():
    letters, learn = steps(2, cbs=[raise_at("before_batch", CancelBatchException)], dls=loaders(2, None))
    assert letters == "Ett" and (learn.train_iter, learn.opt_iter) == (3, 2)  # the log did not hear the first


@pytest.mark.parametrize("event_name", ["before_step", "before_batch"])
def test_a_whole_pass_without_an_update_raises(event_name):
    cancel = CancelStepException if event_name == "before_step" else CancelBatchException
    learn = learner(Callback(**{event_name: raising(cancel)}), dls=loaders(3, None))
    with pytest.raises(RuntimeError, match=r"a whole pass over the training loader \(3 batches\) made no update"):
        learn.fit(n_step=2)
    assert learn.train_iter == 3 and learn.task is None


@pytest.mark.parametrize(
    ("run", "named"),
    [(lambda learn: learn.fit(n_step=2), r"fit\(n_step=…\)"), (lambda learn: learn.lr_find(), "lr_find")],
    ids=["fit", "lr_find"],
)
def test_that_error_names_what_would_never_end(run, named):
    learn = learner(Callback(before_step=raising(CancelStepException)), default_cbs=True)
    with pytest.raises(RuntimeError, match=f"so `{named}` would never end. Check which callback cancels the step"):
        run(learn)


@pytest.mark.parametrize("opt_iter", [0, 1])
def test_a_pass_begun_in_the_middle_may_end_without_an_update(opt_iter):
    learn = learner(dls=loaders(2))
    learn.opt_iter = opt_iter  # in the batches before the middle
    passes = Passes(learn, learn.dls.train, number=0, start=1)
    for _ in range(2):
        next(passes)
    assert (passes.number, passes.taken, learn.opt_iter) == (1, 1, opt_iter)


def test_a_later_pass_without_an_update_raises_as_well():
    class Stops(Callback):
        def before_step(self):
            if self.train_iter >= 2:
                raise CancelStepException

    learn = learner(Stops(), dls=loaders(3, None))
    with pytest.raises(RuntimeError, match=r"\(3 batches\) made no update"):
        learn.fit(n_step=5)
    assert (learn.train_iter, learn.opt_iter) == (6, 2)


def test_a_model_without_parameters_raises_too_instead_of_running_for_ever():
    with pytest.raises(RuntimeError, match="made no update"):
        learner(model=nn.Identity()).fit(n_step=2)


def test_a_loader_that_yields_nothing_raises_too():
    with pytest.raises(RuntimeError, match=r"made no update.*that the loader is not empty"):
        learner(dls=over(Stream(0))).fit(n_step=2)


def test_an_iterator_that_can_be_read_only_once_raises_at_its_end():
    learn = learner(dls=over(iter(list(tensor_loader(3)))))
    with pytest.raises(RuntimeError, match=r"\(0 batches\) made no update.*that it can be iterated more than once"):
        learn.fit(n_step=5)
    assert learn.opt_iter == 3


def test_a_training_phase_cancelled_in_each_epoch_does_not_run_for_ever():
    _, learn = steps(4, 2, cbs=[Callback(before_train=raising(CancelTrainException))], dls=loaders(2, 1))
    assert learn.opt_iter == 0


def test_rows_and_after_epoch_work_as_in_a_fit_of_epochs():
    heard = Heard(["after_epoch", "after_train", "before_validate"])
    steps(4, 2, cbs=[heard])
    assert heard.events == ["after_train", "before_validate", "after_epoch"] * 2


def test_a_fit_of_epochs_after_one_of_steps_is_one_of_epochs():
    _, learn = steps(5, 2)
    learn.fit(1)
    assert (learn.n_step, learn.n_epoch, learn.train_iter, learn.pct_train) == (None, 1, 2, 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"pass either `fit\(n_epoch\)` or `fit\(n_step=…, valid_every=…\)`"),
        ({"n_epoch": 1, "n_step": 1}, ValueError, "pass either"),
        ({"n_epoch": 1, "valid_every": 1}, ValueError, "`valid_every` goes with `n_step`"),
        ({"n_epoch": -1}, ValueError, "`n_epoch=-1`: pass 0 or more"),
        ({"n_epoch": 1.5}, TypeError, "`n_epoch=1.5`: pass a whole number"),
        ({"n_epoch": True}, TypeError, "`n_epoch=True`: pass a whole number"),
        ({"n_step": 0}, ValueError, "`n_step=0`: pass 1 or more"),
        ({"n_step": 3, "valid_every": 0}, ValueError, "`valid_every=0`: pass 1 or more"),
        ({"n_epoch": 1, "start_epoch": -2}, ValueError, "`start_epoch=-2`: pass 0 or more"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_begins(arguments, error, message):
    learn = learner(heard := Heard())
    heard.events.clear()
    with pytest.raises(error, match=message):
        learn.fit(**arguments)
    assert heard.events == [] and learn.opt is None


class Who(Dataset):
    """Samples that say which process read them."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.tensor([float(os.getpid())])


@pytest.mark.filterwarnings("ignore:nothing was trained")
@pytest.mark.parametrize("persistent", [True, False])
def test_workers_of_a_torch_loader_live_on_from_epoch_to_epoch_where_they_are_meant_to(persistent):
    loader = DataLoader(Who(), 2, num_workers=1, persistent_workers=persistent)
    pids = []
    look = Callback(before_batch=lambda cb: pids.append(int(cb.x[0])))
    learner(look, dls=DataLoaders(loader, device="cpu", keyed=False)).fit(2)
    assert pids[0] == pids[1] and pids[2] == pids[3]
    assert (pids[0] == pids[2]) == persistent
    if persistent:
        end_workers(loader._iterator)


# What comes before the place of a state


class Numbered(Stream):
    """A loader that says where it stands, and goes on from there; it counts the batches that it reads."""

    def __init__(self, n_batch):
        super().__init__(n_batch)
        self.next = self.n_read = 0

    def __iter__(self):
        for batch in list(tensor_loader(self.n_batch))[self.next :]:
            self.n_read, self.next = self.n_read + 1, self.next + 1
            yield batch
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def stopped_after(n_batch, dls):
    """A learner whose fit was stopped after so many batches."""
    presses = Callback(after_batch=lambda cb: signal.raise_signal(signal.SIGINT) if cb.train_iter == n_batch else None)
    learn = learner(presses, dls=dls)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1)
    return learn


@pytest.mark.parametrize(
    ("dls", "goes_on"),
    [
        (over(tensor_loader(4)), "nothing before it is read again"),
        (over(list(tensor_loader(4))), "nothing before it is read again"),
        (SimpleNamespace(train=DataLoader(POINTS, 2)), "nothing before it is read again"),
        (over(Stream(4)), "the data is read again up to it"),
        (over(Numbered(4)), "the loader goes on by its own state"),
    ],
    ids=["keyed", "list", "put together elsewhere", "stream", "with a state"],
)
def test_it_is_said_what_becomes_of_the_data_before_the_place_of_a_state(dls, goes_on):
    learn = stopped_after(2, dls)
    assert how_data_goes_on(learn, learn.state_dict()) == goes_on


def test_a_loader_with_more_batches_than_it_says_is_gone_on_with_beyond_them():
    class Modest(Stream):
        def __len__(self):
            return 1

    learn = stopped_after(2, over(Modest(4)))
    learn.resume()
    assert learn.train_iter == 4


def test_a_loader_with_a_state_of_its_own_reads_no_batch_twice():
    loader = Numbered(4)
    learn = stopped_after(2, over(loader))
    learn.resume()
    assert loader.n_read == 4 and learn.train_iter == 4


def test_nor_does_it_after_a_second_stop():
    loader = Numbered(4)
    learn = stopped_after(2, over(loader))
    learn.add_cb(Callback(after_batch=lambda cb: signal.raise_signal(signal.SIGINT) if cb.train_iter == 3 else None))
    with pytest.raises(KeyboardInterrupt):
        learn.resume()
    learn.resume()
    assert loader.n_read == 4 and learn.train_iter == 4


class Counted(Sampler):
    """The numbers of the points in turn, from any one on."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        while self.next < len(POINTS):
            self.next += 1
            yield self.next - 1
        self.next = 0

    def __len__(self):
        return len(POINTS)


class Resumable(DataLoader):
    """A loader of torch's that goes on where its sampler stood."""

    def state_dict(self):
        return {"next": self.sampler.next}

    def load_state_dict(self, state):
        self.sampler.next = state["next"]


def test_nor_does_a_loader_of_torch_that_is_not_keyed():
    seen = []
    loader = Resumable(POINTS, 2, sampler=Counted())
    learn = stopped_after(2, DataLoaders(loader, device="cpu", keyed=False))
    learn.add_cb(Callback(before_batch=lambda cb: seen.extend(cb.x.flatten().tolist())))
    learn.resume()
    assert seen == [4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("half", ["state_dict", "load_state_dict"])
def test_a_loader_with_one_half_of_a_state_is_read_again(half):
    loader = Stream(4)
    setattr(loader, half, raising(AssertionError("asked")))
    learn = stopped_after(2, over(loader))
    assert learn.state_dict()["position"]["loader"] is None
    learn.resume()
    assert learn.train_iter == 4


def test_a_validation_inside_of_a_resumed_fit_reads_its_own_loader_from_the_beginning():
    valid = Numbered(4)
    learn = stopped_after(2, over(Numbered(4), valid))
    learn.add_cb(Callback(before_epoch=lambda cb: cb.learn.validate()))
    learn.resume()
    assert valid.n_read == 8  # before the training and after it


def test_a_loader_that_fails_after_a_resume_is_noted_with_the_number_of_the_batch():
    class Breaks(Stream):
        n_begun = 0

        def __iter__(self):
            self.n_begun += 1
            yield from list(tensor_loader(4))[: 4 if self.n_begun == 1 else 2]
            if self.n_begun == 2:
                raise OSError("gone")

    learn = stopped_after(2, over(Breaks(4)))
    with pytest.raises(OSError, match="gone") as caught:
        learn.resume()
    assert "on its way to the next batch, number 2 of epoch 0, train" in caught.value.__notes__[0]


def test_a_loader_that_draws_from_the_global_generators_draws_anew_in_each_epoch():
    class Shuffled:
        def __iter__(self):
            return (torch.full((1, 1), float(i)) for i in torch.randperm(8))

    orders = []
    learn = learner(Callback(before_batch=lambda cb: orders.append(int(cb.x))), dls=over(Shuffled()), model=lambda x: x)
    with pytest.warns(UserWarning, match="nothing was trained"):
        learn.fit(2)
    assert sorted(orders[:8]) == sorted(orders[8:]) and orders[:8] != orders[8:]


# How long some of the batches are waited for


class BeginsAnew:
    """An iterator of its own that starts from the beginning once it was asked for more than it has."""

    def __init__(self, n_batch, has_len):
        self.batches, self.i = list(tensor_loader(n_batch)), 0
        if has_len:
            self.__class__ = type("Sized", (BeginsAnew,), {"__len__": lambda self: len(self.batches)})

    def __iter__(self):
        return self

    def __next__(self):
        if self.i == len(self.batches):
            self.i = 0
            raise StopIteration
        self.i += 1
        return self.batches[self.i - 1]


@pytest.mark.parametrize("n_batch", [1, 2, 40])
@pytest.mark.parametrize("has_len", [True, False])
def test_a_loader_is_not_asked_for_more_after_its_end(n_batch, has_len):
    learn = learner(dls=over(BeginsAnew(n_batch, has_len)))
    learn.fit(2)
    assert learn.train_iter == 2 * n_batch


def test_nor_is_it_when_a_fit_is_resumed_there():
    state = stopped_after(3, over(BeginsAnew(3, has_len=True))).state_dict()
    learn = learner(dls=over(BeginsAnew(3, has_len=True)))
    learn.load_state_dict(state)
    learn.resume()
    assert learn.train_iter == 3


def test_waits_are_measured_in_the_middle_of_each_training_phase():
    learn = learner(dls=over(tensor_loader(100), tensor_loader(40)))
    learn.fit(3)
    assert [n for _, _, n in waits(learn)] == [SAMPLE] * 3
    assert all(0 < waited < passed for waited, passed, _ in waits(learn))
    learn.validate()
    assert len(waits(learn)) == 3
    learn.fit(n_step=150, valid_every=50)
    assert [n for _, _, n in waits(learn)] == [SAMPLE] * 3


@pytest.mark.parametrize(("n_batch", "measured"), [(1, 1), (3, 2), (10, 5), (40, SAMPLE)])
def test_waits_are_measured_from_the_middle_of_a_short_phase_on(n_batch, measured):
    learn = learner(dls=over(tensor_loader(n_batch)))
    learn.fit(1)
    assert [n for _, _, n in waits(learn)] == [measured]


def test_waits_are_measured_from_the_middle_of_what_is_left_to_a_resumed_fit():
    learn = stopped_after(8, over(tensor_loader(20)))
    learn.resume()
    assert [n for _, _, n in waits(learn)] == [6]


def test_the_seconds_in_which_waits_are_measured_are_a_part_of_the_fit():
    learn = learner(dls=over(tensor_loader(20)))
    begin = time.perf_counter()
    learn.fit(3)
    assert 0 < sum(passed for _, passed, _ in waits(learn)) < time.perf_counter() - begin


class Event:
    """A mark in the work of a GPU that takes five seconds; it says as little without its conditions as torch's."""

    def __init__(self, enable_timing=False):
        self.is_timed, self.stream, self.is_over = enable_timing, None, False

    def record(self, stream):
        self.stream = stream

    def synchronize(self):
        self.is_over = True

    def elapsed_time(self, end):
        if not (self.is_timed and end.is_timed and end.is_over and self.stream and end.stream):
            raise RuntimeError("not timed, not recorded or not over")
        return 5000.0


class Arrays:
    """Eight batches that no device takes."""

    def __len__(self):
        return 8

    def __iter__(self):
        return iter([np.zeros((2, 1))] * 8)


@pytest.mark.filterwarnings("ignore:nothing was trained")
def test_on_a_gpu_the_seconds_in_which_waits_are_measured_are_those_of_its_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    learn = learner(dls=SimpleNamespace(train=Arrays(), device=torch.device("cuda", 0)), model=lambda x: x)
    learn.fit(1)
    assert [(passed, n) for _, passed, n in waits(learn)] == [(5.0, 4)]


# The samples of a batch


def samples(*fit, dls=None, **kwargs):
    """The numbers of the samples in hand and of those after them, in `before_train` and in each training batch."""
    seen = []

    def look(cb):
        if cb.training:
            seen.append((sample_numbers(cb.learn, 0), sample_numbers(cb.learn, 1)))

    learner(Callback(before_train=look, before_batch=look), dls=dls).fit(*fit, **kwargs)
    return seen


def test_a_loader_tells_the_numbers_of_the_samples_in_a_batch_and_in_the_next_one():
    assert samples(1) == [(None, [0, 1]), ([0, 1], [2, 3]), ([2, 3], None)]


def test_with_n_step_they_are_those_of_the_pass_over_the_loader():
    assert samples(n_step=3)[1:] == [([0, 1], [2, 3]), ([2, 3], None), ([0, 1], [2, 3])]


def test_a_loader_without_len_does_not_tell():
    assert samples(1, dls=over(Stream(2))) == [(None, None)] * 3


def test_loaders_that_were_put_together_elsewhere_follow_a_key_too():
    seen = []
    look = Callback(before_batch=lambda cb: seen.append((cb.x.flatten().tolist(), sample_numbers(cb.learn, 0))))
    learner(look, dls=SimpleNamespace(train=DataLoader(POINTS, 2, shuffle=True))).fit(1)
    assert len(seen) == 4 and all(x == numbers for x, numbers in seen)


def test_each_loader_has_an_order_of_its_own():
    orders = {"train": [], "valid": []}
    look = Callback(before_batch=lambda cb: orders[cb.dl_name].extend(sample_numbers(cb.learn, 0)))
    learner(look, dls=over(DataLoader(POINTS, 2, shuffle=True), DataLoader(POINTS, 2, shuffle=True))).fit(1)
    assert sorted(orders["train"]) == sorted(orders["valid"]) and orders["train"] != orders["valid"]


def test_the_passes_of_a_dry_run_are_numbered_from_0_on():
    numbers = []
    look = Callback(before_batch=lambda cb: numbers.append(place(cb.learn)[1]))
    learner(dls=loaders(1, None)).dry_run(n_step=2, cbs=look)
    assert numbers == [0, 1]


def test_the_number_of_a_pass_is_the_epoch_in_a_fit_and_0_in_every_other_run():
    numbers = []
    learn = learner(Callback(before_batch=lambda cb: numbers.append(place(cb.learn)[1])), dls=loaders(1, 1))
    learn.fit(2)
    learn.validate()
    assert numbers == [0, 0, 1, 1, 0]


class Shuffled(Numbered):
    """Its order depends on an epoch that it counts by itself."""

    def __init__(self, n_batch):
        super().__init__(n_batch)
        self.epoch = 0

    def __iter__(self):
        data = list(tensor_loader(self.n_batch))
        for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(self.epoch)).tolist()[self.next :]:
            self.next += 1
            yield data[i]
        self.next, self.epoch = 0, self.epoch + 1


def shuffled(*cbs):
    tells = Callback(before_train=lambda cb: setattr(cb.dl, "epoch", cb.epoch))
    return learner([Recorder(), tells, *cbs], dls=over(Shuffled(4), list(tensor_loader(1))))


@pytest.mark.parametrize(
    "event_name", ["before_batch", "after_train", "before_validate", "after_epoch", "before_train"]
)
def test_a_loader_that_is_told_its_epoch_goes_on_in_another_learner(event_name):
    press = Callback(**{event_name: lambda cb: signal.raise_signal(signal.SIGINT) if cb.train_iter == 4 else None})
    whole, stopped, other = shuffled(), shuffled(press), shuffled()
    whole.fit(3)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(3)
    other.load_state_dict(stopped.state_dict())
    other.resume()
    assert other.recorder.raw_losses == whole.recorder.raw_losses


def test_an_empty_validation_set_is_an_error_in_a_fit_that_counts_updates_too():
    learn = learner(dls=over(list(tensor_loader(2)), Stream(0)))
    with pytest.raises(ValueError, match="the validation loader yielded no batch in epoch 0"):
        learn.fit(n_step=2)


def test_an_error_ends_the_workers_though_somebody_holds_it():
    dls = DataLoaders(DataLoader(POINTS, 2, num_workers=1), keyed=False, device="cpu")
    with pytest.raises(ZeroDivisionError) as held:
        learner(Callback(after_batch=lambda cb: 1 / 0), dls=dls).fit(1)
    assert (held.value.__traceback__ is not None, multiprocessing.active_children()) == (True, [])
