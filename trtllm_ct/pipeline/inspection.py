"""`inspect_checkpoint`: everything that can be said about a directory from its headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import CheckpointError, Fault
from trtllm_ct.base.json_form import json_object
from trtllm_ct.config.detect import Detection, FormatDetector
from trtllm_ct.engine.parallel import ONE_RANK, Parallel
from trtllm_ct.engine.releases import DEFAULT_ENGINE
from trtllm_ct.engine.target import target_named
from trtllm_ct.pipeline.open import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["Inspection", "SchemeRow", "inspect_checkpoint"]

_RowKey = tuple[bool, str, str, str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeRow:
    """Modules that share stored scheme, native mode, delivery and reason, with their bytes now and after."""

    modules: tuple[str, ...]
    stored_scheme: str
    native_mode: str
    delivered_mode: str
    reason: str
    note: str
    stored_bytes: int
    delivered_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
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
    """What was detected, what the plan for a target says, and every problem that keeps the checkpoint from it.

    `parallel` are the sizes that were asked about. `plan` is None when there are problems.
    """

    directory: Path
    target: str
    parallel: Parallel
    detection: Detection
    plan: Plan | None
    problems: tuple[Fault, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Oddities that change nothing: of detection, configuration, files and plan."""
        return self.detection.disagreements + (self.plan.warnings if self.plan else ())

    def rows(self) -> Iterator[SchemeRow]:
        """The modules of the plan, grouped by how they are stored and delivered; quantized ones first."""
        if self.plan is None:
            return
        keys: dict[tuple[int, ...], _RowKey] = {}
        rows: dict[_RowKey, list[ModulePlan]] = {}
        for module in self.plan.modules:
            # A large model has 10^5 modules and few kinds, whose plans share these objects.
            parts = (module.weight, module.scheme, module.native_mode, module.layer, module.reason, module.note)
            kind = tuple(map(id, parts))
            if kind not in keys:
                keys[kind] = _row_key(module)
            rows.setdefault(keys[kind], []).append(module)
        for key in sorted(rows):
            yield _row(rows[key])

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the parts of the plan are null when there are problems."""
        plan = self.plan
        return json_object(
            {
                "directory": self.directory,
                "target": self.target,
                "parallel": self.parallel,
                "detection": self.detection,
                "architecture": plan.architecture if plan else None,
                "schemes": list(self.rows()),
                "modules": plan.modules if plan else None,
                "quantization": plan.quant_config if plan else None,
                "kv_cache": plan.quant_config.kv_cache_quant_algo if plan else None,
                "stored_bytes": plan.stored_bytes if plan else None,
                "delivered_bytes": plan.delivered_bytes if plan else None,
                "warnings": self.warnings,
                "problems": self.problems,
            }
        )


def inspect_checkpoint(
    directory: str | Path, to: str = "modelopt", *, engine: str = DEFAULT_ENGINE, parallel: Parallel = ONE_RANK
) -> Inspection:
    """Inspect a directory as it would be delivered to the target named `to`, for the capability set `engine`.

    `parallel` are the sizes that the engine will run with; what it can't be cut by is among the problems. Reads headers
    only and does not import torch. Problems of the checkpoint are gathered in the result.
    Raises `UsageError` for an unknown target, `CheckpointError` when there is nothing that could be detected.
    """
    directory = Path(directory)
    target = target_named(to, engine)
    detection = FormatDetector().detect(directory)
    plan: Plan | None = None
    problems: tuple[Fault, ...] = ()
    try:
        plan = open_checkpoint(directory, detection).plan(target.name, engine=engine, parallel=parallel)
    except CheckpointError as error:
        problems = error.faults
    return Inspection(
        directory=directory,
        target=target.name,
        parallel=parallel,
        detection=detection,
        plan=plan,
        problems=problems,
    )


def _row_key(module: ModulePlan) -> _RowKey:
    native = str(module.native_mode) if module.native_mode else ""
    return (module.weight is None, module.stored_scheme, native, module.delivered_mode, module.reason, module.note)


def _row(members: Sequence[ModulePlan]) -> SchemeRow:
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
