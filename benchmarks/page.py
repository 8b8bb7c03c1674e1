"""Puts tables and plots into docs/performance.md; what stands outside of the markers is left as it is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from benchmarks.cases import Table
from benchmarks.plots import draw, require_matplotlib
from benchmarks.tables import grids, markdown
from trtllm_ct.base.errors import Fault, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.results import Report

__all__ = ["PAGE", "require_page", "write_page"]

PAGE = "performance.md"


def require_page(docs: Path) -> None:
    """Raise `UsageError` when the page or its markers are not there, and `MissingDependencyError` without matplotlib.

    To be called first: measuring takes minutes.
    """
    require_matplotlib()
    text = (docs / PAGE).read_text(encoding="utf-8") if (docs / PAGE).is_file() else ""
    missing = [table for table in Table if _block(table).search(text) is None]
    if missing:
        raise UsageError(
            Fault(
                where=str(docs / PAGE),
                expected="a page with markers for each table",
                found=f"none for {', '.join(missing)}" if text else "no such file",
                remedy="Give the docs folder of a checkout of trtllm-ct.",
            )
        )


def write_page(report: Report, docs: Path, command: str) -> None:
    """Put everything that was measured between the markers of its table, with the command, and draw its plot."""
    page = docs / PAGE
    text = page.read_text(encoding="utf-8")
    for table in Table:
        if any(True for _ in grids(report, table)):
            text = _replaced(text, table, _section(report, table, command))
            _draw(report, table, docs)
    page.write_text(text, encoding="utf-8")


def _block(table: Table) -> re.Pattern[str]:
    return re.compile(rf"(<!-- bench {table}: begin -->\n).*?(<!-- bench {table}: end -->)", re.DOTALL)


def _replaced(text: str, table: Table, section: str) -> str:
    """The page with another text between the markers of a table."""
    return _block(table).sub(lambda found: f"{found[1]}{section}{found[2]}", text)


def _section(report: Report, table: Table, command: str) -> str:
    """What stands between the markers."""
    machine = ", ".join(f"{name} {words}" for name, words in report.machine.items())
    parts = [
        f"<!-- not run: takes minutes -->\n```bash\n{command}\n```\n",
        f"Measured on: {machine}.\n",
        *(f"Left out: {name}, {why}.\n" for name, why in report.skipped.items()),
        *(markdown(grid) for grid in grids(report, table)),
    ]
    if any(series.table == table for series in report.series):
        parts.append(f"![time against size](performance/{table}.svg)\n")
    return "\n".join(parts)


def _draw(report: Report, table: Table, docs: Path) -> None:
    series = [each for each in report.series if each.table == table]
    if series:
        plots = docs / "performance"
        plots.mkdir(exist_ok=True)
        draw(series, plots / f"{table}.svg", counts_tensors=table is Table.HEADERS)
