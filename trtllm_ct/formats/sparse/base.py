"""The interface of a sparse format, which stores a dense tensor in pieces: values, a bitmask and a shape.

Sparsity is a layer of its own around the weight formats. Decoding the pieces gives the tensor that would have been
stored without sparsity: plain values such as bfloat16, or the int8 or float8 codes of a quantized weight.

The interface resembles that of a weight format: `accepts` and `describe` need headers only, `decode` needs the tensors,
and `encode` is the inverse of `decode`. A mark is a set bit of the bitmask: the element has a stored value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PayloadError
from trtllm_ct.layouts.bitmasks import count_marks, scatter_marked
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.schemes import CompressionFormat, TensorSpec
    from trtllm_ct.formats.base import StoredSpecs
    from trtllm_ct.layouts.stored_array import StoredTensors

__all__ = ["SHAPE_DTYPES", "SparseFormat", "SparseTensor", "check_pieces", "refuse_piece"]

_DAMAGED = "The file was damaged or cut, or its writer broke the format; download the checkpoint again."
SHAPE_DTYPES = frozenset({DType.I64, DType.I32})
"""The dtypes in which writers store the shape of a dense tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTensor:
    """A dense tensor that a file stores in pieces, as described by the headers.

    `spec` belongs to the dense tensor, `kind` is its sparse format. `parts` maps the local name of a piece
    (`compressed`, ...) to the full name under which it is stored.
    """

    spec: TensorSpec
    kind: CompressionFormat
    parts: Mapping[str, str]


class SparseFormat(ABC):
    """The interface of one sparse format. Each file has one final subclass, with one instance in `SPARSE_FORMATS`."""

    name: CompressionFormat
    """The name under which a `sparsity_config` declares it."""

    @abstractmethod
    def accepts(self, pieces: StoredSpecs) -> bool:
        """Return whether these pieces, by local name, are stored in this format."""

    @abstractmethod
    def describe(
        self,
        stem: str,
        pieces: StoredSpecs,
        expected_shape: tuple[int, ...] | None,
        faults: FaultCollector,
    ) -> TensorSpec | None:
        """Return the dtype and shape of the dense tensor.

        If the pieces contradict each other, adds faults and returns None. `stem` is the common beginning of the stored
        names of the pieces. `expected_shape` is the shape that the `shape` piece or the model gives, or None.
        """

    @abstractmethod
    def holds(self, dense: StoredArray) -> bool:
        """Return whether this format can store every value of the tensor, apart from the sign of zeros."""

    @abstractmethod
    def encode(self, dense: StoredArray) -> dict[str, StoredArray]:
        """Return the pieces of a dense tensor by local name, byte for byte as compressed-tensors wrote them."""

    @abstractmethod
    def check_marks(self, sparse: SparseTensor, pieces: StoredTensors, faults: FaultCollector) -> None:
        """Add a fault if the marks break a rule of this format that can't be checked from headers."""

    def decode(self, sparse: SparseTensor, pieces: StoredTensors) -> StoredArray:
        """Return the dense tensor, from its pieces by local name.

        Raises `PayloadError` if the pieces contradict each other; see `restore` in `pieces.py`.
        """
        faults = FaultCollector()
        _check_shape(sparse, pieces["shape"], faults)
        _check_counts(sparse, pieces, faults)
        self.check_marks(sparse, pieces, faults)
        faults.raise_if_any(PayloadError)
        values, bitmask = pieces["compressed"].elements.reshape(-1), pieces["bitmask"].elements
        return StoredArray(scatter_marked(values, bitmask, sparse.spec.shape[-1]), sparse.spec.dtype)


def check_pieces(stem: str, pieces: StoredSpecs, faults: FaultCollector) -> bool:
    """Return whether `bitmask` and `shape` have the dtypes and ranks that both formats require; add a fault if not."""
    bitmask, shape = pieces["bitmask"], pieces["shape"]
    rank = len(bitmask.shape)
    faults_before = len(faults.faults)
    if bitmask.dtype is not DType.U8 or rank == 0:
        faults.add(where=f"{stem}.bitmask", expected="uint8, one bit a column", found=str(bitmask), remedy=_DAMAGED)
    elif shape.dtype not in SHAPE_DTYPES or shape.numel != rank:
        expected = f"int64 [{rank}], the sizes of the dense tensor"
        faults.add(where=f"{stem}.shape", expected=expected, found=str(shape), remedy=_DAMAGED)
    return len(faults.faults) == faults_before


def refuse_piece(name: str, expected: str, found: object, faults: FaultCollector) -> None:
    """Add the fault that one piece is damaged."""
    faults.add(where=name, expected=expected, found=str(found), remedy=_DAMAGED)


def _check_shape(sparse: SparseTensor, stored: StoredArray, faults: FaultCollector) -> None:
    """Add a fault if the numbers in the `shape` piece differ from the shape of the dense tensor."""
    sizes = stored.elements.ravel().tolist()
    if sizes != list(sparse.spec.shape):
        faults.add(
            where=sparse.parts["shape"],
            expected=f"{list(sparse.spec.shape)}, which the bitmask and config.json make",
            found=str(sizes),
            remedy="Pieces and config.json belong to different models; download all of the checkpoint again.",
        )


def _check_counts(sparse: SparseTensor, pieces: StoredTensors, faults: FaultCollector) -> None:
    """Add a fault if the numbers of values and marks differ, and one if there are marks beyond the last column."""
    bitmask, values = pieces["bitmask"].elements, pieces["compressed"].elements.size
    marks = int(count_marks(bitmask).sum())
    if marks != values:
        refuse_piece(sparse.parts["bitmask"], f"{values} marks, one for each value", f"{marks} marks", faults)
    columns = sparse.spec.shape[-1]
    if columns % 8 and bool((bitmask[..., -1] >> (columns % 8)).any()):
        refuse_piece(sparse.parts["bitmask"], f"no mark beyond column {columns}", "some", faults)
