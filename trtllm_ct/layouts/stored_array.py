"""StoredArray: the elements of a stored tensor as a numpy array, for code that does not need torch.

numpy has no bfloat16 and no floats of 8 bits, so their bits are kept as unsigned integers. Nothing is copied: the array
shares the memory of the bytes, or of the tensor, that it was made from.
Sources: OCP 8-bit Floating Point Specification 1.0 for E4M3 and E5M2, OCP Microscaling Formats 1.0 for E8M0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from trtllm_ct.base.dtypes import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from trtllm_ct.base.schemes import Packing, TensorSpec

__all__ = ["StoredArray", "StoredTensors", "stored_array", "unpack_along_rows"]

_NUMPY = {
    DType.BOOL: "u1",
    DType.U8: "u1",
    DType.I8: "i1",
    DType.I16: "i2",
    DType.U16: "u2",
    DType.I32: "i4",
    DType.U32: "u4",
    DType.I64: "i8",
    DType.U64: "u8",
    DType.F8_E4M3: "u1",
    DType.F8_E5M2: "u1",
    DType.F8_E8M0: "u1",
    DType.F16: "f2",
    DType.BF16: "u2",
    DType.F32: "f4",
    DType.F64: "f8",
}


class _Bits(NamedTuple):
    """Bits of a float dtype: `not_finite` are those of infinity or the least NaN, `magnitude` all but the sign.

    Without the sign, finite numbers have the order of their bits, and infinity and NaN come after them.
    """

    not_finite: int
    magnitude: int


_BITS = {
    DType.F8_E4M3: _Bits(0x7F, 0x7F),
    DType.F8_E5M2: _Bits(0x7C, 0x7F),
    DType.BF16: _Bits(0x7F80, 0x7FFF),
    DType.F16: _Bits(0x7C00, 0x7FFF),
    DType.F32: _Bits(0x7F800000, 0x7FFFFFFF),
    DType.F64: _Bits(0x7FF << 52, (1 << 63) - 1),
}
_E8M0_NAN = 0xFF


@dataclass(frozen=True, slots=True)
class StoredArray:
    """The elements of a tensor in their shape, and their dtype; floats that numpy lacks are bits."""

    elements: NDArray[Any]
    dtype: DType

    @classmethod
    def of_bytes(cls, data: memoryview, spec: TensorSpec) -> StoredArray:
        """Return the tensor with this dtype and shape whose bytes are given."""
        import numpy as np

        return cls(np.frombuffer(data, _NUMPY[spec.dtype]).reshape(spec.shape), spec.dtype)

    @classmethod
    def of_tensor(cls, tensor: Tensor) -> StoredArray:
        """Return a tensor of torch; it is copied only if it is not contiguous, or not in CPU memory."""
        import torch

        dtype = DType.from_torch(tensor.dtype)
        data: NDArray[Any] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return cls(data.view(_NUMPY[dtype]).reshape(tuple(tensor.shape)), dtype)

    def read_as(self, dtype: DType) -> StoredArray:
        """Return the same bytes, read as another dtype of the same width."""
        return StoredArray(self.elements.view(_NUMPY[dtype]), dtype)

    @property
    def numbers(self) -> NDArray[Any]:
        """The elements as numbers; bfloat16 and floats of 8 bits become float32, others stay as they are."""
        import numpy as np

        if self.dtype is DType.BF16:
            widened: NDArray[Any] = np.left_shift(self.elements, 16, dtype=np.uint32).view(np.float32)
            return widened
        table = _numbers_of_bytes().get(self.dtype)
        return self.elements if table is None else table.take(self.elements)

    @property
    def zeros(self) -> int:
        """The number of elements that are zero, of either sign."""
        import numpy as np

        nonzero = self._bits & _BITS[self.dtype].magnitude if self.dtype in _BITS else self.numbers
        return self.elements.size - int(np.count_nonzero(nonzero))

    def is_finite_scale(self, *, zero_allowed: bool) -> bool:
        """Whether the bits of floats show that all elements are finite and positive, or 0 where `zero_allowed`.

        False decides nothing for -0, for dtypes that are no floats, and for tensors without elements.
        """
        bits = self._bits
        if not bits.size:
            return False
        if self.dtype is DType.F8_E8M0:
            return int(bits.max()) < _E8M0_NAN
        if self.dtype not in _BITS:
            return False
        return int(bits.max()) < _BITS[self.dtype].not_finite and (zero_allowed or int(bits.min()) > 0)

    @property
    def _bits(self) -> NDArray[Any]:
        return self.elements.view(f"u{self.dtype.itemsize}")


StoredTensors = Mapping[str, Union["Tensor", StoredArray]]
"""Stored tensors by name: those of torch where it is loaded, otherwise arrays."""


def stored_array(tensor: Tensor | StoredArray) -> StoredArray:
    """Return a stored tensor as an array."""
    return tensor if isinstance(tensor, StoredArray) else StoredArray.of_tensor(tensor)


def unpack_along_rows(words: NDArray[np.int32], packing: Packing, shape: tuple[int, int]) -> NDArray[np.int8]:
    """Return the signed codes of `shape` in offset binary words that are packed along the rows, as zero points are.

    Surplus columns and rows are left out.
    """
    import numpy as np

    rows, columns = shape
    streams = np.ascontiguousarray(words[:, :columns].T).view(np.uint8)
    bits = np.unpackbits(streams, axis=1, bitorder="little")
    if not packing.dense:
        used = packing.container.bits // packing.bits * packing.bits
        bits = bits.reshape(columns, -1, packing.container.bits)[:, :, :used].reshape(columns, -1)
    fields = bits[:, : rows * packing.bits].reshape(columns, rows, packing.bits)
    codes: NDArray[np.uint8] = (fields << np.arange(packing.bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    # The subtraction wraps around in uint8; read as int8, the result is the signed code.
    return (codes - np.uint8(1 << (packing.bits - 1))).view(np.int8).T


@cache
def _numbers_of_bytes() -> dict[DType, NDArray[np.float32]]:
    """Return the number of each byte, for the floats of 8 bits."""
    import numpy as np

    codes = np.arange(256)
    # Read as exponent and mantissa of a float16, E4M3 is less by a factor of 2^8: the biases are 7 and 15.
    e4m3 = ((codes & 0x80) << 8 | (codes & 0x7F) << 7).astype(np.uint16).view(np.float16).astype(np.float32) * 256
    e4m3[codes & 0x7F == 0x7F] = np.nan
    e8m0 = np.ldexp(1.0, np.minimum(codes, _E8M0_NAN - 1) - 127).astype(np.float32)
    e8m0[_E8M0_NAN] = np.nan
    e5m2 = (codes << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    return {DType.F8_E4M3: e4m3, DType.F8_E8M0: e8m0, DType.F8_E5M2: e5m2}
