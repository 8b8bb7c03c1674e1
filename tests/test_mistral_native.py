"""Mistral's own form of a checkpoint, with params.json and other names: refused by name, never half understood."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, rewrite, rewrite_config, write_checkpoint
from command_line import run_cli
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from torch import Tensor

from trtllm_ct import CompressedTensorsWeightLoader, convert_checkpoint
from trtllm_ct.errors import ConfigError, DetectionError, PlanError
from trtllm_ct.pipeline import open_checkpoint, plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

# Longer names first: "norm" is a part of others.
NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attention",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "model.norm": "norm",
    "model.layers": "layers",
    "lm_head": "output",
}


def native_name(name: str) -> str:
    for hugging_face, own in NAMES.items():
        name = name.replace(hugging_face, own)
    return name


def write_native(directory: Path, scheme: str = "int4-g32") -> Built:
    """The form that Mistral publishes: params.json with the block, consolidated weights under its own names."""
    built = write_checkpoint(directory, config=tiny_config("MistralForCausalLM"), scheme=scheme)
    rename_weights(directory)
    write_params(directory, built.config["quantization_config"])
    (directory / "config.json").unlink()
    return built


def rename_weights(directory: Path) -> None:
    stored = load_file(directory / "model.safetensors")
    renamed = {native_name(name): tensor.clone() for name, tensor in stored.items()}
    save_file(renamed, directory / "consolidated.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").unlink()


def write_params(directory: Path, block: dict[str, Any]) -> None:
    sizes = {"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 128, "n_heads": 4, "n_kv_heads": 2}
    params = {**sizes, "norm_eps": 1e-6, "vocab_size": 96, "rope_theta": 10000.0, "quantization": block}
    (directory / "params.json").write_text(json.dumps(params), encoding="utf-8")


def test_names_are_those_of_mistral() -> None:
    assert native_name("model.layers.1.self_attn.q_proj.weight_packed") == "layers.1.attention.wq.weight_packed"
    assert native_name("model.layers.0.post_attention_layernorm.weight") == "layers.0.ffn_norm.weight"


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel", "fp8-tensor-static", "dense"])
def test_params_json_alone_is_refused_with_the_form_to_use(tmp_path: Path, scheme: str) -> None:
    write_native(tmp_path, scheme)

    with pytest.raises(ConfigError) as raised:
        open_checkpoint(tmp_path)

    (fault,) = raised.value.faults
    assert fault.where == str(tmp_path / "params.json")
    assert fault.expected == "a config.json, which describes the model"
    assert fault.found == "params.json alone, Mistral's own form"
    assert "config.json and model*.safetensors" in fault.remedy
    assert "rows of queries and keys have another order" in fault.remedy


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel", "fp8-tensor-static", "nvfp4"])
def test_mistrals_names_beside_a_config_json_are_one_fault(tmp_path: Path, scheme: str) -> None:
    """And not one for every tensor that seems missing or surplus."""
    write_checkpoint(tmp_path, config=tiny_config("MistralForCausalLM"), scheme=scheme)
    rename_weights(tmp_path)

    with pytest.raises(PlanError) as raised:
        plan_checkpoint(tmp_path)

    (fault,) = raised.value.faults
    assert fault.where.startswith("layers.0.attention.")
    assert "model.layers.0.self_attn.q_proj.weight" in fault.expected
    assert fault.found == "those of Mistral's own form"
    assert "config.json and model*.safetensors" in fault.remedy


def test_every_entrance_says_the_same(tmp_path: Path) -> None:
    write_native(tmp_path / "in")

    inspected = run_cli("inspect", tmp_path / "in", "--json").document
    with pytest.raises(ConfigError, match="Mistral's own form"):
        CompressedTensorsWeightLoader().load_weights(tmp_path / "in")
    with pytest.raises(ConfigError, match="Mistral's own form"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")

    assert [problem["found"] for problem in inspected["problems"]] == ["params.json alone, Mistral's own form"]
    assert inspected["detection"]["method"] == "compressed-tensors"
    assert not (tmp_path / "out").exists()


def test_both_forms_in_one_directory_are_read_as_hugging_faces(tmp_path: Path) -> None:
    """Mistral's own repositories hold the weights twice; the second copy is named and left behind."""
    config = tiny_config("MistralForCausalLM")
    both, twin = (write_checkpoint(tmp_path / name, config=config, scheme="int4-g32") for name in ("both", "twin"))
    shutil.copy(both.directory / "model.safetensors", both.directory / "model-00001-of-00001.safetensors")
    rename_weights(both.directory)
    write_params(both.directory, both.config["quantization_config"])

    loader = CompressedTensorsWeightLoader()
    loaded, want = (loader.load_weights(built.directory, layout="dense") for built in (both, twin))

    assert loaded.keys() == want.keys()
    assert all(torch.equal(loaded[name], want[name]) for name in want)
    assert "a second copy of the weights: consolidated.safetensors" in plan_checkpoint(both.directory).warnings[0]


def test_a_block_in_params_json_counts_for_weights_in_hugging_faces_form(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=tiny_config("MistralForCausalLM"), scheme="int4-g64")
    write_params(tmp_path, built.config["quantization_config"])
    rewrite_config(tmp_path, lambda config: config.pop("quantization_config"))

    plan = plan_checkpoint(tmp_path)

    assert open_checkpoint(tmp_path).config.origin == "params.json: quantization"
    assert plan.module("model.layers.0.self_attn.o_proj").delivered_mode == "W4A16_AWQ g64"


def test_mistrals_own_fp8_is_another_method(tmp_path: Path) -> None:
    write_native(tmp_path)
    write_params(tmp_path, {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"})
    with pytest.raises(DetectionError, match=r"params\.json: quantization"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_only_looks_like_it_stays_a_leftover(tmp_path: Path) -> None:
    def add(stored: dict[str, Tensor]) -> None:
        stored["model.layers.0.attention.wq.weight"] = torch.ones(2, 2).bfloat16()

    write_checkpoint(tmp_path)
    rewrite(tmp_path, add)
    with pytest.raises(PlanError) as raised:
        plan_checkpoint(tmp_path)
    assert "Mistral" not in str(raised.value)
