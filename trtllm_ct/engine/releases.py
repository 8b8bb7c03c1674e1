"""The releases of TensorRT-LLM that checkpoints are made for, oldest first.

Which modes a release has is said by the modes (`engine/modes.py`: `linear_since`, `experts_since`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT_ENGINE", "RELEASES", "STOCK_1_0", "STOCK_1_2", "STOCK_1_3", "Release"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One line of releases.

    `name` is what `--engine` calls it, `source` the code that its facts were read from. `kv_cache` are the modes of its
    KV cache.
    """

    name: str
    source: str
    kv_cache: frozenset[str] = frozenset({"FP8"})


STOCK_1_0 = Release(
    name="stock-1.0",
    source="TensorRT-LLM late 2025, _torch/modules/linear.py and fused_moe/quantization.py",
)
STOCK_1_2 = Release(
    name="stock-1.2",
    source="TensorRT-LLM early 2026, _torch/modules/linear.py and fused_moe/fused_moe_cutlass.py",
)
STOCK_1_3 = Release(
    name="stock-1.3",
    source="TensorRT-LLM main of September 2026, _torch/modules/linear.py: get_quant_method",
)

RELEASES = (STOCK_1_0, STOCK_1_2, STOCK_1_3)

DEFAULT_ENGINE = STOCK_1_2.name
"""The newest stable line."""
