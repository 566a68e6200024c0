"""Files of a whole run: written with a checksum over every byte, the newest good one found again in a folder."""

import hashlib
import re
import secrets
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from learnloop.checkpoint import FileDamaged, read_plain, write_atomically
from learnloop.loop.state import VERSION, same

SUFFIX = ".ckpt"
_NAME = re.compile(r"(\d{6,})-(\w+)\.ckpt")  # its number in the folder, the run that it belongs to
_FORMAT = "learnloop checkpoint"
_MARK = b"learnloop-sha256"  # what stands behind the archive of `torch.save`, before the checksum
_BLOCK = 1 << 20


class Stored(NamedTuple):
    """What a file of a run holds."""

    path: Path
    state: dict[str, Any]  # of `learn.state_dict()`
    run: str  # the training it belongs to, also over its resumes
    phase: int  # number of the fit, in a verb that makes several


def new_run() -> str:
    """A name for a training that begins."""
    return secrets.token_hex(4)


# Writing


def write_run(path: Path, state: dict[str, Any], run: str, phase: int) -> None:
    """Writes a run to `path`, whole or not at all; OSError names path and reason."""
    content = {"format": _FORMAT, "version": VERSION, "state": state, "run": run, "phase": phase, "time": time.time()}

    def write(file: BinaryIO) -> None:
        sink = _Hashing(file)
        torch.save(content, sink)  # type: ignore[arg-type]
        sink.flush()
        file.write(_MARK + sink.hash.digest())

    write_atomically(path, write)


class _Hashing:
    """A file for writing that hashes what passes through it; torch writes hundreds of small pieces."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash = file, hashlib.sha256()
        self.pieces = bytearray()

    def write(self, data: Any) -> int:
        if len(data) < _BLOCK:
            self.pieces += data
            if len(self.pieces) >= _BLOCK:
                self.flush()
        else:
            self.flush()
            self._pass_on(data)
        return len(data)

    def flush(self) -> None:
        self._pass_on(self.pieces)
        self.pieces = bytearray()

    def _pass_on(self, data: Any) -> None:
        self.hash.update(data)
        self.file.write(data)


class Writing:
    """One file on its way to the disk, in a thread of its own; then older ones are removed."""

    def __init__(
        self,
        folder: Path,
        state: dict[str, Any],  # that nobody changes meanwhile
        run: str,
        phase: int,
        keep: int | None,  # files that stay, the newest; None: all
        is_checked: bool,  # read back, and taken away again if it is not what was written
    ):
        self.folder, self.state, self.run, self.phase = folder, state, run, phase
        self.keep, self.is_checked = keep, is_checked
        self.path: Path | None = None
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._write, name="learnloop checkpoint")

    def start(self) -> "Writing":
        self._thread.start()
        return self

    def finish(self) -> OSError | None:
        """Waits until it is done; returns what went wrong."""
        self._thread.join()
        return self.error

    def _write(self) -> None:
        try:
            self.path = next_path(self.folder, self.run)
            write_run(self.path, self.state, self.run, self.phase)
            if self.is_checked:
                self._check()
            self._remove_old()
        except OSError as error:
            self.error = error
        except Exception as error:  # not of the disk, but nobody would hear of it in a thread
            self.error = OSError(f"the checkpoint `{self.path}` could not be written: {error!r}")
            self.error.__cause__ = error

    def _check(self) -> None:
        path: Path = self.path  # type: ignore[assignment]
        with suppress(ValueError):  # such as `FileDamaged`
            if same(read_run(path).state, self.state):
                return
        path.unlink()
        raise OSError(f"the checkpoint `{path}` did not hold what was written to it: is the disk all right?")

    def _remove_old(self) -> None:
        with suppress(OSError):  # the new one is there, which is what counts
            for path in runs_in(self.folder)[: -self.keep] if self.keep is not None else ():
                path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """OSError where no file can be made in a folder; removes what a process left that was killed while it wrote."""
    probe = folder / f".{secrets.token_hex(6)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".*{SUFFIX}.*.tmp"):
            left.unlink(missing_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: no checkpoint could be written there", str(folder)) from error


# Reading


def read_run(path: Path) -> Stored:
    """Reads a run back; runs no code of the file.

    `FileDamaged` where a byte is not as it was written, ValueError for what is no checkpoint.
    """
    _check_bytes(path)
    content = read_plain(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT or not isinstance(content.get("state"), dict):
        raise ValueError(f"`{path}` is no checkpoint of a run. A file of weights is read by `learn.load`.")
    if content["version"] != VERSION:
        raise ValueError(
            f"`{path}` has the format {content['version']}, and this version reads {VERSION}. Resume it with the "
            "version of learnloop that wrote it."
        )
    return Stored(path, content["state"], content["run"], content["phase"])


def _check_bytes(path: Path) -> None:
    """`FileDamaged` unless the checksum at the end of a file is that of what comes before."""
    found, left = hashlib.sha256(), path.stat().st_size - len(_MARK) - hashlib.sha256().digest_size
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            found.update(block)
            left -= len(block)
        end = file.read()
    if end != _MARK + found.digest():
        reason = "its checksum is another" if end.startswith(_MARK) else "its end is not that of a checkpoint"
        raise FileDamaged(f"the checkpoint `{path}` is cut short or damaged: {reason}.")


# In a folder


def runs_in(folder: Path) -> list[Path]:
    """The files of a folder, the oldest first."""
    files = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(files, key=_number)


def next_path(folder: Path, run: str) -> Path:
    """The path for a file newer than all that are there."""
    there = runs_in(folder)
    return folder / f"{_number(there[-1]) + 1 if there else 0:06d}-{run}{SUFFIX}"


def newest_run(folder: Path) -> Stored | None:
    """The newest file of the newest run that can be read, with a warning for each damaged one; None for no files."""
    paths = runs_in(folder)
    runs = [path for path in paths if _run(path) == _run(paths[-1])]  # an earlier run's would be another training
    for path in reversed(runs):
        try:
            return read_run(path)
        except (FileDamaged, OSError) as error:
            warnings.warn(f"{error} The one before it is tried.", stacklevel=2)
    if not paths:
        return None
    other = " There are files of an earlier run: `resume` takes the path of one." if len(runs) < len(paths) else ""
    raise FileDamaged(f"none of the {len(runs)} checkpoints of the last run in `{folder}` can be read.{other}")


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _run(path: Path) -> str:
    return path.stem.partition("-")[2]
