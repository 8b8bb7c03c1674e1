"""`LLM(requantize=...)` rounds the same weights to the same codes as a converted directory has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import engine_double
import pytest
import torch
from builders import tiny_config, write_checkpoint
from engine_fixtures import BINDINGS

import trtllm_ct
from trtllm_ct.base.errors import UsageError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.requantization import Requantize
from trtllm_ct.reference import load_model
from trtllm_ct.serve.sidecar import Sidecar

if TYPE_CHECKING:
    from pathlib import Path

    from builders import Built

EXPERTS = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g32")
TOKENS = [5, 17, 3, 42, 8, 66, 90, 2]


@pytest.fixture
def built(tmp_path: Path) -> Built:
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=256)
    return write_checkpoint(tmp_path / "in", config=config, scheme=EXPERTS)


@pytest.mark.reference
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (2, 2)], ids="tp {0[0]}, ep {0[1]}".format)
def test_the_plug_in_rounds_what_each_rank_needs(
    built: Built, tmp_path: Path, sidecar_cache: Path, sizes: tuple[int, int]
) -> None:
    """The same weights as in a converted directory, on every rank."""
    convert_checkpoint(
        built.directory, tmp_path / "out", engine="stock-1.3", requantize=Requantize.parse("experts=fp8-block")
    )
    parallel = {"tensor_parallel_size": sizes[0], "moe_expert_parallel_size": sizes[1]}

    with engine_double.installed("newest", importers=[BINDINGS]):
        llm = trtllm_ct.LLM(built.directory, requantize="experts=fp8-block", skip_tokenizer_init=True, **parallel)
        got = llm.logits(TOKENS)

    model = load_model(tmp_path / "out", dtype=torch.float32, quantize_activations=False)
    with torch.no_grad():
        want = model(torch.tensor([TOKENS])).logits[0]
    assert float((got - want).abs().max() / want.std()) < 2e-3


def test_a_prepared_directory_remembers_what_was_asked_for(built: Built, sidecar_cache: Path) -> None:
    asked = trtllm_ct.prepare(built.directory, requantize={"experts": "fp8-block"})
    plain = trtllm_ct.prepare(built.directory)

    assert asked != plain
    assert Sidecar.open(asked).options.requantize == Requantize.parse("experts=fp8-block")
    assert Sidecar.open(plain).options.requantize == Requantize()


def test_unknown_words_are_refused_before_anything_is_prepared(built: Built, sidecar_cache: Path) -> None:
    with pytest.raises(UsageError, match="--requantize"):
        trtllm_ct.prepare(built.directory, requantize="experts=int4")

    assert not sidecar_cache.exists()
