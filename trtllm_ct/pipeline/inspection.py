"""`inspect_checkpoint`: reports everything that the headers of a directory tell."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import CatalogError, CheckpointError, Fault, UnreadClassError
from trtllm_ct.base.json_form import json_object
from trtllm_ct.base.source_errors import source_errors
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.checkpoint.opening import open_source
from trtllm_ct.checkpoint.side_files import side_files
from trtllm_ct.config.detect import Detection, FormatDetector
from trtllm_ct.engine.target import DENSE, MODELOPT
from trtllm_ct.pipeline.alternatives import ServedOn, alternative, elsewhere
from trtllm_ct.pipeline.gpus import GpuRow, gpu_rows
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.plan.parts import Part, parts_of
from trtllm_ct.plan.verdict import verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from typing_extensions import Unpack

    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.options import PlanArguments
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["Inspection", "SchemeRow", "inspect_checkpoint"]

_RowKey = tuple[bool, str, str, str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeRow:
    """Modules with the same stored scheme, native mode, delivered mode, reason and note.

    `stored_bytes` and `delivered_bytes` are the sums over these modules.
    """

    modules: tuple[str, ...]
    stored_scheme: str
    native_mode: str
    delivered_mode: str
    reason: str
    note: str
    stored_bytes: int
    delivered_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object(
            {
                "modules": self.modules,
                "scheme": self.stored_scheme,
                "native_mode": self.native_mode,
                "mode": self.delivered_mode,
                "reason": self.reason,
                "note": self.note,
                "stored_bytes": self.stored_bytes,
                "delivered_bytes": self.delivered_bytes,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The result of an inspection: what was detected, the plan for a target, and the problems.

    `directory` is the path of the directory, or the name of a repository with its commit.
    `parallel` are the parallel sizes that the plan was made for. `plan` is None if a problem prevents delivery; the
    problems of a plan prevent only that the engine serves the result. `noted` are the warnings of the configuration,
    the files and the plan, up to the stage that found a problem that prevents delivery. `alternative` says with which
    other option the modules that cost most would keep their codes; empty if there is none. `elsewhere` are the releases
    and GPUs that were compared, None if that was not asked for. `checkpoint` and `options` are what the plan was made
    from.
    """

    directory: Path | str
    target: str
    parallel: Parallel
    detection: Detection
    plan: Plan | None
    problems: tuple[Fault, ...]
    noted: tuple[str, ...] = ()
    alternative: str = ""
    elsewhere: tuple[ServedOn, ...] | None = None
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    options: PlanOptions = field(default=PlanOptions(), repr=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about detection, configuration, files and plan; they don't prevent delivery."""
        return self.detection.disagreements + self.noted

    @property
    def verdict(self) -> str:
        """One sentence: whether the target serves the checkpoint, and at what cost; empty without a plan."""
        return verdict(self.plan, self.problems) if self.plan else ""

    def rows(self) -> Iterator[SchemeRow]:
        """Yield the modules of the plan, grouped by how they are stored and delivered; quantized ones come first."""
        if self.plan is None:
            return
        keys: dict[tuple[int, ...], _RowKey] = {}
        rows: dict[_RowKey, list[ModulePlan]] = {}
        for module in self.plan.modules:
            # Computing the key for each of 10^5 modules would be slow. The plans of modules that are alike share these
            # objects, so their identity is looked up first.
            parts = (module.weight, module.scheme, module.native_mode, module.layer, module.reason, module.note)
            identity = tuple(map(id, parts))
            if identity not in keys:
                keys[identity] = _row_key(module)
            rows.setdefault(keys[identity], []).append(module)
        for key in sorted(rows):
            yield _row(rows[key])

    def parts(self) -> tuple[Part, ...]:
        """Return the bytes by kind of module; empty without a plan."""
        return parts_of(self.plan, self.checkpoint.model) if self.plan and self.checkpoint else ()

    def gpus(self) -> tuple[GpuRow, ...]:
        """Return what one GPU needs at common parallel sizes; takes up to a few seconds. Empty without a plan."""
        return gpu_rows(self.checkpoint, self.plan, self.options) if self.plan and self.checkpoint else ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form; everything from the plan is null or empty if there is none."""
        plan = self.plan
        return json_object(
            {
                "directory": self.directory,
                "target": self.target,
                "parallel": self.parallel,
                "verdict": self.verdict,
                "alternative": self.alternative,
                "detection": self.detection,
                "architecture": plan.architecture if plan else None,
                "schemes": list(self.rows()),
                "modules": plan.modules if plan else None,
                "quantization": plan.quant_config if plan else None,
                "kv_cache": plan.quant_config.kv_cache_quant_algo if plan else None,
                "stored_bytes": plan.stored_bytes if plan else None,
                "delivered_bytes": plan.delivered_bytes if plan else None,
                "rank_bytes": plan.rank_bytes if plan else None,
                "sms": plan.sms if plan else None,
                "parts": self.parts(),
                "gpus": self.gpus(),
                "elsewhere": self.elsewhere,
                "deviations": plan.deviations if plan else (),
                "requantizations": [
                    choice.to_dict() | {"rank_bytes": plan.rank_bytes_with(choice)} for choice in plan.choices
                ]
                if plan
                else (),
                "checks": plan.checks if plan else (),
                "warnings": self.warnings,
                "problems": self.problems,
            }
        )


def inspect_checkpoint(
    directory: str | Path,
    to: str = MODELOPT.name,
    *,
    compare_places: bool = False,
    **asked: Unpack[PlanArguments],
) -> Inspection:
    """Inspect a checkpoint: how it would be delivered to the target named `to`, with the options of `PlanOptions`.

    `directory` may be the name of a repository of the Hub too, such as `ORG/NAME@REVISION`; see `open_source`.
    Parallel sizes that can't divide the model are problems. A model whose class has no row is inspected for the target
    `dense`. With `compare_places`, other releases and GPUs are compared, which takes up to some seconds. No weights are
    read, and torch is not imported. Problems of the checkpoint are collected in the result.
    Raises `UsageError` for options that don't exist, and `CheckpointError` if no checkpoint is detected or a repository
    can't be read.
    """
    source = open_source(directory)
    options = PlanOptions.of(to, **asked)
    options.target()  # An option that doesn't exist is no problem of the checkpoint.
    detection = FormatDetector().detect(source)
    inspection = Inspection(
        directory=source.folder or source.place,
        target=options.to,
        parallel=options.parallel,
        detection=detection,
        plan=None,
        problems=(),
        options=options,
    )
    try:
        checkpoint = open_checkpoint(source, detection)
    except CheckpointError as error:
        return replace(inspection, problems=error.faults, noted=error.warnings)
    return _planned(replace(inspection, checkpoint=checkpoint), checkpoint, options, compare_places=compare_places)


def _planned(
    inspection: Inspection, checkpoint: Checkpoint, options: PlanOptions, *, compare_places: bool
) -> Inspection:
    """Return the inspection with the plan of the checkpoint, or with the faults that leave it without one."""
    try:
        try:
            plan = checkpoint.plan_for(options, compare_class=True)
        except UnreadClassError as error:
            options = PlanOptions(to=DENSE.name, dtype=options.dtype)
            inspection = replace(inspection, target=options.to, options=options)
            plan = checkpoint.plan_for(options, compare_class=True)
            return replace(inspection, plan=plan, problems=error.faults, noted=plan.warnings)
    except CheckpointError as error:
        return replace(inspection, problems=error.faults, noted=error.warnings)
    return replace(
        inspection,
        plan=plan,
        problems=plan.problems,
        noted=(*plan.warnings, *_refused_side_files(checkpoint)),
        alternative=alternative(checkpoint, plan, options),
        elsewhere=elsewhere(checkpoint, plan, options) if compare_places else None,
    )


def _refused_side_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return a warning that names the files beside the weights that `convert` would refuse to copy."""
    folder = checkpoint.source.folder
    if folder is None:
        return ()
    try:
        with source_errors(folder):
            side_files(folder)
    except CatalogError as error:
        names = format_names(fault.where.removeprefix(f"{folder}{os.sep}") for fault in error.faults)
        return (f"`convert` refuses side files: {names} ({error.faults[0].found})",)
    return ()


def _row_key(module: ModulePlan) -> _RowKey:
    """Return what the modules of one row have in common; keys of quantized modules sort first."""
    native = str(module.native_mode) if module.native_mode else ""
    return (module.weight is None, module.stored_scheme, native, module.delivered_mode, module.reason, module.note)


def _row(members: Sequence[ModulePlan]) -> SchemeRow:
    """Return the row of modules that have the same key."""
    first = members[0]
    return SchemeRow(
        modules=tuple(module.name for module in members),
        stored_scheme=first.stored_scheme or "plain",
        native_mode=str(first.native_mode) if first.native_mode else "",
        delivered_mode=first.delivered_mode,
        reason=first.reason,
        note=first.note,
        stored_bytes=sum(module.stored_bytes for module in members),
        delivered_bytes=sum(module.delivered_bytes for module in members),
    )
