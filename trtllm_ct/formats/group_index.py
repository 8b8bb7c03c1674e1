"""`weight_g_idx`: which group each column belongs to, under activation ordering by group.

Columns are stored in their original order; what the ordering permutes are the groups, so that column k takes scale
and zero point of group `weight_g_idx[k]` instead of k // g. Ordering by weight ("static") stores nothing and has
contiguous groups.

Releases 0.6 to 0.18 write and read it; 0.19 refuses the configuration, and ignores the tensor where a user has
removed `actorder` from it. Source: compressed-tensors 0.18 `quantization/lifecycle/{initialize,forward}.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.formats.base import StoredSpecs, StoredWeight, scale_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantArgs

__all__ = ["GROUP_INDEX", "check_group_index", "group_of_columns", "is_filled"]

GROUP_INDEX = "weight_g_idx"

_INTEGERS = frozenset({DType.I32, DType.I64})


def check_group_index(
    module: str, args: QuantArgs, stored: StoredSpecs, shape: tuple[int, int], faults: FaultCollector
) -> str | None:
    """The name of the tensor that gives each column's group, after checking that it is [K] and integer.

    None where none is stored, or where a row has one scale and every column the same group.
    """
    spec = stored.get(GROUP_INDEX)
    if spec is None:
        return None
    if spec.dtype not in _INTEGERS or spec.shape != shape[1:]:
        faults.add(
            where=f"{module}.{GROUP_INDEX}",
            expected=f"int32 {[shape[1]]}: the group of each column",
            found=str(spec),
            remedy="The index belongs to another weight; download the checkpoint again.",
        )
    return GROUP_INDEX if scale_shape(args, shape)[1] > 1 else None


def group_of_columns(weight: StoredWeight, stored: Mapping[str, Tensor]) -> Tensor | None:
    """The group of each column, [K]; None where groups are contiguous after all.

    That is so when the writer never filled the index, or when it holds k // g.
    """
    import torch

    if weight.group_index is None:
        return None
    index = stored[weight.group_index]
    contiguous = torch.arange(weight.shape[1], device=index.device) // (weight.group_columns or 1)
    if not is_filled(index) or torch.equal(index.long(), contiguous):
        return None
    return index


def is_filled(index: Tensor) -> bool:
    """Whether a writer has filled the index; -1 stands in one that it left as it was."""
    return not bool((index == -1).any())
