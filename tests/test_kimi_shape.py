"""The largest checkpoints that people have are planned from headers, in seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from kimi_shape import write_kimi_shape

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kimi")
    assert write_kimi_shape(directory) == 208_215
    return directory


def run(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trtllm_ct", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    # Import times are a list of everything that was imported.
    assert not [line for line in done.stderr.splitlines() if line.endswith(("| torch", "| transformers"))]
    document: dict[str, object] = json.loads(done.stdout)
    return document


def test_inspect_names_every_row_without_torch(kimi: Path) -> None:
    found = run("inspect", str(kimi))

    assert found["problems"] == []
    schemes = {(row["scheme"], row["mode"]): len(row["modules"]) for row in found["schemes"]}  # type: ignore[attr-defined]
    assert schemes == {
        ("pack-quantized: int4 group 32", "dequantized"): 60 * 384 * 3,
        ("plain", "plain"): 795,
    }


def test_plan_accounts_for_every_tensor_once(kimi: Path) -> None:
    found = run("plan", str(kimi), "--to", "modelopt")

    stored = found["stored"]
    assert isinstance(stored, list)
    assert len({entry["name"] for entry in stored}) == len(stored) == 208_215
    assert {entry["fate"] for entry in stored} == {"consumed", "copied"}
    # A router is bfloat16 though ignore does not list it: the tensors decide.
    router = next(entry for entry in stored if entry["name"] == "model.layers.1.mlp.gate.weight")
    assert router["fate"] == "copied"
