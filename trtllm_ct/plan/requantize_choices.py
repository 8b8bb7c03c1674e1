"""`choices`: what requantizing on request would make of modules that are dequantized, with its price."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element
from trtllm_ct.engine.requantization import FORMS, Requantize
from trtllm_ct.plan.requantize import requantized
from trtllm_ct.plan.requantize_choice import Choice

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.engine.holdings import Holding
    from trtllm_ct.engine.requantization import Form
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.assign import Assignment, Candidate
    from trtllm_ct.plan.models.sites import Site

__all__ = ["choices"]


def choices(
    assignments: Mapping[str, Assignment],
    candidates: Mapping[str, Candidate],
    sites: Iterable[Site],
    target: Target,
    itemsize: int,
) -> tuple[Choice, ...]:
    """Return the options that would keep dequantized modules in codes: experts first, and small forms first.

    `itemsize` is that of dequantized weights.
    """
    alike = _alike(assignments, candidates, sites)
    found: list[Choice] = []
    for what, expert in (("experts", True), ("linears", False)):
        groups = [(members, count) for members, count in alike if members[0].expert is expert]
        options = (_choice(what, form, groups, assignments, candidates, target, itemsize) for form in FORMS.values())
        found += sorted(filter(None, options), key=lambda choice: choice.coded_bytes / choice.dense_bytes)
    return tuple(found)


def _alike(
    assignments: Mapping[str, Assignment], candidates: Mapping[str, Candidate], sites: Iterable[Site]
) -> list[tuple[list[Site], int]]:
    """Return one group with dequantized modules of each kind, and how many there are.

    Groups are alike if their members have the same weights; plain members belong to a group too. A model has 10^4
    experts, and few different groups.
    """
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        groups[site.mode_group or site.module].append(site)
    dequantized = {name for name, assignment in assignments.items() if assignment.holding is None}
    kinds: dict[tuple[tuple[int | None, bool, int], ...], tuple[list[Site], int]] = {}
    for members in groups.values():
        names = [site.module for site in members]
        if dequantized.isdisjoint(names):
            continue
        weights = [found and id(found.weight) for found in map(candidates.get, names)]
        key = tuple([(weight, site.expert, id(site.limit)) for weight, site in zip(weights, members, strict=True)])
        first, count = kinds.get(key, (members, 0))
        kinds[key] = first, count + 1
    return list(kinds.values())


def _choice(
    what: str,
    form: Form,
    groups: Iterable[tuple[list[Site], int]],
    assignments: Mapping[str, Assignment],
    candidates: Mapping[str, Candidate],
    target: Target,
    itemsize: int,
) -> Choice | None:
    """Return what one option would make of groups of modules; None if no kernel holds any of them then."""
    modules = dense = coded = 0
    held: Holding | None = None
    for members, count in groups:
        names = [site.module for site in members if site.module in candidates]
        made = requantized(
            {name: assignments[name] for name in names},
            {name: candidates[name] for name in names},
            members,
            target,
            Requantize(experts=form) if what == "experts" else Requantize(linears=form),
        )
        for name in names:
            holding, shape = made[name].holding, candidates[name].weight.shape
            if made[name].form is not None and holding is not None and shape is not None:
                held = holding
                modules += count
                dense += count * prod(shape) * itemsize
                coded += count * _coded_bytes(shape, holding, form, candidates[name])
    if held is None:
        return None
    return Choice(
        what=what,
        form=form,
        mode=held.mode.algo,
        activations=str(held.mode.activations),
        modules=modules,
        dense_bytes=dense,
        coded_bytes=coded,
    )


def _coded_bytes(shape: tuple[int, int], holding: Holding, form: Form, candidate: Candidate) -> int:
    """Return the bytes of codes and scales of a weight [N, K], as `deliver.requantized` delivers them."""
    site, dtype = candidate.site, candidate.weight.model_dtype or DType.BF16
    codes = prod(shape) // (1 if form.element is Element.E4M3 else 2)
    scales = prod(holding.mode.scale_shape(shape, holding.group_size)) * form.scale_dtype.itemsize
    names = 2 if (site.expert or site.class_joins) and holding.mode.expert_scale_alias else 1
    scalar = DType.F32.itemsize if form.scale_dtype is DType.F8_E4M3 else 0
    if form.input_divisor is not None:
        scalar += DType.F32.itemsize
    if form.keeps_codes:
        scalar += len(holding.mode.unit_scalars) * DType.F32.itemsize
        scalar += shape[1] * dtype.itemsize if holding.mode.pre_quant_scale and not site.fused else 0
    return codes + names * scales + scalar
