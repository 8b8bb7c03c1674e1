"""The compiled loop that quantizes int4 weights again as NVFP4; `layouts/requantize_int4.py` explains its tables.

A word holds the sixteen codes of a group, four bits each, that of the first column in the lowest bits. All groups of a
row are treated by one step before the next one: the first and the last step then run on several groups at once.
The rules of `kernels.py` hold here too.
Axis letters: `O` out (rows, N), `B` groups of 16 columns, `G` stored groups along K, `S` kinds of groups, `M`
magnitudes of codes from 0 to 8, `C` candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.layouts.loops.machine_code import inner, kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Words = NDArray[np.uint64]

__all__ = ["e2m1_from_int4"]

u8, u32, u64, i64, f32 = np.uint8, np.uint32, np.uint64, np.int64, np.float32

_ALL = u64(0x1111111111111111)
"""A word with 1 in each of its sixteen fields."""

# Tables for the two mantissas of the example's scales, instead of 128.
_TABLE = [[[float(m * (c + 1) % 7) for c in range(12)] for m in range(9)]] * 18
_MAPS = [[0xFEDCBA9876543210, 0x0123456789ABCDEF] * 6] * 18


@kernel(
    *([[0x7F80899ABCDEF012, 0x8888888888888888], [0x1234567887654321, 0]], [[0x3D81, 0x3C00], [0x3F81, 0x0001]]),
    *(1, 122, 10, [20] * 18, _TABLE, _MAPS, [[0] * 2] * 3, [[0] * 2] * 2, [[0] * 2] * 2),
)
def e2m1_from_int4(
    codes_OB: Words,
    scale_OG: NDArray[np.uint16],
    groups: int,
    exponent: int,
    above: int,
    first_S: Bytes,
    error_SMC: NDArray[np.float32],
    map_SC: Words,
    buffer_3B: Words,
    e2m1_OB: Words,
    e4m3_OB: Bytes,
) -> None:
    """Quantize int4 codes in offset binary to E2M1 codes, with the bits of an E4M3 scale for each group of 16 columns.

    `scale_OG` are the bits of positive bfloat16 numbers, one for `groups` groups. The tables are for scales whose
    biased exponent is `exponent`: the bits of the first candidate, the squared errors, and the E2M1 code of each int4
    code.
    `above` is the number of candidates after the first one. `buffer_3B` has three rows.
    The scale of a group is 0 where a candidate would be no normal number of E4M3; its codes are 0 too.
    """
    magnitudes_B, largest_B, map_B = buffer_3B[0], buffer_3B[1], buffer_3B[2]
    for n in range(codes_OB.shape[0]):
        scale_G, e4m3_B = scale_OG[n], e4m3_OB[n]
        _magnitudes(codes_OB[n], magnitudes_B, largest_B)
        for g in range(scale_G.shape[0]):
            bits = u32(scale_G[g])
            kind = i64(bits & u32(127)) * 9
            shift = 8 * (i64(bits >> u32(7)) - exponent)
            for b in range(g * groups, (g + 1) * groups):
                slot = kind + i64(largest_B[b])
                first = i64(first_S[slot]) + shift
                if largest_B[b] == u64(0):
                    e4m3_B[b], map_B[b] = u8(1), u64(0)  # the first of candidates that are all exact
                elif first < 8 or first + above > 126:
                    e4m3_B[b], map_B[b] = u8(0), u64(0)
                else:
                    best = _best_candidate(error_SMC[slot], magnitudes_B[b])
                    e4m3_B[b], map_B[b] = u8(first + best), map_SC[slot, best]
        _mapped(codes_OB[n], map_B, e2m1_OB[n])


@inner
def _magnitudes(codes_B: Words, magnitudes_B: Words, largest_B: Words) -> None:
    """Write the magnitudes of the codes of each group, from 0 to 8, and the largest of them."""
    for b in range(codes_B.shape[0]):
        codes = codes_B[b]
        negative = u64(u64(~codes >> u64(3)) & _ALL)
        magnitudes = u64(u64(u64(codes & u64(_ALL * u64(7))) ^ u64(negative * u64(7))) + negative)
        magnitudes_B[b] = magnitudes
        # The largest one, bit by bit: the fields without a bit that others have are left out.
        eight = u64(u64(magnitudes >> u64(3)) & _ALL)
        four = u64(u64(magnitudes >> u64(2)) & _ALL)
        left = u64(magnitudes & u64(four * u64(3))) if four != u64(0) else magnitudes
        two = u64(u64(left >> u64(1)) & _ALL)
        left = u64(left & two) if two != u64(0) else u64(left & _ALL)
        largest = (
            (u64(4) if four != u64(0) else u64(0))
            + (u64(2) if two != u64(0) else u64(0))
            + (u64(1) if left != u64(0) else u64(0))
        )
        largest_B[b] = u64(8) if eight != u64(0) else u64(largest)


@inner
def _best_candidate(error_MC: NDArray[np.float32], magnitudes: np.uint64) -> np.int64:
    """Return the candidate with the least squared error of a group, the first of those with the same.

    Errors are added in the order of columns. The bits of numbers that are not negative have their order.
    """
    e0, e1 = error_MC[i64(magnitudes & u64(15))], error_MC[i64((magnitudes >> u64(4)) & u64(15))]
    e2, e3 = error_MC[i64((magnitudes >> u64(8)) & u64(15))], error_MC[i64((magnitudes >> u64(12)) & u64(15))]
    e4, e5 = error_MC[i64((magnitudes >> u64(16)) & u64(15))], error_MC[i64((magnitudes >> u64(20)) & u64(15))]
    e6, e7 = error_MC[i64((magnitudes >> u64(24)) & u64(15))], error_MC[i64((magnitudes >> u64(28)) & u64(15))]
    e8, e9 = error_MC[i64((magnitudes >> u64(32)) & u64(15))], error_MC[i64((magnitudes >> u64(36)) & u64(15))]
    e10, e11 = error_MC[i64((magnitudes >> u64(40)) & u64(15))], error_MC[i64((magnitudes >> u64(44)) & u64(15))]
    e12, e13 = error_MC[i64((magnitudes >> u64(48)) & u64(15))], error_MC[i64((magnitudes >> u64(52)) & u64(15))]
    e14, e15 = error_MC[i64((magnitudes >> u64(56)) & u64(15))], error_MC[i64(magnitudes >> u64(60))]
    least = ~u64(0)
    for c in range(12):
        error = f32(f32(f32(e0[c] + e1[c]) + e2[c]) + e3[c])
        error = f32(f32(f32(f32(error + e4[c]) + e5[c]) + e6[c]) + e7[c])
        error = f32(f32(f32(f32(error + e8[c]) + e9[c]) + e10[c]) + e11[c])
        error = f32(f32(f32(f32(error + e12[c]) + e13[c]) + e14[c]) + e15[c])
        least = min(least, u64(u64(u64(f32(error).view(np.uint32)) << u64(4)) | u64(c)))
    return i64(least & u64(15))


@inner
def _mapped(codes_B: Words, map_B: Words, e2m1_B: Words) -> None:
    """Write the codes of each group, replaced by the fields of its map that they number."""
    for b in range(codes_B.shape[0]):
        codes, fields, result = codes_B[b], map_B[b], u64(0)
        for i in range(16):
            place = u64(4 * i)
            number = u64(u64(codes >> place) & u64(15))
            result |= u64(u64(u64(fields >> u64(number << u64(2))) & u64(15)) << place)
        e2m1_B[b] = result
