"""The arrangements of Marlin's 2:4 sparse kernel, undone and redone: codes, positions and scales.

Of each four columns two codes are kept; which ones, is said by a nibble `first | second << 2`. Codes and nibbles lie in
the order in which a GPU's tensor cores fetch them, so a file of this layout is a permutation of a plain one.
Axis letters: `O` out (rows, N), `I` in (columns, K), `H` half of the columns, `F` fours of columns, `G` groups.
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
    from torch import Tensor

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
"""Rows come in blocks of 64, the reach of the order of the nibbles."""

K_MULTIPLE = 32
"""Columns come in blocks of 32: 16 kept ones, the side of a tile."""

NIBBLES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)
"""The nibbles of two different positions, the lower one first."""

_TILE = 16
_RUN = 1024
_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_META = Packing(bits=4, container=DType.I16, axis=1, offset_binary=False)
# By the marks of four columns, the first one in the lowest bit. CUTLASS fills groups of fewer than two marks like this.
_NIBBLE_OF_MARKS = {0: 0xE, 1: 0x8, 2: 0x9, 3: 0x4, 4: 0xE, 5: 0x8, 6: 0x9, 8: 0xE, 9: 0xC, 10: 0xD, 12: 0xE}


def restore_codes(words: Tensor, bits: int) -> Tensor:
    """int32 [K/32, N * bits/2] -> the kept codes, int8 [N, K/2] in the order of their columns."""
    import torch

    tiles, width = words.shape[0], words.shape[1] * 32 // bits
    stored = unpack_codes(words, packed_words(bits), (tiles, width)).view(-1, _RUN)
    plain = torch.empty_like(stored)
    plain[:, _tile_order(bits)] = stored
    blocks = plain.view(tiles, width // _TILE**2, _TILE, _TILE)
    return blocks.permute(1, 3, 0, 2).reshape(width // _TILE, tiles * _TILE)


def arrange_codes(codes_OH: Tensor, bits: int) -> Tensor:
    """The inverse of `restore_codes`."""
    rows, half = codes_OH.shape
    blocks = codes_OH.view(rows // _TILE, _TILE, half // _TILE, _TILE).permute(2, 0, 3, 1)
    stored = blocks.reshape(-1, _RUN)[:, _tile_order(bits)]
    return pack_codes(stored.reshape(half // _TILE, rows * _TILE), packed_words(bits))


def restore_nibbles(meta: Tensor) -> Tensor:
    """int16 [K/32, 2N] -> the nibble of each four columns, uint8 [N, K/4]."""
    rows, elements = meta.shape[1] // 2, meta.shape[0] * 2
    plain = meta.flatten()[_meta_order(rows, elements)]
    return unpack_fields(plain, _META, (rows, elements * 4))


def arrange_nibbles(nibbles_OF: Tensor) -> Tensor:
    """The inverse of `restore_nibbles`."""
    import torch

    plain = pack_fields(nibbles_OF, _META)
    rows, elements = plain.shape
    meta = torch.empty(rows * elements, dtype=torch.int16)
    meta[_meta_order(rows, elements)] = plain
    return meta.view(elements // 2, rows * 2)


def restore_scales(stored_GO: Tensor) -> Tensor:
    """Scales in the order 0 4 1 5 2 6 3 7 of each eight rows of the weight -> in the order of the rows."""
    groups, rows = stored_GO.shape
    return stored_GO.reshape(groups, rows // 8, 4, 2).transpose(2, 3).reshape(groups, rows)


def arrange_scales(scale_GO: Tensor) -> Tensor:
    """The inverse of `restore_scales`."""
    groups, rows = scale_GO.shape
    return scale_GO.reshape(groups, rows // 8, 2, 4).transpose(2, 3).reshape(groups, rows)


def expand_fours(codes_OH: Tensor, nibbles_OF: Tensor) -> Tensor:
    """Two codes for each four columns to the positions that the nibbles say, zeros elsewhere: int8 [N, K]."""
    import torch

    rows, fours = nibbles_OF.shape
    lower, upper = codes_OH.view(rows, fours, 2).unbind(2)
    first, second = nibbles_OF & 3, nibbles_OF >> 2
    result = torch.empty((rows, fours, 4), dtype=torch.int8)
    for position in range(4):
        torch.add(lower * (first == position), upper * (second == position), out=result[..., position])
    return result.view(rows, fours * 4)


def pick_fours(codes_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `expand_fours`: the two codes of each four columns, and the nibbles that say where they were.

    Raises `ValueError` when four columns hold more than two codes that are not zero.
    """
    import torch

    fours = codes_OI.reshape(codes_OI.shape[0], -1, 4)
    marks = ((fours != 0) << torch.arange(4)).sum(dim=2)
    table = torch.tensor([_NIBBLE_OF_MARKS.get(pattern, 0) for pattern in range(16)], dtype=torch.uint8)
    nibbles = table[marks]
    if bool((nibbles == 0).any()):
        raise ValueError("more than two codes of four columns are not zero: this is no 2:4 sparse weight")
    places = torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()
    return fours.gather(2, places).flatten(1), nibbles


@cache
def _tile_order(bits: int) -> Tensor:
    """Where each of 1024 consecutive codes of the file comes from within four tiles of 16 x 16."""
    import torch

    order: list[int] = []
    for thread in range(32):
        column, pair = thread // 4, thread % 4
        rows = (2 * pair, 2 * pair + 1, 2 * pair + 8, 2 * pair + 9)
        corner = 256 * (column // 2) + 8 * (column % 2)
        base = [16 * row + corner + 4 * block for block in range(2) for row in rows]
        order += [place + shift for shift in range(4) for place in base]
    interleave = list(_INTERLEAVE[bits])
    return torch.tensor(order).view(-1, len(interleave))[:, interleave].flatten()


def _meta_order(rows: int, elements: int) -> Tensor:
    """Where in the flat file each element of a row-major [rows, elements] matrix of nibbles lies."""
    import torch

    row, column = torch.arange(rows)[:, None], torch.arange(elements)[None, :]
    target = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    # In each 2 x 2 block the two elements off the diagonal change places.
    swap = column % 2 - target % 2
    target, column = target + swap, column - swap
    return column // 2 * (2 * rows) + target * 2 + column % 2
