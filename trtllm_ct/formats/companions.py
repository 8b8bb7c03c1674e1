"""Checks that all integer and float8 formats share: is every companion of the codes there, in the right shape?

A scale is judged by its number of elements: writers have stored a scale per tensor as [], [1] and [1, 1], and a
scale per row as [N], [N, 1] and [1, N].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.dtypes import DType
from trtllm_ct.formats.base import StoredSpecs, scale_shape
from trtllm_ct.schemes import QuantArgs, Strategy, TensorSpec

if TYPE_CHECKING:
    from trtllm_ct.errors import FaultCollector

__all__ = ["check_codes", "check_plain_zero_point", "check_scale", "check_shape"]

_SCALE_DTYPES = frozenset({DType.BF16, DType.F16, DType.F32})


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
    """Whether `weight_scale` is there, a float, and holds as many elements as strategy and shape ask for."""
    expected = scale_shape(args, shape)
    spec = stored.get("weight_scale")
    wanted = f"{list(expected)} for strategy {args.strategy}" + (
        f" and group_size {args.group_size} over {shape[1]} inputs" if args.group_size else ""
    )
    if spec is None:
        faults.add(
            where=f"{module}.weight_scale",
            expected=f"a scale of shape {wanted}",
            found="no such tensor",
            remedy="Without its scale the weight has no value; download the checkpoint again or look for a lost shard.",
        )
    elif spec.dtype not in _SCALE_DTYPES:
        faults.add(
            where=f"{module}.weight_scale",
            expected="bfloat16, float16 or float32",
            found=str(spec),
            remedy="Scales of this dtype belong to another format; check `format` in config_groups.",
        )
    elif not _fits(spec, expected, args):
        faults.add(
            where=f"{module}.weight_scale",
            expected=f"shape {wanted}",
            found=str(spec),
            remedy=_scale_remedy(spec, shape),
        )


def check_plain_zero_point(
    module: str, args: QuantArgs, spec: TensorSpec, shape: tuple[int, int], faults: FaultCollector
) -> None:
    """Whether an unpacked `weight_zero_point` is int8 and has one element for each scale."""
    expected = scale_shape(args, shape)
    if spec.dtype is not DType.I8 or not _fits(spec, expected, args):
        faults.add(
            where=f"{module}.weight_zero_point",
            expected=f"int8 {list(expected)}, one for each scale",
            found=str(spec),
            remedy="Zero points are stored as plain int8 or, by pack-quantized, in int32 words along the rows.",
        )


def _fits(spec: TensorSpec, expected: tuple[int, int], args: QuantArgs) -> bool:
    """By element count where at most one axis counts, by shape where two do."""
    if args.strategy is Strategy.TENSOR or 1 in expected:
        return spec.numel == expected[0] * expected[1]
    return spec.shape == expected


def _scale_remedy(spec: TensorSpec, shape: tuple[int, int]) -> str:
    rows, columns = shape
    if len(spec.shape) == 2 and spec.shape[0] == rows and spec.shape[1] and columns % spec.shape[1] == 0:
        size = columns // spec.shape[1]
        return f"The checkpoint may be of group_size {size}; check weights.group_size in config_groups."
    return "Check strategy and group_size in config_groups against the tool that wrote the file."
