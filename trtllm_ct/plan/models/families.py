"""Model families as tables: which modules a layer has, of which sizes, and which of them an engine fuses.

A size is named (`hidden`, `kv_heads`, ...) and looked up in `Model.sizes`.
Sources: transformers 5.23 `models/*/modeling_*.py` (a test compares every row with the models that transformers
builds); TensorRT-LLM `_torch/models/checkpoints/hf/*_weight_mapper.py` and `_torch/models/modeling_*.py` for what
is fused, what is read plain, and how tensor parallelism cuts it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import Cut

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ALWAYS", "ARCHITECTURES", "MODEL_TYPES", "Architecture", "Experts", "LinearSite", "NormSite"]

ALWAYS = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """One Linear of a layer: its path in the layer, its sizes by name, the fused group that it joins.

    `bias` is the key of config.json that gives it a bias, or `always`; `extras` are further parameters that it has.
    A `plain` one is never read quantized by engines. `cut` says how ranks share it, and `parts` are the sizes of its
    rows where several Linears are stored in one, which engines take apart before they cut.
    """

    path: str
    outputs: str
    inputs: str
    cut: Cut = Cut.NONE
    parts: tuple[str, ...] = ()
    fused: str | None = None
    bias: str | None = None
    plain: bool = False
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSite:
    """One norm of a layer by its path in the layer and the size of its weight."""

    path: str
    size: str = "hidden"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The routed experts of a layer.

    Each expert is `{path}.{index}.{projection}`, projections as (gate, up, down) under the names that engines read.
    `aliases` are spellings that writers have used instead of a projection's name.
    `count` and `intermediate` name the sizes, `router` and `shared` are the Linears beside the experts.
    """

    path: str
    projections: tuple[str, str, str]
    count: str
    intermediate: str
    router: LinearSite
    shared: tuple[LinearSite, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of decoder-only models by its layer.

    `mlp` is the feed-forward part of dense layers, `experts` that of the others; config.json tells them apart (see
    `Model.dense_layers`). Ranks share the rows of `embedding` unless it says otherwise. Where `mlp_ranks_vary`, an
    engine may cut dense and shared feed-forward parts for fewer ranks than there are, and then gives each of the parts
    to several.
    """

    attention: tuple[LinearSite, ...]
    mlp: tuple[LinearSite, ...]
    norms: tuple[NormSite, ...]
    experts: Experts | None = None
    norm_class: str = "RMSNorm"
    embedding: Cut = Cut.VOCABULARY
    mlp_ranks_vary: bool = False


def _qkv(bias: str | None = None, output_bias: str | None = None) -> tuple[LinearSite, ...]:
    def into(path: str, outputs: str, cut: Cut) -> LinearSite:
        return LinearSite(path=path, outputs=outputs, inputs="hidden", cut=cut, fused="self_attn.qkv_proj", bias=bias)

    return (
        into("self_attn.q_proj", "heads", Cut.COLUMN),
        into("self_attn.k_proj", "kv_heads", Cut.KV_HEADS),
        into("self_attn.v_proj", "kv_heads", Cut.KV_HEADS),
        LinearSite(path="self_attn.o_proj", outputs="hidden", inputs="heads", cut=Cut.ROW, bias=output_bias),
    )


def _gated_mlp(path: str = "mlp", size: str = "intermediate", bias: str | None = None) -> tuple[LinearSite, ...]:
    def into(leaf: str) -> LinearSite:
        return LinearSite(
            path=f"{path}.{leaf}",
            outputs=size,
            inputs="hidden",
            cut=Cut.COLUMN,
            fused=f"{path}.gate_up_proj",
            bias=bias,
        )

    return (
        into("gate_proj"),
        into("up_proj"),
        LinearSite(path=f"{path}.down_proj", outputs="hidden", inputs=size, cut=Cut.ROW, bias=bias),
    )


def _router(path: str, extras: tuple[str, ...] = ()) -> LinearSite:
    return LinearSite(path=path, outputs="experts", inputs="hidden", plain=True, extras=extras)


_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
_PRE_NORMS = (NormSite(path="input_layernorm"), NormSite(path="post_attention_layernorm"))
_HEAD_NORMS = (
    NormSite(path="self_attn.q_norm", size="head_dim"),
    NormSite(path="self_attn.k_norm", size="head_dim"),
)
_SANDWICH_NORMS = (
    *_PRE_NORMS,
    NormSite(path="pre_feedforward_layernorm"),
    NormSite(path="post_feedforward_layernorm"),
)

_LLAMA = Architecture(
    attention=_qkv("attention_bias", "attention_bias"), mlp=_gated_mlp(bias="mlp_bias"), norms=_PRE_NORMS
)
_MISTRAL = Architecture(attention=_qkv(), mlp=_gated_mlp(), norms=_PRE_NORMS)
_QWEN2 = Architecture(attention=_qkv(ALWAYS), mlp=_gated_mlp(), norms=_PRE_NORMS)
_QWEN3 = Architecture(
    attention=_qkv("attention_bias", "attention_bias"), mlp=_gated_mlp(), norms=_PRE_NORMS + _HEAD_NORMS
)
_GEMMA2 = Architecture(attention=_qkv("attention_bias", "attention_bias"), mlp=_gated_mlp(), norms=_SANDWICH_NORMS)
_GEMMA3 = replace(_GEMMA2, norms=_SANDWICH_NORMS + _HEAD_NORMS)
_PHI3 = Architecture(
    attention=(
        LinearSite(
            path="self_attn.qkv_proj",
            outputs="qkv",
            inputs="hidden",
            cut=Cut.COLUMN,
            parts=("heads", "kv_heads", "kv_heads"),
        ),
        LinearSite(path="self_attn.o_proj", outputs="hidden", inputs="heads", cut=Cut.ROW),
    ),
    mlp=(
        LinearSite(
            path="mlp.gate_up_proj",
            outputs="gate_up",
            inputs="hidden",
            cut=Cut.COLUMN,
            parts=("intermediate", "intermediate"),
        ),
        LinearSite(path="mlp.down_proj", outputs="hidden", inputs="intermediate", cut=Cut.ROW),
    ),
    norms=_PRE_NORMS,
)
_MIXTRAL = Architecture(
    attention=_qkv(),
    mlp=(),
    norms=_PRE_NORMS,
    experts=Experts(
        path="block_sparse_moe.experts",
        projections=("w1", "w3", "w2"),
        count="experts",
        intermediate="intermediate",
        router=_router("block_sparse_moe.gate"),
        # llm-compressor 0.14 names Mixtral's experts after the dense layer.
        aliases=(("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")),
    ),
)
_QWEN_EXPERTS = Experts(
    path="mlp.experts",
    projections=_GATE_UP_DOWN,
    count="experts",
    intermediate="moe_intermediate",
    router=_router("mlp.gate"),
)
_QWEN2_MOE = replace(
    _QWEN2,
    attention=_qkv("qkv_bias"),
    experts=replace(
        _QWEN_EXPERTS,
        shared=(
            *_gated_mlp("mlp.shared_expert", "shared_intermediate"),
            LinearSite(path="mlp.shared_expert_gate", outputs="one", inputs="hidden", plain=True),
        ),
    ),
)
_QWEN3_MOE = replace(_QWEN3, experts=_QWEN_EXPERTS)

_MLA_OUTPUT = (
    # Engines put it behind q_a_proj by a copy of their own, which takes the weight and no scale of most modes.
    LinearSite(path="self_attn.kv_a_proj_with_mqa", outputs="kv_a", inputs="hidden", bias="attention_bias", plain=True),
    # Engines split it by head and absorb it into the attention, and read it plain for that.
    LinearSite(path="self_attn.kv_b_proj", outputs="kv_b", inputs="kv_lora_rank", cut=Cut.COLUMN, plain=True),
    LinearSite(path="self_attn.o_proj", outputs="hidden", inputs="mla_values", cut=Cut.ROW, bias="attention_bias"),
)
_MLA_NORMS = (*_PRE_NORMS, NormSite(path="self_attn.kv_a_layernorm", size="kv_lora_rank"))
_DEEPSEEK_LITE = Architecture(
    attention=(
        LinearSite(path="self_attn.q_proj", outputs="mla_queries", inputs="hidden", cut=Cut.COLUMN),
        *_MLA_OUTPUT,
    ),
    mlp=_gated_mlp(),
    norms=_MLA_NORMS,
    experts=Experts(
        path="mlp.experts",
        projections=_GATE_UP_DOWN,
        count="experts",
        intermediate="moe_intermediate",
        router=_router("mlp.gate"),
        shared=_gated_mlp("mlp.shared_experts", "shared_intermediate"),
    ),
    embedding=Cut.NONE,
    # By what their scale blocks and one node's GPUs allow.
    mlp_ranks_vary=True,
)
_DEEPSEEK_V2 = replace(
    _DEEPSEEK_LITE,
    attention=(
        LinearSite(
            path="self_attn.q_a_proj", outputs="q_lora_rank", inputs="hidden", bias="attention_bias", plain=True
        ),
        LinearSite(path="self_attn.q_b_proj", outputs="mla_queries", inputs="q_lora_rank", cut=Cut.COLUMN),
        *_MLA_OUTPUT,
    ),
    norms=(*_MLA_NORMS, NormSite(path="self_attn.q_a_layernorm", size="q_lora_rank")),
)


def _with_score_correction(architecture: Architecture) -> Architecture:
    """DeepSeek-V3 and what is built like it: routers carry a bias that corrects their scores."""
    if architecture.experts is None:
        raise AssertionError("only routers have score corrections")
    router = replace(architecture.experts.router, extras=("e_score_correction_bias",))
    return replace(architecture, experts=replace(architecture.experts, router=router))


ARCHITECTURES: Mapping[str, tuple[Architecture, ...]] = {
    "LlamaForCausalLM": (_LLAMA,),
    "MistralForCausalLM": (_MISTRAL,),
    "Qwen2ForCausalLM": (_QWEN2,),
    "Qwen3ForCausalLM": (_QWEN3,),
    "GraniteForCausalLM": (_LLAMA,),
    "Gemma2ForCausalLM": (_GEMMA2,),
    "Gemma3ForCausalLM": (_GEMMA3,),
    "Phi3ForCausalLM": (_PHI3,),
    "MixtralForCausalLM": (_MIXTRAL,),
    "Qwen2MoeForCausalLM": (_QWEN2_MOE,),
    "Qwen3MoeForCausalLM": (_QWEN3_MOE,),
    # With and without a low-rank query projection: `q_lora_rank` in config.json tells.
    "DeepseekV2ForCausalLM": (_DEEPSEEK_V2, _DEEPSEEK_LITE),
    "DeepseekV3ForCausalLM": (_with_score_correction(_DEEPSEEK_V2), _with_score_correction(_DEEPSEEK_LITE)),
}
"""Architecture by the name in config.json; where there are two, the first needs sizes that the second does not."""

MODEL_TYPES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
}
"""The text part of a multimodal model, by `text_config.model_type`."""
