"""Imitates `_torch/models/modeling_llama.py`, `_qwen`, `_qwen_moe`, `_qwen3`, `_qwen3_moe` and `_mixtral`.

One decoder with the module names of TensorRT-LLM: fused `qkv_proj` and `gate_up_proj`, experts in one module. It
computes in float32, without a KV cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.distributed import allreduce, here
from tensorrt_llm._torch.models.modeling_utils import DecoderModelForCausalLM
from tensorrt_llm._torch.modules.attention import Attention, RMSNorm, decoder_linear
from tensorrt_llm._torch.modules.fused_moe.interface import MoEWeightLoadingMode, create_moe
from tensorrt_llm._torch.modules.linear import Linear, TensorParallelMode, WeightMode, WeightsLoadingConfig
from tensorrt_llm._torch.modules.linear_methods import frozen
from tensorrt_llm._torch.modules.sharding import copy_weight
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig

__all__ = ["Decoder", "GatedMLP"]


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


_ASKED_FOR_MLP_BIAS = frozenset(
    {"llama", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_moe", "qwen3", "qwen3_vl_text", "qwen3_next"}
    | {"qwen3_5_moe_text", "seed_oss", "exaone4", "hunyuan_v1_dense", "hunyuan_v1_moe"}
)
"""The model types whose class passes `mlp_bias` of config.json on; the others pass False."""


class GatedMLP(nn.Module):
    """SwiGLU with one Linear for gate and up; few classes look at `mlp_bias`."""

    def __init__(self, config: ModelConfig, inner: int | None = None, *, biased: bool | None = None) -> None:
        super().__init__()
        model = config.pretrained_config
        inner = inner or model.intermediate_size
        if biased is None:
            biased = model.model_type in _ASKED_FOR_MLP_BIAS and getattr(model, "mlp_bias", False)
        self.gate_up_proj = decoder_linear(
            config,
            2 * inner,
            model.hidden_size,
            TensorParallelMode.COLUMN,
            bias=biased,
            weights_loading_config=WeightsLoadingConfig(weight_mode=WeightMode.FUSED_GATE_UP_LINEAR),
        )
        self.down_proj = decoder_linear(config, model.hidden_size, inner, TensorParallelMode.ROW, bias=biased)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class SparseMLP(nn.Module):
    """A router, never quantized, and experts; Qwen2-MoE has a shared expert with a gate of its own, never quantized."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model = config.pretrained_config
        # `modeling_mixtral.py` reads the one, `modeling_qwen3_moe.py` (03441af1) the other.
        experts = model.num_local_experts if model.model_type == "mixtral" else model.num_experts
        self.gate = Linear(
            model.hidden_size, experts, bias=False, dtype=config.torch_dtype, skip_create_weights_in_init=True
        )
        self.experts = create_moe(
            num_experts=experts,
            hidden_size=model.hidden_size,
            intermediate_size=getattr(model, "moe_intermediate_size", None) or model.intermediate_size,
            top_k=model.num_experts_per_tok,
            renormalize=model.model_type == "mixtral" or getattr(model, "norm_topk_prob", False),
            model_config=config,
            weight_loading_mode=MoEWeightLoadingMode.FUSED_GATE_UP_PROJ
            if model.model_type == "qwen3_vl_moe_text"
            else MoEWeightLoadingMode.VANILLA,
        )
        if model.model_type == "qwen2_moe":
            self.shared_expert = GatedMLP(config, model.shared_expert_intermediate_size)
            self.shared_expert_gate = Linear(model.hidden_size, 1, bias=False, dtype=config.torch_dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.experts(hidden, self.gate(hidden))
        if hasattr(self, "shared_expert"):
            output = output + self.shared_expert_gate(hidden).sigmoid() * self.shared_expert(hidden)
        return output


class DecoderLayer(nn.Module):
    """Attention and a feed-forward part, which has the name that the architecture uses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model = config.pretrained_config
        self.input_layernorm = RMSNorm(model.hidden_size, config)
        self.self_attn = Attention(config, head_norms=model.model_type.startswith("qwen3"))
        self.post_attention_layernorm = RMSNorm(model.hidden_size, config)
        self.feed_forward = "block_sparse_moe" if model.model_type == "mixtral" else "mlp"
        self.add_module(self.feed_forward, SparseMLP(config) if model.model_type in _SPARSE else GatedMLP(config))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        output: Tensor = self.get_submodule(self.feed_forward)(self.post_attention_layernorm(hidden))
        return hidden + output


_SPARSE = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text"})
"""Experts in every layer: `modeling_qwen_moe.py` (0a0d2c8e) and `modeling_qwen3_moe.py` (a678b91a and 03441af1)."""


class DecoderModel(nn.Module):
    """Embedding, layers and the last norm; a pipeline stage holds only its own layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model, mapping = config.pretrained_config, config.mapping
        mine = mapping.pp_layers(model.num_hidden_layers)
        tied_head = model.tie_word_embeddings and mapping.is_last_pp_rank()
        self.embed_tokens: Any = Embedding(config) if mapping.is_first_pp_rank() or tied_head else None
        self.layers = nn.ModuleList(
            DecoderLayer(config) if layer in mine else nn.Identity() for layer in range(model.num_hidden_layers)
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
            self.lm_head = decoder_linear(
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
