"""Rows of Gemma 4: layers without values, or without keys and values, and experts beside the MLP.

Files are in TensorRT-LLM's `_torch/models/` unless another folder is named; a commit identifies the version of the
file that was read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.modes import LINEAR_MODES
from trtllm_ct.plan.models.class_row import ClassRow, Limit
from trtllm_ct.plan.models.layer_parts import (
    ATTENTION_BIASES,
    DENSE_MLP,
    HEAD_NORM_NAMES,
    QKVO,
    TWO_NORMS,
    Part,
)
from trtllm_ct.plan.models.mixture_rows import GATED

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GEMMA4_ROWS"]

_ALL = frozenset(mode.algo for mode in LINEAR_MODES)

_FEEDFORWARD_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_PER_LAYER = "hidden_size_per_layer_input"
_LAYER = Part(
    modules=(*QKVO, *HEAD_NORM_NAMES, *TWO_NORMS, *_FEEDFORWARD_NORMS, *DENSE_MLP.modules),
    tensors=("layer_scalar",),
    when={
        **ATTENTION_BIASES,
        _PER_LAYER: tuple(
            f"{name}.weight" for name in ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm")
        ),
    },
)
_EXPERTS = Part(
    modules=(
        "router.proj",
        *(f"post_feedforward_layernorm_{number}" for number in (1, 2)),
        "pre_feedforward_layernorm_2",
    ),
    tensors=("router.scale", "router.per_expert_scale"),
    experts=GATED,
    key="enable_moe_block",
)
_ENDS = ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")

# modeling_gemma4.py (00e7d103) and checkpoints/hf/gemma4_weight_mapper.py (7ed07f06 to 1c58b177). The mapper renames
# `router` and stacks of experts; 7ed07f06 knows no names of single experts but those of the class itself, which all
# versions pass on (`_remap_moe_keys`). The inputs of each layer and the Linears that make them are plain `nn.Linear`.
# Gemma4Attention has no bias, whatever config.json says.
_GEMMA4 = ClassRow(
    plain=("router.proj", "per_layer_input_gate", "per_layer_projection"),
    experts="experts",
    projections=("w1", "w3", "w2"),
    read_as=((r"(\blayers\.\d+)\.experts\b", r"\1.moe.experts"),),
    limits=(
        Limit(
            paths=("q_proj", "k_proj", "v_proj"),
            algos=_ALL - {QuantAlgo.W4A16, QuantAlgo.W4A8_AWQ},
            obstacle="counts K/V heads by the rows of this weight, which are half as many in",
            source="Gemma4HfWeightMapper._duplicate_kv_weights_with_head_dim, "
            "`checkpoints/hf/gemma4_weight_mapper.py`, 1c58b177",
        ),
        Limit(
            paths=tuple(f"experts.{leaf}" for leaf in ("w1", "w3", "w2")),
            algos=frozenset({QuantAlgo.NVFP4}),
            obstacle="gates experts by GELU, which is known to work in NVFP4, and not known of",
            source="Gemma4MoE.__init__, `modeling_gemma4.py`, 00e7d103 (pull requests 12932 and 16108)",
        ),
    ),
    inner=((r"\.router\.proj$", ".moe.router.proj"),),
    keys_as_values="attention_k_eq_v",
    query_only="num_kv_shared_layers",
    tied=True,
    mixers=("mlp",),
    one_stage=True,  # Gemma4ForCausalLM.__init__
    layer=((_LAYER,), (_EXPERTS,)),
    ends=Part(modules=("norm",), when={_PER_LAYER: tuple(f"{name}.weight" for name in _ENDS)}),
)
# modeling_gemma4mm.py: Gemma4ForConditionalGeneration.load_weights (001a6a01) hands keys below `model.language_model.`
# to the text model, and no head. modeling_gemma4_unified.py (1c0067ee) does the same.
_GEMMA4_WRAPPER = replace(_GEMMA4, head_unread=True)

GEMMA4_ROWS: Mapping[str, ClassRow] = {
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": _GEMMA4_WRAPPER,
    "Gemma4UnifiedForConditionalGeneration": _GEMMA4_WRAPPER,
}
"""The rows by the name of the architecture in config.json."""
