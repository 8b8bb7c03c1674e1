"""The rotary embedding that an engine builds from our config.json is the one that transformers computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from engine_builder import rotary_table
from installed_transformers import typed_config

from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.plan.engine_files.rope import Rope, rope_of

ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
LENGTH = 32768
YARN = {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 4096}
"""The factor is the ratio of the two lengths, which is what transformers before 4.55 takes for it."""
HEAD = 128
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, other bounds": YARN | {"beta_fast": 16, "beta_slow": 2},
    "yarn, no bounds": YARN | {"beta_fast": None, "beta_slow": 0},
    "yarn, length of the model": {"rope_type": "yarn", "factor": 4.0},
    "yarn, factor of attention": YARN | {"attention_factor": 1.25},
    "yarn, no factor of attention": YARN | {"attention_factor": 1.0},
    "yarn, usual factor of attention": YARN | {"attention_factor": 0.1 * math.log(8) + 1},
    "yarn, both factors": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5},
    "yarn, one factor": YARN | {"mscale": 0.7},
    "yarn, another ratio of lengths": YARN | {"factor": 4.0},
    "yarn, shorter": YARN | {"factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
NEWEST = {
    *("yarn, no bounds", "yarn, one factor", "yarn, both factors"),
    *("yarn, another ratio of lengths", "yarn, shorter"),
}
"""Those that transformers 4, or some releases of it, refuse or read otherwise."""


def read(text: dict[str, Any], **more: Any) -> tuple[Rope, FaultCollector]:
    faults = FaultCollector()
    return rope_of(text, more.get("base", 10000.0), more.get("length", LENGTH), faults), faults


def built(rope: Rope, **more: Any) -> tuple[np.ndarray, float]:
    """What the builder makes of the keys that a directory has."""
    config = {"position_embedding_type": "rope_gpt_neox", "max_position_embeddings": rope.length, "head_size": HEAD}
    return rotary_table(config | {"rotary_base": rope.base, "rotary_scaling": rope.scaling}, **more)


def computed(block: dict[str, Any]) -> tuple[np.ndarray, float]:
    """What transformers computes at sequences that are no longer than the model."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = typed_config(
        "llama",
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_theta": 500000.0, **block},
    )
    embedding = LlamaRotaryEmbedding(config)
    return embedding.inv_freq.numpy(), float(embedding.attention_scaling)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "type"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.newest_transformers] if name in NEWEST else []) for name in KINDS],
)
def test_the_engine_computes_the_embedding_of_the_source(name: str, spelling: str) -> None:
    block = KINDS[name]
    spelled = {"type": block["rope_type"], **{key: value for key, value in block.items() if key != "rope_type"}}
    text = {
        "rope_parameters": {"rope_parameters": {"rope_theta": 500000, **block}},
        "rope_scaling": {"rope_theta": 500000.0, "rope_scaling": block},
        "type": {"rope_theta": 500000.0, "rope_scaling": spelled},
    }[spelling]

    rope, faults = read(text)

    assert not faults.faults
    frequencies, attention = built(rope)
    want, factor = computed(block)
    np.testing.assert_allclose(frequencies, want, rtol=1e-6)
    assert attention == pytest.approx(factor, rel=1e-6)


def test_only_keys_that_engines_read_are_written() -> None:
    rope, _ = read({"rope_scaling": YARN | {"beta_fast": None, "beta_slow": 1, "finetuned": True}})

    assert rope.scaling == {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 4096}


class TestDynamic:
    """Engines compute another table for it, or stop at a key that it doesn't have; shorter sequences need none."""

    def test_it_is_left_out_with_the_length_from_which_on_it_counts(self) -> None:
        rope, faults = read({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, length=4096)

        assert not faults.faults
        assert rope.scaling is None
        assert "sequences of up to 4096 tokens as the model does" in rope.warning

    @pytest.mark.parametrize("release", ["1.0", "1.2"])
    def test_written_as_such_it_would_be_wrong_in_every_release(self, release: str) -> None:
        rope = Rope(base=500000.0, length=LENGTH, scaling=KINDS["dynamic"])

        if release == "1.0":
            frequencies, _ = built(rope, before_hunyuan=True)
            assert not np.allclose(frequencies, computed(KINDS["dynamic"])[0], rtol=1e-3)
        else:
            with pytest.raises(KeyError, match="alpha"):
                built(rope)

    def test_scaling_that_counts_for_every_length_is_refused(self) -> None:
        _, faults = read({"rope_scaling": {"type": "dynamic", "factor": 4.0, "alpha": 1000.0}})

        assert [fault.found for fault in faults.faults] == ["alpha"]


@pytest.mark.parametrize(
    ("block", "warned"),
    [
        ({"rope_type": "linear", "factor": 2.0}, True),
        ({"rope_type": "linear", "factor": 1.0}, False),
        (YARN, True),
        (LLAMA3, False),
        ({"rope_type": "default"}, False),
    ],
)
def test_a_builder_whose_default_length_is_past_its_table_is_named(block: dict[str, Any], warned: bool) -> None:
    rope, _ = read({"rope_parameters": block})

    assert (f"--max_seq_len {LENGTH} or less" in rope.warning) == warned


def test_what_no_converter_writes_is_named() -> None:
    assert read({"rope_scaling": YARN})[0].derived == "rotary_scaling of type yarn"
    assert read({"rope_scaling": LLAMA3})[0].derived == ""


def test_an_original_length_beside_the_block_counts() -> None:
    scaling = {"type": "yarn", "factor": 4.0}
    rope, _ = read({"rope_scaling": scaling, ORIGINAL: 1024})

    assert rope.scaling == {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 1024}


def test_a_base_in_the_block_of_the_scaling_counts() -> None:
    rope, _ = read({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}})

    assert (rope.base, rope.scaling) == (5e5, {"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (YARN | {"truncate": False}, "truncate"),
        (YARN | {"truncate": None}, "truncate"),
        (YARN | {"factor": 1.0, "attention_factor": 1.25}, "attention_factor 1.25"),
    ],
)
def test_what_engines_do_not_compute_of_yarn_is_refused(block: dict[str, Any], found: str) -> None:
    _, faults = read({"rope_scaling": block})

    assert [fault.found for fault in faults.faults] == [found]


@pytest.mark.parametrize(
    "text",
    [
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {**LLAMA3}},
        {"rope_scaling": YARN, ORIGINAL: 2048},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        {"rope_scaling": {"type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "dynamic"}},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ],
)
def test_contradictions_and_other_kinds_are_faults(text: dict[str, Any]) -> None:
    assert len(read(text)[1].faults) == 1


@pytest.mark.parametrize("value", [True, "2.0", [2.0], {}, math.nan, math.inf, 0, -1.0])
@pytest.mark.parametrize("key", ["rope_theta", "factor", "low_freq_factor", "high_freq_factor", ORIGINAL])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_a_value_that_is_no_positive_number_is_a_fault(key: str, value: Any, spelling: str) -> None:
    rope, faults = read({spelling: LLAMA3 | {key: value}})

    assert [fault.where for fault in faults.faults] == [f"config.json: {spelling}.{key}"]
    assert rope.scaling is None


@pytest.mark.parametrize("value", [True, "1.0", [1.0], math.nan])
@pytest.mark.parametrize("key", ["beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"])
def test_an_optional_value_that_is_no_number_is_a_fault(key: str, value: Any) -> None:
    _, faults = read({"rope_scaling": YARN | {key: value}})

    assert [fault.where for fault in faults.faults] == [f"config.json: rope_scaling.{key}"]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", [True, "linear", 2.0, ["linear"]])
def test_a_block_that_is_no_object_is_a_fault(key: str, value: Any) -> None:
    _, faults = read({key: value})

    assert [(fault.where, fault.expected) for fault in faults.faults] == [(f"config.json: {key}", "an object")]
