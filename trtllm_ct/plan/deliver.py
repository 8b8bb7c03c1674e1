"""Which tensors a module delivers, and which operation makes each. The names are those of the engine's Linears.

Source of names, dtypes and shapes: TensorRT-LLM `_torch/modules/linear.py` and `fused_moe/quantization.py`, and what
ModelOpt 0.47 exports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, TensorSpec
from trtllm_ct.layouts.floats import E2M1_PACKED
from trtllm_ct.plan.equalize import OWN
from trtllm_ct.plan.ops import (
    AdditiveZero,
    Cast,
    Copy,
    Dequantize,
    FoldPlain,
    FoldTransform,
    LargestScale,
    Ones,
    Operation,
    Reciprocal,
    Reinterpret,
    Repack,
    SharedReciprocal,
    ShiftScale,
    WidenScale,
    Zeros,
)
from trtllm_ct.plan.plan import Delivery
from trtllm_ct.plan.requantize_ops import GivenScale, GlobalScale, RoundedCodes, RoundedScale

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.engine.holdings import Holding
    from trtllm_ct.engine.modes import LinearMode
    from trtllm_ct.engine.requantization import Form
    from trtllm_ct.layouts.folds import Fold
    from trtllm_ct.plan.equalize import Equalized, Replaced
    from trtllm_ct.plan.models.sites import Site
    from trtllm_ct.plan.stored import StoredModule
    from trtllm_ct.plan.weights import QuantizedWeight

__all__ = [
    "Dtypes",
    "dequantized",
    "given_input_scale",
    "group_scale",
    "input_scale_reason",
    "kept",
    "kv_scale",
    "multiplier",
    "native",
    "plain",
    "requantized",
]

_SCALAR = TensorSpec(DType.F32, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtypes:
    """The dtypes of delivered tensors.

    `model` is the model's dtype, `dequantized` the dtype of dequantized modules; with `cast_plain` plain float tensors
    are cast to `model`.
    """

    model: DType
    dequantized: DType
    cast_plain: bool

    def of_plain(self, stored: DType) -> DType:
        """Return the dtype in which a plain tensor of dtype `stored` is delivered; integers keep theirs."""
        return self.model if self.cast_plain and stored.is_wide_float else stored


def plain(
    module: StoredModule, locals_: Iterable[str], dtypes: Dtypes, folds: tuple[Fold, ...] = ()
) -> tuple[Delivery, ...]:
    """Return deliveries of plain tensors: names unchanged, cast if the whole model is, with transforms folded in."""
    return tuple(_plain_tensor(module, local, dtypes, _folds_in(local, folds)) for local in locals_)


def dequantized(
    module: StoredModule, weight: QuantizedWeight, dtypes: Dtypes, folds: tuple[Fold, ...] = ()
) -> tuple[Delivery, ...]:
    """Return the delivery of a dequantized `weight`, with transforms folded in."""
    spec = TensorSpec(dtypes.dequantized, weight.stored.shape)
    if not folds:
        return (_from_weight(module, weight, "weight", Dequantize(result=spec)),)
    locals_ = (*weight.stored.consumed, *_fold_sources(folds))
    operation = FoldTransform(result=spec, folds=folds)
    return (Delivery(name=module.delivered_name("weight"), operation=operation, sources=module.sources(locals_)),)


def native(
    module: StoredModule,
    weight: QuantizedWeight,
    holding: Holding,
    dtypes: Dtypes,
    site: Site,
    equalized: Equalized = OWN,
) -> tuple[Delivery, ...]:
    """Return deliveries of the tensors that the Linear of a mode reads.

    `equalized` has the scalars that replace the stored ones, so that all parts of a fused Linear have the same.
    Fused Linears never read a `pre_quant_scale`; other Linears of a mode that has one require it. Some releases read
    the scales of experts under the name `weight_scale_inv` in some modes, and all read those of Linears that a model
    class joins under it, so these are delivered under both names.
    """
    deliveries = kept(module, weight, holding, dtypes, site, equalized)
    return deliveries + tuple(_input_scale(module, holding.mode, equalized))


def kept(
    module: StoredModule,
    weight: QuantizedWeight,
    holding: Holding,
    dtypes: Dtypes,
    site: Site,
    equalized: Equalized = OWN,
) -> tuple[Delivery, ...]:
    """Return the deliveries of `native` without the scale of the input."""
    mode = holding.mode
    deliveries = [_codes(module, weight, mode), *_scales(module, weight, holding, equalized)]
    if (site.expert or site.class_joins) and mode.expert_scale_alias:
        deliveries.append(_renamed(module, deliveries[1], mode.expert_scale_alias))
    one = Ones(result=_SCALAR)
    deliveries += [Delivery(name=module.delivered_name(local), operation=one) for local in mode.unit_scalars]
    if mode.pre_quant_scale and not site.fused:
        ones = Ones(result=TensorSpec(dtypes.model, (weight.stored.shape[1],)))
        deliveries.append(Delivery(name=module.delivered_name("pre_quant_scale"), operation=ones))
    return tuple(deliveries)


def requantized(
    module: StoredModule, weight: QuantizedWeight, holding: Holding, form: Form, site: Site
) -> tuple[Delivery, ...]:
    """Return deliveries of the tensors that the Linear of a mode reads of a weight that is rounded to `form`.

    The scale of the input, which some of these modes read, is `given_input_scale`; none requires a `pre_quant_scale`.
    """
    mode, (rows, columns) = holding.mode, weight.stored.shape
    codes = TensorSpec(DType.F8_E4M3, (rows, columns))
    if form.element is Element.E2M1:
        codes = TensorSpec(DType.U8, E2M1_PACKED.packed_shape((rows, columns)))
    shape = mode.scale_shape((rows, columns), holding.group_size)
    scale = TensorSpec(mode.scale.dtype, (*shape, 1) if holding.scale_column else shape)
    deliveries = [
        _from_weight(module, weight, "weight", RoundedCodes(result=codes, form=form)),
        _from_weight(module, weight, "weight_scale", RoundedScale(result=scale, form=form)),
    ]
    if (site.expert or site.class_joins) and mode.expert_scale_alias:
        deliveries.append(_renamed(module, deliveries[1], mode.expert_scale_alias))
    if form.scale_dtype is DType.F8_E4M3:
        deliveries.append(Delivery(name=module.delivered_name("weight_scale_2"), operation=GlobalScale(result=_SCALAR)))
    return tuple(deliveries)


def given_input_scale(module: StoredModule, value: float) -> Delivery:
    """Return the delivery of the static scale of a module's input that was given beside the checkpoint."""
    return Delivery(name=module.delivered_name("input_scale"), operation=GivenScale(result=_SCALAR, value=value))


def kv_scale(module: StoredModule, local: str, name: str) -> Delivery:
    """Return the delivery of a KV-cache scale under the name that engines read: float32, one element.

    Of scales per head it is the largest.
    """
    operation = WidenScale if module.specs[local].numel == 1 else LargestScale
    scalar = operation(result=_SCALAR, source=local)
    return Delivery(name=name, operation=scalar, sources=module.sources((local,)))


def input_scale_reason(holding: Holding | None) -> str:
    """Return why a stored activation scale is not delivered; empty when the mode reads it."""
    if holding is None:
        return "the module is delivered plain; its activations are not quantized"
    if holding.mode.input_scale is not None:
        return ""
    return f"{holding.mode.algo} computes on {holding.mode.activations} activations"


def _codes(module: StoredModule, weight: QuantizedWeight, mode: LinearMode) -> Delivery:
    """Return the delivery of the codes in the mode's packing; a copy where the stored packing is the same."""
    stored = weight.stored
    operation: Operation
    if mode.packing is None or mode.packing == stored.packing:
        operation = Copy(result=module.specs[stored.codes], source=stored.codes)
    else:
        spec = TensorSpec(mode.packing.container, mode.packing.packed_shape(stored.shape))
        operation = Repack(result=spec, packing=mode.packing)
    not_codes = {stored.scale, stored.divisor, stored.zero_point}
    sources = [local for local in stored.consumed if local not in not_codes]
    return Delivery(name=module.delivered_name("weight"), operation=operation, sources=module.sources(sources))


def _scales(
    module: StoredModule, weight: QuantizedWeight, holding: Holding, equalized: Equalized
) -> Iterator[Delivery]:
    """Yield `weight_scale`, and `weight_scale_2` or `weight_zero` where the mode has them."""
    stored, mode = weight.stored, holding.mode
    shape = mode.scale_shape(stored.shape, holding.group_size)
    spec = TensorSpec(mode.scale.dtype, (*shape, 1) if holding.scale_column else shape)
    if mode.scale.one_byte:
        yield _from_one(module, "weight_scale", stored.scale, group_scale(spec, stored.scale, equalized.weight))
        if stored.divisor is not None:
            yield _from_one(module, "weight_scale_2", stored.divisor, multiplier(stored.divisor, equalized.weight))
        return
    yield _from_weight(module, weight, "weight_scale", WidenScale(result=spec))
    if mode.zero_point:
        yield _from_weight(module, weight, "weight_zero", AdditiveZero(result=spec))


def group_scale(spec: TensorSpec, source: str, replaced: Replaced | None) -> Operation:
    """Return the operation for one-byte scales.

    They are delivered unchanged, unless the global scale of the weight (a divisor) is replaced by itself times a power
    of two. Then the scales are multiplied by the same power. They become zero where the stored global scale is 0.
    """
    if replaced is None:
        return Reinterpret(result=spec, source=source)
    if replaced.stored == 0:
        return Zeros(result=spec, source=source)
    return ShiftScale(result=spec, source=source, power=replaced.power)


def multiplier(source: str, replaced: Replaced | None) -> Operation:
    """Return the operation that turns a stored divisor, or the shared one that replaces it, into a multiplier."""
    if replaced is None:
        return Reciprocal(result=_SCALAR, source=source)
    return SharedReciprocal(result=_SCALAR, source=source, stored=replaced.stored, shared=replaced.shared)


def _input_scale(module: StoredModule, mode: LinearMode, equalized: Equalized) -> list[Delivery]:
    """Return the static scale of the input, where the mode reads one and it is stored.

    A scale that is required but not stored is a fault elsewhere (`ModelModules`).
    """
    source = mode.input_scale
    if source is None or source not in module.views:
        return []
    if source == "input_scale":
        return [_from_one(module, "input_scale", source, WidenScale(result=_SCALAR, source=source))]
    return [_from_one(module, "input_scale", source, multiplier(source, equalized.input))]


def _plain_tensor(module: StoredModule, local: str, dtypes: Dtypes, folds: tuple[Fold, ...] = ()) -> Delivery:
    """Return the delivery of one plain tensor: copied, cast, or with transforms folded in."""
    spec = module.specs[local]
    wanted = dtypes.of_plain(spec.dtype)
    operation: Operation = Copy(result=spec, source=local)
    if folds:
        operation = FoldPlain(result=TensorSpec(wanted, spec.shape), source=local, folds=folds)
        sources = module.sources((local, *_fold_sources(folds)))
        return Delivery(name=module.delivered_name(local), operation=operation, sources=sources)
    if wanted is not spec.dtype:
        operation = Cast(result=TensorSpec(wanted, spec.shape), source=local)
    return _from_one(module, local, local, operation)


def _folds_in(local: str, folds: tuple[Fold, ...]) -> tuple[Fold, ...]:
    """Return the folds that change a tensor: all for a weight, those of its rows for a bias, none for anything else."""
    return {"weight": folds, "bias": tuple(fold for fold in folds if fold.axis == 0)}.get(local, ())


def _fold_sources(folds: tuple[Fold, ...]) -> tuple[str, ...]:
    """Return the local names of the tensors that folds read, each once."""
    return tuple(dict.fromkeys(source for fold in folds for source in fold.sources))


def _from_one(module: StoredModule, local: str, source: str, operation: Operation) -> Delivery:
    """Return the delivery of a tensor that its operation makes from one stored tensor, `source` by its local name."""
    return Delivery(name=module.delivered_name(local), operation=operation, sources=module.sources((source,)))


def _from_weight(module: StoredModule, weight: QuantizedWeight, local: str, operation: Operation) -> Delivery:
    """Return the delivery of a tensor that is made from all stored tensors of the weight."""
    sources = module.sources(weight.stored.consumed)
    return Delivery(name=module.delivered_name(local), operation=operation, sources=sources)


def _renamed(module: StoredModule, delivery: Delivery, local: str) -> Delivery:
    """Return the delivery of the same tensor under a second name."""
    return Delivery(name=module.delivered_name(local), operation=delivery.operation, sources=delivery.sources)
