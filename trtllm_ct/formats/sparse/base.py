"""What a sparse format is: how the pieces of one tensor, values and marks, make the dense tensor.

Sparsity is a layer of its own, outside of the weight formats: what comes out is the tensor that would have been stored
without it, be it bfloat16, or the int8 or float8 codes of a quantized weight.
The questions and their order are those of a weight format: `accepts` and `describe` from headers, `decode` from
tensors, and `encode`, the inverse of `decode`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PayloadError
from trtllm_ct.layouts.bitmasks import count_marks, scatter_marked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.schemes import CompressionFormat, TensorSpec
    from trtllm_ct.formats.base import StoredSpecs

__all__ = ["SHAPE_DTYPES", "SparseFormat", "SparseTensor", "check_pieces", "refuse_piece"]

_DAMAGED = "The file was damaged or cut, or its writer broke the format; download the checkpoint again."
SHAPE_DTYPES = frozenset({DType.I64, DType.I32})
"""What writers store the sizes of a dense tensor in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTensor:
    """A dense tensor that a file holds in pieces, known from headers.

    `name` and `spec` are those of the dense tensor; `parts` gives the stored name of each piece (`compressed`, ...).
    """

    name: str
    spec: TensorSpec
    kind: CompressionFormat
    parts: Mapping[str, str]


class SparseFormat(ABC):
    """The contract of one sparse format; a final class per file, one instance in `SPARSE_FORMATS`."""

    name: CompressionFormat
    """The name under which a `sparsity_config` declares it."""

    @abstractmethod
    def accepts(self, pieces: StoredSpecs) -> bool:
        """Whether these pieces, by their local names, are of this format."""

    @abstractmethod
    def describe(
        self,
        stem: str,
        pieces: StoredSpecs,
        expected_shape: tuple[int, ...] | None,
        faults: FaultCollector,
    ) -> TensorSpec | None:
        """Dtype and shape of the dense tensor; None, with faults added, when the pieces contradict each other.

        `stem` is what the stored names of the pieces begin with; `expected_shape` is what `shape` or the model says,
        where it is known.
        """

    @abstractmethod
    def holds(self, dense: Tensor) -> bool:
        """Whether `encode` keeps every value of a tensor; the sign of zero does not count."""

    @abstractmethod
    def encode(self, dense: Tensor) -> dict[str, Tensor]:
        """The pieces of a dense tensor by local name, byte for byte as compressed-tensors wrote them."""

    @abstractmethod
    def check_marks(self, sparse: SparseTensor, pieces: Mapping[str, Tensor], faults: FaultCollector) -> None:
        """Add a fault where the marks break a promise of this format that headers can't show."""

    def decode(self, sparse: SparseTensor, pieces: Mapping[str, Tensor]) -> Tensor:
        """The dense tensor, from its pieces by local name; see `restore`."""
        faults = FaultCollector()
        _check_shape(sparse, pieces["shape"], faults)
        _check_counts(sparse, pieces, faults)
        self.check_marks(sparse, pieces, faults)
        faults.raise_if_any(PayloadError)
        return scatter_marked(pieces["compressed"].flatten(), pieces["bitmask"], sparse.spec.shape[-1])


def check_pieces(stem: str, pieces: StoredSpecs, faults: FaultCollector) -> bool:
    """Whether bitmask and shape are of the dtypes and ranks that both formats share."""
    bitmask, shape = pieces["bitmask"], pieces["shape"]
    rank = len(bitmask.shape)
    before = len(faults.faults)
    if bitmask.dtype is not DType.U8 or rank == 0:
        faults.add(where=f"{stem}.bitmask", expected="uint8, one bit a column", found=str(bitmask), remedy=_DAMAGED)
    elif shape.dtype not in SHAPE_DTYPES or shape.numel != rank:
        expected = f"int64 [{rank}], the sizes of the dense tensor"
        faults.add(where=f"{stem}.shape", expected=expected, found=str(shape), remedy=_DAMAGED)
    return len(faults.faults) == before


def refuse_piece(name: str, expected: str, found: object, faults: FaultCollector) -> None:
    """Add the fault of one piece."""
    faults.add(where=name, expected=expected, found=str(found), remedy=_DAMAGED)


def _check_shape(sparse: SparseTensor, stored: Tensor, faults: FaultCollector) -> None:
    sizes = [int(size) for size in stored.flatten()]
    if sizes != list(sparse.spec.shape):
        faults.add(
            where=sparse.parts["shape"],
            expected=f"{list(sparse.spec.shape)}, which the bitmask and config.json make",
            found=str(sizes),
            remedy="Pieces and config.json belong to different models; download all of the checkpoint again.",
        )


def _check_counts(sparse: SparseTensor, pieces: Mapping[str, Tensor], faults: FaultCollector) -> None:
    """As many values as marks, and none of the marks beyond the last column."""
    bitmask, values = pieces["bitmask"], pieces["compressed"].numel()
    marks = int(count_marks(bitmask).sum())
    if marks != values:
        refuse_piece(sparse.parts["bitmask"], f"{values} marks, one for each value", f"{marks} marks", faults)
    columns = sparse.spec.shape[-1]
    if columns % 8 and bool((bitmask[..., -1] >> (columns % 8)).any()):
        refuse_piece(sparse.parts["bitmask"], f"no mark beyond column {columns}", "some", faults)
