"""Which mode each quantized module gets at a target.

A module alone takes the mode that holds it as it is. Modules that the engine fuses into one Linear (q/k/v, gate/up)
must end in one mode: scales may be repeated to reach it, since that changes no value; where no common mode exists,
all of them are dequantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.modes import Holding, holdings, obstacles
from trtllm_ct.plan.architectures import EMBEDDING, LM_HEAD, Site
from trtllm_ct.schemes import QuantAlgo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trtllm_ct.plan.target import Target
    from trtllm_ct.plan.weights import QuantizedWeight

__all__ = ["Assignment", "assign_modes"]

_ModeKey = tuple[QuantAlgo, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The mode of one module, or None with the reason why it is dequantized."""

    holding: Holding | None
    reason: str = ""


def assign_modes(
    weights: Mapping[str, QuantizedWeight], sites: Sequence[Site], target: Target
) -> dict[str, Assignment]:
    """The assignment of every quantized module by name. `sites` tell which modules are fused."""
    alone: dict[str, Assignment] = {}
    fused: dict[str, list[Site]] = {}
    for site in sites:
        if site.fused is not None:
            fused.setdefault(site.fused, []).append(site)
        elif site.module in weights:
            alone[site.module] = _assign_one(site.module, weights[site.module], target)
    for name, members in fused.items():
        alone |= _assign_fused(name, [site.module for site in members], weights, target)
    return alone


def _assign_one(module: str, weight: QuantizedWeight, target: Target) -> Assignment:
    if module in {EMBEDDING, LM_HEAD} and target.algos:
        return Assignment(holding=None, reason=f"target {target.name} keeps {module} plain")
    first = next((holding for holding in _held(weight, target) if holding.as_is), None)
    return Assignment(holding=first, reason="" if first else _why_not(weight, target))


def _assign_fused(
    name: str, members: Sequence[str], weights: Mapping[str, QuantizedWeight], target: Target
) -> dict[str, Assignment]:
    """One mode for all members of a fused group; nothing when none of them is quantized."""
    quantized = [module for module in members if module in weights]
    plain = [module for module in members if module not in weights]
    each = {module: _assign_one(module, weights[module], target) for module in quantized}
    if plain and quantized:
        reason = f"the engine fuses it into {name}, and {_leaves(plain)} is stored plain"
        return {module: _plain_because(each[module], reason) for module in quantized}
    keys = {assignment.holding.key if assignment.holding else None for assignment in each.values()}
    if len(keys) <= 1:
        return each
    options = {module: {holding.key: holding for holding in _held(weights[module], target)} for module in quantized}
    common = set.intersection(*(set(option) for option in options.values()))
    if common:
        # The mode that the most members hold as they are; LINEAR_MODES and its group sizes break ties.
        first = options[quantized[0]]
        best = max((key for key in first if key in common), key=lambda key: _fit(key, options))
        reason = f"scales repeated so that {name} has one mode"
        return {
            module: Assignment(holding=option[best], reason="" if option[best].as_is else reason)
            for module, option in options.items()
        }
    schemes = "; ".join(f"{_leaves([module])}: {weights[module].scheme.label()}" for module in quantized)
    reason = f"the engine fuses it into {name}, whose parts share no mode ({schemes})"
    return {module: _plain_because(each[module], reason) for module in quantized}


def _fit(key: _ModeKey, options: Mapping[str, Mapping[_ModeKey, Holding]]) -> int:
    return sum(option[key].as_is for option in options.values())


def _held(weight: QuantizedWeight, target: Target) -> list[Holding]:
    """The modes of the target that hold a weight, those that take it as it is first."""
    stored = weight.stored
    found = holdings(weight.scheme, stored.shape, has_zero_point=stored.has_zero_point)
    return [holding for holding in found if holding.mode.algo in target.algos]


def _why_not(weight: QuantizedWeight, target: Target) -> str:
    """Why no mode of a target holds a weight as it is."""
    if not target.algos:
        return f"target {target.name} holds plain weights only"
    stored = weight.stored
    elsewhere = [
        str(holding.mode.algo)
        for holding in holdings(weight.scheme, stored.shape, has_zero_point=stored.has_zero_point)
        if holding.as_is
    ]
    if elsewhere:
        return f"{' or '.join(elsewhere)} would hold it, and target {target.name} has no such Linear"
    reasons = obstacles(weight.scheme, stored.shape, has_zero_point=stored.has_zero_point)
    return "; ".join(reasons)


def _plain_because(own: Assignment, reason: str) -> Assignment:
    """Dequantized for the sake of a fused group, unless the module had a reason of its own."""
    return Assignment(holding=None, reason=reason if own.holding is not None else own.reason)


def _leaves(modules: Sequence[str]) -> str:
    return ", ".join(module.rpartition(".")[2] for module in modules)
