"""The tables of model families against transformers' own modules, and config.json against the tables."""

from __future__ import annotations

from typing import Any

import pytest
from builders import ARCHITECTURES as MODEL_TYPES
from builders import tiny_config

from trtllm_ct.dtypes import DType
from trtllm_ct.errors import ConfigError, Fault
from trtllm_ct.plan.architectures import ARCHITECTURES, Model, Site

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ARCHITECTURES),
    *((name, {"tied": True}) for name in ARCHITECTURES),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", {"num_key_value_heads": 4, "head_dim": 32}),
    ("Qwen3ForCausalLM", {"attention_bias": True}),
]


def sites(config: dict[str, Any]) -> dict[str, Site]:
    return {site.module: site for site in Model.from_config(config).sites()}


def faults(**config: Any) -> tuple[Fault, ...]:
    with pytest.raises(ConfigError) as caught:
        Model.from_config(tiny_config(**config))
    return caught.value.faults


@pytest.mark.reference
@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
def test_sites_are_the_modules_that_transformers_builds(architecture: str, options: dict[str, Any]) -> None:
    """Same names, classes, shapes and biases: the table neither lacks nor invents a module."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config(architecture, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    expected = {
        name: (type(module).__name__, tuple(module.weight.shape), getattr(module, "bias", None) is not None)
        for name, module in model.named_modules()
        if hasattr(module, "weight") and not (name == "lm_head" and config["tie_word_embeddings"])
    }

    assert type(model).__name__ == architecture
    assert {name: (site.class_name, site.shape, site.bias) for name, site in sites(config).items()} == expected


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_engines_fuse_qkv_and_gate_up(architecture: str) -> None:
    members: dict[str, list[str]] = {}
    for site in sites(tiny_config(architecture, layers=1)).values():
        if site.fused is not None:
            members.setdefault(site.fused, []).append(site.module.rpartition(".")[2])

    assert members == {
        "model.layers.0.self_attn.qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "model.layers.0.mlp.gate_up_proj": ["gate_proj", "up_proj"],
    }


def test_a_tied_lm_head_is_no_site() -> None:
    assert "lm_head" in sites(tiny_config())
    assert "lm_head" not in sites(tiny_config(tied=True))


@pytest.mark.parametrize("absent", [{"head_dim": None}, {"num_key_value_heads": None}])
def test_head_sizes_that_config_leaves_out_are_derived(absent: dict[str, Any]) -> None:
    """As transformers does it: head_dim from the hidden size, as many KV heads as heads."""
    config = tiny_config(hidden=64, heads=4, kv_heads=4, **absent)

    assert sites(config)["model.layers.0.self_attn.k_proj"].shape == (64, 64)


@pytest.mark.parametrize("names", [["MixtralForCausalLM"], [], None, "MixtralForCausalLM", ["LlamaModel", "X"]])
def test_an_unknown_architecture_is_named_beside_the_known_ones(names: object) -> None:
    config = tiny_config() | {"architectures": names}

    with pytest.raises(ConfigError) as caught:
        Model.from_config(config)

    (fault,) = caught.value.faults
    assert fault.where == "config.json: architectures"
    assert fault.expected == "one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    assert fault.found == (str(names[0]) if isinstance(names, list) and names else str(names or "none"))
    assert "not supported" in fault.remedy


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
    ],
)
@pytest.mark.parametrize("value", [0, -1, True, "64", 1.5, [64]])
def test_a_size_that_is_no_positive_integer_is_a_fault(key: str, value: object) -> None:
    (fault,) = faults(**{key: value})

    assert (fault.where, fault.expected, fault.found) == (f"config.json: {key}", "a positive integer", repr(value))


def test_all_missing_sizes_are_reported_together() -> None:
    missing = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")

    found = faults(**dict.fromkeys(missing), dtype="int8")

    assert {fault.where for fault in found} == {f"config.json: {key}" for key in (*missing, "dtype")}


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ({"dtype": "float16"}, DType.F16),
        ({"dtype": None, "torch_dtype": "float32"}, DType.F32),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, DType.BF16),
        ({"dtype": "torch.float16"}, DType.F16),
        ({"dtype": None}, DType.BF16),
    ],
)
def test_both_spellings_of_the_model_dtype(spelling: dict[str, Any], dtype: DType) -> None:
    """`dtype` counts before `torch_dtype`, and bfloat16 where there is neither."""
    assert Model.from_config(tiny_config(**spelling)).dtype is dtype


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "auto", 16, {"": "bfloat16"}])
def test_a_dtype_that_no_model_computes_in_is_a_fault(name: object) -> None:
    (fault,) = faults(dtype=name)

    assert (fault.where, fault.found) == ("config.json: dtype", repr(name))
