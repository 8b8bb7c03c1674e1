"""Compiled loops that quantize weights again: for each block the scale with the least squared error, and the codes.

Each has an equivalent made of numpy operations in `layouts/requantize.py`, which explains the searches; both give the
same bits. Squared errors are float32 and are added in a fixed order, so that both choose the same scales.
The rules of `kernels.py` hold here too.
Axis letters: `O` out (rows, N), `I` in (columns, K), `G` groups along K, `B` bytes, `L` lanes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.layouts.loops.lanes import AT_ONCE, SCALES_AT_ONCE, add_e2m1_errors, add_e4m3_estimates
from trtllm_ct.layouts.loops.machine_code import inner, kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

__all__ = [
    "PEAKS",
    "candidate_scales",
    "e2m1_with_e4m3_scales",
    "e2m1_with_exponents",
    "e4m3_blocks",
    "e4m3_code",
    "finalists",
]

u8, u32, u64, f32, f64 = np.uint8, np.uint32, np.uint64, np.float32, np.float64

_INFINITY, _LEAST_NORMAL, _SEEMS_EXACT = f32(np.inf), f32(2.0**-100), f32(2e-5)
_VALUES = [[1.0, -7.0, 0.0, 3.0], [0.3, 0.0, -0.0, 900.0]]
_LANES = [[0.0] * 2] * 2
PEAKS = [448.0, 256.0, *(float(peak) for peak in range(300, 432, 6))]
"""Peaks for examples: as many as are treated at once."""


@kernel(
    *(_VALUES, PEAKS, 0, 2, (1, 2), [0.0] * 2, [0] * 2, [0.0] * 512, [[0.0] * 24] * 3, [[0.0] * 128] * 2),
    *([[0] * 4] * 2, [[0.0] * 2] * 2),
)
def e4m3_blocks(
    values_OI: Floats,
    peaks: Floats,
    powers_of_two: bool,  # noqa: FBT001 (numba has no keywords)
    numbers: int,
    block: tuple[int, int],
    lanes_L: Floats,
    words_L: NDArray[np.uint32],
    squares: NDArray[np.float64],
    candidates_3C: Floats,
    bins: Floats,
    codes_OI: Bytes,
    scale_XG: Floats,
) -> None:
    """Quantize [N, K] to E4M3 codes, with a float32 scale for each block of the rows and columns that `block` names.

    `peaks` are what the largest magnitude of a block may become; the first `numbers` of them are numbers of E4M3. With
    `powers_of_two`, scales are rounded up to one.
    `lanes_L` and `words_L` (the columns of a block), `squares` (512), `candidates_3C` and `bins` ([2, 128]) are
    buffers. The number of candidates is 1, or a multiple of `SCALES_AT_ONCE`.
    """
    height, width = block
    buffers = (lanes_L, words_L, squares, candidates_3C, bins)
    for x in range(scale_XG.shape[0]):
        begin, end = x * height, min((x + 1) * height, values_OI.shape[0])
        _row_of_blocks(
            values_OI[begin:end], peaks, powers_of_two, numbers, width, buffers, codes_OI[begin:end], scale_XG[x]
        )


@inner
def _row_of_blocks(
    values_OI: Floats,
    peaks: Floats,
    powers_of_two: bool,  # noqa: FBT001 (numba has no keywords)
    numbers: int,
    width: int,
    buffers: tuple[Floats, NDArray[np.uint32], NDArray[np.float64], Floats, Floats],
    codes_OI: Bytes,
    scale_G: Floats,
) -> None:
    """Quantize one row of blocks; the arguments are those of `e4m3_blocks`."""
    lanes_L, words_L, squares, candidates_3C, bins = buffers
    columns = values_OI.shape[1]
    for g in range(scale_G.shape[0]):
        begin, end = g * width, min((g + 1) * width, columns)
        lanes, words = lanes_L[: end - begin], words_L[: end - begin]
        largest = _largest_of_block(values_OI, begin, words)
        candidate_scales(largest, peaks, powers_of_two, candidates_3C[0])
        _squares_by_mantissa(values_OI, begin, end, squares)
        best, exact = finalists(numbers, squares, candidates_3C, bins)
        scale = candidates_3C[0, best]
        if exact != best:
            of_exact = _e4m3_error(values_OI, begin, candidates_3C[0, exact], lanes)
            of_best = _e4m3_error(values_OI, begin, scale, lanes)
            scale = candidates_3C[0, exact] if of_exact <= of_best else scale
        scale_G[g] = scale
        inverse = f32(1) / scale
        for n in range(values_OI.shape[0]):
            values_I, codes_I = values_OI[n][begin:end], codes_OI[n][begin:end]
            for k in range(words.shape[0]):
                words[k] = e4m3_code(values_I[k], inverse)
            for k in range(words.shape[0]):
                codes_I[k] = u8(words[k])


@inner
def candidate_scales(largest: np.float32, peaks: Floats, powers_of_two: bool, scales_C: Floats) -> None:  # noqa: FBT001
    """Write the scales with which the largest magnitude of a block becomes each of the peaks."""
    for c in range(scales_C.shape[0]):
        scale = max(f32(largest / peaks[c]), _LEAST_NORMAL)
        scales_C[c] = _power_above(scale) if powers_of_two else scale


@inner
def _power_above(scale: np.float32) -> np.float32:
    """Return the smallest power of two that is not below a scale: every mantissa but 0 carries into the exponent."""
    return u32(u32(f32(scale).view(np.uint32) + u32(0x7FFFFF)) & u32(0x7F800000)).view(np.float32)


@inner
def _squares_by_mantissa(values_OI: Floats, begin: int, end: int, squares: NDArray[np.float64]) -> None:
    """Add the squares of a block's values by the seven highest bits of their mantissas, in four sums each.

    Every fourth column has the same sum: an addition need not wait for the one before.
    """
    for i in range(squares.shape[0]):
        squares[i] = 0.0
    for n in range(values_OI.shape[0]):
        values_I = values_OI[n][begin:end]
        for k in range(values_I.shape[0]):
            mantissa = u32(u32(f32(values_I[k]).view(np.uint32) >> u32(16)) & u32(127))
            squares[(k & 3) * 128 + np.int64(mantissa)] += f64(values_I[k]) * f64(values_I[k])


@inner
def finalists(numbers: int, squares: NDArray[np.float64], candidates_3C: Floats, bins: Floats) -> tuple[int, int]:
    """Return the candidate with the least error of a block, and one that may be exact, or the same again.

    Errors are estimated from the sums of squares. The first `numbers` scales may be exact. A single candidate is both;
    of several there is a multiple of `SCALES_AT_ONCE`.
    `bins` is a buffer: the number in the middle of each bin of mantissas, and the weight of its squared error.
    """
    scales, errors, inverses = candidates_3C[0], candidates_3C[1], candidates_3C[2]
    if scales.shape[0] == 1:
        return 0, 0
    total = f32(0)
    for c in range(scales.shape[0]):
        inverses[c] = f32(1) / _mantissa(scales[c])
        errors[c] = f32(0)
    middles, weights = bins[0], bins[1]
    for b in range(128):
        middles[b] = f32(f32(1.00390625) + f32(f32(b) * f32(0.0078125)))
        weights[b] = f32(squares[b] + squares[b + 128] + squares[b + 256] + squares[b + 384])
    for b in range(128):
        total += weights[b]
    for b in range(128):
        weights[b] = f32(weights[b] / f32(middles[b] * middles[b]))
    for b in range(0, 128, 16):
        for c in range(0, errors.shape[0], SCALES_AT_ONCE):
            add_e4m3_estimates(middles[b:], weights[b:], inverses[c:], errors[c:])
    for c in range(scales.shape[0]):
        mantissa = _mantissa(scales[c])
        errors[c] = f32(errors[c] * f32(mantissa * mantissa))
    best, exact = _least(errors), _least(errors[:numbers])
    return best, best if errors[exact] > f32(_SEEMS_EXACT * total) else exact


@inner
def _least(errors_C: Floats) -> int:
    """Return the first place of the least error."""
    place, least = 0, errors_C[0]
    for c in range(1, errors_C.shape[0]):
        place, least = (c, errors_C[c]) if errors_C[c] < least else (place, least)
    return place


@inner
def _mantissa(number: np.float32) -> np.float32:
    """Return the mantissa of a positive number, from 1 to 2."""
    return u32(u32(f32(number).view(np.uint32) & u32(0x7FFFFF)) | u32(0x3F800000)).view(np.float32)


@inner
def _largest_of_block(values_OI: Floats, begin: int, words_L: NDArray[np.uint32]) -> np.float32:
    """Return the largest magnitude of a block: magnitudes have the order of their bits. `words_L` is a buffer."""
    for k in range(words_L.shape[0]):
        words_L[k] = u32(0)
    for n in range(values_OI.shape[0]):
        values_I = values_OI[n][begin : begin + words_L.shape[0]]
        for k in range(words_L.shape[0]):
            words_L[k] = max(words_L[k], u32(f32(values_I[k]).view(np.uint32) & u32(0x7FFFFFFF)))
    largest = u32(0)
    for k in range(words_L.shape[0]):
        largest = max(largest, words_L[k])
    return u32(largest).view(np.float32)


@inner
def _e4m3_error(values_OI: Floats, begin: int, scale: np.float32, lanes_L: Floats) -> np.float32:
    """Return the squared error of a block with a scale: a sum for each column, and these in order."""
    inverse = f32(1) / scale
    for k in range(lanes_L.shape[0]):
        lanes_L[k] = f32(0)
    for n in range(values_OI.shape[0]):
        values_I = values_OI[n][begin : begin + lanes_L.shape[0]]
        for k in range(lanes_L.shape[0]):
            magnitude = abs(values_I[k])
            error = f32(magnitude - f32(_e4m3_magnitude(f32(magnitude * inverse)) * scale))
            lanes_L[k] += f32(error * error)
    total = f32(0)
    for k in range(lanes_L.shape[0]):
        total += lanes_L[k]
    return total


@inner
def _e4m3_magnitude(magnitude: np.float32) -> np.float32:
    """Round a magnitude to the nearest number of E4M3, ties to even; all above 448 become 448."""
    bits = u32(f32(magnitude).view(np.uint32))
    nearest = u32(u32(bits + u32(0x7FFFF)) + u32(u32(bits >> u32(20)) & u32(1)))
    normal = u32(nearest & u32(0xFFF00000)).view(np.float32)
    subnormal = f32(f32(magnitude + f32(2.0**14)) - f32(2.0**14))
    rounded = normal if magnitude >= f32(2.0**-6) else subnormal
    return min(f32(448), rounded)


@inner
def _e4m3_number(code: np.uint32) -> np.float32:
    """Return the number of E4M3 with these bits; they have no sign."""
    normal = u32(u32(code << u32(20)) + u32(120 << 23)).view(np.float32)
    return normal if code >= u32(8) else f32(f32(code) * f32(2.0**-9))


@inner
def e4m3_code(value: np.float32, inverse: np.float32) -> np.uint32:
    """Return the bits of the E4M3 number that is nearest to value * inverse, ties to even, at most 448."""
    bits = u32(f32(f32(value) * inverse).view(np.uint32))
    magnitude = u32(bits & u32(0x7FFFFFFF))
    rebiased = u32(u32(magnitude - u32(120 << 23)) + u32(u32(magnitude >> u32(20)) & u32(1)))
    normal = u32(u32(rebiased + u32(0x7FFFF)) >> u32(20))
    normal = min(u32(126), normal)
    subnormal = u32(f32(u32(magnitude).view(np.float32) + f32(2.0**14)).view(np.uint32) - u32(0x46800000))
    return u32((normal if magnitude >= u32(0x3C800000) else subnormal) | u32(u32(bits >> u32(24)) & u32(0x80)))


@kernel(_VALUES, 1.0, (3, 7, 8, 15), _LANES, [[0.0] * 2] * 4, [[0] * 2] * 2, [[0] * 2] * 2, [[0] * 2] * 2)
def e2m1_with_e4m3_scales(
    values_OI: Floats,
    global_scale: float,
    reach: tuple[int, int, int, int],
    values_LG: Floats,
    numbers_XG: Floats,
    fields_LG: NDArray[np.uint32],
    codes_OB: Bytes,
    scale_OG: Bytes,
) -> None:
    """Quantize [N, K] to pairs of E2M1 codes [N, K/2], with the bits of an E4M3 scale for each group of columns.

    The global scale is a power of two. Candidates are the number that is nearest to a sixth of the largest magnitude,
    `reach[0]` numbers below it and `reach[1]` above; they are all from 1 to `reach[3]` if it is below `reach[2]`.
    `values_LG`, `numbers_XG` (four rows) and `fields_LG` are buffers.
    """
    below, above, subnormal, end = reach
    groups, inverse = scale_OG.shape[1], 1 / global_scale
    error_G, least_G, step_G, inverse_G = numbers_XG[0], numbers_XG[1], numbers_XG[2], numbers_XG[3]
    first_G, best_G = fields_LG[0], fields_LG[1]
    for n in range(values_OI.shape[0]):
        scale_G = scale_OG[n]
        _groups_across(values_OI[n], values_LG)
        _largest_of_groups(values_LG, error_G)
        are_subnormal = u32(0)
        for g in range(groups):
            nearest = e4m3_code(f32(error_G[g] / f32(6)), f32(inverse))
            is_subnormal = nearest < u32(subnormal)
            first_G[g] = u32(1) if is_subnormal else u32(nearest - u32(below))
            best_G[g], least_G[g] = first_G[g], _INFINITY
            are_subnormal |= u32(is_subnormal)
        for c in range(end if are_subnormal else below + above + 1):
            for g in range(groups):
                step_G[g] = _e4m3_number(_tried(first_G[g], c, reach)) * f32(global_scale)
            _e2m1_errors(values_LG, step_G, inverse_G, error_G)
            # Without a branch: which candidate is better can't be foreseen.
            for g in range(groups):
                better = error_G[g] < least_G[g]
                best_G[g] = _tried(first_G[g], c, reach) if better else best_G[g]
                least_G[g] = error_G[g] if better else least_G[g]
        for g in range(groups):
            scale_G[g] = u8(best_G[g])
            inverse_G[g] = f32(1) / (_e4m3_number(best_G[g]) * f32(global_scale))
        _e2m1_fields(values_LG, inverse_G, fields_LG)
        _pack_pairs(fields_LG, codes_OB[n])


@inner
def _tried(first: np.uint32, more: int, reach: tuple[int, int, int, int]) -> np.uint32:
    """Return the candidate that comes so many after the first one, or the last one; only subnormal ones start at 1."""
    below, above, _, end = reach
    last = u32(end) if first == u32(1) else min(u32(first + u32(below + above)), u32(126))
    return u32(min(u32(first + u32(more)), last))


@kernel(_VALUES, _LANES, [[0.0] * 2] * 4, [[0] * 2] * 2, [[0] * 2] * 2, [[0] * 2] * 2)
def e2m1_with_exponents(
    values_OI: Floats,
    values_LG: Floats,
    numbers_XG: Floats,
    fields_LG: NDArray[np.uint32],
    codes_OB: Bytes,
    exponent_OG: Bytes,
) -> None:
    """Quantize [N, K] to pairs of E2M1 codes [N, K/2], with an E8M0 exponent for each group of columns.

    Candidates are the smallest power of two with which the largest magnitude is at most 6, and half of it.
    `values_LG`, `numbers_XG` (four rows) and `fields_LG` are buffers.
    """
    groups = exponent_OG.shape[1]
    halved_G, whole_G, step_G, inverse_G = numbers_XG[0], numbers_XG[1], numbers_XG[2], numbers_XG[3]
    upper_G = fields_LG[0]
    for n in range(values_OI.shape[0]):
        exponent_G = exponent_OG[n]
        _groups_across(values_OI[n], values_LG)
        _largest_of_groups(values_LG, whole_G)
        for g in range(groups):
            sixth = max(f32(whole_G[g] / f32(6)), _LEAST_NORMAL)
            upper_G[g] = u32(f32(_power_above(sixth)).view(np.uint32) >> u32(23))
            step_G[g] = u32(u32(upper_G[g] - u32(1)) << u32(23)).view(np.float32)
        _e2m1_errors(values_LG, step_G, inverse_G, halved_G)
        for g in range(groups):
            step_G[g] = f32(step_G[g] * f32(2))
        _e2m1_errors(values_LG, step_G, inverse_G, whole_G)
        for g in range(groups):
            best = u32(upper_G[g] - u32(1)) if halved_G[g] < whole_G[g] else upper_G[g]
            exponent_G[g] = u8(best)
            inverse_G[g] = u32(u32(u32(254) - best) << u32(23)).view(np.float32)
        _e2m1_fields(values_LG, inverse_G, fields_LG)
        _pack_pairs(fields_LG, codes_OB[n])


@inner
def _groups_across(values_I: Floats, values_LG: Floats) -> None:
    """Copy a row so that loops over groups are the innermost ones: they are long, and need no sums across lanes."""
    width, groups = values_LG.shape
    for g in range(groups):
        for i in range(width):
            values_LG[i, g] = values_I[g * width + i]


@inner
def _largest_of_groups(values_LG: Floats, largest_G: Floats) -> None:
    """Write the largest magnitude of each group."""
    # Magnitudes have the order of their bits.
    largest_bits_G = largest_G.view(np.uint32)
    for g in range(largest_bits_G.shape[0]):
        largest_bits_G[g] = u32(0)
    for i in range(values_LG.shape[0]):
        bits_G = values_LG[i].view(np.uint32)
        for g in range(largest_bits_G.shape[0]):
            largest_bits_G[g] = max(largest_bits_G[g], u32(bits_G[g] & u32(0x7FFFFFFF)))


@inner
def _e2m1_errors(values_LG: Floats, step_G: Floats, inverse_G: Floats, error_G: Floats) -> None:
    """Write the squared error of each group with a scale, added in the order of columns. `inverse_G` is a buffer."""
    for g in range(error_G.shape[0]):
        inverse_G[g], error_G[g] = f32(1) / step_G[g], f32(0)
    width, groups = values_LG.shape
    at_once, rows = groups // AT_ONCE * AT_ONCE, width // AT_ONCE * AT_ONCE
    for i in range(0, rows, AT_ONCE):
        for g in range(0, at_once, AT_ONCE):
            add_e2m1_errors(values_LG[i][g:], u64(groups), step_G[g:], inverse_G[g:], error_G[g:])
    for i in range(width):
        values_G = values_LG[i]
        for g in range(at_once if i < rows else 0, groups):
            magnitude = abs(values_G[g])
            error = f32(magnitude - f32(_e2m1_magnitude(f32(magnitude * inverse_G[g])) * step_G[g]))
            error_G[g] += f32(error * error)


@inner
def _e2m1_magnitude(magnitude: np.float32) -> np.float32:
    """Round a magnitude to the nearest number of E2M1, ties to even; all above 6 become 6."""
    # Next to 2^22 times the power of two below a number, float32 has the steps that E2M1 has next to that number.
    power = u32(max(u32(f32(magnitude).view(np.uint32)), u32(0x3F800000)) & u32(0x7F800000))
    far = u32(power + u32(22 << 23)).view(np.float32)
    rounded = u32(f32(f32(magnitude + far) - far).view(np.uint32))
    return u32(min(rounded, u32(0x40C00000))).view(np.float32)


@inner
def _e2m1_fields(values_LG: Floats, inverse_G: Floats, fields_LG: NDArray[np.uint32]) -> None:
    """Write the bits of the E2M1 numbers that are nearest to values * inverse, ties to even, at most 6."""
    for i in range(values_LG.shape[0]):
        values_G, fields_G = values_LG[i], fields_LG[i]
        for g in range(fields_G.shape[0]):
            bits = u32(f32(values_G[g] * inverse_G[g]).view(np.uint32))
            magnitude = u32(bits & u32(0x7FFFFFFF))
            rebiased = u32(u32(magnitude - u32(126 << 23)) + u32(u32(magnitude >> u32(22)) & u32(1)))
            normal = u32(u32(rebiased + u32(0x1FFFFF)) >> u32(22))
            normal = min(u32(7), normal)
            subnormal = u32(f32(u32(magnitude).view(np.float32) + f32(2.0**22)).view(np.uint32) - u32(0x4A800000))
            code = normal if magnitude >= u32(0x3F800000) else subnormal
            fields_G[g] = u32(code | u32(u32(bits >> u32(28)) & u32(8)))


@inner
def _pack_pairs(fields_LG: NDArray[np.uint32], codes_B: Bytes) -> None:
    """Write two fields to each byte, that of the even column to the low half."""
    pairs = fields_LG.shape[0] // 2
    if pairs % 8:
        for g in range(fields_LG.shape[1]):
            for i in range(pairs):
                codes_B[g * pairs + i] = u8(fields_LG[2 * i, g] | u32(fields_LG[2 * i + 1, g] << u32(4)))
        return
    words_W = codes_B.view(np.uint64)
    for w in range(pairs // 8):
        for g in range(fields_LG.shape[1]):
            word = u64(0)
            for i in range(16):
                word |= u64(u64(fields_LG[16 * w + i, g]) << u64(4 * i))
            words_W[g * (pairs // 8) + w] = word
