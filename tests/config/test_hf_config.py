"""A config.json that transformers 4 and transformers 5 both read."""

from __future__ import annotations

import contextlib
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


BY_TYPE = {
    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
}
OLDER_BY_TYPE = {
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma3n_text", None])
@pytest.mark.parametrize("entries", [{"rope_parameters": BY_TYPE}, OLDER_BY_TYPE], ids=["newer", "older"])
def test_parameters_for_each_layer_type_are_in_both_spellings(entries: dict[str, Any], model_type: str | None) -> None:
    made = portable(model_type=model_type, **entries)

    assert made["rope_parameters"] == BY_TYPE
    assert {key: made[key] for key in OLDER_BY_TYPE} == OLDER_BY_TYPE


def test_the_default_theta_of_sliding_layers_is_left_to_the_class() -> None:
    made = portable(model_type="gemma3_text", rope_theta=1e6)

    assert made["rope_parameters"]["sliding_attention"] == {"rope_type": "default"}
    assert "rope_local_base_freq" not in made


def test_layers_without_a_rotary_embedding_have_no_older_theta() -> None:
    made = portable(rope_parameters={**BY_TYPE, "sliding_attention": None})

    assert made["rope_theta"] == 1e6
    assert "rope_local_base_freq" not in made


@pytest.mark.parametrize("model_type", ["gemma4_text", "laguna", "step3p5", "cohere_compass_text", "unknown"])
def test_blocks_that_only_transformers_5_reads_have_no_older_spelling(model_type: str) -> None:
    made = portable(model_type=model_type, rope_parameters=BY_TYPE)

    assert made["rope_parameters"] == BY_TYPE
    assert not made.keys() & OLDER_BY_TYPE.keys()


def test_deepseek_v4_scales_the_compressed_layers_only() -> None:
    blocks = {"main": {"rope_theta": 1e4, "rope_type": "default"}, "compress": {"rope_theta": 16e4, **YARN}}

    made = portable(model_type="deepseek_v4", rope_parameters=blocks)

    assert made.items() >= {"rope_theta": 1e4, "compress_rope_theta": 16e4, "rope_scaling": YARN}.items()


SECTIONS = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}


def test_sections_of_mrope_are_kept_beside_the_default_type() -> None:
    """TensorRT-LLM's classes set `rope_scaling["type"]`, so it must not be null."""
    text = {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default", **SECTIONS}}

    made = portable(model_type="qwen3_vl", text_config=text)["text_config"]

    assert made["rope_scaling"] == {"rope_type": "default", **SECTIONS}
    assert made["rope_theta"] == 5e6


@pytest.mark.parametrize(
    ("model_type", "sections"),
    [
        ("qwen3_vl_text", SECTIONS),
        ("qwen3_vl_moe_text", SECTIONS),
        ("qwen2_vl_text", {"mrope_section": [16, 24, 24]}),
        ("qwen2_5_vl_text", {"mrope_section": [16, 24, 24]}),
    ],
)
def test_sections_that_the_class_takes_by_itself_are_stated(model_type: str, sections: dict[str, Any]) -> None:
    made = portable(model_type=model_type, rope_parameters={"rope_theta": 5e6, "rope_type": "default"})

    assert made["rope_scaling"] == {"rope_type": "default", **sections}


def test_the_older_type_mrope_is_the_default_type() -> None:
    made = portable(rope_theta=5e6, rope_scaling={"type": "mrope", "mrope_section": [1, 2, 3]})

    assert made["rope_parameters"] == {"rope_theta": 5e6, "rope_type": "default", "mrope_section": [1, 2, 3]}


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("rope_type", ["default", "yarn"])
def test_qwen2_vl_has_the_keys_of_its_text_model_at_the_top_level_too(model_type: str, rope_type: str) -> None:
    """TensorRT-LLM 1.0 and transformers 4.55 look there; transformers 5 can't read the type yarn there."""
    text = {"hidden_size": 8, "rope_parameters": {"rope_theta": 5.0, "rope_type": rope_type, **SECTIONS}}

    made = portable(model_type=model_type, text_config=text)

    assert (made["hidden_size"], made["rope_theta"], made["model_type"]) == (8, 5.0, model_type)
    assert made.get("rope_scaling") == (made["text_config"]["rope_scaling"] if rope_type == "default" else None)
    assert "rope_parameters" not in made


def test_the_long_factors_of_phi3_are_the_only_keys_beside_their_type() -> None:
    """In 4.57 the class refuses a fourth key."""
    factors = {"short_factor": [1.0], "long_factor": [2.0]}
    block = {"rope_type": "longrope", "rope_theta": 5.0, "original_max_position_embeddings": 64, **factors}

    made = portable(model_type="phi3", rope_parameters=block)

    assert made["rope_scaling"] == {"type": "longrope", **factors}


def test_a_type_that_only_names_the_class_is_no_scaling() -> None:
    tower = {"model_type": "pixtral", "rope_parameters": {"rope_theta": 5.0, "rope_type": "axial"}}

    made = portable(vision_config=tower)["vision_config"]

    assert made["rope_theta"] == 5.0
    assert made["rope_scaling"] is None


def test_classes_that_scale_by_default_get_no_block_without_scaling() -> None:
    assert "rope_parameters" not in portable(model_type="gpt_oss", rope_theta=5.0)
    assert (
        portable(model_type="gpt_oss", rope_theta=5.0, rope_scaling=None)["rope_parameters"]["rope_type"] == "default"
    )


def test_all_parts_get_both_spellings_and_lose_their_quantization() -> None:
    part = {"dtype": "float16", "rope_parameters": {"rope_theta": 5.0}, "quantization_config": {}}

    made = portable(vision_config=part, llm_config={"audio_config": part})

    for tower in (made["vision_config"], made["llm_config"]["audio_config"]):
        assert (tower["torch_dtype"], tower["dtype"], tower["rope_theta"]) == ("float16", "float16", 5.0)
        assert "quantization_config" not in tower


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


@pytest.mark.reference
@pytest.mark.newest_transformers
@pytest.mark.filterwarnings("ignore")  # classes warn of their own defaults
def test_every_class_keeps_its_blocks_for_kinds_of_layers() -> None:
    """Some take an older key beside them for the only one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    blocks = {label: {"rope_theta": 1e4, "rope_type": "default"} for label in ("full_attention", "sliding_attention")}
    kept: dict[str, bool] = {}
    for model_type in CONFIG_MAPPING_NAMES:
        config_class = CONFIG_MAPPING[model_type]
        fields = {field for base in config_class.__mro__ for field in getattr(base, "__annotations__", {})}
        if not {"layer_types", "rope_parameters"} <= fields:
            continue
        with contextlib.suppress(Exception):  # other fields of the class may ask for more
            made = config_class(num_hidden_layers=2, layer_types=list(blocks), rope_parameters=copy.deepcopy(blocks))
            document = made.to_dict()
            if document["rope_parameters"] == blocks:
                read = config_class.from_dict(portable_config(document, DType.BF16))
                kept[model_type] = read.rope_parameters == blocks

    assert len(kept) > 20
    assert {model_type for model_type, same in kept.items() if not same} == set()
