"""Operations of torch that do the same as the functions of `layouts/`: the package had them before it used numpy.

They share no code with those functions, and torch computes and rounds by itself.
"""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING

import torch

from trtllm_ct.layouts.packing import run_size

if TYPE_CHECKING:
    from on_tensors import Scaling
    from torch import Tensor

    from trtllm_ct.base.schemes import Packing

_TILE_ELEMENTS = 1 << 20
_OUT_OF_RANGE = 64
_E8M0 = (*(2.0 ** (exponent - 127) for exponent in range(255)), nan)


def unpack_codes(packed_OP: Tensor, packing: Packing, shape: tuple[int, int]) -> Tensor:
    """Return the signed codes in a container: int8 of `shape`, in [-2^(bits-1), 2^(bits-1) - 1].

    The container has the shape `packing.packed_shape(shape)`, or surplus elements along either axis, which are ignored.
    """
    return _signed(unpack_fields(packed_OP, packing, shape), packing)


def unpack_fields(packed_OP: Tensor, packing: Packing, shape: tuple[int, int]) -> Tensor:
    """Return the bit pattern of each code as it is stored: uint8 of `shape`, in [0, 2^bits - 1]."""
    streams = _byte_streams(packed_OP, packing)
    fields = _split_stream(streams, packing)
    if packing.axis == 0:
        fields = fields.T
    return fields[: shape[0], : shape[1]].contiguous()


def pack_codes(codes_OI: Tensor, packing: Packing) -> Tensor:
    """Pack signed int8 codes into a container: the inverse of `unpack_codes`.

    Returns a contiguous tensor of the container's dtype and of shape `packing.packed_shape(codes.shape)`. The unused
    bits of the last element are zero.
    """
    half = 1 << (packing.bits - 1)
    unsigned = codes_OI.view(torch.uint8) + half if packing.offset_binary else codes_OI.view(torch.uint8)
    return pack_fields(unsigned & ((1 << packing.bits) - 1), packing)


def pack_fields(fields_OI: Tensor, packing: Packing) -> Tensor:
    """Pack uint8 fields of `packing.bits` bits into a container: the inverse of `unpack_fields`."""
    lines = fields_OI if packing.axis == 1 else fields_OI.T
    width = packing.elements(lines.shape[1]) * packing.container.itemsize
    streams = _join_stream(lines, packing)
    padded = torch.zeros((lines.shape[0], width), dtype=torch.uint8)
    used = min(width, streams.shape[1])
    padded[:, :used] = streams[:, :used]
    packed = padded.view(packing.container.torch_dtype)
    return packed if packing.axis == 1 else _transposed(packed)


def repack(packed: Tensor, source: Packing, target: Packing, shape: tuple[int, int]) -> Tensor:
    """Convert codes of `shape` from one packing to another."""
    return packed if source == target else pack_codes(unpack_codes(packed, source, shape), target)


def _byte_streams(packed: Tensor, packing: Packing) -> Tensor:
    """Return the container as uint8 [lines, bytes]: one line per row (axis 1) or per column (axis 0).

    This relies on little-endian byte order, which safetensors prescribes and which the supported machines have.
    """
    lines = packed.contiguous() if packing.axis == 1 else _transposed(packed)
    return lines.view(torch.uint8)


def _transposed(matrix: Tensor) -> Tensor:
    """Return a transposed copy.

    `.T.contiguous()` does not copy a matrix of one row or column: torch treats it as contiguous, but with strides that
    can't be viewed as another dtype.
    """
    return matrix.T.clone(memory_format=torch.contiguous_format)


def _split_stream(streams: Tensor, packing: Packing) -> Tensor:
    """Split bytes [lines, bytes] into fields, uint8 [lines, codes].

    A field lies in one byte or straddles two; then its low bits are the highest bits of the first byte.
    """
    size, count = run_size(packing)
    if count == 1:
        return streams
    padded = torch.nn.functional.pad(streams, (0, -streams.shape[1] % size))
    runs = padded.reshape(padded.shape[0], padded.shape[1] // size, size)
    fields = torch.empty((*runs.shape[:2], count), dtype=torch.uint8)
    for i in range(count):
        byte, shift = divmod(i * packing.bits, 8)
        torch.bitwise_right_shift(runs[..., byte], shift, out=fields[..., i])
        if shift + packing.bits > 8:
            fields[..., i] |= runs[..., byte + 1] << (8 - shift)
    fields &= (1 << packing.bits) - 1
    return fields.flatten(1)


def _join_stream(lines: Tensor, packing: Packing) -> Tensor:
    """Join fields [lines, codes] into bytes, with the last run padded by zero bits: the inverse of `_split_stream`."""
    size, count = run_size(packing)
    if count == 1:
        return lines
    padded = torch.nn.functional.pad(lines, (0, -lines.shape[1] % count))
    runs = padded.reshape(padded.shape[0], padded.shape[1] // count, count)
    streams = torch.zeros((*runs.shape[:2], size), dtype=torch.uint8)
    for i in range(count):
        byte, shift = divmod(i * packing.bits, 8)
        streams[..., byte] |= runs[..., i] << shift
        if shift + packing.bits > 8:
            streams[..., byte + 1] |= runs[..., i] >> (8 - shift)
    return streams.flatten(1)


def _signed(fields: Tensor, packing: Packing) -> Tensor:
    """Convert fields of `packing.bits` bits to signed int8 codes."""
    half = 1 << (packing.bits - 1)
    # The top bit of two's complement counts as -half; flipping it gives offset binary, code + half.
    offset = fields if packing.offset_binary else fields ^ half
    # The subtraction wraps around in uint8; read as int8, the result is the signed code.
    return (offset - half).view(torch.int8)


def widen_scale(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a scale [rows, groups] as float32 in the shape that the engine's Linear reads, by repeating its values.

    `shape` is [] for a scalar, [N] for one scale per row, or [N, G], where N and G are multiples of the stored rows and
    groups.
    """
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
    return -(zero_point_OG.to(torch.float32) * scale_OG.to(torch.float32)) + 0.0


def scale_values(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a stored scale as float32 or float64 (`dtype`): floats are cast, uint8 is decoded as E8M0."""
    return power_of_two(scale, dtype) if scale.dtype == torch.uint8 else scale.to(dtype)


def computing_dtype(scaling: Scaling, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which to multiply scales and codes before the result is rounded to `dtype`.

    It is float32 when the products are exact there: a scale of at most 16 bits times a code of at most 9 bits. Other
    products are computed in float64, and so are all products for a float64 result: E8M0 scales reach the limit of
    float32, so that a product may exceed it.
    Division by a divisor is done in float64, whose error is far below the precision of a delivered dtype.
    """
    exact_in_float32 = scaling.divisor is None and scaling.scale.dtype not in {torch.float32, torch.float64}
    return torch.float32 if exact_in_float32 and dtype != torch.float64 else torch.float64


def dequantize(values_OI: Tensor, scaling: Scaling, dtype: torch.dtype) -> Tensor:
    """Dequantize codes [N, K] to weights of `dtype`; each is the exact value, rounded once.

    `values_OI` holds int8 or float8 codes, or numbers that are already decoded to a wider float.
    Peak memory: the result plus a tile of float64.
    """
    rows, columns = values_OI.shape
    result = torch.empty((rows, columns), dtype=dtype)
    working_dtype, group_columns = computing_dtype(scaling, dtype), scaling.group_columns or columns
    group_of_column = scaling.group_index.long() if scaling.group_index is not None else None
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        tile_rows = torch.arange(start, min(start + step, rows))

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


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `values` (float64 or float32, any shape) to `dtype`: to nearest, ties to even, exactly once.

    torch's own conversion rounds once for float32 inputs and for float32 or float64 results, so that these use it.
    """
    if values.dtype != torch.float64 or dtype in {torch.float32, torch.float64}:
        return values.to(dtype)
    return _round_to_odd_float32(values).to(dtype)


def _round_to_odd_float32(values: Tensor) -> Tensor:
    """Round float64 to odd float32: exact values stay, others become the neighbour whose last mantissa bit is one.

    Rounding to odd requires at least two more mantissa bits than the final dtype; float32 has these for bfloat16 and
    float16.
    """
    nearest = values.to(torch.float32)
    widened = nearest.to(torch.float64)
    even = (nearest.view(torch.int32) & 1) == 0
    inexact = (widened != values) & nearest.isfinite()
    direction = torch.where(values > widened, torch.inf, -torch.inf).to(torch.float32)
    return torch.where(inexact & even, torch.nextafter(nearest, direction), nearest)


def shift_scale(scale: Tensor, power: int) -> Tensor | None:
    """Return `scale` (float8_e4m3fn, any shape) times 2^`power`, or None when E4M3 can't represent some product."""
    # Beyond these bounds every product but zero is out of E4M3's range; within them float32 holds 2^power.
    factor = 2.0 ** max(-_OUT_OF_RANGE, min(_OUT_OF_RANGE, power))
    wide = scale.to(torch.float32) * factor
    shifted = wide.to(torch.float8_e4m3fn)
    exact = torch.equal(shifted.to(torch.float32), wide) and torch.equal(wide == 0, scale.to(torch.float32) == 0)
    return shifted if exact else None


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 E8M0 exponents e, any shape, to 2^(e - 127) in `dtype`, float32 or float64; 255 gives NaN."""
    return _look_up(_E8M0, exponent, dtype)


def _look_up(table: tuple[float, ...], fields: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `table[field]` for each field."""
    return torch.tensor(table, dtype=dtype)[fields.long()]
