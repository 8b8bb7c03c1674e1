"""ByteReader: the payload of cataloged tensors as bytes of memory-mapped files, for code that does not need torch."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from typing import TYPE_CHECKING

from trtllm_ct.base.regular_files import open_regular
from trtllm_ct.checkpoint.reader import file_changed, read_error
from trtllm_ct.checkpoint.windows import WINDOW_BYTES, window_of

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor

__all__ = ["ByteReader"]

_MAX_OPEN_WINDOWS = 8
"""Each window holds a file descriptor, of which a process may have few, and threads have a reader each."""

_MAX_MAPPED_BYTES = 4 * WINDOW_BYTES
"""Windows of large tensors are larger; fewer of them are kept."""


class ByteReader:
    """Reads byte ranges of tensors by name, as views of memory-mapped files; nothing is copied.

    Keeps the windows that were used last, at most `_MAX_OPEN_WINDOWS` of them. A window stays mapped as long as a
    view of it is alive. Use a reader from one thread only.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._windows: OrderedDict[tuple[str, int, int], memoryview] = OrderedDict()

    def read(self, name: str, begin: int, nbytes: int) -> memoryview:
        """Return `nbytes` bytes of the tensor `name`, from its byte `begin` on, as a read-only view.

        Raises `KeyError` for a name that is not in the catalog, and `CatalogError` when the file changed since the
        catalog was read, or when a limit of this process forbids to map it.
        """
        tensor = self._catalog.tensors[name]
        first = tensor.offset + begin
        start, end = window_of(first, nbytes)
        data = self._window(tensor, start, end)[first - start : first - start + nbytes]
        if len(data) < nbytes:
            raise file_changed(tensor, f"a file that ends before byte {first + nbytes}")
        return data

    def _window(self, tensor: StoredTensor, start: int, end: int) -> memoryview:
        """Return the bytes of the file of `tensor` from `start` up to `end`, or up to its end."""
        key = (tensor.file, start, end)
        if key not in self._windows:
            try:
                with open_regular(self._catalog.directory / tensor.file) as descriptor:
                    length = min(end, os.fstat(descriptor).st_size) - start
                    mapped = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start) if length > 0 else b""
            except OSError as error:
                raise read_error(tensor, error) from None
            self._windows[key] = memoryview(mapped)
            self._drop_unused()
        self._windows.move_to_end(key)
        return self._windows[key]

    def _drop_unused(self) -> None:
        """Drop the windows that were not used for longest, but never the last one."""
        mapped = sum(len(window) for window in self._windows.values())
        while len(self._windows) > 1 and (len(self._windows) > _MAX_OPEN_WINDOWS or mapped > _MAX_MAPPED_BYTES):
            mapped -= len(self._windows.popitem(last=False)[1])
