"""ByteReader: the payload of cataloged tensors as bytes of memory-mapped files, for code that does not need torch."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from trtllm_ct.checkpoint.reader import file_changed

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.catalog import Catalog

__all__ = ["ByteReader"]


class ByteReader:
    """Reads byte ranges of tensors by name, as views of memory-mapped files; nothing is copied.

    Each file stays mapped and open as long as this reader, or a view that it returned, is alive. Use a reader from one
    thread only.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._files: dict[str, memoryview] = {}

    def read(self, name: str, begin: int, nbytes: int) -> memoryview:
        """Return `nbytes` bytes of the tensor `name`, from its byte `begin` on, as a read-only view.

        Raises `KeyError` for a name that is not in the catalog, and `CatalogError` when the file changed since the
        catalog was read.
        """
        tensor = self._catalog.tensors[name]
        if tensor.file not in self._files:
            try:
                with (self._catalog.directory / tensor.file).open("rb") as file:
                    self._files[tensor.file] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError) as error:  # ValueError: the file is empty now
                raise file_changed(tensor, str(error)) from None
        data = self._files[tensor.file][tensor.offset + begin : tensor.offset + begin + nbytes]
        if len(data) < nbytes:
            raise file_changed(tensor, f"a file that ends before byte {tensor.offset + begin + nbytes}")
        return data
