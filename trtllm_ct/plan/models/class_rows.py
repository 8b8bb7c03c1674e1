"""One `ClassRow` for each model class of the engine that is known, from a file for each kind of layer or of loader.

The releases that have a class are in `engine/model_classes.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.plan.models.dense_rows import DENSE_ROWS
from trtllm_ct.plan.models.gemma4_rows import GEMMA4_ROWS
from trtllm_ct.plan.models.hybrid_rows import HYBRID_ROWS
from trtllm_ct.plan.models.latent_rows import LATENT_ROWS
from trtllm_ct.plan.models.llama4_rows import LLAMA4_ROWS
from trtllm_ct.plan.models.mixture_rows import MIXTURE_ROWS
from trtllm_ct.plan.models.own_loader_rows import OWN_LOADER_ROWS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.plan.models.class_row import ClassRow

__all__ = ["CLASS_ROWS", "TEXT_MODELS"]

CLASS_ROWS: Mapping[str, ClassRow] = {
    **DENSE_ROWS,
    **MIXTURE_ROWS,
    **LATENT_ROWS,
    **HYBRID_ROWS,
    **GEMMA4_ROWS,
    **LLAMA4_ROWS,
    **OWN_LOADER_ROWS,
}
"""The rows, by the architecture that config.json names."""

TEXT_MODELS: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
}
"""The row of the text model inside of a larger model, by `text_config.model_type`.

The row of the larger model's own name counts if its text model has none here."""
