"""The latent projections of DeepSeek on the double: its class joins q_a_proj and kv_a_proj_with_mqa while it loads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from safetensors.torch import load_file

import trtllm_ct
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("sidecar_cache")

ATTENTION = "model.layers.0.self_attn"
JOINED = f"{ATTENTION}.kv_a_proj_with_mqa"
# kv_a_proj_with_mqa has 144 rows: its second row of blocks is ragged, as in DeepSeek-V3, which has 576.
SIZES: dict[str, Any] = {
    "head_dim": None,
    "num_key_value_heads": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "moe_intermediate_size": 128,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
}


def config_of(q_lora_rank: int | None) -> dict[str, Any]:
    sizes = SIZES | {"q_lora_rank": q_lora_rank}
    config = tiny_config("DeepseekV3ForCausalLM", hidden=256, heads=8, kv_heads=4, intermediate=256, **sizes)
    return config | {"q_lora_rank": q_lora_rank}


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "loader"])
@pytest.mark.parametrize("q_lora_rank", [256, None])
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_block_scales_are_kept_and_joined(
    tmp_path: Path, generation: str, q_lora_rank: int | None, stock: bool, caplog: pytest.LogCaptureFixture
) -> None:
    built = write_checkpoint(tmp_path / "in", config=config_of(q_lora_rank), scheme="fp8-block")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", engine=engine_double.RELEASE_OF[generation])
    parts = (JOINED,) if q_lora_rank is None else (f"{ATTENTION}.q_a_proj", JOINED)

    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        one = {"skip_tokenizer_init": True}
        with engine.LLM(model=str(tmp_path / "out"), **one) if stock else trtllm_ct.LLM(tmp_path / "in", **one) as llm:
            module = llm.models[0].get_submodule(JOINED)
            assert str(module.quant_config.quant_algo) == "FP8_BLOCK_SCALES"
            weight = module.quant_method.apply(module, torch.eye(256, dtype=torch.bfloat16), None).T

    # Products of codes and scales, rounded to bfloat16 once by the stored checkpoint's exact weight.
    exact = torch.cat([built.dense[f"{part}.weight"] for part in parts])
    assert ((weight - exact).abs() <= exact.abs() * 2.0**-8).all()
    assert "stay unread" not in caplog.text


def test_scales_are_written_under_the_name_that_the_class_reads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", config=config_of(256), scheme="fp8-block")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")

    tensors = load_file(next((tmp_path / "out").glob("*.safetensors")))
    for part, blocks in (("q_a_proj", 2), ("kv_a_proj_with_mqa", 2)):
        second = tensors[f"{ATTENTION}.{part}.weight_scale_inv"]
        assert second.shape == (blocks, 2)
        assert torch.equal(second, tensors[f"{ATTENTION}.{part}.weight_scale"])
    assert f"{ATTENTION}.o_proj.weight_scale_inv" not in tensors
    excluded = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert f"{ATTENTION}.kv_b_proj" in excluded
    assert JOINED not in excluded
    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").good


def test_verification_misses_the_name_that_the_class_reads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", config=config_of(256), scheme="fp8-block")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    file = next((tmp_path / "out").glob("*.safetensors"))
    # The header's entry is renamed in place: the tensor is then another one.
    whole = file.read_bytes().replace(f"{JOINED}.weight_scale_inv".encode(), f"{JOINED}.weight_scale_xxx".encode())
    file.write_bytes(whole)

    faults = verify_checkpoint(tmp_path / "in", tmp_path / "out").faults
    assert f"{JOINED}.weight_scale_inv" in [fault.where for fault in faults]


@pytest.mark.parametrize("q_lora_rank", [192, 144])
def test_both_are_dequantized_where_a_block_would_hold_rows_of_both(tmp_path: Path, q_lora_rank: int) -> None:
    """The class joins rows of blocks, and the second part must begin with one."""
    write_checkpoint(tmp_path / "in", config=config_of(q_lora_rank), scheme="fp8-block")

    plan = plan_checkpoint(tmp_path / "in")

    reasons = {part: plan.module(f"{ATTENTION}.{part}").reason for part in ("q_a_proj", "kv_a_proj_with_mqa")}
    needs = "FP8_BLOCK_SCALES needs out % 128 == 0 in q_a_proj, which it fuses, and in % 16 == 0"
    assert needs in reasons["q_a_proj"]
    assert "q_a_proj" in reasons["kv_a_proj_with_mqa"]
    assert "out % 128 == 0" in reasons["kv_a_proj_with_mqa"]
    for part in reasons:
        assert plan.module(f"{ATTENTION}.{part}").delivered_mode == "dequantized"
        assert f"{ATTENTION}.{part}" in plan.quant_config.exclude_modules


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8-channel-token", "fp8-tensor-static", "int4-g128", "int8-channel"])
def test_scales_that_the_class_does_not_join_are_dequantized(tmp_path: Path, scheme: str) -> None:
    write_checkpoint(tmp_path / "in", config=config_of(256), scheme=scheme)

    plan = plan_checkpoint(tmp_path / "in", engine="stock-1.3")

    for part in ("q_a_proj", "kv_a_proj_with_mqa"):
        module = plan.module(f"{ATTENTION}.{part}")
        assert module.delivered_mode == "dequantized"
        assert module.reason.startswith(
            "the engine's class joins this Linear with another, and joins the scales of FP8_BLOCK_SCALES only"
        )


def test_a_plain_part_makes_both_plain(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", config=config_of(256), scheme={"kv_a_proj_with_mqa": "fp8-block"})

    module = plan_checkpoint(tmp_path / "in").module(JOINED)

    assert module.delivered_mode == "dequantized"
    assert module.reason == "kv_a_proj_with_mqa has one mode for all its parts, and q_a_proj is stored plain"
