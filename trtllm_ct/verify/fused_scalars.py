"""What the parts of one NVFP4 Linear share in a converted directory: judged by values of the source, not by its plan.

Engines make one Linear of q/k/v and of gate and up, and assert that its scalars are equal. `verify_converted` proves
that weights are what they were under whatever scalar; here is the rest: the scale of the input, which may be that of
another part, and that all parts agree.
"""

from __future__ import annotations

from math import frexp
from typing import TYPE_CHECKING

import torch

from trtllm_ct.base.schemes import QuantAlgo
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

_ALGOS = frozenset({QuantAlgo.NVFP4, QuantAlgo.W4A16_NVFP4})
_SCALARS = ("weight_scale_2", "input_scale")


def input_multipliers(plan: Plan, source: TensorReader) -> dict[str, float]:
    """What `input_scale` must be, by module, in float64.

    That is 1 / `input_global_scale`, and 0 for the 0 of an expert that calibration never reached. Parts of one Linear
    take the largest where theirs is a power of two below it, or 0.
    """
    own: dict[str, float] = {}
    linears: dict[str, list[str]] = {}
    for module in plan.modules:
        divisor = _input_divisor(module, source)
        if divisor is not None:
            own[module.name] = 1 / divisor if divisor else 0.0
            linears.setdefault(module.fused_linear or module.name, []).append(module.name)
    return {
        name: shared if own[name] == 0 or frexp(own[name])[0] == frexp(shared)[0] else own[name]
        for names, shared in ((names, max(own[name] for name in names)) for names in linears.values())
        for name in names
    }


def check_fused_scalars(
    plan: Plan, catalog: Catalog, delivered: TensorReader, quant_config: QuantConfig, faults: FaultCollector
) -> None:
    """Add a fault for each scalar of a converted part that differs from that of another part of its Linear.

    Linears with a part that has a fault already are left out: the fault says where they begin to differ.
    """
    faulty = [fault.where for fault in faults.faults]
    linears: dict[str, list[str]] = {}
    for module in plan.modules:
        layer = quant_config.layer_config(module.name)
        if module.fused_linear is not None and layer is not None and layer.quant_algo in _ALGOS:
            linears.setdefault(module.fused_linear, []).append(module.name)
    for names in linears.values():
        if any(where.startswith(name) for where in faulty for name in names):
            continue
        for local in _SCALARS:
            having = [name for name in names if f"{name}.{local}" in catalog]
            _check_equal({name: delivered.read(f"{name}.{local}").reshape(()) for name in having}, local, faults)


def _input_divisor(module: ModulePlan, source: TensorReader) -> float | None:
    """The stored divisor of a module's input, where a native mode takes it."""
    for delivery in module.deliveries:
        if isinstance(delivery.operation, Reciprocal) and delivery.name == f"{module.name}.input_scale":
            view = module.views[str(delivery.operation.source)]
            return float(view.of({name: source.read(name) for name in view.sources}).double())
    return None


def _check_equal(scalars: Mapping[str, Tensor], local: str, faults: FaultCollector) -> None:
    first = next(iter(scalars), "")
    for name, value in scalars.items():
        wanted = scalars[first]
        # As the engine asserts it.
        if not torch.allclose(value, wanted):
            faults.add(
                where=f"{name}.{local}",
                expected=f"{float(wanted):.9g}, as {first} has it: the engine makes one Linear of both",
                found=f"{float(value):.9g}",
                remedy="Convert again; the engine would refuse the weights, or take one of the two for both.",
            )
