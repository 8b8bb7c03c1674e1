"""The engine's view of a plan: `QuantConfig` with explicit module names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.modes import Holding, ScaleForm
from trtllm_ct.quant_config import LayerQuantConfig, QuantConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtllm_ct.plan.model import ModulePlan

__all__ = ["engine_config", "layer_config"]

_WITH_WEIGHTS = frozenset({"Linear", "Embedding"})


def layer_config(holding: Holding) -> LayerQuantConfig:
    """One module's entry."""
    mode = holding.mode
    return LayerQuantConfig(
        quant_algo=mode.algo,
        group_size=holding.group_size if mode.scale is ScaleForm.GROUP else None,
        has_zero_point=mode.zero_point,
        pre_quant_scale=mode.pre_quant_scale,
    )


def engine_config(modules: Iterable[ModulePlan], *, kv_cache_quant_algo: str | None) -> QuantConfig:
    """One mode with the plain modules excluded by name, or MIXED_PRECISION with an entry for every quantized module."""
    layers: dict[str, LayerQuantConfig] = {}
    excluded = []
    for module in modules:
        if module.layer is not None:
            layers[module.name] = module.layer
        elif module.class_name in _WITH_WEIGHTS:
            excluded.append(module.name)
    modes = set(layers.values())
    one = modes.pop() if len(modes) == 1 else None
    return QuantConfig(
        layer=one,
        kv_cache_quant_algo=kv_cache_quant_algo,
        exclude_modules=tuple(excluded) if layers else (),
        quantized_layers={} if one else layers,
    )
