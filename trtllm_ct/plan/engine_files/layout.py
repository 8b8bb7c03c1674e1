"""Where a module of the model is in an engine: its stage, its name there, and the Linear that it is a part of."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.build_classes import BUILD_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.plan.models.build_classes import BuildClass
    from trtllm_ct.plan.models.sites import Model, Site

__all__ = ["Layout", "RankPlace", "Spot", "stages_of"]


class RankPlace(NamedTuple):
    """A rank that has a part of a module: its number, its number within the stage, and the module's name there."""

    rank: int
    tensor: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """The place of a module in the engine.

    `name` is the engine's name of it, without the layer; `layer` is its number in the model, None outside of layers.
    `parts` are the modules of the model that are joined by rows in this module, itself included, in this order.
    `expert` is the number of a routed expert, of which there are `experts`.
    """

    name: str
    layer: int | None = None
    parts: tuple[str, ...] = ()
    expert: int | None = None
    experts: int = 0


def stages_of(layers: int, pipeline: int) -> tuple[range, ...]:
    """Return the layers of each pipeline stage; where they don't divide, the first stages have one more.

    Source: TensorRT-LLM `mapping.py: Mapping.pp_layers`; older releases require that the layers divide.
    """
    size, more = divmod(layers, pipeline)
    ends = [(stage + 1) * size + min(stage + 1, more) for stage in range(pipeline)]
    return tuple(range(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True))


@dataclass(slots=True)
class Layout:
    """The places of all modules of one model in an engine of given sizes; `place` is what `Model.place` returns."""

    model: Model
    row: BuildClass
    parallel: Parallel
    place: tuple[str, str]
    table: str = BUILD_NAMES["embed_tokens"]
    head: str = BUILD_NAMES["lm_head"]
    sites: Mapping[str, Site] = field(init=False)
    stages: tuple[range, ...] = field(init=False)
    _in_layer: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        self.sites = {site.module: site for site in self.model.sites(self.place)}
        self.stages = stages_of(self.model.layers, self.parallel.pipeline)
        self._in_layer = re.compile(re.escape(self.place[0]) + r"layers\.(\d+)\.(.+)")

    def spot(self, module: str) -> Spot | None:
        """Return the place of a module, None if the engine has no such module."""
        inside = self._in_layer.fullmatch(module)
        if inside is None:
            name = BUILD_NAMES.get(self._outside(module))
            return None if name is None else Spot(name=name, parts=(module,))
        layer, path = int(inside[1]), inside[2]
        experts = self.model.experts
        if experts and path.startswith(f"{experts}."):
            expert, _, projection = path.removeprefix(f"{experts}.").partition(".")
            return self._in_expert(module, layer, expert, projection)
        name = self.row.modules.get(path)
        if name is None:
            return None
        paths = [path_ for path_, name_ in self.row.modules.items() if name_ == name]
        prefix = module.removesuffix(path)
        return Spot(name=name, layer=layer, parts=tuple(prefix + path_ for path_ in paths))

    def ranks(self, spot: Spot, *, head: bool = False) -> Iterator[RankPlace]:
        """Yield the ranks that have a part of a module; with `head` the ranks of the head that shares its weight."""
        stage, name = self.stage(spot), spot.name
        if head:
            stage, name = self.parallel.pipeline - 1, self.head
        if spot.layer is not None:
            name = self.local_name(spot)
        for tensor in range(self.parallel.tensor):
            yield RankPlace(rank=stage * self.parallel.tensor + tensor, tensor=tensor, name=name)

    def stage(self, spot: Spot) -> int:
        """Return the pipeline stage of a module: the embeddings are in the first one, norm and head in the last."""
        if spot.layer is None:
            return 0 if spot.name == self.table else self.parallel.pipeline - 1
        return next(number for number, layers in enumerate(self.stages) if spot.layer in layers)

    def local_name(self, spot: Spot) -> str:
        """Return the name of a module of a layer in the engine; layers are counted in each stage from 0."""
        if spot.layer is None:
            return spot.name
        first = self.stages[self.stage(spot)].start
        return f"transformer.layers.{spot.layer - first}.{spot.name}"

    def attention(self, layer: int) -> Spot:
        """Return the place of the attention module of a layer."""
        return Spot(name="attention", layer=layer)

    def layer_of(self, module: str) -> int | None:
        """Return the number of the layer that a module is in, None outside of layers."""
        inside = self._in_layer.match(f"{module}.")
        return int(inside[1]) if inside else None

    def rows(self, module: str, tensor: int, rows: int) -> tuple[int, int]:
        """Return the rows of a weight that a rank has; K/V heads are repeated for ranks that outnumber them."""
        site, ranks = self.sites[module], self.parallel.tensor
        if site.head:
            return self.head_rows(tensor, rows)
        if site.cut not in {Cut.COLUMN, Cut.KV_HEADS}:
            return 0, rows
        repeats = max(1, ranks // site.heads) if site.heads else 1
        size = rows * repeats // ranks
        return tensor // repeats * size, (tensor // repeats + 1) * size

    def columns(self, module: str, tensor: int, columns: int) -> tuple[int, int]:
        """Return the columns of a module's weight that a rank has."""
        if self.sites[module].cut is not Cut.ROW:
            return 0, columns
        size = columns // self.parallel.tensor
        return tensor * size, (tensor + 1) * size

    def head_rows(self, tensor: int, rows: int) -> tuple[int, int]:
        """Return the rows of the head that a rank has; the rest of its tensor is padding, see `padded_rows`."""
        size = self.padded_rows(rows)
        return min(tensor * size, rows), min((tensor + 1) * size, rows)

    def is_row_parallel(self, module: str) -> bool:
        """Whether ranks divide the columns of a module."""
        return self.sites[module].cut is Cut.ROW

    def engine_rows(self, module: str) -> int:
        """Return the rows of the engine's Linear that a module is a part of, on all ranks together."""
        spot = self.spot(module)
        rows = 0
        for name in spot.parts if spot else ():
            site = self.sites[name]
            repeats = max(1, self.parallel.tensor // site.heads) if site.heads else 1
            rows += site.shape[0] * repeats
        return rows

    def padded_rows(self, rows: int) -> int:
        """Return the rows of the head that each rank's file has: the same number on all ranks."""
        return -(-rows // self.parallel.tensor)

    def _outside(self, module: str) -> str:
        """Return the name of a module outside of layers as the table has it."""
        return "lm_head" if module == self.place[1] else module.removeprefix(self.place[0])

    def _in_expert(self, module: str, layer: int, expert: str, projection: str) -> Spot | None:
        """Return the place of one projection of a routed expert."""
        name = self.row.experts.get(projection)
        if name is None:
            return None
        prefix = module.removesuffix(projection)
        parts = tuple(prefix + other for other, name_ in self.row.experts.items() if name_ == name)
        experts = self.model.sizes["experts"]
        return Spot(name=name, layer=layer, parts=parts, expert=int(expert), experts=experts)
