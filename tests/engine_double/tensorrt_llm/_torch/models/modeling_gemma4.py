"""Imitates `modeling_gemma4.py` (00e7d103), `modeling_gemma4mm.py` (001a6a01), `modeling_gemma4_unified.py` (1c0067ee).

Layers differ in the size and number of heads; some have no keys and values, for which a Linear of queries alone is
built plain. The mapper is the stricter text of `checkpoints/hf/gemma4_weight_mapper.py` (7ed07f06): it copies only
`weight` of k_proj to v_proj and knows no names of single experts; 1c58b177 does both.
"""

from __future__ import annotations

import re
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper
from tensorrt_llm._torch.models.modeling_decoder import Embedding, GatedMLP
from tensorrt_llm._torch.models.modeling_rows import COLUMN, ROW, Norm, PlainDecoder, experts, layer_of
from tensorrt_llm._torch.models.modeling_utils import register_mapper
from tensorrt_llm._torch.models.modeling_wrappers import Wrapper
from tensorrt_llm._torch.modules.attention import decoder_linear
from tensorrt_llm._torch.modules.awq_methods import W4A8_AWQ_LinearMethod, W4A16_AWQ_LinearMethod
from tensorrt_llm._torch.modules.linear import Linear, WeightMode, WeightsLoadingConfig
from tensorrt_llm._torch.modules.linear_methods import frozen
from tensorrt_llm.quantization import QuantAlgo
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorrt_llm._torch.model_config import ModelConfig
    from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import Weights
    from torch import Tensor

__all__ = ["Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"]

_LANGUAGE = "model.language_model."
_LAYER = r"(model\.layers\.\d+)\."


@register_mapper("HF", "Gemma4ForCausalLM")
@register_mapper("HF", "Gemma4ForConditionalGeneration")
@register_mapper("HF", "Gemma4UnifiedForConditionalGeneration")
class Gemma4HfWeightMapper(HfWeightMapper):
    """Renames routers and stacks of experts, copies k_proj, and counts K/V heads by rows."""

    def preprocess_weights(self, weights: Weights) -> Weights:  # type: ignore[override]
        if any(key.startswith(_LANGUAGE) for key in list(weights)[:20]):
            weights = {_without_prefix(key): value for key, value in weights.items()}
        renamed: Weights = {}
        for key, value in weights.items():
            renamed |= _of_moe(key, value)
        for key in [key for key in renamed if key.endswith(".layer_scalar")]:
            self._model.model.layers[int(key.split(".")[2])].layer_scalar.copy_(renamed.pop(key))
        if getattr(self._model.config, "attention_k_eq_v", False):
            for layer, kind in enumerate(self._model.config.layer_types):
                keys, values = (f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "kv")
                if kind == "full_attention" and keys in renamed:
                    renamed.setdefault(values, renamed[keys])
        return renamed

    def apply_callbacks(self, module: Any, module_name: str, module_names_breakdown: list[str], weights: Any) -> Any:
        if "self_attn" not in module_names_breakdown:
            return super().apply_callbacks(module, module_name, module_names_breakdown, weights)
        size = self._model.get_submodule(".".join(module_names_breakdown)).head_dim
        parts = []
        for name in self.mapping[module_name]:
            part = self.filter_weights(".".join([*module_names_breakdown, name]), weights)
            parts.append(self._repeated(module, part, size) if name != "q_proj" and "weight" in part else part)
        return parts

    def _repeated(self, module: Any, weights: Weights, size: int) -> Weights:
        """Upstream's method of W4A8_AWQ is no subclass of that of W4A16_AWQ."""
        method = module.quant_method
        halves = isinstance(method, W4A16_AWQ_LinearMethod) and not isinstance(method, W4A8_AWQ_LinearMethod)
        heads = weights["weight"].shape[0] * (1 + halves) // size
        nvfp4 = module.quant_config is not None and module.quant_config.quant_mode.algo == QuantAlgo.NVFP4
        keys = {"weight", "bias"} | ({"weight_scale"} if nvfp4 else set())
        return {key: _repeat(value, heads, self._tp_size) if key in keys else value for key, value in weights.items()}


def _repeat(value: Tensor, heads: int, ranks: int) -> Tensor:
    """`HfWeightMapper._duplicate_kv`."""
    if heads >= ranks:
        assert heads % ranks == 0
        return value
    assert ranks % heads == 0
    return value.unflatten(0, (heads, -1)).repeat_interleave(ranks // heads, dim=0).flatten(0, 1)


def _without_prefix(key: str) -> str:
    return "model." + key[len(_LANGUAGE) :] if key.startswith(_LANGUAGE) else key


def _of_moe(key: str, value: Tensor) -> Weights:
    """`_remap_moe_keys`; names inside of `moe` are passed on."""
    if match := re.fullmatch(_LAYER + r"router\.per_expert_scale", key):
        return {f"{match[1]}.moe.per_expert_scale": value}
    if match := re.fullmatch(_LAYER + r"experts\.gate_up_proj", key):
        halves = zip(("w1", "w3"), value.chunk(2, dim=1), strict=True)
        return {f"{match[1]}.moe.experts.{e}.{name}.weight": one for name, half in halves for e, one in enumerate(half)}
    if match := re.fullmatch(_LAYER + r"experts\.down_proj", key):
        return {f"{match[1]}.moe.experts.{e}.w2.weight": value[e] for e in range(len(value))}
    return {re.sub(_LAYER + r"router\.", r"\1.moe.router.", key): value}


class _QOnlyLinear(Linear):
    """Takes the first of three parts."""

    def load_weights(self, weights: Any, **kwargs: Any) -> None:
        super().load_weights(weights[:1], **kwargs)


class Gemma4Attention(nn.Module):
    """Heads of the size and number of the layer's kind."""

    def __init__(self, config: ModelConfig, layer: int, *, shared: bool) -> None:
        super().__init__()
        model, ranks = config.pretrained_config, config.mapping.tp_size
        sliding = model.layer_types[layer] == "sliding_attention"
        self.head_dim = model.head_dim if sliding else model.global_head_dim
        kv_heads = model.num_key_value_heads
        if not sliding and getattr(model, "attention_k_eq_v", False):
            kv_heads = getattr(model, "num_global_key_value_heads", None) or kv_heads
        queries = model.num_attention_heads * self.head_dim
        if shared:
            arguments = {"bias": False, "dtype": config.torch_dtype, "skip_create_weights_in_init": True}
            self.qkv_proj = _QOnlyLinear(
                model.hidden_size, queries, mapping=config.mapping, tensor_parallel_mode=COLUMN, **arguments
            )
        else:
            self.qkv_proj = decoder_linear(
                config,
                queries + 2 * max(kv_heads, ranks) * self.head_dim,
                model.hidden_size,
                COLUMN,
                weights_loading_config=WeightsLoadingConfig(weight_mode=WeightMode.FUSED_QKV_LINEAR),
            )
            self.k_norm = Norm(config, self.head_dim)
        self.q_norm = Norm(config, self.head_dim)
        self.o_proj = decoder_linear(config, model.hidden_size, queries, ROW)


class Gemma4Router(nn.Module):
    """A plain Linear and a scale of its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model = config.pretrained_config
        self.scale = frozen(model.hidden_size, dtype=config.torch_dtype)
        self.proj = Linear(model.hidden_size, model.num_experts, bias=False, dtype=config.torch_dtype)


class Gemma4MoE(nn.Module):
    """Router and experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model = config.pretrained_config
        self.router = Gemma4Router(config)
        self.per_expert_scale = frozen(model.num_experts, dtype=config.torch_dtype)
        model.num_experts_per_tok = model.top_k_experts
        self.experts = experts(config, model.num_experts, model.moe_intermediate_size)


class Gemma4ForCausalLM(PlainDecoder):
    """Experts beside the MLP, and inputs for each layer, if config.json asks for them."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.mapping.pp_size == 1, "Gemma4 does not support pipeline parallelism"
        super().__init__(config)
        model = config.pretrained_config
        width = getattr(model, "hidden_size_per_layer_input", 0)
        if width:
            columns = model.num_hidden_layers * width
            self.model.embed_tokens_per_layer = Embedding(_table(config, model.vocab_size_per_layer_input, columns))
            self.model.per_layer_model_projection = _plain(config, model.hidden_size, columns)
            self.model.per_layer_projection_norm = Norm(config, width)

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model = config.pretrained_config
        first = model.num_hidden_layers - getattr(model, "num_kv_shared_layers", 0)
        shared = layer >= first > 0
        inner = model.intermediate_size * (1 + (shared and getattr(model, "use_double_wide_mlp", False)))
        names = [f"{place}_layernorm" for place in ("post_attention", "pre_feedforward", "post_feedforward")]
        parts: dict[str, nn.Module] = {}
        if getattr(model, "enable_moe_block", False):
            parts["moe"] = Gemma4MoE(config)
            names += [f"{place}_feedforward_layernorm_{at}" for place, at in (("post", 1), ("post", 2), ("pre", 2))]
        width = getattr(model, "hidden_size_per_layer_input", 0)
        if width:
            parts["per_layer_input_gate"] = _plain(config, model.hidden_size, width)
            parts["per_layer_projection"] = _plain(config, width, model.hidden_size)
            names.append("post_per_layer_input_norm")
        attention = Gemma4Attention(config, layer, shared=shared)
        result = layer_of(
            config, ("input_layernorm", *names), self_attn=attention, mlp=GatedMLP(config, inner), **parts
        )
        result.register_buffer("layer_scalar", torch.ones(1))
        return result

    def load_weights(self, weights: Any, weight_mapper: Any, **kwargs: Any) -> None:
        given = {key: weights[key] for key in list(weights)}
        super().load_weights(weight_mapper.preprocess_weights(given), weight_mapper, **kwargs)


def _plain(config: ModelConfig, columns: int, rows: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, dtype=config.torch_dtype).requires_grad_(False)


def _table(config: ModelConfig, rows: int, columns: int) -> Any:
    like, changed = copy(config), copy(config.pretrained_config)
    changed.vocab_size, changed.hidden_size = rows, columns
    like.pretrained_config = changed
    return like


class Gemma4ForConditionalGeneration(Wrapper):
    """Hands on the keys below `model.language_model.` only, and adds the names inside to what is excluded."""

    text_class = Gemma4ForCausalLM
    mapper_class = Gemma4HfWeightMapper
    vision = ("model.vision_tower.", "model.embed_vision.")

    def text_quant_config(self, config: Any) -> Any:
        if config.exclude_modules:
            config = copy(config)
            inside = [_without_prefix(name) for name in config.exclude_modules]
            config.exclude_modules = [*config.exclude_modules, *inside]
        return config

    def text_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_without_prefix(key): tensor for key, tensor in weights.items() if key.startswith(_LANGUAGE)}


class Gemma4UnifiedForConditionalGeneration(Gemma4ForConditionalGeneration):
    """No towers, but embedders."""

    vision = ("model.vision_embedder.", "model.embed_vision.")
