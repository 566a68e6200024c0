"""What things show of themselves in a cell: small tables as HTML, with everything in them escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

__all__ = ["code", "details", "paragraph", "table"]


def table(
    rows: Iterable[Sequence[Any]],  # cells; None is shown as an empty one, a float with six digits
    columns: Sequence[Any] = (),  # titles; none: a table without a head
    caption: str = "",
) -> str:
    """A table of plain cells."""
    head = f"<thead><tr>{''.join(f'<th>{_text(c)}</th>' for c in columns)}</tr></thead>" if columns else ""
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f"<table>{title}{head}<tbody>{body}</tbody></table>"


def details(summary: Any, *inner: str, is_open: bool = False) -> str:
    """A line that unfolds what is inside, which is HTML already."""
    return f"<details{' open' if is_open else ''}><summary>{_text(summary)}</summary>{''.join(inner)}</details>"


def paragraph(text: Any) -> str:
    return f"<p>{_text(text)}</p>"


def code(text: Any) -> str:
    """Text as it would stand in a terminal, its lines and spaces kept."""
    return f"<pre>{_text(text)}</pre>"


def _text(cell: Any) -> str:
    return escape("" if cell is None else f"{cell:.6f}" if isinstance(cell, float) else str(cell))
