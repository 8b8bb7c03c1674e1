"""Rows of classes that load their weights themselves: names, exclusions, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import rewrite, rewrite_config, tiny_config, write_checkpoint
from own_loader_models import write_own_loader

from trtllm_ct.base.errors import PlanError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# The models are built as transformers 5 builds them.
pytestmark = [pytest.mark.reference, pytest.mark.newest_transformers]

DEEPSEEK, GPT_OSS, STEP = "DeepseekV4ForCausalLM", "GptOssForCausalLM", "Step3p5ForCausalLM"
MLLAMA = "MllamaForConditionalGeneration"


def renamed(stored: dict[str, Tensor], old: str, new: str) -> None:
    for key in [key for key in stored if key.startswith(old)]:
        stored[new + key.removeprefix(old)] = stored.pop(key)


def test_deepseek_v4_is_refused_under_names_that_the_class_does_not_find(tmp_path: Path) -> None:
    write_own_loader(tmp_path, DEEPSEEK, "nvfp4")
    rewrite(tmp_path, lambda stored: renamed(stored, "layers.", "model.layers."))

    with pytest.raises(PlanError) as raised:
        plan_checkpoint(tmp_path, engine="stock-1.3")
    (fault,) = raised.value.faults
    assert fault.where == "names of the tensors"
    assert "--to dense" in fault.remedy

    plan = plan_checkpoint(tmp_path, "dense")
    assert "model.layers.0.attn.wq_b" in plan.by_name


def test_what_deepseek_v4_reads_plain_is_excluded_under_the_names_of_its_modules(tmp_path: Path) -> None:
    write_own_loader(tmp_path, DEEPSEEK, "nvfp4")

    excluded = {*plan_checkpoint(tmp_path, engine="stock-1.3").quant_config.exclude_modules}

    layer = "model.layers.1"
    attention = {"kv_a_proj_with_mqa", "o_a_proj", "indexer.weights_proj", "mqa.indexer.weights_proj"}
    attention |= {f"{mqa}{part}compressor.wkv_gate" for mqa in ("", "mqa.") for part in ("", "indexer.")}
    assert {f"{layer}.self_attn.{name}" for name in attention} <= excluded
    assert {f"{layer}.mlp.gate", "lm_head", "model.embed_tokens"} <= excluded
    assert not any(name.endswith(("q_b_proj", "wq_b", "experts")) for name in excluded)


def test_draft_layers_of_deepseek_v4_are_excluded_under_the_number_that_the_class_gives_them(tmp_path: Path) -> None:
    write_own_loader(tmp_path, DEEPSEEK, "nvfp4")
    name = "mtp.0.attn.wq_b"
    rewrite(tmp_path, lambda stored: stored.update({f"{name}.weight": torch.randn(512, 128).bfloat16()}))

    plan = plan_checkpoint(tmp_path, engine="stock-1.3")

    assert plan.module(name).layer is None
    assert "model.layers.3.self_attn.q_b_proj" in plan.quant_config.exclude_modules


def test_plain_linears_and_experts_of_gpt_oss_are_excluded_under_the_names_of_its_modules(tmp_path: Path) -> None:
    write_own_loader(tmp_path, GPT_OSS, {"o_proj": "fp8-channel-token"})

    # The release whose wrapper of experts hands no exclusion down.
    config = plan_checkpoint(tmp_path, engine="stock-1.2").quant_config

    assert config.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN"
    inside = {"attn.qkv_proj", "mlp.gate", "mlp.experts", "mlp.experts.backend"}
    assert {f"model.block.1.{name}" for name in inside} <= {*config.exclude_modules}
    assert "model.block.1.attn.o_proj" not in config.exclude_modules


def test_plain_stacks_of_gpt_oss_are_delivered_as_they_are(tmp_path: Path) -> None:
    stacks = {"gate_up_proj": (4, 256, 1024), "gate_up_proj_bias": (4, 1024), "down_proj": (4, 512, 256)}
    experts = "model.layers.0.mlp.experts"

    def edit(stored: dict[str, Tensor]) -> None:
        for key in [key for key in stored if key.startswith(f"{experts}.")]:
            del stored[key]
        stored |= {f"{experts}.{name}": torch.randn(shape).bfloat16() for name, shape in stacks.items()}
        stored[f"{experts}.down_proj_bias"] = torch.randn(4, 256).bfloat16()

    write_own_loader(tmp_path / "in", GPT_OSS, "fp8-channel-token")
    rewrite(tmp_path / "in", edit)
    plan = convert_checkpoint(tmp_path / "in", tmp_path / "out", engine="stock-1.3").plan

    assert {name: plan.delivered_specs[f"{experts}.{name}"].shape for name in stacks} == stacks
    assert not any(name.startswith(f"{experts}.0.") for name in plan.delivered_specs)
    assert "model.block.0.mlp.experts" in plan.quant_config.exclude_modules
    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").good


def test_plain_stacks_of_step_beside_quantized_experts_are_excluded_as_experts(tmp_path: Path) -> None:
    def edit(stored: dict[str, Tensor]) -> None:
        for key in [key for key in stored if key.startswith("model.layers.2.moe.experts.")]:
            del stored[key]
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (4, 256, 512) if name == "down_proj" else (4, 512, 256)
            stored[f"model.layers.2.moe.{name}.weight"] = torch.randn(shape).bfloat16()

    write_own_loader(tmp_path, STEP, "nvfp4")
    rewrite(tmp_path, edit)
    config = plan_checkpoint(tmp_path, engine="stock-1.3").quant_config

    assert config.quant_algo == "NVFP4"
    assert "model.layers.2.moe.experts" in config.exclude_modules
    assert "model.layers.1.moe.experts" not in config.exclude_modules


def test_one_plain_linear_makes_all_of_mllama_plain(tmp_path: Path) -> None:
    write_own_loader(tmp_path, MLLAMA, {"self_attn.q_proj": "fp8-channel-token", "up_proj": "fp8-channel-token"})

    plan = plan_checkpoint(tmp_path, engine="stock-1.3")

    assert all(module.layer is None for module in plan.modules)
    assert plan.quant_config.quant_algo is None


def test_mllama_is_delivered_under_the_names_that_the_class_reads(tmp_path: Path) -> None:
    write_own_loader(tmp_path, MLLAMA, "fp8-channel-token")

    def edit(stored: dict[str, Tensor]) -> None:
        renamed(stored, "language_model.model.", "model.language_model.")
        renamed(stored, "language_model.lm_head.", "lm_head.")
        renamed(stored, "multi_modal_projector.", "model.multi_modal_projector.")

    rewrite(tmp_path, edit)
    names = plan_checkpoint(tmp_path, engine="stock-1.3").by_name

    assert {"language_model.model.layers.0.self_attn.q_proj", "language_model.lm_head"} <= {*names}
    assert "multi_modal_projector" in names


def test_mistrals_own_names_stay_in_a_model_without_tables(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", config=tiny_config(), scheme="fp8-channel-token")
    rewrite_config(tmp_path / "in", lambda config: config.update(architectures=["MistralLarge3ForCausalLM"]))

    def edit(stored: dict[str, Tensor]) -> None:
        renamed(stored, "model.layers.", "layers.")
        for key in list(stored):
            new = key.replace("self_attn.q_proj", "attention.wq_b").replace("self_attn.k_proj", "attention.wkv_b")
            stored[new] = stored.pop(key)

    rewrite(tmp_path / "in", edit)
    plan = convert_checkpoint(tmp_path / "in", tmp_path / "out", to="dense").plan

    assert "layers.0.attention.wkv_b" in plan.by_name
    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").good
