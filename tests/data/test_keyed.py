"""The data's randomness: a function of seed, epoch and position, apart from the global generators."""

import gc
import multiprocessing
import os
import random
import signal
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from learnloop import Callback, DataLoaders, TensorLoader
from learnloop.data.keyed import (
    Key,
    batches,
    draw_seed,
    indices_of,
    is_keyed,
    is_plain,
    length,
    mix,
    preserved_randomness,
    random_states,
    set_random_states,
)
from tests.toys import learner

KEY = Key(7, 0)


class Noisy(Dataset):
    """Samples `i + noise`, the noise from the generators of torch, numpy and python; counts what is read."""

    def __init__(self, n=12):
        self.n, self.read = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read.append(i)
        return torch.tensor([i + torch.rand(1).item(), np.random.rand(), np.random.randn(), random.random()])


def noisy_collate(samples):
    return default_collate(samples) + torch.rand(1) + np.random.rand() + random.random()


def noisy_loader(n=12, **kwargs):
    return DataLoader(Noisy(n), **{"batch_size": 4, "shuffle": True, "collate_fn": noisy_collate, **kwargs})


def read(dl, key=KEY, start=0):
    return [batch.tolist() for batch in batches(dl, key, start)]


def indices(dl, key=KEY, start=0):
    """Which samples are in each batch, for data that is `range(n)`."""
    return [[int(i) for i in batch] for batch in batches(dl, key, start)]


def everything_random():
    return repr(random_states())


# Numbers


def test_mix_gives_the_same_63_bits_everywhere():
    assert mix(0) == 0xE220A8397B1DCDAF >> 1  # the first number of SplitMix64 from 0, as published
    assert mix(1, 2, 3) == 3851293329796251419
    assert mix(-1) == 8245168133484221968


def test_mix_tells_numbers_and_their_order_apart():
    numbers = {mix(a, b) for a in range(100) for b in range(100)}
    assert len(numbers) == 10_000
    assert max(numbers) < 2**63


def test_the_number_of_a_key_depends_on_seed_epoch_and_position():
    numbers = {Key(s, e).number(*p) for s in (0, 1) for e in (0, 1) for p in ((), (0,), (1,), (0, 0))}
    assert len(numbers) == 16


def test_a_seed_is_one_draw_from_torchs_global_generator():
    torch.manual_seed(0)
    seeds = [draw_seed(), draw_seed()]
    torch.manual_seed(0)
    assert seeds == [int(torch.empty((), dtype=torch.int64).random_()) for _ in range(2)]


# The global generators


def draws():
    return torch.rand(1).item(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)


def test_random_states_bring_back_what_will_be_drawn():
    np.random.randn(), random.gauss(0, 1)  # normals come in pairs: the second of each is waiting now
    states = random_states()
    drawn = draws()
    set_random_states(states)
    assert draws() == drawn


def test_preserved_randomness_puts_the_generators_back_also_after_an_error():
    before = everything_random()
    with pytest.raises(ValueError, match="mine"), preserved_randomness():
        draws()
        raise ValueError("mine")
    assert everything_random() == before


# A pass over a plain torch loader


def test_the_same_key_gives_the_same_batches():
    dl = noisy_loader()
    assert read(dl) == read(dl) == read(noisy_loader())


def test_the_order_is_that_of_the_key_and_every_sample_comes_once():
    dl = DataLoader(range(12), 4, shuffle=True)
    assert indices(dl) == indices(dl)
    assert sorted(list(chain(*indices(dl)))) == list(range(12))
    assert indices(dl) != [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("other", [Key(7, 1), Key(8, 0)])
def test_another_epoch_or_seed_gives_another_order_and_other_noise(other):
    shuffled, ordered = DataLoader(range(12), 4, shuffle=True), noisy_loader(shuffle=False)
    assert indices(shuffled, other) != indices(shuffled)
    assert read(ordered, other) != read(ordered)


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}, {"multiprocessing_context": "fork"}])
def test_two_workers_give_the_same_stream_as_none(options):
    dl = noisy_loader(num_workers=2, **options)
    assert read(dl) == read(noisy_loader())
    assert read(dl, Key(7, 1), 1) == read(noisy_loader(), Key(7, 1), 1)


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_pass_begins_at_any_batch(n_workers, start):
    assert read(noisy_loader(num_workers=n_workers), start=start) == read(noisy_loader())[start:]


def test_a_pass_from_the_middle_reads_no_earlier_sample():
    dl = noisy_loader(shuffle=False)
    read(dl, start=2)
    assert dl.dataset.read == [8, 9, 10, 11]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_iterating_moves_none_of_the_global_generators(n_workers):
    np.random.randn(), random.gauss(0, 1)
    before = everything_random()
    read(noisy_loader(num_workers=n_workers))
    assert everything_random() == before


def test_a_pass_left_halfway_moves_none_of_the_global_generators():
    before = everything_random()
    stream = batches(noisy_loader(), KEY)
    next(stream)
    assert everything_random() == before
    stream.close()
    assert everything_random() == before


def test_a_dataset_that_fails_leaves_the_global_generators_alone():
    class Fails(Noisy):
        def __getitem__(self, i):
            super().__getitem__(i)
            raise ValueError("mine")

    before = everything_random()
    with pytest.raises(ValueError, match="mine"):
        read(DataLoader(Fails(), 4))
    assert everything_random() == before


def test_what_the_global_generators_hold_does_not_reach_the_data():
    first = read(noisy_loader())
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    np.random.randn()
    assert read(noisy_loader()) == first


def test_the_last_batch_may_be_smaller_or_left_out():
    assert [len(b) for b in read(noisy_loader(10))] == [4, 4, 2]
    assert [len(b) for b in read(noisy_loader(10, drop_last=True))] == [4, 4]


def test_the_loader_that_was_handed_in_is_not_changed():
    dl = noisy_loader()
    before = dict(vars(dl))
    read(dl)
    assert vars(dl) == before


# Every way in which torch lets one say the order


def test_a_generator_of_the_loader_decides_the_order_and_is_not_moved():
    def loader(seed):
        return DataLoader(range(12), 4, shuffle=True, generator=torch.Generator().manual_seed(seed))

    dl = loader(1)
    state = dl.generator.get_state()
    assert indices(dl) == indices(loader(1)) == indices(dl, Key(8, 0))
    assert indices(dl) != indices(loader(2))
    assert indices(dl) != indices(dl, Key(7, 1))
    assert torch.equal(dl.generator.get_state(), state)
    assert dl.generator.initial_seed() == 1


def test_a_weighted_sampler_draws_from_the_key():
    dl = DataLoader(range(12), 4, sampler=WeightedRandomSampler([0.0] * 6 + [1.0] * 6, 20))
    assert indices(dl) == indices(dl) != indices(dl, Key(7, 1))
    assert {i for batch in indices(dl) for i in batch} <= set(range(6, 12))
    assert [len(batch) for batch in indices(dl)] == [4] * 5


def test_a_batch_sampler_is_asked_for_whole_batches():
    dl = DataLoader(range(12), batch_sampler=BatchSampler(RandomSampler(range(12)), 5, drop_last=True))
    assert [len(batch) for batch in indices(dl)] == [5, 5]
    assert indices(dl) == indices(dl) != indices(dl, Key(7, 1))
    assert indices(dl, start=1) == indices(dl)[1:]


def test_without_batches_every_sample_is_one():
    dl = DataLoader(Noisy(), batch_size=None, shuffle=True)
    assert [len(sample) for sample in read(dl)] == [4] * 12
    assert read(dl, start=10) == read(dl)[10:]


def test_a_sampler_of_batches_without_automatic_batching_hands_lists_to_the_dataset():
    class Rows(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, idx):
            return torch.tensor(idx)

    dl = DataLoader(Rows(), batch_size=None, sampler=BatchSampler(range(6), 4, drop_last=False))
    assert read(dl) == [[0, 1, 2, 3], [4, 5]]


def test_a_dataset_that_reads_whole_batches_is_asked_for_them():
    class Whole(Noisy):
        def __getitems__(self, idx):
            return [torch.tensor(i) for i in idx]

    assert indices(DataLoader(Whole(), 5)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_a_sampler_that_knows_epochs_is_told_the_epoch():
    told = []

    class Sampler(RandomSampler):
        def set_epoch(self, epoch):
            told.append(epoch)

    read(DataLoader(Noisy(), 4, sampler=Sampler(range(12))), Key(7, 3))
    assert told == [3]


def test_a_distributed_sampler_shuffles_by_epoch():
    sampler = DistributedSampler(range(12), num_replicas=2, rank=1, seed=5)
    dl = DataLoader(range(12), 3, sampler=sampler)
    expected = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert [list(chain(*indices(dl, Key(7, epoch)))) for epoch in (0, 1)] == expected


def test_a_sampler_around_python_s_or_numpy_s_generator_draws_from_the_key():
    class Shuffled:
        def __init__(self, shuffle):
            self.shuffle = shuffle

        def __len__(self):
            return 12

        def __iter__(self):
            order = list(range(12))
            self.shuffle(order)
            return iter(order)

    for shuffle in (random.shuffle, np.random.shuffle):
        dl = DataLoader(range(12), 4, sampler=Shuffled(shuffle))
        assert indices(dl) == indices(dl) != indices(dl, Key(7, 1))


# Which loaders follow a key


class Subclassed(DataLoader):
    """A torch loader with something added that does not touch the iteration."""

    extra = 1


class Iterates(DataLoader):
    def __iter__(self):
        return super().__iter__()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(6.0))


class NoLength:
    def __iter__(self):
        return iter(range(4))


def test_a_subclass_of_torchs_loader_without_its_own_iteration_is_plain():
    assert is_plain(Subclassed(range(6), 2, shuffle=True))
    assert indices(Subclassed(range(6), 2, shuffle=True)) == indices(DataLoader(range(6), 2, shuffle=True))


@pytest.mark.parametrize(
    "dl",
    [
        Iterates(range(6), 2),
        DataLoader(Stream(), 2),
        DataLoader(range(6), 2, sampler=NoLength()),
        [1, 2],
        iter([1]),
        TensorLoader(torch.ones(2)),
    ],
)
def test_anything_else_is_not_plain(dl):
    assert not is_plain(dl)


def test_our_own_loaders_are_keyed_whatever_is_said_of_plain_ones():
    assert is_keyed(TensorLoader(torch.ones(2)), plain_too=False)
    assert not is_keyed(DataLoader(range(6)), plain_too=False)


@pytest.mark.parametrize("dl", [Iterates(range(6), 2), DataLoader(Stream(), 2)])
def test_a_foreign_loader_is_read_up_to_the_start(dl):
    assert indices(dl, start=1) == [[2, 3], [4, 5]]


def test_a_list_is_indexed():
    assert list(batches(["a", "b", "c"], KEY, 1)) == ["b", "c"]


@pytest.mark.parametrize(
    ("dl", "n"), [([1, 2], 2), (iter([1]), None), (DataLoader(Stream(), 2), None), (DataLoader(range(5), 2), 3)]
)
def test_length_is_none_where_a_loader_does_not_say(dl, n):
    assert length(dl) == n


# Workers


def workers():
    gc.collect()  # learners and their callbacks know each other, and a loader goes with its learner
    return multiprocessing.active_children()


def test_workers_are_gone_after_a_whole_pass_and_after_half_of_one():
    read(noisy_loader(num_workers=2))
    assert workers() == []
    stream = batches(noisy_loader(num_workers=2), KEY)
    next(stream)
    assert len(workers()) == 2
    stream.close()
    assert workers() == []


def test_persistent_workers_live_from_pass_to_pass_and_go_with_their_loader():
    dl = noisy_loader(num_workers=2, persistent_workers=True)
    read(dl)
    first = {w.pid for w in workers()}
    read(dl, Key(7, 1))
    assert {w.pid for w in workers()} == first
    del dl
    assert workers() == []


def test_persistent_workers_go_on_after_half_a_pass():
    dl = noisy_loader(40, num_workers=2, persistent_workers=True)
    stream = batches(dl, KEY)
    next(stream)
    stream.close()
    first = {w.pid for w in workers()}
    assert read(dl, Key(7, 1)) == read(noisy_loader(40), Key(7, 1))
    assert {w.pid for w in workers()} == first


def test_a_pass_inside_a_pass_over_the_same_persistent_workers_disturbs_neither():
    dl = noisy_loader(40, num_workers=1, persistent_workers=True)
    outer, inner = [], []
    for i, batch in enumerate(batches(dl, KEY)):
        outer.append(batch.tolist())
        if i == 2:
            inner = read(dl, Key(7, 1))
    assert outer == read(noisy_loader(40))
    assert inner == read(noisy_loader(40), Key(7, 1))


def test_persistent_workers_that_died_are_replaced():
    dl = noisy_loader(num_workers=1, persistent_workers=True)
    read(dl)
    os.kill(workers()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        read(dl)
    assert read(dl) == read(noisy_loader())


class Where(Dataset):
    """Says in which dataset and worker a sample was read, and what Ctrl-C would do there."""

    mark = 0

    def __len__(self):
        return 2

    def __getitem__(self, i):
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return torch.tensor([get_worker_info().dataset is self, self.mark, ignored])


def set_mark(worker_id):
    get_worker_info().dataset.mark = 5


def test_a_worker_shows_its_own_code_the_users_dataset_and_ignores_ctrl_c():
    assert read(DataLoader(Where(), 2, num_workers=1, worker_init_fn=set_mark)) == [[[1, 5, 1], [1, 5, 1]]]


# In a fit


def xy(n=12):
    x = torch.arange(float(n))[:, None]
    return TensorDataset(x, x)


def orders(learn, **fit):
    """The samples of each training batch, epoch by epoch."""
    seen = {}
    note = Callback(before_batch=lambda cb: seen.setdefault(cb.epoch, []).append(cb.x.flatten().tolist()))
    with learn.added_cbs(note):
        learn.fit(**fit or {"n_epoch": 2})
    return list(seen.values())


def shuffled(**kwargs):
    return DataLoaders(DataLoader(xy(), 4, shuffle=True, **kwargs), device="cpu")


def test_the_order_differs_between_epochs_and_between_fits():
    learn = learner(dls=shuffled())
    first, second = orders(learn), orders(learn)
    assert len({str(epoch) for epoch in [*first, *second]}) == 4


def test_the_same_global_seed_gives_the_same_orders():
    assert orders(learner(dls=shuffled())) == orders(learner(dls=shuffled()))
    assert orders(learner(dls=shuffled(), seed=1)) != orders(learner(dls=shuffled(), seed=2))


def test_callbacks_that_draw_random_numbers_do_not_change_the_order():
    draw = Callback(before_batch=lambda cb: draws(), before_epoch=lambda cb: draws())
    assert orders(learner(draw, dls=shuffled())) == orders(learner(dls=shuffled()))


def test_an_explicit_seed_gives_the_same_orders_in_every_fit():
    def learn(seed):
        return learner(dls=DataLoaders.from_dsets(xy(), bs=4, seed=seed, device="cpu"), seed=torch.seed())

    assert orders(learn(3)) == orders(learn(3)) != orders(learn(4))


def test_a_validation_in_the_middle_does_not_change_the_order():
    look = Callback(after_batch=lambda cb: cb.learn.validate() if cb.training else None)
    dls = DataLoaders(DataLoader(xy(), 4, shuffle=True), DataLoader(xy(), 4, shuffle=True), device="cpu")
    plain = orders(learner(dls=dls))
    noted = []
    learn = learner(look, dls=dls)
    learn.add_cb(Callback(before_batch=lambda cb: noted.append(cb.x.flatten().tolist()) if not cb._depth else None))
    learn.fit(2)
    assert noted == [batch for epoch in plain for batch in epoch]


def test_the_training_loader_stays_the_object_that_was_handed_in():
    dl = DataLoader(xy(), 4, shuffle=True)
    learn = learner(dls=DataLoaders(dl, device="cpu"))
    seen = []
    learn.add_cb(Callback(before_train=lambda cb: seen.append(cb.dl is dl)))
    learn.fit(1)
    assert seen == [True]
    assert learn.dls.train is dl


def test_loaders_that_are_not_to_be_keyed_draw_from_the_global_generator():
    def learn():
        dls = DataLoaders(DataLoader(xy(), 4, shuffle=True), keyed=False, device="cpu")
        return learner(dls=dls)

    torch.manual_seed(0)
    torch.nn.Linear(1, 1)  # the toy's model
    draw_seed()  # the fit's
    expected = [x.flatten().tolist() for x, _ in DataLoader(xy(), 4, shuffle=True)]
    assert orders(learn(), n_epoch=1) == [expected]


def test_passes_of_a_fit_by_steps_have_orders_of_their_own():
    (epoch,) = orders(learner(dls=shuffled()), n_step=9)
    passes = [list(chain(*epoch[i : i + 3])) for i in (0, 3, 6)]
    assert [sorted(p) for p in passes] == [list(range(12))] * 3
    assert len({str(p) for p in passes}) == 3


@pytest.mark.parametrize("ending", ["normal", "error", "interrupt", "second interrupt"])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_gone_before_a_fit_returns_however_it_ends(ending, persistent):
    def end(cb):
        if ending == "error":
            raise ValueError("mine")
        for _ in range({"normal": 0, "interrupt": 1, "second interrupt": 2}[ending]):
            signal.raise_signal(signal.SIGINT)

    assert workers() == []
    dl = DataLoader(xy(), 4, num_workers=2, persistent_workers=persistent)
    learn = learner(Callback(after_batch=end), dls=DataLoaders(dl, dl, device="cpu"))
    try:
        learn.fit(1)
    except (ValueError, KeyboardInterrupt):
        pass
    assert len(workers()) == (2 if persistent else 0)


def test_workers_of_a_foreign_loader_are_gone_too():
    learn = learner(dls=DataLoaders(Iterates(xy(), 4, num_workers=2), device="cpu"))
    learn.add_cb(Callback(after_batch=lambda cb: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1)
    assert workers() == []


# Which samples a batch holds


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", ["ours", "torch", "torch with a generator"])
def test_a_loader_tells_the_numbers_of_the_samples_in_each_batch(kind, shuffle, drop_last):
    x = torch.arange(10)
    if kind == "ours":
        dl = TensorLoader(x, x, bs=4, shuffle=shuffle, drop_last=drop_last)
    else:
        generator = torch.Generator().manual_seed(5) if kind.endswith("generator") else None
        dl = DataLoader(list(range(10)), 4, shuffle=shuffle, drop_last=drop_last, generator=generator)
    for key in (Key(1, 0), Key(1, 1)):
        told = [list(map(int, numbers)) for numbers in indices_of(dl, key)]
        came = [(b[0] if kind == "ours" else b).tolist() for b in batches(dl, key)]
        assert told == came


def test_batches_of_a_list_are_numbered_on_from_the_first():
    assert indices_of([(torch.ones(3),), (torch.ones(2),)], Key(0, 0)) == [range(0, 3), range(3, 5)]


def test_asking_for_the_numbers_moves_no_generator():
    dl = DataLoader(list(range(10)), 4, shuffle=True)
    state = torch.get_rng_state()
    indices_of(dl, Key(1, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sampler_of_the_users_own_is_not_asked():
    class Own(Sampler):
        def __iter__(self):
            raise AssertionError("it was asked")

        def __len__(self):
            return 3

    assert indices_of(DataLoader([1, 2, 3], 1, sampler=Own()), Key(0, 0)) is None
    assert indices_of(DataLoader([1, 2, 3], 1), Key(0, 0), plain_too=False) is None
    assert indices_of(iter([1]), Key(0, 0)) is None
