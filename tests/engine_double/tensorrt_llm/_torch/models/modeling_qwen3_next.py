"""Imitates loading in `_torch/models/modeling_qwen3_next.py`, `modeling_qwen3_5.py`, `modules/mamba/gdn_mixer.py`.

Layers have attention with a gate, or linear attention. `linear_attn.conv1d` is a Linear with the global quantization,
which its plain weight must be excluded from. `forward` leaves linear attention out, so its logits mean nothing.
"""

from __future__ import annotations

import re
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._torch.models.checkpoints.hf.qwen3_5_weight_mapper import Qwen3_5MoeHfWeightMapper
from tensorrt_llm._torch.models.checkpoints.hf.qwen3_next_weight_mapper import Qwen3NextHfWeightMapper
from tensorrt_llm._torch.models.modeling_decoder import Decoder, GatedMLP
from tensorrt_llm._torch.models.modeling_wrappers import Qwen3VLModel
from tensorrt_llm._torch.modules.attention import Attention, RMSNorm, decoder_linear
from tensorrt_llm._torch.modules.fused_moe.interface import create_moe
from tensorrt_llm._torch.modules.linear import Linear, TensorParallelMode, WeightMode, WeightsLoadingConfig
from tensorrt_llm._torch.modules.linear_methods import frozen
from torch import nn

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig
    from torch import Tensor

__all__ = [
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5VLModel",
]

_IN_PROJ = (
    (re.compile(r"in_proj_[ab]$"), "in_proj_ba*"),
    (re.compile(r"in_proj_(?:q|k|v|z|qkv)$"), "in_proj_qkvz*"),
)


class GatedAttention(Attention):
    """Rows of a gate follow those of the queries of each head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, head_norms=True, attn_output_gate=True)
        model, ranks = config.pretrained_config, config.mapping.tp_size
        self.qkv_proj = decoder_linear(
            config,
            (2 * self.heads + 2 * self.kv_heads) * ranks * self.head_dim,
            model.hidden_size,
            TensorParallelMode.COLUMN,
            bias=self.qkv_proj.has_bias,
            weights_loading_config=WeightsLoadingConfig(weight_mode=WeightMode.FUSED_QKV_LINEAR),
        )


class Qwen3NextGatedDeltaNet(nn.Module):
    """Linear attention: four Linears with the quantization of the model, and three parameters of the rank."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model, ranks = config.pretrained_config, config.mapping.tp_size
        keys = model.linear_num_key_heads * model.linear_key_head_dim
        values = model.linear_num_value_heads * model.linear_value_head_dim
        assert model.linear_num_key_heads % ranks == 0
        assert model.linear_num_value_heads % ranks == 0
        column, hidden = TensorParallelMode.COLUMN, model.hidden_size
        self.conv1d = decoder_linear(config, 2 * keys + values, model.linear_conv_kernel_dim, column)
        self.in_proj_qkvz = decoder_linear(config, 2 * keys + 2 * values, hidden, column)
        self.in_proj_ba = decoder_linear(config, 2 * model.linear_num_value_heads, hidden, column)
        self.out_proj = decoder_linear(config, hidden, values, TensorParallelMode.ROW)
        self.A_log = frozen(model.linear_num_value_heads // ranks, dtype=torch.float32)
        self.dt_bias = frozen(model.linear_num_value_heads // ranks, dtype=torch.float32)
        self.norm = RMSNorm(model.linear_value_head_dim, config)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


class Router(nn.Module):
    """A bare parameter, which is never quantized."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model = config.pretrained_config
        self.weight = frozen(model.num_experts, model.hidden_size, dtype=config.torch_dtype)

    def load_weights(self, weights: list[dict[str, Tensor]]) -> None:
        self.weight.data.copy_(weights[0]["weight"])


class Qwen3NextSparseMoeBlock(nn.Module):
    """Routed experts, and a shared one beside them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model = config.pretrained_config
        self.gate = Router(config)
        self.experts = create_moe(
            num_experts=model.num_experts,
            hidden_size=model.hidden_size,
            intermediate_size=model.moe_intermediate_size,
            top_k=model.num_experts_per_tok,
            renormalize=True,
            model_config=config,
        )
        self.shared_expert = GatedMLP(config, model.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(
            model.hidden_size, 1, bias=False, dtype=config.torch_dtype, skip_create_weights_in_init=True
        )

    def forward(self, hidden: Tensor) -> Tensor:
        gate = self.shared_expert_gate(hidden).sigmoid()
        output: Tensor = self.experts(hidden, hidden @ self.gate.weight.float().T) + gate * self.shared_expert(hidden)
        return output


class DenseAdapter(nn.Module):
    """A dense MLP, one level deeper than it is stored."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mlp = GatedMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.mlp(hidden)
        return output


class Qwen3NextForCausalLM(Decoder):
    """The decoder with layers of two kinds; its loader rearranges weights before the general loop."""

    mapper_class: Any = Qwen3NextHfWeightMapper

    def finish_construction(self) -> None:
        """Build the layers anew before configurations are settled."""
        config = self.model_config
        for layer, kind in zip(self.model.layers, config.pretrained_config.layer_types, strict=True):
            if isinstance(layer, nn.Identity):
                continue
            if kind == "full_attention":
                layer.self_attn = GatedAttention(config)
            else:
                layer.linear_attn = Qwen3NextGatedDeltaNet(config)
                layer.self_attn = nn.Identity()
            experts = getattr(config.pretrained_config, "num_experts", 0)
            layer.mlp = Qwen3NextSparseMoeBlock(config) if experts else DenseAdapter(config)
        super().finish_construction()

    def load_weights(self, weights: Any, weight_mapper: Any, **kwargs: Any) -> None:
        super().load_weights(weight_mapper.preprocess_weights(weights), weight_mapper, **kwargs)


class Qwen3_5ForCausalLM(Qwen3NextForCausalLM):  # noqa: N801 (upstream's name)
    """Also for models with experts. Its heads are plain, and names in `exclude_modules` are those of the files.

    As in `_normalize_qwen35_exclude_modules` of commit 2478158c, which does not add `*linear_attn.conv1d` yet, and with
    lm_head as of commit 00620eb0. Entries of layers are compared as they are.
    """

    mapper_class = Qwen3_5MoeHfWeightMapper

    def __init__(self, config: ModelConfig) -> None:
        config = copy(config)
        if config.quant_config.exclude_modules is not None:
            names = [*map(_normalized, config.quant_config.exclude_modules), "lm_head"]
            config.quant_config = copy(config.quant_config)
            config.quant_config.exclude_modules = [name for name in names if name is not None]
        super().__init__(config)


def _normalized(name: str) -> str | None:
    if name.startswith(("model.visual", "mtp.")):
        return None
    name = name.replace("model.language_model.", "model.", 1)
    for pattern, packed in _IN_PROJ:
        name = pattern.sub(packed, name)
    return name


class Qwen3_5VLModel(Qwen3VLModel):  # noqa: N801 (upstream's name)
    """Hands its configuration to the text model, which takes the prefix off."""

    text_class = Qwen3_5ForCausalLM
    mapper_class = Qwen3_5MoeHfWeightMapper
