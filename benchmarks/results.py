"""What a benchmark comes to, as values: samples of one side, measurements of a case, figures, series for plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Clock", "Finding", "Measurement", "Point", "Report", "Sample", "Series", "Side"]


class Clock(StrEnum):
    """Which time counts."""

    PROCESS = "process"
    """from the start of a process to its end, imports included"""
    CALL = "call"
    """of the call alone, in a process of its own, after imports"""
    LOOP = "loop"
    """of one loop over memory that is in use already, in one process for both sides"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run. Seconds are missing where a clock does not apply; `facts` are what the task itself found out."""

    process_seconds: float | None = None
    call_seconds: float | None = None
    peak_anonymous: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """All runs of one side of a case: `ours`, or a peer by name. `failure` says why there are none, or fewer."""

    name: str
    clock: Clock
    samples: tuple[Sample, ...]
    failure: str = ""

    @property
    def seconds(self) -> float | None:
        """Median by the clock of the case."""
        return self.process_seconds if self.clock is Clock.PROCESS else self.call_seconds

    @property
    def process_seconds(self) -> float | None:
        """Median from start to end of the process."""
        return _median(sample.process_seconds for sample in self.samples)

    @property
    def call_seconds(self) -> float | None:
        """Median of the call alone."""
        return _median(sample.call_seconds for sample in self.samples)

    @property
    def peak_anonymous(self) -> int | None:
        """The highest peak of all runs."""
        return max(
            (sample.peak_anonymous for sample in self.samples if sample.peak_anonymous is not None), default=None
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        """Those of the last run."""
        return self.samples[-1].facts if self.samples else {}

    def to_dict(self) -> dict[str, Any]:
        """JSON form: medians, and the runs by themselves."""
        return {
            "name": self.name,
            "clock": str(self.clock),
            "seconds": self.seconds,
            "process_seconds": [sample.process_seconds for sample in self.samples],
            "call_seconds": [sample.call_seconds for sample in self.samples],
            "peak_anonymous_bytes": self.peak_anonymous,
            "facts": dict(self.facts),
            "failure": self.failure,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A case on one checkpoint: both sides, and the bytes that come out, by which throughput is counted.

    `size` is what the case grows with, bytes or a number of tensors; `skipped` are peers by name, with the reason.
    """

    case: str
    shape: str
    size: int
    moved_bytes: int | None
    ours: Side
    peers: tuple[Side, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    def peer(self, name: str) -> Side | None:
        """A peer that was measured."""
        return next((side for side in self.peers if side.name == name and side.samples), None)

    def ratio(self, peer: str) -> float | None:
        """Our median over that of a peer."""
        other = self.peer(peer)
        if other is None or not other.seconds or self.ours.seconds is None:
            return None
        return self.ours.seconds / other.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "case": self.case,
            "shape": self.shape,
            "size": self.size,
            "moved_bytes": self.moved_bytes,
            "ours": self.ours.to_dict(),
            "peers": [side.to_dict() for side in self.peers],
            "ratios": {side.name: self.ratio(side.name) for side in self.peers},
            "skipped": dict(self.skipped),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A figure to reach and what was found; `value` is None where nothing was measured, and `note` says why."""

    what: str
    table: str
    unit: str
    limit: float
    value: float | None
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the value is within its limit; None where there is no value."""
        return None if self.value is None else self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "what": self.what,
            "table": self.table,
            "unit": self.unit,
            "limit": self.limit,
            "value": self.value,
            "reached": self.reached,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Seconds at one size."""

    size: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a plot."""

    table: str
    label: str
    points: tuple[Point, ...]

    @property
    def line(self) -> tuple[float, float]:
        """Seconds at size 0, and seconds for each unit of size: the straight line of least squares."""
        sizes, seconds = [point.size for point in self.points], [point.seconds for point in self.points]
        middle, height = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
        spread = sum((size - middle) ** 2 for size in sizes)
        slope = sum((point.size - middle) * (point.seconds - height) for point in self.points) / (spread or 1)
        return height - slope * middle, slope

    @property
    def deviation(self) -> float:
        """How far a point lies from the line at most, as a share of its seconds."""
        start, slope = self.line
        return max(abs(point.seconds - start - slope * point.size) / point.seconds for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "table": self.table,
            "label": self.label,
            "points": [[point.size, point.seconds] for point in self.points],
            "largest_deviation_from_line": self.deviation,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of it. `skipped` are peers that were asked for and are not there, with the reason."""

    machine: Mapping[str, str]
    runs: int
    skipped: Mapping[str, str]
    measurements: tuple[Measurement, ...]
    findings: tuple[Finding, ...]
    series: tuple[Series, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "machine": dict(self.machine),
            "runs": self.runs,
            "skipped": dict(self.skipped),
            "figures": [finding.to_dict() for finding in self.findings],
            "measurements": [measurement.to_dict() for measurement in self.measurements],
            "series": [series.to_dict() for series in self.series],
        }


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
