"""Files of JSON lines: each added whole, and read again whatever became of the last one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learnloop.callbacks.logfiles import json_line

__all__ = ["append_line", "read_lines"]


def append_line(path: Path, fields: dict[str, Any]) -> None:
    """Adds a line in one write, and waits until it is on disk; makes file and folder.

    After a line that was cut short it begins a new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.lseek(file, 0, os.SEEK_END)
        is_cut = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        line = f"{json_line(fields)}\n".encode()
        if os.write(file, b"\n" + line if is_cut else line) < len(line):
            raise OSError(f"{path}: the disk is full; the last line was cut short.")
        os.fsync(file)
    finally:
        os.close(file)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file as dicts; what is no line of JSON, such as one that was cut short, is left out."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if isinstance(fields, dict):
            yield fields
