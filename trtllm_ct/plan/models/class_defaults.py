"""What a config.json leaves out: the defaults of the configuration classes, as transformers fills them in.

Many files in public omit what equals the default of their class, for example the `text_config` of Gemma 3.
Source: transformers 5.23.0, `models/*/configuration_*.py`, the class of each model type; a test compares these tables
with the classes that are installed. A key without an entry has the default None there: `head_dim` is then
hidden_size / num_attention_heads, and there are as many K/V heads as heads. `num_nextn_predict_layers` is left out:
its default differs between releases of transformers, and layers that no key declares are not accepted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CLASS_DEFAULTS",
    "EXPERT_COUNTS",
    "WRAPPERS",
    "Wrapper",
    "is_headless",
    "is_tied",
    "text_config_of",
    "with_defaults",
]

EXPERT_COUNTS = ("num_local_experts", "n_routed_experts", "num_experts")
"""The keys that writers have used for the number of routed experts."""


def _class(
    hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int, **more: int | bool
) -> dict[str, int | bool]:
    """Return the defaults of one class; `more` are those that not every class has."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    } | more


_LATENT_RANKS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_QWEN2_VL_TEXT = _class(8192, 29568, 80, 64, 152064, num_key_value_heads=8)
_QWEN3 = _class(4096, 22016, 32, 32, 151936, num_key_value_heads=32, head_dim=128)
_DEEPSEEK_V3 = _class(
    *(7168, 18432, 61, 128, 129280),
    num_key_value_heads=128,
    n_routed_experts=256,
    n_shared_experts=1,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    **_LATENT_RANKS,
)

CLASS_DEFAULTS: Mapping[str, Mapping[str, int | bool]] = {
    "llama": _class(4096, 11008, 32, 32, 32000),
    "mistral": _class(4096, 14336, 32, 32, 32000, num_key_value_heads=8),
    "ministral3": _class(4096, 14336, 34, 32, 131072, num_key_value_heads=8, head_dim=128),
    "qwen2": _class(4096, 22016, 32, 32, 151936, num_key_value_heads=32),
    "qwen2_vl_text": _QWEN2_VL_TEXT,
    "qwen2_5_vl_text": _QWEN2_VL_TEXT,
    "qwen3": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "granite": _class(4096, 11008, 32, 32, 32000),
    "gemma2": _class(*(2304, 9216, 26, 8, 256000), num_key_value_heads=4, head_dim=256, tie_word_embeddings=True),
    "gemma3_text": _class(*(2304, 9216, 26, 8, 262208), num_key_value_heads=4, head_dim=256, tie_word_embeddings=True),
    "phi3": _class(3072, 8192, 32, 32, 32064),
    "mixtral": _class(4096, 14336, 32, 32, 32000, num_key_value_heads=8, num_local_experts=8),
    "qwen2_moe": _class(
        *(2048, 5632, 24, 16, 151936),
        num_key_value_heads=16,
        num_experts=60,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        qkv_bias=True,
    ),
    "qwen3_moe": _class(
        *(2048, 6144, 24, 32, 151936), num_key_value_heads=4, num_experts=128, moe_intermediate_size=768
    ),
    "qwen3_vl_moe_text": _class(
        *(2048, 5632, 24, 16, 151936),
        num_key_value_heads=16,
        num_experts=60,
        moe_intermediate_size=1408,
        tie_word_embeddings=True,
    ),
    "deepseek_v2": _class(
        *(4096, 11008, 32, 32, 102400),
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1407,
        first_k_dense_replace=0,
        **_LATENT_RANKS,
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    # The class in Kimi's repository is that of DeepSeek-V3; transformers reads `text_config` of Kimi K2.5 with it.
    "kimi_k2": _DEEPSEEK_V3,
}
"""The defaults by the `model_type` of the text model. Biases, except those listed, are off by default."""

_MODEL_TYPE_OF: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GraniteForCausalLM": "granite",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
"""The model type of each architecture, for a config.json that names no `model_type`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """The configuration class of a model that contains a text model.

    `text` is the model type of the text model where `text_config` names none. `tied` is the class's default of
    `tie_word_embeddings`. With `text_ties` the class also ties when only `text_config` says so. With `flat` it takes
    the keys of the text model from the top level if there is no `text_config`.
    """

    text: str
    tied: bool
    text_ties: bool = False
    flat: bool = False


WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper(text="gemma3_text", tied=True),
    "internvl": Wrapper(text="qwen2", tied=True),
    "kimi_k25": Wrapper(text="deepseek_v3", tied=True),
    "llava": Wrapper(text="llama", tied=False, text_ties=True),
    "llava_next": Wrapper(text="llama", tied=False),
    "llava_next_video": Wrapper(text="llama", tied=False, text_ties=True),
    "llava_onevision": Wrapper(text="qwen2", tied=False, text_ties=True),
    "mistral3": Wrapper(text="mistral", tied=True),
    "qwen2_vl": Wrapper(text="qwen2_vl_text", tied=False, text_ties=True, flat=True),
    "qwen2_5_vl": Wrapper(text="qwen2_5_vl_text", tied=False, text_ties=True, flat=True),
    "qwen3_vl": Wrapper(text="qwen3_vl_text", tied=False),
    "qwen3_vl_moe": Wrapper(text="qwen3_vl_moe_text", tied=False),
}
"""The wrappers with a text model of a supported family, by the `model_type` at the top level."""


_HEADLESS = re.compile(r".*(?<!LMHead)(?<!Chat)Model|.*For(?:Retrieval|\w*Classification|Embedding|RewardModel)")


def is_headless(architecture: str) -> bool:
    """Whether a class has no head for tokens, by its name.

    In transformers, classes named `...Model` are the bodies alone. `InternVLChatModel` is a class with a head from its
    own repository.
    """
    return _HEADLESS.fullmatch(architecture) is not None


def text_config_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of the text model inside of a larger model, with its `model_type`, as stored.

    None if `config`, a parsed config.json, is that of a text model itself.
    """
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    nested = config.get("text_config")
    if isinstance(nested, dict):
        return ({"model_type": wrapper.text} if wrapper else {}) | nested
    if wrapper is None:
        return None
    return (dict(config) if wrapper.flat else {}) | {"model_type": wrapper.text}


def with_defaults(text: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Return the configuration of a text model with the defaults of its class for the keys that it leaves out.

    `architecture` is used if there is no `model_type`. A class that is not listed has no known defaults. A key that is
    null stays null: classes derive its value from others, or refuse it.
    """
    model_type = text.get("model_type") or _MODEL_TYPE_OF.get(architecture)
    defaults = dict(CLASS_DEFAULTS.get(str(model_type), {}))
    if any(key in text for key in EXPERT_COUNTS):
        for key in EXPERT_COUNTS:
            defaults.pop(key, None)
    return defaults | dict(text)


def is_tied(config: Mapping[str, Any], text: Mapping[str, Any] | None, architecture: str) -> bool:
    """Whether config.json says that the head uses the weight of the embedding.

    The top level decides before `text`, which is what `text_config_of` returns; if neither has the key, the default of
    the outermost class does. Source: transformers 5.23.0 `modeling_utils.py` (`get_expanded_tied_weights_keys` reads
    the configuration of the whole model); TensorRT-LLM reads the same attribute.
    """
    key = "tie_word_embeddings"
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    of_text = (text or {}).get(key)
    if config.get(key) is not None:
        return bool(config[key]) or bool(wrapper and wrapper.text_ties and of_text)
    if of_text is not None:
        return bool(of_text)
    if wrapper is not None:
        return wrapper.tied
    return bool(with_defaults(config if text is None else text, architecture).get(key))
