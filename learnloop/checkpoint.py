"""Files of weights and optimizer: written whole or not at all, read without running code from them."""

import io
import json
import os
import pickle
import re
import secrets
import shutil
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from fastcore.foundation import L
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from learnloop.data.batches import get_model
from learnloop.loop.state import plain, unplain
from learnloop.machine import rank_distrib

Device = torch.device | str | int | None

WEIGHTS, SAFETENSORS = ".pth", ".safetensors"
SHOWN = 6  # names of one kind that an error lists


class FileDamaged(ValueError):
    """A file that is cut short, or in which bits are not as they were written. An earlier one may still be good."""


# Writing


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Lets `write(file)` fill a new file beside `path` and gives it that name once it is on disk; makes the folder.

    Whoever reads `path`, after a crash too, finds the whole new file or the whole old one. An OSError names path and
    reason, anything else that `write` raises is raised as it is; both leave no file. A killed process may leave one
    that begins with a dot and ends in `.tmp`.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _fill(temporary, write)
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = f"{error.strerror or error}; nothing was written, and an earlier file is as it was"
        raise OSError(error.errno, reason, str(path)) from error
    _sync_folder(path.parent)


class _Sink(io.BufferedWriter):
    """A file that remembers what stopped a write: torch raises an error of its own in its place."""

    failure: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BaseException as error:
            self.failure = self.failure or error
            raise


def _fill(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    file = _Sink(io.FileIO(path, "xb"))
    try:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    except BaseException:
        if file.failure is not None:
            raise file.failure from None
        raise
    finally:
        file.raw.close()  # not the buffer: after an error that would write once more


def _sync_folder(folder: Path) -> None:
    """Brings the new name to disk too, where the system can; the file itself is there already."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# Reading

_ZIP = b"PK\x03\x04"  # how files of `torch.save` begin
_FOLDER = 0x10  # what marks a folder in a zip file
#: What fastai's files hold beside tensors and python's own kinds. Making one of these runs nothing of the file.
_ALSO_PLAIN: list[Any] = [L, np.dtype, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)]
_SCALAR = np.float64(0).__reduce__()[0]
_ALSO_PLAIN += [(_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_reading = threading.Lock()


def read_plain(path: str | Path, device: Device = None) -> Any:
    """What `torch.save` wrote, if it is tensors and plain data; checksums compared, no code of the file run.

    Tensors come to `device`, host memory by default. FileNotFoundError names files that look alike, `FileDamaged` is
    for one that is cut or changed, ValueError for one that holds code or is of another kind.
    """
    torch.empty(0, device=_place(device))  # torch's own error where there is no such device
    with opened_whole(path) as file:
        try:
            with _fastai_is_plain():
                return torch.load(file, map_location=_place(device), weights_only=True)
        except pickle.UnpicklingError as error:
            raise _refused(Path(path), error) from None
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a changed bit in what zip keeps no checksum of: its list of contents
            raise _damaged(Path(path), str(error).partition("\n")[0]) from error


@contextmanager
def _fastai_is_plain() -> Iterator[None]:
    """Lets torch make what fastai's files hold; its list of such kinds is one for the process, and left as it was."""
    with _reading:
        known = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([kind for kind in _ALSO_PLAIN if kind not in known]):
            yield


@contextmanager
def opened_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A file of `torch.save`, open for reading, after every byte of it was compared with its checksum."""
    path = Path(path)
    if not path.exists():
        raise _missing(path)
    with open(path, "rb") as file:
        _check_whole(file, path)
        file.seek(0)
        yield file


def _check_whole(file: BinaryIO, path: Path) -> None:
    # torch itself reads past changed bits: its reader is built without the checks of zip.
    start = file.read(len(_ZIP))
    if start != _ZIP:
        raise _damaged(path, "it begins wrongly") if _may_be_ours(start, file) else _no_weights(path)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            _check_size(infos, path)
            changed = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, ValueError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if changed is not None:
        raise _damaged(path, f"`{changed}` in it is not what was written")
    if any(info.external_attr & _FOLDER for info in infos):
        raise _damaged(path, "a part of it is marked as a folder")  # torch would read nothing for it
    if not any(info.filename.endswith("/data.pkl") for info in infos):
        raise _no_weights(path)


def _check_size(infos: list[zipfile.ZipInfo], path: Path) -> None:
    """Refuses a zip bomb before anything of it is unpacked: torch compresses nothing."""
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise _damaged(path, "it would unpack to more than is in it")


def _may_be_ours(start: bytes, file: BinaryIO) -> bool:
    return _ZIP.startswith(start) or zipfile.is_zipfile(file)


def _damaged(path: Path, reason: str) -> FileDamaged:
    return FileDamaged(f"`{path}` is cut short or damaged ({reason}): take an earlier file, or fetch it again.")


def _no_weights(path: Path) -> ValueError:
    return ValueError(
        f"`{path}` is no file of weights, as `learn.save` and `torch.save` write them. A file of an old torch: "
        "load and save it with `torch` once. A program: `torch.export.load` reads it."
    )


def _missing(path: Path) -> FileNotFoundError:
    names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    alike = get_close_matches(path.name, names, n=3) or [n for n in names if n.endswith(path.suffix)][:SHOWN]
    there = f"the folder has {', '.join(f'`{n}`' for n in alike)}" if alike else "nothing like it is in that folder"
    return FileNotFoundError(f"there is no file `{path}`; {there}.")


def _refused(path: Path, error: Exception) -> ValueError:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"`{found[1]}`, which is code and no data" if found else "more than tensors and plain data"
    return ValueError(
        f"`{path}` holds {what}: it was refused, and none of it ran. If you made it yourself, read it once with "
        "`torch.load(…, weights_only=False)` and save the model's `state_dict()`."
    )


def _place(device: Device) -> torch.device:
    """The device that an argument names: a number is a GPU's, None the host."""
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cpu")


# Weights and optimizer


def weights_path(learn: Any, file: str | Path) -> Path:
    """Where a learner's weights of that name lie: below `model_dir`, and files of safetensors where `export` puts them.

    `.pth` is added where it is missing; an absolute path stays.
    """
    name = os.fspath(file)
    if name.endswith(SAFETENSORS):
        return Path(learn.path) / name
    return Path(learn.path) / learn.model_dir / (name if name.endswith(WEIGHTS) else name + WEIGHTS)


def save_model(file: str | Path, model: Any, opt: Any, with_opt: bool = True) -> None:
    """Writes the weights of `model`, and the state of `opt` if there is one, to `file`; fastai reads it too.

    Of several processes the first writes. TypeError where something could not be read back as plain data.
    """
    if Path(file).suffix == SAFETENSORS:
        raise ValueError(f"`{file}`: weights are saved as {WEIGHTS}; `learn.export('{file}')` writes this kind.")
    if rank_distrib():
        return
    state: Any = _storable(model_state(model))
    if with_opt and opt is not None:
        state = {"model": state, "opt": _storable(opt.state_dict(), "the optimizer's state")}
    write_atomically(file, lambda stream: torch.save(state, stream))


def load_model(
    file: str | Path,  # of `save_model`, of fastai, of `torch.save(model.state_dict(), …)`, or .safetensors
    model: Any,
    opt: Any,
    with_opt: bool | None = None,  # True: the optimizer's state must be there and fit; None: if so, else warn
    device: Device = None,  # where tensors are put while they are read; None: host memory
    strict: bool = True,  # False: names that only one side has are left out
) -> bool:
    """Reads weights and the state of an optimizer into `model` and `opt`, which stay on their devices.

    Returns whether there was such a state, and it fitted. ValueError that names keys and shapes where they do not fit;
    then neither has changed.
    """
    path = Path(file)
    weights, opt_state = _read(path, device)
    if with_opt and (opt_state is None or opt is None):
        lacks = f"`{path}` holds no state of an optimizer" if opt_state is None else "there is no optimizer to fill"
        raise ValueError(f"{lacks}. Pass `with_opt=False` to load the weights alone.")
    with _put_back_on_error(model):
        _put_weights(get_model(model), weights, strict, path)
        if with_opt is not False and path.suffix != SAFETENSORS:
            return _put_opt(opt, opt_state, path, bool(with_opt))
    return False


def model_state(model: Any) -> Any:
    """A model's `state_dict()`, with the names that it has outside of torch's wrappers; {} for a function."""
    model = get_model(model)
    return model.state_dict() if hasattr(model, "state_dict") else {}


def _storable(state: Any, where: str = "the model's state") -> Any:
    """The same containers with plain data; tensors are not copied. TypeError that names what is not plain."""
    if isinstance(state, Tensor):
        return storable_tensor(state, where)
    if isinstance(state, Mapping):
        items = {key: _storable(value, f"{where}: `{key}`") for key, value in state.items()}
        return _with_versions(items, state)
    if type(state) in (list, tuple):
        return type(state)(_storable(value, where) for value in state)
    return plain(state, where)


def _with_versions(items: dict[str, Any], state: Any) -> Any:
    """In a model's state, the layers' versions, by which they read files of older torches."""
    if hasattr(state, "_metadata"):
        state.update(items)  # made for us by `state_dict()`
        return state
    return items


def storable_tensor(tensor: Tensor, where: str) -> Tensor:
    """The values of a tensor, without what its class adds to them; TypeError where they are not in it."""
    if nn.parameter.is_lazy(tensor):
        raise TypeError(f"{where} has no shape before the model has seen a batch; run it once, then save.")
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(f"{where} is a {type(tensor).__name__}, which holds other tensors; gather the weights first.")
    return tensor.detach().as_subclass(Tensor)


def _read(path: Path, device: Device) -> tuple[Any, Any]:
    """Weights by name and the state of an optimizer, None where there is none."""
    if path.suffix == SAFETENSORS:
        return read_safetensors(path, device), None
    state, opt_state = read_plain(path, device), None
    if isinstance(state, Mapping) and set(state) == {"model", "opt"} and isinstance(state["model"], Mapping):
        state, opt_state = state["model"], state["opt"]
    if not isinstance(state, Mapping) or (state and not any(isinstance(v, Tensor) for v in state.values())):
        keys = f" of {_shortened([*map(repr, state)])}" if isinstance(state, Mapping) else ""
        raise ValueError(f"`{path}` holds a {type(state).__name__}{keys}, not weights by name; `torch.load` shows it.")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            state[name] = unplain(value)  # type: ignore[index]
    return state, unplain(opt_state)


@contextmanager
def _put_back_on_error(model: Any) -> Iterator[None]:
    """Gives a model its weights back, kept in host memory, where loading fails half-way.

    torch puts in what fits before it says what does not.
    """
    former = model_state(model)
    for name, value in list(former.items()):
        if not isinstance(value, Tensor):
            continue
        if nn.parameter.is_lazy(value):
            del former[name]
        else:
            former[name] = value.detach().to("cpu", copy=True)
    try:
        yield
    except BaseException:
        if former:
            get_model(model).load_state_dict(former, strict=False)
        raise


def _put_weights(model: Any, weights: Any, strict: bool, path: Path) -> None:
    here = model_state(model)
    if not strict and here and not here.keys() & weights.keys():
        raise ValueError(_unfit(here, weights, True, path, model))
    _fill_shared(here, weights)
    try:
        if hasattr(model, "load_state_dict"):
            model.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        message = _unfit(here, weights, strict, path, model)
        if message is None:  # not a matter of names and shapes
            raise
        raise ValueError(message) from error


def _unfit(here: Mapping[str, Any], saved: Mapping[str, Any], strict: bool, path: Path, model: Any) -> str | None:
    """What does not fit, by name and shape; None where all does."""
    both = [name for name in saved if name in here and _shape(saved[name]) != _shape(here[name])]
    found = {
        "only in the file": [_named(n, saved) for n in saved if n not in here] if strict else [],
        "only in the model": [_named(n, here) for n in here if n not in saved] if strict else [],
        "of another shape": [f"`{n}` {_shape(saved[n])} in the file and {_shape(here[n])} here" for n in both],
    }
    lines = [f"{title}: {_shortened(names)}" for title, names in found.items() if names]
    title = f"`{path}` does not fit the model `{type(model).__name__}`, which is as it was; "
    return title + "; ".join(lines) + "." if lines else None


def _shape(value: Any) -> Any:
    is_known = isinstance(value, Tensor) and not nn.parameter.is_lazy(value)
    return list(value.shape) if is_known else None


def _named(name: str, state: Mapping[str, Any]) -> str:
    shape = _shape(state[name])
    return f"`{name}`" if shape is None else f"`{name}` {shape}"


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _put_opt(opt: Any, state: Any, path: Path, must: bool) -> bool:
    if opt is None:
        return False
    if state is None:
        warnings.warn(f"`{path}` holds no state of an optimizer: the weights alone were loaded.", stacklevel=4)
        return False
    try:
        opt.load_state_dict(state)
    except Exception as error:
        if must:
            raise ValueError(
                f"the optimizer's state in `{path}` does not fit, and nothing was loaded: {error}"
            ) from error
        warnings.warn(f"the optimizer's state in `{path}` does not fit and was left out: {error}", stacklevel=4)
        return False
    return True


# safetensors, which holds tensors and strings and cannot hold code


def safetensors() -> Any:
    """The package, or an ImportError that says how to get it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("files of safetensors need the package: `pip install safetensors`.") from error
    return safetensors


def read_safetensors(path: Path, device: Device = None) -> dict[str, Tensor]:
    """The tensors of a file; `FileDamaged` where it is cut, or its checksum, if it has one, is another."""
    package = safetensors()
    if not path.exists():
        raise _missing(path)
    try:
        with package.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            expected = (file.metadata() or {}).get("crc32")
    except package.SafetensorError as error:
        raise _damaged(path, str(error)) from error
    if expected is not None and expected != json.dumps(checksum(tensors)):
        raise _damaged(path, "its tensors are not what was written")
    return {name: tensor.to(_place(device)) for name, tensor in tensors.items()}


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over names, kinds, shapes and values of tensors in host memory."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), crc)  # type: ignore[arg-type]
    return crc


def shared_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Each name under which a tensor is there once more -> the first name of that tensor."""
    first: dict[Any, str] = {}
    shared = {}
    for name, t in state.items():
        if isinstance(t, Tensor) and not nn.parameter.is_lazy(t) and t.numel():
            key = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride())
            if first.setdefault(key, name) != name:
                shared[name] = first[key]
    return shared


def _fill_shared(here: Mapping[str, Any], weights: Any) -> None:
    """Adds the names that a file left out because the model has that tensor under another name too."""
    groups: dict[str, list[str]] = {}
    for name, first in shared_names(here).items():
        groups.setdefault(first, [first]).append(name)
    for names in groups.values():
        kept = next((name for name in names if name in weights), None)
        for name in names if kept is not None else ():
            weights.setdefault(name, weights[kept])
