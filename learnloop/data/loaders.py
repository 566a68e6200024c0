"""Loaders: training and validation together (`DataLoaders`), and one for tensors in memory (`TensorLoader`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from learnloop.data.batches import default_device, split, to_device
from learnloop.data.keyed import Key, batches, draw_seed, length, preserved_randomness


def known_n_inp(dls: Any, dl: Any) -> int | None:
    """How many elements of a batch are inputs, as far as loaders say so; reads no batch."""
    known = dls._n_inp if isinstance(dls, DataLoaders) else getattr(dls, "n_inp", None)
    return getattr(dl, "n_inp", None) if known is None else known


class DataLoaders:
    """A training loader, a validation loader and more, over any torch `DataLoader` or iterable of batches."""

    seed: int | None = None  # of the data's order and augmentation; None: drawn once per fit

    def __init__(
        self,
        *loaders: Any,  # training first, then validation, then any others
        path: str | Path = ".",
        device: str | torch.device | None = None,  # where batches and model go; None: the GPU where there is one
        n_inp: int | None = None,  # how many elements of a batch are inputs; None: all but the last
        targets: Sequence[str] | None = None,  # the keys of a mapping batch that are targets
        keyed: bool = True,  # False: loaders are iterated as they are, with the global generators
    ):
        if not loaders:
            raise ValueError("DataLoaders() got no loader; pass a training loader, and a validation loader after it.")
        for i, loader in enumerate(loaders):
            if not hasattr(loader, "__iter__"):
                raise TypeError(
                    f"loader {i} is a {type(loader).__name__}, which cannot be iterated; pass an iterable of batches."
                )
        self.loaders, self.path, self.keyed = list(loaders), Path(path), keyed
        self._n_inp = n_inp
        self._device: torch.device | None = None
        self.targets = (targets,) if isinstance(targets, str) else targets
        if device is not None:
            self.to(device)

    @classmethod
    def from_dsets(
        cls,
        train_ds: Any,
        valid_ds: Any = None,
        bs: int = 64,  # samples per batch, training and validation
        shuffle: bool = True,  # the training set only
        device: str | torch.device | None = None,
        num_workers: int = 0,
        seed: int | None = None,  # of the data's order and augmentation; None: drawn once per fit
        **kwargs: Any,  # for torch's DataLoader
    ) -> "DataLoaders":
        """Torch loaders over two map-style datasets."""
        own = {k: kwargs.pop(k) for k in ("path", "n_inp", "targets", "keyed") if k in kwargs}
        kwargs["num_workers"] = num_workers
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        train = DataLoader(train_ds, batch_size=bs, shuffle=shuffle, generator=generator, **kwargs)
        rest = [] if valid_ds is None else [DataLoader(valid_ds, batch_size=bs, **{**kwargs, "drop_last": False})]
        dls = cls(train, *rest, device=device, **own)
        dls.seed = seed
        return dls

    @property
    def train(self) -> Any:
        return self.loaders[0]

    @property
    def valid(self) -> Any:
        return self[1]

    def __getitem__(self, i: int) -> Any:
        try:
            return self.loaders[i]
        except IndexError:
            raise IndexError(f"there is no loader {i}: DataLoaders got {len(self.loaders)}, numbered from 0.") from None

    def __len__(self) -> int:
        return len(self.loaders)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loaders)

    @property
    def train_ds(self) -> Any:
        return self.train.dataset

    @property
    def valid_ds(self) -> Any:
        return self.valid.dataset

    @property
    def n_inp(self) -> int:
        """How many elements of a batch are inputs: as given, as the loader says, or as a first batch shows."""
        known = known_n_inp(self, self.train)
        return len(split(self.one_batch(), None, self.targets)[0]) if known is None else known

    @property
    def bs(self) -> int | None:
        """Samples per training batch, where the loader says."""
        loader = self.train
        bs = getattr(loader, "bs", None)
        return getattr(loader, "batch_size", None) if bs is None else bs

    @property
    def device(self) -> torch.device:
        return default_device() if self._device is None else self._device

    @device.setter
    def device(self, device: str | torch.device) -> None:
        self.to(device)

    def to(self, device: str | torch.device) -> "DataLoaders":
        """Batches and model go to this device from now on; tensors held by our own loaders move at once."""
        device = self._device = torch.device(device)
        for loader in self.loaders:
            if isinstance(loader, TensorLoader):
                loader.to(device)
        return self

    def cuda(self) -> "DataLoaders":
        return self.to("cuda")

    def cpu(self) -> "DataLoaders":
        return self.to("cpu")

    def one_batch(self) -> Any:
        """The first training batch on the device; moves no random generator."""
        with preserved_randomness():
            stream = batches(self.train, Key(self.seed or 0, 0)) if self.keyed else iter(self.train)
            for batch in stream:
                return to_device(batch, self.device)
        raise ValueError("the training loader is empty: it yields no batch.")

    def test_dl(self, items: Any, bs: int | None = None, **kwargs: Any) -> Any:
        """An unshuffled loader over `items` (tensors, a dataset, a list), otherwise like the validation loader."""
        like = self.loaders[min(1, len(self.loaders) - 1)]
        if isinstance(like, TensorLoader):
            tensors = items if isinstance(items, (tuple, list)) else (items,)
            return TensorLoader(*tensors, bs=bs or like.bs, device=like.device, **kwargs)
        options = (
            {"collate_fn": like.collate_fn, "num_workers": like.num_workers} if isinstance(like, DataLoader) else {}
        )
        return DataLoader(items, batch_size=bs or getattr(like, "batch_size", None) or 64, **{**options, **kwargs})

    def __repr__(self) -> str:
        sizes = ", ".join(f"{'?' if (n := length(dl)) is None else n} batches" for dl in self.loaders)
        return f"DataLoaders({sizes}, bs={self.bs}, device={self.device})"


class TensorLoader:
    """Batches of tensors that fit in memory, each taken whole by one index operation.

    `TensorLoader(x, y, bs=64)` yields tuples `(x[idx], y[idx])`, copies that may be changed in place.
    """

    def __init__(
        self,
        *tensors: Any,  # of equal first dimension n
        bs: int = 64,  # samples per batch
        shuffle: bool = False,
        drop_last: bool = False,  # leave out a last batch smaller than bs
        device: str | torch.device | None = None,  # where the tensors are kept; None: where they are
        seed: int | None = None,  # of the order; None: drawn once per fit
        n_inp: int | None = None,
    ):
        self.tensors = tuple(torch.as_tensor(t) for t in tensors)
        if not self.tensors:
            raise ValueError("TensorLoader() got no tensor; pass inputs, then targets.")
        sizes = [len(t) if t.ndim else 0 for t in self.tensors]
        if len(set(sizes)) > 1:
            raise ValueError(f"tensors of different length: {sizes}; the first dimension is the sample.")
        if not isinstance(bs, int) or bs < 1:
            raise ValueError(f"bs={bs!r}: a batch needs at least one sample; pass a positive int.")
        self.bs, self.shuffle, self.drop_last, self.seed = bs, shuffle, drop_last, seed
        if n_inp is not None:
            self.n_inp = n_inp
        self._passes = 0  # by hand, outside of a learner
        if device is not None:
            self.to(device)

    @property
    def dataset(self) -> TensorDataset:
        """The samples one by one, as torch has them."""
        return TensorDataset(*self.tensors)

    @property
    def n(self) -> int:
        """Samples."""
        return len(self.tensors[0])

    @property
    def batch_size(self) -> int:
        return self.bs

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def __len__(self) -> int:
        return self.n // self.bs if self.drop_last else -(-self.n // self.bs)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        seed = draw_seed() if self.seed is None and self.shuffle else self.seed or 0
        self._passes += 1
        return self.keyed_batches(Key(seed, self._passes - 1))

    def keyed_batches(self, key: Key, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """One pass in the order of a key, from batch `start` on; the loader's own seed wins over the key's."""
        order = self._order(key if self.seed is None else Key(self.seed, key.epoch))
        for i in range(start, len(self)):
            part = slice(i * self.bs, (i + 1) * self.bs)
            if order is None:
                yield tuple(t[part].clone() for t in self.tensors)  # a view would let a callback change the data
            else:
                index = order[part]
                yield tuple(t[index] for t in self.tensors)

    def _order(self, key: Key) -> Tensor | None:
        if not self.shuffle:
            return None
        generator = torch.Generator().manual_seed(key.number())
        return torch.randperm(self.n, generator=generator).to(self.device)

    def to(self, device: str | torch.device) -> "TensorLoader":
        self.tensors = tuple(t.to(device) for t in self.tensors)
        return self

    def one_batch(self) -> tuple[Tensor, ...]:
        """The first batch of the first pass."""
        return next(self.keyed_batches(Key(self.seed or 0, 0)))

    def new(self, *tensors: Any, **changes: Any) -> "TensorLoader":
        """A loader like this one, over other tensors or with other settings."""
        settings = {"bs": self.bs, "shuffle": self.shuffle, "drop_last": self.drop_last, "seed": self.seed}
        if hasattr(self, "n_inp"):
            settings["n_inp"] = self.n_inp
        return TensorLoader(*(tensors or self.tensors), **{**settings, **changes})

    def __repr__(self) -> str:
        return f"TensorLoader({self.n} samples, bs={self.bs}, shuffle={self.shuffle}, {self.device})"
