"""Probes what an installed TensorRT-LLM can do, by looking at its modules instead of its version string.

The engine's objects are arguments, so this module does not import the engine; `bindings.engine_features` passes them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, PlanError, UsageError
from trtllm_ct.base.json_form import fields_form
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.platform import Platform
from trtllm_ct.engine.releases import DEFAULT_ENGINE, RELEASES
from trtllm_ct.engine.target import ENGINES, TENSORRT_LLM
from trtllm_ct.plan.options import PlanOptions

if TYPE_CHECKING:
    from collections.abc import Collection

    from trtllm_ct.config.detect import Detection

__all__ = ["DEFAULT_FEATURES", "EngineFeatures", "EngineParts", "probe_features", "require_class", "unknown_class"]

_FORCE_DYNAMIC = "force_dynamic_quantization"
_STOCK_PARSER = "update_quant_config_from_compressed_tensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFeatures:
    """The properties of an engine that decide how a checkpoint is planned and loaded.

    - `engine`: the name of its capability set, a key of `trtllm_ct.engine.target.ENGINES`.
    - `additive_zeros`: whether there is a Linear method for asymmetric int4 (W4A16_GPTQ), either the engine's own
      (`has_own_gptq`) or the one that this package can install.
    - `force_dynamic_quantization`: whether `LLM` takes the argument of this name, and attention honours it. Some
      releases have the argument, and honour it in Linears only.
    - `mapping_argument`: whether the engine's weight loaders take the argument `mapping`.
    - `compressed_tensors_parser`: whether the engine parses some compressed-tensors configurations by itself.
    - `version`: the engine's version string. It is only shown; no decision depends on it.
    - `model_classes`: the architectures that it can build, those that the user registered among them; empty if unknown.
    - `sm`: the SM of this machine's GPU, one of `trtllm_ct.engine.platform.SMS`; None if it has none of them.
    """

    engine: str = DEFAULT_ENGINE
    additive_zeros: bool = True
    has_own_gptq: bool = False
    force_dynamic_quantization: bool = False
    mapping_argument: bool = True
    compressed_tensors_parser: bool = False
    version: str | None = None
    model_classes: frozenset[str] = frozenset()
    sm: int | None = None

    @property
    def platform(self) -> Platform:
        """The release line of the capability set, with the SM of this machine's GPU."""
        release = next(release for release in RELEASES if release.name == self.engine)
        return Platform(release=release, sm=self.sm)

    @property
    def plan_options(self) -> PlanOptions:
        """The options of a plan for this engine on this machine, as this package loads it, without anything asked."""
        return PlanOptions(to=TENSORRT_LLM.name, engine=self.engine, sm=self.sm, additive_zeros=self.additive_zeros)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, for JSON output; without the model classes, which are a hundred."""
        form = fields_form(self)
        del form["model_classes"]
        return form


DEFAULT_FEATURES = EngineFeatures()
"""The features assumed when no engine is installed: the newest stable release line, with this package's method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """The objects of the engine that `probe_features` looks at.

    - `linear`: the module `_torch.modules.linear`, which has `QuantAlgo`, `QuantConfig` and `get_quant_method`.
    - `attention`: the class `_torch.modules.attention.Attention`.
    - `llm_args`: the class `llmapi.llm_args.TorchLlmArgs`.
    - `llm_utils`: the module `llmapi.llm_utils`.
    - `weight_loader`: the class `_torch.models.checkpoints.base_weight_loader.BaseWeightLoader`.
    - `version`: the engine's version string, if it has one.
    - `model_classes`: the keys of its registries of model classes.
    - `sm`: the SM of this machine's GPU, if it is known.
    """

    linear: Any
    attention: type
    llm_args: type
    llm_utils: Any
    weight_loader: Any
    version: str | None = None
    model_classes: frozenset[str] = frozenset()
    sm: int | None = None


def probe_features(parts: EngineParts) -> EngineFeatures:
    """Return the features of an engine.

    They are found from signatures, from enum members, and by calling `get_quant_method`, the function that chooses the
    method of a Linear. Raises `UsageError` when the engine lacks an algorithm that every supported release has.
    """
    from trtllm_ct.serve.additive_zeros import can_install_additive_zeros, has_own_additive_zeros

    algorithms = parts.linear.QuantAlgo.__members__
    mapping_argument = "mapping" in inspect.signature(parts.weight_loader.load_weights).parameters
    # An engine without this member of QuantAlgo can't be configured for it, so no method could be chosen.
    has_gptq = QuantAlgo.W4A16_GPTQ in algorithms
    has_own_gptq = has_gptq and has_own_additive_zeros(parts.linear)
    return EngineFeatures(
        engine=_capability_set(set(algorithms), mapping_argument=mapping_argument),
        additive_zeros=has_own_gptq or (has_gptq and can_install_additive_zeros(parts.linear)),
        has_own_gptq=has_own_gptq,
        force_dynamic_quantization=_FORCE_DYNAMIC in _fields(parts.llm_args) and _attention_honours(parts.attention),
        mapping_argument=mapping_argument,
        compressed_tensors_parser=hasattr(parts.llm_utils, _STOCK_PARSER),
        version=parts.version,
        model_classes=parts.model_classes,
        sm=parts.sm,
    )


def require_class(detection: Detection, features: EngineFeatures) -> None:
    """Raise `PlanError` if the engine can't build the model of a detected directory; see `unknown_class`."""
    fault = unknown_class(detection, features)
    if fault is not None:
        raise PlanError(fault)


def unknown_class(detection: Detection, features: EngineFeatures) -> Fault | None:
    """Return the fault of an engine that can't build the model of a detected directory; None if it can.

    The engine itself is asked, because users may register model classes (`--custom_module_dirs`). A directory without
    config.json, in Mistral's own form, has one of the classes that every release has.
    """
    names = detection.files.get("config.json", {}).get("architectures") or []
    name = str(names[0]) if isinstance(names, list) and names else str(names)
    if not features.model_classes or not names or name in features.model_classes:
        return None
    return Fault(
        where="config.json: architectures",
        expected=f"a model class that TensorRT-LLM {features.version or 'here'} has",
        found=f"{name}, which it would refuse as unknown",
        remedy="Run `trtllm-ct convert DIR OUT --to dense` for another program, or register the class before LLM.",
    )


def _capability_set(algorithms: Collection[str], *, mapping_argument: bool) -> str:
    """Return the name of the newest capability set all of whose algorithms the engine has.

    An engine whose weight loaders don't take `mapping` is release 1.0 or 1.1, so it gets the oldest set.
    """
    supported = [name for name, engine in ENGINES.items() if engine.linear | engine.experts <= set(algorithms)]
    if not supported:
        oldest = next(iter(ENGINES.values()))
        missing = sorted((oldest.linear | oldest.experts) - set(algorithms))
        raise UsageError(
            Fault(
                where="tensorrt_llm.quantization.QuantAlgo",
                expected=f"the algorithms of {oldest.name}",
                found=f"no {', '.join(missing)}",
                remedy="Install TensorRT-LLM 1.0 or newer.",
            )
        )
    return supported[-1] if mapping_argument else supported[0]


def _attention_honours(attention: type) -> bool:
    """Whether the function that decides about the output of attention reads `force_dynamic_quantization`.

    Source: TensorRT-LLM `_torch/modules/attention.py`, `Attention._use_quantize_output`.
    """
    decides = getattr(attention, "_use_quantize_output", None)
    code = getattr(inspect.unwrap(decides), "__code__", None) if callable(decides) else None
    return code is not None and _FORCE_DYNAMIC in code.co_names


def _fields(arguments: type) -> Collection[str]:
    """Return the names of the arguments that `arguments` takes: pydantic fields, or its constructor's parameters."""
    fields: Collection[str] | None = getattr(arguments, "model_fields", None)
    return inspect.signature(arguments).parameters if fields is None else fields
