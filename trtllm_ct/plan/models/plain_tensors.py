"""The tensors that a checkpoint has once its codes are plain weights: names and shapes, without any values.

Checks compare them with each other (`alike_layers.py`) and with the tensors of a model class (`model_class.py`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trtllm_ct.plan.models.expert_spellings import PROJECTIONS
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.plan.models.expert_spellings import ExpertSpelling, StackedExperts
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["EXPERT", "PlainTensors", "Shape", "as_class_spells", "plain_tensors"]

Shape = tuple[int, ...]
PlainTensors = dict[str, Shape | None]
"""Shapes by full name; None for a weight whose codes could not be read, which is a fault of its own."""

EXPERT = re.compile(r"(.*(?<!shared_)experts)\.(\d+)\.(\w+)\.(weight|bias)")
"""The weight or bias of one routed expert: the experts, number, projection and local name."""


def plain_tensors(modules: Iterable[StoredModule], weights: Mapping[str, Shape]) -> PlainTensors:
    """Return the tensors of modules under the names of the files.

    `weights` are the shapes of quantized weights by the stored name of their module. Tensors of quantization and of
    transforms are left out.
    """
    tensors: PlainTensors = {}
    for module in modules:
        codes = module.is_quantized
        if codes:
            tensors[module.full_name("weight")] = weights.get(module.stored_name)
        for local, spec in module.specs.items():
            if local not in QUANTIZATION_TENSORS and "." not in local and not (codes and local == "weight"):
                tensors[module.full_name(local)] = spec.shape
    return tensors


def as_class_spells(tensors: PlainTensors, spelling: ExpertSpelling) -> PlainTensors:
    """Return the tensors with routed experts as the class of transformers reads them, see `expert_spellings.py`.

    Layers that lack some projection of an expert are unchanged if the class reads stacks.
    """
    names = spelling.projections
    if names is not None:
        return {_renamed(name, names): shape for name, shape in tensors.items()}
    return tensors if spelling.stacked is None else _stacked(tensors, spelling.stacked)


def _renamed(name: str, projections: tuple[str, str, str]) -> str:
    """Return the name of a tensor with the projection of a routed expert under one of these names."""
    expert = EXPERT.fullmatch(name)
    if expert is None or expert[3] not in PROJECTIONS:
        return name
    return f"{expert[1]}.{expert[2]}.{projections[PROJECTIONS[expert[3]]]}.{expert[4]}"


def _stacked(tensors: PlainTensors, stacked: StackedExperts) -> PlainTensors:
    """Return the tensors with those of all experts of a layer as one."""
    rest: PlainTensors = {}
    layers: dict[str, dict[tuple[int, int, str], tuple[str, Shape | None]]] = {}
    for name, shape in tensors.items():
        expert = EXPERT.fullmatch(name)
        if expert is None or expert[3] not in PROJECTIONS:
            rest[name] = shape
        else:
            key = (int(expert[2]), PROJECTIONS[expert[3]], expert[4])
            layers.setdefault(expert[1], {})[key] = (name, shape)
    for owner, members in layers.items():
        rest |= _layer(owner, members, stacked) or dict(members.values())
    return rest


def _layer(
    owner: str, members: Mapping[tuple[int, int, str], tuple[str, Shape | None]], stacked: StackedExperts
) -> PlainTensors:
    """Return the stacked tensors of one layer; nothing if a projection or a bias of some expert is missing."""
    parent = owner.rpartition(".")[0]
    count = 1 + max(number for number, _, _ in members)
    result: PlainTensors = {}
    used = 0
    for local, stacks in (("weight", stacked.parts), ("bias", stacked.biases or {})):
        for stack, positions in stacks.items():
            keys = {(number, position, local) for number in range(count) for position in positions}
            if not keys <= members.keys():
                return {}
            used += len(keys)
            shapes = [{members[number, position, local][1] for number in range(count)} for position in positions]
            transposed = stacked.inputs_first and local == "weight"
            result[f"{parent}.{stack}"] = _stack_shape(count, shapes, transposed=transposed)
    return result if used == len(members) else {}


def _stack_shape(count: int, shapes: list[set[Shape | None]], *, transposed: bool) -> Shape | None:
    """Return the shape of a stack, given those of each projection; None if the experts don't have one shape."""
    parts = [next(iter(alike)) if len(alike) == 1 else None for alike in shapes]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part[1:] for part in known}) > 1:
        return None
    rows, columns = sum(part[0] for part in known), known[0][1:]
    return (count, *columns, rows) if transposed else (count, rows, *columns)
