"""Tiles: convert the large tensors of a module a few rows at a time.

The result of a tile stays in the processor's cache until it is written, and memory does not grow with the size of a
tensor. A tile is the plan of some rows of a weight (`plan/ranks/narrow.py`), like the row slices for the ranks of an
engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.convert.direct import is_copied
from trtllm_ct.plan.ranks.narrow import Rows, can_narrow, narrow, row_unit, weight_rows, weight_rows_per_row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from trtllm_ct.pipeline.mapper import CompressedTensorsWeightMapper
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["TILE_BYTES", "converted_tensors"]

TILE_BYTES = 4 * 2**20
"""Approximate delivered bytes of one tile."""


def converted_tensors(
    module: ModulePlan, local: Mapping[str, Tensor], mapper: CompressedTensorsWeightMapper
) -> Iterator[tuple[str, Tensor, int | None]]:
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
    for begin, end in tiles:
        tile = narrow(module, begin, end)
        tile_tensors = mapper.tensors(tile, _tensors_of_tile(tile, local), begin)
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


def _tensors_of_tile(tile: ModulePlan, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the stored tensors of a tile by local name, as views of the stored tensors of the module."""
    return {
        name: view.of_whole(local[name]) if isinstance(view, Rows) else local[name]
        for name, view in tile.views.items()
        if name in local
    }
