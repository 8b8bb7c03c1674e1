"""A config.json of a class with a row that leaves sizes out is read as its class in transformers reads it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite_config
from class_models import CLASSES
from decoder_models import DECODERS, write_decoder

from trtllm_ct.base.errors import PlanError
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
from trtllm_ct.plan.models.class_rows import CLASS_ROWS
from trtllm_ct.plan.models.row_defaults import ROW_DEFAULTS
from trtllm_ct.plan.models.sites import Model

if TYPE_CHECKING:
    from pathlib import Path

MORE_TYPES = {
    "Gemma4ForCausalLM": "gemma4_text",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Gemma4UnifiedForConditionalGeneration": "gemma4_unified",
    "Llama4ForConditionalGeneration": "llama4",
    "Step3p5ForCausalLM": "step3p5",
    "DeepseekV4ForCausalLM": "deepseek_v4",
    "GptOssForCausalLM": "gpt_oss",
    "HunYuanMoEV1ForCausalLM": "hunyuan_v1_moe",
    "MllamaForConditionalGeneration": "mllama",
}
ALWAYS = ("hidden_size", "num_attention_heads", "num_key_value_heads")


def test_every_class_whose_row_lists_no_modules_has_defaults() -> None:
    rows = {name: row for name, row in CLASS_ROWS.items() if not row.leaves}
    assert ROW_DEFAULTS.keys() == rows.keys()
    for name, row in rows.items():
        assert {*ALWAYS, *row.divided} <= ROW_DEFAULTS[name].keys(), name


@pytest.mark.newest_transformers
def test_every_default_is_that_of_the_installed_class() -> None:
    """`head_dim` may be derived; of latent attention it is another size."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    types = {name: kind for name, (kind, _) in {**DECODERS, **CLASSES}.items()} | MORE_TYPES
    known = {name: types[name] for name in ROW_DEFAULTS if types[name] in CONFIG_MAPPING}
    assert len(known) > len(ROW_DEFAULTS) - 2
    for name, kind in known.items():
        configuration = CONFIG_MAPPING[kind]().get_text_config()
        # Of Gemma 4, whose layers differ, the class doesn't give sizes as attributes.
        typed = SimpleNamespace(**vars(configuration))
        defaults = dict(ROW_DEFAULTS[name])
        if not hasattr(typed, "kv_lora_rank"):
            derived = typed.hidden_size // typed.num_attention_heads
            defaults.setdefault("head_dim", derived)
            assert (name, getattr(typed, "head_dim", None) or derived) == (name, defaults.pop("head_dim"))
        kv_heads = typed.num_key_value_heads or typed.num_attention_heads
        assert (name, kv_heads) == (name, defaults.pop("num_key_value_heads"))
        assert (name, {key: getattr(typed, key) for key in defaults}) == (name, defaults)


@pytest.mark.parametrize("name", ROW_DEFAULTS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_without_sizes_has_those_of_its_class(name: str, nested: bool) -> None:
    config: dict[str, Any] = {"architectures": [name]} | ({"text_config": {"hidden_act": "silu"}} if nested else {})

    model = Model.from_config(config)

    defaults = ROW_DEFAULTS[name]
    assert (model.heads, model.kv_heads) == (defaults["num_attention_heads"], defaults["num_key_value_heads"])
    assert model.sizes["head_dim"] == defaults.get("head_dim", model.sizes["head_dim"])


def test_stated_sizes_count_before_defaults() -> None:
    config = {"architectures": ["SeedOssForCausalLM"], "num_attention_heads": 8, "num_key_value_heads": None}

    model = Model.from_config(config)

    assert (model.heads, model.kv_heads, model.sizes["head_dim"]) == (8, 8, 128)


@pytest.mark.parametrize("name", ["SeedOssForCausalLM", "MiniMaxM2ForCausalLM"])
def test_leaving_out_the_default_changes_no_plan(tmp_path: Path, name: str) -> None:
    """Two K/V heads of 128 rows for four ranks: without the size of a head they would seem to be more heads."""
    write_decoder(tmp_path, name, "fp8-channel-token", head_dim=128, num_key_value_heads=2)
    parallel = Parallel(tensor=4)
    stated = outcome(tmp_path, parallel)

    rewrite_config(tmp_path, lambda config: config.pop("head_dim"))

    assert outcome(tmp_path, parallel) == stated


def outcome(directory: Path, parallel: Parallel) -> object:
    """The plan, or why there is none."""
    try:
        return plan_checkpoint(directory, engine="stock-1.3", parallel=parallel)
    except PlanError as error:
        return error.faults


@pytest.mark.newest_transformers
def test_a_number_that_nothing_gives_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a row without defaults: 0 is divisible by every number of ranks. Loaders don't ask transformers' class."""
    write_decoder(tmp_path, "HunYuanDenseV1ForCausalLM", "fp8-channel-token")
    rewrite_config(tmp_path, lambda config: config.pop("num_key_value_heads"))
    monkeypatch.setattr("trtllm_ct.plan.models.row_defaults.ROW_DEFAULTS", {})

    assert open_checkpoint(tmp_path).plan("modelopt", engine="stock-1.3")
    with pytest.raises(PlanError) as caught:
        open_checkpoint(tmp_path).plan("modelopt", engine="stock-1.3", parallel=Parallel(tensor=2))

    fault = next(fault for fault in caught.value.faults if "num_key_value_heads" in fault.where)
    assert (fault.found, "Add num_key_value_heads to config.json" in fault.remedy) == ("no such number", True)
    assert "num_key_value_heads" not in json.loads((tmp_path / "config.json").read_text())
