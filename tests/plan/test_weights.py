"""Reading one quantized module: its tensors decide, the configuration gives the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import config_group, fp8_inputs, fp8_weights, int_weights, quantization_block

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, FaultCollector
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.config.reader import CompressedTensorsConfigReader
from trtllm_ct.plan.models.sites import Site
from trtllm_ct.plan.stored import StoredModule, Whole
from trtllm_ct.plan.weights import QuantizedWeight, WeightReader

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


def reader(*groups: dict[str, Any], multimodal: bool = False, **block: Any) -> WeightReader:
    """A reader of a block with these groups, by default of all Linears."""
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    config = CompressedTensorsConfigReader().read(quantization_block(named, **block))
    return WeightReader(config, FaultCollector(), multimodal=multimodal)


def module(specs: Mapping[str, TensorSpec], name: str = NAME) -> StoredModule:
    return StoredModule(name, {local: Whole(name=f"{name}.{local}", spec=spec) for local, spec in specs.items()})


def read(weights: WeightReader, specs: Mapping[str, TensorSpec]) -> QuantizedWeight:
    """The module's weight; fails on any fault."""
    found = weights.read(module(specs), SITE)
    assert not weights.faults.faults
    assert found is not None
    return found


def refusal(weights: WeightReader, specs: Mapping[str, TensorSpec]) -> Fault:
    """The one fault of a module that has no weight."""
    assert weights.read(module(specs), SITE) is None
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
def test_a_quantized_module_that_is_ignored_is_read_with_a_warning(block: dict[str, Any]) -> None:
    weights = reader(config_group(int_weights(4, group_size=32)), **block)

    assert read(weights, INT4).group == "group_0"
    assert weights.warnings == (
        "stored quantized though no target covers it or ignore lists it; read as group_0 (1 modules)",
    )


def test_an_untargeted_module_gets_the_only_group_whose_format_fits() -> None:
    fours = config_group(int_weights(4, group_size=32), targets=["elsewhere"])
    floats = config_group(fp8_weights(), fp8_inputs(), targets=["elsewhere"])

    assert read(reader(fours, floats), FP8).group == "group_1"


@pytest.mark.parametrize("count", [0, 2])
def test_an_untargeted_module_that_fits_none_or_several_groups_is_a_fault(count: int) -> None:
    fitting = [
        config_group(int_weights(4, group_size=32), inputs, targets=["elsewhere"]) for inputs in (None, INT8_INPUTS)
    ]
    other = config_group(fp8_weights(), targets=["elsewhere"])

    fault = refusal(reader(other, *fitting[:count]), INT4)

    assert fault.where == NAME
    assert fault.found == (
        f"{count} groups whose format fits its tensors (weight_packed int32, weight_scale bfloat16, weight_shape int64)"
    )
    assert "targets" in fault.remedy


@pytest.mark.parametrize("order", [(32, 64), (64, 32)])
def test_an_untargeted_module_gets_the_only_group_whose_shapes_fit(order: tuple[int, int]) -> None:
    groups = [config_group(int_weights(4, group_size=size), targets=["elsewhere"]) for size in order]

    assert read(reader(*groups), INT4).scheme.label() == "int4 group 32"


TWO_BITS = {
    "weight_packed": TensorSpec(DType.I32, (32, 4)),
    "weight_scale": TensorSpec(DType.BF16, (32, 2)),
}
ALL_LINEARS = {
    2: config_group(int_weights(2, group_size=32)),
    4: config_group(int_weights(4, group_size=32)),
    8: config_group(int_weights(8, "channel")),
}


@pytest.mark.parametrize(("specs", "bits"), [(TWO_BITS, 2), (INT4, 4), (INT8_WORDS, 8)])
@pytest.mark.parametrize("order", [(2, 4, 8), (8, 4, 2), (4, 8, 2)])
def test_of_several_groups_that_claim_a_module_the_only_one_that_fits_is_read(
    specs: Mapping[str, TensorSpec], bits: int, order: tuple[int, ...]
) -> None:
    weights = reader(*(ALL_LINEARS[size] for size in order))

    weight = read(weights, specs)

    assert weight.scheme.weights is not None
    assert weight.scheme.weights.num_bits == bits
    chosen = f"group_{order.index(bits)}"
    (warning,) = weights.warnings
    assert warning.startswith("group_0, group_1 and group_2 all claim a module; ")
    assert warning.endswith(f"read as {chosen}, the only one that fits the tensors: {NAME}")


def test_a_named_target_whose_scheme_does_not_fit_gives_way_to_the_one_that_does() -> None:
    named = config_group(int_weights(8, "channel"), targets=["re:.*down_proj"])

    weights = reader(named, ALL_LINEARS[4])

    assert read(weights, INT4).group == "group_1"
    assert weights.warnings == (
        f"group_0 and group_1 both claim a module; read as group_1, the only one that fits the tensors: {NAME}",
    )


@pytest.mark.parametrize("targets", [[NAME], ["re:.*down_proj"]])
def test_a_more_specific_target_that_fits_needs_no_warning(targets: list[str]) -> None:
    weights = reader(config_group(int_weights(4, group_size=32), targets=targets), ALL_LINEARS[8])

    assert read(weights, INT4).group == "group_0"
    assert weights.warnings == ()


@pytest.mark.parametrize(
    ("targets", "group"),
    [
        ([["Linear"], ["Linear"]], "group_1"),  # the last group of the same entry
        ([["re:.*down.*"], ["re:.*mlp.*"]], "group_0"),  # patterns in the order of their text
        ([["re:.*mlp.*"], ["re:.*down.*"]], "group_1"),
    ],
)
def test_where_several_claims_fit_the_library_decides_and_it_is_said(targets: list[list[str]], group: str) -> None:
    inputs = (None, INT8_INPUTS)
    scheme = int_weights(4, group_size=32)
    weights = reader(*(config_group(scheme, each, targets=names) for each, names in zip(inputs, targets, strict=True)))

    assert read(weights, INT4).group == group
    assert weights.warnings == (
        f"group_0 and group_1 both claim a module; read as {group}, by the order of the library: {NAME}",
    )


def test_groups_of_one_scheme_need_no_warning() -> None:
    weights = reader(ALL_LINEARS[4], ALL_LINEARS[4])

    assert read(weights, INT4).group == "group_1"
    assert weights.warnings == ()


def test_a_stored_zero_point_tells_an_asymmetric_claim_from_a_symmetric_one() -> None:
    asymmetric = config_group(int_weights(4, group_size=32, symmetric=False))

    for order in ((asymmetric, ALL_LINEARS[4]), (ALL_LINEARS[4], asymmetric)):
        assert read(reader(*order), INT4).scheme.weights == reader(ALL_LINEARS[4]).config.groups[0].scheme.weights
        with_zero_points = read(reader(*order), INT4 | ZERO_POINT)
        assert with_zero_points.scheme.weights is not None
        assert not with_zero_points.scheme.weights.symmetric


def test_the_format_that_a_group_declares_never_overrules_the_tensors() -> None:
    weights = reader(config_group(int_weights(4, group_size=32), format="int-quantized"))

    assert read(weights, INT4).stored.format.name == "pack-quantized"
    assert weights.warnings == ("declared as int-quantized, stored as pack-quantized: the tensors decide (1 modules)",)


@pytest.mark.parametrize("declared", ["float-quantized", "naive-quantized"])
def test_both_names_of_float8_codes_are_accepted_without_a_warning(declared: str) -> None:
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
NVFP4 = fp8_weights("tensor_group") | {"num_bits": 4, "group_size": 16}
MX = fp8_weights("group") | {"group_size": 32, "scale_dtype": "torch.uint8"}
NVFP4_SPECS = {
    "weight_packed": TensorSpec(DType.U8, (32, 32)),
    "weight_scale": TensorSpec(DType.F8_E4M3, (32, 4)),
    "weight_global_scale": TensorSpec(DType.F32, (1,)),
}
EXPONENTS = {"weight_scale": TensorSpec(DType.U8, (32, 2))}
SUPPORTED = {
    "int4": (config_group(int_weights(4, group_size=32)), INT4, "pack-quantized"),
    "int4 in bytes": (
        config_group(int_weights(4, "channel"), INT8_INPUTS),
        {"weight": TensorSpec(DType.I8, (32, 64)), "weight_scale": TensorSpec(DType.BF16, (32, 1))},
        "int-quantized",
    ),
    "int8 activations": (
        config_group(int_weights(8, "channel"), INT8_INPUTS),
        {"weight": TensorSpec(DType.I8, (32, 64)), "weight_scale": TensorSpec(DType.BF16, (32, 1))},
        "int-quantized",
    ),
    "fp8": (config_group(fp8_weights(), fp8_inputs()), FP8, "float-quantized"),
    "fp8 with output activations": (
        config_group(fp8_weights(), fp8_inputs()) | {"output_activations": fp8_inputs()},
        FP8,
        "float-quantized",
    ),
    "fp8 in blocks": (
        config_group(fp8_weights("block", block_structure=[16, 48]), fp8_inputs("token")),
        FP8 | {"weight_scale": TensorSpec(DType.F32, (2, 2))},
        "float-quantized",
    ),
    "nvfp4": (config_group(NVFP4), NVFP4_SPECS, "nvfp4-pack-quantized"),
    "mxfp4": (
        config_group(MX | {"num_bits": 4}),
        EXPONENTS | {"weight_packed": TensorSpec(DType.U8, (32, 32))},
        "mxfp4-pack-quantized",
    ),
    "mxfp6": (
        config_group(MX | {"num_bits": 6}),
        EXPONENTS | {"weight_packed": TensorSpec(DType.U8, (32, 48))},
        "mxfp6-pack-quantized",
    ),
    "mxfp8": (
        config_group(MX),
        EXPONENTS | {"weight": TensorSpec(DType.F8_E4M3, (32, 64))},
        "mxfp8-quantized",
    ),
}


@pytest.mark.parametrize("case", SUPPORTED)
def test_the_row_of_a_module_is_named_by_its_tensors(case: str) -> None:
    group, specs, name = SUPPORTED[case]
    weights = reader(group, format=name)

    weight = read(weights, specs)

    assert weight.stored.format.name == name
    assert weight.stored.shape == SITE.shape
    assert weights.warnings == ()


UNREADABLE = {
    "float8 e5m2": (
        config_group(fp8_weights(), fp8_inputs()),
        FP8 | {"weight": TensorSpec(DType.F8_E5M2, (32, 64))},
        "fp8 tensor, input fp8 tensor, declared pack-quantized (weight float8_e5m2, weight_scale bfloat16)",
    ),
    "codes of integers for floats": (
        config_group(NVFP4, format="nvfp4-pack-quantized"),
        INT4,
        "fp4 tensor_group 16, declared nvfp4-pack-quantized (weight_packed int32, weight_scale bfloat16, weight_shape",
    ),
    "pieces without their words": (
        config_group(int_weights(4, group_size=32)),
        {"weight": TensorSpec(DType.U8, (32, 32)), "weight_scale": TensorSpec(DType.BF16, (32, 2))},
        "int4 group 32, declared pack-quantized (weight uint8, weight_scale bfloat16)",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_tensors_that_no_format_accepts_are_refused_with_what_they_are(case: str) -> None:
    group, specs, found = UNREADABLE[case]

    fault = refusal(reader(group), specs)

    assert fault.where == NAME
    assert found in fault.found
    for known in ("pack-quantized", "float-quantized", "nvfp4-pack-quantized", "marlin-24"):
        assert known in fault.expected
    assert "num_bits, type and format" in fault.remedy


def test_nvfp4_without_its_divisor_is_a_fault_and_never_a_divisor_of_one() -> None:
    lacking = {local: spec for local, spec in NVFP4_SPECS.items() if local != "weight_global_scale"}

    fault = refusal(reader(config_group(NVFP4)), lacking)

    assert fault.where == f"{NAME}.weight_global_scale"


class TestNames:
    """In a multimodal model, targets and ignore may have another prefix of the text model than the files."""

    STORED = ("model.language_model.layers.0.mlp.down_proj", "language_model.model.layers.0.mlp.down_proj")

    @pytest.mark.parametrize("name", STORED)
    @pytest.mark.parametrize(
        "target",
        [
            *STORED,
            "model.layers.0.mlp.down_proj",
            f"{STORED[0]}.linear",
            r"re:.*language_model\.layers.*down_proj",
            r"re:language_model\.model\..*",
        ],
    )
    def test_every_order_of_the_prefix_is_the_same_module(self, name: str, target: str) -> None:
        weights = reader(
            config_group(int_weights(4, group_size=32), targets=[target]),
            config_group(int_weights(4, group_size=64), targets=["elsewhere"]),
            multimodal=True,
        )

        found = weights.read(module(INT4, name), SITE)

        assert found is not None
        assert found.group == "group_0"
        assert weights.warnings == ()

    def test_a_name_of_its_own_counts_before_that_of_a_variant(self) -> None:
        own, other = self.STORED
        weights = reader(
            config_group(int_weights(4, group_size=64), targets=[other]),
            config_group(int_weights(4, group_size=32), targets=[own]),
            multimodal=True,
        )

        found = weights.read(module(INT4, own), SITE)

        assert found is not None
        assert found.group == "group_1"

    def test_a_model_that_is_text_alone_has_one_spelling(self) -> None:
        weights = reader(config_group(int_weights(4, group_size=32), targets=[self.STORED[0]]))

        read(weights, INT4)

        (warning,) = weights.warnings
        assert "no target covers it" in warning


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
        "asymmetric without a zero point: all zero, as in files of writers up to 0.9.3 (1 modules)",
    )


@pytest.mark.parametrize("version", ["0.9.4", "0.13.0", "0.20.0", "0.13.1.a20260101", "1.0"])
def test_later_writers_never_leave_zero_points_out(version: str) -> None:
    weights = reader(config_group(int_weights(4, group_size=32, symmetric=False)), version=version)

    weights.read(module(INT4), SITE)

    (fault,) = weights.faults.faults
    assert fault.where == f"{NAME}.weight_zero_point"
    assert fault.expected == "the zero points of an asymmetric weight"
    assert fault.found == "no such tensor"


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_stored_zero_point_counts_whatever_the_configuration_says(symmetric: bool) -> None:
    weights = reader(config_group(int_weights(4, group_size=32, symmetric=symmetric)))

    assert read(weights, INT4 | ZERO_POINT).stored.has_zero_point


def test_faults_of_the_tensors_are_reported_and_leave_no_weight() -> None:
    """A missing scale is one fault: the reader adds the faults of the format."""
    fault = refusal(reader(config_group(int_weights(8, "channel"))), {"weight_packed": INT8_WORDS["weight_packed"]})

    assert fault.where == f"{NAME}.weight_scale"
    assert fault.found == "no such tensor"
