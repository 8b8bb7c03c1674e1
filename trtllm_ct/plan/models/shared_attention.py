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
    from collections.abc import Mapping

    from trtllm_ct.plan.models.sites import Model

__all__ = ["is_absent_by_design", "layers_of_queries_only", "with_values"]

_KEYS = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.k_proj")
_OF_KEYS_ALONE = "k_"


def layers_of_queries_only(model: Model) -> frozenset[int]:
    """Return the numbers of the layers that take keys and values of earlier layers."""
    count = model.text.get(model.row.query_only) if model.row is not None and model.row.query_only else None
    first = model.layers - (count or 0)
    # The engine's class and transformers count none if all layers would share.
    return frozenset(range(first, model.layers)) if first > 0 else frozenset()


def is_absent_by_design(model: Model, layer: int, path: str) -> bool:
    """Whether a layer lacks a module although others have it, by config.json; `path` is the module's path in it."""
    if path == "self_attn.v_proj" and layer in _layers_without_values(model):
        return True
    return path in {"self_attn.k_proj", "self_attn.v_proj"} and layer in layers_of_queries_only(model)


def with_values(modules: dict[str, StoredModule], model: Model) -> dict[str, StoredModule]:
    """Return the modules with a v_proj for each layer whose values are its keys: the tensors of k_proj.

    A stored v_proj stays. The scale of the KV cache for keys is none of values.
    """
    layers = _layers_without_values(model)
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


def _layers_without_values(model: Model) -> frozenset[int]:
    """Return the numbers of the layers whose values are the output of k_proj."""
    text: Mapping[str, object] = model.text
    if model.row is None or not model.row.keys_as_values or not text.get(model.row.keys_as_values):
        return frozenset()
    kinds = text.get("layer_types")
    if not isinstance(kinds, list):
        return frozenset()
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
