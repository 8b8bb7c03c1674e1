from __future__ import annotations

from typing import Any

import pytest

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
from trtllm_ct.reference.names import NameMap

TEXT = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
W8A16 = LayerQuantConfig(quant_algo=QuantAlgo.W8A16)


def names(model_type: str = "llama", **config: Any) -> NameMap:
    return NameMap.of_checkpoint(config, model_type=model_type)


@pytest.mark.parametrize(
    ("model_type", "stored", "path"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.mlp.experts.3.w1"),
        ("phimoe", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.router.weight"),
        ("phimoe", "model.layers.0.block_sparse_moe.experts.0.w2.weight", "model.layers.0.mlp.experts.0.w2.weight"),
        ("hy_v3", "model.layers.0.mlp.router.gate.weight", "model.layers.0.mlp.gate.weight"),
        ("exaone_moe", "model.layers.0.mlp.e_score_correction_bias", "model.layers.0.mlp.gate.e_score_correction_bias"),
        ("mimo_v2_flash", "model.layers.0.self_attn.attention_sink_bias", "model.layers.0.self_attn.sinks"),
        ("llama", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("mixtral", "lm_head", "lm_head"),
    ],
)
def test_names_of_a_family_map_to_paths_and_back(model_type: str, stored: str, path: str) -> None:
    assert names(model_type).path(stored) == path
    assert names(model_type).stored(path) == stored


@pytest.mark.parametrize(
    ("stored", "path"),
    [
        ("embed.weight", "model.embed_tokens.weight"),
        ("head.weight", "lm_head.weight"),
        ("hc_head_fn", "model.hc_head.hc_fn"),
        ("layers.3.hc_attn_base", "model.layers.3.attn_hc.base"),
        ("layers.3.attn.wq_b.weight_scale", "model.layers.3.self_attn.q_b_proj.weight_scale"),
        (
            "layers.3.attn.indexer.compressor.wgate.weight",
            "model.layers.3.self_attn.compressor.indexer.gate_proj.weight",
        ),
        ("layers.3.attn.compressor.norm.weight", "model.layers.3.self_attn.compressor.kv_norm.weight"),
        ("layers.3.ffn.experts.0.w1.weight", "model.layers.3.mlp.experts.0.w1.weight"),
        ("layers.3.ffn.gate.bias", "model.layers.3.mlp.gate.e_score_correction_bias"),
        ("mtp.0.attn.wq_a.weight", None),
        ("tower.0.weight", "tower.0.weight"),
    ],
)
def test_the_names_that_deepseek_published_are_found(stored: str, path: str | None) -> None:
    assert names("deepseek_v4").path(stored) == path


def test_only_whole_parts_of_a_name_are_replaced() -> None:
    assert names("mixtral").path("model.my_block_sparse_moe.gate.weight") == "model.my_block_sparse_moe.gate.weight"


@pytest.mark.parametrize(
    ("stored", "path"),
    [
        ("language_model.model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head", "lm_head"),
        ("model.language_model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.embed_tokens", "model.embed_tokens"),
        ("lm_head.weight", "lm_head.weight"),
        ("visual.blocks.0.attn.qkv.weight", None),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        ("model.vision_tower.layers.0.mlp.fc1.weight", None),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", None),
        ("multi_modal_projector.linear_1.weight", None),
        ("model.norm_of_images.weight", None),
        ("mtp.layers.0.mlp.up_proj.weight", None),
        ("model.language_model.layers.2.eh_proj.weight", None),
        ("language_model.model.mtp.layers.0.norm.weight", None),
    ],
)
def test_the_language_part_of_a_multimodal_checkpoint_is_found(stored: str, path: str | None) -> None:
    assert names(text_config=TEXT).path(stored) == path


def test_a_language_model_has_no_prefixes() -> None:
    """A name that fits nowhere must stay a fault in a text-only checkpoint."""
    for config in ({}, {"text_config": None}, {"text_config": {}}):
        assert names(**config).path("visual.blocks.0.weight") == "visual.blocks.0.weight"


@pytest.mark.parametrize("config", [TEXT, {"text_config": TEXT}], ids=["text", "multimodal"])
def test_draft_layers_are_those_behind_the_last_one(config: dict[str, Any]) -> None:
    layers = [names(**config).path(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(4)]

    assert [path is None for path in layers] == [False, False, True, False]


def test_a_configuration_is_translated_with_its_tensors() -> None:
    quant_config = QuantConfig(
        kv_cache_quant_algo="FP8",
        exclude_modules=("vision_tower.head", "language_model.lm_head"),
        quantized_layers={"language_model.model.layers.0.mlp.up_proj": W8A16, "vision_tower.fc1": W8A16},
    )

    translated = names(text_config=TEXT).translate(quant_config)

    assert translated == QuantConfig(
        kv_cache_quant_algo="FP8",
        exclude_modules=("lm_head",),
        quantized_layers={"model.layers.0.mlp.up_proj": W8A16},
    )


def test_several_names_of_one_module_are_translated_to_its_path() -> None:
    experts = ("language_model.model.layers.0.mlp.experts", "model.layers.0.mlp.experts")
    listed = [f"{name}{child}" for name in experts for child in ("", ".backend")]
    quantized = QuantConfig(quantized_layers=dict.fromkeys(listed, W8A16))

    translated = names(text_config=TEXT).translate(QuantConfig(layer=W8A16, exclude_modules=tuple(listed)))

    assert translated.exclude_modules == ("model.layers.0.mlp.experts",)
    assert names(text_config=TEXT).translate(quantized).quantized_layers == {"model.layers.0.mlp.experts": W8A16}
