"""The results of a benchmark: samples of one side, measurements of a case, findings for figures, series for plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.json_form import json_object
from trtllm_ct.base.str_enum import StrEnum

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Clock", "Finding", "Measurement", "Point", "Report", "Sample", "Series", "Side"]


class Clock(StrEnum):
    """Which time of a run is reported."""

    PROCESS = "process"
    """from the start of a process to its end, including imports"""
    CALL = "call"
    """only the call, in a separate process, after imports"""
    LOOP = "loop"
    """one loop over memory that was touched before, in one process for both sides"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run of one side.

    The seconds of a clock that does not apply are None. `user_seconds` and `system_seconds` are the times that all
    cores spent for the process outside of the kernel and in it. `facts` are the results that the task itself reported.
    """

    process_seconds: float | None = None
    call_seconds: float | None = None
    user_seconds: float | None = None
    system_seconds: float | None = None
    peak_anonymous: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """All runs of one side of a case.

    `name` is `ours` for this package, or the name of a peer. `failure` is the reason why runs are missing, if any.
    """

    name: str
    clock: Clock
    samples: tuple[Sample, ...]
    failure: str = ""

    @property
    def seconds(self) -> float | None:
        """The median of the runs, by the clock of the case."""
        return self.process_seconds if self.clock is Clock.PROCESS else self.call_seconds

    @property
    def process_seconds(self) -> float | None:
        """The median time from start to end of the process."""
        return _median(sample.process_seconds for sample in self.samples)

    @property
    def call_seconds(self) -> float | None:
        """The median time of the call alone."""
        return _median(sample.call_seconds for sample in self.samples)

    @property
    def user_seconds(self) -> float | None:
        """The median time of all cores in the process, outside of the kernel."""
        return _median(sample.user_seconds for sample in self.samples)

    @property
    def system_seconds(self) -> float | None:
        """The median time of all cores in the kernel, for the process."""
        return _median(sample.system_seconds for sample in self.samples)

    @property
    def peak_anonymous(self) -> int | None:
        """The highest peak of anonymous memory in all runs, in bytes."""
        return max(
            (sample.peak_anonymous for sample in self.samples if sample.peak_anonymous is not None), default=None
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts of the last run."""
        return self.samples[-1].facts if self.samples else {}

    def to_dict(self) -> dict[str, Any]:
        """Return the side as a JSON object, with the median and the single runs."""
        return json_object(
            {
                "name": self.name,
                "clock": self.clock,
                "seconds": self.seconds,
                "process_seconds": [sample.process_seconds for sample in self.samples],
                "call_seconds": [sample.call_seconds for sample in self.samples],
                "user_seconds": [sample.user_seconds for sample in self.samples],
                "system_seconds": [sample.system_seconds for sample in self.samples],
                "peak_anonymous_bytes": self.peak_anonymous,
                "facts": self.facts,
                "failure": self.failure,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A case measured on one checkpoint: this package and its peers.

    `size` is the size of the checkpoint that the plots use, in bytes or as a number of tensors. `moved_bytes` are the
    output bytes that throughput is computed from, or None. `skipped` maps peers that were not run to the reason.
    """

    case: str
    shape: str
    size: int
    moved_bytes: int | None
    ours: Side
    peers: tuple[Side, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    def peer(self, name: str) -> Side | None:
        """Return a peer by name, or None if it was not measured."""
        return next((side for side in self.peers if side.name == name and side.samples), None)

    def ratio(self, peer: str) -> float | None:
        """Return the median of this package divided by the median of a peer; None if one of them was not measured."""
        peer_side = self.peer(peer)
        if peer_side is None or not peer_side.seconds or self.ours.seconds is None:
            return None
        return self.ours.seconds / peer_side.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object(
            {
                "case": self.case,
                "shape": self.shape,
                "size": self.size,
                "moved_bytes": self.moved_bytes,
                "ours": self.ours,
                "peers": self.peers,
                "ratios": {side.name: self.ratio(side.name) for side in self.peers},
                "skipped": self.skipped,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result for one target figure; `value` is None if it was not measured, and `note` is then the reason."""

    what: str
    table: str
    unit: str
    limit: float
    value: float | None
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the value is within its limit; None if there is no value."""
        return None if self.value is None else self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object(
            {
                "what": self.what,
                "table": self.table,
                "unit": self.unit,
                "limit": self.limit,
                "value": self.value,
                "reached": self.reached,
                "note": self.note,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a plot: the median seconds at one size."""

    size: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The points of one line in the plot of a table."""

    table: str
    label: str
    points: tuple[Point, ...]

    @property
    def line(self) -> tuple[float, float]:
        """The least-squares line: seconds at size 0, and seconds per unit of size."""
        sizes, seconds = [point.size for point in self.points], [point.seconds for point in self.points]
        mean_size, mean_seconds = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
        spread = sum((size - mean_size) ** 2 for size in sizes)
        covariance = sum((point.size - mean_size) * (point.seconds - mean_seconds) for point in self.points)
        slope = covariance / (spread or 1)
        return mean_seconds - slope * mean_size, slope

    @property
    def deviation(self) -> float:
        """The largest deviation of a point from the line, as a share of the point's seconds."""
        start, slope = self.line
        return max(abs(point.seconds - start - slope * point.size) / point.seconds for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object(
            {
                "table": self.table,
                "label": self.label,
                "points": [[point.size, point.seconds] for point in self.points],
                "largest_deviation_from_line": self.deviation,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of a whole benchmark; `skipped` maps requested peers that are not installed to the reason."""

    machine: Mapping[str, str]
    runs: int
    skipped: Mapping[str, str]
    measurements: tuple[Measurement, ...]
    findings: tuple[Finding, ...]
    series: tuple[Series, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object(
            {
                "machine": self.machine,
                "runs": self.runs,
                "skipped": self.skipped,
                "figures": self.findings,
                "measurements": self.measurements,
                "series": self.series,
            }
        )


def _median(values: Any) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None
