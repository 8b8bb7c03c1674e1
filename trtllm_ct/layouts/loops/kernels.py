"""Compiled loops over CPU memory: one pass from stored bytes to delivered bytes, at about the speed of a copy.

numba compiles each loop once per processor type, and later processes load the machine code: see `machine_code.py`.
Loops release the GIL and use one thread; callers run several threads. numpy's operations are slower because each of
them makes its own pass over the memory. Every loop has an equivalent made of them in `packing.py` or `scales.py`.
`dispatch.py` chooses between the two, and the tests check that both give the same bits.

The caller allocates all arrays; they are numpy arrays and contiguous along the last axis. A field is the bit pattern of
one code as it is stored. numba widens the result of integer arithmetic to 64 bits, so narrow types are spelled out
wherever SIMD lanes should stay narrow. A change of this file, or of any that its loops call something of, triggers a
new compilation.
Axis letters: `O` out (rows, N), `I` in (columns, K), `B` bytes, `G` groups, `W` words, `H` half-words or lanes.
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
    "OUTPUT_DTYPES",
    "additive_zero",
    "additive_zero_of_words",
    "dequantize",
    "plain_codes",
    "plain_codes_along_rows",
    "row_pairs",
    "row_pairs_of_nibbles",
]

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i32, f32, f64 = np.int32, np.float32, np.float64

# Small arguments, of every bit pattern that loops treat in a way of its own, on which compiled loops are tried.
_BYTES = [[0x10, 0xFE], [0x9A, 0x7F], [0x00, 0x88], [0xF0, 0x0F]]
_WORDS = [[0x76543210, 0x89ABCDEF], [0xFFFFFFFF, 0x80000001]]
_SCALES = [[1, 0.5], [3, 100]]
_ZEROS_22, _ZEROS_24 = [[0] * 2] * 2, [[0] * 4] * 2

_BFLOAT16, _FLOAT16, _FLOAT32, _FLOAT64 = range(4)
OUTPUT_DTYPES = {DType.BF16: _BFLOAT16, DType.F16: _FLOAT16, DType.F32: _FLOAT32, DType.F64: _FLOAT64}
"""The output dtypes of `dequantize`, and the number that stands for each of them in the loops."""


@kernel([[0x1234, 0xFFFF], [0x8000, 0x0F0F], [0x0001, 0xABCD], [0, 0x7FFE]], 0x88888888, _ZEROS_22)
def row_pairs_of_nibbles(half_words_OH: NDArray[np.uint16], flip: int, lanes_OH: NDArray[np.uint32]) -> None:
    """Repack 4-bit codes along K to row pairs: [N, >= K/4] half-words of 16 bits to [N/2, K/4] lanes of 32 bits.

    A lane is four bytes: four nibbles of the even row in the low halves of the bytes, and four nibbles of the odd row
    in the high halves. `flip` is XORed into each lane: 0x88888888 for codes in offset binary, which differ from two's
    complement in the top bit of each nibble, else 0. Lanes of 16 bits would take fewer steps, but compilers widen these
    to 64 bits.
    """
    byte_mask, low, high = u32(0x00FF00FF), u32(0x000F000F), u32(0x00F000F0)
    pairs, lanes = lanes_OH.shape
    for pair in range(pairs):
        for i in range(lanes):
            even, odd = u32(half_words_OH[2 * pair, i]), u32(half_words_OH[2 * pair + 1, i])
            # Spread the two bytes of each half-word over every other byte of the lane, then combine the nibbles.
            even = u32(u32(even | u32(even << u32(8))) & byte_mask)
            odd = u32(u32(odd | u32(odd << u32(8))) & byte_mask)
            first = u32(u32(even & low) | u32(u32(odd & low) << u32(4)))
            second = u32(u32(u32(even & high) << u32(4)) | u32(u32(odd & high) << u32(8)))
            lanes_OH[pair, i] = u32(u32(first | second) ^ u32(flip))


@kernel(_BYTES, (4, 1, 2), 0, _ZEROS_24, _ZEROS_24)
def row_pairs(stored_OB: Bytes, run: tuple[int, int, int], flip: int, fields_2I: Bytes, pairs_OI: Bytes) -> None:
    """Repack codes of any width along K to int4 row pairs: [N, B] to [ceil(N/2), K].

    When N is odd, the missing last row is all zero bits. `run` is described in `unpack_row`, `flip` in `plain_codes`;
    `fields_2I` is a buffer. Only the low four bits of wider codes are kept.
    """
    rows, columns = stored_OB.shape[0], pairs_OI.shape[1]
    half = u8(1 << (run[0] - 1))
    even_I, odd_I = fields_2I[0], fields_2I[1]
    for pair in range(pairs_OI.shape[0]):
        pairs_I = pairs_OI[pair]
        unpack_row(stored_OB[2 * pair], run, even_I)
        has_odd = 2 * pair + 1 < rows
        if has_odd:
            unpack_row(stored_OB[2 * pair + 1], run, odd_I)
        for k in range(columns):
            even = u8(u8(even_I[k] ^ u8(flip)) - half) & u8(0x0F)
            odd = u8(u8(u8(odd_I[k] ^ u8(flip)) - half) << u8(4)) if has_odd else u8(0)
            pairs_I[k] = even | odd


@kernel(_BYTES[:2], (4, 1, 2), 8, _ZEROS_24)
def plain_codes(stored_OB: Bytes, run: tuple[int, int, int], flip: int, codes_OI: Bytes) -> None:
    """Unpack codes of any width along K to one signed byte each, stored as uint8: [N, B] to [N, K].

    `run` is described in `unpack_row`. `flip` is XORed into each field to turn it into offset binary: 0 for fields that
    are offset binary already, the top bit of the code for two's complement.
    """
    half = u8(1 << (run[0] - 1))
    if run[0] == 8:
        rows, columns = codes_OI.shape
        for n in range(rows):
            for k in range(columns):
                codes_OI[n, k] = u8(stored_OB[n, k] ^ u8(flip)) - half
        return
    for n in range(codes_OI.shape[0]):
        codes_I = codes_OI[n]
        unpack_row(stored_OB[n], run, codes_I)
        for k in range(codes_I.shape[0]):
            codes_I[k] = u8(codes_I[k] ^ u8(flip)) - half


@kernel(_WORDS, 4, 8, [[0] * 2] * 16)
def plain_codes_along_rows(words_WG: NDArray[np.uint32], bits: int, per_word: int, codes_OG: Bytes) -> None:
    """Unpack offset-binary codes along N in 32-bit words to one signed byte each, stored as uint8: [W, >= G] to [N, G].

    Each word holds `per_word` codes; 0 means that the codes form one dense stream and may straddle two words.
    """
    mask, half, (rows, groups) = u32((1 << bits) - 1), u32(1 << (bits - 1)), codes_OG.shape
    # Rows are short here: slicing each row into an array of its own would cost half as much as unpacking it.
    for n in range(rows):
        first_bit = n // per_word * 32 + n % per_word * bits if per_word else n * bits
        word, shift = first_bit // 32, u32(first_bit % 32)
        if first_bit % 32 + bits > 32:
            rest = u32(32 - first_bit % 32)
            for g in range(groups):
                field = u32(u32(words_WG[word, g] >> shift) | u32(words_WG[word + 1, g] << rest))
                codes_OG[n, g] = u8(u32(field & mask) - half)
        else:
            for g in range(groups):
                codes_OG[n, g] = u8(u32(u32(words_WG[word, g] >> shift) & mask) - half)


@kernel([[1, -8], [0, 7]], _SCALES, 0, _ZEROS_22)
def additive_zero(zero_OG: NDArray[np.int8], scale_OG: NDArray[Any], is_bfloat16: bool, offset_OG: Floats) -> None:  # noqa: FBT001 (numba has no keywords)
    """Compute -(zero point) * scale, all [N, G]; the result is never -0.0.

    `scale_OG` is float32, or the bits of bfloat16 as uint16 when `is_bfloat16` is true.
    """
    rows, groups = offset_OG.shape
    for n in range(rows):
        for g in range(groups):
            offset_OG[n, g] = -(f32(i32(zero_OG[n, g])) * float32_of(scale_OG[n, g], is_bfloat16)) + f32(0)


@kernel(_WORDS, 4, 8, _SCALES, 0, _ZEROS_22)
def additive_zero_of_words(
    words_WG: NDArray[np.uint32],
    bits: int,
    per_word: int,
    scale_OG: NDArray[Any],
    is_bfloat16: bool,  # noqa: FBT001 (numba has no keywords)
    offset_OG: Floats,
) -> None:
    """Compute `additive_zero` for packed zero points.

    They are offset-binary codes along N in 32-bit words; each word holds `per_word` whole codes.
    """
    mask, half, (rows, groups) = u32((1 << bits) - 1), i32(1 << (bits - 1)), offset_OG.shape
    for n in range(rows):
        word, shift = n // per_word, u32(n % per_word * bits)
        for g in range(groups):
            zero = i32(i32(u32(words_WG[word, g] >> shift) & mask) - half)
            offset_OG[n, g] = -(f32(zero) * float32_of(scale_OG[n, g], is_bfloat16)) + f32(0)


@kernel(
    _BYTES[:2], (4, 1, 2), (-1, 8, 0), _SCALES, [[0, 1], [3, 0]], 3.0, (1, 2), (), [0] * 4, [0] * 4, 0, [[0] * 8] * 2
)
def dequantize(
    stored_OB: Bytes,
    run: tuple[int, int, int],
    decoding: tuple[int, int, int],
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
    """Dequantize codes along K: bytes [N, B] to the bytes of weights [N, K]; each is the exact value, rounded once.

    value = (code - zero point) * scale / divisor.
    `run` is described in `unpack_row`, `decoding` in `decode_row`. `kind` is the output dtype, one of `OUTPUT_DTYPES`.
    `block` is the number of (rows, columns) that share a scale. When scales or zero points have only one row, all rows
    of the weight use it.
    `group_of_I` gives the group of each column, and is empty when groups are contiguous.
    `fields_I` and `numbers_I` are buffers. The dtype of `numbers_I` is the one to compute in: float32 if products are
    exact there, else float64.
    """
    for n in range(dense_OB.shape[0]):
        scale_G = scale_XG[0 if scale_XG.shape[0] == 1 else n // block[0]]
        zero_G = zero_YG[0 if zero_YG.shape[0] == 1 else n // block[0]]
        unpack_row(stored_OB[n], run, fields_I)
        decode_row(fields_I, run[0], decoding, numbers_I)
        if group_of_I.shape[0]:
            scale_by_index(numbers_I, scale_G, zero_G, group_of_I)
        else:
            scale_row(numbers_I, scale_G, zero_G, block[1])
        if divisor != 1.0:
            for k in range(numbers_I.shape[0]):
                numbers_I[k] /= divisor
        round_row(numbers_I, kind, dense_OB[n])


@inner
def float32_of(scale: Any, is_bfloat16: bool) -> np.float32:  # noqa: FBT001 (numba has no keywords)
    """Return a scale as float32; it is float32 already, or the bits of bfloat16 when `is_bfloat16` is true."""
    return u32(u32(scale) << u32(16)).view(np.float32) if is_bfloat16 else f32(scale)


@inner
def unpack_row(stored_B: Bytes, run: tuple[int, int, int], fields_I: Bytes) -> None:
    """Unpack bytes to one field per column, lowest bits first.

    `run` is (bits of a field, bytes of a run, fields of a run). A run is a unit of bytes that holds whole fields only
    (see `packing.run_size`); the last run may be cut short.
    """
    bits, size, count = run
    columns = fields_I.shape[0]
    if bits == 8:
        for k in range(columns):
            fields_I[k] = stored_B[k]
    elif bits == 4 and count == 2 * size:
        for i in range(columns // 2):
            fields_I[2 * i] = stored_B[i] & u8(0x0F)
            fields_I[2 * i + 1] = stored_B[i] >> u8(4)
        if columns % 2:
            fields_I[columns - 1] = stored_B[columns // 2] & u8(0x0F)
    else:
        _unpack_stream(stored_B, run, fields_I)


@inner
def _unpack_stream(stored_B: Bytes, run: tuple[int, int, int], fields_I: Bytes) -> None:
    """Unpack fields that may straddle two bytes.

    Runs of eight fields are read by one load of eight bytes, all other fields one by one.
    """
    bits, size, count = run
    mask = u64((1 << bits) - 1)
    fast_runs = min(fields_I.shape[0] // 8, (stored_B.shape[0] - 8) // size) if count == 8 else 0
    for start in range(fast_runs):
        stored_8, fields_8 = stored_B[start * size : start * size + 8], fields_I[start * 8 : start * 8 + 8]
        stream = u64(0)
        for i in range(8):
            stream |= u64(stored_8[i]) << u64(8 * i)
        for i in range(8):
            fields_8[i] = u8((stream >> u64((bits * i) & 63)) & mask)
    for k in range(max(fast_runs, 0) * 8, fields_I.shape[0]):
        first_bit = k // count * size * 8 + k % count * bits
        first, second = first_bit // 8, min(first_bit // 8 + 1, stored_B.shape[0] - 1)
        pair = u32(stored_B[first]) | u32(u32(stored_B[second]) << u32(8))
        fields_I[k] = u8(u64(pair >> u32(first_bit % 8)) & mask)


@inner
def decode_row(fields_I: Bytes, bits: int, decoding: tuple[int, int, int], numbers_I: NDArray[Any]) -> None:
    """Decode fields of `bits` bits to numbers.

    For integers, `decoding` is (-1, flip, unused), where `flip` is described in `plain_codes`. For small floats it is
    (mantissa bits, exponent bias, magnitude bits of NaN), with -1 when the format has no NaN. The highest bit of a
    small float is its sign, and it has no infinity.
    """
    mantissa, bias, nan_magnitude = decoding
    if mantissa < 0:
        flip, half = u8(bias), i32(1 << (bits - 1))
        for k in range(fields_I.shape[0]):
            # Narrow the integer to 32 bits first: processors can't convert vectors of 64-bit integers to float.
            numbers_I[k] = f32(i32(i32(u8(fields_I[k] ^ flip)) - half))
        return
    sign, least_normal = u32(1 << (bits - 1)), u32(1 << mantissa)
    # The masks (& 31) below show the compiler that shifts stay within 32 bits.
    to_sign, to_mantissa = u32(32 - bits), u32(23 - mantissa)
    rebias, subnormal_step = u32((127 - bias) << 23), f32(2.0 ** (1 - bias - mantissa))
    for k in range(fields_I.shape[0]):
        field = u32(fields_I[k])
        magnitude = u32(field & u32(sign - u32(1)))
        float_bits = u32(u32(magnitude << u32(to_mantissa & u32(31))) + rebias)
        if magnitude < least_normal:
            float_bits = f32(f32(i32(magnitude)) * subnormal_step).view(np.uint32)
        if i32(magnitude) == nan_magnitude:
            float_bits = u32(0x7FC00000)
        numbers_I[k] = u32(float_bits | u32(u32(field & sign) << u32(to_sign & u32(31)))).view(np.float32)


@inner
def scale_row(numbers_I: NDArray[Any], scale_G: Floats, zero_G: Floats, span: int) -> None:
    """Compute (number - zero point) * scale in place.

    Each `span` columns share a scale and a zero point; the last group may have fewer columns.
    """
    for g in range(scale_G.shape[0]):
        scale, zero = scale_G[g], zero_G[g]
        group_I = numbers_I[g * span : (g + 1) * span]
        for k in range(group_I.shape[0]):
            group_I[k] = (group_I[k] - zero) * scale


@inner
def scale_by_index(numbers_I: NDArray[Any], scale_G: Floats, zero_G: Floats, group_of_I: NDArray[np.int64]) -> None:
    """Compute (number - zero point) * scale in place, where `group_of_I` gives the group of each column."""
    for k in range(numbers_I.shape[0]):
        g = group_of_I[k]
        numbers_I[k] = (numbers_I[k] - zero_G[g]) * scale_G[g]


@inner
def round_row(numbers_I: NDArray[Any], kind: int, dense_B: Bytes) -> None:
    """Round numbers to the output dtype `kind`: to nearest, ties to even.

    float64 numbers are rounded to odd float32 before they become 16 bits wide, so that they are rounded only once.
    """
    if kind == _BFLOAT16 and numbers_I.itemsize == 4:
        half_words_I = dense_B.view(np.uint16)
        for k in range(numbers_I.shape[0]):
            half_words_I[k] = bfloat16_bits(f32(numbers_I[k]).view(np.uint32))
    elif kind == _BFLOAT16:
        half_words_I = dense_B.view(np.uint16)
        for k in range(numbers_I.shape[0]):
            half_words_I[k] = bfloat16_bits(odd_bits(numbers_I[k]))
    elif kind == _FLOAT16:
        half_words_I = dense_B.view(np.uint16)
        for k in range(numbers_I.shape[0]):
            half_words_I[k] = float16_bits(odd_bits(numbers_I[k]))
    elif kind == _FLOAT32:
        float32_I = dense_B.view(np.float32)
        for k in range(numbers_I.shape[0]):
            float32_I[k] = numbers_I[k]
    else:
        float64_I = dense_B.view(np.float64)
        for k in range(numbers_I.shape[0]):
            float64_I[k] = numbers_I[k]


@inner
def odd_bits(number: float) -> np.uint32:
    """Round a float64 number to odd float32 and return its bits.

    Exact numbers stay; others become the neighbour whose last bit is one. Rounding the result again to fewer bits gives
    the same as rounding the original number once; see `rounding.py`.
    """
    bits = f32(number).view(np.uint32)
    nearest = f64(f32(number))
    must_move = (nearest != number) & ((bits & u32(1)) == u32(0)) & (abs(nearest) < np.inf)
    step = u32(1) if abs(number) > abs(nearest) else u32(0xFFFFFFFF)
    return u32(bits + (step if must_move else u32(0)))


@inner
def bfloat16_bits(bits: np.uint32) -> np.uint16:
    """Round the bits of a float32 to the bits of a bfloat16: to nearest, ties to even.

    The result is the upper 16 bits, plus one if the lower 16 bits are more than half of their range, or if they are
    exactly half and the upper bits are odd.
    """
    nearest = u32(bits + u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1)))
    is_nan = u32(bits & u32(0x7FFFFFFF)) > u32(0x7F800000)
    return u16(0x7FC0) if is_nan else u16(nearest >> u32(16))


@inner
def float16_bits(bits: np.uint32) -> np.uint16:
    """Round the bits of a float32 to the bits of a float16: to nearest, ties to even.

    For subnormal results, the addition of 0.5 does the rounding: the last bit of 0.5 as a float32 is 2^-24, which is
    the step of subnormal float16 numbers.
    """
    magnitude = u32(bits & u32(0x7FFFFFFF))
    nearest = u32(magnitude - u32(112 << 23) + u32(0xFFF) + u32(u32(magnitude >> u32(13)) & u32(1)))
    half = u32(nearest >> u32(13))
    if magnitude < u32(0x38800000):
        half = u32(f32(u32(magnitude).view(np.float32) + f32(0.5)).view(np.uint32) - u32(0x3F000000))
    if magnitude >= u32(0x477FF000):
        half = u32(0x7C00)
    if magnitude > u32(0x7F800000):
        half = u32(0x7E00)
    return u16(half | u32(u32(bits >> u32(16)) & u32(0x8000)))
