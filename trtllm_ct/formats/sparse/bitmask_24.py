"""`sparse-24-bitmask`: two values of each four columns, and one bit for each element.

| piece        | dtype      | shape                                        |
|--------------|------------|----------------------------------------------|
| `compressed` | the values | [R, C / 2]                                   |
| `bitmask`    | uint8      | [R, ceil(C / 8)], lowest bit first           |
| `shape`      | int64      | [2, 1]: the numbers R, C                     |

Exactly two of each four columns are marked, so that zeros are stored where a group has fewer than two values.
Written by releases 0.9 to 0.14, often on top of int8 or float8 codes.
Source: compressed-tensors 0.14 `compressors/sparse_compressors/sparse_24_bitmask.py`; later releases have no such code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import CompressionFormat, TensorSpec
from trtllm_ct.formats.sparse.base import SparseFormat, SparseTensor, check_pieces, refuse_piece
from trtllm_ct.layouts.bitmasks import gather_marked, marks_of_fours, nonzero_mask, pack_mask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.formats.base import StoredSpecs

__all__ = ["SPARSE_24_BITMASK"]

_TWO_AND_TWO = 0x22
_TWO_AND_NONE = 0x02


class _Sparse24Bitmask(SparseFormat):
    name = CompressionFormat.SPARSE_24_BITMASK

    def accepts(self, pieces: StoredSpecs) -> bool:
        """Values in a matrix."""
        return len(pieces["compressed"].shape) == 2

    def describe(
        self,
        stem: str,
        pieces: StoredSpecs,
        expected_shape: tuple[int, ...] | None,  # noqa: ARG002 (the contract names it)
        faults: FaultCollector,
    ) -> TensorSpec | None:
        """See the table above; half of the columns are there to be counted, so nothing is left open."""
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

    def holds(self, dense: Tensor) -> bool:
        """A matrix with no more than two values in each four columns."""
        if not _has_fours(dense):
            return False
        counts = marks_of_fours(pack_mask(nonzero_mask(dense)))
        return bool(((counts & 0x0F) <= 2).all() and ((counts >> 4) <= 2).all())

    def encode(self, dense: Tensor) -> dict[str, Tensor]:
        """The three pieces; of more than two values in four columns, the two largest magnitudes stay.

        Equal magnitudes, among them the zeros that fill a group up, are taken as `torch.topk` takes them, which is what
        the library called. It compared the bytes of float8 codes and lost -128; here magnitudes are what they are.
        Raises `ValueError` when the tensor is no matrix of whole groups.
        """
        import torch

        if not _has_fours(dense):
            raise ValueError(f"2:4 sparsity needs a matrix with a multiple of 4 columns, not {list(dense.shape)}")
        kept = _magnitudes(dense).reshape(-1, 4).topk(2, dim=1).indices
        mask = torch.zeros((kept.shape[0], 4), dtype=torch.bool, device=dense.device).scatter_(1, kept, value=True)
        mask = mask.view(dense.shape)
        return {
            "shape": torch.tensor(dense.shape, dtype=torch.int64).reshape(-1, 1),
            "compressed": gather_marked(dense, mask).view(dense.shape[0], dense.shape[1] // 2),
            "bitmask": pack_mask(mask),
        }

    def check_marks(self, sparse: SparseTensor, pieces: Mapping[str, Tensor], faults: FaultCollector) -> None:
        """Two marks in each four columns."""
        counts = marks_of_fours(pieces["bitmask"])
        whole = sparse.spec.shape[1] // 8
        good = (counts[:, :whole] == _TWO_AND_TWO).all() and (counts[:, whole:] == _TWO_AND_NONE).all()
        if not bool(good):
            refuse_piece(sparse.parts["bitmask"], "two marks in each four columns", "more or fewer in some", faults)


SPARSE_24_BITMASK = _Sparse24Bitmask()


def _has_fours(dense: Tensor) -> bool:
    return dense.dim() == 2 and dense.shape[1] % 4 == 0


def _magnitudes(dense: Tensor) -> Tensor:
    """Absolute values, in a dtype in which none overflows and that orders them as they are."""
    import torch

    if dense.itemsize == 1:
        return dense.to(torch.bfloat16).abs()
    return dense.abs() if dense.is_floating_point() else dense.double().abs()
