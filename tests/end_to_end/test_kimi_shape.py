"""The largest checkpoints that people have are inspected and planned from headers, in seconds and without torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from fresh_python import run_python

from benchmarks.kimi import KimiShape

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = 208_215
CODE = """
import json, sys
from collections import Counter
from trtllm_ct import inspect_checkpoint

found = inspect_checkpoint(sys.argv[1])
fates = list(found.plan.fates())
print(json.dumps({
    "problems": len(found.problems),
    "rows": [[row.stored_scheme, row.delivered_mode, len(row.modules)] for row in found.rows()],
    "stored": len({fate.name for fate in fates}),
    "fates": Counter(fate.fate for fate in fates),
    "router": next(fate.fate for fate in fates if fate.name == "model.layers.1.mlp.gate.weight"),
    "heavy": sorted({"torch", "transformers"} & set(sys.modules)),
}))
"""


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory: Path = tmp_path_factory.mktemp("kimi")
    assert KimiShape().write(directory) == TENSORS
    summary: dict[str, Any] = json.loads(run_python(CODE, directory).stdout)
    return summary


def test_nothing_heavy_is_imported(kimi: dict[str, Any]) -> None:
    assert kimi["heavy"] == []


def test_every_module_has_its_row(kimi: dict[str, Any]) -> None:
    assert kimi["problems"] == 0
    assert kimi["rows"] == [
        ["pack-quantized: int4 group 32", "dequantized", 60 * 384 * 3],
        ["plain", "plain", 795],
    ]


def test_every_tensor_has_one_fate(kimi: dict[str, Any]) -> None:
    assert kimi["stored"] == TENSORS
    assert sum(kimi["fates"].values()) == TENSORS
    assert kimi["fates"].keys() == {"consumed", "copied"}


def test_a_router_is_plain_though_ignore_does_not_list_it(kimi: dict[str, Any]) -> None:
    assert kimi["router"] == "copied"
