"""Biases: which mode a Linear with one gets in each release, and what a plan says when the GPU decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint

from trtllm_ct.engine.target import ENGINES
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.plan import Plan

CONFIG = tiny_config("Qwen2ForCausalLM", hidden=128, kv_heads=4, intermediate=128, layers=1)
WITH_BIAS = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
WITHOUT_BIAS = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]


def modes(plan: Plan, names: list[str]) -> set[str]:
    return {plan.module(name).delivered_mode for name in names}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("scheme", "plain_mode", "biased_mode"),
    [("int8-channel", "W8A16", "dequantized"), ("int4-channel", "W4A16", "W4A16_AWQ g128")],
)
def test_a_linear_with_a_bias_never_gets_a_mode_that_drops_it(
    tmp_path: Path, scheme: str, plain_mode: str, biased_mode: str, engine: str
) -> None:
    write_checkpoint(tmp_path, config=CONFIG, scheme=scheme)

    plan = plan_checkpoint(tmp_path, engine=engine)

    assert modes(plan, WITHOUT_BIAS) == {plain_mode}
    assert modes(plan, WITH_BIAS) == {plain_mode if engine == "stock-1.3" else biased_mode}
    if engine != "stock-1.3":
        assert {f"{engine} drops the bias; stock-1.3 adds it" in plan.module(name).reason for name in WITH_BIAS} == {
            True
        }


@pytest.mark.parametrize(
    ("engine", "sm", "warned", "native"),
    [
        # No such Linear exists on SM100 before 1.2.
        ("stock-1.0", None, False, True),
        ("stock-1.0", 90, False, True),
        ("stock-1.2", None, True, True),
        ("stock-1.2", 90, False, True),
        ("stock-1.2", 100, False, False),
        ("stock-1.3", None, False, True),
        ("stock-1.3", 100, False, True),
    ],
)
@pytest.mark.parametrize("target", ["modelopt", "tensorrt_llm"])
@pytest.mark.parametrize("scheme", ["int4-g64", "int4-g64-asym"])
def test_a_bias_that_one_gpu_drops_is_warned_of_until_the_gpu_is_known(
    tmp_path: Path, scheme: str, target: str, engine: str, sm: int | None, warned: bool, native: bool
) -> None:
    if scheme == "int4-g64-asym" and target == "modelopt":
        warned = native = False
    write_checkpoint(tmp_path, config=CONFIG, scheme=scheme)

    plan = plan_checkpoint(tmp_path, target, engine=engine, sm=sm)

    named = [text for text in plan.warnings if "drop their bias on SM" in text]
    assert [f"{engine} drop their bias on SM100 GPUs (3 modules)" in text for text in named] == [True] * warned
    assert (modes(plan, WITH_BIAS) == {"dequantized"}) is not native
    if engine == "stock-1.2" and sm == 100 and target == "tensorrt_llm":
        assert "of stock-1.2 drops the bias on SM100; stock-1.3 adds it" in plan.module(WITH_BIAS[0]).reason


def test_no_warning_without_a_bias(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config=tiny_config(hidden=128, layers=1), scheme="int4-g64")

    assert plan_checkpoint(tmp_path, engine="stock-1.0").warnings == ()


@pytest.mark.parametrize(
    ("scheme", "options", "deviation"),
    [
        ("mxfp4", {}, "7 modules (dequantized): activations stay 16-bit; the scheme asks for fp4 group 32 dynamic"),
        (
            "mxfp4a16",
            {"sm": 100},
            (
                "7 modules (W4A8_MXFP4_MXFP8 g32): activations are fp8 dynamic per group of 32; "
                "the scheme leaves them 16-bit"
            ),
        ),
        ("mxfp8", {}, "7 modules (dequantized): activations stay 16-bit; the scheme asks for fp8 group 32 dynamic"),
        ("w8a8", {}, "7 modules (W8A16): activations stay 16-bit; the scheme asks for int8 token dynamic"),
    ],
)
def test_lost_quantization_of_activations_is_a_deviation(
    tmp_path: Path, scheme: str, options: dict[str, int], deviation: str
) -> None:
    write_checkpoint(tmp_path, config=tiny_config(hidden=128, layers=1), scheme=scheme)

    assert [str(entry) for entry in plan_checkpoint(tmp_path, **options).deviations] == [deviation]


@pytest.mark.parametrize("scheme", ["int4-g64", "fp8-channel-token", "nvfp4", "int8-g32"])
def test_what_the_scheme_asks_for_is_no_deviation(tmp_path: Path, scheme: str) -> None:
    """Weight-only schemes leave activations 16-bit, dequantized or not."""
    write_checkpoint(tmp_path, config=tiny_config(hidden=128, layers=1), scheme=scheme)

    assert plan_checkpoint(tmp_path).deviations == ()


@pytest.mark.parametrize("to", ["modelopt", "tensorrt_llm", "dense"])
@pytest.mark.parametrize(
    ("scheme", "engine", "sm", "where"),
    [
        ("fp8-block", "stock-1.3", None, "SM100 and SM120"),
        ("fp8-block", "stock-1.2", None, "SM100"),
        ("fp8-block", "stock-1.0", 100, "SM100"),
        ("fp8-block", "stock-1.3", 120, "SM120"),
        ("fp8-block", "stock-1.2", 120, None),
        ("fp8-block", "stock-1.3", 90, None),
        ("fp8-channel-token", "stock-1.3", 100, None),
    ],
)
def test_weights_that_a_gpu_quantizes_again_are_warned_of(
    tmp_path: Path, scheme: str, engine: str, sm: int | None, where: str | None, to: str
) -> None:
    write_checkpoint(tmp_path, scheme=scheme)

    plan = plan_checkpoint(tmp_path, to, engine=engine, sm=sm)

    named = [warning for warning in plan.warnings if "quantizes the weights again" in warning]
    warned = where is not None and to != "dense" and any(module.layer for module in plan.modules)
    assert len(named) == warned
    assert all(f"on {where}: {engine} rounds scales up" in warning for warning in named)
