"""A model whose class the engine lacks is a problem of targets for that engine, and of no other target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite_config, tiny_config, write_checkpoint
from class_models import write_class
from multimodal import write_multimodal
from tiny_models import FAMILIES

from trtllm_ct import convert_checkpoint, inspect_checkpoint, verify_checkpoint
from trtllm_ct.base.errors import PlanError
from trtllm_ct.engine.model_classes import has_class
from trtllm_ct.engine.releases import RELEASES, Release
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
from trtllm_ct.plan.models.class_rows import CLASS_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LACKING = ("GraniteForCausalLM", "Gemma2ForCausalLM", "DeepseekV2ForCausalLM")


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_claimed_class_is_served_or_a_problem(tmp_path: Path, name: str, release: Release) -> None:
    write_checkpoint(tmp_path, config=tiny_config(name), scheme="fp8-tensor-static")

    for target in ("modelopt", "tensorrt_llm"):
        problems = plan_checkpoint(tmp_path, target, engine=release.name).problems
        assert [fault.where for fault in problems] == ["config.json: architectures"] * (name in LACKING)
        assert all("--to dense" in fault.remedy and name in fault.found for fault in problems)
    for target in ("dense", "reference"):
        assert plan_checkpoint(tmp_path, target).problems == ()


def test_a_class_of_a_later_release_names_that_release(tmp_path: Path) -> None:
    write_multimodal(tmp_path, "language_model.model.")
    rewrite_config(tmp_path, lambda config: config.update(architectures=["KimiK25ForConditionalGeneration"]))

    (fault,) = plan_checkpoint(tmp_path).problems

    assert "stock-1.3" in fault.found
    assert "--engine stock-1.3" in fault.remedy
    assert plan_checkpoint(tmp_path, engine="stock-1.3").problems == ()


def test_a_wrapper_that_no_release_lists_is_a_problem(tmp_path: Path) -> None:
    write_multimodal(tmp_path, "model.language_model.")
    rewrite_config(tmp_path, lambda config: config.update(architectures=["LlavaOnevisionForConditionalGeneration"]))

    assert not any(has_class(release, "LlavaOnevisionForConditionalGeneration") for release in RELEASES)
    assert len(inspect_checkpoint(tmp_path).problems) == 1
    assert inspect_checkpoint(tmp_path, "dense").problems == ()


@pytest.mark.parametrize("name", ["Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        ({"mlp_only_layers": [1]}, "1"),
        ({"decoder_sparse_step": 2}, "0, 2"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "0, 1, 2, 3"),
    ],
    ids=str,
)
def test_layers_without_experts_are_a_problem_where_the_class_builds_experts_in_every_layer(
    tmp_path: Path, name: str, keys: dict[str, Any], dense: str
) -> None:
    write_checkpoint(tmp_path, config=tiny_config(name, layers=4, **keys), scheme="fp8-tensor-static")

    for target in ("modelopt", "tensorrt_llm"):
        for release in RELEASES:
            (fault,) = plan_checkpoint(tmp_path, target, engine=release.name).problems
            assert fault.expected.startswith("routed experts in every layer")
            assert fault.found == f"layers without them: {dense}"
            assert "--to dense" in fault.remedy
    assert plan_checkpoint(tmp_path, "dense").problems == ()


WRITERS: dict[str, Callable[..., object]] = {
    **{
        name: lambda directory, name=name, **keys: write_checkpoint(directory, config=tiny_config(name, **keys))
        for name in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
    },
    **{
        name: lambda directory, name=name, **keys: write_class(directory, name, **keys)
        for name in ("Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration")
    },
}
"""What writes a checkpoint of each class that builds experts in every layer, whatever its number.

`Qwen3NextForCausalLM._create_mlp` looks at the number of experts only (TensorRT-LLM `modeling_qwen3_next.py`,
00022b04), and the classes of Qwen3.5 have its decoder (`modeling_qwen3_5.py`, 00620eb0).
"""


def test_the_rows_of_these_classes_say_so_and_no_others() -> None:
    assert {name for name, row in CLASS_ROWS.items() if row.all_mixtures} == WRITERS.keys()


@pytest.mark.parametrize("name", WRITERS)
def test_one_layer_without_experts_is_a_problem_of_each_such_class(tmp_path: Path, name: str) -> None:
    """Nothing is compared with transformers here, as in workers; its classes of Qwen3.5 would refuse the layer too."""
    WRITERS[name](tmp_path / "all")
    WRITERS[name](tmp_path / "mixed", mlp_only_layers=[1])

    assert open_checkpoint(tmp_path / "all").plan("modelopt", engine="stock-1.3").problems == ()
    (fault,) = open_checkpoint(tmp_path / "mixed").plan("modelopt", engine="stock-1.3").problems
    assert fault.found == "layers without them: 1"
    assert "--to dense" in fault.remedy
    assert "fetch the experts" in fault.remedy


def test_a_class_that_reads_which_layers_have_experts_has_no_such_problem(tmp_path: Path) -> None:
    config = tiny_config("DeepseekV3ForCausalLM", layers=3, first_k_dense_replace=2)
    write_checkpoint(tmp_path, config=config, scheme="fp8-tensor-static")

    assert plan_checkpoint(tmp_path).problems == ()


@pytest.mark.parametrize("name", LACKING)
def test_the_problem_is_shown_with_the_plan_and_both_directories_are_right(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "in", config=tiny_config(name), scheme="fp8-channel-token")

    inspection = inspect_checkpoint(tmp_path / "in")

    assert inspection.plan is not None
    assert inspection.to_dict()["problems"] == [fault.to_dict() for fault in inspection.plan.problems] != []
    for target in ("modelopt", "dense"):
        report = convert_checkpoint(tmp_path / "in", tmp_path / target, to=target)
        assert len(report.to_dict()["problems"]) == (target == "modelopt")
        assert verify_checkpoint(tmp_path / "in", tmp_path / target).good


def test_strict_refuses_before_anything_is_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", config=tiny_config("GraniteForCausalLM"), scheme="fp8-channel-token")

    with pytest.raises(PlanError, match="GraniteForCausalLM"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", strict=True)

    assert [path.name for path in tmp_path.iterdir()] == ["in"]
