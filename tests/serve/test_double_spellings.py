"""Configurations in the spelling of transformers 5 on the double: each generation builds the model that was meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import rewrite_config, tiny_config, write_checkpoint
from decoder_models import write_decoder
from engine_fixtures import BINDINGS
from multimodal import write_multimodal

import trtllm_ct
from trtllm_ct.convert.convert import convert_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("sidecar_cache")

MID_ON = engine_double.GENERATIONS[1:]
SCALED = {"rope_type": "linear", "factor": 8.0}
BLOCKS = {
    "full_attention": {"rope_theta": 3e6, **SCALED},
    "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
}
OLDER = {"rope_theta": 3e6, "rope_local_base_freq": 2e4, "rope_scaling": SCALED}
SECTIONS = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}


@pytest.fixture(params=["stock", "loader"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Iterator[Any]]:
    """Yield the model that a generation builds of the checkpoint `in`: converted, or read by this package."""

    def built(generation: str) -> Iterator[Any]:
        arguments: dict[str, Any] = {"skip_tokenizer_init": True}
        if request.param == "stock":
            convert_checkpoint(tmp_path / "in", tmp_path / "out", engine=engine_double.RELEASE_OF[generation])
        with engine_double.installed(generation, importers=[BINDINGS]) as engine:
            if request.param == "stock":
                with engine.LLM(model=str(tmp_path / "out"), **arguments) as llm:
                    yield llm.models[0]
            else:
                with trtllm_ct.LLM(tmp_path / "in", engine="tensorrt_llm", **arguments) as llm:
                    yield llm.models[0]

    return built


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_qwen3_moe_has_all_its_experts(tmp_path: Path, models: Callable[..., Any], generation: str) -> None:
    """In transformers 4.57 the class takes 128 where only transformers 5's name is written."""
    config = tiny_config("Qwen3MoeForCausalLM", hidden=128, model_type="qwen3_moe", num_experts=4)
    write_checkpoint(tmp_path / "in", config=config, scheme="fp8-channel-token")
    rewrite_config(tmp_path / "in", lambda stored: stored.update(num_local_experts=stored.pop("num_experts")))

    for model in models(generation):
        assert model.model.layers[0].mlp.gate.weight.shape[0] == 4


@pytest.mark.parametrize("rope", [{"rope_parameters": BLOCKS}, {"rope_parameters": None, **OLDER}], ids=["5", "4"])
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_gemma3_rotates_each_kind_of_layer_as_meant(
    tmp_path: Path, models: Callable[..., Any], generation: str, rope: dict[str, Any]
) -> None:
    config = tiny_config("Gemma3ForCausalLM", hidden=128, model_type="gemma3_text") | rope
    config |= {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    config = {key: value for key, value in config.items() if value is not None}
    write_checkpoint(tmp_path / "in", config=config, scheme="fp8-channel-token")

    for model in models(generation):
        sliding, full = (layer.self_attn for layer in model.model.layers)
        powers = torch.arange(0, full.head_dim, 2).double() / full.head_dim
        assert torch.equal(full.frequencies, 3e6**-powers / 8.0)
        assert torch.equal(sliding.frequencies, 2e4**-powers)


@pytest.mark.parametrize("generation", MID_ON)
def test_qwen3_vl_keeps_the_sections_of_its_rotary_embedding(
    tmp_path: Path, models: Callable[..., Any], generation: str
) -> None:
    text = tiny_config("Qwen3ForCausalLM", hidden=128, kv_heads=4, model_type="qwen3_vl_text")
    text["rope_parameters"] = {"rope_theta": 5e6, "rope_type": "default", **SECTIONS}
    name = "Qwen3VLForConditionalGeneration"
    write_multimodal(tmp_path / "in", "model.language_model.", text=text, architecture=name, scheme="fp8-channel-token")

    for model in models(generation):
        assert model.mrope_section == SECTIONS["mrope_section"]


@pytest.mark.parametrize("words", [("mamba", "attention"), ("linear_attention", "full_attention")], ids=["5.5", "5.23"])
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.reference
def test_nemotron_h_has_the_pattern_of_its_layers(
    tmp_path: Path, models: Callable[..., Any], generation: str, words: tuple[str, str]
) -> None:
    write_decoder(tmp_path / "in", "NemotronHForCausalLM", "fp8-channel-token")
    kinds = [words[0], words[1], "mlp", "moe"]
    rewrite_config(tmp_path / "in", lambda stored: stored.update(layers_block_type=kinds))

    for model in models(generation):
        names = [type(layer.mixer).__name__ for layer in model.model.layers]
        assert names[:3] == ["Mamba2Mixer", "QKVAttention", "MLP"]
        assert hasattr(model.model.layers[3].mixer, "experts")
