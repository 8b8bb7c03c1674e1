"""The decoder of `marlin-24`: codes of a 2:4 sparse weight in the order of a GPU kernel.

| tensor          | dtype   | shape                                                |
|-----------------|---------|------------------------------------------------------|
| `weight_packed` | int32   | [K / 32, 2 N] for 4 bits, [K / 32, 4 N] for 8 bits   |
| `scale_packed`  | float16 | [G, N]                                               |
| `meta`          | int16   | [K / 32, 2 N]: a nibble for each four columns        |

64 rows of the weight are one block: they are stored in columns of their own. Within a block each 1,024 kept codes are
permuted, and so are the nibbles, which hold the two columns of each four that are kept.
Source: compressed-tensors 0.14 `compressors/sparse_quantized_compressors/marlin_24.py` and
`utils/{permutations_24,semi_structured_conversions}.py`; a fix of 0.8 for the order of scales.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.base.schemes import Strategy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trtllm_ct.verify.source.coded import Coded
    from trtllm_ct.verify.source.weights import Weight

__all__ = ["BLOCK", "read", "shape"]

BLOCK = 64
"""Rows that are decoded together."""

_TILE = 16
_SCALES_PERMUTED_SINCE = (0, 8)
_INTERLEAVED = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_INTERLEAVED_SCALES = (0, 4, 1, 5, 2, 6, 3, 7)


def shape(weight: Weight) -> tuple[int, int]:
    """Return (N, K)."""
    packed = weight.tensor("weight_packed").shape
    return packed[1] * 2 // weight.args.num_bits, packed[0] * 32


def read(weight: Weight, begin: int, end: int) -> Coded:
    """Return rows of the weight, which are decoded in whole blocks."""
    for local in ("weight_packed", "meta", "scale_packed"):
        if local not in weight.kept:
            weight.kept[local] = weight.tensor(local).whole()
    first, last = begin // BLOCK, -(-end // BLOCK)
    within = slice(begin - first * BLOCK, end - first * BLOCK)
    codes = np.concatenate([_codes(weight, block) for block in range(first, last)])[within]
    scale = np.concatenate([_scale(weight, block) for block in range(first, last)])[within]
    return weight.coded(codes, begin, end, scale=scale, zero_point="")


def _codes(weight: Weight, block: int) -> NDArray[np.int8]:
    """Return the codes of the 64 rows of one block, [64, K]; those that are not kept are 0."""
    columns = weight.shape[1]
    kept = _kept_codes(weight, block)
    nibbles = _nibbles(weight.kept["meta"], block, weight.shape)
    codes = np.zeros((BLOCK, columns // 4, 4), np.int8)
    row, four = np.ogrid[:BLOCK, : columns // 4]
    codes[row, four, nibbles & 3] = kept[:, 0::2]
    codes[row, four, nibbles >> 2] = kept[:, 1::2]
    return codes.reshape(BLOCK, columns)


def _kept_codes(weight: Weight, block: int) -> NDArray[np.int8]:
    """Return the codes that are kept, [64, K / 2]."""
    bits = weight.args.num_bits
    words = weight.kept["weight_packed"]
    width = BLOCK * bits // 2
    packed = np.ascontiguousarray(words[:, block * width : (block + 1) * width]).view(np.uint32)
    stored = packed[:, :, None] >> np.arange(0, 32, bits, dtype=np.uint32) & ((1 << bits) - 1)
    stored = stored.reshape(len(words), 1024)
    tiles = np.empty_like(stored)
    tiles[:, _permutation(bits)] = stored
    # [K / 32, 4 tiles, 16 kept columns, 16 rows] to [rows, kept columns].
    codes = tiles.reshape(len(words), BLOCK // _TILE, _TILE, _TILE).transpose(1, 3, 0, 2).reshape(BLOCK, -1)
    return (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


@cache
def _permutation(bits: int) -> NDArray[np.int64]:
    """Return the place in four tiles of each of 1,024 stored codes."""
    places = []
    for lane in range(32):
        column = lane // 4
        base = [
            16 * row + 256 * (column // 2) + 8 * (column % 2) + 4 * half
            for half in (0, 1)
            for row in (
                2 * (lane % 4),
                2 * (lane % 4) + 1,
                2 * (lane % 4 + 4),
                2 * (lane % 4 + 4) + 1,
            )
        ]
        places += [place + tile for tile in range(4) for place in base]
    order = _INTERLEAVED[bits]
    return np.array(places).reshape(-1, len(order))[:, order].ravel()


def _nibbles(meta: NDArray[np.int16], block: int, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Return the nibble of each four columns, [64, K / 4]."""
    count = shape[1] // 16
    row, column = np.meshgrid(np.arange(block * BLOCK, (block + 1) * BLOCK), np.arange(count), indexing="ij")
    place = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 32 % 4 // 2 * 32 + row % 64 // 8 * 4
    up, down = (place % 2 == 0) & (column % 2 == 1), (place % 2 == 1) & (column % 2 == 0)
    place, column = place + up * 1 - down * 1, column - up * 1 + down * 1
    words = meta.ravel()[column // 2 * 2 * shape[0] + 2 * place + column % 2].view(np.uint16).astype(np.int64)
    nibbles: NDArray[np.int64] = words[:, :, None] >> np.array([0, 4, 8, 12]) & 15
    return nibbles.reshape(BLOCK, -1)


def _scale(weight: Weight, block: int) -> NDArray[np.float64]:
    """Return the scales of a block, [64, G]."""
    scale = weight.kept["scale_packed"]
    args, columns = weight.args, weight.shape[1]
    grouped = args.strategy is Strategy.GROUP and args.group_size is not None and args.group_size < columns // 2
    if grouped and (not weight.release or weight.release >= _SCALES_PERMUTED_SINCE):
        plain = np.empty_like(scale).reshape(-1, 8)
        plain[:, _INTERLEAVED_SCALES] = scale.reshape(-1, 8)
        scale = plain.reshape(scale.shape)
    part: NDArray[np.float64] = scale[:, block * BLOCK : (block + 1) * BLOCK].T.astype(np.float64)
    return part
