"""Loops over CPU memory, compiled: one pass from stored bytes to delivered ones, at about the speed of a copy.

numba compiles a loop once for a machine, later processes load what it made: see `machine_code.py`. Loops release the
interpreter lock and use one thread; callers run several. torch operations would pass over the same memory once for each
operation, which is where their time goes. The twin of each loop, of plain torch operations, is in `packing.py` and
`scales.py`: `dispatch.py` chooses, and tests hold one to the other, bit for bit.

All arrays are numpy's, contiguous along the last axis, and made by the caller. Fields are the bits of codes as they are
stored. numba makes 64 bits of integers that meet, so that narrow types are spelled out wherever lanes should stay
narrow. Loops that call each other must stand in one file: when it changes, machine code is made anew, and only then.
Axis letters: `O` out (rows, N), `I` in (columns, K), `B` bytes, `G` groups, `W` words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.dtypes import DType
from trtllm_ct.layouts.loops.machine_code import inner, kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

__all__ = [
    "KINDS",
    "additive_zero",
    "additive_zero_of_words",
    "dequantize",
    "plain_codes",
    "plain_codes_along_rows",
    "row_pairs",
    "row_pairs_of_nibbles",
]

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i32, f32, f64 = np.int8, np.int32, np.float32, np.float64

_BFLOAT16, _FLOAT16, _FLOAT32, _FLOAT64 = range(4)
KINDS = {DType.BF16: _BFLOAT16, DType.F16: _FLOAT16, DType.F32: _FLOAT32, DType.F64: _FLOAT64}
"""What `dequantize` can deliver."""


@kernel
def row_pairs_of_nibbles(halves_OH: NDArray[np.uint16], flip: int, lanes_OH: NDArray[np.uint32]) -> None:
    """Nibbles along K to bytes of two rows: [N, >= K/4] halves of words to [N/2, K/4] lanes of 32 bits.

    Four nibbles of the even row and four of the odd one, which go on top, make the four bytes of a lane. `flip` is
    0x88888888 for codes in offset binary, which differ from two's complement in the top bit of each nibble. Lanes of
    16 bits would take fewer steps; compilers widen those to 64.
    """
    bytes_, low, high = u32(0x00FF00FF), u32(0x000F000F), u32(0x00F000F0)
    pairs, lanes = lanes_OH.shape
    for pair in range(pairs):
        for i in range(lanes):
            even, odd = u32(halves_OH[2 * pair, i]), u32(halves_OH[2 * pair + 1, i])
            # A byte of each half in every other byte of the lane, then their nibbles side by side.
            even = u32(u32(even | u32(even << u32(8))) & bytes_)
            odd = u32(u32(odd | u32(odd << u32(8))) & bytes_)
            first = u32(u32(even & low) | u32(u32(odd & low) << u32(4)))
            second = u32(u32(u32(even & high) << u32(4)) | u32(u32(odd & high) << u32(8)))
            lanes_OH[pair, i] = u32(u32(first | second) ^ u32(flip))


@kernel
def row_pairs(octets_OB: Bytes, run: tuple[int, int, int], flip: int, fields_2I: Bytes, pairs_OI: Bytes) -> None:
    """Codes of any width along K to bytes of two rows: [N, B] to [ceil(N/2), K]; a missing last row is all zero bits.

    `run` is as `unpack_row` takes it, `flip` as `plain_codes` does, `fields_2I` is a buffer. Codes wider than a nibble
    are cut.
    """
    rows, columns = octets_OB.shape[0], pairs_OI.shape[1]
    half = u8(1 << (run[0] - 1))
    even_I, odd_I = fields_2I[0], fields_2I[1]
    for pair in range(pairs_OI.shape[0]):
        pairs_I = pairs_OI[pair]
        unpack_row(octets_OB[2 * pair], run, even_I)
        whole = 2 * pair + 1 < rows
        if whole:
            unpack_row(octets_OB[2 * pair + 1], run, odd_I)
        for k in range(columns):
            even = u8(u8(even_I[k] ^ u8(flip)) - half) & u8(0x0F)
            odd = u8(u8(u8(odd_I[k] ^ u8(flip)) - half) << u8(4)) if whole else u8(0)
            pairs_I[k] = even | odd


@kernel
def plain_codes(octets_OB: Bytes, run: tuple[int, int, int], flip: int, codes_OI: Bytes) -> None:
    """Codes of any width along K, to one signed byte each (as uint8): [N, B] to [N, K].

    `run` is as `unpack_row` takes it. `flip` makes offset binary of a field: 0 where it is that already, the top bit of
    the code for two's complement.
    """
    half = u8(1 << (run[0] - 1))
    if run[0] == 8:
        rows, columns = codes_OI.shape
        for n in range(rows):
            for k in range(columns):
                codes_OI[n, k] = u8(octets_OB[n, k] ^ u8(flip)) - half
        return
    for n in range(codes_OI.shape[0]):
        codes_I = codes_OI[n]
        unpack_row(octets_OB[n], run, codes_I)
        for k in range(codes_I.shape[0]):
            codes_I[k] = u8(codes_I[k] ^ u8(flip)) - half


@kernel
def plain_codes_along_rows(words_WG: NDArray[np.uint32], bits: int, per_word: int, codes_OG: Bytes) -> None:
    """Offset-binary codes along N in words of 32 bits, to one signed byte each (as uint8): [W, >= G] to [N, G].

    `per_word` codes stand in each word; 0 says that codes are one dense stream and may straddle two words.
    """
    mask, half, (rows, groups) = u32((1 << bits) - 1), u32(1 << (bits - 1)), codes_OG.shape
    # Rows are short here: taking them apart as arrays of their own would cost half as much as unpacking them.
    for n in range(rows):
        place = n // per_word * 32 + n % per_word * bits if per_word else n * bits
        word, shift = place // 32, u32(place % 32)
        if place % 32 + bits > 32:
            rest = u32(32 - place % 32)
            for g in range(groups):
                field = u32(u32(words_WG[word, g] >> shift) | u32(words_WG[word + 1, g] << rest))
                codes_OG[n, g] = u8(u32(field & mask) - half)
        else:
            for g in range(groups):
                codes_OG[n, g] = u8(u32(u32(words_WG[word, g] >> shift) & mask) - half)


@kernel
def additive_zero(zero_OG: NDArray[np.int8], scale_OG: NDArray[Any], halves: bool, offset_OG: Floats) -> None:  # noqa: FBT001 (numba has no keywords)
    """-(zero point) * scale, all [N, G], plus zero for minus zero.

    `scale_OG` is float32, or the bits of bfloat16 as uint16: then `halves` says so.
    """
    rows, groups = offset_OG.shape
    for n in range(rows):
        for g in range(groups):
            offset_OG[n, g] = -(f32(i32(zero_OG[n, g])) * float32_of(scale_OG[n, g], halves)) + f32(0)


@kernel
def additive_zero_of_words(
    words_WG: NDArray[np.uint32],
    bits: int,
    per_word: int,
    scale_OG: NDArray[Any],
    halves: bool,  # noqa: FBT001 (numba has no keywords)
    offset_OG: Floats,
) -> None:
    """The same for zero points that are whole codes along N in words of 32 bits, `per_word` in each."""
    mask, half, (rows, groups) = u32((1 << bits) - 1), i32(1 << (bits - 1)), offset_OG.shape
    for n in range(rows):
        word, shift = n // per_word, u32(n % per_word * bits)
        for g in range(groups):
            zero = i32(i32(u32(words_WG[word, g] >> shift) & mask) - half)
            offset_OG[n, g] = -(f32(zero) * float32_of(scale_OG[n, g], halves)) + f32(0)


@kernel
def dequantize(
    octets_OB: Bytes,
    run: tuple[int, int, int],
    meaning: tuple[int, int, int],
    scale_XG: Floats,
    zero_YG: Floats,
    divisor: float,
    block: tuple[int, int],
    group_of_I: NDArray[np.int64],
    fields_I: Bytes,
    numbers_I: NDArray[Any],
    kind: int,
    dense_OB: Bytes,
) -> None:
    """Codes along K to plain numbers of `kind`: [N, B] to [N, K], here as bytes; each is the exact value rounded once.

    value = (code - zero point) * scale / divisor, computed in the dtype of `numbers_I`, a buffer as `fields_I` is:
    float32 if its products are exact, else float64. `run` is as `unpack_row` takes it, and `meaning` as `decode_row`
    does.
    `block` is the (rows, columns) that share a scale; one row of scales or zero points is that of all rows.
    `group_of_I` gives the group of each column, or is empty where groups are contiguous.
    """
    for n in range(dense_OB.shape[0]):
        scale_G = scale_XG[0 if scale_XG.shape[0] == 1 else n // block[0]]
        zero_G = zero_YG[0 if zero_YG.shape[0] == 1 else n // block[0]]
        unpack_row(octets_OB[n], run, fields_I)
        decode_row(fields_I, run[0], meaning, numbers_I)
        if group_of_I.shape[0]:
            scale_by_index(numbers_I, scale_G, zero_G, group_of_I)
        else:
            scale_row(numbers_I, scale_G, zero_G, block[1])
        if divisor != 1.0:
            for k in range(numbers_I.shape[0]):
                numbers_I[k] /= divisor
        round_row(numbers_I, kind, dense_OB[n])


@inner
def float32_of(scale: Any, halves: bool) -> np.float32:  # noqa: FBT001 (numba has no keywords)
    """A scale as a number: the bits of bfloat16 with `halves`, else float32 as it is."""
    return u32(u32(scale) << u32(16)).view(np.float32) if halves else f32(scale)


@inner
def unpack_row(octets_B: Bytes, run: tuple[int, int, int], fields_I: Bytes) -> None:
    """Bytes to the field of each column, lowest bits first.

    `run` is (bits of a field, bytes of a run, fields of a run), where a run is the least number of bytes that begins
    and ends with a whole field; the last one may be cut short.
    """
    bits, size, count = run
    columns = fields_I.shape[0]
    if bits == 8:
        for k in range(columns):
            fields_I[k] = octets_B[k]
    elif bits == 4 and count == 2 * size:
        for i in range(columns // 2):
            fields_I[2 * i] = octets_B[i] & u8(0x0F)
            fields_I[2 * i + 1] = octets_B[i] >> u8(4)
        if columns % 2:
            fields_I[columns - 1] = octets_B[columns // 2] & u8(0x0F)
    else:
        _unpack_stream(octets_B, run, fields_I)


@inner
def _unpack_stream(octets_B: Bytes, run: tuple[int, int, int], fields_I: Bytes) -> None:
    """The same for fields across the borders of bytes: runs of eight by one load of eight bytes, others bit by bit."""
    bits, size, count = run
    mask = u64((1 << bits) - 1)
    fast = min(fields_I.shape[0] // 8, (octets_B.shape[0] - 8) // size) if count == 8 else 0
    for start in range(fast):
        octets_8, fields_8 = octets_B[start * size : start * size + 8], fields_I[start * 8 : start * 8 + 8]
        stream = u64(0)
        for i in range(8):
            stream |= u64(octets_8[i]) << u64(8 * i)
        for i in range(8):
            fields_8[i] = u8((stream >> u64((bits * i) & 63)) & mask)
    for k in range(max(fast, 0) * 8, fields_I.shape[0]):
        place = k // count * size * 8 + k % count * bits
        first, second = place // 8, min(place // 8 + 1, octets_B.shape[0] - 1)
        pair = u32(octets_B[first]) | u32(u32(octets_B[second]) << u32(8))
        fields_I[k] = u8(u64(pair >> u32(place % 8)) & mask)


@inner
def decode_row(fields_I: Bytes, bits: int, meaning: tuple[int, int, int], numbers_I: NDArray[Any]) -> None:
    """What fields of `bits` bits mean, as floats.

    `meaning` is (-1, flip, -) for integers, where `flip` is that of `plain_codes`; for floats it is (bits of the
    mantissa, bias of the exponent, the magnitude that is NaN or -1). A float has a sign bit on top and no infinity.
    """
    mantissa, bias, not_a_number = meaning
    if mantissa < 0:
        flip, half = u8(bias), i32(1 << (bits - 1))
        for k in range(fields_I.shape[0]):
            # Narrow again before it becomes a float: processors have no such step for many 64-bit integers at once.
            numbers_I[k] = f32(i32(i32(u8(fields_I[k] ^ flip)) - half))
        return
    sign, least_normal = u32(1 << (bits - 1)), u32(1 << mantissa)
    # The masks tell the compiler that shifts stay within 32 bits.
    to_sign, to_mantissa = u32(32 - bits), u32(23 - mantissa)
    rebias, subnormal = u32((127 - bias) << 23), f32(2.0 ** (1 - bias - mantissa))
    for k in range(fields_I.shape[0]):
        field = u32(fields_I[k])
        size = u32(field & u32(sign - u32(1)))
        wide = u32(u32(size << u32(to_mantissa & u32(31))) + rebias)
        if size < least_normal:
            wide = f32(f32(i32(size)) * subnormal).view(np.uint32)
        if i32(size) == not_a_number:
            wide = u32(0x7FC00000)
        numbers_I[k] = u32(wide | u32(u32(field & sign) << u32(to_sign & u32(31)))).view(np.float32)


@inner
def scale_row(numbers_I: NDArray[Any], scale_G: Floats, zero_G: Floats, span: int) -> None:
    """(number - zero point) * scale in place, where each `span` columns share both, the last ones perhaps fewer."""
    for g in range(scale_G.shape[0]):
        scale, zero = scale_G[g], zero_G[g]
        own = numbers_I[g * span : (g + 1) * span]
        for k in range(own.shape[0]):
            own[k] = (own[k] - zero) * scale


@inner
def scale_by_index(numbers_I: NDArray[Any], scale_G: Floats, zero_G: Floats, group_of_I: NDArray[np.int64]) -> None:
    """The same where an index gives the group of each column."""
    for k in range(numbers_I.shape[0]):
        g = group_of_I[k]
        numbers_I[k] = (numbers_I[k] - zero_G[g]) * scale_G[g]


@inner
def round_row(numbers_I: NDArray[Any], kind: int, dense_B: Bytes) -> None:
    """Numbers rounded to `kind`, to nearest, ties to even; those of float32 are rounded once anyway."""
    if kind == _BFLOAT16 and numbers_I.itemsize == 4:
        halves_I = dense_B.view(np.uint16)
        for k in range(numbers_I.shape[0]):
            halves_I[k] = bfloat16_bits(f32(numbers_I[k]).view(np.uint32))
    elif kind == _BFLOAT16:
        halves_I = dense_B.view(np.uint16)
        for k in range(numbers_I.shape[0]):
            halves_I[k] = bfloat16_bits(odd_bits(numbers_I[k]))
    elif kind == _FLOAT16:
        halves_I = dense_B.view(np.uint16)
        for k in range(numbers_I.shape[0]):
            halves_I[k] = float16_bits(odd_bits(numbers_I[k]))
    elif kind == _FLOAT32:
        singles_I = dense_B.view(np.float32)
        for k in range(numbers_I.shape[0]):
            singles_I[k] = numbers_I[k]
    else:
        doubles_I = dense_B.view(np.float64)
        for k in range(numbers_I.shape[0]):
            doubles_I[k] = numbers_I[k]


@inner
def odd_bits(number: float) -> np.uint32:
    """The bits of a number in float32: exact ones stay, others go to the neighbour whose last bit is one.

    Rounding these once more to fewer bits is rounding the number once; see `rounding.py`.
    """
    bits = f32(number).view(np.uint32)
    back = f64(f32(number))
    inexact = (back != number) & ((bits & u32(1)) == u32(0)) & (abs(back) < np.inf)
    step = u32(1) if abs(number) > abs(back) else u32(0xFFFFFFFF)
    return u32(bits + (step if inexact else u32(0)))


@inner
def bfloat16_bits(bits: np.uint32) -> np.uint16:
    """float32 to bfloat16: the upper half, plus one if the lower half is more than half, or half and the upper odd."""
    nearest = u32(bits + u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1)))
    is_nan = u32(bits & u32(0x7FFFFFFF)) > u32(0x7F800000)
    return u16(0x7FC0) if is_nan else u16(nearest >> u32(16))


@inner
def float16_bits(bits: np.uint32) -> np.uint16:
    """float32 to float16; for subnormal results the addition of 0.5 rounds, whose last bit is 2^-24, the least step."""
    size = u32(bits & u32(0x7FFFFFFF))
    nearest = u32(size - u32(112 << 23) + u32(0xFFF) + u32(u32(size >> u32(13)) & u32(1)))
    half = u32(nearest >> u32(13))
    if size < u32(0x38800000):
        half = u32(f32(u32(size).view(np.float32) + f32(0.5)).view(np.uint32) - u32(0x3F000000))
    if size >= u32(0x477FF000):
        half = u32(0x7C00)
    if size > u32(0x7F800000):
        half = u32(0x7E00)
    return u16(half | u32(u32(bits >> u32(16)) & u32(0x8000)))
