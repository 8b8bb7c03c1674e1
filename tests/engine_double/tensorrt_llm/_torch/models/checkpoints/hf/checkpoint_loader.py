"""Imitates `checkpoints/hf/checkpoint_loader.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.models.checkpoints.base_checkpoint_loader import BaseCheckpointLoader
from tensorrt_llm._torch.models.checkpoints.hf.config_loader import HfConfigLoader
from tensorrt_llm._torch.models.checkpoints.hf.weight_loader import HfWeightLoader, read_files
from tensorrt_llm._torch.models.modeling_utils import register_checkpoint_loader

if TYPE_CHECKING:
    from tensorrt_llm._torch.models.checkpoints.base_config_loader import BaseConfigLoader
    from tensorrt_llm._torch.models.checkpoints.base_weight_loader import BaseWeightLoader
    from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import BaseWeightMapper
    from tensorrt_llm.mapping import Mapping

__all__ = ["HfCheckpointLoader"]


@register_checkpoint_loader("HF")
class HfCheckpointLoader(BaseCheckpointLoader):
    """Takes its parts by keyword; `cleanup` drops all of them."""

    def __init__(
        self,
        *,
        weight_loader: BaseWeightLoader | None = None,
        weight_mapper: BaseWeightMapper | None = None,
        config_loader: BaseConfigLoader | None = None,
    ) -> None:
        self._weight_loader: Any = weight_loader or self.get_default_weight_loader()
        self._config_loader: Any = config_loader or self.get_default_config_loader()
        self._weight_mapper = weight_mapper
        self._checkpoint_format = "HF"

    def get_default_weight_loader(self) -> BaseWeightLoader:
        return HfWeightLoader()

    def get_default_config_loader(self) -> BaseConfigLoader:
        return HfConfigLoader()

    if RELEASE.weight_sessions:

        def load_weights(self, checkpoint_dir: str, mapping: Mapping, **kwargs: Any) -> Any:
            """Open the files itself for a worker that has a part of the model (`_uses_context_only_lazy_loading`).

            Upstream does so only for objects of exactly this class. The double does not make that exception, so that
            it finds a subclass that depends on it.
            """
            if getattr(getattr(kwargs.get("model"), "model", None), "disagg_context_only", False) is True:
                return read_files(checkpoint_dir)
            return super().load_weights(checkpoint_dir, mapping=mapping, **kwargs)

    @property
    def weight_loader(self) -> BaseWeightLoader:
        loader: BaseWeightLoader = self._weight_loader
        return loader

    @property
    def weight_mapper(self) -> BaseWeightMapper | None:
        return self._weight_mapper

    @weight_mapper.setter
    def weight_mapper(self, value: BaseWeightMapper) -> None:
        self._weight_mapper = value

    @property
    def config_loader(self) -> BaseConfigLoader:
        loader: BaseConfigLoader = self._config_loader
        return loader

    @property
    def checkpoint_format(self) -> str:
        return self._checkpoint_format

    def cleanup(self) -> None:
        for part in (self._weight_mapper, self._weight_loader, self._config_loader):
            if part is not None:
                part.cleanup()
        self._weight_mapper = self._weight_loader = self._config_loader = None
