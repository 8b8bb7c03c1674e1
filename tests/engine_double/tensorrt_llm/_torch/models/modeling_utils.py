"""Imitates `_torch/models/modeling_utils.py`: registries, per-layer configurations, and the loop that loads a model."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.modules.attention import Attention
from tensorrt_llm._torch.modules.fused_moe.interface import MoE
from tensorrt_llm._torch.modules.linear import Linear, WeightMode
from tensorrt_llm.models.modeling_utils import QuantConfig
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorrt_llm._torch.model_config import ModelConfig
    from tensorrt_llm._torch.models.checkpoints.base_weight_mapper import BaseWeightMapper

CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING: dict[str, Any] = {}
MODEL_CLASS_CHECKPOINT_WEIGHT_LOADER_DEFAULT_MAPPING: dict[str, Any] = {}
MODEL_CLASS_CONFIG_LOADER_DEFAULT_MAPPING: dict[str, Any] = {}
MODEL_CLASS_MAPPER_MAPPING: dict[str, Any] = {}
MODEL_CLASS_MAPPING: dict[str, Any] = {}

Class = TypeVar("Class", bound=type)
_FUSED = {
    WeightMode.FUSED_QKV_LINEAR: ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    WeightMode.FUSED_GATE_UP_LINEAR: ("gate_up_proj", ("gate_proj", "up_proj")),
}


def _registering(registry: dict[str, Any], key: str) -> Callable[[Class], Class]:
    """The last registration silently replaces earlier ones."""

    def register(cls: Class) -> Class:
        registry[key] = cls
        return cls

    return register


def register_auto_model(name: str) -> Callable[[Class], Class]:
    return _registering(MODEL_CLASS_MAPPING, name)


def register_checkpoint_loader(name: str) -> Callable[[Class], Class]:
    return _registering(CHECKPOINT_LOADER_FORMAT_DEFAULT_MAPPING, name)


def register_checkpoint_weight_loader(name: str) -> Callable[[Class], Class]:
    return _registering(MODEL_CLASS_CHECKPOINT_WEIGHT_LOADER_DEFAULT_MAPPING, name)


def register_config_loader(name: str) -> Callable[[Class], Class]:
    return _registering(MODEL_CLASS_CONFIG_LOADER_DEFAULT_MAPPING, name)


def register_mapper(format: str, name: str | None = None) -> Callable[[Class], Class]:  # noqa: A002
    return _registering(MODEL_CLASS_MAPPER_MAPPING, f"{name}_{format}" if name else format)


def get_checkpoint_weight_loader(name: str) -> Any:
    if name not in MODEL_CLASS_CHECKPOINT_WEIGHT_LOADER_DEFAULT_MAPPING:
        raise ValueError(f"Default checkpoint weight loader for {name} not found.")
    return MODEL_CLASS_CHECKPOINT_WEIGHT_LOADER_DEFAULT_MAPPING[name]


def get_config_loader(name: str) -> Any:
    if name not in MODEL_CLASS_CONFIG_LOADER_DEFAULT_MAPPING:
        raise ValueError(f"Default config loader for {name} not found.")
    return MODEL_CLASS_CONFIG_LOADER_DEFAULT_MAPPING[name]


def compute_in_bfloat16(pretrained: Any) -> None:
    """What constructors of some classes do: `config.torch_dtype = torch.bfloat16`, whatever config.json says."""
    pretrained.dtype = pretrained.torch_dtype = "bfloat16"


class DecoderModelForCausalLM(nn.Module):
    """Class `DecoderModelForCausalLM`: what happens to any model after its modules are named."""

    model_config: ModelConfig

    def finish_construction(self) -> None:
        """`__post_init__`: configurations per layer, then exclusions, then every module allocates."""
        self.apply_layerwise_quant_config()
        self.apply_quant_config_exclude_modules()
        for module in list(self.modules()):
            if module is not self and callable(getattr(module, "create_weights", None)):
                module.create_weights()

    @property
    def config(self) -> Any:
        return self.model_config.pretrained_config

    def apply_layerwise_quant_config(self) -> None:
        """Assign the first entry that matches: fused Linears, experts and attention by substring, others by equality.

        The name of a wrapper's `backend` is compared too, and is in no key that names an expert's Linear.
        """
        entries = self.model_config.quant_config_dict
        for name, module in self.named_modules() if entries is not None else ():
            if isinstance(module, MoE):
                found = _first(entries, lambda key, name=name: name in key)
            elif isinstance(module, Linear):
                found = _first(entries, _layer_test(name, module))
            elif isinstance(module, Attention):
                found = _first(entries, lambda key, name=name: f"{name}.q_proj" in key)
            else:
                continue
            module.quant_config = found or module.quant_config

    def apply_quant_config_exclude_modules(self) -> None:
        """One excluded member un-quantizes a whole fused Linear; the KV cache stays as it is."""
        whole = self.model_config.quant_config
        if whole.exclude_modules is None:
            return
        plain = QuantConfig(kv_cache_quant_algo=whole.kv_cache_quant_algo)
        for name, module in self.named_modules():
            if getattr(module, "quant_config", None) is None:
                continue
            if any(whole.is_module_excluded_from_quantization(each) for each in _names_of(name, module)):
                module.quant_config = plain

    def load_weights(self, weights: Any, weight_mapper: BaseWeightMapper, **kwargs: Any) -> None:
        _load_weights_impl_v2(self, weights, weight_mapper, **kwargs)


def _first(entries: dict[str, QuantConfig] | None, test: Callable[[str], bool]) -> QuantConfig | None:
    return next((config for key, config in (entries or {}).items() if test(key)), None)


def _layer_test(name: str, module: Linear) -> Callable[[str], bool]:
    """Early texts of `modeling_utils.py` look for `gate_proj` only; no release looks for `qkv_proj`."""
    mode, around = module.weights_loading_config.weight_mode, name.rpartition(".")[0]
    if mode == WeightMode.FUSED_GATE_UP_LINEAR:
        knows_stored = RELEASE.fused_entries
        return lambda key: f"{around}.gate_proj" in key or (knows_stored and f"{around}.gate_up_proj" in key)
    if mode == WeightMode.FUSED_QKV_LINEAR:
        return lambda key: f"{around}.q_proj" in key
    return lambda key: key == name


def _names_of(name: str, module: nn.Module) -> list[str]:
    """Return the module's name, and the names of its parts if it is fused."""
    if not isinstance(module, Linear) or module.weights_loading_config.weight_mode not in _FUSED:
        return [name]
    fused, members = _FUSED[module.weights_loading_config.weight_mode]
    return [name, *(name.replace(fused, member) for member in members)]


def _load_weights_impl_v2(
    model: DecoderModelForCausalLM, weights: Any, weight_mapper: BaseWeightMapper, allow_partial_loading: bool = False
) -> None:
    """Load into every module with parameters the tensors that have its name as prefix.

    A module without tensors is skipped, and unread tensors are not noticed.
    """

    def load(named: tuple[str, nn.Module]) -> None:
        name, module = named
        if module._parameters and not weight_mapper.should_skip_module(name):
            _load_module(name, module, weights, weight_mapper, allow_partial_loading)

    modules = list(model.named_modules(remove_duplicate=False))
    if os.environ.get("TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL") == "1":
        for named in modules:
            load(named)
        return
    with ThreadPoolExecutor(max_workers=int(os.environ.get("TLLM_LOAD_WEIGHTS_NUM_WORKERS", "2"))) as pool:
        list(pool.map(load, modules))


def _load_module(name: str, module: Any, weights: Any, mapper: BaseWeightMapper, partial: bool) -> None:
    *around, leaf = name.split(".")
    if leaf == "backend" and isinstance(module, MoE):
        # Checkpoints don't have the wrapper's child in their names.
        name, (*around, leaf) = ".".join(around), around
    more = {"allow_partial_loading": True} if partial else {}
    if mapper.does_require_special_handling(leaf):
        module.load_weights(weights=mapper.apply_callbacks(module, leaf, around, weights), **more)
        _consumed(weights, *(".".join([*around, source]) for source in mapper.mapping[leaf]))
        return
    own = mapper.filter_weights(name, weights)
    if not own:
        return
    if mapper.is_special_instance_module(module):
        mapper.handle_special_instance_module(module, name, own)
    elif hasattr(module, "load_weights"):
        module.load_weights(weights=[own], **more)
    else:
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                mapper.handle_manual_copy(name, own, parameter_name, parameter)
    _consumed(weights, name)


def _consumed(weights: Any, *prefixes: str) -> None:
    """Newer releases free the tensors that a module has copied."""
    for prefix in prefixes if hasattr(weights, "mark_consumed") else ():
        weights.mark_consumed(prefix)
