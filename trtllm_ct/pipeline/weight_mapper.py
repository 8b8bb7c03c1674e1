"""CompressedTensorsWeightMapper: `ModuleMapper` for users of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.formats.codecs import NATIVE, Codec
from trtllm_ct.layouts.torch_tensors import array_of, tensors_of
from trtllm_ct.pipeline.mapper import ModuleMapper

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["CompressedTensorsWeightMapper"]


class CompressedTensorsWeightMapper:
    """Converts codes, scales and zero points of compressed-tensors to the layouts of the engine's Linears.

    Values that a producer is known to write wrong give a warning, once, for the first module that has them. It goes to
    `on_warning(module name, warning)` if that is given, otherwise to the log.
    """

    def __init__(self, *, codec: Codec = NATIVE, on_warning: Callable[[str, str], object] | None = None) -> None:
        self._mapper = ModuleMapper(codec=codec, on_warning=on_warning)

    def map_module(self, module: ModulePlan, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the delivered tensors of one module, by full name, on the CPU.

        `stored` has the tensors that `module.reads` lists, by full name and as stored. Inputs are never changed, and a
        tensor that needs no change shares the memory of its input. For memory and errors see `ModuleMapper.map_module`.
        """
        return tensors_of(self._mapper.map_module(module, {name: array_of(stored[name]) for name in module.reads}))

    def map_weights(self, plan: Plan, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the delivered tensors of all modules of a plan, for stored tensors that are in memory already."""
        delivered: dict[str, Tensor] = {}
        for module in plan.modules:
            delivered |= self.map_module(module, stored)
        return delivered
