"""`grids_of`: modules in rows of layers and columns of their paths in a layer; experts of a layer share a cell."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from trtllm_ct.cli.page.markup import text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Grid", "grids_of", "table_of"]

T = TypeVar("T")

_IN_LAYER = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(slots=True)
class Grid(Generic[T]):
    """The entries of the layers behind one prefix, such as `model.layers`, by layer and path in it.

    Numbers in paths, those of experts, are stars.
    """

    prefix: str
    rows: dict[int, dict[str, list[T]]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """The paths of all rows: those of one part, such as `self_attn`, together, else by first appearance."""
        parts: dict[str, dict[str, None]] = {}
        for row in self.rows.values():
            for path in row:
                parts.setdefault(path.partition(".")[0], {})[path] = None
        return [path for paths in parts.values() for path in paths]


def grids_of(entries: Iterable[tuple[str, T]]) -> tuple[list[Grid[T]], list[tuple[str, T]]]:
    """Return the grids of entries by the names of their modules, and the entries that are in no layer."""
    grids: dict[str, Grid[T]] = {}
    others = []
    for name, entry in entries:
        match = _IN_LAYER.fullmatch(name)
        if match is None:
            others.append((name, entry))
            continue
        prefix, layer, path = match[1] or "", int(match[2]), _NUMBER.sub("*", match[3])
        grid = grids.setdefault(prefix, Grid(prefix))
        grid.rows.setdefault(layer, defaultdict(list))[path].append(entry)
    return list(grids.values()), others


def table_of(grid: Grid[T], cell: Callable[[list[T]], str], what: str) -> str:
    """Return a grid as a table that arrow keys move in; `cell` returns the attributes and the text of a cell.

    `what` says what the cells show. The script of the page shows more about a cell that has the focus.
    """
    columns = grid.columns
    head = "".join(f"<th scope=col><span>{text(path)}</span></th>" for path in columns)
    lines = []
    for layer, row in sorted(grid.rows.items()):
        cells = "".join(f"<td {cell(row[path])}</td>" if path in row else "<td class=no></td>" for path in columns)
        lines.append(f"<tr><th scope=row>{layer}</th>{cells}</tr>\n")
    label = text(f"{what} of {grid.prefix or 'layers'}")
    return (
        f'<div class=wide><table class=map role=grid aria-label="{label}" data-prefix="{text(grid.prefix)}">'
        f"<caption>{text(grid.prefix)}</caption><thead><tr><th scope=col>layer</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )
