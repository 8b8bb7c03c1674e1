"""Experts that are stored together in 3-D tensors, seen as one module for each expert and projection.

Two spellings exist: `experts.gate_up_proj.weight_packed` [E, 2I, W] with `experts.down_proj`, and
`experts.w13_weight` with `experts.w2_weight`; plain experts have no parameter name behind (`experts.gate_up_proj`
[E, 2I, H]). Gate comes before up. Source: llm-compressor issues 3183 and 3200; transformers 5.23
`modeling_qwen3_moe.py`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, TypeGuard

from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.formats import WEIGHT_TENSORS, Axis
from trtllm_ct.plan.stored import ExpertSlice, StoredModule, View, Whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.plan.models.families import Experts

__all__ = ["NOT_PER_EXPERT", "split_fused_experts"]

# Fused tensor to the parts of its rows, as positions in (gate, up, down).
_PARTS = {"gate_up_proj": (0, 1), "w13_weight": (0, 1), "down_proj": (2,), "w2_weight": (2,)}
# All rows share a tensor that belongs to the columns.
_PER_COLUMN = frozenset(name for name, axes in WEIGHT_TENSORS.items() if Axis.COLUMNS in axes)
# The shape of the fused weight says nothing about one expert; the codes say it.
NOT_PER_EXPERT = frozenset(name for name, axes in WEIGHT_TENSORS.items() if Axis.SHAPE in axes)


def split_fused_experts(modules: dict[str, StoredModule], experts: Experts) -> dict[str, StoredModule]:
    """The modules with every fused experts tensor replaced by its experts; anything else stays as it is."""
    result: dict[str, StoredModule] = {}
    for name, module in modules.items():
        owner, _, leaf = name.rpartition(".")
        if name.endswith(f".{experts.path}"):
            # Plain fused experts: the parameters of the experts module itself.
            whole = [local for local, view in module.views.items() if local in _PARTS and _is_split(view, "weight")]
            for local in whole:
                _add(result, name, local, {"weight": module.views[local]}, experts)
            rest = {key: view for key, view in module.views.items() if key not in whole}
        elif owner.endswith(f".{experts.path}") and leaf in _PARTS:
            _add(result, owner, leaf, module.views, experts)
            rest = {key: view for key, view in module.views.items() if not _is_split(view, key)}
        else:
            result[name] = module
            continue
        if rest:
            result[name] = StoredModule(name, rest)
    return result


def _is_split(view: View, local: str) -> TypeGuard[Whole]:
    """Whether a tensor has an entry for each expert. What has none stays behind, and is refused if nothing takes it."""
    return local not in NOT_PER_EXPERT and isinstance(view, Whole) and len(view.spec.shape) > 0


def _add(result: dict[str, StoredModule], owner: str, fused: str, views: Mapping[str, View], experts: Experts) -> None:
    """One module for each expert and each part of a fused tensor."""
    parts = _PARTS[fused]
    for local, view in views.items():
        if not _is_split(view, local):
            continue
        for expert in range(view.spec.shape[0]):
            pieces = _pieces(view, expert, len(parts), cut=local not in _PER_COLUMN)
            for part, piece in zip(parts, pieces, strict=True):
                name = f"{owner}.{expert}.{experts.projections[part]}"
                known = result.get(name)
                result[name] = StoredModule(name, {**(known.views if known else {}), local: piece})


def _pieces(view: Whole, expert: int, count: int, *, cut: bool) -> Iterator[View]:
    """The parts of one expert's rows, or the same whole for each part where rows can't be cut (one scale for all)."""
    shape = view.spec.shape[1:]
    size = prod(shape)
    if count == 1 or not cut or not shape or shape[0] % count != 0:
        spec = TensorSpec(view.spec.dtype, shape)
        for _ in range(count):
            yield ExpertSlice(name=view.name, spec=spec, expert=expert, size=size, users=count)
        return
    rows = shape[0] // count
    for part in range(count):
        spec = TensorSpec(view.spec.dtype, (rows, *shape[1:]))
        span = (part * rows, (part + 1) * rows)
        yield ExpertSlice(name=view.name, spec=spec, expert=expert, size=size, rows=span)
