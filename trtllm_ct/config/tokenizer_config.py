"""tokenizer_config.json of a converted directory: readable by transformers 4 and 5.

transformers 5 names its general class of fast tokenizers `TokenizersBackend` and keeps `PreTrainedTokenizerFast`, the
name in transformers 4, as another name of it; it writes further special tokens as a list `extra_special_tokens`, which
transformers 4 reads as an object, and reads `additional_special_tokens` too. transformers 4 refuses either.
Source: transformers 5.23 `tokenization_utils_tokenizers.py`, `tokenization_utils_base.py`; 4.57
`models/auto/tokenization_auto.py: tokenizer_class_from_name`, `tokenization_utils_base.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TOKENIZER_CONFIG", "class_of_transformers_5", "portable_tokenizer_config"]

TOKENIZER_CONFIG = "tokenizer_config.json"

_CLASS, _EXTRA, _ADDITIONAL = "tokenizer_class", "extra_special_tokens", "additional_special_tokens"
_OLDER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
_ONLY_IN_5 = frozenset({"MistralCommonBackend", "PythonBackend", "SentencePieceBackend"})


def portable_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parsed tokenizer_config.json in names that both lines of transformers know; `config` is not changed."""
    portable = dict(config)
    if isinstance(config.get(_CLASS), str):
        portable[_CLASS] = _OLDER_CLASSES.get(config[_CLASS], config[_CLASS])
    if isinstance(config.get(_EXTRA), list):
        extra, stated = portable.pop(_EXTRA), config.get(_ADDITIONAL) or []
        portable[_ADDITIONAL] = [*stated, *(token for token in extra if token not in stated)]
    return portable


def class_of_transformers_5(config: Mapping[str, Any]) -> str | None:
    """Return the tokenizer class of a tokenizer_config.json if transformers 4 has none like it, else None."""
    name = config.get(_CLASS)
    return name if isinstance(name, str) and name in _ONLY_IN_5 else None
