"""Attention that quantizes its output at a fixed scale: when it does, what is said, and what is dequantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.engine.releases import RELEASES, STOCK_1_3, Release
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan import attention_output
from trtllm_ct.plan.assign import DENSE_OUTPUT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ATTENTION = "model.layers.0.self_attn"
OUTPUT = f"{ATTENTION}.o_proj"
CONFIG = tiny_config(hidden=256, heads=4, intermediate=256)
ROW, BLOCK = QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN, QuantAlgo.FP8_BLOCK_SCALES
OTHER = {"model.layers.0.mlp.down_proj": QuantAlgo.W8A16}


def unscaled_outputs(
    algos: Mapping[str, QuantAlgo | None],
    cache: str | None,
    architecture: str = "LlamaForCausalLM",
    release: Release | None = None,
) -> tuple[str, ...]:
    return attention_output.unscaled_outputs(algos, cache, architecture=architecture, release=release)


def layer(queries: QuantAlgo | None, output: QuantAlgo | None) -> dict[str, QuantAlgo | None]:
    return {f"{ATTENTION}.q_proj": queries, OUTPUT: output}


@pytest.mark.parametrize("cache", ["FP8", "NVFP4"])
@pytest.mark.parametrize("algo", [ROW, BLOCK])
def test_modes_without_an_input_scale_get_a_fixed_one(algo: QuantAlgo, cache: str) -> None:
    assert unscaled_outputs(layer(algo, algo), cache) == (OUTPUT,)


@pytest.mark.parametrize("cache", [None, "INT8", "BFLOAT16"])
def test_a_cache_that_is_not_fp8_or_nvfp4_changes_nothing(cache: str | None) -> None:
    assert unscaled_outputs(layer(ROW, ROW), cache) == ()


@pytest.mark.parametrize("algo", [None, *(algo for algo in MODES_BY_ALGO if algo not in {ROW, BLOCK})])
def test_no_other_mode_is_concerned(algo: QuantAlgo | None) -> None:
    """Modes with an input scale use that; attention writes no FP8 values for the others."""
    assert unscaled_outputs(layer(ROW, algo), "FP8") == ()


@pytest.mark.parametrize(
    ("queries", "more", "happens"),
    [
        (QuantAlgo.FP8, OTHER, True),
        (BLOCK, OTHER, True),
        (QuantAlgo.W4A16_AWQ, {}, False),
        (None, OTHER, False),
        # Without entries of layers, attention has the mode of the whole model, also where its queries are excluded.
        (None, {}, True),
    ],
)
def test_attention_must_have_a_mode_with_quantized_values_too(
    queries: QuantAlgo | None, more: dict[str, QuantAlgo], happens: bool
) -> None:
    assert unscaled_outputs(layer(queries, ROW) | more, "FP8") == (OUTPUT,) * happens


@pytest.mark.parametrize(("queries", "happens"), [(QuantAlgo.FP8, True), (QuantAlgo.W8A16, False), (None, False)])
def test_queries_that_are_stored_together_with_keys_and_values_count(queries: QuantAlgo | None, happens: bool) -> None:
    algos = {f"{ATTENTION}.qkv_proj": queries, OUTPUT: ROW, "model.layers.0.mlp.down_proj": QuantAlgo.NVFP4}
    assert unscaled_outputs(algos, "FP8") == (OUTPUT,) * happens


@pytest.mark.parametrize("release", [None, *RELEASES])
def test_the_newest_release_matches_nvfp4_attention_with_the_output(release: Release | None) -> None:
    """There it leaves its output 16-bit for an `o_proj` in another mode; other modes of attention don't care."""
    algos = layer(QuantAlgo.NVFP4, ROW) | OTHER
    assert unscaled_outputs(algos, "FP8", release=release) == (OUTPUT,) * (release is not STOCK_1_3)
    assert unscaled_outputs(layer(QuantAlgo.FP8, ROW) | OTHER, "FP8", release=release) == (OUTPUT,)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("architecture", "gated"),
    [
        ("Qwen3NextForCausalLM", True),
        ("Qwen3_5ForCausalLM", True),
        ("Qwen3_5ForConditionalGeneration", True),
        ("Qwen3_5MoeForCausalLM", True),
        ("Qwen3_5MoeForConditionalGeneration", True),
        ("AfmoeForCausalLM", True),
        # Laguna has a gate too, but its class multiplies by it behind the attention that may quantize.
        ("LagunaForCausalLM", False),
        ("Glm4MoeForCausalLM", False),
        ("Qwen3ForCausalLM", False),
        ("UnknownForCausalLM", False),
    ],
)
def test_attention_with_a_gate_writes_16_bit_values(architecture: str, gated: bool, release: Release) -> None:
    """`Attention._use_quantize_output`: the gate is multiplied to what attention has written."""
    assert unscaled_outputs(layer(ROW, ROW), "FP8", architecture, release) == (OUTPUT,) * (not gated)


def test_latent_attention_writes_16_bit_values() -> None:
    assert unscaled_outputs(layer(BLOCK, BLOCK) | {f"{ATTENTION}.kv_b_proj": None}, "FP8") == ()


# Directories for stock TensorRT-LLM.


def warnings(directory: Path, to: str = "modelopt", engine: str = "stock-1.2") -> list[str]:
    return [text for text in plan_checkpoint(directory, to, engine=engine).warnings if "fixed scale" in text]


@pytest.mark.parametrize("scheme", ["fp8-channel-token", "fp8-block"])
@pytest.mark.parametrize("kv", [True, False])
def test_a_directory_with_a_quantized_cache_says_so(tmp_path: Path, scheme: str, kv: bool) -> None:
    write_checkpoint(tmp_path, config=CONFIG, scheme=scheme, kv=kv)

    assert [text[:8] for text in warnings(tmp_path)] == ["2 o_proj"] * kv
    assert all("--dense-o-proj" in text and "force_dynamic" not in text for text in warnings(tmp_path))
    assert warnings(tmp_path, "dense") == warnings(tmp_path, "tensorrt_llm") == []


@pytest.mark.parametrize("scheme", ["fp8-tensor-static", "int4-g64"])
def test_other_schemes_say_nothing(tmp_path: Path, scheme: str) -> None:
    write_checkpoint(tmp_path, config=CONFIG, scheme=scheme, kv=True)

    assert warnings(tmp_path) == []


@pytest.mark.parametrize("static", [True, False])
def test_the_argument_of_llm_is_named_where_attention_honours_it_and_it_changes_nothing_else(
    tmp_path: Path, static: bool
) -> None:
    scheme = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "fp8-channel-token")
    write_checkpoint(
        tmp_path, config=CONFIG, scheme=scheme | ({"down_proj": "fp8-tensor-static"} if static else {}), kv=True
    )

    (text,) = warnings(tmp_path, engine="stock-1.3")

    assert ("force_dynamic_quantization=True" in text) is not static


@pytest.mark.parametrize("scheme", ["fp8-channel-token", "fp8-block"])
@pytest.mark.parametrize("kv", [True, False])
def test_output_projections_are_dequantized_on_request_where_it_happens(tmp_path: Path, scheme: str, kv: bool) -> None:
    write_checkpoint(tmp_path / "model", config=CONFIG, scheme=scheme, kv=kv)

    plan = convert_checkpoint(tmp_path / "model", tmp_path / "out", dense_o_proj=True).plan

    dense = {module.name: module.reason for module in plan.modules if module.dequantized}
    assert dense == {f"model.layers.{index}.self_attn.o_proj": DENSE_OUTPUT for index in range(2) if kv}
    assert not [text for text in plan.warnings if "fixed scale" in text]


@pytest.mark.parametrize("engine", ["stock-1.2", "stock-1.3"])
@pytest.mark.parametrize("architecture", ["Qwen3NextForCausalLM", "Qwen3_5ForConditionalGeneration"])
def test_nothing_is_said_or_dequantized_for_attention_with_a_gate(
    tmp_path: Path, architecture: str, engine: str
) -> None:
    from class_models import write_class

    write_class(tmp_path, architecture, "fp8-channel-token", kv=True)

    plan = plan_checkpoint(tmp_path, engine=engine, dense_o_proj=True)

    assert warnings(tmp_path, engine=engine) == []
    assert not [module.name for module in plan.modules if module.reason == DENSE_OUTPUT]


@pytest.mark.parametrize("engine", ["stock-1.2", "stock-1.3"])
def test_a_plan_says_what_happens_behind_nvfp4_attention(tmp_path: Path, engine: str) -> None:
    scheme = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "nvfp4") | dict.fromkeys(
        ("o_proj", "gate_proj", "up_proj", "down_proj"), "fp8-channel-token"
    )
    write_checkpoint(tmp_path, config=CONFIG, scheme=scheme, kv=True)

    plan = plan_checkpoint(tmp_path, engine=engine, sm=100, dense_o_proj=True)
    said = [text for text in plan_checkpoint(tmp_path, engine=engine, sm=100).warnings if "fixed scale" in text]

    dense = [module.name for module in plan.modules if module.reason == DENSE_OUTPUT]
    assert len(said) == (engine == "stock-1.2")
    assert len(dense) == 2 * (engine == "stock-1.2")
