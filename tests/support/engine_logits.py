"""A Llama in plain torch that computes with the files of an engine-build checkpoint, rank by rank.

Every rank has its heads and its part of the MLP; row-parallel Linears are added up over ranks, as engines do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

if TYPE_CHECKING:
    from engine_files import EngineFiles
    from torch import Tensor

__all__ = ["engine_logits"]


def engine_logits(files: EngineFiles, tokens: Tensor) -> Tensor:
    """Logits [n, vocabulary] in float32 at every position of a prompt."""
    first, last = files.files[0], files.files[-files.tp :]
    hidden = first["transformer.vocab_embedding.weight"].float()[tokens]
    cos, sin = _rotary(files, len(tokens))
    for stage, layers in enumerate(files.stages):
        ranks = range(stage * files.tp, (stage + 1) * files.tp)
        for local in range(len(layers)):
            prefix = f"transformer.layers.{local}."
            norm = files.files[ranks[0]]
            normed = _norm(files, hidden, norm[f"{prefix}input_layernorm.weight"])
            hidden = hidden + sum(_attention(files, rank, prefix, normed, cos, sin) for rank in ranks)
            normed = _norm(files, hidden, norm[f"{prefix}post_layernorm.weight"])
            hidden = hidden + sum(_mlp(files, rank, prefix, normed) for rank in ranks)
    hidden = _norm(files, hidden, last[0]["transformer.ln_f.weight"])
    logits = torch.cat([linear(hidden, part["lm_head.weight"].float()) for part in last], dim=-1)
    return logits[:, : files.config["vocab_size"]]


def _weight(files: EngineFiles, rank: int, name: str) -> Tensor:
    loaded = files.linear(rank, name)
    assert loaded.bias is None
    return loaded.weight.float()


def _norm(files: EngineFiles, hidden: Tensor, weight: Tensor) -> Tensor:
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return hidden * torch.rsqrt(variance + files.config["norm_epsilon"]) * weight.float()


def _rotary(files: EngineFiles, length: int) -> tuple[Tensor, Tensor]:
    assert files.config["position_embedding_type"] == "rope_gpt_neox"
    assert files.config["rotary_scaling"] is None
    powers = torch.arange(0, files.head, 2, dtype=torch.float32) / files.head
    angles = torch.arange(length, dtype=torch.float32)[:, None] / files.config["rotary_base"] ** powers
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _attention(files: EngineFiles, rank: int, prefix: str, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    fused = linear(hidden, _weight(files, rank, f"{prefix}attention.qkv"))
    heads = fused.unflatten(-1, (-1, files.head)).transpose(0, 1)
    queries, keys, values = heads.split([files.heads, files.kv_heads, files.kv_heads])
    group = files.heads // files.kv_heads
    keys, values = _rotated(keys, cos, sin).repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    mixed = scaled_dot_product_attention(_rotated(queries, cos, sin), keys, values, is_causal=True)
    return linear(mixed.transpose(0, 1).flatten(1), _weight(files, rank, f"{prefix}attention.dense"))


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-high, low], dim=-1) * sin


def _mlp(files: EngineFiles, rank: int, prefix: str, hidden: Tensor) -> Tensor:
    assert files.config["hidden_act"] == "silu"
    activated = silu(linear(hidden, _weight(files, rank, f"{prefix}mlp.fc")))
    gated = activated * linear(hidden, _weight(files, rank, f"{prefix}mlp.gate"))
    return linear(gated, _weight(files, rank, f"{prefix}mlp.proj"))
