"""Where the codes of a Linear are in the stream of bytes that a kernel for narrow weights reads.

It is written from the description of the format, as the position of each code, and shares nothing with `layouts/`.
Source: TensorRT-LLM `quantization/functional.py: preprocess_weights_for_mixed_gemm` (2a9abd95).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

__all__ = ["rows_in_stream", "tile_rows"]

_TILE = 64


def tile_rows(bits: int, sm: int) -> int:
    """Return how many rows have their tiles in turn: as many as fill 16 bits before Hopper, and one on Hopper."""
    return 16 // bits if sm < 90 else 1


def rows_in_stream(stream: NDArray[np.uint8], columns: int, *, bits: int, sm: int) -> NDArray[np.int64]:
    """Return the signed codes [n, K] of whole groups of rows, whose bytes follow each other; K is `columns`."""
    together = tile_rows(bits, sm)
    fields: NDArray[Any] = stream.astype(np.int64)
    if bits < 8:
        fields = np.stack((fields & 15, fields >> 4), axis=-1).reshape(-1)
    rows = np.arange(fields.size // columns)[:, None]
    place = _place_in_row(np.arange(columns), bits)
    tile, inside = np.divmod(place, _TILE)
    first = rows // together * together * columns
    codes: NDArray[np.int64] = fields[first + (tile * together + rows % together) * _TILE + inside]
    return codes - (1 << (bits - 1))


def _place_in_row(columns: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Return the place of each column among the codes of its row, if no other rows came between.

    A block of 128 bits holds `fourths` fourths of eight columns. Pair i of fourth j, which has the columns 2i and
    2i + 1, becomes pair j of register i, and a register has all even columns before all odd ones.
    """
    block = 128 // bits
    fourths = block // 8
    fourth, inside = np.divmod(columns % block, 8)
    pair, odd = np.divmod(inside, 2)
    place: NDArray[np.int64] = columns // block * block + pair * 2 * fourths + odd * fourths + fourth
    return place
