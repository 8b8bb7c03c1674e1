"""Find the modules of a model in its files.

Names and shapes are in the headers; config.json gives the numbers that no shape shows, such as that of heads. Where the
row of the class has the modules of a layer, these are looked for (`discover_stated`). Otherwise a module is found by
its codes, or by a plain weight with two axes (`discover`). Everything else is delivered as it is stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import Cut
from trtllm_ct.formats import PACKED_CODES
from trtllm_ct.plan.models.class_row import entry_of
from trtllm_ct.plan.models.expert_spellings import PROJECTIONS
from trtllm_ct.plan.models.site import Site
from trtllm_ct.plan.models.site_rules import SiteRules, ends_with
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from trtllm_ct.plan.models.class_row import ClassRow
    from trtllm_ct.plan.models.stated_modules import Stated, StatedModules
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["Discovery", "discover", "discover_stated", "is_draft", "table_names_of"]

_TABLES = frozenset({"embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in", "embeddings"})
_HEADS = frozenset({"lm_head", "embed_out", "output", "proj_out"})
_LAYER = re.compile(r"((?:.*?\.)?)((?:layers|h|blocks|block)\.(\d+)\.)(.+)")
# Layers for multi-token prediction, which draft the next tokens, under a name of their own.
_DRAFT = re.compile(r"(model\.)?mtp(_|\.)")
_EXPERT = re.compile(r"(.*(?<!shared_)experts)\.(\d+)\.(\w+)")
_MATRIX = 2
_ROWS = PACKED_CODES | {"weight"}
_NO_SHAPES: Mapping[str, tuple[int, int]] = MappingProxyType({})
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """The modules that a checkpoint stores: those that config.json states, or those whose weight is a matrix.

    They are in the order of the model if config.json states them, and otherwise in that of the files.
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
    tied: bool = False,
    usual_ends: bool = False,
) -> Discovery:
    """Return the modules of a checkpoint whose weight is a matrix, as the model class that `row` describes reads them.

    `layers`, `head_dim` and `kv_heads` are the numbers in config.json, 0 if it gives none. Layers after the last one,
    or under a name of their own (`is_draft`), draft tokens, and are left out. `shapes` are the shapes of
    weights that are known although the headers of their codes don't show them. `query_only` are the numbers of layers
    without keys and values, whose q_proj the class builds plain. If the head is `tied` and only it is stored, it is
    the embeddings. With `usual_ends` embeddings and head may have any usual name, whatever the engine's class reads.
    """
    tables = table_names_of(row, usual=usual_ends)
    body, head = place = _place_of(stored, tables, head_names_of(row, usual=usual_ends))
    numbers = [int(match[3]) for name in stored if (match := _LAYER.fullmatch(name)) is not None and match[1] == body]
    count = layers or max(numbers, default=-1) + 1
    finder = _Finder(SiteRules(row), body, tables, stored, shapes, head_dim, kv_heads, query_only)
    sites = []
    for name, module in stored.items():
        layer = _LAYER.fullmatch(name)
        drafts = layer is not None and layer[1] == body and int(layer[3]) >= count
        if not drafts and not is_draft(name) and _has_matrix(module):
            sites.append(finder.head(module) if name == head else finder.site(module))
    if tied and head in stored and not any(site.module == f"{body}{table}" for site in sites for table in tables):
        sites = [finder.embeddings(stored[head]) if site.head else site for site in sites]
    experts = [int(match[2]) for site in sites if site.expert and (match := _EXPERT.fullmatch(site.module))]
    return Discovery(place=place, layers=count, experts=max(experts, default=-1) + 1, sites=tuple(sites))


def discover_stated(
    stored: Mapping[str, StoredModule],
    stated: StatedModules,
    place: tuple[str, str],
    *,
    tied: bool,
    plain_experts: bool,
) -> Discovery:
    """Return the modules of a checkpoint that its config.json states, as the model class of their row reads them.

    Shapes, biases and heads are those of the headers. Codes, whose headers may not show the shape of the weight, and
    modules without a weight have the shape that config.json states. `place` is the prefix of the text model's body and
    the name of its head, and `tied` says that the head is no module. `plain_experts` says that the class reads routed
    experts plain.
    """
    finder = _StatedFinder(SiteRules(stated.row), stated, stored, place[1], plain_experts)
    sites: list[Site] = []
    for prefix, modules in stated.parts(place, tied=tied):
        sites += finder.sites(prefix, modules)
    return Discovery(place=place, layers=stated.sizes["layers"], experts=stated.sizes["experts"], sites=tuple(sites))


@dataclass(frozen=True, slots=True)
class _StatedFinder:
    """Makes the sites of the stored modules that config.json states, once for all modules that are alike."""

    rules: SiteRules
    stated: StatedModules
    stored: Mapping[str, StoredModule]
    head_name: str
    plain_experts: bool
    _made: dict[tuple[object, ...], Site] = field(init=False, default_factory=dict)

    def sites(self, prefix: str, modules: Mapping[str, Stated]) -> Iterator[Site]:
        """Yield the sites of the modules behind a prefix that are stored."""
        for path, stated in modules.items():
            name = prefix + path
            module = self.stored.get(name) or self._under_other_name(name, stated.behind(prefix))
            if module is None:
                continue
            shape, names = _stored_shape(module, stated), _stated_locals(module, stated)
            key = (path, shape, names)
            site = self._made.get(key)
            if site is None:
                site = self._made[key] = self._site(path, shape, names)
            if site.cut is Cut.KV_HEADS:
                site = site._replace(heads=self._heads(name, shape))
            yield _behind(prefix, site) if prefix else site._replace(aliases=stated.aliases)

    def _under_other_name(self, name: str, stated: Stated) -> StoredModule | None:
        return next((self.stored[other] for other in stated.stored_names(name) if other in self.stored), None)

    def _site(self, path: str, shape: tuple[int, ...], names: tuple[str, ...]) -> Site:
        """Return the site of a module by its path in a layer, or by its full name outside of the layers."""
        if path == self.head_name:
            # For draft layers, engines may slice the weight of the head as a plain one (`_torch/modules/embedding.py:
            # LMHead.forward`, pull request 16511).
            return self.rules.head(path, shape, names)._replace(plain=self.stated.sizes["draft_layers"] > 0)
        if len(shape) != _MATRIX:
            return Site(module=path, class_name="RMSNorm", shape=shape, locals=names)
        if path.rpartition(".")[2] in _TABLES:
            return self.rules.table(path, shape, names)
        expert = _EXPERT.fullmatch(path)
        if expert is not None and expert[3] in PROJECTIONS:
            site = self.rules.expert(expert[1], expert[2], PROJECTIONS[expert[3]], shape, names)
            return site._replace(plain=self.plain_experts)
        splits = entry_of(self.rules.row.splits, path) or ()
        return self.rules.linear(path, shape, names)._replace(parts=tuple(self.stated.sizes[size] for size in splits))

    def _heads(self, name: str, shape: tuple[int, ...]) -> int:
        """Return the number of K/V heads of a K or V Linear, by the rows of its weight."""
        sizes = self.stated.sizes
        return _head_count(shape[0], name, self.stored, sizes["head_dim"]) or sizes["num_key_value_heads"]


@dataclass(frozen=True, slots=True)
class _Finder:
    """Makes the sites of the stored modules of one checkpoint, whose text model has its body behind a prefix."""

    rules: SiteRules
    body: str
    tables: frozenset[str]
    stored: Mapping[str, StoredModule]
    shapes: Mapping[str, tuple[int, int]]
    head_dim: int
    kv_heads: int
    query_only: Collection[int]

    def head(self, module: StoredModule) -> Site:
        """Return the site of the head of the text model."""
        return self.rules.head(module.name, self._shape(module), _locals(module))

    def embeddings(self, head: StoredModule) -> Site:
        """Return the site of the embeddings, which are stored as the head."""
        name = self.body + (self.rules.row.embeddings or "embed_tokens")
        return self.rules.table(name, self._shape(head), _locals(head))._replace(aliases=(head.name,))

    def site(self, module: StoredModule) -> Site:
        """Return the site of any other module with a matrix."""
        name, shape = module.name, self._shape(module)
        expert = _EXPERT.fullmatch(name)
        if expert is not None and expert[3] in PROJECTIONS:
            position = PROJECTIONS[expert[3]]
            return self.rules.expert(expert[1], expert[2], position, shape, _locals(module), stored=expert[3])
        if name.rpartition(".")[2] in self.tables:
            return self.rules.table(name, shape, _locals(module))
        site = self.rules.linear(name, shape, _locals(module))
        layer = self._layer(name)
        # Outside of the layers, classes build all but the head plain.
        return site._replace(
            plain=site.plain or layer is None or (layer in self.query_only and ends_with(name, _QKV)),
            early=site.early and layer is not None,
            heads=self._heads(module) if site.cut is Cut.KV_HEADS else None,
        )

    def _shape(self, module: StoredModule) -> tuple[int, ...]:
        """Return the shape of a weight; () for codes whose shape only their format shows."""
        if module.name in self.shapes:
            return self.shapes[module.name]
        return () if module.is_quantized else module.specs["weight"].shape

    def _layer(self, name: str) -> int | None:
        """Return the number of the text model's layer that a module is in; None if it is in none."""
        layer = _LAYER.fullmatch(name)
        return int(layer[3]) if layer is not None and layer[1] == self.body else None

    def _heads(self, module: StoredModule) -> int:
        """Return the number of K/V heads of a K or V Linear."""
        stored = next((spec.shape for local, spec in module.specs.items() if local in _ROWS and spec.shape), (0,))
        rows = self.shapes.get(module.name, stored)[0]
        return _head_count(rows, module.name, self.stored, self.head_dim) or self.kv_heads or 1


def _head_count(rows: int, name: str, stored: Mapping[str, StoredModule], head_dim: int) -> int:
    """Return the number of heads in so many rows of a K or V Linear; 0 if they are no whole number of heads.

    Layers may have heads of different sizes: a norm of single heads has the size of one. Otherwise it is `head_dim`.
    """
    norm = stored.get(f"{name.rpartition('.')[0]}.k_norm")
    size = norm.specs["weight"].numel if norm is not None and "weight" in norm.specs else 0
    head_dim = size if 0 < size < rows else head_dim
    return rows // head_dim if head_dim and rows % head_dim == 0 else 0


def _stored_shape(module: StoredModule, stated: Stated) -> tuple[int, ...]:
    """Return the shape of a plain weight, or of what config.json states in its place; a weight has as many axes."""
    spec = module.specs.get("weight")
    if spec is None or module.is_quantized or len(spec.shape) != len(stated.shape):
        return stated.shape
    return spec.shape


def _stated_locals(module: StoredModule, stated: Stated) -> tuple[str, ...]:
    """Return the parameters beside the weight that are stated and stored."""
    return tuple([local for local in stated.locals if local in module.specs]) if stated.locals else ()


def _behind(prefix: str, site: Site) -> Site:
    """Return the site of a module in the layer with this prefix, given that of its path in a layer."""
    group, shares = site.mode_group, site.shares
    placed = Site(
        prefix + site.module,
        site.class_name,
        site.shape,
        prefix + group if group else None,
        site.fused,
        prefix + shares if shares else None,
        *site[6:],
    )
    return placed._replace(aliases=tuple(prefix + alias for alias in site.aliases)) if site.aliases else placed


def table_names_of(row: ClassRow, *, usual: bool = False) -> frozenset[str]:
    """Return the last parts of the names that embeddings may have, as the class reads them; `usual` adds all others."""
    named = frozenset({row.embeddings}) if row.embeddings else frozenset()
    return named | _TABLES if usual or not named else named


def head_names_of(row: ClassRow, *, usual: bool = False) -> frozenset[str]:
    """Return the same for the head."""
    named = frozenset({row.head}) if row.head else frozenset()
    return named | _HEADS if usual or not named else named


def is_draft(name: str) -> bool:
    """Whether a module belongs to draft layers that have a name of their own."""
    return _DRAFT.match(name) is not None


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
