"""Files of a whole run: written with a checksum over every byte, the newest good one found again in a folder."""

import hashlib
import re
import time
import warnings
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from learnloop.checkpoint import FileDamaged, read_plain, write_atomically
from learnloop.loop.state import VERSION

SUFFIX = ".ckpt"
_FORMAT = "learnloop checkpoint"
_MARK = b"learnloop-sha256"  # what stands behind the archive of `torch.save`, before the checksum
_BLOCK = 1 << 20


class Stored(NamedTuple):
    """What a file of a run holds."""

    path: Path
    state: dict[str, Any]  # of `learn.state_dict()`
    run: str  # the training it belongs to, also over its resumes
    phase: int  # number of the fit, in a verb that makes several


def write_run(path: Path, state: dict[str, Any], run: str, phase: int) -> None:
    """Writes a run to `path`, whole or not at all; OSError names path and reason."""
    content = {"format": _FORMAT, "version": VERSION, "state": state, "run": run, "phase": phase, "time": time.time()}

    def write(file: BinaryIO) -> None:
        sink = _Hashing(file)
        torch.save(content, sink)  # type: ignore[arg-type]
        file.write(_MARK + sink.hash.digest())

    write_atomically(path, write)


def read_run(path: Path) -> Stored:
    """Reads a run back; runs no code of the file. `FileDamaged` where a byte is not as it was written."""
    _check_bytes(path)
    content = read_plain(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"`{path}` is no checkpoint of a run. A file of weights is read by `learn.load`.")
    if content["version"] != VERSION:
        raise ValueError(
            f"`{path}` has the format {content['version']}, and this version reads {VERSION}. Resume it with the "
            "version of learnloop that wrote it."
        )
    return Stored(path, content["state"], content["run"], content["phase"])


def runs_in(folder: Path) -> list[Path]:
    """The files of a folder, the oldest first."""
    numbered = {int(m[1]): p for p in _files(folder) if (m := re.fullmatch(rf"(\d+){re.escape(SUFFIX)}", p.name))}
    return [numbered[n] for n in sorted(numbered)]


def next_path(folder: Path) -> Path:
    """The path for a file newer than all that are there."""
    there = runs_in(folder)
    return folder / f"{int(there[-1].stem) + 1 if there else 0:06d}{SUFFIX}"


def newest_run(folder: Path) -> Stored | None:
    """The newest file that can be read, with a warning for each damaged one; None where there is no file at all."""
    paths = runs_in(folder)
    for path in reversed(paths):
        try:
            return read_run(path)
        except FileDamaged as error:
            warnings.warn(f"{error} The one before it is tried.", stacklevel=2)
    if paths:
        raise FileDamaged(f"none of the {len(paths)} checkpoints in `{folder}` can be read; see the warnings above.")
    return None


class _Hashing:
    """A file for writing that hashes what passes through it."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _check_bytes(path: Path) -> None:
    """`FileDamaged` unless the checksum at the end of a file is that of what comes before."""
    size = path.stat().st_size - len(_MARK) - hashlib.sha256().digest_size
    with open(path, "rb") as file:
        found = hashlib.sha256()
        for start in range(0, max(size, 0), _BLOCK):
            found.update(file.read(min(_BLOCK, size - start)))
        end = file.read()
    if end != _MARK + found.digest():
        reason = "its checksum is another" if end.startswith(_MARK) else "it has no end"
        raise FileDamaged(f"the checkpoint `{path}` is cut short or damaged: {reason}.")


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
