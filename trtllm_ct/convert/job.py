"""The description of a conversion for its workers.

A `Job` holds the arguments of a conversion and is small enough to send to another process. A `Conversion` holds
everything that is derived from a job: the opened checkpoint, the plan, the write plan and the units of work.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.errors import CatalogError, Fault
from trtllm_ct.base.version import __version__
from trtllm_ct.checkpoint.write_plan import WritePlan
from trtllm_ct.checkpoint.writer import file_locks
from trtllm_ct.convert.source_files import source_files
from trtllm_ct.convert.units import plan_units
from trtllm_ct.pipeline.open import open_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

    from trtllm_ct.checkpoint.folder import Folder
    from trtllm_ct.convert.source_files import SourceFile
    from trtllm_ct.convert.units import Unit
    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.options import PlanOptions
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["Conversion", "Job"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The arguments of a conversion; everything that another process needs to take part in it.

    `directory` is the source, `options` are those of its plan, and `files` is the folder that
    the weight files are written to.
    """

    directory: Path
    options: PlanOptions
    max_shard_bytes: int
    files: Folder


class Conversion:
    """A job with its checkpoint, its plan, its write plan and its units of work.

    Pickling keeps only the job, the digest and `token`, which no other conversion has. A process that unpickles it
    opens the checkpoint itself, once, and raises `CatalogError` when the conversion that it gets has another digest.
    """

    def __init__(self, job: Job, checkpoint: Checkpoint, plan: Plan) -> None:
        self.token = secrets.token_hex(16)
        self.job = job
        self.checkpoint = checkpoint
        self.plan = plan
        self.source_files = source_files(checkpoint.catalog)
        with collector_paused():
            self.write_plan = WritePlan.of(
                plan.delivered_specs,
                job.max_shard_bytes,
                plan.places or plan.stacks,
                ranks=plan.build_config is not None,
            )
            self.units = plan_units(plan, self.write_plan)
        self.locks = file_locks(self.write_plan)

    @classmethod
    def open(cls, job: Job) -> Self:
        """Open the checkpoint of a job, reading headers only, and plan its conversion.

        Raises the `CheckpointError` of the stage that finds faults.
        """
        checkpoint = open_checkpoint(job.directory)
        return cls(job, checkpoint, checkpoint.plan_for(job.options))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.job, self.digest, self.token)

    def modules(self, unit: Unit) -> list[ModulePlan]:
        """Return the plans of the modules in a unit."""
        return [self.plan.modules[position] for position in unit.modules]

    @cached_property
    def digest(self) -> str:
        """A hash of what decides the output bytes: version, headers of source files, operations, places of tensors.

        It is the same on all machines that share the files. Their payload is not read.
        """
        digest = hashlib.sha256(__version__.encode())
        for file in self.source_files.values():
            digest.update(f"{file.content}\n".encode(errors="surrogateescape"))
        for module in self.plan.modules:
            digest.update(_module_description(module).encode())
        digest.update(self.write_plan.digest())
        return digest.hexdigest()

    @cached_property
    def identity(self) -> str:
        """The digest with the identity of each source file; a run resumes only work of the same identity."""
        identities = [file.identity for file in self.source_files.values()]
        return hashlib.sha256("\n".join([self.digest, *identities]).encode(errors="surrogateescape")).hexdigest()

    def files_of(self, unit: Unit) -> list[SourceFile]:
        """Return the source files that a unit is made from."""
        tensors = self.checkpoint.catalog.tensors
        names = {tensors[name].file for module in self.modules(unit) for name in module.reads}
        return [self.source_files[name] for name in sorted(names)]


_conversions: dict[str, Conversion] = {}


def _unpickle(job: Job, digest: str, token: str) -> Conversion:
    """Return the conversion of a pickled job; the latest one is kept for the next call in this process.

    The token tells conversions apart that only write to another directory, or again to the same one.
    """
    if token not in _conversions:
        _conversions.clear()
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
        _conversions[token] = conversion
    return _conversions[token]


def _module_description(module: ModulePlan) -> str:
    """Return a text with everything in a module's plan that decides the bytes that it delivers."""
    lines = [f"{module.name} {module.stored_scheme}"]
    if module.weight is not None:
        weight = module.weight
        lines.append(f"{weight.args} {weight.shape} {weight.packing} {weight.zero_point_packing} {weight.consumed}")
    lines += [f"{delivery.name} {delivery.operation} {delivery.sources}" for delivery in module.deliveries]
    lines += [_module_description(piece) for piece in module.pieces]
    return "\n".join(lines)
