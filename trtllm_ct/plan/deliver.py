"""Which tensors a module delivers, and by which operations: here live the names of the engine's Linear tensors.

Source of names, dtypes and shapes: TensorRT-LLM `_torch/modules/linear.py` and `fused_moe/quantization.py`, and what
ModelOpt 0.47 exports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.plan.equalize import OWN
from trtllm_ct.plan.ops import (
    AdditiveZero,
    Cast,
    Copy,
    Dequantize,
    FoldPlain,
    FoldTransform,
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

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.engine.holdings import Holding
    from trtllm_ct.engine.modes import LinearMode
    from trtllm_ct.layouts.folds import Fold
    from trtllm_ct.plan.equalize import Equalized, Replaced
    from trtllm_ct.plan.models.sites import Site
    from trtllm_ct.plan.stored import StoredModule
    from trtllm_ct.plan.weights import QuantizedWeight

__all__ = ["Dtypes", "dequantized", "input_scale_reason", "kv_scale", "native", "plain"]

_SCALAR = TensorSpec(DType.F32, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtypes:
    """The dtypes of a delivery: the model's, that of dequantized modules, and whether plain tensors are cast."""

    model: DType
    dequantized: DType
    cast_plain: bool

    def of_plain(self, stored: DType) -> DType:
        """The dtype in which a plain tensor is delivered; integers stay what they are."""
        return self.model if self.cast_plain and stored.is_wide_float else stored


def plain(
    module: StoredModule, locals_: Iterable[str], dtypes: Dtypes, folds: tuple[Fold, ...] = ()
) -> tuple[Delivery, ...]:
    """Plain tensors under their own names, cast where the whole model is, with transforms folded in."""
    return tuple(_plain_tensor(module, local, dtypes, _folds_in(local, folds)) for local in locals_)


def dequantized(
    module: StoredModule, weight: QuantizedWeight, dtypes: Dtypes, folds: tuple[Fold, ...] = ()
) -> tuple[Delivery, ...]:
    """A plain `weight` instead of the codes, with transforms folded in."""
    spec = TensorSpec(dtypes.dequantized, weight.stored.shape)
    if not folds:
        return (_from_weight(module, weight, "weight", Dequantize(result=spec)),)
    locals_ = (*weight.stored.consumed, *_matrices(folds))
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
    """The tensors that the Linear of a mode reads; `equalized` are the scalars that it shares with other parts.

    Linears that the engine joins never read a `pre_quant_scale`, the others demand it. Experts read block and MXFP4
    scales under the name `weight_scale_inv` in some releases, so they get both names.
    """
    mode = holding.mode
    deliveries = [_codes(module, weight, mode), *_scales(module, weight, holding, equalized)]
    if site.expert and mode.expert_scale_alias:
        deliveries.append(_renamed(module, deliveries[1], mode.expert_scale_alias))
    if mode.pre_quant_scale and not site.fused:
        ones = Ones(result=TensorSpec(dtypes.model, (weight.stored.shape[1],)))
        deliveries.append(Delivery(name=module.delivered_name("pre_quant_scale"), operation=ones))
    return tuple(deliveries + _input_scale(module, mode, equalized))


def kv_scale(module: StoredModule, local: str, name: str) -> Delivery:
    """A KV-cache scale under the name that engines read: float32, one element."""
    scalar = WidenScale(result=_SCALAR, source=local)
    return Delivery(name=name, operation=scalar, sources=module.sources((local,)))


def input_scale_reason(holding: Holding | None) -> str:
    """Why a stored activation scale is not delivered; empty when the mode takes it."""
    if holding is None:
        return "the module is delivered plain; its activations are not quantized"
    if holding.mode.input_scale is not None:
        return ""
    return f"{holding.mode.algo} computes on {holding.mode.activations} activations"


def _codes(module: StoredModule, weight: QuantizedWeight, mode: LinearMode) -> Delivery:
    """The codes in the mode's container; the stored tensor itself where the bytes are the same."""
    stored = weight.stored
    operation: Operation
    if mode.packing is None or mode.packing == stored.packing:
        operation = Copy(result=module.specs[stored.codes], source=stored.codes)
    else:
        spec = TensorSpec(mode.packing.container, mode.packing.packed_shape(stored.shape))
        operation = Repack(result=spec, packing=mode.packing)
    apart = {stored.scale, stored.divisor, "weight_zero_point" if stored.has_zero_point else None}
    sources = [local for local in stored.consumed if local not in apart]
    return Delivery(name=module.delivered_name("weight"), operation=operation, sources=module.sources(sources))


def _scales(
    module: StoredModule, weight: QuantizedWeight, holding: Holding, equalized: Equalized
) -> Iterator[Delivery]:
    """`weight_scale` and what else a mode has to turn codes into values."""
    stored, mode = weight.stored, holding.mode
    spec = TensorSpec(mode.scale.dtype, mode.scale_shape(stored.shape, holding.group_size))
    if mode.scale.one_byte:
        yield _from_one(module, "weight_scale", _group_scale(spec, stored.scale, equalized.weight))
        if stored.divisor is not None:
            yield _from_one(module, "weight_scale_2", _multiplier(stored.divisor, equalized.weight))
        return
    yield _from_weight(module, weight, "weight_scale", WidenScale(result=spec))
    if mode.zero_point:
        yield _from_weight(module, weight, "weight_zero", AdditiveZero(result=spec))


def _group_scale(spec: TensorSpec, source: str, replaced: Replaced | None) -> Operation:
    """Scales of one byte: as they are, or with the power of two by which the scalar of the weight was replaced."""
    if replaced is None:
        return Reinterpret(result=spec, source=source)
    if replaced.stored == 0:
        return Zeros(result=spec, source=source)
    return ShiftScale(result=spec, source=source, power=replaced.power)


def _multiplier(source: str, replaced: Replaced | None) -> Operation:
    """A divisor as a multiplier: the module's own, or that of all parts of its Linear."""
    if replaced is None:
        return Reciprocal(result=_SCALAR, source=source)
    return SharedReciprocal(result=_SCALAR, source=source, stored=replaced.stored, shared=replaced.shared)


def _input_scale(module: StoredModule, mode: LinearMode, equalized: Equalized) -> list[Delivery]:
    """The static scale of the input, where the mode reads one; the planner faults one that is not stored."""
    source = mode.input_scale
    if source is None or source not in module.views:
        return []
    if source == "input_scale":
        return [_from_one(module, "input_scale", WidenScale(result=_SCALAR, source=source))]
    return [_from_one(module, "input_scale", _multiplier(source, equalized.input))]


def _plain_tensor(module: StoredModule, local: str, dtypes: Dtypes, folds: tuple[Fold, ...] = ()) -> Delivery:
    spec = module.specs[local]
    wanted = dtypes.of_plain(spec.dtype)
    operation: Operation = Copy(result=spec, source=local)
    if folds:
        operation = FoldPlain(result=TensorSpec(wanted, spec.shape), source=local, folds=folds)
        sources = module.sources((local, *_matrices(folds)))
        return Delivery(name=module.delivered_name(local), operation=operation, sources=sources)
    if wanted is not spec.dtype:
        operation = Cast(result=TensorSpec(wanted, spec.shape), source=local)
    return _from_one(module, local, operation)


def _folds_in(local: str, folds: tuple[Fold, ...]) -> tuple[Fold, ...]:
    """Those that change a tensor: a bias is transformed with the rows of its weight, other parameters never."""
    return {"weight": folds, "bias": tuple(each for each in folds if each.axis == 0)}.get(local, ())


def _matrices(folds: tuple[Fold, ...]) -> tuple[str, ...]:
    """The local names of what folds read, each once."""
    return tuple(dict.fromkeys(source for each in folds for source in each.sources))


def _from_one(module: StoredModule, local: str, operation: Operation) -> Delivery:
    """A delivered tensor made from the one tensor that its operation names."""
    sources = () if operation.source is None else module.sources((operation.source,))
    return Delivery(name=module.delivered_name(local), operation=operation, sources=sources)


def _from_weight(module: StoredModule, weight: QuantizedWeight, local: str, operation: Operation) -> Delivery:
    """A delivered tensor made from all tensors of the weight."""
    sources = module.sources(weight.stored.consumed)
    return Delivery(name=module.delivered_name(local), operation=operation, sources=sources)


def _renamed(module: StoredModule, delivery: Delivery, local: str) -> Delivery:
    """The same tensor under a second name."""
    return Delivery(name=module.delivered_name(local), operation=delivery.operation, sources=delivery.sources)
