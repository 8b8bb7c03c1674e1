"""config.json of a converted directory: no compressed-tensors block, and both spellings of what transformers renamed.

transformers 5 writes `dtype` and `rope_parameters`, transformers 4 reads `torch_dtype`, `rope_theta` and
`rope_scaling`; it silently falls back to theta 10000 where it finds none. TensorRT-LLM releases are built with
either, so both are written. Source: transformers 5.23 `modeling_rope_utils.py`, 4.57 `configuration_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_ct.base.dtypes import DType

__all__ = ["portable_config"]

_QUANTIZATION_BLOCKS = ("quantization_config", "compression_config")
_TEXT = "text_config"


def portable_config(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """A config.json (parsed) without quantization, of the given model dtype, for readers of both generations.

    The source is not changed. A nested `text_config` is treated alike.
    """
    portable = {key: value for key, value in config.items() if key not in _QUANTIZATION_BLOCKS}
    portable |= {"dtype": dtype.torch_name, "torch_dtype": dtype.torch_name}
    portable |= _both_rope_spellings(portable)
    if isinstance(portable.get(_TEXT), Mapping):
        portable[_TEXT] = portable_config(portable[_TEXT], dtype)
    return portable


def _both_rope_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary keys that are missing, made from those that are there.

    Parameters that differ by layer type (a dictionary for each) have no older spelling and stay as they are.
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
