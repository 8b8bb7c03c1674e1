"""Imitates `_torch/models/modeling_deepseekv4.py` (02586bf0): names, exclusions and loading; it computes nothing.

Keys of the files are renamed only if some begin with `layers.`. Sizes that the class fixes are left free.
"""

from __future__ import annotations

import re
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._torch.models.modeling_decoder import Embedding
from tensorrt_llm._torch.models.modeling_rows import COLUMN, ROW, Norm, _below, _mlp_of_some_ranks, _on_one_rank
from tensorrt_llm._torch.models.modeling_utils import DecoderModelForCausalLM
from tensorrt_llm._torch.modules.attention import decoder_linear
from tensorrt_llm._torch.modules.fused_moe.interface import MoE, create_moe
from tensorrt_llm._torch.modules.linear_methods import frozen
from tensorrt_llm.quantization import QuantAlgo
from torch import nn

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig
    from torch import Tensor

__all__ = ["DeepseekV4ForCausalLM"]

_LINEARS = {"wq_a": "q_a_proj", "wq_b": "q_b_proj", "wkv": "kv_a_proj_with_mqa", "wo_b": "o_b_proj"}
_ATTENTION = _LINEARS | {"q_norm": "q_a_layernorm", "kv_norm": "kv_a_layernorm"}
_SHARED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
}


class Compressor(nn.Module):
    """Both projections in one plain Linear."""

    def __init__(self, config: ModelConfig, size: int, ratio: int) -> None:
        super().__init__()
        overlap = 2 if ratio == 4 else 1
        hidden = config.pretrained_config.hidden_size
        self.wkv_gate = decoder_linear(config, 2 * overlap * size, hidden, None, quant_config=None)
        self.norm = Norm(config, size)
        self.ape = frozen(ratio, overlap * size, dtype=torch.float32)


class Indexer(nn.Module):
    """Queries are quantized; `wk` is never used, and the loader makes it."""

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        super().__init__()
        model = config.pretrained_config
        size = model.index_head_dim
        self.wq_b = decoder_linear(config, model.index_n_heads * size, model.q_lora_rank, None)
        self.weights_proj = decoder_linear(config, model.index_n_heads, model.hidden_size, None, quant_config=None)
        self.wk = decoder_linear(config, size, model.hidden_size, None, quant_config=None)
        self.compressor = Compressor(config, size, ratio)


class Attention(nn.Module):
    """Queries and K/V have a joined first projection; the output has two, of which the first is in groups."""

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        super().__init__()
        model, ranks = config.pretrained_config, config.mapping.tp_size
        rows = model.num_attention_heads * model.head_dim
        self.kv_a_proj_with_mqa = decoder_linear(config, model.q_lora_rank + model.head_dim, model.hidden_size, None)
        self.q_b_proj = decoder_linear(config, rows, model.q_lora_rank, COLUMN)
        self.o_b_proj = decoder_linear(config, model.hidden_size, model.o_groups * model.o_lora_rank, ROW)
        self.q_a_layernorm = Norm(config, model.q_lora_rank)
        self.kv_a_layernorm = Norm(config, model.head_dim)
        self.groups = model.o_groups // ranks
        shape = (self.groups * model.o_lora_rank, rows // model.o_groups)
        self.o_a_proj = frozen(*shape, dtype=config.torch_dtype)
        self.attn_sink = frozen(model.num_attention_heads // ranks, dtype=torch.float32)
        if ratio > 1:
            self.compressor = Compressor(config, model.head_dim, ratio)
        if ratio == 4:
            self.indexer = Indexer(config, ratio)


class Gate(nn.Module):
    """A plain router; the first layers have a table of tokens instead of a correction."""

    def __init__(self, config: ModelConfig, *, hashed: bool) -> None:
        super().__init__()
        model = config.pretrained_config
        self.weight = frozen(model.n_routed_experts, model.hidden_size, dtype=config.torch_dtype)
        if hashed:
            shape = (model.vocab_size, model.num_experts_per_tok)
            self.tid2eid = nn.Parameter(torch.full(shape, -1, dtype=torch.int32), requires_grad=False)
        else:
            self.e_score_correction_bias = frozen(model.n_routed_experts, dtype=torch.float32)

    def load_weights(self, weights: list[dict[str, Tensor]]) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not None:
                parameter.data.copy_(weights[0][name])


class HyperConnection(nn.Module):
    """Three parameters, which the files have under names without a dot."""

    def __init__(self, streams: int, width: int, scales: int) -> None:
        super().__init__()
        self.fn = frozen(streams, width, dtype=torch.float32)
        self.base = frozen(streams, dtype=torch.float32)
        self.scale = frozen(scales, dtype=torch.float32)


class DecoderLayer(nn.Module):
    """Every layer has experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        model = config.pretrained_config
        assert config.quant_config.quant_algo != "MIXED_PRECISION", "MIXED_PRECISION is ambiguous"
        streams, width = (2 + model.hc_mult) * model.hc_mult, model.hc_mult * model.hidden_size
        self.hc_attn, self.hc_ffn = (HyperConnection(streams, width, 3) for _ in range(2))
        self.self_attn = Attention(config, model.compress_ratios[layer])
        self.mlp = nn.Module()
        self.mlp.gate = Gate(config, hashed=layer < model.num_hash_layers)
        self.mlp.experts = create_moe(
            num_experts=model.n_routed_experts,
            hidden_size=model.hidden_size,
            intermediate_size=model.moe_intermediate_size,
            top_k=model.num_experts_per_tok,
            renormalize=True,
            model_config=config,
        )
        self.mlp.shared_experts = _mlp_of_some_ranks(config, model.moe_intermediate_size)
        assert gcd(model.o_groups, config.mapping.tp_size) == config.mapping.tp_size
        self.input_layernorm, self.post_attention_layernorm = (Norm(config, model.hidden_size) for _ in range(2))


class DeepseekV4ForCausalLM(DecoderModelForCausalLM):
    """The model of a rank, without draft layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model_config = config
        model = config.pretrained_config
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(_on_one_rank(config))
        self.model.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(model.num_hidden_layers))
        self.model.norm = Norm(config, model.hidden_size)
        self.model.hc_head = HyperConnection(model.hc_mult, model.hc_mult * model.hidden_size, 1)
        self.lm_head = decoder_linear(
            config, model.vocab_size, model.hidden_size, COLUMN, gather_output=True, quant_config=None
        )
        self.finish_construction()

    def load_weights(self, weights: Any, weight_mapper: Any = None) -> None:
        given = {key: weights[key] for key in list(weights)}
        if any(key == "embed.weight" or key.startswith("layers.") for key in given):
            given = _renamed(given)
            for name, parameter in self.named_parameters():
                if name.endswith("indexer.wk.weight"):
                    given[name] = torch.zeros_like(parameter)
        for name, module in self.named_modules():
            if module._parameters:
                self._load(name.removesuffix(".backend"), module, given)

    def _load(self, name: str, module: Any, weights: dict[str, Tensor]) -> None:
        around, _, leaf = name.rpartition(".")
        mapping = self.model_config.mapping
        if isinstance(module, Attention):
            rows = weights[f"{name}.o_a_proj"]
            assert rows.dtype != torch.float8_e4m3fn
            module.o_a_proj.data.copy_(rows.chunk(mapping.tp_size)[mapping.tp_rank])
            module.attn_sink.data.copy_(weights[f"{name}.attn_sink"].chunk(mapping.tp_size)[mapping.tp_rank])
            assert module.o_b_proj.quant_config.quant_algo != QuantAlgo.FP8_BLOCK_SCALES
        elif leaf == "kv_a_proj_with_mqa":
            parts = [f"{around}.q_a_proj", name]
            if f"{name}.weight_scale_inv" in weights:
                module.weight_scale.data.copy_(torch.cat([weights[f"{part}.weight_scale_inv"] for part in parts]))
            module.weight.data.copy_(torch.cat([weights[f"{part}.weight"] for part in parts]))
        elif leaf == "gate_up_proj":
            module.load_weights(weights=[_below(f"{around}.{part}", weights) for part in ("gate_proj", "up_proj")])
        elif isinstance(module, HyperConnection):
            for local, parameter in module._parameters.items():
                parameter.data.copy_(weights[f"{name}_{local}"])  # type: ignore[union-attr]
        elif isinstance(module, MoE) or hasattr(module, "load_weights"):
            module.load_weights(weights=[_below(name, weights)])
        else:
            for local, parameter in module._parameters.items():
                if parameter is not None:
                    parameter.data.copy_(weights[f"{name}.{local}"])


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The engine's keys for those that DeepSeek published; both parts of each compressor in one."""
    packed = any(
        re.fullmatch(r"layers\.\d+\.ffn\.experts\.\d+\.w\d\.weight", key) and tensor.dtype == torch.uint8
        for key, tensor in weights.items()
    )
    result: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        new = _TOP.get(key) or (f"model.{key}" if key.startswith("hc_head_") else key)
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
        if layer is not None:
            new = f"model.layers.{layer[1]}.{_in_layer(layer[2])}"
        if packed and ".mlp.experts." in new and new.endswith((".weight", ".weight_scale")):
            result[new] = tensor.view(torch.uint8)
        else:
            result[new] = tensor
    for key in [key for key in result if key.endswith(".wkv.weight") and ".compressor." in key]:
        gate = result.pop(key.replace(".wkv.", ".wgate."))
        result[key.replace(".wkv.", ".wkv_gate.")] = torch.cat([result.pop(key), gate])
    return result


def _in_layer(rest: str) -> str:
    """One key within a layer; only `.scale` is known among scales."""
    head, _, tail = rest.partition(".")
    if head in {"attn_norm", "ffn_norm"}:
        return f"{'input_layernorm' if head == 'attn_norm' else 'post_attention_layernorm'}.{tail}"
    if head == "attn":
        part, _, local = tail.partition(".")
        if tail == "wo_a.weight":
            return "self_attn.o_a_proj"
        return f"self_attn.{_ATTENTION.get(part, part)}{'.' if local else ''}{local}"
    if head == "ffn":
        shared = re.fullmatch(r"shared_experts\.(w\d)\.(.+)", tail)
        tail = f"shared_experts.{_SHARED[shared[1]]}.{shared[2]}" if shared else tail
        return "mlp." + tail.replace("gate.bias", "gate.e_score_correction_bias")
    return rest
