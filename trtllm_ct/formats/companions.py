"""Checks that all integer and float8 formats share: is every companion of the codes there, in the right shape?

A scale is judged by its number of elements where at most one axis counts, else by the axes longer than one: writers
have stored a scale per tensor as [], [1] and [1, 1], a scale per row as [N], [N, 1] and [1, N], and a scale per block
as [A, B] and [A, 1, B, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats.base import StoredSpecs, scale_shape

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector

__all__ = ["check_codes", "check_plain_zero_point", "check_scale", "check_shape", "scale_name"]

_SCALE_DTYPES = frozenset({DType.BF16, DType.F16, DType.F32})
_PLAIN_ZERO_POINT_DTYPES = _SCALE_DTYPES | {DType.I8}


def scale_name(stored: StoredSpecs) -> str:
    """`weight_scale`, or `weight_scale_inv` where only that is stored.

    The latter is how DeepSeek and Qwen call the same multiplier; partial conversions leave it beside a
    compressed-tensors configuration. Source: compressed-tensors 0.20
    `entrypoints/convert/converters/fp8block_dequantizer.py`.
    """
    return "weight_scale_inv" if "weight_scale_inv" in stored and "weight_scale" not in stored else "weight_scale"


def check_codes(module: str, name: str, spec: TensorSpec, dtype: DType, faults: FaultCollector) -> bool:
    """Whether the codes are a matrix of the right dtype."""
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
    """Whether the stored weight has the (N, K) that the model's configuration asks for."""
    if expected is not None and found != expected:
        faults.add(
            where=module,
            expected=f"a weight of {list(expected)} (out, in) by the sizes in config.json",
            found=f"codes for {list(found)}",
            remedy="config.json and the weights belong to different models, or num_bits in config_groups is wrong.",
        )


def check_scale(
    module: str, args: QuantArgs, stored: StoredSpecs, shape: tuple[int, int], faults: FaultCollector
) -> None:
    """Whether the scale is there, a float, and holds as many elements as strategy and shape ask for."""
    expected = scale_shape(args, shape)
    name = scale_name(stored)
    spec = stored.get(name)
    wanted = f"{list(expected)} for strategy {args.strategy}{_granularity(args, shape)}"
    if spec is None:
        faults.add(
            where=f"{module}.{name}",
            expected=f"a scale of shape {wanted}",
            found="no such tensor",
            remedy="Without its scale the weight has no value; download the checkpoint again or look for a lost shard.",
        )
    elif spec.dtype not in _SCALE_DTYPES:
        faults.add(
            where=f"{module}.{name}",
            expected="bfloat16, float16 or float32",
            found=str(spec),
            remedy="Scales of this dtype belong to another format; check `format` in config_groups.",
        )
    elif not _fits(spec, expected, args):
        faults.add(
            where=f"{module}.{name}",
            expected=f"shape {wanted}",
            found=str(spec),
            remedy=_scale_remedy(args, spec, shape),
        )


def check_plain_zero_point(
    module: str, args: QuantArgs, spec: TensorSpec, shape: tuple[int, int], faults: FaultCollector
) -> None:
    """Whether an unpacked `weight_zero_point` has one element for each scale.

    compressed-tensors writes int8; forks of MoE-Quant write floats, whose values must turn out to be integers.
    """
    expected = scale_shape(args, shape)
    if spec.dtype not in _PLAIN_ZERO_POINT_DTYPES or not _fits(spec, expected, args):
        faults.add(
            where=f"{module}.weight_zero_point",
            expected=f"int8 {list(expected)}, one for each scale",
            found=str(spec),
            remedy="Zero points are stored as plain int8 or, by pack-quantized, in int32 words along the rows.",
        )


def _fits(spec: TensorSpec, expected: tuple[int, int], args: QuantArgs) -> bool:
    """By element count where at most one axis counts, by the axes longer than one where two do."""
    if args.strategy is Strategy.TENSOR or 1 in expected:
        return spec.numel == expected[0] * expected[1]
    return tuple(size for size in spec.shape if size != 1) == expected


def _granularity(args: QuantArgs, shape: tuple[int, int]) -> str:
    """How large the parts are that share a scale, where the strategy alone does not say it."""
    if args.block_structure is not None:
        return f" {args.block_structure[0]}x{args.block_structure[1]} over {list(shape)}"
    if args.group_size is not None:
        return f" and group_size {args.group_size} over {shape[1]} inputs"
    return ""


def _scale_remedy(args: QuantArgs, spec: TensorSpec, shape: tuple[int, int]) -> str:
    rows, columns = shape
    if args.strategy is Strategy.BLOCK:
        return "Check block_structure in config_groups ([rows, columns]) against the tool that wrote the file."
    if len(spec.shape) == 2 and spec.shape[0] == rows and spec.shape[1] and columns % spec.shape[1] == 0:
        size = columns // spec.shape[1]
        return f"The checkpoint may be of group_size {size}; check weights.group_size in config_groups."
    return "Check strategy and group_size in config_groups against the tool that wrote the file."
