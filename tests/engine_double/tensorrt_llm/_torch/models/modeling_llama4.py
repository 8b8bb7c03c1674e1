"""Imitates Llama 4 of `modeling_llama.py` (3a5901cd), and `checkpoints/hf/llama4_weight_mapper.py` (7dfda15a).

The class is the decoder itself, with a tower beside it. Experts are read from stacks, and the global mode decides
which layers join the quantization of an input with an all-reduce, which needs `input_scale` of the Linear behind it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from tensorrt_llm._torch.model_config import PretrainedConfig
from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper
from tensorrt_llm._torch.models.modeling_decoder import GatedMLP
from tensorrt_llm._torch.models.modeling_rows import PlainDecoder, QKVAttention, asked_biases, experts, layer_of
from tensorrt_llm._torch.models.modeling_utils import register_mapper
from tensorrt_llm._torch.modules.fused_moe.interface import MoEWeightLoadingMode
from tensorrt_llm._torch.modules.linear import Linear
from tensorrt_llm.quantization import QuantAlgo
from torch import nn

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig
    from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import Weights

__all__ = ["Llama4ForConditionalGeneration"]


@register_mapper("HF", "Llama4ForConditionalGeneration")
class Llama4HfWeightMapper(HfWeightMapper):
    """Takes `language_model.` off all keys."""

    def filter_weights(self, prefix: str, weights: Any) -> Weights:
        renamed = {key.removeprefix("language_model."): weights[key] for key in list(weights)}
        return super().filter_weights(prefix, renamed)


class Llama4ForConditionalGeneration(PlainDecoder):
    """Each layer has an MLP or a router, stacked experts and a shared expert, by `interleave_moe_layer_step`."""

    def __init__(self, config: ModelConfig) -> None:
        text = PretrainedConfig(**config.pretrained_config.text_config)
        text.tie_word_embeddings = getattr(text, "tie_word_embeddings", False)
        self.vision_keys: dict[str, list[str]] = {}
        super().__init__(dataclasses.replace(config, pretrained_config=text))

    def layer(self, config: ModelConfig, layer: int) -> nn.Module:
        model = config.pretrained_config
        names = ("input_layernorm", "post_attention_layernorm")
        if (layer + 1) % model.interleave_moe_layer_step:
            feed_forward: nn.Module = GatedMLP(
                config, model.intermediate_size_mlp, biased=getattr(model, "mlp_bias", False)
            )
        else:
            feed_forward = nn.Module()
            feed_forward.router = Linear(model.hidden_size, model.num_local_experts, bias=False)
            feed_forward.experts = experts(
                config,
                model.num_local_experts,
                model.intermediate_size,
                weight_loading_mode=MoEWeightLoadingMode.FUSED_GATE_UP_PROJ,
            )
            feed_forward.shared_expert = GatedMLP(config, model.intermediate_size)
        return layer_of(
            config, names, self_attn=QKVAttention(config, **asked_biases(config)), feed_forward=feed_forward
        )

    def load_weights(self, weights: Any, weight_mapper: Any, **kwargs: Any) -> None:
        prefixes = ("vision_model.", "multi_modal_projector.")
        self.vision_keys = {prefix: [key for key in list(weights) if key.startswith(prefix)] for prefix in prefixes}
        super().load_weights(weights, weight_mapper, **kwargs)
        self._require_input_scales()

    def _require_input_scales(self) -> None:
        """What `Llama4DecoderLayer.forward` reads of an MLP in these global modes."""
        whole, mapping = self.model_config.quant_config, self.model_config.mapping
        if mapping.tp_size == 1 or mapping.has_pp() or whole.quant_algo not in {QuantAlgo.FP8, QuantAlgo.NVFP4}:
            return
        for layer in self.model.layers:
            if isinstance(layer.feed_forward, GatedMLP):
                _ = layer.feed_forward.gate_up_proj.input_scale
            if whole.quant_algo == QuantAlgo.NVFP4 and not hasattr(layer.self_attn.qkv_proj, "input_scale"):
                raise ValueError("not enough values to unpack (expected 3, got 2)")
