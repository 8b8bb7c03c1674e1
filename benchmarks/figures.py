"""The target figures of the benchmark, and their measured values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import auto
from typing import TYPE_CHECKING

from benchmarks.cases import NO_SHAPE, RANKS, table_of
from benchmarks.results import Finding
from trtllm_ct.base.str_enum import StrEnum

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from benchmarks.cases import Table
    from benchmarks.results import Measurement, Sample

__all__ = ["FIGURES", "Figure", "Metric", "find"]


class Metric(StrEnum):
    """Which number of a measurement a figure uses."""

    RATIO = auto()
    """the median time of this package divided by the median time of the peer"""
    SECONDS = auto()
    """the median time of this package"""
    PEAK = auto()
    """the highest anonymous memory of this package's process"""
    BEYOND_RESULT = auto()
    """anonymous memory in addition to the memory before and the result, over the largest group of fused Linears"""
    COLUMN_SHARE = auto()
    """the share of the stored bytes of column-parallel Linears that a rank reads"""
    NODE_SHARE = auto()
    """the bytes that all ranks of a node fetch from its disk, as a share of the bytes of the files"""


_UNITS = {
    Metric.RATIO: "x",
    Metric.SECONDS: "s",
    Metric.PEAK: "MB",
    Metric.BEYOND_RESULT: "x",
    Metric.COLUMN_SHARE: "%",
    Metric.NODE_SHARE: "%",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One target figure: the limit for a metric of a case on a shape; `what` describes it in the tables."""

    what: str
    case: str
    shape: str
    metric: Metric
    limit: float
    peer: str = ""


_KERNEL_LIMITS = {
    "int4-repack": ("int4 repack, 4096 x 14336, group 128, one thread", 1.2),
    "int8-rebias": ("int8 re-bias", 1.5),
    "zero-points": ("zero points", 1.5),
    "fp8-rows": ("FP8 rows", 1.5),
    "nvfp4": ("NVFP4 passthrough", 1.5),
    "dequantize": ("int4 to bfloat16", 3.0),
}

_PEAK = 700.0

FIGURES = (
    *(
        Figure(what=what, case=name, shape=NO_SHAPE, metric=Metric.RATIO, peer="memcpy", limit=limit)
        for name, (what, limit) in _KERNEL_LIMITS.items()
    ),
    Figure(
        what="`load_weights` of 0.76 GB, native, against `load_file` and `clone`",
        case="load-native",
        shape="1b",
        metric=Metric.RATIO,
        peer="load_file",
        limit=1.6,
    ),
    Figure(
        what="memory of `load_weights` beyond its result, against one group of fused Linears",
        case="load-native",
        shape="1b",
        metric=Metric.BEYOND_RESULT,
        limit=1.0,
    ),
    Figure(
        what=f"bytes that a rank of tp {RANKS} reads of column-cut Linears",
        case="rank",
        shape="1b",
        metric=Metric.COLUMN_SHARE,
        limit=26.0,
    ),
    Figure(
        what=f"bytes that {RANKS} ranks of one node fetch from its disk together, of the files",
        case="node",
        shape="1b",
        metric=Metric.NODE_SHARE,
        limit=101.0,
    ),
    Figure(
        what="`convert --to modelopt` of 5.7 GB against `cp -r`",
        case="convert-modelopt",
        shape="8b",
        metric=Metric.RATIO,
        peer="cp",
        limit=1.15,
    ),
    *(
        Figure(
            what=f"the same of {codes} codes, {size}",
            case="convert-modelopt",
            shape=f"8b-{scheme}",
            metric=Metric.RATIO,
            peer="cp",
            limit=1.05,
        )
        for scheme, codes, size in (("fp8", "FP8", "9.1 GB"), ("nvfp4", "NVFP4", "6.0 GB"))
    ),
    Figure(
        what="`convert --to dense` of the same against `cp` of the output bytes",
        case="convert-dense",
        shape="8b",
        metric=Metric.RATIO,
        peer="cp",
        limit=1.15,
    ),
    Figure(
        what="`convert --to dense` of the same against the library's converter",
        case="convert-dense",
        shape="8b",
        metric=Metric.RATIO,
        peer="library",
        limit=0.2,
    ),
    *(
        Figure(
            what=f"peak anonymous memory of `convert --to {to}`, {shape}",
            case=f"convert-{to}",
            shape=shape,
            metric=Metric.PEAK,
            limit=_PEAK,
        )
        for to in ("modelopt", "dense")
        for shape in ("1b", "8b")
    ),
    Figure(
        what="`verify` of 0.76 GB and its converted directory against `convert --to modelopt`",
        case="verify",
        shape="1b",
        metric=Metric.RATIO,
        peer="convert",
        limit=3.0,
    ),
    Figure(
        what="peak anonymous memory of `verify`, 1b",
        case="verify",
        shape="1b",
        metric=Metric.PEAK,
        limit=300.0,
    ),
    Figure(
        what="`inspect` of the Kimi-K2 shape, process start included, torch not imported",
        case="inspect",
        shape="kimi-k2",
        metric=Metric.SECONDS,
        limit=4.0,
    ),
    Figure(
        what="`inspect` of 8b, process start included",
        case="inspect",
        shape="8b",
        metric=Metric.SECONDS,
        limit=1.0,
    ),
    Figure(
        what="`import trtllm_ct`, process start included",
        case="import",
        shape=NO_SHAPE,
        metric=Metric.SECONDS,
        limit=0.15,
    ),
)
"""What is to be reached, on two cores with the files in the page cache."""


def find(measurements: Sequence[Measurement], tables: Collection[Table], shapes: Sequence[str]) -> tuple[Finding, ...]:
    """Return a finding for each figure of the given tables and shapes, also for figures that were not measured."""
    by_case = {(measurement.case, measurement.shape): measurement for measurement in measurements}
    return tuple(
        _finding(figure, by_case.get((figure.case, figure.shape)))
        for figure in FIGURES
        if table_of(figure.case) in tables and figure.shape in {NO_SHAPE, *shapes}
    )


def _finding(figure: Figure, measured: Measurement | None) -> Finding:
    value = None if measured is None or measured.ours.facts.get("torch_imported") else _value(figure, measured)
    note = "" if measured is None else _note(figure, measured)
    return Finding(
        what=figure.what,
        table=str(table_of(figure.case)),
        unit=_UNITS[figure.metric],
        limit=figure.limit,
        value=value,
        note="" if value is not None else note or "not measured",
    )


def _value(figure: Figure, measured: Measurement) -> float | None:
    """Return the value of a figure in its unit, or None if it was not measured."""
    ours = measured.ours
    match figure.metric:
        case Metric.RATIO:
            return measured.ratio(figure.peer)
        case Metric.SECONDS:
            return ours.seconds
        case Metric.PEAK:
            return None if ours.peak_anonymous is None else ours.peak_anonymous / 1e6
        case Metric.BEYOND_RESULT:
            return max((_beyond_result(sample) for sample in ours.samples), default=None)
        case Metric.COLUMN_SHARE:
            cuts = ours.facts.get("cuts", {}).get("column")
            return 100 * cuts["read"] / cuts["stored"] if cuts else None
        case Metric.NODE_SHARE:
            ranks = ours.facts.get("ranks")
            return 100 * sum(rank["fetched"] for rank in ranks) / ours.facts["stored"] if ranks else None


def _beyond_result(sample: Sample) -> float:
    """Return the temporary anonymous memory of loading, divided by the bytes of the largest group of fused Linears."""
    facts = sample.facts
    result = facts["weight_bytes"] - facts["mapped_bytes"]
    beyond: float = ((sample.peak_anonymous or 0) - facts["before_bytes"] - result) / facts["group_bytes"]
    return beyond


def _note(figure: Figure, measured: Measurement) -> str:
    """Return the reason why a figure has no value, or an empty text."""
    if measured.ours.failure:
        return measured.ours.failure
    if figure.peer in measured.skipped:
        return f"{figure.peer}: {measured.skipped[figure.peer]}"
    if measured.ours.facts.get("torch_imported"):
        return "torch was imported"
    failures = {side.name: side.failure for side in measured.peers}
    return f"{figure.peer}: {failures.get(figure.peer, 'not asked for')}" if figure.peer else ""
