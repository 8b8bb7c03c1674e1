"""Rows of decoders with layers of several kinds: attention beside linear attention or Mamba.

Files are in TensorRT-LLM's `_torch/models/` unless another folder is named; a commit identifies the version of the
file that was read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
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

__all__ = ["HYBRID_ROWS"]

# Modes whose tensors have either a row for each row of the weight or one element, under the names that Linears read.
_ROWS_OF_ITS_OWN = frozenset(
    {
        QuantAlgo.FP8,
        QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
        QuantAlgo.NVFP4,
        QuantAlgo.W4A16_NVFP4,
        QuantAlgo.MXFP8,
        QuantAlgo.W4A16_MXFP4,
        QuantAlgo.W4A8_MXFP4_MXFP8,
        QuantAlgo.W8A16,
    }
)

_FULL_ATTENTION = Part(modules=(*QKVO, *HEAD_NORM_NAMES), when=ATTENTION_BIASES)
_LINEAR = tuple(f"linear_attn.{leaf}" for leaf in ("conv1d", "norm", "out_proj"))
_DELTA_NET = Part(
    modules=(*_LINEAR, "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
    tensors=("linear_attn.dt_bias", "linear_attn.A_log"),
)
_NORMS = (Part(modules=TWO_NORMS),)
_SHARED = tuple(f"mlp.shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))
_SHARED_EXPERTS = Part(modules=("mlp.gate", "mlp.shared_expert_gate", *_SHARED), experts=GATED)

# modeling_qwen3_next.py (00022b04), `_torch/modules/mamba/gdn_mixer.py` (0d4bd901) and
# `checkpoints/hf/qwen3_next_weight_mapper.py` (ff5ca335 for 1.2, 32e0e21a for 1.3), `qwen2_moe_weight_mapper.py`
# (00be09f7). `linear_attn.conv1d` is a Linear there; writers store it as a plain convolution, and it is excluded by
# name as any plain module is. Qwen3NextAttention is Qwen3Attention with `attn_output_gate=True`.
_QWEN3_NEXT = ClassRow(
    all_mixtures=True,
    cuts={
        **CUTS,
        "linear_attn.in_proj_qkvz": Cut.COLUMN,
        "linear_attn.in_proj_ba": Cut.COLUMN,
        "linear_attn.out_proj": Cut.ROW,
    },
    plain=("mlp.shared_expert_gate", "linear_attn.conv1d"),
    router="mlp.gate",
    experts="mlp.experts",
    limits=(
        Limit(
            paths=("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
            algos=_ROWS_OF_ITS_OWN,
            source="Qwen3NextHfWeightMapper._permute_in_proj_to_dense, `checkpoints/hf/qwen3_next_weight_mapper.py`, "
            "32e0e21a (pull request 16314); 1.2 leaves the rows as they are",
        ),
    ),
    mixers=("linear_attn",),
    divided=("linear_num_key_heads", "linear_num_value_heads"),
    drafts="mtp.layers.",
    gated_output=True,
    layer=(_NORMS, (_FULL_ATTENTION, _DELTA_NET), (_SHARED_EXPERTS, DENSE_MLP)),
    built_biases=built_biases(attention_bias=QKVO, mlp_bias=_SHARED),
)

_SPLIT_DELTA_NET = Part(
    modules=(*_LINEAR, *(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a"))),
    tensors=_DELTA_NET.tensors,
)

# TensorRT-LLM `_torch/models/modeling_qwen3_5.py` (2478158c to 00620eb0) and `checkpoints/hf/qwen3_5_weight_mapper.py`
# (da259e7d to 04666e21): a decoder of Qwen3-Next whose linear attention is stored in four projections. The class packs
# them into two, and puts the dense MLP one level deeper.
_QWEN3_5_MOE = replace(
    _QWEN3_NEXT,
    cuts={**CUTS, "linear_attn.out_proj": Cut.ROW},
    limits=(
        Limit(
            paths=tuple(f"linear_attn.in_proj_{part}" for part in ("q", "k", "v", "qkv", "z", "b", "a", "qkvz", "ba")),
            source="Qwen3_5MoeHfWeightMapper._pack_split_projections, `checkpoints/hf/qwen3_5_weight_mapper.py`, "
            "da259e7d to 04666e21: which scales it packs depends on the release and on the global mode",
        ),
        Limit(
            paths=("lm_head",),
            source="`_torch/models/modeling_qwen3_5.py`, 00620eb0: lm_head is added to exclude_modules",
        ),
    ),
    inner=(
        (r"\.in_proj_(?:q|k|v|qkv|z)$", ".in_proj_qkvz"),
        (r"\.in_proj_[ba]$", ".in_proj_ba"),
    ),
    layer=(_NORMS, (_FULL_ATTENTION, _SPLIT_DELTA_NET), (_SHARED_EXPERTS, DENSE_MLP)),
)
_QWEN3_5 = replace(
    _QWEN3_5_MOE,
    all_mixtures=False,
    inner=(*_QWEN3_5_MOE.inner, (r"(layers\.\d+\.mlp)\.(gate_proj|up_proj|down_proj)$", r"\1.mlp.\2")),
    layer=(_NORMS, (_FULL_ATTENTION, _SPLIT_DELTA_NET), (DENSE_MLP,)),
)

_MAMBA = Part(
    modules=("mixer.in_proj", "mixer.conv1d", "mixer.norm", "mixer.out_proj"),
    tensors=("mixer.A_log", "mixer.D", "mixer.dt_bias"),
    when={"use_conv_bias": ("mixer.conv1d.bias",), "use_bias": biases("mixer.in_proj", "mixer.out_proj")},
)
_MIXER_ATTENTION = Part(modules=tuple(f"mixer.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")))
_UP_DOWN = ("mixer.up_proj", "mixer.down_proj")
_MIXER_MLP = Part(modules=_UP_DOWN, when={"mlp_bias": biases(*_UP_DOWN)})
_MIXER_SHARED = ("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj")
_LATENT = ("mixer.fc1_latent_proj", "mixer.fc2_latent_proj")
_MIXER_EXPERTS = Part(
    modules=("mixer.gate", *_MIXER_SHARED),
    tensors=("mixer.gate.e_score_correction_bias",),
    when={"mlp_bias": biases(*_MIXER_SHARED)},
    experts=(1, 2),
)
# The experts of some models work in a smaller space.
_MIXER_LATENT = Part(modules=_LATENT, when={"mlp_bias": biases(*_LATENT)}, key="moe_latent_size")

# modeling_nemotron_h.py (00620eb0, d513eeaf) and checkpoints/hf/nemotron_h_weight_mapper.py (05b033ac; fbbc05dd and the
# versions between): NemotronHHfWeightMapper.preprocess_weights renames `backbone`, cuts and rearranges the tensors of
# Mamba itself, and gives experts an empty w3, since they have no gate. MLPLayer has no bias, unlike NemotronHMOE; and
# NemotronHLayer leaves `bias` and `conv_bias` of `_torch/modules/mamba/mamba2_mixer.py` at False and True.
_NEMOTRON_H = ClassRow(
    fused=QKV,
    cuts={**CUTS, "mixer.out_proj": Cut.ROW},
    table=Cut.NONE,
    router="mixer.gate",
    experts="mixer.experts",
    limits=(
        Limit(
            paths=("mixer.in_proj",),
            algos=frozenset({QuantAlgo.FP8}),
            source="NemotronHHfWeightMapper.preprocess_weights, `checkpoints/hf/nemotron_h_weight_mapper.py`: 05b033ac "
            "also rearranges scales that have a row for each row; earlier versions do so in NVFP4 models or never",
        ),
        Limit(
            paths=("mixer.experts.up_proj", "mixer.experts.down_proj"),
            algos=frozenset({QuantAlgo.FP8, QuantAlgo.NVFP4}),
            obstacle="makes an empty gate for each expert, and has no code for the tensors of",
            source="NemotronHHfWeightMapper.preprocess_weights, `checkpoints/hf/nemotron_h_weight_mapper.py`, 05b033ac",
        ),
    ),
    inner=(
        (r"^backbone\.", "model."),
        # NemotronHMOE.__init__ (00620eb0) takes the mode of the first entry that begins with the name of the experts
        # and a dot; other code compares the name itself.
        (r"^(?:backbone|model)\.(.+\.mixer\.experts)$", r"model.\1.0.up_proj"),
    ),
    divided=("mamba_num_heads", "n_groups"),
    layer=(
        (Part(modules=("norm",)),),
        (_MAMBA, _MIXER_ATTENTION, _MIXER_MLP, _MIXER_EXPERTS),
        (_MIXER_LATENT, NOTHING),
    ),
    ends=Part(modules=("norm_f",)),
    built_biases=built_biases(
        attention_bias=_MIXER_ATTENTION.modules,
        mlp_bias=(*_MIXER_SHARED, *_LATENT),
        always=("mixer.conv1d",),
    ),
)

HYBRID_ROWS: Mapping[str, ClassRow] = {
    "Qwen3NextForCausalLM": _QWEN3_NEXT,
    "Qwen3_5ForCausalLM": _QWEN3_5,
    "Qwen3_5ForConditionalGeneration": _QWEN3_5,
    "Qwen3_5MoeForCausalLM": _QWEN3_5_MOE,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3_5_MOE,
    "NemotronHForCausalLM": _NEMOTRON_H,
}
"""The rows by the name of the architecture in config.json."""
