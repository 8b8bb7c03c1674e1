"""How the classes of the TensorRT backend name the modules of a model: one row per class, one line per module.

Names are given without `transformer.` and without the layer. The trap in them: `fc` is the branch that is activated,
which Hugging Face calls `gate_proj`, and `gate` is the linear one, `up_proj`. In experts, the rows of the linear branch
come first. Sources: TensorRT-LLM `models/model_weights_loader.py` (04a2cacb) for names, `models/llama/convert.py`
(0afa06ab), `models/llama/config.py` (89fd9b74), `models/qwen/config.py` (373970a8) and `layers/moe.py`.
How ranks divide a module is in the row of its class (`class_rows.py`): both backends cut at the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import auto
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.str_enum import StrEnum

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BUILD_CLASSES", "BUILD_NAMES", "ROUTER", "BuildClass", "Windows"]


class Windows(StrEnum):
    """Which layers of a class have the sliding window of config.json, in transformers 5.23."""

    NONE = auto()
    """None: the class has no such key."""
    ALL = auto()
    BY_LAYER = auto()
    """Those that `layer_types` names, or from `max_window_layers` on; none without `use_sliding_window`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildClass:
    """How one class names the modules of a layer, and what its configuration has beside the keys of every class.

    `modules` maps the path of a module in a layer to its name in the engine; modules with the same name are parts of
    it, joined by rows in the order of the table. `experts` are the projections of an expert in the same form.
    `biases` are the modules that have a bias if one is stored; any other bias is never read.
    `config` has further keys of config.json with their values, and `copied` pairs of a key of config.json of the engine
    and one of the source, with the value if the source has none. `defaults` are the values of the keys that a source
    may leave out beside its sizes (`class_defaults.py`): those of the class in transformers 5.23; a test compares them.
    `windows` says which layers have a sliding window. `uncertain` is what is not known of the class; empty if nothing.
    """

    modules: Mapping[str, str]
    hidden_act: str = "silu"
    experts: Mapping[str, str] = field(default_factory=dict)
    biases: frozenset[str] = frozenset()
    head_norms: bool = False
    defaults: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    copied: tuple[tuple[str, str, Any], ...] = ()
    windows: Windows = Windows.NONE
    uncertain: str = ""


BUILD_NAMES: Mapping[str, str] = {
    "embed_tokens": "transformer.vocab_embedding",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
"""The names of the modules outside of layers, which are the same in every class."""

ROUTER = "mlp.router"
"""The Linear that selects experts; it is float32 in every engine."""

_ATTENTION = {
    "self_attn.q_proj": "attention.qkv",
    "self_attn.k_proj": "attention.qkv",
    "self_attn.v_proj": "attention.qkv",
    "self_attn.o_proj": "attention.dense",
}
_MLP = {
    "mlp.gate_proj": "mlp.fc",
    "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj",
}
_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_layernorm",
}
_HEAD_NORMS = {
    "self_attn.q_norm": "attention.q_layernorm",
    "self_attn.k_norm": "attention.k_layernorm",
}
_ROUTER = {"block_sparse_moe.gate": ROUTER}
_EXPERTS = {
    "w3": "mlp.fc",
    "w1": "mlp.fc",
    "w2": "mlp.proj",
}
_DENSE = _NORMS | _ATTENTION | _MLP
_QWEN = {
    "seq_length": 8192,
    "use_logn_attn": False,
    "moe_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "num_labels": 1,
}
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_QWEN_DEFAULTS = {
    **_DEFAULTS,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_MISTRAL_LENGTH = {"max_position_embeddings": 131072}
_LLAMA_BIASES = frozenset({"attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"})

BUILD_CLASSES: Mapping[str, BuildClass] = {
    "LlamaForCausalLM": BuildClass(
        modules=_DENSE,
        biases=_LLAMA_BIASES,
        defaults={**_DEFAULTS, "max_position_embeddings": 2048},
        copied=(("attn_bias", "attention_bias", False), ("mlp_bias", "mlp_bias", False)),
    ),
    "MistralForCausalLM": BuildClass(
        modules=_DENSE,
        defaults={**_DEFAULTS, **_MISTRAL_LENGTH, "sliding_window": 4096},
        windows=Windows.ALL,
        config={"attn_bias": False, "mlp_bias": False},
    ),
    "MixtralForCausalLM": BuildClass(
        modules=_NORMS | _ATTENTION | _ROUTER,
        experts=_EXPERTS,
        hidden_act="swiglu",
        windows=Windows.ALL,
        defaults={
            **_DEFAULTS,
            **_MISTRAL_LENGTH,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts_per_tok": 2,
        },
        config={"attn_bias": False, "mlp_bias": False},
    ),
    "Qwen2ForCausalLM": BuildClass(
        modules=_DENSE,
        biases=frozenset({"attention.qkv"}),
        defaults=_QWEN_DEFAULTS,
        windows=Windows.BY_LAYER,
        config={"attn_bias": True, "mlp_bias": False, "qwen_type": "qwen2", **_QWEN},
    ),
    "Qwen3ForCausalLM": BuildClass(
        modules=_DENSE | _HEAD_NORMS,
        head_norms=True,
        defaults=_QWEN_DEFAULTS,
        windows=Windows.BY_LAYER,
        uncertain="which release is the first whose trtllm-build knows Qwen3 is not established, and its layers were "
        "read from a copy of the source: an earlier release stops, or leaves out the norms of queries and keys",
        config={"attn_bias": False, "mlp_bias": False, "qwen_type": "qwen3", **_QWEN},
    ),
}
"""The classes that directories are written for, by their name in config.json."""
