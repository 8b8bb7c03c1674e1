"""`sparse-bitmask`: the values that are not zero, and one bit for each element.

| piece         | dtype      | matrix [R, C]             | vector [n]      |
|---------------|------------|---------------------------|-----------------|
| `compressed`  | the values | [nnz], row after row      | [nnz]           |
| `bitmask`     | uint8      | [R, ceil(C / 8)]          | [ceil(n / 8)]   |
| `row_offsets` | int64      | [R]: values before a row  | []: the number 0 |
| `shape`       | int64      | [2]: the numbers R, C     | [1]             |

Bits are lowest first. Minus zero counts as zero and loses its sign. Row offsets follow from the bitmask, so a file may
lack them; where they are, they must agree. Tensors of more axes are stored like matrices, with offsets that count
along the first axis.
Source: compressed-tensors 0.6 and 0.14 `compressors/.../sparse_bitmask.py`; later releases have no such code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, TensorSpec
from trtllm_ct.formats.sparse.base import SparseFormat, SparseTensor, check_pieces, refuse_piece
from trtllm_ct.layouts.bitmasks import count_marks, gather_marked, nonzero_mask, pack_mask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.formats.base import StoredSpecs

__all__ = ["SPARSE_BITMASK"]


class _SparseBitmask(SparseFormat):
    name = CompressionFormat.SPARSE_BITMASK

    def accepts(self, pieces: StoredSpecs) -> bool:
        """Values in one flat tensor."""
        return len(pieces["compressed"].shape) == 1

    def describe(
        self,
        stem: str,
        pieces: StoredSpecs,
        expected_shape: tuple[int, ...] | None,
        faults: FaultCollector,
    ) -> TensorSpec | None:
        """See the table above; the last byte of a row may not be full, so `expected_shape` settles the columns.

        Without one that fits, the bytes count as full; `decode` compares that with the numbers in `shape`.
        """
        if not check_pieces(stem, pieces, faults):
            return None
        *rows, width = pieces["bitmask"].shape
        columns = 8 * width
        if expected_shape and list(expected_shape[:-1]) == rows and columns - 8 < expected_shape[-1] <= columns:
            columns = expected_shape[-1]
        spec = TensorSpec(pieces["compressed"].dtype, (*rows, columns))
        if not _check_row_offsets(stem, pieces, tuple(rows), faults):
            return None
        if pieces["compressed"].numel > spec.numel:
            refuse_piece(f"{stem}.compressed", f"at most {spec.numel} values", pieces["compressed"], faults)
            return None
        return spec

    def holds(self, dense: Tensor) -> bool:
        """Everything but a scalar, which has no rows."""
        return dense.dim() > 0

    def encode(self, dense: Tensor) -> dict[str, Tensor]:
        """The four pieces. Raises `ValueError` for a scalar."""
        import torch

        if not self.holds(dense):
            raise ValueError("a scalar has no rows, so it can't be stored as sparse-bitmask")
        mask = nonzero_mask(dense)
        return {
            "shape": torch.tensor(dense.shape, dtype=torch.int64),
            "compressed": gather_marked(dense, mask),
            "bitmask": pack_mask(mask),
            "row_offsets": _offsets(mask.sum(dim=-1)),
        }

    def check_marks(self, sparse: SparseTensor, pieces: Mapping[str, Tensor], faults: FaultCollector) -> None:
        """Row offsets, where they are stored, must be those that the bitmask makes."""
        import torch

        stored = pieces.get("row_offsets")
        if stored is not None and not torch.equal(stored.long(), _offsets(count_marks(pieces["bitmask"]))):
            refuse_piece(sparse.parts["row_offsets"], "the offsets that the bitmask makes", "others", faults)


SPARSE_BITMASK = _SparseBitmask()


def _check_row_offsets(stem: str, pieces: StoredSpecs, rows: tuple[int, ...], faults: FaultCollector) -> bool:
    offsets = pieces.get("row_offsets")
    if offsets is None or (offsets.dtype in {DType.I64, DType.I32} and offsets.shape == rows):
        return True
    refuse_piece(f"{stem}.row_offsets", f"int64 {list(rows)}, one for each row", offsets, faults)
    return False


def _offsets(counts: Tensor) -> Tensor:
    """Values before each row, from the values in each; summed along the first axis, as the library does."""
    return counts.cumsum(dim=0) - counts
