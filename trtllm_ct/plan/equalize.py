"""Make the scalars of the parts of a fused Linear equal, if that is possible without changing any weight.

Engines fuse q/k/v into one Linear, and gate and up too, also in every expert. An NVFP4 Linear has one `weight_scale_2`
and one `input_scale`, which are made from the stored global scales and must be equal bit for bit. Most writers give the
parts the same global scales. Where a writer did not and the global scales are powers of two apart, one of them serves
all parts: the E4M3 group scales are multiplied by the power of two between the two global scales, and every value stays
the same, bit for bit. Parts whose global scales differ otherwise have no common scalar and are dequantized.
A global scale of 0 in an expert means that calibration never reached it: its weight is zero under any scalar. That of
an input may be infinite as well, which is 448 * 6 / 0; both are delivered as 0, or as the scalar of the other parts.
Source: TensorRT-LLM `_torch/modules/linear.py`, NVFP4LinearMethod, and `fused_moe/quantization.py`.
"""

from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass, replace
from math import frexp, inf, ldexp
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.engine.holdings import activations_of
from trtllm_ct.engine.modes import Activations
from trtllm_ct.plan.probe import probe_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from trtllm_ct.plan.models.sites import Site
    from trtllm_ct.plan.probe import Probe
    from trtllm_ct.plan.stored import StoredModule
    from trtllm_ct.plan.weights import QuantizedWeight

__all__ = ["OWN", "Equalized", "Part", "Replaced", "equalize", "powers_of_two_apart"]

_INPUT = "input_global_scale"


class Part(NamedTuple):
    """A module whose weight is quantized, and its place in the model."""

    site: Site
    module: StoredModule
    weight: QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """A stored global scale, and the shared one that replaces it in all parts of the fused Linear."""

    stored: float
    shared: float

    @property
    def power(self) -> int:
        """The k in shared = stored * 2^k; 0 if the stored global scale is 0, since no k exists then."""
        return frexp(self.shared)[1] - frexp(self.stored)[1] if _is_reached(self.stored) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalized:
    """The global scales that a module uses so that they equal those of the other parts of its fused Linear.

    `weight` and `input` are None where the stored global scale is kept. `reason` describes the change of the weight's
    global scale, `note` that of the input's. `obstacle` says why the scales can't be made equal; empty if they can.
    """

    weight: Replaced | None = None
    input: Replaced | None = None
    reason: str = ""
    note: str = ""
    obstacle: str = ""


OWN = Equalized()
"""The value for a module that keeps its stored global scales."""


def equalize(parts: Iterable[Part], probe: Probe, *, inputs: bool = True) -> dict[str, Equalized]:
    """Return, by module name, the global scales that parts of fused NVFP4 Linears use instead of the stored ones.

    Without `inputs` those of inputs may differ: some engines take the largest one.

    Modules that keep their stored global scales are left out. Nothing is decided from scales that were not probed, nor
    from those that are refused when they are loaded: NaN and negative ones, and in general infinity and zero.
    """
    linears: dict[str, list[Part]] = {}
    for part in parts:
        if part.site.shares is not None and part.weight.stored.divisor is not None:
            linears.setdefault(part.site.shares, []).append(part)
    return {
        name: equalized
        for members in linears.values()
        for name, equalized in _equalize_linear(members, probe, inputs=inputs).items()
    }


def powers_of_two_apart(divisors: Sequence[float]) -> bool:
    """Whether the divisors are delivered as different multipliers, and differ by powers of two; zeros are ignored."""
    nonzero = [divisor for divisor in divisors if divisor]
    return not _all_equal(nonzero) and len({frexp(divisor)[0] for divisor in nonzero}) == 1


def _equalize_linear(members: Sequence[Part], probe: Probe, *, inputs: bool) -> dict[str, Equalized]:
    """Return the parts of one fused Linear whose global scales change, or all parts with the obstacle."""
    weights, obstacle = _replacements(members, members[0].weight.stored.divisor or "", probe)
    replaced: Sequence[Replaced | None] = [None] * len(members)
    if inputs and all(activations_of(part.weight.scheme) is Activations.FP4_LOCAL for part in members):
        replaced, input_obstacle = _replacements(members, _INPUT, probe)
        obstacle = obstacle or input_obstacle
    if obstacle:
        return {part.site.module: Equalized(obstacle=obstacle) for part in members}
    return {
        part.site.module: _with_reasons(Equalized(weight=weight, input=input_), part.site)
        for part, weight, input_ in zip(members, weights, replaced, strict=True)
        if weight or input_
    }


def _replacements(members: Sequence[Part], local: str, probe: Probe) -> tuple[list[Replaced | None], str]:
    """Return the replacement of one global scale for each member, and the obstacle to making them equal.

    A replacement is None where the stored global scale is kept. The obstacle is empty if there is none.
    """
    kept: list[Replaced | None] = [None] * len(members)
    divisors = [_divisor(part, local, probe) for part in members]
    known = [divisor for divisor in divisors if divisor is not None]
    nonzero = [divisor for divisor in known if _is_reached(divisor)]
    if len(known) < len(members) or not nonzero:
        return kept, ""
    shared: float | None = None
    if _all_equal(nonzero):
        shared = nonzero[0]
    elif not powers_of_two_apart(nonzero):
        return kept, _obstacle(members, known, local, "which do not differ by a power of two")
    elif local == _INPUT:
        # The engine computes the group scales of activations at run time. The smallest divisor is the largest
        # multiplier, and under that no group scale is clipped.
        shared = min(nonzero)
    else:
        shared = _exact_divisor(members, known, probe)
    if shared is None:
        return kept, _obstacle(members, known, local, "and E4M3 group scales can't take up the difference")
    return [_replaced(divisor, shared) for divisor in known], ""


def _divisor(part: Part, local: str, probe: Probe) -> float | None:
    """Return a stored global scale; None if it was not probed or is refused when it is loaded."""
    view = part.module.views.get(local)
    value = None if view is None else probe.scalars.get(probe_key(view))
    if value is None or _is_reached(value):
        return value
    accepted = part.site.expert and (value == 0 or (value == inf and local == _INPUT))
    return value if accepted else None


def _is_reached(divisor: float) -> bool:
    """Whether calibration reached the module: 0 and infinity come from modules that saw zeros only, or nothing."""
    return 0 < divisor < inf


def _all_equal(divisors: Sequence[float]) -> bool:
    """Whether all divisors are delivered as the same multiplier, bit for bit: releases assert exact equality."""
    return len({_multiplier(divisor) for divisor in divisors}) <= 1


def _multiplier(divisor: float) -> float:
    """Return 1 / divisor rounded to float32, as it is delivered; 0 for 0."""
    return c_float(1 / divisor).value if divisor else 0.0


def _replaced(stored: float, shared: float) -> Replaced | None:
    """Return the replacement of a stored global scale; None if it equals the shared one."""
    return None if _multiplier(stored) == _multiplier(shared) else Replaced(stored=stored, shared=shared)


def _exact_divisor(members: Sequence[Part], divisors: Sequence[float], probe: Probe) -> float | None:
    """Return a divisor to which the group scales of all members can be shifted without loss; None if none exists.

    Of several such divisors the one is taken that equals the stored divisor of the most members. Members with a stored
    divisor of 0 fit any divisor.
    """
    exponents, least, most = [], [], []
    for part, divisor in zip(members, divisors, strict=True):
        if divisor:
            powers = probe.powers.get(probe_key(part.module.views[part.weight.stored.scale]), (0, 0))
            exponents.append(frexp(divisor)[1])
            least.append(exponents[-1] + powers[0])
            most.append(exponents[-1] + powers[1])
    # The range of each member contains its stored exponent. So if the ranges intersect, they do so between the least
    # and the greatest stored exponent.
    fitting = range(max(*least, min(exponents)), min(*most, max(exponents)) + 1)
    if not fitting:
        return None
    mantissa = frexp(next(divisor for divisor in divisors if divisor))[0]
    return ldexp(mantissa, min(fitting, key=lambda shared: sum(shared != exponent for exponent in exponents)))


def _with_reasons(equalized: Equalized, site: Site) -> Equalized:
    """Return the value with the `reason` and the `note` that describe its replacements."""
    linear = (site.shares or "").rpartition(".")[2]
    reason = note = ""
    if equalized.weight is not None and equalized.weight.stored:
        reason = f"group scales times a power of two, so that {linear} has one scalar"
    elif equalized.weight is not None:
        reason = f"calibration never reached it: group scales of zero under the scalar of {linear}"
    if equalized.input is not None and _is_reached(equalized.input.stored):
        note = f"the input scale is the largest of {linear}, a power of two above its own"
    return replace(equalized, reason=reason, note=note)


def _obstacle(members: Sequence[Part], divisors: Sequence[float], local: str, why: str) -> str:
    """Return the reason why the members share no scalar: it names two of them and their global scales.

    If some members do not differ by a power of two, it names two of those.
    """
    values = [(part.site, divisor) for part, divisor in zip(members, divisors, strict=True) if _is_reached(divisor)]
    first_site, first = values[0]
    second_site, second = max(values, key=lambda entry: (frexp(entry[1])[0] != frexp(first)[0], entry[1] != first))
    names = [site.module.rpartition(".")[2] for site in (first_site, second_site)]
    *_, parent, linear = (first_site.shares or "").split(".")
    whole = f"expert {parent}" if first_site.expert else linear
    return (
        f"the parts of {whole} share no scalar: {local} is {first:.9g} in {names[0]} and {second:.9g} in {names[1]}, "
        f"{why}"
    )
