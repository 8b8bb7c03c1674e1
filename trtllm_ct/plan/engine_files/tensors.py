"""Which tensors a module delivers to an engine-build checkpoint, and which operation makes each, for the whole module.

Ranks get parts of them (`ranks.py`). Parts of a fused Linear have one scale of their input, and in some modes one scale
of the weight: those operations read the scales of all parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.engine.build_mode import BuildTensor, Content, Extent
from trtllm_ct.engine.quant_config import LayerQuantConfig
from trtllm_ct.plan import deliver
from trtllm_ct.plan.models.build_classes import ROUTER
from trtllm_ct.plan.ops import Cast, Copy, Ones, Repack, WidenScale
from trtllm_ct.plan.rank_ops import (
    LargestOf,
    LargestReciprocal,
    Permute,
    Requantize,
    RoundScale,
    RoundZero,
    WidenCastScale,
)
from trtllm_ct.plan.stored import Shared

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trtllm_ct.engine.build_mode import BuildMode
    from trtllm_ct.plan.equalize import Equalized
    from trtllm_ct.plan.ops import Operation
    from trtllm_ct.plan.plan import Delivery, ModulePlan
    from trtllm_ct.plan.stored import View

__all__ = ["Held", "Item", "held_items", "input_scale_of", "norm_items", "peer_views", "plain_items"]

_SCALAR = TensorSpec(DType.F32, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One tensor of a whole module: what the file calls it, its operation, and the stored tensors that it is from."""

    tensor: BuildTensor
    operation: Operation
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A module that is delivered in a mode: the mode with its group size, and the global scales that it shares."""

    mode: BuildMode
    group_size: int | None
    equalized: Equalized

    @property
    def layer(self) -> LayerQuantConfig:
        """The mode as the configuration of the engine has it."""
        return LayerQuantConfig(
            quant_algo=self.mode.algo,
            group_size=self.group_size,
            has_zero_point=self.mode.has_zero_point,
            pre_quant_scale=self.mode.pre_quant_scale,
        )


def input_scale_of(module: ModulePlan) -> str:
    """Return the local name of the static scale of a quantized module's input."""
    return "input_global_scale" if module.weight is not None and module.weight.divisor else "input_scale"


def held_items(module: ModulePlan, parts: Sequence[ModulePlan], held: Held, dtype: DType) -> tuple[Item, ...]:
    """Return the tensors of a module in a mode; `parts` are the modules of its fused Linear, itself included.

    `dtype` is the model's dtype. Tensors of the whole Linear are made by the first part alone.
    """
    return tuple(_held_item(tensor, module, parts, held, dtype) for tensor in held.mode.tensors)


def peer_views(module: ModulePlan, parts: Sequence[ModulePlan]) -> dict[str, View]:
    """Return views of the scales of the other parts of a fused Linear, by the local names that operations use."""
    views: dict[str, View] = {}
    for part in parts:
        if part.weight is None or part.name == module.name:
            continue
        for local in (part.weight.scale, input_scale_of(part)):
            if local in part.views:
                views[_peer(module, part, local)] = Shared.of_view(part.views[local])
    return views


def plain_items(deliveries: Sequence[Delivery], views: Mapping[str, View], name: str) -> tuple[Item, ...]:
    """Return the tensors of a module that is delivered plain under the engine's `name`.

    `views` are those of the module. The router of experts is float32.
    """
    items = []
    for delivery in deliveries:
        operation, local = delivery.operation, delivery.name.rpartition(".")[2]
        if name == ROUTER:
            operation = _as_float32(operation, views)
        extent = Extent.MATRIX if len(operation.result.shape) > 1 else Extent.ROWS
        tensor = BuildTensor(name=local, content=Content.CODES, extent=extent, dtype=None)
        items.append(Item(tensor=tensor, operation=operation, sources=delivery.sources))
    return tuple(items)


def norm_items(mode: BuildMode | None, dtype: DType) -> tuple[Item, ...]:
    """Return the tensors that the norms before attention and before the MLP have in a mode beside their weight."""
    if mode is None or mode.norm_scale is None:
        return ()
    tensor = BuildTensor(name=mode.norm_scale, content=Content.ONES, extent=Extent.SCALAR, dtype=None)
    return (Item(tensor=tensor, operation=Ones(result=TensorSpec(dtype, ()))),)


def _held_item(tensor: BuildTensor, module: ModulePlan, parts: Sequence[ModulePlan], held: Held, dtype: DType) -> Item:
    """Return one tensor of a module in a mode."""
    weight = module.weight
    if weight is None:
        raise AssertionError("a module in a mode has codes")
    operation = _operation(tensor, module, parts, held, dtype)
    locals_ = {
        Content.ONES: (),
        Content.INPUT_SCALE: (),
        Content.GLOBAL_SCALE: (weight.divisor,),
    }.get(tensor.content, weight.consumed)
    sources = [source for local in locals_ if local for source in module.views[local].sources]
    if isinstance(operation, LargestOf):
        local = input_scale_of(module) if tensor.content is Content.INPUT_SCALE else weight.scale
        sources += [source for part in parts if local in part.views for source in part.views[local].sources]
    return Item(tensor=tensor, operation=operation, sources=tuple(dict.fromkeys(sources)))


def _operation(
    tensor: BuildTensor, module: ModulePlan, parts: Sequence[ModulePlan], held: Held, dtype: DType
) -> Operation:
    """Return the operation that makes one tensor of a module in a mode."""
    weight, mode = module.weight, held.mode
    if weight is None:
        raise AssertionError("a module in a mode has codes")
    rows, columns = weight.shape
    wanted = tensor.dtype or dtype
    match tensor.content:
        case Content.CODES:
            return _codes(tensor, module, parts, mode, dtype)
        case Content.SCALE:
            return _scale(tensor, module, parts, held, dtype)
        case Content.ZERO:
            return RoundZero(result=TensorSpec(wanted, (rows, columns // (held.group_size or columns))))
        case Content.GLOBAL_SCALE:
            return deliver.multiplier(weight.divisor or "", held.equalized.weight)
        case Content.INPUT_SCALE:
            local = input_scale_of(module)
            largest = LargestReciprocal if weight.divisor else LargestOf
            return largest(result=_SCALAR, scales=_scales(module, parts, local))
        case Content.ONES:
            return Ones(result=TensorSpec(wanted, (columns,)))


def _scale(tensor: BuildTensor, module: ModulePlan, parts: Sequence[ModulePlan], held: Held, dtype: DType) -> Operation:
    """Return the operation that makes the scale of a module's codes; `dtype` is the model's dtype."""
    weight, wanted = module.weight, tensor.dtype or dtype
    if weight is None:
        raise AssertionError("a module in a mode has codes")
    rows, columns = weight.shape
    stored = module.views[weight.scale].spec
    if tensor.extent is Extent.SCALAR:
        scales = _scales(module, parts, weight.scale)
        return LargestOf(result=_SCALAR, scales=scales) if len(parts) > 1 else WidenScale(result=_SCALAR)
    if wanted is DType.F8_E4M3:
        return deliver.group_scale(TensorSpec(wanted, stored.shape), weight.scale, held.equalized.weight)
    shape = (rows,) if tensor.extent is Extent.ROWS else (rows, columns // (held.group_size or columns))
    spec = TensorSpec(wanted, shape)
    if wanted is not DType.F32:
        return RoundScale(result=spec)
    # float16 alone has a narrower range than stored scales may have.
    if held.mode.casts_scales and dtype is DType.F16 and stored.dtype is not dtype:
        return WidenCastScale(result=spec, cast=dtype)
    return WidenScale(result=spec)


def _codes(
    tensor: BuildTensor, module: ModulePlan, parts: Sequence[ModulePlan], mode: BuildMode, dtype: DType
) -> Operation:
    """Return the operation that makes the codes of a module; `dtype` is the model's dtype."""
    weight = module.weight
    if weight is None:
        raise AssertionError("a module in a mode has codes")
    stored = module.views[weight.codes].spec
    if mode.requantizes and len(parts) > 1:
        return Requantize(result=stored, scales=_scales(module, parts, weight.scale))
    if mode.order is not None:
        rows, columns = weight.shape
        width = mode.order.bundle * columns * mode.order.bits // dtype.bits
        return Permute(result=TensorSpec(dtype, (rows // mode.order.bundle, width)), order=mode.order)
    if mode.packing is None or mode.packing == weight.packing:
        return Copy(result=stored, source=weight.codes)
    shape = mode.packing.packed_shape(weight.shape)
    return Repack(result=TensorSpec(tensor.dtype or mode.packing.container, shape), packing=mode.packing)


def _scales(module: ModulePlan, parts: Sequence[ModulePlan], local: str) -> tuple[str, ...]:
    """Return the local names of one scale of all parts of a Linear, in the order of the parts."""
    return tuple(local if part.name == module.name else _peer(module, part, local) for part in parts)


def _peer(module: ModulePlan, part: ModulePlan, local: str) -> str:
    """Return the local name of a scale of another part: its name relative to the parent of both."""
    return f"{part.name.removeprefix(module.name.rpartition('.')[0] + '.')}.{local}"


def _as_float32(operation: Operation, views: Mapping[str, View]) -> Operation:
    """Return the operation with a float32 result."""
    result = TensorSpec(DType.F32, operation.result.shape)
    if isinstance(operation, Copy | Cast):
        stored = views[operation.source or ""].spec.dtype
        kind = Copy if stored is DType.F32 else Cast
        return kind(result=result, source=operation.source)
    return type(operation)(result=result)
