"""What per-tensor FP8 is worth inside TensorRT-LLM, computed from the stored codes by a few lines of arithmetic.

The engine makes one Linear of q, k and v, and one of gate and up, each with one scale: the largest of its parts.
Every part is multiplied out by its own scale and divided by the largest in the model's dtype, and rounded to FP8 again.
Inputs are divided by the largest of the parts' static scales. Linears that stand alone stay as they are.
Source: TensorRT-LLM `_torch/modules/linear.py`, FP8QDQLinearMethod. Nothing here is shared with the double or the
package.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from plain_model import Golden, golden_of, plain_logits
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

__all__ = ["STATIC_FP8", "engine_answers", "fp8_static_logits", "requantized"]

STATIC_FP8 = "fp8-static-kv"
"""The one real checkpoint with static per-tensor FP8."""
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FP8, LARGEST = torch.float8_e4m3fn, 448.0


def engine_answers(directory: Path) -> Golden:
    """The golden answers of a real checkpoint, with the oracle's logits where the engine rounds weights once more."""
    golden = golden_of(directory)
    if directory.name != STATIC_FP8:
        return golden
    config = json.loads((directory / "config.json").read_text())
    logits = fp8_static_logits(config, load_file(directory / "model.safetensors"), golden.prompt)
    return replace(golden, logits=logits[-len(golden.logits) :])


def fp8_static_logits(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], tokens: Sequence[int], *, quantize_inputs: bool = False
) -> Tensor:
    """Logits [tokens, vocabulary] of a checkpoint with static per-tensor FP8, in float32.

    With `quantize_inputs` the inputs of quantized Linears are rounded to FP8 under their static scales.
    """
    modules = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    companions = ("weight_scale", "input_scale", "k_scale", "v_scale")
    weights = {name: tensor for name, tensor in stored.items() if not name.endswith(companions)}
    inputs = {}
    dtype = getattr(torch, config["dtype"])
    for parts in parts_of_linears(modules):
        codes = [stored[f"{part}.weight"] for part in parts]
        scales = [stored[f"{part}.weight_scale"] for part in parts]
        for part, weight in zip(parts, requantized(codes, scales, dtype), strict=True):
            weights[f"{part}.weight"] = weight
            if quantize_inputs:
                scale = max(float(stored[f"{each}.input_scale"]) for each in parts)
                inputs[part] = partial(rounded_to_fp8, scale=scale)
    return plain_logits(config, weights, tokens, inputs)


def parts_of_linears(modules: set[str]) -> list[tuple[str, ...]]:
    """The modules that the engine makes one Linear of; a tuple of one for each of the others."""
    names = [
        tuple(f"{parent}.{leaf}" for leaf in leaves)
        for parent in sorted({module.rpartition(".")[0] for module in modules})
        for leaves in JOINED
        if f"{parent}.{leaves[0]}" in modules
    ]
    alone = modules.difference(*names)
    return [*names, *((module,) for module in sorted(alone))]


def requantized(codes: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Weights of the parts of one Linear, float32; every step that the engine makes in `dtype` is rounded to it."""
    largest = max(float(scale) for scale in scales)
    if len(codes) == 1:
        return [codes[0].float() * largest]
    divisor = torch.tensor(largest).to(dtype).float()
    weights = []
    for part, scale in zip(codes, scales, strict=True):
        wide = (part.float() * scale.to(dtype).float()).to(dtype).float()
        weights.append((wide / divisor).to(dtype).to(FP8).float() * largest)
    return weights


def rounded_to_fp8(values: Tensor, scale: float) -> Tensor:
    return (values / scale).clamp(-LARGEST, LARGEST).to(FP8).float() * scale
