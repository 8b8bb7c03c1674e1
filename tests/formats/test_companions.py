"""Companions of a weight in headers: what a fault tells a person to do."""

from __future__ import annotations

import pytest

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.schemes import NumberType, QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats.companions import check_plain_zero_point


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_may_be_removed_only_if_the_scheme_is_symmetric(symmetric: bool) -> None:
    args = QuantArgs(num_bits=4, type=NumberType.INT, symmetric=symmetric, strategy=Strategy.GROUP, group_size=32)
    faults = FaultCollector()

    check_plain_zero_point("a", args, TensorSpec(DType.I8, (32, 3)), (32, 64), faults)

    assert [fault.where for fault in faults.faults] == ["a.weight_zero_point"]
    assert ("remove the zero points" in faults.faults[0].remedy) is symmetric
