"""Imitates `models/modeling_utils.py`: QuantConfig, and which modules it excludes."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from typing import Any

from tensorrt_llm._double import RELEASE
from tensorrt_llm.quantization.mode import QuantMode

__all__ = ["QuantConfig"]

_DEFAULTS: dict[str, Any] = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
    "mamba_ssm_cache_dtype": None,
} | ({"mamba_ssm_stochastic_rounding": False, "mamba_ssm_philox_rounds": 10} if RELEASE.strict_quant_config else {})
_CACHED = ("quant_mode", "layer_quant_mode")


class QuantConfig:
    """Class `QuantConfig`: a dataclass in older releases, a strict pydantic model in the newest.

    Unknown fields: TypeError, or silently set attributes, in older releases; ValueError in the newest (pydantic's
    ValidationError is a ValueError).
    """

    quant_algo: str | None
    kv_cache_quant_algo: str | None
    group_size: int | None
    has_zero_point: bool
    pre_quant_scale: bool
    exclude_modules: list[str] | None

    def __init__(self, **fields: Any) -> None:
        unknown = fields.keys() - _DEFAULTS.keys()
        if unknown and not RELEASE.strict_quant_config:
            raise TypeError(f"QuantConfig.__init__() got an unexpected keyword argument {min(unknown)!r}")
        for name, value in (_DEFAULTS | fields).items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if RELEASE.strict_quant_config and name not in _DEFAULTS and name not in _CACHED:
            raise ValueError(f"QuantConfig: {name}: Extra inputs are not permitted")
        super().__setattr__(name, value)

    @cached_property
    def quant_mode(self) -> QuantMode:
        """The mode; it is cached, so fields that are set later don't change it."""
        return QuantMode(self.quant_algo, self.kv_cache_quant_algo)

    @cached_property
    def layer_quant_mode(self) -> QuantMode:
        """As `quant_mode`, of one layer."""
        return QuantMode(self.quant_algo, self.kv_cache_quant_algo)

    def is_module_excluded_from_quantization(self, name: str) -> bool:
        """Whether `exclude_modules` names a module; only newer releases look at patterns and at its ancestors."""
        entries = self.exclude_modules or ()
        if not RELEASE.exclude_patterns:
            return any(fnmatchcase(name, entry) for entry in entries)
        around = list(accumulate(name.split("."), "{}.{}".format))
        return any(_matches(entry, part) for entry in entries for part in around)

    if RELEASE.strict_quant_config:

        def model_dump(self) -> dict[str, Any]:
            return {name: getattr(self, name) for name in _DEFAULTS}
    else:

        def to_dict(self) -> dict[str, Any]:
            return {name: getattr(self, name) for name in _DEFAULTS}


def _matches(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.fullmatch(entry[3:], name) is not None
    return fnmatchcase(name, entry) or (entry.endswith(".*") and fnmatchcase(name, entry[:-2]))
