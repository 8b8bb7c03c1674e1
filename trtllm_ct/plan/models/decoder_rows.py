"""Rows of the model classes that are decoders of attention, feed-forward parts, experts and Mamba layers.

Files are in TensorRT-LLM's `_torch/models/` unless another folder is named; a commit identifies the version of the
file that was read. The releases that have a class are in `engine/model_classes.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.modes import LINEAR_MODES
from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_row import CUTS, GATE_UP, QKV, ClassRow, Limit

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DECODER_ROWS"]

_ALL = frozenset(mode.algo for mode in LINEAR_MODES)
_INT4 = frozenset({QuantAlgo.W4A16, QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_GPTQ, QuantAlgo.W4A8_AWQ})
# Classes that don't repeat K/V heads when there are more ranks than heads.
_WHOLE_HEADS = ("num_key_value_heads",)
_DENSE_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SHARED_MLP = tuple(f"mlp.shared_experts.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))

# modeling_seedoss.py (22de8b34): the stock mapper; q/k/v have biases.
_SEED_OSS = ClassRow()

# modeling_exaone4.py (17eae74d, fbbc05dd): the stock mapper; the norms follow attention and MLP.
_EXAONE4 = ClassRow(
    limits=(
        Limit(
            paths=("q_proj", "k_proj", "v_proj", "o_proj", *_DENSE_MLP),
            algos=_ALL - {QuantAlgo.FP8_BLOCK_SCALES},
            obstacle="runs this Linear in a kernel that reads past its memory with",
            source="Exaone4DecoderLayer.__init__, `modeling_exaone4.py`, 17eae74d: DeepGEMM is off where the global "
            "mode is FP8_BLOCK_SCALES; fbbc05dd has no such test",
        ),
    ),
)

# modeling_nemotron.py (000a01de): the stock mapper; no gate in the MLP. Every rank has the whole embeddings.
_NEMOTRON = ClassRow(fused=QKV, table=Cut.NONE)

# modeling_starcoder2.py (08c952c0, 65b31db1), Starcoder2ForCausalLM.load_weights: c_fc and c_proj are renamed, and the
# modules have the new names.
_STARCODER2 = ClassRow(
    fused=QKV,
    cuts={**CUTS, "mlp.c_fc": Cut.COLUMN, "mlp.c_proj": Cut.ROW},
    tied=True,
    inner=((r"\.mlp\.c_fc$", ".mlp.up_proj"), (r"\.mlp\.c_proj$", ".mlp.down_proj")),
)

# modeling_cohere2.py (231ddefa): Cohere2ForCausalLM.load_weights takes no mapper, fuses q/k/v only and repeats nothing.
# Cohere2MLP.__init__ gives the three Linears neither `skip_create_weights_in_init` nor a fused form, so they are
# allocated in the global mode; `apply_quant_config_exclude_modules` of modeling_utils.py allocates them again only in
# its newest version, and entries of layers never do.
_COHERE2 = ClassRow(fused=QKV, early=_DENSE_MLP, divided=_WHOLE_HEADS, tied=True)

# modeling_hunyuan_dense.py (64584b28, 06d811a9), HunYuanDenseV1ForCausalLM.load_weights: no mapper.
_HUNYUAN_DENSE = ClassRow(
    limits=(
        Limit(
            paths=("q_proj", "k_proj", "v_proj"),
            algos=_ALL - _INT4,
            obstacle="counts K/V heads by the rows of this weight, which are half as many in",
            source="HunYuanDenseV1ForCausalLM.load_weights, `modeling_hunyuan_dense.py`, 06d811a9",
        ),
    ),
    divided=_WHOLE_HEADS,
)

# modeling_glm.py (8f5bb1e0): Glm4DecoderLayer.__init__ asserts that the global mode is not MIXED_PRECISION, and
# `_compute_mlp_tp_size` and `_compute_shared_expert_tp_size` divide these parts among as many ranks as blocks allow.
# Glm4WeightLoader takes no mapper, repeats weights and biases of K and V only, and reads experts one by one.
_GLM4_MOE = ClassRow(
    table=Cut.NONE,
    plain=("mlp.gate",),
    experts="mlp.experts",
    projections=("gate_proj", "up_proj", "down_proj"),
    one_mode=True,
    ranks_vary=(*_DENSE_MLP, *_SHARED_MLP),
    divided=_WHOLE_HEADS,
)

# modeling_minimaxm2.py (9c8b74e8, 00592717): the stock mapper, which renames no expert; MiniMaxM2MoE.__init__ builds
# the router plain. MiniMaxM2Attention applies one norm to all heads, which has as many
# heads as all ranks hold together.
_MINIMAX_M2 = ClassRow(
    table=Cut.NONE,
    plain=("block_sparse_moe.gate",),
    experts="block_sparse_moe.experts",
    projections=("w1", "w3", "w2"),
    divided=_WHOLE_HEADS,
)

# modeling_laguna.py (01dcc21a): LagunaHfWeightMapper renames experts. LagunaAttention.__init__ allocates g_proj, which
# gates the output of attention, in the global mode, as Cohere2's MLP is.
_LAGUNA = ClassRow(
    cuts={**CUTS, "self_attn.g_proj": Cut.COLUMN},
    plain=("mlp.gate",),
    experts="mlp.experts",
    projections=("gate_proj", "up_proj", "down_proj"),
    early=("self_attn.g_proj",),
)

# modeling_afmoe.py and checkpoints/hf/afmoe_weight_mapper.py (038cc86c): AfmoeHfWeightMapper renames router and
# experts, and puts the rows of self_attn.gate_proj between those of q_proj; before (3c4acdc9) they were two Linears.
# AfmoeAttention passes `attn_output_gate=True`.
_AFMOE = ClassRow(
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj", "self_attn.gate_proj"), **GATE_UP},
    table=Cut.NONE,
    plain=("mlp.router.gate",),
    experts="mlp.experts",
    projections=("gate_proj", "up_proj", "down_proj"),
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
)

# modeling_nemotron_h.py (00620eb0, d513eeaf) and checkpoints/hf/nemotron_h_weight_mapper.py (05b033ac; fbbc05dd and the
# versions between): NemotronHHfWeightMapper.preprocess_weights renames `backbone`, cuts and rearranges the tensors of
# Mamba itself, and gives experts an empty w3, since they have no gate.
_NEMOTRON_H = ClassRow(
    fused=QKV,
    cuts={**CUTS, "mixer.out_proj": Cut.ROW},
    table=Cut.NONE,
    plain=("mixer.gate",),
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
    inner=((r"^backbone\.", "model."),),
    divided=("mamba_num_heads", "n_groups"),
)

# modeling_deepseekv3.py (585c7565 for 1.2, 7ed07f06 and 047098b7 for 1.3): DeepseekV3WeightLoader joins q_a_proj and
# kv_a_proj_with_mqa, splits kv_b_proj by heads, and knows the scales of few modes; 585c7565 joins indexer.wk to them
# too. Issue 18658: later versions copy the codes of a quantized indexer.wk as numbers. DeepseekV3DecoderLayer.__init__
# asserts that the global mode is not MIXED_PRECISION. The indexer is a child of the attention backend too.
_SPARSE_LATENT = ClassRow(
    fused=GATE_UP,
    cuts={**CUTS, "q_b_proj": Cut.COLUMN, "kv_b_proj": Cut.COLUMN},
    table=Cut.NONE,
    plain=(
        *(f"self_attn.{leaf}" for leaf in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
        "indexer.wk",
        "indexer.weights_proj",
        "mlp.gate",
    ),
    experts="mlp.experts",
    projections=("gate_proj", "up_proj", "down_proj"),
    limits=(
        Limit(
            paths=("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"),
            algos=_ALL - {QuantAlgo.W4A8_AWQ},
            obstacle="reads experts in a layout of its own (W4A8_CUSTOM) in",
            source="Deepseekv3MoE.__init__, `modeling_deepseekv3.py`, 585c7565 and 047098b7",
        ),
    ),
    inner=((r"\.self_attn\.indexer\.", ".self_attn.mqa.indexer."),),
    one_mode=True,
    ranks_vary=(*_DENSE_MLP, *_SHARED_MLP),
)

DECODER_ROWS: Mapping[str, ClassRow] = {
    "SeedOssForCausalLM": _SEED_OSS,
    "Exaone4ForCausalLM": _EXAONE4,
    # modeling_exaone4_5.py (0050262c), checkpoints/hf/exaone4_5_weight_mapper.py (0aa87516): a tower, which is left
    # plain, beside Exaone4ForCausalLM.
    "Exaone4_5_ForConditionalGeneration": _EXAONE4,
    "NemotronForCausalLM": _NEMOTRON,
    "Starcoder2ForCausalLM": _STARCODER2,
    "Cohere2ForCausalLM": _COHERE2,
    "HunYuanDenseV1ForCausalLM": _HUNYUAN_DENSE,
    "Glm4MoeForCausalLM": _GLM4_MOE,
    "MiniMaxM2ForCausalLM": _MINIMAX_M2,
    "LagunaForCausalLM": _LAGUNA,
    "AfmoeForCausalLM": _AFMOE,
    "NemotronHForCausalLM": _NEMOTRON_H,
    "DeepseekV32ForCausalLM": _SPARSE_LATENT,
    "GlmMoeDsaForCausalLM": _SPARSE_LATENT,
}
"""The rows by the name of the architecture in config.json."""
