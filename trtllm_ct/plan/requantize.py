"""Give modes to modules that would be dequantized, if the user asks to have them requantized.

A requantized weight is planned like one that was stored so: `engine/requantization.py` says which scheme it has then.
Modules that a mode holds are never requantized, nor are those that engines read plain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.engine.holdings import deviation_of
from trtllm_ct.engine.requantization import NOT_REQUANTIZED
from trtllm_ct.plan.assign import Assignment, assign_modes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trtllm_ct.engine.holdings import Weight
    from trtllm_ct.engine.requantization import Form, Requantize
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.assign import Candidate
    from trtllm_ct.plan.models.sites import Site
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["refuse_requantization", "requantized", "unused_requests"]


def refuse_requantization(asked: Requantize, target: Target) -> None:
    """Raise `UsageError` if something is to be requantized for a target that has no kernels of the engine."""
    if asked != NOT_REQUANTIZED and target.capabilities.release is None:
        raise UsageError(
            Fault(
                where="--requantize",
                expected="a target for the PyTorch backend of TensorRT-LLM: modelopt, or LLM(...)",
                found=f"target {target.name}",
                remedy="Convert with --to modelopt, or leave --requantize out.",
            )
        )


def requantized(
    assignments: Mapping[str, Assignment],
    candidates: Mapping[str, Candidate],
    sites: Iterable[Site],
    target: Target,
    asked: Requantize,
) -> dict[str, Assignment]:
    """Return the assignments, with a mode for each dequantized module that `asked` names and a kernel holds then.

    Modules that share a mode are requantized together: a group with a member that a mode holds or that is plain stays
    as it is. The reason of a module that stays dequantized says why its form has no kernel either.
    """
    rounded = _candidates(assignments, candidates, asked)
    if not rounded:
        return dict(assignments)
    made = assign_modes(rounded, _sites(sites, candidates, rounded), target)
    known: dict[tuple[int, int, int], Assignment] = {}
    result = dict(assignments)
    for name, new in made.items():
        key = (id(new), id(assignments[name]), id(candidates[name].weight))
        if key not in known:
            known[key] = _combined(assignments[name], new, candidates[name], asked, target)
        result[name] = known[key]
    return result


def unused_requests(modules: Iterable[ModulePlan], asked: Requantize) -> Iterator[str]:
    """Yield a warning for each form that was asked for and that no module got, with the reason."""
    forms: dict[str, list[str]] = {}
    for what, form in (("experts", asked.experts), ("linears", asked.linears)):
        if form is not None:
            forms.setdefault(form.name, []).append(what)
    dequantized = [module for module in modules if module.dequantized or module.form is not None] if forms else []
    for name, kinds in forms.items():
        meant = [module for module in dequantized if ("experts" if module.experts else "linears") in kinds]
        if not any(module.form is not None for module in meant):
            option = "all" if len(kinds) > 1 else kinds[0]
            reason = meant[0].reason if meant else f"no {' or '.join(kinds)} would be dequantized"
            yield f"--requantize {option}={name} changes nothing: {reason}"


def _candidates(
    assignments: Mapping[str, Assignment], candidates: Mapping[str, Candidate], asked: Requantize
) -> dict[str, Candidate]:
    """Return the candidates that are requantized if a kernel holds them then.

    Those that share a `Weight` object share one again: modes are chosen once for all of them.
    """
    weights: dict[tuple[int, int], Weight] = {}
    rounded = {}
    for name, candidate in candidates.items():
        form = asked.form(expert=candidate.site.expert)
        if form is None or assignments[name].holding is not None or candidate.folded or candidate.site.head:
            continue
        if not _changes(candidate.weight, form):
            continue
        key = (id(candidate.weight), id(form))
        if key not in weights:
            weights[key] = _rounded(candidate.weight, form)
        rounded[name] = candidate._replace(weight=weights[key], unequal="")
    return rounded


def _changes(weight: Weight, form: Form) -> bool:
    """Whether a form would make anything else of a weight.

    It would not if the weight has the codes and the groups of the form: other scales could only lose precision. A form
    that keeps the codes is for weights that have such codes, and changes what their kernels compute on.
    """
    if form.keeps_codes:
        return weight.element is form.element
    same = ("num_bits", "type", "strategy", "group_size", "block_structure")
    return any(getattr(weight.args, name) != getattr(form.weights, name) for name in same)


def _sites(sites: Iterable[Site], candidates: Mapping[str, Candidate], rounded: Mapping[str, Candidate]) -> list[Site]:
    """Return the sites without those of groups that have a member which stays quantized otherwise, or is folded."""
    sites = list(sites)
    others = {site.mode_group for site in sites if site.module in candidates and site.module not in rounded}
    return [site for site in sites if site.mode_group is None or site.mode_group not in others]


def _combined(
    before: Assignment, new: Assignment, candidate: Candidate, asked: Requantize, target: Target
) -> Assignment:
    """Return the assignment of a requantized module, or the former one with the reason why it is none.

    Where the engine rounds scales up to powers of two while it loads weights, they are powers of two already.
    """
    form = asked.form(expert=candidate.site.expert)
    if form is None:
        raise AssertionError("only modules that were asked for are requantized")
    if new.holding is None:
        return replace(before, reason=f"{before.reason}; not requantized to {form.name}: {new.reason}")
    note = deviation_of(candidate.weight.scheme, new.holding.mode.activations)
    holding = replace(new.holding, note="; ".join(filter(None, (form.price, note, new.holding.mode.note))))
    reason = f"requantized to {form.name} on request; {before.reason}"
    release, first = target.capabilities.release, new.holding.mode.requantized_on.get(target.capabilities.sm or 0)
    form = replace(form, powers_of_two=release is not None and release.has(first))
    return Assignment(holding=holding, reason=reason, form=form)


def _rounded(weight: Weight, form: Form) -> Weight:
    """Return what decides the mode of a weight after it was rounded to a form, or only its inputs are."""
    if form.keeps_codes:
        return replace(weight, scheme=replace(form.scheme, weights=weight.args))
    return replace(
        weight,
        scheme=form.scheme,
        element=form.element,
        has_zero_point=False,
        permuted=False,
        scale_dtype=form.scale_dtype,
        two_level=form.scale_dtype is DType.F8_E4M3,
        exponent_scale=form.scale_dtype is DType.U8,
    )
