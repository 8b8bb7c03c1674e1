"""Write tables and plots into docs/performance.md; text outside the markers is left unchanged."""

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
    """Raise `UsageError` if the page or a marker is missing, and `MissingDependencyError` if matplotlib is missing.

    Call this before measuring, which takes minutes.
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
    """Write each measured table between its markers, with the command that measured it, and draw its plot."""
    page = docs / PAGE
    text = page.read_text(encoding="utf-8")
    for table in Table:
        if any(True for _ in grids(report, table)):
            text = _replace_section(text, table, _section(report, table, command))
            _draw(report, table, docs)
    page.write_text(text, encoding="utf-8")


def _block(table: Table) -> re.Pattern[str]:
    return re.compile(rf"(<!-- bench {table}: begin -->\n).*?(<!-- bench {table}: end -->)", re.DOTALL)


def _replace_section(text: str, table: Table, section: str) -> str:
    """Return the page `text` with `section` between the markers of a table."""
    return _block(table).sub(lambda match: f"{match[1]}{section}{match[2]}", text)


def _section(report: Report, table: Table, command: str) -> str:
    """Return the text for between the markers of a table."""
    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    parts = [
        f"<!-- not run: takes minutes -->\n```bash\n{command}\n```\n",
        f"Measured on: {machine}.\n",
        *(f"Left out: {name}, {reason}.\n" for name, reason in report.skipped.items()),
        *(markdown(grid) for grid in grids(report, table)),
    ]
    if any(series.table == table for series in report.series):
        parts.append(f"![time against size](performance/{table}.svg)\n")
    return "\n".join(parts)


def _draw(report: Report, table: Table, docs: Path) -> None:
    table_series = [series for series in report.series if series.table == table]
    if table_series:
        plots = docs / "performance"
        plots.mkdir(exist_ok=True)
        draw(table_series, plots / f"{table}.svg", counts_tensors=table is Table.HEADERS)
