"""Converted directories as other software reads them: safetensors, transformers and TensorRT-LLM."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from builders import DENSE, Built, tiny_config, write_checkpoint
from installed_transformers import in_dtype
from on_tensors import on_tensors
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import FAMILIES

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.convert.hf_directory import MODELOPT_LAYOUT, hf_quant_config
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
from trtllm_ct.layouts import rounding as rounding_layout

if TYPE_CHECKING:
    from pathlib import Path

round_once = on_tensors(rounding_layout.round_once)

NATIVE = (
    "int4-g64",
    "int4-channel",
    "int8-channel",
    "int8-plain-channel",
    "w8a8",
    "fp8-tensor-static",
    "fp8-channel-token",
    "nvfp4",
)
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@pytest.mark.parametrize("scheme", NATIVE)
def test_every_tensor_is_read_by_safetensors_as_planned(tmp_path: Path, scheme: str) -> None:
    write_checkpoint(tmp_path / "source", config=tiny_config(layers=1), scheme=scheme)

    report = convert_checkpoint(tmp_path / "source", tmp_path / "out")

    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    specs = report.plan.delivered_specs
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        name: (spec.dtype.torch_dtype, spec.shape) for name, spec in specs.items()
    }


@pytest.mark.parametrize("scheme", NATIVE)
def test_every_linear_that_is_not_excluded_has_the_tensors_of_its_mode(tmp_path: Path, scheme: str) -> None:
    """Checked with the files alone: the names in hf_quant_config.json match the names of tensors."""
    write_checkpoint(tmp_path / "source", config=tiny_config(layers=1), scheme=scheme, kv=True)
    convert_checkpoint(tmp_path / "source", tmp_path / "out")

    config = QuantConfig.from_dict(json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    with_scale = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    linears = {name.removesuffix(".weight") for name in tensors if name.endswith(("_proj.weight", "lm_head.weight"))}
    assert {name for name in linears if config.layer_config(name)} == with_scale == linears - {"lm_head"}
    assert "lm_head" in config.exclude_modules
    assert {"model.layers.0.self_attn.k_proj.k_scale", "model.layers.0.self_attn.v_proj.v_scale"} <= tensors.keys()


def test_the_quantization_document_has_modelopts_shape() -> None:
    config = QuantConfig(layer=LayerQuantConfig(quant_algo=QuantAlgo.FP8), exclude_modules=("lm_head",))

    document = hf_quant_config(config)

    assert document["producer"] == {"name": "modelopt", "version": MODELOPT_LAYOUT}
    assert document["quantization"] == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }


@pytest.mark.reference
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_dense_directory_is_a_plain_model_for_transformers(tmp_path: Path, architecture: str) -> None:
    """All weights are loaded, none is missing or unexpected, and each is the exact value rounded once."""
    from transformers import AutoModelForCausalLM

    tied = architecture == "Qwen3ForCausalLM"
    built = write_checkpoint(
        tmp_path / "source",
        config=tiny_config(architecture, tied=tied),
        scheme={"q_proj": "int8-g32", "down_proj": "fp8-tensor-static", "w2": "nvfp4", "up_proj": DENSE},
        kv=True,
        shards=2,
    )
    convert_checkpoint(tmp_path / "source", tmp_path / "out", to="dense", max_shard_bytes=100_000)

    model, loading_info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", **in_dtype("auto"), output_loading_info=True
    )

    assert not any(loading_info.values())
    assert type(model).__name__ == architecture
    assert model.dtype is torch.bfloat16
    assert_holds(model.state_dict(), built)


def assert_holds(state: dict[str, torch.Tensor], built: Built) -> None:
    stacked = any(name.endswith(".experts.gate_up_proj") for name in state)  # since transformers 5
    expected = as_transformers_has_it(built.dense) if stacked else built.dense
    assert state.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"}
    for name, exact in expected.items():
        assert torch.equal(state[name], round_once(exact, state[name].dtype)), name


def as_transformers_has_it(dense: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under the names of transformers 5.

    All routed experts are in one tensor, gate before up, and the expert module of Mixtral is called `mlp`.
    """
    result: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in dense.items():
        owner, is_expert, expert = name.replace(".block_sparse_moe.", ".mlp.").partition(".experts.")
        if is_expert:
            index, projection = expert.split(".")[:2]
            experts.setdefault(f"{owner}.experts", {})[f"{index}.{PROJECTIONS.get(projection, projection)}"] = tensor
        else:
            result[owner] = tensor
    for name, parts in experts.items():
        count = len(parts) // 3
        gate_up = [torch.cat([parts[f"{i}.gate_proj"], parts[f"{i}.up_proj"]]) for i in range(count)]
        result[f"{name}.gate_up_proj"] = torch.stack(gate_up)
        result[f"{name}.down_proj"] = torch.stack([parts[f"{i}.down_proj"] for i in range(count)])
    return result
