"""Rows of decoders with routed experts beside attention of separate queries, keys and values.

Modules and sizes: transformers 5.23 `models/*/modeling_*.py`; a test compares every row that lists the modules of its
layers with the models that transformers builds. Names and fusion: TensorRT-LLM `_torch/models/checkpoints/hf/` and
`_torch/models/modeling_*.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.plan.models.class_row import PROJECTION_NAMES, SHAPES, ClassRow, Leaves
from trtllm_ct.plan.models.dense_rows import ATTENTION, HEAD_NORMS, MLP, PRE_NORMS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MIXTURE_ROWS"]

# llm-compressor 0.14 gives the projections of Mixtral's experts the names of a dense layer.
_MIXTRAL = ClassRow(
    router="block_sparse_moe.gate",
    experts="block_sparse_moe.experts",
    projections=("w1", "w3", "w2"),
    leaves=(Leaves(attention=ATTENTION, norms=PRE_NORMS),),
)
_QWEN2_MOE = ClassRow(
    router="mlp.gate",
    experts="mlp.experts",
    projections=PROJECTION_NAMES,
    plain=("mlp.shared_expert_gate",),
    biases=dict.fromkeys(ATTENTION[:3], "qkv_bias"),
    leaves=(
        Leaves(
            attention=ATTENTION,
            mlp=MLP,
            shared=(*(f"mlp.shared_expert.{leaf}" for leaf in PROJECTION_NAMES), "mlp.shared_expert_gate"),
            norms=PRE_NORMS,
        ),
    ),
    shapes={
        **SHAPES,
        "shared_expert.gate_proj": ("shared_intermediate", "hidden"),
        "shared_expert.up_proj": ("shared_intermediate", "hidden"),
        "shared_expert.down_proj": ("hidden", "shared_intermediate"),
        "shared_expert_gate": ("one", "hidden"),
    },
)
_QWEN3_MOE = ClassRow(
    router="mlp.gate",
    experts="mlp.experts",
    projections=PROJECTION_NAMES,
    biases=dict.fromkeys(ATTENTION, "attention_bias"),
    leaves=(Leaves(attention=ATTENTION, mlp=MLP, norms=PRE_NORMS + HEAD_NORMS),),
)

MIXTURE_ROWS: Mapping[str, ClassRow] = {
    "MixtralForCausalLM": _MIXTRAL,
    "Qwen2MoeForCausalLM": _QWEN2_MOE,
    "Qwen3MoeForCausalLM": _QWEN3_MOE,
}
"""The rows by the name of the architecture in config.json."""
