"""Rows of decoders whose layers are attention and one MLP.

Modules and sizes: transformers 5.23 `models/*/modeling_*.py`; a test compares every row that lists the modules of its
layers with the models that transformers builds. Fusion and cuts: TensorRT-LLM `_torch/modules/attention.py` and
`gated_mlp.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_row import ALWAYS, CUTS, SHAPES, ClassRow, Leaves

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ATTENTION", "DENSE_ROWS", "HEAD_NORMS", "MLP", "PRE_NORMS"]

ATTENTION = tuple(f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"))
"""The Linears of attention with separate queries, keys and values."""

MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""The Linears of a gated feed-forward part."""

PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
"""The norms of the inputs of attention and MLP."""

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""The norms of single heads."""

_SANDWICH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_ATTENTION_BIAS = dict.fromkeys(ATTENTION, "attention_bias")

_MISTRAL = ClassRow(leaves=(Leaves(attention=ATTENTION, mlp=MLP, norms=PRE_NORMS),))
_LLAMA = replace(_MISTRAL, biases={**_ATTENTION_BIAS, **dict.fromkeys(MLP, "mlp_bias")})
_QWEN2 = replace(_MISTRAL, biases=dict.fromkeys(ATTENTION[:3], ALWAYS))
_QWEN3 = ClassRow(biases=_ATTENTION_BIAS, leaves=(Leaves(attention=ATTENTION, mlp=MLP, norms=PRE_NORMS + HEAD_NORMS),))
_GEMMA2 = ClassRow(biases=_ATTENTION_BIAS, leaves=(Leaves(attention=ATTENTION, mlp=MLP, norms=_SANDWICH_NORMS),))
_GEMMA3 = replace(_GEMMA2, leaves=(Leaves(attention=ATTENTION, mlp=MLP, norms=_SANDWICH_NORMS + HEAD_NORMS),))
# TensorRT-LLM `_torch/models/modeling_phi3.py: Phi3ForCausalLM.load_weights` cuts both fused weights.
_PHI3 = ClassRow(
    cuts={**CUTS, "qkv_proj": Cut.COLUMN, "gate_up_proj": Cut.COLUMN},
    splits={"qkv_proj": ("heads", "kv_heads", "kv_heads"), "gate_up_proj": ("intermediate", "intermediate")},
    divided=("num_key_value_heads",),
    leaves=(
        Leaves(
            attention=("self_attn.qkv_proj", "self_attn.o_proj"),
            mlp=("mlp.gate_up_proj", "mlp.down_proj"),
            norms=PRE_NORMS,
        ),
    ),
    shapes={**SHAPES, "qkv_proj": ("qkv", "hidden"), "gate_up_proj": ("gate_up", "hidden")},
)

DENSE_ROWS: Mapping[str, ClassRow] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _MISTRAL,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "GraniteForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "Phi3ForCausalLM": _PHI3,
}
"""The rows by the name of the architecture in config.json."""
