"""`--requantize` of the commands, and `perplexity`, which shows what it costs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g32")
FP8 = ("--requantize", "experts=fp8-block")


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=128, vocabulary=300)
    return write_checkpoint(tmp_path / "in", config=config, scheme=EXPERTS, tokenizer=True).directory


def test_inspect_lists_what_could_be_requantized(mixture: Path) -> None:
    before, after = run_cli("inspect", mixture).out, run_cli("inspect", mixture, *FP8).out

    assert "--requantize experts=fp8-block: 1.6 MB -> " in before
    assert ", error ~2.6%, fp8 inputs" in before
    assert "are rounded to FP8_BLOCK_SCALES g128" in after
    assert "--requantize" not in after


def test_a_conversion_is_verified_by_what_was_asked_for(mixture: Path, tmp_path: Path) -> None:
    converted = run_cli("convert", mixture, tmp_path / "out", *FP8)
    assert "weights are rounded to fp8-block, with a relative error of at most 6%" in " ".join(converted.out.split())

    verified = run_cli("verify", mixture, tmp_path / "out")
    assert "24 requantized tensors, relative error 2." in verified.out
    assert run_cli("verify", mixture, tmp_path / "out", *FP8).code == 0
    other = run_cli("verify", mixture, tmp_path / "out", "--requantize", "experts=nvfp4")
    assert other.code == 1
    assert "--requantize experts=fp8-block" in other.out


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "verify"])
def test_other_words_are_usage_errors(mixture: Path, tmp_path: Path, command: str) -> None:
    out = [tmp_path / "out"] if command in {"convert", "verify"} else []

    done = run_cli(command, mixture, *out, "--requantize", "experts=int4")

    assert done.code == 2
    assert "fp8-block or nvfp4 or mxfp4 or fp8" in done.err_words


@pytest.mark.reference
def test_perplexities_stand_side_by_side(mixture: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the import statement of a module, and of another module " * 3)
    run_cli("convert", mixture, tmp_path / "out", *FP8)

    models = run_cli("perplexity", mixture, tmp_path / "out", "--text", tmp_path / "text", "--json").document["models"]

    assert [model["model"] for model in models] == [str(mixture), str(tmp_path / "out")]
    assert models[0]["difference"] == 0
    assert 0 < models[1]["difference"] < 0.1


@pytest.mark.reference
@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_text_that_can_not_be_read_is_a_usage_error(mixture: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)

    done = run_cli("perplexity", mixture, "--text", tmp_path / "text")

    assert done.code == 2
    assert "text in UTF-8" in done.err_words
