"""Online transforms in a plan: which modules have one, its tensors, refusals, and the delivered values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from builders import Built, rewrite, rewrite_config, write_checkpoint
from oracles import round_once
from tiny_models import tiny_config
from torch import Tensor

from trtllm_ct import (
    CompressedTensorsConfigReader,
    CompressedTensorsWeightLoader,
    convert_checkpoint,
    to_quant_config,
    verify_checkpoint,
)
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import ConfigError, Fault, PayloadError, PlanError
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan.plan import Fate
from trtllm_ct.verify.comparison import compare_rounded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"
GATE = "model.layers.0.mlp.gate_proj"
R4 = f"{DOWN}.R4_input"
ONE_LAYER = tiny_config(layers=1)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of 1 and -1: the sign is the parity of the bits that row and column share."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


def group(location: str = "input", targets: str = "re:.*down_proj$", **more: Any) -> dict[str, Any]:
    """One entry of `transform_config`; `inverse` and `ignore` belong to its only place."""
    place = {"targets": [targets], "location": location}
    place |= {key: more.pop(key) for key in ("inverse", "ignore") if key in more}
    return {"type": "hadamard", "apply": [place], **more}


def write(
    directory: Path,
    groups: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    scheme: str | dict[str, str] = "int8-channel",
    config: dict[str, Any] = ONE_LAYER,
) -> Built:
    """Write a checkpoint with these transforms in its configuration and these tensors besides those of the model."""
    built = write_checkpoint(directory, config=config, scheme=scheme, edit=lambda stored: stored.update(tensors))
    block = {"config_groups": dict(groups)}
    rewrite_config(directory, lambda config: config["quantization_config"].update(transform_config=block))
    return built


def faults(directory: Path) -> list[Fault]:
    with pytest.raises(PlanError) as raised:
        plan_checkpoint(directory)
    return list(raised.value.faults)


class TestDelivery:
    def test_the_module_is_dequantized_with_the_fold_rounded_once(self, tmp_path: Path):
        built = write(tmp_path, {"R4": group()}, {f"{R4}.weight": hadamard(128)})

        weights = CompressedTensorsWeightLoader().load_weights(tmp_path)

        exact = built.dense[f"{DOWN}.weight"] @ hadamard(128).double().T / math.sqrt(128)
        assert weights[f"{DOWN}.weight"].dtype == torch.bfloat16
        assert torch.equal(weights[f"{DOWN}.weight"].double(), round_once(exact, torch.bfloat16))

    def test_the_plan_gives_the_reason(self, tmp_path: Path):
        write(tmp_path, {"R4": group()}, {f"{R4}.weight": hadamard(128)})

        plan = plan_checkpoint(tmp_path)

        module = plan.module(DOWN)
        (delivery,) = module.deliveries
        assert module.delivered_mode == "dequantized"
        assert module.reason == "the online transform R4 (hadamard, input) is folded into the weight"
        assert delivery.operation.label == "dequantize and fold"
        assert not delivery.operation.exact
        fate = next(fate for fate in plan.fates() if fate.name == f"{R4}.weight")
        assert (fate.fate, fate.by) == (Fate.CONSUMED, (f"{DOWN}.weight",))
        assert DOWN in plan.quant_config.exclude_modules
        assert plan.module(UP).delivered_mode == "W8A16"

    @pytest.mark.parametrize("to", ["dense", "modelopt", "reference"])
    def test_the_reason_is_the_same_at_every_target(self, tmp_path: Path, to: str):
        write(tmp_path, {"R4": group()}, {f"{R4}.weight": hadamard(128)})
        assert "R4 (hadamard, input)" in plan_checkpoint(tmp_path, to).module(DOWN).reason

    def test_a_plain_weight_is_folded_too(self, tmp_path: Path):
        built = write(tmp_path, {"R4": group()}, {f"{R4}.weight": hadamard(128)}, scheme={"o_proj": "int8-channel"})

        module = plan_checkpoint(tmp_path).module(DOWN)
        weights = CompressedTensorsWeightLoader().load_weights(tmp_path)

        exact = built.dense[f"{DOWN}.weight"] @ hadamard(128).double().T / math.sqrt(128)
        assert (module.delivered_mode, module.deliveries[0].operation.label) == ("plain", "fold")
        assert "R4" in module.reason
        assert torch.equal(weights[f"{DOWN}.weight"].double(), round_once(exact, torch.bfloat16))

    def test_a_bias_is_rotated_with_the_output(self, tmp_path: Path):
        config = tiny_config(layers=1, mlp_bias=True)
        built = write(tmp_path, {"U": group("output")}, {f"{DOWN}.U_output.weight": hadamard(64)}, config=config)

        weights = CompressedTensorsWeightLoader().load_weights(tmp_path, layout="dense")

        factor = hadamard(64).double().T / 8
        for local in ("weight", "bias"):
            exact = factor @ built.dense[f"{DOWN}.{local}"]
            assert torch.equal(weights[f"{DOWN}.{local}"].double(), round_once(exact, torch.bfloat16))

    def test_a_transform_of_an_embeddings_output_rotates_its_rows(self, tmp_path: Path):
        transforms = {"E": group("output", "Embedding", inverse=True)}
        built = write(tmp_path, transforms, {"model.embed_tokens.E_output.weight": hadamard(64)})

        weights = CompressedTensorsWeightLoader().load_weights(tmp_path)

        exact = built.dense["model.embed_tokens.weight"] @ hadamard(64).double() / 8
        assert torch.equal(weights["model.embed_tokens.weight"].double(), round_once(exact, torch.bfloat16))

    def test_a_matrix_that_modules_share_is_stored_with_one_of_them(self, tmp_path: Path):
        """save_pretrained drops tensors that are tied; its bytes count once."""
        transforms = {"V": group("input", "Linear", ignore=["lm_head"])}
        tensors = {f"{UP}.V_input.weight": hadamard(64), f"{DOWN}.V_input.weight": hadamard(128)}
        write(tmp_path, transforms, tensors)

        plan = plan_checkpoint(tmp_path)

        fates = {fate.name: fate for fate in plan.fates()}
        assert len(fates[f"{UP}.V_input.weight"].by) == 6
        assert fates[f"{DOWN}.V_input.weight"].by == (f"{DOWN}.weight",)
        assert sum(module.stored_bytes for module in plan.modules) == plan.stored_bytes
        assert all(module.dequantized for module in plan.modules if module.weight is not None)

    def test_the_other_parts_of_one_linear_are_dequantized_with_it(self, tmp_path: Path):
        write(tmp_path, {"R": group("input", "re:.*gate_proj$")}, {f"{GATE}.R_input.weight": hadamard(64)})

        plan = plan_checkpoint(tmp_path)

        assert plan.module(UP).reason == (
            "gate_up_proj has one mode for all its parts, and "
            "the online transform R (hadamard, input) is folded into the weight of another part"
        )
        assert plan.module(GATE).reason == "the online transform R (hadamard, input) is folded into the weight"

    def test_offline_transforms_are_ignored(self, tmp_path: Path):
        transforms = {"R1": group("weight_input", "Linear"), "R2": group("weight_output", "Linear")}
        write(tmp_path, transforms, {})
        assert plan_checkpoint(tmp_path).module(DOWN).delivered_mode == "W8A16"


class TestRefusals:
    @pytest.mark.parametrize("location", ["k_cache", "q_attn"])
    def test_transforms_of_attention_are_refused_by_name(self, tmp_path: Path, location: str):
        name = f"model.layers.0.self_attn.R3_{location}.weight"
        write(tmp_path, {"R3": group(location, "re:.*self_attn$", head_dim=16)}, {name: hadamard(16)})

        (fault,) = faults(tmp_path)

        assert fault.where == "config.json: quantization_config.transform_config.R3"
        assert fault.found == f"a hadamard transform applied at run time ({location})"

    def test_a_matrix_that_is_stored_nowhere(self, tmp_path: Path):
        write(tmp_path, {"R4": group()}, {})

        (fault,) = faults(tmp_path)

        assert fault.where == f"{R4}.weight"
        assert "the matrix [128, 128] of transform R4 (hadamard, input)" in fault.expected
        assert fault.found == "no such tensor"
        assert "the weight is wrong" in fault.remedy

    def test_a_matrix_of_another_size_is_not_shared(self, tmp_path: Path):
        write(tmp_path, {"R4": group(targets="re:.*(down|up)_proj$")}, {f"{R4}.weight": hadamard(128)})
        assert [fault.where for fault in faults(tmp_path)] == [f"{UP}.R4_input.weight"]

    @pytest.mark.parametrize(
        ("kind", "clear"), [("hadamard", True), ("random-hadamard", False), ("random-matrix", False)]
    )
    def test_of_several_random_matrices_none_is_shared(self, tmp_path: Path, kind: str, clear: bool):
        """A model that was spread over several devices has one for each; all deterministic ones are the same."""
        tensors = {f"{UP}.V_input.weight": hadamard(64), f"{GATE}.V_input.weight": hadamard(64)}
        transforms = {"V": group("input", "re:.*([qkv]|up|gate)_proj$", type=kind)}
        write(tmp_path, transforms, tensors)

        if clear:
            assert plan_checkpoint(tmp_path).module("model.layers.0.self_attn.q_proj").dequantized
            return
        found = faults(tmp_path)
        assert [fault.where.split(".")[-3] for fault in found] == ["q_proj", "k_proj", "v_proj"]
        assert all(fault.found == "2 modules with one of that name and size" for fault in found)

    def test_an_inverse_that_is_stored_itself_is_shared_by_inverses_only(self, tmp_path: Path):
        places = [
            {"targets": ["re:.*up_proj$"], "location": "input"},
            {"targets": ["re:.*gate_proj$"], "location": "input", "inverse": True},
        ]
        write(
            tmp_path,
            {"M": {"type": "random-matrix", "apply": places}},
            {f"{UP}.M_input.weight": torch.eye(64)},
        )
        assert [fault.where for fault in faults(tmp_path)] == [f"{GATE}.M_input.weight"]

    @pytest.mark.parametrize(
        ("tensors", "where", "found"),
        [
            ({"weight": torch.ones(64, 128)}, "weight", "float32 [64, 128]"),
            ({"weight": torch.ones(128, 128, dtype=torch.int8)}, "weight", "int8 [128, 128]"),
            ({"weight": torch.ones(128, 128), "perm": torch.arange(128)}, "perm", "int64 [128]"),
            ({"perm": torch.arange(128)}, "weight", "no such tensor"),
        ],
    )
    def test_tensors_that_are_no_matrix_of_the_transform(
        self, tmp_path: Path, tensors: dict[str, Tensor], where: str, found: str
    ):
        write(tmp_path, {"R4": group()}, {f"{R4}.{local}": tensor for local, tensor in tensors.items()})
        assert (f"{R4}.{where}", found) in {(fault.where, fault.found) for fault in faults(tmp_path)}

    def test_a_randomized_transform_needs_its_permutation(self, tmp_path: Path):
        write(tmp_path, {"R4": group(randomize=True)}, {f"{R4}.weight": hadamard(128)})
        (fault,) = faults(tmp_path)
        assert (fault.where, fault.found) == (f"{R4}.perm", "no such tensor")

    def test_a_stored_matrix_without_a_configuration(self, tmp_path: Path):
        write_checkpoint(tmp_path, config=ONE_LAYER, edit=lambda stored: stored.update({f"{R4}.weight": hadamard(128)}))

        (fault,) = faults(tmp_path)

        assert fault.where == R4
        assert "in transform_config" in fault.expected
        assert fault.found == "weight float32 [128, 128]"
        assert "the rotation is lost" in fault.remedy

    def test_a_stored_matrix_at_a_module_that_is_ignored(self, tmp_path: Path):
        write(tmp_path, {"R4": group(ignore=[DOWN])}, {f"{R4}.weight": hadamard(128)})
        (fault,) = faults(tmp_path)
        assert (fault.where, fault.found) == (R4, "a matrix that it says nothing about")

    def test_a_matrix_of_a_module_that_is_not_there(self, tmp_path: Path):
        write(tmp_path, {"R4": group()}, {f"{R4}.weight": hadamard(128), "model.extra.R4_input.weight": hadamard(128)})
        assert "model.extra.R4_input" in {fault.where for fault in faults(tmp_path)}

    @pytest.mark.parametrize(
        ("transform", "where", "found"),
        [
            (group(targets="LlamaMLP", head_dim=16), "LlamaMLP", "names no Linear or embedding"),
            (group(targets="re:.*mlp$", head_dim=16), "model.layers.0.mlp", "no Linear"),
            (group(targets="re:.*norm$", head_dim=16), "model.layers.0.input_layernorm", "no Linear"),
            (group(targets="Embedding"), "model.embed_tokens", "a table, whose input is no vector"),
            (group(head_dim=48), f"{R4}.weight", "48"),
        ],
    )
    def test_transforms_that_can_not_be_folded_into_a_weight(
        self, tmp_path: Path, transform: dict[str, Any], where: str, found: str
    ):
        write(tmp_path, {"R4": transform}, {})
        told = {fault.where: fault.found for fault in faults(tmp_path)}
        assert found in told[where]

    @pytest.mark.parametrize(("targets", "where"), [("Embedding", "model.embed_tokens"), ("lm_head", "lm_head")])
    def test_a_weight_that_two_modules_share_is_not_rotated_for_one_of_them(
        self, tmp_path: Path, targets: str, where: str
    ):
        config = tiny_config(layers=1, tied=True)
        write(tmp_path, {"R": group("output", targets)}, {}, config=config)
        assert [fault.where for fault in faults(tmp_path)] == [where]

    def test_one_stored_matrix_can_not_be_two_random_ones(self, tmp_path: Path):
        """The library keeps only the last of them under that name."""
        places = [{"targets": [DOWN], "location": "input", "inverse": inverse} for inverse in (False, True)]
        write(tmp_path, {"M": {"type": "random-matrix", "apply": places}}, {f"{DOWN}.M_input.weight": torch.eye(128)})
        assert {fault.found for fault in faults(tmp_path)} == {"one stored matrix for several transforms"}

    def test_a_dictionary_alone_does_not_tell_which_modules_are_rotated(self):
        block = {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
            "transform_config": {"config_groups": {"R4": group()}},
        }
        with pytest.raises(ConfigError, match=r"the online transform R4 \(hadamard, input\)"):
            to_quant_config(CompressedTensorsConfigReader().read(block))


class TestMixturesAndOtherParts:
    CONFIG = tiny_config("MixtralForCausalLM", layers=1, num_local_experts=2)
    EXPERT = "model.layers.0.block_sparse_moe.experts.0"

    def test_experts_that_are_named_are_folded(self, tmp_path: Path):
        transforms = {"R4": group("input", "re:.*w2$")}
        tensors = {f"{self.EXPERT}.w2.R4_input.weight": hadamard(128)}
        write(tmp_path, transforms, tensors, scheme={"o_proj": "int8-channel"}, config=self.CONFIG)

        plan = plan_checkpoint(tmp_path)

        assert [module.name[-4:] for module in plan.modules if module.transforms] == ["0.w2", "1.w2"]

    def test_quantized_experts_are_linears(self, tmp_path: Path):
        """llm-compressor makes Linears of them before it quantizes."""
        transforms = {"V": group("input", "Linear", ignore=["lm_head", "re:.*gate$"])}
        tensors = {f"{self.EXPERT}.w{part}.V_input.weight": hadamard(128 if part == 2 else 64) for part in (1, 2)}
        write(tmp_path, transforms, tensors, scheme="int8-channel", config=self.CONFIG)

        plan = plan_checkpoint(tmp_path)

        assert sum(len(module.transforms) for module in plan.modules) == 4 + 2 * 3

    def test_plain_routers_and_experts_that_only_a_class_targets_are_refused(self, tmp_path: Path):
        """Release 5 of transformers builds neither as a Linear, and a shared matrix does not show its users."""
        transforms = {"V": group("input", "Linear", ignore=["lm_head"])}
        tensors = {"model.layers.0.self_attn.q_proj.V_input.weight": hadamard(64)}
        write(tmp_path, transforms, tensors, scheme={"o_proj": "int8-channel"}, config=self.CONFIG)

        found = faults(tmp_path)

        assert {fault.where.rpartition("block_sparse_moe.")[2] for fault in found} == {
            "gate",
            *(f"experts.{expert}.w{part}" for expert in range(2) for part in (1, 2, 3)),
        }
        assert all("only its class is targeted" in fault.found for fault in found)

    def test_class_targets_do_not_apply_to_draft_layers(self, tmp_path: Path):
        """compressed-tensors copies them from the original files."""
        transforms = {"R4": group("input", "Linear", ignore=["lm_head", "re:.*([qkvo]|up|gate)_proj"])}
        tensors = {f"{R4}.weight": hadamard(128), "mtp.fc.weight": torch.ones(64, 128).bfloat16()}
        write(tmp_path, transforms, tensors)
        assert plan_checkpoint(tmp_path).module("mtp.fc").delivered_mode == "plain"

    def test_a_matrix_at_a_draft_layer_is_refused(self, tmp_path: Path):
        tensors = {
            f"{R4}.weight": hadamard(128),
            "mtp.fc.weight": torch.ones(64, 128).bfloat16(),
            "mtp.fc.R4_input.weight": hadamard(128),
        }
        write(tmp_path, {"R4": group("input", "re:(.*down_proj$|mtp.fc)")}, tensors)
        assert {"mtp.fc"} == {fault.where for fault in faults(tmp_path)}

    def test_class_targets_apply_to_vision_towers_and_are_refused_there(self, tmp_path: Path):
        def nest(stored: dict[str, Tensor]) -> None:
            for name in [name for name in stored if name.startswith("model.")]:
                stored[name.replace("model.", "model.language_model.", 1)] = stored.pop(name)
            stored["model.vision_tower.fc.weight"] = torch.ones(64, 64).bfloat16()
            stored["model.vision_tower.norm.weight"] = torch.ones(64).bfloat16()

        transforms = {"R4": group("input", "Linear", ignore=["lm_head", "re:.*([qkvo]|up|gate)_proj"])}
        write(tmp_path, transforms, {})
        rewrite(tmp_path, nest)
        rewrite(tmp_path, lambda stored: stored.update({f"model.language_model{R4[5:]}.weight": hadamard(128)}))
        rewrite_config(tmp_path, lambda config: config.update(text_config={**config, "model_type": "llama"}))

        (fault,) = faults(tmp_path)

        assert (fault.where, fault.found) == (
            "model.vision_tower.fc",
            "a module outside the text model's layers",
        )


class TestValues:
    @pytest.mark.parametrize(
        ("transform", "local", "tensor", "found"),
        [
            (group(), "weight", hadamard(128) / math.sqrt(128), "0.0883883 (16384 of 16384 elements are bad)"),
            (group(), "weight", hadamard(128).index_fill(0, torch.tensor([3]), torch.nan), "nan (128 of 16384"),
            (group(type="random-matrix"), "weight", torch.full((128, 128), torch.inf), "inf (16384 of 16384"),
            (group(randomize=True), "perm", torch.zeros(128).long(), "numbers from 0 to 0, 1 different ones"),
        ],
    )
    def test_an_invalid_matrix_is_refused(
        self, tmp_path: Path, transform: dict[str, Any], local: str, tensor: Tensor, found: str
    ):
        tensors = {f"{R4}.weight": hadamard(128), f"{R4}.perm": torch.arange(128)}
        if not transform.get("randomize"):
            del tensors[f"{R4}.perm"]
        write(tmp_path, {"R4": transform}, tensors | {f"{R4}.{local}": tensor})

        with pytest.raises(PayloadError) as raised:
            CompressedTensorsWeightLoader().load_weights(tmp_path)

        (fault,) = raised.value.faults
        assert fault.where.startswith(f"{R4}.{local}")
        assert found in fault.found
        assert [fault.where for fault in verify_checkpoint(tmp_path).faults] == [fault.where]


class TestVerification:
    """The exact value of a module includes its transforms, by feeding unit vectors through them."""

    TRANSFORMS = {  # noqa: RUF012
        "A": group("input", "re:.*(q|down)_proj$", type="random-matrix", head_dim=8),
        "B": group("output", "re:.*q_proj$", randomize=True, head_dim=4),
        "C": group("output", "Embedding", type="random-hadamard", inverse=True),
    }

    def write(self, directory: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        q_proj = "model.layers.0.self_attn.q_proj"
        tensors = {
            f"{q_proj}.A_input.weight": torch.rand(8, 8, generator=generator),
            f"{q_proj}.B_output.weight": hadamard(4).double(),
            f"{q_proj}.B_output.perm": torch.randperm(4, generator=generator),
            "model.embed_tokens.C_output.weight": hadamard(64)[torch.randperm(64, generator=generator)],
        }
        write(directory, self.TRANSFORMS, tensors, config=tiny_config("Qwen2ForCausalLM", layers=1))

    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    @pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
    def test_a_conversion_verifies(self, tmp_path: Path, to: str, dtype: str):
        self.write(tmp_path / "in")
        convert_checkpoint(tmp_path / "in", tmp_path / "out", to=to, dtype=dtype)
        report = verify_checkpoint(tmp_path / "in", tmp_path / "out")
        assert report.faults == ()

    @pytest.mark.parametrize(
        "name",
        [f"{DOWN}.weight", "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight"],
    )
    def test_one_changed_value_is_found(self, tmp_path: Path, name: str):
        self.write(tmp_path / "in")
        convert_checkpoint(tmp_path / "in", tmp_path / "out")

        def change(stored: dict[str, Tensor]) -> None:
            stored[name].view(-1)[-1] += 0.0625

        rewrite(tmp_path / "out", change)

        (fault,) = verify_checkpoint(tmp_path / "in", tmp_path / "out").faults
        assert fault.where.startswith(name)

    def test_another_order_of_summation_may_round_differently(self):
        """A value between two of the dtype's; without doubt about it only the even neighbour is right."""
        exact, odd = np.array([1 + 2**-8]), np.array([1 + 2**-7])
        assert not compare_rounded(odd, exact, DType.BF16).good
        assert compare_rounded(odd, exact, DType.BF16, uncertainty=1e-10).good
        assert not compare_rounded(odd, exact - 1e-8, DType.BF16, uncertainty=1e-10).good

    def test_a_transposed_fold_is_found(self, tmp_path: Path):
        """Verification does not repeat the planner's choice: it runs the transform that the configuration names."""
        self.write(tmp_path / "in")
        convert_checkpoint(tmp_path / "in", tmp_path / "out")
        name = "model.layers.0.self_attn.q_proj.A_input.weight"

        rewrite(tmp_path / "in", lambda stored: stored.update({name: stored[name].T.contiguous()}))

        wheres = [fault.where for fault in verify_checkpoint(tmp_path / "in", tmp_path / "out").faults]
        assert [where.rpartition(".weight")[0] for where in wheres] == ["model.layers.0.self_attn.q_proj", DOWN]
