"""Models of any class become plain weights that transformers loads: exactly, and without a missing or unexpected key.

A fixed choice runs always, with what models differ in. `--every-class` adds every class that generates text and that
transformers builds from a tiny configuration:

    pytest tests/end_to_end/test_any_model.py --every-class -q
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from any_model import SCHEMES, Outcome, has_stacks, quantize, taken_through
from builders import rewrite, rewrite_config
from safetensors.torch import load_file
from tiny_classes import class_names, tiny_model

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.library, pytest.mark.reference]

EXACT = Outcome(result="exact")
CHOICE = {
    "CohereForCausalLM": "a head that is tied by the default of the class",
    "FalconForCausalLM": "layers called h, a fused q/k/v and word_embeddings",
    "Qwen3_5ForConditionalGeneration": "linear attention beside full attention, and a vision tower",
    "Idefics3ForConditionalGeneration": "a text model under a prefix of its own",
    "NemotronHForCausalLM": "layers of several kinds",
    "WhisperForConditionalGeneration": "encoder and decoder",
}
MIXTURES = {
    "Glm4MoeForCausalLM": "experts one by one",
    "MiniMaxM2ForCausalLM": "experts called w1, w2 and w3",
    "GraniteMoeHybridForCausalLM": "stacks that are modules beside the experts",
    "GptOssForCausalLM": "stacks of transposed experts with alternating rows and biases",
    "Llama4ForConditionalGeneration": "stacks of transposed experts in a wrapper",
    "Mistral4ForCausalLM": "stacks of experts",
}


UNBUILT = frozenset(
    {
        *("ChameleonForConditionalGeneration", "DbrxForCausalLM", "Dots3NoteForConditionalGeneration"),
        *("Emu3ForConditionalGeneration", "Ernie4_5_VLMoeForConditionalGeneration", "FastVlmForConditionalGeneration"),
        *("Florence2ForConditionalGeneration", "Gemma3nForConditionalGeneration", "Gemma4AssistantForCausalLM"),
        *("Gemma4UnifiedAssistantForCausalLM", "Glm5NextForConditionalGeneration", "InklingForConditionalGeneration"),
        *("JanusForConditionalGeneration", "Molmo2ForConditionalGeneration", "MuseSparkForConditionalGeneration"),
        *("NemotronH_Omni_Reasoning_V3", "PerceptionLMForConditionalGeneration", "ZambaForCausalLM"),
    }
)
"""Classes that need another package or more than small sizes, or whose defaults leave them large."""

UNSAVED = frozenset(
    {"Kimi_K25ForConditionalGeneration", "LongcatFlashForCausalLM", "MistralLarge4ForConditionalGeneration"}
)
"""Classes whose `save_pretrained` permutes rows of codes, and fails, and one with experts that have no weights."""

REFUSED = {
    "GPT2LMHeadModel": "an unquantized checkpoint",
    "OpenAIGPTLMHeadModel": "an unquantized checkpoint",
    "HrmTextForCausalLM": "Without its scale",
    "MiniMaxM3SparseForConditionalGeneration": "Without its scale",
    "QianfanOCRForConditionalGeneration": "Without its scale",
    "Step3p7ForConditionalGeneration": "Its weight was lost or renamed",
    "UnlimitedOcrForConditionalGeneration": "Without its scale",
}
"""Classes that have no Linears, and those whose `save_pretrained` renames weights and loses their FP8 scales."""


def test_a_model_loads_exactly(tmp_path: Path, name: str, scheme: str) -> None:
    for stacked in (False, True) if has_stacks(tiny_model(name)) else (False,):
        source = quantize(tiny_model(name), tmp_path / f"source-{stacked}", scheme, stacked=stacked)

        outcome = taken_through(source, tmp_path / f"dense-{stacked}")

        assert outcome == EXACT or (outcome.result in {"inspect", "refused"} and REFUSED[name] in outcome.why)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "scheme" in metafunc.fixturenames:
        names: tuple[str, ...] = (*CHOICE, *MIXTURES)
        if metafunc.config.getoption("--every-class"):
            names = tuple(name for name in class_names() if name not in UNBUILT | UNSAVED)
        metafunc.parametrize(("name", "scheme"), [(name, scheme) for name in names for scheme in SCHEMES])


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of five layers, the first of which has no experts."""
    directory = tmp_path_factory.mktemp("glm")
    model = tiny_model("Glm4MoeForCausalLM", num_hidden_layers=5, attention_bias=True)
    return quantize(model, directory, "w4a16-g32").directory


def copied(source: Path, out: Path) -> Path:
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


@pytest.mark.parametrize(
    "lost",
    ["model.layers.3.self_attn.o_proj", "model.layers.2.mlp.experts.1.up_proj", "model.layers.4.mlp.experts.2"],
)
def test_a_lost_module_is_named(glm: Path, tmp_path: Path, lost: str) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{lost}.")]:
            del tensors[name]

    damaged = copied(glm, tmp_path / "damaged")
    rewrite(damaged, lose)

    problems = inspect_checkpoint(damaged, "dense").problems

    assert problems
    assert all(fault.where.startswith(lost) and "Fetch the shard" in fault.remedy for fault in problems)


def test_a_lost_bias_is_named(glm: Path, tmp_path: Path) -> None:
    damaged = copied(glm, tmp_path / "damaged")
    rewrite(damaged, lambda tensors: tensors.pop("model.layers.3.self_attn.k_proj.bias"))

    (problem,) = inspect_checkpoint(damaged, "dense").problems

    assert problem.where == "model.layers.3.self_attn.k_proj.bias"


def test_a_note_says_how_a_model_without_tables_was_checked(glm: Path) -> None:
    (note,) = [warning for warning in plan_checkpoint(glm, "dense").warnings if "no table describes" in warning]

    assert "Glm4MoeForCausalLM" in note
    assert "index" in note


@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_is_delivered_whatever_the_class_ties(
    glm: Path, tmp_path: Path, stated: bool | None, equal: bool
) -> None:
    def state(config: dict[str, Any]) -> None:
        config.pop("tie_word_embeddings", None)
        config |= {} if stated is None else {"tie_word_embeddings": stated}

    def store(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table.clone() if equal else -table

    source = copied(glm, tmp_path / "source")
    rewrite_config(source, state)
    rewrite(source, store)

    convert_checkpoint(source, tmp_path / "dense", to="dense")

    config = json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert "lm_head.weight" in tensors
    assert config.get("tie_word_embeddings") is (stated if equal else False)
    assert verify_checkpoint(source, tmp_path / "dense").good


def test_without_a_stored_head_the_class_decides_on_the_tie(glm: Path, tmp_path: Path) -> None:
    source = copied(glm, tmp_path / "source")
    rewrite_config(source, lambda config: config.pop("tie_word_embeddings"))
    rewrite(source, lambda tensors: tensors.pop("lm_head.weight"))

    convert_checkpoint(source, tmp_path / "dense", to="dense")

    assert "tie_word_embeddings" not in json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))


def test_a_checkpoint_that_holds_nothing_quantized_is_copied(glm: Path, tmp_path: Path) -> None:
    convert_checkpoint(glm, tmp_path / "plain", to="dense")
    block = open_checkpoint(glm).detection.block
    rewrite_config(tmp_path / "plain", lambda config: config.update(quantization_config=dict(block or {})))

    report = convert_checkpoint(tmp_path / "plain", tmp_path / "copy", to="dense")

    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "copy"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any("nothing is quantized" in warning for warning in report.plan.warnings)
