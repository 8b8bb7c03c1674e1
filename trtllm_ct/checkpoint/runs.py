"""`read_runs`: short runs of many tensors, read without torch and without memory-mapping a file.

`TensorReader` is for whole weights. `read_runs` is for stages that look at single values of thousands of tensors and
must stay light.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from trtllm_ct.base.regular_files import open_regular, read_descriptor
from trtllm_ct.checkpoint.read_errors import file_changed, read_error
from trtllm_ct.checkpoint.reader import Run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor

__all__ = ["read_runs"]


def read_runs(catalog: Catalog, runs: Iterable[Run]) -> Iterator[tuple[Run, bytes]]:
    """Yield the runs with their bytes, in the order of files and offsets; one run is in memory at a time.

    Raises `CatalogError` when a file is gone or shorter than its header says.
    """
    by_file: dict[str, list[_Place]] = {}
    for run in runs:
        tensor = catalog.tensors[run.name]
        by_file.setdefault(tensor.file, []).append(_place(run, tensor))
    for file, places in sorted(by_file.items()):
        places.sort(key=lambda place: place[0])
        try:
            with open_regular(catalog.directory / file) as descriptor:
                _advise(descriptor, places)
                for offset, nbytes, run in places:
                    os.lseek(descriptor, offset, os.SEEK_SET)
                    data = read_descriptor(descriptor, nbytes)
                    if len(data) < nbytes:
                        found = f"a file that ends before byte {offset + nbytes}"
                        raise file_changed(catalog.tensors[run.name], found)
                    yield run, data
        except OSError as error:
            raise read_error(catalog.tensors[places[0][2].name], error) from None


_Place = tuple[int, int, Run]
"""The offset of a run in its file, its size in bytes, and the run itself."""


def _place(run: Run, tensor: StoredTensor) -> _Place:
    """Convert a run, which counts elements, to its place in the file, which counts bytes."""
    size = tensor.spec.dtype.itemsize
    end = tensor.spec.numel if run.end is None else run.end
    return tensor.offset + run.begin * size, (end - run.begin) * size, run


def _advise(descriptor: int, places: Iterable[_Place]) -> None:
    """Announce all reads to the kernel before the first one, so that it does many of them at once.

    Without it, each scalar is a separate wait: reading 48 000 of them from a cold disk took six times as long.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):  # only a hint
        for offset, nbytes, _ in places:
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
