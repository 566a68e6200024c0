"""The data's randomness: a function of (seed, epoch, position), apart from the model's, which is the global stream.

An epoch's order comes from its own key, and a batch is read and collated with the generators of torch, numpy and python
set from its key and put back after. So the stream is the same for any number of workers, starts at any position without
reading, and does not move the generators that dropout and initialisation draw from.
"""

import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from learnloop.data.batches import find_bs

_64_BITS = (1 << 64) - 1


class Key(NamedTuple):
    """Names one pass over a loader. `seed` is drawn once per fit; `epoch` counts passes."""

    seed: int
    epoch: int

    def number(self, *position: int) -> int:
        """63 bits for the whole pass, or for one position in it."""
        return mix(self.seed, self.epoch, *position)


def mix(*numbers: int) -> int:
    """63 well mixed bits from integers (the finalizer of SplitMix64: Steele, Lea, Flood 2014)."""
    z = 0
    for number in numbers:
        z = (z + (number & _64_BITS) + 0x9E3779B97F4A7C15) & _64_BITS
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64_BITS
        z ^= z >> 31
    return z >> 1


#: By process: one that was forked while a thread of the other had the lock must not wait for that thread.
_locks: dict[int, Any] = {}


def _seeding() -> Any:
    """The lock for the generators: what a thread draws must not come from what another has set for its data."""
    return _locks.get(os.getpid()) or _locks.setdefault(os.getpid(), threading.RLock())


def draw_seed() -> int:
    """A seed from the global generator of torch, which it moves by one draw."""
    with _seeding():
        return int(torch.empty((), dtype=torch.int64).random_())


# The global generators


def random_states() -> dict[str, Any]:
    """The states of the global generators of python, numpy, torch and CUDA."""
    with _seeding():
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
        }


def set_random_states(states: dict[str, Any]) -> None:
    """Puts back what `random_states` returned."""
    with _seeding():
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Whatever draws random numbers inside leaves the global generators as they were."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


class _Seeded:
    """The three host generators set from a number, then put back: cheaper than `preserved_randomness`, without CUDA.

    One thread at a time: the generators belong to the whole process.
    """

    def __init__(self) -> None:
        self.bits = np.random.MT19937()
        self.numpy = np.random.RandomState(self.bits)

    def __call__(self, number: int) -> "_Seeded":
        self.number = number
        return self

    def __enter__(self) -> None:
        self.lock = _seeding()
        self.lock.acquire()
        self.torch_state = torch.default_generator.get_state()
        self.python_state = random.getstate()
        self.numpy_bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
        self.numpy_state = np.random.get_state(legacy=False)
        self.numpy.seed(self.number & 0xFFFFFFFF)
        np.random.set_bit_generator(self.bits)  # type: ignore[attr-defined]
        torch.default_generator.manual_seed(self.number)
        random.seed(self.number)

    def __exit__(self, *exc: object) -> None:
        np.random.set_bit_generator(self.numpy_bits)  # type: ignore[attr-defined]
        if self.numpy_state["has_gauss"]:  # normals come in pairs, and the second of one was still waiting
            np.random.set_state(self.numpy_state)
        torch.default_generator.set_state(self.torch_state)
        random.setstate(self.python_state)
        self.lock.release()

    def __reduce__(self) -> Any:
        """A copy makes generators of its own."""
        return _Seeded, ()


# Passes over loaders


def batches(dl: Any, key: Key, start: int = 0) -> Iterator[Any]:
    """One pass over any loader from batch `start` on.

    Ours (they have `keyed_batches`) and plain map-style torch loaders follow the key and read nothing before `start`.
    A list is indexed. Anything else draws its randomness as it likes and is read again up to `start`.
    """
    if hasattr(dl, "keyed_batches"):
        return dl.keyed_batches(key, start)
    if is_plain(dl):
        return _plain_batches(dl, key, start)
    if is_list(dl):
        return iter(dl if start == 0 else dl[start:])
    return islice(iter(dl), start, None) if start else iter(dl)


def indices_of(dl: Any, key: Key, plain_too: bool = True) -> list[Any] | None:
    """The numbers of the samples in each batch of a pass; None where a loader does not tell.

    Ours and lists of batches do, and plain torch loaders whose sampler is one of torch's own: others may change when
    they are asked a second time. Batches of a list are numbered on from the first.
    """
    if hasattr(dl, "keyed_indices"):
        return dl.keyed_indices(key)
    if is_list(dl):
        return _numbered(dl)
    if plain_too and is_plain(dl) and type(dl.batch_sampler) is BatchSampler and type(dl.sampler) in _TOLD:
        return _order(dl, key)
    return None


_TOLD = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


def _numbered(dl: Sequence[Any]) -> list[range]:
    ends = list(accumulate(map(find_bs, dl), initial=0))
    return [range(start, end) for start, end in pairwise(ends)]


def is_keyed(dl: Any, plain_too: bool = True) -> bool:
    """Whether `dl` follows a key: ours always do, plain torch loaders where they may be rebuilt."""
    return hasattr(dl, "keyed_batches") or (plain_too and is_plain(dl))


def is_list(dl: Any) -> bool:
    """Whether the batches lie ready and draw no random number."""
    return isinstance(dl, Sequence)


def is_plain(dl: Any) -> bool:
    """A map-style torch loader that iterates as torch's own class does, and so can be rebuilt from its attributes."""
    return (
        isinstance(dl, DataLoader)
        and not isinstance(dl.dataset, IterableDataset)
        and type(dl).__iter__ is DataLoader.__iter__
        and type(dl)._get_iterator is DataLoader._get_iterator
        and length(dl) is not None
    )


def length(dl: Any) -> int | None:
    """Batches in a loader; None where it does not say."""
    try:
        return len(dl)
    except (TypeError, NotImplementedError):
        return None


#: Rebuilt loaders with workers that live on, and their orders, between two passes over the loader that was handed in.
_standing: WeakKeyDictionary[DataLoader, Any] = WeakKeyDictionary()


def _plain_batches(dl: DataLoader, key: Key, start: int) -> Iterator[Any]:
    """A pass over the loader rebuilt; closing it ends the workers, or lets those that are meant to live on stand by."""
    order = _KeyedOrder(_order(dl, key), key, start)
    # A pass takes them away: another pass begun meanwhile gets workers of its own.
    rebuilt, order_there = _standing.pop(dl, None) or (_rebuilt(dl, order, key), order)
    vars(order_there).update(vars(order))
    stream = iter(rebuilt)
    is_whole = False
    try:
        yield from stream
        is_whole = True
    except GeneratorExit:
        is_whole = True
    finally:
        if is_whole and dl.persistent_workers and _are_alive(stream):
            _standing[dl] = rebuilt, order_there
        else:
            end_workers(stream)


def _are_alive(stream: Any) -> bool:
    """Whether no worker has died: torch says that in whatever the main process does then, outside of this generator."""
    return all(worker.is_alive() for worker in getattr(stream, "_workers", ()))


def end_workers(stream: Any) -> None:
    """Ends the workers behind a torch loader's iterator, where it has any."""
    if hasattr(stream, "_shutdown_workers"):
        stream._shutdown_workers()


def _order(dl: DataLoader, key: Key) -> list[Any]:
    """The indices of every batch of a pass, drawn by the loader's own sampler from the pass's key."""
    sampler: Any = dl.sampler if dl.batch_sampler is None else dl.batch_sampler
    drawing = [s for s in (sampler, getattr(sampler, "sampler", None)) if s is not None]
    for s in drawing:
        if hasattr(s, "set_epoch"):
            s.set_epoch(key.epoch)
    generators = [g for s in drawing if isinstance(g := getattr(s, "generator", None), torch.Generator)]
    with _Seeded()(key.number()):  # its lock keeps a sampler's own generators for one thread, too
        states = [g.get_state() for g in generators]
        try:
            for g in generators:
                g.manual_seed(mix(g.initial_seed(), key.epoch))
            return list(sampler)
        finally:
            for g, state in zip(generators, states, strict=True):
                g.set_state(state)


def _rebuilt(dl: DataLoader, order: "_KeyedOrder", key: Key) -> DataLoader:
    """The same loader with our order, and with reading and collating inside one seeded scope per batch.

    `batch_size=None` hands each element of `order` to the dataset as it is, so one element is one batch. The private
    generator keeps `iter()` from drawing the workers' base seed from the global one.
    """
    dataset: Any = _KeyedDataset(dl.dataset, dl.collate_fn, one_item=dl.batch_sampler is None)
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        collate_fn=_as_it_is,
        num_workers=dl.num_workers,
        pin_memory=dl.pin_memory,
        timeout=dl.timeout,
        worker_init_fn=_WorkerStart(dl.worker_init_fn),
        multiprocessing_context=dl.multiprocessing_context,
        generator=torch.Generator().manual_seed(key.number()),
        prefetch_factor=dl.prefetch_factor,
        persistent_workers=dl.persistent_workers,
    )


class _WorkerStart:
    """What a worker does first: it leaves Ctrl-C to the main process, and shows the user's own code its dataset."""

    def __init__(self, own: Any):
        self.own = own  # the loader's `worker_init_fn`

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to workers too
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # frozen
        if self.own is not None:
            self.own(worker_id)


class _KeyedOrder:
    """Yields (number for the generators, indices) for each batch of a pass from `start` on."""

    def __init__(self, order: list[Any], key: Key, start: int):
        self.order, self.key, self.start = order, key, start

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for position in range(self.start, len(self.order)):
            yield self.key.number(position), self.order[position]

    def __len__(self) -> int:
        return len(self.order) - self.start


class _KeyedDataset:
    """Reads and collates one whole batch per index, in the main process or in a worker alike."""

    def __init__(self, dataset: Any, collate: Any, one_item: bool):
        self.dataset, self.collate, self.one_item = dataset, collate, one_item
        self.seeded: _Seeded | None = None

    def __getitem__(self, numbered: tuple[int, Any]) -> Any:
        number, indices = numbered
        self.seeded = self.seeded or _Seeded()
        with self.seeded(number):
            return self.collate(self._read(indices))

    def _read(self, indices: Any) -> Any:
        if self.one_item:
            return self.dataset[indices]
        if getattr(self.dataset, "__getitems__", None):  # torch's own way of reading a batch in one call
            return self.dataset.__getitems__(indices)
        return [self.dataset[i] for i in indices]


def _as_it_is(batch: Any) -> Any:
    return batch
