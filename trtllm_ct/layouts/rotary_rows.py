"""Conversion between the two row orders of query and key weights.

Rotary position embedding rotates pairs of numbers (x, y) within each head. The orders differ in where the two rows of
a pair are:

| order  | rows of a head of 2n                  | written by                                     |
|--------|---------------------------------------|------------------------------------------------|
| pairs  | x0, y0, x1, y1, ...                   | Meta, Mistral: neighbours rotate together      |
| halves | x0, x1, ..., x(n-1), y0, y1, ...      | Hugging Face: row i rotates with row i + n     |

Attention scores are the same in either order, as long as queries, keys and the rotation use the same one.
Source: transformers 4.53 `models/mistral/convert_mistral_weights_to_hf.py` (`permute_for_rope`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.layouts.packing import pack_fields, unpack_fields

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from trtllm_ct.base.schemes import Packing

__all__ = ["halves_of_packed_pairs", "halves_of_pairs"]


def halves_of_pairs(rows_OI: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Reorder the rows of each head from pairs to halves: [N, ...] of any dtype, N a multiple of `head_dim`."""
    heads = rows_OI.shape[0] // head_dim
    pairs = rows_OI.reshape(heads, head_dim // 2, 2, *rows_OI.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows_OI.shape)


def halves_of_packed_pairs(words_PI: NDArray[Any], packing: Packing, rows: int, head_dim: int) -> NDArray[Any]:
    """Reorder the rows of each head from pairs to halves in a matrix that is packed along axis 0; `rows` is N.

    A word holds codes of several rows. The bits of each code stay the same; the unused bits behind the last row become
    zero.
    """
    fields_OI = unpack_fields(words_PI, packing, (rows, words_PI.shape[1]))
    return pack_fields(halves_of_pairs(fields_OI, head_dim), packing)
