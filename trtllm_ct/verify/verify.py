"""`verify_checkpoint`: verify a checkpoint, and check that a converted directory holds the same weights.

The two sides are dequantized by different code in plain numpy: the source by `source/`, the converted directory by
`native_layouts.py`. Neither plans, codecs, the mapper nor the targets take part in the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.arguments import path_of
from trtllm_ct.base.errors import Fault, FaultCollector, UnreadClassError, UsageError, VerificationError
from trtllm_ct.base.json_form import json_object
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.engine.requantization import NOT_REQUANTIZED, Requantize
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.probe import NO_PROBE
from trtllm_ct.plan.producers import ValueWatch
from trtllm_ct.verify.engine_ranks import is_engine_directory
from trtllm_ct.verify.plain_values import PlainWatch
from trtllm_ct.verify.source_check import check_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.plan import ModulePlan, Plan
    from trtllm_ct.verify.converted import TensorCheck
    from trtllm_ct.verify.requantized import RoundedComparison

__all__ = ["Started", "VerificationReport", "verify_checkpoint"]

Started = Callable[[int], Callable[[int], None]]
"""Called with the number of bytes to verify, before the first one; returns a progress callback.

The progress callback is called with numbers of bytes that are verified.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """The result of a verification: what was checked, and all faults.

    `modules` is the number of modules in the plan. `zero_scales` is the number of rows or groups with a scale of zero.
    `checks` is empty if only the source was verified, or if the source has faults. `warnings` are the warnings of the
    plan, warnings about the checkpoint's producer that follow from the values, and those about plain tensors with
    numbers that are not finite.
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

    @property
    def relative_errors(self) -> dict[str, float]:
        """The relative error of each weight that was requantized, by name; see `RoundedComparison`."""
        return {check.name: comparison.relative_error for check, comparison in self._rounded()}

    @property
    def relative_error(self) -> float:
        """The relative error of all requantized weights together; 0 if there are none."""
        from trtllm_ct.verify.requantized import relative_error

        pairs = [(comparison.squared_error, comparison.squares) for _, comparison in self._rounded()]
        return relative_error(sum(error for error, _ in pairs), sum(squares for _, squares in pairs))

    def _rounded(self) -> Iterator[tuple[TensorCheck, RoundedComparison]]:
        from trtllm_ct.verify.requantized import RoundedComparison

        for check in self.checks:
            if isinstance(check.comparison, RoundedComparison):
                yield check, check.comparison

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
                "relative_error": self.relative_error if self.relative_errors else None,
                "checks": self.checks,
                "warnings": self.warnings,
                "faults": self.faults,
            }
        )


@missing_packages_as_errors()
def verify_checkpoint(
    directory: str | Path,
    converted: str | Path | None = None,
    *,
    requantize: str | Iterable[str] | Mapping[str, str] | Requantize | None = None,
    on_start: Started | None = None,
) -> VerificationReport:
    """Verify a compressed-tensors directory, and a directory converted from it when one is given.

    Without `converted`, these are checked: the structure and the companion tensors (by planning), that scales are
    finite and positive, that zero points are in range and that no code is NaN. A plain tensor that holds NaN or an
    infinity is a warning: it is delivered as it is stored. With `converted`, every weight is also
    compared: by its codes and scales, or dequantized on both sides in float64. A native weight is good when every
    element is equal; where a delivered number had to be rounded to float32, when no element is off by more than 1e-6 of
    the largest value in its row. A dequantized or plain weight is good when each element is the exact value rounded
    once to its dtype. A weight that was requantized is good when each code is the nearest one with its scale, and its
    error within the limit of its form (`engine/requantization.py`). The directory itself says which weights were; with
    `requantize`, as in `PlanOptions.of`, a directory that was asked for anything else is a fault, and scales of inputs
    that the directory got from a calibration must be those of `requantize`, if it has any. `on_start` is told how far
    the verification is: every stored byte counts once, and once more when it is compared.
    Weights that differ are faults of the report. A directory that can't be read raises the `CheckpointError` of the
    stage that fails. Memory does not grow with the size of a weight: chunks of 512 KiB for each core. Exceptions are
    weights with a transform on their output, of which as many rows as its matrix has are held in float64, and
    `marlin-24`, whose stored tensors are held for one weight.
    """
    from trtllm_ct.verify.converted import compare_converted, refuse_other_requantization
    from trtllm_ct.verify.engine_match import compare_engine_directory

    converted = None if converted is None else path_of("converted", converted)
    requantize = None if requantize is None else Requantize.parse(requantize)
    if requantize is not None and converted is None:
        raise UsageError(
            Fault(
                where="--requantize",
                expected="a converted directory, OUT, of which it says what was requantized",
                found="the checkpoint alone",
                remedy="Name OUT too, or leave --requantize out.",
            )
        )
    checkpoint = open_checkpoint(directory)
    # Keep only the shapes from the probe, and whether a tied head equals the embeddings, which the probe compared
    # byte by byte. The plan then still reads zero points and group indices that the probe found to have no effect, so
    # that this verification proves it.
    probe = replace(NO_PROBE, shapes=checkpoint.probe.shapes, head_is_table=checkpoint.probe.head_is_table)
    checkpoint = replace(checkpoint, probe=probe)
    plan = _plan(checkpoint, _target_of(converted))
    faults = FaultCollector()
    watch, plain = ValueWatch(), PlainWatch()
    stored_bytes = sum(module.stored_bytes for module in plan.modules)
    progress = on_start(stored_bytes * (1 if converted is None else 2)) if on_start else _ignore
    zero_scales = check_source(plan, checkpoint.catalog, (watch, plain), faults, progress)
    checks: tuple[TensorCheck, ...] = ()
    if converted is not None and requantize is not None:
        refuse_other_requantization(converted, requantize, faults)
    if converted is not None and not faults.faults:
        compare = compare_engine_directory
        if not is_engine_directory(converted):
            compare = partial(compare_converted, calibration=(requantize or NOT_REQUANTIZED).calibration)
        checks = compare(checkpoint, converted, faults, _by_elements(progress, plan, stored_bytes))
    return VerificationReport(
        directory=Path(directory),
        converted=converted,
        modules=len(plan.modules),
        zero_scales=zero_scales,
        checks=checks,
        faults=tuple(faults.faults),
        warnings=plan.warnings + watch.warnings + plain.warnings,
    )


def _plan(checkpoint: Checkpoint, target: str) -> Plan:
    """Return the plan for a target; for `dense` if it is not known how an engine's class reads the model.

    It is compared with the class in transformers, as conversion does.
    """
    try:
        return checkpoint.plan(target, compare_class=True)
    except UnreadClassError:
        return checkpoint.plan("dense", compare_class=True)


def _target_of(converted: Path | None) -> str:
    """Return the target that a directory was converted to; what that target leaves out is not checked.

    A directory without quantized modules counts as `dense`: both targets leave out the same then. An engine-build
    checkpoint counts as `reference`, which leaves out nothing that engines read; its own plan depends on its sizes.
    """
    if converted is not None and is_engine_directory(converted):
        return "reference"
    modes = None if converted is None else converted / "hf_quant_config.json"
    return "modelopt" if modes is None or modes.is_file() else "dense"


def _by_elements(progress: Callable[[int], None], plan: Plan, stored_bytes: int) -> Callable[[int], None]:
    """Return the callback for numbers of elements of weights, which have `stored_bytes` together."""
    elements = max(1, sum(map(_elements, plan.modules)))
    compared = 0

    def add(count: int) -> None:
        nonlocal compared
        before = compared * stored_bytes // elements
        compared += count
        progress(compared * stored_bytes // elements - before)

    return add


def _elements(module: ModulePlan) -> int:
    """Return the number of elements that are compared of a module, apart from scales and so on."""
    if module.weight is not None:
        return prod(module.weight.shape)
    return sum(view.spec.numel for view in module.views.values())


def _ignore(nbytes: int) -> None:
    """Ignore progress; used when the caller passes no `on_start`."""


def _error(check: TensorCheck) -> float:
    return check.comparison.error
