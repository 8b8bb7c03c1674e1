"""Which modes hold a weight exactly, and why the others don't.

A mode *holds* a weight if its Linear computes with exactly the values of the stored weight, and with its bias.
`holdings` lists these modes on a platform, which is None for a reader without kernels: the CPU reference engine.
Planning then takes the first one that the target has. `native_mode` answers another question: it names the family that
a scheme belongs to, independent of any engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import Element, NumberType, QuantAlgo, QuantArgs, QuantScheme, Strategy
from trtllm_ct.engine.kernels import dropped_bias, missing_kernel, refused_dtype
from trtllm_ct.engine.modes import LINEAR_MODES, Activations, LinearMode, ScaleForm
from trtllm_ct.engine.platform import SMS, sms_in_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.engine.platform import Platform
    from trtllm_ct.engine.slices import Slices

__all__ = [
    "Holding",
    "Weight",
    "activations_of",
    "deviation_of",
    "holdings",
    "native_mode",
    "obstacles",
    "slice_obstacle",
    "slice_problem",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """The properties of a stored weight that decide its mode.

    `shape` is (N, K), None if only a configuration is known. `has_zero_point` says whether a zero point is stored; that
    counts, not the scheme's `symmetric`. `permuted` says that groups are not contiguous (activation ordering). A
    `fused` weight becomes a part of a fused Linear; `fused_parts` are the short names of all its parts, for messages.
    `bias` says that its Linear has a bias, which a fused Linear has if one of its parts has. `expert` marks the weights
    of routed experts. `scale_dtype` is the dtype of the stored scale, None if only a configuration is known.
    `two_level` weights have a global scale besides group scales (NVFP4), those with `exponent_scale` have E8M0 scales
    (MX formats). `slices` are the ranks' slices, None if every rank has the whole weight.
    """

    scheme: QuantScheme
    element: Element
    shape: tuple[int, int] | None = None
    has_zero_point: bool = False
    permuted: bool = False
    fused: bool = False
    fused_parts: tuple[str, ...] = ()
    bias: bool = False
    expert: bool = False
    scale_dtype: DType | None = None
    model_dtype: DType | None = None
    two_level: bool = False
    exponent_scale: bool = False
    slices: Slices | None = None

    @property
    def args(self) -> QuantArgs:
        """The quantization arguments of the weight in its scheme."""
        if self.scheme.weights is None:
            raise AssertionError("a quantized weight has arguments")
        return self.scheme.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A mode that holds a weight exactly, with the group size that its Linear uses.

    `as_is` says that scales need not be repeated for smaller groups than the weight's. `note` says how the mode treats
    activations differently from the scheme; empty if it doesn't. With `scale_column` row scales are delivered as
    [N, 1].
    """

    mode: LinearMode
    group_size: int | None
    as_is: bool
    note: str = ""
    scale_column: bool = False

    @property
    def key(self) -> tuple[QuantAlgo, int | None]:
        """Algorithm and group size, which the members of a mode group must have in common."""
        return self.mode.algo, self.group_size


def native_mode(args: QuantArgs, modifiers: Iterable[str] = ()) -> QuantAlgo | None:
    """Return the family of a weight scheme; None if the engine has no mode for it.

    int4 weights count as AWQ if `modifiers` (from `recipe.yaml`) names the AWQ modifier, and as GPTQ otherwise.
    """
    if args.type is NumberType.INT:
        if args.num_bits > 4:
            return QuantAlgo.W8A16
        return QuantAlgo.W4A16_AWQ if "AWQModifier" in modifiers else QuantAlgo.W4A16_GPTQ
    microscaling = args.group_size == 32
    families = {
        (8, False): QuantAlgo.FP8_BLOCK_SCALES if args.strategy is Strategy.BLOCK else QuantAlgo.FP8,
        (8, True): QuantAlgo.MXFP8,
        (4, False): QuantAlgo.NVFP4,
        (4, True): QuantAlgo.W4A16_MXFP4,
    }
    return families.get((args.num_bits, microscaling))


@lru_cache(maxsize=1024)
def holdings(weight: Weight, platform: Platform | None = None) -> tuple[Holding, ...]:
    """Return every mode that holds the weight exactly on a platform; those with `as_is` come first.

    Results are cached: a model has few distinct weights, some of them 70 000 times.
    """
    held = [
        holding
        for mode in LINEAR_MODES
        if _obstacle(mode, weight, platform) is None
        for holding in _holdings_of_mode(mode, weight, platform)
    ]
    return tuple(sorted(held, key=lambda holding: not holding.as_is))


@lru_cache(maxsize=1024)
def obstacles(weight: Weight, algos: frozenset[QuantAlgo], platform: Platform | None = None) -> tuple[str, ...]:
    """Return why the modes among `algos` that have such codes don't hold the weight; empty if none has such codes."""
    reasons = (
        _obstacle(mode, weight, platform) for mode in LINEAR_MODES if mode.algo in algos and _holds_codes(mode, weight)
    )
    return tuple(reason for reason in reasons if reason is not None)


@lru_cache(maxsize=1024)
def slice_obstacle(weight: Weight, algos: frozenset[QuantAlgo], platform: Platform | None = None) -> str | None:
    """Return why no mode among `algos` holds each rank's slice, if one of them holds the whole weight; else None."""
    if weight.slices is None or any(holding.mode.algo in algos for holding in holdings(weight, platform)):
        return None
    whole = (holding.mode for holding in holdings(replace(weight, slices=None), platform) if holding.mode.algo in algos)
    return next((_wrong_slices(mode, weight, platform) for mode in whole), None)


def activations_of(scheme: QuantScheme) -> Activations:
    """Return the kind of activations that a scheme asks for."""
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
        # Writers set `dynamic` to "local", True or False, and mean the same: the global scale is stored, and the scales
        # of groups are computed at run time.
        return Activations.FP4_LOCAL
    return kinds.get((args.num_bits, args.strategy, args.group_size, args.dynamic), Activations.OTHER)


def _holds_codes(mode: LinearMode, weight: Weight) -> bool:
    """Whether the mode has codes and scales of the weight's kind."""
    if mode.element is not weight.element or weight.args.num_bits not in mode.bits:
        return False
    small_groups = {ScaleForm.TWO_LEVEL: weight.two_level, ScaleForm.EXPONENT: weight.exponent_scale}
    if weight.two_level or weight.exponent_scale:
        return small_groups.get(mode.scale, False)
    return mode.scale not in small_groups


def _obstacle(mode: LinearMode, weight: Weight, platform: Platform | None) -> str | None:
    """Return the first reason why a mode doesn't hold a weight; None if it holds it."""
    return (
        _wrong_scheme(mode, weight)
        or _wrong_groups(mode, weight)
        or _wrong_scales(mode, weight)
        or (platform and _wrong_platform(mode, weight, platform))
        or _wrong_sizes(mode, weight, platform)
        or _wrong_slices(mode, weight, platform)
    )


def _wrong_scheme(mode: LinearMode, weight: Weight) -> str | None:
    """Return why a mode doesn't hold codes, scales or activations of this kind; None if it does."""
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
        return (
            f"{mode.algo} computes on {mode.activations} activations, and the scheme leaves them {_input_label(weight)}"
        )
    return None


def _wrong_groups(mode: LinearMode, weight: Weight) -> str | None:
    """Return why a mode doesn't hold groups or blocks of this size; None if it does, or if there are none."""
    stored = weight.args.group_size
    if stored is not None and not _group_sizes(mode, stored):
        return f"{mode.algo} holds groups of {' or '.join(str(size) for size in sorted(mode.group_sizes))}"
    if weight.args.strategy is Strategy.BLOCK and weight.args.block_structure != mode.block:
        return f"{mode.algo} holds blocks of {'x'.join(map(str, mode.block or ()))}"
    return None


def _wrong_scales(mode: LinearMode, weight: Weight) -> str | None:
    """Return why the mode's kernel would round the stored scales; None if it would not."""
    if mode.scale_dtypes is None or weight.scale_dtype is None or weight.scale_dtype in mode.scale_dtypes:
        return None
    exact = " or ".join(sorted(dtype.torch_name for dtype in mode.scale_dtypes))
    return f"{mode.algo} rounds scales to {exact}, and these are {weight.scale_dtype.torch_name}"


def _wrong_platform(mode: LinearMode, weight: Weight, platform: Platform) -> str | None:
    """Return why the mode has no kernel for the weight or the model on a platform, or drops a bias; None if neither."""
    expert, dtype = weight.expert, weight.model_dtype
    drops = dropped_bias(mode, platform) if weight.bias and not expert else None
    refused = refused_dtype(mode, dtype, platform, expert=expert) if dtype else None
    return missing_kernel(mode, platform, expert=expert) or refused or drops


def _takes_activations(mode: LinearMode, weight: Weight) -> bool:
    """Whether the mode accepts schemes with these activations, exactly or with a note."""
    asked = activations_of(weight.scheme)
    if asked is mode.activations:
        return True
    # A weight with one scale and a static input scale is exactly what mode FP8 holds; another FP8 mode would drop the
    # input scale.
    static_tensor = asked is Activations.FP8_STATIC and weight.args.strategy is Strategy.TENSOR
    return asked in mode.other_activations and not (static_tensor and mode.element is Element.E4M3)


def _input_label(weight: Weight) -> str:
    """Return the activations that the scheme asks for, in words."""
    args = weight.scheme.input_activations
    return "16-bit" if args is None else args.label()


def _wrong_sizes(mode: LinearMode, weight: Weight, platform: Platform | None) -> str | None:
    """Return which sizes the kernel requires, if it doesn't accept a weight of this shape; else None."""
    if weight.shape is None:
        return None
    rows, columns = _row_multiple(mode, weight), _column_multiple(mode, weight, platform)
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{mode.algo} needs {_conditions(mode, weight, platform)}"
    whole_groups = mode.scale is not ScaleForm.GROUP or _usable_group_sizes(mode, weight)
    return None if whole_groups else f"{mode.algo} needs in % {weight.args.group_size} == 0, whole groups"


def _conditions(mode: LinearMode, weight: Weight, platform: Platform | None) -> str:
    """Return the sizes that the kernel requires, in words, without those that every number meets."""
    rows = _row_multiple(mode, weight)
    conditions = [f"out % {rows} == 0"] if rows > 1 else []
    if rows > 1 and weight.fused_parts:
        *most, last = weight.fused_parts
        others = f"each of {', '.join(most)} and " if most else ""
        conditions[0] += f" in {others}{last}, which it fuses,"
    columns = _column_multiple(mode, weight, platform)
    everywhere = lcm(mode.column_multiple, mode.expert_multiple if weight.expert else 1)
    if platform is not None and platform.sm is None and columns > everywhere:
        conditions += [f"in % {everywhere} == 0"] if everywhere > 1 else []
        sms = [sm for sm in SMS if mode.columns_on(sm) > mode.column_multiple]
        conditions.append(f"in % {columns} == 0 on {sms_in_words(sms)}")
    elif columns > 1:
        conditions.append(f"in % {columns} == 0")
    return " and ".join(conditions)


def _row_multiple(mode: LinearMode, weight: Weight) -> int:
    """Return the number that N must be a multiple of."""
    multiple = mode.fused_row_multiple if weight.fused else mode.row_multiple
    return lcm(multiple, mode.expert_multiple if weight.expert else 1)


def _column_multiple(mode: LinearMode, weight: Weight, platform: Platform | None) -> int:
    """Return the number that K must be a multiple of; on all SMs together if the SM is not known."""
    multiple = mode.columns_on(platform.sm) if platform else mode.column_multiple
    return lcm(multiple, mode.expert_multiple if weight.expert else 1)


def _wrong_slices(
    mode: LinearMode, weight: Weight, platform: Platform | None, group_size: int | None = None
) -> str | None:
    """Return why the kernel doesn't accept every rank's slice, and at which sizes it would; None if it does.

    The Linear's groups have `group_size` columns, or the smallest size in which the mode can hold the weight's groups.
    """
    if weight.slices is None or weight.shape is None:
        return None
    size = group_size or min(_usable_group_sizes(mode, weight), default=1)
    multiple = _slice_multiple(
        mode,
        weight.slices,
        size,
        rows=mode.fused_row_multiple if weight.slices.parts else _row_multiple(mode, weight),
        columns=_column_multiple(mode, weight, platform),
    )
    return weight.slices.obstacle(mode.algo, weight.shape, multiple, scales_repeated=mode.scales_follow_kv_heads)


@lru_cache(maxsize=256)
def slice_problem(
    mode: LinearMode, shape: tuple[int, int], slices: Slices, *, group_size: int, fused: bool, expert: bool
) -> str:
    """Return why a mode doesn't hold the slices of a weight that is delivered in it; empty if it holds them.

    `shape` is (N, K). `group_size` is that of the Linear, 1 if its mode has no groups.
    """
    rows = mode.fused_row_multiple if fused or slices.parts else mode.row_multiple
    kernel = mode.expert_multiple if expert else 1
    columns = lcm(mode.column_multiple, kernel)
    multiple = _slice_multiple(mode, slices, group_size, rows=lcm(rows, kernel), columns=columns)
    return slices.problem(shape, multiple, scales_repeated=mode.scales_follow_kv_heads)


def _slice_multiple(mode: LinearMode, slices: Slices, group_size: int, *, rows: int, columns: int) -> int:
    """Return the number that each rank's rows or columns must be a multiple of, with groups of `group_size`.

    `rows` and `columns` are those of the kernel.
    """
    multiples = [columns, group_size] if slices.columns else [rows]
    if mode.block is not None:
        multiples.append(mode.block[slices.columns])
    if slices.alone:
        multiples += [mode.alignment, group_size if mode.scale is ScaleForm.GROUP else 1]
    return lcm(*multiples)


def _group_sizes(mode: LinearMode, stored: int) -> tuple[int, ...]:
    """Return the group sizes of a mode in which it holds stored groups; only float32 scales can be repeated."""
    repeatable = mode.scale is ScaleForm.GROUP
    return tuple(size for size in mode.group_sizes if size == stored or (repeatable and stored % size == 0))


def _usable_group_sizes(mode: LinearMode, weight: Weight) -> tuple[int, ...]:
    """Return the group sizes in which a mode holds all columns of a weight in whole groups.

    Stored groups must be whole too: scales are repeated equally often for each of them.
    """
    stored = weight.args.group_size
    sizes = mode.group_sizes if stored is None else _group_sizes(mode, stored)
    if weight.shape is None:
        return sizes
    columns = weight.shape[1]
    return tuple(size for size in sizes if columns % size == 0 and columns % (stored or size) == 0)


def _holdings_of_mode(mode: LinearMode, weight: Weight, platform: Platform | None) -> Iterator[Holding]:
    """Yield one holding for each group size in which a mode holds a weight, the largest first.

    Modes without groups of several sizes yield one holding.
    """
    args, deviation = weight.args, deviation_of(weight.scheme, mode.activations)
    note = "; ".join(filter(None, (deviation, mode.note)))
    if mode.scale is not ScaleForm.GROUP:
        size = mode.group_sizes[0] if mode.group_sizes else None
        yield Holding(mode=mode, group_size=size, as_is=args.strategy in mode.exact, note=note)
        return
    for size in _usable_group_sizes(mode, weight):
        if not _wrong_slices(mode, weight, platform, size):
            as_is = args.group_size == size and args.strategy in mode.exact
            yield Holding(mode=mode, group_size=size, as_is=as_is, note=note)


def deviation_of(scheme: QuantScheme, activations: Activations = Activations.WIDE) -> str:
    """Return how activations of this kind differ from those of a scheme; empty if they don't.

    A module that is delivered plain has 16-bit activations.
    """
    if activations_of(scheme) is activations:
        return ""
    args = scheme.input_activations
    asked = "leaves them 16-bit" if args is None else f"asks for {args.label()}"
    if activations is Activations.WIDE:
        return f"activations stay 16-bit; the scheme {asked}"
    if activations_of(scheme) is Activations.FP8_STATIC:
        return f"activations are {activations}; the static input scale of the scheme is dropped"
    return f"activations are {activations}; the scheme {asked}"
