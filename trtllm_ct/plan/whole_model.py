"""Apply the conditions that an engine's model class sets for all modules together, after each of them has got a mode.

Some classes refuse a configuration with entries for single modules, so the whole model has one mode. Some allocate a
few Linears in the global mode, before they look at entries and exclusions: if all modules have the same mode, these
Linears have it too; otherwise they are plain, and all other modules have entries. Some read the input scale of a
Linear by the global mode, although it is plain, which entries for all modules prevent.
Sources: the rows in `plan/models/`; for the form with entries TensorRT-LLM `_torch/models/modeling_utils.py:
apply_layerwise_quant_config`, where MIXED_PRECISION itself quantizes nothing.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.assign import Assignment
from trtllm_ct.plan.engine_config import layer_config
from trtllm_ct.plan.models.site_rules import ends_with

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.plan.assign import Candidate
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["as_class_accepts", "fusion_warnings", "needs_entries"]

_HEAD = "the engine's class has one mode, and a quantized head needs an entry of its own"
_EARLY = "the engine's class builds this Linear in the mode of the whole model, which has several"


def as_class_accepts(
    assignments: Mapping[str, Assignment], candidates: Mapping[str, Candidate], sites: Sequence[Site], model: Model
) -> dict[str, Assignment]:
    """Return the assignments with those modules dequantized that the model's class can't read beside the others.

    `sites` are all sites of the model, with the shapes of their weights.
    """
    settled = dict(assignments)
    if model.row.one_mode:
        settled = _in_one_mode(settled, candidates, sites)
    early = {site.module for site in sites if site.early}
    if early:
        settled = _with_early(settled, early, sites)
    return settled


def needs_entries(layers: Mapping[str, LayerQuantConfig | None], sites: Sequence[Site], model: Model) -> bool:
    """Whether the engine must get an entry for each quantized module although all have one mode.

    It must if its class asks for them (`ClassRow.entries`), or if a Linear is plain that would be built in the mode of
    the whole model, or whose input scale would be read. `layers` has the mode of every module, None for a plain one.
    """
    if model.row.entries or (_without_input_scales(layers, model) and not model.row.one_mode):
        return True
    return any(site.early and layers.get(site.module) is None for site in sites)


def fusion_warnings(modules: Sequence[ModulePlan], model: Model) -> tuple[str, ...]:
    """Return the warning about plain Linears whose input scale a class may read that refuses entries; empty if none."""
    eager = model.row.eager
    plain = _without_input_scales({module.name: module.layer for module in modules}, model)
    if eager is None or not plain or not model.row.one_mode:
        return ()
    reads = f"some versions of {model.name} read the input scale of {len(plain)} plain Linears ({plain[0]}, ...)"
    return (f"{reads} if there are several tensor-parallel ranks, and stop: set {eager.switch}=1 then",)


def _without_input_scales(layers: Mapping[str, LayerQuantConfig | None], model: Model) -> list[str]:
    """Return the plain Linears whose input scale the class reads by the only mode of the model."""
    eager = model.row.eager
    algos = {layer.quant_algo for layer in layers.values() if layer is not None}
    if eager is None or len(algos) != 1 or model.sizes.get("hidden", eager.hidden_above + 1) <= eager.hidden_above:
        return []
    paths = eager.paths.get(algos.pop(), ())
    return [name for name, layer in layers.items() if layer is None and ends_with(name, paths)]


def _in_one_mode(
    assignments: dict[str, Assignment], candidates: Mapping[str, Candidate], sites: Sequence[Site]
) -> dict[str, Assignment]:
    """Return the assignments with one mode: the one that most elements have, of those that the class accepts."""
    settled = _with_plain_head(assignments, sites)
    elements: dict[LayerQuantConfig, int] = {}
    for name, assignment in settled.items():
        if assignment.holding is not None:
            layer = layer_config(assignment.holding)
            elements[layer] = elements.get(layer, 0) + prod(candidates[name].weight.shape or ())
    accepted = [layer for layer in elements if not _uneven_blocks(layer, sites)]
    best = max(accepted, key=lambda layer: elements[layer], default=None)
    if len(elements) == 1 and best is not None:
        return settled
    result = {}
    for name, assignment in settled.items():
        own = layer_config(assignment.holding) if assignment.holding else None
        result[name] = assignment if own in {None, best} else _plain(_why_another(own, best, sites))
    return result


def _why_another(layer: LayerQuantConfig | None, best: LayerQuantConfig | None, sites: Sequence[Site]) -> str:
    """Return why a class with one mode, which is `best`, can't have a module in the mode of `layer`."""
    uneven = _uneven_blocks(layer, sites) if layer is not None else ""
    other = best.quant_algo if best is not None and best != layer else None
    return uneven or f"the engine's class has one mode for the whole model, and most of it is {other}"


def _uneven_blocks(layer: LayerQuantConfig, sites: Sequence[Site]) -> str:
    """Return why a class refuses a group size; empty if it doesn't.

    It asserts that blocks of the group size divide the rows of parts that it may give to fewer ranks, quantized or not
    (`_torch/models/modeling_glm.py` and `modeling_deepseekv3.py: _compute_mlp_tp_size, _compute_shared_expert_tp_size`,
    8f5bb1e0).
    """
    rows = {site.shape[0] for site in sites if site.ranks_vary and site.cut is Cut.COLUMN and site.shape}
    uneven = sorted(row for row in rows if layer.group_size and row % layer.group_size)
    return f"the engine's class asks for whole groups of {layer.group_size} in {uneven[0]} rows" if uneven else ""


def _with_early(assignments: dict[str, Assignment], early: set[str], sites: Sequence[Site]) -> dict[str, Assignment]:
    """Return the assignments with the early Linears in the only mode of the model, or else plain."""
    alike = _with_plain_head(assignments, sites)
    modes = {layer_config(assignment.holding) for assignment in alike.values() if assignment.holding is not None}
    quantized = {name for name in early if name in alike and alike[name].holding is not None}
    if len(modes) <= 1 and quantized == early:
        return alike
    return {**assignments, **dict.fromkeys(quantized, _plain(_EARLY))}


def _with_plain_head(assignments: dict[str, Assignment], sites: Sequence[Site]) -> dict[str, Assignment]:
    """Return the assignments without a quantized head, which has an entry of its own in any model."""
    heads = [site.module for site in sites if site.head]
    return assignments | {
        name: _plain(_HEAD) for name in heads if name in assignments and assignments[name].holding is not None
    }


def _plain(reason: str) -> Assignment:
    return Assignment(holding=None, reason=reason)
