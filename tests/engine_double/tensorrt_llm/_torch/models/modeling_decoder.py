"""Imitates `_torch/models/modeling_llama.py`, `_qwen`, `_qwen3`, `_qwen3_moe`, `_mixtral` and the modules they share.

One decoder with the module names of TensorRT-LLM: fused `qkv_proj` and `gate_up_proj`, experts in one module. It
computes in float32, without a KV cache.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.distributed import allreduce, here
from tensorrt_llm._torch.models.modeling_utils import DecoderModelForCausalLM, register_auto_model
from tensorrt_llm._torch.modules.fused_moe.interface import MoE
from tensorrt_llm._torch.modules.linear import Linear, TensorParallelMode, WeightMode, WeightsLoadingConfig
from tensorrt_llm._torch.modules.linear_methods import FP8, FP8_MAX, frozen
from tensorrt_llm._torch.modules.sharding import copy_weight
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig, PretrainedConfig

__all__ = ["Decoder"]


def _linear(config: ModelConfig, rows: int, columns: int, mode: TensorParallelMode, **more: Any) -> Linear:
    """A Linear that allocates only after its configuration is settled."""
    arguments: dict[str, Any] = {
        "bias": False,
        "dtype": config.torch_dtype,
        "mapping": config.mapping,
        "tensor_parallel_mode": mode,
        "quant_config": config.quant_config,
        "skip_create_weights_in_init": True,
        "force_dynamic_quantization": config.force_dynamic_quantization,
    }
    return Linear(columns, rows, **(arguments | more))


class RMSNorm(nn.Module):
    """No `load_weights`: its parameter is copied by name."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.weight = frozen(size, dtype=config.torch_dtype)
        self.eps = config.pretrained_config.rms_norm_eps

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()


class Embedding(nn.Module):
    """Never quantized; each rank holds some rows, and returns zeros for the others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mapping = config.mapping
        self.local = -(-config.pretrained_config.vocab_size // self.mapping.tp_size)
        self.weight = frozen(self.local, config.pretrained_config.hidden_size, dtype=config.torch_dtype)

    def load_weights(self, weights: list[dict[str, Tensor]]) -> None:
        first = self.mapping.tp_rank * self.local
        rows = weights[0]["weight"][first : first + self.local]
        copy_weight(self.weight, functional.pad(rows, (0, 0, 0, self.local - rows.shape[0])))

    def forward(self, tokens: Tensor) -> Tensor:
        at = tokens - self.mapping.tp_rank * self.local
        mine = (at >= 0) & (at < self.local)
        rows = self.weight[at.clamp(0, self.local - 1)].float()
        return allreduce(torch.where(mine[:, None], rows, 0.0), self.mapping.tp_group)


class Attention(nn.Module):
    """Heads are distributed over the ranks; K and V heads are repeated when there are fewer heads than ranks."""

    def __init__(self, config: ModelConfig, head_norms: bool) -> None:
        super().__init__()
        model, ranks = config.pretrained_config, config.mapping.tp_size
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        self.head_dim = getattr(model, "head_dim", None) or model.hidden_size // heads
        assert heads % ranks == 0, f"{heads} heads on {ranks} ranks"
        self.heads, self.kv_heads = heads // ranks, -(-kv_heads // ranks)
        self.frequencies = _frequencies(model.rope, self.head_dim)
        biased = getattr(model, "attention_bias", False)
        self.qkv_proj = _linear(
            config,
            (self.heads + 2 * self.kv_heads) * ranks * self.head_dim,
            model.hidden_size,
            TensorParallelMode.COLUMN,
            bias=biased or model.model_type == "qwen2",
            weights_loading_config=WeightsLoadingConfig(weight_mode=WeightMode.FUSED_QKV_LINEAR),
        )
        self.o_proj = _linear(config, model.hidden_size, heads * self.head_dim, TensorParallelMode.ROW, bias=biased)
        if head_norms:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, config), RMSNorm(self.head_dim, config)

    def forward(self, hidden: Tensor) -> Tensor:
        sizes = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        parts = self.qkv_proj(hidden).split(sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for part in parts)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotate(q, self.frequencies), _rotate(k, self.frequencies)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=0) for part in (k, v))
        seen = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        return self.o_proj(self._quantize_output(seen.transpose(0, 1).flatten(1)))

    def _quantize_output(self, values: Tensor) -> Tensor:
        """Imitates `_torch/modules/attention.py`: a row-wise FP8 o_proj gets quantized values.

        The GEMM does not know their scale. Without an input scale it is 1, instead of one scale per token.
        """
        if not self.o_proj.has_fp8_rowwise or self.o_proj.force_dynamic_quantization:
            return values
        values = values * self.o_proj.inv_input_scale
        return values.clamp(-FP8_MAX, FP8_MAX).to(FP8) if RELEASE.quantize_activations else values


def _frequencies(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Return the angles per position, from the rotary parameters that the release reads."""
    base = rope.get("rope_theta", 10000.0) ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base
    if kind == "linear":
        return base / rope["factor"]
    if kind != "llama3":
        raise NotImplementedError(f"the double has no rotary embedding of type {kind}")
    turns = rope["original_max_position_embeddings"] * base / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (smooth + (1 - smooth) / rope["factor"])


def _rotate(values: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.arange(values.shape[-2]).double()[:, None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second = values.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class GatedMLP(nn.Module):
    """SwiGLU with one Linear for gate and up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model = config.pretrained_config
        inner, biased = model.intermediate_size, getattr(model, "mlp_bias", False)
        self.gate_up_proj = _linear(
            config,
            2 * inner,
            model.hidden_size,
            TensorParallelMode.COLUMN,
            bias=biased,
            weights_loading_config=WeightsLoadingConfig(weight_mode=WeightMode.FUSED_GATE_UP_LINEAR),
        )
        self.down_proj = _linear(config, model.hidden_size, inner, TensorParallelMode.ROW, bias=biased)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class SparseMLP(nn.Module):
    """A router, never quantized, and experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model = config.pretrained_config
        experts = getattr(model, "num_local_experts", None) or model.num_experts
        self.gate = Linear(
            model.hidden_size, experts, bias=False, dtype=config.torch_dtype, skip_create_weights_in_init=True
        )
        self.experts = MoE(
            num_experts=experts,
            hidden_size=model.hidden_size,
            intermediate_size=getattr(model, "moe_intermediate_size", None) or model.intermediate_size,
            top_k=model.num_experts_per_tok,
            renormalize=model.model_type == "mixtral" or getattr(model, "norm_topk_prob", False),
            model_config=config,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts(hidden, self.gate(hidden))


class DecoderLayer(nn.Module):
    """Attention and a feed-forward part, which has the name that the architecture uses."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        model = config.pretrained_config
        self.input_layernorm = RMSNorm(model.hidden_size, config)
        self.self_attn = Attention(config, head_norms=model.model_type in {"qwen3", "qwen3_moe"})
        self.post_attention_layernorm = RMSNorm(model.hidden_size, config)
        self.feed_forward = "block_sparse_moe" if model.model_type == "mixtral" else "mlp"
        self.add_module(self.feed_forward, SparseMLP(config) if _is_sparse(model, layer) else GatedMLP(config))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        output: Tensor = self.get_submodule(self.feed_forward)(self.post_attention_layernorm(hidden))
        return hidden + output


def _is_sparse(model: PretrainedConfig, layer: int) -> bool:
    if model.model_type == "mixtral":
        return True
    step = getattr(model, "decoder_sparse_step", 1)
    dense = layer in (getattr(model, "mlp_only_layers", None) or []) or (layer + 1) % step != 0
    return model.model_type == "qwen3_moe" and not dense


class DecoderModel(nn.Module):
    """Embedding, layers and the last norm; a pipeline stage holds only its own layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model, mapping = config.pretrained_config, config.mapping
        mine = mapping.pp_layers(model.num_hidden_layers)
        tied_head = model.tie_word_embeddings and mapping.is_last_pp_rank()
        self.embed_tokens: Any = Embedding(config) if mapping.is_first_pp_rank() or tied_head else None
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) if layer in mine else nn.Identity() for layer in range(model.num_hidden_layers)
        )
        self.norm: Any = RMSNorm(model.hidden_size, config) if mapping.is_last_pp_rank() else None


class Decoder(DecoderModelForCausalLM):
    """The model of a rank: `forward` takes token ids and returns float32 logits, on every rank."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model_config = config
        self.model = DecoderModel(config)
        model = config.pretrained_config
        if config.mapping.is_last_pp_rank():
            self.lm_head = _linear(
                config,
                model.vocab_size,
                model.hidden_size,
                TensorParallelMode.COLUMN,
                gather_output=True,
                quant_config=config.quant_config if _quantized_head(config) else None,
            )
        self.finish_construction()
        if config.mapping.is_last_pp_rank() and model.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> Tensor:
        mapping = self.model_config.mapping
        if mapping.is_first_pp_rank():
            hidden = self.model.embed_tokens(tokens)
        else:
            hidden = here().exchange((mapping.prev_pp_rank(), mapping.rank), None)[0]
        for layer in self.model.layers:
            hidden = layer(hidden)
        if mapping.is_last_pp_rank():
            logits = self.lm_head(self.model.norm(hidden))
        else:
            here().exchange((mapping.rank, mapping.next_pp_rank()), hidden)
            logits = None
        if mapping.has_pp():
            logits = here().exchange(tuple(mapping.pp_group), logits)[-1]
        return logits


def _quantized_head(config: ModelConfig) -> bool:
    """Older releases never quantize it; the newest does when an entry or the checkpoint's own tensors say so."""
    model = config.pretrained_config
    if not RELEASE.quantized_lm_head or model.tie_word_embeddings:
        return False
    if config.quant_config_dict is not None:
        return "lm_head" in config.quant_config_dict
    return "lm_head.weight_scale" in _tensor_names(Path(model._name_or_path))


def _tensor_names(directory: Path) -> set[str]:
    names = set()
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            names |= json.loads(file.read(int.from_bytes(file.read(8), "little"))).keys()
    return names


for _name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Mixtral"):
    register_auto_model(f"{_name}ForCausalLM")(Decoder)
