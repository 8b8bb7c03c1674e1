"""Conversion from and to the layout of Marlin's 2:4 sparse kernel: codes, their positions, and scales.

Two codes of each four columns are kept; the nibble `first | second << 2` holds their positions. Codes and nibbles are
stored in the order in which the tensor cores of a GPU fetch them: this layout is a permutation of a plain one.
The functions `restore_*` convert from this layout to row-major order, and `arrange_*` convert back.
Axis letters: `O` out (rows, N), `I` in (columns, K), `H` half of the columns (K/2 kept codes), `F` groups of four
columns (K/4), `G` quantization groups.
Sources: compressed-tensors 0.14 `compressors/sparse_quantized_compressors/marlin_24.py` (removed later) and 0.20
`utils/permutations_24.py`, `utils/semi_structured_conversions.py`; CUTLASS `host_reorder.h` for the order of the
nibbles.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Packing
from trtllm_ct.layouts.packing import pack_codes, pack_fields, packed_words, unpack_codes, unpack_fields

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    Codes = NDArray[np.int8]
    Nibbles = NDArray[np.uint8]

__all__ = [
    "K_MULTIPLE",
    "NIBBLES",
    "N_MULTIPLE",
    "arrange_codes",
    "arrange_nibbles",
    "arrange_scales",
    "expand_fours",
    "pick_fours",
    "restore_codes",
    "restore_nibbles",
    "restore_scales",
]

N_MULTIPLE = 64
"""N is a multiple of 64: the order of the nibbles permutes blocks of 64 rows."""

K_MULTIPLE = 32
"""K is a multiple of 32: a row of stored words holds 32 columns, whose 16 kept codes are the side of a tile."""

NIBBLES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)
"""The valid nibbles: two different positions, the lower one first."""

_TILE = 16
_PERMUTED_CODES = 1024  # the order of the codes permutes this many at a time: four tiles
_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_META = Packing(bits=4, container=DType.I16, axis=1, offset_binary=False)
# The nibble for each pattern of nonzero codes in four columns, the first column in the lowest bit. Patterns with fewer
# than two nonzero codes get the nibble that CUTLASS gives them.
_NIBBLE_OF_PATTERN = {0: 0xE, 1: 0x8, 2: 0x9, 3: 0x4, 4: 0xE, 5: 0x8, 6: 0x9, 8: 0xE, 9: 0xC, 10: 0xD, 12: 0xE}


def restore_codes(words: NDArray[np.int32], bits: int) -> Codes:
    """Convert stored int32 words [K/32, N * bits/2] to the kept codes, int8 [N, K/2] in column order."""
    import numpy as np

    tiles, width = words.shape[0], words.shape[1] * 32 // bits
    stored = unpack_codes(words, packed_words(bits), (tiles, width)).reshape(-1, _PERMUTED_CODES)
    plain = np.empty_like(stored)
    plain[:, _tile_order(bits)] = stored
    blocks = plain.reshape(tiles, width // _TILE**2, _TILE, _TILE)
    return blocks.transpose(1, 3, 0, 2).reshape(width // _TILE, tiles * _TILE)


def arrange_codes(codes_OH: Codes, bits: int) -> NDArray[Any]:
    """Convert kept codes, int8 [N, K/2], to the stored int32 words: the inverse of `restore_codes`."""
    rows, half = codes_OH.shape
    blocks = codes_OH.reshape(rows // _TILE, _TILE, half // _TILE, _TILE).transpose(2, 0, 3, 1)
    stored = blocks.reshape(-1, _PERMUTED_CODES)[:, _tile_order(bits)]
    return pack_codes(stored.reshape(half // _TILE, rows * _TILE), packed_words(bits))


def restore_nibbles(meta: NDArray[np.int16]) -> Nibbles:
    """Convert the stored int16 tensor [K/32, 2N] to one nibble per four columns, uint8 [N, K/4]."""
    rows, elements = meta.shape[1] // 2, meta.shape[0] * 2
    plain = meta.flatten()[_meta_order(rows, elements)]
    return unpack_fields(plain, _META, (rows, elements * 4))


def arrange_nibbles(nibbles_OF: Nibbles) -> NDArray[np.int16]:
    """Convert nibbles, uint8 [N, K/4], to the stored int16 tensor: the inverse of `restore_nibbles`."""
    import numpy as np

    plain = pack_fields(nibbles_OF, _META)
    rows, elements = plain.shape
    meta = np.empty(rows * elements, np.int16)
    meta[_meta_order(rows, elements)] = plain
    return meta.reshape(elements // 2, rows * 2)


def restore_scales(stored_GO: NDArray[Any]) -> NDArray[Any]:
    """Convert stored scales [G, N] to row order; the file interleaves each eight rows as 0 4 1 5 2 6 3 7."""
    groups, rows = stored_GO.shape
    return stored_GO.reshape(groups, rows // 8, 4, 2).swapaxes(2, 3).reshape(groups, rows)


def arrange_scales(scale_GO: NDArray[Any]) -> NDArray[Any]:
    """Interleave scales [G, N] as the file stores them: the inverse of `restore_scales`."""
    groups, rows = scale_GO.shape
    return scale_GO.reshape(groups, rows // 8, 2, 4).swapaxes(2, 3).reshape(groups, rows)


def expand_fours(codes_OH: Codes, nibbles_OF: Nibbles) -> Codes:
    """Place two codes per four columns at the positions given by the nibbles, with zeros elsewhere: int8 [N, K].

    `codes_OH` is int8 [N, K/2], `nibbles_OF` is uint8 [N, K/4].
    """
    import numpy as np

    rows, fours = nibbles_OF.shape
    pairs = codes_OH.reshape(rows, fours, 2)
    first, second = nibbles_OF & 3, nibbles_OF >> 2
    result = np.empty((rows, fours, 4), np.int8)
    for position in range(4):
        result[..., position] = pairs[..., 0] * (first == position) + pairs[..., 1] * (second == position)
    return result.reshape(rows, fours * 4)


def pick_fours(codes_OI: Codes) -> tuple[Codes, Nibbles]:
    """Return two codes per four columns, int8 [N, K/2], and the nibbles with their positions, uint8 [N, K/4].

    This is the inverse of `expand_fours`.
    Raises `ValueError` when four columns hold more than two nonzero codes.
    """
    import numpy as np

    fours = codes_OI.reshape(codes_OI.shape[0], -1, 4)
    patterns = ((fours != 0) << np.arange(4)).sum(axis=2)
    nibbles = np.array([_NIBBLE_OF_PATTERN.get(pattern, 0) for pattern in range(16)], np.uint8)[patterns]
    if not nibbles.all():
        raise ValueError("more than two codes of four columns are not zero: this is no 2:4 sparse weight")
    positions = np.stack((nibbles & 3, nibbles >> 2), axis=2).astype(np.int64)
    return np.take_along_axis(fours, positions, 2).reshape(codes_OI.shape[0], -1), nibbles


@cache
def _tile_order(bits: int) -> NDArray[np.int64]:
    """Return the position within four 16 x 16 tiles of each of 1024 consecutive codes in the file, int64 [1024]."""
    import numpy as np

    order: list[int] = []
    for thread in range(32):
        column, pair = thread // 4, thread % 4
        rows = (2 * pair, 2 * pair + 1, 2 * pair + 8, 2 * pair + 9)
        corner = 256 * (column // 2) + 8 * (column % 2)
        base = [16 * row + corner + 4 * block for block in range(2) for row in rows]
        order += [position + shift for shift in range(4) for position in base]
    interleave = list(_INTERLEAVE[bits])
    return np.array(order).reshape(-1, len(interleave))[:, interleave].ravel()


def _meta_order(rows: int, elements: int) -> NDArray[np.int64]:
    """Return the index in the flattened stored tensor of each element of a row-major matrix, int64 [rows, elements].

    An element is an int16 with four nibbles.
    """
    import numpy as np

    row, column = np.arange(rows)[:, None], np.arange(elements)[None, :]
    stored_row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    # In each 2 x 2 block the two off-diagonal elements are swapped.
    swap = column % 2 - stored_row % 2
    stored_row, stored_column = stored_row + swap, column - swap
    order: NDArray[np.int64] = stored_column // 2 * (2 * rows) + stored_row * 2 + stored_column % 2
    return order
