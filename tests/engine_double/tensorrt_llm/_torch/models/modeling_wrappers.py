"""Imitates `modeling_{qwen2vl,qwen3vl,mistral,gemma3vl,kimi_k25}.py`.

Each holds a text model as `llm`. All hand it their quantization unchanged, so names are compared inside of the text
model; only Kimi K2.5 renames `exclude_modules`. Vision towers are left out; the prefix of their keys is looked up.
"""

from __future__ import annotations

import dataclasses
from copy import copy, deepcopy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.model_config import PretrainedConfig
from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper
from tensorrt_llm._torch.models.modeling_decoder import Decoder
from tensorrt_llm._torch.models.modeling_deepseekv3 import DeepseekV3ForCausalLM
from tensorrt_llm._torch.models.modeling_gemma3 import Gemma3ForCausalLM, Gemma3HfWeightMapper
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorrt_llm._torch.model_config import ModelConfig
    from torch import Tensor

__all__ = [
    "Gemma3VLM",
    "KimiK25ForConditionalGeneration",
    "Mistral3VLM",
    "Qwen2VLModel",
    "Qwen3MoeVLModel",
    "Qwen3VLModel",
    "Wrapper",
]


class Wrapper(nn.Module):
    """A model with a text model; `vision` is the prefix of the keys that its other parts read."""

    text_class: Any = Decoder
    mapper_class: Any = HfWeightMapper
    vision: tuple[str, ...] = ("vision_tower.", "multi_modal_projector.")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        outer = config.pretrained_config
        fields = outer.text_config | {"tie_word_embeddings": outer.tie_word_embeddings}
        text = PretrainedConfig(**fields, _name_or_path=outer._name_or_path)
        self.prepare_text(text)
        inner = dataclasses.replace(deepcopy(config), pretrained_config=text)
        inner.quant_config = self.text_quant_config(inner.quant_config)
        self.llm = self.text_class(inner)
        self.model_config = copy(config)
        self.model_config.pretrained_config = text
        self.vision_keys: dict[str, list[str]] = {}

    @property
    def config(self) -> Any:
        return self.model_config.pretrained_config

    def text_quant_config(self, config: Any) -> Any:
        return config

    def prepare_text(self, text: PretrainedConfig) -> None:
        """What the wrapper writes into the configuration of its text model."""

    def text_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the keys below `language_model.`, and drop all others."""
        prefix = "language_model."
        return {key[len(prefix) :]: tensor for key, tensor in weights.items() if key.startswith(prefix)}

    def load_weights(self, weights: Any, weight_mapper: Any = None) -> None:
        """Load the text model; other parts only say which keys they find."""
        self.vision_keys = {prefix: [key for key in list(weights) if key.startswith(prefix)] for prefix in self.vision}
        mapper = self.mapper_class()
        mapper.init_model_and_config(self.llm, self.llm.model_config)
        self.llm.load_weights(self.text_weights(weights), weight_mapper=mapper)

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.llm(tokens)
        return logits


class Qwen3VLModel(Wrapper):
    """Renames `model.language_model.`, and leaves other keys as they are."""

    vision = ("model.visual.",)

    def prepare_text(self, text: PretrainedConfig) -> None:
        """Set the type of M-RoPE; null raises TypeError in releases with transformers 4 (f4faed18)."""
        if RELEASE.rope_parameters:
            scaling = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None) or {}
            text.rope_scaling = dict(scaling)
        text.rope_scaling["type"] = "mrope"
        self.mrope_section = text.rope_scaling.get("mrope_section")

    def text_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        old, new = "model.language_model.", "model."
        kept = {key: tensor for key, tensor in weights.items() if not key.startswith("model.visual.")}
        return {new + key[len(old) :] if key.startswith(old) else key: tensor for key, tensor in kept.items()}


class Qwen2VLModel(Qwen3VLModel):
    """Qwen2-VL and Qwen2.5-VL: the text model is Qwen 2, whatever its configuration says.

    Its mapper takes off the prefix (`checkpoints/hf/qwen2vl_weight_mapper.py`, 81813aec), and leaves other keys.
    """

    vision = ("visual.", "model.visual.")

    def text_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {key: tensor for key, tensor in weights.items() if not key.startswith("visual.")}
        return super().text_weights(kept)


class Qwen3MoeVLModel(Qwen3VLModel):
    """`modeling_qwen3vl_moe.py`: the same names; its mapper hands on the tensors of experts as they are."""


class Mistral3VLM(Wrapper):
    """Hands the configuration on unchanged and keeps keys below `language_model`."""


class Gemma3VLM(Wrapper):
    """As Mistral 3, with its own text model, which it always builds in bfloat16 (`modeling_gemma3vl.py`)."""

    text_class = Gemma3ForCausalLM
    mapper_class = Gemma3HfWeightMapper

    def __init__(self, config: ModelConfig) -> None:
        for name in ("dtype", "torch_dtype"):
            config.pretrained_config.text_config[name] = "bfloat16"
        super().__init__(config)


class KimiK25ForConditionalGeneration(Wrapper):
    """Takes the prefix off `exclude_modules`, not off the entries of layers; its text model needs no mapper."""

    text_class = DeepseekV3ForCausalLM
    mapper_class = SimpleNamespace
    vision = ("vision_tower.", "mm_projector.")

    def text_quant_config(self, config: Any) -> Any:
        if config.exclude_modules:
            config = copy(config)
            names = [name.removeprefix("language_model.") for name in config.exclude_modules]
            config.exclude_modules = [f"model.{name}" if name.startswith("layers.") else name for name in names]
        return config

    def load_weights(self, weights: Any, weight_mapper: Any = None) -> None:
        self.vision_keys = {prefix: [key for key in list(weights) if key.startswith(prefix)] for prefix in self.vision}
        below = self.text_weights(weights)
        self.llm.load_weights(below or weights)
