"""What `trtllm-build` makes of a loaded model before it builds: joined MLPs, and the table of the rotary embedding.

Written from TensorRT-LLM's text of the releases with this backend; the product is not used. Sources:
`models/modeling_utils.py: fuse_gate_mlp` (42705657), `builder.py: optimize_model_with_config` (47cb03a), where
`use_fused_mlp` is on by default; `layers/attention.py: Attention.create_attention_const_params` (34c6cd4);
`functional.py: RopeEmbeddingUtils` (8c2fa7f; dfaa638 has no branch for dynamic scaling).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["joined_fp8", "rotary_table"]


def joined_fp8(
    gate: Tensor, fc: Tensor, gate_scale: Tensor, fc_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes of gate above those of fc under one scale: both are dequantized, and quantized again.

    Codes go through the model's dtype, which holds them all; scales are float32 of shape [1], so that products are
    float32.
    """
    assert gate.dtype == fc.dtype == torch.float8_e4m3fn
    assert gate_scale.shape == fc_scale.shape == (1,)
    assert gate_scale.dtype == fc_scale.dtype == torch.float32
    values = torch.cat([gate.to(dtype) * gate_scale, fc.to(dtype) * fc_scale])
    scale = torch.maximum(gate_scale, fc_scale)
    return (values / scale).to(torch.float8_e4m3fn), scale


def rotary_table(config: Mapping[str, Any], *, before_hunyuan: bool = False) -> tuple[np.ndarray, float]:
    """The inverse frequencies of a config.json, float32, and the factor of cosines and sines.

    `before_hunyuan` is the text of release 1.0, to which pull request 5521 had not come.
    """
    assert config["position_embedding_type"] == "rope_gpt_neox"
    assert isinstance(config["max_position_embeddings"], int), "the number of rows of the table"
    dim, theta, scaling = config["head_size"], config["rotary_base"], config["rotary_scaling"]
    kind, factor = None, 1.0
    if scaling is not None:
        kind = scaling.get("type", scaling.get("rope_type"))
        assert kind in {"linear", "dynamic", "longrope", "llama3", "mrope", "yarn"}, "RotaryScalingType.from_string"
        factor = scaling.get("factor", 1.0)
    powers = np.arange(0, dim, 2) / dim
    if kind == "yarn":
        return _yarn(dim, theta, factor, scaling)
    if kind == "llama3":
        return _llama3((1.0 / (theta**powers).astype(np.float32)), scaling), 1.0
    if kind == "dynamic" and not before_hunyuan:
        theta = theta * scaling["alpha"] ** (dim / (dim - 2))
        return (1.0 / theta**powers).astype(np.float32), 1.0
    scale = 1.0 / factor if kind == "linear" else factor
    return (scale / (theta**powers).astype(np.float32)).astype(np.float32), 1.0


def _llama3(frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    factor, original = scaling.get("factor", 8.0), scaling.get("original_max_position_embeddings", 8192)
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    scaled = []
    for frequency in frequencies:
        length = 2 * math.pi / frequency
        if length < original / high:
            scaled.append(frequency)
        elif length > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / length - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(scaled, dtype=np.float32)


def _yarn(dim: int, theta: float, factor: float, scaling: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    original = scaling.get("original_max_position_embeddings", 4096)

    def bound(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = max(math.floor(bound(scaling.get("beta_fast", 32.0))), 0)
    high = min(math.ceil(bound(scaling.get("beta_slow", 1.0))), dim - 1)
    slope = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high if high != low else high + 0.001) - low)
    kept = 1 - slope.clamp(0, 1)
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    frequencies = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept

    def attention(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = attention(scaling.get("mscale", 1.0)) / attention(scaling.get("mscale_all_dim", 0.0))
    return frequencies.numpy(), scale
