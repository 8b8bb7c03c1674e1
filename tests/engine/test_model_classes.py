"""Which model classes each release has."""

from __future__ import annotations

import pytest

from trtllm_ct.engine.model_classes import MODEL_CLASSES, WRAPPERS, first_release, has_class
from trtllm_ct.engine.releases import RELEASES, STOCK_1_0, STOCK_1_2, STOCK_1_3


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_a_release_has_the_classes_of_all_earlier_ones(name: str) -> None:
    have = [has_class(release, name) for release in RELEASES]

    assert have == sorted(have)
    assert have[-1]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("LlamaForCausalLM", STOCK_1_0),
        ("Gemma3ForConditionalGeneration", STOCK_1_0),
        ("Mistral3ForConditionalGeneration", STOCK_1_0),
        ("Qwen3VLForConditionalGeneration", STOCK_1_2),
        ("Qwen3VLMoeForConditionalGeneration", STOCK_1_2),
        ("KimiK25ForConditionalGeneration", STOCK_1_3),
        ("GraniteForCausalLM", None),
        ("Gemma2ForCausalLM", None),
        ("DeepseekV2ForCausalLM", None),
        ("Glm4ForCausalLM", None),
        ("Glm4MoeLiteForCausalLM", None),
        ("Mistral4ForCausalLM", None),
        ("InternVLForConditionalGeneration", None),
        ("LlavaForConditionalGeneration", None),
        ("LlavaOnevisionForConditionalGeneration", None),
    ],
)
def test_the_first_release_of_a_class(name: str, first: object) -> None:
    assert first_release(name) == first


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_a_class_that_some_release_has(name: str) -> None:
    assert name in MODEL_CLASSES
    assert len(set(WRAPPERS[name].places)) == len(WRAPPERS[name].places) > 0
