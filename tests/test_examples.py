"""The programs in examples/ run as they stand, and on a directory that is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import tiny_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "01_inspect": "28 modules: pack-quantized: int4 group 128 -> W4A16_AWQ g128",
    "02_convert_modelopt": "28 modules: W4A16_AWQ g128",
    "03_load_weights": "pre_quant_scale: torch.bfloat16 [256]",
    "04_verify": "39 tensors are those of the source.",
    "05_reference_engine": "(40 tokens in",
    "serve_with_trtllm": "The import statement\nis semantically equivalent",
}


def run(example: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(example), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def marked(example: Path) -> object:
    marks = [pytest.mark.reference] if example.stem in {"05_reference_engine", "serve_with_trtllm"} else []
    return pytest.param(example, id=example.stem, marks=marks)


@pytest.mark.parametrize("example", [marked(example) for example in EXAMPLES])
def test_examples_run_as_they_stand(example: Path) -> None:
    assert SAYS[example.stem] in run(example)


def test_examples_take_a_directory(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "made", config=tiny_config(hidden=128), scheme="int4-g32")

    assert "14 modules: pack-quantized: int4 group 32 -> dequantized" in run(EXAMPLES[0], made.directory)
