"""What is computed once for each kind of group of int4 codes; `requantize_int4.py` explains how it is used.

Axis letters: `S` kinds of groups (a mantissa of the scale, and a largest magnitude), `M` magnitudes, `C` candidates or
lanes of them, `R` records.
"""

from __future__ import annotations

from functools import cache
from math import log2
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.dtypes import DType
from trtllm_ct.layouts.e2m1 import pairs_of_codes, squared_errors
from trtllm_ct.layouts.loops.huge_pages import empty
from trtllm_ct.layouts.requantize import (
    NVFP4_CANDIDATES,
    mxfp4_scales,
    mxfp4_upper_exponents,
    nvfp4_candidates,
    nvfp4_scales,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    Words = NDArray[np.uint64]

__all__ = [
    "MANTISSAS",
    "SYMMETRIC",
    "WORD",
    "e4m3_tables",
    "mxfp4_tables",
    "nvfp4_symmetric_tables",
    "nvfp4_tables",
    "table_exponent",
]

WORD = 16
"""The codes of a word, and the columns of a group of NVFP4."""

MANTISSAS = 128
"""The mantissas of a bfloat16 number."""

SYMMETRIC = 8
"""The zero point of symmetric weights, and the largest magnitude of their numbers."""

_MAGNITUDES = 16
"""The magnitudes of numbers, from 0 on."""

_LANES, _MORE_LANES = 8, 16
"""The lanes of groups whose magnitudes are at most 8, and those of others, of which the last four are not compared."""

_NEVER = 1e30
"""The error of a lane without a candidate: larger than any, and finite, since it is multiplied by 0 too."""


class SymmetricNvfp4Tables(NamedTuple):
    """The tables of NVFP4 for numbers of at most 8.

    `first` are the bits of the first candidate of a kind, uint8 [S]; `above` is the number of those after it. For the
    candidates that may be the best, in lanes, `steps` are their bits, uint8 [(S + 2) * C], `errors` the squared errors
    of magnitudes, float32 [S + 2, M, C], and `maps` the E2M1 code of each int4 code, sixteen in a word, uint64
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
def nvfp4_symmetric_tables(global_scale: float) -> SymmetricNvfp4Tables:
    """Return the tables for scales of bfloat16 with the exponent `table_exponent`."""
    import numpy as np

    scale_S, largest_S, bits_CS = _kinds(global_scale, SYMMETRIC)
    steps_SC = nvfp4_scales(bits_CS.T, global_scale)
    error_SMC = _errors(scale_S, steps_SC, SYMMETRIC)
    lane_SC, count_S = _best_first(error_SMC, largest_S)
    is_free = np.arange(_LANES) >= count_S[:, None]
    errors = empty((len(scale_S) + 2, SYMMETRIC, _LANES), DType.F32)
    errors[:-2] = np.where(is_free[:, None], _NEVER, np.take_along_axis(error_SMC, lane_SC[:, None], axis=2))
    errors[-2:] = 0
    # Of the two kinds at the end, the first has the smallest number as its scale.
    steps = np.pad(np.take_along_axis(bits_CS.T, lane_SC, axis=1), ((0, 2), (0, 0)))
    steps[-2] = 1
    map_SC = _maps(scale_S, np.take_along_axis(steps_SC, lane_SC, axis=1), np.arange(-8, 8, dtype=np.float32))
    return SymmetricNvfp4Tables(
        bits_CS[0],
        len(bits_CS) - 1,
        steps.ravel(),
        errors,
        np.pad(map_SC, ((0, 2), (0, 0))).ravel(),
    )


class Nvfp4Tables(NamedTuple):
    """The tables of NVFP4 for numbers of at most 15.

    `exponents` are the biased exponent of the scales that the tables are for, and the lowest and the highest one with
    which all candidates are normal numbers of E4M3, whatever the largest magnitude is, but for groups of zeros. `first`
    are the bits of the first candidate of a kind, uint8 [S]; `above` is the number of those after it.
    The candidates that may be the best are in sixteen lanes for each kind: at most eight where no magnitude is above 8,
    else twelve. `steps` are their bits, uint8 [S * 16], and `places` those of their records, uint16 [S * 16].
    Candidates with the same E2M1 codes have the same record; `records`, uint8 [R * 64], have by magnitude the product
    of the magnitude and twice its number, the square of twice its number, and the code; 16 bytes are free.
    The squared error of a group is a sum of integers in units of its kind: its own squares, which all candidates have
    in common, and the sums of products and of squares times `factors`, int16 [S * 64], in the order of
    `least_of_eight`.
    """

    exponents: tuple[int, int, int]
    first: Bytes
    above: int
    steps: Bytes
    places: NDArray[np.uint16]
    records: Bytes
    factors: NDArray[np.int16]


@cache
def nvfp4_tables(global_scale: float) -> Nvfp4Tables:
    """Return the tables for scales of bfloat16 with the exponent `table_exponent`."""
    import numpy as np

    scale_S, largest_S, bits_CS = _kinds(global_scale, _MAGNITUDES - 1)
    lane_SL = _lanes_of_kinds(scale_S, largest_S, nvfp4_scales(bits_CS.T, global_scale))
    bits_SL = np.take_along_axis(bits_CS.T, lane_SL, axis=1)
    steps_SL, are_zeros_S = nvfp4_scales(bits_SL, global_scale), largest_S == 0
    factors_S2L = _factors(scale_S, steps_SL) * ~are_zeros_S[:, None, None]
    factors = np.swapaxes(factors_S2L.reshape(-1, 2, 4, 4), 1, 2).astype(np.int16).repeat(2)
    maps = _maps(scale_S, steps_SL, np.arange(_MAGNITUDES, dtype=np.float32))
    maps[are_zeros_S], bits_SL[are_zeros_S] = 0, 1  # the scale of zeros is the smallest number
    records, places = _records(maps.ravel())
    exponents = _normal_exponents(table_exponent(global_scale), bits_CS[:, ~are_zeros_S])
    return Nvfp4Tables(exponents, bits_CS[0], len(bits_CS) - 1, bits_SL.ravel(), places, records, factors)


def _factors(scale_S: Floats, steps_SL: Floats) -> NDArray[np.float64]:
    """Return the factors of products and of squares in the errors of candidates, [S, 2, L]: integers up to 20,736.

    With m the magnitude and n twice its number, the error (m * scale - n * step / 2)^2 is m^2 * scale^2, and n * m
    times the first factor, and n^2 times the second one. Both are divided by a power of two that is common to a kind.
    """
    import numpy as np

    scale_S1, half_SL = scale_S.astype(np.float64)[:, None], steps_SL.astype(np.float64) / 2
    lowest_S1 = _lowest_bit(half_SL).min(axis=1, keepdims=True)
    common_S1 = lowest_S1 * np.minimum(lowest_S1, _lowest_bit(scale_S1))
    factors_S2L: NDArray[np.float64] = np.stack([-2 * half_SL * scale_S1, np.square(half_SL)], axis=1)
    factors_S2L /= common_S1[:, None]
    return factors_S2L


def _normal_exponents(exponent: int, bits_CS: Bytes) -> tuple[int, int, int]:
    """Return the exponent of tables, and the range of those with which candidates are normal numbers of E4M3.

    `bits_CS` are the bits of candidates of all kinds but those of zeros.
    """
    lowest, highest = int(bits_CS.min()), int(bits_CS.max())
    return exponent, exponent - (lowest - 8) // 8, exponent + (126 - highest) // 8


def table_exponent(global_scale: float) -> int:
    """Return the biased exponent of the scales that tables of NVFP4 are made for.

    Eight times the global scale is in the middle of the range where all candidates are normal numbers of E4M3, whatever
    the largest magnitude is.
    """
    return 127 + 3 + int(log2(global_scale))


def _kinds(global_scale: float, largest: int) -> tuple[Floats, NDArray[np.int64], Bytes]:
    """Return the scale and the largest magnitude of each kind, [S], and the bits of its candidates, uint8 [C, S]."""
    import numpy as np

    scale_S = np.repeat(_scales(table_exponent(global_scale)), largest + 1)
    largest_S = np.tile(np.arange(largest + 1), MANTISSAS)
    candidates = nvfp4_candidates(scale_S * largest_S.astype(np.float32), global_scale)
    return scale_S, largest_S, candidates[:NVFP4_CANDIDATES]


def _lanes_of_kinds(scale_S: Floats, largest_S: NDArray[np.int64], steps_SC: Floats) -> NDArray[np.intp]:
    """Return the candidates in the lanes of each kind, [S, 16]; lanes without a candidate repeat the first one."""
    import numpy as np

    lane = np.arange(_MORE_LANES)
    lane_SL = np.tile(np.where(lane < steps_SC.shape[1], lane, 0), (len(scale_S), 1))
    of = largest_S <= SYMMETRIC
    order_SC, count_S = _best_first(_errors(scale_S[of], steps_SC[of], SYMMETRIC), largest_S[of])
    lane_SL[of, :_LANES] = np.where(np.arange(_LANES) < count_S[:, None], order_SC, order_SC[:, :1])
    return lane_SL


def _best_first(error_SMC: Floats, largest_S: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Return the candidates that may be the best, then others, eight of each kind, [S, 8], and the number of the first.

    Both are in their order.
    """
    import numpy as np

    kept_SC = _best_for_some_group(error_SMC, largest_S)
    return np.argsort(~kept_SC, axis=1, kind="stable")[:, :_LANES], kept_SC.sum(axis=1)


def _best_for_some_group(error_SMC: Floats, largest_S: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which candidates have the least error of some group of a kind, bool [S, C]; at most eight of each kind.

    A candidate is left out where another has no more error for any magnitude, and is before it if both are alike. Where
    too many are left, all groups are tried.
    """
    import numpy as np

    _, magnitudes, count = error_SMC.shape
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


def _lowest_bit(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest powers of two of which numbers are multiples."""
    import numpy as np

    mantissa, exponent = np.frexp(numbers)
    integer = (mantissa * 2**24).astype(np.int64)
    lowest: NDArray[np.float64] = np.ldexp((integer & -integer).astype(np.float64), exponent - 24)
    return lowest


def _records(maps: Words) -> tuple[Bytes, NDArray[np.uint16]]:
    """Return the records of different maps, uint8 [R * 64], and the place of the record of each map."""
    import numpy as np

    different, places = np.unique(maps, return_inverse=True)
    codes = _codes_of_maps(different)
    numbers = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.uint8)[codes]
    records = empty((len(different), 4, WORD), DType.U8)
    records[:, 0] = numbers * np.arange(WORD, dtype=np.uint8)
    records[:, 1], records[:, 2], records[:, 3] = np.square(numbers), codes, 0
    return records.reshape(-1), (places * records[0].size).astype(np.uint16)


def _codes_of_maps(maps: Words) -> Bytes:
    """Return the codes in words of sixteen, uint8 [..., 16]."""
    import numpy as np

    return ((maps[:, None] >> np.arange(0, 64, 4, dtype=np.uint64)) & np.uint64(15)).astype(np.uint8)


@cache
def mxfp4_tables() -> tuple[Bytes, NDArray[np.int32], NDArray[np.uint16], Bytes]:
    """Return the larger exponent, uint8 [S], and how much errors grow with the smaller one, int32 [S, 2, 8].

    The first magnitude is 1, and the last element is 0. Last are the E2M1 codes of magnitudes, sixteen for each of
    several records, uint8, and before them the places of the records for both exponents, uint16 [S * 2]. All are for
    scales from 1 to 2, of which numbers are multiples of 2^-7, as numbers of E2M1 are with both exponents: errors are
    counted in units of 2^-14 and are exact.
    """
    import numpy as np

    scale_S = np.repeat(_scales(127), _MAGNITUDES)
    magnitudes = np.arange(_MAGNITUDES, dtype=np.float32)
    upper_S = mxfp4_upper_exponents(scale_S * np.tile(magnitudes, MANTISSAS))
    power_SC = mxfp4_scales(upper_S[:, None] - np.arange(2))
    error_SMC = _errors(scale_S, power_SC, _MAGNITUDES - 1)
    gain_SM = np.zeros((len(scale_S), _MAGNITUDES), np.int32)
    gain_SM[:, :-1] = (error_SMC[:, :, 1] - error_SMC[:, :, 0]) * 2**14
    different, records = np.unique(_maps(scale_S, power_SC, magnitudes), return_inverse=True)
    codes = _codes_of_maps(different).ravel()
    return upper_S.astype(np.uint8), gain_SM.reshape(-1, 2, 8), (WORD * records.ravel()).astype(np.uint16), codes


@cache
def e4m3_tables() -> tuple[NDArray[np.float64], Bytes]:
    """Return the squares of odd magnitudes from 1 to 15 times scales from 1 to 2, float64 [128, 8], and their bins.

    A bin is the seven highest bits of the mantissa, uint8 of the same shape.
    """
    import numpy as np

    products = _scales(127)[:, None] * np.arange(1, _MAGNITUDES, 2, dtype=np.float32)
    bins = ((products.view(np.uint32) >> np.uint32(16)) & np.uint32(127)).astype(np.uint8)
    return np.square(products.astype(np.float64)), bins


def _errors(scale_S: Floats, steps_SC: Floats, largest: int) -> Floats:
    """Return the squared errors of each magnitude from 1 on with new scales, float32 [S, M, C]."""
    import numpy as np

    values_SM = scale_S[:, None] * np.arange(1, largest + 1).astype(np.float32)
    shape = (*values_SM.shape, steps_SC.shape[1])
    values, steps = np.broadcast_to(values_SM[..., None], shape), np.broadcast_to(steps_SC[:, None], shape)
    return squared_errors(values[..., None], steps)


def _maps(scale_S: Floats, steps_SC: Floats, numbers: Floats) -> Words:
    """Return the E2M1 code of each of sixteen numbers with new scales, sixteen in a word, uint64 [S, C]."""
    import numpy as np

    values = scale_S[:, None, None] * numbers
    maps: Words = pairs_of_codes(np.tile(values, (1, steps_SC.shape[1], 1)), steps_SC).view(np.uint64)
    return maps


def _scales(exponent: int) -> Floats:
    """Return the numbers of bfloat16 with a biased exponent, float32 [128]."""
    import numpy as np

    mantissas = np.arange(MANTISSAS, dtype=np.uint32) << np.uint32(16)
    scales: Floats = (mantissas | np.uint32(exponent << 23)).view(np.float32)
    return scales
