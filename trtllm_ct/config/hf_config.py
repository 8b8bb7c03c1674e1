"""config.json of a converted directory: without a compressed-tensors block, and in both spellings of renamed keys.

transformers 5 writes `dtype` and `rope_parameters`. transformers 4 reads `torch_dtype`, `rope_theta` and
`rope_scaling`, and silently uses theta 10000 where it finds no theta. TensorRT-LLM releases are built with either
version, so both spellings are written. Source: transformers 5.23 `modeling_rope_utils.py`, 4.57
`configuration_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_ct.base.dtypes import DType

__all__ = ["portable_config", "with_tie"]

_QUANTIZATION_BLOCKS = ("quantization_config", "compression_config")
_TEXT = "text_config"


def portable_config(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """Return a parsed config.json without quantization, with the given model dtype, for transformers 4 and 5.

    `config` is not changed. A nested `text_config` is converted in the same way.
    """
    portable = {key: value for key, value in config.items() if key not in _QUANTIZATION_BLOCKS}
    portable |= {"dtype": dtype.torch_name, "torch_dtype": dtype.torch_name}
    portable |= _both_rope_spellings(portable)
    if isinstance(portable.get(_TEXT), Mapping):
        portable[_TEXT] = portable_config(portable[_TEXT], dtype)
    return portable


def with_tie(config: Mapping[str, Any], *, tied: bool | None) -> dict[str, Any]:
    """Return a parsed config.json that says whether head and embeddings are tied; unchanged if that is not known.

    It says so at the top level and in `text_config`: readers differ in the level that decides, and releases of
    transformers in the default of a class.
    """
    if tied is None:
        return dict(config)
    stated = {**config, "tie_word_embeddings": tied}
    if isinstance(stated.get(_TEXT), Mapping):
        stated[_TEXT] = with_tie(stated[_TEXT], tied=tied)
    return stated


def _both_rope_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary keys that are missing in `config`, derived from those that are present.

    Parameters that differ by layer type (a dictionary for each type) have no older spelling, so nothing is added for
    them.
    """
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        if any(isinstance(value, Mapping) for value in parameters.values()):
            return {}
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        older = {"rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling}
        if "rope_theta" in parameters:
            older["rope_theta"] = parameters["rope_theta"]
        if "partial_rotary_factor" in parameters:
            older["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        return {key: value for key, value in older.items() if config.get(key) is None}
    if "rope_theta" not in config:
        return {}
    scaling = dict(config.get("rope_scaling") or {})
    rope_type = scaling.pop("rope_type", scaling.pop("type", "default"))
    return {"rope_parameters": {"rope_theta": config["rope_theta"], "rope_type": rope_type, **scaling}}
