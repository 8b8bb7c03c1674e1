"""Synthetic checkpoints: reproducible bytes, and valid for planning and verification."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from benchmarks.kimi import KimiShape
from benchmarks.shapes import SHAPES, LlamaShape
from trtllm_ct import inspect_checkpoint, verify_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

TINY = SHAPES["tiny"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    assert TINY.write(tmp_path) == 49
    return tmp_path


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_a_shape_gives_the_same_bytes_every_time(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    again = tmp_path_factory.mktemp("again")
    TINY.write(again)

    assert digest(again) == digest(tiny)


def test_another_seed_is_another_checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert isinstance(TINY, LlamaShape)
    other = tmp_path_factory.mktemp("other")
    replace(TINY, seed=1).write(other)

    assert digest(other).keys() == digest(tiny).keys()
    assert digest(other)["model-00001-of-00005.safetensors"] != digest(tiny)["model-00001-of-00005.safetensors"]


def test_it_has_shards_and_an_index(tiny: Path) -> None:
    index = json.loads((tiny / "model.safetensors.index.json").read_text(encoding="utf-8"))

    assert len(set(index["weight_map"].values())) == 5
    assert index["metadata"]["total_size"] == TINY.disk_bytes


def test_it_can_be_planned_and_is_delivered_natively(tiny: Path) -> None:
    plan = plan_checkpoint(tiny, "modelopt")

    assert inspect_checkpoint(tiny).problems == ()
    assert {module.delivered_mode for module in plan.modules if module.weight} == {"W4A16_AWQ g128"}
    assert plan.stored_bytes == TINY.disk_bytes
    assert plan_checkpoint(tiny, "dense").delivered_bytes == TINY.dense_bytes


def test_its_scales_are_valid(tiny: Path) -> None:
    assert verify_checkpoint(tiny).good


@pytest.mark.parametrize(
    ("scheme", "mode"), [("fp8", "FP8_PER_CHANNEL_PER_TOKEN"), ("nvfp4", "NVFP4 g16")], ids=["fp8", "nvfp4"]
)
def test_other_schemes_are_valid_and_keep_their_codes(tmp_path: Path, scheme: str, mode: str) -> None:
    assert isinstance(TINY, LlamaShape)
    replace(TINY, scheme=scheme).write(tmp_path)

    plan = plan_checkpoint(tmp_path, "modelopt")

    assert verify_checkpoint(tmp_path).good
    assert plan.problems == ()
    assert {module.delivered_mode for module in plan.modules if module.weight} == {mode}
    assert plan.stored_bytes == replace(TINY, scheme=scheme).disk_bytes


@pytest.mark.parametrize(("name", "nbytes"), [("1b", 0.76e9), ("8b", 5.7e9), ("8b-fp8", 9.1e9), ("8b-nvfp4", 6.0e9)])
def test_the_shapes_of_the_figures_have_their_sizes(name: str, nbytes: float) -> None:
    assert SHAPES[name].disk_bytes == pytest.approx(nbytes, rel=0.01)


def test_disk_bytes_grow_with_layers_except_for_embedding_and_head() -> None:
    shape = SHAPES["1b"]
    half, tables = shape.with_layers(8), 2 * 2 * 32000 * 2048

    assert 2 * (half.disk_bytes - tables) == pytest.approx(shape.disk_bytes - tables, rel=1e-4)


def test_the_kimi_shape_with_few_layers_needs_almost_no_disk(tmp_path: Path) -> None:
    shape = KimiShape().with_layers(2)
    tensors = shape.write(tmp_path)

    assert tensors == sum(1 for _ in shape.tensors())
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) <= 2 * shape.disk_bytes
    assert inspect_checkpoint(tmp_path).problems == ()
