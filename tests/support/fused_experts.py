"""Routed experts in the tensors of all of them, made from tensors of each: the spellings that files have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

SPELLINGS = (("gate_up_proj", "down_proj"), ("w13_weight", "w2_weight"))
_EXPERT = re.compile(r"(?P<owner>.*\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)\.(?P<local>\w+)")
_PARTS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2, "linear_gate": 0, "wgate": 0}
_PER_COLUMN = frozenset({"weight_g_idx"})


def fuse_experts(stored: dict[str, Tensor], spelling: tuple[str, str] = SPELLINGS[0], *, plain_shape: int = 3) -> None:
    """Replace the tensors of each expert by those of all, in place; gate comes before up.

    A plain weight has the name of the fused module itself. `weight_shape` is that of the fused weight, with
    `plain_shape` entries.
    """
    parts: dict[tuple[str, str], dict[tuple[int, int], Tensor]] = {}
    for name in [name for name in stored if _EXPERT.fullmatch(name)]:
        found = _EXPERT.fullmatch(name)
        assert found is not None
        key = (found["owner"], found["local"])
        parts.setdefault(key, {})[int(found["index"]), _PARTS[found["projection"]]] = stored.pop(name)
    for (owner, local), tensors in parts.items():
        experts = range(len(tensors) // 3)
        gate_up = [_joined(local, tensors[expert, 0], tensors[expert, 1]) for expert in experts]
        down = [tensors[expert, 2] for expert in experts]
        for leaf, each in zip(spelling, (gate_up, down), strict=True):
            plain = local == "weight" and each[0].dtype.itemsize > 1
            name = f"{owner}.{leaf}" if plain else f"{owner}.{leaf}.{local}"
            whole = torch.stack([tensor.view(torch.uint8) for tensor in each]).view(each[0].dtype)
            if local == "weight_shape":
                rows = int(each[0][0]) * (2 if leaf == spelling[0] else 1)
                whole = torch.tensor([len(each), rows, int(each[0][1])][-plain_shape:])
            stored[name] = whole


def _joined(local: str, gate: Tensor, up: Tensor) -> Tensor:
    """Both parts one behind the other; what both share, once."""
    if local in _PER_COLUMN | {"weight_shape"} or (gate.numel() == 1 and torch.equal(gate, up)):
        return gate
    return torch.cat([gate.view(torch.uint8), up.view(torch.uint8)]).view(gate.dtype)
