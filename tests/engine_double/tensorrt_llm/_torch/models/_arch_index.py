"""Imitates `_torch/models/_arch_index.py`: which release has which model class, and where it is.

`ARCHITECTURES` is the table; a class that is not in it, or only in a later generation, is unknown.
Classes of other packages take precedence (`register_auto_model`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from tensorrt_llm._double import GENERATIONS, RELEASE
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING

__all__ = ["ARCHITECTURES", "MODEL_ARCH_TO_MODULE", "Row", "get_model_class"]


class Row(NamedTuple):
    """One class: the first generation that has it, the double's file in `_torch/models/`, and its name there."""

    since: str
    module: str
    name: str


ARCHITECTURES = {
    "LlamaForCausalLM": Row("old", "modeling_decoder", "Decoder"),
    "MistralForCausalLM": Row("old", "modeling_decoder", "Decoder"),
    "MixtralForCausalLM": Row("old", "modeling_decoder", "Decoder"),
    "Qwen2ForCausalLM": Row("old", "modeling_decoder", "Decoder"),
    "Qwen2MoeForCausalLM": Row("old", "modeling_decoder", "Decoder"),
    "Qwen3ForCausalLM": Row("old", "modeling_decoder", "Decoder"),
    "Qwen3MoeForCausalLM": Row("old", "modeling_decoder", "Decoder"),
    "DeepseekV3ForCausalLM": Row("old", "modeling_deepseekv3", "DeepseekV3ForCausalLM"),
    "Gemma3ForCausalLM": Row("old", "modeling_gemma3", "Gemma3ForCausalLM"),
    "Phi3ForCausalLM": Row("old", "modeling_phi3", "Phi3ForCausalLM"),
    "Gemma3ForConditionalGeneration": Row("old", "modeling_wrappers", "Gemma3VLM"),
    "Mistral3ForConditionalGeneration": Row("old", "modeling_wrappers", "Mistral3VLM"),
    "Qwen2VLForConditionalGeneration": Row("old", "modeling_wrappers", "Qwen2VLModel"),
    "Qwen2_5_VLForConditionalGeneration": Row("old", "modeling_wrappers", "Qwen2VLModel"),
    "Qwen3VLForConditionalGeneration": Row("mid", "modeling_wrappers", "Qwen3VLModel"),
    "Qwen3VLMoeForConditionalGeneration": Row("mid", "modeling_wrappers", "Qwen3MoeVLModel"),
    "Qwen3NextForCausalLM": Row("mid", "modeling_qwen3_next", "Qwen3NextForCausalLM"),
    "Qwen3_5ForCausalLM": Row("newest", "modeling_qwen3_next", "Qwen3_5ForCausalLM"),
    "Qwen3_5MoeForCausalLM": Row("newest", "modeling_qwen3_next", "Qwen3_5ForCausalLM"),
    "Qwen3_5ForConditionalGeneration": Row("newest", "modeling_qwen3_next", "Qwen3_5VLModel"),
    "Qwen3_5MoeForConditionalGeneration": Row("newest", "modeling_qwen3_next", "Qwen3_5VLModel"),
    "SeedOssForCausalLM": Row("mid", "modeling_rows", "PlainDecoder"),
    "Exaone4ForCausalLM": Row("old", "modeling_rows", "Exaone4ForCausalLM"),
    "NemotronForCausalLM": Row("old", "modeling_rows", "NemotronForCausalLM"),
    "Starcoder2ForCausalLM": Row("mid", "modeling_rows", "Starcoder2ForCausalLM"),
    "Cohere2ForCausalLM": Row("newest", "modeling_rows", "Cohere2ForCausalLM"),
    "HunYuanDenseV1ForCausalLM": Row("mid", "modeling_rows", "HunYuanDenseV1ForCausalLM"),
    "Glm4MoeForCausalLM": Row("mid", "modeling_rows", "Glm4MoeForCausalLM"),
    "MiniMaxM2ForCausalLM": Row("newest", "modeling_rows", "MiniMaxM2ForCausalLM"),
    "LagunaForCausalLM": Row("newest", "modeling_rows", "LagunaForCausalLM"),
    "AfmoeForCausalLM": Row("newest", "modeling_rows", "AfmoeForCausalLM"),
    "NemotronHForCausalLM": Row("old", "modeling_rows", "NemotronHForCausalLM"),
    "Exaone4_5_ForConditionalGeneration": Row("newest", "modeling_rows", "Exaone4_5ForConditionalGeneration"),
    "Llama4ForConditionalGeneration": Row("old", "modeling_llama4", "Llama4ForConditionalGeneration"),
    "Gemma4ForCausalLM": Row("newest", "modeling_gemma4", "Gemma4ForCausalLM"),
    "Gemma4ForConditionalGeneration": Row("newest", "modeling_gemma4", "Gemma4ForConditionalGeneration"),
    "Gemma4UnifiedForConditionalGeneration": Row("newest", "modeling_gemma4", "Gemma4UnifiedForConditionalGeneration"),
    "DeepseekV32ForCausalLM": Row("mid", "modeling_deepseekv3", "DeepseekV3ForCausalLM"),
    "GlmMoeDsaForCausalLM": Row("newest", "modeling_deepseekv3", "DeepseekV3ForCausalLM"),
    "HunYuanMoEV1ForCausalLM": Row("old", "modeling_own_loaders", "HunYuanMoEV1ForCausalLM"),
    "GptOssForCausalLM": Row("old", "modeling_own_loaders", "GptOssForCausalLM"),
    "MllamaForConditionalGeneration": Row("old", "modeling_own_loaders", "MllamaForConditionalGeneration"),
    "Step3p5ForCausalLM": Row("newest", "modeling_own_loaders", "Step3p7ForCausalLM"),
    "DeepseekV4ForCausalLM": Row("newest", "modeling_deepseekv4", "DeepseekV4ForCausalLM"),
    "KimiK25ForConditionalGeneration": Row("newest", "modeling_wrappers", "KimiK25ForConditionalGeneration"),
}
"""The classes that the double has. Stock has many more."""

MODEL_ARCH_TO_MODULE = {
    name: row.module
    for name, row in ARCHITECTURES.items()
    if GENERATIONS.index(row.since) <= GENERATIONS.index(RELEASE.name)
}
"""The classes of this release. Releases before the newest register all of theirs when they are imported."""


def get_model_class(architecture: str) -> Any:
    """Return the class of an architecture, or None if the release has none."""
    if architecture in MODEL_CLASS_MAPPING:
        return MODEL_CLASS_MAPPING[architecture]
    row = ARCHITECTURES.get(architecture)
    if row is None or GENERATIONS.index(row.since) > GENERATIONS.index(RELEASE.name):
        return None
    return getattr(import_module(f"tensorrt_llm._torch.models.{row.module}"), row.name)
