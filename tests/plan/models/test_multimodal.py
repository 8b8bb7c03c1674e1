"""Models with more than a text model: prefixes, vision towers, projectors and draft layers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import config_group, int_weights, rewrite, rewrite_config, tiny_config, write_checkpoint
from multimodal import PLACES, VISION, renamed, write_multimodal
from on_tensors import on_tensors
from safetensors.torch import load_file, save_file
from stored_schemes import SCHEMES, Writer

from trtllm_ct.base.errors import Fault, PlanError, UnreadClassError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.layouts import rounding as rounding_layout
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan.models.class_rows import CLASS_ROWS, TEXT_MODELS
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from builders import Built
    from torch import Tensor

round_once = on_tensors(rounding_layout.round_once)


def faults(directory: Path) -> list[Fault]:
    with pytest.raises(PlanError) as caught:
        plan_checkpoint(directory)
    return list(caught.value.faults)


class TestPrefixes:
    @pytest.mark.parametrize("body", PLACES)
    def test_the_text_model_is_found_under_every_prefix(self, tmp_path: Path, body: str):
        built = write_multimodal(tmp_path, body)

        plan = plan_checkpoint(tmp_path)

        layer = f"{body}layers.1"
        assert plan.module(f"{layer}.self_attn.q_proj").delivered_mode == "FP8_PER_CHANNEL_PER_TOKEN"
        assert plan.module(f"{layer}.self_attn.o_proj").delivered_mode == "W8A16"
        assert plan.module(f"{layer}.mlp.up_proj").delivered_mode == "W4A16_AWQ g64"
        assert plan.module(f"{layer}.mlp.down_proj").delivered_mode == "dequantized"
        assert plan.module(PLACES[body]).delivered_mode == "plain"
        assert {renamed(name, body) for name in built.dense} <= plan.delivered_specs.keys()
        assert plan.architecture == "LlavaNextForConditionalGeneration"
        assert plan.warnings == ()

    @pytest.mark.parametrize("body", PLACES)
    @pytest.mark.parametrize("spelled", PLACES)
    def test_targets_and_ignore_may_have_another_prefix(self, tmp_path: Path, body: str, spelled: str):
        write_multimodal(tmp_path, body)
        want = plan_checkpoint(tmp_path)

        def spell(document: dict[str, Any]) -> None:
            block = document["quantization_config"]
            text = f"{body}layers."
            block["ignore"] = [PLACES[spelled] if entry == PLACES[body] else entry for entry in block["ignore"]]
            for group in block["config_groups"].values():
                group["targets"] = [target.replace(text, f"{spelled}layers.") for target in group["targets"]]

        rewrite_config(tmp_path, spell)

        assert plan_checkpoint(tmp_path) == want

    def test_kv_scales_are_delivered_under_the_prefix(self, tmp_path: Path):
        write_multimodal(tmp_path, "model.language_model.", scheme="fp8-tensor-static", kv=True)

        plan = plan_checkpoint(tmp_path)

        assert "model.language_model.layers.0.self_attn.v_proj.v_scale" in plan.delivered_specs
        assert plan.quant_config.kv_cache_quant_algo == "FP8"

    def test_names_of_the_engine_config_have_the_prefix_of_the_files(self, tmp_path: Path):
        write_multimodal(tmp_path, "language_model.model.")

        config = plan_checkpoint(tmp_path).quant_config

        assert all(name.startswith(("language_model.model.", "model.")) for name in config.quantized_layers)
        assert {"language_model.lm_head", "language_model.model.embed_tokens"} <= set(config.exclude_modules)

    def test_a_mixture_under_a_prefix(self, tmp_path: Path):
        text = tiny_config("Qwen3MoeForCausalLM", hidden=128)
        write_multimodal(tmp_path, "model.language_model.", text=text, scheme="nvfp4")

        plan = plan_checkpoint(tmp_path)

        assert plan.module("model.language_model.layers.1.mlp.experts.3.up_proj").delivered_mode == "NVFP4 g16"
        assert "model.language_model.layers.1.mlp.gate" in plan.quant_config.exclude_modules

    @pytest.mark.parametrize("model_type", TEXT_MODELS)
    def test_the_row_of_a_text_model_lists_its_modules(self, model_type: str):
        assert CLASS_ROWS[TEXT_MODELS[model_type]].leaves

    def test_a_class_with_an_unknown_text_model_becomes_plain_weights_only(self, tmp_path: Path):
        write_multimodal(tmp_path, "language_model.model.")
        rewrite_config(tmp_path, lambda document: document["text_config"].update(model_type="grok"))

        with pytest.raises(UnreadClassError) as caught:
            plan_checkpoint(tmp_path)

        (fault,) = caught.value.faults
        assert fault.where == "config.json: architectures"
        assert fault.found.startswith("LlavaNextForConditionalGeneration")
        assert "--to dense" in fault.remedy
        assert plan_checkpoint(tmp_path, "dense").by_name.keys() >= {"language_model.model.layers.1.mlp.up_proj"}

    def test_a_text_model_under_a_prefix_of_its_own_is_planned_by_its_files(self, tmp_path: Path):
        write_multimodal(tmp_path, "model.text_model.")

        with pytest.raises(UnreadClassError):
            plan_checkpoint(tmp_path)
        plan = plan_checkpoint(tmp_path, "dense")

        assert plan.module("model.text_model.layers.1.mlp.up_proj").delivered_mode == "dequantized"


class TestOtherParts:
    @pytest.mark.parametrize("to", ["modelopt", "dense", "reference"])
    def test_a_plain_vision_tower_is_delivered_unchanged(self, tmp_path: Path, to: str):
        write_multimodal(tmp_path, "language_model.model.")

        fates = {fate.name: fate for fate in plan_checkpoint(tmp_path, to).fates()}

        assert {(str(fates[name].fate), fates[name].by) for name in VISION} == {("copied", (name,)) for name in VISION}

    def test_a_quantized_part_is_dequantized_with_a_reason(self, tmp_path: Path):
        """It is unknown how an engine uses it."""
        name = "vision_tower.blocks.0.attn.proj"
        tensors, exact = Writer(torch.bfloat16, torch.Generator().manual_seed(3)).store(SCHEMES["w8a8"], (16, 8))
        write_multimodal(tmp_path / "source", "language_model.model.", scheme="w8a8")
        rewrite(
            tmp_path / "source",
            lambda stored: stored.update({f"{name}.{local}": tensor for local, tensor in tensors.items()}),
        )

        plan = plan_checkpoint(tmp_path / "source")
        convert_checkpoint(tmp_path / "source", tmp_path / "out")

        assert plan.module(name).delivered_mode == "dequantized"
        assert plan.module(name).reason == "not a part of the text model's layers"
        assert name in plan.quant_config.exclude_modules
        delivered = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
        assert torch.equal(delivered, round_once(exact, torch.bfloat16))

    def test_scales_beside_a_plain_weight_are_never_applied(self, tmp_path: Path):
        write_multimodal(tmp_path, "language_model.model.")
        scale = "vision_tower.blocks.0.attn.qkv.weight_scale"
        rewrite(tmp_path, lambda stored: stored.update({scale: torch.ones(24, 1)}))

        (fate,) = [fate for fate in plan_checkpoint(tmp_path).fates() if fate.name == scale]

        assert (str(fate.fate), fate.reason) == ("ignored", "the weight beside it is plain")

    def test_a_scale_without_a_weight_is_a_fault_outside_of_the_text_model_too(self, tmp_path: Path):
        write_multimodal(tmp_path, "language_model.model.")
        scale = "vision_tower.blocks.1.attn.qkv.weight_scale"
        rewrite(tmp_path, lambda stored: stored.update({scale: torch.ones(24, 1)}))

        assert [fault.where for fault in faults(tmp_path)] == [scale]

    def test_without_a_text_config_a_vision_tower_is_a_fault(self, tmp_path: Path):
        write_checkpoint(tmp_path, edit=lambda stored: stored.update({"vision_tower.x.weight": torch.ones(2)}))

        assert [fault.where for fault in faults(tmp_path)] == ["vision_tower.x.weight"]


class TestDraftLayers:
    """Layers that predict further tokens are delivered, and never mistaken for layers of the model."""

    NAMES = ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "model.mtp.norm.weight", "mtp_block.0.weight")

    @pytest.mark.parametrize("name", NAMES)
    def test_plain_draft_layers_are_delivered_unchanged(self, tmp_path: Path, name: str):
        """Even if the target Linear matches them: writers copy them from the original files."""
        write_checkpoint(tmp_path, edit=lambda stored: stored.update({name: torch.ones(64, 64).bfloat16()}))

        plan = plan_checkpoint(tmp_path)

        assert str(plan.delivered_specs[name]) == "bfloat16 [64, 64]"
        assert plan.warnings == ()

    @pytest.mark.parametrize("scheme", ["int4-g32", "fp8-block", "nvfp4", "mxfp8"])
    def test_quantized_draft_layers_are_dequantized(self, tmp_path: Path, scheme: str):
        tensors, exact = Writer(torch.bfloat16, torch.Generator().manual_seed(3)).store(SCHEMES[scheme], (64, 64))
        more = {f"mtp.layers.0.mlp.up_proj.{local}": tensor for local, tensor in tensors.items()}
        write_checkpoint(tmp_path / "source", scheme=scheme, edit=lambda stored: stored.update(more))

        convert_checkpoint(tmp_path / "source", tmp_path / "out")

        delivered = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(delivered["mtp.layers.0.mlp.up_proj.weight"], round_once(exact, torch.bfloat16))
        assert not [name for name in delivered if name.startswith("mtp") and not name.endswith(".weight")]

    @pytest.mark.parametrize(("declared", "known"), [(1, True), (None, False), (0, False)])
    def test_layers_behind_the_last_one_are_those_that_config_json_declares(
        self, tmp_path: Path, declared: int | None, known: bool
    ):
        """Any other surplus layer means that config.json belongs to another model."""
        config = tiny_config("DeepseekV3ForCausalLM", num_nextn_predict_layers=declared)
        more = {f"model.layers.2.{name}.weight": torch.ones(4, 4).bfloat16() for name in ("eh_proj", "enorm")}
        write_checkpoint(tmp_path, config=config, scheme="nvfp4", edit=lambda stored: stored.update(more))

        if known:
            assert more.keys() <= plan_checkpoint(tmp_path).delivered_specs.keys()
        else:
            assert {fault.where for fault in faults(tmp_path)} == more.keys()

    def test_there_are_no_more_draft_layers_than_config_json_declares(self, tmp_path: Path):
        config = tiny_config("DeepseekV3ForCausalLM", num_nextn_predict_layers=1)
        more = {f"model.layers.{layer}.enorm.weight": torch.ones(4).bfloat16() for layer in (2, 3)}
        write_checkpoint(tmp_path, config=config, scheme="nvfp4", edit=lambda stored: stored.update(more))

        assert {fault.where for fault in faults(tmp_path)} == {"model.layers.3.enorm.weight"}


class TestGolden:
    """One checkpoint with everything: prefixes, mixed schemes, a vision tower, and draft layers in a separate file."""

    BODY = "model.language_model."

    @pytest.fixture
    def built(self, tmp_path: Path) -> Built:
        directory = tmp_path / "source"
        built = write_multimodal(directory, self.BODY, kv=True)
        tensors, exact = Writer(torch.bfloat16, torch.Generator().manual_seed(5)).store(SCHEMES["int4-g32"], (64, 128))
        drafts = {f"mtp.layers.0.mlp.down_proj.{local}": tensor for local, tensor in tensors.items()}
        drafts |= {"mtp.fc.weight": torch.randn(128, 256).bfloat16(), "mtp.norm.weight": torch.ones(128).bfloat16()}
        built.dense["mtp.layers.0.mlp.down_proj.weight"] = exact
        save_in_two_files(directory, drafts)
        group = config_group(int_weights(4, group_size=32), targets=[r"re:^mtp\.layers.*"], format="pack-quantized")

        def declare(document: dict[str, Any]) -> None:
            document["quantization_config"]["ignore"] += ["mtp.fc", "re:.*vision_tower.*"]
            document["quantization_config"]["config_groups"]["drafts"] = group

        rewrite_config(directory, declare)
        return built

    def test_the_plan_of_every_module(self, built: Built):
        plan = plan_checkpoint(built.directory)

        modes = {
            module.name.replace(self.BODY, "").replace("layers.1", "layers.0"): module.delivered_mode
            for module in plan.modules
        }
        assert modes == {
            "embed_tokens": "plain",
            "layers.0.input_layernorm": "plain",
            "layers.0.post_attention_layernorm": "plain",
            "layers.0.self_attn": "plain",
            "layers.0.self_attn.q_proj": "FP8_PER_CHANNEL_PER_TOKEN",
            "layers.0.self_attn.k_proj": "FP8_PER_CHANNEL_PER_TOKEN",
            "layers.0.self_attn.v_proj": "FP8_PER_CHANNEL_PER_TOKEN",
            "layers.0.self_attn.o_proj": "W8A16",
            "layers.0.mlp.gate_proj": "W4A16_AWQ g64",
            "layers.0.mlp.up_proj": "W4A16_AWQ g64",
            "layers.0.mlp.down_proj": "dequantized",
            "norm": "plain",
            "lm_head": "plain",
            "vision_tower.patch_embed": "plain",
            "vision_tower.blocks.0.attn.qkv": "plain",
            "vision_tower": "plain",
            "multi_modal_projector.linear_1": "plain",
            "mtp.fc": "plain",
            "mtp.norm": "plain",
            "mtp.layers.0.mlp.down_proj": "dequantized",
        }
        assert plan.warnings == ()

    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_every_value_is_verified(self, built: Built, tmp_path: Path, to: str):
        convert_checkpoint(built.directory, tmp_path / "out", to=to)

        report = verify_checkpoint(built.directory, tmp_path / "out")

        assert report.faults == ()
        assert {check.kind for check in report.checks} >= {"plain", "dequantized"}

    def test_dense_values_are_exact(self, built: Built, tmp_path: Path):
        convert_checkpoint(built.directory, tmp_path / "out", to="dense")

        delivered = load_file(tmp_path / "out" / "model.safetensors")
        for name, exact in built.dense.items():
            stored_name = name if name.startswith("mtp") else renamed(name, self.BODY)
            assert torch.equal(delivered[stored_name], round_once(exact, torch.bfloat16)), stored_name
        assert VISION.keys() | {"mtp.fc.weight"} <= delivered.keys()

    def test_inspect_names_every_row(self, built: Built):
        report = inspect_checkpoint(built.directory)

        assert "unknown" not in json.dumps(report.to_dict())

    def test_draft_layers_that_no_target_covers_are_read_as_the_only_group_that_fits(self, built: Built):
        rewrite_config(built.directory, lambda document: document["quantization_config"]["config_groups"].pop("drafts"))

        plan = plan_checkpoint(built.directory)

        assert plan.module("mtp.layers.0.mlp.down_proj").stored_scheme == "pack-quantized: int4 group 32"
        assert any("no target covers it" in warning for warning in plan.warnings)

    def test_draft_layers_that_fit_several_groups_are_a_fault(self, built: Built):
        def declare_twice(document: dict[str, Any]) -> None:
            groups = document["quantization_config"]["config_groups"]
            groups["others"] = groups.pop("drafts") | {"targets": ["re:^other.*"]}

        rewrite_config(built.directory, declare_twice)

        (fault,) = faults(built.directory)

        assert fault.where == "mtp.layers.0.mlp.down_proj"
        assert fault.found.startswith("2 groups whose format fits its tensors")


def save_in_two_files(directory: Path, drafts: dict[str, Tensor]) -> None:
    """As compressed-tensors 0.15 and later save drafts: beside the model, which gets another name and an index."""
    files = {"model_backbone.safetensors": load_file(directory / "model.safetensors"), "model_mtp.safetensors": drafts}
    for name, tensors in files.items():
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, directory / name, {"format": "pt"})
    (directory / "model.safetensors").unlink()
    weight_map = {key: name for name, tensors in files.items() for key in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
