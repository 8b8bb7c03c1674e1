"""`CompressedTensorsConfigLoader` and `to_quant_config`: the configuration of a checkpoint as the engine's QuantConfig.

The loader has the interface of the engine's config loaders (`load(checkpoint_dir)`). Both work without the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.arguments import check_arguments, instance_of
from trtllm_ct.config.hf_config import portable_config, with_tie
from trtllm_ct.config.quantization_config import QuantizationConfig
from trtllm_ct.engine.target import target_named
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.engine_config import engine_config_of_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig

__all__ = ["CompressedTensorsConfigLoader", "EngineConfig", "to_quant_config"]

_CHECKS = {
    "config": instance_of(
        "a QuantizationConfig", QuantizationConfig, remedy="Read one with CompressedTensorsConfigReader().read(...)."
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """A model's configuration as the engine needs it; the fields correspond to those of the engine's `ModelConfig`.

    `pretrained_config` is config.json without the quantization block. `quant_config` has the modes of the whole model.
    `quant_config_dict` has the mode of every quantized module by name; it is None unless modules differ.
    """

    pretrained_config: Mapping[str, Any]
    quant_config: QuantConfig
    quant_config_dict: Mapping[str, LayerQuantConfig] | None


class CompressedTensorsConfigLoader:
    """Loads the configuration of a compressed-tensors checkpoint for a target."""

    def __init__(self, *, target: str = "modelopt") -> None:
        self._target = target

    def load(self, checkpoint_dir: str | Path, **kwargs: Any) -> EngineConfig:  # noqa: ARG002 (engines pass their own)
        """Return the configuration of a directory for the target; no weights are read.

        Raises `CheckpointError` with all faults of the stage that found them.
        """
        checkpoint = open_checkpoint(checkpoint_dir)
        plan = checkpoint.plan(self._target)
        return EngineConfig(
            pretrained_config=with_tie(portable_config(checkpoint.hf_config, plan.dtype), tied=plan.tied),
            quant_config=plan.quant_config,
            quant_config_dict=plan.quant_config.quantized_layers or None,
        )


def to_quant_config(config: QuantizationConfig, target: str = "modelopt") -> QuantConfig:
    """Return the `QuantConfig` of a configuration for the target of this name, with full names of excluded modules.

    If the configuration was read from a directory, the directory is planned, so the result depends on the tensors that
    exist there. If it was read from a dictionary, only the scheme is known: the result has one mode for all modules,
    and excludes the modules that `ignore` names. Raises `PlanError` for a directory that can't be delivered, and
    `ConfigError` if a dictionary is not sufficient.
    """
    check_arguments(_CHECKS, {"config": config})
    if config.directory is not None:
        return open_checkpoint(config.directory).plan(target).quant_config
    return engine_config_of_scheme(config, target_named(target))
