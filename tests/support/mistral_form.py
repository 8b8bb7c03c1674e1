"""Checkpoints in Mistral's own form: params.json, consolidated.safetensors, other names and another order of rows.

Made from a checkpoint in Hugging Face's form by the inverse of what the published converter does to queries and keys
(transformers `convert_mistral_weights_to_hf.py`), written down as a list of rows; nothing here uses the package.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import oracles
import torch
from builders import Built, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Packing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

# Longer names first: "norm" is a part of others.
NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attention",
    "block_sparse_moe.": "feed_forward.",
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
SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
QUERIES_AND_KEYS = re.compile(r".*\.(wq|wk)\.(\w+)")


def native_name(name: str) -> str:
    for hugging_face, own in NAMES.items():
        name = name.replace(hugging_face, own)
    return name


def pairs_of_halves(rows: int, head_dim: int) -> list[int]:
    """Where each row of Mistral's order lies in Hugging Face's: 0, n, 1, n + 1, ... in each head of 2n rows."""
    half = head_dim // 2
    return [head + i + side * half for head in range(0, rows, head_dim) for i in range(half) for side in (0, 1)]


def in_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """The same rows in pairs; FP8 is indexed as bytes, because torch before 2.10 can't index it."""
    stored = tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor
    return stored[pairs_of_halves(tensor.shape[0], head_dim)].view(tensor.dtype)


def packed_in_pairs(words: Tensor, rows: int, bits: int, head_dim: int, *, dense: bool = True) -> Tensor:
    """The same for rows that are packed in int32 words along the first axis."""
    packing = Packing(bits=bits, container=DType.I32, axis=0, offset_binary=True, dense=dense)
    fields = oracles.unpack(words, packing, (rows, words.shape[1]))
    return oracles.pack(fields[pairs_of_halves(rows, head_dim)], packing)


def quantized_in_place(head_dim: int, bits: int = 4) -> Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]:
    """As llm-compressor's `model_free_ptq` writes it: every tensor that has rows has them in Mistral's order."""

    def place(name: str, tensor: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        local = name.rpartition(".")[2]
        if local in {"weight_shape", "weight_g_idx"} or tensor.numel() == 1:
            return tensor
        if local == "weight_zero_point" and tensor.dtype == torch.int32:
            rows = stored[name.replace(local, "weight_packed")].shape[0]
            return packed_in_pairs(tensor, rows, bits, head_dim)
        return in_pairs(tensor, head_dim)

    return place


def readable_by_vllm(head_dim: int) -> Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]:
    """As vLLM expects it: plain weights and 8-bit codes in Mistral's order, other tensors in Hugging Face's."""

    def place(name: str, tensor: Tensor, _stored: Mapping[str, Tensor]) -> Tensor:
        return in_pairs(tensor, head_dim) if name.endswith(".weight") else tensor

    return place


def write_native(
    directory: Path,
    scheme: str | Mapping[str, str] = "fp8-tensor-static",
    *,
    config: dict[str, Any] | None = None,
    place: Callable[[str, Tensor, Mapping[str, Tensor]], Tensor] | None = None,
    rename: Mapping[str, str] | None = None,
    qk_rows: str | None = None,
    **options: Any,
) -> Built:
    """Params.json and consolidated.safetensors of a model, and what it is in Hugging Face's form.

    `place` puts the tensors of queries and keys in order, in place when it is left out; `rename` gives local names that
    Mistral's form has (`weight_scale` -> `qscale_weight`).
    """
    config = config or tiny_config("MistralForCausalLM")
    built = write_checkpoint(directory, config=config, scheme=scheme, **options)
    to_native(directory, place or quantized_in_place(config["head_dim"]), rename or {})
    block = dict(built.config["quantization_config"]) | ({"qk_rows": qk_rows} if qk_rows else {})
    write_params(directory, config, quantization=block)
    (directory / "config.json").unlink()
    return built


def to_native(
    directory: Path,
    place: Callable[[str, Tensor, Mapping[str, Tensor]], Tensor],
    rename: Mapping[str, str],
) -> None:
    """The weights of a directory under Mistral's names and in its order."""
    stored = {native_name(name): tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    placed = {
        name: place(name, tensor, stored) if QUERIES_AND_KEYS.fullmatch(name) else tensor
        for name, tensor in stored.items()
    }
    renamed = {renamed_local(name, rename): tensor.clone().contiguous() for name, tensor in placed.items()}
    save_file(renamed, directory / "consolidated.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").unlink()


def renamed_local(name: str, rename: Mapping[str, str]) -> str:
    module, _, local = name.rpartition(".")
    return f"{module}.{rename.get(local, local)}"


def params_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Mistral says of a model that Hugging Face describes by `config`."""
    params = {own: config[theirs] for own, theirs in SIZES.items()}
    params["rope_theta"] = config["rope_parameters"]["rope_theta"]
    if "num_local_experts" in config:
        params["moe"] = {"num_experts": config["num_local_experts"], "num_experts_per_tok": 2}
    return params


def write_params(directory: Path, config: Mapping[str, Any], **more: Any) -> None:
    (directory / "params.json").write_text(json.dumps(params_of(config) | more), encoding="utf-8")
