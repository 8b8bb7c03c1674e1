"""Imitates `_torch/models/modeling_deepseekv3.py`: names, exclusions and loading of Linears; it computes nothing.

The layers that draft tokens are built as with `MTPDecodingConfig`, one for each in the checkpoint and one more, which
shares their weights: the class copies its exclusions from those of the checkpoint's layers. DeepSeek-V3.2 and GLM-5
have the same loader, and an indexer in each layer.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.models.modeling_decoder import Embedding, GatedMLP
from tensorrt_llm._torch.models.modeling_utils import DecoderModelForCausalLM
from tensorrt_llm._torch.modules.attention import RMSNorm, decoder_linear
from tensorrt_llm._torch.modules.fused_moe.interface import MoE, MoEWeightLoadingMode
from tensorrt_llm._torch.modules.linear import TensorParallelMode
from tensorrt_llm._torch.modules.linear_methods import frozen
from tensorrt_llm.mapping import Mapping
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping as Weights

    from tensorrt_llm._torch.model_config import ModelConfig
    from torch import Tensor

__all__ = ["DeepseekV3ForCausalLM"]

_INDEXED = frozenset({"deepseek_v32", "glm_moe_dsa"})
_PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class MLA(nn.Module):
    """`kv_a_proj_with_mqa` holds q_a_proj too, except in models without a low-rank projection of queries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model, column = config.pretrained_config, TensorParallelMode.COLUMN
        heads, rank = model.num_attention_heads, model.kv_lora_rank
        queries = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
        latent = (model.q_lora_rank or 0) + rank + model.qk_rope_head_dim
        if model.model_type in _INDEXED:
            self.indexer = Indexer(config)
            # Commit 585c7565 appends the rows of the indexer's keys; later ones read them for themselves.
            latent += model.index_head_dim if RELEASE.name == "mid" else 0
        self.kv_a_proj_with_mqa = decoder_linear(config, latent, model.hidden_size, None)
        if model.q_lora_rank is None:
            self.q_proj = decoder_linear(config, queries, model.hidden_size, column)
        else:
            self.q_b_proj = decoder_linear(config, queries, model.q_lora_rank, column)
            self.q_a_layernorm = RMSNorm(model.q_lora_rank, config)
        self.kv_b_proj = decoder_linear(config, heads * (model.qk_nope_head_dim + model.v_head_dim), rank, column)
        self.o_proj = decoder_linear(config, model.hidden_size, heads * model.v_head_dim, TensorParallelMode.ROW)
        self.kv_a_layernorm = RMSNorm(rank, config)


class Indexer(nn.Module):
    """`attention_backend/sparse/dsa.py`: not divided among ranks; only the queries are quantized."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model, plain = config.pretrained_config, {"quant_config": None, "dtype": torch.float32}
        size = model.index_head_dim
        self.wq_b = decoder_linear(config, model.index_n_heads * size, model.q_lora_rank, None)
        if RELEASE.name != "mid":
            self.wk = decoder_linear(config, size, model.hidden_size, None, **plain)
        self.weights_proj = decoder_linear(config, model.index_n_heads, model.hidden_size, None, **plain)
        self.k_norm = nn.LayerNorm(size)


class DeepseekV3Gate(nn.Module):
    """The router's weight, and a correction of its scores, which DeepSeek-V2 lacks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model = config.pretrained_config
        self.weight = frozen(model.n_routed_experts, model.hidden_size, dtype=config.torch_dtype)
        self.e_score_correction_bias = frozen(model.n_routed_experts, dtype=torch.float32)


class Deepseekv3MoE(nn.Module):
    """A plain router, routed experts, and a gated feed-forward part that is always used."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model = config.pretrained_config
        shared = copy(config)
        object.__setattr__(shared, "pretrained_config", copy(model))
        shared.pretrained_config.intermediate_size = model.moe_intermediate_size * model.n_shared_experts
        self.gate = DeepseekV3Gate(config)
        self.experts = MoE(
            num_experts=model.n_routed_experts,
            hidden_size=model.hidden_size,
            intermediate_size=model.moe_intermediate_size,
            top_k=model.num_experts_per_tok,
            renormalize=True,
            model_config=config,
            weight_loading_mode=MoEWeightLoadingMode.W4A8_CUSTOM
            if _has_int4_groups(config)
            else MoEWeightLoadingMode(0),
        )
        self.shared_experts = GatedMLP(shared)


def _on_one_rank(config: ModelConfig) -> ModelConfig:
    whole = copy(config)
    object.__setattr__(whole, "mapping", Mapping())
    return whole


def _has_int4_groups(config: ModelConfig) -> bool:
    """`is_int4_weight_only_per_group` of the experts; one layer's entry is taken for all."""
    entries = [config.quant_config, *(config.quant_config_dict or {}).values()]
    return any(str(entry.quant_algo) in {"W4A16_AWQ", "W4A8_AWQ"} for entry in entries)


class DecoderLayer(nn.Module):
    """One layer; the first `first_k_dense_replace` have no experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        model = config.pretrained_config
        assert config.quant_config.quant_algo != "MIXED_PRECISION", "MIXED_PRECISION is ambiguous"
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(model.hidden_size, config) for _ in range(2))
        self.self_attn = MLA(config)
        self.mlp = GatedMLP(config) if layer < model.first_k_dense_replace else Deepseekv3MoE(config)


class MTP(DecoderLayer):
    """A layer that drafts a token."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        width = config.pretrained_config.hidden_size
        self.eh_proj = decoder_linear(config, width, 2 * width, None)
        self.enorm, self.hnorm = RMSNorm(width, config), RMSNorm(width, config)


class DeepseekV3ForCausalLM(DecoderModelForCausalLM):
    """Layers and draft layers; every rank has the whole embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model_config = config
        model = config.pretrained_config
        first, stored = model.num_hidden_layers, getattr(model, "num_nextn_predict_layers", 0) or 0
        drafts = stored + 1 if stored else 0
        self.stored_layer = {first + at: first + at % stored for at in range(drafts)} if stored else {}
        excluded = config.quant_config.exclude_modules
        if excluded is not None:
            for layer, source in self.stored_layer.items():
                here, there = f"model.layers.{layer}", f"model.layers.{source}"
                excluded += [name.replace(there, here) for name in excluded if there in name and here not in name]
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            MTP(config, layer) if layer >= first else DecoderLayer(config, layer) for layer in range(first + drafts)
        )
        self.model.embed_tokens = Embedding(_on_one_rank(config))
        self.model.norm = RMSNorm(model.hidden_size, config)
        self.lm_head = decoder_linear(
            config, model.vocab_size, model.hidden_size, TensorParallelMode.COLUMN, quant_config=None
        )
        self.finish_construction()

    def load_weights(self, weights: Weights[str, Tensor], weight_mapper: Any = None) -> None:
        """Load by names, with q_a and kv_a joined, gate and up given one after the other, and experts renamed."""
        for name, module in self.named_modules():
            if module._parameters:
                self._load(self._stored_name(name.removesuffix(".backend")), module, weights)

    def _stored_name(self, name: str) -> str:
        for layer, source in self.stored_layer.items():
            name = name.replace(f"model.layers.{layer}.", f"model.layers.{source}.")
        return name

    def _load(self, name: str, module: Any, weights: Weights[str, Tensor]) -> None:
        around, _, leaf = name.rpartition(".")
        if leaf == "kv_a_proj_with_mqa":
            model = self.model_config.pretrained_config
            parts = [leaf] if model.q_lora_rank is None else ["q_a_proj", leaf]
            if RELEASE.name == "mid" and model.model_type in _INDEXED:
                parts.append("indexer.wk")
            _join([f"{around}.{part}" for part in parts], module, weights)
        elif leaf == "gate_up_proj":
            module.load_weights(weights=[_below(f"{around}.{part}", weights) for part in ("gate_proj", "up_proj")])
        elif leaf == "experts":
            module.load_weights(weights=[_renamed(_below(name, weights))])
        elif hasattr(module, "load_weights"):
            module.load_weights(weights=[_below(name, weights)])
        else:
            for parameter_name, parameter in module._parameters.items():
                parameter.data.copy_(weights[f"{name}.{parameter_name}"])


def _join(parts: list[str], module: Any, weights: Weights[str, Tensor]) -> None:
    """Copy joined weights, and scales that the last part has as `weight_scale_inv`; nothing else is read.

    Alike in all generations: commits 000561df and a43cf9e3, and the September text with NVFP4 beside it. Scales under
    another name leave the parameter as it was allocated.
    """
    if f"{parts[-1]}.weight_scale_inv" in weights:
        module.weight_scale.data.copy_(torch.cat([weights[f"{part}.weight_scale_inv"] for part in parts]))
    module.weight.data.copy_(torch.cat([weights[f"{part}.weight"] for part in parts]))


def _below(name: str, weights: Weights[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(name) + 1 :]: tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}


def _renamed(weights: Weights[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in weights.items():
        expert, projection, local = key.split(".")
        renamed[f"{expert}.{_PROJECTIONS[projection]}.{local}"] = tensor
    return renamed
