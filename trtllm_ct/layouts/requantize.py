"""Quantize weights again, in a format of fewer bits: for each block the scale with the least squared error.

Each function searches the scale of every block among a few candidates, and rounds values / scale to the nearest code,
ties to even. The first of several candidates with the same error is taken.

- E4M3 with a float32 scale for a block (FP8 block scales): E4M3 has the same relative step in every binade, so a factor
  of two changes nothing, and the candidates are the scales with which the largest magnitude becomes a number of E4M3
  from 240 to 448. One of them is exact for integer codes of at most four significant bits whose scales differ by powers
  of two only.
  Some engines round scales up to powers of two while they load weights. With `powers_of_two`, the scale is the smallest
  power with which the largest magnitude is at most 448: such an engine changes no value then.
- E2M1 with an E4M3 scale for a group and a global scale (NVFP4): the candidates are all numbers of E4M3 around a sixth
  of the largest magnitude, far enough that none beyond has less error. If that is subnormal, they are all subnormal
  numbers and the first binade of others: that has all mantissas, and a scale of twice as much has no number up to the
  largest magnitude that it has not. With a scale that is too small for it the largest magnitude becomes 6.
- E2M1 with a power of two for a group (MXFP4): the smallest power with which the largest magnitude is at most 6, and
  half of it. Twice as much has no number that it has not.

The loops in `loops/requantize_kernels.py` do the same for large weights, bit for bit. `requantize_int4.py` finds scales
with the same errors for int4 weights, from their codes, in a fraction of the time.
Sources: OCP 8-bit Floating Point 1.0 and OCP Microscaling Formats 1.0 for the formats. TensorRT-LLM reads the results
as `_torch/modules/fused_moe/quantization.py` and `_torch/modules/linear.py` describe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.layouts.e2m1 import nearest, pairs_of_codes, squared_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

__all__ = [
    "LARGEST_OF_NVFP4",
    "NVFP4_CANDIDATES",
    "block_peaks",
    "mxfp4_scales",
    "mxfp4_upper_exponents",
    "nvfp4_candidates",
    "nvfp4_scales",
    "to_e2m1_exponents",
    "to_e2m1_groups",
    "to_e4m3_blocks",
]

LARGEST_OF_NVFP4 = 6 * 448
"""The largest magnitude of NVFP4 with a global scale of 1."""

_MIN_VALUES = 1 << 16
"""Loops run from this number of values on: loading machine code takes longer for fewer."""

_NUMBERS = (448, 416, 384, 352, 320, 288, 256, 240)
_BETWEEN = tuple(448 * 2 ** (-step / 64) for step in range(1, 65))
"""What the largest magnitude of a block of E4M3 may become: numbers of E4M3, and steps of one percent.

The last step is 448 again, a factor of two below; with it, candidates fill the registers of `SCALES_AT_ONCE`.
"""

_BELOW, _ABOVE = 3, 7
"""How many numbers of E4M3 are tried as scales, below and above the nearest to a sixth of the largest magnitude."""

NVFP4_CANDIDATES = _BELOW + _ABOVE + 1

_SUBNORMAL, _FIRST_BINADE = 8, 16
"""The bits of numbers of E4M3 before which they are subnormal, and before which they have the smallest exponent."""

_LEAST_SCALE = 2.0**-100
"""The smallest scale of float32 and of powers of two, so that its inverse is finite."""

_E4M3_CODES = 127  # from 0 to 448


def to_e4m3_blocks(
    values_OI: Floats, block: tuple[int, int] = (128, 128), *, powers_of_two: bool = False
) -> tuple[Bytes, Floats]:
    """Return E4M3 codes, uint8 [N, K], and the scale of each block, float32 [ceil(N / rows), ceil(K / columns)].

    `values_OI` are finite float32 [N, K]; blocks at the end may be smaller. value = code * scale. With `powers_of_two`
    all scales are.
    """
    import numpy as np

    (rows, columns), shape = block, values_OI.shape
    codes_OI = np.empty(shape, np.uint8)
    scale_XG = np.empty((-(-shape[0] // rows), -(-shape[1] // columns)), np.float32)
    if values_OI.size >= _MIN_VALUES:
        _blocks_by_loop(values_OI, block, codes_OI, scale_XG, powers_of_two=powers_of_two)
        return codes_OI, scale_XG
    for x in range(scale_XG.shape[0]):
        band = slice(x * rows, (x + 1) * rows)
        for g in range(scale_XG.shape[1]):
            values = values_OI[band, g * columns : (g + 1) * columns]
            scale_XG[x, g] = _power_for_block(values) if powers_of_two else _scale_of_block(values)
            codes_OI[band, g * columns : (g + 1) * columns] = _e4m3_codes(values * (np.float32(1) / scale_XG[x, g]))
    return codes_OI, scale_XG


def to_e2m1_groups(values_OI: Floats, group_size: int, global_scale: float) -> tuple[Bytes, Bytes]:
    """Return pairs of E2M1 codes, uint8 [N, K/2], and the bits of E4M3 scales, uint8 [N, K/group_size].

    `values_OI` are finite float32 [N, K], at most `LARGEST_OF_NVFP4` times `global_scale`; K is a multiple of
    `group_size`, which is even. value = code * scale * global scale; `global_scale` is a power of two.
    """
    import numpy as np

    if values_OI.size >= _MIN_VALUES:
        return _groups_by_loop(values_OI, group_size, global_scale)
    values = _groups(values_OI, group_size)
    candidates = nvfp4_candidates(np.abs(values).max(-1), global_scale)
    steps = nvfp4_scales(candidates, global_scale)
    best, least = candidates[0], np.full(candidates.shape[1:], np.inf, np.float32)
    for tried, step in zip(candidates, steps, strict=True):
        error = squared_errors(values, step)
        best, least = np.where(error < least, tried, best), np.minimum(error, least)
    return pairs_of_codes(values, nvfp4_scales(best, global_scale)), best


def nvfp4_candidates(largest: Floats, global_scale: float) -> Bytes:
    """Return the bits of the E4M3 scales to try for groups with these largest magnitudes, uint8 [candidates, ...].

    They are ascending; the last ones are equal where numbers beyond 448 would be tried, and the last four of groups
    that have only `NVFP4_CANDIDATES`.
    """
    import numpy as np

    sixth = largest / np.float32(6)
    middle = _e4m3_codes(sixth * np.float32(1 / global_scale)).astype(np.int64)
    first = np.where(middle < _SUBNORMAL, 1, middle - _BELOW)
    last = np.clip(middle + _ABOVE, _FIRST_BINADE - 1, _E4M3_CODES - 1)
    tried = first + np.arange(_FIRST_BINADE - 1).reshape(-1, *[1] * first.ndim)
    candidates: Bytes = np.minimum(tried, last).astype(np.uint8)
    return candidates


def nvfp4_scales(codes: Bytes, global_scale: float) -> Floats:
    """Return the scales of groups, float32, by their bits as numbers of E4M3."""
    import numpy as np

    scales: Floats = _e4m3_numbers()[codes] * np.float32(global_scale)
    return scales


def to_e2m1_exponents(values_OI: Floats, group_size: int = 32) -> tuple[Bytes, Bytes]:
    """Return pairs of E2M1 codes, uint8 [N, K/2], and E8M0 exponents, uint8 [N, K/group_size].

    `values_OI` are finite float32 [N, K]; K is a multiple of `group_size`, which is even.
    value = code * 2^(exponent - 127).
    """
    import numpy as np

    if values_OI.size >= _MIN_VALUES:
        return _exponents_by_loop(values_OI, group_size)
    values = _groups(values_OI, group_size)
    upper = mxfp4_upper_exponents(np.abs(values).max(-1))
    whole, halved = (squared_errors(values, mxfp4_scales(upper - less)) for less in (0, 1))
    best = np.where(halved < whole, upper - 1, upper)
    return pairs_of_codes(values, mxfp4_scales(best)), best.astype(np.uint8)


def _groups(values_OI: Floats, group_size: int) -> Floats:
    """Return the groups of columns of a weight, [N, G, group_size]."""
    rows, columns = values_OI.shape
    return values_OI.reshape(rows, columns // group_size, group_size)


def mxfp4_upper_exponents(largest: Floats) -> NDArray[np.int64]:
    """Return the larger of both exponents to try for groups with these largest magnitudes."""
    import numpy as np

    mantissa, exponent = np.frexp(np.maximum(largest / np.float32(6), np.float32(_LEAST_SCALE)))
    upper: NDArray[np.int64] = exponent.astype(np.int64) + 127 - (mantissa == 0.5)
    return upper


def _power_for_block(values: Floats) -> np.float32:
    """Return the smallest power of two with which the largest magnitude of a block is at most 448."""
    import numpy as np

    scale = np.maximum(np.abs(values).max() / np.float32(448), np.float32(_LEAST_SCALE))
    mantissa, exponent = np.frexp(scale)
    power: np.float32 = np.ldexp(np.float32(1), exponent - int(mantissa == 0.5))
    return power


def _scale_of_block(values: Floats) -> np.float32:
    """Return the best scale of one block for E4M3 codes.

    Errors are estimated from the sums of the values' squares by the seven highest bits of their mantissas: the relative
    error of a value depends on its mantissa and that of the scale. Where a scale seems to be exact with which the
    largest magnitude becomes a number of E4M3, its error and that of the best one are compared on all values.
    """
    import numpy as np

    peaks, _ = block_peaks(powers_of_two=False)
    scales = np.maximum(np.abs(values).max() / peaks, np.float32(_LEAST_SCALE))
    squares = _squares_by_mantissa(values)
    errors = _estimated_errors(squares, scales)
    best, exact = int(errors.argmin()), int(errors[: len(_NUMBERS)].argmin())
    total = np.add.accumulate(squares)[-1]
    finalists = [exact, best] if errors[exact] <= np.float32(2e-5) * total else [best]
    chosen: np.float32 = min((scales[c] for c in finalists), key=lambda scale: _e4m3_error(values, scale))
    return chosen


def _squares_by_mantissa(values: Floats) -> Floats:
    """Return the sums of squares of values [N, K] by the seven highest bits of their mantissas, float32 [128].

    Every fourth column has a sum of its own in float64; the four are added in order.
    """
    import numpy as np

    mantissas = (values.view(np.uint32) >> np.uint32(16)) & np.uint32(127)
    bins = mantissas + np.uint32(128) * (np.arange(values.shape[1], dtype=np.uint32) & np.uint32(3))
    four = np.bincount(bins.ravel(), np.square(values.astype(np.float64)).ravel(), 512).reshape(4, 128)
    squares: Floats = np.add.accumulate(four, axis=0)[-1].astype(np.float32)
    return squares


def _estimated_errors(squares: Floats, scales: Floats) -> Floats:
    """Return the squared error with each scale, as if each mantissa were in the middle of its bin."""
    import numpy as np

    mantissas = ((scales.view(np.uint32) & np.uint32(0x7FFFFF)) | np.uint32(0x3F800000)).view(np.float32)
    middles = np.float32(1.00390625) + np.arange(128, dtype=np.float32) * np.float32(0.0078125)
    numbers = middles[:, None] * (np.float32(1) / mantissas)
    significand, exponent = np.frexp(numbers)
    nearest = np.ldexp(np.rint(significand * 16), exponent - 4).astype(np.float32)
    weights = squares / np.square(middles)
    errors = np.square(numbers - nearest) * weights[:, None]
    estimated: Floats = np.add.accumulate(errors, axis=0)[-1] * np.square(mantissas)
    return estimated


def _e4m3_error(values: Floats, scale: np.float32) -> np.float32:
    """Return the squared error with a scale: each column is added in the order of rows, then these sums in order."""
    import numpy as np

    magnitudes = np.abs(values)
    rounded = _e4m3_numbers()[_e4m3_codes(magnitudes * (np.float32(1) / scale))]
    errors = np.square(magnitudes - rounded * scale)
    total: np.float32 = np.add.accumulate(np.add.accumulate(errors, axis=0)[-1])[-1]
    return total


def _e4m3_numbers() -> Floats:
    """Return the numbers of E4M3 from 0 to 448, by their bits."""
    import numpy as np

    exponent, mantissa = np.divmod(np.arange(_E4M3_CODES), 8)
    significand = np.where(exponent, 8 + mantissa, mantissa).astype(np.float32)
    numbers: Floats = np.ldexp(significand, np.maximum(exponent, 1) - 10)
    return numbers


def _e4m3_codes(numbers: Floats) -> Bytes:
    """Return the bits of the nearest numbers of E4M3, ties to even, at most 448; the sign bit is kept."""
    import numpy as np

    sign = np.signbit(numbers).astype(np.uint8) * np.uint8(128)
    return nearest(np.abs(numbers), _e4m3_numbers()) | sign


def mxfp4_scales(exponent: NDArray[np.int64]) -> Floats:
    """Return 2^(exponent - 127) as float32."""
    import numpy as np

    return np.ldexp(np.float32(1), exponent - 127).astype(np.float32)


def block_peaks(*, powers_of_two: bool) -> tuple[Floats, int]:
    """Return what the largest magnitude of a block of E4M3 may become, and how many of them are numbers of E4M3."""
    import numpy as np

    return np.array(_NUMBERS[:1] if powers_of_two else (*_NUMBERS, *_BETWEEN), np.float32), len(_NUMBERS)


def _blocks_by_loop(
    values_OI: Floats, block: tuple[int, int], codes_OI: Bytes, scale_XG: Floats, *, powers_of_two: bool
) -> None:
    """Write the codes and the scales of blocks."""
    import numpy as np

    from trtllm_ct.layouts.loops import requantize_kernels

    (peaks, numbers), columns = block_peaks(powers_of_two=powers_of_two), min(block[1], values_OI.shape[1])
    lanes, words, squares = np.empty(columns, np.float32), np.empty(columns, np.uint32), np.empty(512, np.float64)
    candidates, bins = np.empty((3, len(peaks)), np.float32), np.empty((2, 128), np.float32)
    requantize_kernels.e4m3_blocks(
        values_OI, peaks, powers_of_two, numbers, block, lanes, words, squares, candidates, bins, codes_OI, scale_XG
    )


def _groups_by_loop(values_OI: Floats, group_size: int, global_scale: float) -> tuple[Bytes, Bytes]:
    from trtllm_ct.layouts.loops import requantize_kernels

    values, numbers, fields, codes, scales = _buffers(values_OI, group_size)
    reach = (_BELOW, _ABOVE, _SUBNORMAL, _FIRST_BINADE - 1)
    requantize_kernels.e2m1_with_e4m3_scales(values_OI, global_scale, reach, values, numbers, fields, codes, scales)
    return codes, scales


def _exponents_by_loop(values_OI: Floats, group_size: int) -> tuple[Bytes, Bytes]:
    from trtllm_ct.layouts.loops import requantize_kernels

    values, numbers, fields, codes, exponents = _buffers(values_OI, group_size)
    requantize_kernels.e2m1_with_exponents(values_OI, values, numbers, fields, codes, exponents)
    return codes, exponents


def _buffers(values_OI: Floats, group_size: int) -> tuple[Floats, Floats, NDArray[np.uint32], Bytes, Bytes]:
    """Return the buffers of a loop over groups, and its results: pairs of codes, and a byte for each group."""
    import numpy as np

    rows, groups = values_OI.shape[0], values_OI.shape[1] // group_size
    return (
        np.empty((group_size, groups), np.float32),
        np.empty((4, groups), np.float32),
        np.empty((group_size, groups), np.uint32),
        np.empty((rows, groups * group_size // 2), np.uint8),
        np.empty((rows, groups), np.uint8),
    )
