"""CompressedTensorsWeightMapper: the tensors of one module in, the tensors that the engine's Linear reads out.

Every decision was made by the plan; here scales and zero points are checked and operations run.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, FaultCollector, PayloadError
from trtllm_ct.formats.codecs import NATIVE, Codec
from trtllm_ct.pipeline.payload import check_payload
from trtllm_ct.plan.ops import ModuleTensors
from trtllm_ct.plan.producers import ValueWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from trtllm_ct.base.schemes import TensorSpec
    from trtllm_ct.plan.plan import Delivery, ModulePlan, Place, Plan, Share

__all__ = ["CompressedTensorsWeightMapper"]

logger = logging.getLogger("trtllm_ct")


class CompressedTensorsWeightMapper:
    """Turns the scales, zero points and codes of compressed-tensors into the engine's Linear layouts.

    Values that a producer is known to write wrong are told once, with the first module that has them: to `on_warning`
    if that is given, else to the log.
    """

    def __init__(
        self, *, codec: Codec = NATIVE, device: str = "cpu", on_warning: Callable[[str, str], object] | None = None
    ) -> None:
        self._codec = codec
        self._device = device
        self._on_warning = on_warning or _log_warning
        self._watch = ValueWatch()

    def map_module(self, module: ModulePlan, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The delivered tensors of one module, by full name.

        `stored` holds what `module.reads` lists, by full name; contiguous, as stored. Inputs are never changed, and
        a tensor that needs no change is handed on as it is. Memory: the delivered tensors, and for a dequantized
        weight its int8 codes. Raises `PayloadError` for scales that are NaN, infinite, negative or (one per tensor)
        zero, for a `weight_shape` that contradicts the plan, and for values that the delivered dtype can't hold.
        Operations run on the device of the mapper and leave their results there, but what a rank is handed a share of
        is on the CPU.
        """
        if module.share is None:
            return self._map(module, stored)
        try:
            made = self._map(module.share.module, stored)
        except PayloadError as error:
            rows = f", in rows {module.share.begin} to {module.share.end}"
            raise PayloadError(*(replace(fault, found=fault.found + rows) for fault in error.faults)) from None
        return {each.name: self._handed_over(each, module, module.share, made, stored) for each in module.deliveries}

    def _handed_over(
        self,
        delivery: Delivery,
        module: ModulePlan,
        share: Share,
        made: Mapping[str, Tensor],
        stored: Mapping[str, Tensor],
    ) -> Tensor:
        """A tensor of full shape, of which only the rows of a rank are there."""
        source, place = delivery.operation.source, share.places.get(delivery.name)
        if delivery.name in share.views and source is not None:
            whole = {source: module.views[source].of(stored)}
            return _run(delivery, ModuleTensors(whole, None, self._codec))
        return made[delivery.name] if place is None else _placed(delivery.spec, made[delivery.name], place)

    def _map(self, module: ModulePlan, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a module delivers, or its rows where it is a part of one."""
        local = self.checked(module, stored)
        tensors = self.tensors(module, local)
        return {delivery.name: self.run(module, delivery, tensors) for delivery in module.deliveries}

    def checked(self, module: ModulePlan, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a module by local name, on the mapper's device; `stored` as `map_module` takes it.

        Raises `PayloadError` for values that may not be delivered.
        """
        local = {name: tensor.to(self._device) for name, tensor in module.local_tensors(stored).items()}
        for warning in self._watch.look(module, local):
            self._on_warning(module.name, warning)
        faults = FaultCollector()
        check_payload(module, local, faults)
        faults.raise_if_any(PayloadError)
        return local

    def tensors(self, module: ModulePlan, local: Mapping[str, Tensor], first_row: int = 0) -> ModuleTensors:
        """What the operations of a module run on; `first_row` is where it begins if it is some rows of another one."""
        return ModuleTensors(local, module.weight, self._codec, first_row)

    def run(self, module: ModulePlan, delivery: Delivery, tensors: ModuleTensors) -> Tensor:
        """One delivered tensor; raises `PayloadError` for values that it can't hold."""
        try:
            return _run(delivery, tensors)
        except PayloadError as error:
            raise PayloadError(*(_located(fault, module.name) for fault in error.faults)) from None

    def map_weights(self, plan: Plan, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`map_module` over all modules of a plan, for weights that are in memory already."""
        delivered: dict[str, Tensor] = {}
        for module in plan.modules:
            delivered |= self.map_module(module, {name: stored[name] for name in module.reads})
        return delivered


def _log_warning(module: str, warning: str) -> None:
    logger.warning("%s: %s", module, warning)


def _placed(spec: TensorSpec, rows: Tensor, place: Place) -> Tensor:
    """Rows in a tensor of shape `spec` whose other rows are never written, so that they take no memory."""
    import torch

    whole = torch.empty(spec.shape, dtype=spec.dtype.torch_dtype)
    whole[place.at : place.at + place.count] = rows[place.first : place.first + place.count]
    return whole


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
