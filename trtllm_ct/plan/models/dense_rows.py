"""Rows of decoders whose layers are attention with separate queries, keys and values, and one MLP.

Files are in TensorRT-LLM's `_torch/models/` unless another folder is named; a commit identifies the version of the
file that was read. The modules that rows list are those of transformers 5.23 `models/*/modeling_*.py`; a test compares
them with the models that transformers builds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_row import (
    ALL_MODES,
    ALWAYS,
    CUTS,
    QKV,
    SHAPES,
    WHOLE_HEADS,
    ClassRow,
    EagerFusion,
    Leaves,
    Limit,
    built_biases,
)
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

__all__ = ["ATTENTION", "DENSE_ROWS", "HEAD_NORMS", "MLP", "PRE_NORMS"]

ATTENTION = tuple(f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"))
"""The Linears of attention with separate queries, keys and values."""

MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""The Linears of a gated feed-forward part."""

PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
"""The norms of the inputs of attention and MLP."""

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""The norms of single heads."""

_INT4 = frozenset({QuantAlgo.W4A16, QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_GPTQ, QuantAlgo.W4A8_AWQ})
_SANDWICH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_ATTENTION_BIAS = dict.fromkeys(ATTENTION, "attention_bias")

# `built_biases` are from what a class gives `_torch/modules/attention.py: Attention` (00547a25: `bias` for q, k and v,
# and `dense_bias` for the output, which is `bias` unless it is given), `gated_mlp.py` (01503f55) and `mlp.py`.
# modeling_mistral.py: MistralAttention and MistralDecoderLayer (002f3cc3) have no bias.
_MISTRAL = ClassRow(leaves=(Leaves(attention=ATTENTION, mlp=MLP, norms=PRE_NORMS),))
# modeling_llama.py: LlamaAttention and LlamaDecoderLayer (012cf909).
_LLAMA = replace(
    _MISTRAL,
    biases={**_ATTENTION_BIAS, **dict.fromkeys(MLP, "mlp_bias")},
    eager=EagerFusion(
        paths={QuantAlgo.FP8: MLP[:2], QuantAlgo.NVFP4: (*ATTENTION[:3], *MLP[:2])},
        hidden_above=4096,
        switch="TRTLLM_LLAMA_EAGER_FUSION_DISABLED",
        source="LlamaDecoderLayer.forward, `modeling_llama.py`, 3a5901cd",
    ),
    built_biases=built_biases(attention_bias=ATTENTION, mlp_bias=MLP),
)
# modeling_qwen.py: QwenAttention, QwenYarnAttention and QwenDecoderLayer (047098b7).
_QWEN2 = replace(
    _MISTRAL,
    biases=dict.fromkeys(ATTENTION[:3], ALWAYS),
    built_biases=built_biases(always=ATTENTION[:3], mlp_bias=MLP),
)
# modeling_qwen3.py: Qwen3DecoderLayer (010bb95f).
_QWEN3 = ClassRow(
    biases=_ATTENTION_BIAS,
    built_biases=built_biases(attention_bias=ATTENTION, mlp_bias=MLP),
    leaves=(Leaves(attention=ATTENTION, mlp=MLP, norms=PRE_NORMS + HEAD_NORMS),),
)
_GEMMA2 = ClassRow(biases=_ATTENTION_BIAS, leaves=(Leaves(attention=ATTENTION, mlp=MLP, norms=_SANDWICH_NORMS),))
# modeling_gemma3.py: Gemma3Attention (00e7d103) has no bias, whatever config.json says.
_GEMMA3 = replace(_GEMMA2, leaves=(Leaves(attention=ATTENTION, mlp=MLP, norms=_SANDWICH_NORMS + HEAD_NORMS),))
# modeling_phi3.py (000a01de): Phi3ForCausalLM.load_weights cuts both fused weights, and no bias of them.
_PHI3 = ClassRow(
    cuts={**CUTS, "qkv_proj": Cut.COLUMN, "gate_up_proj": Cut.COLUMN},
    splits={"qkv_proj": ("heads", "kv_heads", "kv_heads"), "gate_up_proj": ("intermediate", "intermediate")},
    divided=WHOLE_HEADS,
    leaves=(
        Leaves(
            attention=("self_attn.qkv_proj", "self_attn.o_proj"),
            mlp=("mlp.gate_up_proj", "mlp.down_proj"),
            norms=PRE_NORMS,
        ),
    ),
    shapes={**SHAPES, "qkv_proj": ("qkv", "hidden"), "gate_up_proj": ("gate_up", "hidden")},
    built_biases=built_biases(attention_bias=("self_attn.qkv_proj", "self_attn.o_proj")),
)

# modeling_seedoss.py (22de8b34): the stock mapper; q/k/v have biases.
_SEED_OSS = ClassRow(
    layer=(
        (
            Part(
                modules=(*QKVO, *TWO_NORMS, *MLP),
                when={
                    "attention_bias": biases(*QKVO[:3]),
                    "attention_out_bias": biases(QKVO[3]),
                    "mlp_bias": biases(*MLP),
                },
            ),
        ),
    ),
    built_biases=built_biases(attention_bias=QKVO[:3], attention_out_bias=QKVO[3:], mlp_bias=MLP),
)

# modeling_exaone4.py (17eae74d, fbbc05dd): the stock mapper; the norms follow attention and MLP.
_EXAONE4 = ClassRow(
    limits=(
        Limit(
            paths=("q_proj", "k_proj", "v_proj", "o_proj", *MLP),
            algos=ALL_MODES - {QuantAlgo.FP8_BLOCK_SCALES},
            obstacle="runs this Linear in a kernel that reads past its memory with",
            source="Exaone4DecoderLayer.__init__, `modeling_exaone4.py`, 17eae74d: DeepGEMM is off where the global "
            "mode is FP8_BLOCK_SCALES; fbbc05dd has no such test",
        ),
    ),
    layer=(
        (
            Part(
                modules=(
                    *QKVO,
                    *HEAD_NORM_NAMES,
                    *MLP,
                    "post_attention_layernorm",
                    "post_feedforward_layernorm",
                )
            ),
        ),
    ),
    built_biases=built_biases(mlp_bias=MLP),
)

_NORM_WITH_BIAS = Part(modules=("norm",), tensors=("norm.bias",))

# modeling_nemotron.py (000a01de): the stock mapper; no gate in the MLP. Every rank has the whole embeddings.
_NEMOTRON = ClassRow(
    fused=QKV,
    table=Cut.NONE,
    layer=(
        (
            Part(
                modules=(*QKVO, *TWO_NORMS, *MLP[1:]),
                tensors=biases(*TWO_NORMS),
                when={**ATTENTION_BIASES, "mlp_bias": biases(*MLP[1:])},
            ),
        ),
    ),
    ends=_NORM_WITH_BIAS,
    built_biases=built_biases(attention_bias=QKVO, mlp_bias=MLP[1:]),
)

# modeling_starcoder2.py (08c952c0, 65b31db1), Starcoder2ForCausalLM.load_weights: c_fc and c_proj are renamed, and the
# modules have the new names.
_STARCODER2 = ClassRow(
    fused=QKV,
    cuts={**CUTS, "mlp.c_fc": Cut.COLUMN, "mlp.c_proj": Cut.ROW},
    tied=True,
    inner=((r"\.mlp\.c_fc$", ".mlp.up_proj"), (r"\.mlp\.c_proj$", ".mlp.down_proj")),
    layer=(
        (
            Part(
                modules=(*QKVO, *TWO_NORMS, "mlp.c_fc", "mlp.c_proj"),
                tensors=biases(*TWO_NORMS),
                when={"use_bias": biases(*QKVO, "mlp.c_fc", "mlp.c_proj")},
            ),
        ),
    ),
    ends=_NORM_WITH_BIAS,
    built_biases=built_biases(use_bias=(*QKVO, "mlp.c_fc", "mlp.c_proj")),
)

# modeling_cohere2.py (231ddefa): Cohere2ForCausalLM.load_weights takes no mapper, fuses q/k/v only and repeats nothing.
# Cohere2MLP.__init__ gives the three Linears neither `skip_create_weights_in_init` nor a fused form, so they are
# allocated in the global mode; `apply_quant_config_exclude_modules` of modeling_utils.py allocates them again only in
# its newest version, and entries of layers never do. Cohere2Attention and Cohere2MLP have no bias.
_COHERE2 = ClassRow(
    fused=QKV,
    early=MLP,
    divided=WHOLE_HEADS,
    tied=True,
    layer=((Part(modules=(*QKVO, "input_layernorm"), when=ATTENTION_BIASES),), (DENSE_MLP,)),
)

# modeling_hunyuan_dense.py (64584b28, 06d811a9), HunYuanDenseV1ForCausalLM.load_weights: no mapper.
_HUNYUAN_DENSE = ClassRow(
    limits=(
        Limit(
            paths=("q_proj", "k_proj", "v_proj"),
            algos=ALL_MODES - _INT4,
            obstacle="counts K/V heads by the rows of this weight, which are half as many in",
            source="HunYuanDenseV1ForCausalLM.load_weights, `modeling_hunyuan_dense.py`, 06d811a9",
        ),
    ),
    divided=WHOLE_HEADS,
    layer=(
        (
            Part(
                modules=(*QKVO, *TWO_NORMS),
                when={
                    **ATTENTION_BIASES,
                    "use_qk_norm": ("self_attn.query_layernorm.weight", "self_attn.key_layernorm.weight"),
                },
            ),
        ),
        (DENSE_MLP,),
    ),
    built_biases=built_biases(attention_bias=QKVO, mlp_bias=MLP),
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
    "SeedOssForCausalLM": _SEED_OSS,
    "Exaone4ForCausalLM": _EXAONE4,
    # modeling_exaone4_5.py (0050262c), checkpoints/hf/exaone4_5_weight_mapper.py (0aa87516): a tower, which is left
    # plain, beside Exaone4ForCausalLM.
    "Exaone4_5_ForConditionalGeneration": _EXAONE4,
    "NemotronForCausalLM": _NEMOTRON,
    "Starcoder2ForCausalLM": _STARCODER2,
    "Cohere2ForCausalLM": _COHERE2,
    "HunYuanDenseV1ForCausalLM": _HUNYUAN_DENSE,
}
"""The rows by the name of the architecture in config.json."""
