"""Scales and zero points: conversion to engine shapes, and dequantization.

Inside this package `value = (code - zero_point) * scale / divisor`, where zero point and divisor are optional.
Axis letters: `O` out (rows, N), `I` in (columns, K), `G` groups along K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.layouts.rounding import round_once
from trtllm_ct.layouts.stored_array import StoredArray, numpy_dtype

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Scaling", "additive_zero", "computing_dtype", "dequantize", "scale_values", "widen_scale"]

_TILE_ELEMENTS = 1 << 20  # float64 intermediates of a tile: 8 MiB each


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scaling:
    """Scale, zero point and divisor of one quantized weight [N, K].

    `scale` is [1, 1], [N, 1], [N, ceil(K / group_columns)], or [ceil(N / block_rows), ceil(K / group_columns)]. It is a
    float, or uint8 for powers of two (E8M0). The last group or block may be smaller.
    `group_columns` is None when a row has only one scale.
    `zero_point` is int8 and has the shape of the scale.
    `group_index` [K] gives the group of each column when groups are not contiguous.
    """

    scale: StoredArray
    zero_point: NDArray[np.int8] | None = None
    group_columns: int | None = None
    block_rows: int = 1
    group_index: NDArray[Any] | None = None
    divisor: float = 1.0


def widen_scale(scale: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a scale [rows, groups] as float32 in the shape that the engine's Linear reads, by repeating its values.

    `shape` is [] for a scalar, [N] for one scale per row, or [N, G], where N and G are multiples of the stored rows and
    groups.
    """
    import numpy as np

    wide = scale.astype(np.float32, copy=False)
    if len(shape) == 2 and shape[1] != wide.shape[1]:
        wide = np.repeat(wide, shape[1] // wide.shape[1], axis=1)
    if shape and shape[0] != wide.shape[0]:
        wide = np.repeat(wide, shape[0], axis=0)
    return np.ascontiguousarray(wide).reshape(shape)


def additive_zero(scale_OG: NDArray[Any], zero_point_OG: NDArray[Any]) -> NDArray[np.float32]:
    """Return the offset that the engine adds after scaling: -(zero_point) * scale, float32 [N, G].

    (code - zero_point) * scale == code * scale + additive_zero. The product of a 16-bit scale and a code is exact in
    float32. A zero point of 0 gives +0.0, never -0.0.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        offset: NDArray[np.float32] = -(zero_point_OG.astype(np.float32) * scale_OG.astype(np.float32)) + np.float32(0)
    return offset


def scale_values(scale: StoredArray) -> NDArray[Any]:
    """Return a stored scale as numbers: floats of 32 bits or their own width; uint8 is decoded as E8M0."""
    return (scale.read_as(DType.F8_E8M0) if scale.dtype is DType.U8 else scale).numbers


def computing_dtype(scaling: Scaling, dtype: DType) -> DType:
    """Return the dtype in which to multiply scales and codes before the result is rounded to `dtype`.

    It is float32 when the products are exact there: a scale of at most 16 bits times a code of at most 9 bits. Other
    products are computed in float64, and so are all products for a float64 result: E8M0 scales reach the limit of
    float32, so that a product may exceed it.
    Division by a divisor is done in float64, whose error is far below the precision of a delivered dtype.
    """
    exact_in_float32 = scaling.divisor == 1 and scaling.scale.dtype not in {DType.F32, DType.F64}
    return DType.F32 if exact_in_float32 and dtype is not DType.F64 else DType.F64


def dequantize(values_OI: NDArray[Any], scaling: Scaling, dtype: DType) -> StoredArray:
    """Dequantize codes [N, K] to weights of `dtype`; each is the exact value, rounded once.

    `values_OI` holds int8 codes, or float32 numbers that float codes were decoded to.
    Peak memory: the result plus a tile of float64.
    """
    import numpy as np

    rows, columns = values_OI.shape
    result = np.empty((rows, columns), numpy_dtype(dtype))
    working_dtype, group_columns = numpy_dtype(computing_dtype(scaling, dtype)), scaling.group_columns or columns
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    scale = scale_values(scaling.scale)
    for start in range(0, rows, step):
        blocks = np.arange(start, min(start + step, rows)) // scaling.block_rows

        def expand(per_group: NDArray[Any], blocks: NDArray[Any] = blocks) -> NDArray[Any]:
            per_row = per_group if per_group.shape[0] == 1 else per_group[blocks]
            return _per_column(per_row.astype(working_dtype), group_columns, columns, scaling.group_index)

        values = values_OI[start : start + step].astype(working_dtype)
        with np.errstate(all="ignore"):
            if scaling.zero_point is not None:
                values -= expand(scaling.zero_point)
            values *= expand(scale)
            if scaling.divisor != 1:
                values /= scaling.divisor
        result[start : start + step] = round_once(values, dtype).elements
    return StoredArray(result, dtype)


def _per_column(
    per_group: NDArray[Any], group_columns: int, columns: int, group_of_column: NDArray[Any] | None
) -> NDArray[Any]:
    """Expand values per group [rows, G] to values per column [rows, K]; a single group stays [rows, 1] to broadcast."""
    import numpy as np

    if per_group.shape[1] == 1:
        return per_group
    if group_of_column is not None:
        return per_group[:, group_of_column]
    return np.repeat(per_group, group_columns, axis=1)[:, :columns]
