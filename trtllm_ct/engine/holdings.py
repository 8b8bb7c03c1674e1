"""Which modes hold a weight exactly, and why the others don't.

Two questions are kept apart.
`native_mode` names the family that a scheme belongs to, whatever engine is going to serve it.
`holdings` lists the modes whose Linear reproduces the weights exactly; a target then takes the first one that it has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import Element, NumberType, QuantAlgo, QuantArgs, QuantScheme, Strategy
from trtllm_ct.engine.modes import LINEAR_MODES, Activations, LinearMode, ScaleForm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trtllm_ct.engine.slices import Slices

__all__ = ["Holding", "Weight", "activations_of", "holdings", "native_mode", "obstacles", "slice_obstacle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """What of a stored weight decides its mode.

    `shape` is None where only a configuration is known. `has_zero_point` says whether a zero point is stored: that
    counts, not `symmetric`. `permuted` groups are not contiguous (activation ordering). `fused` weights become
    part of one Linear. `slices` are those of the ranks that share it, None when each has all of it.
    """

    scheme: QuantScheme
    element: Element
    shape: tuple[int, int] | None = None
    has_zero_point: bool = False
    permuted: bool = False
    fused: bool = False
    two_level: bool = False
    exponent_scale: bool = False
    slices: Slices | None = None

    @property
    def args(self) -> QuantArgs:
        """The arguments of the weight."""
        if self.scheme.weights is None:
            raise AssertionError("a quantized weight has arguments")
        return self.scheme.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A mode that holds a weight exactly, with the group size that its Linear would use.

    `as_is` when the weight fits without repeating scales for the sake of others; only a fused group that must agree
    takes another. `note` says what the mode does otherwise than the scheme asks, about activations only.
    """

    mode: LinearMode
    group_size: int | None
    as_is: bool
    note: str = ""

    @property
    def key(self) -> tuple[QuantAlgo, int | None]:
        """What the members of a fused group must share."""
        return self.mode.algo, self.group_size


def native_mode(args: QuantArgs, modifiers: Iterable[str] = ()) -> QuantAlgo | None:
    """The family of a weight scheme, or None for one that no mode of the engine belongs to.

    int4 weights came from AWQ when `recipe.yaml` names the AWQ modifier, and count as GPTQ otherwise.
    """
    if args.type is NumberType.INT:
        if args.num_bits > 4:
            return QuantAlgo.W8A16
        return QuantAlgo.W4A16_AWQ if "AWQModifier" in modifiers else QuantAlgo.W4A16_GPTQ
    in_powers_of_two = args.group_size == 32
    families = {
        (8, False): QuantAlgo.FP8_BLOCK_SCALES if args.strategy is Strategy.BLOCK else QuantAlgo.FP8,
        (8, True): QuantAlgo.MXFP8,
        (4, False): QuantAlgo.NVFP4,
        (4, True): QuantAlgo.W4A16_MXFP4,
    }
    return families.get((args.num_bits, in_powers_of_two))


@lru_cache(maxsize=256)
def holdings(weight: Weight) -> tuple[Holding, ...]:
    """Every mode that holds the weight exactly, those that fit as it is first.

    Remembered, since a model has few kinds of weights and some have 70 000 of a kind.
    """
    found = [
        holding for mode in LINEAR_MODES if _obstacle(mode, weight) is None for holding in _group_sizes(mode, weight)
    ]
    return tuple(sorted(found, key=lambda holding: not holding.as_is))


@lru_cache(maxsize=256)
def obstacles(weight: Weight, algos: frozenset[QuantAlgo]) -> tuple[str, ...]:
    """Why the modes among `algos` for codes of this kind don't take the weight; empty when none has such codes."""
    reasons = (_obstacle(mode, weight) for mode in LINEAR_MODES if mode.algo in algos and _holds_codes(mode, weight))
    return tuple(reason for reason in reasons if reason is not None)


@lru_cache(maxsize=256)
def slice_obstacle(weight: Weight, algos: frozenset[QuantAlgo]) -> str | None:
    """Why no mode among `algos` holds each rank's slice, where one of them holds the weight as a whole; else None."""
    if weight.slices is None or any(holding.mode.algo in algos for holding in holdings(weight)):
        return None
    whole = (holding.mode for holding in holdings(replace(weight, slices=None)) if holding.mode.algo in algos)
    return next((_wrong_slices(mode, weight) for mode in whole), None)


def activations_of(scheme: QuantScheme) -> Activations:
    """The kind of activations that a scheme asks for."""
    args = scheme.input_activations
    if args is None:
        return Activations.WIDE
    if args.type is not NumberType.FLOAT or not args.symmetric:
        return Activations.OTHER
    kinds: Mapping[tuple[int, Strategy, int | None, object], Activations] = {
        (8, Strategy.TENSOR, None, False): Activations.FP8_STATIC,
        (8, Strategy.TOKEN, None, True): Activations.FP8_TOKEN,
        (8, Strategy.GROUP, 128, True): Activations.FP8_GROUP,
        (8, Strategy.GROUP, 32, True): Activations.MX_FP8,
    }
    if args.num_bits == 4 and args.group_size == 16:
        # Writers say "local", True or False for the same thing: a stored global scale and local ones at run time.
        return Activations.FP4_LOCAL
    return kinds.get((args.num_bits, args.strategy, args.group_size, args.dynamic), Activations.OTHER)


def _holds_codes(mode: LinearMode, weight: Weight) -> bool:
    """Whether the mode's codes are of the weight's kind, scales of small groups included."""
    if mode.element is not weight.element or weight.args.num_bits not in mode.bits:
        return False
    small_groups = {ScaleForm.TWO_LEVEL: weight.two_level, ScaleForm.EXPONENT: weight.exponent_scale}
    if weight.two_level or weight.exponent_scale:
        return small_groups.get(mode.scale, False)
    return mode.scale not in small_groups


def _obstacle(mode: LinearMode, weight: Weight) -> str | None:
    """The first thing that keeps a weight out of a mode, or None."""
    args = weight.args
    if not _holds_codes(mode, weight):
        return f"{mode.algo} holds {mode.codes} codes"
    if weight.permuted:
        return f"{mode.algo} holds contiguous groups only, and this weight has activation ordering"
    if args.strategy not in mode.exact | mode.widened:
        return f"{mode.algo} holds no scale per {args.strategy}"
    if weight.has_zero_point and not mode.zero_point:
        return f"{mode.algo} holds no zero points"
    if not _takes_activations(mode, weight):
        return f"{mode.algo} computes on {mode.activations} activations, and the scheme leaves them {_asked(weight)}"
    if args.group_size is not None and args.group_size not in mode.group_sizes:
        return f"{mode.algo} holds groups of {' or '.join(str(size) for size in sorted(mode.group_sizes))}"
    if args.strategy is Strategy.BLOCK and args.block_structure != mode.block:
        return f"{mode.algo} holds blocks of 128x128"
    return _wrong_sizes(mode, weight) or _wrong_slices(mode, weight)


def _takes_activations(mode: LinearMode, weight: Weight) -> bool:
    asked = activations_of(weight.scheme)
    if asked is mode.activations:
        return True
    # One scale for the whole weight and a static one for its input are exactly what mode FP8 holds.
    static_tensor = asked is Activations.FP8_STATIC and weight.args.strategy is Strategy.TENSOR
    return asked in mode.other_activations and not (static_tensor and mode.element is Element.E4M3)


def _asked(weight: Weight) -> str:
    args = weight.scheme.input_activations
    return "16-bit" if args is None else args.label()


def _wrong_sizes(mode: LinearMode, weight: Weight) -> str | None:
    """None when the kernel takes a weight of this shape, else which sizes it would take."""
    if weight.shape is None:
        return None
    rows = mode.fused_row_multiple if weight.fused else mode.row_multiple
    if weight.shape[0] % rows == 0 and weight.shape[1] % mode.column_multiple == 0:
        return None
    return f"{mode.algo} needs out % {rows} == 0 and in % {mode.column_multiple} == 0"


def _wrong_slices(mode: LinearMode, weight: Weight, group_size: int | None = None) -> str | None:
    """None when the kernel takes every rank's slice, else at which tensor-parallel sizes it would.

    Groups are of `group_size`, or of the smallest size that holds the weight's.
    """
    if weight.slices is None or weight.shape is None:
        return None
    size = group_size or min(_sizes_of_groups(mode, weight), default=1)
    multiple = _slice_multiple(mode, weight, weight.slices, size)
    return weight.slices.obstacle(mode.algo, weight.shape, multiple, scales_repeated=mode.scales_follow_kv_heads)


def _slice_multiple(mode: LinearMode, weight: Weight, slices: Slices, group_size: int) -> int:
    """What the rows or columns of each rank must be a multiple of, when groups are of `group_size`."""
    if slices.columns:
        multiples = [mode.column_multiple, group_size]
    else:
        multiples = [mode.fused_row_multiple if weight.fused or slices.parts else mode.row_multiple]
    if mode.block is not None:
        multiples.append(mode.block[slices.columns])
    if slices.alone:
        multiples += [mode.alignment, group_size if mode.scale is ScaleForm.GROUP else 1]
    return lcm(*multiples)


def _sizes_of_groups(mode: LinearMode, weight: Weight) -> tuple[int, ...]:
    """The group sizes of a mode in which a weight's own groups can be held, by repeating scales if need be."""
    own = weight.args.group_size
    return tuple(size for size in mode.group_sizes if own is None or own % size == 0)


def _group_sizes(mode: LinearMode, weight: Weight) -> Iterator[Holding]:
    """The group sizes under which a mode holds a weight: its own first, then smaller ones that divide it."""
    args, note = weight.args, _note(mode, weight)
    if mode.scale is not ScaleForm.GROUP:
        size = mode.group_sizes[0] if mode.group_sizes else None
        yield Holding(mode=mode, group_size=size, as_is=args.strategy in mode.exact, note=note)
        return
    for size in _sizes_of_groups(mode, weight):
        if weight.shape is None or (weight.shape[1] % size == 0 and not _wrong_slices(mode, weight, size)):
            as_is = args.group_size == size and args.strategy in mode.exact
            yield Holding(mode=mode, group_size=size, as_is=as_is, note=note)


def _note(mode: LinearMode, weight: Weight) -> str:
    """What becomes of activations that the scheme wants otherwise than the mode computes."""
    if activations_of(weight.scheme) is mode.activations:
        return ""
    if mode.activations is Activations.WIDE:
        return f"activations stay 16-bit; the scheme asks for {_asked(weight)}"
    return f"activations are {mode.activations}; the static input scale of the scheme is dropped"
