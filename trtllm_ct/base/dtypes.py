"""The dtype table: the name of each dtype in a safetensors header and in torch, and its width in bits.

This module does not import torch: `DType.torch_dtype` imports it when it is read. Stages that read only headers
(detect, inspect, plan) therefore stay light.
Source of the names: the safetensors format description and `safetensors.torch._TYPES`, 0.8.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["DENSE_DTYPES", "DType"]


class DType(Enum):
    """The element type of a stored tensor: (name in a safetensors header, bits per element, name in torch)."""

    BOOL = ("BOOL", 8, "bool")
    U8 = ("U8", 8, "uint8")
    I8 = ("I8", 8, "int8")
    I16 = ("I16", 16, "int16")
    U16 = ("U16", 16, "uint16")
    I32 = ("I32", 32, "int32")
    U32 = ("U32", 32, "uint32")
    I64 = ("I64", 64, "int64")
    U64 = ("U64", 64, "uint64")
    F8_E4M3 = ("F8_E4M3", 8, "float8_e4m3fn")
    F8_E5M2 = ("F8_E5M2", 8, "float8_e5m2")
    F8_E8M0 = ("F8_E8M0", 8, "float8_e8m0fnu")
    F16 = ("F16", 16, "float16")
    BF16 = ("BF16", 16, "bfloat16")
    F32 = ("F32", 32, "float32")
    F64 = ("F64", 64, "float64")

    # `Enum` hashes a member by its name in Python code, which slows down every look-up of a spec. Each member is a
    # single object, so the hash of its identity is enough.
    __hash__ = object.__hash__

    def __init__(self, header_name: str, bits: int, torch_name: str) -> None:
        self.header_name = header_name
        self.bits = bits
        self.torch_name = torch_name

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.bits // 8

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of the same name."""
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    @property
    def is_wide_float(self) -> bool:
        """Whether this is a float of 16 bits or more: weights of such a dtype are unquantized and have no scale."""
        return self in _WIDE_FLOATS

    @classmethod
    def from_header(cls, name: str) -> DType | None:
        """Return the dtype with this name in safetensors headers, or None for an unknown name."""
        return cls.__members__.get(name)

    @classmethod
    def from_torch(cls, dtype: torch.dtype | str) -> DType:
        """Return the dtype for a torch dtype or for its name, with or without the `torch.` prefix.

        Raises `KeyError` when the table has no such torch dtype.
        """
        return _BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


_WIDE_FLOATS = frozenset({DType.F16, DType.BF16, DType.F32, DType.F64})
_BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DType}


DENSE_DTYPES = ("auto", DType.BF16.torch_name, DType.F16.torch_name, DType.F32.torch_name)
"""The names by which users choose the dtype of dequantized weights; "auto" is the dtype of the model."""
