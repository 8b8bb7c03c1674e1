"""Checks and helpers for small floats (NVFP4 and MX): groups of 16 or 32 columns with a one-byte scale per group.

NVFP4 has E4M3 scales and a second scale for the whole tensor; the microscaling (MX) formats have powers of two (E8M0).
Some writers store these bytes under another dtype of the same width. If the dtype does not tell what the scales are,
the group size in the arguments does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import NumberType
from trtllm_ct.formats.base import scale_shape
from trtllm_ct.formats.companions import LOST_SCALE

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import Packing, QuantArgs, TensorSpec
    from trtllm_ct.formats.base import StoredSpecs, StoredWeight
    from trtllm_ct.layouts.stored_array import StoredArray

__all__ = [
    "NVFP4_GROUP",
    "check_group_scale",
    "check_group_size",
    "has_e4m3_scales",
    "is_packed_float",
    "local_scale",
    "logical_shape",
]

NVFP4_GROUP = 16


def is_packed_float(args: QuantArgs, stored: StoredSpecs, bits: int) -> bool:
    """Whether a module stores floats of `bits` bits packed in uint8."""
    packed = stored.get("weight_packed")
    return args.type is NumberType.FLOAT and args.num_bits == bits and packed is not None and packed.dtype is DType.U8


def has_e4m3_scales(args: QuantArgs, stored: StoredSpecs) -> bool:
    """Whether the scales of 4-bit floats are E4M3 (NVFP4) rather than E8M0 (MXFP4).

    The dtype of the scale decides if it is float8_e4m3fn or float8_e8m0fnu. For any other dtype, such as uint8, and for
    a missing scale, the group size of the arguments decides.
    """
    scale = stored.get("weight_scale")
    if scale is not None and scale.dtype in {DType.F8_E4M3, DType.F8_E8M0}:
        return scale.dtype is DType.F8_E4M3
    return args.group_size == NVFP4_GROUP


def local_scale(weight: StoredWeight, scale: StoredArray) -> StoredArray:
    """Return a view of a stored one-byte scale: float8_e4m3fn if the weight has a divisor (NVFP4), else uint8 (MX)."""
    return scale.read_as(DType.U8 if weight.divisor is None else DType.F8_E4M3)


def logical_shape(
    packed: TensorSpec, packing: Packing | None, expected_shape: tuple[int, int] | None
) -> tuple[int, int]:
    """Return (N, K): the model's K if it needs exactly the stored bytes, else as many columns as the bytes hold."""
    rows, width = packed.shape
    if packing is None:
        return rows, width
    if expected_shape is not None and packing.elements(expected_shape[1]) == width:
        return rows, expected_shape[1]
    return rows, width * packing.container.bits // packing.bits


def check_group_size(module: str, args: QuantArgs, group_size: int, faults: FaultCollector) -> bool:
    """Return whether the arguments have the group size that the format requires; add a fault if not."""
    if args.group_size == group_size:
        return True
    faults.add(
        where=module,
        expected=f"group_size {group_size}, which its tensors ask for",
        found=args.label(),
        remedy="Check which config group targets this module, and weights.group_size there.",
    )
    return False


def check_group_scale(
    module: str,
    args: QuantArgs,
    stored: StoredSpecs,
    shape: tuple[int, int],
    dtypes: tuple[DType, ...],
    faults: FaultCollector,
) -> None:
    """Add a fault if `weight_scale` is missing, has none of `dtypes`, or not one element for each row and group."""
    expected = list(scale_shape(args, shape))
    spec = stored.get("weight_scale")
    names = " or ".join(dtype.torch_name for dtype in dtypes)
    if spec is None:
        remedy = LOST_SCALE
    elif spec.dtype not in dtypes:
        remedy = "Scales of this dtype belong to another format; check `format` in config_groups."
    elif list(spec.shape) != expected and not (1 in expected and spec.numel == expected[0] * expected[1]):
        remedy = (
            "Codes and scales contradict each other: the weight is of another width or group size than num_bits and "
            "group_size in config_groups say."
        )
    else:
        return
    faults.add(
        where=f"{module}.weight_scale",
        expected=f"{names} {expected}, one for each row and group of {args.group_size} columns",
        found=str(spec) if spec else "no such tensor",
        remedy=remedy,
    )
