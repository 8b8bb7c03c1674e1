"""Tiles: a module's large tensors converted some rows at a time.

What is made stays in the processor's cache until it is written, and memory does not grow with the size of a tensor. A
tile is the plan of some rows of a weight, as the ranks of an engine have them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.convert.direct import is_copied
from trtllm_ct.plan.ranks.narrow import Rows, can_narrow, narrow, row_unit, rows_in_one, weight_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from trtllm_ct.pipeline.mapper import CompressedTensorsWeightMapper
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["TILE_BYTES", "made_tensors"]

TILE_BYTES = 4 * 2**20
"""Delivered bytes of a tile, about."""


def made_tensors(
    module: ModulePlan, local: Mapping[str, Tensor], mapper: CompressedTensorsWeightMapper
) -> Iterator[tuple[str, Tensor, int | None]]:
    """What a module delivers and is not copied: name, tensor, and the first row where that is a part.

    `local` are the module's tensors by local name, checked. Raises `PayloadError` for values that can't be delivered.
    """
    made = [delivery for delivery in module.deliveries if not is_copied(delivery, module)]
    tiles = _tiles(module, sum(delivery.spec.nbytes for delivery in made))
    in_tiles = _narrowed(module, *tiles[0]) if tiles else frozenset()
    whole = mapper.tensors(module, local)
    for delivery in made:
        if delivery.name not in in_tiles:
            yield delivery.name, mapper.run(module, delivery, whole), None
    for begin, end in tiles:
        part = narrow(module, begin, end)
        tensors = mapper.tensors(part, _rows_of(part, local), begin)
        for delivery in part.deliveries:
            if delivery.name in in_tiles:
                first = begin // rows_in_one(delivery.operation, module.weight)
                yield delivery.name, mapper.run(part, delivery, tensors), first


def _tiles(module: ModulePlan, nbytes: int) -> list[tuple[int, int]]:
    """First and last row of each tile; none where a module is small, or can only be converted whole."""
    if nbytes <= TILE_BYTES or not can_narrow(module) or not _has_weight(module):
        return []
    rows, unit = weight_rows(module), row_unit(module)
    step = max(1, TILE_BYTES * rows // nbytes // unit) * unit
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _has_weight(module: ModulePlan) -> bool:
    """Whether rows mean something for all tensors that would be cut."""
    if module.weight is not None:
        return True
    lengths = {view.spec.shape[:1] for local, view in module.views.items() if local in {"weight", "bias"}}
    return "weight" in module.views and len(lengths) == 1 and lengths != {()}


def _narrowed(module: ModulePlan, begin: int, end: int) -> frozenset[str]:
    """The delivered tensors that are made, and of which a tile makes some rows."""
    part = narrow(module, begin, end)
    return frozenset(
        whole.name
        for whole, some in zip(module.deliveries, part.deliveries, strict=True)
        if some is not whole and not is_copied(whole, module)
    )


def _rows_of(part: ModulePlan, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a tile, views of those of the whole."""
    return {
        name: view.of_whole(local[name]) if isinstance(view, Rows) else local[name]
        for name, view in part.views.items()
        if name in local
    }
