"""Rows name what a layer has: what every layer has lost is named without transformers, and nothing else is."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from class_models import CLASSES, write_class
from decoder_models import DECODERS, write_decoder
from own_loader_models import OWN_LOADERS, write_own_loader
from safetensors import safe_open

from trtllm_ct.plan.models.class_rows import CLASS_ROWS
from trtllm_ct.plan.models.sites import Model
from trtllm_ct.plan.row_parts_check import lost_by_row

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.plan.models.layer_parts import Part

pytestmark = [pytest.mark.reference, pytest.mark.newest_transformers]

# Ministral 3 has a row that lists its modules.
WRITTEN = sorted({*CLASSES, *DECODERS, *OWN_LOADERS} - {"Mistral3ForConditionalGeneration"})
BODIES = {
    "Exaone4_5_ForConditionalGeneration": "model.language_model.",
    "Qwen3_5ForConditionalGeneration": "model.language_model.",
    "Qwen3_5MoeForConditionalGeneration": "model.language_model.",
    "MllamaForConditionalGeneration": "language_model.model.",
    "NemotronHForCausalLM": "backbone.",
    "DeepseekV4ForCausalLM": "",
}
# A layer has either of them.
FIRST_SPELLING = {"layers.*.ffn.gate.tid2eid": "layers.*.ffn.gate.bias"}
# Of these, config.json decides, and the configurations of the tests leave it open.
BY_CONFIG = {"Step3p5ForCausalLM": {"use_head_wise_attn_gate": True, "use_moe_router_bias": True}}


def stored(directory: Path, name: str) -> tuple[Model, list[str]]:
    """The model of a checkpoint of a class, and the names of its tensors."""
    if name in CLASSES:
        write_class(directory, name, "fp8-channel-token")
    elif name in DECODERS:
        write_decoder(directory, name, "fp8-channel-token")
    else:
        write_own_loader(directory, name, {"o_proj": "fp8-channel-token", "wo_b": "fp8-channel-token"})
    config = json.loads((directory / "config.json").read_text()) | BY_CONFIG.get(name, {})
    with safe_open(directory / "model.safetensors", "pt") as file:
        names = [key for key in file.keys() if not key.endswith(".weight_scale")]  # noqa: SIM118
    return Model.from_config(config), names


def everywhere(name: str) -> str:
    """The name of a tensor without its layer and its expert."""
    return re.sub(r"(layers|experts)\.\d+\.", r"\1.*.", name)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_every_layer_has_lost_is_named(tmp_path: Path, name: str) -> None:
    body = BODIES.get(name, "model.")
    model, names = stored(tmp_path, name)
    assert not list(lost_by_row(names, model, body))

    in_layers = [key for key in names if key.startswith(f"{body}layers.")]
    for leaf in dict.fromkeys(map(everywhere, in_layers)):
        rest = [key for key in names if everywhere(key) != leaf]
        lost = {everywhere(where) for where, _ in lost_by_row(rest, model, body)}
        assert {where.rpartition(".")[2] for where in lost} == {FIRST_SPELLING.get(leaf, leaf).rpartition(".")[2]}, leaf


@pytest.mark.parametrize("name", WRITTEN)
def test_a_layer_that_has_lost_everything_but_its_norms_is_named(tmp_path: Path, name: str) -> None:
    body = BODIES.get(name, "model.")
    model, names = stored(tmp_path, name)

    rest = [
        key for key in names if not key.startswith(f"{body}layers.1.") or "layernorm" in key or key.endswith("norm")
    ]
    rest.append(f"{body}layers.1.other.weight")

    assert any(where.startswith(f"{body}layers.1.") for where, _ in lost_by_row(rest, model, body))


def test_every_row_names_the_parts_of_a_layer() -> None:
    assert all(row.leaves or row.layer for row in CLASS_ROWS.values())


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name, row in CLASS_ROWS.items() if not row.leaves),
    *((name, {"attention_bias": True}) for name in ("Cohere2ForCausalLM", "GlmMoeDsaForCausalLM", "AfmoeForCausalLM")),
    ("Glm4MoeForCausalLM", {"use_qk_norm": True, "attention_bias": True}),
    ("GlmMoeDsaForCausalLM", {"indexer_types": ["full", "shared"]}),
    ("SeedOssForCausalLM", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    ("NemotronForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("NemotronHForCausalLM", {"mlp_bias": True, "use_bias": True, "use_conv_bias": False, "moe_latent_size": 32}),
    ("Starcoder2ForCausalLM", {"use_bias": False}),
    (
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    ),
    (
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "attention_k_eq_v": True,
        },
    ),
    ("Llama4ForConditionalGeneration", {"moe_layers": [1], "attention_bias": True}),
    ("Qwen3NextForCausalLM", {"layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [1]}),
]
# These have other names in memory than in files, or no class in transformers; `lost_by_row` is tested with the files.
RENAMED = {"MiniMaxM2ForCausalLM", "DeepseekV4ForCausalLM", "Step3p5ForCausalLM", "MllamaForConditionalGeneration"}


@pytest.mark.parametrize(("name", "keys"), [pair for pair in VARIANTS if pair[0] not in RENAMED])
def test_the_parts_are_those_of_the_class(name: str, keys: Mapping[str, Any]) -> None:
    """No parameter of a layer is in no part, and no part has what the class lacks."""
    from tiny_classes import tiny_model

    built = tiny_model(name, **keys)
    config = json.loads(built.config.to_json_string(use_diff=False)) | {"architectures": [name]}
    names = [*built.state_dict()]
    body = next(match[1] for key in names if (match := re.match(r"(?!vision|.*audio)(.*?)layers\.0\.", key)))
    model = Model.from_config(config)

    assert not list(lost_by_row(names, model, body))
    known = {tensor for choice in model.row.layer for part in choice for tensor in names_of(part)}
    leaves = {key.removeprefix(body).split(".", 2)[2] for key in names if key.startswith(f"{body}layers.")}
    assert {
        leaf for leaf in leaves - known if not re.search(r"experts\.(gate_up|up|down)_proj(_bias)?$", leaf)
    } == set()


def names_of(part: Part) -> set[str]:
    """Every name that a part may have."""
    config = dict.fromkeys((*part.when, part.key), True)
    return {spelling for name in part.names(config) for spelling in name.split("|")}
