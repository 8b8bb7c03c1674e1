"""Imitates decoders that load their weights themselves, under names of their own; they compute nothing.

`modeling_hunyuan_moe.py` (047098b7), `_step3p7` (0c37d5ba), `_gpt_oss` (050b6cb9; NVFP4 of a later text) and `_mllama`
(000a01de).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tensorrt_llm._torch.model_config import PretrainedConfig
from tensorrt_llm._torch.models.modeling_decoder import Embedding, GatedMLP
from tensorrt_llm._torch.models.modeling_rows import (
    COLUMN,
    HunYuanDenseV1ForCausalLM,
    Norm,
    PlainDecoder,
    QKVAttention,
    asked_biases,
    experts,
    layer_of,
)
from tensorrt_llm._torch.models.modeling_utils import DecoderModelForCausalLM
from tensorrt_llm._torch.modules.attention import decoder_linear
from tensorrt_llm._torch.modules.fused_moe.interface import MoE, MoEWeightLoadingMode
from tensorrt_llm._torch.modules.linear import Linear
from tensorrt_llm._torch.modules.linear_methods import frozen
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.modeling_utils import QuantConfig
from torch import nn

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig
    from torch import Tensor

__all__ = [
    "GptOssForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "MllamaForConditionalGeneration",
    "Step3p7ForCausalLM",
]

Weights = dict[str, "Tensor"]
_NORMS = ("input_layernorm", "post_attention_layernorm")


class HunYuanMoEV1ForCausalLM(HunYuanDenseV1ForCausalLM):
    """The router is stored as `gate.wg`; experts are renamed for the backend CUTLASS only."""

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model = config.pretrained_config
        size = model.hidden_size // model.num_attention_heads
        attention = QKVAttention(config, **asked_biases(config), query_layernorm=size, key_layernorm=size)
        if layer < model.moe_layer_num_skipped:
            return layer_of(config, _NORMS, self_attn=attention, mlp=GatedMLP(config))
        mlp = nn.Module()
        mlp.gate = Linear(model.hidden_size, model.num_experts, bias=False, dtype=config.torch_dtype)
        model.num_experts_per_tok = model.moe_topk
        mlp.experts = experts(config, model.num_experts, model.moe_intermediate_size)
        mlp.shared_mlp = GatedMLP(config)
        return layer_of(config, _NORMS, self_attn=attention, mlp=mlp)

    def load_weights(self, weights: Any, weight_mapper: Any = None) -> None:
        renamed = {key.replace("mlp.gate.wg", "mlp.gate"): weights[key] for key in list(weights)}
        for name, module in self.named_modules():
            if isinstance(module, MoE) and module._parameters and module.moe_backend != "CUTLASS":
                below = [key for key in renamed if key.startswith(f"{name.removesuffix('.backend')}.")]
                assert not any("_proj" in key for key in below), "this backend reads w1, w3 and w2"
        super().load_weights(renamed)


class Step3p7ForCausalLM(PlainDecoder):
    """All but routed experts is plain; layers have different numbers of heads."""

    whole_table = True

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model, plain = config.pretrained_config, _with(config, QuantConfig())
        sliding = model.layer_types[layer] == "sliding_attention"
        heads = (model.attention_other_setting if sliding else vars(model))["num_attention_heads"]
        sizes = {"num_attention_heads": heads, "num_key_value_heads": model.num_attention_groups}
        here = _with(plain, plain.quant_config, PretrainedConfig(**{**vars(model), **sizes}))
        attention = QKVAttention(here, q_norm=model.head_dim, k_norm=model.head_dim)
        attention.g_proj = decoder_linear(config, heads, model.hidden_size, COLUMN, quant_config=None)
        if str(layer) not in model.moe_layers_enum.split(","):
            return layer_of(config, _NORMS, self_attn=attention, mlp=GatedMLP(plain))
        model.num_experts_per_tok = model.moe_top_k
        moe = nn.Module()
        moe.gate = Linear(model.hidden_size, model.moe_num_experts, bias=False, dtype=config.torch_dtype)
        moe.router_bias = _RouterBias(model.moe_num_experts)
        moe.experts = experts(config, model.moe_num_experts, model.moe_intermediate_size)
        share = GatedMLP(plain, model.share_expert_dim)
        return layer_of(config, _NORMS, self_attn=attention, moe=moe, share_expert=share)

    def load_weights(self, weights: Any, weight_mapper: Any, **kwargs: Any) -> None:
        """Split stacks of experts, and look at what the layers need that compute experts in Python."""
        given = {key: weights[key] for key in list(weights) if not key.endswith((".k_scale", ".v_scale"))}
        names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        for key in [key for key in given if ".moe." in key]:
            around, _, rest = key.partition(".moe.")
            projection, _, local = rest.partition(".")
            if projection in names:
                for expert, entry in enumerate(given.pop(key)):
                    given[f"{around}.moe.experts.{expert}.{names[projection]}.{local}"] = entry
        for key, tensor in given.items():
            if ".moe.experts." in key and key.endswith(".weight") and tensor.dtype == torch.uint8:
                assert {f"{key}_scale", f"{key}_scale_2"} <= given.keys(), "bytes are taken for NVFP4"
            elif ".moe.experts." in key and tensor.dtype == torch.float8_e4m3fn and key.endswith(".weight"):
                assert f"{key}_scale_inv" in given, "FP8 is taken for blocks"
        super().load_weights(given, weight_mapper, **kwargs)


class _RouterBias(nn.Module):
    """The only tensor below `moe.router_bias`, whatever the rest of its name is."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)

    def load_weights(self, weights: list[Weights]) -> None:
        (tensor,) = weights[0].values()
        self.router_bias.data.copy_(tensor)


def _with(config: ModelConfig, quant_config: QuantConfig, model: PretrainedConfig | None = None) -> ModelConfig:
    """A copy with another quantization of the whole model, and no entries."""
    pretrained = model or config.pretrained_config
    return dataclasses.replace(config, pretrained_config=pretrained, quant_config=quant_config, quant_config_dict=None)


class GptOssForCausalLM(DecoderModelForCausalLM):
    """Modules have other names than the files; experts are in stacks, and entries of layers are ignored."""

    names: ClassVar[dict[str, str]] = {
        "embedding": "embed_tokens",
        "attn.norm": "input_layernorm",
        "attn": "self_attn",
        "mlp.norm": "post_attention_layernorm",
        "block": "layers",
        "gate": "router",
    }
    ends: ClassVar[dict[str, str]] = {"qkv": "qkv_proj", "out": "o_proj", "unembedding": "lm_head"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model_config = config
        model = config.pretrained_config
        assert config.mapping.pp_size == 1
        self.model = nn.Module()
        self.model.embedding = self.model.embed_tokens = Embedding(config)
        self.model.block = nn.ModuleList(self._block(config) for _ in range(model.num_hidden_layers))
        self.model.norm = Norm(config, model.hidden_size)
        self.lm_head = decoder_linear(
            config, model.vocab_size, model.hidden_size, COLUMN, gather_output=True, quant_config=None
        )
        self.finish_construction()

    @staticmethod
    def _block(config: ModelConfig) -> nn.Module:
        model = config.pretrained_config
        attention = QKVAttention(config, bias=True, out_bias=True, norm=model.hidden_size)
        attention.sinks = _Sinks(config)
        mlp = nn.Module()
        mlp.norm = Norm(config, model.hidden_size)
        mlp.gate = Linear(model.hidden_size, model.num_local_experts, bias=True, dtype=config.torch_dtype)
        stacked = {"weight_loading_mode": MoEWeightLoadingMode.FUSED_GATE_UP_PROJ, "bias": True}
        mlp.experts = experts(config, model.num_local_experts, model.intermediate_size, **stacked)
        block = nn.Module()
        block.attn, block.mlp = attention, mlp
        return block

    def apply_layerwise_quant_config(self) -> None:
        """Entries are not looked at; exclusions get the prefix that they lack."""
        whole = self.model_config.quant_config
        if not whole.exclude_modules:
            return
        if whole.quant_algo == "NVFP4":
            whole.exclude_modules = [f"block.*.{name}" for name in ("attn.qkv", "attn.out", "mlp.gate")]
        for at, name in enumerate(whole.exclude_modules):
            *around, leaf = name.split(".")
            parts = [*around, self.ends.get(leaf, leaf)]
            whole.exclude_modules[at] = ".".join(parts if parts[0] == "model" else ["model", *parts])

    def load_weights(self, weights: Any, weight_mapper: Any = None) -> None:
        for name, module in list(self.named_modules()):
            if not module._parameters:
                continue
            stem = name.removesuffix(".backend")
            for inside, stored in self.names.items():
                stem = stem.replace(inside, stored)
            below = _below(stem, weights)
            if isinstance(module, MoE):
                module.load_weights([self._experts(below)])
            elif stem.endswith("qkv_proj"):
                module.load_weights(  # type: ignore[operator]
                    weights=[_below(stem.replace("qkv_proj", part), weights) for part in ("q_proj", "k_proj", "v_proj")]
                )
            elif hasattr(module, "load_weights"):
                module.load_weights(weights=[below])
            else:
                for parameter_name, parameter in module._parameters.items():
                    if parameter is not None:
                        parameter.data.copy_(below[parameter_name])

    def _experts(self, weights: Weights) -> dict[str, Any]:
        """The rows of gate and up, which alternate, one after the other; a missing stack raises KeyError."""
        dtype = self.model_config.torch_dtype
        whole = {name: weights[name].to(dtype) for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj")}
        parts = {name: torch.cat([whole[name][..., ::2], whole[name][..., 1::2]], dim=-1) for name in [*whole][:2]}
        return {
            "gate_up_proj": parts["gate_up_proj"],
            "gate_up_proj.bias": parts["gate_up_proj_bias"],
            "down_proj": whole["down_proj"],
            "down_proj.bias": weights["down_proj_bias"],
        }


class _Sinks(nn.Module):
    """One number for each head of this rank; a parameter of attention itself in the class."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mapping = config.mapping
        self.sinks = frozen(config.pretrained_config.num_attention_heads // self.mapping.tp_size, dtype=torch.float32)

    def load_weights(self, weights: list[Weights]) -> None:
        (tensor,) = weights[0].values()
        self.sinks.data.copy_(tensor.chunk(self.mapping.tp_size)[self.mapping.tp_rank])


def _below(prefix: str, weights: Any) -> Weights:
    return {key[len(prefix) + 1 :]: weights[key] for key in list(weights) if key.startswith(prefix)}


class MllamaForConditionalGeneration(nn.Module):
    """No layers of cross-attention; Linears allocate at once in the global mode, and nothing is excluded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model_config = config
        outer = config.pretrained_config
        text = PretrainedConfig(**({"tie_word_embeddings": False} | outer.text_config))
        inner = dataclasses.replace(config, pretrained_config=text)
        body = nn.Module()
        whole = dataclasses.replace(
            inner,
            mapping=Mapping(),
            pretrained_config=PretrainedConfig(**{**vars(text), "vocab_size": text.vocab_size + 8}),
        )
        body.embed_tokens = Embedding(whole)
        numbers = range(text.num_hidden_layers)
        body.layers = nn.ModuleDict(
            {str(number): self._layer(inner) for number in numbers if number not in text.cross_attention_layers}
        )
        body.norm = Norm(inner, text.hidden_size)
        self.language_model = nn.Module()
        self.language_model.model = body
        self.language_model.lm_head = Linear(
            text.hidden_size,
            text.vocab_size,
            bias=False,
            dtype=inner.torch_dtype,
            mapping=inner.mapping,
            tensor_parallel_mode=COLUMN,
            gather_output=True,
        )
        width = outer.vision_config["vision_output_dim"]
        self.multi_modal_projector = nn.Linear(width, text.hidden_size, dtype=inner.torch_dtype)
        self.text = text

    @property
    def config(self) -> Any:
        return self.text

    @staticmethod
    def _layer(config: ModelConfig) -> nn.Module:
        layer = layer_of(config, _NORMS, self_attn=QKVAttention(config), mlp=GatedMLP(config))
        for module in layer.modules():
            if isinstance(module, Linear):
                module.create_weights()
        return layer

    def load_weights(self, weights: Any, weight_mapper: Any = None) -> None:
        fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        for name, module in list(self.named_modules()):
            if not module._parameters:
                continue
            around, _, leaf = name.rpartition(".")
            if leaf in fused:
                parts = [_below(f"{around}.{part}", weights) for part in fused[leaf]]
                module.load_weights(weights=parts)  # type: ignore[operator]
            elif hasattr(module, "load_weights"):
                module.load_weights(weights=[_below(name, weights)])
            else:
                for parameter_name, parameter in module._parameters.items():
                    if parameter is not None:
                        parameter.data.copy_(_below(name, weights)[parameter_name])
