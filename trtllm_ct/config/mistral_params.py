"""Convert the params.json of Mistral's own form to the config.json of the same model in Hugging Face's form.

| params.json                            | config.json                                                     |
|----------------------------------------|-----------------------------------------------------------------|
| `dim`, `n_layers`, `hidden_dim`, ...   | `hidden_size`, `num_hidden_layers`, `intermediate_size`, ...    |
| `moe` of two numbers                   | `MixtralForCausalLM`, else `MistralForCausalLM`                 |
| `vision_encoder` with a patch merger   | `Mistral3ForConditionalGeneration` around `MistralForCausalLM`  |

Unknown keys with a value other than null, false or 0 are refused: latent attention, scaled positions and adapters
change what a model computes, and the weights do not show that.
Sources: transformers 4.53 `models/mistral/convert_mistral_weights_to_hf.py` and
`models/mistral3/convert_mistral3_weights_to_hf.py`; vLLM 0.15 `transformers_utils/configs/mistral.py`;
mistral-inference 1.6 `args.py`, `transformer.py`, `vision_encoder.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import ConfigError, FaultCollector
from trtllm_ct.base.json_values import is_finite_number

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import TensorSpec

__all__ = ["config_from_params"]

_FILE = "params.json"
_USE_HF_CONFIG = "Put the config.json of the model's Hugging Face form beside the weights; it then counts instead."
_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_OPTIONAL_SIZES = {"n_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
_OTHER_KEYS = {
    "norm_eps", "rope_theta", "moe", "sliding_window", "tied_embeddings", "max_position_embeddings", "max_seq_len",
    "vision_encoder", "quantization", "quantization_config",
    # The dtype is taken from the tensors, and the batch size is decided when the model is served.
    "dtype", "torch_dtype", "max_batch_size",
}  # fmt: skip
# Keys that may only have the value that is assumed without them.
_DEFAULTS = {"model_type": "transformer", "activation": "silu", "causal": True}
_MIXTURE = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
_DEFAULT_MAX_POSITION = 128_000
"""The maximum position that vLLM and TensorRT-LLM assume when params.json names none."""
_THETA_OF_WINDOWED = 10_000.0
"""The theta of Mistral 7B 0.1, the only model whose params.json names a sliding window and no theta."""

_VISION_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size",
)  # fmt: skip
_OTHER_VISION_KEYS = {
    "rope_theta", "spatial_merge_size", "image_token_id", "image_break_token_id", "image_end_token_id",
    "max_image_size",
    # Read from the tensors instead.
    "adapter_bias",
}  # fmt: skip
_ADAPTER_BIAS = "vision_language_adapter.w_in.bias"
# Mistral3 in transformers has both; an adapter without them belongs to another architecture.
_VISION_DEFAULTS = {"mm_projector_id": "patch_merge", "add_pre_mm_projector_layer_norm": True}
_IMAGE_TOKEN = 10


def config_from_params(params: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Return the config.json of a model.

    `params` is its parsed params.json, and `stored` the specs of its tensors from the headers, which give the dtype.
    Raises `ConfigError` with every key that is missing, of the wrong type, or has a meaning that is not known here.
    """
    faults = FaultCollector()
    reader = _Params(params, _FILE, faults)
    reader.refuse_unknown({*_SIZES, *_OPTIONAL_SIZES, *_OTHER_KEYS}, _DEFAULTS)
    text = _text_config(reader) | _dtype(stored)
    vision = params.get("vision_encoder")
    if vision:
        reader = _Params(vision, f"{_FILE}: vision_encoder", faults)
        text = _with_vision(text, reader, adapter_bias=_ADAPTER_BIAS in stored)
    faults.raise_if_any(ConfigError)
    return text


class _Params:
    """Typed access to one object of params.json; every fault names its key."""

    def __init__(self, raw: object, where: str, faults: FaultCollector) -> None:
        self.raw: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
        self.faults = faults
        self._where = where
        if not isinstance(raw, Mapping):
            self.fault("", "a JSON object", raw)

    def fault(self, key: str, expected: str, found: object, remedy: str = _USE_HF_CONFIG) -> None:
        """Record a fault for `key`, or for the whole object when `key` is empty."""
        separator = ": " if self._where == _FILE else "."
        where = f"{self._where}{separator}{key}" if key else self._where
        self.faults.add(where=where, expected=expected, found=repr(found), remedy=remedy)

    def size(self, key: str) -> int:
        """Return a positive integer; 0 after a fault."""
        value = self.raw.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self.fault(key, "a positive integer", value)
        return 0

    def number(self, key: str) -> float:
        """Return a positive number; 0 after a fault."""
        value: Any = self.raw.get(key)
        if is_finite_number(value) and value > 0:
            return float(value)
        self.fault(key, "a positive number", value)
        return 0.0

    def refuse_unknown(self, known: set[str], defaults: Mapping[str, object]) -> None:
        """Add one fault for all keys that may change the model in a way that is not known here.

        These are unknown keys, unless their value is null, false, 0 or empty, and keys of `defaults` whose value is
        neither null nor the default.
        """
        refused = [
            f"{key} {value!r}" if key in defaults else key
            for key, value in sorted(self.raw.items())
            if (value not in (None, defaults[key]) if key in defaults else value and key not in known)
        ]
        if refused:
            self.faults.add(
                where=self._where,
                expected="a dense model or a mixture of experts, described by keys that are known here",
                found=f"what may change what the model computes: {', '.join(refused)}",
                remedy=_USE_HF_CONFIG,
            )


def _text_config(params: _Params) -> dict[str, Any]:
    """Return the config of the text model alone."""
    config: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config |= {hf_key: params.size(key) for key, hf_key in _SIZES.items()}
    config |= {hf_key: params.size(key) for key, hf_key in _OPTIONAL_SIZES.items() if params.raw.get(key) is not None}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config |= {
        "hidden_act": "silu",
        "rms_norm_eps": params.number("norm_eps"),
        "rope_theta": _theta(params),
        "sliding_window": _sliding_window(params),
        "max_position_embeddings": _max_position(params),
        "tie_word_embeddings": params.raw.get("tied_embeddings") is True,
    }
    if params.raw.get("moe"):
        config |= _mixture(_Params(params.raw["moe"], f"{_FILE}: moe", params.faults))
    return config


def _theta(params: _Params) -> float:
    """Return the base of the rotary embedding; it must be given.

    Readers disagree about its default. The exception is one old model, which names a sliding window and no base.
    """
    if params.raw.get("rope_theta") is None and params.raw.get("sliding_window"):
        return _THETA_OF_WINDOWED
    return params.number("rope_theta")


def _sliding_window(params: _Params) -> int | None:
    """Return the sliding window, which must be the same for all layers; None when there is none.

    Some writers store it as a string, some as a list with one entry per layer.
    """
    value = params.raw.get("sliding_window")
    entries = value if isinstance(value, list) else [value]
    numbers = {int(entry) if isinstance(entry, str) and entry.isdigit() else entry for entry in entries}
    if len(numbers) == 1 and isinstance(single := numbers.pop(), int | None):
        return single or None
    params.fault("sliding_window", "one window for all layers", value)
    return None


def _max_position(params: _Params) -> int:
    """Return the largest number of positions."""
    for key in ("max_position_embeddings", "max_seq_len"):
        if params.raw.get(key) is not None:
            return params.size(key)
    return _DEFAULT_MAX_POSITION


def _mixture(moe: _Params) -> dict[str, Any]:
    """Return the keys that a mixture of experts adds to the config of the text model."""
    moe.refuse_unknown(set(_MIXTURE), {})
    sizes = {hf_key: moe.size(key) for key, hf_key in _MIXTURE.items()}
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **sizes}


def _dtype(stored: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return the dtype of the embeddings, which no writer quantizes, as a config.json key.

    Returns no key when their dtype is unknown; a config.json without it counts as bfloat16.
    """
    for name in ("tok_embeddings.weight", "model.embed_tokens.weight"):
        if name in stored and stored[name].dtype.is_wide_float:
            return {"dtype": stored[name].dtype.torch_name}
    return {}


def _with_vision(text: dict[str, Any], vision: _Params, *, adapter_bias: bool) -> dict[str, Any]:
    """Return the config of a text model with a Pixtral vision tower and the projector of Mistral Small 3.1."""
    vision.refuse_unknown({*_VISION_SIZES, *_OTHER_VISION_KEYS}, _VISION_DEFAULTS)
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
