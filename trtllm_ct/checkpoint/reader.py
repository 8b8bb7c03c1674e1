"""TensorReader: the payload of cataloged tensors, as views of memory-mapped files.

Nothing is copied. A tensor is a view of the kernel's page cache: its bytes are read from disk when they are first
touched, and the kernel can drop them again under memory pressure. A map costs address space, not memory, but a process
may hold only a limited number of maps, so the reader keeps the most recently used ones. Whole files are mapped, but
where the address space is limited, only windows of them.
"""

from __future__ import annotations

import errno
import os
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CatalogError, Fault
from trtllm_ct.base.memory_budget import available_memory
from trtllm_ct.base.regular_files import open_regular
from trtllm_ct.checkpoint.windows import WINDOW_BYTES, address_limit, map_window, window_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch
    from typing_extensions import Self

    from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor

__all__ = ["Run", "TensorReader", "file_changed", "read_error"]

_MAX_OPEN_MAPS = 16

_MAX_WINDOW_BYTES = 2 * WINDOW_BYTES
"""The most that windows take where the address space is limited, but for one window that is larger.

Each thread has a reader, and tensors need room too. To map a window again takes no reading: it is in the file cache.
"""

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
    """Reads tensors of a catalog by name.

    Only the parts of a tensor that are touched take memory, and clean pages are file cache.
    Keeps at most `_MAX_OPEN_MAPS` maps and no file descriptor. A tensor keeps the map that it views alive, even after
    `close`. `bytes_read` counts the payload bytes of all ranges that `read` was called for. Use a reader from one
    thread only.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._maps: OrderedDict[tuple[str, int, int | None], torch.Tensor] = OrderedDict()
        self._in_windows = address_limit() is not None
        self._available: int | None = None
        self._measured_at = -_MEMORY_CHECK_SECONDS
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release all maps; tensors that were returned stay valid, and a later `read` maps the file again."""
        self._maps.clear()

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Return the tensor `name`: contiguous, of the dtype and shape in the catalog, on the CPU.

        `begin` and `end` are element indices. The caller promises to use no element outside of that range: the others
        are not counted in `bytes_read`, are not read, and may even hold wrong values.
        The tensor is a view of a private map. Writing to it changes neither the file nor other processes, but it does
        change what this reader returns for the same bytes while it keeps the map. A payload that is not aligned to its
        item size is copied.
        The storage of the tensor is the whole file or window, so clone a tensor before pickling it or sharing it with
        another process.
        Raises `KeyError` for a name that is not in the catalog, and `CatalogError` when the file changed since the
        catalog was read.
        """
        tensor = self._catalog.tensors[name]
        data = self._data(tensor)
        if len(data) < tensor.spec.nbytes:
            raise file_changed(tensor, f"{len(data)} of them")
        first, last = _bounds(tensor, begin, end)
        self.bytes_read += last - first
        if tensor.offset % tensor.spec.dtype.itemsize:
            data = _aligned(data, first, last)
        return data.view(tensor.spec.dtype.torch_dtype).view(tensor.spec.shape)

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

    def _data(self, tensor: StoredTensor) -> torch.Tensor:
        """Return the bytes of a tensor, fewer where the file ends before.

        Reuses an existing map; a new one replaces the least recently used maps when there are too many.
        """
        nbytes = tensor.spec.nbytes
        begin, end = window_of(tensor.offset, nbytes) if self._in_windows else (0, None)
        key = (tensor.file, begin, end)
        if key not in self._maps:
            try:
                self._maps[key] = _map_file(self._catalog.directory / tensor.file, begin, end)
            except (OSError, RuntimeError) as error:
                raise read_error(tensor, error) from None
            self._drop_unused()
        self._maps.move_to_end(key)
        return self._maps[key][tensor.offset - begin : tensor.offset - begin + nbytes]

    def _drop_unused(self) -> None:
        """Drop the maps that were not used for longest, but never the last one."""
        mapped = sum(data.numel() for data in self._maps.values()) if self._in_windows else 0
        while len(self._maps) > 1 and (len(self._maps) > _MAX_OPEN_MAPS or mapped > _MAX_WINDOW_BYTES):
            mapped -= self._maps.popitem(last=False)[1].numel()

    def _advise(self, file: str, ranges: list[tuple[int, int]]) -> None:
        with suppress(OSError):  # only a hint: an error of the file will show when the file is read
            descriptor = os.open(self._catalog.directory / file, os.O_RDONLY)
            try:
                for begin, end in ranges:
                    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _map_file(path: Path, begin: int, end: int | None) -> torch.Tensor:
    """Map a file into memory, or a window of it, and return its bytes.

    Unlike `mmap.mmap`, torch closes the file. With shared=False, writing to a page copies it.
    """
    import torch

    with open_regular(path) as descriptor:
        if end is not None:
            return map_window(descriptor, begin, end)
        size = os.fstat(descriptor).st_size
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


_CAUSES = {
    errno.EIO: "Check the disk that the file is on, or get the file again.",
    errno.ENOMEM: "Raise the limit of address space of this process (`ulimit -v`), or of its memory.",
    errno.EMFILE: "Raise the limit of open files of this process (`ulimit -n`).",
    errno.ENFILE: "Too many files are open on this machine: end other programs, or raise the system's limit.",
}
"""What helps when a file is as it was, but can't be read or mapped."""


def read_error(tensor: StoredTensor, error: OSError | RuntimeError) -> CatalogError:
    """Return the error for a file that can't be read or mapped.

    It changed, a limit of this process is reached, or the disk fails.
    """
    code = getattr(error, "errno", None)
    if code not in _CAUSES:
        return file_changed(tensor, str(error))
    return CatalogError(
        Fault(
            where=f"{tensor.file}: {tensor.name}",
            expected=f"that {tensor.spec.nbytes} bytes at byte {tensor.offset} can be read",
            found=str(error.args[1]),
            remedy=_CAUSES[code],
        )
    )


def file_changed(tensor: StoredTensor, found: str) -> CatalogError:
    """Return the error for a file that no longer matches the header that was read from it."""
    return CatalogError(
        Fault(
            where=f"{tensor.file}: {tensor.name}",
            expected=f"{tensor.spec.nbytes} bytes at byte {tensor.offset}, as when the header was read",
            found=found,
            remedy="The file changed or vanished while it was in use: wait until it is complete and start again.",
        )
    )


def _bounds(tensor: StoredTensor, begin: int, end: int | None) -> tuple[int, int]:
    """Return begin and end of a range of elements, in bytes from the start of the tensor."""
    size = tensor.spec.dtype.itemsize
    return begin * size, (tensor.spec.numel if end is None else end) * size


def _aligned(data: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return a copy in memory of its own, in which only the bytes from `first` up to `last` are filled in."""
    import torch

    copy = torch.empty_like(data)
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
