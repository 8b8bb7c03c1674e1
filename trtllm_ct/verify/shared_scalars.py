"""Check the scalars that the parts of a fused NVFP4 Linear share in a converted directory.

Engines fuse q/k/v, and gate and up, into one Linear each, and assert that the scalars of all parts are equal.
`compare_converted` already proves that the weights have the right values whichever scalar is used. This file does the
rest: it computes the expected scale of the input, which may be the scale of another part, and checks that all parts
agree. The expected values come from the tensors of the source, not from the deliveries of the plan.
"""

from __future__ import annotations

from math import frexp
from typing import TYPE_CHECKING

import torch

from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.plan.ops import Reciprocal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.checkpoint.reader import TensorReader
    from trtllm_ct.engine.quant_config import QuantConfig
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["check_fused_scalars", "input_multipliers"]


def input_multipliers(plan: Plan, source: TensorReader) -> dict[str, float]:
    """The expected value of `input_scale` by module, in float64.

    This is 1 / `input_global_scale`, or 0 if that is 0, as for an expert that calibration never reached. A part of a
    fused Linear has the largest value of all parts instead, if its own value is 0 or differs from the largest by a
    power of two.
    """
    multipliers: dict[str, float] = {}
    linears: dict[str, list[str]] = {}
    for module in plan.modules:
        divisor = _input_divisor(module, source)
        if divisor is not None:
            multipliers[module.name] = 1 / divisor if divisor else 0.0
            linears.setdefault(module.fused_linear or module.name, []).append(module.name)
    return {
        name: largest
        if multipliers[name] == 0 or frexp(multipliers[name])[0] == frexp(largest)[0]
        else multipliers[name]
        for names, largest in ((names, max(multipliers[name] for name in names)) for names in linears.values())
        for name in names
    }


def check_fused_scalars(
    plan: Plan, catalog: Catalog, delivered: TensorReader, quant_config: QuantConfig, faults: FaultCollector
) -> None:
    """Add a fault for each scalar of a converted part that differs from the scalar of the first part of its Linear.

    Skips every Linear with a part that already has a fault: the differing scalar may only follow from it.
    """
    fault_places = [fault.where for fault in faults.faults]
    linears: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for module in plan.modules:
        layer = quant_config.layer_config(module.name)
        mode = MODES_BY_ALGO.get(layer.quant_algo) if layer is not None else None
        if module.fused_linear is not None and mode is not None:
            linears.setdefault((module.fused_linear, mode.shared_scalars), []).append(module.name)
    for (_, scalars), names in linears.items():
        if any(place.startswith(name) for place in fault_places for name in names):
            continue
        for local in scalars:
            parts = [name for name in names if f"{name}.{local}" in catalog]
            _check_equal({name: delivered.read(f"{name}.{local}").reshape(()) for name in parts}, local, faults)


def _input_divisor(module: ModulePlan, source: TensorReader) -> float | None:
    """The stored `input_global_scale` of a module; None if no `input_scale` is delivered as its reciprocal."""
    for delivery in module.deliveries:
        if isinstance(delivery.operation, Reciprocal) and delivery.name == f"{module.name}.input_scale":
            view = module.views[str(delivery.operation.source)]
            return float(view.of({name: source.read(name) for name in view.sources}).double())
    return None


def _check_equal(scalars: Mapping[str, Tensor], local: str, faults: FaultCollector) -> None:
    """Add a fault for each scalar, by module name, that differs from the first."""
    first = next(iter(scalars), "")
    for name, value in scalars.items():
        expected = scalars[first]
        # Releases of early 2026 assert exact equality.
        if not torch.equal(value, expected):
            faults.add(
                where=f"{name}.{local}",
                expected=f"{float(expected):.9g}, as {first} has it: the engine makes one Linear of both",
                found=f"{float(value):.9g}",
                remedy="Convert again; the engine would refuse the weights, or take one of the two for both.",
            )
