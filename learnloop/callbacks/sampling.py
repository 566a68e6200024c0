"""Which samples a training sees: drawn by weight, the same few again and again, a part of an epoch."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, WeightedRandomSampler

from learnloop.data.keyed import Key, draw_seed, is_plain
from learnloop.data.loaders import DataLoaders, TensorLoader
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelTrainException, CancelValidException


class OverfitBatch(Callback):
    """Trains on the first `n` batches alone, again and again: a model that cannot learn these by heart has a fault.

    In `before_batch` every training batch is replaced by one of them; epochs stay as long as they are, and validation
    sees its own. The loader is read on, for nothing. Source: Karpathy, "A Recipe for Training Neural Networks". Cost
    per batch: one copy of it.
    """

    order, run_valid, tasks = -8, False, ("fit", "lr_find")
    _stateattrs = ("kept",)

    def __init__(self, n: int = 1):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"`n={n!r}`: pass a whole number of batches, 1 or more.")
        self.n = n
        self.kept: list[Any] = []  # (xb, yb) of the first batches of this fit

    def before_fit(self) -> None:
        self.kept = []

    def before_batch(self) -> None:
        learn = self.learn
        if len(self.kept) < self.n:
            self.kept.append(copy.deepcopy((learn.xb, learn.yb)))
        else:
            learn.xb, learn.yb = copy.deepcopy(self.kept[learn.train_iter % self.n])  # others may change it in place

    def cleanup_fit(self) -> None:
        self.kept = []


class ShortEpochCallback(Callback):
    """Ends each phase of a fit after a part of its batches: to see quickly whether everything works.

    It cancels the phase in `after_batch`, once `pct` of the batches are done, one at least; so the epoch's row has None
    for its numbers. Source: docs.fast.ai/callback.training. Cost per batch: none to speak of.
    """

    tasks = ("fit",)

    def __init__(
        self,
        pct: float = 0.01,  # part of the batches that is run
        short_valid: bool = True,  # of validation too
    ):
        self.pct, self.short_valid = pct, short_valid

    def before_fit(self) -> None:
        if self.learn.n_step is not None:
            raise ValueError("ShortEpochCallback shortens epochs; of `fit(n_step=…)` make fewer steps instead.")

    def after_batch(self) -> None:
        learn = self.learn
        if learn.n_iter is None:
            raise ValueError("ShortEpochCallback runs a part of a loader's batches, and this one has no length.")
        done = learn.iter + 1
        if done == learn.n_iter or done / learn.n_iter < self.pct:
            return
        if learn.training:
            raise CancelTrainException
        if self.short_valid:
            raise CancelValidException


class WeightedSampling(Callback):
    """Draws training samples with replacement, as often as their weights say: rare ones may come more often.

    In `before_fit` `learn.dls` gets another training loader, in `cleanup_fit` the former one is back. What is drawn
    depends on the fit's seed and the epoch alone, as any order of the data. Source: docs.fast.ai/callback.data
    (WeightedDL). Cost per batch: none; per epoch one draw for every sample.
    """

    order, tasks = -20, ("fit", "lr_find")

    def __init__(
        self,
        weights: Sequence[float] | Tensor,  # one per sample of the training set, in any unit
        n: int | None = None,  # samples per epoch; None: as many as there are
    ):
        self.weights, self.n = torch.as_tensor(weights, dtype=torch.double).flatten(), n
        if not bool(((self.weights >= 0) & self.weights.isfinite()).all()) or not self.weights.sum() > 0:
            raise ValueError("`weights` are finite, not negative, and not all of them 0; one per sample.")
        self._former: Any = None  # `learn.dls`, while another is in its place

    def before_fit(self) -> None:
        learn = self.learn
        if not isinstance(learn.dls, DataLoaders):
            raise TypeError(f"WeightedSampling needs DataLoaders, and `learn.dls` is a {type(learn.dls).__name__}.")
        weighted = copy.copy(learn.dls)
        weighted.loaders = [self._loader_for(learn.dls.train), *learn.dls.loaders[1:]]
        self._former, learn.dls = learn.dls, weighted

    def _loader_for(self, dl: Any) -> Any:
        if not isinstance(dl, TensorLoader) and not (is_plain(dl) and dl.batch_size is not None):
            raise TypeError(
                f"WeightedSampling draws from a TensorLoader or a map-style torch DataLoader; {type(dl).__name__} is "
                "neither. Let its own sampler weigh."
            )
        n = len(dl.dataset)
        if len(self.weights) != n:
            raise ValueError(f"`weights` has {len(self.weights)} numbers, and the training set {n} samples.")
        if isinstance(dl, TensorLoader):
            return _WeightedTensors(dl, self.weights, self.n or n)
        return _with_sampler(dl, WeightedRandomSampler(self.weights.tolist(), self.n or n))

    def cleanup_fit(self) -> None:
        if self._former is not None:
            self.learn.dls, self._former = self._former, None


class _WeightedTensors:
    """The samples of a TensorLoader, drawn by weight."""

    def __init__(self, of: TensorLoader, weights: Tensor, n: int):
        self.of, self.weights, self.n = of, weights, n
        self.bs, self.dataset, self.n_inp = of.bs, of.dataset, getattr(of, "n_inp", None)

    def __len__(self) -> int:
        return self.n // self.bs if self.of.drop_last else -(-self.n // self.bs)

    def __iter__(self) -> Iterator[Any]:
        return self.keyed_batches(Key(draw_seed(), 0))

    def keyed_batches(self, key: Key, start: int = 0) -> Iterator[Any]:
        for index in self.keyed_indices(key)[start:]:
            yield tuple(t[index] for t in self.of.tensors)

    def keyed_indices(self, key: Key) -> list[Tensor]:
        key = key if self.of.seed is None else Key(self.of.seed, key.epoch)
        generator = torch.Generator().manual_seed(key.number())
        order = torch.multinomial(self.weights, self.n, replacement=True, generator=generator).to(self.of.device)
        return [order[i * self.bs : (i + 1) * self.bs] for i in range(len(self))]


def _with_sampler(dl: DataLoader, sampler: Any) -> DataLoader:
    """The loader with another sampler, otherwise the same."""
    names = [
        *("num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn"),
        *("multiprocessing_context", "prefetch_factor", "persistent_workers"),
    ]
    options = {name: getattr(dl, name) for name in names}
    return DataLoader(dl.dataset, batch_size=dl.batch_size, sampler=sampler, **options)
