"""Rows of decoders with routed experts beside attention with separate queries, keys and values.

Files are in TensorRT-LLM's `_torch/models/` unless another folder is named; a commit identifies the version of the
file that was read. The modules that rows list are those of transformers 5.23 `models/*/modeling_*.py`; a test compares
them with the models that transformers builds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_row import (
    CUTS,
    GATE_UP,
    PROJECTION_NAMES,
    SHAPES,
    WHOLE_HEADS,
    ClassRow,
    EagerFusion,
    Leaves,
    Limit,
    built_biases,
)
from trtllm_ct.plan.models.dense_rows import ATTENTION, HEAD_NORMS, MLP, PRE_NORMS
from trtllm_ct.plan.models.layer_parts import (
    ATTENTION_BIASES,
    DENSE_MLP,
    HEAD_NORM_NAMES,
    QKVO,
    TWO_NORMS,
    Part,
    biases,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GATED", "GROUPED_EXPERTS", "MIXTURE_ROWS", "SHARED_MLP"]

GATED = (0, 1, 2)
"""The projections of an expert with a gate, for `Part.experts`."""

SHARED_MLP = tuple(f"mlp.shared_experts.{leaf}" for leaf in PROJECTION_NAMES)
"""The Linears of an MLP beside the routed experts, as most classes name them."""

GROUPED_EXPERTS = Part(modules=("mlp.gate", *SHARED_MLP), tensors=("mlp.gate.e_score_correction_bias",), experts=GATED)
"""Experts that are selected in groups, and an MLP beside them."""

# llm-compressor 0.14 gives the projections of Mixtral's experts the names of a dense layer. modeling_mixtral.py
# (000a01de) has no bias.
_MIXTRAL = ClassRow(
    router="block_sparse_moe.gate",
    experts="block_sparse_moe.experts",
    projections=("w1", "w3", "w2"),
    leaves=(Leaves(attention=ATTENTION, norms=PRE_NORMS),),
)
# modeling_qwen_moe.py: QwenMoeDecoderLayer (0a0d2c8e) and modeling_qwen3_moe.py: Qwen3MoEDecoderLayer (a678b91a,
# 03441af1) build experts without a look at the layer's number. QwenMoeAttention does not look at `qkv_bias`.
_QWEN2_MOE = ClassRow(
    all_mixtures=True,
    router="mlp.gate",
    experts="mlp.experts",
    projections=PROJECTION_NAMES,
    plain=("mlp.shared_expert_gate",),
    biases=dict.fromkeys(ATTENTION[:3], "qkv_bias"),
    built_biases=built_biases(
        always=ATTENTION[:3], mlp_bias=tuple(f"mlp.shared_expert.{leaf}" for leaf in PROJECTION_NAMES)
    ),
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
    all_mixtures=True,
    router="mlp.gate",
    experts="mlp.experts",
    projections=PROJECTION_NAMES,
    biases=dict.fromkeys(ATTENTION, "attention_bias"),
    built_biases=built_biases(attention_bias=ATTENTION),
    leaves=(Leaves(attention=ATTENTION, mlp=MLP, norms=PRE_NORMS + HEAD_NORMS),),
)

# modeling_glm.py (8f5bb1e0): Glm4DecoderLayer.__init__ asserts that the global mode is not MIXED_PRECISION, and
# `_compute_mlp_tp_size` and `_compute_shared_expert_tp_size` divide these parts among as many ranks as blocks allow.
# Glm4WeightLoader takes no mapper, repeats weights and biases of K and V only, and reads experts one by one.
# The layer builds norms of heads by `use_qk_norm` since pull request 10653 (January 2026). Versions before it, such as
# 0406f8aa, always build them, and their loader stops at a model that has none (`modeling_utils.py: _load_weights_impl`
# looks up every parameter of a norm). No version leaves them unwritten.
_GLM4_MOE = ClassRow(
    table=Cut.NONE,
    router="mlp.gate",
    experts="mlp.experts",
    projections=PROJECTION_NAMES,
    one_mode=True,
    eager=EagerFusion(
        paths={QuantAlgo.NVFP4: MLP[:2]},
        switch="TRTLLM_GLM_EAGER_FUSION_DISABLED",
        source="Glm4DecoderLayer.forward_mlp, `modeling_glm.py`, 8f5bb1e0",
    ),
    ranks_vary=(*MLP, *SHARED_MLP),
    divided=WHOLE_HEADS,
    layer=(
        (
            Part(
                modules=(*QKVO, *TWO_NORMS),
                when={
                    "attention_bias": biases(*QKVO[:3]),
                    "use_qk_norm": tuple(f"{norm}.weight" for norm in HEAD_NORM_NAMES),
                },
            ),
        ),
        (GROUPED_EXPERTS, DENSE_MLP),
    ),
    built_biases=built_biases(attention_bias=QKVO[:3]),
)

# modeling_minimaxm2.py (9c8b74e8, 00592717): the stock mapper, which renames no expert; MiniMaxM2MoE.__init__ builds
# the router plain. MiniMaxM2Attention has no bias, and applies one norm to all heads, which has as many heads as all
# ranks hold together.
_MINIMAX_M2 = ClassRow(
    table=Cut.NONE,
    router="block_sparse_moe.gate",
    experts="block_sparse_moe.experts",
    projections=("w1", "w3", "w2"),
    divided=WHOLE_HEADS,
    layer=(
        (Part(modules=(*QKVO, *TWO_NORMS, *HEAD_NORM_NAMES)),),
        (
            Part(
                modules=("block_sparse_moe.gate",),
                tensors=("block_sparse_moe.e_score_correction_bias",),
                experts=GATED,
            ),
        ),
    ),
)

# modeling_laguna.py (01dcc21a): LagunaHfWeightMapper renames experts. LagunaAttention.__init__ allocates g_proj, which
# gates the output of attention, in the global mode, as Cohere2's MLP is; its output projection has no bias.
_LAGUNA = ClassRow(
    cuts={**CUTS, "self_attn.g_proj": Cut.COLUMN},
    router="mlp.gate",
    experts="mlp.experts",
    projections=PROJECTION_NAMES,
    early=("self_attn.g_proj",),
    layer=(
        (Part(modules=(*QKVO, *TWO_NORMS, *HEAD_NORM_NAMES, "self_attn.g_proj"), when=ATTENTION_BIASES),),
        (
            Part(
                modules=("mlp.gate",),
                tensors=(
                    "mlp.gate.e_score_correction_bias|mlp.experts.e_score_correction_bias",
                    *(f"{name}.weight|{name.replace('experts', 'expert')}.weight" for name in SHARED_MLP),
                ),
                experts=GATED,
            ),
            DENSE_MLP,
        ),
    ),
    built_biases=dict.fromkeys(QKVO[:3], ("qkv_bias", "attention_bias")),
)

# modeling_afmoe.py and checkpoints/hf/afmoe_weight_mapper.py (038cc86c): AfmoeHfWeightMapper renames router and
# experts, and puts the rows of self_attn.gate_proj between those of q_proj; before (3c4acdc9) they were two Linears.
# AfmoeAttention passes `attn_output_gate=True` and has no bias.
_AFMOE = ClassRow(
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj", "self_attn.gate_proj"), **GATE_UP},
    table=Cut.NONE,
    router="mlp.router.gate",
    experts="mlp.experts",
    projections=PROJECTION_NAMES,
    limits=(
        Limit(
            paths=("q_proj", "k_proj", "v_proj", "self_attn.gate_proj"),
            algos=frozenset({QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN}),
            source="AfmoeHfWeightMapper._fuse_attention_gate, `checkpoints/hf/afmoe_weight_mapper.py`, 038cc86c: every "
            "tensor of q_proj must have the rows of all heads",
        ),
    ),
    inner=((r"\.mlp\.router\.gate$", ".mlp.gate"),),
    gated_output=True,
    layer=(
        (
            Part(
                modules=(
                    *QKVO,
                    *TWO_NORMS,
                    *HEAD_NORM_NAMES,
                    *("self_attn.gate_proj", "pre_mlp_layernorm", "post_mlp_layernorm"),
                ),
                when=ATTENTION_BIASES,
            ),
        ),
        (
            Part(
                modules=("mlp.router.gate",),
                tensors=("mlp.expert_bias",),
                when={"num_shared_experts": tuple(f"{name}.weight" for name in SHARED_MLP)},
                experts=GATED,
            ),
            DENSE_MLP,
        ),
    ),
)

MIXTURE_ROWS: Mapping[str, ClassRow] = {
    "MixtralForCausalLM": _MIXTRAL,
    "Qwen2MoeForCausalLM": _QWEN2_MOE,
    "Qwen3MoeForCausalLM": _QWEN3_MOE,
    "Glm4MoeForCausalLM": _GLM4_MOE,
    "MiniMaxM2ForCausalLM": _MINIMAX_M2,
    "LagunaForCausalLM": _LAGUNA,
    "AfmoeForCausalLM": _AFMOE,
}
"""The rows by the name of the architecture in config.json."""
