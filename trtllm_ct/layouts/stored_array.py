"""StoredArray: the elements of a tensor as a numpy array, which is the form of tensors in this package.

numpy has no bfloat16 and no floats of 8 bits, so their bits are kept as unsigned integers. Nothing is copied: the array
shares the memory of the bytes that it was made from. `torch_tensors.py` makes tensors of torch from arrays.
Sources: OCP 8-bit Floating Point Specification 1.0 for E4M3 and E5M2, OCP Microscaling Formats 1.0 for E8M0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from trtllm_ct.base.schemes import Packing

__all__ = ["StoredArray", "StoredTensors", "numpy_dtype", "scalar", "unpack_along_rows"]

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
_BITS_OF_ONE = {DType.BF16: 0x3F80, DType.F8_E4M3: 0x38, DType.F8_E5M2: 0x3C, DType.F8_E8M0: 0x7F}


def numpy_dtype(dtype: DType) -> str:
    """Return the numpy dtype of the elements of a `StoredArray`: unsigned integers for the floats that numpy lacks."""
    return _NUMPY[dtype]


@dataclass(frozen=True, slots=True, eq=False)
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
    def filled(cls, spec: TensorSpec, number: int = 0) -> Self:
        """Return a new tensor whose elements all have this number, which every dtype can hold."""
        import numpy as np

        bits = _BITS_OF_ONE[spec.dtype] * number if spec.dtype in _BITS_OF_ONE else number
        return cls(np.full(spec.shape, bits, _NUMPY[spec.dtype]), spec.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.elements.shape

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape."""
        return TensorSpec(self.dtype, self.elements.shape)

    @property
    def data(self) -> memoryview:
        """The bytes of contiguous elements, as a view that keeps them alive."""
        return self.elements.reshape(-1).view("u1").data

    def reshape(self, *shape: int) -> StoredArray:
        """Return the elements in another shape; contiguous ones are not copied."""
        return StoredArray(self.elements.reshape(shape), self.dtype)

    def read_as(self, dtype: DType) -> StoredArray:
        """Return the same bytes, read as another dtype; one of another width changes the length of the last axis."""
        return StoredArray(self.elements.view(_NUMPY[dtype]), dtype)

    def __getitem__(self, key: Any) -> StoredArray:
        return StoredArray(self.elements[key], self.dtype)

    def __float__(self) -> float:
        return float(self.numbers.item())

    @property
    def numbers(self) -> NDArray[Any]:
        """The elements as numbers; bfloat16 and floats of 8 bits become float32, others stay as they are."""
        import numpy as np

        if self.dtype is DType.BF16:
            widened: NDArray[Any] = np.asarray(np.left_shift(self.elements, 16, dtype=np.uint32)).view(np.float32)
            return widened
        table = _numbers_of_bytes().get(self.dtype)
        return self.elements if table is None else np.asarray(table.take(self.elements))

    @property
    def is_nonzero(self) -> NDArray[np.bool_]:
        """Whether each element is not zero; zeros of either sign count as zero, NaN does not."""
        import numpy as np

        elements = self._bits & _BITS[self.dtype].magnitude if self.dtype in _BITS else self.numbers
        nonzero: NDArray[np.bool_] = np.asarray(elements != 0)
        return nonzero

    @property
    def zeros(self) -> int:
        """The number of elements that are zero, of either sign."""
        import numpy as np

        return self.elements.size - int(np.count_nonzero(self.is_nonzero))

    @property
    def magnitudes(self) -> NDArray[Any]:
        """Numbers in the order of the absolute values, which are equal for equal ones; NaN is the greatest."""
        import numpy as np

        if self.dtype in _BITS:
            bits = _BITS[self.dtype]
            magnitudes: NDArray[Any] = np.minimum(self._bits & bits.magnitude, bits.not_finite + 1)
            return magnitudes
        return np.abs(self.elements.astype(np.int64)) if self.elements.dtype.kind == "i" else self.elements

    @property
    def largest(self) -> float:
        """The largest absolute value of a float dtype; NaN if there is one, and 0 without elements."""
        if not self.elements.size:
            return 0.0
        return float(
            StoredArray(self.magnitudes.max(keepdims=True).view(_NUMPY[self.dtype]), self.dtype).numbers.item()
        )

    @property
    def is_infinite(self) -> NDArray[np.bool_]:
        """Whether each element of a float dtype is infinite; E4M3 has no infinity."""
        import numpy as np

        bits = _BITS[self.dtype]
        infinite: NDArray[np.bool_] = np.asarray((self._bits & bits.magnitude) == bits.not_finite)
        return infinite

    @property
    def is_finite(self) -> bool:
        """Whether all elements of a float dtype are numbers."""
        bits = _BITS[self.dtype]
        return not self.elements.size or int((self._bits & bits.magnitude).max()) < bits.not_finite

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


def scalar(number: float) -> StoredArray:
    """Return a float32 tensor [1] with this number."""
    import numpy as np

    with np.errstate(over="ignore"):
        return StoredArray(np.array([number], np.float64).astype(np.float32), DType.F32)


StoredTensors = Mapping[str, StoredArray]
"""Stored tensors by name."""


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
