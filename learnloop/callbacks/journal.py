"""A journal of the batches of a training, by which a resumed one tells whether it repeats them bit for bit."""

import ctypes
import os
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from learnloop.data.keyed import mix

_LINE = struct.Struct("<qIII")  # training batches done, then what `Line` has: 32 bits of each
_HEAD = 16  # bytes before the first line
_MT_WORDS = 625  # of the Mersenne Twister: its 624 numbers, and which of them comes next
#: Lines are made and written so many at a time, and the generators looked at as often: between two batches of a network
#: the cache is cold, and all this would take four times as long. On an accelerator it also waits for the device.
AT_ONCE, AT_ONCE_AWAY = 16, 64


class Line(NamedTuple):
    """Checksums of what a batch was."""

    place: int  # in the data
    random: int  # states of the generators, in every so manyth batch; 0 in the others
    loss: int


_WHAT = Line("the place in the data", "a random state", "the loss")  # type: ignore[arg-type]


class Journal:
    """One line of 20 bytes per training batch, in a file of which a killed process leaves all but the last few.

    Its first 16 bytes name the run. Where writing fails, a warning says so and the journal ends: it only verifies.
    """

    def __init__(self, path: Path, run: str, start: int):
        self.path, self.run, self.start = path, run, start  # training batches that were done before
        self.expected: dict[int, Line] = {}  # noted when the run was here before
        self.repeated = 0  # lines that came again as they were
        self.differs = False
        self._known = start  # the last batch with a line in the file
        self._waiting: list[tuple[int, tuple[int, ...], int, Any]] = []
        self._file: int | None = None

    def open(self) -> "Journal":
        """Reads what the run has noted already; another run's journal is begun anew."""
        lines = self._read()
        self.expected = {n: line for n, line in (lines or {}).items() if n > self.start}
        self._known = max(self.expected, default=self.start)
        try:
            self._file = self._opened(goes_on=lines is not None)
        except OSError as error:
            self._give_up(error)
        return self

    def _read(self) -> dict[int, Line] | None:
        """The lines of this run that are there; None where there is no journal of it."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return None
        if data[:_HEAD] != self._head():
            return None
        whole = data[_HEAD : len(data) - (len(data) - _HEAD) % _LINE.size]
        return {n: Line(*rest) for n, *rest in _LINE.iter_unpack(whole)}

    def _head(self) -> bytes:
        return self.run.encode()[:_HEAD].ljust(_HEAD)

    def _opened(self, goes_on: bool) -> int:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | (0 if goes_on else os.O_TRUNC), 0o666)
        if goes_on:  # a process that was killed in the middle of a line leaves a part of it
            size = os.lseek(file, 0, os.SEEK_END)
            os.lseek(file, size - (size - _HEAD) % _LINE.size, os.SEEK_SET)
        else:
            os.write(file, self._head())
        return file

    def note(self, learn: Any) -> None:
        """A line for the batch that was just done."""
        n, loss = learn.train_iter, learn._finished_loss()
        place = learn._passes.used if learn._passes is not None else (learn.epoch, learn._batches_done)
        states = 0 if n % AT_ONCE else random_checksum()
        self._waiting.append((n, (learn._data_seed, *place), states, loss))
        if len(self._waiting) >= AT_ONCE:
            is_away = isinstance(loss, Tensor) and loss.device.type != "cpu"
            if not is_away or len(self._waiting) >= AT_ONCE_AWAY:
                self.flush()

    def flush(self) -> None:
        """Writes the lines that wait, and compares those that were noted before."""
        waiting, self._waiting = self._waiting, []
        losses = _on_host([loss for *_, loss in waiting])
        lines = [
            (n, Line(mix(*place) & 0xFFFFFFFF, states, _bits(loss)))
            for (n, place, states, _), loss in zip(waiting, losses, strict=True)
        ]
        for n, line in lines:
            if n in self.expected:
                self._compare(n, self.expected.pop(n), line)
        self._append(b"".join(_LINE.pack(n, *line) for n, line in lines if n > self._known))

    def _append(self, new: bytes) -> None:
        if new and self._file is not None:
            try:
                os.write(self._file, new)
            except OSError as error:
                self.close()
                self._give_up(error)

    def _compare(self, n: int, before: Line, now: Line) -> None:
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

    @property
    def is_repeated(self) -> bool:
        """Whether all that was noted before came again, which nobody has been told yet."""
        return self.repeated > 0 and not self.expected

    def verdict(self) -> str | None:
        """What is to be said of the lines that came again, once; None where there is nothing to say."""
        n, self.repeated = self.repeated, 0
        if not n or self.differs:
            return None
        return f"resume verified: {n} batch{'' if n == 1 else 'es'} repeated bit for bit"

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _give_up(self, error: OSError) -> None:
        warnings.warn(
            f"the journal `{self.path}` could not be written: {error.strerror}. It is left out.", stacklevel=2
        )


def random_checksum() -> int:
    """32 bits of the states of the host's generators: torch, numpy, python."""
    state: Any = torch.default_generator.get_state().numpy()
    crc = zlib.crc32(_numpy_state(), zlib.crc32(state))
    return (crc ^ hash(random.getstate()[1])) & 0xFFFFFFFF  # of a tuple of integers, it is the same in every process


def _numpy_state() -> Any:
    """The bytes of numpy's global state, read where they are: asking for them takes longer than all else in a line."""
    bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(bits) is np.random.MT19937:
        return (ctypes.c_uint32 * _MT_WORDS).from_address(bits.ctypes.state_address)
    return repr(bits.state).encode()


def _on_host(losses: list[Any]) -> list[float | None]:
    """Losses as numbers; those on an accelerator are brought together, in one copy."""
    whole = [loss.mean() if isinstance(loss, Tensor) and loss.ndim else loss for loss in losses]
    away = [i for i, loss in enumerate(whole) if isinstance(loss, Tensor) and loss.device.type != "cpu"]
    if len(away) > 1:
        for i, number in zip(away, torch.stack([whole[i] for i in away]).tolist(), strict=True):
            whole[i] = number
    return [None if loss is None else float(loss) for loss in whole]


def _bits(loss: float | None) -> int:
    return 0 if loss is None else zlib.crc32(struct.pack("<d", loss))
