"""Compiled loops that quantize int4 weights again, from their codes; `layouts/requantize_int4.py` explains the tables.

A word holds sixteen codes in offset binary, four bits each, that of the first column in the lowest bits. One scale and
one zero point hold for several words; `group_B` and so on are their places. The number of a code is its difference to
the zero point, from -15 to 15, or from -8 to 7 where the zero point is 8, as in symmetric weights. `magnitude_ZI` and
`sign_ZI` have the magnitudes of these numbers by zero point and code, and 8 where they are negative.
A histogram is two words: byte m - 1 of the first one is the number of codes whose numbers have the magnitude m, up to
8, and byte m - 9 of the second one that of larger magnitudes.
Rows are treated by several short steps, each for all groups, so that the processor works on many groups at once.
The rules of `kernels.py` hold here too.
Axis letters: `O` out (rows, N), `B` words along K, `G` stored groups along K, `X` new groups or blocks, `I` columns,
`Z` zero points, `S` kinds of groups, `M` magnitudes, `H` halves of a histogram, `C` candidates.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trtllm_ct.layouts.loops.lanes import (
    add_histogram_of_word,
    add_scaled_bytes,
    dot_with_bytes,
    e4m3_error_of_codes,
    e4m3_of_codes,
    highest_byte,
    histogram_of_word,
    looked_up_bytes,
    mapped_codes,
)
from trtllm_ct.layouts.loops.machine_code import inner, kernel
from trtllm_ct.layouts.loops.requantize_kernels import PEAKS, candidate_scales, finalists

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    Words = NDArray[np.uint64]
    Places = NDArray[np.uint32]

__all__ = ["NumberTables", "e2m1_with_exponents", "e4m3_blocks", "histogram_of_symmetric", "number_tables"]

u8, u32, u64, i64, f32, f64 = np.uint8, np.uint32, np.uint64, np.int64, np.float32, np.float64

_MAGNITUDES = u64(16)
"""The largest magnitudes that a group may have, from 0 to 15; those up to 8 are small."""


class NumberTables(NamedTuple):
    """The numbers of codes by zero point: their magnitudes, and 8 where they are negative, uint8 [Z, 16].

    Histograms of symmetric weights are sums of those of two codes, `pair`, uint64 [256]. Others are made of the numbers
    of codes in each byte, `counted`, uint8 [256, 16]: `above` and `below` are the codes of each magnitude from 1 on,
    uint8 [Z, 16], and 128 stands for none.
    """

    magnitude: Bytes
    sign: Bytes
    pair: Words
    counted: Bytes
    above: Bytes
    below: Bytes


@cache
def number_tables() -> NumberTables:
    """Return the tables of all zero points; a zero point is the code of 0, from 0 to 15."""
    codes, both = np.arange(16), np.arange(256)[:, None] >> np.array([0, 4]) & 15
    number_ZI, places = codes - codes[:, None], 8 * (np.abs(both - 8) - 1)
    above, below = codes[:, None] + codes + 1, codes[:, None] - codes - 1
    return NumberTables(
        np.abs(number_ZI).astype(np.uint8),
        (8 * (number_ZI < 0)).astype(np.uint8),
        np.where(places < 0, 0, 1 << np.maximum(places, 0)).sum(1).astype(np.uint64),
        (both[..., None] == codes).sum(1).astype(np.uint8),
        np.where(above < 16, above, 128).astype(np.uint8),
        np.where(below >= 0, below, 128).astype(np.uint8),
    )


_CODES = [[0x7F80899ABCDEF012, 0x8888888888888888], [0x1234567887654321, 0x0]]
_BITS, _ZEROS = [[0x3D81, 0x3C00], [0x3F81, 0x0001]], [[8, 8], [3, 0]]
_NUMBERS = [table.tolist() for table in number_tables()]
# Tables for the two mantissas of the example's scales, instead of 128.
_KINDS = 32


@kernel(
    *(_CODES, [[0x3D81], [0x3F81]], [[8], [3]], [0], 2, *_NUMBERS, [120] * _KINDS),
    *(
        [[[3, -5, 7, 11, -13, 2, -9, 40], [1, -8, 6, -2, 5, -4, 9, 0]]] * _KINDS,
        [16 * (k % 2) for k in range(2 * _KINDS)],
    ),
    *([*range(16), *[7] * 16], [[0] * 2], [0], [[0] * 2] * 2, [[0] * 1] * 2),
)
def e2m1_with_exponents(
    codes_OB: Words,
    bits_OG: NDArray[np.uint16],
    zero_OG: Bytes,
    group_X: Places,
    halves: int,
    magnitude_ZI: Bytes,
    sign_ZI: Bytes,
    pair_X: Words,
    counted_XI: Bytes,
    above_ZI: Bytes,
    below_ZI: Bytes,
    upper_S: Bytes,
    gain_SHM: NDArray[np.int32],
    record_L: NDArray[np.uint16],
    code_X: Bytes,
    histogram_X2: Words,
    lane_X: Words,
    e2m1_OB: Words,
    exponent_OX: Bytes,
) -> None:
    """Quantize int4 codes to E2M1 codes, with an E8M0 exponent for each group of 32 columns.

    `bits_OG` are the bits of positive bfloat16 scales. The tables are for scales from 1 to 2: the larger exponent, how
    much the squared error of a number grows with the other one, and the place of the E2M1 codes of magnitudes in
    `code_X`, with both. The exponent of a group of zeros is `upper_S[0]`. `halves` is 1 if no magnitude is above 8.
    `histogram_X2` and `lane_X` are buffers.
    """
    for n in range(codes_OB.shape[0]):
        codes_B, byte_X, e2m1_B = codes_OB[n], codes_OB[n].view(np.uint8), e2m1_OB[n]
        bits_G, zero_G, exponent_X = bits_OG[n], zero_OG[n], exponent_OX[n]
        _histograms_of_runs(byte_X, zero_G, 2, halves, group_X, pair_X, counted_XI, above_ZI, below_ZI, histogram_X2)
        for x in range(group_X.shape[0]):
            bits, histogram = u32(bits_G[group_X[x]]), histogram_X2[x]
            largest = _largest(histogram)
            slot = u64(bits & u32(127)) * _MAGNITUDES + largest
            gain = dot_with_bytes(histogram[0], gain_SHM[slot, 0])
            if halves > 1:
                gain += dot_with_bytes(histogram[1], gain_SHM[slot, 1])
            halved = u64(gain < 0)
            exponent = u8(i64(upper_S[slot]) + i64(bits >> u32(7)) - 127 - i64(halved))
            exponent_X[x] = exponent if largest != u64(0) else upper_S[u64(0)]
            lane_X[x] = slot * u64(2) + halved
        for x in range(group_X.shape[0]):
            even, odd, zero, record = u64(2) * x, u64(2) * x + u64(1), zero_G[group_X[x]], u64(record_L[lane_X[x]])
            e2m1_B[even] = mapped_codes(codes_B[even], code_X, record, magnitude_ZI[zero], sign_ZI[zero])
            e2m1_B[odd] = mapped_codes(codes_B[odd], code_X, record, magnitude_ZI[zero], sign_ZI[zero])


@inner
def _histograms_of_runs(
    byte_X: Bytes,
    zero_G: Bytes,
    run: int,
    halves: int,
    group_R: Places,
    pair_X: Words,
    counted_XI: Bytes,
    above_ZI: Bytes,
    below_ZI: Bytes,
    histogram_R2: Words,
) -> None:
    """Write the histograms of runs of so many words in a row; the second word is 0 if `halves` is 1."""
    for r in range(group_R.shape[0]):
        first, histogram = u64(8 * r * run), histogram_R2[r]
        if halves > 1:
            above_I, below_I = above_ZI[zero_G[group_R[r]]], below_ZI[zero_G[group_R[r]]]
            histogram_of_word(byte_X, first, counted_XI, above_I, below_I, histogram)
            for x in range(first + u64(8), first + u64(8 * run), u64(8)):
                add_histogram_of_word(byte_X, x, counted_XI, above_I, below_I, histogram)
        else:
            word = u64(0)
            for x in range(first, first + u64(8 * run), u64(8)):
                word += histogram_of_symmetric(byte_X, u64(x), pair_X)
            histogram[0], histogram[1] = word, u64(0)


@inner
def histogram_of_symmetric(byte_X: Bytes, first: np.uint64, pair_X: Words) -> np.uint64:
    """Return the histogram of a word of a row of bytes, by its first byte, of a symmetric weight."""
    histogram: np.uint64 = (
        pair_X[byte_X[first]]
        + pair_X[byte_X[first + u64(1)]]
        + pair_X[byte_X[first + u64(2)]]
        + pair_X[byte_X[first + u64(3)]]
        + pair_X[byte_X[first + u64(4)]]
        + pair_X[byte_X[first + u64(5)]]
        + pair_X[byte_X[first + u64(6)]]
        + pair_X[byte_X[first + u64(7)]]
    )
    return histogram


@inner
def _largest(histogram: Words) -> np.uint64:
    """Return the largest magnitude of a histogram."""
    high = histogram[1]
    return max(highest_byte(histogram[0]), (highest_byte(high) + u64(8)) * u64(high != u64(0)))


@kernel(
    *(_CODES, _BITS, _ZEROS, [0, 1], [0, 1], (1, 2, 1, 2), PEAKS, 0, 2),
    *(*_NUMBERS, [[1.0] * 8] * 128, [[5] * 8] * 128),
    *([[[0] * 2] * 2] * 2, [[[0.0] * 8] * 2] * 128, [0.0] * 512, [[0.0] * 24] * 3, [[0.0] * 128] * 2),
    *([[0] * 16] * 2, [[[0] * 16] * 2] * 2, [[0.0]] * 2),
)
def e4m3_blocks(
    codes_OB: Words,
    bits_OG: NDArray[np.uint16],
    zero_OG: Bytes,
    group_R: Places,
    run_B: Places,
    sizes: tuple[int, int, int, int],
    peaks: Floats,
    powers_of_two: bool,  # noqa: FBT001 (numba has no keywords)
    numbers: int,
    magnitude_ZI: Bytes,
    sign_ZI: Bytes,
    pair_X: Words,
    counted_XI: Bytes,
    above_ZI: Bytes,
    below_ZI: Bytes,
    square_SM: NDArray[np.float64],
    bin_SM: Bytes,
    histogram_OR2: Words,
    sum_SHM: NDArray[np.float64],
    squares: NDArray[np.float64],
    candidates_3C: Floats,
    bins: Floats,
    map_RI: Bytes,
    e4m3_OBI: Bytes,
    scale_YX: Floats,
) -> None:
    """Quantize int4 codes to E4M3 codes [N, K/16, 16], with a float32 scale for each block.

    `bits_OG` are the bits of positive bfloat16 scales. A run is a number of words, at most eight, that have the same
    scale and are in the same block: `group_R` are the scales of runs, and `run_B` the runs of words. `sizes` are the
    words of a run, the runs of a block, its rows, and 1 if no magnitude is above 8, else 2. The tables have the squares
    of odd magnitudes times each mantissa of a scale, and the seven highest bits of their mantissas. `peaks`, `numbers`
    and `powers_of_two` are as in `requantize_kernels.e4m3_blocks`. `histogram_OR2` (of the runs in a row of blocks),
    `sum_SHM`, `squares`, `candidates_3C`, `bins` and `map_RI` are buffers.
    """
    run, width, height, halves = sizes
    for y in range(scale_YX.shape[0]):
        begin, end = y * height, min((y + 1) * height, codes_OB.shape[0])
        histograms, bits = histogram_OR2[: end - begin], bits_OG[begin:end]
        for n in range(begin, end):
            histogram_R2 = histogram_OR2[n - begin]
            _histograms_of_runs(
                *(codes_OB[n].view(np.uint8), zero_OG[n], run, halves, group_R),
                *(pair_X, counted_XI, above_ZI, below_ZI, histogram_R2),
            )
        for x in range(scale_YX.shape[1]):
            runs = (x * width, min((x + 1) * width, group_R.shape[0]), halves)
            largest = _sums_of_block(histograms, bits, group_R, runs, sum_SHM)
            _squares_of_sums(halves, square_SM, bin_SM, sum_SHM, squares)
            candidate_scales(largest, peaks, powers_of_two, candidates_3C[0])
            best, exact = finalists(numbers, squares, candidates_3C, bins)
            scale_YX[y, x] = _better_scale(
                histograms, bits, group_R, runs, candidates_3C[0, best], candidates_3C[0, exact]
            )
        for n in range(begin, end):
            _maps_of_row(bits_OG[n], zero_OG[n], group_R, width, magnitude_ZI, sign_ZI, scale_YX[y], map_RI)
            codes_B, e4m3_BI = codes_OB[n], e4m3_OBI[n]
            for b in range(codes_B.shape[0]):
                looked_up_bytes(codes_B[b], map_RI[run_B[b]], e4m3_BI[b])


@inner
def _sums_of_block(
    histogram_OR2: Words,
    bits_OG: NDArray[np.uint16],
    group_R: Places,
    place: tuple[int, int, int],
    sum_SHM: NDArray[np.float64],
) -> np.float32:
    """Sum the squared powers of two of scales, by their mantissas and by the magnitudes of codes.

    `place` is the block's first run, the one after its last, and the halves of histograms. Returns the largest
    magnitude.
    """
    begin, end, halves = place
    for s in range(128):
        for h in range(halves):
            for m in range(8):
                sum_SHM[s, h, m] = 0.0
    largest = f32(0)
    for n in range(histogram_OR2.shape[0]):
        for r in range(u64(begin), u64(end)):
            bits, histogram = u32(bits_OG[n, group_R[r]]), histogram_OR2[n, r]
            mantissa, exponent = u64(bits & u32(127)), i64(bits >> u32(7))
            largest = max(largest, f32(f32(_largest(histogram)) * u32(bits << u32(16)).view(np.float32)))
            square = u64(u64(2 * exponent + 769) << u64(52)).view(np.float64)  # 2^(2 * (exponent - 127))
            add_scaled_bytes(histogram[0], square, sum_SHM[mantissa, 0])
            if halves > 1:
                add_scaled_bytes(histogram[1], square, sum_SHM[mantissa, 1])
    return f32(largest)


@inner
def _better_scale(
    histogram_OR2: Words,
    bits_OG: NDArray[np.uint16],
    group_R: Places,
    place: tuple[int, int, int],
    best: np.float32,
    exact: np.float32,
) -> np.float32:
    """Return the one of two scales with the least error of a block; `place` is as in `_sums_of_block`."""
    if exact == best:
        return best
    of_best = _error_of_block(histogram_OR2, bits_OG, group_R, place, best)
    of_exact = _error_of_block(histogram_OR2, bits_OG, group_R, place, exact)
    return exact if of_exact <= of_best else best


@inner
def _error_of_block(
    histogram_OR2: Words,
    bits_OG: NDArray[np.uint16],
    group_R: Places,
    place: tuple[int, int, int],
    step: np.float32,
) -> np.float64:
    """Return the squared error of a block with a scale; `place` is as in `_sums_of_block`."""
    begin, end, halves = place
    inverse, total = f32(1) / step, f64(0)
    for n in range(histogram_OR2.shape[0]):
        for r in range(u64(begin), u64(end)):
            scale = u32(u32(bits_OG[n, group_R[r]]) << u32(16)).view(np.float32)
            for h in range(halves):
                total += f64(e4m3_error_of_codes(histogram_OR2[n, r, h], f32(8 * h + 1), scale, step, inverse))
    return total


@inner
def _maps_of_row(
    bits_G: NDArray[np.uint16],
    zero_G: Bytes,
    group_R: Places,
    width: int,
    magnitude_ZI: Bytes,
    sign_ZI: Bytes,
    scale_X: Floats,
    map_RI: Bytes,
) -> None:
    """Write the E4M3 number of each code, for the runs of a row; a block has `width` runs."""
    for x in range(scale_X.shape[0]):
        inverse = f32(1) / scale_X[x]
        for r in range(u64(x * width), u64(min((x + 1) * width, group_R.shape[0]))):
            g = group_R[r]
            scale, zero = u32(u32(bits_G[g]) << u32(16)).view(np.float32), zero_G[g]
            e4m3_of_codes(scale, inverse, magnitude_ZI[zero], sign_ZI[zero], map_RI[r])


@inner
def _squares_of_sums(
    halves: int,
    square_SM: NDArray[np.float64],
    bin_SM: Bytes,
    sum_SHM: NDArray[np.float64],
    squares: NDArray[np.float64],
) -> None:
    """Write the sums of the squares of a block's values by the seven highest bits of their mantissas.

    A magnitude and its double have the same mantissa, so the sums of odd magnitudes include those of their multiples by
    powers of two. Odd magnitudes take turns at four arrays of sums: an addition need not wait for the one before.
    """
    for i in range(squares.shape[0]):
        squares[i] = 0.0
    for s in range(128):
        of_8, square_M, bin_M = sum_SHM[s, 0], square_SM[s], bin_SM[s]
        one = of_8[0] + 4 * of_8[1] + 16 * of_8[3] + 64 * of_8[7]
        three, five, seven = of_8[2] + 4 * of_8[5], of_8[4], of_8[6]
        if halves > 1:
            of_16 = sum_SHM[s, 1]
            three, five, seven = three + 16 * of_16[3], five + 4 * of_16[1], seven + 4 * of_16[5]
            squares[u64(bin_M[4])] += of_16[0] * square_M[4]
            squares[u64(bin_M[5]) + u64(128)] += of_16[2] * square_M[5]
            squares[u64(bin_M[6]) + u64(256)] += of_16[4] * square_M[6]
            squares[u64(bin_M[7]) + u64(384)] += of_16[6] * square_M[7]
        squares[u64(bin_M[0])] += one * square_M[0]
        squares[u64(bin_M[1]) + u64(128)] += three * square_M[1]
        squares[u64(bin_M[2]) + u64(256)] += five * square_M[2]
        squares[u64(bin_M[3]) + u64(384)] += seven * square_M[3]
