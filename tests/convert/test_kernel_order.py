"""Target `engine` with consent: integer codes in the order of one generation's kernels, which config.json names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import write_checkpoint
from engine_files import EngineFiles
from tiny_models import tiny_config

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocabulary": 97, "layers": 3}
FOUR = Parallel(tensor=4)
TWO_BY_TWO = Parallel(tensor=2, pipeline=2)
SCHEMES = {
    "int4-g64": "W4A16_GPTQ",
    "int4-g128": "W4A16_GPTQ",
    "int4-channel": "W4A16_GPTQ",
    "int4-plain-g64": "W4A16_GPTQ",
    "int3-g64": "W4A16_GPTQ",
    "int4-g64-asym": "W4A16_GPTQ",
    "int4-channel-asym": "W4A16_GPTQ",
    "int8-g64": "W8A16_GPTQ",
    "int8-channel-asym": "W8A16_GPTQ",
}


def config(**more: Any) -> dict[str, Any]:
    return tiny_config("LlamaForCausalLM", **SIZES | more)


def permuted(source: Path, out: Path, sm: int, parallel: Parallel = FOUR, **options: Any) -> EngineFiles:
    convert_checkpoint(source, out, to="engine", parallel=parallel, sm=sm, untested=True, **options)
    files = EngineFiles(out, sm=sm)
    files.check_tensors()
    return files


def assert_close(files: EngineFiles, dense: dict[str, Tensor]) -> None:
    """Every weight is code * scale + zero of the source, where zeros may be rounded once to bfloat16."""
    weights, zeros = files.weights(), files.zeros()
    assert weights.keys() == dense.keys()
    for name, want in dense.items():
        bound = 1e-6 * want.abs().amax(-1, keepdim=True) + (zeros[name] * 2**-8 * (1 + 2**-7) if name in zeros else 0)
        assert bool(((weights[name] - want).abs() <= bound).all()), name


@pytest.mark.parametrize("sm", [80, 89, 90])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_of_that_gpu_computes_with_the_weights_of_the_source(scheme: str, sm: int, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme=scheme)
    for parallel in (FOUR, TWO_BY_TWO):
        files = permuted(built.directory, tmp_path / f"out{parallel.pipeline}", sm, parallel)
        assert (files.algo, files.config["producer"]["sm"]) == (SCHEMES[scheme], sm)
        assert_close(files, built.dense)


def test_symmetric_weights_have_zeros_of_zero(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme="int4-g64")

    files = permuted(built.directory, tmp_path / "out", 80)

    assert files.quantization["has_zero_point"] is True
    assert not any(tensor.any() for part in files.files for name, tensor in part.items() if name.endswith(".zero"))


def test_the_file_of_one_generation_is_another_matrix_on_another(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme="int4-g64")

    files = permuted(built.directory, tmp_path / "out", 90)

    elsewhere = EngineFiles(tmp_path / "out", sm=80).weights()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(elsewhere[name], files.weights()[name])


def test_a_bias_that_the_kernel_adds_is_zero_on_all_ranks_but_the_first(tmp_path: Path) -> None:
    """The loader leaves such files as they are, and the outputs of ranks are added up after the kernel."""
    built = write_checkpoint(
        tmp_path / "source", config=config(attention_bias=True, mlp_bias=True), scheme="int4-g64-asym"
    )

    files = permuted(built.directory, tmp_path / "out", 80)

    biases = [part["transformer.layers.1.attention.dense.bias"] for part in files.files]
    assert [bool(bias.any()) for bias in biases] == [True, False, False, False]
    assert all(bool(part["transformer.layers.1.attention.qkv.bias"].any()) for part in files.files)
    assert_close(files, built.dense)


def test_plain_linears_beside_them_keep_their_bias_on_every_rank(tmp_path: Path) -> None:
    """They add it after the ranks are added up, and the loader of these files zeroes nothing."""
    scheme = dict.fromkeys([f"{part}_proj" for part in ("q", "k", "v", "gate", "up", "down")], "int4-g64")
    built = write_checkpoint(tmp_path / "source", config=config(attention_bias=True, mlp_bias=True), scheme=scheme)

    files = permuted(built.directory, tmp_path / "out", 90)

    assert files.excluded("transformer.layers.0.attention.dense")
    assert_close(files, built.dense)


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("LlamaForCausalLM", {"tied": True}),
        ("MistralForCausalLM", {}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
    ],
)
def test_every_class_has_them(architecture: str, more: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_config(architecture, **SIZES | more)
    built = write_checkpoint(tmp_path / "source", config=source, scheme="int4-g64", kv=True)

    files = permuted(built.directory, tmp_path / "out", 80, dtype="float16")

    assert (files.algo, files.quantization["kv_cache_quant_algo"]) == ("W4A16_GPTQ", "FP8")
    head = {"lm_head.weight": built.dense["model.embed_tokens.weight"]} if more.get("tied") else {}
    assert_close(files, built.dense | head)


@pytest.mark.parametrize("scheme", ["fp8-channel-token", "int8-channel"])
def test_weights_with_a_form_for_all_gpus_keep_it(scheme: str, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme=scheme)
    convert_checkpoint(built.directory, tmp_path / "asked", to="engine", sm=90, untested=True)
    convert_checkpoint(built.directory, tmp_path / "plain", to="engine")

    for name in ("config.json", "rank0.safetensors"):
        assert (tmp_path / "asked" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_without_consent_an_sm_changes_nothing(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme="int4-g64")
    convert_checkpoint(built.directory, tmp_path / "asked", to="engine", sm=80)
    convert_checkpoint(built.directory, tmp_path / "plain", to="engine")

    assert json.loads((tmp_path / "asked" / "config.json").read_text())["quantization"]["quant_algo"] == "W4A16_AWQ"
    for name in ("config.json", "rank0.safetensors"):
        assert (tmp_path / "asked" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("scheme", ["int4-g64", "int4-g64-asym", "int8-g64"])
def test_the_bytes_do_not_depend_on_the_size_of_tiles(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(attention_bias=True), scheme=scheme)
    permuted(built.directory, tmp_path / "whole", 80, TWO_BY_TWO)
    monkeypatch.setattr("trtllm_ct.convert.tiles.TILE_BYTES", 1 << 13)
    permuted(built.directory, tmp_path / "tiled", 80, TWO_BY_TWO)

    for rank in range(4):
        file = f"rank{rank}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "tiled" / file).read_bytes()
