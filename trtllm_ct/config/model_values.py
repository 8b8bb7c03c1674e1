"""Types and bounds of the values in config.json that decide how a model is planned.

A config.json may come from anybody: a number of layers of 10^9 would be counted to, and a string would be compared with
a number. Every key that any stage calculates with is in the table below and is checked before it is used. The bounds
are far above those of real models. Keys that are not listed are copied, not interpreted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.json_values import is_finite_number
from trtllm_ct.config.json_object import shown
from trtllm_ct.config.not_finite import keys_not_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trtllm_ct.base.errors import FaultCollector


__all__ = ["MODEL_VALUES", "check_model_values", "with_whole_numbers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A kind of value: a text for messages, and a function that says whether a value is of it; null always is.

    `whole` says that its numbers are integers.
    """

    expected: str
    accepts: Callable[[Any], bool]
    whole: bool = False


def _count(most: int) -> _Kind:
    """Return the kind of whole numbers up to `most`.

    -1 and 0 stand for none in some models, and configurations of some classes have a list with one number per layer.
    transformers writes some numbers as floats, such as 1200.0 (`with_whole_numbers`).
    """

    def is_count(value: Any) -> bool:
        return not isinstance(value, bool) and isinstance(_whole(value), int) and -1 <= value <= most

    def accepts(value: Any) -> bool:
        if isinstance(value, list):
            return len(value) <= _MOST_LAYERS and all(item is None or is_count(item) for item in value)
        return is_count(value)

    return _Kind(expected=f"a positive integer, at most {most}", accepts=accepts, whole=True)


def _whole(value: Any) -> Any:
    """Return a whole number that is stored as a float as an integer, also in a list; any other value as it is."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MOST_CHARACTERS and value.isprintable()


def _is_rotary(value: Any) -> bool:
    """Whether a value has the form of `rope_scaling`, or of a block with one such for each kind of layer."""
    if not isinstance(value, Mapping) or keys_not_finite(value):
        return False
    blocks = [value, *(block for block in value.values() if isinstance(block, Mapping))]
    types = [block.get(key) for block in blocks for key in ("rope_type", "type")]
    return all(name is None or _is_name(name) for name in types)


_MOST_LAYERS = 10_000
_MOST_CHARACTERS = 200
_LAYERS = _count(_MOST_LAYERS)
_EXPERTS = _count(100_000)
_SIZE = _count(2**31)
_NUMBER = _Kind(expected="a finite number", accepts=is_finite_number)
_FLAG = _Kind(expected="true or false", accepts=lambda value: isinstance(value, bool))
_NAME = _Kind(expected=f"a name of at most {_MOST_CHARACTERS} printable characters", accepts=_is_name)
# transformers saves "" for a configuration without a type of its own, such as `attn_config` of MPT.
_TYPE = _Kind(expected=_NAME.expected, accepts=lambda value: value == "" or _is_name(value))
_NAMES = _Kind(
    expected="a list of printable names",
    accepts=lambda value: _is_name(value) or (isinstance(value, list) and all(map(_is_name, value))),
)
_BLOCK = _Kind(expected="an object", accepts=lambda value: isinstance(value, Mapping))
_ROTARY = _Kind(expected="an object of finite numbers, with a name as its type", accepts=_is_rotary)
_LAYER_KINDS = _Kind(
    expected=f"at most {_MOST_LAYERS} kinds of layers",
    accepts=lambda value: isinstance(value, str | list) and len(value) <= _MOST_LAYERS,
)

MODEL_VALUES: Mapping[str, _Kind] = {
    **dict.fromkeys(("architectures",), _NAMES),
    **dict.fromkeys(("model_type",), _TYPE),
    **dict.fromkeys(("dtype", "torch_dtype", "hidden_act"), _NAME),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), _FLAG),
    **dict.fromkeys(
        (
            "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_nextn_predict_layers",
            "first_k_dense_replace", "decoder_sparse_step", "moe_layer_freq", "mlp_only_layers",
        ),
        _LAYERS,
    ),
    **dict.fromkeys(
        ("num_local_experts", "n_routed_experts", "num_experts", "n_shared_experts", "num_experts_per_tok"), _EXPERTS
    ),
    **dict.fromkeys(
        (
            "hidden_size", "n_embd", "num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "vocab_size",
            "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            "max_position_embeddings", "sliding_window",
        ),
        _SIZE,
    ),
    **dict.fromkeys(
        (
            "rope_theta", "rms_norm_eps", "layer_norm_epsilon", "partial_rotary_factor", "rope_local_base_freq",
            "compress_rope_theta",
        ),
        _NUMBER,
    ),
    **dict.fromkeys(("text_config", "llm_config", "language_config", "thinker_config", "vision_config"), _BLOCK),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _ROTARY),
    **dict.fromkeys(("layers_block_type", "layer_types", "hybrid_override_pattern"), _LAYER_KINDS),
}  # fmt: skip
"""The kind of each value, by its key; the same in config.json and in the configurations of parts inside of it."""

_IN_ANY_PART = (
    "model_type", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rope_local_base_freq",
    "compress_rope_theta", "num_nextn_predict_layers",
)  # fmt: skip
"""What is written in older spellings in every part of the configuration, such as `audio_config` (`hf_config.py`)."""

_PART = "_config"
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "vision_config")
_TAKE_ORIGINAL = "Take config.json from the model that was quantized."


def check_model_values(config: Mapping[str, Any], faults: FaultCollector, where: str = "config.json: ") -> None:
    """Add a fault for every value of a parsed config.json that is not of its kind in `MODEL_VALUES`.

    Configurations of parts are checked too. `where` is put before the key in faults.
    """
    _check_values(config, MODEL_VALUES, faults, where)
    for key, part in config.items():
        if isinstance(part, Mapping) and key in _PARTS:
            check_model_values(part, faults, f"{where}{key}.")
        elif isinstance(part, Mapping) and key.endswith(_PART):
            _check_any_part(part, faults, f"{where}{key}.")


def _check_any_part(part: Mapping[str, Any], faults: FaultCollector, where: str) -> None:
    """Check a part of which only the values `_IN_ANY_PART` are used, and the parts in it."""
    _check_values(part, _IN_ANY_PART, faults, where)
    for key, inner in part.items():
        if isinstance(inner, Mapping) and key.endswith(_PART):
            _check_any_part(inner, faults, f"{where}{key}.")


def _check_values(config: Mapping[str, Any], keys: Iterable[str], faults: FaultCollector, where: str) -> None:
    for key in keys:
        value, kind = config.get(key), MODEL_VALUES[key]
        if value is not None and not kind.accepts(value):
            faults.add(where=f"{where}{key}", expected=kind.expected, found=shown(value), remedy=_TAKE_ORIGINAL)


def with_whole_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parsed config.json with integers for the whole numbers in it that are stored as floats.

    transformers 5.23 saves MusicFlamingo with `max_position_embeddings: 1200.0`.
    """
    read = {}
    for key, value in config.items():
        kind = MODEL_VALUES.get(key)
        part = key in _PARTS and isinstance(value, Mapping)
        read[key] = with_whole_numbers(value) if part else _whole(value) if kind is not None and kind.whole else value
    return read
