"""Tables and names that are never cut off: on a narrow terminal they take another form."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rich import box
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

__all__ = ["UnbrokenName", "fitted_table"]

_WRAPPED_COLUMNS = frozenset({"stored", "delivered as, or reason"})
# Without a terminal width to fit, long reasons would make this column hundreds of characters wide.
_MAX_WIDTHS = {"stored": 60}
_COLUMN_GAP = 3
_FIRST_SHOWN = 3
"""How many runs of a list of numbers are shown that is too long for a line, beside the last one."""
_NUMBERS = re.compile(r"\{([^}]*)\}")


def fitted_table(*headers: str, title: str | None = None, narrow: RenderableType | None = None) -> Table:
    """Return an empty table with these columns; names and modes don't wrap, schemes and reasons do.

    `narrow` is shown in its place on a terminal that is too narrow for that. Without it, all cells wrap there.
    """
    table = _FittedTable(narrow, title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        no_wrap = header not in _WRAPPED_COLUMNS
        table.add_column(header, no_wrap=no_wrap, overflow="fold", max_width=_MAX_WIDTHS.get(header))
    return table


class _FittedTable(Table):
    """A table that shows all text on a narrow terminal: in another form if there is one, otherwise all cells wrap."""

    def __init__(self, narrow: RenderableType | None, **options: Any) -> None:
        super().__init__(**options)
        self._narrow = narrow

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if sum(_min_width(column, console, options) for column in self.columns) > options.max_width:
            if self._narrow is not None:
                return console.render(self._narrow, options)
            for column in self.columns:
                column.no_wrap = False
        return super().__rich_console__(console, options)


def _min_width(column: Column, console: Console, options: ConsoleOptions) -> int:
    """Return the least width of a column, with the gap to the next one.

    That is its longest cell if the column does not wrap, and its longest word if it does.
    """
    sizes = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    return max(size.maximum if column.no_wrap else size.minimum for size in sizes) + _COLUMN_GAP


class UnbrokenName:
    """A folded name in a line of its own. If it is too long, its longest list of numbers follows it in the next line.

    Of a list that is too long for a line, the first numbers and the last one are shown, and how many there are.
    """

    def __init__(self, name: str, indent: int) -> None:
        self._name = name
        self._indent = indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lists = [] if len(self._name) + self._indent <= options.max_width else [*_NUMBERS.finditer(self._name)]
        longest = max(lists, key=lambda match: len(match[0]), default=None)
        if longest is None:
            yield Padding(Text(self._name, overflow="fold"), (0, 0, 0, self._indent))
            return
        name = f"{self._name[: longest.start()]}*{self._name[longest.end() :]}"
        yield Padding(Text(name, overflow="fold"), (0, 0, 0, self._indent))
        numbers = _cut_list(longest[1].split(","), options.max_width - self._indent - 2)
        yield Padding(Text(numbers), (0, 0, 0, self._indent + 2))


def _cut_list(runs: list[str], width: int) -> str:
    """Return a text for a star that stands for these runs of numbers, such as `3` or `0..56..4`."""
    whole = f"* is {', '.join(runs)}"
    if len(whole) <= width or len(runs) <= _FIRST_SHOWN + 1:
        return whole
    return f"* is one of {sum(map(_count, runs))}: {', '.join(runs[:_FIRST_SHOWN])} … {runs[-1]}"


def _count(run: str) -> int:
    """Return how many numbers a run stands for."""
    first, *more = map(int, run.split(".."))
    last, step = (*more, first, 1)[:2] if len(more) != 1 else (more[0], 1)
    return len(range(first, last + 1, step))
