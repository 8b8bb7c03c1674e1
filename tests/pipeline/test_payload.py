"""Invalid values that headers don't show: each is named, and all faults of a module are raised together."""

from __future__ import annotations

from math import inf, nan
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import tiny_config, write_checkpoint
from on_tensors import arrays

from trtllm_ct.base.errors import FaultCollector, PayloadError
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.pipeline.payload import check_payload, count_zero_scales
from trtllm_ct.pipeline.weight_mapper import CompressedTensorsWeightMapper

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.base.errors import Fault
    from trtllm_ct.plan.plan import ModulePlan

Module = tuple["ModulePlan", dict[str, "Tensor"]]
O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def one_module(tmp_path: Path) -> Callable[..., Module]:
    """`one_module(scheme)`: the plan of one module and its stored tensors by local name, free to be damaged."""

    def build(scheme: str, name: str = O_PROJ, **more: Any) -> Module:
        built = write_checkpoint(tmp_path / scheme, config=tiny_config(layers=1), scheme=scheme, **more)
        module = plan_checkpoint(built.directory, "reference").module(name)
        return module, {read.rpartition(".")[2]: built.stored[read].clone() for read in module.reads}

    return build


def faults_of(module: ModulePlan, stored: Mapping[str, Tensor]) -> list[Fault]:
    faults = FaultCollector()
    check_payload(module, arrays(stored), faults)
    return faults.faults


@pytest.mark.parametrize("scheme", ["int4-g64-asym", "int8-plain-channel-asym", "fp8-tensor-static"])
def test_good_values_raise_no_fault(scheme: str, one_module: Callable[..., Module]) -> None:
    assert faults_of(*one_module(scheme)) == []


@pytest.mark.parametrize("bad", [nan, inf, -inf, -1e-30])
@pytest.mark.parametrize(
    ("scheme", "position"), [("int4-g32", "[3, 1]"), ("int8-channel", "[3, 0]"), ("int4-tensor", "[0]")]
)
def test_a_scale_is_finite_and_not_negative(
    scheme: str, position: str, bad: float, one_module: Callable[..., Module]
) -> None:
    module, stored = one_module(scheme, scale_dtype=torch.float32)
    scale = stored["weight_scale"]
    scale.view(-1)[min(3 * scale.shape[-1] + scale.shape[-1] - 1, scale.numel() - 1)] = bad
    (fault,) = faults_of(module, stored)
    assert fault.where == f"{O_PROJ}.weight_scale{position}"
    assert fault.expected.startswith("a finite scale")
    assert f"{bad:g} (1 of {scale.numel()} elements are bad)" in fault.found
    assert "download or quantize it again" in fault.remedy


@pytest.mark.parametrize(("scheme", "zero_rows"), [("int4-g32", 2), ("int8-channel", 1), ("fp8-channel-token", 1)])
def test_a_zero_scale_of_a_row_or_a_group_is_counted_and_allowed(
    scheme: str, zero_rows: int, one_module: Callable[..., Module]
) -> None:
    """Experts and channels that calibration never saw have such scales; they hold zeros."""
    module, stored = one_module(scheme)
    stored["weight_scale"][5] = 0
    assert faults_of(module, stored) == []
    assert count_zero_scales(module, arrays(stored)) == zero_rows


@pytest.mark.parametrize("scheme", ["int4-tensor", "fp8-tensor-static"])
def test_a_zero_scale_of_a_whole_tensor_is_a_fault(scheme: str, one_module: Callable[..., Module]) -> None:
    module, stored = one_module(scheme)
    stored["weight_scale"].zero_()
    (fault,) = faults_of(module, stored)
    assert "positive" in fault.expected


@pytest.mark.parametrize("bad", [0.0, nan, inf, -1.0])
@pytest.mark.parametrize(
    ("name", "local"), [(O_PROJ, "input_scale"), ("model.layers.0.self_attn", "k_scale")], ids=["input", "kv"]
)
def test_scales_of_activations_are_positive(
    name: str, local: str, bad: float, one_module: Callable[..., Module]
) -> None:
    module, stored = one_module("fp8-tensor-static", name, kv=True)
    stored[local].fill_(bad)
    (fault,) = faults_of(module, stored)
    assert fault.where.startswith(f"{name}.{local}")
    assert "positive" in fault.expected


@pytest.mark.parametrize("numbers", [[64, 63], [63, 64], [64], [1, 64, 64]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_weight_shape_must_match_the_codes_and_the_config(
    numbers: list[int], dtype: torch.dtype, one_module: Callable[..., Module]
) -> None:
    module, stored = one_module("int4-g32")
    assert faults_of(module, stored | {"weight_shape": torch.tensor([64, 64], dtype=dtype)}) == []
    (fault,) = faults_of(module, stored | {"weight_shape": torch.tensor(numbers, dtype=dtype)})
    assert fault.where == f"{O_PROJ}.weight_shape"
    assert "[64, 64]" in fault.expected
    assert fault.found == str(numbers)


def test_unsigned_zero_points_are_distinguished_from_signed_ones(tmp_path: Path) -> None:
    """Some writers stored 0 to 15 where the format has -8 to 7."""

    def plain(stored: dict[str, Tensor]) -> None:
        stored[f"{O_PROJ}.weight_zero_point"] = torch.full((64, 2), 15, dtype=torch.int8)

    built = write_checkpoint(tmp_path, config=tiny_config(layers=1), scheme={O_PROJ: "int4-g32-asym"}, edit=plain)
    module = plan_checkpoint(built.directory, "reference").module(O_PROJ)
    (fault,) = faults_of(module, {name.rpartition(".")[2]: built.stored[name] for name in module.reads})
    assert fault.where == f"{O_PROJ}.weight_zero_point"
    assert "[-8, 7]" in fault.expected
    assert "from 15 to 15" in fault.found
    assert "unsigned" in fault.remedy


def test_all_faults_of_a_module_are_raised_together(one_module: Callable[..., Module]) -> None:
    module, stored = one_module("fp8-tensor-static")
    stored["weight_scale"].fill_(nan)
    stored["input_scale"].zero_()
    with pytest.raises(PayloadError) as caught:
        CompressedTensorsWeightMapper().map_module(module, {f"{O_PROJ}.{k}": v for k, v in stored.items()})
    assert [fault.where for fault in caught.value.faults] == [f"{O_PROJ}.weight_scale[0]", f"{O_PROJ}.input_scale[0]"]


def test_a_plain_module_has_nothing_to_check(one_module: Callable[..., Module]) -> None:
    module, stored = one_module("int4-g32", "model.norm")
    assert faults_of(module, stored) == []
    assert count_zero_scales(module, arrays(stored)) == 0
