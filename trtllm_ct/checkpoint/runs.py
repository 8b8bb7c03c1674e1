"""`read_runs`: short runs of many tensors, read without torch and without memory-mapping a file.

`TensorReader` is for whole weights. `read_runs` is for stages that look at single values of thousands of tensors and
must stay light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.checkpoint.read_errors import file_changed, read_error
from trtllm_ct.checkpoint.reader import Run
from trtllm_ct.checkpoint.source import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor

__all__ = ["read_runs"]


def read_runs(catalog: Catalog, runs: Iterable[Run]) -> Iterator[tuple[Run, bytes]]:
    """Yield the runs with their bytes, in the order of files and offsets; one run is in memory at a time.

    Raises `CatalogError` when a file is gone or shorter than its header says, and what `Source.announce` raises.
    """
    by_file: dict[str, list[_Place]] = {}
    for run in runs:
        tensor = catalog.tensors[run.name]
        by_file.setdefault(tensor.file, []).append(_place(run, tensor))
    catalog.source.announce(Part(file, *place[:2]) for file, places in by_file.items() for place in places)
    for file, places in sorted(by_file.items()):
        places.sort(key=lambda place: place[0])
        try:
            with catalog.source.open(file) as stored:
                for offset, nbytes, run in places:
                    data = stored.read(nbytes, offset)
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
