"""`--requantize` of the commands, and `perplexity`, which shows what it costs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import rewrite, tiny_config, write_checkpoint
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


def test_a_code_that_is_nan_makes_the_error_infinite_in_every_report(mixture: Path, tmp_path: Path) -> None:
    run_cli("convert", mixture, tmp_path / "out", *FP8)
    name = "model.layers.0.mlp.experts.0.up_proj"
    rewrite(tmp_path / "out", lambda stored: stored[f"{name}.weight"].view(torch.uint8)[0, 0].fill_(0x7F))

    shown = run_cli("verify", mixture, tmp_path / "out")
    document = run_cli("verify", mixture, tmp_path / "out", "--json", "--html", tmp_path / "page.html").document

    assert shown.code == 1
    assert f"relative error infinite together, at most infinite in {name}" in " ".join(shown.out.split())
    errors = {check["name"]: check["relative_error"] for check in document["checks"] if check["kind"] == "requantized"}
    assert [check for check, error in errors.items() if error == "inf"] == [f"{name}.weight"]
    assert document["relative_error"] == "inf"
    assert "NaN" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "verify"])
def test_other_words_are_usage_errors(mixture: Path, tmp_path: Path, command: str) -> None:
    out = [tmp_path / "out"] if command in {"convert", "verify"} else []

    done = run_cli(command, mixture, *out, "--requantize", "experts=int4")

    assert done.code == 2
    assert "fp8-block or nvfp4 or mxfp4 or fp8 or w4a8-awq or nvfp4-w4a4" in done.err_words


@pytest.mark.reference
def test_perplexities_stand_side_by_side(mixture: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the import statement of a module, and of another module " * 3)
    run_cli("convert", mixture, tmp_path / "out", *FP8)

    models = run_cli("perplexity", mixture, tmp_path / "out", "--text", tmp_path / "text", "--json").document["models"]

    assert [model["model"] for model in models] == [str(mixture), str(tmp_path / "out")]
    assert models[0]["difference"] == 0
    assert 0 < models[1]["difference"] < 0.1


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text("the import statement of a module, and of another module " * 3)
    return tmp_path / "text"


@pytest.mark.reference
@pytest.mark.newest_transformers  # older releases build the routers as Linears, which are measured too
def test_what_is_calibrated_is_converted_verified_and_measured(tmp_path: Path, text: Path) -> None:
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=256, vocabulary=300)
    schemes = dict.fromkeys(EXPERTS, "int4-g128")
    source = write_checkpoint(tmp_path / "in", config=config, scheme=schemes, tokenizer=True).directory
    scales, out = tmp_path / "scales.safetensors", tmp_path / "out"
    asked = ("--requantize", "experts=w4a8-awq", "--calibration", scales)
    listed = "--requantize experts=w4a8-awq: 3.1 MB -> 848.1 kB, exact codes, static fp8"
    assert listed in run_cli("inspect", source, "--sm", 90).out

    measured = run_cli("calibrate", source, scales, "--text", text, "--json").document
    assert (measured["out"], measured["modules"], measured["unreached"]) == (str(scales), 33, [])
    assert "24 quantized modules keep their codes" in run_cli("inspect", source, "--sm", 90, *asked).out
    assert "input_scale" in run_cli("plan", source, "--sm", 90, *asked, "--filter", "input_scale").out
    assert run_cli("convert", source, out, "--sm", 90, *asked).code == 0
    verified = run_cli("verify", source, out, *asked)
    assert "24 native tensors, worst error 0" in verified.out
    assert run_cli("verify", source, out).code == 0

    run_cli("calibrate", source, tmp_path / "others", "--text", text, "--max-tokens", 8)
    other = run_cli("verify", source, out, *asked[:3], tmp_path / "others")
    assert other.code == 1
    assert "input_scale" in other.out
    models = run_cli("perplexity", source, out, "--text", text, "--json").document["models"]
    assert 0 < models[1]["difference"] < 0.1


@pytest.mark.parametrize(("engine", "shown"), [("1.2", True), ("1.3", False)])
def test_coarser_inputs_are_offered_only_where_the_same_codes_have_no_other_kernel(
    mixture: Path, engine: str, shown: bool
) -> None:
    options = ("inspect", mixture, "--sm", 100, "--engine", engine)

    assert ("experts=nvfp4-w4a4: " in run_cli(*options).out) == shown
    listed = run_cli(*options, "--json").document["requantizations"]
    assert {one["option"]: one["needs_calibration"] for one in listed}["experts=nvfp4-w4a4"]


@pytest.mark.reference
def test_experts_that_no_token_reached_are_named(mixture: Path, tmp_path: Path, text: Path) -> None:
    done = run_cli("calibrate", mixture, tmp_path / "scales", "--text", text, "--max-tokens", 2)

    assert "have the largest scale of their layer, as no token reached them" in done.out
    assert ".experts." in done.out


@pytest.mark.reference
@pytest.mark.parametrize("place", ["in", "nowhere/scales"])
def test_a_place_where_no_file_can_be_is_a_usage_error(mixture: Path, tmp_path: Path, text: Path, place: str) -> None:
    done = run_cli("calibrate", mixture, tmp_path / place, "--text", text)

    assert done.code == 2
    assert "a new file in a folder that exists" in done.err_words


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "verify"])
def test_a_calibration_without_a_form_that_reads_it_is_a_usage_error(
    mixture: Path, tmp_path: Path, command: str
) -> None:
    out = [tmp_path / "out"] if command in {"convert", "verify"} else []

    done = run_cli(command, mixture, *out, "--calibration", tmp_path / "scales", *FP8)

    assert done.code == 2
    assert "a form that reads scales of inputs" in done.err_words


@pytest.mark.reference
def test_what_models_generate_stands_side_by_side(mixture: Path, tmp_path: Path) -> None:
    run_cli("convert", mixture, tmp_path / "out", *FP8)
    words = ("--prompt", "the import", "--max-tokens", 3)

    both = run_cli("generate", mixture, tmp_path / "out", *words, "--json").document["models"]

    assert [one["directory"] for one in both] == [str(mixture), str(tmp_path / "out")]
    assert both[1]["text"] == run_cli("generate", tmp_path / "out", *words, "--json").document["text"]
    shown = run_cli("generate", mixture, tmp_path / "out", *words).out
    assert all(str(one["directory"]) in shown for one in both)


@pytest.mark.reference
@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_text_that_can_not_be_read_is_a_usage_error(mixture: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)

    done = run_cli("perplexity", mixture, "--text", tmp_path / "text")

    assert done.code == 2
    assert "text in UTF-8" in done.err_words
