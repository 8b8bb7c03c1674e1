"""Which tensors a module delivers, and by which operations: here live the names of the engine's Linear tensors.

Source of names, dtypes and shapes: TensorRT-LLM `_torch/modules/linear.py`, and what ModelOpt 0.47 exports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.dtypes import DType
from trtllm_ct.modes import Activations, Holding, LinearMode, ScaleForm
from trtllm_ct.ops import AdditiveZero, Cast, Copy, Dequantize, Ones, Operation, Repack, WidenScale
from trtllm_ct.plan.model import Delivery
from trtllm_ct.schemes import TensorSpec

if TYPE_CHECKING:
    from trtllm_ct.plan.stored import StoredModule
    from trtllm_ct.plan.weights import QuantizedWeight

__all__ = ["Dtypes", "dequantized", "input_scale_reason", "kv_scale", "native", "plain"]

_ONE_SCALE = (1, 1)


class Dtypes:
    """The dtypes of a delivery: the model's, that of dequantized modules, and whether plain tensors are cast."""

    def __init__(self, *, model: DType, dequantized: DType, cast_plain: bool) -> None:
        self.model = model
        self.dequantized = dequantized
        self._cast_plain = cast_plain

    def of_plain(self, stored: DType) -> DType:
        """The dtype in which a plain tensor is delivered; integers stay what they are."""
        return self.model if self._cast_plain and stored.is_wide_float else stored


def plain(module: StoredModule, locals_: tuple[str, ...], dtypes: Dtypes) -> tuple[Delivery, ...]:
    """Plain tensors under their own names, cast where the whole model is."""
    return tuple(_plain_tensor(module, local, dtypes) for local in locals_)


def dequantized(module: StoredModule, weight: QuantizedWeight, dtypes: Dtypes) -> tuple[Delivery, ...]:
    """A plain `weight` instead of the codes."""
    spec = TensorSpec(dtypes.dequantized, weight.stored.shape)
    return (_from_codes(module, weight, "weight", Dequantize(result=spec)),)


def native(
    module: StoredModule, weight: QuantizedWeight, holding: Holding, dtypes: Dtypes, *, fused: bool
) -> tuple[Delivery, ...]:
    """The tensors that the Linear of a mode reads; a fused one never reads a `pre_quant_scale`, others demand it."""
    mode, stored = holding.mode, weight.stored
    columns = stored.shape[1]
    deliveries = [_codes(module, weight, mode)]
    scale_shape = _scale_shape(holding, stored.shape)
    scale = WidenScale(
        result=TensorSpec(DType.F32, scale_shape), source="weight_scale", stored_shape=stored.scale_shape
    )
    deliveries.append(_delivery(module, "weight_scale", scale))
    if mode.zero_point:
        zero = AdditiveZero(result=TensorSpec(DType.F32, scale_shape))
        deliveries.append(_from_codes(module, weight, "weight_zero", zero))
    if mode.pre_quant_scale and not fused:
        ones = Ones(result=TensorSpec(dtypes.model, (columns,)))
        deliveries.append(Delivery(name=module.full_name("pre_quant_scale"), operation=ones))
    if mode.activations is Activations.STATIC_TENSOR:
        scalar = WidenScale(result=TensorSpec(DType.F32, ()), source="input_scale", stored_shape=_ONE_SCALE)
        deliveries.append(_delivery(module, "input_scale", scalar))
    return tuple(deliveries)


def kv_scale(module: StoredModule, local: str) -> Delivery:
    """`self_attn.k_scale` under the name that engines read, `self_attn.k_proj.k_scale`: float32, one element."""
    scalar = WidenScale(result=TensorSpec(DType.F32, ()), source=local, stored_shape=_ONE_SCALE)
    name = module.full_name(f"{local[0]}_proj.{local}")
    return Delivery(name=name, operation=scalar, sources=module.full_names((local,)))


def input_scale_reason(holding: Holding | None) -> str:
    """Why a stored activation scale is not delivered; empty when the mode takes it."""
    if holding is None:
        return "the module is delivered plain; its activations are not quantized"
    if holding.mode.activations is Activations.STATIC_TENSOR:
        return ""
    return f"{holding.mode.algo} computes on {holding.mode.activations.value} activations"


def _codes(module: StoredModule, weight: QuantizedWeight, mode: LinearMode) -> Delivery:
    """The codes in the mode's container; the stored tensor itself where the bytes are the same."""
    stored = weight.stored
    operation: Operation
    if mode.packing is None or mode.packing == stored.packing:
        operation = Copy(result=module.specs[stored.codes], source=stored.codes)
    else:
        spec = TensorSpec(mode.packing.container, mode.packing.packed_shape(stored.shape))
        operation = Repack(result=spec, packing=mode.packing)
    sources = tuple(local for local in stored.consumed if local in {stored.codes, "weight_shape"})
    return Delivery(name=module.full_name("weight"), operation=operation, sources=module.full_names(sources))


def _scale_shape(holding: Holding, shape: tuple[int, int]) -> tuple[int, ...]:
    rows, columns = shape
    match holding.mode.scale:
        case ScaleForm.SCALAR:
            return ()
        case ScaleForm.ROW:
            return (rows,)
        case ScaleForm.GROUP:
            return rows, columns // (holding.group_size or columns)


def _plain_tensor(module: StoredModule, local: str, dtypes: Dtypes) -> Delivery:
    spec = module.specs[local]
    wanted = dtypes.of_plain(spec.dtype)
    operation: Operation = Copy(result=spec, source=local)
    if wanted is not spec.dtype:
        operation = Cast(result=TensorSpec(wanted, spec.shape), source=local)
    return _delivery(module, local, operation)


def _delivery(module: StoredModule, local: str, operation: Operation) -> Delivery:
    """A delivered tensor made from the one stored tensor that its operation names."""
    sources = () if operation.source is None else module.full_names((operation.source,))
    return Delivery(name=module.full_name(local), operation=operation, sources=sources)


def _from_codes(module: StoredModule, weight: QuantizedWeight, local: str, operation: Operation) -> Delivery:
    """A delivered tensor made from all tensors of the weight."""
    return Delivery(
        name=module.full_name(local), operation=operation, sources=module.full_names(weight.stored.consumed)
    )
