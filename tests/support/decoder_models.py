"""Tiny checkpoints of decoders whose row lists no modules: whatever transformers builds and saves.

Nothing here uses the rows of the package under test.
"""

from __future__ import annotations

import json
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from builders import Built, quantization_block
from installed_transformers import in_dtype
from safetensors.torch import load_file, save_file
from stored_schemes import SCHEMES, Writer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["DECODERS", "SINCE", "write_decoder"]

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_SHARED_HEADS = _SIZES | {"num_key_value_heads": 2}
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 512}
_GROUPED = _ROUTED | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_LATENT = {
    "num_key_value_heads": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 16,
}
_MAMBA = {
    "num_hidden_layers": None,
    "layers_block_type": ["mamba", "attention", "mlp", "moe"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 4,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "moe_shared_expert_intermediate_size": 512,
}
_ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 256,
}
_FOUR = {"num_experts": 4}

DECODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "SeedOssForCausalLM": ("seed_oss", _SIZES | {"attention_bias": True, "attention_out_bias": False}),
    "Exaone4ForCausalLM": ("exaone4", _SHARED_HEADS | {"head_dim": 32, "sliding_window_pattern": 4}),
    "Exaone4_5_ForConditionalGeneration": (
        "exaone4",
        _SHARED_HEADS | {"head_dim": 32, "sliding_window_pattern": 4},
    ),
    "Mistral3ForConditionalGeneration": ("ministral3", _SHARED_HEADS | {"rope_parameters": _ROPE}),
    "NemotronForCausalLM": ("nemotron", _SHARED_HEADS),
    "Starcoder2ForCausalLM": ("starcoder2", _SIZES | {"head_dim": 32, "use_bias": True, "mlp_type": "default"}),
    "Cohere2ForCausalLM": ("cohere2", _SIZES | {"tie_word_embeddings": True}),
    "HunYuanDenseV1ForCausalLM": ("hunyuan_v1_dense", _SIZES | {"use_qk_norm": True, "mlp_bias": False}),
    "Glm4MoeForCausalLM": (
        "glm4_moe",
        _SIZES | _GROUPED | {"first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True},
    ),
    "MiniMaxM2ForCausalLM": ("minimax_m2", _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "LagunaForCausalLM": (
        "laguna",
        _SHARED_HEADS | _ROUTED | _FOUR | {"shared_expert_intermediate_size": 512, "gating": "per-element"},
    ),
    "AfmoeForCausalLM": (
        "afmoe",
        _SHARED_HEADS | _ROUTED | _FOUR | {"num_shared_experts": 1, "num_dense_layers": 1, "n_group": 1},
    ),
    "NemotronHForCausalLM": ("nemotron_h", _SHARED_HEADS | _GROUPED | _MAMBA),
    "DeepseekV32ForCausalLM": ("deepseek_v32", _SIZES | _GROUPED | _LATENT),
    "GlmMoeDsaForCausalLM": ("glm_moe_dsa", _SIZES | _GROUPED | _LATENT),
}
"""By the class in config.json: the `model_type` and the sizes of the text model."""

SINCE = {
    "Exaone4ForCausalLM": "old",
    "NemotronForCausalLM": "old",
    "NemotronHForCausalLM": "old",
    "Mistral3ForConditionalGeneration": "old",
    "SeedOssForCausalLM": "mid",
    "Starcoder2ForCausalLM": "mid",
    "HunYuanDenseV1ForCausalLM": "mid",
    "Glm4MoeForCausalLM": "mid",
    "DeepseekV32ForCausalLM": "mid",
}
"""The first generation of classes that not only the newest one has."""

WRAPPERS = {
    "Exaone4_5_ForConditionalGeneration": ("exaone4_5", "model.visual.blocks.0.attn.qkv.weight"),
    "Mistral3ForConditionalGeneration": ("mistral3", "model.vision_tower.blocks.0.attn.qkv.weight"),
}
"""By the class of a wrapper: its `model_type`, and a tensor of its tower."""
_PLAIN = ("embed_tokens", "embeddings", "lm_head", "mlp.gate", "mixer.gate", "block_sparse_moe.gate", "router.gate")


def write_decoder(directory: Path, name: str, scheme: str | Mapping[str, str], **more: Any) -> Built:
    """Write a random checkpoint of a class, whose Linears are stored by `scheme`, or by that of the end of their names.

    Routers, embeddings and heads are plain. The text model of a wrapper is under `model.language_model.`, beside a
    plain tower. `more` are other sizes. `dense` of the result has the exact values under the names of a text-only
    model.
    """
    config, saved = _saved(directory / "plain", name, more)
    writer = Writer(torch.bfloat16, torch.Generator().manual_seed(0))
    stored: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    named: dict[str, str] = {}
    for key, tensor in saved.items():
        module, _, local = key.rpartition(".")
        how = _scheme_of(module, scheme) if tensor.dim() == 2 and local == "weight" else ""
        if how:
            tensors, exact[key] = writer.store(SCHEMES[how], (tensor.shape[0], tensor.shape[1]))
            stored |= {_place(name, f"{module}.{part}"): value for part, value in tensors.items()}
            named[_place(name, module)] = how
        else:
            value = tensor.bfloat16() if tensor.is_floating_point() else tensor
            stored[_place(name, key)], exact[key] = value, value.double()
    config["quantization_config"] = _block(named)
    if name in WRAPPERS:
        stored[WRAPPERS[name][1]] = writer.normal(24, 16).bfloat16()
        config = _wrapped(name, config)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file({key: value.contiguous() for key, value in stored.items()}, directory / "model.safetensors")
    return Built(directory=directory, config=config, dense=exact, stored=stored)


def _saved(directory: Path, name: str, more: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and the tensors of a random model, as transformers saves both."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, sizes = DECODERS[name]
    given = {key: value for key, value in {**sizes, **more}.items() if value is not None}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given), **in_dtype(torch.float32))
    for parameter_name, parameter in model.named_parameters():
        width = parameter.shape[-1] if parameter.dim() > 1 else 100
        parameter.data.normal_(std=1 / sqrt(width)).add_("norm" in parameter_name and parameter.dim() == 1)
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text()) | given | {"dtype": "bfloat16"}
    config |= {"tie_word_embeddings": sizes["tie_word_embeddings"]}
    return config, load_file(directory / "model.safetensors")


def _scheme_of(module: str, scheme: str | Mapping[str, str]) -> str:
    if module.endswith(_PLAIN):
        return ""
    if isinstance(scheme, str):
        return scheme
    return next((how for end, how in scheme.items() if module.endswith(end)), "")


def _block(named: Mapping[str, str]) -> dict[str, Any]:
    """A group of named modules for each scheme."""
    used = sorted(set(named.values()))
    groups = {
        f"group_{at}": SCHEMES[how].group | {"targets": [module for module in named if named[module] == how]}
        for at, how in enumerate(used)
    }
    formats = {group["format"] for group in groups.values()}
    return quantization_block(groups, ["lm_head"], formats.pop() if len(formats) == 1 else "mixed-precision")


def _place(name: str, key: str) -> str:
    return key.replace("model.", "model.language_model.", 1) if name in WRAPPERS else key


def _wrapped(name: str, config: dict[str, Any]) -> dict[str, Any]:
    whole = {key: config.pop(key) for key in ("quantization_config", "tie_word_embeddings", "dtype")}
    vision = {"model_type": "pixtral" if name.startswith("Mistral") else "exaone4_5_vision"}
    kinds = {"architectures": [name], "model_type": WRAPPERS[name][0]}
    return {**whole, **kinds, "text_config": config, "vision_config": vision}
