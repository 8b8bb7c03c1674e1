"""Modules are delivered to the engine under the prefix that its class reads, whatever prefix the files have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import rewrite, rewrite_config
from multimodal import PLACES, renamed, write_multimodal

from trtllm_ct import convert_checkpoint, verify_checkpoint
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

# The prefix of the text model that each class reads, if it reads another one than that of the files, and the prefixes
# that it reads as they are. Written down from TensorRT-LLM `_torch/models/modeling_*.py`.
READ = {
    "Gemma3ForConditionalGeneration": ("language_model.model.",),
    "Mistral3ForConditionalGeneration": ("language_model.model.",),
    "KimiK25ForConditionalGeneration": ("language_model.model.", "model."),
    "Qwen3VLForConditionalGeneration": ("model.language_model.", "model."),
    "Qwen3VLMoeForConditionalGeneration": ("model.language_model.", "model."),
    "Qwen2VLForConditionalGeneration": ("model.language_model.", "model."),
    "Qwen2_5_VLForConditionalGeneration": ("model.language_model.", "model."),
}
TOWER = {"model.vision_tower.blocks.0.fc1.weight": (16, 8), "model.multi_modal_projector.linear_1.weight": (16, 8)}


@pytest.mark.parametrize("to", ["modelopt", "tensorrt_llm"])
@pytest.mark.parametrize("body", PLACES)
@pytest.mark.parametrize("architecture", READ)
def test_an_engine_gets_the_names_that_its_class_reads(tmp_path: Path, architecture: str, body: str, to: str) -> None:
    built = write_multimodal(tmp_path, body, architecture=architecture, kv=True)

    plan = plan_checkpoint(tmp_path, to, engine="stock-1.3")

    read = body if body in READ[architecture] else READ[architecture][0]
    assert {renamed(name, read) for name in built.dense} <= plan.delivered_specs.keys()
    texts = [
        name for name in plan.delivered_specs if "layers." in name or name.endswith(("norm.weight", "embed_tokens"))
    ]
    assert all(name.startswith(read) for name in texts)
    assert PLACES[read] in plan.by_name


@pytest.mark.parametrize("to", ["dense", "reference"])
@pytest.mark.parametrize("body", PLACES)
def test_other_targets_keep_the_names_of_the_files(tmp_path: Path, body: str, to: str) -> None:
    built = write_multimodal(tmp_path, body, architecture="Gemma3ForConditionalGeneration")

    assert {renamed(name, body) for name in built.dense} <= plan_checkpoint(tmp_path, to).delivered_specs.keys()


@pytest.mark.parametrize("architecture", ["Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"])
def test_towers_and_projectors_move_too(tmp_path: Path, architecture: str) -> None:
    write_multimodal(tmp_path, "model.language_model.", architecture=architecture, vision=TOWER)

    plan = plan_checkpoint(tmp_path)

    moved = {name.removeprefix("model.") for name in TOWER}
    assert moved <= plan.delivered_specs.keys()
    assert TOWER.keys().isdisjoint(plan.delivered_specs)
    assert {name.removesuffix(".weight") for name in moved} <= set(plan.quant_config.exclude_modules)


@pytest.mark.parametrize("spelled", PLACES)
def test_targets_may_name_the_stored_or_any_other_prefix(tmp_path: Path, spelled: str) -> None:
    body = "model.language_model."
    write_multimodal(tmp_path, body, architecture="Mistral3ForConditionalGeneration")
    want = plan_checkpoint(tmp_path)

    def spell(document: dict) -> None:
        for group in document["quantization_config"]["config_groups"].values():
            group["targets"] = [target.replace(f"{body}layers.", f"{spelled}layers.") for target in group["targets"]]

    rewrite_config(tmp_path, spell)

    assert plan_checkpoint(tmp_path) == want


def test_a_module_is_not_moved_onto_another_one(tmp_path: Path) -> None:
    write_multimodal(tmp_path, "model.language_model.", architecture="Gemma3ForConditionalGeneration", vision=TOWER)
    name = "model.vision_tower.blocks.0.fc1.weight"
    rewrite(tmp_path, lambda stored: stored.update({name.removeprefix("model."): torch.ones(16, 8).bfloat16()}))

    specs = plan_checkpoint(tmp_path).delivered_specs

    assert {name, name.removeprefix("model.")} <= specs.keys()


@pytest.mark.parametrize("architecture", ["Gemma3ForConditionalGeneration", "Qwen3VLForConditionalGeneration"])
def test_a_converted_directory_has_the_names_and_verifies(tmp_path: Path, architecture: str) -> None:
    write_multimodal(tmp_path / "in", "model.language_model.model.", architecture=architecture)

    convert_checkpoint(tmp_path / "in", tmp_path / "out")

    names = Catalog.from_directory(tmp_path / "out").tensors
    assert f"{READ[architecture][0]}embed_tokens.weight" in names
    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").good
