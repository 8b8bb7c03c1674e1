"""The reference engine: runs a model on the CPU, in plain torch, from the tensors that an engine would be given.

Conversion is verified against this engine, so it shares no code with planning, mapping or targets.
Names are imported on first use: importing this package loads neither torch nor transformers.

engine.py             load_model and build_model
architecture.py       builds transformers' model without weights
rope.py               rotary embeddings in the spelling of the installed transformers
directory.py          reads a model directory: config, quantization and tensors
bridge.py             the one file that uses plans: streams the delivered tensors of a source directory
assembly.py           puts delivered tensors into the model
names.py              maps checkpoint names to module paths
linear.py             a Linear that computes from delivered tensors
linear_layouts.py     how each algorithm stores a Linear
coded_weight.py       a delivered weight as codes, scales and zeros
rules.py              checks the dtypes and shapes of delivered tensors
activations.py        simulates quantized activations
effective_weights.py  the weight that equals a Linear together with its transforms
attention.py          simulates an FP8 KV cache
mixtures.py           mixture-of-experts layers
expert_parts.py       collects the tensors of one layer's experts
shared_values.py      attention whose values are the output of k_proj
experts.py            routed experts that compute from delivered tensors, in the forms of transformers 4 and 5
generate.py           generates text from a directory
perplexity.py         measures the perplexity of a text
calibration.py        measures the scales of inputs on a text
prompts.py            the tokens of a prompt, with the chat template of its tokenizer
llm.py                ReferenceLLM, with the interface of TensorRT-LLM's LLM
requests.py           the prompts, parameters and results of ReferenceLLM
sampling.py           chooses the next token
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from trtllm_ct.base.packages import missing_packages_as_errors

if TYPE_CHECKING:
    from trtllm_ct.reference.calibration import MeasuredScales, measure_scales
    from trtllm_ct.reference.engine import build_model, load_model
    from trtllm_ct.reference.generate import Generation, generate_text
    from trtllm_ct.reference.linear import ReferenceLinear
    from trtllm_ct.reference.llm import ReferenceLLM
    from trtllm_ct.reference.perplexity import Perplexity, text_perplexities, text_perplexity
    from trtllm_ct.reference.requests import SamplingParams

__all__ = [
    "Generation",
    "MeasuredScales",
    "Perplexity",
    "ReferenceLLM",
    "ReferenceLinear",
    "SamplingParams",
    "build_model",
    "generate_text",
    "load_model",
    "measure_scales",
    "text_perplexities",
    "text_perplexity",
]

_HOMES = {
    "Generation": "generate",
    "MeasuredScales": "calibration",
    "Perplexity": "perplexity",
    "ReferenceLLM": "llm",
    "ReferenceLinear": "linear",
    "SamplingParams": "requests",
    "build_model": "engine",
    "generate_text": "generate",
    "load_model": "engine",
    "measure_scales": "calibration",
    "text_perplexities": "perplexity",
    "text_perplexity": "perplexity",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with missing_packages_as_errors():
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
