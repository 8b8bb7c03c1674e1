"""ModuleMapper: converts the stored tensors of one module to the tensors that an engine reads.

The plan has made every decision. The mapper checks scales and zero points and runs the operations of the plan.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, FaultCollector, PayloadError
from trtllm_ct.formats.codecs import NATIVE, Codec
from trtllm_ct.layouts.loops.huge_pages import empty
from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors
from trtllm_ct.pipeline.payload import check_payload
from trtllm_ct.plan.ops import ModuleTensors
from trtllm_ct.plan.producers import ValueWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from trtllm_ct.base.schemes import TensorSpec
    from trtllm_ct.plan.plan import Delivery, ModulePlan, Place, Share

__all__ = ["ModuleMapper"]

logger = logging.getLogger("trtllm_ct")


class ModuleMapper:
    """Converts codes, scales and zero points of compressed-tensors to the layouts of the engine's Linears.

    Values that a producer is known to write wrong give a warning, once, for the first module that has them. It goes to
    `on_warning(module name, warning)` if that is given, otherwise to the log.
    """

    def __init__(self, *, codec: Codec = NATIVE, on_warning: Callable[[str, str], object] | None = None) -> None:
        self._codec = codec
        self._on_warning = on_warning or _log_warning
        self._watch = ValueWatch()

    def map_module(self, module: ModulePlan, stored: StoredTensors) -> dict[str, StoredArray]:
        """Return the delivered tensors of one module, by full name.

        `stored` has the tensors that `module.reads` lists, by full name, contiguous and as stored. Inputs are never
        changed, and a tensor that needs no change is returned itself. Memory: the delivered tensors, and for a
        dequantized weight its int8 codes. Raises `PayloadError` for scales that are NaN, infinite, negative or (one per
        tensor) zero, for a `weight_shape` that contradicts the plan, and for values that the delivered dtype can't
        hold.
        """
        if module.pieces:
            return {name: tensor for piece in module.pieces for name, tensor in self._map(piece, stored).items()}
        if module.share is None:
            return self._map(module, stored)
        try:
            made = self._map(module.share.module, stored)
        except PayloadError as error:
            rows = f", in rows {module.share.begin} to {module.share.end}"
            raise PayloadError(*(replace(fault, found=fault.found + rows) for fault in error.faults)) from None
        return {
            delivery.name: self._full_tensor(delivery, module, module.share, made, stored)
            for delivery in module.deliveries
        }

    def _full_tensor(
        self,
        delivery: Delivery,
        module: ModulePlan,
        share: Share,
        made: StoredTensors,
        stored: StoredTensors,
    ) -> StoredArray:
        """Return a delivered tensor of full shape, of which only the rows of the rank's share are filled.

        `made` are the tensors that the plan of the share delivers.
        """
        source, place = delivery.operation.source, share.places.get(delivery.name)
        if delivery.name in share.views and source is not None:
            whole = {source: module.views[source].of(stored)}
            return _run(delivery, ModuleTensors(whole, None, self._codec))
        return made[delivery.name] if place is None else _placed(delivery.spec, made[delivery.name], place)

    def _map(self, module: ModulePlan, stored: StoredTensors) -> dict[str, StoredArray]:
        """Return the delivered tensors of a module without a share; the module may be some rows of another one."""
        local = self.checked(module, stored)
        tensors = self.tensors(module, local)
        return {delivery.name: self.run(module, delivery, tensors) for delivery in module.deliveries}

    def checked(self, module: ModulePlan, stored: StoredTensors) -> dict[str, StoredArray]:
        """Return the checked tensors of a module by local name.

        `stored` has the tensors by full name, as for `map_module`. Raises `PayloadError` for values that may not be
        delivered.
        """
        local = module.local_tensors(stored)
        for warning in self._watch.look(module, local):
            self._on_warning(module.name, warning)
        faults = FaultCollector()
        check_payload(module, local, faults)
        faults.raise_if_any(PayloadError)
        return local

    def tensors(self, module: ModulePlan, local: StoredTensors, first_row: int = 0) -> ModuleTensors:
        """Return the input of a module's operations.

        If the module is some rows of another one, `first_row` is the number of the first of them there.
        """
        return ModuleTensors(local, module.weight, self._codec, first_row)

    def run(self, module: ModulePlan, delivery: Delivery, tensors: ModuleTensors) -> StoredArray:
        """Return one delivered tensor; raises `PayloadError` for values that it can't hold."""
        try:
            return _run(delivery, tensors)
        except PayloadError as error:
            raise PayloadError(*(_located(fault, module.name) for fault in error.faults)) from None


def _log_warning(module: str, warning: str) -> None:
    logger.warning("%s: %s", module, warning)


def _placed(spec: TensorSpec, rows: StoredArray, place: Place) -> StoredArray:
    """Return a tensor with dtype and shape `spec` that has `rows` at `place`.

    Its other rows are never written, so that they take no memory.
    """
    whole = empty(spec.shape, spec.dtype)
    whole[place.at : place.at + place.count] = rows.elements[place.first : place.first + place.count]
    return StoredArray(whole, spec.dtype)


def _located(fault: Fault, module: str) -> Fault:
    """Return the fault with the module's name added if it has only a local name; formats and layouts know no others."""
    return fault if fault.where.startswith(module) else replace(fault, where=f"{module}.{fault.where}")


def _run(delivery: Delivery, tensors: ModuleTensors) -> StoredArray:
    """Run one operation and check its result: contiguous, with the dtype and shape that the plan promised."""
    tensor = delivery.operation.run(delivery.name, tensors)
    spec = delivery.spec
    is_contiguous = tensor.elements.flags.c_contiguous
    if tensor.spec != spec or not is_contiguous:
        found = f"{tensor.spec}, contiguous: {is_contiguous}"
        raise AssertionError(f"{delivery.name}: the plan promised {spec}, {delivery.operation.label} gave {found}")
    return tensor
