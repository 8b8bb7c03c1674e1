"""Reading one quantized module: its tensors decide, the configuration gives the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import config_group, fp8_inputs, fp8_weights, int_weights, quantization_block

from trtllm_ct.config.reader import CompressedTensorsConfigReader
from trtllm_ct.dtypes import DType
from trtllm_ct.errors import Fault, FaultCollector
from trtllm_ct.plan.architectures import Site
from trtllm_ct.plan.stored import StoredModule
from trtllm_ct.plan.weights import QuantizedWeight, WeightReader
from trtllm_ct.schemes import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "model.layers.0.mlp.down_proj"
SITE = Site(module=NAME, class_name="Linear", shape=(32, 64))
INT4 = {
    "weight_packed": TensorSpec(DType.I32, (32, 8)),
    "weight_scale": TensorSpec(DType.BF16, (32, 2)),
    "weight_shape": TensorSpec(DType.I64, (2,)),
}
ZERO_POINT = {"weight_zero_point": TensorSpec(DType.I32, (4, 2))}
FP8 = {"weight": TensorSpec(DType.F8_E4M3, (32, 64)), "weight_scale": TensorSpec(DType.BF16, (1,))}
INT8_WORDS = {
    "weight_packed": TensorSpec(DType.I32, (32, 16)),
    "weight_scale": TensorSpec(DType.BF16, (32, 1)),
}


def reader(*groups: dict[str, Any], **block: Any) -> WeightReader:
    """A reader of a block with these groups, by default of all Linears."""
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    config = CompressedTensorsConfigReader().read(quantization_block(named, **block))
    return WeightReader(config, FaultCollector())


def read(weights: WeightReader, specs: Mapping[str, TensorSpec]) -> QuantizedWeight:
    """The module's weight; fails on any fault."""
    found = weights.read(StoredModule(NAME, specs), SITE)
    assert not weights.faults.faults
    assert found is not None
    return found


def refusal(weights: WeightReader, specs: Mapping[str, TensorSpec]) -> Fault:
    """The one fault of a module that has no weight."""
    assert weights.read(StoredModule(NAME, specs), SITE) is None
    (fault,) = weights.faults.faults
    return fault


def test_the_group_that_targets_a_module_gives_its_parameters() -> None:
    eights = config_group(int_weights(8, "channel"), targets=["re:.*self_attn.*"])
    fours = config_group(int_weights(4, group_size=32), targets=["Linear"])

    weight = read(reader(eights, fours), INT4)

    assert weight.group == "group_1"
    assert weight.scheme.label() == "int4 group 32"
    assert weight.stored.shape == SITE.shape
    assert weight.stored.consumed == ("weight_packed", "weight_scale", "weight_shape")


@pytest.mark.parametrize(
    "block",
    [{"ignore": [NAME]}, {"ignore": ["re:.*mlp.*"]}],
    ids=["ignored by name", "ignored by pattern"],
)
def test_a_module_that_is_quantized_in_spite_of_ignore_is_read_with_a_warning(block: dict[str, Any]) -> None:
    weights = reader(config_group(int_weights(4, group_size=32)), **block)

    assert read(weights, INT4).group == "group_0"
    assert weights.warnings == (
        "stored quantized though no target covers it or ignore lists it; read as group_0 (1 modules)",
    )


def test_the_only_group_whose_format_fits_is_taken_for_an_untargeted_module() -> None:
    fours = config_group(int_weights(4, group_size=32), targets=["elsewhere"])
    floats = config_group(fp8_weights(), fp8_inputs(), targets=["elsewhere"])

    assert read(reader(fours, floats), FP8).group == "group_1"


@pytest.mark.parametrize("count", [0, 2])
def test_an_untargeted_module_that_none_or_several_groups_fit_is_a_fault(count: int) -> None:
    fitting = [config_group(int_weights(4, group_size=size), targets=["elsewhere"]) for size in (32, 64)]
    other = config_group(fp8_weights(), targets=["elsewhere"])

    fault = refusal(reader(other, *fitting[:count]), INT4)

    assert fault.where == NAME
    assert fault.found == (
        f"{count} groups whose format fits its tensors (weight_packed int32, weight_scale bfloat16, weight_shape int64)"
    )
    assert "targets" in fault.remedy


def test_the_format_that_a_group_declares_never_overrules_the_tensors() -> None:
    weights = reader(config_group(int_weights(4, group_size=32), format="int-quantized"))

    assert read(weights, INT4).stored.format.name == "pack-quantized"
    assert weights.warnings == ("declared as int-quantized, stored as pack-quantized: the tensors decide (1 modules)",)


@pytest.mark.parametrize("declared", ["float-quantized", "naive-quantized"])
def test_both_names_of_float8_codes_are_taken_without_a_warning(declared: str) -> None:
    weights = reader(config_group(fp8_weights(), fp8_inputs(), format=declared))

    assert read(weights, FP8).stored.format.name == "float-quantized"
    assert weights.warnings == ()


def test_a_warning_that_many_modules_share_is_given_once_with_their_number() -> None:
    weights = reader(config_group(int_weights(4, group_size=32), format="int-quantized"))
    for _ in range(3):
        read(weights, INT4)

    (warning,) = weights.warnings
    assert warning.endswith("(3 modules)")


INT8_INPUTS = fp8_inputs("token") | {"type": "int"}
UNSUPPORTED = {
    "nvfp4": (
        config_group(
            fp8_weights("tensor_group") | {"num_bits": 4, "group_size": 16},
            fp8_inputs("tensor_group") | {"num_bits": 4, "group_size": 16, "dynamic": "local"},
            format="nvfp4-pack-quantized",
        ),
        {"weight_packed": TensorSpec(DType.U8, (32, 32)), "weight_scale": TensorSpec(DType.F8_E4M3, (32, 4))},
        "fp4 tensor_group 16",
    ),
    "int8 activations": (
        config_group(int_weights(8, "channel"), INT8_INPUTS),
        {"weight": TensorSpec(DType.I8, (32, 64)), "weight_scale": TensorSpec(DType.BF16, (32, 1))},
        "int8 channel, input int8 token dynamic",
    ),
    "output activations": (
        config_group(fp8_weights(), fp8_inputs()) | {"output_activations": fp8_inputs()},
        FP8,
        "output fp8 tensor",
    ),
    "float8 e5m2": (
        config_group(fp8_weights(), fp8_inputs()),
        FP8 | {"weight": TensorSpec(DType.F8_E5M2, (32, 64))},
        "weight float8_e5m2",
    ),
    "sparse": (
        config_group(fp8_weights(), fp8_inputs()),
        {"compressed": TensorSpec(DType.F8_E4M3, (32,)), "bitmask": TensorSpec(DType.U8, (32, 8))},
        "bitmask uint8, compressed float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_an_unsupported_scheme_is_refused_with_what_it_is_and_what_is_supported(case: str) -> None:
    group, specs, found = UNSUPPORTED[case]

    fault = refusal(reader(group), specs)

    assert fault.where == NAME
    assert found in fault.found
    assert "int4 and int8 weight-only" in fault.expected
    assert "fp8 per channel with dynamic token activations" in fault.expected
    assert fault.remedy.startswith("Quantize the model again with a supported scheme")


def test_weight_and_weight_packed_together_are_a_fault_not_a_choice() -> None:
    fault = refusal(
        reader(config_group(int_weights(4, group_size=32))), INT4 | {"weight": TensorSpec(DType.BF16, (32, 64))}
    )

    assert (fault.where, fault.expected, fault.found) == (NAME, "either weight or weight_packed", "both")


@pytest.mark.parametrize("version", [None, "0.6.0", "0.9.3"])
def test_writers_up_to_0_9_3_left_out_zero_points_that_are_all_zero(version: str | None) -> None:
    weights = reader(config_group(int_weights(4, group_size=32, symmetric=False)), version=version)

    assert not read(weights, INT4).stored.has_zero_point
    assert weights.warnings == (
        "asymmetric without a zero point: all zero, as writers up to 0.9.3 mean it (1 modules)",
    )


@pytest.mark.parametrize("version", ["0.9.4", "0.13.0", "0.20.0", "0.13.1.a20260101", "1.0"])
def test_later_writers_never_leave_zero_points_out(version: str) -> None:
    weights = reader(config_group(int_weights(4, group_size=32, symmetric=False)), version=version)

    weights.read(StoredModule(NAME, INT4), SITE)

    (fault,) = weights.faults.faults
    assert fault.where == f"{NAME}.weight_zero_point"
    assert fault.expected == "the zero points of an asymmetric weight"
    assert fault.found == "no such tensor"


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_stored_zero_point_counts_whatever_the_configuration_says(symmetric: bool) -> None:
    weights = reader(config_group(int_weights(4, group_size=32, symmetric=symmetric)))

    assert read(weights, INT4 | ZERO_POINT).stored.has_zero_point


def test_faults_of_the_tensors_are_reported_and_leave_no_weight() -> None:
    """Missing scale, one fault; the reader passes on what the format finds."""
    fault = refusal(reader(config_group(int_weights(8, "channel"))), {"weight_packed": INT8_WORDS["weight_packed"]})

    assert fault.where == f"{NAME}.weight_scale"
    assert fault.found == "no such tensor"
