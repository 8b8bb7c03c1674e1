"""HTML of single values and tables. Names of a checkpoint come from strangers: every text is escaped here."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from trtllm_ct.base.texts import format_bytes, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["bars", "bullets", "bytes_of", "count_of", "section", "table", "text"]


_UNITS = ((10**6, " M"), (10**3, " k"))


def text(value: object) -> str:
    """Return a text as HTML, with control characters as escapes."""
    return escape(printable(str(value)))


def bytes_of(count: int | None, name: str = "") -> str:
    """Return a number of bytes with its exact value; `name` is the key that it has in the document of `--json`."""
    return "unknown" if count is None else _data(count, format_bytes(count), name)


def count_of(count: int | None, name: str = "", *, short: bool = False) -> str:
    """Return a count with thousands separators, or with `short` in thousands or millions; see `bytes_of`."""
    if count is None:
        return "unknown"
    unit = next((entry for entry in _UNITS if short and count >= entry[0]), (1, ""))
    return _data(count, f"{count / unit[0]:,.1f}{unit[1]}" if unit[1] else f"{count:,}", name)


def _data(value: int, shown: str, name: str) -> str:
    key = f' data-key="{escape(name)}"' if name else ""
    return f'<data value="{value}"{key}>{shown}</data>'


def bars(*shares: float) -> str:
    """Return bars of these widths in percent; the numbers beside them say the same."""
    widths = "".join(f'<i style="width:{share:.1f}%"></i>' for share in shares)
    return f"<div class=bars aria-hidden=true>{widths}</div>"


def section(title: str, body: str, *, note: str = "") -> str:
    """Return a section of HTML under a title; empty without a body."""
    if not body:
        return ""
    name = "".join(character if character.isalnum() else "-" for character in title.lower())
    under = f"<p class=note>{text(note)}</p>" if note else ""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{text(title)}</h2>{under}{body}</section>\n'


def bullets(items: Iterable[str]) -> str:
    """Return a list of HTML texts; empty without any."""
    entries = "".join(f"<li>{item}</li>" for item in items)
    return f"<ul>{entries}</ul>" if entries else ""


def table(caption: str, headers: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """Return a table of HTML cells, whose first cell of each row is its header.

    The last `numbers` columns are right-aligned.
    """
    first = len(headers) - numbers
    aligned = ["" if at < first else " class=n" for at in range(len(headers))]
    head = "".join(f"<th scope=col{kind}>{text(name)}</th>" for name, kind in zip(headers, aligned, strict=True))
    lines = "".join(f"<tr>{_row(row, aligned)}</tr>\n" for row in rows)
    return (
        f"<div class=wide tabindex=0 role=region aria-label='{text(caption)}'><table><caption>{text(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _row(cells: Sequence[str], aligned: Sequence[str]) -> str:
    head, *others = cells
    data = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(others, aligned[1:], strict=True))
    return f"<th scope=row>{head}</th>{data}"
