"""Names, dtypes and shapes of the tensors that each mode delivers: the contract with the engine's Linears."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import SCHEMES, tiny_config, write_checkpoint

from trtllm_ct.base.dtypes import DType
from trtllm_ct.engine.releases import DEFAULT_ENGINE
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.plan import Plan

LAYER = "model.layers.0"
FUSED, ALONE = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj"
# What a Linear of [out, in] = [128, 128] is given, by scheme and then by name.
WORDS, PAIRS = "int8 [128, 128]", "uint8 [64, 128]"
CODES = "float8_e4m3fn [128, 128]"
GROUPS_128, GROUPS_64 = "float32 [128, 1]", "float32 [128, 2]"
LAYOUTS: dict[str, dict[str, str]] = {
    "int4-g128": {"weight": PAIRS, "weight_scale": GROUPS_128, "pre_quant_scale": "bfloat16 [128]"},
    "int4-g64": {"weight": PAIRS, "weight_scale": GROUPS_64, "pre_quant_scale": "bfloat16 [128]"},
    "int4-g64-asym": {"weight": PAIRS, "weight_scale": GROUPS_64, "weight_zero": GROUPS_64},
    "int4-g128-asym": {"weight": PAIRS, "weight_scale": GROUPS_128, "weight_zero": GROUPS_128},
    "int4-channel": {"weight": PAIRS, "weight_scale": "float32 [128]"},
    "int4-tensor": {"weight": PAIRS, "weight_scale": "float32 [128]"},
    "int8-channel": {"weight": WORDS, "weight_scale": "float32 [128]"},
    "int8-plain-channel": {"weight": WORDS, "weight_scale": "float32 [128]"},
    "fp8-tensor-static": {
        "weight": CODES,
        "weight_scale": "float32 []",
        "input_scale": "float32 []",
    },
    "fp8-channel-token": {"weight": CODES, "weight_scale": "float32 [128]"},
    "fp8-block": {"weight": CODES, "weight_scale": "float32 [1, 1]"},
    "nvfp4": {
        "weight": "uint8 [128, 64]",
        "weight_scale": "float8_e4m3fn [128, 8]",
        "weight_scale_2": "float32 []",
        "input_scale": "float32 []",
    },
    "mxfp8": {"weight": CODES, "weight_scale": "uint8 [128, 4]"},
}
LAYOUTS["fp8-tensor-naive"] = LAYOUTS["fp8-tensor-static"]
LAYOUTS["fp8-tensor-token"] = LAYOUTS["fp8-channel-static"] = LAYOUTS["fp8-channel-token"]
LAYOUTS["nvfp4a16"] = {name: spec for name, spec in LAYOUTS["nvfp4"].items() if name != "input_scale"}
LAYOUTS |= dict.fromkeys(
    ("int6-channel", "int8-plain-tensor", "w8a8", "w8a8-static", "w8a8-static-asym"), LAYOUTS["int8-channel"]
)
LAYOUTS |= dict.fromkeys(("int3-g64", "int4-plain-g64", "w4afp8"), LAYOUTS["int4-g64"])
LAYOUTS |= dict.fromkeys(("int2-channel", "w4a8"), LAYOUTS["int4-channel"])
NEWEST = ("nvfp4a16", "mxfp8")
DEQUANTIZED = (
    "int4-g16",
    "int4-g32",
    "int4-g32-asym",
    "int4-g64-asym",
    "int4-g64-actorder",
    "int4-g128-asym",
    "int4-channel-asym",
    "int8-g32",
    "int8-g64",
    "int8-plain-g32",
    "int8-channel-asym",
    "int8-plain-channel-asym",
    "fp8-weight-only",
    "mxfp4",
    "mxfp4a16",
    "mxfp6a8",
    "mxfp8a16",
    *NEWEST,
)


def plan(
    tmp_path: Path,
    scheme: str,
    *,
    to: str = "reference",
    engine: str = DEFAULT_ENGINE,
    dtype: DType | None = None,
    **config: object,
) -> Plan:
    config = {"hidden": 128, "heads": 4, "kv_heads": 4, "layers": 1, **config}
    write_checkpoint(tmp_path, config=tiny_config(**config), scheme=scheme)
    return plan_checkpoint(tmp_path, to, engine=engine, dtype=dtype)


def delivered(made: Plan, module: str) -> dict[str, str]:
    return {delivery.name.removeprefix(f"{module}."): str(delivery.spec) for delivery in made.module(module).deliveries}


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_each_mode_delivers_the_tensors_that_its_linear_reads(tmp_path: Path, scheme: str) -> None:
    """A fused Linear never reads `pre_quant_scale`, any other Linear requires it."""
    made = plan(tmp_path, scheme)

    assert delivered(made, ALONE) == LAYOUTS[scheme]
    assert delivered(made, FUSED) == {name: spec for name, spec in LAYOUTS[scheme].items() if name != "pre_quant_scale"}


def test_every_scheme_is_delivered_natively_somewhere_or_dequantized_at_stock() -> None:
    # The last one is that of experts, see tests/serve/test_double_w4a8.py.
    assert SCHEMES.keys() - {"int4-g256", "int4-g128-fp8-static"} == {*LAYOUTS, *DEQUANTIZED}


@pytest.mark.parametrize("scheme", [name for name in LAYOUTS if not name.endswith("-asym") or name.startswith("w8a8")])
def test_the_newest_engine_gets_the_same_tensors(tmp_path: Path, scheme: str) -> None:
    """Of the modes that the reference engine has, stock releases lack only the one with zero points."""
    made = plan(tmp_path, scheme, to="modelopt", engine="stock-1.3")

    assert delivered(made, ALONE) == LAYOUTS[scheme]


@pytest.mark.parametrize("scheme", NEWEST)
def test_modes_that_only_the_newest_engine_has_are_dequantized_for_others(tmp_path: Path, scheme: str) -> None:
    made = plan(tmp_path, scheme, to="modelopt")

    assert delivered(made, ALONE) == {"weight": "bfloat16 [128, 128]"}
    assert made.module(ALONE).reason.endswith("; stock-1.3 has one")


@pytest.mark.parametrize("scheme", DEQUANTIZED)
def test_a_module_without_a_mode_delivers_one_plain_weight(tmp_path: Path, scheme: str) -> None:
    made = plan(tmp_path, scheme, to="modelopt")

    assert delivered(made, ALONE) == delivered(made, FUSED) == {"weight": "bfloat16 [128, 128]"}


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_a_plain_target_gets_plain_weights_only(tmp_path: Path, scheme: str) -> None:
    """In particular no `input_scale`, which the dequantizer of the library leaves in the file."""
    made = plan(tmp_path, scheme, to="dense")

    assert {name.rpartition(".")[2] for name in made.delivered_specs} == {"weight"}
    assert {spec.dtype for spec in made.delivered_specs.values()} == {DType.BF16}


@pytest.mark.parametrize("scheme", ["int4-g128", "int8-channel", "fp8-tensor-static", "int8-g32"])
def test_a_bias_is_delivered_in_its_stored_dtype(tmp_path: Path, scheme: str) -> None:
    made = plan(tmp_path, scheme, to="modelopt", architecture="Qwen2ForCausalLM")

    assert delivered(made, FUSED)["bias"] == "bfloat16 [128]"
    assert "bias" not in delivered(made, ALONE)


def test_pre_quant_scale_has_the_dtype_of_the_model(tmp_path: Path) -> None:
    assert delivered(plan(tmp_path, "int4-g128", dtype=DType.F16), ALONE)["pre_quant_scale"] == "float16 [128]"


class TestDtypes:
    def test_float16_casts_every_plain_tensor(self, tmp_path: Path) -> None:
        """float16 kernels need float16 throughout; scales that belong to codes stay float32."""
        made = plan(tmp_path, "int8-g32", to="modelopt", dtype=DType.F16, architecture="Qwen2ForCausalLM")

        assert {spec.dtype for spec in made.delivered_specs.values()} == {DType.F16}
        assert {delivery.operation.label for delivery in made.deliveries()} == {"cast", "dequantize"}
        assert made.dtype is made.dense_dtype is DType.F16

    @pytest.mark.parametrize("scheme", LAYOUTS)
    def test_float16_does_not_change_codes_and_their_scales(self, tmp_path: Path, scheme: str) -> None:
        made = plan(tmp_path, scheme, dtype=DType.F16)
        expected = {name: spec.replace("bfloat16", "float16") for name, spec in LAYOUTS[scheme].items()}

        assert delivered(made, ALONE) == expected
        assert delivered(made, "model.norm") == {"weight": "float16 [128]"}

    @pytest.mark.parametrize("dtype", [None, DType.BF16, DType.F32])
    def test_other_dtypes_apply_to_dequantized_modules_only(self, tmp_path: Path, dtype: DType | None) -> None:
        made = plan(tmp_path, "int8-g32", to="modelopt", dtype=dtype)
        expected = dtype or DType.BF16

        assert delivered(made, ALONE) == {"weight": f"{expected.torch_name} [128, 128]"}
        assert delivered(made, "model.norm") == {"weight": "bfloat16 [128]"}
        assert (made.dtype, made.dense_dtype) == (DType.BF16, expected)

    @pytest.mark.parametrize(("dtype", "of_model"), [(None, DType.BF16), (DType.F32, DType.F32)])
    def test_a_dense_model_has_the_requested_dtype(self, tmp_path: Path, dtype: DType | None, of_model: DType) -> None:
        assert plan(tmp_path, "int8-g32", to="dense", dtype=dtype).dtype is of_model

    @pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_scales_are_delivered_as_float32_whatever_their_stored_dtype(
        self, tmp_path: Path, scale_dtype: torch.dtype
    ) -> None:
        """float32 holds each of them exactly."""
        write_checkpoint(tmp_path, scheme="int8-channel", scale_dtype=scale_dtype)

        specs = plan_checkpoint(tmp_path).delivered_specs
        assert {spec.dtype for name, spec in specs.items() if name.endswith("_scale")} == {DType.F32}
