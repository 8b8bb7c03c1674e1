"""`sparse-bitmask`: the nonzero values, and one bit per element.

| piece         | dtype          | matrix [R, C]                      | vector [n]       |
|---------------|----------------|------------------------------------|------------------|
| `compressed`  | as when dense  | [nnz], in row-major order          | [nnz]            |
| `bitmask`     | uint8          | [R, ceil(C / 8)]                   | [ceil(n / 8)]    |
| `row_offsets` | int64          | [R]: number of values before a row | []: the number 0 |
| `shape`       | int64          | [2]: the numbers R, C              | [1]              |

nnz is the number of nonzero values. The lowest bit of a byte comes first. Minus zero counts as zero and loses its sign.
Row offsets follow from the bitmask, so a file may omit them; if they are stored, they must agree with the bitmask.
Tensors of more than two axes are stored like matrices, with offsets that accumulate along the first axis.
Source: compressed-tensors 0.6 and 0.14 `compressors/.../sparse_bitmask.py`; later releases have no such code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, TensorSpec
from trtllm_ct.formats.sparse.base import SparseFormat, SparseTensor, check_pieces, refuse_piece
from trtllm_ct.layouts.bitmasks import count_marks, pack_mask
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.formats.base import StoredSpecs
    from trtllm_ct.layouts.stored_array import StoredTensors

__all__ = ["SPARSE_BITMASK"]


class _SparseBitmask(SparseFormat):
    name = CompressionFormat.SPARSE_BITMASK

    def accepts(self, pieces: StoredSpecs) -> bool:
        """Accept pieces whose values are one flat tensor."""
        return len(pieces["compressed"].shape) == 1

    def describe(
        self,
        stem: str,
        pieces: StoredSpecs,
        expected_shape: tuple[int, ...] | None,
        faults: FaultCollector,
    ) -> TensorSpec | None:
        """Return the dtype and shape of the dense tensor; None, with faults added, if the pieces contradict each other.

        The last byte of a row of the bitmask need not be full, so `expected_shape` determines the number of columns. If
        it is unknown or does not fit, the number of columns is 8 per byte; `decode` compares the result with the
        numbers in `shape`.
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

    def holds(self, dense: StoredArray) -> bool:
        """Return True for any tensor but a scalar, which has no rows."""
        return len(dense.shape) > 0

    def encode(self, dense: StoredArray) -> dict[str, StoredArray]:
        """Return the four pieces by local name. Raises `ValueError` for a scalar."""
        import numpy as np

        if not self.holds(dense):
            raise ValueError("a scalar has no rows, so it can't be stored as sparse-bitmask")
        mask = dense.is_nonzero
        return {
            "shape": StoredArray(np.array(dense.shape, np.int64), DType.I64),
            "compressed": dense[mask],
            "bitmask": StoredArray(pack_mask(mask), DType.U8),
            "row_offsets": StoredArray(_row_offsets(mask.sum(axis=-1, dtype=np.int64)), DType.I64),
        }

    def check_marks(self, sparse: SparseTensor, pieces: StoredTensors, faults: FaultCollector) -> None:
        """Add a fault if row offsets are stored and differ from those that follow from the bitmask."""
        import numpy as np

        stored = pieces.get("row_offsets")
        if stored is None:
            return
        if not np.array_equal(stored.elements, _row_offsets(count_marks(pieces["bitmask"].elements))):
            refuse_piece(sparse.parts["row_offsets"], "the offsets that the bitmask makes", "others", faults)


SPARSE_BITMASK = _SparseBitmask()


def _check_row_offsets(stem: str, pieces: StoredSpecs, rows: tuple[int, ...], faults: FaultCollector) -> bool:
    """Return whether row offsets are absent, or int64 or int32 of shape `rows`; add a fault if not."""
    offsets = pieces.get("row_offsets")
    if offsets is None or (offsets.dtype in {DType.I64, DType.I32} and offsets.shape == rows):
        return True
    refuse_piece(f"{stem}.row_offsets", f"int64 {list(rows)}, one for each row", offsets, faults)
    return False


def _row_offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of values before each row, from the number of values in each row.

    For more than one axis of rows, the sum runs along the first axis only, as in the library.
    """
    import numpy as np

    offsets: NDArray[np.int64] = np.cumsum(counts, axis=0).reshape(np.shape(counts)) - counts
    return np.asarray(offsets)
