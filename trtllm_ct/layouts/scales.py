"""Scales and zero points: expanding, widening, and the arithmetic of dequantization.

Inside this package `value = (code - zero_point) * scale`.
Axis letters: `O` out (rows, N), `I` in (columns, K), `G` groups along K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.layouts.rounding import round_once

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["additive_zero", "dequantize", "widen_scale"]

_TILE_ELEMENTS = 1 << 20  # float64 intermediates of a tile: 8 MiB each


def widen_scale(scale: Tensor, stored_shape: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """A scale as float32 in the shape that an engine's Linear reads; repeating is exact, so no value changes.

    `scale` holds one scale per tensor, row or group in any shape; `stored_shape` is that as (rows, groups), 1 where
    shared. `shape` is [] for one scalar, [N] for one per row, or [N, G] with G a multiple of the stored groups.
    """
    import torch

    wide = scale.to(torch.float32).reshape(stored_shape)
    if len(shape) == 2:
        rows, groups = shape
        wide = wide.repeat_interleave(groups // stored_shape[1], dim=1).expand(rows, groups)
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


def dequantize(
    codes_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor | None, group_size: int | None, dtype: torch.dtype
) -> Tensor:
    """Codes (int8 or float8, [N, K]) to weights of `dtype`, each the exact value rounded once.

    `scale_OG` is [1, 1], [N, 1] or [N, ceil(K / group_size)]; the last group may be shorter.
    `zero_point_OG` has the shape of the scale or is None. Peak memory: the result plus a tile of float64.
    """
    import torch

    rows, columns = codes_OI.shape
    span = group_size or columns
    result = torch.empty((rows, columns), dtype=dtype, device=codes_OI.device)
    # A 16-bit scale times a code of at most 9 bits is exact in float32; a float32 scale needs the wider product.
    wide = torch.float64 if scale_OG.dtype in {torch.float32, torch.float64} else torch.float32
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = codes_OI[part].to(wide)
        if zero_point_OG is not None:
            values -= _per_column(_rows(zero_point_OG, part).to(wide), span, columns)
        values *= _per_column(_rows(scale_OG, part).to(wide), span, columns)
        result[part] = round_once(values, dtype)
    return result


def _rows(per_row: Tensor, part: slice) -> Tensor:
    """The rows of a scale that belong to a tile; a scale shared by all rows stays as it is."""
    return per_row if per_row.shape[0] == 1 else per_row[part]


def _per_column(per_group: Tensor, span: int, columns: int) -> Tensor:
    """One value per column from one per group; a single group broadcasts by itself."""
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(span, dim=1)[:, :columns]
