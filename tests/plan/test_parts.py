"""The bytes of a model by kind of module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint
from class_models import CLASSES, write_class
from tiny_models import FAMILIES

from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.parts import KINDS, Part, parts_of

if TYPE_CHECKING:
    from pathlib import Path

MIXTURE = {"embeddings", "attention", "MLP", "routed experts", "shared experts", "routers", "norms", "head"}
OF_CLASS = {
    "MixtralForCausalLM": MIXTURE - {"MLP", "shared experts"},
    "Qwen2MoeForCausalLM": MIXTURE - {"MLP"},
    "Qwen3MoeForCausalLM": MIXTURE - {"MLP", "shared experts"},
    "DeepseekV2ForCausalLM": MIXTURE,
    "DeepseekV3ForCausalLM": MIXTURE,
}


def parts(directory: Path, to: str = "modelopt") -> dict[str, Part]:
    checkpoint = open_checkpoint(directory)
    plan = checkpoint.plan(to)
    found = parts_of(plan, checkpoint.model)
    assert [part.kind for part in found] == [kind for kind in KINDS if kind in {part.kind for part in found}]
    assert sum(part.modules for part in found) == len(plan.modules)
    assert sum(part.stored_bytes for part in found) == sum(module.stored_bytes for module in plan.modules)
    assert sum(part.delivered_bytes for part in found) == plan.delivered_bytes
    return {part.kind: part for part in found}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_has_its_kinds_and_bytes_add_up(tmp_path: Path, architecture: str) -> None:
    write_checkpoint(tmp_path, config=tiny_config(architecture), scheme="int4-g32")

    assert parts(tmp_path).keys() == OF_CLASS.get(architecture, {"embeddings", "attention", "MLP", "norms", "head"})


@pytest.mark.parametrize("name", CLASSES)
def test_linear_attention_is_attention_and_a_tower_is_outside(tmp_path: Path, name: str) -> None:
    write_class(tmp_path, name)

    found = parts(tmp_path, "dense")

    assert ("outside of the text model" in found) is ("Conditional" in name)
    assert ("routed experts" in found) is ("Moe" in name or "Next" in name)
    assert found["MLP"].modules == 6 if "routed experts" not in found else "MLP" not in found
    assert found["attention"].modules > 4 + 4


def test_draft_layers_are_apart(tmp_path: Path) -> None:
    """The layer after the last one of config.json."""
    config = tiny_config("DeepseekV3ForCausalLM", layers=3)
    built = write_checkpoint(tmp_path / "in", config=config)
    whole = {name: tensor for name, tensor in built.stored.items() if ".layers.2." in name}
    config = tiny_config("DeepseekV3ForCausalLM", layers=2, num_nextn_predict_layers=1)

    def add_draft(stored: dict[str, object]) -> None:
        more = {"eh_proj.weight": (64, 128), "enorm.weight": (64,), "hnorm.weight": (64,)}
        more |= {"embed_tokens.weight": (96, 64), "shared_head.head.weight": (96, 64), "shared_head.norm.weight": (64,)}
        stored |= whole
        stored |= {
            f"model.layers.2.{name}": built.stored["model.norm.weight"].new_ones(shape) for name, shape in more.items()
        }

    write_checkpoint(tmp_path / "out", config=config, edit=add_draft)

    found = parts(tmp_path / "out")
    assert found["draft layers"].stored_bytes > sum(tensor.nbytes for tensor in whole.values())
