"""Which other option would keep the codes of the modules that cost most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

from trtllm_ct.base.texts import format_bytes
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline import alternatives
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import Checkpoint, plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.plan import Plan

WIDE = {"hidden": 512, "intermediate": 1024, "heads": 4, "kv_heads": 4}
LLM = "LLM with this package installed (--to tensorrt_llm)"


@pytest.mark.parametrize(
    ("scheme", "options", "change", "changed"),
    [
        ("int4-g64-asym", {}, LLM, {"to": "tensorrt_llm"}),
        ("nvfp4a16", {}, "--engine stock-1.3", {"engine": "stock-1.3"}),
        ("mxfp4a16", {}, "--sm 100", {"sm": 100}),
        ("mxfp4a16", {"sm": 90}, "--sm 100", {"sm": 100}),
    ],
)
def test_the_option_that_works_is_named_with_the_bytes(
    tmp_path: Path, scheme: str, options: dict[str, Any], change: str, changed: dict[str, Any]
) -> None:
    write_checkpoint(tmp_path, config=tiny_config(**WIDE), scheme=scheme)
    got = inspect_checkpoint(tmp_path, **options).alternative

    plan = plan_checkpoint(tmp_path, **{**options, **changed})
    assert not any(module.dequantized for module in plan.modules)
    assert got == f"{change} keeps the codes of these modules: {format_bytes(plan.delivered_bytes)} in all"


def test_a_tensor_parallel_size_that_works_is_named(tmp_path: Path) -> None:
    """Blocks of 128 columns in 512 can't be divided among 8 ranks."""
    config = tiny_config(hidden=512, intermediate=1024, heads=8, kv_heads=8)
    write_checkpoint(tmp_path, config=config, scheme={"o_proj": "fp8-block"})

    got = inspect_checkpoint(tmp_path, parallel=Parallel(tensor=8)).alternative

    assert got.startswith("--tp 1 keeps the codes of these modules: ")


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("int8-g32", {}), ("int4-g128", {}), ("dense", {}), ("int4-g64-asym", {"to": "dense"})],
    ids=["none works", "nothing is dequantized", "nothing is quantized", "all is dequantized on purpose"],
)
def test_nothing_is_named(tmp_path: Path, scheme: str, options: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, config=tiny_config(**WIDE), scheme=scheme)
    assert inspect_checkpoint(tmp_path, **options).alternative == ""


def test_changes_are_tried_while_the_model_is_small_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, config=tiny_config(**WIDE), scheme="nvfp4a16")
    plan = inspect_checkpoint(tmp_path).plan
    assert plan is not None
    for modules, found in ((len(plan.modules), "--engine stock-1.3"), (len(plan.modules) - 1, "")):
        monkeypatch.setattr(alternatives, "_MODULES", modules)
        assert inspect_checkpoint(tmp_path).alternative[:18] == found


def test_inspection_of_a_model_too_large_for_changes_makes_one_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inspect` of 10^5 modules takes no longer for what it may find."""
    write_checkpoint(tmp_path, config=tiny_config(**WIDE), scheme="nvfp4a16")
    monkeypatch.setattr(alternatives, "_MODULES", 1)
    calls: list[None] = []
    whole = Checkpoint.plan_for

    def counted(self: Checkpoint, *arguments: Any, **options: Any) -> Plan:
        calls.append(None)
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Checkpoint, "plan_for", counted)

    inspect_checkpoint(tmp_path)

    assert len(calls) == 1


@pytest.mark.parametrize(
    ("scheme", "options", "best"),
    [
        ("mxfp4a16", {}, "--engine stock-1.2 --sm 100"),
        ("nvfp4a16", {}, "--engine stock-1.3 --sm 100"),
        ("nvfp4a16", {"to": "tensorrt_llm", "sm": 90}, "--engine stock-1.3 --sm 100"),
    ],
)
def test_the_release_and_gpu_that_serve_most_are_named(
    tmp_path: Path, scheme: str, options: dict[str, Any], best: str
) -> None:
    write_checkpoint(tmp_path, config=tiny_config(**WIDE), scheme=scheme)

    found = inspect_checkpoint(tmp_path, **options, compare_places=True).elsewhere

    assert found is not None
    assert len(found) == len({(served.engine, served.sm) for served in found}) == 12 + (options.get("sm") is None)
    assert (found[0].engine, found[0].sm) == ("stock-1.2", options.get("sm"))
    for served in found:
        plan = plan_checkpoint(tmp_path, **{**options, "engine": served.engine, "sm": served.sm})
        kept = [module for module in plan.modules if module.layer is not None]
        assert (served.kept, served.quantized) == (len(kept), 14)
        assert served.deviating == sum(bool(module.note) for module in kept)
        assert served.delivered_bytes == plan.delivered_bytes
    assert alternatives.elsewhere_text(found).startswith(f"{best} serves most of it natively: 14 of 14 quantized")


@pytest.mark.parametrize("scheme", ["int8-g32", "int4-g128"], ids=["nothing holds it", "all hold it"])
def test_no_better_place_is_said(tmp_path: Path, scheme: str) -> None:
    write_checkpoint(tmp_path, config=tiny_config(**WIDE), scheme=scheme)

    done = run_cli("inspect", tmp_path, "--elsewhere")

    assert "Elsewhere: none of 12 other releases and GPUs keeps the codes of more modules" in done.out


def test_places_are_compared_only_if_asked_and_while_the_model_is_small_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, config=tiny_config(**WIDE), scheme="mxfp4a16")
    inspection = inspect_checkpoint(tmp_path)
    assert inspection.plan is not None
    assert inspection.elsewhere is None
    assert inspect_checkpoint(tmp_path, "dense", compare_places=True).elsewhere == ()
    monkeypatch.setattr(alternatives, "_MODULES_ELSEWHERE", 2 * len(inspection.plan.modules))
    found = inspect_checkpoint(tmp_path, compare_places=True).elsewhere
    assert found is not None
    assert [(served.engine, served.sm) for served in found] == [
        ("stock-1.2", None),
        ("stock-1.2", 100),
        ("stock-1.3", 100),
    ]


def test_the_report_says_it_below_the_cost(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config=tiny_config(**WIDE), scheme="int4-g64-asym")

    lines = run_cli("inspect", tmp_path).out.splitlines()

    cost = next(number for number, line in enumerate(lines) if "cost most" in line)
    assert lines[cost + 1].strip() == inspect_checkpoint(tmp_path).alternative
    assert run_cli("inspect", tmp_path, "--json").document["alternative"] == lines[cost + 1].strip()
