"""For tests of weight formats: from the stored tensors of one module to its description, its faults and its values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from on_tensors import NATIVE, arrays
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, FaultCollector
from trtllm_ct.base.schemes import QuantArgs, TensorSpec
from trtllm_ct.pipeline.payload import check_payload
from trtllm_ct.plan.plan import ModulePlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.formats.base import StoredSpecs, StoredWeight, Version, WeightFormat

NEWEST: Version = (0, 20, 0)
Sized = tuple[DType, tuple[int, ...]]
Shape = tuple[int, int]


def specs_of(tensors: Mapping[str, Tensor]) -> StoredSpecs:
    """What the headers say of these tensors."""
    return {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


def header_faults(
    entry: WeightFormat, args: QuantArgs, stored: StoredSpecs, expected: Shape | None = None, version: Version = NEWEST
) -> list[Fault]:
    """Everything that is wrong with the headers of module `lin`."""
    faults = FaultCollector()
    entry.describe("lin", args, stored, expected, faults, version)
    return faults.faults


def described(
    entry: WeightFormat, args: QuantArgs, stored: StoredSpecs, expected: Shape | None = None, version: Version = NEWEST
) -> StoredWeight:
    """The weight of module `lin`; fails on any fault."""
    faults = FaultCollector()
    weight = entry.describe("lin", args, stored, expected, faults, version)
    assert not faults.faults
    assert weight is not None
    return weight


def payload_faults(weight: StoredWeight, tensors: Mapping[str, Tensor]) -> list[Fault]:
    """Everything that is wrong with the values of module `lin`."""
    faults = FaultCollector()
    check_payload(ModulePlan(name="lin", class_name="Linear", views={}, weight=weight), arrays(tensors), faults)
    return faults.faults


def values(weight: StoredWeight, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight in float64, which holds every product of a code and a scale; fails on bad values."""
    assert payload_faults(weight, tensors) == []
    return NATIVE.dequantize(weight, tensors, torch.float64)


def exact_values(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    block: Shape = (1, 1),
    group_index: list[int] | None = None,
) -> Tensor:
    """The slow twin: (code - zero point) * scale, element by element, in float64.

    `scale` is 2-D, one for each block of rows and columns; `group_index` overrules the columns of a block.
    """
    result = torch.empty(codes.shape, dtype=torch.float64)
    for n, k in np.ndindex(*codes.shape):
        place = n // block[0], k // block[1] if group_index is None else group_index[k]
        zero = 0 if zero_point is None else int(zero_point[place])
        result[n, k] = (float(codes[n, k]) - zero) * float(scale[place])
    return result


def assert_fault(fault: Fault, where: str, expected: str, found: str, remedy: str) -> None:
    """The fault says where it is, and the other parts hold these words."""
    assert fault.where == where
    assert expected in fault.expected
    assert found in fault.found
    assert remedy in fault.remedy
