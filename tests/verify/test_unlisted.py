"""Tensors that the index of a source does not list: old ones are no loss, and forgotten ones must be delivered."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from builders import Built, rewrite, tiny_config, write_checkpoint
from fused_experts import fuse_experts

from trtllm_ct import convert_checkpoint, verify_checkpoint
from trtllm_ct.checkpoint.catalog import INDEX_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

MOE = tiny_config("Qwen3MoeForCausalLM")
LINEAR = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.1.mlp.experts."


def unlist(directory: Path, names: Iterable[str]) -> None:
    path = directory / INDEX_FILE
    index = json.loads(path.read_text(encoding="utf-8"))
    for name in names:
        index["weight_map"].pop(name, None)
    path.write_text(json.dumps(index), encoding="utf-8")


def old_experts(built: Built) -> dict[str, Tensor]:
    weights = {name: (3 * tensor).bfloat16() for name, tensor in built.dense.items() if name.startswith(EXPERTS)}
    fuse_experts(weights)
    return weights


def old_tensors(kind: str, built: Built) -> dict[str, Tensor]:
    if kind == "a stack of experts":
        return old_experts(built)
    return {
        "a weight beside its codes": {f"{LINEAR}.weight": torch.ones(64, 64)},
        "a parameter": {f"{LINEAR}.momentum": torch.ones(4)},
        "a module": {"model.layers.0.adapter.lora_A.weight": torch.ones(4, 4)},
        "a module of the body": {"model.old.weight": torch.ones(4, 4)},
        "a layer after the last one": {"model.layers.2.mlp.gate.weight": torch.ones(4, 64)},
        "a draft": {"mtp.fc.weight": torch.ones(4, 4)},
    }[kind]


@pytest.mark.parametrize("target", ["modelopt", "dense"])
@pytest.mark.parametrize(
    "kind",
    [
        *("a stack of experts", "a weight beside its codes", "a parameter", "a module", "a module of the body"),
        *("a layer after the last one", "a draft"),
    ],
)
def test_old_tensors_that_the_index_dropped_are_no_loss(tmp_path: Path, kind: str, target: str) -> None:
    source = write_checkpoint(tmp_path / "in", config=dict(MOE), scheme="int4-g32", shards=2)
    old = old_tensors(kind, source)
    rewrite(source.directory, lambda stored: stored.update(old))
    unlist(source.directory, old)
    convert_checkpoint(source.directory, tmp_path / "out", to=target)

    assert verify_checkpoint(source.directory, tmp_path / "out").faults == ()


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.2.mlp.gate_proj.weight", "model.layers.0.adapter.lora_A.weight", "model.old.weight"),
        *("mtp.fc.weight", f"{LINEAR}.momentum"),
    ],
)
def test_they_are_no_loss_for_files_of_an_engine_either(tmp_path: Path, name: str) -> None:
    config = tiny_config(hidden=256, intermediate=256)
    source = write_checkpoint(tmp_path / "in", config=config, scheme="fp8-tensor-static", shards=2).directory
    rewrite(source, lambda stored: stored.update({name: torch.ones(4, 4)}))
    unlist(source, [name])
    convert_checkpoint(source, tmp_path / "out", to="engine", engine="stock-1.0")

    assert verify_checkpoint(source, tmp_path / "out").faults == ()


@pytest.mark.parametrize(
    ("forgotten", "lost"),
    [
        ([f"{LINEAR}.weight_packed", f"{LINEAR}.weight_scale", f"{LINEAR}.weight_shape"], f"{LINEAR}.weight"),
        ([f"{LINEAR}.weight_scale"], f"{LINEAR}.weight"),
        ([f"{EXPERTS}2.up_proj.weight_packed"], f"{EXPERTS}2.up_proj.weight"),
        (["model.layers.1.input_layernorm.weight"], "model.layers.1.input_layernorm.weight"),
        (["model.norm.weight"], "model.norm.weight"),
        (["lm_head.weight"], "lm_head.weight"),
        (["model.embed_tokens.weight"], "model.embed_tokens.weight"),
    ],
    ids=lambda names: names if isinstance(names, str) else "",
)
def test_tensors_that_the_index_forgot_must_be_delivered(tmp_path: Path, forgotten: list[str], lost: str) -> None:
    source = write_checkpoint(tmp_path / "in", config=dict(MOE), scheme="int4-g32", shards=2).directory
    unlist(source, forgotten)
    convert_checkpoint(source, tmp_path / "out", to="dense")
    assert verify_checkpoint(source, tmp_path / "out").faults == ()

    rewrite(tmp_path / "out", lambda stored: stored.pop(lost))

    assert any(fault.where.startswith(lost) for fault in verify_checkpoint(source, tmp_path / "out").faults)
