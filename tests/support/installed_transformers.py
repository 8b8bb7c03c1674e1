"""Configurations of transformers' own models, in the spelling of the installed release.

Tests spell their configurations as transformers 5 does. transformers 4 keeps a block `rope_parameters` unread, and has
`rope_theta` and `rope_scaling` instead; before 4.56, `dtype` is called `torch_dtype`.
Sources: transformers 5.23 `modeling_rope_utils.py`, 4.57 and 4.55 `configuration_utils.py`, `modeling_utils.py`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import cache
from typing import Any

_BLOCK = "rope_parameters"


@cache
def release() -> tuple[int, int] | None:
    """The major and minor number of the installed transformers."""
    try:
        major, minor = importlib.metadata.version("transformers").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


def has_newest_transformers() -> bool:
    """Whether transformers 5 is installed, whose defaults and spellings are written down."""
    return (release() or (0, 0)) >= (5, 0)


# The releases that brought model types; the others that are asked for are in 4.53 already.
_SINCE = {
    "deepseek_v2": (4, 54),
    "ministral3": (5, 0),
    "qwen3_vl": (4, 57),
    "qwen3_vl_moe": (4, 57),
    "qwen3_vl_text": (4, 57),
    "qwen3_vl_moe_text": (4, 57),
}


def is_installed(model_type: str) -> bool:
    """Whether the installed transformers has the model type."""
    return (release() or (0, 0)) >= _SINCE.get(model_type, (0, 0))


def typed_config(model_type: str, **fields: Any) -> Any:
    """The configuration object of `model_type` with `fields` in the spelling of transformers 5."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **(fields if has_newest_transformers() else _older(fields)))


def in_dtype(dtype: Any) -> dict[str, Any]:
    """The argument with which transformers' models are built or loaded in `dtype`."""
    return {"dtype" if (release() or (0, 0)) >= (4, 56) else "torch_dtype": dtype}


def _older(fields: Mapping[str, Any]) -> dict[str, Any]:
    older = {key: _older(value) if isinstance(value, Mapping) else value for key, value in fields.items()}
    older |= _older_rope(older.pop(_BLOCK, None) or {})
    return older


def _older_rope(block: Mapping[str, Any]) -> dict[str, Any]:
    if "full_attention" in block:  # one base for each type of layer
        local = block["sliding_attention"]["rope_theta"]
        return _older_rope(block["full_attention"]) | {"rope_local_base_freq": local}
    scaling = {key: value for key, value in block.items() if key != "rope_theta"}
    keys = {"rope_theta": block["rope_theta"]} if "rope_theta" in block else {}
    return keys | ({"rope_scaling": scaling} if scaling.keys() - {"rope_type"} else {})
