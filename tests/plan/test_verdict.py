"""The sentence at the head of an inspection: who serves the model, in which modes, and at what cost."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.plan.verdict import family_note, largest_cost

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.pipeline.inspection import Inspection

BYTES = r"[\d.]+ kB (become [\d.]+ kB \([\d.]+ x\)|stay [\d.]+ kB)\.$"


def inspected(directory: Path, scheme: Any, *, to: str = "modelopt", name: str = "LlamaForCausalLM") -> Inspection:
    config = tiny_config(name, layers=2, hidden=128, intermediate=128)
    write_checkpoint(directory, config=config, scheme=scheme)
    return inspect_checkpoint(directory, to)


@pytest.mark.parametrize(
    ("scheme", "to", "modes"),
    [
        ("int4-g64", "modelopt", "All 14 quantized modules keep their codes in W4A16_AWQ g64; "),
        ("int8-g32", "modelopt", "All 14 quantized modules are dequantized; "),
        ("int4-g64", "dense", "All 14 quantized modules are dequantized; "),
        ("dense", "modelopt", "Nothing is quantized; "),
        (
            {"o_proj": "int8-g32", "mlp": "int4-g64", "qkv": "int4-g128"},
            "modelopt",
            "12 of 14 quantized modules keep their codes in W4A16_AWQ g128, W4A16_AWQ g64, 2 are dequantized; ",
        ),
    ],
)
def test_modes_and_bytes(tmp_path: Path, scheme: Any, to: str, modes: str) -> None:
    verdict = inspected(tmp_path, scheme if isinstance(scheme, str) else _by_leaf(**scheme), to=to).verdict

    assert verdict.startswith(modes)
    assert re.search(BYTES, verdict)


def _by_leaf(*, o_proj: str, mlp: str, qkv: str) -> dict[str, str]:
    leaves = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), mlp)
    return leaves | dict.fromkeys(("q_proj", "k_proj", "v_proj"), qkv) | {"o_proj": o_proj}


def test_a_class_that_the_release_lacks(tmp_path: Path) -> None:
    found = inspected(tmp_path, "int4-g64", name="GraniteForCausalLM")

    assert found.problems
    assert found.verdict.startswith("TensorRT-LLM (stock-1.2) can't serve it; all 14 quantized modules keep ")


def test_a_class_that_no_row_describes(tmp_path: Path) -> None:
    """The plan is for `dense` then, which serves it: the problem is that of the target that was asked for."""
    write_checkpoint(tmp_path, scheme="int4-g64", config=tiny_config(architectures=["GrokForCausalLM"]))
    found = inspect_checkpoint(tmp_path)

    assert found.problems
    assert found.verdict.startswith("Planned for target dense instead; all 14 quantized modules are dequantized; ")


def test_without_a_plan_there_is_no_verdict(tmp_path: Path) -> None:
    inspected(tmp_path, "int4-g64")
    (tmp_path / "model.safetensors").unlink()

    assert inspect_checkpoint(tmp_path).verdict == ""


def test_what_costs_most_is_named_with_its_bytes_and_reason(tmp_path: Path) -> None:
    """Experts are dequantized here; the reason names the release or GPU that would hold them, if there is one."""
    config = tiny_config("MixtralForCausalLM", layers=2, hidden=128, intermediate=128, experts=4)
    write_checkpoint(tmp_path, config=config, scheme="int4-g64")
    plan = inspect_checkpoint(tmp_path).plan
    assert plan is not None
    experts = [module for module in plan.modules if module.dequantized]
    more = sum(module.delivered_bytes - module.stored_bytes for module in experts)

    cost = largest_cost(plan)

    assert len(experts) == 24
    assert cost.startswith(f"24 dequantized modules of routed experts cost most, {more / 1000:.1f} kB more: ")
    assert cost.endswith(experts[0].reason)


def test_nothing_costs_where_nothing_is_dequantized(tmp_path: Path) -> None:
    plan = inspected(tmp_path, "int4-g64").plan
    assert plan is not None
    assert largest_cost(plan) == ""


@pytest.mark.parametrize(
    ("scheme", "to", "note"),
    [
        ("int4-g64", "modelopt", "W4A16_GPTQ as W4A16_AWQ: the scheme family says how weights were quantized; "),
        ("int8-channel", "modelopt", ""),
        ("int4-g64", "dense", ""),
        ("dense", "modelopt", ""),
        (
            {"o_proj": "int4-g64", "mlp": "fp8-block", "qkv": "int4-g128"},
            "modelopt",
            "W4A16_GPTQ as W4A16_AWQ: the scheme family ",
        ),
    ],
)
def test_modes_with_another_name_than_the_family_are_explained_once(
    tmp_path: Path, scheme: Any, to: str, note: str
) -> None:
    inspection = inspected(tmp_path, scheme if isinstance(scheme, str) else _by_leaf(**scheme), to=to)

    assert inspection.plan is not None
    assert family_note(inspection.plan).startswith(note)
    assert bool(family_note(inspection.plan)) is bool(note)
    assert run_cli("inspect", tmp_path, "--to", to).out.count("the scheme family says") == bool(note)
