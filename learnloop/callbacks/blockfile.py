"""A text file to which fit after fit adds its lines, and in which a resumed fit finds its own."""

from pathlib import Path
from typing import IO, Any


class BlockFile:
    """A file in which the lines of a fit are one block. The first line of every block begins with `opening`.

    Every line is flushed, so that others can read it at once. A resumed fit goes on with its block: lines that it is
    going to write again are taken out, those of other fits stay.
    """

    def __init__(self, opening: str):
        self.opening = opening.encode()
        self.place: tuple[int, int] | None = None  # bytes at which the block begins and ends; None: not begun
        self._file: IO[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no open file."""
        return {**vars(self), "_file": None}

    def open(self, path: Path) -> None:
        """Opens the file, which is made together with its folder, and changes nothing in it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.place, self._file = None, path.open("r+b")

    def begin(self, first_line: str, append: bool) -> None:
        """Begins a block at the end of the file; without `append` everything before is thrown away."""
        if self._file is not None:
            start = self._file.seek(0, 2 if append else 0)
            self._file.truncate()
            self.place = start, start
            self.write(first_line)

    def go_on(self, place: tuple[int, int]) -> None:
        """Goes on with a block as it was at `place`. In a file that was not written to that far, none is begun."""
        if self._file is None:
            return
        start, end = place
        self._file.seek(0)
        text = self._file.read()
        if len(text) < end or not text.startswith(self.opening, start):
            return
        others = blocks_in(text[end:], self.opening)
        self._file.seek(start)
        self._file.write(others + text[start:end])
        self._file.truncate()
        self.place = start + len(others), self._file.tell()
        self._file.flush()

    def write(self, line: str) -> None:
        """Adds a line to the block."""
        if self._file is not None and self.place is not None:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            self.place = self.place[0], self._file.tell()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def blocks_in(text: bytes, opening: bytes) -> bytes:
    """Everything from the first line that opens a block; empty where none does."""
    if text.startswith(opening):
        return text
    found = text.find(b"\n" + opening)
    return b"" if found < 0 else text[found + 1 :]
