"""The releases of TensorRT-LLM as capability sets: which modes their Linears, routed experts and KV caches have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEFAULT_ENGINE", "ENGINES", "Capabilities"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one line of an engine's releases holds; facts with their source, never guesses.

    `linear` are the modes of its Linears, `experts` those of its routed experts, `kv_cache` the KV-cache modes;
    `kv_cache_alone` says whether one of these can be had without any quantized module.
    """

    name: str
    source: str
    linear: frozenset[QuantAlgo] = frozenset()
    experts: frozenset[QuantAlgo] = frozenset()
    kv_cache: frozenset[str] = frozenset()
    kv_cache_alone: bool = False


_LINEAR = frozenset(
    {
        QuantAlgo.W4A16,
        QuantAlgo.W4A16_AWQ,
        QuantAlgo.W8A16,
        QuantAlgo.FP8,
        QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
        QuantAlgo.FP8_BLOCK_SCALES,
        QuantAlgo.NVFP4,
    }
)
# int4 weight-only and row-wise fp8 experts have no kernel: the first demands activation scales, the second is refused.
_EXPERTS = frozenset(
    {QuantAlgo.W8A16, QuantAlgo.FP8, QuantAlgo.FP8_BLOCK_SCALES, QuantAlgo.NVFP4, QuantAlgo.W4A16_MXFP4}
)
_NEWEST = frozenset({QuantAlgo.MXFP8, QuantAlgo.W4A16_NVFP4})
_FP8_CACHE = frozenset({"FP8"})

ENGINES: Mapping[str, Capabilities] = {
    entry.name: entry
    for entry in (
        Capabilities(
            name="stock-1.0",
            source="TensorRT-LLM late 2025, _torch/modules/linear.py and fused_moe/quantization.py",
            linear=_LINEAR,
            experts=_EXPERTS,
            kv_cache=_FP8_CACHE,
        ),
        Capabilities(
            name="stock-1.2",
            source="TensorRT-LLM early 2026, _torch/modules/linear.py and fused_moe/fused_moe_cutlass.py",
            linear=_LINEAR,
            experts=_EXPERTS,
            kv_cache=_FP8_CACHE,
        ),
        Capabilities(
            name="stock-1.3",
            source="TensorRT-LLM main of September 2026, _torch/modules/linear.py: get_quant_method",
            linear=_LINEAR | _NEWEST,
            experts=_EXPERTS | _NEWEST,
            kv_cache=_FP8_CACHE,
        ),
    )
}
"""Capability sets by name, oldest first. No release has a W4A16_GPTQ Linear."""

DEFAULT_ENGINE = "stock-1.2"
"""The newest stable line."""
