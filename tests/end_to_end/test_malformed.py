"""Malformed configurations and weights end to end: each refused by name, and nothing left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import fp8_weights
from damages import (
    ATTENTION,
    DOWN,
    Case,
    Q,
    assert_refused,
    assert_told,
    block,
    config,
    element,
    in_order,
    tensors,
    weights_of_group,
)

from trtllm_ct.base.errors import ConfigError, DetectionError, PayloadError, PlanError, UnreadClassError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

INT4_ASYMMETRIC = {"scheme": "int4-g32-asym"}
FP8 = {"scheme": "fp8-tensor-static"}
FP8_KV = FP8 | {"kv": True}
NOT_CALIBRATED = "damaged or badly calibrated"


def five_exponent_bits(stored: dict[str, Tensor]) -> None:
    """float8 of the kind that is meant for gradients: no release writes weights in it."""
    stored[f"{Q}.weight"] = stored[f"{Q}.weight"].float().to(torch.float8_e5m2)


CASES: dict[str, Case] = {
    "another quantization method": Case(
        damage=config(lambda document: document.update(quantization_config={"quant_method": "gptq", "bits": 4})),
        error=DetectionError,
        where="source",
        expected="a compressed-tensors checkpoint",
        found="an AutoGPTQ checkpoint, not compressed-tensors",
        remedy="GPTQ",
    ),
    "argument without a meaning": Case(
        damage=weights_of_group(strategy="rainbow"),
        error=ConfigError,
        where="config_groups.group_0.weights.strategy",
        expected="group",
        found='"rainbow"',
        remedy="quantize again with a current llm-compressor",
    ),
    "unknown architecture": Case(
        damage=config(lambda document: document.update(architectures=["GrokForCausalLM"])),
        error=UnreadClassError,
        where="config.json: architectures",
        expected="a class whose reading of names is known, for target modelopt",
        found="GrokForCausalLM",
        remedy="Convert with --to dense: that works for every architecture",
    ),
    "leftover weight_scale without weight": Case(
        damage=tensors(lambda stored: stored.update({"model.layers.9.mlp.up_proj.weight_scale": torch.ones(1)})),
        error=PlanError,
        where="model.layers.9.mlp.up_proj.weight_scale",
        expected="a module that this tensor belongs to",
        found="float32 [1] without an owner",
        remedy="Its weight was lost or renamed. No file is missing",
    ),
    "weight_packed without weight_scale": Case(
        damage=tensors(lambda stored: stored.pop(f"{Q}.weight_scale")),
        error=PlanError,
        where=f"{Q}.weight_scale",
        expected="a scale of shape [64, 2] for strategy group and group_size 32 over 64 inputs",
        found="no such tensor",
        remedy="Without its scale the weight has no value",
    ),
    "asymmetric without zero point": Case(
        options=INT4_ASYMMETRIC,
        damage=in_order(tensors(lambda stored: stored.pop(f"{Q}.weight_zero_point")), block(version="0.13.0")),
        error=PlanError,
        where=f"{Q}.weight_zero_point",
        expected="the zero points of an asymmetric weight",
        found="no such tensor",
        remedy="Without its zero points the weight is wrong",
    ),
    "a norm as codes": Case(
        damage=tensors(
            lambda stored: stored.update(
                {
                    "model.layers.0.input_layernorm.weight": torch.ones(64, dtype=torch.int8),
                    "model.layers.0.input_layernorm.weight_scale": torch.ones(1),
                }
            )
        ),
        error=PlanError,
        where="model.layers.0.input_layernorm",
        expected="a plain weight [64]: no scheme is for the vector of a RMSNorm",
        found="codes (weight int8, weight_scale float32)",
        remedy="Take the module out of the targets",
    ),
    "weight and weight_packed": Case(
        damage=tensors(lambda stored: stored.update({f"{Q}.weight": torch.ones(64, 64)})),
        error=PlanError,
        where=Q,
        expected="either weight or weight_packed",
        found="both",
        remedy="List only the right one in model.safetensors.index.json",
    ),
    "scale of another group size": Case(
        damage=weights_of_group(group_size=64),
        error=PlanError,
        where=f"{Q}.weight_scale",
        expected="shape [64, 1] for strategy group and group_size 64 over 64 inputs",
        found="bfloat16 [64, 2]",
        remedy="The checkpoint may be of group_size 32",
    ),
    "scale of another dtype": Case(
        damage=tensors(lambda stored: stored.update({f"{Q}.weight_scale": torch.ones(64, 2, dtype=torch.int32)})),
        error=PlanError,
        where=f"{Q}.weight_scale",
        expected="float32",
        found="int32 [64, 2]",
        remedy="another format",
    ),
    "weight_shape that contradicts": Case(
        damage=tensors(lambda stored: stored.update({f"{Q}.weight_shape": torch.tensor([64, 63])})),
        error=PayloadError,
        where=f"{Q}.weight_shape",
        expected="[64, 64], which the packed codes and config.json make",
        found="[64, 63]",
        remedy="Codes and shape belong to different weights",
    ),
    "NaN scale": Case(
        damage=element(f"{DOWN}.weight_scale", float("nan")),
        error=PayloadError,
        where=f"{DOWN}.weight_scale[63, 3]",
        expected="a finite scale that is not negative",
        found="nan (1 of 256 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "infinite scale": Case(
        damage=element(f"{Q}.weight_scale", float("inf")),
        error=PayloadError,
        where=f"{Q}.weight_scale[63, 1]",
        expected="a finite scale that is not negative",
        found="inf (1 of 128 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "negative scale": Case(
        damage=element(f"{Q}.weight_scale", -0.5),
        error=PayloadError,
        where=f"{Q}.weight_scale[63, 1]",
        expected="a finite scale that is not negative",
        found="-0.5 (1 of 128 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "zero scale of a whole tensor": Case(
        options=FP8,
        damage=element(f"{Q}.weight_scale", 0),
        error=PayloadError,
        where=f"{Q}.weight_scale",
        expected="a finite scale that is positive",
        found="0 (1 of 1 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "zero input_scale": Case(
        options=FP8,
        damage=element(f"{Q}.input_scale", 0),
        error=PayloadError,
        where=f"{Q}.input_scale",
        expected="a finite scale that is positive",
        found="0 (1 of 1 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "zero KV scale": Case(
        options=FP8_KV,
        damage=element(f"{ATTENTION}.v_scale", 0),
        error=PayloadError,
        where=f"{ATTENTION}.v_scale",
        expected="a finite scale that is positive",
        found="0 (1 of 1 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "unsigned zero points": Case(
        options=INT4_ASYMMETRIC,
        damage=tensors(
            lambda stored: stored.update({f"{Q}.weight_zero_point": torch.full((64, 2), 8, dtype=torch.int8)})
        ),
        error=PayloadError,
        where=f"{Q}.weight_zero_point",
        expected="signed zero points in [-8, 7]",
        found="values from 8 to 8",
        remedy="quantize again with a current release",
    ),
    "static fp8 without input_scale": Case(
        options=FP8,
        damage=tensors(lambda stored: stored.pop(f"{Q}.input_scale")),
        error=PlanError,
        where=f"{Q}.input_scale",
        expected="the static scale of the module's input",
        found="no such tensor",
        remedy="quantize again with dynamic activations",
    ),
    "kv_cache_scheme without scales": Case(
        options=FP8,
        damage=block(kv_cache_scheme=fp8_weights("tensor")),
        error=PlanError,
        where=f"{ATTENTION}.k_scale",
        expected="the scale that kv_cache_scheme promises",
        found="no scale of the KV cache in any layer",
        remedy="remove kv_cache_scheme",
    ),
    "wrong model sizes": Case(
        damage=config(lambda document: document.update(intermediate_size=256)),
        error=PlanError,
        where="model.layers.0.mlp.gate_proj",
        expected="a weight of [256, 64] (out, in) by the sizes in config.json",
        found="codes for [128, 64]",
        remedy="Take config.json from where the weights were published",
    ),
    "a lost layer": Case(
        damage=config(lambda document: document.update(num_hidden_layers=3)),
        error=PlanError,
        where="model.layers.2.input_layernorm.weight",
        expected="a tensor that LlamaForCausalLM needs",
        found="no such tensor in any shard",
        remedy="No file is missing, so the checkpoint was saved without it",
    ),
    "unsupported format": Case(
        options=FP8,
        damage=tensors(five_exponent_bits),
        error=PlanError,
        where=Q,
        expected="tensors of one of the formats",
        found="fp8 tensor, input fp8 tensor, declared float-quantized (input_scale bfloat16, weight float8_e5m2",
        remedy="against the tool that wrote the file",
    ),
    "online transform": Case(
        damage=block(
            transform_config={
                "config_groups": {
                    "R3": {"type": "hadamard", "apply": [{"targets": ["LlamaAttention"], "location": "k_cache"}]},
                }
            }
        ),
        error=PlanError,
        where="transform_config.R3",
        expected="transforms that",
        found="a hadamard transform applied at run time (k_cache)",
        remedy="Without the rotation the model is wrong",
    ),
    "experts that were shrunk": Case(
        damage=block(moe_sparsity_config={"method": "novice", "num_experts": [4, 4]}),
        error=PlanError,
        where="moe_sparsity_config",
        expected="method prune",
        found="method novice",
        remedy="use the unpruned checkpoint",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_refused_by_name_and_nothing_is_left_behind(case: Case, tmp_path: Path) -> None:
    assert_refused(case, tmp_path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_command_line_says_the_same_and_exits_with_1(case: Case, tmp_path: Path) -> None:
    assert_told(case, tmp_path)
