"""Every entry of the engine's configuration is under each name that the engine may compare with."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import pytest
import torch
from builders import rewrite, rewrite_config, tiny_config, write_checkpoint
from multimodal import MIXED, PLACES, VISION, write_multimodal

from trtllm_ct.engine.model_classes import WRAPPERS
from trtllm_ct.engine.releases import RELEASES
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.engine.releases import Release

DEEPSEEK = "DeepseekV3ForCausalLM"
DRAFT = "model.layers.2"
DRAFT_LINEARS = (
    "eh_proj",
    "self_attn.o_proj",
    "self_attn.q_a_proj",
    "mlp.gate",
    "mlp.experts.0.gate_proj",
    "mlp.experts.1.down_proj",
    "mlp.shared_experts.up_proj",
    "shared_head.head",
)


def inner(name: str, body: str) -> str:
    """The name that a delivered module has inside of the text model."""
    return "lm_head" if name == PLACES[body] else name.replace(body, "model.", 1) if name.startswith(body) else name


def add_draft_layer(stored: dict[str, Tensor]) -> None:
    for name in DRAFT_LINEARS:
        stored[f"{DRAFT}.{name}.weight"] = torch.randn(64, 64).bfloat16()
    for name in ("enorm", "hnorm", "input_layernorm"):
        stored[f"{DRAFT}.{name}.weight"] = torch.ones(64).bfloat16()


@pytest.mark.parametrize("architecture", WRAPPERS)
@pytest.mark.parametrize("body", PLACES)
def test_a_wrapper_lists_stored_and_inner_names(tmp_path: Path, architecture: str, body: str) -> None:
    write_multimodal(tmp_path, body, architecture=architecture)

    plan = plan_checkpoint(tmp_path, engine="stock-1.3")
    config = plan.quant_config

    delivered, _ = next(
        (place for place in PLACES.items() if f"{place[0]}layers.0" in " ".join(plan.by_name)), ("", "")
    )
    for module in plan.modules:
        if module.layer is not None:
            assert config.quantized_layers[module.name] == module.layer
            assert config.quantized_layers[inner(module.name, delivered)] == module.layer
        elif module.class_name in {"Linear", "Embedding"}:
            assert {module.name, inner(module.name, delivered)} <= set(config.exclude_modules)
    assert not config.quantized_layers.keys() & set(config.exclude_modules)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_linears_that_are_stored_fused_are_listed_by_their_first_part_too(tmp_path: Path, release: Release) -> None:
    """`apply_layerwise_quant_config` looks for `q_proj` and `gate_proj`, whatever the files have."""
    scheme = {"qkv_proj": "fp8-tensor-static", "gate_up_proj": "nvfp4", "down_proj": "int8-channel"}
    write_checkpoint(tmp_path, config=tiny_config("Phi3ForCausalLM", hidden=128), scheme=scheme)

    layers = plan_checkpoint(tmp_path, engine=release.name).quant_config.quantized_layers

    for stored, first in (("self_attn.qkv_proj", "self_attn.q_proj"), ("mlp.gate_up_proj", "mlp.gate_proj")):
        for layer in range(2):
            entry = layers[f"model.layers.{layer}.{stored}"]
            assert layers[f"model.layers.{layer}.{first}"] == entry
    assert "model.layers.0.mlp.down_proj" in layers


@pytest.mark.parametrize("scheme", [MIXED, "int8-channel"])
def test_towers_and_projectors_are_listed(tmp_path: Path, scheme: str) -> None:
    write_multimodal(tmp_path, "language_model.model.", scheme=scheme)

    excluded = set(plan_checkpoint(tmp_path).quant_config.exclude_modules)

    weights = {name.removesuffix(".weight") for name in VISION if name.endswith(".weight")}
    assert weights <= excluded
    assert "vision_tower" not in excluded, "a parameter of its own must not exclude all modules below"


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
@pytest.mark.parametrize("fused", [False, True])
def test_plain_draft_layers_are_excluded(tmp_path: Path, release: object, fused: bool) -> None:
    config = tiny_config(DEEPSEEK, num_nextn_predict_layers=1)

    def edit(stored: dict[str, Tensor]) -> None:
        add_draft_layer(stored)
        if fused:
            for name in [name for name in stored if name.startswith(f"{DRAFT}.mlp.experts.")]:
                del stored[name]
            stored[f"{DRAFT}.mlp.experts.gate_up_proj"] = torch.randn(4, 128, 64).bfloat16()
            stored[f"{DRAFT}.mlp.experts.down_proj"] = torch.randn(4, 64, 64).bfloat16()

    write_checkpoint(tmp_path, config=config, scheme="nvfp4", edit=edit)

    excluded = plan_checkpoint(tmp_path, engine=release.name).quant_config.exclude_modules

    experts = f"{DRAFT}.mlp.experts"
    want = {f"{DRAFT}.{name}" for name in DRAFT_LINEARS if "mlp.experts" not in name} | {experts}
    want |= {f"{experts}.backend"} if release.wraps_experts else set()
    assert {name for name in excluded if name.startswith(DRAFT)} == want


def test_quantized_draft_layers_are_dequantized_and_excluded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config=tiny_config(DEEPSEEK, layers=3), scheme="fp8-tensor-static")
    rewrite_config(tmp_path, lambda config: config.update(num_hidden_layers=2, num_nextn_predict_layers=1))

    plan = plan_checkpoint(tmp_path)

    experts = f"{DRAFT}.mlp.experts"
    assert plan.module(f"{experts}.0.up_proj").delivered_mode == "dequantized"
    assert {experts, f"{experts}.backend", f"{DRAFT}.self_attn.o_proj"} <= set(plan.quant_config.exclude_modules)
    assert f"{experts}.0.up_proj" not in plan.quant_config.exclude_modules


def test_no_excluded_name_is_an_ancestor_of_a_quantized_module(tmp_path: Path) -> None:
    """Newer releases exclude everything below an excluded name."""
    write_multimodal(tmp_path, "model.language_model.", architecture="Qwen3VLForConditionalGeneration")
    rewrite(tmp_path, lambda stored: stored.update({"model.image_newline": torch.ones(4, 4).bfloat16()}))

    config = plan_checkpoint(tmp_path).quant_config

    for name in config.quantized_layers:
        assert set(config.exclude_modules).isdisjoint(accumulate(name.split("."), "{}.{}".format))


@pytest.mark.parametrize("to", ["dense", "reference"])
def test_other_targets_list_delivered_names_only(tmp_path: Path, to: str) -> None:
    write_multimodal(tmp_path, "language_model.model.")

    config = plan_checkpoint(tmp_path, to).quant_config

    assert not [name for name in config.exclude_modules if name.startswith(("model.", "lm_head"))]
