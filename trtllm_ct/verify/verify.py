"""`verify_checkpoint`: verify a checkpoint, and check that a converted directory holds the same weights.

The two sides are dequantized by different code: the source by the codec of its stored format, the converted directory
by the reference engine, which reads the native layouts. Neither the mapper nor the targets take part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, FaultCollector, VerificationError
from trtllm_ct.base.json_form import json_object
from trtllm_ct.base.packages import missing_packages_as_errors
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
    """The result of a verification: what was checked, and all faults.

    `modules` is the number of modules in the plan. `zero_scales` is the number of rows or groups with a scale of zero.
    `checks` is empty if only the source was verified, or if the source has faults. `warnings` are the warnings of the
    plan, and warnings about the checkpoint's producer that follow from the values.
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
        """Whether there are no faults."""
        return not self.faults

    def worst(self, kind: str) -> TensorCheck | None:
        """The check of this kind with the largest error; None if there is no check of this kind."""
        return max((check for check in self.checks if check.kind == kind), key=_error, default=None)

    def raise_if_bad(self) -> None:
        """Raise `VerificationError` with all faults, if there are any."""
        if self.faults:
            raise VerificationError(*self.faults)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object(
            {
                "directory": self.directory,
                "converted": self.converted,
                "good": self.good,
                "modules": self.modules,
                "zero_scales": self.zero_scales,
                "checks": self.checks,
                "warnings": self.warnings,
                "faults": self.faults,
            }
        )


@missing_packages_as_errors()
def verify_checkpoint(directory: str | Path, converted: str | Path | None = None) -> VerificationReport:
    """Verify a compressed-tensors directory, and a directory converted from it when one is given.

    Without `converted`, these are checked: the structure and the companion tensors (by planning), that scales are
    finite and positive, that zero points are in range and that no code is NaN. With `converted`, every weight is also
    dequantized on both sides in float64. A native weight is good when no element is off by more than 1e-6 of the
    largest value in its row. A dequantized or plain weight is good when each element is the exact value rounded once to
    its dtype.
    Weights that differ are faults of the report. A directory that can't be read raises the `CheckpointError` of the
    stage that fails. Memory: two copies of one module in float64.
    """
    from trtllm_ct.verify.converted import compare_converted

    checkpoint = open_checkpoint(directory)
    # Keep only the shapes from the probe. The plan then still reads zero points and group indices that the probe found
    # to have no effect, so that this verification proves it.
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
    """Check the payload of every module; return the number of rows or groups with a scale of zero."""
    zero_scales = 0
    with TensorReader(catalog) as reader:
        for module in plan.modules:
            stored = module.local_tensors({name: reader.read(name) for name in module.reads})
            check_payload(module, stored, faults)
            watch.look(module, stored)
            zero_scales += count_zero_scales(module, stored)
            _check_codes(module, stored, faults)
    return zero_scales


def _check_codes(module: ModulePlan, stored: Mapping[str, Tensor], faults: FaultCollector) -> None:
    """Add a fault if a float8 code of the module's weight is NaN."""
    weight = module.weight
    if weight is None or weight.packing is not None:
        return
    is_nan = stored[weight.codes].float().isnan()
    if bool(is_nan.any()):
        position = [int(index) for index in is_nan.nonzero()[0]]
        faults.add(
            where=f"{module.name}.{weight.codes}{position}",
            expected="finite codes",
            found=f"{int(is_nan.sum())} fp8 codes that are no number (NaN)",
            remedy="The weight was damaged or quantized with a scale that is too small; quantize it again.",
        )
