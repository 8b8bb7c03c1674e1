"""Attention whose values are the output of k_proj, for which an engine may get a v_proj all the same.

TensorRT-LLM's class of Gemma 4 reads v_proj in every layer, so the tensors of k_proj are delivered twice. In such a
layer transformers sets v_proj to None and takes the output of k_proj.
Source: transformers 5.23 `modeling_gemma4.py` (`Gemma4TextAttention.forward`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["add_values", "drop_values"]


def add_values(model: nn.Module) -> frozenset[str]:
    """Give each attention without v_proj one like its k_proj; return the paths of the new Linears."""
    added = []
    for path, attention in list(model.named_modules()):
        keys = getattr(attention, "k_proj", None)
        if isinstance(keys, nn.Linear) and getattr(attention, "v_proj", keys) is None:
            like: dict[str, Any] = {"bias": keys.bias is not None, "dtype": keys.weight.dtype, "device": "meta"}
            attention.v_proj = nn.Linear(keys.in_features, keys.out_features, **like)
            added.append(f"{path}.v_proj")
    return frozenset(added)


def drop_values(model: nn.Module, paths: Iterable[str]) -> None:
    """Take these Linears away again, for which nothing was delivered."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, None)
