"""Quantize int4 weights again as NVFP4, from their codes: the bits of `to_e2m1_groups`, in a fraction of the time.

With scales in bfloat16, groups of 16 columns come in few kinds: 128 mantissas of the scale and eight largest magnitudes
of codes. The exponent of the scale only shifts all candidates, as long as they are normal numbers of E4M3. So the
squared error of each code with each candidate, and the E2M1 code that it gets, are computed once for each kind. For a
group, sixteen rows of these errors are added, in the order in which `to_e2m1_groups` adds them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.layouts.e2m1 import pairs_of_codes, squared_errors
from trtllm_ct.layouts.requantize import nvfp4_candidates, nvfp4_scales, to_e2m1_groups

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

__all__ = ["INT4_GROUP", "int4_to_e2m1_groups"]

INT4_GROUP = 16
"""The columns of a group of NVFP4: the codes of one are a word."""

_MANTISSAS, _MAGNITUDES = 128, 9
_LANES = 12
"""The errors of eleven candidates, and one that is never the least: twelve fill three SIMD registers."""

_EXPONENT = 127 - 5
"""The exponent of bfloat16 that tables are made for; candidates are normal numbers of E4M3 with it."""


def int4_to_e2m1_groups(
    words_OW: NDArray[np.int32], scale_OG: NDArray[np.uint16], global_scale: float
) -> tuple[Bytes, Bytes]:
    """Return pairs of E2M1 codes, uint8 [N, K/2], and the bits of E4M3 scales of 16 columns, uint8 [N, K/16].

    `words_OW` are int4 codes in offset binary, int32 [N, K/8], and `scale_OG` the bits of bfloat16 scales, uint16
    [N, G]: positive numbers, at most an eighth of `LARGEST_OF_NVFP4` times `global_scale`, a power of two. K / G is a
    multiple of 16.
    """
    import numpy as np

    from trtllm_ct.layouts.loops import requantize_int4_kernels

    codes_OB = np.require(words_OW, requirements="C").view(np.uint64)
    tables = _tables(global_scale)
    e2m1_OB, e4m3_OB = np.empty_like(codes_OB), np.empty(codes_OB.shape, np.uint8)
    columns = codes_OB.shape[1] // scale_OG.shape[1]
    requantize_int4_kernels.e2m1_from_int4(
        *(codes_OB, np.require(scale_OG, requirements="C"), columns, _EXPONENT, tables.above),
        *(tables.first, tables.errors, tables.maps, np.empty((3, codes_OB.shape[1]), np.uint64)),
        *(e2m1_OB, e4m3_OB),
    )
    others = np.nonzero(e4m3_OB == 0)
    if others[0].size:
        values = _values(codes_OB[others], scale_OG[others[0], others[1] // columns])
        pairs, scales = to_e2m1_groups(values, INT4_GROUP, global_scale)
        e2m1_OB[others], e4m3_OB[others] = pairs.view(np.uint64)[:, 0], scales[:, 0]
    return e2m1_OB.view(np.uint8), e4m3_OB


class _Tables(NamedTuple):
    """What is computed once for each kind of group.

    `first` are the bits of its first candidate, uint8 [S]; `above` is the number of those after it. `errors` are the
    squared errors of magnitudes of codes, float32 [S, M, C], and `maps` the E2M1 code of each code, sixteen in a word,
    uint64 [S, C].
    """

    first: Bytes
    above: int
    errors: NDArray[np.float32]
    maps: NDArray[np.uint64]


@cache
def _tables(global_scale: float) -> _Tables:
    """Return the tables for scales of bfloat16 with the exponent `_EXPONENT`."""
    import numpy as np

    mantissas = np.arange(_MANTISSAS, dtype=np.uint32) << np.uint32(16)
    scale = (mantissas | np.uint32(_EXPONENT << 23)).view(np.float32)
    scale_S = np.repeat(scale, _MAGNITUDES)
    magnitudes = np.arange(_MAGNITUDES, dtype=np.float32)
    candidates_CS = nvfp4_candidates(scale_S * np.tile(magnitudes, _MANTISSAS), global_scale)
    steps_SC = np.ascontiguousarray(nvfp4_scales(candidates_CS, global_scale).T)
    kinds, count = steps_SC.shape
    error_SMC = np.full((kinds, _MAGNITUDES, _LANES), np.inf, np.float32)
    for m, magnitude in enumerate(magnitudes):
        error_SMC[:, m, :count] = squared_errors(np.tile((scale_S * magnitude)[:, None, None], (1, count, 1)), steps_SC)
    codes = scale_S[:, None, None] * np.arange(-8, 8, dtype=np.float32)
    pairs = pairs_of_codes(np.tile(codes, (1, count, 1)), steps_SC)
    map_SC = np.zeros((kinds, _LANES), np.uint64)
    map_SC[:, :count] = pairs.view(np.uint64)
    return _Tables(candidates_CS[0], count - 1, error_SMC, map_SC)


def _values(codes_B: NDArray[np.uint64], scale_B: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the values of groups, float32 [groups, 16]; they are exact."""
    import numpy as np

    fields = (codes_B[:, None] >> np.arange(0, 64, 4, dtype=np.uint64)) & np.uint64(15)
    scale = (scale_B.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return (fields.astype(np.float32) - np.float32(8)) * scale[:, None]
