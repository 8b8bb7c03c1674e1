"""A configuration in the engine's terms: `CompressedTensorsConfigLoader` and `to_quant_config`.

The loader uses the engine's verb (`load(checkpoint_dir)`); both work without the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.config.hf_config import portable_config
from trtllm_ct.engine.target import target_named
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
from trtllm_ct.plan.engine_config import engine_config_of_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig

__all__ = ["CompressedTensorsConfigLoader", "EngineConfig", "to_quant_config"]


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


def to_quant_config(config: QuantizationConfig, target: str = "modelopt") -> QuantConfig:
    """What TensorRT-LLM's `QuantConfig` needs for the target of that name, with excluded modules by their full names.

    A configuration that was read from a directory is planned with the tensors that exist there. A dictionary alone
    gives the scheme only: one mode for all modules, and the excluded ones as far as `ignore` names them. Raises
    `PlanError` for a directory that can't be delivered, and `ConfigError` where a dictionary does not say enough.
    """
    if config.directory is not None:
        return plan_checkpoint(config.directory, target).quant_config
    return engine_config_of_scheme(config, target_named(target))
