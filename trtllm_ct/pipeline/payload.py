"""Check the numbers in scales, shapes, zero points and indices before they are used; headers don't show them.

| tensor                    | NaN, inf, negative | zero                                        |
|---------------------------|--------------------|---------------------------------------------|
| scale of a whole tensor   | fault              | fault: the whole weight would be zero       |
| scale of a row or a group | fault              | allowed and counted: the group is all zeros |
| E8M0 exponent of a group  | 255 (NaN): fault   | can't occur: exponent 0 is 2^-127           |
| global scale (NVFP4)      | fault              | fault; allowed in experts: the weight is 0  |
| input global scale        | fault; infinity is | fault; allowed in experts: they saw no data |
|                           | allowed as 0 is    |                                             |
| `input_scale`, KV scales  | fault              | fault                                       |

Zero points must be integers in the signed range of the codes, and all zero if the codes are floats. A group index must
name groups that exist. The matrix of a transform must be finite, and a Hadamard matrix must consist of 1 and -1. A
permutation must contain each index once. Codes are read only if their container can hold values that are no codes.
Only tensors that the plan uses are checked: what a target leaves out is no reason to refuse it.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from trtllm_ct.formats import WEIGHT_TENSORS, Axis
from trtllm_ct.formats.group_index import is_filled
from trtllm_ct.formats.small_floats import local_scale
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.layouts.scales import scale_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import Packing
    from trtllm_ct.config.quantization_config import Transform
    from trtllm_ct.formats.base import StoredWeight
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["check_payload", "count_zero_scales", "has_values_to_check"]

_ACTIVATION_SCALES = ("input_scale", "k_scale", "v_scale")
_KV_SCALES = (".k_proj.k_scale", ".v_proj.v_scale")
_INPUT_DIVISOR = "input_global_scale"
_GLOBAL_SCALES = (*(name for name, axes in WEIGHT_TENSORS.items() if Axis.SCALAR in axes), _INPUT_DIVISOR)
_EXPERT = ".experts."


def check_payload(module: ModulePlan, stored: Mapping[str, Tensor], faults: FaultCollector) -> None:
    """Add a fault for every tensor of a module with invalid values; `stored` has the tensors by local name.

    Codes are read only if they have fewer than 8 bits and are stored in one byte each, or if they are in padded words.
    Of the other tensors only small ones are read.
    """
    weight = module.weight
    if weight is not None:
        for local in (local for local, axis in weight.axes.items() if axis is Axis.SHAPE):
            _check_shape(f"{module.name}.{local}", stored[local], weight.part_of or weight.shape, faults)
        zero_allowed = weight.scale_shape != (1, 1)
        scale = _scale_numbers(weight, stored[weight.scale])
        _check_scale(f"{module.name}.{weight.scale}", scale, faults, zero_allowed=zero_allowed)
        zero_point = weight.format.zero_point  # Stored zero points of float codes count as none, and must be zero.
        if zero_point in weight.axes and weight.zero_point_packing is None:
            _check_zero_point(f"{module.name}.{zero_point}", weight, stored[zero_point], faults)
        if weight.group_index is not None:
            _check_group_index(f"{module.name}.{weight.group_index}", weight, stored[weight.group_index], faults)
        _check_codes(f"{module.name}.{weight.codes}", weight, stored[weight.codes], faults)
    for local in dict.fromkeys((*_ACTIVATION_SCALES, *_kv_scales(module))):
        if local in stored:
            _check_scale(f"{module.name}.{local}", stored[local], faults, zero_allowed=False)
    for local in _GLOBAL_SCALES:
        if local in stored:
            _check_global_scale(module.name, local, stored[local], faults)
    for transform in module.transforms:
        _check_transform(module.name, transform, stored, faults)


def has_values_to_check(module: ModulePlan) -> bool:
    """Whether `check_payload` reads any value of a module."""
    scales = (*_ACTIVATION_SCALES, *_GLOBAL_SCALES, *_kv_scales(module))
    has_scale = any(local in module.views and local not in module.ignored for local in scales)
    return module.weight is not None or has_scale or bool(module.transforms)


def _kv_scales(module: ModulePlan) -> Iterator[str]:
    """Yield the local names of a module's KV-cache scales, whatever name their writer gave them."""
    for delivery in module.deliveries:
        if delivery.operation.source is not None and delivery.name.endswith(_KV_SCALES):
            yield delivery.operation.source


def count_zero_scales(module: ModulePlan, stored: Mapping[str, Tensor]) -> int:
    """Return how many rows or groups of a weight have a scale of zero, so that all their values are zero.

    Under a global scale of 0 these are all groups.
    """
    weight = module.weight
    if weight is None:
        return 0
    scale = _scale_numbers(weight, stored[weight.scale])
    if weight.divisor is not None and not bool(stored[weight.divisor].any()):
        return scale.numel()
    return int((scale == 0).sum())


def _scale_numbers(weight: StoredWeight, scale: Tensor) -> Tensor:
    """Return a scale in a dtype that supports comparisons: wide floats unchanged, one-byte scales as float32."""
    import torch

    if scale.element_size() > 1:
        return scale
    return scale_values(local_scale(weight, scale), torch.float32)


def _check_scale(name: str, scale: Tensor, faults: FaultCollector, *, zero_allowed: bool) -> None:
    """Add a fault if a scale has elements that are NaN, infinite, negative, or zero without being allowed to."""
    if scale.numel() and _is_good_range(*(float(bound) for bound in scale.aminmax()), zero_allowed=zero_allowed):
        return
    # Comparisons with NaN are false, so NaN counts as bad here. Infinity needs the second condition.
    good = (scale >= 0 if zero_allowed else scale > 0) & scale.isfinite()
    if bool(good.all()):
        return
    bad = (~good).nonzero()
    position = [int(index) for index in bad[0]]
    faults.add(
        where=f"{name}{position or ''}",
        expected="a finite scale that is " + ("not negative" if zero_allowed else "positive"),
        found=f"{float(scale[tuple(position)]):g} ({bad.shape[0]} of {scale.numel()} elements are bad)",
        remedy="The checkpoint was damaged or badly calibrated; download or quantize it again.",
    )


def _check_global_scale(module: str, local: str, scale: Tensor, faults: FaultCollector) -> None:
    """Add a fault for an invalid global scale.

    For an expert that calibration never reached, some writers store 0. As the divisor of its input, others store
    448 * 6 / 0 = infinity.
    """
    is_expert = _EXPERT in module
    if is_expert and local == _INPUT_DIVISOR and bool((scale == inf).all()):
        return
    _check_scale(f"{module}.{local}", scale, faults, zero_allowed=is_expert)


def _is_good_range(least: float, greatest: float, *, zero_allowed: bool) -> bool:
    """Whether all scales between these bounds are valid; if a scale is NaN, both bounds are NaN and this is False."""
    return (least >= 0 if zero_allowed else least > 0) and greatest < inf


def _check_transform(module: str, transform: Transform, stored: Mapping[str, Tensor], faults: FaultCollector) -> None:
    """Add a fault for an invalid matrix of a transform, and for an invalid permutation of a randomized one."""
    name = f"{transform.module}.weight"
    matrix = stored[name]
    good = matrix.abs() == 1 if transform.hadamard else matrix.isfinite()
    if not bool(good.all()):
        row, column = (int(index) for index in (~good).nonzero()[0])
        faults.add(
            where=f"{module}.{name}[{row}, {column}]",
            expected="1 or -1, which are divided by the root of their number" if transform.hadamard else "a number",
            found=f"{float(matrix[row, column]):g} ({int((~good).sum())} of {matrix.numel()} elements are bad)",
            remedy="The matrix was damaged, or its writer scales it otherwise; download or quantize the model again.",
        )
    if transform.permuted:
        name = f"{transform.module}.perm"
        order = stored[name].sort().values.tolist()
        if order != list(range(len(order))):
            faults.add(
                where=f"{module}.{name}",
                expected=f"each number from 0 to {len(order) - 1} once",
                found=f"numbers from {order[0]} to {order[-1]}, {len(set(order))} different ones",
                remedy="The file was damaged; download the checkpoint again.",
            )


def _check_shape(name: str, stored_shape: Tensor, shape: tuple[int, int], faults: FaultCollector) -> None:
    """Add a fault if `weight_shape` is not the shape in the plan."""
    sizes = [int(size) for size in stored_shape.flatten()]
    if sizes != list(shape):
        faults.add(
            where=name,
            expected=f"{list(shape)}, which the packed codes and config.json make",
            found=str(sizes),
            remedy="Codes and shape belong to different weights; download the checkpoint again.",
        )


def _check_zero_point(name: str, weight: StoredWeight, zero_point: Tensor, faults: FaultCollector) -> None:
    """Add a fault for unpacked zero points that are no integers in the signed range of the codes.

    If the weight has no zero point, they must all be zero.
    """
    if not weight.has_zero_point:
        _check_leftover_zero_point(name, zero_point, faults)
        return
    half = 1 << (weight.args.num_bits - 1)
    wide = zero_point.float()
    fraction = (wide != wide.round()) | wide.isinf()
    if bool(fraction.any()):
        faults.add(
            where=name,
            expected="integers, which are subtracted from the codes before scaling",
            found=f"{float(wide[fraction][0]):g} ({int(fraction.sum())} of {zero_point.numel()} are no integers)",
            remedy="These zero points mean something else, perhaps an offset after scaling: quantize again with "
            "llm-compressor.",
        )
        return
    low, high = int(zero_point.min()), int(zero_point.max())
    if low < -half or high >= half:
        faults.add(
            where=name,
            expected=f"signed zero points in [{-half}, {half - 1}]",
            found=f"values from {low} to {high}",
            remedy="The writer stored unsigned zero points; quantize again with a current release of it.",
        )


def _check_leftover_zero_point(name: str, zero_point: Tensor, faults: FaultCollector) -> None:
    """Add a fault for zero points of float codes that are not zero.

    Early writers stored zero points for float codes too, but always zero. No release computes with them.
    """
    nonzero = int((zero_point.float() != 0).sum())
    if nonzero:
        faults.add(
            where=name,
            expected="zeros only, since float codes have no zero point",
            found=f"{nonzero} of {zero_point.numel()} elements that are not zero",
            remedy="No release computes with such zero points: quantize the model again with a current release.",
        )


def _check_group_index(name: str, weight: StoredWeight, index: Tensor, faults: FaultCollector) -> None:
    """Add a fault if a column's group has no scale; an index that was never filled is accepted, it counts as absent."""
    groups = weight.scale_shape[1]
    bad = (index < 0) | (index >= groups)
    if is_filled(index) and bool(bad.any()):
        column = int(bad.nonzero()[0])
        faults.add(
            where=f"{name}[{column}]",
            expected=f"a group from 0 to {groups - 1}, those that weight_scale has",
            found=f"{int(index[column])} ({int(bad.sum())} of {index.numel()} elements are bad)",
            remedy="Index and scale belong to different weights; download the checkpoint again.",
        )


def _check_codes(name: str, weight: StoredWeight, codes: Tensor, faults: FaultCollector) -> None:
    """Add a fault for codes that don't fit their width, if the container is wider."""
    packing = weight.packing
    if packing is None:
        return
    if packing == INT8_PLAIN and weight.args.num_bits < packing.bits:
        _check_code_range(name, codes, weight.args.num_bits, faults)
    if not packing.dense:
        _check_spare_bits(name, codes, packing, faults)


def _check_code_range(name: str, codes: Tensor, bits: int, faults: FaultCollector) -> None:
    """Add a fault for int8 codes outside the signed range of `bits` bits."""
    half = 1 << (bits - 1)
    low, high = (int(bound) for bound in codes.aminmax())
    if low < -half or high >= half:
        faults.add(
            where=name,
            expected=f"codes of {bits} bits, from {-half} to {half - 1}",
            found=f"codes from {low} to {high}",
            remedy="num_bits in config_groups is too small for this weight, or its writer stored unsigned codes.",
        )


def _check_spare_bits(name: str, words: Tensor, packing: Packing, faults: FaultCollector) -> None:
    """Add a fault if the padding bits of padded words are not zero.

    The words were then written in the dense layout, which may need the same number of words.
    """
    used = packing.bits * (packing.container.bits // packing.bits)
    spare = words >> used
    if bool(spare.any()):
        faults.add(
            where=name,
            expected=f"words padded to {used} used bits, as compressed-tensors up to 0.17.1 writes {packing.bits} bits",
            found=f"{int(spare.count_nonzero())} of {words.numel()} words that use more",
            remedy="A newer release packed this weight; set `version` in the configuration to that of its writer.",
        )
