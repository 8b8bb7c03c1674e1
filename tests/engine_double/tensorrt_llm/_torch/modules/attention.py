"""Imitates `_torch/modules/attention.py`, `attention_backend/trtllm.py`, and `modules/rms_norm.py`.

It computes in float32, without a KV cache.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._double import RELEASE
from tensorrt_llm._torch.modules.linear import Linear, TensorParallelMode, WeightMode, WeightsLoadingConfig
from tensorrt_llm._torch.modules.linear_methods import FP8Values, frozen
from tensorrt_llm.quantization import QuantAlgo
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from tensorrt_llm._torch.model_config import ModelConfig
    from tensorrt_llm.models.modeling_utils import QuantConfig

__all__ = ["Attention", "RMSNorm", "decoder_linear", "frequencies"]

_FP8_INPUT = frozenset({QuantAlgo.FP8, QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN, QuantAlgo.FP8_BLOCK_SCALES})
_FP4_INPUT = frozenset({QuantAlgo.NVFP4, QuantAlgo.W4A8_NVFP4_FP8})
_HAS_QUANT_SCALE = _FP8_INPUT | _FP4_INPUT
"""Algorithms with which `o_proj` takes, and attention writes, quantized values (`has_quant_scale`)."""
_QUANTIZED_CACHES = frozenset({QuantAlgo.FP8, QuantAlgo.NVFP4})


def decoder_linear(config: ModelConfig, rows: int, columns: int, mode: TensorParallelMode, **more: Any) -> Linear:
    """A Linear that allocates only after its configuration is settled, as `_torch/models/modeling_auto.py` demands."""
    arguments: dict[str, Any] = {
        "bias": False,
        "dtype": config.torch_dtype,
        "mapping": config.mapping,
        "tensor_parallel_mode": mode,
        "quant_config": config.quant_config,
        "skip_create_weights_in_init": True,
        "force_dynamic_quantization": config.force_dynamic_quantization,
    }
    return Linear(columns, rows, **(arguments | more))


_BIASES = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text"), (True, False)),
    **dict.fromkeys(("mistral", "ministral3", "mixtral", "gemma3_text"), (False, False)),
}
"""By model type: whether q, k and v, and whether the output has a bias, where the class doesn't ask config.json.

`modeling_qwen.py` (047098b7), `_qwen_moe` (0a0d2c8e), `_mistral` (002f3cc3), `_mixtral` (000a01de) and `_gemma3`
(00e7d103)."""


def _biases(model: Any) -> tuple[bool, bool]:
    asked = bool(getattr(model, "attention_bias", False))
    return _BIASES.get(model.model_type, (asked, asked))


class RMSNorm(nn.Module):
    """No `load_weights`: its parameter is copied by name."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.weight = frozen(size, dtype=config.torch_dtype)
        self.eps = config.pretrained_config.rms_norm_eps

    def forward(self, values: Tensor) -> Tensor:
        """`_torch/modules/rms_norm.py` calls flashinfer, which has no kernel for float32 (issue 5260)."""
        if self.weight.dtype == torch.float32:
            raise RuntimeError("rmsnorm failed to dispatch data type Float")
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()


class Attention(nn.Module):
    """Heads are distributed over the ranks; K and V heads are repeated when there are fewer heads than ranks.

    It has a configuration of its own: the global one, or the entry of `q_proj`, or none where its name is excluded.
    With `attn_output_gate` a gate is multiplied to its output, which is then never quantized
    (`Attention._use_quantize_output`, in early 2026 and in c6d3bb2a).
    """

    def __init__(self, config: ModelConfig, head_norms: bool, attn_output_gate: bool = False) -> None:
        super().__init__()
        self.attn_output_gate = attn_output_gate
        model, ranks = config.pretrained_config, config.mapping.tp_size
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        self.head_dim = getattr(model, "head_dim", None) or model.hidden_size // heads
        assert heads % ranks == 0, f"{heads} heads on {ranks} ranks"
        self.heads, self.kv_heads = heads // ranks, -(-kv_heads // ranks)
        self.quant_config: QuantConfig | None = config.quant_config
        self._pool_algo = config.quant_config.kv_cache_quant_algo
        self.frequencies = frequencies(model.rope, self.head_dim)
        biased, biased_output = _biases(model)
        self.qkv_proj = decoder_linear(
            config,
            (self.heads + 2 * self.kv_heads) * ranks * self.head_dim,
            model.hidden_size,
            TensorParallelMode.COLUMN,
            bias=biased,
            weights_loading_config=WeightsLoadingConfig(weight_mode=WeightMode.FUSED_QKV_LINEAR),
        )
        self.o_proj = decoder_linear(
            config, model.hidden_size, heads * self.head_dim, TensorParallelMode.ROW, bias=biased_output
        )
        if head_norms:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, config), RMSNorm(self.head_dim, config)

    def forward(self, hidden: Tensor) -> Tensor:
        self._check_pool()
        sizes = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        parts = self.qkv_proj(hidden).split(sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for part in parts)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotate(q, self.frequencies), _rotate(k, self.frequencies)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=0) for part in (k, v))
        seen = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        return self.o_proj(self._quantize_output(seen.transpose(0, 1).flatten(1)))

    def create_weights(self) -> None:
        """It has no weights, but what it does depends on the final configuration of `o_proj`."""
        self.o_proj.create_weights()
        self.has_quant_scale = self.o_proj.quant_algo in _HAS_QUANT_SCALE

    if RELEASE.dynamic_attention_output:

        def _use_quantize_output(self) -> bool:
            """Whether `o_proj` shall get quantized values; not where its activations shall be dynamic."""
            if self.o_proj.force_dynamic_quantization:
                return False
            own = None if self.quant_config is None else self.quant_config.layer_quant_mode.algo
            if own == QuantAlgo.NVFP4 and self.o_proj.quant_algo != QuantAlgo.NVFP4:
                return False
            return self.has_quant_scale and not self.attn_output_gate and not self._has_pre_quant_scale
    else:

        def _use_quantize_output(self) -> bool:
            """Whether `o_proj` shall get quantized values."""
            return self.has_quant_scale and not self.attn_output_gate and not self._has_pre_quant_scale

    @property
    def _has_pre_quant_scale(self) -> bool:
        return getattr(self.o_proj, "pre_quant_scale", None) is not None

    @property
    def quantizes_output(self) -> bool:
        """Whether it writes quantized values, with the `input_scale` of `o_proj`, or 1 where that has none.

        `o_proj` must want them (`Attention._use_quantize_output`) and have an `inv_input_scale`, which is the
        `out_scale` of `TrtllmAttention.forward`: dynamic per-tensor FP8 has none. Attention's own algorithm must have
        scales too, and the KV cache must be FP8 or NVFP4 (`TrtllmAttention.get_quantize_output_dtype`).
        """
        own, out = self.quant_config, self.o_proj
        if own is None or not self._use_quantize_output():
            return False
        if out.quant_algo in _FP8_INPUT and out.inv_input_scale is None:
            return False
        return own.layer_quant_mode.algo in _HAS_QUANT_SCALE and own.kv_cache_quant_algo in _QUANTIZED_CACHES

    def _quantize_output(self, values: Tensor) -> Any:
        """FP4 values are written with the scale that `o_proj` would use itself, which the double doesn't simulate."""
        if not self.quantizes_output or self.o_proj.quant_algo in _FP4_INPUT:
            return values
        return FP8Values(values, self.o_proj.inv_input_scale)

    def _check_pool(self) -> None:
        """The cache is allocated by the global configuration, and written by attention's own.

        Until `validate_and_set_kv_cache_quant` of `_torch/pyexecutor/model_loader.py` also sets the entries of
        layers, `KvCacheConfig(dtype=...)` lets the two differ in a checkpoint of MIXED_PRECISION.
        """
        if self.quant_config is not None and self.quant_config.kv_cache_quant_algo != self._pool_algo:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def frequencies(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Return the angles per position, from the rotary parameters that the release reads."""
    base = rope.get("rope_theta", 10000.0) ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in {"default", "mrope"}:  # for text, all sections of M-RoPE have the same positions
        return base
    if kind == "linear":
        return base / rope["factor"]
    if kind != "llama3":
        raise NotImplementedError(f"the double has no rotary embedding of type {kind}")
    turns = rope["original_max_position_embeddings"] * base / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (smooth + (1 - smooth) / rope["factor"])


def _rotate(values: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.arange(values.shape[-2]).double()[:, None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second = values.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
