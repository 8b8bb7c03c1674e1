"""`weight_g_idx`: the group of each column, under activation ordering by group (`actorder: group`).

Columns are stored in their original order, but groups are not contiguous: column k takes the scale and zero point of
group `weight_g_idx[k]` instead of k // g. Ordering by weight ("static") stores no such tensor and has contiguous
groups.

Releases 0.6 to 0.18 of compressed-tensors write and read the tensor. Release 0.19 refuses a configuration with
`actorder: group`; it ignores the tensor if a user has removed `actorder` from the configuration.
Source: compressed-tensors 0.18 `quantization/lifecycle/{initialize,forward}.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.formats.base import StoredSpecs, StoredWeight, scale_shape

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors

__all__ = ["GROUP_INDEX", "check_group_index", "group_of_columns", "is_filled"]

GROUP_INDEX = "weight_g_idx"

_INTEGERS = frozenset({DType.I32, DType.I64})


def check_group_index(
    module: str, args: QuantArgs, stored: StoredSpecs, shape: tuple[int, int], faults: FaultCollector
) -> str | None:
    """Return the local name of the group index; add a fault if it is not int32 or int64 of shape [K].

    Returns None if no group index is stored, or if a row has only one scale, so that all columns are in one group.
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


def group_of_columns(weight: StoredWeight, stored: StoredTensors) -> StoredArray | None:
    """Return the group of each column, [K], or None if the groups are contiguous.

    Groups are contiguous if the weight has no group index, if the writer never filled it, or if it holds k // g.
    """
    import numpy as np

    if weight.group_index is None:
        return None
    index = stored[weight.group_index]
    contiguous = np.arange(weight.shape[1]) // (weight.group_columns or 1)
    if not is_filled(index.elements) or np.array_equal(index.elements, contiguous):
        return None
    return index


def is_filled(index: NDArray[Any]) -> bool:
    """Whether the writer has filled the index; it is initialized with -1."""
    return not bool((index == -1).any())
