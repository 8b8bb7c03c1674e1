"""A decoder in plain torch that computes with the files of an engine-build checkpoint, rank by rank.

Every rank has its heads and its part of the MLP, or of each expert; what row-parallel Linears and experts give is added
up over ranks, as engines do. Keys and values go through the KV cache in its dtype, and inputs of Linears with a static
scale through FP8 or INT8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from engine_builder import rotary_table
from engine_codes import E2M1
from engine_files import ADDS_BIAS_IN_KERNEL
from torch.nn.functional import linear, scaled_dot_product_attention, silu

if TYPE_CHECKING:
    from engine_files import EngineFiles, Loaded
    from torch import Tensor

__all__ = ["cached", "engine_logits", "narrowed"]


def engine_logits(files: EngineFiles, tokens: Tensor) -> Tensor:
    """Logits [n, vocabulary] in float32 at every position of a prompt."""
    assert files.config["hidden_act"] == ("swiglu" if "moe" in files.config else "silu"), "experts need the gated name"
    first, last = files.files[0], files.files[-files.tp :]
    hidden = first["transformer.vocab_embedding.weight"].float()[tokens]
    cos, sin = _rotary(files, len(tokens))
    for stage, layers in enumerate(files.stages):
        ranks = range(stage * files.tp, (stage + 1) * files.tp)
        for local in range(len(layers)):
            prefix = f"transformer.layers.{local}."
            norm = files.files[ranks[0]]
            normed = _norm(files, hidden, norm[f"{prefix}input_layernorm.weight"])
            mixed = [_attention(files, rank, prefix, normed, cos, sin) for rank in ranks]
            hidden = hidden + _added_up(files, ranks, f"{prefix}attention.dense", mixed)
            normed = _norm(files, hidden, norm[f"{prefix}post_layernorm.weight"])
            hidden = hidden + (_mixture if "moe" in files.config else _mlp)(files, ranks, prefix, normed)
    hidden = _norm(files, hidden, last[0]["transformer.ln_f.weight"])
    logits = torch.cat([linear(hidden, part["lm_head.weight"].float()) for part in last], dim=-1)
    return logits[:, : files.config["vocab_size"]]


def cached(heads: Tensor, algo: str | None, scale: Tensor | None) -> Tensor:
    """Keys or values as they come back from a cache of FP8 or INT8, or of the model's dtype."""
    if algo is None or scale is None:
        assert algo is None, "the loader needs the scale"
        return heads
    if algo == "FP8":
        return (heads / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(heads.dtype) * scale
    return (heads / scale).round().clamp(-128, 127) * scale


def narrowed(inputs: Tensor, algo: str | None, scale: Tensor | None) -> Tensor:
    """Inputs of a Linear as its kernel sees them: those of NVFP4 have a scale for each block of 16 too."""
    if scale is None:
        return inputs
    if algo == "NVFP4":
        blocks = inputs.unflatten(-1, (-1, 16))
        largest = blocks.abs().amax(-1, keepdim=True) / 6
        step = (largest / scale).clamp(max=448).to(torch.float8_e4m3fn).to(inputs.dtype) * scale
        return (_fp4(blocks / step.where(step > 0, torch.ones_like(step))) * step).flatten(-2)
    return cached(inputs, "FP8" if algo == "FP8" else "INT8", scale)


def _fp4(values: Tensor) -> Tensor:
    """The nearest number of E2M1."""
    numbers = torch.tensor([*(-value for value in E2M1), *E2M1]).unique().to(values.dtype)
    return numbers[(values[..., None] - numbers).abs().argmin(-1)]


def _linear(inputs: Tensor, part: Loaded, *, bias: bool = True) -> Tensor:
    """What a Linear of one rank computes in float32."""
    added = part.bias.float() if bias and part.bias is not None else None
    return linear(narrowed(inputs, part.algo, part.input_scale), part.weight.float(), added)


def _norm(files: EngineFiles, hidden: Tensor, weight: Tensor) -> Tensor:
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return hidden * torch.rsqrt(variance + files.config["norm_epsilon"]) * weight.float()


def _rotary(files: EngineFiles, length: int) -> tuple[Tensor, Tensor]:
    assert length <= files.config["max_position_embeddings"], "the table ends there"
    frequencies, scale = rotary_table(files.config)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * torch.from_numpy(frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * scale, angles.sin() * scale


def _attention(files: EngineFiles, rank: int, prefix: str, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    fused = _linear(hidden, files.linear(rank, f"{prefix}attention.qkv"))
    heads = fused.unflatten(-1, (-1, files.head)).transpose(0, 1)
    queries, keys, values = heads.split([files.heads, files.kv_heads, files.kv_heads])
    held = files.files[rank]
    if f"{prefix}attention.q_layernorm.weight" in held:
        queries = _norm(files, queries, held[f"{prefix}attention.q_layernorm.weight"])
        keys = _norm(files, keys, held[f"{prefix}attention.k_layernorm.weight"])
    algo = files.cache
    scale = held.get(f"{prefix}attention.kv_cache_scaling_factor")
    keys, values = (cached(part, algo, scale) for part in (_rotated(keys, cos, sin), values))
    group = files.heads // files.kv_heads
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    mixed = scaled_dot_product_attention(_rotated(queries, cos, sin), keys, values, is_causal=True)
    return mixed.transpose(0, 1).flatten(1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-high, low], dim=-1) * sin


def _mlp(files: EngineFiles, ranks: range, prefix: str, hidden: Tensor) -> Tensor:
    gated = [_gated(files, rank, prefix, hidden) for rank in ranks]
    return _added_up(files, ranks, f"{prefix}mlp.proj", gated)


def _gated(files: EngineFiles, rank: int, prefix: str, hidden: Tensor) -> Tensor:
    branches = [_linear(hidden, part) for part in files.mlp(rank, prefix)]
    return silu(branches[0]) * branches[1]


def _added_up(files: EngineFiles, ranks: range, name: str, inputs: list[Tensor]) -> Tensor:
    """The output of a Linear whose columns the ranks divide; its bias is added by each kernel, or once afterwards."""
    parts = [files.linear(rank, name) for rank in ranks]
    total = torch.stack([_linear(x, part, bias=False) for x, part in zip(inputs, parts, strict=True)]).sum(dim=0)
    biases = [part.bias.float() for part in parts if part.bias is not None]
    if files.block(name).get("quant_algo") not in ADDS_BIAS_IN_KERNEL:
        biases = biases[:1]
    return total + sum(biases) if biases else total


def _mixture(files: EngineFiles, ranks: range, prefix: str, hidden: Tensor) -> Tensor:
    """What the experts of a layer add: each rank has a part of every expert (`moe_tp_size`), and all of the router."""
    assert files.config["mapping"]["moe_tp_size"] == files.tp
    assert files.config["mapping"]["moe_ep_size"] == 1
    parts = [_experts(files, files.files[rank], prefix, hidden) for rank in ranks]
    return torch.stack(parts).sum(dim=0)


def _experts(files: EngineFiles, held: dict[str, Tensor], prefix: str, hidden: Tensor) -> Tensor:
    """The rows of the linear branch (w3) come before those of the activated one (w1), the reverse of a dense MLP."""
    moe = files.config["moe"]
    assert moe["normalization_mode"] == 1, "the shares of the chosen experts add up to 1"
    router = held[f"{prefix}mlp.router.weight"]
    assert router.dtype == torch.float32
    chosen, experts = linear(hidden, router).softmax(-1).topk(moe["top_k"])
    shares = torch.zeros(len(hidden), moe["num_experts"]).scatter(1, experts, chosen / chosen.sum(-1, keepdim=True))
    result = torch.zeros_like(hidden)
    stacks = (held[f"{prefix}mlp.{name}.weight"].float() for name in ("fc", "proj"))
    for share, fc, proj in zip(shares.T, *stacks, strict=True):
        linear_branch, activated = fc.chunk(2)
        inner = silu(linear(hidden, activated)) * linear(hidden, linear_branch)
        result = result + share[:, None] * linear(inner, proj)
    return result
