"""A config.json that leaves keys out is read as its class in transformers reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint

from trtllm_ct import plan_checkpoint
from trtllm_ct.base.errors import ConfigError
from trtllm_ct.plan.models.class_defaults import CLASS_DEFAULTS, WRAPPERS, is_tied, text_config_of
from trtllm_ct.plan.models.class_rows import CLASS_ROWS, TEXT_MODELS
from trtllm_ct.plan.models.sites import Model

if TYPE_CHECKING:
    from pathlib import Path

SIZES_OF_ALL = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings"),
)


def model_types() -> list[str]:
    """The model types of every class whose row lists modules, alone and as a part of a larger model."""
    from tiny_models import FAMILIES

    return sorted({str(family["model_type"]) for family in FAMILIES.values()} | TEXT_MODELS.keys())


def architecture_of(model_type: str) -> str:
    from tiny_models import FAMILIES

    own = {str(family["model_type"]): name for name, family in FAMILIES.items()}
    return own.get(model_type) or TEXT_MODELS[model_type]


def known_to_transformers(names: list[str]) -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return [name for name in names if name in CONFIG_MAPPING]


def test_the_table_has_every_class_whose_row_lists_modules() -> None:
    assert sorted(CLASS_DEFAULTS) == model_types()
    listed = {name for name, row in CLASS_ROWS.items() if row.leaves}
    assert {architecture_of(name) for name in CLASS_DEFAULTS} == listed


@pytest.mark.newest_transformers
def test_every_default_is_that_of_the_installed_class() -> None:
    """Every key of the table, and the sizes that every class has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = known_to_transformers(model_types())
    assert len(known) >= len(model_types()) - 1  # Kimi K2 has its class in its own repository.
    for name in known:
        typed = CONFIG_MAPPING[name]()
        table = dict(CLASS_DEFAULTS[name])
        table.setdefault("num_key_value_heads", table["num_attention_heads"])
        assert table.keys() >= set(SIZES_OF_ALL)
        found = {key: getattr(typed, key, False) for key in table}
        assert (name, found) == (name, table)


@pytest.mark.newest_transformers
@pytest.mark.parametrize("changed", [{}, {"hidden_size": 512, "num_attention_heads": 4}])
def test_a_config_without_sizes_describes_the_model_that_the_class_describes(changed: dict[str, Any]) -> None:
    """Derived sizes too: head_dim, which some classes derive from the hidden size and others set to a number."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in known_to_transformers(model_types()):
        typed = CONFIG_MAPPING[name](**changed)
        model = Model.from_config({"architectures": [architecture_of(name)], "model_type": name} | changed)

        heads, latent = typed.num_attention_heads, hasattr(typed, "kv_lora_rank")
        head_dim = getattr(typed, "head_dim", None) or typed.hidden_size // heads
        assert (name, model.layers, model.heads) == (name, typed.num_hidden_layers, heads)
        assert (name, model.vocabulary, model.sizes["hidden"]) == (name, typed.vocab_size, typed.hidden_size)
        assert latent or (name, model.sizes["head_dim"]) == (name, head_dim)
        assert latent or (name, model.kv_heads) == (name, typed.num_key_value_heads)
        for size, key in (("experts", "num_experts"), ("q_lora_rank", "q_lora_rank")):
            if model.sizes.get(size):
                assert (name, model.sizes[size]) == (name, getattr(typed, key, None) or typed.n_routed_experts)


@pytest.mark.newest_transformers
def test_wrappers_tie_by_default_as_their_classes_do() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in known_to_transformers(sorted(WRAPPERS)):
        text = WRAPPERS[name].text
        typed = CONFIG_MAPPING[name](text_config={"model_type": text, "tie_word_embeddings": False})
        assert (name, typed.tie_word_embeddings) == (name, WRAPPERS[name].tied)
        assert (name, typed.get_text_config().model_type) == (name, text)
        tied = CONFIG_MAPPING[name](tie_word_embeddings=False, text_config={"model_type": text, **TIED})
        assert (name, tied.tie_word_embeddings) == (name, WRAPPERS[name].text_ties)


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("top", "text", "tied"),
    [
        ({"model_type": "mistral3"} | UNTIED, TIED, False),
        ({"model_type": "mistral3"} | TIED, UNTIED, True),
        ({"model_type": "mistral3"}, UNTIED, False),
        ({"model_type": "mistral3"}, {}, True),
        ({"model_type": "gemma3"}, {}, True),
        ({"model_type": "gemma3"} | UNTIED, {}, False),
        ({"model_type": "qwen3_vl_moe"}, {}, False),
        # transformers reads these two levels as one: older releases wrote the flag into text_config only.
        ({"model_type": "qwen2_5_vl"} | UNTIED, TIED, True),
        ({"model_type": "someone_elses"}, {"model_type": "gemma3_text"}, True),
        ({"model_type": "someone_elses"}, {"model_type": "llama"}, False),
    ],
)
def test_the_top_level_decides_before_text_config_about_ties(
    top: dict[str, Any], text: dict[str, Any], tied: bool
) -> None:
    config = top | {"text_config": text}

    assert is_tied(config, text_config_of(config), "LlamaForCausalLM") is tied


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_vl_with_the_sizes_of_its_text_model_at_the_top_level(tmp_path: Path, model_type: str) -> None:
    """As transformers before 4.52 wrote it; the files have the vision tower beside `model.`."""
    config = tiny_config("Qwen2ForCausalLM", tied=True) | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": model_type,
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2},
    }
    tower = "visual.blocks.0.attn.proj.weight"
    write_checkpoint(
        tmp_path,
        scheme="fp8-tensor-static",
        config=tiny_config("Qwen2ForCausalLM", tied=True),
        edit=_add(tower, (32, 32)),
    )
    (tmp_path / "config.json").write_text(_with_quantization(tmp_path, config))

    plan = plan_checkpoint(tmp_path)

    assert plan.module("model.layers.1.mlp.down_proj").delivered_mode == "FP8"
    assert plan.delivered_specs[tower].shape == (32, 32)
    assert "lm_head.weight" not in plan.delivered_specs


@pytest.mark.reference
def test_qwen_vl_with_flat_sizes_runs_on_the_reference_engine(tmp_path: Path) -> None:
    import torch

    from trtllm_ct.reference import load_model

    text = tiny_config("Qwen2ForCausalLM", tied=True)
    write_checkpoint(tmp_path, scheme="fp8-tensor-static", config=text)
    config = text | {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    (tmp_path / "config.json").write_text(_with_quantization(tmp_path, config))

    logits = load_model(tmp_path)(torch.tensor([[1, 2, 3]])).logits

    assert logits.shape == (1, 3, text["vocab_size"])


def _add(name: str, shape: tuple[int, ...]) -> Any:
    import torch

    return lambda stored: stored.update({name: torch.ones(shape).bfloat16()})


def _with_quantization(directory: Path, config: dict[str, Any]) -> str:
    import json

    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    return json.dumps(config | {"quantization_config": block})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_null_is_not_the_default(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        Model.from_config(tiny_config() | {key: None})


@pytest.mark.parametrize("count", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_the_number_of_experts_may_have_another_name_than_in_the_class(count: str) -> None:
    model = Model.from_config(tiny_config("MixtralForCausalLM", num_local_experts=None) | {count: 6})

    assert model.sizes["experts"] == 6
