"""What a config.json may leave out, for classes whose row lists no modules: the defaults of the classes.

Most sizes of such a model are in the headers of its files. These are not, and ranks are planned by them. The other keys
say which tensors a layer has (`layer_parts.py`). Whether the head is tied is in the row (`ClassRow.tied`).
Source: transformers 5.23.0, `models/*/configuration_*.py`; a test compares this table with the classes that are
installed. Where `head_dim` is left out, it is hidden_size / num_attention_heads; where `num_key_value_heads` is, there
are as many K/V heads as heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ROW_DEFAULTS", "with_row_defaults"]


def _sizes(hidden: int, heads: int, kv_heads: int, head_dim: int | None = None, **more: int) -> dict[str, int]:
    """Return the defaults of one class; `more` are further sizes that ranks divide, and keys that ask for tensors."""
    own = {} if head_dim is None else {"head_dim": head_dim}
    return {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads} | own | more


_LINEAR_HEADS = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
_GEMMA4 = _sizes(2304, 8, 4, 256, hidden_size_per_layer_input=256)
_EXAONE4 = _sizes(4096, 32, 32)
_QWEN3_5 = _sizes(4096, 16, 4, 256, **_LINEAR_HEADS)
_QWEN3_5_MOE = _sizes(2048, 16, 2, 256, **_LINEAR_HEADS)

ROW_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "SeedOssForCausalLM": _sizes(4096, 80, 8, 128, attention_bias=True),
    "Exaone4ForCausalLM": _EXAONE4,
    "Exaone4_5_ForConditionalGeneration": _EXAONE4,
    "NemotronForCausalLM": _sizes(6144, 48, 48, 128),
    "Starcoder2ForCausalLM": _sizes(3072, 24, 2, use_bias=True),
    "Cohere2ForCausalLM": _sizes(8192, 64, 64, 128),
    "HunYuanDenseV1ForCausalLM": _sizes(4096, 32, 32),
    "Glm4MoeForCausalLM": _sizes(4096, 96, 8),
    "MiniMaxM2ForCausalLM": _sizes(3072, 48, 8, 128),
    "LagunaForCausalLM": _sizes(2048, 48, 8, 128),
    "AfmoeForCausalLM": _sizes(2048, 16, 16, 128, num_shared_experts=2),
    "NemotronHForCausalLM": _sizes(4096, 32, 8, 128, mamba_num_heads=128, n_groups=8, use_conv_bias=True),
    "DeepseekV32ForCausalLM": _sizes(7168, 128, 128),
    "GlmMoeDsaForCausalLM": _sizes(6144, 64, 64),
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": _GEMMA4,
    "Gemma4UnifiedForConditionalGeneration": _sizes(2304, 8, 4, 256),
    "Llama4ForConditionalGeneration": _sizes(5120, 40, 8, 128),
    "Step3p5ForCausalLM": _sizes(4096, 64, 8, 128),
    "DeepseekV4ForCausalLM": _sizes(4096, 64, 1, 512, o_groups=8),
    "GptOssForCausalLM": _sizes(2880, 64, 8, 64, attention_bias=True),
    "HunYuanMoEV1ForCausalLM": _sizes(4096, 32, 32),
    "MllamaForConditionalGeneration": _sizes(4096, 32, 8),
    "Qwen3NextForCausalLM": _sizes(2048, 16, 2, 256, **_LINEAR_HEADS),
    "Qwen3_5ForCausalLM": _QWEN3_5,
    "Qwen3_5ForConditionalGeneration": _QWEN3_5,
    "Qwen3_5MoeForCausalLM": _QWEN3_5_MOE,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3_5_MOE,
}
"""The defaults of the text model, by the architecture that config.json names."""


def with_row_defaults(text: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Return the configuration of a text model with the defaults of its class for the sizes that it leaves out.

    A key that is null stays null: classes derive its value from others, the number of K/V heads from that of heads.
    """
    defaults = ROW_DEFAULTS.get(architecture)
    if defaults is None:
        return dict(text)
    sizes = {**defaults, **text}
    if sizes["num_key_value_heads"] is None:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes
