"""What the index does not list: old tensors change nothing, and forgotten ones are found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from builders import Built, rewrite, tiny_config, write_checkpoint
from fused_experts import fuse_experts

from trtllm_ct.checkpoint.catalog import INDEX_FILE
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import Tensor

MOE = tiny_config("Qwen3MoeForCausalLM")
LINEAR = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"
UNREAD = "the model is complete without them"
READ = "not in the index, read nevertheless"


def built(directory: Path) -> Built:
    return write_checkpoint(directory, config=dict(MOE), scheme="int4-g32", kv=True, shards=2)


def unlist(directory: Path, names: Iterable[str]) -> None:
    """Take names out of the index; the tensors stay in their shard."""
    path = directory / INDEX_FILE
    index = json.loads(path.read_text(encoding="utf-8"))
    for name in names:
        index["weight_map"].pop(name)
    path.write_text(json.dumps(index), encoding="utf-8")


def plain(*modules: str) -> Callable[[Built], dict[str, Tensor]]:
    """Weights from before the quantization, other values than the codes have."""
    return lambda built: {f"{name}.weight": (3 * built.dense[f"{name}.weight"]).bfloat16() for name in modules}


def all_experts(built: Built) -> dict[str, Tensor]:
    """The plain experts of one layer, as one tensor for each projection."""
    owner = EXPERT.partition(".2.")[0]
    weights = {name: (3 * tensor).bfloat16() for name, tensor in built.dense.items() if name.startswith(owner)}
    fuse_experts(weights)
    return weights


def surplus(_: Built) -> dict[str, Tensor]:
    return {
        "mtp.fc.weight": torch.ones(4, 4),
        "model.layers.0.self_attn.q_norm.bias": torch.ones(16),
        "model.old_adapter.lora_A.weight": torch.ones(4, 4),
    }


@pytest.mark.parametrize(
    "stale", [plain(LINEAR), plain(EXPERT), plain(LINEAR, EXPERT), all_experts, surplus], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("target", ["modelopt", "dense"])
def test_old_tensors_that_the_index_dropped_change_nothing(
    tmp_path: Path, stale: Callable[[Built], dict[str, Tensor]], target: str
) -> None:
    checkpoint = built(tmp_path)
    clean = plan_checkpoint(tmp_path, target)
    old = stale(checkpoint)
    rewrite(tmp_path, lambda stored: stored.update(old))
    unlist(tmp_path, old)

    plan = plan_checkpoint(tmp_path, target)

    assert plan.modules == clean.modules
    assert plan.stored.keys() == clean.stored.keys()
    assert any(UNREAD in warning for warning in plan.warnings)
    assert not any(READ in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    "names",
    [
        [f"{LINEAR}.weight_packed", f"{LINEAR}.weight_scale", f"{LINEAR}.weight_shape"],
        [f"{LINEAR}.weight_packed"],
        [f"{LINEAR}.weight_scale"],
        ["model.norm.weight"],
        ["lm_head.weight"],
        ["model.embed_tokens.weight"],
        ["model.layers.0.self_attn.k_scale"],
    ],
    ids=lambda names: names[0],
)
def test_tensors_that_the_index_forgot_are_read_with_a_warning(tmp_path: Path, names: list[str]) -> None:
    built(tmp_path)
    clean = plan_checkpoint(tmp_path)
    unlist(tmp_path, names)

    plan = plan_checkpoint(tmp_path)

    assert plan.stored.keys() == clean.stored.keys()
    assert {module.name: module for module in plan.modules} == {module.name: module for module in clean.modules}
    assert [warning for warning in plan.warnings if READ in warning]
    assert not any(UNREAD in warning for warning in plan.warnings)


def test_a_bias_that_the_index_forgot_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config=tiny_config("Qwen2ForCausalLM"), shards=2)
    clean = plan_checkpoint(tmp_path)
    unlist(tmp_path, [f"{LINEAR}.bias"])

    assert {delivery.name for delivery in plan_checkpoint(tmp_path).deliveries()} == {
        delivery.name for delivery in clean.deliveries()
    }
