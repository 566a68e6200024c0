"""A journal of the batches of a training, by which a resumed one tells whether it repeats them bit for bit."""

import os
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learnloop.data.keyed import mix

_LINE = struct.Struct("<qIII")  # training batches done; place in the data, random states, loss: 32 bits of each
_HEAD = 16  # bytes before the first line
_WHAT = ("the place in the data", "a random state", "the loss")
_WAITING = 64  # lines whose losses are on an accelerator: they are brought to the host together


class Journal:
    """One line of 20 bytes per training batch, in a file that a killed process leaves behind complete.

    Its first 16 bytes name the run. Where writing fails, a warning says so and the journal ends: it only verifies.
    """

    def __init__(self, path: Path, run: str, start: int):
        self.path, self.run = path, run
        lines = self._read()
        self.expected = {
            n: line for n, line in (lines or {}).items() if n > start
        }  # noted when the run was here before
        self.repeated = 0  # lines that came again as they were
        self.differs = False
        self._known = max(self.expected, default=start)
        self._waiting: list[tuple[int, int, int, Any]] = []
        self._file: int | None = self._opened(goes_on=lines is not None)

    def _read(self) -> dict[int, tuple[int, int, int]] | None:
        """The lines of this run that are there; None where there is no journal of it."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return None
        if data[:_HEAD] != self._head():
            return None
        whole = data[_HEAD : len(data) - (len(data) - _HEAD) % _LINE.size]
        return {n: tuple(rest) for n, *rest in _LINE.iter_unpack(whole)}  # type: ignore[misc]

    def _head(self) -> bytes:
        return self.run.encode()[:_HEAD].ljust(_HEAD)

    def _opened(self, goes_on: bool) -> int | None:
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | (0 if goes_on else os.O_TRUNC), 0o666)
            size = os.lseek(file, 0, os.SEEK_END)
            if goes_on:  # a process that was killed in the middle of a line leaves a part of it
                os.lseek(file, size - (size - _HEAD) % _LINE.size, os.SEEK_SET)
            else:
                os.write(file, self._head())
        except OSError as error:
            return self._give_up(error)
        return file

    def note(self, learn: Any) -> None:
        """A line for the batch that was just done."""
        place = learn._passes.used if learn._passes is not None else (learn.epoch, learn._batches_done)
        line = learn.train_iter, mix(learn._data_seed, *place) & 0xFFFFFFFF, random_checksum(), learn._finished_loss()
        self._waiting.append(line)
        if not isinstance(line[3], Tensor) or line[3].device.type == "cpu" or len(self._waiting) >= _WAITING:
            self.flush()

    def flush(self) -> None:
        """Writes the lines that wait, or compares them with what was noted before."""
        lines = [(n, place, states, _bits(loss)) for n, place, states, loss in self._waiting]
        self._waiting = []
        for n, *line in lines:
            if n in self.expected:
                self._compare(n, self.expected.pop(n), tuple(line))
        new = b"".join(_LINE.pack(*line) for line in lines if line[0] > self._known)
        if new and self._file is not None:
            try:
                os.write(self._file, new)
            except OSError as error:
                self._file = self._give_up(error)

    def _compare(self, n: int, before: tuple[int, ...], now: tuple[int, ...]) -> None:
        if self.differs:
            return
        if before == now:
            self.repeated += 1
            return
        self.differs = True
        what = next(name for name, a, b in zip(_WHAT, before, now, strict=True) if a != b)
        warnings.warn(
            f"the resumed training differs from the one before: {what} is another in training batch {n - 1}. "
            "`learn.verify_resume()` looks for the cause.",
            stacklevel=2,
        )

    def verdict(self) -> str | None:
        """What is to be said once all that was noted before came again; None where there is nothing to say."""
        if not self.repeated or self.differs:
            return None
        plural = "" if self.repeated == 1 else "es"
        return f"resume verified: {self.repeated} batch{plural} repeated bit for bit"

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _give_up(self, error: OSError) -> None:
        warnings.warn(
            f"the journal `{self.path}` could not be written: {error.strerror}. It is left out.", stacklevel=2
        )


def random_checksum() -> int:
    """32 bits of the states of the host's generators: torch, numpy, python."""
    numpy = np.random.get_state(legacy=False)["state"]
    crc = zlib.crc32(torch.default_generator.get_state().numpy())
    crc = zlib.crc32(numpy["key"], crc) + numpy["pos"]
    return (crc ^ hash(random.getstate()[1])) & 0xFFFFFFFF


def _bits(loss: Any) -> int:
    if loss is None:
        return 0
    return zlib.crc32(struct.pack("<d", float(loss.mean() if isinstance(loss, Tensor) and loss.ndim else loss)))
