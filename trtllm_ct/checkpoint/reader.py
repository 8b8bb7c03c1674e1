"""TensorReader: the payload of cataloged tensors, as views of memory-mapped files.

Nothing is copied. A tensor is a view of the kernel's page cache: its bytes are read from disk when they are first
touched, and the kernel can drop them again under memory pressure. A map costs address space, not memory, but a process
may hold only a limited number of maps, so the reader keeps the most recently used ones. Whole files are mapped, but
only windows of them where the address space is limited, and for callers whose memory must not grow with the file:
pages that were touched count as memory of the process while they are mapped. The latter get small tensors in memory of
their own, since a new window costs more than a read, and read large ones part by part (`read_into`).
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.memory_budget import available_memory
from trtllm_ct.base.regular_files import open_regular
from trtllm_ct.checkpoint.open_files import OpenFiles
from trtllm_ct.checkpoint.read_errors import file_changed, read_error
from trtllm_ct.checkpoint.windows import WINDOW_BYTES, address_limit, map_file, window_of
from trtllm_ct.layouts.stored_array import StoredArray, numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor

__all__ = ["Run", "TensorReader"]

_MAX_OPEN_MAPS = 16

_MAX_WINDOW_BYTES = 2 * WINDOW_BYTES
"""The most that windows take where the address space is limited, but for one window that is larger.

Each thread has a reader, and tensors need room too. To map a window again takes no reading: it is in the file cache.
"""

_READ_BYTES = 2**20
"""Tensors up to this size are read into memory by readers that were asked for windows."""

_READ_AHEAD_SHARE = 0.5
"""Share of the available memory that read-ahead may fill; the rest is for tensors made from what was read."""

_MEMORY_CHECK_SECONDS = 1.0
"""How long a reader reuses its last measurement of available memory."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive elements of a stored tensor: from `begin` up to but not including `end`, or to the last if None."""

    name: str
    begin: int = 0
    end: int | None = None

    def union(self, other: Run) -> Run:
        """Return the shortest run of the same tensor that contains both."""
        end = None if self.end is None or other.end is None else max(self.end, other.end)
        return Run(self.name, min(self.begin, other.begin), end)


class TensorReader:
    """Reads tensors of a catalog by name; with `in_windows` it maps windows of files and not whole files.

    Only the parts of a tensor that are touched take memory, and clean pages are file cache.
    Keeps at most `_MAX_OPEN_MAPS` maps, and the descriptors of a few files that were read and not mapped. A tensor
    keeps the map that it views alive, even after `close`. `bytes_read` counts the payload bytes of all ranges that
    `read` and `read_into` were called for. Use a reader from one thread only.
    """

    def __init__(self, catalog: Catalog, *, in_windows: bool = False) -> None:
        self._catalog = catalog
        self._files = OpenFiles(catalog.directory)
        self._maps: OrderedDict[tuple[str, int, int | None], NDArray[np.uint8]] = OrderedDict()
        self._reads_small = in_windows
        self._in_windows = in_windows or address_limit() is not None
        self._available: int | None = None
        self._measured_at = -_MEMORY_CHECK_SECONDS
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release all maps and files; tensors that were returned stay valid, and a later `read` opens files again."""
        self._maps.clear()
        self._files.close()

    def read(self, name: str, begin: int = 0, end: int | None = None) -> StoredArray:
        """Return the tensor `name`: contiguous, of the dtype and shape in the catalog.

        `begin` and `end` are element indices. The caller promises to use no element outside of that range: the others
        are not counted in `bytes_read`, are not read, and may even hold wrong values.
        The tensor is a view of a private map, or has memory of its own. Writing to it changes neither the file nor
        other processes, but it may change what this reader returns for the same bytes while it keeps the map. A payload
        that is not aligned to its item size is copied.
        Raises `KeyError` for a name that is not in the catalog, and `CatalogError` when the file changed since the
        catalog was read.
        """
        tensor = self._catalog.tensors[name]
        first, last = _bounds(tensor, begin, end)
        if not self.is_mapped(name):
            return self._in_memory(tensor, first, last)
        data = self._data(tensor, 0, tensor.spec.nbytes)
        if len(data) < tensor.spec.nbytes:
            raise file_changed(tensor, f"{len(data)} of them")
        self.bytes_read += last - first
        if tensor.offset % tensor.spec.dtype.itemsize:
            data = _aligned(data, first, last)
        return StoredArray(data.view(numpy_dtype(tensor.spec.dtype)).reshape(tensor.spec.shape), tensor.spec.dtype)

    def read_bytes(self, name: str, begin: int, nbytes: int) -> memoryview:
        """Return `nbytes` bytes of the tensor `name`, from its byte `begin` on, as a view of the map.

        Raises what `read` raises; where the address space is limited, no more than these bytes are mapped at once.
        """
        tensor = self._catalog.tensors[name]
        data = self._data(tensor, begin, nbytes)
        if len(data) < nbytes:
            raise file_changed(tensor, f"a file that ends before byte {tensor.offset + begin + nbytes}")
        self.bytes_read += nbytes
        return data.data

    def is_mapped(self, name: str) -> bool:
        """Whether `read` returns a view of a map, no byte of which was read yet."""
        return not self._reads_small or self._catalog.tensors[name].spec.nbytes > _READ_BYTES

    def read_into(self, name: str, begin: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes of the tensor `name`, from its byte `begin` on; raises what `read` raises."""
        tensor, filled = self._catalog.tensors[name], 0
        try:
            with self._files.descriptor(tensor.file) as descriptor:
                while filled < len(buffer):
                    count = os.preadv(descriptor, [buffer[filled:]], tensor.offset + begin + filled)
                    if not count:
                        raise file_changed(
                            tensor, f"a file that ends before byte {tensor.offset + begin + len(buffer)}"
                        )
                    filled += count
        except OSError as error:
            raise read_error(tensor, error) from None
        self.bytes_read += len(buffer)

    def _in_memory(self, tensor: StoredTensor, first: int, last: int) -> StoredArray:
        """Return a tensor in memory of its own, in which only the bytes from `first` up to `last` are filled in."""
        import numpy as np

        data = np.empty(tensor.spec.nbytes, np.uint8)
        self.read_into(tensor.name, first, data.data[first:last])
        return StoredArray.of_bytes(data.data, tensor.spec)

    def prefetch(self, runs: Iterable[Run]) -> int:
        """Ask the kernel to read runs into the file cache in the background; returns the number of bytes requested.

        Pass the runs in the order of their use. When not all of them fit into half of the memory that is available to
        this process (control groups included), only the first ones are requested. Does nothing where the available
        memory can't be determined or the platform has no `posix_fadvise`.
        """
        available = self._memory()
        if available is None or not hasattr(os, "posix_fadvise"):
            return 0
        budget = int(available * _READ_AHEAD_SHARE)
        spans = _first_within(budget, (self._place(run) for run in runs))
        for file, ranges in _merge(spans).items():
            self._advise(file, ranges)
        return sum(end - begin for _, begin, end in spans)

    def _memory(self) -> int | None:
        """Return the available memory in bytes, or None when unknown; measured at most once a second.

        Measuring takes as long as converting a small module.
        """
        now = time.monotonic()
        if now - self._measured_at >= _MEMORY_CHECK_SECONDS:
            self._available, self._measured_at = available_memory(), now
        return self._available

    def _place(self, run: Run) -> tuple[str, int, int]:
        """Return the file of a run, and its begin and end in bytes from the start of the file."""
        tensor = self._catalog.tensors[run.name]
        first, last = _bounds(tensor, run.begin, run.end)
        return tensor.file, tensor.offset + first, tensor.offset + last

    def _data(self, tensor: StoredTensor, first: int, nbytes: int) -> NDArray[np.uint8]:
        """Return bytes of a tensor from its byte `first` on, fewer where the file ends before.

        Reuses an existing map; a new one replaces the least recently used maps when there are too many.
        """
        offset = tensor.offset + first
        begin, end = window_of(offset, nbytes) if self._in_windows else (0, None)
        key = (tensor.file, begin, end)
        if key not in self._maps:
            try:
                with open_regular(self._catalog.directory / tensor.file) as descriptor:
                    self._maps[key] = map_file(descriptor, begin, end)
            except OSError as error:
                raise read_error(tensor, error) from None
            self._drop_unused()
        self._maps.move_to_end(key)
        return self._maps[key][offset - begin : offset - begin + nbytes]

    def _drop_unused(self) -> None:
        """Drop the maps that were not used for longest, but never the last one."""
        mapped = sum(len(data) for data in self._maps.values()) if self._in_windows else 0
        while len(self._maps) > 1 and (len(self._maps) > _MAX_OPEN_MAPS or mapped > _MAX_WINDOW_BYTES):
            mapped -= len(self._maps.popitem(last=False)[1])

    def _advise(self, file: str, ranges: list[tuple[int, int]]) -> None:
        with suppress(OSError):  # only a hint: an error of the file will show when the file is read
            descriptor = os.open(self._catalog.directory / file, os.O_RDONLY)
            try:
                for begin, end in ranges:
                    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _bounds(tensor: StoredTensor, begin: int, end: int | None) -> tuple[int, int]:
    """Return begin and end of a range of elements, in bytes from the start of the tensor."""
    size = tensor.spec.dtype.itemsize
    return begin * size, (tensor.spec.numel if end is None else end) * size


def _aligned(data: NDArray[np.uint8], first: int, last: int) -> NDArray[np.uint8]:
    """Return a copy in memory of its own, in which only the bytes from `first` up to `last` are filled in."""
    import numpy as np

    copy = np.empty_like(data)
    copy[first:last] = data[first:last]
    return copy


def _first_within(budget: int, places: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Return the leading places that take at most `budget` bytes together, without empty ones.

    A place is a file, a begin and an end, in bytes from the start of the file.
    """
    spans = []
    for file, begin, end in places:
        budget -= end - begin
        if budget < 0:
            break
        if begin < end:
            spans.append((file, begin, end))
    return spans


def _merge(spans: Iterable[tuple[str, int, int]]) -> dict[str, list[tuple[int, int]]]:
    """Return the byte ranges by file, sorted; ranges that touch or overlap become one."""
    merged: dict[str, list[tuple[int, int]]] = {}
    for file, begin, end in sorted(spans):
        ranges = merged.setdefault(file, [])
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
        else:
            ranges.append((begin, end))
    return merged
