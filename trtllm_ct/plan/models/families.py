"""Tables of model families: which modules a layer has, with which sizes, and which of them an engine fuses.

Sizes are given by name (`hidden`, `kv_heads`, ...) and looked up in `Model.sizes`.
Sources: transformers 5.23 `models/*/modeling_*.py` (a test compares every row with the models that transformers
builds); TensorRT-LLM `_torch/models/checkpoints/hf/*_weight_mapper.py` and `_torch/models/modeling_*.py` for what
is fused, what is read plain, and how tensor parallelism cuts it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.parallel import Cut

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ALWAYS",
    "ARCHITECTURES",
    "MODEL_TYPES",
    "Architecture",
    "Experts",
    "LinearSite",
    "NormSite",
]

ALWAYS = "always"
"""In place of a key of config.json: the Linear has a bias in every model of the family."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """One Linear of a layer: its path in the layer and its sizes by name.

    `fused` is the path of the fused Linear that it becomes a part of. `bias` is the key of config.json that gives it a
    bias, or `always`; `extras` are the local names of its other parameters. Engines never read a `plain` Linear
    quantized. `cut` says how ranks divide the weight. `parts` names the numbers of rows of each Linear if several are
    stored as one; engines split these before they slice. With `class_cuts` the engine's model class itself splits them,
    by the rows of `weight` and of a `weight_scale` that has as many; it knows no other scales.
    `class_joins` is the path of the Linear into which the engine's model class itself joins this one, by its own name
    for the last part; it knows the scales of few modes (`LinearMode.class_joins_scales`).
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
    class_cuts: bool = False
    class_joins: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSite:
    """One norm of a layer: its path in the layer, and the size of its weight by name."""

    path: str
    size: str = "hidden"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The routed experts of a layer.

    The modules are called `{path}.{index}.{projection}`; `projections` are the names of (gate, up, down) that engines
    read. `aliases` are pairs of a projection's name and another name that writers have used for it. `count` and
    `intermediate` name the sizes. `router` and `shared` are the other Linears of the layer's feed-forward part.
    `other_layouts` are the modes whose tensors the engine's class reads in another layout than other classes do.
    """

    path: str
    projections: tuple[str, str, str]
    count: str
    intermediate: str
    router: LinearSite
    shared: tuple[LinearSite, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    other_layouts: frozenset[QuantAlgo] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The layer of a family of decoder-only models.

    `mlp` is the feed-forward part of dense layers and `experts` the one of all other layers; `Model.dense_layers` tells
    which layers are dense. `embedding` says how ranks divide the rows of the embedding. With `mlp_ranks_vary` an engine
    may slice dense and shared feed-forward parts for fewer ranks than there are; several ranks then have the same
    slice. With `one_mode` an engine refuses a quantization with entries for single modules.
    """

    attention: tuple[LinearSite, ...]
    mlp: tuple[LinearSite, ...]
    norms: tuple[NormSite, ...]
    experts: Experts | None = None
    norm_class: str = "RMSNorm"
    embedding: Cut = Cut.VOCABULARY
    mlp_ranks_vary: bool = False
    one_mode: bool = False


def _qkv(bias: str | None = None, output_bias: str | None = None) -> tuple[LinearSite, ...]:
    """Return the Linears of attention: q, k and v, which engines fuse, and the output projection."""

    def linear(path: str, outputs: str, cut: Cut) -> LinearSite:
        return LinearSite(path=path, outputs=outputs, inputs="hidden", cut=cut, fused="self_attn.qkv_proj", bias=bias)

    return (
        linear("self_attn.q_proj", "heads", Cut.COLUMN),
        linear("self_attn.k_proj", "kv_heads", Cut.KV_HEADS),
        linear("self_attn.v_proj", "kv_heads", Cut.KV_HEADS),
        LinearSite(path="self_attn.o_proj", outputs="hidden", inputs="heads", cut=Cut.ROW, bias=output_bias),
    )


def _gated_mlp(path: str = "mlp", size: str = "intermediate", bias: str | None = None) -> tuple[LinearSite, ...]:
    """Return the Linears of a gated feed-forward part: gate and up, which engines fuse, and down."""

    def linear(leaf: str) -> LinearSite:
        return LinearSite(
            path=f"{path}.{leaf}",
            outputs=size,
            inputs="hidden",
            cut=Cut.COLUMN,
            fused=f"{path}.gate_up_proj",
            bias=bias,
        )

    return (
        linear("gate_proj"),
        linear("up_proj"),
        LinearSite(path=f"{path}.down_proj", outputs="hidden", inputs=size, cut=Cut.ROW, bias=bias),
    )


def _router(path: str, extras: tuple[str, ...] = ()) -> LinearSite:
    """Return the Linear that selects experts; engines read it plain."""
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
# TensorRT-LLM `_torch/models/modeling_phi3.py: Phi3ForCausalLM.load_weights` cuts both fused weights.
_PHI3 = Architecture(
    attention=(
        LinearSite(
            path="self_attn.qkv_proj",
            outputs="qkv",
            inputs="hidden",
            cut=Cut.COLUMN,
            parts=("heads", "kv_heads", "kv_heads"),
            class_cuts=True,
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
            class_cuts=True,
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
        # llm-compressor 0.14 gives the projections of Mixtral's experts the names of a dense layer.
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

# TensorRT-LLM `_torch/models/modeling_deepseekv3.py` (000561df: `DeepseekV3ForCausalLM.load_weights`, since a43cf9e3
# `DeepseekV3WeightLoader.load_weights`) joins q_a_proj and this one.
_KV_A = "self_attn.kv_a_proj_with_mqa"
_MLA_OUTPUT = (
    LinearSite(path=_KV_A, outputs="kv_a", inputs="hidden", bias="attention_bias", class_joins=_KV_A),
    # Engines split it by head and absorb it into attention; for that they read it plain.
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
        # TensorRT-LLM `_torch/models/modeling_deepseekv3.py: Deepseekv3MoE`: `MoEWeightLoadingMode.W4A8_CUSTOM`.
        other_layouts=frozenset({QuantAlgo.W4A8_AWQ}),
    ),
    embedding=Cut.NONE,
    # Engines choose the number of ranks by the scale blocks and by the number of GPUs in one node.
    mlp_ranks_vary=True,
    # TensorRT-LLM `_torch/models/modeling_deepseekv3.py: DeepseekV3DecoderLayer.__init__` (585c7565, 047098b7) asserts
    # that the global mode is not MIXED_PRECISION.
    one_mode=True,
)
_DEEPSEEK_V2 = replace(
    _DEEPSEEK_LITE,
    attention=(
        LinearSite(
            path="self_attn.q_a_proj", outputs="q_lora_rank", inputs="hidden", bias="attention_bias", class_joins=_KV_A
        ),
        LinearSite(path="self_attn.q_b_proj", outputs="mla_queries", inputs="q_lora_rank", cut=Cut.COLUMN),
        *_MLA_OUTPUT,
    ),
    norms=(*_MLA_NORMS, NormSite(path="self_attn.q_a_layernorm", size="q_lora_rank")),
)


def _with_score_correction(architecture: Architecture) -> Architecture:
    """Return the architecture with a router bias that corrects its scores, as DeepSeek-V3 and models like it have."""
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
    # The variants with and without a low-rank projection of queries; `q_lora_rank` in config.json decides.
    "DeepseekV2ForCausalLM": (_DEEPSEEK_V2, _DEEPSEEK_LITE),
    "DeepseekV3ForCausalLM": (_with_score_correction(_DEEPSEEK_V2), _with_score_correction(_DEEPSEEK_LITE)),
}
"""The variants of each architecture by its name in config.json.

If there are two, the first one needs sizes that the second one does not need."""

MODEL_TYPES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "MistralForCausalLM",
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
"""The architecture of the text model in a multimodal model, by `text_config.model_type`."""
