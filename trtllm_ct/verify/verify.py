"""`verify_checkpoint`: is a checkpoint sound, and does a converted directory hold the same weights?

The two sides are dequantized by different code: the source by its stored format, the converted one by the reference
engine's reading of native layouts. Neither the mapper nor the targets take part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, FaultCollector, VerificationError
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.pipeline.payload import check_payload, count_zero_scales
from trtllm_ct.plan.probe import NO_PROBE
from trtllm_ct.plan.producers import ValueWatch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.plan.plan import ModulePlan, Plan
    from trtllm_ct.verify.converted import TensorCheck

__all__ = ["VerificationReport", "verify_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """What was checked and every fault that was found. `checks` is empty when only the source was verified.

    `warnings` are those of the plan and what the values say of their producer.
    """

    directory: Path
    converted: Path | None
    modules: int
    zero_scales: int
    checks: tuple[TensorCheck, ...]
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def worst(self, kind: str) -> TensorCheck | None:
        """The check with the largest error among those of a kind."""
        return max((check for check in self.checks if check.kind == kind), key=_error, default=None)

    def raise_if_bad(self) -> None:
        """Raise `VerificationError` with all faults, if there are any."""
        if self.faults:
            raise VerificationError(*self.faults)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "directory": str(self.directory),
            "converted": str(self.converted) if self.converted else None,
            "good": self.good,
            "modules": self.modules,
            "zero_scales": self.zero_scales,
            "checks": [check.to_dict() for check in self.checks],
            "warnings": list(self.warnings),
            "faults": [fault.to_dict() for fault in self.faults],
        }


def verify_checkpoint(directory: str | Path, converted: str | Path | None = None) -> VerificationReport:
    """Verify a compressed-tensors directory, and a directory converted from it when one is given.

    Alone: structure and companions (by planning), finite and positive scales, zero points in range, no NaN codes.
    With `converted`: every weight is dequantized on both sides in float64. A native one is good when no row is off
    by more than 1e-6 of its largest value, a dequantized or plain one when each element is the exact value rounded
    once to its dtype. Weights that differ are faults of the report; a directory that can't be read raises the
    `CheckpointError` of its stage. Memory: one module in float64, twice.
    """
    from trtllm_ct.verify.converted import compare_converted

    checkpoint = open_checkpoint(directory)
    # Of what a probe found only shapes: zero points and group indices that change nothing prove it here.
    checkpoint = replace(checkpoint, probe=replace(NO_PROBE, shapes=checkpoint.probe.shapes))
    plan = checkpoint.plan("modelopt")
    faults = FaultCollector()
    watch = ValueWatch()
    zero_scales = _check_source(plan, checkpoint.catalog, watch, faults)
    checks: tuple[TensorCheck, ...] = ()
    if converted is not None and not faults.faults:
        checks = compare_converted(checkpoint, plan, Path(converted), faults)
    return VerificationReport(
        directory=Path(directory),
        converted=Path(converted) if converted is not None else None,
        modules=len(plan.modules),
        zero_scales=zero_scales,
        checks=checks,
        faults=tuple(faults.faults),
        warnings=plan.warnings + watch.warnings,
    )


def _error(check: TensorCheck) -> float:
    return check.comparison.error


def _check_source(plan: Plan, catalog: Catalog, watch: ValueWatch, faults: FaultCollector) -> int:
    """The payload of every module; gives the number of rows or groups that hold zeros only."""
    zeros = 0
    with TensorReader(catalog) as reader:
        for module in plan.modules:
            stored = module.local_tensors({name: reader.read(name) for name in module.reads})
            check_payload(module, stored, faults)
            watch.look(module, stored)
            zeros += count_zero_scales(module, stored)
            _check_codes(module, stored, faults)
    return zeros


def _check_codes(module: ModulePlan, stored: Mapping[str, Tensor], faults: FaultCollector) -> None:
    """No float8 code may be NaN."""
    weight = module.weight
    if weight is None or weight.packing is not None:
        return
    lost = stored[weight.codes].float().isnan()
    if bool(lost.any()):
        position = [int(index) for index in lost.nonzero()[0]]
        faults.add(
            where=f"{module.name}.{weight.codes}{position}",
            expected="finite codes",
            found=f"{int(lost.sum())} fp8 codes that are no number (NaN)",
            remedy="The weight was damaged or quantized with a scale that is too small; quantize it again.",
        )
