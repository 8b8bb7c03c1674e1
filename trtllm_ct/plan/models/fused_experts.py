"""Split 3-D tensors that hold all experts of a layer into one module for each expert and projection, and stack them.

Two spellings exist: `experts.gate_up_proj.weight_packed` [E, 2I, W] with `experts.down_proj`, and
`experts.w13_weight` with `experts.w2_weight`. Plain experts have no parameter name at the end
(`experts.gate_up_proj` [E, 2I, H]). The rows of gate come before those of up.
Source: llm-compressor issues 3183 and 3200; transformers 5.23 `modeling_qwen3_moe.py`.

Some classes have plain experts as [E, in, out]: a shape doesn't tell the two orders apart when two sizes are equal, so
`STACKED_EXPERTS` names them. The classes in this table read no other spelling, so plain experts are delivered stacked.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, TypeGuard

from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.write_plan import StackPart
from trtllm_ct.formats import WEIGHT_TENSORS, Axis, axes_of
from trtllm_ct.plan.models.expert_spellings import PROJECTIONS, STACKED_EXPERTS
from trtllm_ct.plan.stored import ExpertSlice, StoredModule, TransposedExpert, View, Whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trtllm_ct.plan.models.expert_spellings import StackedExperts
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["NOT_PER_EXPERT", "split_fused_experts", "stack_parts", "stack_warnings", "stores_inputs_first"]

# Name of a fused tensor -> the projections whose rows it holds, as positions in (gate, up, down).
_PARTS = {"gate_up_proj": (0, 1), "w13_weight": (0, 1), "down_proj": (2,), "w2_weight": (2,)}
_WITH_ROWS = frozenset({Axis.ROWS, Axis.SCALE_ROWS})
# Tensors that hold the shape of the fused weight. The shape of one expert follows from its codes.
NOT_PER_EXPERT = frozenset(name for name, axes in WEIGHT_TENSORS.items() if Axis.SHAPE in axes)


def split_fused_experts(
    modules: dict[str, StoredModule], model: Model, *, inputs_first: bool = False, plain: bool = True
) -> dict[str, StoredModule]:
    """Return the modules, with every tensor of all experts replaced by its experts; other modules are unchanged.

    `inputs_first` says that plain tensors are [E, in, out], see `stores_inputs_first`. Without `plain` only codes are
    split.
    """
    result: dict[str, StoredModule] = {}
    owner = f".{model.experts}"
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if not plain and not module.is_quantized:
            result[name] = module
            continue
        if name.endswith(owner):
            # Plain fused experts are parameters of the experts module itself.
            fused = {local: view for local, view in module.views.items() if local in _PARTS and _is_stack(view)}
            for local, view in fused.items():
                if inputs_first:
                    _add_transposed(result, name, local, view, model)
                else:
                    _add_experts(result, name, local, {"weight": view}, model)
            rest = {local: view for local, view in module.views.items() if local not in fused}
        elif leaf in _PARTS and parent.endswith(owner):
            _add_experts(result, parent, leaf, module.views, model)
            rest = {local: view for local, view in module.views.items() if not _has_experts(view, local)}
        else:
            result[name] = module
            continue
        if rest:
            result[name] = StoredModule(name, rest)
    return result


def stores_inputs_first(modules: Mapping[str, StoredModule], model: Model) -> bool:
    """Whether plain tensors of all experts are [E, in, out]: by the model's class, unless their shapes exclude it.

    transformers 5 saves Qwen3-VL-MoE as [E, out, in], other writers as [E, in, out]. A single shape may fit both; but
    `gate_up_proj` is square only if in = 2I, and `down_proj` only if in = I, so one of them always shows the order.
    """
    stacked = STACKED_EXPERTS.get(model.text_type)
    if stacked is None or model.stated is None or not stacked.inputs_first:
        return False
    shapes = _shapes(model)
    outputs_first = [
        view.spec.shape[1:] == shapes[local][::-1]
        for name, module in modules.items()
        if name.endswith(f".{model.experts}")
        for local, view in module.views.items()
        if local in shapes and view.spec.shape[1:] != shapes[local]
    ]
    return not (outputs_first and all(outputs_first))


def stack_parts(modules: Iterable[ModulePlan], model: Model, *, engine: bool) -> dict[str, StackPart]:
    """Return the places of plain experts in the stacked tensors that the model's class reads, by delivered name.

    `engine` says that the class is TensorRT-LLM's. Layers with quantized experts, with several dtypes in one stack, or
    without some projection have no places: no stacked tensor can hold them.
    """
    stacked = STACKED_EXPERTS.get(model.text_type) if engine else model.spelling.stacked
    if stacked is None or (engine and not stacked.by_engine):
        return {}
    layers: dict[str, list[ModulePlan]] = {}
    for module in modules:
        if module.experts is not None:
            layers.setdefault(module.experts, []).append(module)
    parts: dict[str, StackPart] = {}
    for owner, members in layers.items():
        specs = {delivery.name: delivery.spec for module in members for delivery in module.deliveries}
        if not any(module.layer for module in members):
            parts |= _parts_of_layer(owner, specs, stacked)
    return parts


def stack_warnings(model: Model) -> tuple[str, ...]:
    """Return a warning if transformers 5 misreads stacked tensors of a model: it tells their axes apart by their sizes.

    Source: transformers 5.23 `core_model_loading.py`, `Transpose(check_dims=True)`.
    """
    stacked = STACKED_EXPERTS.get(model.text_type)
    if stacked is None or not stacked.told_by_shape or model.stated is None:
        return ()
    square = [name for name, shape in _shapes(model).items() if len(set(shape)) == 1]
    if not square:
        return ()
    what = f"{' and '.join(square)} of the experts: both axes have the same size"
    return (
        f"{what}, so transformers 5 reads them in the wrong order; transformers 4 and TensorRT-LLM read them right",
    )


def _shapes(model: Model) -> dict[str, tuple[int, int]]:
    """Return the sizes (in, out) of an expert's part of each stacked tensor."""
    hidden, inner = model.sizes["hidden"], model.sizes["moe_intermediate"]
    return {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}


def _parts_of_layer(owner: str, specs: Mapping[str, TensorSpec], stacked: StackedExperts) -> dict[str, StackPart]:
    """Return the places of the experts of one layer.

    Nothing if a projection or a bias of some expert is missing, or if the parts of one stack have several dtypes.
    """
    parent = owner.rpartition(".")[0]
    entries: dict[tuple[int, int, str], str] = {}
    for name in specs:
        expert, projection, local = name.removeprefix(f"{owner}.").split(".")
        entries[int(expert), PROJECTIONS[projection], local] = name
    count = 1 + max(number for number, _, _ in entries)
    parts: dict[str, StackPart] = {}
    for local, stacks in (("weight", stacked.parts), ("bias", stacked.biases or {})):
        transposed = stacked.inputs_first and local == "weight"
        for stack, positions in stacks.items():
            for number in range(count):
                keys = [(number, position, local) for position in positions]
                if not entries.keys() >= set(keys):
                    return {}
                rows = {entries[key]: specs[entries[key]].shape[0] for key in keys}
                whole = StackPart(
                    stack=f"{parent}.{stack}",
                    entry=number,
                    entries=count,
                    line=0,
                    lines=sum(rows.values()),
                    step=len(rows) if stacked.alternate else 1,
                    transposed=transposed,
                )
                parts |= _one_after_another(whole, rows)
    dtypes = {(part.stack, specs[name].dtype) for name, part in parts.items()}
    uniform = len(dtypes) == len({stack for stack, _ in dtypes})
    return parts if uniform and parts.keys() == specs.keys() else {}


def _one_after_another(whole: StackPart, rows: Mapping[str, int]) -> dict[str, StackPart]:
    """Return the places of matrices with so many rows in one entry, in which they alternate or follow each other."""
    parts, line = {}, 0
    for position, (name, count) in enumerate(rows.items()):
        parts[name] = replace(whole, line=position if whole.step > 1 else line)
        line += count
    return parts


def _add_transposed(result: dict[str, StoredModule], parent: str, fused: str, view: Whole, model: Model) -> None:
    """Add to `result` one module for each expert and each projection in a plain tensor [E, in, out]."""
    positions = _PARTS[fused]
    count, inputs, outputs = (*view.spec.shape, 0, 0)[:3]
    rows = outputs // len(positions)
    for expert in range(count):
        for part, position in enumerate(positions):
            spec = TensorSpec(view.spec.dtype, (rows, inputs))
            columns = (part * rows, (part + 1) * rows)
            piece = TransposedExpert(spec=spec, name=view.name, expert=expert, columns=columns)
            name = f"{parent}.{expert}.{model.projections[position]}"
            result[name] = StoredModule(name, {"weight": piece})


def _is_stack(view: View) -> TypeGuard[Whole]:
    """Whether a plain parameter of the experts module has an entry for each expert."""
    return _has_experts(view, "weight")


def _has_experts(view: View, local: str) -> TypeGuard[Whole]:
    """Whether a tensor has an entry for each expert.

    Other tensors stay with the fused module, and are refused later if the plan has no use for them.
    """
    return local not in NOT_PER_EXPERT and isinstance(view, Whole) and len(view.spec.shape) > 0


def _add_experts(
    result: dict[str, StoredModule], parent: str, fused: str, views: Mapping[str, View], model: Model
) -> None:
    """Add to `result` one module for each expert and each projection in a fused module's tensors.

    `parent` is the name of the experts module, `fused` the name of the fused module or parameter in it.
    """
    parts, axes = _PARTS[fused], axes_of(views)
    for local, view in views.items():
        if not _has_experts(view, local):
            continue
        for expert in range(view.spec.shape[0]):
            pieces = _pieces(view, expert, len(parts), axes.get(local))
            for part, piece in zip(parts, pieces, strict=True):
                name = f"{parent}.{expert}.{model.projections[part]}"
                known = result.get(name)
                result[name] = StoredModule(name, {**(known.views if known else {}), local: piece})


def _pieces(view: Whole, expert: int, count: int, axis: Axis | None) -> Iterator[View]:
    """Yield one view for each of `count` projections of one expert.

    Each is a range of the expert's rows, or the whole part of the expert where rows don't belong to one projection: of
    columns and tiles, and of one scale for all rows. A number for the whole weight is stored once for each projection
    or once for all. `axis` is None for tensors that belong to no weight, such as biases.
    """
    shape = view.spec.shape[1:]
    size = prod(shape)
    has_rows = axis is None or axis in _WITH_ROWS or (axis is Axis.SCALAR and size == count)
    if count == 1 or not has_rows or not shape or shape[0] % count != 0:
        spec = TensorSpec(view.spec.dtype, shape)
        for _ in range(count):
            yield ExpertSlice(name=view.name, spec=spec, expert=expert, size=size, users=count)
        return
    rows = shape[0] // count
    for part in range(count):
        spec = TensorSpec(view.spec.dtype, (rows, *shape[1:]))
        span = (part * rows, (part + 1) * rows)
        yield ExpertSlice(name=view.name, spec=spec, expert=expert, size=size, rows=span)
