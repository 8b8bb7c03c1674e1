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
from any_model import SCHEMES, Outcome, quantize, taken_through
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


def test_a_model_loads_exactly(tmp_path: Path, name: str, scheme: str, stacked: bool) -> None:
    source = quantize(tiny_model(name), tmp_path / "source", scheme, stacked=stacked)

    assert taken_through(source, tmp_path / "dense") == EXACT


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "scheme" not in metafunc.fixturenames:
        return
    every = metafunc.config.getoption("--every-class")
    names = class_names() if every else (*CHOICE, *MIXTURES)
    cases = [(name, scheme, stacked) for name in names for scheme in SCHEMES for stacked in (False, True)]
    metafunc.parametrize(("name", "scheme", "stacked"), cases)
