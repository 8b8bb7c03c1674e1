"""A tokenizer_config.json that transformers 4 and transformers 5 both read."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_ct.config.tokenizer_config import class_of_transformers_5, portable_tokenizer_config


def test_the_general_class_has_the_name_that_both_know() -> None:
    made = portable_tokenizer_config({"tokenizer_class": "TokenizersBackend", "bos_token": "<s>"})

    assert made == {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast", None, 3])
def test_other_classes_are_kept(name: Any) -> None:
    assert portable_tokenizer_config({"tokenizer_class": name}) == {"tokenizer_class": name}
    assert class_of_transformers_5({"tokenizer_class": name}) is None


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"extra_special_tokens": ["<a>", "<b>"]}, {"additional_special_tokens": ["<a>", "<b>"]}),
        (
            {"extra_special_tokens": ["<a>", "<b>"], "additional_special_tokens": ["<b>", "<c>"]},
            {"additional_special_tokens": ["<b>", "<c>", "<a>"]},
        ),
        ({"extra_special_tokens": {"image": "<i>"}}, {"extra_special_tokens": {"image": "<i>"}}),
        ({"extra_special_tokens": []}, {"additional_special_tokens": []}),
    ],
)
def test_a_list_of_further_tokens_has_the_name_that_both_know(stored: Any, expected: Any) -> None:
    before = {key: list(value) for key, value in stored.items()}

    assert portable_tokenizer_config(stored) == expected
    assert {key: list(value) for key, value in stored.items()} == before


@pytest.mark.parametrize("name", ["MistralCommonBackend", "SentencePieceBackend"])
def test_classes_that_transformers_4_lacks_are_named(name: str) -> None:
    assert class_of_transformers_5({"tokenizer_class": name}) == name


@pytest.mark.newest_transformers
def test_both_names_are_one_class() -> None:
    import transformers

    assert transformers.PreTrainedTokenizerFast is transformers.TokenizersBackend
