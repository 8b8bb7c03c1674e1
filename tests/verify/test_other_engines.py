"""`verify DIR OUT` where OUT is an engine-build checkpoint of something else: faults that say so, and no traceback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import write_checkpoint
from engine_sources import with_shared_globals
from tiny_models import tiny_config

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.verify.verify import VerificationReport

SIZES = {"hidden": 128, "heads": 2, "kv_heads": 1, "intermediate": 128, "vocabulary": 97, "layers": 2}
STATIC = dict.fromkeys([f"{part}_proj" for part in ("q", "v", "o", "gate", "up", "down")], "fp8-tensor-static")
SOURCES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "int4-g64", {}),
    "more layers": ("LlamaForCausalLM", "int4-g64", {"layers": 3}),
    "wider": ("LlamaForCausalLM", "int4-g64", {"hidden": 256}),
    "more heads": ("LlamaForCausalLM", "int4-g64", {"heads": 4}),
    "more K/V heads": ("LlamaForCausalLM", "int4-g64", {"kv_heads": 2}),
    "more words": ("LlamaForCausalLM", "int4-g64", {"vocabulary": 128}),
    "mixture": ("MixtralForCausalLM", "dense", {}),
    "more experts": ("MixtralForCausalLM", "dense", {"num_local_experts": 8}),
    "qwen3": ("Qwen3ForCausalLM", "int4-g64", {}),
    "dense": ("LlamaForCausalLM", "dense", {}),
    "int4-g64-asym": ("LlamaForCausalLM", "int4-g64-asym", {}),
    "int8-channel": ("LlamaForCausalLM", "int8-channel", {}),
    "w8a8": ("LlamaForCausalLM", "w8a8", {}),
    "w8a8-static": ("LlamaForCausalLM", "w8a8-static", {}),
    "fp8-tensor-static": ("LlamaForCausalLM", "fp8-tensor-static", {}),
    "fp8-channel-token": ("LlamaForCausalLM", "fp8-channel-token", {}),
    "fp8-weight-only": ("LlamaForCausalLM", "fp8-weight-only", {}),
    "plain keys": ("LlamaForCausalLM", STATIC, {}),
    "keys with wide inputs": ("LlamaForCausalLM", STATIC | {"k_proj": "fp8-weight-only"}, {}),
    "nvfp4": ("LlamaForCausalLM", "nvfp4", {}),
    "experts of another class": ("Qwen3MoeForCausalLM", "int4-g64", {"moe_intermediate_size": 64}),
}
"""Checkpoints that differ in one thing each; those of equal sizes have their weights from the same random numbers."""
WITHOUT_ENGINE = {"fp8-weight-only", "keys with wide inputs", "experts of another class"}
ENGINES = sorted(SOURCES.keys() - WITHOUT_ENGINE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each source, with its engine directory `out` for two ranks."""
    made = {}
    for name, (architecture, scheme, more) in SOURCES.items():
        made[name] = folder = tmp_path_factory.mktemp("made")
        edit = with_shared_globals if scheme == "nvfp4" else None
        write_checkpoint(folder / "in", config=tiny_config(architecture, **SIZES | more), scheme=scheme, edit=edit)
        if name not in WITHOUT_ENGINE:
            convert_checkpoint(folder / "in", folder / "out", to="engine", parallel=Parallel(tensor=2))
    return made


def verified(folders: dict[str, Path], source: str, engine: str) -> VerificationReport:
    return verify_checkpoint(folders[source] / "in", folders[engine] / "out")


@pytest.mark.parametrize("source", SOURCES)
def test_only_its_own_engine_is_good(source: str, folders: dict[str, Path]) -> None:
    good = {engine for engine in ENGINES if verified(folders, source, engine).good}

    assert good == {source} - WITHOUT_ENGINE


@pytest.mark.parametrize(
    ("source", "engine", "keys"),
    [
        ("more layers", "llama", {"num_hidden_layers"}),
        ("llama", "more heads", {"num_attention_heads", "head_size"}),
        ("llama", "more K/V heads", {"num_key_value_heads"}),
        ("llama", "mixture", {"architecture", "moe"}),
    ],
)
def test_an_engine_of_another_model_is_named_by_its_sizes(
    source: str, engine: str, keys: set[str], folders: dict[str, Path]
) -> None:
    """Its tensors are not compared: parts are where config.json has them."""
    report = verified(folders, source, engine)

    assert not report.checks
    assert keys <= {fault.where.rpartition(": ")[2] for fault in report.faults}


@pytest.mark.parametrize(
    ("source", "engine", "expected", "found"),
    [
        ("w8a8", "int8-channel", "inputs in int8 token dynamic", "W8A16"),
        ("int8-channel", "w8a8", "inputs in 16 bits", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"),
        ("llama", "fp8-tensor-static", "inputs in 16 bits", "FP8"),
        ("fp8-weight-only", "fp8-channel-token", "inputs in 16 bits", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("w8a8-static", "w8a8", "inputs in int8 tensor", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"),
        ("dense", "nvfp4", "inputs in 16 bits", "NVFP4"),
    ],
)
def test_an_engine_that_narrows_inputs_otherwise_is_a_fault(
    source: str, engine: str, expected: str, found: str, folders: dict[str, Path]
) -> None:
    """Once for all Linears, even if their weights are equal."""
    faults = [fault for fault in verified(folders, source, engine).faults if "inputs in" in fault.expected]

    assert [fault.where for fault in faults] == ["rank0.safetensors: transformer.layers.0.attention.qkv and 9 more"]
    assert expected in faults[0].expected
    assert found in faults[0].found
