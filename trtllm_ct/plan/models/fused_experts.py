"""Split 3-D tensors that hold all experts of a layer into one module for each expert and projection.

Two spellings exist: `experts.gate_up_proj.weight_packed` [E, 2I, W] with `experts.down_proj`, and
`experts.w13_weight` with `experts.w2_weight`. Plain experts have no parameter name at the end
(`experts.gate_up_proj` [E, 2I, H]). The rows of gate come before those of up.
Source: llm-compressor issues 3183 and 3200; transformers 5.23 `modeling_qwen3_moe.py`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, TypeGuard

from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.formats import WEIGHT_TENSORS, Axis, axes_of
from trtllm_ct.plan.stored import ExpertSlice, StoredModule, View, Whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.plan.models.families import Experts

__all__ = ["NOT_PER_EXPERT", "split_fused_experts"]

# Name of a fused tensor -> the projections whose rows it holds, as positions in (gate, up, down).
_PARTS = {"gate_up_proj": (0, 1), "w13_weight": (0, 1), "down_proj": (2,), "w2_weight": (2,)}
_WITH_ROWS = frozenset({Axis.ROWS, Axis.SCALE_ROWS})
# Tensors that hold the shape of the fused weight. The shape of one expert follows from its codes.
NOT_PER_EXPERT = frozenset(name for name, axes in WEIGHT_TENSORS.items() if Axis.SHAPE in axes)


def split_fused_experts(modules: dict[str, StoredModule], experts: Experts) -> dict[str, StoredModule]:
    """Return the modules, with every tensor of all experts replaced by its experts; other modules are unchanged."""
    result: dict[str, StoredModule] = {}
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if name.endswith(f".{experts.path}"):
            # Plain fused experts are parameters of the experts module itself.
            fused = [local for local, view in module.views.items() if local in _PARTS and _has_experts(view, "weight")]
            for local in fused:
                _add_experts(result, name, local, {"weight": module.views[local]}, experts)
            rest = {local: view for local, view in module.views.items() if local not in fused}
        elif parent.endswith(f".{experts.path}") and leaf in _PARTS:
            _add_experts(result, parent, leaf, module.views, experts)
            rest = {local: view for local, view in module.views.items() if not _has_experts(view, local)}
        else:
            result[name] = module
            continue
        if rest:
            result[name] = StoredModule(name, rest)
    return result


def _has_experts(view: View, local: str) -> TypeGuard[Whole]:
    """Whether a tensor has an entry for each expert.

    Other tensors stay with the fused module, and are refused later if the plan has no use for them.
    """
    return local not in NOT_PER_EXPERT and isinstance(view, Whole) and len(view.spec.shape) > 0


def _add_experts(
    result: dict[str, StoredModule], parent: str, fused: str, views: Mapping[str, View], experts: Experts
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
                name = f"{parent}.{expert}.{experts.projections[part]}"
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
