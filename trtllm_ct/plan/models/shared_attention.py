"""Layers of attention that lack k_proj or v_proj on purpose, and the v_proj that an engine's class reads all the same.

Gemma 4 has two kinds of them. With `attention_k_eq_v`, layers of full attention have no v_proj: their values are the
output of k_proj. The last `num_kv_shared_layers` layers use keys and values of earlier layers: what is stored of their
k_proj and v_proj is not read.
Source: transformers 5.23 `modeling_gemma4.py` (`Gemma4TextAttention`), and TensorRT-LLM `_torch/models/
modeling_gemma4.py` (`Gemma4Attention`, 00e7d103).

TensorRT-LLM copies k_proj to v_proj itself, in early versions only the tensor `weight` (`checkpoints/hf/
gemma4_weight_mapper.py`: `_handle_buffers_and_kvdup`, 7ed07f06; 1c58b177 copies all; pull request 16797). No version
replaces a v_proj that it is given.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trtllm_ct.plan.stored import Shared, StoredModule

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from typing import Any

    from trtllm_ct.plan.models.class_row import ClassRow

__all__ = ["layers_of_queries_only", "layers_without_values", "with_values"]

_KEYS = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.k_proj")
_OF_KEYS_ALONE = "k_"


def layers_of_queries_only(row: ClassRow, text: Mapping[str, Any], layers: int) -> frozenset[int]:
    """Return the numbers of the layers that take keys and values of earlier layers.

    `text` is the configuration of a text model with so many layers.
    """
    count = text.get(row.query_only) if row.query_only else None
    first = layers - (count or 0)
    # The engine's class and transformers count none if all layers would share.
    return frozenset(range(first, layers)) if first > 0 else frozenset()


def layers_without_values(row: ClassRow, text: Mapping[str, Any]) -> frozenset[int]:
    """Return the numbers of the layers whose values are the output of k_proj; `text` is the text model's config."""
    if not row.keys_as_values or not text.get(row.keys_as_values):
        return frozenset()
    kinds = text.get("layer_types")
    if not isinstance(kinds, list):
        return frozenset()
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "full_attention")


def with_values(modules: dict[str, StoredModule], layers: Collection[int]) -> dict[str, StoredModule]:
    """Return the modules with a v_proj for each of these layers, whose values are its keys: the tensors of k_proj.

    A stored v_proj stays. The scale of the KV cache for keys is none of values.
    """
    if not layers:
        return modules
    result: dict[str, StoredModule] = {}
    for name, module in modules.items():
        result[name] = module
        match = _KEYS.fullmatch(name)
        values = f"{name.removesuffix('k_proj')}v_proj"
        if match is not None and int(match[1]) in layers and values not in modules:
            views = {
                local: Shared.of_view(view)
                for local, view in module.views.items()
                if not local.startswith(_OF_KEYS_ALONE)
            }
            result[values] = StoredModule(values, views, alias=module.stored_name, transforms=module.transforms)
    return result
