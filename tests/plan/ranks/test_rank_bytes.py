"""The bytes of the weights of one rank, from the slices that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

from trtllm_ct.base.texts import format_bytes
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.plan import Plan


def plan_of(directory: Path, parallel: Parallel, to: str = "modelopt", scheme: Any = "dense", **sizes: Any) -> Plan:
    if not directory.exists():
        write_checkpoint(directory, config=tiny_config(**sizes), scheme=scheme)
    return plan_checkpoint(directory, to, parallel=parallel)


def delivered(plan: Plan, *ends: str) -> int:
    """Return the bytes of the delivered tensors with these ends of names."""
    return sum(delivery.spec.nbytes for delivery in plan.deliveries() if delivery.name.endswith(ends))


def test_one_rank_holds_everything(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "in", Parallel(), scheme="int4-g32")
    assert plan.rank_bytes == plan.delivered_bytes


def test_plain_weights_are_divided_and_norms_are_not(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "in", Parallel(tensor=2))

    norms = delivered(plan, "norm.weight")
    assert norms > 0
    assert plan.rank_bytes == norms + (plan.delivered_bytes - norms) // 2


@pytest.mark.parametrize(
    ("scheme", "whole"),
    [
        ("int4-g128", ()),
        ("fp8-channel-token", ("o_proj.weight_scale", "down_proj.weight_scale")),
        ("fp8-tensor-static", ("_scale",)),
    ],
)
def test_scales_are_divided_where_they_belong_to_rows_or_columns(
    tmp_path: Path, scheme: str, whole: tuple[str, ...]
) -> None:
    """A Linear whose columns are divided has all scales of rows on every rank; its rows are as many as its columns."""
    sizes = {"hidden": 256, "intermediate": 256, "heads": 4, "kv_heads": 4}
    plan = plan_of(tmp_path / "in", Parallel(tensor=2), scheme=scheme, **sizes)

    undivided = delivered(plan, "norm.weight", *whole)
    assert not any(module.dequantized for module in plan.modules)
    assert plan.rank_bytes == undivided + (plan.delivered_bytes - undivided) // 2


def test_a_head_of_keys_is_on_several_ranks(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "in", Parallel(tensor=4), heads=4, kv_heads=2)

    norms, keys = delivered(plan, "norm.weight"), delivered(plan, "k_proj.weight", "v_proj.weight")
    assert plan.rank_bytes == norms + keys // 2 + (plan.delivered_bytes - norms - keys) // 4


def test_the_first_rank_has_a_row_more_of_a_vocabulary(tmp_path: Path) -> None:
    even, odd = (plan_of(tmp_path / str(size), Parallel(tensor=2), vocabulary=size) for size in (64, 65))

    row = delivered(even, "embed_tokens.weight") // 64
    assert row > 0
    assert odd.rank_bytes - even.rank_bytes == 2 * row


@pytest.mark.parametrize("layers", [4, 5])
def test_a_stage_has_its_layers(tmp_path: Path, layers: int) -> None:
    """The first stages have one layer more; the table is in the first, the head in the last, the last norm in each."""
    plan = plan_of(tmp_path / "in", Parallel(pipeline=2), layers=layers)

    layer = sum(module.delivered_bytes for module in plan.modules if ".layers.0." in module.name)
    table = delivered(plan, "embed_tokens.weight")
    assert delivered(plan, "lm_head.weight") == table
    assert plan.rank_bytes == -(-layers // 2) * layer + table + delivered(plan, "model.norm.weight")


@pytest.mark.parametrize(("tensor", "expert"), [(2, 1), (2, 2), (4, 2)])
def test_experts_are_divided_by_expert_and_by_slice(tmp_path: Path, tensor: int, expert: int) -> None:
    plan = plan_of(
        tmp_path / "in",
        Parallel(tensor=tensor, expert=expert),
        architecture="Qwen3MoeForCausalLM",
        heads=4,
        kv_heads=4,
    )

    routed = sum(module.delivered_bytes for module in plan.modules if ".mlp.experts." in module.name)
    whole = delivered(plan, "norm.weight", ".mlp.gate.weight")
    assert routed > 0
    assert plan.rank_bytes == whole + (plan.delivered_bytes - whole) // tensor


@pytest.mark.parametrize("sizes", [Parallel(), Parallel(tensor=2), Parallel(tensor=2, pipeline=2)], ids=str)
def test_files_of_ranks_have_these_bytes(tmp_path: Path, sizes: Parallel) -> None:
    plan = plan_of(
        tmp_path / "in", sizes, to="engine", scheme="int4-g64", dtype="float16", hidden=128, intermediate=128
    )

    convert_checkpoint(tmp_path / "in", tmp_path / "out", to="engine", parallel=sizes)

    files = [*(tmp_path / "out").glob("rank*.safetensors")]
    assert len(files) == sizes.tensor * sizes.pipeline
    headers = [file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    assert plan.rank_bytes == max(headers)


@pytest.mark.parametrize(
    ("architecture", "most"),
    [
        ("Phi3ForCausalLM", 0.51),
        ("Qwen3MoeForCausalLM", 0.51),
        ("MixtralForCausalLM", 0.51),
        ("DeepseekV3ForCausalLM", 0.7),
    ],
)
def test_classes_divide_almost_all_of_their_weights(tmp_path: Path, architecture: str, most: float) -> None:
    """Among them Linears of queries, keys and values. DeepSeek has small ones that every rank has whole."""
    one, two = (plan_of(tmp_path / "in", Parallel(tensor=size), architecture=architecture, layers=4) for size in (1, 2))

    assert one.rank_bytes == one.delivered_bytes
    assert one.rank_bytes / 2 <= two.rank_bytes <= most * one.rank_bytes


def test_reports_name_the_bytes_of_a_rank(tmp_path: Path) -> None:
    directory = tmp_path / "in"
    plan = plan_of(directory, Parallel(tensor=2))

    for command in ("inspect", "plan"):
        report, alone = (run_cli(command, directory, "--tp", size) for size in (2, 1))
        words = "weights of one rank at tp 2, pp 1, ep 1: "
        assert f"{words}{format_bytes(plan.rank_bytes)}" in report.out
        assert words not in alone.out
        assert run_cli(command, directory, "--tp", 2, "--json").document["rank_bytes"] == plan.rank_bytes
