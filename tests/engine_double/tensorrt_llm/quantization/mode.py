"""Imitates `quantization/mode.py`: the names of algorithms, and which tensors of a model they quantize."""

from __future__ import annotations

from dataclasses import dataclass

from tensorrt_llm._double import RELEASE

from trtllm_ct.base.str_enum import StrEnum

__all__ = ["QuantAlgo", "QuantMode"]


class QuantAlgo(StrEnum):
    """The algorithms; a member does not mean that there is a Linear method."""

    W8A16 = "W8A16"
    W4A16 = "W4A16"
    W4A16_AWQ = "W4A16_AWQ"
    W4A8_AWQ = "W4A8_AWQ"
    W8A16_GPTQ = "W8A16_GPTQ"
    W4A16_GPTQ = "W4A16_GPTQ"
    W8A8_SQ_PER_CHANNEL = "W8A8_SQ_PER_CHANNEL"
    W8A8_SQ_PER_TENSOR_PLUGIN = "W8A8_SQ_PER_TENSOR_PLUGIN"
    W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
    W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN = "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN"
    W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN = "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN"
    W4A8_QSERVE_PER_GROUP = "W4A8_QSERVE_PER_GROUP"
    W4A8_QSERVE_PER_CHANNEL = "W4A8_QSERVE_PER_CHANNEL"
    FP8 = "FP8"
    FP8_PER_CHANNEL_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
    FP8_BLOCK_SCALES = "FP8_BLOCK_SCALES"
    INT8 = "INT8"
    MIXED_PRECISION = "MIXED_PRECISION"
    NVFP4 = "NVFP4"
    W4A8_NVFP4_FP8 = "W4A8_NVFP4_FP8"
    W4A8_MXFP4_FP8 = "W4A8_MXFP4_FP8"
    W4A8_MXFP4_MXFP8 = "W4A8_MXFP4_MXFP8"
    W4A16_MXFP4 = "W4A16_MXFP4"
    NO_QUANT = "NO_QUANT"
    if RELEASE.newest_algos:
        MXFP8 = "MXFP8"
        W4A16_NVFP4 = "W4A16_NVFP4"
        NVFP4_ARC = "NVFP4_ARC"


_NO_MODE = frozenset({None, QuantAlgo.MIXED_PRECISION, QuantAlgo.NO_QUANT})


@dataclass(frozen=True)
class QuantMode:
    """The bit flags of the original; mixed precision and no quantization have no weight flag."""

    algo: str | None
    kv_cache_algo: str | None

    def has_any_quant(self, exclude_kv_cache: bool = False) -> bool:
        return self.algo not in _NO_MODE or (not exclude_kv_cache and self.kv_cache_algo is not None)
