"""A conversion as its workers see it: what to do in a few words, and everything that these words stand for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.errors import CatalogError, Fault
from trtllm_ct.base.version import __version__
from trtllm_ct.checkpoint.write_plan import WritePlan
from trtllm_ct.checkpoint.writer import file_locks
from trtllm_ct.convert.units import plan_units
from trtllm_ct.pipeline.open import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.convert.units import Unit
    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["Conversion", "Job"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to convert and where to: all that another process has to be told.

    `options` are the keywords of `Checkpoint.plan`; `files` is the directory that the weight files are written to.
    """

    directory: Path
    options: Mapping[str, Any]
    max_shard_bytes: int
    device: str
    files: Path


class Conversion:
    """A job with its plan, its write plan and its units of work.

    Pickled, it is the job alone: another process opens the checkpoint for itself, once, and refuses to take part when
    it does not come to the same plan.
    """

    def __init__(self, job: Job, checkpoint: Checkpoint, plan: Plan) -> None:
        self.job = job
        self.checkpoint = checkpoint
        self.plan = plan
        with collector_paused():
            self.write_plan = WritePlan.of(plan.delivered_specs, job.max_shard_bytes)
            self.units = plan_units(plan, self.write_plan, device=job.device)
        self.locks = file_locks(self.write_plan)

    @classmethod
    def open(cls, job: Job) -> Self:
        """Read headers and plan. Raises the `CheckpointError` of the stage that found faults."""
        checkpoint = open_checkpoint(job.directory)
        return cls(job, checkpoint, checkpoint.plan(**job.options))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.job, self.digest)

    def modules(self, unit: Unit) -> list[ModulePlan]:
        """The plans of a unit's modules."""
        return [self.plan.modules[position] for position in unit.modules]

    @cached_property
    def digest(self) -> str:
        """Tells conversions apart that could write another byte anywhere: by version, source, operations and places.

        Of the source's files name, size and time of the last change count; their payload is not read.
        """
        found = hashlib.sha256(__version__.encode())
        for file in self.checkpoint.catalog.files:
            status = (self.checkpoint.directory / file).stat()
            found.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
        for module in self.plan.modules:
            found.update(_described(module).encode())
        found.update(self.write_plan.digest())
        return found.hexdigest()


_opened: dict[str, Conversion] = {}


def _reopened(job: Job, digest: str) -> Conversion:
    """The conversion in a process that was sent it; the latest is kept."""
    if digest not in _opened:
        conversion = Conversion.open(job)
        if conversion.digest != digest:
            raise CatalogError(
                Fault(
                    where=str(job.directory),
                    expected="the same files and the same release of trtllm-ct on every machine",
                    found="a worker that comes to another plan than the process that sent it",
                    remedy="Let all machines use one file system and one installation, and start again.",
                )
            )
        _opened.clear()
        _opened[digest] = conversion
    return _opened[digest]


def _described(module: ModulePlan) -> str:
    """What decides the bytes that a module delivers, as text."""
    lines = [f"{module.name} {module.stored_scheme}"]
    if module.weight is not None:
        weight = module.weight
        lines.append(f"{weight.args} {weight.shape} {weight.packing} {weight.zero_point_packing} {weight.consumed}")
    lines += [f"{delivery.name} {delivery.operation} {delivery.sources}" for delivery in module.deliveries]
    return "\n".join(lines)
