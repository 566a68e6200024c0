"""A learner in one file, without its data: pickled, as weights with a description, or as a program without python."""

import copy
import copyreg
import importlib.metadata
import io
import json
import pickle
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from inspect import isroutine
from pathlib import Path
from typing import Any, BinaryIO

import torch
from fastcore.foundation import L
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from learnloop.checkpoint import (
    SAFETENSORS,
    checksum,
    model_state,
    opened_whole,
    safetensors,
    shared_names,
    storable_tensor,
    write_atomically,
)
from learnloop.data.batches import default_device, find_bs, get_model, model_caller, split, to_device
from learnloop.data.keyed import preserved_randomness
from learnloop.data.loaders import DataLoaders, TensorLoader, known_n_inp
from learnloop.loop.training_loop import OF_A_RUN, TrainingLoop
from learnloop.machine import default_pickle, rank_distrib

Writer = Callable[[BinaryIO], Any]

#: The formats of `export`, and how their files end.
FORMATS = {"pickle": ".pkl", "safetensors": SAFETENSORS, "pt2": ".pt2"}

#: What a learner keeps of a run, going on or over; the copy in a file begins without.
_OF_A_RUN = (*OF_A_RUN, *("_point", "_no_point", "_call", "_identity", "_is_done", "_phase", "_rest"))


def export(
    learn: Any,
    fname: str | Path | None = None,
    format: str | None = None,
    example: Any = None,
    pickle_module: Any = None,
    pickle_protocol: int = 2,
) -> Path:
    """`Learner.export`: the file is named, filled in one of `FORMATS` and put in place; the learner is not touched."""
    format = _format_of(fname, format)
    path = Path(learn.path) / (f"export{FORMATS[format]}" if fname is None else fname)
    if rank_distrib():
        return path
    if format == "pickle":
        write = _pickled(learn, pickle_module, pickle_protocol)
    elif format == "safetensors":
        write = _as_safetensors(learn)
    else:
        write = _as_program(learn, example)
    write_atomically(path, write)
    return path


def _format_of(fname: str | Path | None, format: str | None) -> str:
    """As asked for, else as the name ends, else a pickle."""
    if format is None:
        return next((f for f, ending in FORMATS.items() if Path(fname or "").suffix == ending), "pickle")
    if format not in FORMATS:
        raise ValueError(f"`format={format!r}`: the formats are {', '.join(map(repr, FORMATS))}.")
    return format


# Pickled


def _pickled(learn: Any, module: Any, protocol: int) -> Writer:
    """The whole learner with empty loaders and without an optimizer, as fastai exports it."""
    module = default_pickle() if module is None else module
    instead = _Instead(learn)
    exporting = types.SimpleNamespace(__name__=module.__name__, Pickler=_pickler(module, instead))

    def write(file: BinaryIO) -> None:
        try:
            torch.save(learn, file, pickle_module=exporting, pickle_protocol=protocol)
        except OSError:
            raise
        except Exception as error:
            raise TypeError(_unpicklable(learn, instead, module, error)) from error

    return write


class _Instead:
    """What a pickler takes in place of a learner, its loaders and its optimizer, wherever it meets them.

    So the learner is never changed, and what refers to it, as callbacks do, refers to the copy in the file.
    """

    def __init__(self, learn: Any):
        self.learn, self.emptied = learn, emptied(learn.dls)

    def reduced(self, thing: Any) -> Any:
        """How `thing` is pickled if that is another way than its own; else NotImplemented."""
        if thing is self.learn:
            return copyreg.__newobj__, (type(thing),), self.state()  # type: ignore[attr-defined]
        if thing is self.learn.dls:
            return self.emptied.__reduce_ex__(2)
        if thing is self.learn.opt and thing is not None:
            return type(None), ()
        if isinstance(thing, types.MethodType) and _is_only_there(thing):
            return _method, (thing.__func__, thing.__self__)
        return NotImplemented

    def state(self) -> dict[str, Any]:
        """What is kept of the learner; its loaders and optimizer are met by `reduced`."""
        learn = self.learn
        kept = {name: value for name, value in learn.__getstate__().items() if name not in _OF_A_RUN}
        fresh: dict[str, Any] = {"task": None, "training": False, "_depth": 0, "_muted": [], "_open_spans": []}
        return {**kept, "model": get_model(learn.model), **fresh}


def _pickler(module: Any, instead: _Instead) -> Any:
    class Pickler(module.Pickler):
        def reducer_override(self, thing: Any) -> Any:
            reduced = instead.reduced(thing)
            if reduced is not NotImplemented:
                return reduced
            parent = getattr(super(), "reducer_override", None)  # cloudpickle has one
            return NotImplemented if parent is None else parent(thing)

    return Pickler


def _is_only_there(method: types.MethodType) -> bool:
    """Whether a method was put on an instance: by its name, as pickle stores it, its class would not have it."""
    owner = method.__self__ if isinstance(method.__self__, type) else type(method.__self__)
    return not hasattr(owner, method.__name__)


def _method(function: Any, owner: Any) -> types.MethodType:
    """Makes a method again; python's own type for it cannot be pickled by name."""
    return types.MethodType(function, owner)


def emptied(dls: Any) -> Any:
    """The loaders without data: what `test_dl`, a device and the number of inputs need stays."""
    if hasattr(dls, "new_empty"):
        return dls.new_empty()
    empty = copy.copy(dls)
    if isinstance(dls, DataLoaders):
        empty.loaders = [_emptied_loader(dl) for dl in dls.loaders]
        empty._n_inp = known_n_inp(dls, dls.train)
        return empty
    for name in ("train", "valid"):
        if hasattr(dls, name):
            setattr(empty, name, _emptied_loader(getattr(dls, name)))
    return empty


def _emptied_loader(dl: Any) -> Any:
    if isinstance(dl, TensorLoader):
        return dl.new(*(t[:0].clone() for t in dl.tensors))  # a part of a tensor is stored with the whole
    if not isinstance(dl, DataLoader):
        return None if dl is None else []
    dataset: Any = dl.dataset.new_empty() if hasattr(dl.dataset, "new_empty") else []
    return DataLoader(
        dataset,
        batch_size=dl.batch_size,
        collate_fn=dl.collate_fn,
        drop_last=dl.drop_last,
        num_workers=dl.num_workers,
        pin_memory=dl.pin_memory,
        worker_init_fn=dl.worker_init_fn,
        prefetch_factor=dl.prefetch_factor,
        persistent_workers=dl.persistent_workers,
    )


def load_learner(
    fname: str | Path,
    cpu: bool = True,  # False: on the accelerator, where there is one
    pickle_module: Any = pickle,
    *,
    trusted: bool = False,  # the file may run code: you know who made it
) -> Any:
    """The learner that `learn.export` wrote; needs the modules that its parts come from.

    Reading a pickle runs whatever its author put in, so ValueError unless `trusted`. `FileDamaged` where it was changed
    on its way, TypeError where it holds no learner.
    """
    device = torch.device("cpu") if cpu else default_device()
    with opened_whole(fname) as file:
        if not trusted:
            raise ValueError(
                f"`{fname}` is a pickle, and reading it runs whatever code its author put in. If you know that it is "
                "yours: `load_learner(…, trusted=True)`. Weights alone are safe to read: `learn.save`, `learn.load`."
            )
        learn = _unpickled(file, device, pickle_module)
    if not isinstance(learn, TrainingLoop):
        raise TypeError(f"`{fname}` holds a {type(learn).__name__}, no learner of `learn.export`.")
    learn._rebuild()
    if hasattr(learn.dls, "to"):
        learn.dls.to(device)
    return learn


def _unpickled(file: BinaryIO, device: torch.device, module: Any) -> Any:
    try:
        return torch.load(file, map_location=device, pickle_module=module, weights_only=False)
    except (AttributeError, ImportError) as error:
        error.add_note(
            "The file names what is not here: import or define it as it was for the export, then load again."
        )
        raise


# Weights with a description


def _as_safetensors(learn: Any) -> Writer:
    """Parameters and buffers, a tensor with several names once, and what `description` says in strings of JSON."""
    package = safetensors()
    state = model_state(learn.model)
    shared = shared_names(state)
    tensors = {name: _for_safetensors(name, value) for name, value in state.items() if name not in shared}
    described = {**description(learn), "shared": shared, "crc32": checksum(tensors)}
    metadata = {"format": "pt", **{name: json.dumps(value, default=_as_json) for name, value in described.items()}}
    return lambda file: file.write(package.torch.save(tensors, metadata))


def _for_safetensors(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` in the model's state is a {type(value).__name__}; this format holds tensors alone.")
    return storable_tensor(value, f"`{name}` in the model's state").cpu().contiguous()


def description(learn: Any) -> dict[str, Any]:
    """What a reader of the weights wants to know of the learner."""
    model, dls = get_model(learn.model), learn.dls
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    found = {
        "learnloop": _version(),
        "model": _class_name(model),
        "loss": _class_name(learn.loss_func),
        "metrics": [metric.name for metric in learn.metrics],
        "n_inp": known_n_inp(dls, dls.train),
        "shapes": {name: value.shape for name, value in model_state(model).items() if isinstance(value, Tensor)},
        "frozen_groups": 0 if learn.opt is None else learn.opt.frozen_idx,
        "frozen": [name for name, p in named if not p.requires_grad],
    }
    vocab = getattr(dls, "vocab", None)
    return found if vocab is None else {**found, "vocab": vocab}


def _class_name(thing: Any) -> str | None:
    """`torch.nn.modules.loss.MSELoss` of an instance; the name of a function."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return None if thing is None else f"{named.__module__}.{named.__qualname__}"


def _version() -> str | None:
    try:
        return importlib.metadata.version("learnloop")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return None


def _as_json(value: Any) -> Any:
    return list(value) if hasattr(value, "__iter__") else str(value)


# A program


def _as_program(learn: Any, example: Any) -> Writer:
    """The model in eval mode as `torch.export` traces it, with a first dimension of any size."""
    model = get_model(learn.model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"`format='pt2'` takes a torch module, and the model is a {type(model).__name__}.")
    with preserved_randomness():
        batch = learn.dls.one_batch() if example is None else example
        xb, _ = split(batch, known_n_inp(learn.dls, learn.dls.train), getattr(learn.dls, "targets", None))
        args, kwargs = called_with(model, _at_least_two(to_device(xb, _device_of(model))))
        program = _traced(model, args, kwargs)
    program.example_inputs = None  # the file would carry samples of the data
    return lambda file: torch.export.save(program, file)


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    n, batch = find_bs((args, kwargs)), torch.export.Dim("batch")

    def of_batch(x: Any) -> Any:
        return {0: batch} if isinstance(x, Tensor) and x.ndim and x.shape[0] == n else None

    shapes = (*tree_map(of_batch, args), *tree_map(of_batch, kwargs).values())
    with _evaluating(model), torch.no_grad():
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:
            error.add_note("`export(format='pt2')` traces the model with `torch.export`, for batches of any size.")
            raise


def called_with(model: nn.Module, xb: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with which a learner calls the model for these inputs."""

    @wraps(model.forward)  # whose signature decides
    def note(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    return model_caller(note, xb)(xb)


def _at_least_two(xb: tuple[Any, ...]) -> tuple[Any, ...]:
    """A batch of one is doubled: torch takes a size of 1 for one that never changes."""
    if find_bs(xb) != 1:
        return xb
    return tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and len(x) == 1 else x, xb)


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each module then gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# What could not be pickled


def _unpicklable(learn: Any, instead: _Instead, module: Any, error: Exception) -> str:
    where, thing = _culprit(learn, "learn", instead, module)
    what = "a function" if isroutine(thing) else f"a {type(thing).__name__}"
    hint = "Leave it out in a `__getstate__` of what holds it"
    if isroutine(thing) or isinstance(thing, type):
        cell = ", or `pip install cloudpickle`, which stores functions of cells and lambdas too"
        hint = "Define it at the top of a module" + (cell if module is pickle else "")
    return f"`{where}` is {what} that cannot be stored: {error}. {hint}, or take it off before the export."


def _culprit(thing: Any, where: str, instead: _Instead, module: Any, above: tuple[Any, ...] = ()) -> tuple[str, Any]:
    """Name and value of the innermost part that cannot be pickled; `above` are those that it is part of."""
    above = (*above, thing)
    for name, part in _parts(thing, instead):
        if not any(part is other for other in above) and not _can_be_pickled(part, instead, module, above):
            return _culprit(part, where + name, instead, module, above)
    return where, thing


def _can_be_pickled(thing: Any, instead: _Instead, module: Any, above: tuple[Any, ...]) -> bool:
    known = {id(other) for other in above}

    class Probe(_pickler(module, instead)):  # type: ignore[misc]
        def persistent_id(self, part: Any) -> str | None:
            is_data = isinstance(part, (Tensor, torch.UntypedStorage, torch.TypedStorage))
            return "skipped" if is_data or id(part) in known else None

    try:
        Probe(io.BytesIO(), 2).dump(thing)
    except Exception:
        return False
    return True


def _parts(thing: Any, instead: _Instead) -> Iterator[tuple[str, Any]]:
    """What a thing consists of, with what is written behind its name to reach it."""
    if thing is instead.learn.dls:
        thing = instead.emptied
    if thing is instead.learn:
        yield from ((f".{name.removeprefix('_')}", part) for name, part in instead.state().items())
    elif isinstance(thing, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in thing.items())
    elif isinstance(thing, (list, tuple, L)):
        yield from ((f"[{i}]", part) for i, part in enumerate(thing))
    elif isinstance(thing, partial):
        yield from ((".func", thing.func), (".args", thing.args), (".keywords", thing.keywords))
    elif isinstance(thing, types.MethodType):
        yield ".__self__", thing.__self__
    elif isinstance(thing, nn.Module):
        yield from ((f"[{name}]" if name.isdigit() else f".{name}", part) for name, part in thing.named_children())
        yield from ((f".{name}", part) for name, part in vars(thing).items() if name != "_modules")
    elif hasattr(thing, "__dict__") and not isroutine(thing) and not isinstance(thing, type):
        yield from ((f".{name}", part) for name, part in vars(thing).items())
