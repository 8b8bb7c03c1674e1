"""Which mode each quantized module gets at a target.

A module alone takes the mode that holds it as it is. Modules that the engine treats as one (q/k/v, gate/up, all routed
experts of a layer) must end in one mode: scales may be repeated to reach it, since that changes no value; where no
common mode exists, all of them are dequantized. Under tensor parallelism a mode must hold every rank's slice, and
scales may be repeated for that as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.engine.holdings import Holding, Weight, holdings, obstacles, slice_obstacle

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trtllm_ct.config.quantization_config import Transform
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.equalize import Equalized, Part
    from trtllm_ct.plan.models.sites import Site

__all__ = ["DENSE_OUTPUT", "Assignment", "Candidate", "assign_modes", "candidates_of", "dense_outputs", "fold_reason"]

DENSE_OUTPUT = "dense_o_proj: attention would quantize its output at a fixed scale of 1"
"""Why row-wise FP8 output projections of attention are dequantized on request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The mode of one module, or None with the reason why it is dequantized."""

    holding: Holding | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A quantized module on its way to a mode.

    `folded` says why it is plain in any case: what its weight takes in. `unequal` says why it shares no scalar with the
    other parts of its Linear, which modes with one for all parts need.
    """

    site: Site
    weight: Weight
    folded: str = ""
    unequal: str = ""


def candidates_of(parts: Iterable[Part], equalized: Mapping[str, Equalized]) -> dict[str, Candidate]:
    """What decides the mode of each part, from its place in the model and its stored weight, by module.

    Parts that share their `QuantizedWeight` share their `Weight` too.
    """
    weights: dict[tuple[int, bool], Weight] = {}
    found = {}
    for part in parts:
        kind = (id(part.weight), part.site.fused)
        if kind not in weights:
            weights[kind] = _weight_of(part)
        found[part.site.module] = Candidate(
            site=part.site,
            folded=fold_reason(part.module.transforms),
            unequal=equalized[part.site.module].obstacle if part.site.module in equalized else "",
            weight=weights[kind],
        )
    return found


def _weight_of(part: Part) -> Weight:
    stored = part.weight.stored
    two_level = stored.divisor is not None
    scale = part.module.specs.get("weight_scale")
    return Weight(
        scheme=part.weight.scheme,
        element=stored.element,
        shape=stored.shape,
        has_zero_point=stored.has_zero_point,
        permuted=stored.group_index is not None,
        fused=part.site.fused,
        two_level=two_level,
        exponent_scale=not two_level and scale is not None and scale.dtype in {DType.U8, DType.F8_E8M0},
    )


def assign_modes(candidates: Mapping[str, Candidate], sites: Iterable[Site], target: Target) -> dict[str, Assignment]:
    """The assignment of every quantized module by name. `sites` tell which modules must agree."""
    each = _assigned_alone(candidates, target)
    assigned: dict[str, Assignment] = {}
    groups: dict[str, list[Site]] = {}
    for site in sites:
        if site.mode_group is not None:
            groups.setdefault(site.mode_group, []).append(site)
        elif site.module in candidates:
            assigned[site.module] = each[site.module]
    for name, members in groups.items():
        assigned |= _assign_group(name, members, candidates, each, target)
    return assigned


def _assigned_alone(candidates: Mapping[str, Candidate], target: Target) -> dict[str, Assignment]:
    """The assignment of each candidate as if it were in no group; those with one `Weight` are looked at once."""
    known: dict[tuple[object, ...], Assignment] = {}
    assigned = {}
    for name, own in candidates.items():
        kind = (id(own.weight), own.folded, own.unequal, own.site.plain, own.site.expert)
        if kind not in known:
            known[kind] = _assign_one(own, target)
        assigned[name] = known[kind]
    return assigned


def dense_outputs(assignments: Mapping[str, Assignment]) -> dict[str, Assignment]:
    """The same with every row-wise FP8 output projection of attention dequantized, and nothing else.

    Row-wise FP8 has no input scale; an engine's attention that quantizes its own output then takes 1.
    Source: TensorRT-LLM `_torch/modules/attention.py` and `linear.py`.
    """
    dense = Assignment(holding=None, reason=DENSE_OUTPUT)
    return {
        module: dense if module.endswith(".self_attn.o_proj") and _row_wise(assignment) else assignment
        for module, assignment in assignments.items()
    }


def _row_wise(assignment: Assignment) -> bool:
    holding = assignment.holding
    return holding is not None and holding.mode.unscaled_attention_output


def fold_reason(transforms: Sequence[Transform]) -> str:
    """What transforms that run beside a module have to do with its weight; empty without any."""
    if not transforms:
        return ""
    names = " and ".join(dict.fromkeys(str(transform) for transform in transforms))
    return f"the online transform {names} is folded into the weight"


def _assign_one(module: Candidate, target: Target) -> Assignment:
    if module.folded:
        return Assignment(holding=None, reason=module.folded)
    if module.site.plain and target.holds_codes:
        return Assignment(holding=None, reason="engines read this module plain")
    first = next((holding for holding in _held(module, target) if holding.as_is), None)
    if first is None and module.weight.slices is not None:
        finer = _in_finer_groups(module, target)
        if finer is not None:
            return Assignment(holding=finer, reason="scales repeated so that each rank has whole groups")
    return Assignment(holding=first, reason="" if first else _why_not(module, target))


def _in_finer_groups(module: Candidate, target: Target) -> Holding | None:
    """A mode that holds the whole weight as it is, and slices of it in smaller groups only; None without one."""
    whole = _held(replace(module, weight=replace(module.weight, slices=None)), target)
    algos = {holding.mode.algo for holding in whole if holding.as_is}
    return next((holding for holding in _held(module, target) if holding.mode.algo in algos), None)


def _assign_group(
    name: str,
    members: Sequence[Site],
    candidates: Mapping[str, Candidate],
    alone: Mapping[str, Assignment],
    target: Target,
) -> dict[str, Assignment]:
    """One mode for all members of a group; nothing when none is quantized. `alone` has what each gets by itself.

    Reasons name the group by its last part, so that they read the same in every layer.
    """
    name = name.rpartition(".")[2]
    quantized = {site.module: candidates[site.module] for site in members if site.module in candidates}
    plain = [site.module for site in members if site.module not in candidates]
    each = {module: alone[module] for module in quantized}
    agree = len({assignment.holding.key if assignment.holding else None for assignment in each.values()}) <= 1
    if agree and not plain:
        return each
    obstacle = _group_obstacle(plain, quantized)
    if not obstacle:
        common = _common_mode(name, quantized, target)
        if common:
            return common
        obstacle = _no_common_mode(quantized, target)
    reason = f"{name} has one mode for all its parts, and {obstacle}"
    return {module: _plain_because(assignment, reason) for module, assignment in each.items()}


def _group_obstacle(plain: Sequence[str], quantized: Mapping[str, Candidate]) -> str:
    """Why the members of a group can't share a quantized mode, whatever modes there are; empty when they may."""
    if plain:
        return f"{_some(plain)} stored plain"
    for candidate in quantized.values():
        if candidate.folded or candidate.unequal:
            return f"of another one {candidate.folded}" if candidate.folded else candidate.unequal
    return ""


def _common_mode(name: str, quantized: Mapping[str, Candidate], target: Target) -> dict[str, Assignment]:
    """The mode that every member can be held in and that the most hold as they are; nothing when there is none.

    Ties are broken by the order of LINEAR_MODES and of the group sizes in it.
    """
    options = {
        module: {holding.key: holding for holding in _held(candidate, target)}
        for module, candidate in quantized.items()
    }
    first = next(iter(options.values()))
    common = [key for key in first if all(key in option for option in options.values())]
    if not common:
        return {}
    best = max(common, key=lambda key: sum(option[key].as_is for option in options.values()))
    reason = f"scales repeated so that {name} has one mode"
    return {
        module: Assignment(holding=option[best], reason="" if option[best].as_is else reason)
        for module, option in options.items()
    }


def _no_common_mode(quantized: Mapping[str, Candidate], target: Target) -> str:
    """Why the members of a group share no mode: the slices of one of them, or their schemes."""
    for module, candidate in quantized.items():
        slices = slice_obstacle(candidate.weight, target.algos(expert=candidate.site.expert))
        if slices:
            return f"{module.rpartition('.')[2]}: {slices}"
    schemes = sorted({candidate.weight.scheme.label() for candidate in quantized.values()})
    return f"theirs share none ({'; '.join(schemes)})"


def _held(module: Candidate, target: Target) -> list[Holding]:
    """The modes of the target that hold a weight, those that take it as it is first."""
    algos = target.algos(expert=module.site.expert)
    held = [holding for holding in holdings(module.weight) if holding.mode.algo in algos]
    return [holding for holding in held if not holding.mode.shared_scalars] if module.unequal else held


def _why_not(module: Candidate, target: Target) -> str:
    """Why no mode of a target holds a weight as it is."""
    if not target.holds_codes:
        return f"target {target.name} holds plain weights only"
    if module.unequal:
        return module.unequal
    expert = module.site.expert
    cut = slice_obstacle(module.weight, target.algos(expert=expert))
    if cut is not None:
        return cut
    what = "expert kernel" if expert else "Linear"
    held = [holding.mode.algo for holding in holdings(module.weight) if holding.as_is]
    for later in target.newer:
        algo = next((algo for algo in held if algo in (later.experts if expert else later.linear)), None)
        if algo is not None:
            return f"{target.capabilities.name} has no {algo} {what}; {later.name} has one"
    if held:
        return f"{' or '.join(held)} would hold it, and {target.capabilities.name} has no such {what}"
    reasons = obstacles(module.weight, target.algos(expert=expert))
    return "; ".join(reasons) or f"{target.capabilities.name} has no {what} for {module.weight.args.label()} weights"


def _plain_because(own: Assignment, reason: str) -> Assignment:
    """Dequantized for the sake of a group, unless the module had a reason of its own."""
    return Assignment(holding=None, reason=reason if own.holding is not None else own.reason)


def _some(modules: Sequence[str]) -> str:
    """The last parts of their names, each once, with the verb."""
    leaves = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    return ", ".join(leaves) + (" is" if len(modules) == 1 else " are")
