"""Everything this package raises on purpose.

    TrtllmCtError                    the root; carries one or more faults
    ├── UsageError                   arguments that can't work; nothing was read (exit code 2)
    │   └── MissingDependencyError   an optional package is needed and not installed
    └── CheckpointError              something is wrong with, or unsupported in, a checkpoint (exit code 1)
        ├── DetectionError           no compressed-tensors checkpoint here; says what was found
        ├── ConfigError              config.json or its quantization block can't be read as meant
        ├── CatalogError             weight files or their headers are damaged, missing or forbidden
        ├── PlanError                config and stored tensors disagree, or a scheme has no way to the target
        ├── PayloadError             values of a tensor break a promise: NaN scale, wrong shape entry, overflow
        ├── SidecarError             a directory prepared for the engine is damaged, out of date, or can't be made
        ├── LoadError                what was loaded is not what the plan promises, or not what the engine reads
        └── VerificationError        a converted directory doesn't equal its source

A fault says where, what was expected, what was found and what to do about it.
One stage collects all its faults and raises them together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

__all__ = [
    "CatalogError",
    "CheckpointError",
    "ConfigError",
    "DetectionError",
    "Fault",
    "FaultCollector",
    "LoadError",
    "MissingDependencyError",
    "PayloadError",
    "PlanError",
    "SidecarError",
    "TrtllmCtError",
    "UsageError",
    "VerificationError",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong.

    `where` names file, module or tensor; `expected` and `found` complete "expected ..., found ...";
    `remedy` is a full sentence that says what to do.
    """

    where: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, found {self.found}. {self.remedy}"

    def to_dict(self) -> dict[str, str]:
        """JSON form: the four fields by name."""
        return {
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
        }


class TrtllmCtError(Exception):
    """Root of all errors of this package; `faults` holds every fault that one stage found."""

    def __init__(self, *faults: Fault) -> None:
        # The faults are the exception's args, so that errors survive pickling between processes.
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        if len(self.faults) == 1:
            return str(self.faults[0])
        return f"{len(self.faults)} faults:\n" + "\n".join(f"- {fault}" for fault in self.faults)


class UsageError(TrtllmCtError):
    """Arguments that can't work; nothing was read or written."""


class MissingDependencyError(UsageError):
    """An optional package is needed for this and is not installed."""


class CheckpointError(TrtllmCtError):
    """Something is wrong with a checkpoint, or it holds what this package can't load."""


class DetectionError(CheckpointError):
    """The directory holds no compressed-tensors checkpoint."""


class ConfigError(CheckpointError):
    """The configuration can't be read as meant."""


class CatalogError(CheckpointError):
    """Weight files or their headers are damaged, missing or forbidden."""


class PlanError(CheckpointError):
    """Configuration and stored tensors disagree, or a scheme has no way to the target."""


class PayloadError(CheckpointError):
    """The values of a tensor break a promise that headers can't show."""


class SidecarError(CheckpointError):
    """A directory that was prepared for the engine is damaged or out of date, or it can't be made."""


class LoadError(CheckpointError):
    """What was loaded is not what the plan promises, or not what the engine reads."""


class VerificationError(CheckpointError):
    """A converted directory doesn't equal its source."""


Error = TypeVar("Error", bound=TrtllmCtError)


@dataclass(slots=True)
class FaultCollector:
    """Gathers the faults of one stage, so that a user sees all of them at once."""

    faults: list[Fault] = field(default_factory=list)

    def add(self, *, where: str, expected: str, found: str, remedy: str) -> None:
        """Record one fault."""
        self.faults.append(Fault(where=where, expected=expected, found=found, remedy=remedy))

    def raise_if_any(self, error: type[Error]) -> None:
        """Raise `error` with everything gathered; return quietly when there is nothing."""
        if self.faults:
            raise error(*self.faults)
