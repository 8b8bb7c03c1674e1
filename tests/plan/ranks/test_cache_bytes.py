"""The bytes of the KV cache of one token, by hand from the sizes in config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite_config, tiny_config, write_checkpoint
from class_models import CLASSES, write_class
from own_loader_models import write_own_loader

from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.ranks.cache_bytes import CacheShape, cache_shape
from trtllm_ct.plan.ranks.planned_model import model_of_plan

if TYPE_CHECKING:
    from pathlib import Path


def shape_of(directory: Path, to: str = "modelopt") -> CacheShape:
    checkpoint = open_checkpoint(directory)
    plan = checkpoint.plan(to)
    model = model_of_plan(plan, checkpoint.model)
    return cache_shape(model, model.place(plan.by_name))


@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize(("tensor", "heads"), [(1, 2), (2, 1), (4, 1)])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_keys_and_values_are_divided_by_heads(
    tmp_path: Path, architecture: str, tensor: int, heads: int, itemsize: int
) -> None:
    """Two K/V heads of 16 elements in each of three layers; more ranks than heads repeat them."""
    write_checkpoint(tmp_path, config=tiny_config(architecture, layers=3), scheme="int4-g32")

    shape = shape_of(tmp_path)

    assert shape.unknown == ""
    assert shape.rank_bytes(itemsize, Parallel(tensor=tensor)) == 3 * 2 * heads * 16 * itemsize


def test_stages_have_their_layers_and_attention_data_parallelism_all_heads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config=tiny_config(layers=5))

    shape = shape_of(tmp_path)

    assert shape.rank_bytes(2, Parallel(pipeline=2)) == 3 * 2 * 32 * 2
    assert shape.rank_bytes(2, Parallel(tensor=2, attention_dp=True)) == 5 * 2 * 32 * 2


@pytest.mark.parametrize("tensor", [1, 4])
def test_latent_attention_caches_one_vector_on_every_rank(tmp_path: Path, tensor: int) -> None:
    write_checkpoint(tmp_path, config=tiny_config("DeepseekV3ForCausalLM", layers=2))

    assert shape_of(tmp_path).rank_bytes(2, Parallel(tensor=tensor)) == 2 * (32 + 8) * 2


@pytest.mark.parametrize("name", CLASSES)
def test_layers_of_linear_attention_cache_nothing_for_a_token(tmp_path: Path, name: str) -> None:
    write_class(tmp_path, name)

    shape = shape_of(tmp_path, "dense")

    assert shape.rank_bytes(2, Parallel()) == 2 * 2 * 64 * 2
    assert any("1 of 2 layers cache nothing" in note for note in shape.notes)


@pytest.mark.reference
@pytest.mark.newest_transformers
@pytest.mark.parametrize("name", ["DeepseekV4ForCausalLM", "MllamaForConditionalGeneration"])
def test_other_kinds_of_attention_are_unknown(tmp_path: Path, name: str) -> None:
    write_own_loader(tmp_path, name, "fp8-channel-token")

    shape = shape_of(tmp_path, "dense")

    assert shape.unknown
    assert shape.rank_bytes(2, Parallel()) is None


@pytest.mark.reference
@pytest.mark.newest_transformers
@pytest.mark.parametrize("name", ["HunYuanMoEV1ForCausalLM", "GptOssForCausalLM"])
def test_classes_that_load_their_weights_themselves_cache_keys_and_values(tmp_path: Path, name: str) -> None:
    built = write_own_loader(tmp_path, name, "fp8-channel-token")
    heads, size = built.config["num_key_value_heads"], built.config["head_dim"]

    assert shape_of(tmp_path, "dense").rank_bytes(2, Parallel()) == 2 * 2 * heads * size * 2


def test_a_class_without_a_row_is_unknown(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config=tiny_config(architectures=["UnheardOfForCausalLM"], model_type="unheard"))

    assert "UnheardOfForCausalLM" in shape_of(tmp_path, "dense").unknown


@pytest.mark.parametrize(
    ("more", "noted"),
    [
        ({"sliding_window": 64}, True),
        ({"sliding_window": 64, "use_sliding_window": False}, False),
        ({"sliding_window": None}, False),
        ({}, False),
    ],
)
def test_windows_are_noted(tmp_path: Path, more: dict[str, Any], noted: bool) -> None:
    write_checkpoint(tmp_path)
    rewrite_config(tmp_path, lambda config: config.update(more))

    assert any("64 tokens" in note for note in shape_of(tmp_path).notes) is noted
