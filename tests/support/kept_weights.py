"""Reference models that dequantize each weight once instead of in every call, for tests that generate many tokens."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from trtllm_ct.reference import ReferenceLinear

if TYPE_CHECKING:
    from typing import Any

__all__ = ["with_kept_weights"]


def with_kept_weights(model: Any) -> Any:
    """Keep what `dequantized_weight` returns, for each Linear and dtype, and return the model.

    The delivered tensors never change, so every call gives the same weight.
    """
    for module in model.modules():
        if isinstance(module, ReferenceLinear):
            module.dequantized_weight = cache(module.dequantized_weight)
    return model
