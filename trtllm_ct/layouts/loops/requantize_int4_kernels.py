"""Compiled loops that quantize int4 weights again, from their codes; `layouts/requantize_int4.py` explains the tables.

A word holds sixteen codes in offset binary, four bits each, that of the first column in the lowest bits. Its histogram
is a word too: byte m - 1 is the number of codes whose magnitude is m. One scale holds for `words` words.
Rows are treated by several short steps, each for all groups, so that the processor works on many groups at once.
The rules of `kernels.py` hold here too.
Axis letters: `O` out (rows, N), `B` words along K, `G` stored groups along K, `X` new groups or blocks, `I` columns,
`S` kinds of groups, `M` magnitudes of codes from 1 to 8, `C` candidates.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.layouts.loops.lanes import (
    add_scaled_bytes,
    dot_with_bytes,
    e4m3_error_of_codes,
    e4m3_of_codes,
    floats_of_bytes,
    highest_byte,
    least_lane,
    looked_up_bytes,
    looked_up_fields,
)
from trtllm_ct.layouts.loops.machine_code import inner, kernel
from trtllm_ct.layouts.loops.requantize_kernels import candidate_scales, finalists

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    Words = NDArray[np.uint64]

__all__ = ["e2m1_with_e4m3_scales", "e2m1_with_exponents", "e4m3_blocks", "histograms"]

u8, u32, u64, i64, f32, f64 = np.uint8, np.uint32, np.uint64, np.int64, np.float32, np.float64

_KINDS_OF_MANTISSA = u64(9)
"""The largest magnitudes that a group may have, from 0 to 8."""


@cache
def histograms() -> Words:
    """Return the histogram of the two codes in each byte, uint64 [256]."""
    codes = np.arange(256)[:, None] >> np.array([0, 4]) & 15
    places = 8 * (np.abs(codes - 8) - 1)
    counted: Words = np.where(places < 0, 0, 1 << np.maximum(places, 0)).sum(1).astype(np.uint64)
    return counted


_CODES = [[0x7F80899ABCDEF012, 0x8888888888888888], [0x1234567887654321, 0x0]]
_BITS = [[0x3D81, 0x3C00], [0x3F81, 0x0001]]
_HISTOGRAMS = histograms().tolist()
# Tables for the two mantissas of the example's scales, instead of 128.
_KINDS = 18


@kernel(
    *(_CODES, _BITS, 1, 122, 10, _HISTOGRAMS, [20] * _KINDS, list(range(20, 28)) * (_KINDS + 2)),
    *([[[float(m * (c + 1) % 7) for c in range(8)] for m in range(8)]] * (_KINDS + 2), _CODES[1] * 4 * (_KINDS + 2)),
    *([[0.0] * 8] * 2, [0] * 2, [[0] * 2] * 2, [[0] * 2] * 2),
)
def e2m1_with_e4m3_scales(
    codes_OB: Words,
    bits_OG: NDArray[np.uint16],
    words: int,
    exponent: int,
    above: int,
    histogram_of: Words,
    first_S: Bytes,
    step_L: Bytes,
    error_SMC: Floats,
    map_L: Words,
    count_BM: Floats,
    slot_B: Words,
    e2m1_OB: Words,
    e4m3_OB: Bytes,
) -> None:
    """Quantize int4 codes to E2M1 codes, with the bits of an E4M3 scale for each group of 16 columns.

    `bits_OG` are the bits of positive bfloat16 scales. The tables are for scales whose biased exponent is `exponent`:
    the bits of the first scale that would be tried, and of those that may be the best, squared errors, and the E2M1
    code of each int4 code; the second and the last have eight lanes for each kind. All but the first have two more
    kinds: groups of zeros, and groups without a result. `above` is the number of scales that would be tried after the
    first. `count_BM` and `slot_B` are buffers; of a group, the latter has the largest magnitude, then the kind, then
    the lane.
    The scale of a group is 0 where one that would be tried is no normal number of E4M3; then it has no result.
    """
    for n in range(codes_OB.shape[0]):
        codes_B, byte_X, e2m1_B, e4m3_B = codes_OB[n], codes_OB[n].view(np.uint8), e2m1_OB[n], e4m3_OB[n]
        for b in range(codes_B.shape[0]):
            histogram = _histogram(byte_X, u64(b), histogram_of)
            floats_of_bytes(histogram, count_BM[b])
            slot_B[b] = highest_byte(histogram)
        _slots(bits_OG[n], words, exponent, above, first_S, slot_B, e4m3_B)
        for b in range(codes_B.shape[0]):
            slot = slot_B[b]
            slot_B[b] = (slot << u64(3)) + least_lane(error_SMC[slot], count_BM[b])
        for b in range(codes_B.shape[0]):
            best = slot_B[b]
            e4m3_B[b] = u8(e4m3_B[b] + step_L[best])
            e2m1_B[b] = looked_up_fields(codes_B[b], map_L[best])


@inner
def _histogram(byte_X: Bytes, word: np.uint64, histogram_of: Words) -> np.uint64:
    """Return the histogram of a word of a row of bytes."""
    first = word * u64(8)
    histogram: np.uint64 = (
        histogram_of[byte_X[first]]
        + histogram_of[byte_X[first + u64(1)]]
        + histogram_of[byte_X[first + u64(2)]]
        + histogram_of[byte_X[first + u64(3)]]
        + histogram_of[byte_X[first + u64(4)]]
        + histogram_of[byte_X[first + u64(5)]]
        + histogram_of[byte_X[first + u64(6)]]
        + histogram_of[byte_X[first + u64(7)]]
    )
    return histogram


@inner
def _slots(
    bits_G: NDArray[np.uint16],
    words: int,
    exponent: int,
    above: int,
    first_S: Bytes,
    slot_B: Words,
    shift_B: Bytes,
) -> None:
    """Replace the largest magnitudes of groups by their kinds; write what is added to the bits of their scales."""
    zeros, none = u64(first_S.shape[0]), u64(first_S.shape[0] + 1)
    for g in range(bits_G.shape[0]):
        bits = u32(bits_G[g])
        kind = u64(bits & u32(127)) * _KINDS_OF_MANTISSA
        shift = 8 * (i64(bits >> u32(7)) - exponent)
        are_normal = first_S[kind + u64(1)] + shift >= 8 and first_S[kind + u64(8)] + shift + above <= 126
        for b in range(u64(g * words), u64((g + 1) * words)):
            largest = slot_B[b]
            slot = kind + largest
            first = i64(first_S[slot]) + shift
            normal = are_normal or (first >= 8 and first + above <= 126)
            slot = slot if normal else none
            slot_B[b] = slot if largest != u64(0) else zeros
            shift_B[b] = u8(shift) if normal and largest != u64(0) else u8(0)


@kernel(
    *(
        _CODES,
        [[0x3D81], [0x3F81]],
        2,
        _HISTOGRAMS,
        [120] * _KINDS,
        [[3, -5, 7, 11, -13, 2, -9, 40]] * _KINDS,
        [_CODES[1]] * _KINDS,
    ),
    *([[0] * 2] * 2, [[0] * 1] * 2),
)
def e2m1_with_exponents(
    codes_OB: Words,
    bits_OG: NDArray[np.uint16],
    words: int,
    histogram_of: Words,
    upper_S: Bytes,
    gain_SM: NDArray[np.int32],
    map_SC: Words,
    e2m1_OB: Words,
    exponent_OX: Bytes,
) -> None:
    """Quantize int4 codes to E2M1 codes, with an E8M0 exponent for each group of 32 columns.

    `bits_OG` are the bits of positive bfloat16 scales. The tables are for scales from 1 to 2: the larger exponent, how
    much the squared error of a code grows with the other one, and the E2M1 code of each int4 code with both. The
    exponent of a group of zeros is `upper_S[0]`.
    """
    groups = i64(words) // 2
    for n in range(codes_OB.shape[0]):
        codes_B, byte_X, e2m1_B = codes_OB[n], codes_OB[n].view(np.uint8), e2m1_OB[n]
        bits_G, exponent_X = bits_OG[n], exponent_OX[n]
        for g in range(bits_G.shape[0]):
            kind = u64(bits_G[g] & u32(127)) * _KINDS_OF_MANTISSA
            shift = i64(bits_G[g] >> u32(7)) - 127
            for x in range(u64(g * groups), u64((g + 1) * groups)):
                even, odd = u64(2) * x, u64(2) * x + u64(1)
                histogram = _histogram(byte_X, even, histogram_of) + _histogram(byte_X, odd, histogram_of)
                largest = highest_byte(histogram)
                slot = kind + largest
                halved = u64(dot_with_bytes(histogram, gain_SM[slot]) < 0)
                exponent = u8(i64(upper_S[slot]) + shift - i64(halved))
                exponent_X[x] = exponent if largest != u64(0) else upper_S[u64(0)]
                fields = map_SC[slot, halved]
                e2m1_B[even] = looked_up_fields(codes_B[even], fields)
                e2m1_B[odd] = looked_up_fields(codes_B[odd], fields)


@kernel(
    *(_CODES, _BITS, (1, 1, 2, 1), [448.0, 256.0, 300.0], 0, 2, _HISTOGRAMS, [[1.0] * 8] * 128, [[5] * 8] * 128),
    *([[0] * 2] * 2, [[0.0] * 8] * 128, [0.0] * 512, [[0.0] * 3] * 3, [0] * 16, [[[0] * 16] * 2] * 2, [[0.0]] * 2),
)
def e4m3_blocks(
    codes_OB: Words,
    bits_OG: NDArray[np.uint16],
    sizes: tuple[int, int, int, int],
    peaks: Floats,
    powers_of_two: bool,  # noqa: FBT001 (numba has no keywords)
    numbers: int,
    histogram_of: Words,
    square_SM: NDArray[np.float64],
    bin_SM: Bytes,
    histogram_OR: Words,
    sum_SM: NDArray[np.float64],
    squares: NDArray[np.float64],
    candidates_3C: Floats,
    map_S: Bytes,
    e4m3_OBI: Bytes,
    scale_YX: Floats,
) -> None:
    """Quantize int4 codes to E4M3 codes [N, K/16, 16], with a float32 scale for each block.

    `bits_OG` are the bits of positive bfloat16 scales. `sizes` are the words of a run, of a stored scale and of a
    block, and the rows of a block; runs of at most eight words divide the other two. The tables have the squares of
    codes with each mantissa of a scale, and the seven highest bits of their mantissas. `peaks`, `numbers` and
    `powers_of_two` are as in `requantize_kernels.e4m3_blocks`. `histogram_OR` (of the runs in a row of blocks),
    `sum_SM`, `squares`, `candidates_3C` and `map_S` are buffers.
    """
    run, words, width, height = sizes
    for y in range(scale_YX.shape[0]):
        begin, end = y * height, min((y + 1) * height, codes_OB.shape[0])
        _histograms_of_runs(codes_OB[begin:end], run, histogram_of, histogram_OR)
        for x in range(scale_YX.shape[1]):
            runs = (x * (width // run), min((x + 1) * (width // run), histogram_OR.shape[1]), words // run)
            largest = _sums_of_block(histogram_OR[: end - begin], bits_OG[begin:end], runs, sum_SM)
            _squares_of_sums(square_SM, bin_SM, sum_SM, squares)
            candidate_scales(largest, peaks, powers_of_two, candidates_3C[0])
            best, exact = finalists(numbers, squares, candidates_3C)
            scale = candidates_3C[0, best]
            if exact != best:
                other = candidates_3C[0, exact]
                of_best = _error_of_block(histogram_OR[: end - begin], bits_OG[begin:end], runs, scale)
                of_other = _error_of_block(histogram_OR[: end - begin], bits_OG[begin:end], runs, other)
                scale = other if of_other <= of_best else scale
            scale_YX[y, x] = scale
        for n in range(begin, end):
            _codes_of_row(codes_OB[n], bits_OG[n], (run, words, width), scale_YX[y], map_S, e4m3_OBI[n])


@inner
def _histograms_of_runs(codes_OB: Words, run: int, histogram_of: Words, histogram_OR: Words) -> None:
    """Write the histograms of runs of words."""
    for n in range(codes_OB.shape[0]):
        byte_X, histogram_R = codes_OB[n].view(np.uint8), histogram_OR[n]
        for r in range(histogram_R.shape[0]):
            histogram = u64(0)
            for b in range(r * run, (r + 1) * run):
                histogram += _histogram(byte_X, u64(b), histogram_of)
            histogram_R[r] = histogram


@inner
def _sums_of_block(
    histogram_OR: Words, bits_OG: NDArray[np.uint16], place: tuple[int, int, int], sum_SM: NDArray[np.float64]
) -> np.float32:
    """Sum the squared powers of two of scales, by their mantissas and by the magnitudes of codes.

    `place` is the block's first run, the one after its last, and the runs of a stored scale.
    Returns the largest magnitude.
    """
    begin, end, runs = place
    for s in range(128):
        for m in range(8):
            sum_SM[s, m] = 0.0
    first_scale, first_left = u64(begin // runs), runs - begin % runs
    largest = f32(0)
    for n in range(histogram_OR.shape[0]):
        g, left = first_scale, first_left
        for r in range(u64(begin), u64(end)):
            histogram, bits = histogram_OR[n, r], u32(bits_OG[n, g])
            exponent = i64(bits >> u32(7))
            largest = max(largest, f32(f32(highest_byte(histogram)) * u32(bits << u32(16)).view(np.float32)))
            square = u64(u64(2 * exponent + 769) << u64(52)).view(np.float64)  # 2^(2 * (exponent - 127))
            add_scaled_bytes(histogram, square, sum_SM[u64(bits & u32(127))])
            left -= 1
            g, left = (g, left) if left > 0 else (g + u64(1), runs)
    return f32(largest)


@inner
def _error_of_block(
    histogram_OR: Words, bits_OG: NDArray[np.uint16], place: tuple[int, int, int], step: np.float32
) -> np.float64:
    """Return the squared error of a block with a scale; `place` is as in `_sums_of_block`."""
    begin, end, runs = place
    first_scale, first_left = u64(begin // runs), runs - begin % runs
    inverse, total = f32(1) / step, f64(0)
    for n in range(histogram_OR.shape[0]):
        g, left = first_scale, first_left
        for r in range(u64(begin), u64(end)):
            scale = u32(u32(bits_OG[n, g]) << u32(16)).view(np.float32)
            total += f64(e4m3_error_of_codes(histogram_OR[n, r], scale, step, inverse))
            left -= 1
            g, left = (g, left) if left > 0 else (g + u64(1), runs)
    return total


@inner
def _codes_of_row(
    codes_B: Words,
    bits_G: NDArray[np.uint16],
    sizes: tuple[int, int, int],
    scale_X: Floats,
    map_S: Bytes,
    e4m3_BI: Bytes,
) -> None:
    """Write the E4M3 codes of a row; `sizes` are the words of a run, of a stored scale, and of a block."""
    run, words, width = sizes
    g, left = u64(0), words
    for x in range(scale_X.shape[0]):
        inverse = f32(1) / scale_X[x]
        for first in range(x * width, min((x + 1) * width, codes_B.shape[0]), run):
            e4m3_of_codes(u32(u32(bits_G[g]) << u32(16)).view(np.float32), inverse, map_S)
            for b in range(u64(first), u64(min(first + run, codes_B.shape[0]))):
                looked_up_bytes(codes_B[b], map_S, e4m3_BI[b])
            left -= run
            g, left = (g, left) if left > 0 else (g + u64(1), words)


@inner
def _squares_of_sums(
    square_SM: NDArray[np.float64], bin_SM: Bytes, sum_SM: NDArray[np.float64], squares: NDArray[np.float64]
) -> None:
    """Write the sums of the squares of a block's values by the seven highest bits of their mantissas."""
    for i in range(squares.shape[0]):
        squares[i] = 0.0
    for s in range(128):
        for m in range(8):
            squares[u64(bin_SM[s, m])] += sum_SM[s, m] * square_SM[s, m]
