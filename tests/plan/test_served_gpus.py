"""A plan names the GPUs whose kernels have all of its modes, and none is a problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

from trtllm_ct.engine.platform import SMS
from trtllm_ct.engine.target import ENGINES
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

SIZES: dict[str, Any] = {"hidden": 256, "intermediate": 256, "heads": 4, "kv_heads": 2, "layers": 1}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def written(directory: Path, attention: str, mlp: str, architecture: str = "LlamaForCausalLM") -> Path:
    experts = {"moe_intermediate_size": 256} if "Moe" in architecture else {}
    scheme = {**dict.fromkeys(ATTENTION, attention), **dict.fromkeys(MLP, mlp)}
    return write_checkpoint(directory, config=tiny_config(architecture, **SIZES, **experts), scheme=scheme).directory


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "scheme", ["int4-g128", "int4-channel", "int8-channel", "fp8-channel-token", "fp8-block", "nvfp4", "mxfp4", "dense"]
)
def test_a_gpu_is_named_if_and_only_if_it_keeps_all_modes(tmp_path: Path, scheme: str, engine: str) -> None:
    """What is planned for one SM is the same there, unless the SM has more modes."""
    source = written(tmp_path, scheme, scheme)
    plan = plan_checkpoint(source, engine=engine)
    assert plan.sms is not None

    for sm in SMS:
        kept = plan_checkpoint(source, engine=engine, sm=sm).by_name
        keeps_all = all(kept[module.name].keeps_codes for module in plan.modules if module.keeps_codes)
        assert (sm in plan.sms) == keeps_all, sm


def test_modes_that_no_gpu_has_together_are_a_problem(tmp_path: Path) -> None:
    source = written(tmp_path, "int4-g128", "nvfp4")

    plan = plan_checkpoint(source, engine="stock-1.0")
    done = run_cli("inspect", source, "--engine", "1.0", "--json")

    assert plan.sms == ()
    [problem] = plan.problems
    assert "no exact NVFP4 Linear on SM89 and SM90" in problem.found
    assert "no exact W4A16_AWQ Linear on SM" in problem.found
    assert done.code == 1
    assert done.document["sms"] == []
    assert plan_checkpoint(source, engine="stock-1.0", sm=100).problems == ()


@pytest.mark.parametrize("attention", ["int4-g128", "dense"])
def test_no_requantization_is_offered_that_leaves_no_gpu(tmp_path: Path, attention: str) -> None:
    """NVFP4 experts run on SM100 and later, where release 1.0 has no int4 Linear."""
    source = written(tmp_path, attention, "int4-g32", "Qwen3MoeForCausalLM")

    choices = plan_checkpoint(source, engine="stock-1.0").choices

    assert ("nvfp4-w4a4" in {choice.form.name for choice in choices}) == (attention == "dense")
    assert choices


def test_reports_name_the_gpus(tmp_path: Path) -> None:
    source = written(tmp_path / "in", "nvfp4", "nvfp4")
    line = "GPUs: SM100 and SM120 (no exact NVFP4 Linear on SM89 and SM90)"

    for arguments in (["inspect", source], ["plan", source], ["convert", source, tmp_path / "out"]):
        assert line in " ".join(run_cli(*arguments).out.split())
    assert "GPUs: " not in run_cli("inspect", source, "--sm", "100").out
    assert "GPUs: " not in run_cli("inspect", written(tmp_path / "fp8", "fp8-channel-token", "dense")).out
    assert "GPUs: " not in run_cli("inspect", source, "--to", "dense").out


def test_elsewhere_names_the_gpus_of_a_plan_for_all(tmp_path: Path) -> None:
    found = inspect_checkpoint(written(tmp_path, "nvfp4", "nvfp4"), compare_places=True).elsewhere

    assert found is not None
    assert (found[0].sm, found[0].sms) == (None, (100, 120))
    assert all(place.sm in place.sms for place in found[1:] if place.sm is not None and place.kept)
