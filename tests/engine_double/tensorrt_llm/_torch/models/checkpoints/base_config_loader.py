"""Imitates `checkpoints/base_config_loader.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig

__all__ = ["BaseConfigLoader"]


class BaseConfigLoader(ABC):
    """Loads a ModelConfig from a directory."""

    @abstractmethod
    def load(self, checkpoint_dir: str, **kwargs: Any) -> ModelConfig: ...

    def cleanup(self) -> None:  # noqa: B027 (as upstream)
        """Nothing to drop."""
