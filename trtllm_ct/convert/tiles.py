"""Tiles: convert the large tensors of a module a few rows at a time.

The result of a tile stays in the processor's cache until it is written, and memory does not grow with the size of a
tensor. A tile is the plan of some rows of a weight (`plan/ranks/narrow.py`), like the row slices for the ranks of an
engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.checkpoint.transfer import PAGE_BYTES
from trtllm_ct.layouts.stored_array import StoredArray
from trtllm_ct.plan.ranks.narrow import Rows, can_narrow, narrow, row_unit, weight_rows, weight_rows_per_row

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.checkpoint.reader import TensorReader
    from trtllm_ct.layouts.stored_array import StoredTensors
    from trtllm_ct.pipeline.mapper import ModuleMapper
    from trtllm_ct.plan.plan import Delivery, ModulePlan
    from trtllm_ct.plan.stored import View

__all__ = ["TILE_BYTES", "TileReader", "converted_tensors", "is_copied"]

TILE_BYTES = 4 * 2**20
"""Most delivered bytes of one tile: few enough for the processor's cache, so that what was made is not fetched again.

The expert of a model of many is one tile: with half as many bytes, planning the second one took a quarter of the time.
"""


def is_copied(delivery: Delivery, module: ModulePlan) -> bool:
    """Whether a delivered tensor has the same bytes as one contiguous range of a stored tensor."""
    source = delivery.operation.source
    return delivery.operation.same_bytes and source is not None and module.views[source].offset is not None


class TileReader:
    """Reads the rows of large tensors that one tile after another is made from, into buffers that are used again.

    A tensor of a tile is valid until the next tile. Memory: the stored bytes of one tile.
    """

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def tensors(self, tile: ModulePlan, local: StoredTensors, number: int) -> dict[str, StoredArray]:
        """Return the stored tensors of a tile by local name.

        They begin `number` times as many rows as the tile has behind those that its plan names. `local` holds those of
        the whole module; of tensors that were read already, the rows are views.
        """
        return {name: self._rows(name, view, local[name], number) for name, view in tile.views.items() if name in local}

    def _rows(self, name: str, view: View, whole: StoredArray, number: int) -> StoredArray:
        if not isinstance(view, Rows):
            return whole
        if view.offset is None or not self._reader.is_mapped(view.sources[0]):
            return view.of_whole(whole, number * view.spec.numel)
        data = self._buffer(name, view.spec.nbytes)
        begin = view.offset * view.spec.dtype.itemsize + number * view.spec.nbytes
        self._reader.read_into(view.sources[0], begin, data)
        return StoredArray.of_bytes(data, view.spec)

    def _buffer(self, name: str, nbytes: int) -> memoryview:
        """Return memory at the beginning of a page, the same one for the same local name if it is large enough."""
        import numpy as np

        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < nbytes:
            memory = np.empty(nbytes + PAGE_BYTES, np.uint8)
            start = -memory.ctypes.data % PAGE_BYTES
            buffer = self._buffers[name] = memory[start : start + nbytes]
        return buffer[:nbytes].data


def converted_tensors(
    module: ModulePlan, local: StoredTensors, mapper: ModuleMapper, reader: TileReader
) -> Iterator[tuple[str, StoredArray, int | None]]:
    """Yield the delivered tensors of a module that are converted rather than copied.

    Each item is the name of a delivered tensor, a tensor, and the first delivered row that the tensor holds; the row is
    None when the tensor is whole. `local` holds the stored tensors of the module by local name; their values must have
    been checked. A tensor may share memory with the next one. Raises `PayloadError` for values that can't be delivered.
    """
    converted = [delivery for delivery in module.deliveries if not is_copied(delivery, module)]
    tiles = _tile_bounds(module, sum(delivery.spec.nbytes for delivery in converted))
    # All tiles but the last have as many rows, so that one plan serves them.
    first_tile = narrow(module, *tiles[0]) if tiles else module
    tiled_names = _tiled_names(module, first_tile)
    module_tensors = mapper.tensors(module, local)
    for delivery in converted:
        if delivery.name not in tiled_names:
            yield delivery.name, mapper.run(module, delivery, module_tensors), None
    for number, (begin, end) in enumerate(tiles if tiled_names else ()):
        is_last = number and end - begin < tiles[0][1]
        tile = narrow(module, begin, end) if is_last else first_tile
        tile_tensors = mapper.tensors(tile, reader.tensors(tile, local, 0 if is_last else number), begin)
        for delivery in tile.deliveries:
            if delivery.name in tiled_names:
                first_row = begin // weight_rows_per_row(delivery.operation, module.weight)
                yield delivery.name, mapper.run(tile, delivery, tile_tensors), first_row


def _tile_bounds(module: ModulePlan, nbytes: int) -> list[tuple[int, int]]:
    """Return begin and end row of each tile; an empty list if a module is small or can only be converted whole.

    `nbytes` are the delivered bytes that are converted.
    """
    if nbytes <= TILE_BYTES or not can_narrow(module) or not _has_weight_rows(module):
        return []
    rows, unit = weight_rows(module), row_unit(module)
    # Tiles of as many rows as possible are alike: the plan of one serves all.
    step = -(-rows // -(-nbytes // TILE_BYTES) // unit) * unit
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _has_weight_rows(module: ModulePlan) -> bool:
    """Whether a module has a weight, and all tensors that a tile would slice have as many rows as the weight."""
    if module.weight is not None:
        return True
    lengths = {view.spec.shape[:1] for local, view in module.views.items() if local in {"weight", "bias"}}
    return "weight" in module.views and len(lengths) == 1 and lengths != {()}


def _tiled_names(module: ModulePlan, tile: ModulePlan) -> frozenset[str]:
    """Return the names of the converted tensors that a tile delivers in part; all others are delivered whole.

    A small tensor that is made from another one than the codes is delivered whole, which is one step and not many.
    """
    return frozenset(
        delivery.name
        for delivery, tile_delivery in zip(module.deliveries, tile.deliveries, strict=True)
        if tile_delivery is not delivery
        and not is_copied(delivery, module)
        and (delivery.operation.source is None or delivery.spec.nbytes > TILE_BYTES)
    )
