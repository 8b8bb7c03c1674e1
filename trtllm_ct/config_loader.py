"""CompressedTensorsConfigLoader: what the engine has to know about a model before it builds it.

It uses the engine's verb (`load(checkpoint_dir)`) and works without the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.pipeline import open_checkpoint
from trtllm_ct.targets.hf_config import portable_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.quant_config import LayerQuantConfig, QuantConfig

__all__ = ["CompressedTensorsConfigLoader", "EngineConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """A model's configuration in the engine's terms.

    `pretrained_config` is config.json without quantization; `quant_config` the global modes; `quant_config_dict`
    the mode of every quantized module by name when modules differ, None otherwise, as the engine's `ModelConfig`
    has it.
    """

    pretrained_config: Mapping[str, Any]
    quant_config: QuantConfig
    quant_config_dict: Mapping[str, LayerQuantConfig] | None


class CompressedTensorsConfigLoader:
    """Reads the configuration of a compressed-tensors checkpoint."""

    def __init__(self, *, target: str = "modelopt") -> None:
        self._target = target

    def load(self, checkpoint_dir: str | Path, **kwargs: Any) -> EngineConfig:  # noqa: ARG002 (engines pass their own)
        """The configuration of a directory for the target; headers only.

        Raises `CheckpointError` with all faults of the stage that found them.
        """
        checkpoint = open_checkpoint(checkpoint_dir)
        plan = checkpoint.plan(self._target)
        return EngineConfig(
            pretrained_config=portable_config(checkpoint.hf_config, plan.dtype),
            quant_config=plan.quant_config,
            quant_config_dict=plan.quant_config.quantized_layers or None,
        )
