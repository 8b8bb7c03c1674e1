"""Imitates `_torch/modules/attention.py`: the function that decides whether attention quantizes its own output."""

from __future__ import annotations

from typing import Any

from tensorrt_llm._double import RELEASE

__all__ = ["Attention"]


class Attention:
    """The newest release asks `force_dynamic_quantization`; older ones ask only whether `o_proj` has scales."""

    o_proj: Any

    if RELEASE.force_dynamic_quantization:

        def _use_quantize_output(self) -> bool:
            return not self.o_proj.force_dynamic_quantization
    else:

        def _use_quantize_output(self) -> bool:
            return True
