"""Models with several parts, Gemma 3 and DeepSeek-V3 on the double: every Linear is built and loaded as planned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from multimodal import MIXED, PLACES, write_multimodal

import trtllm_ct
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.model_classes import has_class
from trtllm_ct.engine.releases import RELEASES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("sidecar_cache")

ENGINES = {"old": "stock-1.0", "mid": "stock-1.2", "newest": "stock-1.3"}
ROUNDED = 2**-7
TOKENS = (5, 17, 3, 42, 8, 66)
DEEPSEEK = tiny_config("DeepseekV3ForCausalLM", hidden=128, num_key_value_heads=4, head_dim=None)
# The text model and the tower of each class.
WRAPPED = {
    "Mistral3ForConditionalGeneration": ("MistralForCausalLM", "vision_tower"),
    "Gemma3ForConditionalGeneration": ("Gemma3ForCausalLM", "vision_tower"),
    "Qwen2VLForConditionalGeneration": ("Qwen2ForCausalLM", "visual"),
    "Qwen2_5_VLForConditionalGeneration": ("Qwen2ForCausalLM", "visual"),
    "Qwen3VLForConditionalGeneration": ("Qwen3ForCausalLM", "visual"),
    "Qwen3VLMoeForConditionalGeneration": ("Qwen3MoeForCausalLM", "visual"),
    "KimiK25ForConditionalGeneration": ("DeepseekV3ForCausalLM", "vision_tower"),
}
CASES = [
    (name, generation)
    for name in WRAPPED
    for generation in engine_double.GENERATIONS
    if has_class(next(release for release in RELEASES if release.name == ENGINES[generation]), name)
]
LATENT = {
    **dict.fromkeys(("q_b_proj", "o_proj"), "fp8-channel-token"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "nvfp4"),
}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED |= {"kv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa")}


def weights_of(model: Any) -> Iterator[tuple[str, tuple[str, ...], Tensor]]:
    """Yield the name of each Linear, of a layer or an expert, the names of its stored parts, and the weight in it."""
    for name, module in getattr(model, "llm", model).named_modules():
        around, _, leaf = name.rpartition(".")
        if type(module).__name__ == "Linear":
            parts = tuple(f"{around}.{part}".lstrip(".") for part in FUSED.get(leaf, (leaf,)))
            yield name, parts, module.quant_method.apply(module, torch.eye(module.in_features), None).T
        elif hasattr(module, "expert_ids"):
            experts = name.removesuffix(".backend")
            for expert in range(module.num_experts):
                up, gate = module.quant_method.dequantize(module, "w3_w1", expert).chunk(2)
                down = module.quant_method.dequantize(module, "w2", expert)
                for leaf, weight in (("up_proj", up), ("gate_proj", gate), ("down_proj", down)):
                    yield name, (f"{experts}.{expert}.{leaf}",), weight


def wrong_weights(model: Any, dense: Mapping[str, Tensor]) -> list[str]:
    wrong = []
    for name, parts, weight in weights_of(model):
        want = torch.cat([dense[f"{part}.weight"].float() for part in parts])
        error = (weight - want).abs().max() / want.abs().max()
        if not error < ROUNDED:
            wrong.append(f"{name}: {error}")
    return wrong


def text_of(architecture: str) -> dict[str, Any]:
    if architecture == "DeepseekV3ForCausalLM":
        return DEEPSEEK
    names = {"MistralForCausalLM": "mistral", "Gemma3ForCausalLM": "gemma3_text", "Qwen3ForCausalLM": "qwen3_vl_text"}
    names |= {"Qwen2ForCausalLM": "qwen2_vl_text", "Qwen3MoeForCausalLM": "qwen3_vl_moe_text"}
    return tiny_config(architecture, hidden=128, kv_heads=4, model_type=names[architecture])


def served(directory: Path, generation: str, *, stock: bool) -> Iterator[Any]:
    """Yield the model that an engine has loaded, converted for stock or by this package's loader."""
    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        arguments = {"skip_tokenizer_init": True}
        if stock:
            with engine.LLM(model=str(directory), **arguments) as llm:
                yield llm.models[0]
        else:
            with trtllm_ct.LLM(directory, engine="tensorrt_llm", **arguments) as llm:
                yield llm.models[0]


@pytest.mark.pairs
@pytest.mark.parametrize("stock", [True, False], ids=["stock", "loader"])
@pytest.mark.parametrize("body", list(PLACES)[:3])
@pytest.mark.parametrize(("name", "generation"), CASES)
def test_every_linear_of_a_wrapper_is_right(tmp_path: Path, name: str, body: str, generation: str, stock: bool) -> None:
    text, tower = WRAPPED[name]
    prefix = "model." if body.startswith("model.") else ""
    vision = {f"{prefix}{tower}.blocks.0.fc1.weight": (16, 8)}
    scheme = LATENT if text.startswith("Deepseek") else MIXED
    built = write_multimodal(tmp_path / "in", body, text=text_of(text), architecture=name, vision=vision, scheme=scheme)
    if stock:
        convert_checkpoint(tmp_path / "in", tmp_path / "out", engine=ENGINES[generation])

    for model in served(tmp_path / ("out" if stock else "in"), generation, stock=stock):
        assert wrong_weights(model, built.dense) == []
        if stock and name != "KimiK25ForConditionalGeneration":
            assert any(model.vision_keys.values())


@pytest.mark.parametrize("sizes", [(2, 1), (2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("generation", ["mid", "newest"])
def test_ranks_get_their_parts_of_stacked_experts(tmp_path: Path, generation: str, sizes: tuple[int, int]) -> None:
    name, text = "Qwen3VLMoeForConditionalGeneration", text_of("Qwen3MoeForCausalLM")
    write_multimodal(tmp_path / "in", "model.language_model.", text=text, architecture=name, scheme=MIXED)
    convert_checkpoint(tmp_path / "in", tmp_path / "out", to="dense")
    parallel = {"tensor_parallel_size": sizes[0], "moe_expert_parallel_size": sizes[1]}

    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        with engine.LLM(model=str(tmp_path / "out"), skip_tokenizer_init=True) as plain:
            want = plain.logits(TOKENS)
        with trtllm_ct.LLM(tmp_path / "in", engine="tensorrt_llm", skip_tokenizer_init=True, **parallel) as llm:
            error = (llm.logits(TOKENS) - want).abs().max() / want.abs().max()
    assert error < ROUNDED


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_norms_of_gemma3_are_loaded_with_the_one_that_they_add(tmp_path: Path, generation: str) -> None:
    built = write_checkpoint(tmp_path / "in", config=text_of("Gemma3ForCausalLM"), scheme="int8-channel")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", engine=ENGINES[generation])

    for model in served(tmp_path / "out", generation, stock=True):
        assert wrong_weights(model, built.dense) == []
        for leaf in ("self_attn.q_norm", "pre_feedforward_layernorm"):
            name = f"model.layers.1.{leaf}"
            assert torch.equal(model.get_submodule(name).weight, built.dense[f"{name}.weight"].bfloat16() + 1)


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize(
    "scheme", [LATENT, {"o_proj": "fp8-channel-token"}, "nvfp4"], ids=["two modes", "o_proj", "nvfp4"]
)
def test_plain_draft_layers_of_deepseek_are_built_plain(tmp_path: Path, scheme: Any, generation: str) -> None:
    """The class builds one draft layer more than is stored, from the same weights and the same exclusions."""
    config = DEEPSEEK | {"num_hidden_layers": 3}
    whole = write_checkpoint(tmp_path / "whole", config=config, scheme="dense").dense
    drafts = {name: tensor for name, tensor in whole.items() if name.startswith("model.layers.2.")}
    drafts["model.layers.2.eh_proj.weight"] = torch.randn(128, 256).bfloat16()
    drafts |= {f"model.layers.2.{norm}.weight": torch.ones(128).bfloat16() for norm in ("enorm", "hnorm")}
    built = write_checkpoint(
        tmp_path / "in",
        config=DEEPSEEK | {"num_nextn_predict_layers": 1},
        scheme=scheme,
        edit=lambda stored: stored.update(drafts),
    )
    convert_checkpoint(tmp_path / "in", tmp_path / "out", engine=ENGINES[generation])

    dense = {**built.dense, **drafts}
    dense |= {name.replace("layers.2.", "layers.3."): tensor for name, tensor in drafts.items()}
    for model in served(tmp_path / "out", generation, stock=True):
        assert wrong_weights(model, dense) == []
        for layer in (2, 3):
            for leaf in ("eh_proj", "self_attn.o_proj", "mlp.experts", "mlp.shared_experts.down_proj"):
                built_module = model.get_submodule(f"model.layers.{layer}.{leaf}")
                config = getattr(built_module, "backend", built_module).quant_config
                assert config is None or config.quant_algo is None
