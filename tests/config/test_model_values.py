"""Values of config.json are checked for type and bounds before anything is calculated with them."""

from __future__ import annotations

import time
from math import inf, nan
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite_config, write_checkpoint
from tiny_models import tiny_config

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CheckpointError, ConfigError, FaultCollector
from trtllm_ct.config.hf_config import portable_config, with_tie
from trtllm_ct.config.model_values import MODEL_VALUES, check_model_values, with_whole_numbers
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan.models.sites import Model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STRANGE = (
    "1", [1, "a"], {"a": 1}, True, 10**9, 10**18, -5, 1e308, float("nan"), float("inf"), "\n", "", "x" * 10**6,
    [[]], [None, {}], 0, 1, [],
)  # fmt: skip
FAMILIES = ("LlamaForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "NobodyForCausalLM")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", MODEL_VALUES)
def test_any_value_of_any_key_makes_a_model_or_an_error_that_names_the_key(key: str, family: str) -> None:
    config = tiny_config() | {"architectures": [family], "n_routed_experts": 4, "num_experts": 4}
    for value in STRANGE:
        started = time.process_time()
        try:
            Model.from_config(config | {key: value})
        except ConfigError as error:  # some values make a model
            faults = error.faults
        else:
            faults = ()
        assert all(fault.where.strip() and len(str(fault)) < 5000 for fault in faults)
        assert time.process_time() - started < 1


ROPE = {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e4, "factor": 4.0}
RESPELT = {
    "rope_theta": 1e4, "rope_scaling": ROPE, "partial_rotary_factor": 1.0, "rope_local_base_freq": 1e4,
    "compress_rope_theta": 1e4, "layers_block_type": ["mamba"], "mtp_layers_block_type": ["mamba"],
    "layer_types": ["sliding_attention"], "mlp_layer_types": ["moe"], "compress_rates": {"full_attention": 4},
    "num_nextn_predict_layers": 1, "layer_norm_epsilon": 1e-5, "num_local_experts": 4, "dtype": "bfloat16",
}  # fmt: skip
NEWER: tuple[dict[str, Any], ...] = (
    {},
    {"rope_parameters": ROPE},
    {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    {"rope_parameters": {"main": ROPE, "compress": ROPE}},
)
TYPES = (
    None,
    "llama",
    "nemotron_h",
    "deepseek_v4",
    "phi3",
    "qwen2_vl",
    "qwen3_vl_text",
    "gemma3_text",
    "olmo3",
    [],
    {},
)


def with_strange(config: dict[str, Any], value: object) -> Iterator[dict[str, Any]]:
    """Yield a configuration with each value at any depth replaced."""
    for key, inner in config.items():
        yield config | {key: value}
        if isinstance(inner, dict):
            yield from (config | {key: changed} for changed in with_strange(inner, value))


@pytest.mark.parametrize("model_type", TYPES, ids=str)
@pytest.mark.parametrize("part", [None, "text_config", "vision_config", "audio_config"])
def test_what_is_written_in_older_spellings_is_checked_before(part: str | None, model_type: object) -> None:
    for block in NEWER:
        config = RESPELT | block | ({} if model_type is None else {"model_type": model_type})
        for value in (*STRANGE, "abc", 10**400, {"__float__": "NaN"}, [1], {"a": {}}):
            for changed in with_strange(config, value):
                read = {part: changed} if part else changed
                faults = FaultCollector()
                started = time.process_time()
                check_model_values(read, faults)
                if not faults.faults:
                    with_tie(portable_config(with_whole_numbers(read), DType.BF16), tied=True)
                assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("LlamaForCausalLM", "num_hidden_layers"),
        ("Qwen3MoeForCausalLM", "num_hidden_layers"),
        ("Qwen3MoeForCausalLM", "num_experts"),
        ("MixtralForCausalLM", "num_local_experts"),
        ("DeepseekV3ForCausalLM", "n_routed_experts"),
    ],
)
def test_huge_counts_are_refused_from_headers(tmp_path: Path, family: str, key: str) -> None:
    directory = write_checkpoint(tmp_path / "model", config=tiny_config(family), scheme="dense").directory
    for value in (9_999, 99_999, 10**6, 10**9):
        rewrite_config(directory, lambda config, value=value: config.update({key: value}))
        started = time.process_time()

        with pytest.raises(CheckpointError, match=rf"config\.json: ({key}|number of experts)"):
            plan_checkpoint(directory, "dense")

        assert time.process_time() - started < 2


def test_real_values_are_accepted() -> None:
    faults = FaultCollector()
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 126, "intermediate_size": [8192] * 30,
        "head_dim": None, "sliding_window": -1, "rope_theta": 500000, "layer_types": ["full_attention"] * 40,
        "moe_layer_freq": [0, 1, 1], "n_routed_experts": 384, "text_config": {"num_hidden_layers": 61},
        "attn_config": {"model_type": ""},
    }  # fmt: skip
    check_model_values(values, faults)
    assert faults.faults == []


def test_values_of_parts_are_named_with_their_path() -> None:
    faults = FaultCollector()
    check_model_values({"text_config": {"llm_config": {"hidden_size": "1"}}}, faults)
    assert [fault.where for fault in faults.faults] == ["config.json: text_config.llm_config.hidden_size"]


def test_whole_numbers_may_be_stored_as_floats() -> None:
    config = {"max_position_embeddings": 1200.0, "text_config": {"hidden_size": [64.0, 128]}, "rope_theta": 10000.0}
    faults = FaultCollector()

    check_model_values(config, faults)

    assert faults.faults == []
    read = with_whole_numbers(config)
    assert repr(read["max_position_embeddings"]) == "1200"
    assert repr(read["text_config"]) == "{'hidden_size': [64, 128]}"
    assert repr(read["rope_theta"]) == "10000.0"


@pytest.mark.parametrize("value", [1200.5, inf, nan, 1e30, True])
def test_other_floats_are_no_numbers_of_anything(value: float) -> None:
    faults = FaultCollector()

    check_model_values({"max_position_embeddings": value}, faults)

    assert [fault.where for fault in faults.faults] == ["config.json: max_position_embeddings"]


@pytest.mark.parametrize("value", [10**400, -(10**400), inf, nan, True])
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_what_no_float_holds_is_no_number(key: str, value: object) -> None:
    """JSON has integers of any length."""
    faults = FaultCollector()

    check_model_values({key: value}, faults)

    assert [fault.where for fault in faults.faults] == [f"config.json: {key}"]
