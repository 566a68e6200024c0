"""Loaders for predictions: every sample once, nothing dropped, and the order known."""

from typing import Any

import torch
from fastcore.foundation import L
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from learnloop.data.batches import find_bs, rebuilt
from learnloop.data.keyed import is_plain, preserved_randomness
from learnloop.data.loaders import TensorLoader
from learnloop.data.show import nth
from learnloop.data.tensors import to_concat

#: Samplers that draw from the whole dataset; unshuffled, each of its samples comes once.
_OF_ALL = (SequentialSampler, RandomSampler, WeightedRandomSampler)


def once(dl: Any, in_order: bool = True) -> tuple[Any, list[list[int]] | None]:
    """A loader like `dl` that leaves nothing out, and the indices of its batches where they are not simply in order.

    `in_order`: unshuffled where that can be done. Our own and plain torch loaders are made anew; a batch sampler of the
    user's own keeps its batches, which may have been put together for a reason (such as similar length). Any other
    iterable is handed back as it is.
    """
    if isinstance(dl, TensorLoader):
        return dl.new(drop_last=False, **({"shuffle": False} if in_order else {})), None
    if is_plain(dl):
        return _torch_once(dl, in_order)
    if hasattr(dl, "new") and hasattr(dl, "get_idxs"):  # fastai's
        return dl.new(drop_last=False, **({"shuffle": False} if in_order else {})), None
    return dl, None


def _torch_once(dl: DataLoader, in_order: bool) -> tuple[Any, list[list[int]] | None]:
    if dl.batch_sampler is None:  # the dataset gives whole batches
        return (like(dl, batch_size=None) if in_order else dl), None
    if type(dl.batch_sampler) is not BatchSampler:
        return _with_its_batches(dl, list(dl.batch_sampler)) if in_order else (dl, None)
    bs, sampler = dl.batch_sampler.batch_size, dl.batch_sampler.sampler
    if not in_order:
        return like(dl, batch_size=bs, sampler=sampler), None
    if type(sampler) in _OF_ALL:
        return like(dl, batch_size=bs), None
    if type(sampler) is SubsetRandomSampler:
        return like(dl, batch_size=bs, sampler=sorted(sampler.indices)), None
    return _with_its_batches(dl, list(BatchSampler(sampler, bs, drop_last=False)))


def _with_its_batches(dl: DataLoader, order: list[list[int]]) -> tuple[Any, list[list[int]]]:
    return like(dl, batch_sampler=order), order


def like(dl: DataLoader, **order: Any) -> DataLoader:
    """A torch loader over the same dataset, read and collated in the same way."""
    new = DataLoader(
        dl.dataset,
        collate_fn=dl.collate_fn,
        num_workers=dl.num_workers,
        pin_memory=dl.pin_memory,
        timeout=dl.timeout,
        worker_init_fn=dl.worker_init_fn,
        multiprocessing_context=dl.multiprocessing_context,
        prefetch_factor=dl.prefetch_factor,
        **order,
    )
    if hasattr(dl, "n_inp"):
        new.n_inp = dl.n_inp
    return new


def in_dataset_order(value: Any, indices: list[int], dim: int = 0) -> Any:
    """What was gathered for the samples `indices`, sorted by index; tensors along `dim`, of any structure."""
    order = sorted(range(len(indices)), key=indices.__getitem__)

    def sort(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(dim, torch.tensor(order))
        if isinstance(value, L):  # samples that could not be joined
            return L(value[i] for i in order)
        return rebuilt(value, sort)

    return sort(value)


def samples_at(dl: Any, indices: list[int]) -> Any:
    """Some samples of a loader as one batch, by their numbers; moves no random generator.

    Ours, lists of batches and map-style torch loaders are asked for just these; any other iterable is gone through.
    """
    with preserved_randomness():
        if isinstance(dl, TensorLoader):
            return tuple(t[torch.as_tensor(indices, device=t.device)] for t in dl.tensors)
        if is_plain(dl) and dl.batch_sampler is not None:
            return dl.collate_fn([dl.dataset[i] for i in indices])
        return _picked(dl, indices)


def _picked(stream: Any, indices: list[int]) -> Any:
    wanted, n = set(indices), 0
    found: dict[int, Any] = {}
    for batch in stream:
        bs = find_bs(batch)
        found |= {i: nth(batch, slice(i - n, i - n + 1)) for i in range(n, n + bs) if i in wanted}
        n += bs
    missing = wanted - {*found}
    if missing:
        raise IndexError(f"there is no sample {min(missing)}: the loader gave {n}, numbered from 0.")
    return to_concat(found[i] for i in indices)


class OneItem(list):
    """A loader of one ready batch, which says how many of its elements are inputs."""

    def __init__(self, batch: Any, n_inp: int):
        super().__init__([batch])
        self.n_inp = n_inp


def one_item_batch(dls: Any, item: Any) -> OneItem:
    """One sample's input as a batch, collated as the validation loader collates; of a tuple the first are inputs."""
    like = dls[min(1, len(dls) - 1)] if hasattr(dls, "__len__") else dls.train
    own = like.collate_fn if isinstance(like, DataLoader) and like.batch_sampler is not None else default_collate
    item = torch.tensor(item) if isinstance(item, list) else item
    batch = own([item])
    n = len(item) if isinstance(item, tuple) else 1
    if n > 1:
        n = min(n, getattr(dls, "n_inp", n))
    return OneItem(tuple(batch) if isinstance(item, tuple) else batch, n)


def first_sample(value: Any) -> Any:
    """The first sample of what was gathered, of any structure."""
    return value[0] if isinstance(value, (Tensor, L)) else rebuilt(value, first_sample)
