"""CompressedTensorsWeightMapper: the tensors of one module in, the tensors that the engine's Linear reads out.

Every decision was made by the plan; here scales and zero points are checked and operations run.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.errors import Fault, FaultCollector, PayloadError
from trtllm_ct.formats.codecs import NATIVE, Codec
from trtllm_ct.ops import ModuleTensors
from trtllm_ct.payload import check_payload
from trtllm_ct.producers import ValueWatch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.plan.model import Delivery, ModulePlan, Plan

__all__ = ["CompressedTensorsWeightMapper"]

logger = logging.getLogger("trtllm_ct")


class CompressedTensorsWeightMapper:
    """Turns the scales, zero points and codes of compressed-tensors into the engine's Linear layouts.

    Values that a producer is known to write wrong are logged once, with the first module that has them.
    """

    def __init__(self, *, codec: Codec = NATIVE) -> None:
        self._codec = codec
        self._watch = ValueWatch()

    def map_module(self, module: ModulePlan, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The delivered tensors of one module, by full name.

        `stored` holds what `module.reads` lists, by full name; contiguous, as stored. Inputs are never changed, and
        a tensor that needs no change is handed on as it is. Memory: the delivered tensors, and for a dequantized
        weight its int8 codes. Raises `PayloadError` for scales that are NaN, infinite, negative or (one per tensor)
        zero, for a `weight_shape` that contradicts the plan, and for values that the delivered dtype can't hold.
        """
        local = module.local_tensors(stored)
        for warning in self._watch.look(module, local):
            logger.warning("%s: %s", module.name, warning)
        faults = FaultCollector()
        check_payload(module, local, faults)
        faults.raise_if_any(PayloadError)
        tensors = ModuleTensors(local, module.weight, self._codec)
        try:
            return {delivery.name: _run(delivery, tensors) for delivery in module.deliveries}
        except PayloadError as error:
            raise PayloadError(*(_located(fault, module.name) for fault in error.faults)) from None

    def map_weights(self, plan: Plan, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`map_module` over all modules of a plan, for weights that are in memory already."""
        delivered: dict[str, Tensor] = {}
        for module in plan.modules:
            delivered |= self.map_module(module, {name: stored[name] for name in module.reads})
        return delivered


def _located(fault: Fault, module: str) -> Fault:
    """The fault with the module's name before a local one: formats and layouts know no names."""
    return fault if fault.where.startswith(module) else replace(fault, where=f"{module}.{fault.where}")


def _run(delivery: Delivery, tensors: ModuleTensors) -> Tensor:
    """One operation, held to its promise: the spec that the plan announced, contiguous."""
    tensor = delivery.operation.run(delivery.name, tensors)
    spec = delivery.spec
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype.torch_dtype or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)}, contiguous: {tensor.is_contiguous()}"
        raise AssertionError(f"{delivery.name}: the plan promised {spec}, {delivery.operation.label} gave {found}")
    return tensor
