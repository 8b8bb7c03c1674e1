"""Tiles: convert the large tensors of a module a few rows at a time.

The result of a tile stays in the processor's cache until it is written, and memory does not grow with the size of a
tensor. A tile is the plan of some rows of a weight (`plan/ranks/narrow.py`), like the row slices for the ranks of an
engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.plan.ranks.narrow import Rows, can_narrow, narrow, row_unit, weight_rows, weight_rows_per_row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors
    from trtllm_ct.pipeline.mapper import ModuleMapper
    from trtllm_ct.plan.plan import Delivery, ModulePlan

__all__ = ["TILE_BYTES", "converted_tensors", "is_copied"]

TILE_BYTES = 2 * 2**20
"""Approximate delivered bytes of one tile: about the size of a core's second-level cache.

The memory of an array of this size is used again for the next one; that of a larger one would be fresh, page by page.
"""


def is_copied(delivery: Delivery, module: ModulePlan) -> bool:
    """Whether a delivered tensor has the same bytes as one contiguous range of a stored tensor."""
    source = delivery.operation.source
    return delivery.operation.same_bytes and source is not None and module.views[source].offset is not None


def converted_tensors(
    module: ModulePlan, local: StoredTensors, mapper: ModuleMapper
) -> Iterator[tuple[str, StoredArray, int | None]]:
    """Yield the delivered tensors of a module that are converted rather than copied.

    Each item is the name of a delivered tensor, a tensor, and the first delivered row that the tensor holds; the row is
    None when the tensor is whole. `local` holds the stored tensors of the module by local name; their values must have
    been checked. Raises `PayloadError` for values that can't be delivered.
    """
    converted = [delivery for delivery in module.deliveries if not is_copied(delivery, module)]
    tiles = _tile_bounds(module, sum(delivery.spec.nbytes for delivery in converted))
    tiled_names = _tiled_names(module, *tiles[0]) if tiles else frozenset()
    module_tensors = mapper.tensors(module, local)
    for delivery in converted:
        if delivery.name not in tiled_names:
            yield delivery.name, mapper.run(module, delivery, module_tensors), None
    # All tiles but the last have as many rows, so that one plan serves them.
    first_tile = narrow(module, *tiles[0]) if tiles else module
    for number, (begin, end) in enumerate(tiles):
        is_last = number and end - begin < tiles[0][1]
        tile = narrow(module, begin, end) if is_last else first_tile
        tile_local = _tensors_of_tile(tile, local, 0 if is_last else number)
        tile_tensors = mapper.tensors(tile, tile_local, begin)
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
    step = max(1, TILE_BYTES * rows // nbytes // unit) * unit
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _has_weight_rows(module: ModulePlan) -> bool:
    """Whether a module has a weight, and all tensors that a tile would slice have as many rows as the weight."""
    if module.weight is not None:
        return True
    lengths = {view.spec.shape[:1] for local, view in module.views.items() if local in {"weight", "bias"}}
    return "weight" in module.views and len(lengths) == 1 and lengths != {()}


def _tiled_names(module: ModulePlan, begin: int, end: int) -> frozenset[str]:
    """Return the names of the converted tensors that a tile delivers in part; all others are delivered whole."""
    tile = narrow(module, begin, end)
    return frozenset(
        delivery.name
        for delivery, tile_delivery in zip(module.deliveries, tile.deliveries, strict=True)
        if tile_delivery is not delivery and not is_copied(delivery, module)
    )


def _tensors_of_tile(tile: ModulePlan, local: StoredTensors, number: int) -> dict[str, StoredArray]:
    """Return the stored tensors of a tile by local name, as views of the stored tensors of the module.

    They begin `number` times as many rows as the tile has behind those that its plan names.
    """
    return {
        name: view.of_whole(local[name], number * view.spec.numel) if isinstance(view, Rows) else local[name]
        for name, view in tile.views.items()
        if name in local
    }
