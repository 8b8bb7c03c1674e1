"""JSON of a converted directory with values of another type: every command ends with a fault, none with a traceback."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

from trtllm_ct.convert.convert import convert_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUANTIZATION, CONFIG = "hf_quant_config.json", "config.json"


@pytest.fixture(name="made", scope="module")
def fixture_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    scheme = {"o_proj": "fp8-block", "down_proj": "fp8-channel-token"}
    config = tiny_config(hidden=256, heads=4, kv_heads=2, intermediate=512, head_dim=64)
    write_checkpoint(root / "in", config=config, scheme=scheme)
    convert_checkpoint(root / "in", root / "out")
    return root


def block(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["quantization"].update(values)


def top(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document.update(values)


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a block that is a string": (QUANTIZATION, top(quantization="x")),
    "a block that is a list": (QUANTIZATION, top(quantization=[1])),
    "no block": (QUANTIZATION, lambda document: document.pop("quantization")),
    "layers in a list": (QUANTIZATION, block(quantized_layers=["a"])),
    "a layer that is a string": (QUANTIZATION, block(quantized_layers={"a": "FP8"})),
    "a layer without an algorithm": (QUANTIZATION, block(quantized_layers={"a": {}})),
    "a layer with null": (QUANTIZATION, block(quantized_layers={"a": None})),
    "an unknown algorithm": (QUANTIZATION, block(quantized_layers={"a": {"quant_algo": "X"}})),
    "a group size in words": (QUANTIZATION, block(quantized_layers={"a": {"quant_algo": "FP8", "group_size": "x"}})),
    "exclusions that are a number": (QUANTIZATION, block(exclude_modules=5)),
    "numbers among exclusions": (QUANTIZATION, block(exclude_modules=[5])),
    "exclusions that are a string": (QUANTIZATION, block(exclude_modules="lm_head")),
    "a cache that is a list": (QUANTIZATION, block(kv_cache_quant_algo=["FP8"])),
    "no heads": (CONFIG, top(num_attention_heads=0)),
    "heads in words": (CONFIG, top(num_attention_heads="4")),
    "a number of layers that nobody has": (CONFIG, top(num_hidden_layers=10**9)),
    "a negative size": (CONFIG, top(hidden_size=-5)),
    "a tie in words": (CONFIG, top(tie_word_embeddings="false")),
    "a text model in a list": (CONFIG, top(text_config=[1])),
    "a class that is a number": (CONFIG, top(architectures=[5])),
    "an unknown type": (CONFIG, top(model_type=5)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_command_ends_with_a_fault(made: Path, tmp_path: Path, damage: str) -> None:
    file, edit = DAMAGES[damage]
    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    document = json.loads((out / file).read_text())
    edit(document)
    (out / file).write_text(json.dumps(document))

    for command in (
        ("verify", made / "in", out),
        ("verify", made / "in", out, "--tp", "2"),
        ("verify", out, "--tp", "2"),
        ("generate", out, "--prompt", "a", "--max-tokens", "1"),
    ):
        done = run_cli(*command)
        assert done.code == 1, command
        assert "Traceback" not in done.out + done.err, command
    assert run_cli("doctor", out, "--tp", "2").code in {0, 1}
