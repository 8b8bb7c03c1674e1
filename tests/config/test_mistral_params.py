"""params.json of Mistral's own form, converted to the config.json of Hugging Face's form."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import ConfigError, Fault
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.config.mistral_params import config_from_params

# A model of the size of Mistral Small 3, with the keys that Mistral writes.
SMALL = {
    "dim": 5120, "n_layers": 40, "head_dim": 128, "hidden_dim": 32768, "n_heads": 32, "n_kv_heads": 8,
    "rope_theta": 1000000000.0, "norm_eps": 1e-05, "vocab_size": 131072,
}  # fmt: skip
VISION = {
    "image_token_id": 10, "image_break_token_id": 12, "image_end_token_id": 13, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "mm_projector_id": "patch_merge", "spatial_merge_size": 2,
    "hidden_size": 1024, "num_channels": 3, "image_size": 1540, "max_image_size": 1540, "patch_size": 14,
    "rope_theta": 10000.0, "add_pre_mm_projector_layer_norm": True, "adapter_bias": False,
}  # fmt: skip
EMBEDDINGS = {"tok_embeddings.weight": TensorSpec(DType.F16, (131072, 5120))}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in SMALL.items() if name != key}


def faults(params: dict[str, Any]) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        config_from_params(params, EMBEDDINGS)
    return list(caught.value.faults)


def test_a_dense_model() -> None:
    assert config_from_params(SMALL, EMBEDDINGS) == {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "intermediate_size": 32768,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 1e9,
        "sliding_window": None,
        "max_position_embeddings": 128_000,
        "tie_word_embeddings": False,
        "dtype": "float16",
    }


def test_a_mixture() -> None:
    config = config_from_params(SMALL | {"moe": {"num_experts": 8, "num_experts_per_tok": 2}}, {})

    assert (config["architectures"], config["model_type"]) == (["MixtralForCausalLM"], "mixtral")
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert "dtype" not in config


@pytest.mark.parametrize("bias", [True, False])
def test_a_vision_tower_makes_it_mistral_3(bias: bool) -> None:
    """The bias of the projector is there when its tensor is, whatever the key says."""
    tensors = {"vision_language_adapter.w_in.bias": TensorSpec(DType.BF16, (5120,))} if bias else {}

    config = config_from_params(SMALL | {"vision_encoder": VISION}, EMBEDDINGS | tensors)

    assert config["architectures"] == ["Mistral3ForConditionalGeneration"]
    assert config["text_config"] == config_from_params(SMALL, EMBEDDINGS)
    tower = config["vision_config"]
    assert (tower["model_type"], tower["hidden_size"], tower["head_dim"]) == ("pixtral", 1024, 64)
    assert (tower["hidden_act"], tower["rope_theta"], tower["patch_size"]) == ("silu", 10000.0, 14)
    assert (config["spatial_merge_size"], config["image_token_index"], config["dtype"]) == (2, 10, "float16")
    assert config["multimodal_projector_bias"] is bias


@pytest.mark.parametrize(
    ("key", "value", "hf_key", "read"),
    [
        ("sliding_window", 4096, "sliding_window", 4096),
        ("sliding_window", "4096", "sliding_window", 4096),
        ("sliding_window", [4096, 4096], "sliding_window", 4096),
        ("sliding_window", [None, None], "sliding_window", None),
        ("sliding_window", 0, "sliding_window", None),
        ("tied_embeddings", True, "tie_word_embeddings", True),
        ("max_seq_len", 32768, "max_position_embeddings", 32768),
        ("max_position_embeddings", 40960, "max_position_embeddings", 40960),
        ("n_kv_heads", None, "num_key_value_heads", 32),
        ("norm_eps", 1, "rms_norm_eps", 1.0),
    ],
)
def test_spellings(key: str, value: object, hf_key: str, read: object) -> None:
    assert config_from_params(SMALL | {key: value}, {})[hf_key] == read


def test_a_window_without_a_theta_is_mistral_7b() -> None:
    """Every other model gives its theta, and readers disagree about the default."""
    assert config_from_params(without("rope_theta") | {"sliding_window": 4096}, {})["rope_theta"] == 10000.0
    assert [fault.where for fault in faults(without("rope_theta"))] == ["params.json: rope_theta"]


@pytest.mark.parametrize("key", [key for key in SMALL if key not in {"n_kv_heads", "head_dim"}])
def test_a_missing_key_is_named(key: str) -> None:
    (fault,) = faults(without(key))

    assert fault.where == f"params.json: {key}"
    assert fault.found == "None"
    assert "config.json" in fault.remedy


@pytest.mark.parametrize("value", [True, -1, 2.5, "5120", [5120], {}])
def test_a_size_is_a_positive_integer(value: object) -> None:
    assert faults(SMALL | {"dim": value})[0].expected == "a positive integer"


@pytest.mark.parametrize(
    "more",
    [
        {"max_batch_size": 0, "model_type": "transformer", "activation": "silu", "causal": True},
        {"lora": None, "use_biases": False, "moe": None, "vision_encoder": None, "dtype": "bfloat16"},
        {"quantization": {"config_groups": {}}},
    ],
)
def test_keys_that_change_nothing(more: dict[str, Any]) -> None:
    assert config_from_params(SMALL | more, EMBEDDINGS) == config_from_params(SMALL, EMBEDDINGS)


@pytest.mark.parametrize(
    ("more", "where", "named"),
    [
        ({"yarn": {"factor": 16.0}, "llama_4_scaling": {"beta": 0.1}}, "params.json", "llama_4_scaling, yarn"),
        ({"q_lora_rank": 1536, "kv_lora_rank": 512}, "params.json", "kv_lora_rank, q_lora_rank"),
        ({"model_type": "mamba"}, "params.json", "model_type 'mamba'"),
        ({"causal": False}, "params.json", "causal False"),
        ({"multimodal": {"whisper_model_args": {}}}, "params.json", "multimodal"),
        (
            {"moe": {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1}},
            "params.json: moe",
            "num_shared_experts",
        ),
        (
            {"vision_encoder": VISION | {"add_pre_mm_projector_layer_norm": False}},
            "params.json: vision_encoder",
            "add_pre_mm_projector_layer_norm False",
        ),
    ],
)
def test_a_key_that_may_change_the_model_is_refused_by_name(more: dict[str, Any], where: str, named: str) -> None:
    (fault,) = faults(SMALL | more)

    assert fault.where == where
    assert fault.found == f"what may change what the model computes: {named}"
    assert fault.remedy.startswith("Put the config.json")


@pytest.mark.parametrize(
    ("more", "where", "expected"),
    [
        ({"sliding_window": [4096, None]}, "params.json: sliding_window", "one window for all layers"),
        ({"moe": [1]}, "params.json: moe", "a JSON object"),
        ({"moe": {"num_experts": 8}}, "params.json: moe.num_experts_per_tok", "a positive integer"),
        (
            {"vision_encoder": {key: value for key, value in VISION.items() if key != "mm_projector_id"}},
            "params.json: vision_encoder.mm_projector_id",
            "'patch_merge'",
        ),
        (
            {"vision_encoder": VISION, "moe": {"num_experts": 8, "num_experts_per_tok": 2}},
            "params.json: vision_encoder",
            "a dense text model beside it",
        ),
    ],
)
def test_values_that_a_config_json_cannot_express_are_refused(more: dict[str, Any], where: str, expected: str) -> None:
    assert (where, expected) in [(fault.where, fault.expected) for fault in faults(SMALL | more)]


def test_all_faults_are_raised_together() -> None:
    wrong = without("dim") | {"yarn": {"factor": 2}, "norm_eps": "small"}
    assert [fault.where for fault in faults(wrong)] == ["params.json", "params.json: dim", "params.json: norm_eps"]
