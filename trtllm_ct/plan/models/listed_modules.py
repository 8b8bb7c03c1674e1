"""The modules that a model must have by the row of its class, with the sizes in config.json.

So a checkpoint that lacks a module, or whose weights have other sizes, is refused before any weight is read, whatever
its other layers have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_row import PROJECTION_NAMES, entry_of
from trtllm_ct.plan.models.expert_spellings import STACKED_EXPERTS
from trtllm_ct.plan.models.site import Site
from trtllm_ct.plan.models.site_rules import SiteRules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trtllm_ct.plan.models.class_row import Leaves
    from trtllm_ct.plan.models.sites import Model

__all__ = ["listed_sites"]

_NORM = "RMSNorm"


def listed_sites(model: Model, leaves: Leaves, place: tuple[str, str]) -> Iterator[Site]:
    """Yield every module that must have a weight, in the order of the model; a tied head has none.

    `place` is the prefix of the text model's body and the name of its head.
    """
    body, head = place
    rules = SiteRules(model.row)
    table = (model.vocabulary, model.sizes["hidden"])
    # Some writers store the weight of a tied head only under the name of the head.
    yield rules.table(f"{body}embed_tokens", table)._replace(aliases=(head,) if model.tied else ())
    attention = [_norm(model, path) for path in leaves.norms]
    attention += [_linear(model, rules, path) for path in leaves.attention]
    dense = [_linear(model, rules, path) for path in leaves.mlp]
    sparse = _with_experts(model, rules, leaves) if model.row.router else dense
    for layer in range(model.layers):
        for site in (*attention, *(dense if layer in model.dense_layers else sparse)):
            yield _behind(f"{body}layers.{layer}.", site)
    yield Site(module=f"{body}norm", class_name=_NORM, shape=(model.sizes["hidden"],))
    if not model.tied:
        # For draft layers, engines may slice the weight of the head as a plain one (`_torch/modules/embedding.py:
        # LMHead.forward`, pull request 16511).
        yield rules.head(head, table)._replace(plain=model.draft_layers > 0)


def _with_experts(model: Model, rules: SiteRules, leaves: Leaves) -> list[Site]:
    """Return the router, shared experts and routed experts of a layer, in this order.

    All routed experts of a layer are in one mode group. Those that a class reads from one tensor are plain: the tensors
    of a mode are described for experts one by one.
    """
    sites = [_linear(model, rules, path) for path in (model.row.router, *leaves.shared)]
    shapes = [_shape(model, f"experts.{name}") for name in PROJECTION_NAMES]
    for number in range(model.sizes["experts"]):
        for projection, shape in enumerate(shapes):
            expert = rules.expert(model.row.experts, number, projection, shape)
            sites.append(expert._replace(plain=model.text_type in STACKED_EXPERTS))
    return sites


def _linear(model: Model, rules: SiteRules, path: str) -> Site:
    """Return the site of a Linear by its path in a layer."""
    bias = ("bias",) if entry_of(model.row.biases, path) in model.biases else ()
    site = rules.linear(path, _shape(model, path), bias + (entry_of(model.row.extras, path) or ()))
    return site._replace(
        heads=model.kv_heads if site.cut is Cut.KV_HEADS else None,
        parts=tuple(model.sizes[size] for size in entry_of(model.row.splits, path) or ()),
    )


def _norm(model: Model, path: str) -> Site:
    return Site(module=path, class_name=_NORM, shape=_shape(model, path))


def _shape(model: Model, path: str) -> tuple[int, ...]:
    """Return the shape of the weight of a module by its path in a layer."""
    names = entry_of(model.row.shapes, path)
    if names is None:
        raise AssertionError(f"the row of {model.name} has no shape for {path}")
    return tuple(model.sizes[name] for name in names)


def _behind(prefix: str, site: Site) -> Site:
    """Return the site of a module in the layer with this prefix, given that of its path in a layer."""
    group, shares = site.mode_group, site.shares
    placed = site._replace(
        module=prefix + site.module,
        mode_group=prefix + group if group else None,
        shares=prefix + shares if shares else None,
    )
    return placed._replace(aliases=tuple(prefix + alias for alias in site.aliases)) if site.aliases else placed
