"""Imitates decoders that differ in names, allocation and loading; they compute nothing.

`modeling_seedoss.py` (22de8b34), `_exaone4` (17eae74d), `_nemotron` (000a01de), `_starcoder2` (65b31db1), `_cohere2`
(231ddefa), `_hunyuan_dense` (06d811a9), `_glm` (8f5bb1e0), `_minimaxm2` (00592717), `_laguna` (01dcc21a), `_afmoe`
(038cc86c) and `_nemotron_h` (00620eb0). An excluded Linear that was allocated in `__init__` stays as it is, as in all
versions of `modeling_utils.py` but the newest.
"""

from __future__ import annotations

import dataclasses
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.models.checkpoints.hf.decoder_weight_mappers import (
    AfmoeHfWeightMapper,
    LagunaHfWeightMapper,
    NemotronHHfWeightMapper,
)
from tensorrt_llm._torch.models.modeling_decoder import Embedding, GatedMLP
from tensorrt_llm._torch.models.modeling_utils import DecoderModelForCausalLM, compute_in_bfloat16
from tensorrt_llm._torch.models.modeling_wrappers import Qwen3VLModel
from tensorrt_llm._torch.modules.attention import decoder_linear
from tensorrt_llm._torch.modules.fused_moe.interface import MoE, create_moe
from tensorrt_llm._torch.modules.linear import Linear, TensorParallelMode, WeightMode, WeightsLoadingConfig
from tensorrt_llm._torch.modules.linear_methods import frozen
from tensorrt_llm.mapping import Mapping
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorrt_llm._torch.model_config import ModelConfig
    from torch import Tensor

__all__ = [
    "AfmoeForCausalLM",
    "Cohere2ForCausalLM",
    "Exaone4ForCausalLM",
    "Exaone4_5ForConditionalGeneration",
    "Glm4MoeForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "LagunaForCausalLM",
    "MiniMaxM2ForCausalLM",
    "NemotronForCausalLM",
    "NemotronHForCausalLM",
    "PlainDecoder",
    "Starcoder2ForCausalLM",
    "asked_biases",
]

COLUMN, ROW = TensorParallelMode.COLUMN, TensorParallelMode.ROW
Weights = dict[str, "Tensor"]


class Norm(nn.Module):
    """A weight and perhaps a bias, copied by name; not divided."""

    def __init__(self, config: ModelConfig, size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = frozen(size, dtype=config.torch_dtype)
        self.bias = frozen(size, dtype=config.torch_dtype) if bias else None


class QKVAttention(nn.Module):
    """q, k and v in one Linear; `gate` rows follow those of each head's queries."""

    def __init__(
        self, config: ModelConfig, *, bias: bool = False, out_bias: bool = False, gate: bool = False, **norms: int
    ) -> None:
        super().__init__()
        model, ranks = config.pretrained_config, config.mapping.tp_size
        size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        heads, kv_heads = model.num_attention_heads, max(model.num_key_value_heads, ranks)
        self.qkv_proj = decoder_linear(
            config,
            (heads * (1 + gate) + 2 * kv_heads) * size,
            model.hidden_size,
            COLUMN,
            bias=bias,
            weights_loading_config=WeightsLoadingConfig(weight_mode=WeightMode.FUSED_QKV_LINEAR),
        )
        self.o_proj = decoder_linear(config, model.hidden_size, heads * size, ROW, bias=out_bias)
        for name, width in norms.items():
            self.add_module(name, Norm(config, width))


def asked_biases(config: ModelConfig) -> dict[str, bool]:
    """Biases of attention as config.json says; classes that don't ask have none."""
    biased = bool(getattr(config.pretrained_config, "attention_bias", False))
    return {"bias": biased, "out_bias": biased}


class MLP(nn.Module):
    """`up_proj` and `down_proj`."""

    def __init__(self, config: ModelConfig, inner: int, bias: bool = False) -> None:
        super().__init__()
        hidden = config.pretrained_config.hidden_size
        self.up_proj = decoder_linear(config, inner, hidden, COLUMN, bias=bias)
        self.down_proj = decoder_linear(config, hidden, inner, ROW, bias=bias)


class Router(nn.Module):
    """A bare parameter, which is never quantized, and a correction of its scores."""

    def __init__(self, config: ModelConfig, experts: int, *, corrected: bool = True) -> None:
        super().__init__()
        self.weight = frozen(experts, config.pretrained_config.hidden_size, dtype=config.torch_dtype)
        if corrected:
            self.e_score_correction_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)

    def load_weights(self, weights: list[Weights]) -> None:
        for name in self._parameters:
            if name in weights[0]:
                getattr(self, name).data.copy_(weights[0][name])


def experts(config: ModelConfig, count: int, inner: int, **more: Any) -> MoE:
    model = config.pretrained_config
    return create_moe(
        num_experts=count,
        hidden_size=model.hidden_size,
        intermediate_size=inner,
        top_k=model.num_experts_per_tok,
        renormalize=True,
        model_config=config,
        **more,
    )


def layer_of(config: ModelConfig, norms: tuple[str, ...], bias: bool = False, **parts: nn.Module) -> nn.Module:
    layer = nn.Module()
    for name in norms:
        layer.add_module(name, Norm(config, config.pretrained_config.hidden_size, bias))
    for name, part in parts.items():
        layer.add_module(name, part)
    return layer


_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")


class PlainDecoder(DecoderModelForCausalLM):
    """SeedOss: the stock mapper, embeddings divided among ranks."""

    whole_table = False
    norm_bias = False
    norm_name = "norm"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model_config = config
        model = config.pretrained_config
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(_on_one_rank(config) if self.whole_table else config)
        layers = range(self.layer_count(config))
        self.model.layers = nn.ModuleList(self.layer(config, layer) for layer in layers)
        self.model.add_module(self.norm_name, Norm(config, model.hidden_size, self.norm_bias))
        self.lm_head = decoder_linear(
            config, model.vocab_size, model.hidden_size, COLUMN, gather_output=True, quant_config=None
        )
        self.finish_construction()
        if model.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def layer_count(self, config: ModelConfig) -> int:
        count: int = config.pretrained_config.num_hidden_layers
        return count

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model = config.pretrained_config
        if model.model_type == "seed_oss":
            attention = QKVAttention(config, bias=model.attention_bias, out_bias=model.attention_out_bias)
            return layer_of(config, _PRE_NORMS, self_attn=attention, mlp=GatedMLP(config))
        size = model.hidden_size // model.num_attention_heads
        attention = QKVAttention(config, q_norm=size, k_norm=size)
        names = ("post_attention_layernorm", "post_feedforward_layernorm")
        return layer_of(config, names, self_attn=attention, mlp=GatedMLP(config))


def _on_one_rank(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, mapping=Mapping())


class Exaone4ForCausalLM(PlainDecoder):
    """`modeling_exaone4.py` (17eae74d): as SeedOss, and always in bfloat16."""

    def __init__(self, config: ModelConfig) -> None:
        compute_in_bfloat16(config.pretrained_config)
        super().__init__(config)


class Exaone4_5ForConditionalGeneration(Qwen3VLModel):  # noqa: N801 (upstream's name)
    """`modeling_exaone4_5.py` (0050262c): Exaone 4 beside a tower; its mapper takes off the prefix."""

    text_class = Exaone4ForCausalLM


class NemotronForCausalLM(PlainDecoder):
    """No gate; every rank has all embeddings, and norms have biases."""

    whole_table = norm_bias = True

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model = config.pretrained_config
        mlp = MLP(config, model.intermediate_size, getattr(model, "mlp_bias", False))
        return layer_of(config, _PRE_NORMS, bias=True, self_attn=QKVAttention(config, **asked_biases(config)), mlp=mlp)


class Starcoder2ForCausalLM(PlainDecoder):
    """The MLP has other names in the files; the class itself renames it, without the mapper."""

    norm_bias = True

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model = config.pretrained_config
        attention = QKVAttention(config, bias=model.use_bias, out_bias=model.use_bias)
        mlp = MLP(config, model.intermediate_size, model.use_bias)
        return layer_of(config, _PRE_NORMS, bias=True, self_attn=attention, mlp=mlp)

    def load_weights(self, weights: Any, weight_mapper: Any, **kwargs: Any) -> None:
        names = {".mlp.c_fc.": ".mlp.up_proj.", ".mlp.c_proj.": ".mlp.down_proj."}
        renamed = {}
        for key in list(weights):
            old = next((name for name in names if name in key), "")
            renamed[key.replace(old, names[old]) if old else key] = weights[key]
        super().load_weights(renamed, weight_mapper, **kwargs)


class _OwnLoader(PlainDecoder):
    """Loads by names, without a mapper; a missing tensor raises KeyError."""

    fused: ClassVar[dict[str, tuple[str, ...]]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def part(self, name: str, weights: Weights) -> Weights:
        """One part of a fused Linear, by its name."""
        return weights

    def load_weights(self, weights: Any, weight_mapper: Any = None) -> None:
        for name, module in list(self.named_modules()):
            if not module._parameters or (self.config.tie_word_embeddings and name.startswith("lm_head")):
                continue
            *around, leaf = name.removesuffix(".backend").split(".")
            if leaf in self.fused:
                parts = [self.part(part, _below(".".join([*around, part]), weights)) for part in self.fused[leaf]]
                module.load_weights(weights=parts)  # type: ignore[operator]
            elif isinstance(module, MoE):
                module.load_weights([_experts_renamed(_below(".".join([*around, leaf]), weights))])
            elif hasattr(module, "load_weights"):
                module.load_weights(weights=[_below(name, weights)])
            else:
                for parameter_name, parameter in module._parameters.items():
                    if parameter is not None:
                        parameter.data.copy_(_below(name, weights)[parameter_name])


def _below(prefix: str, weights: Any) -> Weights:
    return {key[len(prefix) + 1 :]: weights[key] for key in list(weights) if key.startswith(prefix)}


def _experts_renamed(weights: Weights) -> Weights:
    names = {"down_proj": "w2", "up_proj": "w3", "gate_proj": "w1"}
    renamed = {}
    for key, value in weights.items():
        for old, new in names.items():
            key = key.replace(old, new)  # noqa: PLW2901
        renamed[key] = value
    return renamed


class _EarlyMLP(nn.Module):
    """Three Linears that allocate at once, in the global mode."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model, now = config.pretrained_config, {"skip_create_weights_in_init": False}
        self.gate_proj = decoder_linear(config, model.intermediate_size, model.hidden_size, COLUMN, **now)
        self.up_proj = decoder_linear(config, model.intermediate_size, model.hidden_size, COLUMN, **now)
        self.down_proj = decoder_linear(config, model.hidden_size, model.intermediate_size, ROW, **now)


class Cohere2ForCausalLM(_OwnLoader):
    """Gate and up are not fused, and nothing repeats K and V."""

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        return layer_of(config, ("input_layernorm",), self_attn=QKVAttention(config), mlp=_EarlyMLP(config))


class HunYuanDenseV1ForCausalLM(_OwnLoader):
    """Counts K/V heads by the rows of each stored weight."""

    fused: ClassVar[dict[str, tuple[str, ...]]] = {**_OwnLoader.fused, "gate_up_proj": ("gate_proj", "up_proj")}

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        size = config.pretrained_config.head_dim
        attention = QKVAttention(config, **asked_biases(config), query_layernorm=size, key_layernorm=size)
        return layer_of(config, _PRE_NORMS, self_attn=attention, mlp=GatedMLP(config))

    def part(self, name: str, weights: Weights) -> Weights:
        ranks, size = self.model_config.mapping.tp_size, self.config.head_dim
        if name not in {"k_proj", "v_proj"}:
            return weights
        return {
            key: _repeat(value, value.shape[0] // size, ranks) if key in {"weight", "bias"} else value
            for key, value in weights.items()
        }


def _repeat(tensor: Tensor, heads: int, ranks: int) -> Tensor:
    """`duplicate_kv_weight` of `modeling_utils.py`."""
    if heads >= ranks:
        assert heads % ranks == 0, f"{heads} heads on {ranks} ranks"
        return tensor
    assert ranks % heads == 0, f"{heads} heads on {ranks} ranks"
    return tensor.unflatten(0, (heads, -1)).repeat_interleave(ranks // heads, dim=0).flatten(0, 1)


class Glm4MoeForCausalLM(_OwnLoader):
    """One mode for the whole model; dense and shared parts are divided among as many ranks as their blocks allow."""

    whole_table = True
    fused = HunYuanDenseV1ForCausalLM.fused

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model, whole = config.pretrained_config, config.quant_config
        assert whole.quant_algo != "MIXED_PRECISION", "MIXED_PRECISION is ambiguous"
        size = model.head_dim
        norms = {"q_norm": size, "k_norm": size} if model.use_qk_norm else {}
        attention = QKVAttention(config, bias=model.attention_bias, **norms)
        if layer < model.first_k_dense_replace:
            mlp: nn.Module = _mlp_of_some_ranks(config, model.intermediate_size)
        else:
            mlp = nn.Module()
            mlp.gate = Router(config, model.n_routed_experts)
            mlp.experts = experts(config, model.n_routed_experts, model.moe_intermediate_size)
            mlp.shared_experts = _mlp_of_some_ranks(config, model.moe_intermediate_size * model.n_shared_experts)
        return layer_of(config, _PRE_NORMS, self_attn=attention, mlp=mlp)

    def part(self, name: str, weights: Weights) -> Weights:
        heads, ranks = self.config.num_key_value_heads, self.model_config.mapping.tp_size
        repeated = {"weight", "bias"} if name in {"k_proj", "v_proj"} else set()
        return {key: _repeat(value, heads, ranks) if key in repeated else value for key, value in weights.items()}


def _mlp_of_some_ranks(config: ModelConfig, inner: int) -> GatedMLP:
    """`_compute_mlp_tp_size`, and the mapping of `GatedMLP(overridden_tp_size=...)`."""
    whole, mapping = config.quant_config, config.mapping
    block = whole.group_size if whole.quant_algo and whole.group_size is not None else 1
    assert inner % block == 0, "intermediate_size must be divisible by block_size."
    size = gcd(inner // block, mapping.tp_size)
    stages = mapping.world_size // size
    smaller = Mapping(world_size=mapping.world_size, rank=mapping.rank, tp_size=size, pp_size=stages)
    return GatedMLP(dataclasses.replace(config, mapping=smaller), inner)


class _Correction(nn.Module):
    """The correction of the router's scores: `_EScoreCorrectionBiasHolder`, so that no module takes all tensors.

    In versions before pull request 11119 it is a parameter of `MiniMaxM2MoE` itself.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.e_score_correction_bias = frozen(experts, dtype=torch.float32)

    def load_weights(self, weights: list[Weights]) -> None:
        (tensor,) = weights[0].values()
        self.e_score_correction_bias.data.copy_(tensor)


class MiniMaxM2ForCausalLM(PlainDecoder):
    """The stock mapper, which renames no expert; norms of all heads at once.

    Without a quantized KV cache it computes in bfloat16, whatever config.json says (9c8b74e8).
    """

    whole_table = True

    def __init__(self, config: ModelConfig) -> None:
        if config.quant_config.kv_cache_quant_algo is None:
            compute_in_bfloat16(config.pretrained_config)
        super().__init__(config)

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model, ranks = config.pretrained_config, config.mapping.tp_size
        kv_heads = -(-model.num_key_value_heads // ranks) * ranks
        norms = {"q_norm": model.num_attention_heads * model.head_dim, "k_norm": kv_heads * model.head_dim}
        moe = nn.Module()
        moe.e_score_correction_bias = _Correction(model.num_local_experts)
        moe.gate = Linear(model.hidden_size, model.num_local_experts, bias=False, dtype=torch.float32)
        moe.experts = experts(config, model.num_local_experts, model.intermediate_size)
        return layer_of(config, _PRE_NORMS, self_attn=QKVAttention(config, **norms), block_sparse_moe=moe)


class _Preprocessed(PlainDecoder):
    """Its mapper changes the weights before the general loop."""

    def load_weights(self, weights: Any, weight_mapper: Any, **kwargs: Any) -> None:
        given = {key: weights[key] for key in list(weights)}
        super().load_weights(weight_mapper.preprocess_weights(given), weight_mapper, **kwargs)


class LagunaForCausalLM(_Preprocessed):
    """A Linear beside attention that allocates at once, in the global mode."""

    mapper_class: Callable[..., Any] = LagunaHfWeightMapper

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model = config.pretrained_config
        biased = bool(getattr(model, "qkv_bias", False) or getattr(model, "attention_bias", False))
        attention = QKVAttention(config, bias=biased, q_norm=model.head_dim, k_norm=model.head_dim)
        rows = model.num_attention_heads * (1 if model.gating == "per-head" else model.head_dim)
        attention.g_proj = decoder_linear(config, rows, model.hidden_size, COLUMN, skip_create_weights_in_init=False)
        if model.mlp_layer_types[layer] != "sparse":
            return layer_of(config, _PRE_NORMS, self_attn=attention, mlp=GatedMLP(config))
        mlp = nn.Module()
        mlp.gate = Router(config, model.num_experts)
        mlp.experts = experts(config, model.num_experts, model.moe_intermediate_size)
        mlp.shared_expert = GatedMLP(config, model.shared_expert_intermediate_size)
        return layer_of(config, _PRE_NORMS, self_attn=attention, mlp=mlp)


class AfmoeForCausalLM(_Preprocessed):
    """The gate of attention is between the rows of the queries; every rank has all embeddings."""

    whole_table = True
    mapper_class: Callable[..., Any] = AfmoeHfWeightMapper

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model = config.pretrained_config
        attention = QKVAttention(config, gate=True, q_norm=model.head_dim, k_norm=model.head_dim)
        names = (*_PRE_NORMS, "pre_mlp_layernorm", "post_mlp_layernorm")
        if layer < model.num_dense_layers:
            return layer_of(config, names, self_attn=attention, mlp=GatedMLP(config))
        mlp = nn.Module()
        mlp.gate = Router(config, model.num_experts)
        mlp.experts = experts(config, model.num_experts, model.moe_intermediate_size)
        mlp.shared_experts = GatedMLP(config, model.moe_intermediate_size * model.num_shared_experts)
        return layer_of(config, names, self_attn=attention, mlp=mlp)


class Mamba2Mixer(nn.Module):
    """Linears with the global quantization, of which `conv1d` is plain in all checkpoints, and parameters of heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model, ranks = config.pretrained_config, config.mapping.tp_size
        inner = model.mamba_num_heads * model.mamba_head_dim
        groups = model.n_groups * model.ssm_state_size
        self.conv1d = decoder_linear(config, inner + 2 * groups, model.conv_kernel, COLUMN, bias=True)
        self.in_proj = decoder_linear(config, 2 * inner + 2 * groups + model.mamba_num_heads, model.hidden_size, COLUMN)
        self.out_proj = decoder_linear(config, model.hidden_size, inner, ROW)
        self.norm = Norm(config, inner // ranks)
        for name in ("A", "D", "dt_bias"):
            self.register_parameter(name, frozen(model.mamba_num_heads // ranks, dtype=torch.float32))


class NemotronHForCausalLM(_Preprocessed):
    """A mixer of one of four kinds in each layer; `backbone` becomes `model` in what is compared with names."""

    whole_table = True
    norm_name = "norm_f"
    mapper_class: Callable[..., Any] = NemotronHHfWeightMapper

    def __init__(self, config: ModelConfig) -> None:
        whole = config.quant_config
        if whole.exclude_modules is not None:
            whole.exclude_modules = [name.replace("backbone", "model") for name in whole.exclude_modules]
        super().__init__(config)

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model = config.pretrained_config
        assert model.rms_norm_eps > 0
        mixer = self._MIXERS[model.hybrid_override_pattern[layer]](self, config, layer)
        return layer_of(config, ("norm",), mixer=mixer)

    def layer_count(self, config: ModelConfig) -> int:
        """One layer for each character of the pattern, in all generations (`NemotronHModel`, 00620eb0)."""
        return len(config.pretrained_config.hybrid_override_pattern)

    def _mamba(self, config: ModelConfig, _layer: int) -> nn.Module:
        return Mamba2Mixer(config)

    def _attention(self, config: ModelConfig, _layer: int) -> nn.Module:
        return QKVAttention(config, **asked_biases(config))

    def _mlp(self, config: ModelConfig, _layer: int) -> nn.Module:
        return MLP(config, config.pretrained_config.intermediate_size)

    def _moe(self, config: ModelConfig, layer: int) -> nn.Module:
        """Under mixed precision the entry of a single expert, or of a child of all, decides before layers do."""
        model, of_experts = config.pretrained_config, config
        entries = config.quant_config_dict if RELEASE.newest_algos else None
        if entries is not None:
            begin = f"model.layers.{layer}.mixer.experts."
            mode = next((mode for name, mode in entries.items() if name.startswith(begin)), config.quant_config)
            of_experts = dataclasses.replace(config, quant_config=mode)
        mixer = nn.Module()
        mixer.gate = Router(config, model.n_routed_experts)
        mixer.experts = experts(of_experts, model.n_routed_experts, model.moe_intermediate_size, gated=False)
        if entries is not None:
            mixer.experts.create_weights()
        biased = getattr(model, "mlp_bias", False)
        mixer.shared_experts = MLP(config, model.moe_shared_expert_intermediate_size, biased)
        return mixer

    _MIXERS: ClassVar[dict[str, Callable[..., nn.Module]]] = {"M": _mamba, "*": _attention, "-": _mlp, "E": _moe}
