"""Compiled loops that quantize int4 weights again, to NVFP4; `layouts/requantize_int4.py` explains how.

Codes, numbers, histograms and axis letters are those of `requantize_int4_kernels.py`. Symmetric weights have few
different magnitudes, so the errors of a group are sums by magnitude. With zero points they are sums of bytes that are
looked up by the magnitude of each code.
Rows are treated by several short steps, each for all groups, so that the processor works on many groups at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.layouts.loops.lanes import (
    floats_of_bytes,
    highest_byte,
    least_lane,
    least_of_eight,
    least_of_twelve,
    looked_up_fields,
    mapped_numbers,
    numbers_of_codes,
)
from trtllm_ct.layouts.loops.machine_code import inner, kernel
from trtllm_ct.layouts.loops.requantize_int4_kernels import histogram_of_symmetric, number_tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    Words = NDArray[np.uint64]
    Places = NDArray[np.uint32]

__all__ = ["e2m1_with_e4m3_scales", "e2m1_with_e4m3_scales_and_zero_points"]

u8, u32, u64, i64 = np.uint8, np.uint32, np.uint64, np.int64

_SYMMETRIC_KINDS, _KINDS, _LANES = u64(9), u64(16), u64(16)
"""The kinds of groups for each mantissa: largest magnitudes from 0 to 8 in symmetric weights, and from 0 to 15 with
zero points, where each kind has sixteen lanes."""

_NUMBERS = u64(32)
"""The bytes of the numbers of a group: sixteen magnitudes and sixteen signs."""

_LARGEST_OF_SYMMETRIC = u64(8)
"""Groups with larger magnitudes have more scales that may be the best."""

_CODES = [[0x7F80899ABCDEF012, 0x8888888888888888], [0x1234567887654321, 0x0]]
_BITS, _ZEROS = [[0x3D81, 0x3C00], [0x3F81, 0x0001]], [[8, 8], [3, 0]]
_MAGNITUDE, _SIGN, _PAIR = (table.tolist() for table in number_tables()[:3])
# Tables for the two mantissas of the example's scales, instead of 128.
_EXAMPLE_SYMMETRIC_KINDS, _EXAMPLE_KINDS = 18, 32


@kernel(
    *(
        _CODES,
        _BITS,
        1,
        122,
        10,
        _PAIR,
        [20] * _EXAMPLE_SYMMETRIC_KINDS,
        list(range(20, 28)) * (_EXAMPLE_SYMMETRIC_KINDS + 2),
    ),
    [[[float(m * (c + 1) % 7) for c in range(8)] for m in range(8)]] * (_EXAMPLE_SYMMETRIC_KINDS + 2),
    _CODES[1] * 4 * (_EXAMPLE_SYMMETRIC_KINDS + 2),
    *([[0.0] * 8] * 2, [0] * 2, [[0] * 2] * 2, [[0] * 2] * 2),
)
def e2m1_with_e4m3_scales(
    codes_OB: Words,
    bits_OG: NDArray[np.uint16],
    words: int,
    exponent: int,
    above: int,
    pair_X: Words,
    first_S: Bytes,
    step_L: Bytes,
    error_SMC: Floats,
    map_L: Words,
    count_BM: Floats,
    slot_B: Words,
    e2m1_OB: Words,
    e4m3_OB: Bytes,
) -> None:
    """Quantize symmetric int4 codes to E2M1 codes, with the bits of an E4M3 scale for each group of 16 columns.

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
            histogram = histogram_of_symmetric(byte_X, u64(8 * b), pair_X)
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
        kind = u64(bits & u32(127)) * _SYMMETRIC_KINDS
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
    *(_CODES, _BITS, _ZEROS, [0, 1], (122, 120, 124), 10, _MAGNITUDE, _SIGN, [20] * _EXAMPLE_KINDS),
    *(list(range(20, 36)) * _EXAMPLE_KINDS, [64 * (lane % 3) for lane in range(16 * _EXAMPLE_KINDS)]),
    *([5 * x % 16 for x in range(192)], [7 * x % 11 - 5 for x in range(64 * _EXAMPLE_KINDS)]),
    *([0] * 64, [0] * 2, [[0] * 2] * 2, [[0] * 2] * 2, [[0] * 2] * 2),
)
def e2m1_with_e4m3_scales_and_zero_points(
    codes_OB: Words,
    bits_OG: NDArray[np.uint16],
    zero_OG: Bytes,
    group_B: Places,
    exponents: tuple[int, int, int],
    above: int,
    magnitude_ZI: Bytes,
    sign_ZI: Bytes,
    first_S: Bytes,
    step_L: Bytes,
    record_L: NDArray[np.uint16],
    record_X: Bytes,
    factor_X: NDArray[np.int16],
    number_X: Bytes,
    lane_B: Words,
    place_2B: Words,
    e2m1_OB: Words,
    e4m3_OB: Bytes,
) -> None:
    """Quantize int4 codes with zero points as `e2m1_with_e4m3_scales` does symmetric ones.

    The tables are for scales with the first of the biased exponents, and have sixteen lanes of scales for each kind:
    `step_L` has the bits of the scale, `record_L` the place of its record in `record_X`, and `factor_X` the factors of
    errors. A record has 64 bytes: what `least_of_eight` says, then the E2M1 codes of magnitudes. Kinds with magnitudes
    of at most 8 have up to eight scales, others twelve. `first_S` has the bits of the first scale that would be tried,
    and `above` is the number of those after it. With exponents from the second to the third, all of them are normal
    numbers of E4M3.
    `number_X`, `lane_B` and `place_2B` are buffers: magnitudes and signs of codes, a group's first lane, then that of
    its best scale, and the places of groups with small magnitudes, and those of others.
    The scale of a group is 0 where one that would be tried is no normal number of E4M3; then it has no result.
    """
    for n in range(codes_OB.shape[0]):
        codes_B, bits_G, zero_G, e2m1_B, e4m3_B = codes_OB[n], bits_OG[n], zero_OG[n], e2m1_OB[n], e4m3_OB[n]
        for b in range(codes_B.shape[0]):
            g, place = group_B[b], u64(b) * _NUMBERS
            largest = numbers_of_codes(codes_B[b], magnitude_ZI[zero_G[g]], sign_ZI[zero_G[g]], number_X, place)
            lane_B[b] = (u64(bits_G[g] & u32(127)) * _KINDS + largest) * _LANES
        small, large = _places_by_magnitude(lane_B[: codes_B.shape[0]], place_2B)
        for p in range(small):
            b = place_2B[0, p]
            lane_B[b] += least_of_eight(number_X, b * _NUMBERS, record_L, lane_B[b], record_X, factor_X)
        for p in range(large):
            b = place_2B[1, p]
            lane_B[b] += least_of_twelve(number_X, b * _NUMBERS, record_L, lane_B[b], record_X, factor_X)
        for b in range(codes_B.shape[0]):
            e2m1_B[b] = mapped_numbers(number_X, u64(b) * _NUMBERS, record_X, u64(record_L[lane_B[b]]) + u64(32))
        _bits_of_scales(lane_B, bits_G, group_B, exponents[0], step_L, e4m3_B)
        if not _are_between(bits_G, exponents[1], exponents[2]):
            _without_result(lane_B, bits_G, group_B, exponents[0], above, first_S, e4m3_B)


@inner
def _places_by_magnitude(lane_B: Words, place_2B: Words) -> tuple[np.uint64, np.uint64]:
    """Write the places of groups with small magnitudes, and those of others; return the numbers of both."""
    small = large = u64(0)
    for b in range(lane_B.shape[0]):
        # No branch: the processor would often guess wrong.
        is_large = u64(lane_B[b] // _LANES % _KINDS > _LARGEST_OF_SYMMETRIC)
        place_2B[0, small] = place_2B[1, large] = u64(b)
        small, large = small + u64(1) - is_large, large + is_large
    return small, large


@inner
def _bits_of_scales(
    lane_B: Words, bits_G: NDArray[np.uint16], group_B: Places, exponent: int, step_L: Bytes, e4m3_B: Bytes
) -> None:
    """Write the bits of the scales of groups in a row; 1 for zeros."""
    for b in range(e4m3_B.shape[0]):
        lane = lane_B[b]
        shift = (u64(bits_G[group_B[b]] >> u32(7)) - u64(exponent)) * u64(8)
        has_codes = lane // _LANES % _KINDS != u64(0)
        e4m3_B[b] = u8(u64(step_L[lane]) + (shift if has_codes else u64(0)))


@inner
def _are_between(bits_G: NDArray[np.uint16], lowest: int, highest: int) -> bool:
    """Whether the exponents of all scales of a row are in a range."""
    outside = u64(0)
    for g in range(bits_G.shape[0]):
        exponent = i64(bits_G[g] >> u32(7))
        outside += u64(exponent < lowest or exponent > highest)
    return bool(outside == u64(0))


@inner
def _without_result(
    lane_B: Words,
    bits_G: NDArray[np.uint16],
    group_B: Places,
    exponent: int,
    above: int,
    first_S: Bytes,
    e4m3_B: Bytes,
) -> None:
    """Write 0 for the groups of a row that would have tried a scale that is no normal number of E4M3."""
    for b in range(e4m3_B.shape[0]):
        slot, shift = lane_B[b] // _LANES, 8 * (i64(bits_G[group_B[b]] >> u32(7)) - exponent)
        first, has_codes = i64(first_S[slot]) + shift, slot % _KINDS != u64(0)
        if has_codes and (first < 8 or first + above > 126):
            e4m3_B[b] = u8(0)
