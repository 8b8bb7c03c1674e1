from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from builders import SCHEMES, rewrite, rewrite_config, tiny_config, write_checkpoint
from fused_experts import fuse_experts

from trtllm_ct.base.errors import CatalogError, DetectionError, UsageError
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

MIXED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "int4-g64"),
    **dict.fromkeys(("gate_proj", "up_proj"), "int8-g32"),
    "o_proj": "int4-g64",
    "down_proj": "fp8-channel-token",
}


def test_rows_have_scheme_family_mode_reason_and_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scheme=MIXED)

    rows = list(inspect_checkpoint(tmp_path).rows())

    assert [(len(row.modules), row.stored_scheme, row.native_mode, row.delivered_mode, row.reason) for row in rows] == [
        (2, "float-quantized: fp8 channel, input fp8 token dynamic", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", ""),
        (8, "pack-quantized: int4 group 64", "W4A16_GPTQ", "W4A16_AWQ g64", ""),
        (4, "pack-quantized: int8 group 32", "W8A16", "dequantized", "W8A16 holds no scale per group"),
        (7, "plain", "", "plain", ""),
    ]


def test_every_module_is_in_one_row_and_bytes_add_up(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, scheme=MIXED, kv=True)

    found = inspect_checkpoint(tmp_path)
    rows = list(found.rows())

    assert found.plan is not None
    assert sorted(name for row in rows for name in row.modules) == sorted(module.name for module in found.plan.modules)
    assert sum(row.stored_bytes for row in rows) == sum(tensor.nbytes for tensor in built.stored.values())
    assert sum(row.delivered_bytes for row in rows) == found.plan.delivered_bytes


@pytest.mark.parametrize("scheme", ["nvfp4", "int4-g64-actorder", "int4-g32", "fp8-tensor-static", "dense"])
def test_bytes_of_experts_in_one_tensor_add_up(tmp_path: Path, scheme: str) -> None:
    """Also of a scalar that gate and up share."""
    config = tiny_config("Qwen3MoeForCausalLM", layers=1)
    built = write_checkpoint(tmp_path, config=config, scheme=scheme, edit=fuse)

    rows = list(inspect_checkpoint(tmp_path).rows())

    assert sum(row.stored_bytes for row in rows) == sum(tensor.nbytes for tensor in built.stored.values())


def fuse(stored: dict[str, torch.Tensor]) -> None:
    for name in [name for name in stored if name.endswith("up_proj.weight_g_idx")]:
        stored[name] = stored[name.replace("up_proj", "gate_proj")].clone()
    fuse_experts(stored)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_a_row_that_names_it(tmp_path: Path, scheme: str) -> None:
    """No row is "unknown", and a dequantized one has a reason."""
    config = tiny_config(hidden=256, intermediate=256, layers=1, vocabulary=16)
    write_checkpoint(tmp_path, config=config, scheme=scheme)

    first, *others = inspect_checkpoint(tmp_path).rows()

    assert [row.stored_scheme for row in others] == ["plain"]
    assert first.stored_scheme.startswith(SCHEMES[scheme].format.replace("naive", "float") + ": ")
    assert len(first.modules) == 7
    assert first.native_mode or scheme.startswith("mxfp6")
    # Groups of 256 are the only ones whose scales are repeated.
    assert bool(first.reason) is (first.delivered_mode == "dequantized" or scheme == "int4-g256")
    assert "unknown" not in json.dumps(inspect_checkpoint(tmp_path).to_dict())


def test_the_recipe_decides_the_family(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scheme="int4-g64")
    (tmp_path / "recipe.yaml").write_text("stage:\n  modifiers:\n    AWQModifier:\n      n: 1\n")

    assert next(inspect_checkpoint(tmp_path).rows()).native_mode == "W4A16_AWQ"


def test_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, scheme=MIXED)
    monkeypatch.setattr(TensorReader, "read", lambda *_: pytest.fail("a tensor was read"))

    assert not inspect_checkpoint(tmp_path).problems


@pytest.mark.parametrize("to", ["modelopt", "dense", "reference"])
def test_the_plan_is_for_the_given_target(tmp_path: Path, to: str) -> None:
    write_checkpoint(tmp_path)

    assert inspect_checkpoint(tmp_path, to).plan == plan_checkpoint(tmp_path, to)


def test_problems_of_every_stage_are_collected_instead_of_raised(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, edit=lambda stored: [stored.pop("model.norm.weight"), stored.pop("lm_head.weight")])

    found = inspect_checkpoint(tmp_path)

    assert found.plan is None
    assert list(found.rows()) == []
    assert [fault.where for fault in found.problems] == ["model.norm.weight", "lm_head.weight"]
    rewrite_config(tmp_path, lambda config: config.update(architectures=["X"]))
    assert [fault.where for fault in inspect_checkpoint(tmp_path).problems] == ["config.json: architectures"]
    (tmp_path / "model.safetensors").unlink()
    assert [fault.expected for fault in inspect_checkpoint(tmp_path).problems] == ["safetensors files"]


def lose_a_norm(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.pop("model.norm.weight"))


def lose_a_size(directory: Path) -> None:
    rewrite_config(directory, lambda config: config.update(vocab_size=0))


def cut_a_file(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(("damage", "of_the_plan"), [(lose_a_norm, True), (lose_a_size, False), (cut_a_file, False)])
def test_warnings_survive_the_problems_of_every_stage(
    tmp_path: Path, damage: Callable[[Path], None], of_the_plan: bool
) -> None:
    """Of the configuration and the files always; of the plan, if it was reached."""
    write_checkpoint(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"")

    def edit(config: dict[str, Any]) -> None:
        config["quantization_config"] |= {"unheard_of": 1, "ignore": ["lm_head", "re:.*q_proj"]}

    rewrite_config(tmp_path, edit)
    sound = inspect_checkpoint(tmp_path).warnings
    damage(tmp_path)

    inspection = inspect_checkpoint(tmp_path)

    assert inspection.problems
    assert any("unheard_of" in warning for warning in inspection.warnings)
    assert any("training_args.bin" in warning for warning in inspection.warnings)
    assert (inspection.warnings == sound) is of_the_plan
    assert inspection.to_dict()["warnings"] == list(inspection.warnings)


def test_another_quantization_format_is_a_problem_with_evidence(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    rewrite_config(tmp_path, lambda config: config.update(quantization_config={"quant_method": "awq", "bits": 4}))

    found = inspect_checkpoint(tmp_path)

    assert found.detection.method == "awq"
    (problem,) = found.problems
    assert problem.found.startswith("an AutoAWQ checkpoint, not compressed-tensors")
    assert "quant_method" in problem.found


def test_a_directory_without_checkpoint_and_an_unknown_target_are_raised(tmp_path: Path) -> None:
    with pytest.raises(DetectionError):
        inspect_checkpoint(tmp_path)
    write_checkpoint(tmp_path)
    with pytest.raises(UsageError):
        inspect_checkpoint(tmp_path, "gguf")


def test_warnings_of_detection_and_plan_are_included(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    rewrite_config(tmp_path, lambda config: config["quantization_config"].update(unheard_of=1))
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}})
    )

    first, second = inspect_checkpoint(tmp_path).warnings

    assert "config.json: quantization_config says compressed-tensors, hf_quant_config.json says modelopt" in first
    assert "unheard_of" in second


@pytest.mark.parametrize("broken", [False, True])
def test_the_document_has_the_same_keys_with_and_without_problems(tmp_path: Path, broken: bool) -> None:
    def edit(stored: dict[str, torch.Tensor]) -> None:
        if broken:
            del stored["model.norm.weight"]

    write_checkpoint(tmp_path, config=tiny_config(layers=1), scheme="fp8-tensor-static", kv=True, edit=edit)

    document = json.loads(json.dumps(inspect_checkpoint(tmp_path).to_dict()))

    assert document.keys() == {
        "directory",
        "target",
        "parallel",
        "verdict",
        "detection",
        "architecture",
        "schemes",
        "modules",
        "quantization",
        "kv_cache",
        "stored_bytes",
        "delivered_bytes",
        "rank_bytes",
        "sms",
        "parts",
        "gpus",
        "elsewhere",
        "alternative",
        "requantizations",
        "deviations",
        "checks",
        "warnings",
        "problems",
    }
    assert document["detection"]["method"] == "compressed-tensors"
    assert document["detection"]["evidence"][0]["file"] == "config.json"
    assert document["kv_cache"] == (None if broken else "FP8")
    assert (document["modules"] is None) is broken
    assert len(document["problems"]) == broken


def test_side_files_that_convert_refuses_are_named(tmp_path: Path) -> None:
    """A folder of links is a common way to name a checkpoint; weights may lie elsewhere, side files must not."""
    source = write_checkpoint(tmp_path / "in", tokenizer=True).directory
    links = tmp_path / "links"
    links.mkdir()
    for file in source.iterdir():
        (links / file.name).symlink_to(file)

    [text] = [text for text in inspect_checkpoint(links).warnings if "side files" in text]

    with pytest.raises(CatalogError) as caught:
        convert_checkpoint(links, tmp_path / "out")
    for fault in caught.value.faults:
        assert fault.where.rpartition("/")[2] in text
    assert "leads out of the checkpoint" in text
    assert not any("side files" in text for text in inspect_checkpoint(source).warnings)
