"""Find the modules of a model in its files, for models that no table of a family describes.

Names and shapes are in the headers; config.json gives the numbers that no shape shows, such as that of heads. A module
is found by its codes, or by a plain weight with two axes. Everything else is delivered as it is stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import Cut
from trtllm_ct.formats import PACKED_CODES
from trtllm_ct.plan.models.expert_spellings import PROJECTIONS
from trtllm_ct.plan.models.site import Site
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from trtllm_ct.plan.models.class_row import ClassRow, Limit
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["Discovery", "discover", "is_draft"]

_TABLES = frozenset({"embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in", "embeddings"})
_HEADS = frozenset({"lm_head", "embed_out", "output", "proj_out"})
_LAYER = re.compile(r"((?:.*?\.)?)((?:layers|h|blocks|block)\.(\d+)\.)(.+)")
# Layers for multi-token prediction, which draft the next tokens, under a name of their own.
_DRAFT = re.compile(r"(model\.)?mtp(_|\.)")
_EXPERT = re.compile(r"(.*(?<!shared_)experts)\.(\d+)\.(\w+)")
_DOWN = 2
_MATRIX = 2
_ROWS = PACKED_CODES | {"weight"}
_NO_SHAPES: Mapping[str, tuple[int, int]] = MappingProxyType({})
_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION = frozenset({*_QKV, "o_proj"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """The modules of a checkpoint whose weight is a matrix, in the order of the files.

    `place` is the prefix of the text model's body and the name of its head. `layers` is the number of its layers, and
    `experts` that of the routed experts of a layer, 0 without any.
    """

    place: tuple[str, str]
    layers: int
    experts: int
    sites: tuple[Site, ...]

    def at(self, place: tuple[str, str]) -> Iterator[Site]:
        """Yield the sites as they are called if the text model is in another place."""
        (body, head), (new_body, new_head) = self.place, place
        for site in self.sites:
            if place == self.place or not (site.module == head or site.module.startswith(body)):
                yield site
            elif site.module == head:
                yield site._replace(module=new_head)
            else:
                groups = {
                    key: new_body + value.removeprefix(body)
                    for key in ("mode_group", "shares")
                    if (value := getattr(site, key)) is not None
                }
                yield site._replace(module=new_body + site.module.removeprefix(body), **groups)


def discover(
    stored: Mapping[str, StoredModule],
    row: ClassRow,
    *,
    layers: int = 0,
    head_dim: int = 0,
    kv_heads: int = 0,
    shapes: Mapping[str, tuple[int, int]] = _NO_SHAPES,
    query_only: Collection[int] = (),
) -> Discovery:
    """Return the modules of a checkpoint whose weight is a matrix, as the model class that `row` describes reads them.

    `layers`, `head_dim` and `kv_heads` are the numbers in config.json, 0 if it gives none. Layers after the last one,
    or under a name of their own (`is_draft`), draft tokens, and are left out. `shapes` are the shapes of
    weights that are known although the headers of their codes don't show them. `query_only` are the numbers of layers
    without keys and values, whose q_proj the class builds plain.
    """
    body, head = place = _place_of(stored, _tables(row), frozenset({row.head}) if row.head else _HEADS)
    numbers = [int(match[3]) for name in stored if (match := _LAYER.fullmatch(name)) is not None and match[1] == body]
    count = layers or max(numbers, default=-1) + 1
    rules = _Rules(row, body, stored, shapes, head_dim, kv_heads, query_only)
    sites = []
    for name, module in stored.items():
        layer = _LAYER.fullmatch(name)
        drafts = layer is not None and layer[1] == body and int(layer[3]) >= count
        if not drafts and not is_draft(name) and _has_matrix(module):
            sites.append(rules.head(module) if name == head else rules.site(module))
    experts = [int(match[2]) for site in sites if site.expert and (match := _EXPERT.fullmatch(site.module))]
    return Discovery(place=place, layers=count, experts=max(experts, default=-1) + 1, sites=tuple(sites))


class _Rules:
    """Applies the row of a class to the modules of one checkpoint."""

    def __init__(
        self,
        row: ClassRow,
        body: str,
        stored: Mapping[str, StoredModule],
        shapes: Mapping[str, tuple[int, int]],
        head_dim: int,
        kv_heads: int,
        query_only: Collection[int],
    ) -> None:
        self._row = row
        self._body = body
        self._stored = stored
        self._shapes = shapes
        self._head_dim = head_dim
        self._kv_heads = kv_heads
        self._query_only = query_only
        parts = [(part, fused) for fused, parts in row.fused.items() for part in parts]
        self._fused = sorted(parts, key=lambda pair: len(pair[0]), reverse=True)

    def head(self, module: StoredModule) -> Site:
        """Return the site of the head of the text model."""
        return Site(
            module=module.name,
            class_name="Linear",
            shape=self._shape(module),
            head=True,
            locals=_locals(module),
            cut=Cut.VOCABULARY,
            limit=self._limit(module.name),
        )

    def site(self, module: StoredModule) -> Site:
        """Return the site of any other module with a matrix."""
        expert = _EXPERT.fullmatch(module.name)
        if expert is not None and expert[3] in PROJECTIONS:
            return self._expert(module, expert[1], expert[2], PROJECTIONS[expert[3]])
        parent, _, leaf = module.name.rpartition(".")
        table = leaf in _tables(self._row)
        group = self._group(module.name)
        cut = self._row.table if table else self._cut(module.name)
        return Site(
            module=module.name,
            class_name="Embedding" if table else "Linear",
            shape=self._shape(module),
            mode_group=group,
            fused=group is not None,
            shares=group,
            plain=table or self._is_plain(module.name),
            locals=_locals(module),
            cut=cut,
            heads=self._heads(module, parent) if cut is Cut.KV_HEADS else None,
            attention=leaf in _ATTENTION or parent.rpartition(".")[2] in self._row.mixers,
            ranks_vary=_ends_with(module.name, self._row.ranks_vary),
            limit=self._limit(module.name),
            early=self._layer(module.name) is not None and _ends_with(module.name, self._row.early),
        )

    def _expert(self, module: StoredModule, experts: str, number: str, projection: int) -> Site:
        """Return the site of a projection of a routed expert; it is delivered under the name that the class reads."""
        prefix = f"{experts}.{number}."
        name = prefix + self._row.projections[projection] if self._row.projections else module.name
        return Site(
            module=name,
            class_name="Linear",
            shape=self._shape(module),
            mode_group=experts,
            shares=None if projection == _DOWN else f"{prefix}gate_up",
            expert=True,
            locals=_locals(module),
            aliases=() if name == module.name else (module.name,),
            cut=Cut.ROW if projection == _DOWN else Cut.COLUMN,
            limit=self._limit(f"{experts}.{name.rpartition('.')[2]}"),
        )

    def _shape(self, module: StoredModule) -> tuple[int, ...]:
        """Return the shape of a weight; () for codes whose shape only their format shows."""
        if module.name in self._shapes:
            return self._shapes[module.name]
        return () if module.is_quantized else module.specs["weight"].shape

    def _is_plain(self, name: str) -> bool:
        """Whether the class builds a Linear plain: by its row, or outside of the layers, where only the head isn't."""
        layer = self._layer(name)
        if layer is None or _ends_with(name, self._row.plain):
            return True
        return layer in self._query_only and _ends_with(name, _QKV)

    def _layer(self, name: str) -> int | None:
        """Return the number of the text model's layer that a module is in; None if it is in none."""
        layer = _LAYER.fullmatch(name)
        return int(layer[3]) if layer is not None and layer[1] == self._body else None

    def _group(self, name: str) -> str | None:
        """Return the name of the fused Linear that a module becomes a part of; None if it is not fused."""
        parent = name.rpartition(".")[0]
        fused = next((fused for path, fused in self._fused if _ends_with(name, (path,))), None)
        return f"{parent}.{fused}" if fused and parent else None

    def _cut(self, name: str) -> Cut:
        """Return how ranks divide a module."""
        return next((cut for path, cut in self._row.cuts.items() if _ends_with(name, (path,))), Cut.NONE)

    def _limit(self, name: str) -> Limit | None:
        """Return the limit on the modes of a module; None without any."""
        return next((limit for limit in self._row.limits if _ends_with(name, limit.paths)), None)

    def _heads(self, module: StoredModule, parent: str) -> int:
        """Return the number of K/V heads of a K or V Linear; layers may have heads of different sizes.

        A norm of single heads has the size of one. Otherwise config.json gives the size.
        """
        stored = next((spec.shape for local, spec in module.specs.items() if local in _ROWS and spec.shape), (0,))
        rows = self._shapes.get(module.name, stored)[0]
        norm = self._stored.get(f"{parent}.k_norm")
        size = norm.specs["weight"].numel if norm is not None and "weight" in norm.specs else 0
        head_dim = size if 0 < size < rows else self._head_dim
        return rows // head_dim if head_dim and rows % head_dim == 0 else self._kv_heads or 1


def is_draft(name: str) -> bool:
    """Whether a module belongs to draft layers that have a name of their own."""
    return _DRAFT.match(name) is not None


def _tables(row: ClassRow) -> frozenset[str]:
    """Return the last parts of the names of embeddings."""
    return frozenset({row.embeddings}) if row.embeddings else _TABLES


def _place_of(stored: Collection[str], table_names: Collection[str], head_names: Collection[str]) -> tuple[str, str]:
    """Return the prefix of the text model's body and the name of its head.

    The body is where the embeddings are, beside the layers. A model without such embeddings has its body where most
    layers are.
    """
    layers: dict[str, int] = {}
    for name in stored:
        match = _LAYER.match(name)
        if match is not None:
            layers[match[1]] = layers.get(match[1], 0) + 1
    tables = {name.removesuffix(leaf) for name in stored if (leaf := name.rpartition(".")[2]) in table_names}
    bodies = sorted(layers, key=lambda body: (body in tables, layers[body]), reverse=True)
    body = bodies[0] if bodies else ""
    heads = [name for name in stored if name.rpartition(".")[2] in head_names and not _LAYER.match(name)]
    around = [name for name in heads if body.startswith(name.rpartition(".")[0])]
    return body, next(iter(sorted(around, key=len, reverse=True)), "lm_head")


def _has_matrix(module: StoredModule) -> bool:
    """Whether a module has codes, or a plain weight with two axes."""
    if module.is_quantized:
        return True
    weight = module.specs.get("weight")
    return weight is not None and len(weight.shape) == _MATRIX


def _locals(module: StoredModule) -> tuple[str, ...]:
    """Return the local names of the parameters beside the weight."""
    return tuple(local for local in module.specs if local not in QUANTIZATION_TENSORS | {"weight"} and "." not in local)


def _ends_with(name: str, paths: Iterable[str]) -> bool:
    """Whether the name of a module ends with one of these paths."""
    return any(name == path or name.endswith(f".{path}") for path in paths)
