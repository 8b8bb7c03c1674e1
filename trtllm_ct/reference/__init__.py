"""The reference engine: delivered tensors, multiplied on CPU in plain torch.

It is the outsider that conversion is proved against, so it shares no code with planning, mapping or targets.
Names resolve on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_ct.reference.engine import build_model, load_model
    from trtllm_ct.reference.generate import Generation, generate_text
    from trtllm_ct.reference.linear import ReferenceLinear
    from trtllm_ct.reference.llm import ReferenceLLM
    from trtllm_ct.reference.requests import SamplingParams

__all__ = [
    "Generation",
    "ReferenceLLM",
    "ReferenceLinear",
    "SamplingParams",
    "build_model",
    "generate_text",
    "load_model",
]

_HOMES = {
    "Generation": "generate",
    "ReferenceLLM": "llm",
    "ReferenceLinear": "linear",
    "SamplingParams": "requests",
    "build_model": "engine",
    "generate_text": "generate",
    "load_model": "engine",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
