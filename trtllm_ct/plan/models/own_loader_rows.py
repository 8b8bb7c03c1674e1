"""Rows of the model classes that load their weights themselves, under names and in modes of their own.

Files are in TensorRT-LLM's `_torch/models/`; a commit identifies the version of the file that was read.
The releases that have a class are in `engine/model_classes.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.modes import LINEAR_MODES
from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_row import CUTS, QKV, ClassRow, Limit, built_biases
from trtllm_ct.plan.models.layer_parts import (
    ATTENTION_BIASES,
    DENSE_MLP,
    HEAD_NORM_NAMES,
    NOTHING,
    QKVO,
    TWO_NORMS,
    Part,
    biases,
)
from trtllm_ct.plan.models.mixture_rows import GATED

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OWN_LOADER_ROWS"]

_ALL = frozenset(mode.algo for mode in LINEAR_MODES)
_INT4 = frozenset({QuantAlgo.W4A16, QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_GPTQ, QuantAlgo.W4A8_AWQ})
_NUMBERED = ("w1", "w3", "w2")
_ATTENTION = tuple(f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"))
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SHARED_MLP = tuple(path.replace("mlp.", "mlp.shared_mlp.") for path in _MLP)
# Classes that repeat weights and biases of K and V only, or nothing, when there are more ranks than heads.
_WHOLE_HEADS = ("num_key_value_heads",)

# modeling_hunyuan_moe.py (047098b7, eb376614), HunYuanMoEV1ForCausalLM.load_weights: no mapper. It renames gate_proj,
# up_proj and down_proj of experts for the backends CUTLASS and VANILLA only (for all since pull request 18018), so they
# are delivered as w1, w3 and w2, which it leaves as they are. The router is stored as `gate.wg`.
_HUNYUAN_MOE = ClassRow(
    plain=("mlp.gate.wg",),
    experts="mlp.experts",
    projections=_NUMBERED,
    limits=(
        Limit(
            paths=("q_proj", "k_proj", "v_proj"),
            algos=_ALL - _INT4,
            obstacle="counts K/V heads by the rows of this weight, which are half as many in",
            source="HunYuanMoEV1ForCausalLM.load_weights, `modeling_hunyuan_moe.py`, 047098b7",
        ),
    ),
    inner=((r"\.mlp\.gate\.wg$", ".mlp.gate"),),
    divided=_WHOLE_HEADS,
    layer=(
        (
            Part(
                modules=(*QKVO, *TWO_NORMS, "self_attn.query_layernorm", "self_attn.key_layernorm"),
                when=ATTENTION_BIASES,
            ),
        ),
        (
            Part(
                modules=(
                    "mlp.gate.wg",
                    *_SHARED_MLP,
                ),
                experts=GATED,
            ),
            DENSE_MLP,
        ),
    ),
    built_biases=built_biases(attention_bias=QKVO, mlp_bias=(*_MLP, *_SHARED_MLP)),
)

# modeling_step3p7.py (0c37d5ba), class Step3p7ForCausalLM, which is registered as Step3p5ForCausalLM:
# Step3p7DecoderLayer.__init__ builds all but routed experts without quantization, and no Linear with a bias.
# split_stacked_moe_weights splits stacks of experts beside the router. Every rank has the whole embeddings.
_STACKED = ("gate_proj", "up_proj", "down_proj")
_STEP3P5 = ClassRow(
    cuts={**CUTS, "self_attn.g_proj": Cut.COLUMN},
    table=Cut.NONE,
    plain=(
        *_ATTENTION,
        "self_attn.g_proj",
        *_MLP,
        *(f"share_expert.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")),
        "moe.gate",
    ),
    experts="moe.experts",
    projections=_NUMBERED,
    limits=(
        Limit(
            paths=tuple(f"moe.experts.{leaf}" for leaf in _NUMBERED),
            algos=frozenset({QuantAlgo.FP8_BLOCK_SCALES, QuantAlgo.NVFP4}),
            obstacle="computes some layers of experts in Python, and has no code there for",
            source="Step3p7ForCausalLM._capture_bf16_clamp_weights and Step3p7MoE.load_clamp_weights_from_fp8_experts, "
            "`modeling_step3p7.py`, 0c37d5ba",
        ),
    ),
    inner=((r"\.moe\.(?:gate_proj|up_proj|down_proj)$", ".moe.experts"),),
    layer=(
        (
            Part(
                modules=(*QKVO, *TWO_NORMS, *HEAD_NORM_NAMES),
                when={"use_head_wise_attn_gate": ("self_attn.g_proj.weight",)},
            ),
        ),
        (
            Part(
                modules=("moe.gate", *(f"share_expert.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))),
                when={"use_moe_router_bias": ("moe.router_bias",)},
            ),
            DENSE_MLP,
        ),
        (Part(experts=GATED), Part(modules=tuple(f"moe.{leaf}" for leaf in _STACKED)), NOTHING),
    ),
)

# modeling_gpt_oss.py (050b6cb9, and a later text of 39575 characters): GptOssForCausalLM.__post_init__ looks at no
# entries, and puts `model.` before exclusions that don't begin with it; `params_map` and `hf_params_map` give the names
# inside. load_hf_weights reads experts from stacks, and falls back to MXFP4 in the layout of OpenAI if one is missing.
_GPT_OSS = ClassRow(
    fused=QKV,
    plain=("mlp.router",),
    experts="mlp.experts",
    limits=(
        Limit(
            paths=_ATTENTION,
            algos=_ALL - {QuantAlgo.NVFP4, QuantAlgo.W4A16_NVFP4},
            obstacle="expects quantized experts beside plain attention in",
            source="GptOssForCausalLM.load_nvfp4_weights, `modeling_gpt_oss.py`, a text after 050b6cb9",
        ),
        Limit(
            paths=tuple(f"mlp.experts.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")),
            obstacle="casts stacked experts to the model's dtype, and never scales them, in",
            source="GptOssForCausalLM.load_hf_weights, `modeling_gpt_oss.py`, 050b6cb9",
        ),
    ),
    inner=(
        (r"^model\.embed_tokens$", "model.embedding"),
        (r"^model\.layers\.(\d+)\.self_attn\.(?:q|k|v)_proj$", r"model.block.\1.attn.qkv_proj"),
        (r"^model\.layers\.(\d+)\.self_attn\.o_proj$", r"model.block.\1.attn.o_proj"),
        (r"^model\.layers\.(\d+)\.mlp\.router$", r"model.block.\1.mlp.gate"),
        (r"^model\.layers\.(\d+)\.mlp\.experts$", r"model.block.\1.mlp.experts"),
    ),
    one_mode=True,
    divided=_WHOLE_HEADS,
    one_stage=True,  # GptOssForCausalLM.__init__
    layer=(
        (Part(modules=(*QKVO, *TWO_NORMS), tensors=("self_attn.sinks",), when=ATTENTION_BIASES),),
        (
            Part(
                modules=("mlp.router",),
                tensors=biases("mlp.router"),
                experts=GATED,
                expert_locals=("weight", "bias"),
            ),
        ),
    ),
    built_biases=built_biases(always=QKVO),
)

# modeling_mllama.py (000a01de): MllamaForConditionalGeneration is no DecoderModelForCausalLM, so neither entries nor
# exclusions are looked at, and all Linears of the decoder are allocated in the global mode. They have no bias, whatever
# config.json says. Layers of cross-attention and the tower are not built. load_weights takes no mapper; every rank has
# the whole embeddings.
_MLLAMA = ClassRow(
    table=Cut.NONE,
    plain=tuple(f"cross_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")),
    limits=(Limit(paths=("lm_head",), source="MllamaForCausalLM.__init__, `modeling_mllama.py`, 000a01de"),),
    one_mode=True,
    early=(*_ATTENTION, *_MLP),
    divided=_WHOLE_HEADS,
    unbuilt=("cross_attn", "vision_model"),
    layer=(
        (Part(modules=TWO_NORMS),),
        (
            Part(modules=QKVO),
            Part(
                modules=tuple(
                    f"cross_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
                ),
                tensors=("cross_attn_attn_gate", "cross_attn_mlp_gate"),
            ),
        ),
        (DENSE_MLP,),
    ),
)

# modeling_deepseekv4.py (02586bf0): _remap_deepseek_v4_checkpoint_keys takes the names that DeepSeek published, and
# adds tensors that they lack; under any other name nothing is found. DeepseekV4WeightLoader joins wq_a and wkv, as
# DeepSeek-V3's does, and the two parts of each compressor. DeepseekV4DecoderLayer.__init__ asserts that the global mode
# is not MIXED_PRECISION. The indexer and the compressor are children of the attention backend too.
_V4_ATTENTION = {
    "wq_a": "kv_a_proj_with_mqa",
    "wkv": "kv_a_proj_with_mqa",
    "wq_b": "q_b_proj",
    "wo_a": "o_a_proj",
    "wo_b": "o_b_proj",
}
_V4_SHARED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_V4_COMPRESSOR = ("compressor.wkv", "compressor.wgate", "compressor.norm")
_V4_PARTS = (
    (
        Part(
            modules=(
                *(f"attn.{leaf}" for leaf in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b")),
                *("attn_norm", "ffn_norm", "ffn.gate", *(f"ffn.shared_experts.{leaf}" for leaf in _NUMBERED)),
            ),
            tensors=(
                "attn.attn_sink",
                "ffn.gate.bias|ffn.gate.tid2eid",
                *(f"hc_{part}_{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base", "scale")),
            ),
            experts=GATED,
        ),
    ),
    (Part(modules=tuple(f"attn.{name}" for name in _V4_COMPRESSOR), tensors=("attn.compressor.ape",)), NOTHING),
    (
        Part(
            modules=(
                *(f"attn.indexer.{name}" for name in _V4_COMPRESSOR),
                *("attn.indexer.wq_b", "attn.indexer.weights_proj"),
            ),
            tensors=("attn.indexer.compressor.ape",),
        ),
        NOTHING,
    ),
)
_V4_LAYER = r"^(?:model\.)?layers\.(\d+)\."
_DEEPSEEK_V4 = ClassRow(
    fused={"gate_up_proj": ("ffn.shared_experts.w1", "ffn.shared_experts.w3")},
    cuts={
        "attn.wq_b": Cut.COLUMN,
        "attn.wo_b": Cut.ROW,
        "ffn.shared_experts.w1": Cut.COLUMN,
        "ffn.shared_experts.w3": Cut.COLUMN,
        "ffn.shared_experts.w2": Cut.ROW,
    },
    table=Cut.NONE,
    plain=(
        *(f"attn.{leaf}" for leaf in ("wq_a", "wkv", "wo_a")),
        *(f"compressor.{leaf}" for leaf in ("wkv", "wgate")),
        "indexer.weights_proj",
        "ffn.gate",
    ),
    experts="ffn.experts",
    projections=_NUMBERED,
    limits=(
        Limit(
            paths=("attn.wo_b",),
            algos=_ALL - {QuantAlgo.FP8_BLOCK_SCALES},
            obstacle="reads the other half of the output projection in FP8 too if this one is in",
            source="create_sparse_attn_weights, `attention_backend/sparse/deepseek_v4/module.py`, 0bbb76d2",
        ),
        Limit(
            paths=tuple(f"ffn.experts.{leaf}" for leaf in _NUMBERED),
            algos=_ALL - {QuantAlgo.W4A8_AWQ},
            obstacle="reads experts in a layout of its own (W4A8_CUSTOM) in",
            source="DeepseekV4MoE.__init__, `modeling_deepseekv4.py`, 02586bf0",
        ),
    ),
    inner=(
        (r"^embed$", "model.embed_tokens"),
        (r"^head$", "lm_head"),
        *((rf"{_V4_LAYER}attn\.{old}$", rf"model.layers.\1.self_attn.{new}") for old, new in _V4_ATTENTION.items()),
        *(
            pair
            for mqa in ("", "mqa.")
            for pair in (
                (rf"{_V4_LAYER}attn\.indexer\.(wq_b|weights_proj)$", rf"model.layers.\1.self_attn.{mqa}indexer.\2"),
                (
                    rf"{_V4_LAYER}attn\.(indexer\.)?compressor\.(?:wkv|wgate)$",
                    rf"model.layers.\1.self_attn.{mqa}\2compressor.wkv_gate",
                ),
            )
        ),
        (rf"{_V4_LAYER}ffn\.(experts|gate)$", r"model.layers.\1.mlp.\2"),
        *(
            (rf"{_V4_LAYER}ffn\.shared_experts\.{old}$", rf"model.layers.\1.mlp.shared_experts.{new}")
            for old, new in _V4_SHARED.items()
        ),
    ),
    one_mode=True,
    ranks_vary=tuple(f"ffn.shared_experts.{leaf}" for leaf in _NUMBERED),
    embeddings="embed",
    head="head",
    body="",
    mixers=("attn",),
    divided=("o_groups",),
    drafts="mtp.",
    layer=_V4_PARTS,
    ends=Part(modules=("norm",), tensors=tuple(f"hc_head_{leaf}" for leaf in ("fn", "base", "scale"))),
)

OWN_LOADER_ROWS: Mapping[str, ClassRow] = {
    "Step3p5ForCausalLM": _STEP3P5,
    "DeepseekV4ForCausalLM": _DEEPSEEK_V4,
    "GptOssForCausalLM": _GPT_OSS,
    "HunYuanMoEV1ForCausalLM": _HUNYUAN_MOE,
    "MllamaForConditionalGeneration": _MLLAMA,
}
"""The rows by the name of the architecture in config.json."""
