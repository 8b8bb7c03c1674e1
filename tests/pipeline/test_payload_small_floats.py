"""The numbers in the scales of NVFP4 and MX weights: one-byte and global scales, and experts without calibration."""

from __future__ import annotations

from math import inf, nan
from typing import TYPE_CHECKING

import pytest
import torch
from float_modules import MXFP4_ARGS, MXFP6_ARGS, MXFP8_ARGS, NVFP4_ARGS, assert_one_fault, described, random_module
from on_tensors import arrays

from trtllm_ct.base.errors import Fault, FaultCollector
from trtllm_ct.base.schemes import QuantArgs
from trtllm_ct.pipeline.payload import check_payload, count_zero_scales
from trtllm_ct.plan.plan import ModulePlan

if TYPE_CHECKING:
    from torch import Tensor

DENSE = "model.layers.0.mlp.down_proj"
SHARED_EXPERT = "model.layers.0.mlp.shared_experts.down_proj"
EXPERT = "model.layers.0.mlp.experts.7.down_proj"
MX_ARGS = [MXFP4_ARGS, MXFP6_ARGS, MXFP8_ARGS]


def stored_module(args: QuantArgs) -> dict[str, Tensor]:
    """Six rows of 64 columns, with no scale that is zero."""
    stored = random_module(args, (6, 64), seed=5)
    scale = stored["weight_scale"].view(torch.uint8)
    scale[scale == 0] = 1
    return stored


def plan_of(name: str, args: QuantArgs, stored: dict[str, Tensor]) -> ModulePlan:
    return ModulePlan(name=name, class_name="Linear", views={}, weight=described(args, stored))


def faults_of(name: str, args: QuantArgs, stored: dict[str, Tensor]) -> list[Fault]:
    faults = FaultCollector()
    check_payload(plan_of(name, args, stored), arrays(stored), faults)
    return faults.faults


@pytest.mark.parametrize("args", [NVFP4_ARGS, *MX_ARGS], ids=QuantArgs.label)
def test_good_values_raise_no_fault(args: QuantArgs) -> None:
    stored = stored_module(args)
    assert faults_of(DENSE, args, stored) == []
    assert count_zero_scales(plan_of(DENSE, args, stored), arrays(stored)) == 0


@pytest.mark.parametrize("as_bytes", [False, True], ids=["e4m3", "bytes"])
@pytest.mark.parametrize(("bits", "found"), [(0x7F, "nan"), (0xFF, "nan"), (0xB8, "-1"), (0x81, "-0.001953")])
@pytest.mark.parametrize("name", [DENSE, EXPERT])
def test_a_local_scale_is_a_number_and_not_negative(name: str, bits: int, found: str, as_bytes: bool) -> None:
    stored = stored_module(NVFP4_ARGS)
    stored["weight_scale"].view(torch.uint8)[3, 2] = bits
    if as_bytes:
        stored["weight_scale"] = stored["weight_scale"].view(torch.uint8)
    (fault,) = faults_of(name, NVFP4_ARGS, stored)
    assert fault.where == f"{name}.weight_scale[3, 2]"
    assert fault.found.startswith(found)
    assert "1 of 24 elements" in fault.found


@pytest.mark.parametrize("bits", [0x00, 0x80], ids=["0", "-0"])
def test_a_local_scale_of_zero_is_allowed_and_counted(bits: int) -> None:
    stored = stored_module(NVFP4_ARGS)
    stored["weight_scale"].view(torch.uint8)[3] = bits
    assert faults_of(DENSE, NVFP4_ARGS, stored) == []
    assert count_zero_scales(plan_of(DENSE, NVFP4_ARGS, stored), arrays(stored)) == 4


@pytest.mark.parametrize("as_e8m0", [False, True], ids=["bytes", "e8m0"])
@pytest.mark.parametrize("args", MX_ARGS, ids=QuantArgs.label)
def test_an_exponent_of_255_is_a_fault(args: QuantArgs, as_e8m0: bool) -> None:
    """The library would decode it as infinity."""
    stored = stored_module(args)
    stored["weight_scale"][3, 1] = 255
    if as_e8m0:
        stored["weight_scale"] = stored["weight_scale"].view(torch.float8_e8m0fnu)
    assert_one_fault(
        faults_of(DENSE, args, stored),
        f"{DENSE}.weight_scale[3, 1]",
        "finite scale",
        "nan (1 of 12",
        "quantize it again",
    )


@pytest.mark.parametrize("exponent", [0, 254])
@pytest.mark.parametrize("args", MX_ARGS, ids=QuantArgs.label)
def test_every_other_exponent_is_a_scale_and_none_is_zero(args: QuantArgs, exponent: int) -> None:
    stored = stored_module(args)
    stored["weight_scale"].fill_(exponent)
    assert faults_of(DENSE, args, stored) == []
    assert count_zero_scales(plan_of(DENSE, args, stored), arrays(stored)) == 0


@pytest.mark.parametrize(
    ("name", "local", "bad"),
    [
        (name, local, bad)
        for name in (DENSE, EXPERT)
        for local in ("weight_global_scale", "input_global_scale")
        for bad in (nan, inf, -inf, -1.0)
        if (name, local, bad) != (EXPERT, "input_global_scale", inf)
    ],
)
def test_a_global_scale_is_finite_and_not_negative(name: str, bad: float, local: str) -> None:
    stored = stored_module(NVFP4_ARGS) | {"input_global_scale": torch.ones(1)}
    stored[local] = torch.tensor([bad])
    assert_one_fault(faults_of(name, NVFP4_ARGS, stored), f"{name}.{local}[0]", "finite", f"{bad:g} (1 of 1", "")


@pytest.mark.parametrize("local", ["weight_global_scale", "input_global_scale"])
@pytest.mark.parametrize("name", [DENSE, SHARED_EXPERT])
def test_a_global_scale_of_zero_is_a_fault_outside_of_experts(name: str, local: str) -> None:
    stored = stored_module(NVFP4_ARGS) | {local: torch.zeros(())}
    assert_one_fault(faults_of(name, NVFP4_ARGS, stored), f"{name}.{local}", "positive", "0 (1 of 1", "")


def test_the_input_of_an_expert_that_saw_no_calibration_may_have_an_infinite_divisor() -> None:
    """Some writers store 448 * 6 / 0 for it, and others 0; both mean that no value was seen."""
    stored = stored_module(NVFP4_ARGS) | {"input_global_scale": torch.tensor([inf])}
    assert faults_of(EXPERT, NVFP4_ARGS, stored) == []


def test_an_expert_that_saw_no_calibration_is_counted_as_zeros() -> None:
    zero = {"weight_global_scale": torch.zeros(1), "input_global_scale": torch.zeros(1)}
    stored = stored_module(NVFP4_ARGS) | zero
    assert faults_of(EXPERT, NVFP4_ARGS, stored) == []
    assert count_zero_scales(plan_of(EXPERT, NVFP4_ARGS, stored), arrays(stored)) == 24


def test_a_leftover_zero_point_must_hold_zeros() -> None:
    stored = stored_module(NVFP4_ARGS) | {"weight_zero_point": torch.zeros(6, 4).to(torch.float8_e4m3fn)}
    assert faults_of(DENSE, NVFP4_ARGS, stored) == []
    stored["weight_zero_point"] = torch.ones(6, 4, dtype=torch.int8)
    assert_one_fault(
        faults_of(DENSE, NVFP4_ARGS, stored),
        f"{DENSE}.weight_zero_point",
        "zeros only",
        "24 of 24",
        "quantize the model again",
    )
