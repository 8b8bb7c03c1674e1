"""TensorRT-LLM's quantization modes: what each one's Linear holds, and which of them hold a given scheme.

Two questions are kept apart.
`native_mode` names the family that a scheme belongs to, whoever is going to serve it.
`holdings` lists the modes whose Linear reproduces the weights exactly; a target then takes the first that it declares.

Source: TensorRT-LLM `tensorrt_llm/_torch/modules/linear.py` (the load methods of each LinearMethod) and
`tensorrt_llm/quantization/functional.py` (`preprocess_weights_for_mixed_gemm`, for the multiples).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN
from trtllm_ct.schemes import NumberType, Packing, QuantAlgo, QuantArgs, QuantScheme, Strategy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["LINEAR_MODES", "Activations", "Holding", "LinearMode", "ScaleForm", "holdings", "native_mode", "obstacles"]


class ScaleForm(Enum):
    """The shape in which a Linear reads `weight_scale`, always float32."""

    SCALAR = auto()
    """[]"""
    ROW = auto()
    """[N]"""
    GROUP = auto()
    """[N, K / group_size]"""


class Activations(Enum):
    """What a Linear does with its input."""

    WIDE = "16-bit"
    STATIC_TENSOR = "fp8 static per tensor"
    DYNAMIC_TOKEN = "fp8 dynamic per token"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMode:
    """What the Linear of one `QuantAlgo` holds.

    `exact` strategies fit as they are; `widened` ones fit by repeating scales, which changes no value.
    `group_sizes` are those that the kernel accepts; a group of a multiple is held by repeating its scale.
    N must be a multiple of `row_multiple` and K of `column_multiple`, or the kernel's weight preparation asserts.
    """

    algo: QuantAlgo
    num_bits: int
    number: NumberType
    packing: Packing | None
    scale: ScaleForm
    exact: frozenset[Strategy]
    widened: frozenset[Strategy] = frozenset()
    group_sizes: tuple[int, ...] = ()
    zero_point: bool = False
    pre_quant_scale: bool = False
    activations: Activations = Activations.WIDE
    row_multiple: int = 1
    column_multiple: int = 1

    def sizes_that_fit(self, shape: tuple[int, int]) -> str | None:
        """None when the kernel takes a weight of `shape` (N, K), else which sizes it would take."""
        if shape[0] % self.row_multiple == 0 and shape[1] % self.column_multiple == 0:
            return None
        return f"{self.algo} needs out % {self.row_multiple} == 0 and in % {self.column_multiple} == 0"


_GROUP = frozenset({Strategy.GROUP})
_TENSOR = frozenset({Strategy.TENSOR})
_CHANNEL = frozenset({Strategy.CHANNEL})

LINEAR_MODES: tuple[LinearMode, ...] = (
    LinearMode(
        algo=QuantAlgo.W4A16_AWQ,
        num_bits=4,
        number=NumberType.INT,
        packing=INT4_ROW_PAIRS,
        scale=ScaleForm.GROUP,
        exact=_GROUP,
        widened=_TENSOR | _CHANNEL,
        group_sizes=(128, 64),
        pre_quant_scale=True,
        row_multiple=16,
        column_multiple=64,
    ),
    LinearMode(
        algo=QuantAlgo.W4A16_GPTQ,
        num_bits=4,
        number=NumberType.INT,
        packing=INT4_ROW_PAIRS,
        scale=ScaleForm.GROUP,
        exact=_GROUP,
        group_sizes=(128, 64),
        zero_point=True,
        row_multiple=16,
        column_multiple=64,
    ),
    LinearMode(
        algo=QuantAlgo.W4A16,
        num_bits=4,
        number=NumberType.INT,
        packing=INT4_ROW_PAIRS,
        scale=ScaleForm.ROW,
        exact=_CHANNEL | _TENSOR,
        row_multiple=16,
        column_multiple=64,
    ),
    LinearMode(
        algo=QuantAlgo.W8A16,
        num_bits=8,
        number=NumberType.INT,
        packing=INT8_PLAIN,
        scale=ScaleForm.ROW,
        exact=_CHANNEL,
        row_multiple=16,
        column_multiple=64,
    ),
    LinearMode(
        algo=QuantAlgo.FP8,
        num_bits=8,
        number=NumberType.FLOAT,
        packing=None,
        scale=ScaleForm.SCALAR,
        exact=_TENSOR,
        activations=Activations.STATIC_TENSOR,
    ),
    LinearMode(
        algo=QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
        num_bits=8,
        number=NumberType.FLOAT,
        packing=None,
        scale=ScaleForm.ROW,
        exact=_CHANNEL,
        activations=Activations.DYNAMIC_TOKEN,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A mode that holds a weight exactly, with the group size that its Linear would use.

    `as_is` when the weight fits without repeating scales; only a fused group that must agree takes another.
    """

    mode: LinearMode
    group_size: int | None
    as_is: bool

    @property
    def key(self) -> tuple[QuantAlgo, int | None]:
        """What the members of a fused group must share."""
        return self.mode.algo, self.group_size


def native_mode(args: QuantArgs, modifiers: Iterable[str] = ()) -> QuantAlgo | None:
    """The family of a weight scheme, or None for one that this package does not name yet.

    int4 weights came from AWQ when `recipe.yaml` names the AWQ modifier, and count as GPTQ otherwise.
    """
    family = (args.type, args.num_bits)
    if family == (NumberType.INT, 4):
        return QuantAlgo.W4A16_AWQ if "AWQModifier" in modifiers else QuantAlgo.W4A16_GPTQ
    return {(NumberType.INT, 8): QuantAlgo.W8A16, (NumberType.FLOAT, 8): QuantAlgo.FP8}.get(family)


def holdings(scheme: QuantScheme, shape: tuple[int, int] | None, *, has_zero_point: bool) -> tuple[Holding, ...]:
    """Every mode that holds the weight exactly, those that fit as it is first.

    `shape` (N, K) is left out when only a configuration is known. `has_zero_point` says whether a zero point is
    stored: that decides, not `symmetric`.
    """
    found = [
        holding
        for mode in LINEAR_MODES
        if _obstacle(mode, scheme, shape, has_zero_point=has_zero_point) is None
        for holding in _group_sizes(mode, scheme, shape)
    ]
    return tuple(sorted(found, key=lambda holding: not holding.as_is))


def obstacles(scheme: QuantScheme, shape: tuple[int, int], *, has_zero_point: bool) -> tuple[str, ...]:
    """Why the modes for codes of this kind don't take the weight as it is; empty when no mode has such codes."""
    args = scheme.weights
    if args is None:
        return ()
    reasons = []
    for mode in LINEAR_MODES:
        if (mode.number, mode.num_bits) != (args.type, args.num_bits):
            continue
        reason = _obstacle(mode, scheme, shape, has_zero_point=has_zero_point)
        if reason is not None:
            reasons.append(reason)
    return tuple(reasons)


def _obstacle(
    mode: LinearMode, scheme: QuantScheme, shape: tuple[int, int] | None, *, has_zero_point: bool
) -> str | None:
    """The first thing that keeps a weight out of a mode, or None."""
    args = scheme.weights
    if args is None or (mode.number, mode.num_bits) != (args.type, args.num_bits):
        return f"{mode.algo} holds {mode.number}{mode.num_bits} codes"
    if args.strategy not in mode.exact | mode.widened:
        return f"{mode.algo} holds no scale per {args.strategy}"
    if has_zero_point and not mode.zero_point:
        return f"{mode.algo} holds no zero points"
    if _activations(scheme) is not mode.activations:
        return f"{mode.algo} computes on {mode.activations.value} activations"
    if args.strategy is Strategy.GROUP and args.group_size not in mode.group_sizes:
        return f"{mode.algo} holds groups of {' or '.join(str(size) for size in sorted(mode.group_sizes))}"
    if shape is None:
        return None
    return mode.sizes_that_fit(shape)


def _group_sizes(mode: LinearMode, scheme: QuantScheme, shape: tuple[int, int] | None) -> Iterator[Holding]:
    """The group sizes under which a mode holds a weight: its own first, then smaller ones that divide it."""
    args = scheme.weights
    if args is None:
        return
    if mode.scale is not ScaleForm.GROUP:
        yield Holding(mode=mode, group_size=None, as_is=args.strategy in mode.exact)
        return
    for size in mode.group_sizes:
        divides = args.group_size is None or args.group_size % size == 0
        whole = shape is None or shape[1] % size == 0
        if divides and whole:
            as_is = args.group_size == size and args.strategy in mode.exact
            yield Holding(mode=mode, group_size=size, as_is=as_is)


def _activations(scheme: QuantScheme) -> Activations | None:
    """What a scheme asks for its input; None where no mode computes like that."""
    args = scheme.input_activations
    if args is None:
        return Activations.WIDE
    if (args.type, args.num_bits, args.symmetric) != (NumberType.FLOAT, 8, True):
        return None
    if args.strategy is Strategy.TENSOR and args.dynamic is False:
        return Activations.STATIC_TENSOR
    if args.strategy is Strategy.TOKEN and args.dynamic is True:
        return Activations.DYNAMIC_TOKEN
    return None
