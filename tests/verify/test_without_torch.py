"""`verify` never imports torch, whose import takes longer than the conversion of a small model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from builders import rewrite, tiny_config, write_checkpoint
from fresh_python import run_python
from fused_experts import fuse_experts

from trtllm_ct.convert.convert import convert_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SMALL = tiny_config(hidden=128, kv_heads=4, intermediate=128, layers=1, vocabulary=32)
MIXTURE = tiny_config("Qwen3MoeForCausalLM", hidden=128, moe_intermediate_size=128, layers=1, vocabulary=32)
Q = "model.layers.0.self_attn.q_proj"
VERIFY = """
import json, sys
from trtllm_ct import verify_checkpoint

source, *outputs = sys.argv[1:]
faults = [str(fault) for out in outputs or [None] for fault in verify_checkpoint(source, out).faults]
print(json.dumps([faults, "numpy" in sys.modules, "torch" in sys.modules]))
"""
COMMAND = """
import sys
from trtllm_ct.cli.commands import main

sys.argv = ["trtllm-ct", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules
"""


def verified(*directories: Path) -> list[str]:
    """The faults that a process of its own finds, which must not have imported torch."""
    faults, numpy, torch = json.loads(run_python(VERIFY, *directories).stdout)
    assert (numpy, torch) == (True, False)
    return faults


@pytest.mark.parametrize(
    "scheme",
    [
        "dense",
        "int4-g64",
        "int4-g32-asym",
        "int4-g64-actorder",
        "int3-g64",
        "int8-plain-channel-asym",
        "w8a8-static",
        "fp8-tensor-static",
        "fp8-channel-token",
        "fp8-block",
        "nvfp4",
        "mxfp4a16",
        "mxfp6a8",
        "mxfp8",
    ],
)
def test_conversions_of_every_kind(tmp_path: Path, scheme: str) -> None:
    write_checkpoint(tmp_path / "in", config=SMALL, scheme=scheme, kv=True)
    for to in ("modelopt", "dense"):
        convert_checkpoint(tmp_path / "in", tmp_path / to, to=to, engine="stock-1.3")

    assert verified(tmp_path / "in", tmp_path / "modelopt", tmp_path / "dense") == []


@pytest.mark.parametrize("scheme", ["dense", "nvfp4"])
def test_experts_that_are_stored_together(tmp_path: Path, scheme: str) -> None:
    write_checkpoint(tmp_path / "in", config=MIXTURE, scheme=scheme, edit=fuse_experts)
    convert_checkpoint(tmp_path / "in", tmp_path / "out")

    assert verified(tmp_path / "in", tmp_path / "out") == []


def test_a_source_alone_and_its_faults(tmp_path: Path) -> None:
    def spoil(stored: dict[str, Tensor]) -> None:
        stored[f"{Q}.weight_scale"][3, 0] = float("nan")

    write_checkpoint(tmp_path / "good", config=SMALL, scheme="fp8-channel-token")
    write_checkpoint(tmp_path / "bad", config=SMALL, scheme="fp8-channel-token", edit=spoil)

    assert verified(tmp_path / "good") == []
    (fault,) = verified(tmp_path / "bad")
    assert f"{Q}.weight_scale[3, 0]" in fault


def test_a_damaged_conversion(tmp_path: Path) -> None:
    def spoil(stored: dict[str, Tensor]) -> None:
        stored[f"{Q}.weight"][5, 7] ^= 0x10
        stored.pop("model.norm.weight")

    write_checkpoint(tmp_path / "in", config=SMALL, scheme="int4-g64")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    rewrite(tmp_path / "out", spoil)

    found = " ".join(verified(tmp_path / "in", tmp_path / "out"))
    assert f"{Q}.weight, row 11" in found
    assert "model.norm.weight" in found


@pytest.mark.parametrize("arguments", ["verify in out", "verify in out --json", "verify out --tp 2"])
def test_the_command(tmp_path: Path, arguments: str) -> None:
    write_checkpoint(tmp_path / "in", config=SMALL, scheme="int4-g64")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    places = {"in": tmp_path / "in", "out": tmp_path / "out"}

    run_python(COMMAND, *(places.get(argument, argument) for argument in arguments.split()))
