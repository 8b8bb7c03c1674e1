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

from trtllm_ct.engine.target import UNREAD_BY_DENSE
from trtllm_ct.formats import WEIGHT_TENSORS, Axis
from trtllm_ct.formats.group_index import is_filled
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.plan.rank_ops import LargestOf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from numpy.typing import NDArray

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import Packing
    from trtllm_ct.config.quantization_config import Transform
    from trtllm_ct.formats.base import StoredWeight
    from trtllm_ct.layouts.stored_array import StoredArray, StoredTensors
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["check_payload", "count_zero_scales", "has_values_to_check"]

_ACTIVATION_SCALES = ("input_scale", "k_scale", "v_scale")
_KV_SCALE_OF_ENGINE = ".kv_cache_scaling_factor"
_KV_SCALES = (".k_proj.k_scale", ".v_proj.v_scale")
_INPUT_DIVISOR = "input_global_scale"
_GLOBAL_SCALES = (*(name for name, axes in WEIGHT_TENSORS.items() if Axis.SCALAR in axes), _INPUT_DIVISOR)
_EXPERT = ".experts."
_CHUNK_WORDS = 1 << 20
_DAMAGED = "The checkpoint was damaged or badly calibrated; download or quantize it again."
_NOT_FOR_DENSE = f"{_DAMAGED.removesuffix('.')}, {UNREAD_BY_DENSE}"
"""The remedies for an invalid scale of a weight, and for one of the input or of the KV cache."""


def check_payload(module: ModulePlan, stored: StoredTensors, faults: FaultCollector) -> None:
    """Add a fault for every tensor of a module with invalid values; `stored` has the tensors by local name.

    Codes are read only if they have fewer than 8 bits and are stored in one byte each, or if they are in padded words.
    Of the other tensors only small ones are read.
    """
    weight = module.weight
    if weight is not None:
        for local in (local for local, axis in weight.axes.items() if axis is Axis.SHAPE):
            _check_shape(f"{module.name}.{local}", stored[local].numbers, weight.part_of or weight.shape, faults)
        zero_allowed = weight.scale_shape != (1, 1)
        scale = weight.scale_in(stored)
        _check_scale(f"{module.name}.{weight.scale}", scale, faults, zero_allowed=zero_allowed)
        zero_point = weight.format.zero_point  # Stored zero points of float codes count as none, and must be zero.
        if zero_point in weight.axes and weight.zero_point_packing is None:
            _check_zero_point(f"{module.name}.{zero_point}", weight, stored[zero_point].numbers, faults)
        if weight.group_index is not None:
            index = stored[weight.group_index].numbers
            _check_group_index(f"{module.name}.{weight.group_index}", weight, index, faults)
        _check_codes(f"{module.name}.{weight.codes}", weight, stored[weight.codes], faults)
    for local in dict.fromkeys((*_ACTIVATION_SCALES, *_kv_scales(module))):
        if local in stored:
            name, scale = f"{module.name}.{local}", stored[local]
            _check_scale(name, scale, faults, zero_allowed=False, remedy=_NOT_FOR_DENSE)
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
        if isinstance(delivery.operation, LargestOf) and delivery.name.endswith(_KV_SCALE_OF_ENGINE):
            yield from delivery.operation.scales
        if delivery.operation.source is not None and delivery.name.endswith(_KV_SCALES):
            yield delivery.operation.source


def count_zero_scales(module: ModulePlan, stored: StoredTensors) -> int:
    """Return how many rows or groups of a weight have a scale of zero, so that all their values are zero.

    Under a global scale of 0 these are all groups.
    """
    weight = module.weight
    if weight is None:
        return 0
    scale = weight.scale_in(stored)
    if weight.divisor is not None and not stored[weight.divisor].numbers.any():
        return scale.elements.size
    return scale.zeros


def _check_scale(
    name: str, scale: StoredArray, faults: FaultCollector, *, zero_allowed: bool, remedy: str = _DAMAGED
) -> None:
    """Add a fault if a scale has elements that are NaN, infinite, negative, or zero without being allowed to."""
    import numpy as np

    if scale.is_finite_scale(zero_allowed=zero_allowed):
        return
    numbers = scale.numbers
    # Comparisons with NaN are false, so NaN counts as bad here. Infinity needs the second condition.
    good = (numbers >= 0 if zero_allowed else numbers > 0) & np.isfinite(numbers)
    if good.all():
        return
    position = _first(~good)
    faults.add(
        where=f"{name}{position or ''}",
        expected="a finite scale that is " + ("not negative" if zero_allowed else "positive"),
        found=f"{float(numbers[tuple(position)]):g} ({int((~good).sum())} of {numbers.size} elements are bad)",
        remedy=remedy,
    )


def _first(bad: NDArray[Any]) -> list[int]:
    """Return the index of the first element that is true."""
    import numpy as np

    return [int(index) for index in np.unravel_index(int(bad.argmax()), bad.shape)]


def _check_global_scale(module: str, local: str, scale: StoredArray, faults: FaultCollector) -> None:
    """Add a fault for an invalid global scale.

    For an expert that calibration never reached, some writers store 0. As the divisor of its input, others store
    448 * 6 / 0 = infinity.
    """
    is_expert = _EXPERT in module
    if is_expert and local == _INPUT_DIVISOR and (scale.numbers == inf).all():
        return
    remedy = _NOT_FOR_DENSE if local == _INPUT_DIVISOR else _DAMAGED
    _check_scale(f"{module}.{local}", scale, faults, zero_allowed=is_expert, remedy=remedy)


def _check_transform(module: str, transform: Transform, stored: StoredTensors, faults: FaultCollector) -> None:
    """Add a fault for an invalid matrix of a transform, and for an invalid permutation of a randomized one."""
    import numpy as np

    name = f"{transform.module}.weight"
    matrix = stored[name].numbers
    good = np.abs(matrix) == 1 if transform.hadamard else np.isfinite(matrix)
    if not good.all():
        row, column = _first(~good)
        faults.add(
            where=f"{module}.{name}[{row}, {column}]",
            expected="1 or -1, which are divided by the root of their number" if transform.hadamard else "a number",
            found=f"{float(matrix[row, column]):g} ({int((~good).sum())} of {matrix.size} elements are bad)",
            remedy="The matrix was damaged, or its writer scales it otherwise; download or quantize the model again.",
        )
    if transform.permuted:
        name = f"{transform.module}.perm"
        order = np.sort(stored[name].numbers).tolist()
        if order != list(range(len(order))):
            faults.add(
                where=f"{module}.{name}",
                expected=f"each number from 0 to {len(order) - 1} once",
                found=f"numbers from {order[0]} to {order[-1]}, {len(set(order))} different ones",
                remedy="The file was damaged; download the checkpoint again.",
            )


def _check_shape(name: str, stored_shape: NDArray[Any], shape: tuple[int, int], faults: FaultCollector) -> None:
    """Add a fault if `weight_shape` is not the shape in the plan."""
    sizes = [int(size) for size in stored_shape.flatten()]
    if sizes != list(shape):
        faults.add(
            where=name,
            expected=f"{list(shape)}, which the packed codes and config.json make",
            found=str(sizes),
            remedy="Codes and shape belong to different weights; download the checkpoint again.",
        )


def _check_zero_point(name: str, weight: StoredWeight, zero_point: NDArray[Any], faults: FaultCollector) -> None:
    """Add a fault for unpacked zero points that are no integers in the signed range of the codes.

    If the weight has no zero point, they must all be zero.
    """
    import numpy as np

    if not weight.has_zero_point:
        _check_leftover_zero_point(name, zero_point, faults)
        return
    if not zero_point.size:
        return
    half = 1 << (weight.args.num_bits - 1)
    fraction = (zero_point != np.rint(zero_point)) | np.isinf(zero_point)
    if fraction.any():
        faults.add(
            where=name,
            expected="integers, which are subtracted from the codes before scaling",
            found=f"{float(zero_point[fraction][0]):g} ({int(fraction.sum())} of {zero_point.size} are no integers)",
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


def _check_leftover_zero_point(name: str, zero_point: NDArray[Any], faults: FaultCollector) -> None:
    """Add a fault for zero points of float codes that are not zero.

    Early writers stored zero points for float codes too, but always zero. No release computes with them.
    """
    nonzero = int((zero_point != 0).sum())
    if nonzero:
        faults.add(
            where=name,
            expected="zeros only, since float codes have no zero point",
            found=f"{nonzero} of {zero_point.size} elements that are not zero",
            remedy="No release computes with such zero points: quantize the model again with a current release.",
        )


def _check_group_index(name: str, weight: StoredWeight, index: NDArray[Any], faults: FaultCollector) -> None:
    """Add a fault if a column's group has no scale; an index that was never filled is accepted, it counts as absent."""
    groups = weight.scale_shape[1]
    bad = (index < 0) | (index >= groups)
    if is_filled(index) and bad.any():
        column = int(bad.argmax())
        faults.add(
            where=f"{name}[{column}]",
            expected=f"a group from 0 to {groups - 1}, those that weight_scale has",
            found=f"{int(index[column])} ({int(bad.sum())} of {index.size} elements are bad)",
            remedy="Index and scale belong to different weights; download the checkpoint again.",
        )


def _check_codes(name: str, weight: StoredWeight, codes: StoredArray, faults: FaultCollector) -> None:
    """Add a fault for codes that don't fit their width, if the container is wider."""
    packing = weight.packing
    if packing is None:
        return
    if packing == INT8_PLAIN and weight.args.num_bits < packing.bits:
        _check_code_range(name, codes.numbers, weight.args.num_bits, faults)
    if not packing.dense:
        _check_spare_bits(name, codes.numbers, packing, faults)


def _check_code_range(name: str, codes: NDArray[Any], bits: int, faults: FaultCollector) -> None:
    """Add a fault for int8 codes outside the signed range of `bits` bits."""
    half = 1 << (bits - 1)
    low, high = int(codes.min()), int(codes.max())
    if low < -half or high >= half:
        faults.add(
            where=name,
            expected=f"codes of {bits} bits, from {-half} to {half - 1}",
            found=f"codes from {low} to {high}",
            remedy="num_bits in config_groups is too small for this weight, or its writer stored unsigned codes.",
        )


def _check_spare_bits(name: str, words: NDArray[Any], packing: Packing, faults: FaultCollector) -> None:
    """Add a fault if the padding bits of padded words are not zero.

    The words were then written in the dense layout, which may need the same number of words.
    """
    import numpy as np

    used = packing.bits * (packing.container.bits // packing.bits)
    chunks = (words.ravel()[begin : begin + _CHUNK_WORDS] for begin in range(0, words.size, _CHUNK_WORDS))
    spare = sum(int(np.count_nonzero(chunk >> used)) for chunk in chunks)
    if spare:
        faults.add(
            where=name,
            expected=f"words padded to {used} used bits, as compressed-tensors up to 0.17.1 writes {packing.bits} bits",
            found=f"{spare} of {words.size} words that use more",
            remedy="A newer release packed this weight; set `version` in the configuration to that of its writer.",
        )
