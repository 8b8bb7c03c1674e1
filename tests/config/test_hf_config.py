"""A config.json that transformers 4 and transformers 5 both read."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config
from installed_transformers import has_newest_transformers

from trtllm_ct.base.dtypes import DType
from trtllm_ct.config.hf_config import portable_config

if TYPE_CHECKING:
    from pathlib import Path

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# transformers 5 and transformers 4, for the same rotary embedding.
ROPE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": (
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {"rope_theta": 500000.0, "rope_scaling": None},
    ),
    "llama3": (
        {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    ),
    "yarn": (
        {"rope_parameters": {"rope_theta": 1000000.0, **YARN}},
        {"rope_theta": 1000000.0, "rope_scaling": YARN},
    ),
}


def config(rope: dict[str, Any]) -> dict[str, Any]:
    return tiny_config(**({"rope_parameters": None} | rope))


def portable(**entries: Any) -> dict[str, Any]:
    return portable_config(entries, DType.BF16)


@pytest.mark.parametrize("rope_type", ROPE)
def test_the_older_spelling_is_derived_from_the_newer(rope_type: str) -> None:
    newer, older = ROPE[rope_type]

    assert portable(**newer) | newer | older == portable(**newer)


@pytest.mark.parametrize("rope_type", ROPE)
def test_the_newer_spelling_is_derived_from_the_older(rope_type: str) -> None:
    newer, older = ROPE[rope_type]

    assert portable(**older) | newer | older == portable(**older)


def test_the_oldest_spelling_of_rope_type_is_type() -> None:
    made = portable(rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2.0})

    assert made["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    assert made["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_a_missing_rope_type_is_the_default() -> None:
    assert portable(rope_parameters={"rope_theta": 5.0})["rope_scaling"] is None
    assert portable(rope_theta=5.0)["rope_parameters"] == {"rope_theta": 5.0, "rope_type": "default"}


def test_existing_keys_are_not_overwritten() -> None:
    """Two spellings that differ are left to the writer; neither is corrected silently."""
    made = portable(rope_theta=7.0, rope_parameters={"rope_theta": 5.0, "rope_type": "default"})

    assert made["rope_theta"] == 7.0
    assert made["rope_parameters"]["rope_theta"] == 5.0


def test_parameters_for_each_layer_type_have_no_older_spelling() -> None:
    by_type = {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}

    made = portable(rope_parameters=by_type)

    assert made["rope_parameters"] == by_type
    assert not made.keys() & {"rope_theta", "rope_scaling"}


@pytest.mark.parametrize("entries", [{}, {"rope_scaling": None}, {"rope_parameters": None}])
def test_a_model_without_rotary_keys_gets_none(entries: dict[str, Any]) -> None:
    assert portable(**entries).get("rope_parameters") is None
    assert "rope_theta" not in portable(**entries)


def test_a_partial_rotary_factor_is_in_both_places() -> None:
    made = portable(rope_parameters={"rope_theta": 5.0, "rope_type": "default", "partial_rotary_factor": 0.5})

    assert made["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
def test_both_spellings_of_the_dtype(dtype: DType) -> None:
    made = portable_config({"torch_dtype": "float64"}, dtype)

    assert made == {"dtype": dtype.torch_name, "torch_dtype": dtype.torch_name}


def test_quantization_is_gone_at_every_level_and_nothing_else() -> None:
    nested = {"quantization_config": {"a": 1}, "compression_config": {"b": 2}, "hidden_size": 8}

    made = portable(text_config=nested, architectures=["X"], **nested)

    assert made == {
        "hidden_size": 8,
        "architectures": ["X"],
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "text_config": {"hidden_size": 8, "dtype": "bfloat16", "torch_dtype": "bfloat16"},
    }


def test_a_nested_text_config_gets_both_spellings_too() -> None:
    newer, older = ROPE["llama3"]

    assert portable(text_config=newer)["text_config"].items() >= older.items()


def test_the_source_is_not_changed() -> None:
    source = tiny_config(quantization_config={"quant_method": "compressed-tensors"}, text_config={"rope_theta": 5.0})
    before = copy.deepcopy(source)

    portable_config(source, DType.F16)

    assert source == before


@pytest.mark.reference
@pytest.mark.parametrize("spelling", [0, 1], ids=["newer", "older"])
@pytest.mark.parametrize("rope_type", ROPE)
def test_transformers_reads_the_same_rotary_embedding_from_all(tmp_path: Path, rope_type: str, spelling: int) -> None:
    """From the portable config made of either spelling, and from either spelling that the installed release reads."""
    from transformers import AutoConfig

    readable = {"newer": ROPE[rope_type][0]} if has_newest_transformers() else {}
    spellings = {name: config(rope) for name, rope in (readable | {"older": ROPE[rope_type][1]}).items()}
    found = []
    for name, document in {
        "portable": portable_config(config(ROPE[rope_type][spelling]), DType.BF16),
        **spellings,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(document))
        found.append(AutoConfig.from_pretrained(tmp_path / name))

    ropes = [rope_of(typed) for typed in found]
    assert ropes == [ropes[0]] * (len(readable) + 2)
    assert ropes[0]["rope_theta"] == ROPE[rope_type][1]["rope_theta"]
    assert found[0].dtype == found[-1].dtype


def rope_of(typed: Any) -> dict[str, Any]:
    """The rotary embedding that the installed transformers computes with."""
    if has_newest_transformers():
        return dict(typed.rope_parameters)
    return {"rope_theta": typed.rope_theta, "scaling": typed.rope_scaling}
