"""The engine's view of a plan: `QuantConfig` with explicit module names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.errors import ConfigError, FaultCollector
from trtllm_ct.base.schemes import ActOrder, Element, NumberType, QuantArgs
from trtllm_ct.engine.holdings import Holding, Weight, holdings
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
from trtllm_ct.plan.kv_cache import KvCache

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["engine_config", "engine_config_of_scheme", "layer_config"]

_WITH_WEIGHTS = frozenset({"Linear", "Embedding"})


def layer_config(holding: Holding) -> LayerQuantConfig:
    """One module's entry."""
    mode = holding.mode
    return LayerQuantConfig(
        quant_algo=mode.algo,
        group_size=mode.entry_group_size or holding.group_size,
        has_zero_point=mode.zero_point,
        pre_quant_scale=mode.pre_quant_scale,
    )


def engine_config(modules: Iterable[ModulePlan], *, kv_cache_quant_algo: str | None) -> QuantConfig:
    """One mode with the plain modules excluded by name, or MIXED_PRECISION with an entry for every quantized module."""
    layers: dict[str, LayerQuantConfig] = {}
    excluded: dict[str, None] = {}
    for module in modules:
        if module.layer is not None:
            layers[module.engine_name] = module.layer
        elif module.class_name in _WITH_WEIGHTS:
            excluded[module.engine_name] = None
    modes = set(layers.values())
    one = modes.pop() if len(modes) == 1 else None
    return QuantConfig(
        layer=one,
        kv_cache_quant_algo=kv_cache_quant_algo,
        exclude_modules=tuple(excluded) if layers else (),
        quantized_layers={} if one else layers,
    )


def engine_config_of_scheme(config: QuantizationConfig, target: Target) -> QuantConfig:
    """The engine's view of a configuration without its tensors: one scheme for all modules.

    Raises `ConfigError` when groups end in different modes, `ignore` holds patterns or transforms run with the model:
    all of them need the names of modules.
    """
    faults = FaultCollector()
    layers = {_layer_of_group(group, target) for group in config.groups if group.scheme.weights is not None}
    if len(layers) > 1:
        _needs_directory(f"{config.origin}.config_groups", f"groups of {len(layers)} different modes", faults)
    patterns = [entry for entry in config.ignore if entry.startswith("re:")]
    if patterns:
        _needs_directory(f"{config.origin}.ignore", f"patterns ({', '.join(patterns)})", faults)
    online = [str(transform) for transform in config.transforms if transform.online]
    if online:
        _needs_directory(f"{config.origin}.transform_config", f"the online transform {' and '.join(online)}", faults)
    faults.raise_if_any(ConfigError)
    layer = layers.pop() if layers else None
    kv_cache = KvCache(config, target, kv_heads=0, alone=layer is None)
    return QuantConfig(layer=layer, kv_cache_quant_algo=kv_cache.algo, exclude_modules=config.ignore)


def _layer_of_group(group: ConfigGroup, target: Target) -> LayerQuantConfig | None:
    args = group.scheme.weights
    if args is None:
        return None
    exponents = args.scale_dtype is not None and args.scale_dtype.endswith("uint8")
    weight = Weight(
        scheme=group.scheme,
        element=_element(args),
        has_zero_point=not args.symmetric,
        permuted=args.actorder is ActOrder.GROUP,
        two_level=args.num_bits == 4 and args.type is NumberType.FLOAT and not exponents,
        exponent_scale=exponents,
    )
    algos = target.algos(expert=False)
    held = (hold for hold in holdings(weight) if hold.as_is and hold.mode.algo in algos)
    return next((layer_config(hold) for hold in held), None)


def _element(args: QuantArgs) -> Element:
    if args.type is NumberType.INT:
        return Element.INT
    return {4: Element.E2M1, 6: Element.E2M3}.get(args.num_bits, Element.E4M3)


def _needs_directory(where: str, found: str, faults: FaultCollector) -> None:
    faults.add(
        where=where,
        expected="one mode for modules that are named",
        found=found,
        remedy="Read the checkpoint directory instead of its configuration: names of modules are needed.",
    )
