"""Quantize int4 weights again from their codes: what `requantize.py` gives for their values, much faster.

A value is a number times a scale; the number is the difference of a code and its zero point, and has four significant
bits. With scales in bfloat16, groups of columns come in few kinds: 128 mantissas of the scale, and the largest
magnitudes of numbers, up to 8 in symmetric weights and up to 15 in others. The exponent of the scale only shifts
everything. What depends on the kind is computed once, in tables.

- NVFP4: of eleven candidates at most eight are the best for any group whose magnitudes are at most 8; the others are
  left out. In symmetric weights, the squared error is a sum of squared errors of magnitudes, by how often each occurs.
  With zero points it is a sum of integers, but for the values' own squares: of products of magnitudes and numbers of
  E2M1, and of squares of these numbers, looked up for each code.
- MXFP4: how much the squared error grows where the scale is halved, an integer for each magnitude. The histogram of a
  group, how often each magnitude occurs, gives the sum.
- FP8 block scales: the squares of the values of a block by their mantissas are sums of squares of scales.

Scales are chosen as in `requantize.py`, for FP8 blocks by estimated errors. Where two scales have the same error but
for the rounding of sums, the choice may be another. Errors of MXFP4 are integers, and their sums are exact.
Groups of NVFP4 that may get a subnormal number or one beyond 448 as their scale are rounded by their values.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_ct.base.dtypes import DType
from trtllm_ct.layouts.loops.huge_pages import empty
from trtllm_ct.layouts.requantize import block_peaks, to_e2m1_groups
from trtllm_ct.layouts.requantize_int4_tables import (
    MANTISSAS,
    SYMMETRIC,
    WORD,
    e4m3_tables,
    mxfp4_tables,
    nvfp4_symmetric_tables,
    nvfp4_tables,
    table_exponent,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    Words = NDArray[np.uint64]

__all__ = ["int4_to_e2m1_exponents", "int4_to_e2m1_groups", "int4_to_e4m3_blocks"]

_LARGEST_RUN = 8
"""The most words whose histograms are added: their counts fit into bytes."""

_GROUPS_BY_VALUES = 1 << 16
"""The groups without a result that are rounded by their values at once."""


def int4_to_e2m1_groups(
    words_OW: NDArray[np.int32], scale_OG: NDArray[np.uint16], zero_OG: Bytes | None, global_scale: float
) -> tuple[Bytes, Bytes]:
    """Return pairs of E2M1 codes, uint8 [N, K/2], and the bits of E4M3 scales of 16 columns, uint8 [N, K/16].

    `words_OW` are int4 codes in offset binary, int32 [N, K/8], `scale_OG` the bits of bfloat16 scales, uint16 [N, G],
    and `zero_OG` the codes that mean 0, uint8 [N, G] from 0 to 15; None is 8 everywhere. K / G is a multiple of 16.
    Scales are positive, and no number times its scale is beyond `LARGEST_OF_NVFP4` times `global_scale`, a power of
    two.
    """
    import numpy as np

    weight = _weight(words_OW, scale_OG, zero_OG)
    e2m1_OB, e4m3_OB = np.empty_like(weight.codes), np.empty(weight.codes.shape, np.uint8)
    (_write_symmetric if zero_OG is None else _write_with_zero_points)(weight, global_scale, e2m1_OB, e4m3_OB)
    if not e4m3_OB.min(initial=1):
        _round_by_values(weight, global_scale, e2m1_OB, e4m3_OB)
    return e2m1_OB.view(np.uint8), e4m3_OB


def _write_symmetric(weight: _Weight, global_scale: float, e2m1_OB: Words, e4m3_OB: Bytes) -> None:
    """Write codes and scales of a weight without zero points; the scale of a group without a result is 0."""
    import numpy as np

    from trtllm_ct.layouts.loops import requantize_int4_nvfp4_kernels as kernels
    from trtllm_ct.layouts.loops.requantize_int4_kernels import number_tables

    tables, row = nvfp4_symmetric_tables(global_scale), e2m1_OB.shape[1]
    kernels.e2m1_with_e4m3_scales(
        *(weight.codes, weight.scale, weight.words, table_exponent(global_scale), tables.above, number_tables().pair),
        *(tables.first, tables.steps, tables.errors, tables.maps),
        *(empty((row, 8), DType.F32), np.empty(row, np.uint64), e2m1_OB, e4m3_OB),
    )


def _write_with_zero_points(weight: _Weight, global_scale: float, e2m1_OB: Words, e4m3_OB: Bytes) -> None:
    """Write codes and scales of a weight with zero points; the scale of a group without a result is 0."""
    import numpy as np

    from trtllm_ct.layouts.loops import requantize_int4_nvfp4_kernels as kernels
    from trtllm_ct.layouts.loops.requantize_int4_kernels import number_tables

    tables, row = nvfp4_tables(global_scale), e2m1_OB.shape[1]
    kernels.e2m1_with_e4m3_scales_and_zero_points(
        *(*weight[:-1], _places(row, weight.words), tables.exponents, tables.above, *number_tables()[:2]),
        *(tables.first, tables.steps, tables.places, tables.records, tables.factors),
        *(
            empty((2 * row * WORD,), DType.U8),
            np.empty(row, np.uint64),
            np.empty((2, row), np.uint64),
            e2m1_OB,
            e4m3_OB,
        ),
    )


def _round_by_values(weight: _Weight, global_scale: float, e2m1_OB: Words, e4m3_OB: Bytes) -> None:
    """Write the result of groups that have none, whose scales are 0, from their values; some at a time."""
    import numpy as np

    rows, places = np.nonzero(e4m3_OB == 0)
    for first in range(0, rows.size, _GROUPS_BY_VALUES):
        row, place = rows[first : first + _GROUPS_BY_VALUES], places[first : first + _GROUPS_BY_VALUES]
        # Zeros fill the last one of long rows, of which the loops are fast.
        values = np.zeros((-(-row.size // 64), 64 * WORD), np.float32)
        values.reshape(-1, WORD)[: row.size] = _values(weight, row, place)
        pairs, scales = to_e2m1_groups(values, WORD, global_scale)
        e2m1_OB[row, place] = pairs.view(np.uint64).ravel()[: row.size]
        e4m3_OB[row, place] = scales.ravel()[: row.size]


def int4_to_e2m1_exponents(
    words_OW: NDArray[np.int32], scale_OG: NDArray[np.uint16], zero_OG: Bytes | None
) -> tuple[Bytes, Bytes]:
    """Return pairs of E2M1 codes, uint8 [N, K/2], and E8M0 exponents of 32 columns, uint8 [N, K/32].

    Arguments are as in `int4_to_e2m1_groups`, with scales from 2^-40 to 2^40. K / G is a multiple of 32.
    """
    import numpy as np

    from trtllm_ct.layouts.loops import requantize_int4_kernels as kernels

    weight = _weight(words_OW, scale_OG, zero_OG)
    (rows, row), e2m1_OB = weight.codes.shape, np.empty_like(weight.codes)
    exponent_OX = np.empty((rows, row // 2), np.uint8)
    kernels.e2m1_with_exponents(
        *(
            *weight[:-1],
            _places(row // 2, weight.words // 2),
            _halves(zero_OG),
            *kernels.number_tables(),
            *mxfp4_tables(),
        ),
        *(np.empty((row // 2, 2), np.uint64), np.empty(row // 2, np.uint64)),
        *(e2m1_OB, exponent_OX),
    )
    return e2m1_OB.view(np.uint8), exponent_OX


def int4_to_e4m3_blocks(
    words_OW: NDArray[np.int32],
    scale_OG: NDArray[np.uint16],
    zero_OG: Bytes | None,
    block: tuple[int, int] = (128, 128),
    *,
    powers_of_two: bool = False,
) -> tuple[Bytes, Floats]:
    """Return E4M3 codes, uint8 [N, K], and the scale of each block, float32 [ceil(N / rows), ceil(K / columns)].

    Arguments are as in `int4_to_e2m1_groups`, with scales from 2^-40 to 2^40. K / G and the columns of a block are
    multiples of 16. With `powers_of_two` all scales of blocks are.
    """
    import numpy as np

    from trtllm_ct.layouts.loops import requantize_int4_kernels as kernels

    weight, (height, columns) = _weight(words_OW, scale_OG, zero_OG), block
    (rows, row), width = weight.codes.shape, columns // WORD
    run = gcd(weight.words, width, _LARGEST_RUN)
    runs = (min(rows, height), row // run)
    e4m3_OBI = np.empty((rows, row, WORD), np.uint8)
    scale_YX = np.empty((-(-rows // height), -(-row // width)), np.float32)
    peaks, numbers = block_peaks(powers_of_two=powers_of_two)
    arguments: tuple[Any, ...] = (
        *(*weight[:-1], _places(row // run, weight.words // run), _places(row, run)),
        *((run, width // run, height, _halves(zero_OG)), peaks, powers_of_two, numbers),
        *(*kernels.number_tables(), *e4m3_tables()),
        *(np.empty((*runs, 2), np.uint64), empty((MANTISSAS, 2, 8), DType.F64)),
        *(np.empty(512), empty((3, len(peaks)), DType.F32), empty((2, MANTISSAS), DType.F32)),
        *(np.empty((row // run, WORD), np.uint8), e4m3_OBI, scale_YX),
    )
    kernels.e4m3_blocks(*arguments)
    return e4m3_OBI.reshape(rows, row * WORD), scale_YX


def _halves(zero_OG: Bytes | None) -> int:
    """Return how many words a histogram has: one for magnitudes up to 8."""
    return 1 if zero_OG is None else 2


class _Weight(NamedTuple):
    """int4 codes, sixteen in a word, uint64 [N, K/16]; the bits of scales, uint16 [N, G]; zero points, uint8 [N, G].

    One scale and one zero point hold for `words` words.
    """

    codes: Words
    scale: NDArray[np.uint16]
    zero: Bytes
    words: int


def _weight(words_OW: NDArray[np.int32], scale_OG: NDArray[np.uint16], zero_OG: Bytes | None) -> _Weight:
    """Return a weight as loops take it."""
    import numpy as np

    if zero_OG is not None and zero_OG.shape != scale_OG.shape:
        raise AssertionError(f"zero points are {zero_OG.shape}, and scales {scale_OG.shape}")
    codes = np.require(words_OW, requirements="C").view(np.uint64)
    zero = np.full(scale_OG.shape, SYMMETRIC, np.uint8) if zero_OG is None else np.require(zero_OG, requirements="C")
    return _Weight(codes, np.require(scale_OG, requirements="C"), zero, codes.shape[1] // scale_OG.shape[1])


def _places(count: int, length: int) -> NDArray[np.uint32]:
    """Return the place of each of so many elements among runs of a length."""
    import numpy as np

    return np.arange(count, dtype=np.uint32) // np.uint32(length)


def _values(weight: _Weight, row: NDArray[np.int64], place: NDArray[np.int64]) -> Floats:
    """Return the values of the words at these rows and places, float32 [B, 16]; they are exact."""
    import numpy as np

    fields = (weight.codes[row, place][:, None] >> np.arange(0, 64, 4, dtype=np.uint64)) & np.uint64(15)
    stored = row, place // weight.words
    scale = (weight.scale[stored].astype(np.uint32) << np.uint32(16)).view(np.float32)
    return (fields.astype(np.float32) - weight.zero[stored].astype(np.float32)[:, None]) * scale[:, None]
