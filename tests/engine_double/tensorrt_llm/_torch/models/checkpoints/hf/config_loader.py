"""Imitates `checkpoints/hf/config_loader.py`."""

from __future__ import annotations

from typing import Any

from tensorrt_llm._torch.model_config import ModelConfig
from tensorrt_llm._torch.models.checkpoints.base_config_loader import BaseConfigLoader
from tensorrt_llm._torch.models.modeling_utils import register_config_loader

__all__ = ["HfConfigLoader"]


@register_config_loader("HF")
class HfConfigLoader(BaseConfigLoader):
    """Loads config.json with ModelConfig."""

    def load(self, checkpoint_dir: str, **kwargs: Any) -> ModelConfig:
        return ModelConfig.from_pretrained(checkpoint_dir, **kwargs)
