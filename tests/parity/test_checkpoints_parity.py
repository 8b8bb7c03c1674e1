"""Whole checkpoints that the library writes, read by this package: equal plain weights, and no fault found in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import config_group, fp8_inputs, fp8_weights, int_weights, tiny_config
from library_builder import write_library_checkpoint

from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.loader import CompressedTensorsWeightLoader

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.library, pytest.mark.reference]

MIXED = {
    "mlp": config_group(int_weights(4, group_size=64), targets=["re:.*mlp.*_proj$"]),
    "attention": config_group(fp8_weights("channel"), fp8_inputs("token"), targets=["re:.*self_attn.*_proj$"]),
}
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "W4A16": ({"scheme": "W4A16"}, {"W4A16_AWQ g128": 7}),
    "W4A16_ASYM, float32": (
        {"scheme": "W4A16_ASYM", "config": tiny_config(layers=1, hidden=128, dtype="float32")},
        {"dequantized": 7},
    ),
    "W8A16": ({"scheme": "W8A16"}, {"dequantized": 7}),
    "int8 plain": (
        {"scheme": {"all": config_group(int_weights(8, "channel"))}, "save_format": "int-quantized"},
        {"W8A16": 7},
    ),
    "FP8 with KV cache": ({"scheme": "FP8", "kv": True}, {"FP8": 7}),
    "FP8_DYNAMIC, Qwen2": (
        {"scheme": "FP8_DYNAMIC", "config": tiny_config("Qwen2ForCausalLM", layers=1, hidden=128)},
        {"FP8_PER_CHANNEL_PER_TOKEN": 7},
    ),
    "mixed, tied Qwen3, shards": (
        {
            "scheme": MIXED,
            "config": tiny_config("Qwen3ForCausalLM", layers=1, hidden=128, tied=True),
            "max_shard_size": "40KB",
        },
        {"FP8_PER_CHANNEL_PER_TOKEN": 4, "W4A16_AWQ g64": 3},
    ),
}


# The preset W8A16 had another strategy in older releases.
@pytest.mark.parametrize(
    ("arguments", "modes"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.newest_library] if name == "W8A16" else [])
        for name, case in CASES.items()
    ],
)
def test_a_checkpoint_of_the_library_is_read_whole(
    arguments: dict[str, Any], modes: dict[str, int], tmp_path: Path
) -> None:
    arguments = {"config": tiny_config(layers=1, hidden=128)} | arguments
    written = write_library_checkpoint(tmp_path, **arguments)
    inspection = inspect_checkpoint(tmp_path)
    assert inspection.problems == ()
    is_float32 = arguments["config"]["dtype"] == "float32"
    assert [text.partition(":")[0] for text in inspection.warnings] == ["dtype of the model"] * is_float32
    delivered = {row.delivered_mode: len(row.modules) for row in inspection.rows() if row.delivered_mode != "plain"}
    assert delivered == modes
    dense = CompressedTensorsWeightLoader().load_weights(tmp_path, layout="dense")
    assert dense.keys() == written.dense.keys()
    for name, tensor in written.dense.items():
        assert torch.equal(dense[name], tensor), name
