"""What a row and config.json say about a checkpoint is asked for without transformers, whatever its layers have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import rewrite, rewrite_config
from class_models import CLASSES, write_class
from decoder_models import DECODERS, write_decoder

from trtllm_ct.base.errors import PlanError
from trtllm_ct.pipeline.open import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

pytestmark = [pytest.mark.reference, pytest.mark.newest_transformers]

MODEL = "Glm4MoeForCausalLM"


def faults_of(directory: Path) -> dict[str, tuple[str, str]]:
    with pytest.raises(PlanError) as caught:
        open_checkpoint(directory).plan("modelopt", engine="stock-1.3")
    return {fault.where: (fault.expected, fault.found) for fault in caught.value.faults}


def without(*ends: str) -> Callable[[dict[str, Tensor]], object]:
    """Drops every tensor of the modules whose names end so."""
    return lambda stored: [stored.pop(name) for name in [*stored] if name.rpartition(".")[0].endswith(ends)]


@pytest.mark.parametrize("lost", ["self_attn.v_proj", "shared_experts.up_proj"])
def test_a_part_of_a_fused_linear_that_every_layer_has_lost_is_a_fault(tmp_path: Path, lost: str) -> None:
    """All layers are alike, so only the row tells that something is missing."""
    write_decoder(tmp_path, MODEL, "fp8-channel-token")
    rewrite(tmp_path, without(lost))

    faults = faults_of(tmp_path)
    assert faults
    assert all(where.rpartition(".")[0].endswith(lost) for where in faults)
    assert set(faults.values()) == {(f"a tensor that layers of {MODEL} have", "no such tensor in any shard")}


def test_layers_without_their_last_experts_are_faults(tmp_path: Path) -> None:
    write_decoder(tmp_path, MODEL, "fp8-channel-token")
    experts = open_checkpoint(tmp_path).hf_config["n_routed_experts"]
    last = f".experts.{experts - 1}."
    rewrite(tmp_path, lambda stored: [stored.pop(name) for name in [*stored] if last in name])

    faults = faults_of(tmp_path)
    assert faults
    assert set(faults.values()) == {(f"{experts} experts, by config.json", str(experts - 1))}


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_ends_of_another_width_are_faults(tmp_path: Path, name: str) -> None:
    write_decoder(tmp_path, MODEL, "fp8-channel-token")
    rewrite(tmp_path, lambda stored: stored.update({name: torch.zeros(stored[name].shape[0] - 1, 3)}))

    assert faults_of(tmp_path)[name][0].endswith("by the sizes in config.json")


@pytest.mark.parametrize("name", [*CLASSES, *DECODERS])
def test_no_whole_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (write_class if name in CLASSES else write_decoder)(tmp_path, name, "fp8-channel-token")

    assert open_checkpoint(tmp_path).plan("dense").modules


def test_more_rows_than_tokens_are_no_fault(tmp_path: Path) -> None:
    """The embeddings of Mllama have rows for special tokens behind those of the vocabulary."""
    write_decoder(tmp_path, MODEL, "fp8-channel-token")
    rewrite_config(tmp_path, lambda config: config.update(vocab_size=config["vocab_size"] - 1))

    assert open_checkpoint(tmp_path).plan("dense").modules
