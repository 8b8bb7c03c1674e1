"""Which rows of stored weights a rank holds, for tests of engines that divide a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

__all__ = ["ROUNDED", "differs", "experts_of", "held_weight", "rows_of_rank"]

ROUNDED = 2.0**-8
"""The largest relative error of a value that is rounded to bfloat16 once."""


def differs(values: Tensor, exact: Tensor) -> bool:
    """Whether values are not the exact ones, rounded once."""
    return values.shape != exact.shape or not ((values - exact).abs() <= exact.abs() * ROUNDED).all()


def held_weight(module: Any) -> Tensor:
    """The weight that a Linear of the double computes with."""
    weight: Tensor = module.quant_method.apply(module, torch.eye(module.in_features), None).T
    return weight


def rows_of_rank(parts: Sequence[Tensor], module: Any, heads: int) -> Tensor:
    """Return this rank's rows of all parts; K and V (the second and third of three) have `heads` heads."""
    size, rank = module.tp_size, module.tp_rank
    repeated = len(parts) == 3 and heads < size
    return torch.cat(
        [
            part.chunk(heads)[rank * heads // size] if repeated and at > 0 else part.chunk(size)[rank]
            for at, part in enumerate(parts)
        ]
    )


def experts_of(name: str, module: Any, dense: Mapping[str, Tensor]) -> Iterator[tuple[str, bool]]:
    """Yield each projection of each expert of this rank, and whether it is not this rank's slice."""
    size, rank = module.mapping.moe_tp_size, module.mapping.moe_tp_rank
    leaves = ("w3", "w1", "w2") if f"{name}.0.w1.weight" in dense else ("up_proj", "gate_proj", "down_proj")
    for at, expert in enumerate(module.expert_ids):
        up, gate = module.quant_method.dequantize(module, "w3_w1", at).chunk(2)
        down = module.quant_method.dequantize(module, "w2", at)
        for leaf, weight, dim in zip(leaves, (up, gate, down), (0, 0, 1), strict=True):
            exact = dense[f"{name}.{expert}.{leaf}.weight"].chunk(size, dim=dim)[rank]
            yield f"{name}.{expert}.{leaf}", differs(weight, exact)
