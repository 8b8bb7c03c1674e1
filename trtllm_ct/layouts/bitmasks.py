"""Bitmasks of sparse matrices: one bit per element says whether the value of that element is stored.

Bit `j` of byte `i` of a row (lowest bit first) marks column `8 * i + j`; the bits beyond the last column are zero. The
marked values are stored in row-major order in one flat array. These functions only convert: callers choose which
elements to mark, and check that the contents of a file are valid.
Source: compressed-tensors 0.20 `utils/helpers.py` (`pack_bitmasks`, `unpack_bitmasks`).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]
    Bytes = NDArray[np.uint8]

__all__ = [
    "count_marks",
    "count_marks_per_four",
    "pack_mask",
    "scatter_marked",
    "unpack_mask",
]

_TILE_ELEMENTS = 1 << 20


def pack_mask(mask: Mask) -> Bytes:
    """Pack a bool mask [..., C] into a bitmask, uint8 [..., ceil(C / 8)]."""
    import numpy as np

    return np.packbits(mask, axis=-1, bitorder="little")


def unpack_mask(bitmask: Bytes, columns: int) -> Mask:
    """Unpack a bitmask, uint8 [..., ceil(C / 8)], into a bool mask [..., C]; bits beyond column C are ignored."""
    import numpy as np

    return np.unpackbits(bitmask, axis=-1, count=columns, bitorder="little").view(np.bool_)


def count_marks(bitmask: Bytes) -> NDArray[np.int64]:
    """Return the number of marked elements per row: uint8 [..., B] -> int64 [...]."""
    import numpy as np

    fours = count_marks_per_four(bitmask)
    return np.asarray(((fours & 0x0F) + (fours >> 4)).sum(axis=-1, dtype=np.int64))


def count_marks_per_four(bitmask: Bytes) -> Bytes:
    """Return how many of each four columns are marked, uint8 of the same shape as `bitmask`.

    A byte of the result counts the first four columns in its low nibble and the next four in its high nibble.
    The counts come from the usual parallel bit count (sideways addition).
    """
    twos = bitmask - ((bitmask >> 1) & 0x55)
    fours: Bytes = (twos & 0x33) + ((twos >> 2) & 0x33)
    return fours


def scatter_marked(values: NDArray[Any], bitmask: Bytes, columns: int) -> NDArray[Any]:
    """Write flat values to the marked elements of a zero array [..., C]: the inverse of `dense[mask]`.

    `bitmask` is uint8 [..., ceil(C / 8)]. There must be as many values as marks, and no mark beyond column C. Bits are
    copied, so that any dtype works and every NaN keeps its payload. Beside the result it needs memory for one tile.
    """
    import numpy as np

    bits = values.view(f"u{values.itemsize}")
    dense = np.zeros((*bitmask.shape[:-1], columns), bits.dtype)
    rows = prod(bitmask.shape[:-1])
    target_OI, bitmask_OB = dense.reshape(rows, columns), bitmask.reshape(rows, bitmask.shape[-1])
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    begin = 0
    for start in range(0, target_OI.shape[0], step):
        mask = unpack_mask(bitmask_OB[start : start + step], columns)
        end = begin + int(np.count_nonzero(mask))
        target_OI[start : start + step][mask] = bits[begin:end]
        begin = end
    return dense.view(values.dtype)
