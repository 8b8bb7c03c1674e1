"""`sparse-24-bitmask`: two values of each four columns, and one bit per element.

| piece        | dtype         | shape                              |
|--------------|---------------|------------------------------------|
| `compressed` | as when dense | [R, C / 2]                         |
| `bitmask`    | uint8         | [R, ceil(C / 8)], lowest bit first |
| `shape`      | int64         | [2, 1]: the numbers R, C           |

Exactly two of each four columns are marked: if four columns have fewer than two nonzero values, zeros are stored too.
Releases 0.9 to 0.14 wrote this format, often for int8 or float8 codes.
Source: compressed-tensors 0.14 `compressors/sparse_compressors/sparse_24_bitmask.py`; later releases have no such code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import CompressionFormat, TensorSpec
from trtllm_ct.formats.sparse.base import SparseFormat, SparseTensor, check_pieces, refuse_piece
from trtllm_ct.layouts.bitmasks import count_marks_per_four, pack_mask
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.formats.base import StoredSpecs
    from trtllm_ct.layouts.stored_array import StoredTensors

__all__ = ["SPARSE_24_BITMASK"]

# Counts of marks for eight columns, as `count_marks_per_four` returns them: the first four columns in the low nibble.
_TWO_AND_TWO = 0x22
_TWO_AND_NONE = 0x02

# The columns that are kept where the second and the third largest magnitude are equal, by the number of columns with a
# larger magnitude than each of the four: what `torch.topk` on a CPU chooses.
_KEPT_OF_EQUALS = {
    (0, 0, 0, 0): (2, 3),
    (0, 0, 0, 3): (1, 2),
    (0, 0, 3, 0): (1, 3),
    (0, 1, 1, 1): (0, 2),
    (0, 1, 1, 3): (0, 1),
    (0, 1, 3, 1): (0, 1),
    (0, 3, 0, 0): (2, 3),
    (0, 3, 1, 1): (0, 2),
    (1, 0, 1, 1): (1, 3),
    (1, 0, 1, 3): (1, 2),
    (1, 0, 3, 1): (1, 3),
    (1, 1, 0, 1): (2, 3),
    (1, 1, 0, 3): (1, 2),
    (1, 1, 1, 0): (2, 3),
    (1, 1, 3, 0): (1, 3),
    (1, 3, 0, 1): (2, 3),
    (1, 3, 1, 0): (2, 3),
    (3, 0, 0, 0): (2, 3),
    (3, 0, 1, 1): (1, 3),
    (3, 1, 0, 1): (2, 3),
    (3, 1, 1, 0): (2, 3),
}


class _Sparse24Bitmask(SparseFormat):
    name = CompressionFormat.SPARSE_24_BITMASK

    def accepts(self, pieces: StoredSpecs) -> bool:
        """Accept pieces whose values are a matrix."""
        return len(pieces["compressed"].shape) == 2

    def describe(
        self,
        stem: str,
        pieces: StoredSpecs,
        expected_shape: tuple[int, ...] | None,  # noqa: ARG002 (the contract names it)
        faults: FaultCollector,
    ) -> TensorSpec | None:
        """Return the dtype and shape of the dense tensor; None, with faults added, if the pieces contradict each other.

        The number of columns is twice that of `compressed`, so `expected_shape` is not needed.
        """
        if not check_pieces(stem, pieces, faults):
            return None
        compressed, bitmask = pieces["compressed"], pieces["bitmask"]
        rows, columns = compressed.shape[0], 2 * compressed.shape[1]
        width = -(-columns // 8)
        if columns % 4:
            refuse_piece(f"{stem}.compressed", "an even number of columns, two for each four", compressed, faults)
        elif bitmask.shape != (rows, width):
            refuse_piece(f"{stem}.bitmask", f"uint8 {[rows, width]} beside {compressed}", bitmask, faults)
        else:
            return TensorSpec(compressed.dtype, (rows, columns))
        return None

    def holds(self, dense: StoredArray) -> bool:
        """Return True for a matrix with a multiple of 4 columns and at most two nonzero values in each four columns."""
        if not _is_matrix_of_fours(dense):
            return False
        counts = count_marks_per_four(pack_mask(dense.is_nonzero))
        return bool(((counts & 0x0F) <= 2).all() and ((counts >> 4) <= 2).all())

    def encode(self, dense: StoredArray) -> dict[str, StoredArray]:
        """Return the three pieces by local name; of each four columns, the two values of largest magnitude are stored.

        Among equal magnitudes, such as the zeros of four columns with fewer than two nonzero values, the same columns
        are chosen as by the library, which left it to `torch.topk`. The library compared the bytes of float8 codes and
        lost int8 codes of -128; this function compares true magnitudes.
        Raises `ValueError` if the tensor is not a matrix with a multiple of 4 columns.
        """
        import numpy as np

        if not _is_matrix_of_fours(dense):
            raise ValueError(f"2:4 sparsity needs a matrix with a multiple of 4 columns, not {list(dense.shape)}")
        mask = _largest_two(dense.magnitudes.reshape(-1, 4)).reshape(dense.shape)
        return {
            "shape": StoredArray(np.array(dense.shape, np.int64).reshape(-1, 1), DType.I64),
            "compressed": dense[mask].reshape(dense.shape[0], dense.shape[1] // 2),
            "bitmask": StoredArray(pack_mask(mask), DType.U8),
        }

    def check_marks(self, sparse: SparseTensor, pieces: StoredTensors, faults: FaultCollector) -> None:
        """Add a fault if not exactly two of each four columns are marked."""
        counts = count_marks_per_four(pieces["bitmask"].elements)
        full_bytes = sparse.spec.shape[1] // 8
        valid = (counts[:, :full_bytes] == _TWO_AND_TWO).all() and (counts[:, full_bytes:] == _TWO_AND_NONE).all()
        if not bool(valid):
            refuse_piece(sparse.parts["bitmask"], "two marks in each four columns", "more or fewer in some", faults)


SPARSE_24_BITMASK = _Sparse24Bitmask()


def _is_matrix_of_fours(dense: StoredArray) -> bool:
    """Whether a tensor is a matrix with a multiple of 4 columns."""
    return len(dense.shape) == 2 and dense.shape[1] % 4 == 0


def _largest_two(magnitudes: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which two of each four magnitudes are kept: [n, 4] -> bool [n, 4]."""
    import numpy as np

    larger = (magnitudes[:, None, :] > magnitudes[:, :, None]).sum(axis=2)
    kept: NDArray[np.bool_] = larger < 2
    equals = np.flatnonzero(kept.sum(axis=1) != 2)
    for counts, columns in _KEPT_OF_EQUALS.items():
        rows = equals[(larger[equals] == counts).all(axis=1)]
        kept[rows] = False
        kept[np.ix_(rows, columns)] = True
    return kept
