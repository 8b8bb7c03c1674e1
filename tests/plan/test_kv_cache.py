"""KV-cache scales: from the attention module, where compressed-tensors keeps them, to where engines look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, fp8_weights, rewrite, rewrite_config, tiny_config, write_checkpoint

from trtllm_ct.errors import Fault, PlanError
from trtllm_ct.pipeline import plan_checkpoint
from trtllm_ct.plan.model import Fate

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.plan.model import Plan

ATTENTION = "model.layers.0.self_attn"


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return write_checkpoint(tmp_path, config=tiny_config(layers=2), scheme="fp8-tensor-static", kv=True)


def fates(plan: Plan) -> set[tuple[Fate, str]]:
    """What becomes of the tensors of the first attention module, and why."""
    names = {f"{ATTENTION}.{letter}_scale" for letter in "kv"}
    return {(fate.fate, fate.reason) for fate in plan.fates() if fate.name in names}


def faults(directory: Path, to: str = "modelopt") -> tuple[Fault, ...]:
    with pytest.raises(PlanError) as caught:
        plan_checkpoint(directory, to)
    return caught.value.faults


def set_scheme(directory: Path, scheme: dict[str, Any] | None) -> None:
    rewrite_config(directory, lambda config: config["quantization_config"].update(kv_cache_scheme=scheme))


@pytest.mark.parametrize("to", ["modelopt", "reference"])
def test_scales_move_to_the_projections_as_one_float32_each(built: Built, to: str) -> None:
    plan = plan_checkpoint(built.directory, to)

    scales = {name: str(spec) for name, spec in plan.delivered_specs.items() if name.endswith(("k_scale", "v_scale"))}
    assert scales == {
        f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale": "float32 []"
        for layer in range(2)
        for letter in "kv"
    }
    assert plan.quant_config.kv_cache_quant_algo == "FP8"


def test_a_plain_target_leaves_the_kv_cache_alone(built: Built) -> None:
    plan = plan_checkpoint(built.directory, "dense")

    assert plan.quant_config.kv_cache_quant_algo is None
    assert fates(plan) == {(Fate.IGNORED, "target dense leaves the KV cache alone")}


def test_scales_without_a_scheme_are_left_over_and_ignored(built: Built) -> None:
    set_scheme(built.directory, None)

    plan = plan_checkpoint(built.directory)

    assert plan.quant_config.kv_cache_quant_algo is None
    assert plan.module(ATTENTION).deliveries == ()
    assert fates(plan) == {(Fate.IGNORED, "the configuration leaves the KV cache unquantized, as engines do")}


def test_zero_points_of_a_symmetric_scheme_are_ignored(built: Built) -> None:
    """llm-compressor writes zeros there for some schemes."""
    zero = torch.zeros(1, dtype=torch.int8)
    rewrite(built.directory, lambda stored: stored.update({f"{ATTENTION}.k_zero_point": zero}))

    fate = next(fate for fate in plan_checkpoint(built.directory).fates() if fate.name.endswith("k_zero_point"))

    assert (fate.fate, fate.reason) == (Fate.IGNORED, "the KV cache is symmetric")


@pytest.mark.parametrize("lost", [[f"{ATTENTION}.k_scale"], [f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"]])
def test_every_missing_scale_is_named(built: Built, lost: list[str]) -> None:
    """Engines leave a scale that they don't find uninitialised."""
    rewrite(built.directory, lambda stored: [stored.pop(name) for name in lost])

    found = faults(built.directory)

    assert [fault.where for fault in found] == lost
    assert {(fault.expected, fault.found) for fault in found} == {
        ("the scale that kv_cache_scheme promises", "no such tensor")
    }


def test_a_scheme_without_any_scales_names_every_layer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scheme="fp8-tensor-static")
    set_scheme(tmp_path, fp8_weights("tensor"))

    assert len(faults(tmp_path)) == 2 * 2
    assert plan_checkpoint(tmp_path, "dense").target == "dense"


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1), (0,)])
def test_a_scale_for_each_head_is_no_scale_of_a_tensor(built: Built, shape: tuple[int, ...]) -> None:
    rewrite(built.directory, lambda stored: stored.update({f"{ATTENTION}.v_scale": torch.ones(shape)}))

    (fault,) = faults(built.directory)

    assert fault.where == f"{ATTENTION}.v_scale"
    assert (fault.expected, fault.found) == ("one element", f"float32 {list(shape)}")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_one_element_counts_in_any_shape(built: Built, shape: tuple[int, ...]) -> None:
    rewrite(built.directory, lambda stored: stored.update({f"{ATTENTION}.v_scale": torch.ones(shape)}))

    assert str(plan_checkpoint(built.directory).delivered_specs[f"{ATTENTION}.v_proj.v_scale"]) == "float32 []"


def test_scales_for_each_head_are_left_out_and_told(built: Built) -> None:
    """Engines take one scale for all heads; the cache is quantized nevertheless."""
    set_scheme(built.directory, fp8_weights("attn_head"))
    names = [name for name in built.stored if name.endswith(("k_scale", "v_scale"))]
    rewrite(built.directory, lambda stored: stored.update({name: torch.ones(2, 1, 1) for name in names}))

    plan = plan_checkpoint(built.directory)

    assert plan.quant_config.kv_cache_quant_algo == "FP8"
    assert fates(plan) == {(Fate.IGNORED, "the engine takes one scale for all heads")}
    assert any("fp8 attn_head" in warning for warning in plan.warnings)


def test_a_dynamic_scheme_promises_no_scales(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scheme="fp8-tensor-static")
    set_scheme(tmp_path, fp8_weights("tensor", dynamic=True))

    assert plan_checkpoint(tmp_path).quant_config.kv_cache_quant_algo == "FP8"


def test_a_cache_that_the_engine_does_not_have_stays_wide_and_is_told(built: Built) -> None:
    set_scheme(built.directory, fp8_weights("tensor", type="int"))

    plan = plan_checkpoint(built.directory)

    assert plan.quant_config.kv_cache_quant_algo is None
    assert fates(plan) == {(Fate.IGNORED, "target modelopt leaves the KV cache alone")}
    assert any("has no int8 tensor cache; it stays 16-bit" in warning for warning in plan.warnings)


def test_scales_on_the_projections_are_those_of_early_writers(built: Built) -> None:
    """compressed-tensors up to 0.5 called them `output_scale`."""

    def rename(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.endswith(("self_attn.k_scale", "self_attn.v_scale"))]:
            attention, _, local = name.rpartition(".")
            stored[f"{attention}.{local[0]}_proj.output_scale"] = stored.pop(name)

    before = plan_checkpoint(built.directory).delivered_specs
    rewrite(built.directory, rename)

    assert plan_checkpoint(built.directory).delivered_specs == before
