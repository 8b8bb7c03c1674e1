"""Rows of decoders with multi-head latent attention: DeepSeek and models like it.

Files are in TensorRT-LLM's `_torch/models/`; a commit identifies the version of the file that was read. Modules and
sizes: transformers 5.23 `models/deepseek_*/modeling_*.py`; a test compares the rows that list the modules of their
layers with the models that transformers builds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_row import (
    ALL_MODES,
    CUTS,
    GATE_UP,
    PROJECTION_NAMES,
    SHAPES,
    ClassRow,
    EagerFusion,
    Leaves,
    Limit,
)
from trtllm_ct.plan.models.dense_rows import MLP, PRE_NORMS
from trtllm_ct.plan.models.layer_parts import DENSE_MLP, NOTHING, TWO_NORMS, Part, biases
from trtllm_ct.plan.models.mixture_rows import GROUPED_EXPERTS, SHARED_MLP

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LATENT_ROWS"]

_KV = ("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj")
_NORMS = (*PRE_NORMS, "self_attn.kv_a_layernorm")
_LOW_RANK_QUERIES = Leaves(
    attention=("self_attn.q_a_proj", "self_attn.q_b_proj", *_KV),
    mlp=MLP,
    shared=SHARED_MLP,
    norms=(*_NORMS, "self_attn.q_a_layernorm"),
)
_FULL_RANK_QUERIES = Leaves(attention=("self_attn.q_proj", *_KV), mlp=MLP, shared=SHARED_MLP, norms=_NORMS)

_EXPERTS_LIMIT = Limit(
    paths=tuple(f"mlp.experts.{leaf}" for leaf in PROJECTION_NAMES),
    algos=ALL_MODES - {QuantAlgo.W4A8_AWQ},
    obstacle="reads experts in another layout (W4A8_CUSTOM) in",
    source="Deepseekv3MoE.__init__, `modeling_deepseekv3.py`, 585c7565 and 047098b7",
)

# modeling_deepseekv3.py: DeepseekV3ForCausalLM.load_weights (000561df), DeepseekV3WeightLoader.load_weights since
# a43cf9e3, joins q_a_proj and kv_a_proj_with_mqa. It splits kv_b_proj by heads and absorbs it into attention; for that
# it reads kv_b_proj plain. DeepseekV3DecoderLayer.__init__ (585c7565, 047098b7) asserts that the global mode is not
# MIXED_PRECISION. The number of ranks for the MLP and the shared experts follows from the scale blocks and from the
# number of GPUs in one node. Attention, the MLP and the shared experts have no bias, whatever config.json says.
_DEEPSEEK_V2 = ClassRow(
    fused=GATE_UP,
    joins={"kv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa")},
    cuts={**CUTS, "q_b_proj": Cut.COLUMN, "kv_b_proj": Cut.COLUMN},
    table=Cut.NONE,
    plain=("self_attn.kv_b_proj",),
    router="mlp.gate",
    experts="mlp.experts",
    projections=PROJECTION_NAMES,
    limits=(_EXPERTS_LIMIT,),
    one_mode=True,
    eager=EagerFusion(
        paths={QuantAlgo.NVFP4: MLP[:2]},
        switch="TRTLLM_DEEPSEEK_EAGER_FUSION_DISABLED",
        source="DeepseekV3DecoderLayer.forward_mlp, `modeling_deepseekv3.py`, 585c7565",
    ),
    ranks_vary=(*MLP, *SHARED_MLP),
    biases=dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa", "o_proj"), "attention_bias"),
    # The first one needs `q_lora_rank` in config.json.
    leaves=(_LOW_RANK_QUERIES, _FULL_RANK_QUERIES),
    shapes={
        **SHAPES,
        "q_proj": ("mla_queries", "hidden"),
        "q_a_proj": ("q_lora_rank", "hidden"),
        "q_b_proj": ("mla_queries", "q_lora_rank"),
        "kv_a_proj_with_mqa": ("kv_a", "hidden"),
        "kv_b_proj": ("kv_b", "kv_lora_rank"),
        "o_proj": ("hidden", "mla_values"),
        "q_a_layernorm": ("q_lora_rank",),
        "kv_a_layernorm": ("kv_lora_rank",),
        "shared_experts.gate_proj": ("shared_intermediate", "hidden"),
        "shared_experts.up_proj": ("shared_intermediate", "hidden"),
        "shared_experts.down_proj": ("hidden", "shared_intermediate"),
    },
)
_DEEPSEEK_V3 = replace(_DEEPSEEK_V2, extras={"mlp.gate": ("e_score_correction_bias",)})

# modeling_deepseekv3.py (585c7565 for 1.2, 7ed07f06 and 047098b7 for 1.3): DeepseekV3WeightLoader joins q_a_proj and
# kv_a_proj_with_mqa, splits kv_b_proj by heads, and knows the scales of few modes; 585c7565 joins indexer.wk to them
# too. Issue 18658: later versions copy the codes of a quantized indexer.wk as numbers. DeepseekV3DecoderLayer.__init__
# asserts that the global mode is not MIXED_PRECISION. The indexer is a child of the attention backend too.
_SPARSE_LATENT = replace(
    _DEEPSEEK_V2,
    joins={},
    plain=(
        *(f"self_attn.{leaf}" for leaf in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
        "indexer.wk",
        "indexer.weights_proj",
    ),
    inner=((r"\.self_attn\.indexer\.", ".self_attn.mqa.indexer."),),
    leaves=(),
    layer=(
        (
            Part(
                modules=(*_KV, "self_attn.kv_a_layernorm", *TWO_NORMS),
                when={"attention_bias": biases("self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")},
            ),
        ),
        (
            Part(
                modules=tuple(f"self_attn.{leaf}" for leaf in ("q_a_proj", "q_a_layernorm", "q_b_proj")),
                when={"attention_bias": biases("self_attn.q_a_proj")},
            ),
            Part(modules=("self_attn.q_proj",)),
        ),
        # Some layers take the choice of an earlier one (`indexer_types` of GLM-5.1).
        (
            Part(
                modules=tuple(f"self_attn.indexer.{leaf}" for leaf in ("wq_b", "wk", "k_norm", "weights_proj")),
                tensors=("self_attn.indexer.k_norm.bias",),
            ),
            NOTHING,
        ),
        (GROUPED_EXPERTS, DENSE_MLP),
    ),
)

LATENT_ROWS: Mapping[str, ClassRow] = {
    "DeepseekV2ForCausalLM": _DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": _DEEPSEEK_V3,
    "DeepseekV32ForCausalLM": _SPARSE_LATENT,
    "GlmMoeDsaForCausalLM": _SPARSE_LATENT,
}
"""The rows by the name of the architecture in config.json."""
