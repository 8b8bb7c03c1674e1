"""The converted side: rows of a delivered weight as codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from trtllm_ct.reference.linear_layouts import LAYOUTS, checked_layout
from trtllm_ct.verify.native_layouts import NATIVE_LAYOUTS, Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.reference.rules import TensorRule
    from trtllm_ct.verify.source.coded import Coded
    from trtllm_ct.verify.source.files import SourceTensor

__all__ = ["NativeWeight"]


@dataclass(frozen=True, kw_only=True)
class NativeWeight:
    """The weight [N, K] that a quantized Linear multiplies its input with, including `pre_quant_scale`.

    `tensors` are the delivered tensors of the module without its bias. Ranges of rows begin at
    an even row, and one that does not begin at a multiple of 128 stays within one block of 128 rows.
    """

    name: str
    tensors: Mapping[str, SourceTensor]
    layer: LayerQuantConfig
    shape: tuple[int, int]

    def check(self) -> None:
        """Raise `PlanError` for tensors that are missing, surplus, or of a wrong dtype or shape; reads none."""
        rows, columns = self.shape
        checked_layout(self.tensors, layer=self.layer, in_features=columns, out_features=rows, name=self.name)

    def coded(self, begin: int, end: int) -> Coded:
        """Return rows `begin` to `end` as codes and scales, without `pre_quant_scale`."""
        parts = {rule.name: self._part(rule, name, begin, end) for rule, name in self._given}
        return NATIVE_LAYOUTS[self.layer.quant_algo](parts)

    @cached_property
    def column_factors(self) -> NDArray[np.float64] | None:
        """The numbers of `pre_quant_scale`, which multiply columns; None if they change nothing."""
        if "pre_quant_scale" not in self._whole:
            return None
        numbers = self._whole["pre_quant_scale"].numbers
        return None if (numbers == 1).all() else numbers

    def _part(self, rule: TensorRule, name: str, begin: int, end: int) -> Part:
        """Return the part of a tensor that belongs to some rows of the weight; all of it if it has no rows."""
        if not _has_rows(rule):
            return self._whole[name]
        height = int(rule.shape[0].removeprefix("N").lstrip("/") or 1)
        tensor = self.tensors[name]
        return Part(tensor.rows(begin // height, -(-end // height)), tensor.dtype)

    @cached_property
    def _given(self) -> tuple[tuple[TensorRule, str], ...]:
        """The rules of the tensors that exist, each with the name that the tensor has here."""
        rules = LAYOUTS[self.layer.quant_algo].tensors
        return tuple((rule, name) for rule in rules for name in rule.names if name in self.tensors)

    @cached_property
    def _whole(self) -> dict[str, Part]:
        """The tensors that have no rows: scalars and vectors of columns."""
        names = [name for rule, name in self._given if not _has_rows(rule)]
        return {name: Part(self.tensors[name].whole(), self.tensors[name].dtype) for name in names}


def _has_rows(rule: TensorRule) -> bool:
    """Whether the first axis of a tensor counts rows of the weight, or blocks of rows."""
    return bool(rule.shape) and rule.shape[0].startswith("N")
