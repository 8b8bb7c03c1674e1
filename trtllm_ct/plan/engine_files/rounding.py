"""Which tensors of a module are rounded to the model's dtype in an engine, and by how much its weights change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.engine.build_mode import Content

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.engine.build_mode import BuildMode
    from trtllm_ct.engine.holdings import Weight

__all__ = ["rounded_tensors"]

_PRECISION: Mapping[DType, int] = {DType.BF16: 8, DType.F16: 11, DType.F32: 24, DType.F64: 53}
"""The significant bits of a number: rounding to the nearest changes it by at most 2^-bits of itself."""


def rounded_tensors(mode: BuildMode, weight: Weight, dtype: DType) -> list[str]:
    """Return what is rounded to `dtype`, the model's, with the bound of the change; empty if nothing is.

    A product of zero point and scale has more bits than either, so that zeros are rounded whatever the scale's dtype.
    The bound is that of numbers in the normal range of a dtype; in float16 it ends at 2^-14.
    """
    bits = _PRECISION.get(dtype)
    stored = weight.scale_dtype
    if bits is None:
        return []
    changes = []
    if mode.scales_in_dtype and stored is not None and _PRECISION.get(stored, 0) > bits:
        changes.append(
            f"scales are rounded from {stored.torch_name} to {dtype.torch_name}: by at most 2^-{bits} of themselves"
        )
    if weight.has_zero_point and any(tensor.content is Content.ZERO for tensor in mode.tensors):
        changes.append(
            f"zeros, -(zero point) * scale, are rounded to {dtype.torch_name}: by at most 2^-{bits} of themselves"
        )
    return changes
