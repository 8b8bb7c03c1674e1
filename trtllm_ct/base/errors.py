"""The exceptions that this package raises, and the faults that they carry.

    TrtllmCtError                    the base class; carries one or more faults
    ├── UsageError                   invalid arguments; nothing was read or written (exit code 2)
    │   └── MissingDependencyError   a required optional package is not installed
    ├── OutputError                  the file system of an output failed or is full (exit code 1)
    ├── LimitError                   this process may not have the memory that it needs (exit code 1)
    └── CheckpointError              a checkpoint is faulty or not supported (exit code 1)
        ├── HubError                 a repository of the Hub, or another place far away, can't be read
        ├── DetectionError           the directory holds no compressed-tensors checkpoint; says what it holds instead
        ├── ConfigError              config.json or its quantization block can't be interpreted
        ├── CatalogError             weight files or their headers are damaged, missing or forbidden
        ├── PlanError                config and stored tensors disagree, or the target does not support a scheme
        ├── PayloadError             tensor values are invalid: NaN scale, wrong shape entry, overflow
        ├── SidecarError             a directory prepared for the engine is damaged, out of date, or can't be created
        ├── LoadError                loaded tensors differ from the plan, or from what the engine reads
        └── VerificationError        a converted directory doesn't equal its source

A fault names the place, what was expected, what was found, and what to do about it.
Each stage collects all its faults and raises them in one exception.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from trtllm_ct.base.json_form import fields_form
from trtllm_ct.base.texts import printable, shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "CatalogError",
    "CheckpointError",
    "ConfigError",
    "DetectionError",
    "Fault",
    "FaultCollector",
    "HubError",
    "LimitError",
    "LoadError",
    "MissingDependencyError",
    "OutputError",
    "PayloadError",
    "PlanError",
    "SidecarError",
    "TrtllmCtError",
    "UnreadClassError",
    "UsageError",
    "VerificationError",
    "keeping_warnings",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One problem that a stage reports.

    `where` names the file, module or tensor. `expected` and `found` complete the message "expected ..., found ...".
    `remedy` is a full sentence that says what to do. Long texts are shortened, control characters escaped, and
    an empty one, such as the name of a tensor may be, is shown in quotes.
    """

    where: str
    expected: str
    found: str
    remedy: str

    def __post_init__(self) -> None:
        """Make the texts fit for a message: they quote names and values that strangers wrote."""
        for name in ("where", "expected", "found", "remedy"):
            text = printable(shortened(getattr(self, name)))
            object.__setattr__(self, name, text if text.strip() else repr(text))

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, found {self.found}. {self.remedy}"

    def to_dict(self) -> dict[str, str]:
        """Return the four fields by name, for JSON output."""
        return fields_form(self)


class TrtllmCtError(Exception):
    """Base class of all errors of this package.

    `faults` holds every fault that one stage found, `warnings` what this stage and those before it would have warned
    of: a warning often explains a fault.
    """

    def __init__(self, *faults: Fault) -> None:
        # Passing the faults as the exception's args lets errors be pickled between processes.
        super().__init__(*faults)
        self.faults = faults
        self.warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        if len(self.faults) == 1:
            return str(self.faults[0])
        return f"{len(self.faults)} faults:\n" + "\n".join(f"- {fault}" for fault in self.faults)


class UsageError(TrtllmCtError):
    """The arguments are invalid; nothing was read or written."""


class MissingDependencyError(UsageError):
    """The operation needs an optional package that is not installed."""


class OutputError(TrtllmCtError):
    """The file system of an output failed or is full; what was written so far is kept for the next run."""


class LimitError(TrtllmCtError):
    """This process may not have the memory or the addresses that it needs."""


class CheckpointError(TrtllmCtError):
    """A checkpoint is faulty, or holds something that this package can't load."""


class HubError(CheckpointError):
    """A repository of the Hub, or another place far away, can't be read: it is missing, closed, or out of reach."""


class DetectionError(CheckpointError):
    """The directory holds no compressed-tensors checkpoint."""


class ConfigError(CheckpointError):
    """The file config.json or its quantization block can't be interpreted."""


class CatalogError(CheckpointError):
    """Weight files or their headers are damaged, missing or forbidden."""


class PlanError(CheckpointError):
    """Configuration and stored tensors disagree, or the target does not support a scheme."""


class UnreadClassError(PlanError):
    """No table says how the engine's class of a model reads these modules; target `dense` needs none."""


class PayloadError(CheckpointError):
    """The values of a tensor are invalid in a way that the headers do not show."""


class SidecarError(CheckpointError):
    """A directory prepared for the engine is damaged or out of date, or can't be created."""


class LoadError(CheckpointError):
    """The loaded tensors differ from the plan, or from what the engine reads."""


class VerificationError(CheckpointError):
    """A converted directory doesn't equal its source."""


MOST_FAULTS = 2000
"""The most faults that one stage lists; a damaged checkpoint may have a million of one kind."""

Error = TypeVar("Error", bound=TrtllmCtError)


@dataclass(slots=True)
class FaultCollector:
    """Collects the faults of one stage, so that the user sees all of them at once, up to `MOST_FAULTS`."""

    faults: list[Fault] = field(default_factory=list)
    more: int = 0

    def add(self, *, where: str, expected: str, found: str, remedy: str) -> None:
        """Record one fault; only count it if there are very many."""
        if len(self.faults) >= MOST_FAULTS:
            self.more += 1
            return
        self.faults.append(Fault(where=where, expected=expected, found=found, remedy=remedy))

    def raise_if_any(self, error: type[Error], warnings: Iterable[str] = ()) -> None:
        """Raise `error` with all recorded faults and with `warnings`; do nothing when there are no faults."""
        if self.faults:
            faults = list(self.faults)
            if self.more:
                found = f"{self.more} more faults of this kind"
                remedy = "Correct those before it first."
                faults.append(Fault(where="and so on", expected="no fault", found=found, remedy=remedy))
            with keeping_warnings(warnings):
                raise error(*faults)


@contextmanager
def keeping_warnings(warnings: Iterable[str]) -> Iterator[None]:
    """Put `warnings` before those of any error that is raised inside, so that they are reported together."""
    try:
        yield
    except TrtllmCtError as error:
        error.warnings = (*warnings, *error.warnings)
        raise
