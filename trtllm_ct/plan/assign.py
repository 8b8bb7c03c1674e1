"""Assign a mode to each quantized module for a target.

A module that is in no group gets the first mode that holds its weight unchanged, or else the first one that holds it
with repeated scales, which changes no value. Modules that the engine treats as one (q/k/v, gate/up, all routed experts
of a layer) form a group and must get the same mode. Scales may be repeated to reach a common mode too; where no common
mode exists, the whole group is dequantized. Under tensor parallelism a mode must hold every rank's slice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.dtypes import DType
from trtllm_ct.engine.holdings import Holding, Weight, activations_of, holdings, obstacles, slice_obstacle
from trtllm_ct.engine.modes import LINEAR_MODES, Activations, ScaleForm
from trtllm_ct.engine.platform import SMS
from trtllm_ct.plan.attention_output import unscaled_outputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.config.quantization_config import Transform
    from trtllm_ct.engine.releases import Release
    from trtllm_ct.engine.requantization import Form
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.equalize import Equalized, Part
    from trtllm_ct.plan.models.sites import Site

__all__ = ["DENSE_OUTPUT", "Assignment", "Candidate", "assign_modes", "candidates_of", "dense_outputs", "fold_reason"]

DENSE_OUTPUT = "dense_o_proj: attention would quantize its output at a fixed scale of 1"
"""The reason that is given for output projections of attention which are dequantized on request."""

_CLASS_JOINS = frozenset(mode.algo for mode in LINEAR_MODES if mode.class_joins_scales)
_PLAIN = "engines read this module plain"
_STACKED = "the class of the model reads its experts from one plain tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The mode of one module, or None with the reason why it is dequantized.

    With `form`, the mode holds the weight only after it was rounded to that form.
    """

    holding: Holding | None
    reason: str = ""
    form: Form | None = None


class Candidate(NamedTuple):
    """A quantized module, and what decides its mode.

    `folded` names the transforms that are folded into the weight, which is then dequantized whatever the target; empty
    without any. `unequal` says why the module's global scale can't be made equal to that of the other parts of its
    fused Linear; modes with `shared_scalars` are then ruled out. It is empty when nothing prevents it.
    """

    site: Site
    weight: Weight
    folded: str = ""
    unequal: str = ""


def candidates_of(
    parts: Iterable[Part], equalized: Mapping[str, Equalized], dtype: DType | None = None
) -> dict[str, Candidate]:
    """Return the candidate for each part by module name, made from its site and its stored weight.

    `dtype` is the dtype of the model at the target, None for a target whose modes take every dtype.

    Parts that share one `QuantizedWeight` object also share one `Weight` object, if nothing else about them that
    decides a mode differs.
    """
    linears: dict[str, list[Part]] = {}
    for part in parts:
        linears.setdefault(part.site.shares or part.site.module, []).append(part)
    weights: dict[tuple[object, ...], Weight] = {}
    candidates = {}
    for members in linears.values():
        bias = any("bias" in part.module.specs for part in members)
        flags = [_is_fused(part.site, members) for part in members]
        names = tuple(
            [part.site.module.rpartition(".")[2] for part, fused in zip(members, flags, strict=True) if fused]
        )
        for part, fused in zip(members, flags, strict=True):
            fused_parts = names if fused else ()
            key = (id(part.weight), fused, part.site.expert, bias, fused_parts)
            weight = weights.get(key)
            if weight is None:
                weight = weights[key] = replace(
                    _weight_of(part), fused=fused, bias=bias, fused_parts=fused_parts, model_dtype=dtype
                )
            folded = fold_reason(part.module.transforms)
            unequal = equalized[part.site.module].obstacle if part.site.module in equalized else ""
            candidates[part.site.module] = Candidate(part.site, weight, folded, unequal)
    return candidates


def _is_fused(site: Site, members: Sequence[Part]) -> bool:
    """Whether the rows of a weight follow those of another part in one tensor of the engine.

    Gate and up of an expert do too: they are the two halves of `w3_w1_weight`, with one tensor of scales
    (TensorRT-LLM `_torch/modules/fused_moe/quantization.py: load_expert_w3_w1_weight`). An expert without a gate has
    one half only.
    """
    return site.fused or (site.expert and len(members) > 1)


def _weight_of(part: Part) -> Weight:
    """Return what decides the mode of a stored weight, without what the other parts of a fused Linear add to it."""
    stored = part.weight.stored
    two_level = stored.divisor is not None
    scale = part.module.specs.get(stored.scale)
    return Weight(
        scheme=part.weight.scheme,
        element=stored.element,
        shape=stored.shape,
        has_zero_point=stored.has_zero_point,
        permuted=stored.group_index is not None,
        expert=part.site.expert,
        scale_dtype=scale.dtype if scale is not None else None,
        two_level=two_level,
        exponent_scale=not two_level and scale is not None and scale.dtype in {DType.U8, DType.F8_E8M0},
    )


def assign_modes(candidates: Mapping[str, Candidate], sites: Iterable[Site], target: Target) -> dict[str, Assignment]:
    """Return the assignment of every quantized module by name.

    Sites with the same `mode_group` get one mode.
    """
    alone = _assign_alone(candidates, target)
    assigned: dict[str, Assignment] = {}
    groups: dict[str, list[Site]] = {}
    for site in sites:
        if site.mode_group is not None:
            groups.setdefault(site.mode_group, []).append(site)
        elif site.module in candidates:
            assigned[site.module] = alone[site.module]
    for name, members in groups.items():
        assigned |= _assign_group(name, members, candidates, alone, target)
    # Equal assignments are one object, so that what follows from them is decided once (`ModelModules`).
    known: dict[tuple[int, str], Assignment] = {}
    return {name: known.setdefault((id(made.holding), made.reason), made) for name, made in assigned.items()}


def _assign_alone(candidates: Mapping[str, Candidate], target: Target) -> dict[str, Assignment]:
    """Return the assignment that each candidate would get if it were in no group.

    Candidates that share their `Weight` object and their other properties are decided once.
    """
    decided: dict[tuple[object, ...], Assignment] = {}
    assigned = {}
    for name, candidate in candidates.items():
        site = candidate.site
        key = (
            id(candidate.weight),
            candidate.folded,
            candidate.unequal,
            site.plain,
            site.expert,
            site.head,
            site.class_cuts,
            # A limit belongs to a row, and its hash takes longer than all the rest.
            id(site.limit),
            site.class_joins,
            site.mode_group is None,
        )
        if key not in decided:
            decided[key] = _assign_one(candidate, target)
        assigned[name] = decided[key]
    return assigned


def dense_outputs(
    assignments: Mapping[str, Assignment],
    sites: Iterable[Site],
    kv_cache: str | None,
    *,
    architecture: str,
    release: Release | None,
) -> dict[str, Assignment]:
    """Return the assignments with those output projections dequantized that `unscaled_outputs` names.

    `sites` are all sites of the model, and `kv_cache` is the KV cache's mode in the engine, whose release is `release`.
    `architecture` is the model's class.
    """
    holdings_by_name = {name: assignment.holding for name, assignment in assignments.items()}
    modes = {site.module: holdings_by_name.get(site.module) for site in sites}
    algos = {name: holding.mode.algo if holding else None for name, holding in modes.items()}
    dense = Assignment(holding=None, reason=DENSE_OUTPUT)
    outputs = unscaled_outputs(algos, kv_cache, architecture=architecture, release=release)
    return {**assignments, **dict.fromkeys(outputs, dense)}


def fold_reason(transforms: Sequence[Transform]) -> str:
    """Return why online transforms force a module to be dequantized; empty without transforms."""
    if not transforms:
        return ""
    names = " and ".join(dict.fromkeys(str(transform) for transform in transforms))
    return f"the online transform {names} is folded into the weight"


def _assign_one(module: Candidate, target: Target) -> Assignment:
    """Return the assignment of a module that is in no group."""
    if module.folded:
        return Assignment(holding=None, reason=module.folded)
    if target.holds_codes and (module.site.plain or not _has_head_mode(module, target)):
        return Assignment(holding=None, reason=_STACKED if module.site.expert else _PLAIN)
    held = _held(module, target)
    first = next((holding for holding in held if holding.as_is), None)
    if first is not None or not held:
        return Assignment(holding=first, reason="" if first else _why_not(module, target))
    finer = _in_finer_groups(module, held, target)
    if finer is not None:
        return Assignment(holding=finer, reason="scales repeated so that each rank has whole groups")
    return Assignment(holding=held[0], reason=_why_repeated(module, held[0], target))


def _has_head_mode(module: Candidate, target: Target) -> bool:
    """Whether heads of this release or a later one have a mode with such codes; true for any other module."""
    if not module.site.head:
        return True
    return any(
        obstacles(module.weight, release.head, release.platform)
        or any(held.mode.algo in release.head for held in holdings(module.weight, release.platform))
        for release in (target.capabilities, *target.newer)
    )


def _in_finer_groups(module: Candidate, held: Sequence[Holding], target: Target) -> Holding | None:
    """Return a mode that holds the whole weight unchanged, but each rank's slice only in smaller groups; else None.

    `held` are the modes that hold each rank's slice, none of them unchanged.
    """
    if module.weight.slices is None:
        return None
    whole = _held(module._replace(weight=replace(module.weight, slices=None)), target)
    algos = {holding.mode.algo for holding in whole if holding.as_is}
    return next((holding for holding in held if holding.mode.algo in algos), None)


def _why_repeated(module: Candidate, holding: Holding, target: Target) -> str:
    """Return why a module gets a mode that holds its weight with repeated scales only."""
    reason = f"scales repeated for groups of {holding.group_size}"
    strategy, platform = module.weight.args.strategy, target.capabilities.platform
    held = {held.mode.algo for held in holdings(module.weight, platform)}
    others = frozenset(mode.algo for mode in LINEAR_MODES if strategy in mode.exact) & _algos(module, target) - held
    return ": ".join([reason, *obstacles(module.weight, others, platform)[:1]])


def _assign_group(
    name: str,
    members: Sequence[Site],
    candidates: Mapping[str, Candidate],
    alone: Mapping[str, Assignment],
    target: Target,
) -> dict[str, Assignment]:
    """Return the assignments of a group's quantized members, all with one mode; empty when none is quantized.

    `alone` has the assignments that the members would get outside of a group. Reasons name the group by the last part
    of its name, so that they are the same in every layer.
    """
    name = name.rpartition(".")[2]
    quantized = {site.module: candidates[site.module] for site in members if site.module in candidates}
    plain = [site.module for site in members if site.module not in candidates]
    assignments = {module: alone[module] for module in quantized}
    keys = {assignment.holding.key if assignment.holding else None for assignment in assignments.values()}
    obstacle = _group_obstacle(plain, quantized)
    dequantized = len(keys) > 1 or None in keys
    hint = _other_sms(quantized.values(), target) if dequantized and not obstacle else ""
    if len(keys) <= 1 and not plain:
        if not hint:
            return assignments
        # Members that are alike keep sharing one object.
        hinted = {id(assignment): _with_hint(assignment, hint) for assignment in assignments.values()}
        return {module: hinted[id(assignment)] for module, assignment in assignments.items()}
    if not obstacle:
        common = _common_mode(name, quantized, target)
        if common:
            return common
        obstacle = _no_common_mode(quantized, alone, target)
    reason = f"{name} has one mode for all its parts, and {obstacle}"
    return {module: _with_hint(_plain_because(assignment, reason), hint) for module, assignment in assignments.items()}


def _group_obstacle(plain: Sequence[str], quantized: Mapping[str, Candidate]) -> str:
    """Return why the members of a group can't share any quantized mode, whatever the target; empty if they may."""
    if plain:
        return f"{_leaves_with_verb(plain)} stored plain"
    for candidate in quantized.values():
        if candidate.folded or candidate.unequal:
            return f"{candidate.folded} of another part" if candidate.folded else candidate.unequal
    return ""


def _common_mode(name: str, quantized: Mapping[str, Candidate], target: Target) -> dict[str, Assignment]:
    """Return assignments with a mode that holds every member; empty when there is none.

    Of several such modes the one is taken that holds the most members unchanged. Ties are broken by the order of
    LINEAR_MODES and of the group sizes in each mode.
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


def _no_common_mode(quantized: Mapping[str, Candidate], alone: Mapping[str, Assignment], target: Target) -> str:
    """Return why the members of a group share no mode: one member's slices, one that has no mode, or their schemes."""
    for module, candidate in quantized.items():
        slices = slice_obstacle(candidate.weight, _algos(candidate, target), target.capabilities.platform)
        if slices:
            return f"{module.rpartition('.')[2]}: {slices}"
    schemes = sorted({candidate.weight.scheme.label() for candidate in quantized.values()})
    without = next((module for module in quantized if alone[module].holding is None), None)
    if len(schemes) == 1 and without is not None:
        return f"{without.rpartition('.')[2]} has none: {alone[without].reason}"
    return f"their schemes have no mode in common ({'; '.join(schemes)})"


def _algos(module: Candidate, target: Target) -> frozenset[QuantAlgo]:
    """Return the modes in which a module may be delivered."""
    algos = target.algos(expert=module.site.expert, head=module.site.head)
    if module.site.limit is not None and target.capabilities.release is not None:
        algos &= module.site.limit.algos
    return algos & _CLASS_JOINS if module.site.class_joins else algos


def _held(module: Candidate, target: Target) -> list[Holding]:
    """Return the modes of the target that hold a weight; those that hold it unchanged come first."""
    algos = _algos(module, target)
    held = [holding for holding in holdings(module.weight, target.capabilities.platform) if holding.mode.algo in algos]
    if module.unequal:
        held = [holding for holding in held if not holding.mode.shared_scalars]
    release = target.capabilities.release
    if release is None or not module.site.class_cuts:
        return held
    # Row scales are delivered as a column there, which a model class can cut by rows.
    cut = [holding for holding in held if holding.mode.cut_by_rows(release)]
    return [replace(holding, scale_column=holding.mode.scale is ScaleForm.ROW) for holding in cut]


def _uncut(module: Candidate, target: Target) -> list[QuantAlgo]:
    """Return the modes that would hold a weight if the engine's model class didn't cut it by rows."""
    release = target.capabilities.release
    if release is None or not module.site.class_cuts:
        return []
    algos = _algos(module, target)
    held = holdings(module.weight, target.capabilities.platform)
    modes = (holding.mode for holding in held if holding.as_is and holding.mode.algo in algos)
    return [mode.algo for mode in modes if not mode.cut_by_rows(release)]


def _beyond_limit(module: Candidate, target: Target) -> str:
    """Return why the engine's model class can't have the modes that would hold a weight; empty if it limits none."""
    limit = module.site.limit
    if limit is None:
        return ""
    algos = target.algos(expert=module.site.expert, head=module.site.head) - limit.algos
    held = holdings(module.weight, target.capabilities.platform)
    names = " or ".join(held.mode.algo for held in held if held.as_is and held.mode.algo in algos)
    return names and f"the engine's class {limit.obstacle} {names}"


def _why_not(module: Candidate, target: Target) -> str:
    """Return why no mode of a target holds a weight."""
    if not target.holds_codes:
        return f"target {target.name} holds plain weights only"
    if module.unequal and not module.site.class_joins:
        return module.unequal
    limit = module.site.limit
    if limit is not None and not limit.algos and target.capabilities.release is not None:
        return "the engine's class reads this Linear plain"
    uncut = _uncut(module, target)
    if uncut:
        return f"the engine's class cuts this Linear by rows, and can't cut the tensors of {' or '.join(uncut)}"
    limited = _beyond_limit(module, target)
    if limited:
        return limited
    reason = _why_not_joined(module, target) if module.site.class_joins else _why_not_here(module, target)
    # What would keep a member of a group depends on the whole group.
    return reason + (_other_sms([module], target) if module.site.mode_group is None else "")


def _why_not_joined(module: Candidate, target: Target) -> str:
    """Return why none of the modes that the engine's model class can join holds a weight."""
    joined = _algos(module, target)
    reason = f"the engine's class joins this Linear with another, and joins the scales of {' or '.join(joined)} only"
    return "; ".join([reason, *obstacles(module.weight, joined, target.capabilities.platform)])


def _why_not_here(module: Candidate, target: Target) -> str:
    """Return why no mode of the target holds a weight on its platform, and which later release has one that does."""
    algos, platform = _algos(module, target), target.capabilities.platform
    cut = slice_obstacle(module.weight, algos, platform)
    if cut is not None:
        return cut
    expert, head = module.site.expert, module.site.head
    what = "expert kernel" if expert else "head" if head else "Linear"
    for later in target.newer:
        later_algos = later.algos(expert=expert, head=head) - algos
        held = (holding.mode.algo for holding in holdings(module.weight, later.platform))
        algo = next((algo for algo in held if algo in later_algos), None)
        if algo is not None:
            return f"{target.capabilities.name} has no {algo} {what}; {later.name} has one"
    here = frozenset(held.mode.algo for held in holdings(module.weight)) & algos
    if here:
        return "; ".join(obstacles(module.weight, here, platform))
    elsewhere = [held.mode.algo for held in holdings(module.weight, platform) if held.as_is]
    if elsewhere:
        reason = f"{' or '.join(elsewhere)} would hold it, and {target.capabilities.name} has no such {what}"
        quantized = {activations_of(module.weight.scheme)} - {Activations.WIDE}
        close = frozenset(mode.algo for mode in LINEAR_MODES if mode.activations in quantized) & algos
        return "; ".join([reason, *obstacles(module.weight, close, platform)])
    # Of experts with 16-bit activations, modes that quantize them say too little: there is no kernel at all.
    wide = expert and activations_of(module.weight.scheme) is Activations.WIDE
    fitting = {mode.algo for mode in LINEAR_MODES if not wide or mode.activations is Activations.WIDE}
    reasons = obstacles(module.weight, algos & fitting, platform)
    return "; ".join(reasons) or f"{target.capabilities.name} has no {what} for {module.weight.args.label()} weights"


def _other_sms(modules: Iterable[Candidate], target: Target) -> str:
    """Return the SMs on which the target would hold all of these weights in one mode, as the end of a reason.

    Empty if there are none, if the engine's class reads one of them plain, or if the plan is made for an SM.
    """
    platform, modules = target.capabilities.platform, list(modules)
    if platform is None or platform.sm is not None or any(module.site.plain for module in modules):
        return ""
    weights = {(id(module.weight), module.unequal, module.site.class_cuts): module for module in modules}
    holding = []
    for sm in SMS:
        on_sm = replace(target, capabilities=replace(target.capabilities, platform=replace(platform, sm=sm)))
        options = [{held.key for held in _held(module, on_sm)} for module in weights.values()]
        if frozenset.intersection(*map(frozenset, options)):
            holding.append(f"--sm {sm}")
    return f"; kept with {' or '.join(holding)}" if holding else ""


def _with_hint(assignment: Assignment, hint: str) -> Assignment:
    """Return the assignment of a member of a group with a hint behind the reason why it is dequantized."""
    return assignment if assignment.holding else replace(assignment, reason=assignment.reason + hint)


def _plain_because(alone: Assignment, reason: str) -> Assignment:
    """Return the assignment of a member that is dequantized because of its group.

    A member that would be dequantized outside of the group too keeps the reason for that.
    """
    return Assignment(holding=None, reason=reason if alone.holding is not None else alone.reason)


def _leaves_with_verb(modules: Sequence[str]) -> str:
    """Return the last parts of the modules' names, each once, followed by "is" or "are"."""
    leaves = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    return ", ".join(leaves) + (" is" if len(modules) == 1 else " are")
