"""Tiny models of the classes that transformers has, from the defaults of their configuration classes.

A default configuration gets small sizes under the names that configurations use for sizes; nothing else is changed.
transformers is imported when a function is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

MAPPINGS = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
"""The tables of `modeling_auto.py` with the classes that generate text, from text or from images too."""

MOST_PARAMETERS = 40_000_000

_HIDDEN = ("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "out_hidden_size", "lru_width")
_INNER = (
    *("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"),
    *("intermediate_dim", "dense_intermediate_size", "moe_shared_expert_intermediate_size"),
)
_EXPERT_INNER = ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
SIZES: dict[str, Any] = {
    **dict.fromkeys(_HIDDEN, 64),
    **dict.fromkeys(_INNER, 128),
    **dict.fromkeys(_EXPERT_INNER, 96),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_EXPERTS, 4),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Small sizes by the names that configuration classes have for them."""


_MAY_BE_NONE = frozenset({"num_key_value_heads", "n_routed_experts", "n_shared_experts", "head_dim"})
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_WINDOWED = ["sliding_attention", "full_attention"]
_PER_LAYER_INPUTS = {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 32}
SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(_WINDOWED, _ROPE), "layer_types": _WINDOWED},
    "cosmos3_edge_text": {"head_dim": 128},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}},
    "ernie4_5_vl_moe_text": {"moe_num_experts": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": _WINDOWED, **_PER_LAYER_INPUTS},
    "gemma4_text": {"num_kv_shared_layers": 0, "layer_types": _WINDOWED, **_PER_LAYER_INPUTS},
    "glm5_next_text": {"num_key_value_heads": 4, "index_topk": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "1/2"},
    "inkling2_vision": {"text_hidden_size": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 0},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}
"""Keys that the classes of a model type need beside the sizes."""


def class_names() -> tuple[str, ...]:
    """The names of the classes that generate text."""
    from transformers.models.auto import modeling_auto

    names: dict[str, None] = {}
    for mapping in MAPPINGS:
        for name in getattr(modeling_auto, mapping).values():
            names |= dict.fromkeys((name,) if isinstance(name, str) else name)
    return tuple(names)


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    """A random model of a class of transformers; `more` are keys of its text model.

    Raises `ValueError` for a class that its configuration leaves large, and whatever the class raises.
    """
    import transformers

    model_class = getattr(transformers, name)
    config = _tiny(model_class.config_class, more)
    with torch.device("meta"):
        shell = model_class(config)
    parameters = sum(parameter.numel() for parameter in shell.parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters} parameters")
    torch.manual_seed(seed)
    config.dtype = dtype
    model = model_class._from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def on_meta(name: str) -> Any:
    """A model of a class of transformers without weights."""
    import transformers

    model_class = getattr(transformers, name)
    with torch.device("meta"):
        return model_class(_tiny(model_class.config_class, {}))


def _tiny(config_class: Any, more: dict[str, Any]) -> Any:
    """A configuration with small sizes, and small ones inside of it."""
    special = SPECIAL.get(config_class.model_type, {})
    default = config_class()
    sizes = {default.attribute_map.get(key, key): value for key, value in SIZES.items()}
    fitting = {key: value for key, value in sizes.items() if _has_number(default, key)}
    nested = dict(_nested(default, more))
    return config_class(**{**fitting, **nested, **special, **({} if "text_config" in nested else more)})


def _has_number(config: Any, key: str) -> bool:
    """Whether a configuration has a number under a key; there may be none for K/V heads, or one for each layer."""
    if isinstance(getattr(type(config), key, None), property):
        return False
    try:
        value = getattr(config, key, False)
    except Exception:  # noqa: BLE001 (configurations refuse a number that differs between layers in their own ways)
        return True
    return (isinstance(value, int) and not isinstance(value, bool)) or (value is None and key in _MAY_BE_NONE)


def _nested(default: Any, more: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The configurations inside of one, tiny."""
    for key in default.sub_configs:
        inner = getattr(default, key, None)
        if inner is not None and hasattr(inner, "to_dict"):
            yield key, _tiny(type(inner), more if key == "text_config" else {}).to_dict()
