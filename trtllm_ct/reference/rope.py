"""Rotary embeddings in the spelling of the installed transformers.

transformers 5 writes one block `rope_parameters`, and reads the older keys too. transformers 4 reads only the older
keys and ignores the block: it would compute with its default base and say nothing.
Source: transformers 5.23 `modeling_rope_utils.py`, 4.57 `configuration_gemma3.py`, `configuration_phi3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["older_rope_keys", "reads_rope_parameters"]

_BLOCK = "rope_parameters"
# What the block holds beside the scaling; transformers 4 reads these at the top level of the config.
_TOP_LEVEL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
# Models with two bases have a block for each type of layer: the base of full attention is `rope_theta` in older keys.
_FULL, _SLIDING = "full_attention", "sliding_attention"


def reads_rope_parameters() -> bool:
    """Whether the installed transformers reads the block `rope_parameters`."""
    from transformers import modeling_rope_utils

    return hasattr(modeling_rope_utils, "RopeParameters")


def older_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with each block `rope_parameters`, at any depth, replaced by the keys of transformers 4."""
    plain = {key: older_rope_keys(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    block = config.get(_BLOCK)
    if not isinstance(block, Mapping):
        return plain
    del plain[_BLOCK]
    full = block.get(_FULL, block)
    if _SLIDING in block:
        plain["rope_local_base_freq"] = block[_SLIDING]["rope_theta"]
    plain |= {key: full[key] for key in _TOP_LEVEL if key in full}
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    # `mrope_section` of Qwen-VL stands beside the default type.
    if full.get("rope_type", "default") != "default" or scaling.keys() - {"rope_type", *_TOP_LEVEL}:
        plain["rope_scaling"] = scaling
    return plain
