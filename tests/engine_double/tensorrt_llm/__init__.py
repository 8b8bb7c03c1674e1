"""Imitates `tensorrt_llm/__init__.py`: the names that users import."""

from tensorrt_llm._double import RELEASE
from tensorrt_llm.llmapi import LLM, KvCacheConfig, SamplingParams

__all__ = ["LLM", "KvCacheConfig", "SamplingParams", "__version__"]

__version__ = RELEASE.version
