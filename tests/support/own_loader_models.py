"""Tiny checkpoints of the classes that load their weights themselves.

The tensors are those that transformers saves; of experts that it stacks, llm-compressor stores each by itself. Nothing
here uses the tables of the package under test.
"""

from __future__ import annotations

import json
import re
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from builders import Built, quantization_block
from safetensors.torch import load_file, save_file
from stored_schemes import SCHEMES, Writer
from tiny_classes import tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["OWN_LOADERS", "write_own_loader"]

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
_STEP_TYPES = ["full_attention", "sliding_attention", "full_attention"]

OWN_LOADERS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "HunYuanMoEV1ForCausalLM": (
        "HunYuanMoEV1ForCausalLM",
        _SIZES | {"head_dim": 32, "num_experts": 4, "moe_topk": 2},
        {"moe_intermediate_size": 512, "moe_layer_num_skipped": 0, "mlp_bias": False, "attention_bias": False},
    ),
    "GptOssForCausalLM": ("GptOssForCausalLM", _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}, {}),
    "Step3p5ForCausalLM": (
        "Step3p7ForConditionalGeneration",
        _SIZES
        | {
            "num_hidden_layers": 3,
            "moe_intermediate_size": 512,
            "share_expert_dim": 512,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": _STEP_TYPES,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_sliding_attention_heads": 12,
            "sliding_window": 8,
        },
        {
            "num_attention_groups": 4,
            "attention_other_setting": {"num_attention_heads": 12, "num_attention_groups": 4},
            "moe_layers_enum": "1,2",
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    ),
    "DeepseekV4ForCausalLM": (
        "DeepseekV4ForCausalLM",
        _SIZES
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "qk_rope_head_dim": 16,
            "q_lora_rank": 128,
            "o_groups": 4,
            "o_lora_rank": 128,
            "moe_intermediate_size": 512,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "index_n_heads": 4,
            "index_head_dim": 64,
            "index_topk": 8,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "num_nextn_predict_layers": 0,
        },
        {"compress_ratios": [0, 4, 128], "num_hash_layers": 1},
    ),
    "MllamaForConditionalGeneration": (
        "MllamaForConditionalGeneration",
        _SIZES | {"num_hidden_layers": 3, "cross_attention_layers": [1], "head_dim": 32},
        {},
    ),
}
"""By the class in config.json: the class of transformers, its sizes, and what config.json has besides."""

_PLAIN = (
    *("embed_tokens", "lm_head", "gate.wg", "router", "moe.gate", "multi_modal_projector"),
    *("embed", "head", "ffn.gate", "compressor.wkv", "compressor.wgate", "weights_proj"),
)
_PUBLISHED = (
    (r"^model\.hc_head\.hc_", "hc_head_"),
    (r"^model\.", ""),
    (r"^lm_head\.", "head."),
    (r"^embed_tokens\.", "embed."),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.attn\.sinks$", ".attn.attn_sink"),
    (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
    (r"\.compressor\.indexer\.scorer\.", ".indexer."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.compressor\.kv_proj\.", ".compressor.wkv."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
    (r"\.position_bias$", ".ape"),
    (r"\.attn\.(q|o)_([ab])_proj\.", r".attn.w\1_\2."),
    (r"\.attn\.kv_proj\.", ".attn.wkv."),
    (r"\.attn\.q_a_norm\.", ".attn.q_norm."),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"\.gate_proj\.", ".w1."),
    (r"\.up_proj\.", ".w3."),
    (r"\.down_proj\.", ".w2."),
)
"""What turns the names that transformers has in memory into those that DeepSeek published; see `_published`."""
_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def write_own_loader(directory: Path, name: str, scheme: str | Mapping[str, str], **more: Any) -> Built:
    """Write a random checkpoint, whose Linears are stored by `scheme`, or by that of the end of their names.

    Routers, embeddings, heads and towers are plain. `more` are other keys of config.json. `dense` of the result has the
    exact values under the names of the files.
    """
    config, saved = _saved(directory, name)
    writer = Writer(torch.bfloat16, torch.Generator().manual_seed(0))
    stored: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    named: dict[str, str] = {}
    for key, tensor in saved.items():
        module, _, local = key.rpartition(".")
        how = _scheme_of(module, scheme) if tensor.dim() == 2 and local == "weight" else ""
        if how:
            tensors, exact[key] = writer.store(SCHEMES[how], (tensor.shape[0], tensor.shape[1]))
            stored |= {f"{module}.{part}": value for part, value in tensors.items()}
            named[module] = how
        else:
            value = tensor.bfloat16() if tensor.is_floating_point() else tensor
            stored[key], exact[key] = value, value.double()
    used = sorted(set(named.values()))
    groups = {
        f"group_{at}": SCHEMES[how].group | {"targets": [module for module in named if named[module] == how]}
        for at, how in enumerate(used)
    }
    formats = {group["format"] for group in groups.values()}
    block = quantization_block(groups, ["lm_head"], formats.pop() if len(formats) == 1 else "mixed-precision")
    config |= {"quantization_config": block, **more}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file({key: value.contiguous() for key, value in stored.items()}, directory / "model.safetensors")
    return Built(directory=directory, config=config, dense=exact, stored=stored)


def _saved(directory: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and the tensors of a random model, with its experts one by one."""
    class_name, sizes, besides = OWN_LOADERS[name]
    model = tiny_model(class_name, **sizes)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            width = parameter.shape[-1] if parameter.dim() > 1 else 100
            parameter.normal_(std=1 / sqrt(width)).add_("norm" in parameter_name and parameter.dim() == 1)
        for table_name, table in model.named_buffers():
            if table_name.endswith("tid2eid"):
                table.copy_(torch.randint(0, 4, table.shape))
    plain = directory / "plain"
    model.save_pretrained(plain)
    config = json.loads((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    if name == "DeepseekV4ForCausalLM":
        tensors = dict(_published(model))
    if name == "Step3p5ForCausalLM":
        config = config["text_config"] | {"architectures": [name]}
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("vi")}
    return config | dict(besides), {key: value for pair in tensors.items() for key, value in _one_by_one(*pair)}


def _published(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a DeepSeek-V4 model under the names that DeepSeek published, its experts one by one."""
    for key, tensor in model.state_dict().items():
        around, _, stack = key.rpartition(".")
        parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.get(stack)
        if parts is None:
            yield _published_name(key), tensor
            continue
        for expert, entry in enumerate(tensor):
            for projection, rows in zip(parts, entry.chunk(len(parts)), strict=True):
                yield f"{_published_name(around)}.{expert}.{projection}.weight", rows


def _published_name(key: str) -> str:
    for pattern, replacement in _PUBLISHED:
        key = re.sub(pattern, replacement, key)
    return key


def _one_by_one(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or those of the experts that it holds; gpt-oss has [E, in, out] with alternating rows."""
    around, _, local = key.rpartition(".")
    if tensor.dim() == 3 and ".moe." in key:
        for expert, entry in enumerate(tensor):
            yield key.replace(".moe.", f".moe.experts.{expert}."), entry
    elif around.endswith("mlp.experts"):
        stack, parameter = local.removesuffix("_bias"), "bias" if local.endswith("_bias") else "weight"
        for expert, entry in enumerate(tensor):
            rows = entry.T if parameter == "weight" else entry
            for at, projection in enumerate(_STACKS[stack]):
                yield f"{around}.{expert}.{projection}.{parameter}", rows[at :: len(_STACKS[stack])]
    else:
        yield key, tensor


def _scheme_of(module: str, scheme: str | Mapping[str, str]) -> str:
    if module.endswith(_PLAIN) or "vision_model" in module:
        return ""
    if isinstance(scheme, str):
        return scheme
    return next((how for end, how in scheme.items() if module.endswith(end)), "")
