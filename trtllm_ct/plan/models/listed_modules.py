"""The modules that a model must have by the row of its class, with the sizes in config.json.

So a checkpoint that lacks a module, or whose weights have other sizes, is refused before any weight is read, whatever
its other layers have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_row import PROJECTION_NAMES, entry_of
from trtllm_ct.plan.models.site import Site
from trtllm_ct.plan.models.site_rules import SiteRules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.plan.models.class_row import ClassRow, Leaves

__all__ = ["Listing"]

_NORM = "RMSNorm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The modules that a row lists, and what config.json says about them.

    `leaves` are the modules of a layer. `sizes` are those of `sizes_of`. `biases` are the keys of config.json that give
    Linears a bias, and `always`. `dense_layers` are the numbers of the layers without routed experts. With `stacked`
    the class reads all routed experts of a layer from one tensor.
    """

    row: ClassRow
    leaves: Leaves
    sizes: Mapping[str, int]
    biases: frozenset[str] = frozenset()
    dense_layers: frozenset[int] = frozenset()
    stacked: bool = False

    def sites(self, place: tuple[str, str], *, tied: bool) -> Iterator[Site]:
        """Yield every module that must have a weight, in the order of the model; a tied head has none.

        `place` is the prefix of the text model's body and the name of its head.
        """
        body, head = place
        rules, hidden = SiteRules(self.row), self.sizes["hidden"]
        table = (self.sizes["vocabulary"], hidden)
        # Some writers store the weight of a tied head only under the name of the head.
        yield rules.table(f"{body}embed_tokens", table)._replace(aliases=(head,) if tied else ())
        dense, sparse = self._dense(rules), self._sparse(rules, self.sizes["experts"])
        for layer in range(self.sizes["layers"]):
            for site in sparse if self._has_experts(layer) else dense:
                yield _behind(f"{body}layers.{layer}.", site)
        yield Site(module=f"{body}norm", class_name=_NORM, shape=(hidden,))
        if not tied:
            # For draft layers, engines may slice the weight of the head as a plain one (`_torch/modules/embedding.py:
            # LMHead.forward`, pull request 16511).
            yield rules.head(head, table)._replace(plain=self.sizes["draft_layers"] > 0)

    def kinds(self) -> Iterator[Site]:
        """Yield the sites of one layer of each kind, by their paths in the layer, with one of the routed experts."""
        rules = SiteRules(self.row)
        kinds = {self._has_experts(layer) for layer in range(self.sizes["layers"])}
        for sparse in sorted(kinds):
            yield from self._sparse(rules, 1) if sparse else self._dense(rules)

    def _has_experts(self, layer: int) -> bool:
        return bool(self.row.router) and layer not in self.dense_layers

    def _dense(self, rules: SiteRules) -> list[Site]:
        """Return the sites of a layer without routed experts, by their paths in the layer."""
        return [*self._attention(rules), *(self._linear(rules, path) for path in self.leaves.mlp)]

    def _sparse(self, rules: SiteRules, experts: int) -> list[Site]:
        """Return the sites of a layer with so many routed experts, by their paths in the layer.

        All routed experts of a layer are in one mode group. Stacked ones are plain: the tensors of a mode are described
        for experts one by one.
        """
        if not self.row.router:
            return []
        sites = [
            *self._attention(rules),
            *(self._linear(rules, path) for path in (self.row.router, *self.leaves.shared)),
        ]
        shapes = [self._shape(f"experts.{name}") for name in PROJECTION_NAMES]
        for number in range(experts):
            for projection, shape in enumerate(shapes):
                site = rules.expert(self.row.experts, number, projection, shape)
                sites.append(site._replace(plain=self.stacked))
        return sites

    def _attention(self, rules: SiteRules) -> list[Site]:
        """Return the sites of all norms and of the Linears of attention in a layer, by their paths in the layer."""
        norms = [Site(module=path, class_name=_NORM, shape=self._shape(path)) for path in self.leaves.norms]
        return norms + [self._linear(rules, path) for path in self.leaves.attention]

    def _linear(self, rules: SiteRules, path: str) -> Site:
        """Return the site of a Linear by its path in a layer."""
        bias = ("bias",) if entry_of(self.row.biases, path) in self.biases else ()
        site = rules.linear(path, self._shape(path), bias + (entry_of(self.row.extras, path) or ()))
        return site._replace(
            heads=self.sizes["num_key_value_heads"] if site.cut is Cut.KV_HEADS else None,
            parts=tuple(self.sizes[size] for size in entry_of(self.row.splits, path) or ()),
        )

    def _shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the weight of a module by its path in a layer."""
        names = entry_of(self.row.shapes, path)
        if names is None:
            raise AssertionError(f"no row has a shape for {path}")
        return tuple(self.sizes[name] for name in names)


def _behind(prefix: str, site: Site) -> Site:
    """Return the site of a module in the layer with this prefix, given that of its path in a layer."""
    group, shares = site.mode_group, site.shares
    placed = site._replace(
        module=prefix + site.module,
        mode_group=prefix + group if group else None,
        shares=prefix + shares if shares else None,
    )
    return placed._replace(aliases=tuple(prefix + alias for alias in site.aliases)) if site.aliases else placed
