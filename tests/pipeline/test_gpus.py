"""What one GPU needs: the same numbers as a plan for each size, and arithmetic on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline import gpus
from trtllm_ct.pipeline.gpus import MEMORIES, TENSOR_SIZES, GpuRow, gpu_rows
from trtllm_ct.pipeline.open import Checkpoint, open_checkpoint
from trtllm_ct.plan.options import PlanOptions

if TYPE_CHECKING:
    from pathlib import Path


WIDE = {"hidden": 512, "intermediate": 1024, "heads": 8, "kv_heads": 4}
WIDER = {"hidden": 1024, "intermediate": 1024, "heads": 8, "kv_heads": 8}
MIXED = {"q_proj": "int4-g128", "o_proj": "fp8-block", "gate_proj": "int8-channel", "down_proj": "nvfp4"}


def rows_of(directory: Path, **options: Any) -> tuple[GpuRow, ...]:
    checkpoint = open_checkpoint(directory)
    return gpu_rows(checkpoint, checkpoint.plan(**options), PlanOptions(**options))


@pytest.mark.parametrize(
    ("architecture", "scheme", "kv"),
    [
        ("LlamaForCausalLM", "int4-g128", False),
        ("LlamaForCausalLM", "fp8-block", True),
        ("LlamaForCausalLM", MIXED, False),
        ("LlamaForCausalLM", "dense", False),
        ("Phi3ForCausalLM", "fp8-channel-token", False),
        ("MixtralForCausalLM", "fp8-tensor-static", True),
        ("Qwen3MoeForCausalLM", "nvfp4", False),
        ("DeepseekV3ForCausalLM", "fp8-block", False),
    ],
)
@pytest.mark.parametrize("options", [{}, {"to": "dense"}, {"parallel": Parallel(tensor=2)}, {"to": "tensorrt_llm"}])
def test_weights_are_those_of_a_plan_for_the_size(
    tmp_path: Path, architecture: str, scheme: Any, kv: bool, options: dict[str, Any]
) -> None:
    """Whether the row is from the plan for one rank, or from one of its own: at 8 ranks, blocks of 128 are cut."""
    write_checkpoint(tmp_path, config=tiny_config(architecture, **WIDE), scheme=scheme, kv=kv)
    checkpoint = open_checkpoint(tmp_path)

    for row in rows_of(tmp_path, **options):
        if row.weights is None:
            with pytest.raises(Exception, match=r"config.json"):
                checkpoint.plan(**{**options, "parallel": Parallel(tensor=row.tensor)})
            continue
        plan = checkpoint.plan(**{**options, "parallel": Parallel(tensor=row.tensor)})
        assert row.weights == plan.rank_bytes
        assert row.dequantized == sum(module.dequantized for module in plan.modules)
        for room in row.rooms:
            assert room.left == room.gpu - row.weights
            assert row.kv_cache
            assert room.tokens == room.left * 1000 // row.kv_cache


def test_a_plan_that_holds_all_slices_is_the_plan_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, config=tiny_config(**WIDER), scheme="int4-g64")
    checkpoint = open_checkpoint(tmp_path)
    plan = checkpoint.plan()
    monkeypatch.setattr(Checkpoint, "plan_for", lambda *_, **__: pytest.fail("planned again"))

    rows = gpu_rows(checkpoint, plan, PlanOptions())

    assert [row.tensor for row in rows] == [*TENSOR_SIZES]
    assert [row.weights for row in rows] == sorted((row.weights or 0 for row in rows), reverse=True)


def test_sizes_that_are_planned_again_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, config=tiny_config(**{**WIDER, "intermediate": 512}), scheme="fp8-block")
    monkeypatch.setattr(gpus, "_MODULES", 1)

    *known, last = rows_of(tmp_path)

    assert all(row.weights for row in known)
    assert (last.weights, last.kv_cache, last.dequantized) == (None, None, None)
    assert last.reason.endswith("use --tp 8")
    assert all((room.left, room.tokens) == (None, None) for room in last.rooms)


def test_what_ranks_can_not_divide_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config=tiny_config(heads=4, kv_heads=2))

    *known, last = rows_of(tmp_path)

    assert all(row.weights for row in known)
    assert last.reason.startswith("config.json: num_attention_heads: 4, ")


def test_the_size_that_was_asked_for_has_a_row_and_experts_stay_divided(tmp_path: Path) -> None:
    config = tiny_config("Qwen3MoeForCausalLM", **{**WIDE, "heads": 16}, num_experts=16)
    write_checkpoint(tmp_path, config=config)

    rows = rows_of(tmp_path, parallel=Parallel(tensor=16, expert=2))

    assert [row.tensor for row in rows] == [2, 4, 8, 16]


def test_weights_that_do_not_fit_are_negative(tmp_path: Path) -> None:
    row = GpuRow(tensor=1, weights=MEMORIES[1], kv_cache=3, dequantized=0, reason="")

    assert [(room.left, room.tokens) for room in row.rooms[:3]] == [
        (MEMORIES[0] - MEMORIES[1], 0),
        (0, 0),
        (MEMORIES[2] - MEMORIES[1], (MEMORIES[2] - MEMORIES[1]) * 1000 // 3),
    ]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_document_has_the_bytes_of_the_report(tmp_path: Path, size: int) -> None:
    write_checkpoint(tmp_path, config=tiny_config(**WIDE), scheme="int4-g128")

    document = run_cli("inspect", tmp_path, "--tp", size, "--json").document

    (row,) = (row for row in document["gpus"] if row["tensor"] == size)
    assert row["weights"] == document["rank_bytes"]


def test_nothing_of_it_is_computed_for_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    for name in ("gpu_rows", "parts_of"):
        monkeypatch.setattr(f"trtllm_ct.pipeline.inspection.{name}", lambda *_: pytest.fail("computed"))

    assert run_cli("inspect", tmp_path).code == 0
