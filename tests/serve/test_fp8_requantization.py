"""Static per-tensor FP8 in fused Linears: the engine requantizes the weights, and so does the oracle.

All generations do it in the same way, in one process and over ranks. No other precision is lost.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import tiny_config, write_checkpoint
from fp8_oracle import STATIC_FP8, engine_answers, fp8_static_logits, requantized
from plain_model import deviation, golden_of
from safetensors.torch import load_file

from trtllm_ct import convert_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

TOKENS = list(range(5, 25))
EXACT = 2e-3


@pytest.fixture(params=engine_double.GENERATIONS)
def generation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["wide", "quantized inputs"])
def quantize_inputs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def engine(generation: str, quantize_inputs: bool) -> Iterator[Any]:
    with engine_double.installed(generation, quantize_activations=quantize_inputs) as module:
        yield module


def logits_of(engine: Any, directory: Path, tokens: list[int], **arguments: Any) -> Tensor:
    with engine.LLM(model=directory, skip_tokenizer_init=True, **arguments) as llm:
        logits: Tensor = llm.logits(tokens)
    return logits


@pytest.mark.pairs
@pytest.mark.reference
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "model",
    [{}, {"architecture": "Qwen2ForCausalLM"}, {"dtype": "float16"}],
    ids=["bfloat16", "biases", "float16"],
)
def test_logits_are_those_of_the_oracle(
    engine: Any, tmp_path: Path, model: dict[str, Any], quantize_inputs: bool, ranks: int
) -> None:
    built = write_checkpoint(tmp_path / "source", config=tiny_config(**model), scheme="fp8-tensor-static")
    want = fp8_static_logits(built.config, built.stored, TOKENS, quantize_inputs=quantize_inputs)
    convert_checkpoint(built.directory, tmp_path / "out")
    assert deviation(logits_of(engine, tmp_path / "out", TOKENS, tensor_parallel_size=ranks), want) < EXACT


@pytest.mark.shared
@pytest.mark.reference
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_checkpoint_gives_the_logits_of_the_oracle(
    engine: Any, shared: Path, tmp_path: Path, quantize_inputs: bool, ranks: int
) -> None:
    source = shared / "checkpoints" / STATIC_FP8
    golden = golden_of(source)
    config = json.loads((source / "config.json").read_text())
    stored = load_file(source / "model.safetensors")
    want = fp8_static_logits(config, stored, golden.prompt, quantize_inputs=quantize_inputs)
    convert_checkpoint(source, tmp_path / "out")
    found = logits_of(engine, tmp_path / "out", golden.prompt, tensor_parallel_size=ranks)
    assert deviation(found, want) < EXACT


# The oracle itself.


@pytest.mark.shared
@pytest.mark.reference
def test_the_engines_rounding_is_what_the_golden_logits_lack(shared: Path) -> None:
    """A bound on the golden logits that is wide enough for static FP8 would miss many other errors."""
    source = shared / "checkpoints" / STATIC_FP8
    assert 0.05 < deviation(engine_answers(source).logits, golden_of(source).logits) < 0.2


def test_equal_scales_change_nothing() -> None:
    codes = [torch.randn(8, 8).to(torch.float8_e4m3fn) for _ in range(2)]
    scale = torch.tensor([0.25])
    assert all(
        torch.equal(weight, part.float() * 0.25)
        for weight, part in zip(requantized(codes, [scale, scale], torch.bfloat16), codes, strict=True)
    )


def test_smaller_scales_lose_what_fp8_has_no_room_for() -> None:
    """1 and 1.125 with a third of the largest scale become 1 / 3 and 0.375, in steps of 1 / 32."""
    small, large = torch.tensor([1.0, 1.125]), torch.tensor([2.0])
    codes = [values.to(torch.float8_e4m3fn) for values in (small, large)]
    weights = requantized(codes, [torch.tensor([1.0]), torch.tensor([3.0])], torch.bfloat16)
    assert weights[0].tolist() == [3 * 11 / 32, 3 * 12 / 32]
    assert weights[1].tolist() == [6.0]
