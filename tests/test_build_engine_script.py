"""examples/build_engine.sh runs against a stand-in for trtllm-build that checks what it is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "build_engine.sh"
# It accepts what trtllm-build needs of a checkpoint directory, and writes an engine directory.
STAND_IN = """#!{python}
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint_dir", type=pathlib.Path, required=True)
parser.add_argument("--output_dir", type=pathlib.Path, required=True)
parser.add_argument("--max_batch_size", type=int, default=0)
parser.add_argument("--max_seq_len", type=int)
parser.add_argument("--use_paged_context_fmha", choices=["enable", "disable"], default="enable")
parser.add_argument("--use_fp8_context_fmha", choices=["enable", "disable"], default="enable")
given = parser.parse_args()
config = json.loads((given.checkpoint_dir / "config.json").read_text())
quantization = config["quantization"]
# The builder reads no hidden file; convert keeps the list of its own files in one.
names = {{path.name for path in given.checkpoint_dir.iterdir() if not path.name.startswith(".")}}
wanted = {{"config.json"}} | {{f"rank{{i}}.safetensors" for i in range(config["mapping"]["world_size"])}}
if quantization["quant_algo"] == "MIXED_PRECISION":
    wanted.add("quant_cfg.json")
    quantization = json.loads((given.checkpoint_dir / "quant_cfg.json").read_text())
    assert quantization["quant_algo"] == "MIXED_PRECISION"
    assert {{block["quant_algo"] for block in quantization["quantized_layers"].values()}}
assert names == wanted, names
scaling, length = config["rotary_scaling"] or {{}}, config["max_position_embeddings"]
longest = length * (scaling["factor"] if scaling.get("rope_type") in ("linear", "yarn") else 1)
longest = longest if given.max_seq_len is None else given.max_seq_len
assert longest <= length, "the rotary table ends before the longest sequence"
# builder.py: build turns each of these on again while the other one is on.
fp8 = quantization["quant_algo"] in ("FP8", "NVFP4") and quantization["kv_cache_quant_algo"] == "FP8"
fp8_attention = fp8 and "enable" in (given.use_paged_context_fmha, given.use_fp8_context_fmha)
plain = [pattern for pattern in quantization.get("exclude_modules") or () if "attention.dense" in pattern]
assert not (fp8_attention and plain), "attention in FP8 without an input scale of its output projection"
given.output_dir.mkdir(parents=True)
summary = {{"max_batch_size": given.max_batch_size, "longest": longest, "fp8_attention": fp8_attention}}
(given.output_dir / "config.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with trtllm-ct of this tree."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _write(folder / "trtllm-ct", f'#!/bin/sh\nexec "{sys.executable}" -m trtllm_ct "$@"\n')
    return folder


def run(programs: Path, *arguments: object, **sizes: str) -> subprocess.CompletedProcess[str]:
    path = f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | sizes,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_converts_verifies_and_builds(programs: Path, tmp_path: Path) -> None:
    _write(programs / "trtllm-build", STAND_IN.format(python=sys.executable))
    config = tiny_config(hidden=256, heads=4, kv_heads=2, intermediate=512, layers=2)
    made = write_checkpoint(tmp_path / "made", config=config, scheme="int4-g64")

    done = run(programs, made.directory, tmp_path / "work", "--max_batch_size", 8, TP="2", PP="2")

    assert done.returncode == 0, done.stderr
    assert built_with(tmp_path)["max_batch_size"] == 8
    assert f"Run it with: mpirun -n 4 python3 run.py --engine_dir {tmp_path}/work/engine" in done.stdout
    assert "good" in done.stdout


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LINEARS = [f"{letter}_proj" for letter in ("q", "k", "v", "gate", "up", "down")]
SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "layers": 2}


def built_with(tmp_path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((tmp_path / "work" / "engine" / "config.json").read_text())
    return document


@pytest.mark.parametrize(
    ("architecture", "scheme", "more", "run_option"),
    [
        ("LlamaForCausalLM", "int4-g64", {"rope_parameters": YARN}, ""),
        ("MistralForCausalLM", "int4-g64", {"sliding_window": 64}, " --max_attention_window_size 64 "),
        (
            "Qwen2ForCausalLM",
            "int4-g64",
            {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
            " --max_attention_window_size 256 64 ",
        ),
        ("LlamaForCausalLM", dict.fromkeys(LINEARS, "fp8-tensor-static"), {}, ""),
        ("LlamaForCausalLM", dict.fromkeys(LINEARS[:3], "fp8-tensor-static") | {"down_proj": "int4-g64"}, {}, ""),
        ("LlamaForCausalLM", "fp8-tensor-static", {}, ""),
    ],
    ids=["yarn", "window", "windows of layers", "plain o_proj beside FP8", "several modes", "FP8"],
)
def test_builder_and_run_get_what_the_directory_can_not_say(
    architecture: str, scheme: Any, more: dict[str, Any], run_option: str, programs: Path, tmp_path: Path
) -> None:
    _write(programs / "trtllm-build", STAND_IN.format(python=sys.executable))
    fp8 = "fp8-tensor-static" in str(scheme)
    config = tiny_config(architecture, **SIZES, **more)
    made = write_checkpoint(tmp_path / "made", config=config, scheme=scheme, kv=fp8)

    done = run(programs, made.directory, tmp_path / "work")

    assert done.returncode == 0, done.stderr
    assert built_with(tmp_path)["longest"] == 256
    assert built_with(tmp_path)["fp8_attention"] is (scheme == "fp8-tensor-static")
    assert ("--max_attention_window_size" in done.stdout) is bool(run_option)
    assert run_option in done.stdout
    assert "no engine was built from it here" in done.stderr


def test_what_the_caller_asks_of_the_builder_decides(programs: Path, tmp_path: Path) -> None:
    _write(programs / "trtllm-build", STAND_IN.format(python=sys.executable))
    config = tiny_config(**SIZES, rope_parameters=YARN)
    made = write_checkpoint(tmp_path / "made", config=config, scheme="int4-g64")

    done = run(programs, made.directory, tmp_path / "work", "--max_seq_len", 32)

    assert done.returncode == 0, done.stderr
    assert built_with(tmp_path)["longest"] == 32


def test_a_refusal_is_shown(programs: Path, tmp_path: Path) -> None:
    _write(programs / "trtllm-build", STAND_IN.format(python=sys.executable))
    made = write_checkpoint(tmp_path / "made", config=tiny_config(**SIZES), scheme="int4-g32")

    done = run(programs, made.directory, tmp_path / "work")

    assert done.returncode == 1
    assert "groups of 64 and 128 columns only" in done.stderr
    assert not (tmp_path / "work" / "engine").exists()


def test_without_trtllm_build_it_says_what_to_use_instead(programs: Path, tmp_path: Path) -> None:
    done = run(programs, tmp_path / "made")

    assert done.returncode == 1
    assert "--to modelopt" in done.stderr


def test_without_a_directory_it_shows_its_usage(programs: Path) -> None:
    assert run(programs).returncode == 2


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
