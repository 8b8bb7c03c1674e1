"""Check the values of a source that no header shows: scales, zero points, shapes, NaN codes and plain values.

These checks use the plan and the checks of the conversion (`pipeline/payload.py`): they say whether a source is sound,
not whether a conversion is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors
from trtllm_ct.pipeline.payload import check_payload, count_zero_scales
from trtllm_ct.plan.stored import TransposedExpert
from trtllm_ct.verify.source.files import TensorFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.plan.plan import ModulePlan, Plan
    from trtllm_ct.plan.producers import ValueWatch
    from trtllm_ct.plan.stored import View
    from trtllm_ct.verify.plain_values import PlainWatch

__all__ = ["check_source"]

_CHUNK_BYTES = 1 << 20


def check_source(
    plan: Plan,
    catalog: Catalog,
    watches: tuple[ValueWatch, PlainWatch],
    faults: FaultCollector,
    progress: Callable[[int], None],
) -> int:
    """Check the payload of every module; return the number of rows or groups with a scale of zero.

    `watches` note what is no fault. `progress` is called with the stored bytes of each module.
    Raises `PayloadError` when the pieces of a sparse tensor contradict each other.
    """
    zero_scales = 0
    values, plain = watches
    with TensorFiles(catalog) as files:
        for module in plan.modules:
            stored = _stored_tensors(module, catalog)
            check_payload(module, stored, faults)
            values.look(module, stored)
            plain.look(module, files)
            zero_scales += count_zero_scales(module, stored)
            _check_codes(module, stored, files, faults)
            progress(module.stored_bytes)
    return zero_scales


def _stored_tensors(module: ModulePlan, catalog: Catalog) -> StoredTensors:
    """Return the tensors of a module by local name, as views of files that are mapped for as long as they are used.

    Pages that were touched count as memory while their file is mapped, so no map is kept for the next module. Left out
    are plain experts that are stored transposed, which no check reads.
    """

    def read(view: View) -> StoredArray:
        if view.offset is not None:
            begin = view.offset * view.spec.dtype.itemsize
            return StoredArray.of_bytes(reader.read_bytes(view.sources[0], begin, view.spec.nbytes), view.spec)
        return view.of({source: reader.read(source) for source in view.sources})

    views = {local: view for local, view in module.views.items() if local not in module.ignored}
    with TensorReader(catalog, in_windows=True) as reader:
        return {local: read(view) for local, view in views.items() if not isinstance(view, TransposedExpert)}


def _check_codes(module: ModulePlan, stored: StoredTensors, files: TensorFiles, faults: FaultCollector) -> None:
    """Add a fault if a float8 code of the module's weight is NaN."""
    weight = module.weight
    if weight is None or weight.packing is not None:
        return
    view = module.views[weight.codes]
    count, first = 0, None
    for begin, codes in _chunks(view, stored[weight.codes], files):
        nan = np.flatnonzero(codes & 0x7F == 0x7F)
        count += len(nan)
        if len(nan) and first is None:
            first = begin + int(nan[0])
    if first is not None:
        faults.add(
            where=f"{module.name}.{weight.codes}{list(divmod(first, view.spec.shape[-1]))}",
            expected="finite codes",
            found=f"{count} fp8 codes that are no number (NaN)",
            remedy="The weight was damaged or quantized with a scale that is too small; quantize it again.",
        )


def _chunks(view: View, codes: StoredArray, files: TensorFiles) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield float8 codes as bytes with the place of the first one, from the file if they are one run of it."""
    for begin in range(0, view.spec.numel, _CHUNK_BYTES):
        length = min(_CHUNK_BYTES, view.spec.numel - begin)
        if view.offset is not None:
            yield begin, files.read(view.sources[0], view.offset + begin, length)
        else:
            yield begin, codes.elements.ravel()[begin : begin + length]
