"""Imitates `checkpoints/base_checkpoint_loader.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.models.checkpoints.auto_mapper import AutoCheckpointMapper
from tensorrt_llm._torch.models.modeling_utils import CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorrt_llm._torch.model_config import ModelConfig
    from tensorrt_llm._torch.models.checkpoints.base_config_loader import BaseConfigLoader
    from tensorrt_llm._torch.models.checkpoints.base_weight_loader import BaseWeightLoader
    from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import BaseWeightMapper
    from tensorrt_llm.mapping import Mapping
    from torch import nn

__all__ = ["BaseCheckpointLoader"]


class BaseCheckpointLoader(ABC):
    """Weight loader, weight mapper and config loader of a format; the newest release calls more than is abstract."""

    @abstractmethod
    def get_default_weight_loader(self) -> BaseWeightLoader: ...

    @abstractmethod
    def get_default_config_loader(self) -> BaseConfigLoader: ...

    @abstractmethod
    def cleanup(self) -> None: ...

    @property
    @abstractmethod
    def weight_loader(self) -> BaseWeightLoader: ...

    @property
    @abstractmethod
    def weight_mapper(self) -> BaseWeightMapper | None: ...

    @weight_mapper.setter
    @abstractmethod
    def weight_mapper(self, value: BaseWeightMapper) -> None: ...

    @property
    @abstractmethod
    def config_loader(self) -> BaseConfigLoader: ...

    @property
    @abstractmethod
    def checkpoint_format(self) -> str: ...

    def load_config(self, checkpoint_dir: str, **kwargs: Any) -> ModelConfig:
        return self.config_loader.load(checkpoint_dir, **kwargs)

    @classmethod
    def get(cls, checkpoint_format: str, **kwargs: Any) -> BaseCheckpointLoader:
        formats = CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING
        if checkpoint_format not in formats:
            raise ValueError(
                f"Checkpoint loader for format {checkpoint_format} not found, available formats are: {list(formats)}"
            )
        loader: BaseCheckpointLoader = formats[checkpoint_format](**kwargs)
        return loader

    def get_initialized_weight_mapper(self, model: nn.Module, config: ModelConfig) -> BaseWeightMapper:
        """Return the loader's mapper, or that of the architecture, which the loader then keeps."""
        mapper = self.weight_mapper
        if mapper is None:
            mapper = AutoCheckpointMapper.get(self.checkpoint_format, config.pretrained_config.architectures[0])
            self.weight_mapper = mapper
        mapper.init_model_and_config(model, config)
        return mapper

    if RELEASE.mapping_argument:

        def load_weights(self, checkpoint_dir: str, mapping: Mapping, **kwargs: Any) -> Any:
            return self.weight_loader.load_weights(checkpoint_dir, mapping=mapping, **kwargs)
    else:

        def load_weights(self, checkpoint_dir: str, **kwargs: Any) -> Any:  # type: ignore[misc]
            return self.weight_loader.load_weights(checkpoint_dir, **kwargs)

    if RELEASE.weight_sessions:

        @contextmanager
        def open_weight_session(self, checkpoint_dir: str, mapping: Mapping, **kwargs: Any) -> Iterator[Any]:
            """Yield the weights until the block ends; the read-ahead of the HF loader is not imitated."""
            yield self.load_weights(checkpoint_dir, mapping=mapping, **kwargs)

        def activate_weight_session(
            self, readiness_error: BaseException | None = None, *, weight_mapper: BaseWeightMapper | None = None
        ) -> None: ...

        def build_checkpoint_catalog(self, checkpoint_dir: str, **kwargs: Any) -> None: ...

        def is_weights_preloaded(self) -> bool:
            return False

        def post_load_apply(self, model: nn.Module, *, weights_preloaded: bool = False) -> None: ...
