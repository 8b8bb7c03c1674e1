"""All sixteen real checkpoints on all generations, loaded by `trtllm_ct.LLM`: golden logits and golden tokens.

The bound for a checkpoint follows from the committed table of modes at these sizes: exact, zeros rounded to bfloat16,
or modules rounded to bfloat16. Static FP8 is compared with an oracle that rounds as the engine does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
from engine_fixtures import BINDINGS
from fp8_oracle import STATIC_FP8, engine_answers
from plain_model import Golden, deviation

import trtllm_ct

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [pytest.mark.shared, pytest.mark.reference]

GOLDEN_MODES: dict[str, Any] = json.loads(Path(__file__).with_name("golden_parallel.json").read_text())
EXACT, ROUNDED_ZEROS, DEQUANTIZED = 2e-3, 5e-3, 2e-2
EXACT_IN_BFLOAT16 = {"mxfp4a16"}
"""Their values are powers of two times E2M1, so dequantizing loses nothing."""
SIZES = [(1, 1), (2, 1), (4, 1), (2, 2)]
"""Tensor and pipeline parallel."""
SPAWNED = ["mixed-fp8-w4", "qwen3moe-nvfp4", "w4a16-g64-asym"]


@pytest.fixture(autouse=True)
def sidecars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_CT_CACHE", str(tmp_path / "sidecars"))


def bound(name: str, tensor: int, pipeline: int) -> float:
    modes = GOLDEN_MODES[name][f"tp{tensor} pp{pipeline}"]
    if modes["dequantized"] and name not in EXACT_IN_BFLOAT16:
        return DEQUANTIZED
    return ROUNDED_ZEROS if any(mode.startswith("W4A16_GPTQ") for mode in modes["native"]) else EXACT


def logits_of(directory: Path, golden: Golden, tensor: int, pipeline: int) -> Tensor:
    """Return the logits for the golden prompt and its continuation."""
    with trtllm_ct.LLM(
        directory,
        engine="tensorrt_llm",
        skip_tokenizer_init=True,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
    ) as llm:
        logits: Tensor = llm.logits(golden.greedy)
    return logits


@pytest.mark.pairs
@pytest.mark.parametrize(("tensor", "pipeline"), SIZES, ids=str)
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("name", sorted(GOLDEN_MODES))
def test_golden_answers(shared: Path, name: str, generation: str, tensor: int, pipeline: int) -> None:
    """Each golden token has the largest logit after the tokens before it, so the model generates the golden text."""
    directory = shared / "checkpoints" / name
    golden = engine_answers(directory)

    with engine_double.installed(generation, importers=[BINDINGS]):
        logits = logits_of(directory, golden, tensor, pipeline)

    end = len(golden.prompt)
    assert deviation(logits[end - len(golden.logits) : end], golden.logits) < bound(name, tensor, pipeline)
    if bound(name, tensor, pipeline) == EXACT and name != STATIC_FP8:
        assert logits[end - 1 : -1].argmax(dim=-1).tolist() == golden.greedy[end:]


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("name", SPAWNED)
def test_two_processes_give_the_golden_answers(shared: Path, name: str, generation: str) -> None:
    """Workers get pickled arguments and their own environment."""
    directory = shared / "checkpoints" / name
    golden = engine_answers(directory)

    with engine_double.installed(generation, in_process=False, importers=[BINDINGS]):
        logits = logits_of(directory, golden, 2, 1)

    end = len(golden.prompt)
    assert deviation(logits[end - len(golden.logits) : end], golden.logits) < bound(name, 2, 1)
