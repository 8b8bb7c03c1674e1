"""Tensors that are stored in pieces: a bitmask and the values that it marks.

| piece        | sparse-bitmask            | sparse-24-bitmask            |
|--------------|---------------------------|------------------------------|
| `compressed` | [number of marks]         | [R, C / 2]                   |
| `bitmask`    | uint8 [R, ceil(C / 8)], the first column in the lowest bit   |
| `shape`      | the shape, [2] or [2, 1]                                    |

In both, the values are in the order of the marks, row after row. Up to 0.8.1 the pieces are named after the tensor
(`x.weight.bitmask`), since 0.9 after the module of a weight (`x.bitmask`).
Source: compressed-tensors 0.6 and 0.14 `compressors/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.verify.source.files import FileTensor, SourceTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["SparseTensor", "join_pieces"]

_CHUNK_ROWS = 4096
# Last parts of tensor names: a stem that ends in one of them is the name of a tensor.
_TENSOR_NAMES = ("weight", "bias", "_scale", "_zero_point", "_packed", "_shape", "_g_idx")


@dataclass(frozen=True, kw_only=True)
class SparseTensor(SourceTensor):
    """A tensor [R, C] or [n] in pieces; its elements that are not marked are zero."""

    bitmask: FileTensor
    compressed: FileTensor

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The number of marks before each row."""
        mask = self.bitmask if len(self.shape) > 1 else self.bitmask.reshaped(1, self.bitmask.size)
        counts = [
            np.unpackbits(mask.rows(first, min(first + _CHUNK_ROWS, mask.shape[0])), axis=1).sum(axis=1, dtype=np.int64)
            for first in range(0, mask.shape[0], _CHUNK_ROWS)
        ]
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(np.concatenate(counts))))

    def rows(self, begin: int, end: int) -> NDArray[Any]:
        """Return rows `begin` to `end`; for a vector, elements `begin` to `end`."""
        if len(self.shape) == 1:
            return self._matrix_rows(0, 1, self.shape[0])[0, begin:end]
        return self._matrix_rows(begin, end, self.shape[1])

    def _matrix_rows(self, begin: int, end: int, columns: int) -> NDArray[Any]:
        mask = self.bitmask if len(self.shape) > 1 else self.bitmask.reshaped(1, self.bitmask.size)
        marks = np.unpackbits(mask.rows(begin, end), axis=1, bitorder="little")[:, :columns].astype(bool)
        first, last = (int(start) for start in self._starts[[begin, end]])
        values = self.compressed.reshaped(self.compressed.size).rows(first, last)
        result = np.zeros(marks.shape, values.dtype)
        result[marks] = values
        return result


def join_pieces(tensors: Mapping[str, FileTensor]) -> dict[str, SourceTensor]:
    """Return the tensors, with those in pieces joined under the name of the whole tensor."""
    stems = [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]
    stems = [stem for stem in stems if f"{stem}.compressed" in tensors]
    pieces = {f"{stem}.{piece}" for stem in stems for piece in ("bitmask", "compressed", "shape", "row_offsets")}
    joined: dict[str, SourceTensor] = {name: tensor for name, tensor in tensors.items() if name not in pieces}
    named_by_tensor = any(stem.rpartition(".")[2].endswith(_TENSOR_NAMES) for stem in stems)
    for stem in stems:
        bitmask, compressed = tensors[f"{stem}.bitmask"], tensors[f"{stem}.compressed"]
        shape = _shape(tensors.get(f"{stem}.shape"), bitmask, compressed)
        name = stem if named_by_tensor else f"{stem}.weight"
        joined[name] = SparseTensor(dtype=compressed.dtype, shape=shape, bitmask=bitmask, compressed=compressed)
    return joined


def _shape(stored: FileTensor | None, bitmask: FileTensor, compressed: FileTensor) -> tuple[int, ...]:
    """Return the shape of the whole tensor; without a stored one its columns are those that the bitmask can mark."""
    if stored is not None:
        return tuple(int(size) for size in stored.whole().flatten())
    *rows, mask_bytes = bitmask.shape
    return (*rows, 2 * compressed.shape[1] if len(compressed.shape) == 2 else 8 * mask_bytes)
