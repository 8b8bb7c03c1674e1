"""Scales and zero points: expanding, widening, and the arithmetic of dequantization.

Inside this package `value = (code - zero_point) * scale / divisor`, where zero point and divisor may be missing.
Axis letters: `O` out (rows, N), `I` in (columns, K), `G` groups along K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.layouts.floats import power_of_two
from trtllm_ct.layouts.rounding import round_once

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Scaling", "additive_zero", "computing_dtype", "dequantize", "scale_values", "widen_scale"]

_TILE_ELEMENTS = 1 << 20  # float64 intermediates of a tile: 8 MiB each


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What makes numbers of the codes of one weight [N, K].

    `scale` is [1, 1], [N, 1], [N, ceil(K / group_columns)], or [ceil(N / block_rows), ceil(K / group_columns)], a float
    or uint8 for powers of two (E8M0); the last group or block may be smaller. `group_columns` is None where a row has
    one scale. `zero_point` is int8 of the shape of the scale. `group_index` [K] gives the group of each column where
    groups are not contiguous. `divisor` is one element.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    group_columns: int | None = None
    block_rows: int = 1
    group_index: Tensor | None = None
    divisor: Tensor | None = None


def widen_scale(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale (rows, groups) as float32 in the shape that an engine's Linear reads; repeating changes no value.

    `shape` is [] for one scalar, [N] for one per row, or [N, G] with N and G multiples of the stored rows and groups.
    """
    import torch

    wide = scale.to(torch.float32)
    if len(shape) == 2 and shape[1] != wide.shape[1]:
        wide = wide.repeat_interleave(shape[1] // wide.shape[1], dim=1)
    if len(shape) == 2:
        wide = wide.expand(shape)
    elif len(shape) == 1:
        wide = wide.expand(shape[0], 1)
    return wide.reshape(shape).contiguous()


def additive_zero(scale_OG: Tensor, zero_point_OG: Tensor) -> Tensor:
    """The offset that an engine adds after scaling: -(zero_point) * scale, float32 [N, G].

    (code - zero_point) * scale == code * scale + additive_zero. The product of a 16-bit scale and a code is exact in
    float32. Minus zero is turned into zero, so that a zero point of 0 leaves no trace.
    """
    import torch

    return -(zero_point_OG.to(torch.float32) * scale_OG.to(torch.float32)) + 0.0


def scale_values(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored scale as numbers of `dtype`, float32 or float64: floats as they are, uint8 as powers of two (E8M0)."""
    import torch

    return power_of_two(scale, dtype) if scale.dtype == torch.uint8 else scale.to(dtype)


def computing_dtype(scaling: Scaling, dtype: torch.dtype) -> torch.dtype:
    """In which dtype products of scales and codes are exact before they are rounded to `dtype`, if they can be.

    A scale of at most 16 bits times a code of at most 9 is exact in float32; anything else needs the wider product.
    Powers of two reach the end of float32, where a product may pass it; float64 as a result has room for it.
    The quotient by a divisor is taken in float64, whose error is far below what a delivered dtype can show.
    """
    import torch

    exact_in_float32 = scaling.divisor is None and scaling.scale.dtype not in {torch.float32, torch.float64}
    return torch.float32 if exact_in_float32 and dtype != torch.float64 else torch.float64


def dequantize(values_OI: Tensor, scaling: Scaling, dtype: torch.dtype) -> Tensor:
    """Codes (int8, float8 or values already, [N, K]) to weights of `dtype`, each the exact value rounded once.

    Peak memory: the result plus a tile of float64.
    """
    import torch

    rows, columns = values_OI.shape
    result = torch.empty((rows, columns), dtype=dtype, device=values_OI.device)
    wide, span = computing_dtype(scaling, dtype), scaling.group_columns or columns
    group_of_column = scaling.group_index.long() if scaling.group_index is not None else None
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        tile = torch.arange(start, min(start + step, rows), device=values_OI.device)

        def spread(per_group: Tensor, tile: Tensor = tile) -> Tensor:
            own = per_group if per_group.shape[0] == 1 else per_group[tile // scaling.block_rows]
            return _per_column(scale_values(own, wide), span, columns, group_of_column)

        values = values_OI[start : start + step].to(wide, copy=True)
        if scaling.zero_point is not None:
            values -= spread(scaling.zero_point)
        values *= spread(scaling.scale)
        if scaling.divisor is not None:
            values /= scaling.divisor.to(wide)
        result[start : start + step] = round_once(values, dtype)
    return result


def _per_column(per_group: Tensor, span: int, columns: int, group_of_column: Tensor | None) -> Tensor:
    """One value per column from one per group; a single group broadcasts by itself."""
    if per_group.shape[1] == 1:
        return per_group
    if group_of_column is not None:
        return per_group[:, group_of_column]
    return per_group.repeat_interleave(span, dim=1)[:, :columns]
