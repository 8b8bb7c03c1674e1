"""Quantize int4 weights again from their codes: what `requantize.py` gives for their values, much faster.

With scales in bfloat16, groups of columns come in few kinds: 128 mantissas of the scale, and eight largest magnitudes
of codes. The exponent of the scale only shifts everything. What depends on the kind is computed once, in tables; a
group then needs its histogram, the number of codes of each magnitude.

- NVFP4: the squared error of each magnitude with each candidate. Of eleven candidates at most eight are the best for
  any group of a kind; the others are left out.
- MXFP4: how much the squared error grows where the scale is halved, an integer for each magnitude.
- FP8 block scales: the squares of the values of a block by their mantissas are sums of squares of scales.

Scales are chosen as in `requantize.py`, for FP8 blocks by estimated errors. Errors are added by magnitude here, and by
column there: where two scales have the same error but for the rounding of these sums, the choice may be another. Errors
of MXFP4 are integers, and their sums are exact.
Groups of NVFP4 that may get a subnormal number or one beyond 448 as their scale are rounded by their values.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from trtllm_ct.base.dtypes import DType
from trtllm_ct.layouts.e2m1 import pairs_of_codes, squared_errors
from trtllm_ct.layouts.loops.huge_pages import empty
from trtllm_ct.layouts.requantize import (
    block_peaks,
    mxfp4_scales,
    mxfp4_upper_exponents,
    nvfp4_candidates,
    nvfp4_scales,
    to_e2m1_groups,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    Words = NDArray[np.uint64]
    Number = TypeVar("Number", bound=np.generic)

__all__ = ["WORD", "int4_to_e2m1_exponents", "int4_to_e2m1_groups", "int4_to_e4m3_blocks"]

WORD = 16
"""The codes of a word, and the columns of a group of NVFP4."""

_MANTISSAS, _MAGNITUDES = 128, 9
_LANES = 8
"""The candidates that are compared: eight fill a register."""

_LARGEST_RUN = 8
"""The most words whose histograms are added: their counts fit into bytes."""

_GROUPS_BY_VALUES = 1 << 16
"""The groups without a result that are rounded by their values at once."""

_NEVER = 1e30
"""The error of a lane without a candidate: larger than any, and finite, since it is multiplied by 0 too."""

_EXPONENT = 127 - 5
"""The biased exponent of the scales that tables of NVFP4 are made for; candidates are normal numbers of E4M3 there."""


def int4_to_e2m1_groups(
    words_OW: NDArray[np.int32], scale_OG: NDArray[np.uint16], global_scale: float
) -> tuple[Bytes, Bytes]:
    """Return pairs of E2M1 codes, uint8 [N, K/2], and the bits of E4M3 scales of 16 columns, uint8 [N, K/16].

    `words_OW` are int4 codes in offset binary, int32 [N, K/8], and `scale_OG` the bits of bfloat16 scales, uint16
    [N, G]: positive numbers, at most an eighth of `LARGEST_OF_NVFP4` times `global_scale`, a power of two. K / G is a
    multiple of 16.
    """
    import numpy as np

    from trtllm_ct.layouts.loops import requantize_int4_kernels as kernels

    codes_OB, words = _codes(words_OW), _words_of_scale(words_OW, scale_OG)
    tables = _nvfp4_tables(global_scale)
    e2m1_OB, e4m3_OB = np.empty_like(codes_OB), np.empty(codes_OB.shape, np.uint8)
    row = codes_OB.shape[1]
    count_BM = empty((row, _LANES), DType.F32)
    kernels.e2m1_with_e4m3_scales(
        *(codes_OB, np.require(scale_OG, requirements="C"), words, _EXPONENT, tables.above, kernels.histograms()),
        *(tables.first, tables.steps, tables.errors, tables.maps),
        *(count_BM, np.empty(row, np.uint64), e2m1_OB, e4m3_OB),
    )
    if not e4m3_OB.min():
        _round_by_values(codes_OB, scale_OG, global_scale, e2m1_OB, e4m3_OB)
    return e2m1_OB.view(np.uint8), e4m3_OB


def _round_by_values(
    codes_OB: Words, scale_OG: NDArray[np.uint16], global_scale: float, e2m1_OB: Words, e4m3_OB: Bytes
) -> None:
    """Write the result of groups that have none, whose scales are 0, from their values; some at a time."""
    import numpy as np

    words = codes_OB.shape[1] // scale_OG.shape[1]
    rows, places = np.nonzero(e4m3_OB == 0)
    for first in range(0, rows.size, _GROUPS_BY_VALUES):
        row, place = rows[first : first + _GROUPS_BY_VALUES], places[first : first + _GROUPS_BY_VALUES]
        # Zeros fill the last one of long rows, of which the loops are fast.
        values = np.zeros((-(-row.size // 64), 64 * WORD), np.float32)
        values.reshape(-1, WORD)[: row.size] = _values(codes_OB[row, place], scale_OG[row, place // words])
        pairs, scales = to_e2m1_groups(values, WORD, global_scale)
        e2m1_OB[row, place] = pairs.view(np.uint64).ravel()[: row.size]
        e4m3_OB[row, place] = scales.ravel()[: row.size]


def int4_to_e2m1_exponents(words_OW: NDArray[np.int32], scale_OG: NDArray[np.uint16]) -> tuple[Bytes, Bytes]:
    """Return pairs of E2M1 codes, uint8 [N, K/2], and E8M0 exponents of 32 columns, uint8 [N, K/32].

    `words_OW` are int4 codes in offset binary, int32 [N, K/8], and `scale_OG` the bits of bfloat16 scales from 2^-40 to
    2^40, uint16 [N, G]. K / G is a multiple of 32.
    """
    import numpy as np

    from trtllm_ct.layouts.loops import requantize_int4_kernels as kernels

    codes_OB, words = _codes(words_OW), _words_of_scale(words_OW, scale_OG)
    e2m1_OB, exponent_OX = np.empty_like(codes_OB), np.empty((codes_OB.shape[0], codes_OB.shape[1] // 2), np.uint8)
    kernels.e2m1_with_exponents(
        *(codes_OB, np.require(scale_OG, requirements="C"), words, kernels.histograms(), *_mxfp4_tables()),
        *(e2m1_OB, exponent_OX),
    )
    return e2m1_OB.view(np.uint8), exponent_OX


def int4_to_e4m3_blocks(
    words_OW: NDArray[np.int32],
    scale_OG: NDArray[np.uint16],
    block: tuple[int, int] = (128, 128),
    *,
    powers_of_two: bool = False,
) -> tuple[Bytes, Floats]:
    """Return E4M3 codes, uint8 [N, K], and the scale of each block, float32 [ceil(N / rows), ceil(K / columns)].

    `words_OW` are int4 codes in offset binary, int32 [N, K/8], and `scale_OG` the bits of bfloat16 scales from 2^-40 to
    2^40, uint16 [N, G]. K / G and the columns of a block are multiples of 16. With `powers_of_two` all scales are.
    """
    import numpy as np

    from trtllm_ct.layouts.loops import requantize_int4_kernels as kernels

    codes_OB, words = _codes(words_OW), _words_of_scale(words_OW, scale_OG)
    (height, columns), (rows, row) = block, codes_OB.shape
    width = columns // WORD
    run = gcd(words, width, _LARGEST_RUN)
    e4m3_OBI = np.empty((rows, row, WORD), np.uint8)
    scale_YX = np.empty((-(-rows // height), -(-row // width)), np.float32)
    peaks, numbers = block_peaks(powers_of_two=powers_of_two)
    kernels.e4m3_blocks(
        *(codes_OB, np.require(scale_OG, requirements="C"), (run, words, width, height), peaks, powers_of_two, numbers),
        *(kernels.histograms(), *_e4m3_tables(), np.empty((min(rows, height), -(-row // run)), np.uint64)),
        *(
            empty((_MANTISSAS, 8), DType.F64),
            np.empty(512),
            empty((3, len(peaks)), DType.F32),
            np.empty(WORD, np.uint8),
        ),
        *(e4m3_OBI, scale_YX),
    )
    return e4m3_OBI.reshape(rows, -1), scale_YX


class _Nvfp4Tables(NamedTuple):
    """What is computed once for each kind of group.

    `first` are the bits of its first candidate, uint8 [S]; `above` is the number of those after it. For the candidates
    that may be the best, in lanes, `steps` are their bits, uint8 [(S + 2) * C], `errors` the squared errors of
    magnitudes of codes, float32 [S + 2, M, C], and `maps` the E2M1 code of each code, sixteen in a word, uint64
    [(S + 2) * C].
    Two more kinds are at the end of all but `first`: a group of zeros, whose scale is the smallest number, and one
    without a result.
    """

    first: Bytes
    above: int
    steps: Bytes
    errors: Floats
    maps: Words


@cache
def _nvfp4_tables(global_scale: float) -> _Nvfp4Tables:
    """Return the tables for scales of bfloat16 with the exponent `_EXPONENT`."""
    import numpy as np

    scale_S = np.repeat(_scales(_EXPONENT), _MAGNITUDES)
    magnitudes = np.arange(_MAGNITUDES, dtype=np.float32)
    candidates_CS = nvfp4_candidates(scale_S * np.tile(magnitudes, _MANTISSAS), global_scale)
    steps_SC = np.ascontiguousarray(nvfp4_scales(candidates_CS, global_scale).T)
    error_SMC, map_SC = _errors(scale_S, steps_SC), _maps(scale_S, steps_SC)
    kept_SC = _best_for_some_group(error_SMC)
    lane_SC = np.argsort(~kept_SC, axis=1, kind="stable")[:, :_LANES]
    is_free = ~np.take_along_axis(kept_SC, lane_SC, axis=1)
    errors = empty((len(scale_S) + 2, _MAGNITUDES - 1, _LANES), DType.F32)
    errors[:-2] = np.where(is_free[:, None], _NEVER, np.take_along_axis(error_SMC, lane_SC[:, None], axis=2))
    errors[-2:] = 0
    return _Nvfp4Tables(
        candidates_CS[0],
        len(candidates_CS) - 1,
        _with_two_more(np.take_along_axis(candidates_CS.T, lane_SC, axis=1), (1, 0)),
        errors,
        _with_two_more(np.take_along_axis(map_SC, lane_SC, axis=1), (0, 0)),
    )


def _with_two_more(table: NDArray[Number], values: tuple[int, int]) -> NDArray[Number]:
    """Return a table with two more kinds, which have the same value everywhere, in one axis."""
    import numpy as np

    return np.concatenate([table, *(np.full_like(table[:1], value) for value in values)]).ravel()


def _best_for_some_group(error_SMC: Floats) -> NDArray[np.bool_]:
    """Return which candidates have the least error of some group of a kind, bool [S, C]; at most eight of each kind.

    A candidate is left out where another has no more error for any magnitude, and is before it if both are alike. Where
    too many are left, all groups are tried.
    """
    import numpy as np

    kinds, magnitudes, count = error_SMC.shape
    largest_S = np.arange(kinds) % _MAGNITUDES
    occurs = np.arange(1, magnitudes + 1) <= largest_S[:, None]
    # One that beats a candidate has nowhere more error: [S, candidate, other].
    no_more = (error_SMC[:, :, None, :] <= error_SMC[:, :, :, None]) | ~occurs[:, :, None, None]
    beats: NDArray[np.bool_] = np.all(no_more, axis=1)
    is_alike = np.swapaxes(beats, 1, 2) & beats
    kept: NDArray[np.bool_] = ~(beats & (~is_alike | np.tri(count, k=-1, dtype=bool))).any(axis=2)
    for s in np.flatnonzero(kept.sum(axis=1) > _LANES):
        errors = error_SMC[s, : largest_S[s]].T @ _groups(int(largest_S[s])).T
        least, is_done = errors.min(axis=0), np.zeros(errors.shape[1], bool)
        for c in range(count):  # the first of several with the least error is the best one
            is_best = (errors[c] == least) & ~is_done
            kept[s, c], is_done = is_best.any(), is_done | is_best
    return kept


@cache
def _groups(largest: int) -> Floats:
    """Return the histograms of all groups of sixteen codes with this largest magnitude, float32 [groups, largest]."""
    import numpy as np

    counts = np.zeros((1, 0), np.float32)
    for _ in range(largest):
        left = 16 - counts.sum(axis=1).astype(int)
        added = np.concatenate([np.arange(more) for more in left])
        counts = np.concatenate([np.repeat(counts, left, axis=0), added[:, None].astype(np.float32)], axis=1)
    counts[:, -1] += 1
    return counts


@cache
def _mxfp4_tables() -> tuple[Bytes, NDArray[np.int32], Words]:
    """Return the larger exponent, uint8 [S], and how much errors grow with the smaller one, int32 [S, M].

    Third is the E2M1 code of each code, sixteen in a word, with both exponents, uint64 [S, 2]. All are for scales from
    1 to 2, of which codes are multiples of 2^-7, as numbers of E2M1 are with both exponents: errors are counted in
    units of 2^-14 and are exact.
    """
    import numpy as np

    scale_S = np.repeat(_scales(127), _MAGNITUDES)
    magnitudes = np.arange(_MAGNITUDES, dtype=np.float32)
    upper_S = mxfp4_upper_exponents(scale_S * np.tile(magnitudes, _MANTISSAS))
    power_SC = mxfp4_scales(upper_S[:, None] - np.arange(2))
    error_SMC = _errors(scale_S, power_SC)
    gain_SM = ((error_SMC[:, :, 1] - error_SMC[:, :, 0]) * 2**14).astype(np.int32)
    return upper_S.astype(np.uint8), gain_SM, _maps(scale_S, power_SC)


@cache
def _e4m3_tables() -> tuple[NDArray[np.float64], Bytes]:
    """Return the squares of codes times scales from 1 to 2, float64 [128, 8], and the bins of these products, uint8.

    A bin is the seven highest bits of the mantissa.
    """
    import numpy as np

    products = _scales(127)[:, None] * np.arange(1, 9, dtype=np.float32)
    bins = ((products.view(np.uint32) >> np.uint32(16)) & np.uint32(127)).astype(np.uint8)
    return np.square(products.astype(np.float64)), bins


def _errors(scale_S: Floats, steps_SC: Floats) -> Floats:
    """Return the squared errors of codes of each magnitude above 0 with new scales, float32 [S, M, C]."""
    import numpy as np

    values_SM = scale_S[:, None] * np.arange(1, _MAGNITUDES).astype(np.float32)
    shape = (*values_SM.shape, steps_SC.shape[1])
    values, steps = np.broadcast_to(values_SM[..., None], shape), np.broadcast_to(steps_SC[:, None], shape)
    return squared_errors(values[..., None], steps)


def _maps(scale_S: Floats, steps_SC: Floats) -> Words:
    """Return the E2M1 code of each code with new scales, sixteen in a word, uint64 [S, C]."""
    import numpy as np

    codes = scale_S[:, None, None] * np.arange(-8, 8, dtype=np.float32)
    maps: Words = pairs_of_codes(np.tile(codes, (1, steps_SC.shape[1], 1)), steps_SC).view(np.uint64)
    return maps


def _scales(exponent: int) -> Floats:
    """Return the numbers of bfloat16 with a biased exponent, float32 [128]."""
    import numpy as np

    mantissas = np.arange(_MANTISSAS, dtype=np.uint32) << np.uint32(16)
    scales: Floats = (mantissas | np.uint32(exponent << 23)).view(np.float32)
    return scales


def _codes(words_OW: NDArray[np.int32]) -> Words:
    """Return words of sixteen codes, uint64 [N, K/16]."""
    import numpy as np

    return np.require(words_OW, requirements="C").view(np.uint64)


def _words_of_scale(words_OW: NDArray[np.int32], scale_OG: NDArray[np.uint16]) -> int:
    """Return the number of words of sixteen codes that have the same scale."""
    words: int = words_OW.shape[1] // 2 // scale_OG.shape[1]
    return words


def _values(codes_B: Words, bits_B: NDArray[np.uint16]) -> Floats:
    """Return the values of words [B] with scales [B], float32 [B, 16]; they are exact."""
    import numpy as np

    fields = (codes_B[:, None] >> np.arange(0, 64, 4, dtype=np.uint64)) & np.uint64(15)
    scale = (bits_B.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return (fields.astype(np.float32) - np.float32(8)) * scale[:, None]
