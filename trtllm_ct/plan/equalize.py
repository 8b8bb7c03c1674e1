"""Equal scalars for the parts of a Linear that engines join: exactly, or not at all.

Engines make one Linear of q/k/v, and of gate and up in every expert too. An NVFP4 Linear has one `weight_scale_2` and
one `input_scale`. Writers link the global scales that these come from; where they did not, and the scales are
powers of two apart, one of them serves all parts: a power of two moves from the scalar into the E4M3 group scales,
and every value stays what it is, bit for bit. Other parts have no common scalar, and are dequantized.
A global scale of 0 in an expert means that calibration never reached it: its weight is zero under any scalar.
Source: TensorRT-LLM `_torch/modules/linear.py`, NVFP4LinearMethod, and `fused_moe/quantization.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import frexp, isclose, isfinite, ldexp
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

__all__ = ["OWN", "SCALAR_TOLERANCE", "Equalized", "Part", "Replaced", "equalize", "powers_of_two_apart"]

SCALAR_TOLERANCE = 1e-6
"""Scalars that differ by less count as equal, relatively: of the same order as the error that any native value may
have."""

_WEIGHT, _INPUT = "weight_global_scale", "input_global_scale"


class Part(NamedTuple):
    """A module whose weight is quantized, and its place in the model."""

    site: Site
    module: StoredModule
    weight: QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """A stored global scale, and the one that the module takes instead, as all parts of its Linear do."""

    stored: float
    shared: float

    @property
    def power(self) -> int:
        """K of shared = stored * 2^k; where 0 is stored there is none, and 0 stands for it."""
        return frexp(self.shared)[1] - frexp(self.stored)[1] if self.stored else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalized:
    """What a module takes so that its scalars are those of the other parts of its Linear; None where they are.

    `reason` and `note` say so, about the weight and about the input. `obstacle` says why nothing makes them equal.
    """

    weight: Replaced | None = None
    input: Replaced | None = None
    reason: str = ""
    note: str = ""
    obstacle: str = ""


OWN = Equalized()
"""A module that keeps what is stored."""


def equalize(parts: Iterable[Part], probe: Probe) -> dict[str, Equalized]:
    """By module name, what parts of joined NVFP4 Linears take instead of their own scalars; others are left out.

    Nothing is said about scalars that were not probed or that are refused when they are read: NaN, infinite, negative,
    and zero outside of routed experts.
    """
    joined: dict[str, list[Part]] = {}
    for part in parts:
        if part.site.shares is not None and part.weight.stored.divisor is not None:
            joined.setdefault(part.site.shares, []).append(part)
    return {name: own for members in joined.values() for name, own in _of_linear(members, probe).items()}


def powers_of_two_apart(divisors: Sequence[float]) -> bool:
    """Whether positive numbers differ, and by powers of two only; zeros among them don't count."""
    live = [divisor for divisor in divisors if divisor]
    return not _same(live) and len({frexp(divisor)[0] for divisor in live}) == 1


def _of_linear(members: Sequence[Part], probe: Probe) -> dict[str, Equalized]:
    """The parts of one Linear that change, or all of them with what is in the way."""
    weights, obstacle = _shared(members, _WEIGHT, probe)
    inputs: Sequence[Replaced | None] = [None] * len(members)
    if all(activations_of(part.weight.scheme) is Activations.FP4_LOCAL for part in members):
        inputs, another = _shared(members, _INPUT, probe)
        obstacle = obstacle or another
    if obstacle:
        return {part.site.module: Equalized(obstacle=obstacle) for part in members}
    return {
        part.site.module: _told(Equalized(weight=weight, input=of_input), part.site)
        for part, weight, of_input in zip(members, weights, inputs, strict=True)
        if weight or of_input
    }


def _shared(members: Sequence[Part], local: str, probe: Probe) -> tuple[list[Replaced | None], str]:
    """For each member the replacement of one scalar, None where it stays; or what is in the way."""
    kept: list[Replaced | None] = [None] * len(members)
    divisors = [_divisor(part, local, probe) for part in members]
    known = [divisor for divisor in divisors if divisor is not None]
    live = [divisor for divisor in known if divisor]
    if len(known) < len(members) or not live:
        return kept, ""
    shared: float | None = None
    if _same(live):
        shared = live[0]
    elif not powers_of_two_apart(live):
        return kept, _obstacle(members, known, local, "no power of two apart")
    elif local == _INPUT:
        # Group scales of activations are computed at run time: under the largest scalar none of them is cut off.
        shared = min(live)
    else:
        shared = _exact_divisor(members, known, probe)
    if shared is None:
        return kept, _obstacle(members, known, local, "and E4M3 group scales can't take up the difference")
    return [_replaced(divisor, shared) for divisor in known], ""


def _divisor(part: Part, local: str, probe: Probe) -> float | None:
    """A stored global scale; None where it was not probed or is none that an engine may be given."""
    view = part.module.views.get(local)
    value = None if view is None else probe.scalars.get(probe_key(view))
    if value is None or not isfinite(value) or value < 0 or (value == 0 and not part.site.expert):
        return None
    return value


def _same(live: Sequence[float]) -> bool:
    return all(isclose(divisor, live[0], rel_tol=SCALAR_TOLERANCE) for divisor in live)


def _replaced(stored: float, shared: float) -> Replaced | None:
    """None for a scale that serves as it is."""
    same = isclose(stored, shared, rel_tol=SCALAR_TOLERANCE)
    return None if same else Replaced(stored=stored, shared=shared)


def _exact_divisor(members: Sequence[Part], divisors: Sequence[float], probe: Probe) -> float | None:
    """The divisor that all group scales can be shifted to without loss and that leaves the most of them as they are.

    None when there is none. Zeros fit any divisor.
    """
    exponents, least, most = [], [], []
    for part, divisor in zip(members, divisors, strict=True):
        if divisor:
            powers = probe.powers.get(probe_key(part.module.views[part.weight.stored.scale]), (0, 0))
            exponents.append(frexp(divisor)[1])
            least.append(exponents[-1] + powers[0])
            most.append(exponents[-1] + powers[1])
    # Every range holds its own exponent, so what they share lies between the exponents if it is no wider.
    fitting = range(max(*least, min(exponents)), min(*most, max(exponents)) + 1)
    if not fitting:
        return None
    mantissa = frexp(next(divisor for divisor in divisors if divisor))[0]
    return ldexp(mantissa, min(fitting, key=lambda shared: sum(shared != own for own in exponents)))


def _told(own: Equalized, site: Site) -> Equalized:
    """With the words for what changes."""
    linear = (site.shares or "").rpartition(".")[2]
    reason = note = ""
    if own.weight is not None and own.weight.stored:
        reason = f"group scales times a power of two, so that {linear} has one scalar"
    elif own.weight is not None:
        reason = f"calibration never reached it: group scales of zero under the scalar of {linear}"
    if own.input is not None and own.input.stored:
        note = f"the input scale is the largest of {linear}, a power of two above its own"
    return replace(own, reason=reason, note=note)


def _obstacle(members: Sequence[Part], divisors: Sequence[float], local: str, why: str) -> str:
    """Names two parts whose scalars differ, and both values; no power of two apart where there are such."""
    values = [(part.site, divisor) for part, divisor in zip(members, divisors, strict=True) if divisor]
    first, value = values[0]
    other, another = max(values, key=lambda each: (frexp(each[1])[0] != frexp(value)[0], each[1] != value))
    names = [site.module.rpartition(".")[2] for site in (first, other)]
    *_, owner, linear = (first.shares or "").split(".")
    whole = f"expert {owner}" if first.expert else linear
    return (
        f"the parts of {whole} share no scalar: {local} is {value:.9g} in {names[0]} and {another:.9g} in {names[1]}, "
        f"{why}"
    )
