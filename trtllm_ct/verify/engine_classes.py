"""What config.json of an engine must say for each class of models, and what the class takes for missing keys.

It is written from the description of the format and from transformers 5.23 (`models/*/configuration_*.py`), and shares
no tables with `plan/`. Sources: TensorRT-LLM `models/llama/config.py` (89fd9b74), `models/qwen/config.py` (373970a8),
`models/modeling_utils.py: PretrainedConfig`, whose further keyword arguments become attributes that layers read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["EngineClass", "class_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineClass:
    """The statements about one class: `fixed` are keys with one value, `defaults` those of its class in transformers.

    `experts` says that config.json has the block `moe`, and `mapping` the sizes that divide experts.
    """

    fixed: Mapping[str, Any] = field(default_factory=dict)
    hidden_act: str = "silu"
    experts: bool = False
    defaults: Mapping[str, float]


_QWEN = {
    "seq_length": 8192,
    "use_logn_attn": False,
    "moe_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "num_labels": 1,
}
_COMMON: Mapping[str, float] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
_MISTRAL = {**_COMMON, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN_DEFAULTS = {
    **_COMMON,
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_LLAMA = EngineClass(defaults={**_COMMON, "intermediate_size": 11008, "max_position_embeddings": 2048})
_CLASSES: Mapping[str, EngineClass] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": EngineClass(defaults=_MISTRAL),
    "MixtralForCausalLM": EngineClass(
        hidden_act="swiglu",
        experts=True,
        defaults={
            **_MISTRAL,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "Qwen2ForCausalLM": EngineClass(fixed={"qwen_type": "qwen2", **_QWEN}, defaults=_QWEN_DEFAULTS),
    "Qwen3ForCausalLM": EngineClass(
        fixed={"qwen_type": "qwen3", **_QWEN}, defaults={**_QWEN_DEFAULTS, "head_dim": 128}
    ),
}


def class_of(source: Mapping[str, Any]) -> EngineClass:
    """Return the statements about the class that a source names; those of Llama for a class that no engine has."""
    names = source.get("architectures") or [""]
    return _CLASSES.get(str(names[0]), _LLAMA)
