"""Imitates `llmapi/__init__.py`."""

from tensorrt_llm.llmapi.llm import LLM, SamplingParams
from tensorrt_llm.llmapi.llm_args import DraftTargetDecodingConfig, KvCacheConfig, MoeConfig, TorchLlmArgs
from tensorrt_llm.models.modeling_utils import QuantConfig
from tensorrt_llm.quantization import QuantAlgo

__all__ = [
    "LLM",
    "DraftTargetDecodingConfig",
    "KvCacheConfig",
    "MoeConfig",
    "QuantAlgo",
    "QuantConfig",
    "SamplingParams",
    "TorchLlmArgs",
]
