"""What integer and float8 formats share: checks of headers, and how unpacked zero points are read.

Writers have stored a scale per tensor as [], [1] and [1, 1], a scale per row as [N], [N, 1] and [1, N], and a scale per
block as [A, B] and [A, 1, B, 1]. So a scale whose expected shape has at most one axis longer than 1 is checked by its
number of elements; any other scale is checked by its axes longer than 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.lost_remedies import FETCH
from trtllm_ct.base.schemes import QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats.base import StoredSpecs, StoredWeight, scale_shape
from trtllm_ct.layouts.stored_array import StoredArray

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector

__all__ = [
    "LOST_SCALE",
    "check_codes",
    "check_plain_zero_point",
    "check_scale",
    "check_shape",
    "plain_zero_point",
    "scale_name",
]

LOST_SCALE = f"Without its scale the weight has no value. {FETCH}."
"""The remedy for a scale that no file has, where a file may be missing."""

_SCALE_DTYPES = frozenset({DType.BF16, DType.F16, DType.F32})
_PLAIN_ZERO_POINT_DTYPES = _SCALE_DTYPES | {DType.I8}


def scale_name(stored: StoredSpecs) -> str:
    """Return the local name of the scale: `weight_scale`, or `weight_scale_inv` if only that is stored.

    DeepSeek and Qwen use `weight_scale_inv` for the same multiplier; partial conversions leave this name in checkpoints
    with a compressed-tensors configuration. Source: compressed-tensors 0.20
    `entrypoints/convert/converters/fp8block_dequantizer.py`.
    """
    return "weight_scale_inv" if "weight_scale_inv" in stored and "weight_scale" not in stored else "weight_scale"


def check_codes(module: str, name: str, spec: TensorSpec, dtype: DType, faults: FaultCollector) -> bool:
    """Return whether the codes are a matrix of `dtype`; add a fault if they are not."""
    if spec.dtype is dtype and len(spec.shape) == 2:
        return True
    faults.add(
        where=f"{module}.{name}",
        expected=f"a {dtype.torch_name} matrix",
        found=str(spec),
        remedy="Check the format that config_groups declares for this module, and the tool that wrote the file.",
    )
    return False


def check_shape(module: str, found: tuple[int, int], expected: tuple[int, int] | None, faults: FaultCollector) -> None:
    """Add a fault if the (N, K) of the stored weight differs from what the model's configuration expects."""
    if expected is not None and found != expected:
        faults.add(
            where=module,
            expected=f"a weight of {list(expected)} (out, in) by the sizes in config.json",
            found=f"codes for {list(found)}",
            remedy="Take config.json from where the weights were published; if it is theirs, correct num_bits in "
            "config_groups.",
        )


def check_scale(
    module: str, args: QuantArgs, stored: StoredSpecs, shape: tuple[int, int], faults: FaultCollector
) -> None:
    """Add a fault if the scale is missing, not bfloat16, float16 or float32, or of the wrong size.

    The strategy in `args` and the `shape` (N, K) of the weight determine the size.
    """
    expected = scale_shape(args, shape)
    name = scale_name(stored)
    spec = stored.get(name)
    description = f"{list(expected)} for strategy {args.strategy}{_granularity(args, shape)}"
    if spec is None:
        faults.add(
            where=f"{module}.{name}",
            expected=f"a scale of shape {description}",
            found="no such tensor",
            remedy=LOST_SCALE,
        )
    elif spec.dtype not in _SCALE_DTYPES:
        faults.add(
            where=f"{module}.{name}",
            expected="bfloat16, float16 or float32",
            found=str(spec),
            remedy="Scales of this dtype belong to another format; check `format` in config_groups.",
        )
    elif not _has_size(spec, expected, args):
        faults.add(
            where=f"{module}.{name}",
            expected=f"shape {description}",
            found=str(spec),
            remedy=_scale_remedy(args, spec, shape),
        )


def check_plain_zero_point(
    module: str, args: QuantArgs, spec: TensorSpec, shape: tuple[int, int], faults: FaultCollector
) -> None:
    """Add a fault if an unpacked `weight_zero_point` has the wrong dtype, or not one element per scale.

    compressed-tensors writes int8. Forks of MoE-Quant write floats, so bfloat16, float16 and float32 are accepted too;
    their values must be integers, which headers can't show.
    """
    expected = scale_shape(args, shape)
    if spec.dtype not in _PLAIN_ZERO_POINT_DTYPES or not _has_size(spec, expected, args):
        faults.add(
            where=f"{module}.weight_zero_point",
            expected=f"int8 {list(expected)}, one for each scale",
            found=str(spec),
            remedy="Check strategy and group_size in config_groups against the tool that wrote the file"
            + ("; or remove the zero points, if the scheme really is symmetric." if args.symmetric else "."),
        )


def plain_zero_point(weight: StoredWeight, stored: StoredArray) -> StoredArray:
    """Return unpacked zero points, which may be stored as floats, as int8 in the shape of the scale."""
    return StoredArray(stored.numbers.reshape(weight.scale_shape).astype("i1", copy=False), DType.I8)


def _has_size(spec: TensorSpec, expected: tuple[int, int], args: QuantArgs) -> bool:
    """Whether a tensor has the size of `expected` (rows, columns), whatever axes of length 1 its shape has.

    The number of elements decides if at most one axis of `expected` is longer than 1, else the axes longer than 1 do.
    """
    if args.strategy is Strategy.TENSOR or 1 in expected:
        return spec.numel == expected[0] * expected[1]
    return tuple(size for size in spec.shape if size != 1) == expected


def _granularity(args: QuantArgs, shape: tuple[int, int]) -> str:
    """Return the block or group size as words for a message; empty for strategies that have none."""
    if args.block_structure is not None:
        return f" {args.block_structure[0]}x{args.block_structure[1]} over {list(shape)}"
    if args.group_size is not None:
        return f" and group_size {args.group_size} over {shape[1]} inputs"
    return ""


def _scale_remedy(args: QuantArgs, spec: TensorSpec, shape: tuple[int, int]) -> str:
    """Return the remedy for a scale of the wrong size; it names the group size that the scale would fit, if any."""
    rows, columns = shape
    if args.strategy is Strategy.BLOCK:
        return "Check block_structure in config_groups ([rows, columns]) against the tool that wrote the file."
    if len(spec.shape) == 2 and spec.shape[0] == rows and spec.shape[1] and columns % spec.shape[1] == 0:
        size = columns // spec.shape[1]
        return f"The checkpoint may be of group_size {size}; check weights.group_size in config_groups."
    return "Check strategy and group_size in config_groups against the tool that wrote the file."
