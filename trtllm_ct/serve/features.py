"""What an installed engine can do, found by looking at its modules, never by its version string.

Probing takes the engine's objects as arguments, so nothing here imports it; `bindings.engine_features` hands them in.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.releases import DEFAULT_ENGINE, ENGINES

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["DEFAULT_FEATURES", "EngineFeatures", "EngineParts", "probe_features"]

_STOCK_PARSER = "update_quant_config_from_compressed_tensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFeatures:
    """What of an engine decides how a checkpoint is planned and loaded.

    `engine` is the capability set, a name in `targets.ENGINES`. `additive_zeros` says whether asymmetric int4 has a
    Linear: the engine's own (`has_own_gptq`), or the one that this package may put in. `force_dynamic_quantization` and
    `mapping_argument` say whether `LLM` and the weight loaders take an argument of that name,
    `compressed_tensors_parser` whether the engine reads some compressed-tensors configurations by itself. `version` is
    shown and decides nothing.
    """

    engine: str = DEFAULT_ENGINE
    additive_zeros: bool = True
    has_own_gptq: bool = False
    force_dynamic_quantization: bool = False
    mapping_argument: bool = True
    compressed_tensors_parser: bool = False
    version: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the fields by name."""
        return asdict(self)


DEFAULT_FEATURES = EngineFeatures()
"""Where no engine is installed: the newest stable line, with this package in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """The objects of an engine that are looked at, by the names of their homes in TensorRT-LLM.

    `linear` is the module `_torch.modules.linear`, with `QuantAlgo`, `QuantConfig` and `get_quant_method` in it;
    `llm_args` is `llmapi.llm_args.TorchLlmArgs`, `llm_utils` the module `llmapi.llm_utils`, and `weight_loader`
    `_torch.models.checkpoints.base_weight_loader.BaseWeightLoader`.
    """

    linear: Any
    llm_args: type
    llm_utils: Any
    weight_loader: Any
    version: str | None = None


def probe_features(parts: EngineParts) -> EngineFeatures:
    """The features of an engine, from signatures, members and the one function that chooses a Linear's method.

    Raises `UsageError` for an engine that lacks an algorithm which every supported release has.
    """
    from trtllm_ct.serve.additive_zeros import can_install_additive_zeros, has_own_additive_zeros

    members = parts.linear.QuantAlgo.__members__
    mapping_argument = "mapping" in inspect.signature(parts.weight_loader.load_weights).parameters
    # Without the algorithm there is nothing that a Linear could be asked for, or be told.
    known = QuantAlgo.W4A16_GPTQ in members
    own = known and has_own_additive_zeros(parts.linear)
    return EngineFeatures(
        engine=_capability_set(set(members), mapping_argument=mapping_argument),
        additive_zeros=own or (known and can_install_additive_zeros(parts.linear)),
        has_own_gptq=own,
        force_dynamic_quantization="force_dynamic_quantization" in _fields(parts.llm_args),
        mapping_argument=mapping_argument,
        compressed_tensors_parser=hasattr(parts.llm_utils, _STOCK_PARSER),
        version=parts.version,
    )


def _capability_set(members: Collection[str], *, mapping_argument: bool) -> str:
    """The newest set all of whose algorithms exist; loaders that are not told the mapping are those of 1.0 and 1.1."""
    known = [name for name, each in ENGINES.items() if each.linear | each.experts <= set(members)]
    if not known:
        oldest = next(iter(ENGINES.values()))
        missing = sorted((oldest.linear | oldest.experts) - set(members))
        raise UsageError(
            Fault(
                where="tensorrt_llm.quantization.QuantAlgo",
                expected=f"the algorithms of {oldest.name}",
                found=f"no {', '.join(missing)}",
                remedy="Install TensorRT-LLM 1.0 or newer.",
            )
        )
    return known[-1] if mapping_argument else known[0]


def _fields(arguments: type) -> Collection[str]:
    """The names of the arguments that a model of `LLM`'s arguments takes: pydantic's, else its constructor's."""
    fields: Collection[str] | None = getattr(arguments, "model_fields", None)
    return inspect.signature(arguments).parameters if fields is None else fields
