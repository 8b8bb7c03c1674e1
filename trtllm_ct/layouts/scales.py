"""Scales and zero points: conversion to engine shapes, and dequantization.

Inside this package `value = (code - zero_point) * scale / divisor`, where zero point and divisor are optional.
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
    """Scale, zero point and divisor of one quantized weight [N, K].

    `scale` is [1, 1], [N, 1], [N, ceil(K / group_columns)], or [ceil(N / block_rows), ceil(K / group_columns)]. It is a
    float, or uint8 for powers of two (E8M0). The last group or block may be smaller.
    `group_columns` is None when a row has only one scale.
    `zero_point` is int8 and has the shape of the scale.
    `group_index` [K] gives the group of each column when groups are not contiguous.
    `divisor` has one element.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    group_columns: int | None = None
    block_rows: int = 1
    group_index: Tensor | None = None
    divisor: Tensor | None = None


def widen_scale(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a scale [rows, groups] as float32 in the shape that the engine's Linear reads, by repeating its values.

    `shape` is [] for a scalar, [N] for one scale per row, or [N, G], where N and G are multiples of the stored rows and
    groups.
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
    """Return the offset that the engine adds after scaling: -(zero_point) * scale, float32 [N, G].

    (code - zero_point) * scale == code * scale + additive_zero. The product of a 16-bit scale and a code is exact in
    float32. A zero point of 0 gives +0.0, never -0.0.
    """
    import torch

    return -(zero_point_OG.to(torch.float32) * scale_OG.to(torch.float32)) + 0.0


def scale_values(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a stored scale as float32 or float64 (`dtype`): floats are cast, uint8 is decoded as E8M0."""
    import torch

    return power_of_two(scale, dtype) if scale.dtype == torch.uint8 else scale.to(dtype)


def computing_dtype(scaling: Scaling, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which to multiply scales and codes before the result is rounded to `dtype`.

    It is float32 when the products are exact there: a scale of at most 16 bits times a code of at most 9 bits. Other
    products are computed in float64, and so are all products for a float64 result: E8M0 scales reach the limit of
    float32, so that a product may exceed it.
    Division by a divisor is done in float64, whose error is far below the precision of a delivered dtype.
    """
    import torch

    exact_in_float32 = scaling.divisor is None and scaling.scale.dtype not in {torch.float32, torch.float64}
    return torch.float32 if exact_in_float32 and dtype != torch.float64 else torch.float64


def dequantize(values_OI: Tensor, scaling: Scaling, dtype: torch.dtype) -> Tensor:
    """Dequantize codes [N, K] to weights of `dtype`; each is the exact value, rounded once.

    `values_OI` holds int8 or float8 codes, or numbers that are already decoded to a wider float.
    Peak memory: the result plus a tile of float64.
    """
    import torch

    rows, columns = values_OI.shape
    result = torch.empty((rows, columns), dtype=dtype, device=values_OI.device)
    working_dtype, group_columns = computing_dtype(scaling, dtype), scaling.group_columns or columns
    group_of_column = scaling.group_index.long() if scaling.group_index is not None else None
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        tile_rows = torch.arange(start, min(start + step, rows), device=values_OI.device)

        def expand(per_group: Tensor, tile_rows: Tensor = tile_rows) -> Tensor:
            per_row = per_group if per_group.shape[0] == 1 else _rows(per_group, tile_rows // scaling.block_rows)
            return _per_column(scale_values(per_row, working_dtype), group_columns, columns, group_of_column)

        values = values_OI[start : start + step].to(working_dtype, copy=True)
        if scaling.zero_point is not None:
            values -= expand(scaling.zero_point)
        values *= expand(scaling.scale)
        if scaling.divisor is not None:
            values /= scaling.divisor.to(working_dtype)
        result[start : start + step] = round_once(values, dtype)
    return result


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return `values[rows]`; float8 is moved as bytes, because torch before 2.10 can't index it on the CPU."""
    import torch

    if values.is_floating_point() and values.dtype.itemsize == 1:
        return values.view(torch.uint8)[rows].view(values.dtype)
    return values[rows]


def _per_column(per_group: Tensor, group_columns: int, columns: int, group_of_column: Tensor | None) -> Tensor:
    """Expand values per group [rows, G] to values per column [rows, K]; a single group stays [rows, 1] to broadcast."""
    if per_group.shape[1] == 1:
        return per_group
    if group_of_column is not None:
        return per_group[:, group_of_column]
    return per_group.repeat_interleave(group_columns, dim=1)[:, :columns]
