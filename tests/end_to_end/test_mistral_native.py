"""Mistral's own form of a checkpoint, with params.json, other names and another order of rows.

It is loaded where its writers and its readers agree what it means, or the block says it, and refused by name otherwise.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import rewrite, rewrite_config, write_checkpoint
from command_line import run_cli
from mistral_form import (
    in_pairs,
    native_name,
    packed_in_pairs,
    quantized_in_place,
    readable_by_vllm,
    to_native,
    write_native,
    write_params,
)
from safetensors.torch import load_file
from tiny_models import tiny_config
from torch import Tensor

from trtllm_ct import CompressedTensorsWeightLoader, convert_checkpoint, verify_checkpoint
from trtllm_ct.base.errors import CheckpointError, ConfigError, DetectionError, Fault, PlanError
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

QSCALE = {"weight_scale": "qscale_weight", "input_scale": "qscale_act"}
# Heads of 32 rows: four of queries, two of keys.
WIDE = tiny_config("MistralForCausalLM", hidden=128, heads=4, kv_heads=2)
# Heads of 128 rows, each a whole row of blocks.
BLOCKS = tiny_config("MistralForCausalLM", hidden=256, heads=2, kv_heads=1, intermediate=256)

# Schemes of which every tensor of queries and keys is read alike by all, and what gives the scales their names.
AGREED = {
    "fp8-tensor-static": {},
    "fp8-tensor-token": {},
    "int8-plain-tensor": {},
    "fp8-channel-token": QSCALE,
    "fp8-channel-static": QSCALE,
    "fp8-weight-only": QSCALE,
    "w8a8": QSCALE,
    "int8-plain-g32": QSCALE,
}
# Those of which some are read otherwise than they are written.
CONTESTED = {
    "fp8-channel-token": "weight_scale",
    "w8a8": "weight_scale",
    "mxfp8": "weight_scale",
    "int8-plain-channel-asym": "weight_scale, weight_zero_point",
    "int4-g32": "weight_packed, weight_scale",
    "int4-g32-asym": "weight_packed, weight_scale, weight_zero_point",
    "int4-channel-asym": "weight_packed, weight_scale, weight_zero_point",
    "int4-tensor": "weight_packed",
    "int4-g64-actorder": "weight_packed, weight_scale",
    "nvfp4": "weight_packed, weight_scale",
    "mxfp4a16": "weight_packed, weight_scale",
    "mxfp6a8": "weight_packed, weight_scale",
}


def delivered(directory: Path, layout: Any) -> dict[str, Tensor]:
    return CompressedTensorsWeightLoader().load_weights(directory, layout=layout)


def assert_same(directory: Path, twin: Path) -> None:
    """Byte for byte what the twin in Hugging Face's form gives, native and dense."""
    for layout in ("native", "dense"):
        found, want = delivered(directory, layout), delivered(twin, layout)
        assert found.keys() == want.keys()
        for name, tensor in found.items():
            assert tensor.dtype == want[name].dtype, name
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), want[name].reshape(-1).view(torch.uint8)), name


def write_twins(folder: Path, scheme: str, config: dict[str, Any] = WIDE, **options: Any) -> tuple[Path, Path]:
    """A checkpoint in Mistral's own form, and the same one in Hugging Face's."""
    write_native(folder / "native", scheme, config=config, **options)
    write_checkpoint(folder / "twin", scheme=scheme, config=config)
    return folder / "native", folder / "twin"


def faults(directory: Path) -> list[Fault]:
    with pytest.raises(CheckpointError) as caught:
        plan_checkpoint(directory)
    return list(caught.value.faults)


class TestWhatEverybodyReadsAlike:
    @pytest.mark.parametrize("scheme", AGREED)
    def test_it_is_what_hugging_faces_form_is(self, tmp_path: Path, scheme: str) -> None:
        native, twin = write_twins(tmp_path, scheme, rename=AGREED[scheme])

        assert_same(native, twin)
        assert plan_checkpoint(native).quant_config == plan_checkpoint(twin).quant_config

    def test_blocks_of_whole_heads_need_no_order(self, tmp_path: Path) -> None:
        def place(name: str, tensor: Tensor, _stored: Any) -> Tensor:
            return in_pairs(tensor, 128) if name.endswith(".weight") else tensor

        native, twin = write_twins(tmp_path, "fp8-block", BLOCKS, place=place)

        assert_same(native, twin)

    @pytest.mark.parametrize("scheme", ["int4-g32-asym", "nvfp4", "marlin-24"])
    def test_queries_and_keys_that_are_plain(self, tmp_path: Path, scheme: str) -> None:
        others = dict.fromkeys(("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), scheme)
        if scheme == "marlin-24":
            others = {"down_proj": "int4-channel"}
        native, twin = write_twins(tmp_path, others)  # type: ignore[arg-type]

        assert_same(native, twin)

    def test_a_mixture_of_experts(self, tmp_path: Path) -> None:
        native, twin = write_twins(tmp_path, "fp8-tensor-static", tiny_config("MixtralForCausalLM"))

        plan = plan_checkpoint(native)

        assert_same(native, twin)
        assert plan.module("model.layers.1.block_sparse_moe.experts.3.w2").delivered_mode == "FP8"

    def test_scales_of_the_kv_cache(self, tmp_path: Path) -> None:
        def move(stored: dict[str, Tensor]) -> None:
            for name in [name for name in stored if name.endswith(("k_scale", "v_scale"))]:
                module, _, local = name.rpartition(".")
                stored[f"{module}.{local[0]}_fake_quantizer.qscale_act"] = stored.pop(name)

        native, twin = tmp_path / "native", tmp_path / "twin"
        write_native(native, config=WIDE, kv=True, rename=QSCALE)
        write_checkpoint(twin, config=WIDE, scheme="fp8-tensor-static", kv=True)
        rewrite(native, move)

        assert_same(native, twin)
        assert plan_checkpoint(native).quant_config.kv_cache_quant_algo == "FP8"

    def test_a_config_json_beside_the_weights_describes_the_model(self, tmp_path: Path) -> None:
        """Transformers' name of a head and Mistral's may both stand in `ignore`."""
        write_checkpoint(tmp_path / "twin", config=WIDE, scheme="fp8-tensor-static")
        shutil.copytree(tmp_path / "twin", tmp_path / "native")
        to_native(tmp_path / "native", quantized_in_place(32), {})

        assert_same(tmp_path / "native", tmp_path / "twin")

    def test_every_stored_tensor_keeps_the_name_of_its_file(self, tmp_path: Path) -> None:
        built = write_native(tmp_path, config=WIDE, rename=QSCALE)

        fates = {fate.name: fate for fate in plan_checkpoint(tmp_path).fates()}

        own = {native_name(name) for name in built.stored}
        assert fates.keys() == {
            name.replace("weight_scale", "qscale_weight").replace("input_scale", "qscale_act") for name in own
        }
        assert fates["layers.1.attention.wk.qscale_weight"].by == ("model.layers.1.self_attn.k_proj.weight_scale",)
        assert {str(fate.fate) for fate in fates.values()} == {"consumed"}

    @pytest.mark.parametrize("spelled", ["re:.*attention.wo$", "re:.*o_proj$"])
    def test_targets_may_have_the_names_of_either_form(self, tmp_path: Path, spelled: str) -> None:
        write_native(tmp_path, {"o_proj": "fp8-tensor-static", "down_proj": "w8a8"}, config=WIDE)
        params = json.loads((tmp_path / "params.json").read_text())
        for group in params["quantization"]["config_groups"].values():
            mine = any("o_proj" in target for target in group["targets"])
            group["targets"] = [spelled] if mine else ["re:.*(w2|down_proj)$"]
        (tmp_path / "params.json").write_text(json.dumps(params))

        plan = plan_checkpoint(tmp_path)

        assert plan.module("model.layers.0.self_attn.o_proj").delivered_mode == "FP8"
        assert plan.module("model.layers.0.mlp.down_proj").delivered_mode == "W8A16"


class TestWhatTheBlockHasToSay:
    @pytest.mark.parametrize("scheme", CONTESTED)
    def test_without_a_word_it_is_one_fault(self, tmp_path: Path, scheme: str) -> None:
        write_native(tmp_path, scheme, config=WIDE)

        (fault,) = faults(tmp_path)

        assert fault.where.startswith("layers.0.attention.wq.")
        assert fault.expected == "rows of queries and keys in an order that is known"
        assert fault.found.endswith(f"tensors: {CONTESTED[scheme]})")
        assert '"qk_rows": "mistral"' in fault.remedy
        assert '"qk_rows": "hugging_face"' in fault.remedy
        assert "config.json and model*.safetensors" in fault.remedy

    @pytest.mark.parametrize("scheme", CONTESTED)
    def test_what_was_quantized_in_place_has_mistrals_rows(self, tmp_path: Path, scheme: str) -> None:
        native, twin = write_twins(tmp_path, scheme, qk_rows="mistral")

        assert_same(native, twin)

    @pytest.mark.parametrize("scheme", CONTESTED)
    def test_what_vllm_reads_rightly_lies_in_both_orders(self, tmp_path: Path, scheme: str) -> None:
        native, twin = write_twins(tmp_path, scheme, place=readable_by_vllm(32), qk_rows="hugging_face")

        assert_same(native, twin)

    @pytest.mark.parametrize("scheme", AGREED)
    @pytest.mark.parametrize("word", ["mistral", "hugging_face"])
    def test_the_word_changes_nothing_where_all_agree(self, tmp_path: Path, scheme: str, word: str) -> None:
        native, twin = write_twins(tmp_path, scheme, rename=AGREED[scheme], qk_rows=word)

        assert_same(native, twin)

    @pytest.mark.parametrize("word", ["mistral", "hugging_face"])
    def test_it_changes_nothing_in_hugging_faces_form(self, tmp_path: Path, word: str) -> None:
        for name in ("said", "unsaid"):
            write_checkpoint(tmp_path / name, config=WIDE, scheme="int4-g32")
        rewrite_config(tmp_path / "said", lambda config: config["quantization_config"].update(qk_rows=word))

        assert_same(tmp_path / "said", tmp_path / "unsaid")

    def test_another_word_is_refused(self, tmp_path: Path) -> None:
        write_native(tmp_path, "int4-g32", config=WIDE, qk_rows="pairs")

        (fault,) = faults(tmp_path)

        assert fault.where == "params.json: quantization.qk_rows"
        assert fault.expected == "one of mistral, hugging_face"

    def test_a_zero_point_packed_along_the_rows_by_hand(self, tmp_path: Path) -> None:
        """One head of 8 rows fills a word of int4: the nibbles 0, 4, 1, 5, 2, 6, 3, 7 of the other order."""
        halves = torch.tensor([[0x76543210]], dtype=torch.int32)

        assert packed_in_pairs(halves, 8, 4, 8).tolist() == [[0x73625140]]

    def test_a_sparse_one(self, tmp_path: Path) -> None:
        """The order of rows means what it means for the dense tensor; vLLM never read sparse files of this form."""
        from trtllm_ct import save_compressed

        for name in ("native", "twin"):
            write_checkpoint(tmp_path / name, config=WIDE, scheme="fp8-tensor-static")
        to_native(tmp_path / "native", quantized_in_place(32), {})
        block = json.loads((tmp_path / "twin" / "config.json").read_text())["quantization_config"]
        path = tmp_path / "native" / "consolidated.safetensors"
        stored = load_file(path)
        queries = {name: tensor for name, tensor in stored.items() if name == "layers.0.attention.wq.weight"}
        save_compressed(queries, tmp_path / "sparse.safetensors", format="sparse-bitmask")
        pieces = load_file(tmp_path / "sparse.safetensors")
        rewrite(tmp_path / "native", lambda tensors: (tensors.pop(next(iter(queries))), tensors.update(pieces)))
        (tmp_path / "native" / "config.json").unlink()
        write_params(tmp_path / "native", WIDE, quantization=block)

        (fault,) = faults(tmp_path / "native")
        assert fault.where in pieces
        write_params(tmp_path / "native", WIDE, quantization=block | {"qk_rows": "mistral"})
        assert_same(tmp_path / "native", tmp_path / "twin")


class TestWhatCannotBeMoved:
    def test_blocks_that_cross_heads(self, tmp_path: Path) -> None:
        config = tiny_config("MistralForCausalLM", hidden=384, heads=4, kv_heads=2, intermediate=384)
        write_native(tmp_path, "fp8-block", config=config, place=readable_by_vllm(96), qk_rows="mistral")

        (fault,) = faults(tmp_path)

        assert fault.where == "layers.0.attention.wq.weight_scale"
        assert fault.found == "blocks of 128 rows that cross heads of 96 (4 tensors)"
        assert "config.json and model*.safetensors" in fault.remedy

    def test_odd_heads(self, tmp_path: Path) -> None:
        config = tiny_config("MistralForCausalLM", hidden=64, heads=4, kv_heads=2) | {"head_dim": 15}
        write_native(tmp_path, config=config, place=lambda _name, tensor, _stored: tensor)

        assert faults(tmp_path)[0].found == "60 rows in heads of 15 (2 tensors)"

    def test_modules_that_the_model_does_not_have(self, tmp_path: Path) -> None:
        """One fault for all of them, and none for the tensors that then seem missing."""
        write_native(tmp_path, config=WIDE)

        def add(stored: dict[str, Tensor]) -> None:
            for layer in range(2):
                stored[f"layers.{layer}.attention.wq_a.weight"] = stored.pop(f"layers.{layer}.attention.wq.weight")

        rewrite(tmp_path, add)

        (fault,) = faults(tmp_path)
        assert fault.where == "layers.0.attention.wq_a"
        assert fault.expected == "the modules that a MistralForCausalLM has in Mistral's own form"
        assert fault.found == "2 others: layers.0.attention.wq_a, layers.1.attention.wq_a"

    def test_a_scale_under_both_names_has_no_owner(self, tmp_path: Path) -> None:
        write_native(tmp_path, config=WIDE)
        rewrite(tmp_path, lambda stored: stored.update({"layers.0.attention.wo.qscale_weight": torch.ones(1)}))

        assert [fault.where for fault in faults(tmp_path)] == ["layers.0.attention.wo.qscale_weight"]

    def test_two_scales_of_one_cache(self, tmp_path: Path) -> None:
        write_native(tmp_path, config=WIDE, kv=True)
        twice = {"layers.0.attention.k_fake_quantizer.qscale_act": torch.ones(1)}
        rewrite(tmp_path, lambda stored: stored.update(twice))

        (fault,) = faults(tmp_path)
        assert fault.expected == "one tensor that makes model.layers.0.self_attn.k_scale"

    def test_a_tensor_that_only_looks_like_it_stays_a_leftover(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        rewrite(tmp_path, lambda stored: stored.update({"model.layers.0.attention.wq.weight": torch.ones(2, 2)}))

        with pytest.raises(PlanError) as raised:
            plan_checkpoint(tmp_path)
        assert "Mistral" not in str(raised.value)


class TestEveryEntrance:
    def test_a_converted_directory_is_that_of_the_twin(self, tmp_path: Path) -> None:
        native, twin = write_twins(tmp_path, "fp8-channel-token", rename=QSCALE)
        (native / "tekken.json").write_text("{}")

        for name in (native, twin):
            convert_checkpoint(name, tmp_path / f"{name.name}-out")

        out, want = tmp_path / "native-out", tmp_path / "twin-out"
        assert (out / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()
        assert (out / "hf_quant_config.json").read_bytes() == (want / "hf_quant_config.json").read_bytes()
        assert {path.name for path in out.iterdir()} == {path.name for path in want.iterdir()} | {"tekken.json"}
        said, wanted = (json.loads((path / "config.json").read_text()) for path in (out, want))
        ours = {"max_position_embeddings", "sliding_window", "rope_theta", "rope_scaling"}
        assert {key: said[key] for key in said.keys() - ours} == {key: wanted[key] for key in said.keys() - ours}
        verify_checkpoint(native, out).raise_if_bad()

    def test_inspect_names_the_row(self, tmp_path: Path) -> None:
        write_native(tmp_path, "fp8-channel-token", config=WIDE, rename=QSCALE)

        document = run_cli("inspect", tmp_path, "--json").document

        assert document["problems"] == []
        assert document["architecture"] == "MistralForCausalLM"
        assert document["detection"]["origin"] == "params.json: quantization"
        assert document["schemes"][0]["mode"] == "FP8_PER_CHANNEL_PER_TOKEN"

    def test_each_says_the_same_of_what_it_refuses(self, tmp_path: Path) -> None:
        write_native(tmp_path / "in", "int4-g32", config=WIDE)

        inspected = run_cli("inspect", tmp_path / "in", "--json").document
        with pytest.raises(PlanError, match="Mistral's own form"):
            CompressedTensorsWeightLoader().load_weights(tmp_path / "in")
        with pytest.raises(PlanError, match="Mistral's own form"):
            convert_checkpoint(tmp_path / "in", tmp_path / "out")

        (problem,) = inspected["problems"]
        assert problem["found"].startswith("Mistral's own form, in which nothing tells it (8 tensors:")
        assert not (tmp_path / "out").exists()

    def test_a_params_json_that_says_nothing_of_the_model(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        (tmp_path / "config.json").unlink()
        (tmp_path / "params.json").write_text(json.dumps({"quantization": block}))

        with pytest.raises(ConfigError, match=r"params\.json: dim"):
            open_checkpoint(tmp_path)


class TestBesideHuggingFacesForm:
    def test_both_forms_in_one_directory_are_read_as_hugging_faces(self, tmp_path: Path) -> None:
        """Mistral's own repositories hold the weights twice; the second copy is named and left behind."""
        both, twin = (write_checkpoint(tmp_path / name, config=WIDE, scheme="int4-g32") for name in ("both", "twin"))
        shutil.copy(both.directory / "model.safetensors", both.directory / "model-00001-of-00001.safetensors")
        to_native(both.directory, quantized_in_place(32), {})
        write_params(both.directory, WIDE, quantization=both.config["quantization_config"])

        assert_same(both.directory, twin.directory)
        assert "a second copy of the weights: consolidated.safetensors" in plan_checkpoint(both.directory).warnings[0]

    def test_a_block_in_params_json_counts_for_weights_in_hugging_faces_form(self, tmp_path: Path) -> None:
        built = write_checkpoint(tmp_path, config=tiny_config("MistralForCausalLM"), scheme="int4-g64")
        write_params(tmp_path, built.config, quantization=built.config["quantization_config"])
        rewrite_config(tmp_path, lambda config: config.pop("quantization_config"))

        plan = plan_checkpoint(tmp_path)

        assert open_checkpoint(tmp_path).config.origin == "params.json: quantization"
        assert plan.module("model.layers.0.self_attn.o_proj").delivered_mode == "W4A16_AWQ g64"


@pytest.mark.parametrize("scheme", ["NO_SCALES", "TENSOR"])
def test_mistrals_own_fp8_is_another_method(tmp_path: Path, scheme: str) -> None:
    """The detector says whose it is, and who reads it."""
    write_native(tmp_path, config=WIDE)
    write_params(tmp_path, WIDE, quantization={"qformat_weight": "fp8_e4m3", "qscheme_act": scheme})

    with pytest.raises(DetectionError) as raised:
        open_checkpoint(tmp_path)

    (fault,) = raised.value.faults
    assert "an FP8 checkpoint in Mistral's own form, not compressed-tensors" in fault.found
    assert "params.json: quantization" in fault.found
    assert "checkpoint_format" in fault.remedy
