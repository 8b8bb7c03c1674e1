"""TensorReader: payload of cataloged tensors, as views of memory-mapped files.

Nothing is copied: a tensor is a window on the kernel's page cache, its bytes come from disk when they are first
touched, and they can be dropped again under memory pressure. A map costs address space, not memory, but a process
may hold only so many of them, so the reader keeps the latest few.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from trtllm_ct.base.errors import CatalogError, Fault
from trtllm_ct.base.memory_budget import available_memory

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor

__all__ = ["Run", "TensorReader", "file_changed"]

_READ_AHEAD_SHARE = 0.5
"""Of the memory that is available, what read-ahead may fill: the rest is for tensors made from what was read."""

_SECONDS_AN_ANSWER_HOLDS = 1.0
"""For which a reader believes what it was told about available memory."""


@dataclass(frozen=True, slots=True)
class Run:
    """Elements of a stored tensor, in the order in which they lie: from `begin` to `end`, or to the last when None."""

    name: str
    begin: int = 0
    end: int | None = None

    def union(self, other: Run) -> Run:
        """The shortest run of the same tensor that holds both."""
        end = None if self.end is None or other.end is None else max(self.end, other.end)
        return Run(self.name, min(self.begin, other.begin), end)


class TensorReader:
    """Reads tensors of a catalog by name.

    Peak memory is what is touched: untouched parts of a tensor take none, and clean pages are file cache.
    Keeps at most `max_open_maps` maps and no file descriptor; a tensor keeps the map that it views alive,
    also after `close`. `bytes_read` counts the payload of all runs asked for. For use from one thread.
    """

    def __init__(self, catalog: Catalog, *, max_open_maps: int = 16) -> None:
        self._catalog = catalog
        self._max_open_maps = max_open_maps
        self._maps: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._available: int | None = None
        self._asked = -_SECONDS_AN_ANSWER_HOLDS
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all maps; tensors handed out stay valid, and a later `read` maps again."""
        self._maps.clear()

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """The tensor `name`: contiguous, of the dtype and shape in the catalog, on the CPU.

        Of elements outside of `begin` to `end` the caller promises to look at none; they are not counted, not read,
        and perhaps not even right.
        A view of a private map: writing to it changes neither the file nor other processes, only what this reader
        returns for the same bytes while it keeps the map. A payload that is not aligned to its item size is copied.
        Its storage is the whole file, so clone a tensor before pickling it or sharing it with another process.
        Raises `KeyError` for a name that is not in the catalog, `CatalogError` when the file changed since.
        """
        tensor = self._catalog.tensors[name]
        octets = self._map(tensor)[tensor.offset : tensor.offset + tensor.spec.nbytes]
        if len(octets) < tensor.spec.nbytes:
            raise file_changed(tensor, f"{len(octets)} of them")
        first, last = _bounds(tensor, begin, end)
        self.bytes_read += last - first
        if tensor.offset % tensor.spec.dtype.itemsize:
            octets = _aligned(octets, first, last)
        return octets.view(tensor.spec.dtype.torch_dtype).view(tensor.spec.shape)

    def prefetch(self, runs: Iterable[Run]) -> int:
        """Ask the kernel to read these runs into the file cache, in the background; returns the bytes asked for.

        Runs come in the order of their use: the first ones count when not all fit into half of the memory that is
        available to this process (control groups included). Does nothing where memory can't be determined or the
        platform has no such call.
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
        """What `available_memory` said a moment ago: asking takes as long as converting a small module."""
        now = time.monotonic()
        if now - self._asked >= _SECONDS_AN_ANSWER_HOLDS:
            self._available, self._asked = available_memory(), now
        return self._available

    def _place(self, run: Run) -> tuple[str, int, int]:
        """File, begin and end of a run."""
        tensor = self._catalog.tensors[run.name]
        first, last = _bounds(tensor, run.begin, run.end)
        return tensor.file, tensor.offset + first, tensor.offset + last

    def _map(self, tensor: StoredTensor) -> torch.Tensor:
        """All bytes of a tensor's file, mapped now or before; the map used least recently makes room."""
        if tensor.file not in self._maps:
            try:
                self._maps[tensor.file] = _map_file(self._catalog.directory / tensor.file)
            except (OSError, RuntimeError) as error:
                raise file_changed(tensor, str(error)) from None
            if len(self._maps) > self._max_open_maps:
                self._maps.popitem(last=False)
        self._maps.move_to_end(tensor.file)
        return self._maps[tensor.file]

    def _advise(self, file: str, ranges: list[tuple[int, int]]) -> None:
        with suppress(OSError):  # only advice: what is wrong with the file will show when it is read
            descriptor = os.open(self._catalog.directory / file, os.O_RDONLY)
            try:
                for begin, end in ranges:
                    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _map_file(path: Path) -> torch.Tensor:
    """The bytes of a file; unlike `mmap.mmap`, torch closes the file, and with shared=False writing copies pages."""
    import torch

    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def file_changed(tensor: StoredTensor, found: str) -> CatalogError:
    """The error for a file that is no longer what its header said when it was read."""
    return CatalogError(
        Fault(
            where=f"{tensor.file}: {tensor.name}",
            expected=f"{tensor.spec.nbytes} bytes at byte {tensor.offset}, as when the header was read",
            found=found,
            remedy="The file changed or vanished while it was in use: wait until it is complete and start again.",
        )
    )


def _bounds(tensor: StoredTensor, begin: int, end: int | None) -> tuple[int, int]:
    """Begin and end of a run in bytes, from the first byte of its tensor."""
    size = tensor.spec.dtype.itemsize
    return begin * size, (tensor.spec.numel if end is None else end) * size


def _aligned(octets: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """As many bytes in memory of their own, of which `first` to `last` are the same."""
    import torch

    copy = torch.empty_like(octets)
    copy[first:last] = octets[first:last]
    return copy


def _first_within(budget: int, places: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The leading places, each with file, begin and end, that take no more than `budget` bytes together."""
    spans = []
    for file, begin, end in places:
        budget -= end - begin
        if budget < 0:
            break
        if begin < end:
            spans.append((file, begin, end))
    return spans


def _merge(spans: Iterable[tuple[str, int, int]]) -> dict[str, list[tuple[int, int]]]:
    """Ranges by file, sorted, with those that touch made one."""
    merged: dict[str, list[tuple[int, int]]] = {}
    for file, begin, end in sorted(spans):
        ranges = merged.setdefault(file, [])
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(end, ranges[-1][1])
        else:
            ranges.append((begin, end))
    return merged
