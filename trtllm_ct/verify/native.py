"""The converted side: rows of a delivered weight, read by the reference engine's layouts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from trtllm_ct.reference.linear import ReferenceLinear
from trtllm_ct.reference.linear_layouts import LAYOUTS
from trtllm_ct.verify.source.coded import Coded

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.reference.rules import TensorRule
    from trtllm_ct.verify.source.files import SourceTensor

__all__ = ["NativeWeight"]


@dataclass(frozen=True, kw_only=True)
class NativeWeight:
    """The weight [N, K] that a quantized Linear multiplies its input with, including `pre_quant_scale`.

    `tensors` are the delivered tensors of the module without its bias. Rows are asked for from an even one on, and none
    of them lies in another block of 128 rows unless the first row begins one.
    """

    name: str
    tensors: Mapping[str, SourceTensor]
    layer: LayerQuantConfig
    shape: tuple[int, int]

    def check(self) -> None:
        """Raise `PlanError` for tensors that are missing, surplus, or of a wrong dtype or shape; reads none."""
        rows, columns = self.shape
        headers = {
            local: torch.empty(tensor.shape, dtype=tensor.dtype.torch_dtype, device="meta")
            for local, tensor in self.tensors.items()
        }
        ReferenceLinear(headers, layer=self.layer, in_features=columns, out_features=rows, name=self.name)

    def coded(self, begin: int, end: int) -> Coded:
        """Return rows `begin` to `end` as codes and scales, without `pre_quant_scale`."""
        weight = LAYOUTS[self.layer.quant_algo].decode(self._parts(begin, end))
        scale = weight.scale.double()
        if weight.factor is not None:
            scale = scale * weight.factor.double()
        return Coded(
            codes=(weight.codes if weight.codes.dtype is torch.int8 else weight.codes.view(torch.uint8)).numpy(),
            scale=scale.numpy(),
            width=weight.width,
            offset=None if weight.zero is None else weight.zero.double().numpy(),
        )

    @cached_property
    def column_factors(self) -> NDArray[np.float64] | None:
        """The numbers of `pre_quant_scale`, which multiply columns; None if they change nothing."""
        scale = self._whole.get("pre_quant_scale")
        return None if scale is None or bool((scale == 1).all()) else scale.double().numpy()

    def _parts(self, begin: int, end: int) -> dict[str, Tensor]:
        """Return the parts of all tensors that belong to some rows, by their names in the reference engine."""
        rules = LAYOUTS[self.layer.quant_algo].tensors
        given = [(rule, name) for rule in rules for name in rule.names if name in self.tensors]
        return {rule.name: self._part(rule, name, begin, end) for rule, name in given}

    def _part(self, rule: TensorRule, name: str, begin: int, end: int) -> Tensor:
        """Return the part of a tensor that belongs to some rows of the weight; the whole if it has no rows."""
        axis = rule.shape[0] if rule.shape else ""
        if not axis.startswith("N"):
            return self._whole[name]
        height = int(axis.removeprefix("N").lstrip("/") or 1)
        tensor = self.tensors[name]
        return _as_torch(tensor, begin // height, -(-end // height))

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """The tensors that have no rows: scalars and vectors of columns."""
        ends = {name: tensor.shape[0] if tensor.shape else 1 for name, tensor in self.tensors.items()}
        rules = [rule for rule in LAYOUTS[self.layer.quant_algo].tensors if not "".join(rule.shape[:1]).startswith("N")]
        names = [name for rule in rules for name in rule.names if name in self.tensors]
        return {name: _as_torch(self.tensors[name], 0, ends[name]).reshape(self.tensors[name].shape) for name in names}


def _as_torch(tensor: SourceTensor, begin: int, end: int) -> Tensor:
    """Return rows of a tensor in its torch dtype."""
    return torch.from_numpy(tensor.rows(begin, end)).view(tensor.dtype.torch_dtype)
