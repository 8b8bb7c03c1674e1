"""Imitates `checkpoints/base_weight_mapper.py`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from tensorrt_llm._torch.models.checkpoints.base_weight_loader import ConsumableWeightsDict
from tensorrt_llm._torch.modules.sharding import copy_weight

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorrt_llm._torch.model_config import ModelConfig
    from torch import Tensor, nn

__all__ = ["BaseWeightMapper"]

Weights = dict[str, "Tensor"]


class BaseWeightMapper(ABC):
    """Maps the names of a checkpoint to the modules of a model."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[nn.Module, str, Weights], Weights]] = []
        self._mapping: dict[str, list[str]] = {}
        self._skip_modules: list[str] = []
        self._model: Any = None
        self._config: Any = None
        self._tp_size = 1

    def init_model_and_config(self, model: Any, config: ModelConfig) -> None:
        """The model must have `model_config` and `config`."""
        if not hasattr(model, "model_config") or not hasattr(model, "config"):
            raise ValueError("model must have model_config and config attributes")
        self._model, self._config = model, config
        mapping = model.model_config.mapping
        self._tp_size = 1 if mapping.enable_attention_dp else mapping.tp_size
        self.map_weights()

    @abstractmethod
    def map_weights(self) -> None: ...

    @abstractmethod
    def apply_callbacks(
        self, module: nn.Module, module_name: str, module_names_breakdown: list[str], weights: Weights
    ) -> list[Weights]:
        """Return the parts of a fused module, of all weights; it is called once per module.

        `module_name` is the last component of the module's name, `module_names_breakdown` are those before it.
        """

    def cleanup(self) -> None:
        self._model = self._config = None

    @property
    def mapping(self) -> dict[str, list[str]]:
        return self._mapping

    def preprocess_weights(self, weights: Weights) -> None:  # noqa: B027 (as upstream)
        """The general loop never calls it, and it returns None."""

    def rename_by_params_map(self, params_map: dict[str, str], weights: Weights) -> Weights:
        renamed = {}
        for key, value in weights.items():
            pattern = next((each for each in params_map if re.match(each, key)), None)
            renamed[re.sub(pattern, params_map[pattern], key) if pattern else key] = value
        return renamed

    def does_require_special_handling(self, module_name: str) -> bool:
        return module_name in self.mapping

    def is_special_instance_module(self, module: nn.Module) -> bool:
        return False

    def handle_special_instance_module(self, module: Any, module_name: str, module_weights: Weights, **_: Any) -> None:
        raise NotImplementedError

    def handle_manual_copy(self, module_name: str, module_weights: Weights, n: str, p: Tensor, **_: Any) -> None:
        copy_weight(p, module_weights[n])

    def should_skip_module(self, module_name: str) -> bool:
        return any(skipped in module_name for skipped in self._skip_modules)

    def add_skip_modules(self, value: list[str]) -> None:
        self._skip_modules.extend(value)

    def filter_weights(self, prefix: str, weights: Any) -> Weights:
        """Return the keys that start with the prefix, whatever character follows it."""
        if isinstance(weights, ConsumableWeightsDict):
            return weights.filter_prefix(prefix)
        return {key[len(prefix) + 1 :]: weights[key] for key in list(weights) if key.startswith(prefix)}
