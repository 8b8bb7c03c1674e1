"""The reference engine: delivered tensors, multiplied on CPU in plain torch.

It is the outsider that conversion is proved against, so it shares no code with planning, mapping or targets.
Names resolve on first use: importing this package loads neither torch nor transformers.

engine.py             load_model and build_model
architecture.py       transformers' model, without weights
directory.py          where delivered tensors come from
bridge.py             the one file that knows plans: a source directory, delivered
assembly.py           delivered tensors put into the model
names.py              checkpoint names to module paths
linear.py             a Linear that computes from delivered tensors
linear_layouts.py     how each algorithm stores a Linear
rules.py              what delivered tensors must look like
activations.py        quantized activations, simulated
effective_weights.py  what a Linear and the transforms beside it amount to
attention.py          an FP8 KV cache, simulated
mixtures.py           mixture-of-experts layers
expert_parts.py       the tensors of one layer's experts, gathered
experts.py            routed experts that compute from delivered tensors
compare.py            a delivered weight beside the exact one
generate.py           text from a directory
llm.py                ReferenceLLM: the surface of TensorRT-LLM's LLM
requests.py           what goes into it and comes out
sampling.py           the next token
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
