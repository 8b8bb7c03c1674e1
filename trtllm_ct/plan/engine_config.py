"""Make the engine's `QuantConfig`, with explicit module names, from a plan or from a configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.errors import ConfigError, FaultCollector
from trtllm_ct.base.schemes import ActOrder, Element, NumberType, QuantArgs, QuantScheme
from trtllm_ct.engine.holdings import Holding, Weight, holdings
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
from trtllm_ct.plan.kv_cache import KvCache
from trtllm_ct.plan.plan import OTHER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.engine_names import EngineNames
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["engine_config", "engine_config_of_scheme", "layer_config"]

_WITH_WEIGHTS = frozenset({"Linear", "Embedding"})


def layer_config(holding: Holding) -> LayerQuantConfig:
    """Return the configuration entry of a module that is delivered in this mode."""
    mode = holding.mode
    return LayerQuantConfig(
        quant_algo=mode.algo,
        group_size=mode.entry_group_size or holding.group_size,
        has_zero_point=mode.zero_point,
        pre_quant_scale=mode.pre_quant_scale,
    )


def engine_config(
    modules: Iterable[ModulePlan], names: EngineNames, *, kv_cache_quant_algo: str | None, entries: bool = False
) -> QuantConfig:
    """Return the `QuantConfig` of a plan's modules, each under all its `names`.

    With a single mode it names that mode, unless `entries` are asked for. Otherwise, and if the head is quantized, it
    is MIXED_PRECISION with an entry for every quantized module: without an entry, engines look for scales of the head
    in the files of the directory, and a prepared one has none (`_torch/models/modeling_utils.py:
    _resolve_lm_head_quant_config`, pull request 16511).
    Modules that are delivered plain are excluded by name, if any module is quantized.
    """
    layers: dict[str, LayerQuantConfig] = {}
    excluded: dict[str, None] = {}
    for module in modules:
        if module.layer is not None:
            layers[module.engine_name] = module.layer
        elif _is_plain(module, names):
            excluded[module.engine_name] = None
    # Modules share few objects, and hashing one takes longer than looking at its identity.
    modes = set({id(layer): layer for layer in layers.values()}.values())
    one = modes.pop() if len(modes) == 1 and names.head not in layers and not entries else None
    named = {} if one else {name: layer for module, layer in layers.items() for name in names.of_module(module)}
    exclusions = dict.fromkeys(name for module in excluded for name in names.of_module(module))
    return QuantConfig(
        layer=one,
        kv_cache_quant_algo=kv_cache_quant_algo,
        exclude_modules=tuple(exclusions) if layers else (),
        quantized_layers=named,
    )


def _is_plain(module: ModulePlan, names: EngineNames) -> bool:
    """Whether a module that is delivered plain is one that an engine could build quantized.

    The text model's tables name the class of a module. Of any other module, which may be a Linear of a vision tower, a
    projector or a draft layer, the tensors tell: its `weight` has several axes, or any of its tensors if it belongs to
    routed experts, which may be stacked under other names. A router's bias may be stored beside them, too.
    """
    if module.class_name != OTHER:
        return module.class_name in _WITH_WEIGHTS
    of_experts = names.all_experts(module.name) is not None
    tensors = [delivery for delivery in module.deliveries if of_experts or delivery.name.endswith(".weight")]
    return any(len(delivery.spec.shape) > 1 for delivery in tensors)


def engine_config_of_scheme(config: QuantizationConfig, target: Target) -> QuantConfig:
    """Return the `QuantConfig` of a configuration without a directory: one mode for all modules.

    Raises `ConfigError` when groups get different modes, when `ignore` holds patterns, and when transforms run with
    the model: each of these needs the names of modules.
    """
    faults = FaultCollector()
    layers = {
        _layer_of_scheme(group.scheme, args, target)
        for group in config.groups
        if (args := group.scheme.weights) is not None
    }
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


def _layer_of_scheme(scheme: QuantScheme, args: QuantArgs, target: Target) -> LayerQuantConfig | None:
    """Return the mode of modules with a scheme, whose weights have the arguments `args`; None if no mode holds them."""
    exponents = args.scale_dtype is not None and args.scale_dtype.endswith("uint8")
    weight = Weight(
        scheme=scheme,
        element=_element(args),
        has_zero_point=not args.symmetric,
        permuted=args.actorder is ActOrder.GROUP,
        two_level=args.num_bits == 4 and args.type is NumberType.FLOAT and not exponents,
        exponent_scale=exponents,
    )
    algos = target.algos(expert=False)
    held = (holding for holding in holdings(weight, target.capabilities.platform) if holding.mode.algo in algos)
    return next((layer_config(holding) for holding in held), None)


def _element(args: QuantArgs) -> Element:
    """Return what the codes of these arguments mean; floats of any other width count as E4M3."""
    if args.type is NumberType.INT:
        return Element.INT
    return {4: Element.E2M1, 6: Element.E2M3}.get(args.num_bits, Element.E4M3)


def _needs_directory(where: str, found: str, faults: FaultCollector) -> None:
    """Add the fault of a configuration whose meaning depends on the names of modules."""
    faults.add(
        where=where,
        expected="one mode for modules that are named",
        found=found,
        remedy="Read the checkpoint directory instead of its configuration: names of modules are needed.",
    )
