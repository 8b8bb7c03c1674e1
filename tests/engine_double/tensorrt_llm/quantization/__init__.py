"""Imitates `quantization/__init__.py`."""

from tensorrt_llm.quantization.mode import QuantAlgo, QuantMode

__all__ = ["QuantAlgo", "QuantMode"]
