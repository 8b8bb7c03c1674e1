"""Which quantized heads keep their codes, how the engine's configuration names them, and why others do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import tiny_config, write_checkpoint
from multimodal import PLACES, write_multimodal

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.reference import load_model
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.plan import ModulePlan

HEADS = {"fp8-tensor-static": "FP8", "nvfp4": "NVFP4", "nvfp4a16": "W4A16_NVFP4"}
NEW = "stock-1.3"
PLAIN = "engines read this module plain"


def head_of(directory: Path, config: dict[str, Any], scheme: str, **options: Any) -> ModulePlan:
    write_checkpoint(directory, config=config, scheme={"lm_head": scheme, "o_proj": scheme})
    return plan_checkpoint(directory, "modelopt", **options).module("lm_head")


def sized(**more: Any) -> dict[str, Any]:
    return tiny_config(**{"hidden": 128, "vocab_size": 128, **more})


@pytest.mark.parametrize("target", ["modelopt", "tensorrt_llm"])
@pytest.mark.parametrize("scheme", HEADS)
def test_a_quantized_head_has_an_entry_of_its_own(tmp_path: Path, scheme: str, target: str) -> None:
    """Even where all modules have one mode: engines would look for its scales in the files of the directory."""
    write_checkpoint(tmp_path, config=sized(), scheme=dict.fromkeys(("lm_head", "o_proj"), scheme))

    plan = plan_checkpoint(tmp_path, target, engine=NEW)

    assert plan.module("lm_head").layer is not None
    assert plan.quant_config.quant_algo is QuantAlgo.MIXED_PRECISION
    assert plan.quant_config.layer_config("lm_head") == plan.module("lm_head").layer
    assert plan.module("lm_head").delivered_mode.partition(" ")[0] == HEADS[scheme]
    assert "lm_head" not in plan.quant_config.exclude_modules
    assert "model.embed_tokens" in plan.quant_config.exclude_modules


@pytest.mark.parametrize("body", list(PLACES))
def test_the_entry_has_the_name_inside_of_the_text_model_too(tmp_path: Path, body: str) -> None:
    text = sized(kv_heads=4, model_type="mistral")
    write_multimodal(tmp_path, body, text=text, scheme=dict.fromkeys(("lm_head", "o_proj"), "nvfp4"))

    config = plan_checkpoint(tmp_path, "modelopt", engine=NEW).quant_config

    assert {"lm_head", PLACES[body]} <= config.quantized_layers.keys()


@pytest.mark.parametrize(
    ("scheme", "engine", "reason"),
    [
        ("nvfp4", "stock-1.2", "stock-1.2 has no NVFP4 head; stock-1.3 has one"),
        ("nvfp4a16", "stock-1.0", "stock-1.0 has no W4A16_NVFP4 head; stock-1.3 has one"),
        ("fp8-channel-token", NEW, "FP8_PER_CHANNEL_PER_TOKEN would hold it, and stock-1.3 has no such head"),
        ("fp8-block", NEW, "FP8_BLOCK_SCALES would hold it, and stock-1.3 has no such head"),
        ("int8-channel", NEW, PLAIN),
        ("int4-g64", NEW, PLAIN),
        ("mxfp4", NEW, PLAIN),
    ],
)
def test_other_heads_are_dequantized_with_the_reason(tmp_path: Path, scheme: str, engine: str, reason: str) -> None:
    head = head_of(tmp_path, sized(), scheme, engine=engine)

    assert (head.layer, head.reason) == (None, reason)


@pytest.mark.parametrize(("vocabulary", "tensor", "kept"), [(128, 4, True), (96, 2, True), (96, 4, False)])
def test_ranks_take_whole_tiles_of_the_head(tmp_path: Path, vocabulary: int, tensor: int, kept: bool) -> None:
    """The head of the engine refuses to be padded, and kernels want a multiple of 16 rows."""
    config = sized(vocab_size=vocabulary, kv_heads=4)
    for dp in (False, True):
        parallel = Parallel(tensor=tensor, attention_dp=dp)
        head = head_of(tmp_path / f"{dp}", config, "fp8-tensor-static", engine=NEW, parallel=parallel)
        assert (head.layer is not None) is (kept or dp)
        assert ("24 rows are no multiple of 16" in head.reason) is not (kept or dp)


def test_a_head_that_draft_layers_share_is_plain(tmp_path: Path) -> None:
    head = head_of(tmp_path, sized(num_nextn_predict_layers=1), "nvfp4", engine=NEW)

    assert (head.layer, head.reason) == (None, PLAIN)


def test_a_tied_head_has_no_mode_unless_it_differs_from_the_table(tmp_path: Path) -> None:
    for name, tied in (("tied", True), ("untied", False)):
        write_checkpoint(
            tmp_path / name,
            config=sized(tied=tied),
            scheme=dict.fromkeys(("lm_head", "o_proj"), "nvfp4"),
        )
        plan = plan_checkpoint(tmp_path / name, "modelopt", engine=NEW)
        assert ("lm_head.weight_scale" in plan.delivered_specs) is not tied


@pytest.mark.reference
@pytest.mark.parametrize("scheme", HEADS)
def test_the_converted_head_is_proved_and_computes_the_same(tmp_path: Path, scheme: str) -> None:
    write_checkpoint(tmp_path / "in", config=sized(), scheme=dict.fromkeys(("lm_head", "o_proj"), scheme))
    convert_checkpoint(tmp_path / "in", tmp_path / "out", engine=NEW)
    convert_checkpoint(tmp_path / "in", tmp_path / "dense", to="dense")

    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").good
    tokens = torch.tensor([[5, 17, 3, 42, 8, 66]])
    logits = [
        load_model(tmp_path / name, dtype=torch.float32, quantize_activations=False)(tokens).logits
        for name in ("out", "dense")
    ]
    assert (logits[0] - logits[1]).abs().max() < logits[1].abs().max() * 2**-6
