"""TensorRT-LLM's `QuantConfig` as a frozen value: how the engine is to read a delivered checkpoint.

The field names are the engine's (`tensorrt_llm.models.modeling_utils.QuantConfig`), and `to_dict` is the
`quantization` part of the `hf_quant_config.json` that ModelOpt writes and every release reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import ConfigError, Fault
from trtllm_ct.base.json_form import from_fields, json_object
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.modes import LINEAR_MODES, MODES_BY_ALGO

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LayerQuantConfig", "QuantConfig", "read_quantization"]

# ModelOpt's names for some algorithms. TensorRT-LLM reads them in upper and lower case
# (`quantization/modelopt_config.py`).
_ALIASES = {alias: mode.algo for mode in LINEAR_MODES for alias in mode.aliases}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuantConfig:
    """How one module is quantized: an entry of `quantized_layers`."""

    quant_algo: QuantAlgo
    group_size: int | None = None
    has_zero_point: bool = False
    pre_quant_scale: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the fields that the algorithm doesn't use."""
        mode = MODES_BY_ALGO.get(self.quant_algo)
        flags = {name: getattr(self, name) for name in (mode.config_fields if mode else ())}
        return json_object({"quant_algo": self.quant_algo}, optional={"group_size": self.group_size}) | flags

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> LayerQuantConfig:
        """Return the value of a JSON form by `to_dict` or ModelOpt.

        Raises `ValueError` for an unknown algorithm, `KeyError` for none, and `TypeError` for values of another type.
        """
        _require(entry, Mapping, "an entry of a mode")
        for name, kind in _MODE_TYPES.items():
            if entry.get(name) is not None:
                _require(entry[name], kind, name)
        known = {field.name: entry[field.name] for field in fields(cls) if field.name in entry}
        return from_fields(cls, known, quant_algo=_algo_named)


_MODE_TYPES: Mapping[str, type] = {"group_size": int, "has_zero_point": bool, "pre_quant_scale": bool}


def _require(value: object, kind: type, what: str) -> None:
    """Raise `TypeError` unless a value of a JSON document has this type."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{what}: {type(value).__name__} in place of {kind.__name__}")


def _algo_named(name: Any) -> QuantAlgo:
    return _ALIASES.get(str(name).lower()) or QuantAlgo(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """The quantization of a whole model.

    `layer` is set when all quantized modules have the same mode. Otherwise `quantized_layers` has the mode of each
    quantized module by name, and the global algorithm is MIXED_PRECISION. If both are empty, no module is quantized.
    `exclude_modules` are full module names, never patterns: releases differ in how they match patterns.
    """

    layer: LayerQuantConfig | None = None
    kv_cache_quant_algo: str | None = None
    exclude_modules: tuple[str, ...] = ()
    quantized_layers: Mapping[str, LayerQuantConfig] = field(default_factory=dict)
    _excluded: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Made once: there may be an entry for each of a million modules, and each of them is looked up.
        object.__setattr__(self, "_excluded", frozenset(self.exclude_modules))

    @property
    def quant_algo(self) -> QuantAlgo | None:
        """The global algorithm, MIXED_PRECISION when modules differ, None when none is quantized."""
        if self.layer is not None:
            return self.layer.quant_algo
        return QuantAlgo.MIXED_PRECISION if self.quantized_layers else None

    @property
    def group_size(self) -> int | None:
        """Group size of the common mode; None if modules differ or the mode has no groups."""
        return self.layer.group_size if self.layer else None

    @property
    def has_zero_point(self) -> bool:
        """Whether the common mode has additive zeros; False if modules differ."""
        return self.layer.has_zero_point if self.layer else False

    @property
    def pre_quant_scale(self) -> bool:
        """Whether the common mode reads a `pre_quant_scale`; False if modules differ."""
        return self.layer.pre_quant_scale if self.layer else False

    def layer_config(self, module: str) -> LayerQuantConfig | None:
        """Return the mode of one module by its full name, None if it is not quantized.

        An entry applies to all modules inside of the named one too, as it does in the engine: one entry is enough for
        all experts of a layer.
        """
        names = tuple(accumulate(module.split("."), "{}.{}".format))
        if not self._excluded.isdisjoint(names):
            return None
        return self.layer or next(
            (self.quantized_layers[name] for name in names if name in self.quantized_layers), None
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the `quantization` part of `hf_quant_config.json`."""
        entry: dict[str, Any] = {"quant_algo": self.quant_algo, "kv_cache_quant_algo": self.kv_cache_quant_algo}
        if self.layer is not None:
            entry |= self.layer.to_dict()
        if self.quantized_layers:
            entry["quantized_layers"] = self.quantized_layers
        return json_object(entry | {"exclude_modules": self.exclude_modules})

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> QuantConfig:
        """Return the value of a JSON form by `to_dict` or ModelOpt; raises what `LayerQuantConfig.from_dict` raises."""
        _require(entry, Mapping, "quantization")
        layers = entry.get("quantized_layers") or {}
        _require(layers, Mapping, "quantized_layers")
        excluded = entry.get("exclude_modules") or []
        _require(excluded, list, "exclude_modules")
        for name in excluded:
            _require(name, str, "a name in exclude_modules")
        cache = entry.get("kv_cache_quant_algo")
        if cache is not None:
            _require(cache, str, "kv_cache_quant_algo")
        return cls(
            layer=None if layers or not entry.get("quant_algo") else LayerQuantConfig.from_dict(entry),
            kv_cache_quant_algo=cache,
            exclude_modules=tuple(excluded),
            quantized_layers={name: LayerQuantConfig.from_dict(layer) for name, layer in layers.items()},
        )


def read_quantization(document: Mapping[str, Any], path: Path | str) -> QuantConfig:
    """Return the `quantization` block of a parsed hf_quant_config.json.

    Raises `ConfigError` when the block is missing or malformed, or names an algorithm that the engine doesn't know.
    """
    try:
        return QuantConfig.from_dict(document["quantization"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            Fault(
                where=str(path),
                expected=f"`quantization` with a quant_algo among {', '.join(MODES_BY_ALGO)}",
                found=f"{type(error).__name__}: {error}",
                remedy="Only these algorithms are known; quantize or convert to one of them.",
            )
        ) from None


@lru_cache(maxsize=8)
def _as_set(names: tuple[str, ...]) -> frozenset[str]:
    """Return the names as a set; it is cached because it is needed for every module of a model."""
    return frozenset(names)
