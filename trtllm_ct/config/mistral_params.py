"""params.json of Mistral's own form -> the config.json that Hugging Face's form of the same model has.

| params.json                            | config.json                                                     |
|----------------------------------------|-----------------------------------------------------------------|
| `dim`, `n_layers`, `hidden_dim`, ...   | `hidden_size`, `num_hidden_layers`, `intermediate_size`, ...    |
| `moe` of two numbers                   | `MixtralForCausalLM`, else `MistralForCausalLM`                 |
| `vision_encoder` with a patch merger   | `Mistral3ForConditionalGeneration` around `MistralForCausalLM`  |

Keys whose meaning is not known here are refused when they say something: latent attention, scaled positions and
adapters change what a model computes, and nothing in the weights tells of them.
Sources: transformers 4.53 `models/mistral/convert_mistral_weights_to_hf.py` and
`models/mistral3/convert_mistral3_weights_to_hf.py`; vLLM 0.15 `transformers_utils/configs/mistral.py`;
mistral-inference 1.6 `args.py`, `transformer.py`, `vision_encoder.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import ConfigError, FaultCollector

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import TensorSpec

__all__ = ["config_from_params"]

_FILE = "params.json"
_TWIN = "Put the config.json of the model's Hugging Face form beside the weights; it then counts instead."
_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_OPTIONAL_SIZES = {"n_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
_READ_APART = {
    "norm_eps", "rope_theta", "moe", "sliding_window", "tied_embeddings", "max_position_embeddings", "max_seq_len",
    "vision_encoder", "quantization", "quantization_config",
    # The dtype is that of the tensors, and the batch is the business of whoever serves the model.
    "dtype", "torch_dtype", "max_batch_size",
}  # fmt: skip
# What holds anyway, when it is said.
_DEFAULTS = {"model_type": "transformer", "activation": "silu", "causal": True}
_MIXTURE = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
_LONGEST_TEXT = 128_000
"""What vLLM and TensorRT-LLM take where nothing says how far positions go."""
_THETA_OF_WINDOWED = 10_000.0
"""What Mistral 7B 0.1 was trained with, the one model that names a window and no theta."""

_VISION_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size",
)  # fmt: skip
_VISION_APART = {
    "rope_theta", "spatial_merge_size", "image_token_id", "image_break_token_id", "image_end_token_id",
    "max_image_size",
    # The tensors say whether there is one.
    "adapter_bias",
}  # fmt: skip
_ADAPTER_BIAS = "vision_language_adapter.w_in.bias"
# Mistral3 in transformers has both; an adapter without them is another architecture.
_VISION_DEFAULTS = {"mm_projector_id": "patch_merge", "add_pre_mm_projector_layer_norm": True}
_IMAGE_TOKEN = 10


def config_from_params(params: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """The config.json of a model, from params.json (parsed) and the headers of its weights, which tell the dtype.

    Raises `ConfigError` with every key that is missing, of the wrong type, or says what is not understood here.
    """
    faults = FaultCollector()
    reader = _Params(params, _FILE, faults)
    reader.refuse_unknown({*_SIZES, *_OPTIONAL_SIZES, *_READ_APART}, _DEFAULTS)
    text = _text(reader) | _dtype(stored)
    vision = params.get("vision_encoder")
    if vision:
        reader = _Params(vision, f"{_FILE}: vision_encoder", faults)
        text = _with_vision(text, reader, adapter_bias=_ADAPTER_BIAS in stored)
    faults.raise_if_any(ConfigError)
    return text


class _Params:
    """One object of params.json with typed access; every fault names its key."""

    def __init__(self, raw: object, where: str, faults: FaultCollector) -> None:
        self.raw: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
        self.faults = faults
        self._where = where
        if not isinstance(raw, Mapping):
            self.fault("", "a JSON object", raw)

    def fault(self, key: str, expected: str, found: object, remedy: str = _TWIN) -> None:
        separator = ": " if self._where == _FILE else "."
        where = f"{self._where}{separator}{key}" if key else self._where
        self.faults.add(where=where, expected=expected, found=repr(found), remedy=remedy)

    def size(self, key: str) -> int:
        """A positive integer; 0 after a fault."""
        value = self.raw.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self.fault(key, "a positive integer", value)
        return 0

    def number(self, key: str) -> float:
        """A positive number; 0 after a fault."""
        value = self.raw.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
        self.fault(key, "a positive number", value)
        return 0.0

    def refuse_unknown(self, known: set[str], defaults: Mapping[str, object]) -> None:
        """One fault for all keys that say what isn't understood; an unknown key says nothing by null, false or 0."""
        other = [
            f"{key} {value!r}" if key in defaults else key
            for key, value in sorted(self.raw.items())
            if (value not in (None, defaults[key]) if key in defaults else value and key not in known)
        ]
        if other:
            self.faults.add(
                where=self._where,
                expected="a dense model or a mixture of experts, described by keys that are known here",
                found=f"what may change what the model computes: {', '.join(other)}",
                remedy=_TWIN,
            )


def _text(params: _Params) -> dict[str, Any]:
    """The text model alone."""
    config: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config |= {theirs: params.size(own) for own, theirs in _SIZES.items()}
    config |= {theirs: params.size(own) for own, theirs in _OPTIONAL_SIZES.items() if params.raw.get(own) is not None}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config |= {
        "hidden_act": "silu",
        "rms_norm_eps": params.number("norm_eps"),
        "rope_theta": _theta(params),
        "sliding_window": _window(params),
        "max_position_embeddings": _longest_text(params),
        "tie_word_embeddings": params.raw.get("tied_embeddings") is True,
    }
    if params.raw.get("moe"):
        config |= _mixture(_Params(params.raw["moe"], f"{_FILE}: moe", params.faults))
    return config


def _theta(params: _Params) -> float:
    """The base of rotary positions; readers disagree about what its absence means, but for one old model."""
    if params.raw.get("rope_theta") is None and params.raw.get("sliding_window"):
        return _THETA_OF_WINDOWED
    return params.number("rope_theta")


def _window(params: _Params) -> int | None:
    """One window for all layers, or none; some writers give it as a string, some as a list with one entry a layer."""
    value = params.raw.get("sliding_window")
    entries = value if isinstance(value, list) else [value]
    numbers = {int(entry) if isinstance(entry, str) and entry.isdigit() else entry for entry in entries}
    if len(numbers) == 1 and isinstance(single := numbers.pop(), int | None):
        return single or None
    params.fault("sliding_window", "one window for all layers", value)
    return None


def _longest_text(params: _Params) -> int:
    for key in ("max_position_embeddings", "max_seq_len"):
        if params.raw.get(key) is not None:
            return params.size(key)
    return _LONGEST_TEXT


def _mixture(moe: _Params) -> dict[str, Any]:
    moe.refuse_unknown(set(_MIXTURE), {})
    sizes = {theirs: moe.size(own) for own, theirs in _MIXTURE.items()}
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **sizes}


def _dtype(stored: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The dtype of the embeddings, which no writer quantizes; a config.json without one counts as bfloat16."""
    for name in ("tok_embeddings.weight", "model.embed_tokens.weight"):
        if name in stored and stored[name].dtype.is_wide_float:
            return {"dtype": stored[name].dtype.torch_name}
    return {}


def _with_vision(text: dict[str, Any], vision: _Params, *, adapter_bias: bool) -> dict[str, Any]:
    """The text model with a Pixtral vision tower and the projector of Mistral Small 3.1."""
    vision.refuse_unknown({*_VISION_SIZES, *_VISION_APART}, _VISION_DEFAULTS)
    for key, value in _VISION_DEFAULTS.items():
        if vision.raw.get(key) is None:
            vision.fault(key, repr(value), None)
    if text["model_type"] != "mistral":
        vision.fault("", "a dense text model beside it", text["model_type"])
    sizes = {key: vision.size(key) for key in _VISION_SIZES}
    tower = {"model_type": "pixtral", "hidden_act": "silu", "rope_theta": vision.number("rope_theta"), **sizes}
    tower["head_dim"] = sizes["hidden_size"] // max(1, sizes["num_attention_heads"])
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text,
        "vision_config": tower,
        "multimodal_projector_bias": adapter_bias,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": vision.size("spatial_merge_size"),
        "image_token_index": vision.raw.get("image_token_id", _IMAGE_TOKEN),
        "vision_feature_layer": -1,
    } | {key: text[key] for key in ("dtype", "tie_word_embeddings") if key in text}
