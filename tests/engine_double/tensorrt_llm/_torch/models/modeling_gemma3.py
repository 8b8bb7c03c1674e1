"""Imitates `_torch/models/modeling_gemma3.py` and `checkpoints/hf/gemma3_weight_mapper.py`: names and loading.

The norms are stored without the 1 that they add. `forward` is that of a plain decoder, so its logits mean nothing.
Sliding layers take theta from `rope_local_base_freq` or the block of their kind, and are not scaled (00e7d103).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper
from tensorrt_llm._torch.models.modeling_decoder import Decoder
from tensorrt_llm._torch.models.modeling_utils import register_mapper
from tensorrt_llm._torch.modules.attention import RMSNorm, frequencies

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig
    from torch import Tensor

__all__ = ["Gemma3ForCausalLM", "Gemma3HfWeightMapper"]


@register_mapper("HF", "Gemma3ForCausalLM")
@register_mapper("HF", "Gemma3ForConditionalGeneration")
class Gemma3HfWeightMapper(HfWeightMapper):
    """Adds 1 to the weights of norms."""

    def handle_manual_copy(
        self, module_name: str, module_weights: dict[str, Tensor], n: str, p: Tensor, **_: Any
    ) -> None:
        more = 1 if "norm" in module_name else 0
        p.data.copy_(module_weights[n][:] + more)


class Gemma3ForCausalLM(Decoder):
    """A decoder whose layers have four norms, and norms of queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        model = config.pretrained_config
        kinds = getattr(model, "layer_types", None) or ["full_attention"] * len(self.model.layers)
        for layer, kind in zip(self.model.layers, kinds, strict=True):
            if kind == "sliding_attention":
                layer.self_attn.frequencies = frequencies(model.local_rope, layer.self_attn.head_dim)
            for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
                layer.add_module(name, RMSNorm(model.hidden_size, config))
            for name in ("q_norm", "k_norm"):
                layer.self_attn.add_module(name, RMSNorm(layer.self_attn.head_dim, config))
