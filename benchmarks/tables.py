"""Format a report as tables, for the terminal and as Markdown for docs/performance.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.cases import CASES, NO_SHAPE, Table, table_of
from benchmarks.kernels import KERNELS
from benchmarks.results import Clock
from trtllm_ct.base.texts import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import RenderableType

    from benchmarks.results import Finding, Measurement, Report, Side

__all__ = ["TITLES", "Grid", "grids", "markdown", "summary"]

TITLES = {
    Table.KERNELS: "Loops over memory",
    Table.LOAD: "Loading",
    Table.CONVERT: "Converting",
    Table.HEADERS: "Commands that read headers only",
}

_CASE_TITLES = {case.name: case.title for case in (*CASES, *KERNELS)}
_CLOCKS = {Clock.PROCESS: "process", Clock.CALL: "call", Clock.LOOP: "loop"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The cells of a table; the first `words` columns are aligned left, and the others, numbers, right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


def grids(report: Report, table: Table) -> Iterator[Grid]:
    """Yield the grids of one table: target figures, the sides of each case, bytes read by ranks, plotted lines."""
    findings = [finding for finding in report.findings if finding.table == table]
    if findings:
        yield _figures(findings)
    measurements = [measurement for measurement in report.measurements if table_of(measurement.case) == table]
    timed = [measurement for measurement in measurements if not {"cuts", "ranks"} & measurement.ours.facts.keys()]
    if timed:
        yield _sides(timed)
    yield from (_cuts(measurement) for measurement in measurements if "cuts" in measurement.ours.facts)
    yield from (_ranks(measurement) for measurement in measurements if "ranks" in measurement.ours.facts)
    if lines := [series for series in report.series if series.table == table]:
        yield Grid(
            columns=("plotted", "sizes", "farthest point from a straight line"),
            rows=tuple((line.label, str(len(line.points)), f"{line.deviation:.0%}") for line in lines),
        )


def summary(report: Report) -> RenderableType:
    """Format a whole report for a terminal."""
    parts: list[RenderableType] = [Text(f"{name}: {value}") for name, value in report.machine.items()]
    parts += [Text(f"left out: {name}, {reason}", style="yellow") for name, reason in report.skipped.items()]
    for table in Table:
        table_grids = list(grids(report, table))
        if table_grids:
            parts += [Text(f"\n{TITLES[table]}", style="bold"), *(_rich_table(grid) for grid in table_grids)]
    return Group(*parts)


def markdown(grid: Grid) -> str:
    """Format a grid as a Markdown table that ends with a line break."""
    rule = ["---" if number < grid.words else "---:" for number in range(len(grid.columns))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (grid.columns, rule, *grid.rows))


def _rich_table(grid: Grid) -> RichTable:
    table = RichTable(box=box.SIMPLE)
    for number, column in enumerate(grid.columns):
        table.add_column(column, justify="left" if number < grid.words else "right")
    for cells in grid.rows:
        table.add_row(*(Text(cell.strip("*").replace("`", "")) for cell in cells))
    return table


def _figures(findings: Sequence[Finding]) -> Grid:
    """Return the grid of the target figures."""
    rows = tuple(
        (finding.what, f"{_three_digits(finding.limit)} {finding.unit}", _measured_value(finding), _verdict(finding))
        for finding in findings
    )
    return Grid(columns=("figure", "at most", "measured", "reached"), rows=rows)


def _verdict(finding: Finding) -> str:
    return {True: "yes", False: "**no**", None: "unknown"}[finding.reached]


def _measured_value(finding: Finding) -> str:
    return finding.note or "" if finding.value is None else f"{_three_digits(finding.value)} {finding.unit}"


def _sides(measurements: Iterable[Measurement]) -> Grid:
    """Return the grid with a row for each side of each case."""
    rows = tuple(row for measurement in measurements for row in _rows(measurement))
    columns = (
        *("what", "checkpoint", "side", "clock", "runs", "median", "ours is", "out", "call alone", "user", "system"),
        "peak memory",
    )
    return _without_empty_columns(Grid(columns=columns, rows=rows, words=4))


def _without_empty_columns(grid: Grid) -> Grid:
    """Return a grid without the columns that are empty in all rows."""
    kept = [number for number in range(len(grid.columns)) if any(row[number] for row in grid.rows)]
    return Grid(
        columns=tuple(grid.columns[number] for number in kept),
        rows=tuple(tuple(row[number] for number in kept) for row in grid.rows),
        words=sum(number < grid.words for number in kept),
    )


def _rows(measurement: Measurement) -> Iterator[tuple[str, ...]]:
    title = _CASE_TITLES[measurement.case]
    for side in (measurement.ours, *measurement.peers):
        ratio = None if side is measurement.ours else measurement.ratio(side.name)
        yield (
            title,
            _checkpoint(measurement),
            side.name,
            _CLOCKS[side.clock],
            str(len(side.samples)),
            side.failure and "failed" if side.seconds is None else _duration(side.seconds),
            "" if ratio is None else f"{ratio:.2f} x",
            _throughput(measurement, side),
            _duration(side.call_seconds) if side.clock is Clock.PROCESS and side.call_seconds is not None else "",
            *(_processor_time(side.clock, seconds) for seconds in (side.user_seconds, side.system_seconds)),
            "" if side.peak_anonymous is None else format_bytes(side.peak_anonymous),
        )
    for name, reason in measurement.skipped.items():
        yield (title, _checkpoint(measurement), name, reason, "0", *[""] * 7)


def _checkpoint(measurement: Measurement) -> str:
    if measurement.shape == NO_SHAPE:
        return ""
    size = measurement.size
    headers_only = table_of(measurement.case) is Table.HEADERS
    return f"{measurement.shape}, {f'{size:,} tensors'.replace(',', ' ') if headers_only else format_bytes(size)}"


def _cuts(measurement: Measurement) -> Grid:
    """Return the grid of the bytes that one rank reads, by how modules are sliced."""
    rows = tuple(
        (
            cut.replace("_", " "),
            format_bytes(nbytes["stored"]),
            format_bytes(nbytes["read"]),
            f"{nbytes['read'] / nbytes['stored']:.1%}" if nbytes["stored"] else "",
        )
        for cut, nbytes in measurement.ours.facts["cuts"].items()
    )
    return Grid(columns=(f"{_CASE_TITLES[measurement.case]}: modules cut by", "stored", "read", "share"), rows=rows)


def _ranks(measurement: Measurement) -> Grid:
    """Return the grid of the bytes that each rank of a node asks for, and that are fetched from the disk for it."""
    facts = measurement.ours.facts
    rows = [
        (f"rank {number}", format_bytes(rank["asked"]), format_bytes(rank["fetched"]))
        for number, rank in enumerate(facts["ranks"])
    ]
    asked, fetched = (sum(rank[key] for rank in facts["ranks"]) for key in ("asked", "fetched"))
    rows.append((f"together, of {format_bytes(facts['stored'])}", format_bytes(asked), format_bytes(fetched)))
    columns = (_CASE_TITLES[measurement.case], "asked for", "fetched from the disk")
    return Grid(columns=columns, rows=tuple(rows))


def _throughput(measurement: Measurement, side: Side) -> str:
    if not measurement.moved_bytes or not side.seconds:
        return ""
    return f"{measurement.moved_bytes / side.seconds / 1e9:.2f} GB/s"


def _processor_time(clock: Clock, seconds: float | None) -> str:
    """Format the time of all cores; empty where the clock times only a part of the process."""
    return _duration(seconds) if clock is Clock.PROCESS and seconds is not None else ""


def _duration(seconds: float) -> str:
    """Format seconds as `1.23 s` or `4.56 ms`."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{0 if seconds >= 0.1 else 2}f} ms"


def _three_digits(value: float) -> str:
    """Format a number with at most three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
