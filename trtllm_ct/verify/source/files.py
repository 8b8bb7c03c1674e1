"""Read rows of tensors from the files of a directory.

Bytes are read, not mapped: pages of a mapped file would count as memory of this process for as long as the map lives.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_ct.base.dtypes import DType
from trtllm_ct.checkpoint.open_files import OpenFiles
from trtllm_ct.checkpoint.read_errors import file_changed, read_error
from trtllm_ct.verify.source.numbers import to_numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from trtllm_ct.checkpoint.catalog import Catalog

__all__ = ["EveryNth", "FileTensor", "SourceTensor", "TensorFiles", "Transposed", "tensors_of"]

# numpy has no floats of 8 bits and no bfloat16; their bits are read as integers.
_RAW: dict[DType, str] = {
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


class TensorFiles:
    """Reads byte ranges of the tensors of a catalog; may be used by several threads."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._files = OpenFiles(catalog.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read(self, name: str, begin: int, nbytes: int) -> NDArray[np.uint8]:
        """Return `nbytes` bytes of a tensor from its byte `begin` on.

        Raises `CatalogError` when the file has changed since the catalog was read.
        """
        tensor = self.catalog.tensors[name]
        data = np.empty(nbytes, np.uint8)
        view = memoryview(data.data)
        done = 0
        while done < nbytes:
            try:
                with self._files.descriptor(tensor.file) as descriptor:
                    count = os.preadv(descriptor, [view[done:]], tensor.offset + begin + done)
            except OSError as error:
                raise read_error(tensor, error) from None
            if count == 0:
                raise file_changed(tensor, f"a file that ends before byte {tensor.offset + begin + nbytes}")
            done += count
        return data


@dataclass(frozen=True, kw_only=True)
class SourceTensor(ABC):
    """A tensor of a source: its dtype and shape, and its rows on demand."""

    dtype: DType
    shape: tuple[int, ...]

    @abstractmethod
    def rows(self, begin: int, end: int) -> NDArray[Any]:
        """Return rows `begin` to `end` of the first axis, as stored; floats that numpy lacks are returned as bits."""

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    def whole(self) -> NDArray[Any]:
        """Return the whole tensor, as stored."""
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1).reshape(())

    def numbers(self, begin: int, end: int) -> NDArray[np.float64]:
        """Return rows `begin` to `end` as float64."""
        return to_numbers(self.rows(begin, end), self.dtype)

    def all_numbers(self) -> NDArray[np.float64]:
        """Return the whole tensor as float64."""
        return to_numbers(self.whole(), self.dtype)


@dataclass(frozen=True, kw_only=True)
class FileTensor(SourceTensor):
    """A tensor in a file, or the entry of one expert in it; `start` is its first byte in the stored tensor `name`."""

    files: TensorFiles
    name: str
    start: int = 0

    def rows(self, begin: int, end: int) -> NDArray[Any]:
        """Return rows `begin` to `end` of the first axis, as stored."""
        row = self.shape[1:]
        row_bytes = prod(row) * self.dtype.itemsize
        data = self.files.read(self.name, self.start + begin * row_bytes, (end - begin) * row_bytes)
        return data.view(_RAW[self.dtype]).reshape(end - begin, *row)

    def bytes_at(self, begin: int, nbytes: int) -> NDArray[np.uint8]:
        """Return bytes of the tensor, whatever its dtype and shape."""
        return self.files.read(self.name, self.start + begin, nbytes)

    def entry(self, index: int) -> FileTensor:
        """Return the tensor at `index` of the first axis."""
        entry_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=self.shape[1:], start=self.start + index * entry_bytes)

    def reshaped(self, *shape: int) -> FileTensor:
        """Return the same elements in another shape."""
        return replace(self, shape=shape)


@dataclass(frozen=True, kw_only=True)
class Transposed(SourceTensor):
    """The transpose of a matrix; the matrix is read once and kept."""

    matrix: SourceTensor
    dtype: DType = field(init=False)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.matrix.dtype)
        object.__setattr__(self, "shape", self.matrix.shape[::-1])

    @cached_property
    def _stored(self) -> NDArray[Any]:
        return self.matrix.whole()

    def rows(self, begin: int, end: int) -> NDArray[Any]:
        """Return columns `begin` to `end` of the matrix as rows."""
        return np.ascontiguousarray(self._stored[:, begin:end].T)


@dataclass(frozen=True, kw_only=True)
class EveryNth(SourceTensor):
    """Rows `first`, `first` + `step`, ... of a tensor."""

    matrix: SourceTensor
    first: int
    step: int
    dtype: DType = field(init=False)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        rows, *inner = self.matrix.shape
        object.__setattr__(self, "dtype", self.matrix.dtype)
        object.__setattr__(self, "shape", (rows // self.step, *inner))

    def rows(self, begin: int, end: int) -> NDArray[Any]:
        """Return rows `begin` to `end` of those that are taken."""
        return np.ascontiguousarray(self.matrix.rows(begin * self.step, end * self.step)[self.first :: self.step])


def tensors_of(files: TensorFiles) -> dict[str, FileTensor]:
    """Return all tensors of a directory by name."""
    return {
        name: FileTensor(files=files, name=name, dtype=stored.spec.dtype, shape=stored.spec.shape)
        for name, stored in files.catalog.tensors.items()
    }
