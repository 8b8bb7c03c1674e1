"""config.json of a converted directory: whatever doesn't say what the source says is a fault."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite_config, tiny_config, write_checkpoint
from multimodal import write_multimodal

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.verify.other_spellings import is_other_spelling
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = tiny_config(hidden=256, intermediate=256)
WRAPPER = "Mistral3ForConditionalGeneration"
BASE = 10000.0
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def faults(root: Path) -> list[str]:
    """Return the keys that are faults, each with the file before it."""
    return [
        fault.where.removeprefix(f"{root / 'out'}/") for fault in verify_checkpoint(root / "in", root / "out").faults
    ]


def convert(root: Path, to: str, **more: Any) -> None:
    convert_checkpoint(root / "in", root / "out", to=to, **more)
    assert faults(root) == []


@pytest.mark.parametrize("to", ["modelopt", "dense"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("hidden_size", 512),
        ("num_attention_heads", 8),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 4),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 2.0),
        ("intermediate_size", 128),
        ("rms_norm_eps", 1.0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", 1.0),
        ("rope_parameters", {"rope_theta": 1.0, "rope_type": "default"}),
        ("rope_parameters", {"rope_theta": BASE, **YARN}),
        ("rope_scaling", YARN),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 16),
        ("architectures", ["Qwen3ForCausalLM"]),
        ("model_type", "qwen3"),
        ("dtype", "float16"),
        ("torch_dtype", "float32"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("compression_config", {}),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 1),
        ("vocab_size", 1),
        ("bos_token_id", 5),
        ("num_experts", 4),
        ("layers_block_type", ["attention", "attention"]),
        ("unknown_key", None),
        ("text_config", {"hidden_size": 1}),
    ],
)
def test_a_changed_or_added_key_is_found(tmp_path: Path, to: str, key: str, value: object) -> None:
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme="fp8-channel-token")
    convert(tmp_path, to)

    rewrite_config(tmp_path / "out", lambda config: config.update({key: value}))

    assert faults(tmp_path)[:1] == [f"config.json: {key}"]


@pytest.mark.parametrize("to", ["modelopt", "dense"])
@pytest.mark.parametrize("key", [key for key, value in CONFIG.items() if value is not None])
def test_a_removed_key_is_found(tmp_path: Path, to: str, key: str) -> None:
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme="fp8-channel-token")
    convert(tmp_path, to)

    rewrite_config(tmp_path / "out", lambda config: config.pop(key))

    assert f"config.json: {key}" in faults(tmp_path)


@pytest.mark.parametrize("to", ["modelopt", "dense"])
def test_a_directory_without_configuration_is_no_model(tmp_path: Path, to: str) -> None:
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme="fp8-channel-token")
    convert(tmp_path, to)

    (tmp_path / "out" / "config.json").unlink()

    assert "config.json" in faults(tmp_path)


@pytest.mark.parametrize("to", ["modelopt", "dense"])
@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "rms_norm_eps", 1.0),
        ("text_config", "dtype", "float16"),
        ("text_config", "quantization_config", {"quant_method": "fp8"}),
        ("text_config", "tie_word_embeddings", "no"),
        ("vision_config", "hidden_size", 8),
        ("vision_config", "dtype", "float16"),
        ("vision_config", "tie_word_embeddings", True),
    ],
)
def test_parts_of_a_larger_model_are_compared_too(tmp_path: Path, to: str, part: str, key: str, value: object) -> None:
    write_multimodal(tmp_path / "in", "language_model.model.", architecture=WRAPPER, scheme="fp8-channel-token")
    convert(tmp_path, to)

    rewrite_config(tmp_path / "out", lambda config: config[part].update({key: value}))

    place = key if key == "tie_word_embeddings" and part == "text_config" else f"{part}.{key}"
    assert faults(tmp_path) == [f"config.json: {place}"]


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_lost_part_is_found(tmp_path: Path, part: str) -> None:
    write_multimodal(tmp_path / "in", "language_model.model.", architecture=WRAPPER, scheme="fp8-channel-token")
    convert(tmp_path, "modelopt")

    rewrite_config(tmp_path / "out", lambda config: config.update({part: [1]}))

    assert f"config.json: {part}" in faults(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("to", ["modelopt", "dense"])
def test_the_dtype_is_that_of_the_weights(tmp_path: Path, to: str, dtype: str) -> None:
    """A conversion may change it; one that no weight has is a fault, and beside float16 any other one."""
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme="fp8-channel-token")
    convert(tmp_path, to, dtype=dtype)
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]

    for other in {"float16", "bfloat16", "float32"} - {stated, CONFIG["dtype"] if stated == "float32" else stated}:
        rewrite_config(tmp_path / "out", lambda config, other=other: config.update(dtype=other))
        assert faults(tmp_path) == ["config.json: dtype"]


def test_a_head_that_is_not_there_must_be_tied(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "in",
        config={**CONFIG, "tie_word_embeddings": True},
        scheme="fp8-channel-token",
        edit=lambda stored: stored.pop("lm_head.weight", None),
    )
    convert(tmp_path, "modelopt")

    rewrite_config(tmp_path / "out", lambda config: config.update(tie_word_embeddings=False))

    assert "config.json: tie_word_embeddings" in faults(tmp_path)


BY_TYPE = {
    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
    "sliding_attention": {"rope_theta": BASE, "rope_type": "default"},
}
MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
NEMOTRON = {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}
DEEPSEEK_V4 = {
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "mlp_layer_types": ["hash_moe", "hash_moe", "moe"],
    "num_nextn_predict_layers": 1,
    "rope_parameters": {"main": {"rope_theta": BASE}, "compress": {"rope_theta": 1.6e5, **YARN}},
}


@pytest.mark.parametrize(
    ("source", "key", "right", "wrong"),
    [
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta", 1e6, 1e4),
        ({"rope_parameters": {"rope_theta": BASE, **YARN}}, "rope_scaling", YARN, {**YARN, "factor": 2.0}),
        ({"rope_parameters": {"rope_theta": BASE, **YARN}}, "rope_scaling", {**YARN}, {"rope_type": "yarn"}),
        ({"rope_theta": BASE, "rope_scaling": YARN}, "rope_parameters", {"rope_theta": BASE, **YARN}, YARN),
        ({"rope_theta": BASE}, "rope_parameters", {"rope_theta": BASE}, {"rope_theta": BASE, **YARN}),
        ({"rope_theta": BASE, "rope_scaling": None}, "rope_scaling", {"rope_type": "default"}, YARN),
        (
            {"rope_theta": BASE, "rope_scaling": MROPE},
            "rope_parameters",
            {"rope_theta": BASE, "rope_type": "default", "mrope_section": [16, 24, 24]},
            {"rope_theta": BASE, "rope_type": "default"},
        ),
        ({"rope_scaling": MROPE}, "rope_scaling", {**MROPE, "rope_type": "default"}, {**MROPE, "rope_type": "yarn"}),
        ({"rope_parameters": BY_TYPE}, "rope_theta", 1e6, BASE),
        ({"rope_parameters": BY_TYPE}, "rope_local_base_freq", BASE, 1e6),
        ({"rope_parameters": BY_TYPE}, "rope_scaling", {"rope_type": "linear", "factor": 8.0}, {"rope_type": "linear"}),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": BASE, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "rope_parameters",
            BY_TYPE,
            {**BY_TYPE, "sliding_attention": BY_TYPE["full_attention"]},
        ),
        (
            {"model_type": "olmo3", "rope_theta": 5e5, "rope_scaling": YARN},
            "rope_parameters",
            {"full_attention": {"rope_theta": 5e5, **YARN}, "sliding_attention": {"rope_theta": 5e5}},
            {"full_attention": {"rope_theta": 5e5, **YARN}, "sliding_attention": {"rope_theta": BASE}},
        ),
        (
            {"model_type": "phi3", "rope_parameters": {**YARN, "rope_type": "longrope", "short_factor": [1.0]}},
            "rope_scaling",
            {"type": "longrope", "short_factor": [1.0]},
            {"type": "longrope", "short_factor": [2.0]},
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor", 0.25, 0.5),
        (DEEPSEEK_V4, "rope_theta", BASE, 1.6e5),
        (DEEPSEEK_V4, "compress_rope_theta", 1.6e5, BASE),
        (DEEPSEEK_V4, "rope_scaling", YARN, {"rope_type": "yarn"}),
        (DEEPSEEK_V4, "compress_ratios", [0, 4, 128, 0], [0, 4, 128]),
        (DEEPSEEK_V4, "num_hash_layers", 2, 3),
        ({"num_local_experts": 8}, "num_experts", 8, 4),
        ({"num_experts": 8}, "num_local_experts", 8, True),
        ({"layer_norm_epsilon": 1e-5}, "rms_norm_eps", 1e-5, 1e-6),
        (NEMOTRON, "hybrid_override_pattern", "ME*-", "ME**"),
        (NEMOTRON, "num_hidden_layers", 4, 5),
        ({"hybrid_override_pattern": "M*"}, "layers_block_type", ["mamba", "attention"], ["mamba"]),
        ({"dtype": "bfloat16"}, "torch_dtype", "bfloat16", "float16"),
    ],
)
def test_an_added_key_must_mean_what_the_source_says(
    source: dict[str, Any], key: str, right: object, wrong: object
) -> None:
    assert is_other_spelling(key, right, source)
    assert not is_other_spelling(key, wrong, source)
    assert not is_other_spelling(key, right, {key: wrong})
