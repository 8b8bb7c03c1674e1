"""config.json of a converted directory: without a compressed-tensors block, and in both spellings of renamed keys.

transformers 5 writes keys that transformers 4 does not know; TensorRT-LLM releases are built with either version, and
their own classes read the older names. So the older keys are added (`spellings.py`, `rope_spellings.py`), in every part
of the configuration: a text model, a vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trtllm_ct.config.rope_spellings import missing_rope_keys
from trtllm_ct.config.spellings import missing_older_keys

if TYPE_CHECKING:
    from trtllm_ct.base.dtypes import DType

__all__ = ["portable_config", "with_tie"]

_QUANTIZATION_BLOCKS = ("quantization_config", "compression_config")
_TEXT = "text_config"
_PART = "_config"
# transformers 4.55 and older have the keys of these text models at the top level, and so does TensorRT-LLM 1.0
# (`modeling_qwen2vl.py: Qwen2VLModelBase`, which reads `pretrained_config.rope_scaling`).
_FLAT = frozenset({"qwen2_vl", "qwen2_5_vl"})
_OF_ONE_LEVEL = frozenset({"model_type", "architectures", "rope_parameters", "tie_word_embeddings", "_name_or_path"})
"""Keys that say something else at the top level than in the text model."""
# With these types transformers 5 compares `rope_scaling` with `max_position_embeddings` of the same level, which it
# takes from the text model only (5.23 `modeling_rope_utils.py: standardize_rope_params`, AttributeError).
_COMPARED_TYPES = frozenset({"yarn", "longrope", "llama3"})


def portable_config(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """Return a parsed config.json without quantization, with the given model dtype, for transformers 4 and 5.

    `config` is not changed. Every part (`text_config`, `vision_config` and the like) is converted too; a text model
    gets the dtype as well, other parts keep theirs.
    """
    stated = {"dtype": dtype.torch_name, "torch_dtype": dtype.torch_name}
    portable = _in_both_spellings({**config, **stated})
    if isinstance(portable.get(_TEXT), Mapping):
        portable[_TEXT] = portable_config(portable[_TEXT], dtype)
        if config.get("model_type") in _FLAT:
            portable = _text_keys(portable[_TEXT]) | portable
    return portable


def _in_both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration and its parts without quantization, with all older keys."""
    kept = {key: value for key, value in config.items() if key not in _QUANTIZATION_BLOCKS}
    for key, value in kept.items():
        if key.endswith(_PART) and key != _TEXT and isinstance(value, Mapping):
            kept[key] = _in_both_spellings(value)
    return kept | missing_older_keys(kept) | missing_rope_keys(kept)


def _text_keys(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the top level of a class in `_FLAT` holds of its text model."""
    keys = {key: value for key, value in text.items() if key not in _OF_ONE_LEVEL}
    scaling = keys.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) in _COMPARED_TYPES:
        del keys["rope_scaling"]
    return keys


def with_tie(config: Mapping[str, Any], *, tied: bool | None) -> dict[str, Any]:
    """Return a parsed config.json that says whether head and embeddings are tied; unchanged if that is not known.

    It says so at the top level and in `text_config`: readers differ in the level that decides, and releases of
    transformers in the default of a class.
    """
    if tied is None:
        return dict(config)
    stated = {**config, "tie_word_embeddings": tied}
    if isinstance(stated.get(_TEXT), Mapping):
        stated[_TEXT] = with_tie(stated[_TEXT], tied=tied)
    return stated
