"""The embeddings, the final norm and the head of a class with a row: no layer is like them, so each is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import rewrite, rewrite_config
from decoder_models import write_decoder

from trtllm_ct.base.errors import PlanError
from trtllm_ct.pipeline.loader import CompressedTensorsWeightLoader
from trtllm_ct.pipeline.open import open_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.reference, pytest.mark.newest_transformers]

TABLE, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_decoder(tmp_path, "SeedOssForCausalLM", "fp8-channel-token")
    rewrite_config(tmp_path, lambda config: config.update(tie_word_embeddings=False))
    return tmp_path


@pytest.mark.parametrize("name", [TABLE, NORM, HEAD])
def test_a_lost_end_is_a_fault_without_the_class_too(directory: Path, name: str) -> None:
    """Loaders compare with no class of transformers."""
    rewrite(directory, lambda tensors: tensors.pop(name))

    with pytest.raises(PlanError) as caught:
        open_checkpoint(directory).plan("modelopt", engine="stock-1.3")

    assert [(fault.where, fault.found) for fault in caught.value.faults] == [(name, "no such tensor in any shard")]


def test_a_tied_head_alone_is_the_embeddings(directory: Path) -> None:
    """As transformers 5 ties them; the engine's class reads the embeddings."""
    rewrite_config(directory, lambda config: config.update(tie_word_embeddings=True))
    head: list[torch.Tensor] = []
    rewrite(directory, lambda tensors: (head.append(tensors[HEAD]), tensors.pop(TABLE)))

    for layout in ("native", "dense"):
        weights = CompressedTensorsWeightLoader().load_weights(directory, layout=layout)
        assert HEAD not in weights
        assert torch.equal(weights[TABLE], head[0].to(weights[TABLE].dtype))
