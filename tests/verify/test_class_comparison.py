"""`verify` and `convert` compare a checkpoint with the same class: neither is stricter than the other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from builders import rewrite, rewrite_config
from decoder_models import write_decoder

from trtllm_ct.base.errors import PlanError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.transformers_class import TransformersClass
from trtllm_ct.plan.models.model_class import Comparison
from trtllm_ct.plan.models.sites import Model
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.models.plain_tensors import PlainTensors

pytestmark = [pytest.mark.reference, pytest.mark.newest_transformers]


def answer(monkeypatch: pytest.MonkeyPatch, comparison: Comparison) -> None:
    """Let every class answer so."""

    def compare(self: TransformersClass, tensors: PlainTensors) -> Comparison:
        return comparison

    monkeypatch.setattr(TransformersClass, "compare", compare)


def test_what_only_the_class_misses_is_a_fault_of_verify_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_decoder(tmp_path, "Glm4MoeForCausalLM", "fp8-channel-token")
    answer(monkeypatch, Comparison(by="the class", missing={"model.extra.weight": (8,)}))

    with pytest.raises(PlanError, match=r"model\.extra\.weight"):
        verify_checkpoint(tmp_path)


def test_what_the_class_overrules_is_no_fault_of_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class reads no such layer, whatever config.json counts."""
    write_decoder(tmp_path / "in", "Glm4MoeForCausalLM", "fp8-channel-token")
    rewrite_config(tmp_path / "in", lambda config: config.update(num_hidden_layers=3))
    answer(monkeypatch, Comparison(by="the class"))

    convert_checkpoint(tmp_path / "in", tmp_path / "out", to="dense")

    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").good


@pytest.mark.parametrize("name", ["SeedOssForCausalLM", "Glm4MoeForCausalLM", "NemotronForCausalLM"])
@pytest.mark.parametrize("stated", [{}, {"tie_word_embeddings": None}, {"tie_word_embeddings": False}])
def test_a_lost_head_is_a_fault_whatever_config_leaves_out(
    tmp_path: Path, name: str, stated: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_decoder(tmp_path, name, "fp8-channel-token")
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config | stated))
    answer(monkeypatch, Comparison(why_not="transformers is not installed"))

    with pytest.raises(PlanError, match=r"lm_head\.weight: expected a head of its own"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"text_config": {}}, False),
    ],
)
def test_the_first_level_that_says_something_decides_on_the_tie(config: dict[str, object], tied: bool) -> None:
    assert Model.from_config({"architectures": ["Qwen3_5ForConditionalGeneration"], **config}).tied is tied


@pytest.mark.parametrize(
    ("name", "headless"),
    [
        ("LlavaModel", True),
        ("Qwen2AudioModel", True),
        ("ColQwen2ForRetrieval", True),
        ("LlamaForSequenceClassification", True),
        ("GPT2LMHeadModel", False),
        ("InternVLChatModel", False),
        ("LlavaForConditionalGeneration", False),
        ("LlamaForCausalLM", False),
    ],
)
def test_only_classes_with_a_head_are_asked_for_one(name: str, headless: bool) -> None:
    model = Model.from_config(
        {"architectures": [name], "model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 1}}
    )

    assert model.headless is headless
    assert ("lm_head" in dict(model.stated_modules(("model.", "lm_head")))) is (
        model.stated is not None and not headless
    )
