"""Loaders: training and validation together (`DataLoaders`), and one for tensors in memory (`TensorLoader`)."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from learnloop import html
from learnloop.data.batches import default_device, split, to_device
from learnloop.data.keyed import Key, batches, draw_seed, is_keyed, length, preserved_randomness
from learnloop.data.show import draw_batch


def known_n_inp(dls: Any, dl: Any) -> int | None:
    """How many elements of a batch are inputs, as far as loaders say so; reads no batch."""
    known = dls._n_inp if isinstance(dls, DataLoaders) else getattr(dls, "n_inp", None)
    return getattr(dl, "n_inp", None) if known is None else known


def first_batch(dls: Any, dl: Any) -> Any:
    """The first batch of a loader; moves no random generator."""
    with preserved_randomness():
        keyed = is_keyed(dl, getattr(dls, "keyed", True))
        stream = batches(dl, Key(getattr(dls, "seed", None) or 0, 0)) if keyed else iter(dl)
        for batch in stream:
            return batch
    raise ValueError(f"the {type(dl).__name__} is empty: it yields no batch.")


def split_batch(dls: Any, dl: Any, batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch, unwrapped where there is one of them; no targets are an empty tuple."""
    xb, yb = split(batch, known_n_inp(dls, dl), getattr(dls, "targets", None))
    return (xb[0] if len(xb) == 1 else xb), (yb[0] if len(yb) == 1 else yb)


def vocab_of(dls: Any, dl: Any) -> Any:
    """The names of the classes: of the loader or of `dls`; None where neither has any."""
    found = [getattr(owner, "vocab", None) for owner in (dl, dls)]
    vocab = next((v for v in found if v is not None), None)
    if vocab is not None and len(vocab) and isinstance(vocab[-1], (list, tuple)):
        return vocab[-1]  # of texts: the words, then the classes
    return vocab


def show_batch_of(dls: Any, dl: Any, max_n: int = 9, **kwargs: Any) -> Any:
    """Draws the first samples of a loader with their targets, and returns the figure; `kwargs`: cols, figsize."""
    xb, yb = split_batch(dls, dl, first_batch(dls, dl))
    return draw_batch(xb, yb, vocab_of(dls, dl), max_n, **kwargs)


def names_of(dls: Any) -> list[str | None]:
    """The name of each loader, by number; also where loaders were put together elsewhere, as fastai's."""
    if isinstance(dls, DataLoaders):
        return dls.names
    n = 2 if (known := length(dls)) is None else known
    has_valid = n > 1 and getattr(dls, "valid", None) is not None
    return ["train", "valid" if has_valid else None, *[None] * n][:n]


def name_of(dls: Any, ds_idx: int | str) -> str | None:
    """The name of a loader given by number or name; None where it has none."""
    names, number = names_of(dls), number_of(dls, ds_idx)
    return names[number] if -len(names) <= number < len(names) else None


def number_of(dls: Any, ds_idx: int | str) -> int:
    """The number of a loader given by number or name; KeyError with the nearest spelling for an unknown name."""
    if not isinstance(ds_idx, str):
        return ds_idx
    names = names_of(dls)
    if ds_idx not in names:
        raise KeyError(f"there is no loader `{ds_idx}`; {_known(ds_idx, names)}")
    return names.index(ds_idx)


def title_of(name: str | None) -> str:
    """How messages call a loader."""
    if name == "train":
        return "the training loader"
    return "the validation loader" if name in ("valid", None) else f"the loader `{name}`"


def due_after(dls: Any, epoch: int, n_epoch: int) -> list[int]:
    """The numbers of the loaders that are validated after an epoch, in their order."""
    every = dls.every if isinstance(dls, DataLoaders) else {}
    names = enumerate(names_of(dls))
    return [i for i, name in names if i > 0 and name is not None and is_due(epoch, n_epoch, every.get(name, 1))]


def is_due(epoch: int, n_epoch: int, every: int) -> bool:
    """Whether what is done every so many epochs is done after this one; after the last of a fit it always is."""
    return (epoch + 1) % every == 0 or epoch == n_epoch - 1


class DataLoaders:
    """A training loader, a validation loader and more, over any torch `DataLoader` or iterable of batches.

    `DataLoaders(train, valid, {"noisy": noisy, "old": old}, every={"old": 5})`: a mapping names further validation
    sets, which a fit validates after `valid`, in their order. They are `dls.noisy`, `dls["noisy"]` and
    `learn.validate("noisy")`, and their columns begin with their name. A mapping may also stand in the place of
    `valid`; then no column is `valid_loss`, unless its first set has the name `valid`. A further loader without a name
    is reached by its number, and no fit validates it.
    """

    seed: int | None = None  # of the data's order and augmentation; None: drawn once per fit
    every: dict[str, int]  # epochs from one validation of a set to the next, by its name; 1 for those not in it

    def __init__(
        self,
        *loaders: Any,  # training first, then validation, then any others; or mappings from name to loader
        every: Mapping[str, int] | None = None,  # epochs between validations of a set; the last epoch always has one
        path: str | Path = ".",
        device: str | torch.device | None = None,  # where batches and model go; None: the GPU where there is one
        n_inp: int | None = None,  # how many elements of a batch are inputs; None: all but the last
        targets: Sequence[str] | None = None,  # the keys of a mapping batch that are targets
        keyed: bool = True,  # False: loaders are iterated as they are, with the global generators
    ):
        if not loaders:
            raise ValueError("DataLoaders() got no loader; pass a training loader, and a validation loader after it.")
        self.loaders, self._names = _flat(loaders)
        for i, loader in enumerate(self.loaders):
            if not hasattr(loader, "__iter__"):
                raise TypeError(
                    f"loader {i} is a {type(loader).__name__}, which cannot be iterated; pass an iterable of batches."
                )
        self.path, self.keyed, self.every = Path(path), keyed, dict(every or {})
        self._n_inp = n_inp
        self._device: torch.device | None = None
        self.targets = (targets,) if isinstance(targets, str) else targets
        self._check_names()
        _check_every(self.every, self.names)
        if device is not None:
            self.to(device)

    def _check_names(self) -> None:
        """Refuses names by which a set could not be reached."""
        taken = [*dir(type(self)), *vars(self), *self._names.values()]
        for i, name in self._names.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"{name!r} is no name for a validation set; pass a string that is not empty.")
            n = 2 if (i, name) in ((0, "train"), (1, "valid")) else 1  # those two are properties as well
            if taken.count(name) > n:
                what = "the first loader after the training loader" if name == "valid" else "something else already"
                raise ValueError(f"`{name}` cannot name this validation set: `dls.{name}` is {what}. Rename the set.")

    @classmethod
    def from_dsets(
        cls,
        train_ds: Any,
        valid_ds: Any = None,  # a dataset, or several in a mapping from name to dataset
        bs: int = 64,  # samples per batch, training and validation
        shuffle: bool = True,  # the training set only
        device: str | torch.device | None = None,
        num_workers: int = 0,
        seed: int | None = None,  # of the data's order and augmentation; None: drawn once per fit
        **kwargs: Any,  # for torch's DataLoader
    ) -> "DataLoaders":
        """Torch loaders over map-style datasets."""
        own = {k: kwargs.pop(k) for k in ("path", "n_inp", "targets", "keyed", "every") if k in kwargs}
        kwargs["num_workers"] = num_workers
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        train = DataLoader(train_ds, batch_size=bs, shuffle=shuffle, generator=generator, **kwargs)
        sets = valid_ds if isinstance(valid_ds, Mapping) else {} if valid_ds is None else {"valid": valid_ds}
        valid = {name: DataLoader(ds, batch_size=bs, **{**kwargs, "drop_last": False}) for name, ds in sets.items()}
        dls = cls(train, valid, device=device, **own)
        dls.seed = seed
        return dls

    @property
    def train(self) -> Any:
        return self.loaders[0]

    @property
    def valid(self) -> Any:
        return self[1]

    @property
    def names(self) -> list[str | None]:
        """The name of each loader: `train`, `valid`, or what a mapping said; None for one that has only its number."""
        return [self._names.get(i) for i in range(len(self.loaders))]

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_names", {}).values():
            return self[name]
        return object.__getattribute__(self, name)  # for its error, or that of a property

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *filter(None, self.names)]

    def __getitem__(self, i: int | str) -> Any:
        """A loader by its number or its name."""
        try:
            return self.loaders[number_of(self, i)]
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

    def show_batch(self, ds_idx: int | str = 0, max_n: int = 9, **kwargs: Any) -> Any:
        """Draws the first samples of a loader with their targets; `kwargs`: cols, figsize. Returns the figure.

        Images have the shape (c, h, w) or (h, w), vectors are lines, anything else is text; `dls.vocab` names classes.
        """
        return show_batch_of(self, self[ds_idx], max_n, **kwargs)

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
        sizes = ", ".join(map(self._size, range(len(self))))
        return f"DataLoaders({sizes}, bs={self.bs}, device={self.device})"

    def _repr_html_(self) -> str:
        titles = ("", "loader", "batches", "batch size", "samples", "validated")
        return html.table(map(self._row, range(len(self))), titles, f"DataLoaders on {self.device}")

    def _row(self, i: int) -> tuple[Any, ...]:
        name, loader = self.names[i], self.loaders[i]
        bs = getattr(loader, "bs", None) or getattr(loader, "batch_size", None)
        samples = length(getattr(loader, "dataset", None))
        return (i if name is None else name, type(loader).__name__, length(loader), bs, samples, self._every(name))

    def _every(self, name: str | None) -> str:
        n = self.every.get(name or "", 1)
        return "" if name in (None, "train") else "every epoch" if n == 1 else f"every {n} epochs"

    def _size(self, i: int) -> str:
        """How `repr` shows a loader: named where it is no plain training or validation loader."""
        name, n = self.names[i], length(self.loaders[i])
        named = f"{name}: " if name not in (None, "train", "valid") else ""
        every = self.every.get(name or "", 1)
        return f"{named}{'?' if n is None else n} batches{f' every {every} epochs' if every > 1 else ''}"


def _flat(loaders: Sequence[Any]) -> tuple[list[Any], dict[int, Any]]:
    """The loaders one after another, those in mappings too; and by their numbers the names that some have."""
    if isinstance(loaders[0], Mapping):
        raise TypeError("the first loader is a mapping, but that one trains; a mapping names validation sets after it.")
    flat: list[Any] = []
    names: dict[int, Any] = {0: "train", 1: "valid"}
    for loader in loaders:
        if isinstance(loader, Mapping):
            names.update(enumerate(loader, len(flat)))
            flat += loader.values()
        else:
            flat.append(loader)
    return flat, names


def _check_every(every: Mapping[str, int], names: list[str | None]) -> None:
    for name, n in every.items():
        if name not in names[1:]:
            raise ValueError(f"`every` names `{name}`, which is no validation set; {_known(name, names[1:])}")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"`every={{{name!r}: {n!r}}}`: pass a whole number of epochs, 1 or more.")


def _known(name: str, names: Sequence[str | None]) -> str:
    """The end of a message about an unknown name: those that there are, and the nearest."""
    known = [n for n in names if n is not None]
    near = get_close_matches(name, known, n=1)
    return f"there is {', '.join(known) or 'none'}." + (f" Did you mean `{near[0]}`?" if near else "")


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

    def keyed_indices(self, key: Key) -> list[Any]:
        """The numbers of the samples in each batch of the pass of a key."""
        order = self._order(key if self.seed is None else Key(self.seed, key.epoch))
        order = torch.arange(self.n) if order is None else order
        return [order[i * self.bs : (i + 1) * self.bs] for i in range(len(self))]

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
