"""The model classes of each release of TensorRT-LLM's PyTorch backend, and how those that wrap a text model read names.

A checkpoint whose class the engine lacks ends in "Unknown architecture for AutoModelForCausalLM", whatever its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.engine.releases import RELEASES, STOCK_1_0, STOCK_1_2, STOCK_1_3

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.engine.releases import Release

__all__ = ["BFLOAT16_CLASSES", "MODEL_CLASSES", "WRAPPERS", "Wrapper", "first_release", "has_class"]

# `_torch/models/__init__.py` as it was before ExaoneMoeForCausalLM, Glm4MoeForCausalLM and Qwen3VLModel were added.
_SINCE_1_0 = (
    "BertForSequenceClassification",
    "CLIPVisionModel",
    "DeciLMForCausalLM",
    "DeepseekV3ForCausalLM",
    "Exaone4ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GptOssForCausalLM",
    "HCXVisionForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "Llama4ForConditionalGeneration",
    "LlamaForCausalLM",
    "LlavaLlamaModel",
    "LlavaNextForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "MllamaForConditionalGeneration",
    "NemotronForCausalLM",
    "NemotronHForCausalLM",
    "NemotronH_Nano_VL_V2",
    "Phi3ForCausalLM",
    "Phi4MMForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2ForProcessRewardModel",
    "Qwen2ForRewardModel",
    "Qwen2MoeForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SiglipVisionModel",
)
# The same file of early 2026, before pull request 11816 (March 2026) added KimiK25ForConditionalGeneration; and
# `checkpoints/__init__.py` of that time for Mistral Large 3. Qwen3-Next was added by pull request 7892
# (2025-09-29), and the release notes of 1.2 are the first that name it; so are they for HunYuan (7081) and Seed-OSS
# (7496), of 1.2.0rc0 in September 2025.
_SINCE_1_2 = (
    "DeepseekV32ForCausalLM",
    "ExaoneMoEForCausalLM",
    "Glm4MoeForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "MistralLarge3ForCausalLM",
    "PixtralForConditionalGeneration",
    "Qwen3NextForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "SeedOssForCausalLM",
    "Starcoder2ForCausalLM",
)
# `_torch/models/_arch_index.py: MODEL_ARCH_TO_MODULE` of September 2026, commit 065ff9e9.
_SINCE_1_3 = (
    "AfmoeForCausalLM",
    "BartForConditionalGeneration",
    "Cohere2ForCausalLM",
    "Cosmos3ForConditionalGeneration",
    "DeepseekV4ForCausalLM",
    "Exaone4_5_ForConditionalGeneration",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration",
    "GlmMoeDsaForCausalLM",
    "KimiK25ForConditionalGeneration",
    "KimiK3ForConditionalGeneration",
    "KimiLinearForCausalLM",
    "LagunaForCausalLM",
    "MBartForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration",
    # In the notes of 1.3.0rc0 (10532, January 2026); whether the branch of 1.2 has it is not known.
    "MiniMaxM2ForCausalLM",
    "MiniMaxM3SparseForCausalLM",
    "MiniMaxM3SparseForConditionalGeneration",
    "NemotronHPuzzleForCausalLM",
    "NemotronH_Nano_Omni_Reasoning_V3",
    "Qwen3ForTextEmbedding",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "QwenImageBenchForConditionalGeneration",
    "Step3p5ForCausalLM",
    "Step3p7ForConditionalGeneration",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
)

MODEL_CLASSES: Mapping[str, Release] = {
    **dict.fromkeys(_SINCE_1_0, STOCK_1_0),
    **dict.fromkeys(_SINCE_1_2, STOCK_1_2),
    **dict.fromkeys(_SINCE_1_3, STOCK_1_3),
}
"""The first release that has a model class, by the name of the architecture in config.json.

Draft models, which no config.json of a checkpoint names, are left out."""

BFLOAT16_CLASSES = frozenset(
    {
        "Exaone4ForCausalLM",
        "Exaone4_5_ForConditionalGeneration",
        "ExaoneMoEForCausalLM",
        "Gemma3ForConditionalGeneration",
        "MiniMaxM2ForCausalLM",
    }
)
"""The classes that compute in bfloat16 whatever the dtype in config.json.

Their constructors set `torch_dtype`: those of `_torch/models/modeling_exaone4.py`, `modeling_exaone_moe.py` and
`modeling_gemma3vl.py` always, that of `modeling_minimaxm2.py` (9c8b74e8) unless the KV cache is quantized.
Exaone 4.5 holds Exaone 4 as its text model."""


def has_class(release: Release, architecture: str) -> bool:
    """Whether a release has the model class of an architecture."""
    first = MODEL_CLASSES.get(architecture)
    return first is not None and RELEASES.index(first) <= RELEASES.index(release)


def first_release(architecture: str) -> Release | None:
    """Return the first release that has the model class of an architecture; None if none has it."""
    return MODEL_CLASSES.get(architecture)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """Which names a model class reads that holds a text model and other parts.

    `places` are the prefixes of the text model's body, each with the name of its head, under which the class finds the
    text model; a checkpoint that has another one is delivered under the first. `beside` are pairs: a prefix under which
    writers have stored another part, and the prefix under which the class reads that part.
    """

    places: tuple[tuple[str, str], ...]
    beside: tuple[tuple[str, str], ...] = ()


_INNER_FIRST = ("language_model.model.", "language_model.lm_head")
_OUTER_FIRST = ("model.language_model.", "lm_head")
_TEXT_ONLY = ("model.", "lm_head")
_TOWER_AND_PROJECTOR = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# They keep the keys below `language_model` and drop all others, the head's among them:
# `_torch/models/modeling_gemma3vl.py: Gemma3VLM.load_weights` and `modeling_mistral.py: Mistral3VLM.load_weights`.
_FILTERING = Wrapper(places=(_INNER_FIRST,), beside=_TOWER_AND_PROJECTOR)
# `modeling_qwen3vl.py: Qwen3VLModel.load_weights` renames `model.language_model.` and leaves other keys as they are.
_QWEN3_VL = Wrapper(places=(_OUTER_FIRST, _TEXT_ONLY), beside=(("visual.", "model.visual."),))
# `checkpoints/hf/qwen2vl_weight_mapper.py` does the same, and takes both names of the tower.
_QWEN2_VL = Wrapper(places=(_OUTER_FIRST, _TEXT_ONLY))

WRAPPERS: Mapping[str, Wrapper] = {
    "Gemma3ForConditionalGeneration": _FILTERING,
    "Mistral3ForConditionalGeneration": _FILTERING,
    "Qwen3VLForConditionalGeneration": _QWEN3_VL,
    "Qwen3VLMoeForConditionalGeneration": _QWEN3_VL,
    "Qwen2VLForConditionalGeneration": _QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN2_VL,
    # `modeling_qwen3_5.py: _Qwen3_5VLModel` is a subclass of `Qwen3VLModelBase` (commit 00620eb0), and
    # `checkpoints/hf/qwen3_5_weight_mapper.py: preprocess_weights` takes the prefix off (commit 04666e21).
    "Qwen3_5ForConditionalGeneration": _QWEN3_VL,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3_VL,
    # `checkpoints/hf/exaone4_5_weight_mapper.py` (0aa87516) renames `model.language_model.` and `model.visual.`.
    "Exaone4_5_ForConditionalGeneration": _QWEN2_VL,
    # `checkpoints/hf/llama4_weight_mapper.py: filter_weights` (7dfda15a) takes `language_model.` off, and
    # `modeling_llama.py: Llama4VisionEncoder.load_weights` (3a5901cd) reads the names of the tower and the projector.
    "Llama4ForConditionalGeneration": Wrapper(
        places=(_INNER_FIRST, _TEXT_ONLY),
        beside=(
            ("model.vision_model.", "vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ),
    ),
    # `modeling_gemma4mm.py: Gemma4ForConditionalGeneration.load_weights` (001a6a01) keeps `model.language_model.` and
    # the parts beside it; `modeling_gemma4_unified.py` (1c0067ee) has other parts under `model.`.
    "Gemma4ForConditionalGeneration": Wrapper(places=(_OUTER_FIRST,)),
    "Gemma4UnifiedForConditionalGeneration": Wrapper(places=(_OUTER_FIRST,)),
    # `modeling_mllama.py: MllamaForConditionalGeneration.load_weights` (000a01de): modules have the names of the files.
    "MllamaForConditionalGeneration": Wrapper(
        places=(_INNER_FIRST,),
        # The projector is a single Linear.
        beside=(("model.vision_model.", "vision_model."), ("model.multi_modal_projector", "multi_modal_projector")),
    ),
    # `modeling_kimi_k25.py: KimiK25ForConditionalGeneration.load_weights`.
    "KimiK25ForConditionalGeneration": Wrapper(places=(_INNER_FIRST, _TEXT_ONLY)),
}
"""The classes whose names are known, by architecture. Checkpoints of any other class keep the names that they have."""
