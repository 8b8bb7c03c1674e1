"""Imitates mappers that change weights before the general loop: those of Laguna, Afmoe and Nemotron-H.

`LagunaHfWeightMapper` is in `modeling_laguna.py` (01dcc21a), the others are `checkpoints/hf/afmoe_weight_mapper.py`
(038cc86c) and `checkpoints/hf/nemotron_h_weight_mapper.py` (05b033ac for the newest release, fbbc05dd for the oldest).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper
from tensorrt_llm._torch.models.modeling_utils import register_mapper
from tensorrt_llm._torch.modules.fused_moe.interface import MoE
from tensorrt_llm.quantization import QuantAlgo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import Weights
    from torch import Tensor, nn

__all__ = ["AfmoeHfWeightMapper", "LagunaHfWeightMapper", "NemotronHHfWeightMapper"]


@register_mapper("HF", "LagunaForCausalLM")
class LagunaHfWeightMapper(HfWeightMapper):
    """Renames experts; `weight_scale` becomes `weight_scale_inv` wherever the global mode is FP8 blocks."""

    def preprocess_weights(self, weights: Weights) -> Weights:  # type: ignore[override]
        old, new = "mlp.experts.e_score_correction_bias", "mlp.gate.e_score_correction_bias"
        return {key.replace(old, new): value for key, value in weights.items()}

    def is_special_instance_module(self, module: nn.Module) -> bool:
        return isinstance(module, MoE)

    def handle_special_instance_module(self, module: Any, module_name: str, module_weights: Weights, **_: Any) -> None:
        blocks = self._config.quant_config.quant_mode.algo == QuantAlgo.FP8_BLOCK_SCALES
        renamed = {}
        for name, value in module_weights.items():
            name = name.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2")  # noqa: PLW2901
            renamed[name.replace("weight_scale", "weight_scale_inv") if blocks else name] = value
        module.load_weights(weights=[renamed])


@register_mapper("HF", "AfmoeForCausalLM")
class AfmoeHfWeightMapper(HfWeightMapper):
    """Renames router and experts, and puts the rows of the gate between those of the queries, head by head."""

    renames = (
        (r"(experts\.\d+\.)gate_proj", r"\1w1"),
        (r"(experts\.\d+\.)up_proj", r"\1w3"),
        (r"(experts\.\d+\.)down_proj", r"\1w2"),
        (r"\.router\.gate\.", ".gate."),
        (r"\.mlp\.expert_bias", ".mlp.gate.e_score_correction_bias"),
    )

    def preprocess_weights(self, weights: Weights) -> Weights:  # type: ignore[override]
        renamed = {}
        for key, value in weights.items():
            for pattern, new in self.renames:
                key = re.sub(pattern, new, key)  # noqa: PLW2901
            renamed[key] = value
        heads, marker = self._model.config.num_attention_heads, ".self_attn.gate_proj."
        for key in [key for key in renamed if marker in key]:
            query = key.replace(marker, ".self_attn.q_proj.")
            if query in renamed:
                renamed[query] = self._interleaved(renamed[query], renamed.pop(key), heads)
        return renamed

    @staticmethod
    def _interleaved(query: Tensor, gate: Tensor, heads: int) -> Tensor:
        assert query.shape[0] % heads == 0, f"q_proj rows {query.shape[0]} not divisible by num_heads {heads}"
        assert gate.shape == query.shape, f"gate_proj shape {gate.shape} != q_proj shape {query.shape}"
        parts = [part.reshape(heads, -1, *part.shape[1:]) for part in (query, gate)]
        return torch.stack(parts, dim=1).reshape(-1, *query.shape[1:]).contiguous()

    def is_special_instance_module(self, module: nn.Module) -> bool:
        return isinstance(module, MoE)

    def handle_special_instance_module(self, module: Any, module_name: str, module_weights: Weights, **_: Any) -> None:
        module.load_weights(weights=[module_weights])


@register_mapper("HF", "NemotronHForCausalLM")
class NemotronHHfWeightMapper(HfWeightMapper):
    """Cuts or rearranges Mamba's tensors for the rank, and gives each expert an empty w3."""

    def preprocess_weights(self, weights: Weights) -> Weights:  # type: ignore[override]
        result: Weights = {}
        for name, value in weights.items():
            key = name.replace("backbone", "model").replace("embeddings", "embed_tokens").replace("A_log", "A")
            if "mixer.in_proj" in key:
                result[key] = self._in_proj(key, value)
            elif "A" in key:
                result[key] = -self._mine(value).float().exp()
            elif "D" in key or "dt_bias" in key:
                result[key] = self._mine(value).float()
            elif "conv1d" in key:
                rows = value.squeeze(1) if "weight" in key else value
                result[key] = self._rearranged(rows, self._conv_sizes())
            elif "mixer.norm.weight" in key:
                result[key] = self._mine(value)
            elif "mixer.experts." in key:
                result |= self._expert(key, value)
            else:
                result[key] = value
        return result

    def _mine(self, value: Tensor) -> Tensor:
        mapping = self._model.model_config.mapping
        return value.chunk(self._tp_size)[0 if mapping.enable_attention_dp else mapping.tp_rank]

    def _conv_sizes(self) -> list[int]:
        model = self._config.pretrained_config
        groups = model.n_groups * model.ssm_state_size
        return [model.mamba_num_heads * model.mamba_head_dim, groups, groups]

    def _in_proj(self, key: str, value: Tensor) -> Tensor:
        """Older releases rearrange `weight_scale` in NVFP4 models only; the oldest ones rearrange no scale."""
        inner, *groups = self._conv_sizes()
        sizes = [inner, inner, *groups, self._config.pretrained_config.mamba_num_heads]
        if "_scale" not in key:
            return self._rearranged(value, sizes)
        nvfp4 = self._config.quant_config.quant_mode.algo == QuantAlgo.NVFP4 and key.endswith("weight_scale")
        if RELEASE.name == "old" or (RELEASE.name == "mid" and not nvfp4):
            return value
        return self._rearranged(value, sizes) if value.dim() and value.shape[0] == sum(sizes) else value

    def _rearranged(self, value: Tensor, sizes: Sequence[int]) -> Tensor:
        """Put the rows of each rank together; raises RuntimeError for another number of rows."""
        parts = value.split(list(sizes))
        return torch.cat([part.chunk(self._tp_size)[rank] for rank in range(self._tp_size) for part in parts])

    @staticmethod
    def _expert(key: str, value: Tensor) -> Weights:
        if "down_proj" in key:
            return {key.replace("down_proj", "w2"): value}
        empty = value if "input_scale" in key or "weight_scale_2" in key else value[:0] if value.dim() else value
        return {key.replace("up_proj", "w1"): value, key.replace("up_proj", "w3"): empty}
