"""Mixtures of experts: names, the tensors of their kernels, the engine's configuration, and all ways to store them."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import SCHEMES, rewrite, rewrite_config, tiny_config, write_checkpoint
from fused_experts import SPELLINGS, fuse_experts
from on_tensors import on_tensors

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, PlanError
from trtllm_ct.base.schemes import QuantAlgo, TensorSpec
from trtllm_ct.engine.quant_config import LayerQuantConfig
from trtllm_ct.layouts import rounding as rounding_layout
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.pipeline.weight_mapper import CompressedTensorsWeightMapper
from trtllm_ct.plan.models.fused_experts import split_fused_experts
from trtllm_ct.plan.models.sites import Model
from trtllm_ct.plan.plan import Fate
from trtllm_ct.plan.stored import StoredModule, Whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from builders import Built
    from torch import Tensor

    from trtllm_ct.plan.plan import Plan

round_once = on_tensors(rounding_layout.round_once)

QWEN, MIXTRAL, DEEPSEEK = "Qwen3MoeForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"
LAYER = "model.layers.1"
EXPERTS = f"{LAYER}.mlp.experts"
GATE, UP, DOWN = (f"{EXPERTS}.2.{name}_proj" for name in ("gate", "up", "down"))
# All sizes are multiples of 128, as MXFP4 and blocks want them.
CONFIG = tiny_config(QWEN, hidden=128, moe_intermediate_size=128)
EXPERTS_ONLY = ("gate_proj", "up_proj", "down_proj")
CODES, SCALAR = "float8_e4m3fn [128, 128]", "float32 []"
# What the kernel of an expert of [out, in] = [128, 128] is given.
NATIVE: dict[str, dict[str, str]] = {
    "fp8-tensor-static": {"weight": CODES, "weight_scale": SCALAR, "input_scale": SCALAR},
    # Some releases read the scales of blocks and of MXFP4 under the second name.
    "fp8-block": {"weight": CODES, "weight_scale": "float32 [1, 1]", "weight_scale_inv": "float32 [1, 1]"},
    "nvfp4": {
        "weight": "uint8 [128, 64]",
        "weight_scale": "float8_e4m3fn [128, 8]",
        "weight_scale_2": SCALAR,
        "input_scale": SCALAR,
    },
    "w8a8": {"weight": "int8 [128, 128]", "weight_scale": "float32 [128]"},
    "int8-channel": {"weight": "int8 [128, 128]", "weight_scale": "float32 [128]"},
    "mxfp4a16": {
        "weight": "uint8 [128, 64]",
        "weight_scale": "uint8 [128, 4]",
        "weight_scale_inv": "uint8 [128, 4]",
    },
}


def write(directory: Path, scheme: str | dict[str, str], config: dict[str, Any] = CONFIG, **options: Any) -> Built:
    return write_checkpoint(directory, config=config, scheme=scheme, **options)


def mapped(directory: Path, to: str = "modelopt") -> dict[str, Tensor]:
    """Every delivered tensor of a directory."""
    from on_tensors import stream_delivered

    from trtllm_ct.pipeline.open import open_checkpoint

    checkpoint = open_checkpoint(directory)
    return {
        name: tensor.clone()
        for _, tensors in stream_delivered(checkpoint.plan(to), checkpoint.catalog)
        for name, tensor in tensors.items()
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype is tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (got[name], tensor))), name


def specs(plan: Plan, module: str) -> dict[str, str]:
    return {each.name.removeprefix(f"{module}."): str(each.spec) for each in plan.module(module).deliveries}


def faults(directory: Path) -> list[Fault]:
    with pytest.raises(PlanError) as caught:
        plan_checkpoint(directory)
    return list(caught.value.faults)


class TestKernels:
    @pytest.mark.parametrize("scheme", NATIVE)
    @pytest.mark.parametrize("to", ["modelopt", "reference"])
    def test_names_and_shapes(self, tmp_path: Path, scheme: str, to: str):
        write(tmp_path, scheme)

        # MXFP4 experts have other modes on other GPUs.
        plan = plan_checkpoint(tmp_path, to, sm=90 if scheme == "mxfp4a16" else None)

        assert {str(specs(plan, module)) for module in (GATE, UP, DOWN)} == {str(NATIVE[scheme])}

    @pytest.mark.parametrize("scheme", ["mxfp8", "nvfp4a16"])
    def test_the_newest_engine_has_more_kernels(self, tmp_path: Path, scheme: str):
        write(tmp_path, scheme)

        assert plan_checkpoint(tmp_path).module(UP).delivered_mode == "dequantized"
        assert "stock-1.3 has one" in plan_checkpoint(tmp_path).module(UP).reason
        newest = specs(plan_checkpoint(tmp_path, engine="stock-1.3"), UP)
        assert ("weight_scale_inv" in newest) is (scheme == "mxfp8")
        assert "weight_scale" in newest

    @pytest.mark.parametrize("scheme", ["int4-g32", "int4-g64", "int4-g128", "int4-channel", "fp8-channel-token"])
    @pytest.mark.parametrize("to", ["modelopt", "reference"])
    def test_without_a_kernel_experts_are_dequantized_and_linears_are_not(self, tmp_path: Path, scheme: str, to: str):
        write(tmp_path, scheme)

        plan = plan_checkpoint(tmp_path, to)

        for module in (GATE, UP, DOWN):
            assert specs(plan, module) == {"weight": "bfloat16 [128, 128]"}
            assert "expert kernel" in plan.module(module).reason
        assert plan.module(f"{LAYER}.self_attn.o_proj").dequantized is (scheme == "int4-g32")

    def test_an_expert_gets_no_pre_quant_scale(self, tmp_path: Path):
        write(tmp_path, "w8a8")

        assert not [name for name in plan_checkpoint(tmp_path).delivered_specs if name.endswith("pre_quant_scale")]

    def test_both_names_of_a_scale_have_the_same_values(self, tmp_path: Path):
        write(tmp_path, "fp8-block")

        delivered = mapped(tmp_path)

        assert torch.equal(delivered[f"{UP}.weight_scale"], delivered[f"{UP}.weight_scale_inv"])


class TestNames:
    @staticmethod
    def as_dense_layers_are_called(stored: dict[str, Tensor]) -> None:
        """llm-compressor 0.14 names Mixtral's experts so."""
        names = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
        for name in [name for name in stored if ".experts." in name]:
            part = next(part for part in names if part in name)
            stored[name.replace(part, names[part])] = stored.pop(name)

    @pytest.mark.parametrize("scheme", ["int8-channel", "nvfp4", "int4-g32"])
    def test_both_spellings_of_mixtral_are_delivered_as_engines_read_them(self, tmp_path: Path, scheme: str):
        config = tiny_config(MIXTRAL)
        write(tmp_path / "engine_names", scheme, config)
        write(tmp_path / "aliases", scheme, config, edit=self.as_dense_layers_are_called)

        got, want = mapped(tmp_path / "aliases"), mapped(tmp_path / "engine_names")

        assert_same(got, want)
        assert f"{LAYER}.block_sparse_moe.experts.0.w1.weight" in got
        assert not [name for name in got if "experts" in name and name.split(".")[6] not in {"w1", "w2", "w3"}]

    def test_messages_name_the_tensor_of_the_file(self, tmp_path: Path):
        def lose(stored: dict[str, Tensor]) -> None:
            self.as_dense_layers_are_called(stored)
            del stored[f"{LAYER}.block_sparse_moe.experts.3.up_proj.weight_scale"]

        write(tmp_path, "int8-channel", tiny_config(MIXTRAL), edit=lose)

        (fault,) = faults(tmp_path)

        assert "experts.3" in fault.where
        assert fault.found == "no such tensor"

    def test_an_expert_under_both_names_is_a_fault(self, tmp_path: Path):
        extra = f"{LAYER}.block_sparse_moe.experts.3.gate_proj.weight"
        write(tmp_path, "dense", tiny_config(MIXTRAL), edit=lambda stored: stored.update({extra: torch.ones(128, 64)}))

        assert [fault.where for fault in faults(tmp_path)] == [extra]


FUSED = ("int4-g32", "int4-g64-asym", "int8-channel", "fp8-tensor-static", "fp8-block", "nvfp4", "mxfp4a16")


class TestFused:
    """Experts in tensors of all experts are planned and delivered as if each were stored separately."""

    @pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda names: names[0])
    @pytest.mark.parametrize("scheme", [*FUSED, "dense", "w8a8", "mxfp8", "fp8-channel-token", "int4-g64-actorder"])
    def test_they_are_delivered_like_separate_experts(self, tmp_path: Path, scheme: str, spelling: tuple[str, str]):
        write(tmp_path / "apart", scheme, edit=one_index)
        write(tmp_path / "fused", scheme, edit=lambda stored: [one_index(stored), fuse_experts(stored, spelling)])

        apart, fused = (plan_checkpoint(tmp_path / name, "reference") for name in ("apart", "fused"))

        assert fused.delivered_specs == apart.delivered_specs
        assert fused.quant_config == apart.quant_config
        assert fused.warnings == apart.warnings
        assert all(scheme == "dense" and "nothing is quantized" in warning for warning in fused.warnings)
        assert_same(mapped(tmp_path / "fused", "reference"), mapped(tmp_path / "apart", "reference"))

    @pytest.mark.parametrize("scheme", FUSED)
    def test_values_are_exact(self, tmp_path: Path, scheme: str):
        built = write(tmp_path, scheme, edit=fuse_experts)

        got = mapped(tmp_path, "dense")

        for name in (GATE, UP, DOWN):
            assert torch.equal(got[f"{name}.weight"], round_once(built.dense[f"{name}.weight"], torch.bfloat16))

    @pytest.mark.parametrize("entries", [2, 3])
    def test_the_shape_of_all_experts_is_ignored_with_a_reason(self, tmp_path: Path, entries: int):
        """[2I, H] or [E, 2I, H]: writers differ; the shape of one expert follows from the codes."""
        write(tmp_path, "int4-g32", edit=lambda stored: fuse_experts(stored, plain_shape=entries))

        fates = {fate.name: fate for fate in plan_checkpoint(tmp_path).fates()}

        fate = fates[f"{EXPERTS}.gate_up_proj.weight_shape"]
        assert (fate.fate, fate.spec.shape) == (Fate.IGNORED, (entries,))
        assert "the codes tell that of each" in fate.reason

    @pytest.mark.parametrize("form", [(), (1,)], ids=["[E]", "[E, 1]"])
    def test_a_scalar_that_gate_and_up_share(self, tmp_path: Path, form: tuple[int, ...]):
        def fuse(stored: dict[str, Tensor]) -> None:
            fuse_experts(stored)
            for name in [name for name in stored if name.endswith("global_scale") and ".experts." in name]:
                stored[name] = torch.arange(1.0, 5).reshape(4, *form)

        write(tmp_path, "nvfp4", edit=fuse)

        got = mapped(tmp_path)

        for module in (GATE, UP, DOWN):
            assert got[f"{module}.weight_scale_2"] == got[f"{module}.input_scale"] == torch.tensor(1 / 3)

    def test_separate_scalars_for_gate_and_up(self, tmp_path: Path):
        def fuse(stored: dict[str, Tensor]) -> None:
            fuse_experts(stored)
            stored[f"{EXPERTS}.gate_up_proj.weight_scale"] = torch.arange(1.0, 9).reshape(4, 2)

        write(tmp_path, "fp8-tensor-static", edit=fuse)

        got = mapped(tmp_path)

        assert (got[f"{GATE}.weight_scale"], got[f"{UP}.weight_scale"]) == (5, 6)

    @pytest.mark.parametrize("local", ["weight_scale", "input_scale"])
    def test_one_scalar_for_all_experts_is_refused_by_name(self, tmp_path: Path, local: str):
        """No known writer stores one, and its meaning is unknown."""

        def fuse(stored: dict[str, Tensor]) -> None:
            fuse_experts(stored)
            stored[f"{EXPERTS}.gate_up_proj.{local}"] = torch.tensor(2.0)

        write(tmp_path, "fp8-tensor-static", edit=fuse)

        assert f"{EXPERTS}.gate_up_proj.{local}" in {fault.where for fault in faults(tmp_path)}

    def test_a_block_of_gate_and_up_together_is_refused(self, tmp_path: Path):
        """96 rows each: a block contains rows of both, and it is unknown if its scale is for both."""
        config = tiny_config(QWEN, hidden=128, moe_intermediate_size=96)

        def fuse(stored: dict[str, Tensor]) -> None:
            fuse_experts(stored)

        write(tmp_path, "fp8-block", config, edit=fuse)

        found = faults(tmp_path)

        assert {fault.where.rpartition(".experts.")[2] for fault in found} == {"gate_up_proj.weight_scale"}
        assert {fault.found for fault in found} == {"96 rows in blocks of fp8 block 128x128"}

    def test_experts_of_all_layers_in_one_file_of_many(self, tmp_path: Path):
        write(tmp_path, "nvfp4", edit=fuse_experts, shards=3)

        assert len(mapped(tmp_path)) == len(plan_checkpoint(tmp_path).delivered_specs)

    @pytest.mark.parametrize("lost", ["gate_up_proj.weight_scale", "down_proj.weight_packed"])
    def test_a_lost_tensor_of_all_experts_names_each(self, tmp_path: Path, lost: str):
        def fuse(stored: dict[str, Tensor]) -> None:
            fuse_experts(stored)
            del stored[f"{EXPERTS}.{lost}"]

        write(tmp_path, "nvfp4", edit=fuse)

        assert len({fault.where.split(".")[5] for fault in faults(tmp_path)}) == 4


def one_index(stored: dict[str, Tensor]) -> None:
    """Gate and up of one tensor have the same order of columns."""
    for name in [name for name in stored if ".experts." in name and name.endswith("up_proj.weight_g_idx")]:
        stored[name] = stored[name.replace("up_proj", "gate_proj")].clone()


class TestFates:
    """Every stored tensor is counted once, however many experts share it."""

    @pytest.mark.parametrize("scheme", [*FUSED, "dense"])
    @pytest.mark.parametrize("to", ["modelopt", "dense", "reference"])
    def test_a_tensor_of_all_experts_has_one_fate(self, tmp_path: Path, scheme: str, to: str):
        built = write(tmp_path, scheme, edit=fuse_experts, kv=True)

        plan = plan_checkpoint(tmp_path, to)

        assert Counter(fate.name for fate in plan.fates()) == Counter(built.stored.keys())
        for fate in plan.fates():
            assert bool(fate.by) == (fate.fate is not Fate.IGNORED) == (not fate.reason), fate
        codes = next(
            fate
            for fate in plan.fates()
            if fate.name.startswith(f"{EXPERTS}.gate_up_proj") and "scale" not in fate.name and fate.by
        )
        assert codes.fate is Fate.CONSUMED
        assert {f"{EXPERTS}.{i}.{part}_proj.weight" for i in range(4) for part in ("gate", "up")} <= set(codes.by)

    @pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "int4-g256"])
    def test_of_separate_experts(self, tmp_path: Path, scheme: str):
        built = write(tmp_path, scheme, tiny_config(QWEN, hidden=128, moe_intermediate_size=128, layers=1))

        fates = list(plan_checkpoint(tmp_path).fates())

        assert Counter(fate.name for fate in fates) == Counter(built.stored.keys())
        assert all(bool(fate.by) == (not fate.reason) for fate in fates)


# ConfigurableMoE, which only releases of early 2026 configure by the name of its child.
WRAPPED_EXPERTS = [("stock-1.0", ("",)), ("stock-1.2", ("", ".backend")), ("stock-1.3", ("",))]


class TestEngineConfig:
    """Engines know all routed experts of a layer by one name."""

    @pytest.mark.parametrize(("release", "children"), WRAPPED_EXPERTS)
    def test_plain_experts_are_excluded_once_a_layer(
        self, tmp_path: Path, release: str, children: tuple[str, ...]
    ) -> None:
        write(tmp_path, dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "nvfp4"))

        config = plan_checkpoint(tmp_path, engine=release).quant_config

        assert [name for name in config.exclude_modules if "experts" in name] == [
            f"model.layers.{layer}.mlp.experts{child}" for layer in range(2) for child in children
        ]
        assert config.layer_config(f"{LAYER}.self_attn.q_proj") is not None
        assert config.layer_config(UP) is None

    @pytest.mark.parametrize(("release", "children"), WRAPPED_EXPERTS)
    def test_quantized_experts_are_named_once_a_layer(
        self, tmp_path: Path, release: str, children: tuple[str, ...]
    ) -> None:
        attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "fp8-channel-token")
        write(tmp_path, attention | dict.fromkeys(EXPERTS_ONLY, "nvfp4"))

        config = plan_checkpoint(tmp_path, engine=release).quant_config

        assert config.quant_algo is QuantAlgo.MIXED_PRECISION
        assert [name for name in config.quantized_layers if "experts" in name] == [
            f"model.layers.{layer}.mlp.experts{child}" for layer in range(2) for child in children
        ]
        nvfp4 = LayerQuantConfig(quant_algo=QuantAlgo.NVFP4, group_size=16)
        assert config.layer_config(UP) == config.layer_config(EXPERTS) == nvfp4
        assert config.layer_config(f"{LAYER}.mlp.gate") is None

    def test_every_delivered_mode_is_found_by_the_name_of_the_module(self, tmp_path: Path):
        attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "int4-g64")
        write(tmp_path, attention | dict.fromkeys(EXPERTS_ONLY, "w8a8"))

        plan = plan_checkpoint(tmp_path)

        for module in plan.modules:
            if module.class_name == "Linear":
                assert plan.quant_config.layer_config(module.name) == module.layer, module.name

    def test_shared_experts_are_ordinary_linears(self, tmp_path: Path):
        write(tmp_path, "fp8-channel-token", tiny_config("Qwen2MoeForCausalLM"))

        plan = plan_checkpoint(tmp_path)

        shared = f"{LAYER}.mlp.shared_expert"
        assert plan.module(f"{shared}.up_proj").delivered_mode == "FP8_PER_CHANNEL_PER_TOKEN"
        assert plan.module(f"{shared}_gate").delivered_mode == "plain"
        assert f"{shared}_gate" in plan.quant_config.exclude_modules
        assert plan.quant_config.layer_config(f"{shared}.up_proj") is not None
        assert plan.quant_config.layer_config(UP) is None


class TestDeepseek:
    def test_latent_projections_are_dense_and_the_rest_is_native(self, tmp_path: Path):
        write(tmp_path, "nvfp4", tiny_config(DEEPSEEK))

        plan = plan_checkpoint(tmp_path)

        attention = f"{LAYER}.self_attn"
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"):
            assert plan.module(f"{attention}.{name}").delivered_mode == "dequantized"
            reason = plan.module(f"{attention}.{name}").reason
            joined = "the engine's class joins this Linear with another, and joins the scales of FP8_BLOCK_SCALES only"
            assert reason == ("engines read this module plain" if name == "kv_b_proj" else joined)
            assert f"{attention}.{name}" in plan.quant_config.exclude_modules
        for name in (f"{attention}.q_b_proj", f"{attention}.o_proj", f"{LAYER}.mlp.shared_experts.up_proj", UP):
            assert plan.module(name).delivered_mode == "NVFP4 g16"
        assert plan.module("model.layers.0.mlp.up_proj").delivered_mode == "NVFP4 g16"

    def test_the_correction_of_scores_is_unchanged(self, tmp_path: Path):
        built = write(tmp_path, "nvfp4", tiny_config(DEEPSEEK))
        name = f"{LAYER}.mlp.gate.e_score_correction_bias"

        assert torch.equal(mapped(tmp_path)[name], built.stored[name])
        assert mapped(tmp_path)[name].dtype is torch.float32

    def test_a_lost_correction_is_named(self, tmp_path: Path):
        name = f"{LAYER}.mlp.gate.e_score_correction_bias"
        write(tmp_path, "nvfp4", tiny_config(DEEPSEEK), edit=lambda stored: stored.pop(name))

        assert [fault.where for fault in faults(tmp_path)] == [name]

    def test_without_low_rank_queries(self, tmp_path: Path):
        write(tmp_path, "w8a8", tiny_config(DEEPSEEK, hidden=128) | {"q_lora_rank": None})

        plan = plan_checkpoint(tmp_path)

        assert plan.module(f"{LAYER}.self_attn.q_proj").delivered_mode == "W8A16"
        assert f"{LAYER}.self_attn.q_a_proj" not in plan.by_name


class TestKimi:
    """Kimi K2: DeepSeek-V3's architecture, int4 in groups of 32, routed experts only."""

    IGNORE = (
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    )

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        config = tiny_config(DEEPSEEK, layers=3)
        experts = [
            f"model.layers.{layer}.mlp.experts.{expert}.{name}"
            for layer in (1, 2)
            for expert in range(4)
            for name in EXPERTS_ONLY
        ]
        write_checkpoint(tmp_path, config=config, scheme=dict.fromkeys(experts, "int4-g32"), shards=2)

        def as_kimi_writes_it(document: dict[str, Any]) -> None:
            block = document["quantization_config"]
            block["ignore"] = list(self.IGNORE)
            block["config_groups"]["group_0"]["targets"] = ["Linear"]

        rewrite_config(tmp_path, as_kimi_writes_it)
        return tmp_path

    def test_experts_are_dequantized_with_a_reason(self, directory: Path):
        plan = plan_checkpoint(directory)

        modes = Counter(module.delivered_mode for module in plan.modules if module.weight is not None)
        assert modes == {"dequantized": 2 * 4 * 3}
        assert plan.module(UP).reason == "stock-1.2 has no expert kernel for int4 group 32 weights"
        assert plan.quant_config.quant_algo is None
        assert plan.warnings == ()

    @pytest.mark.parametrize("to", ["modelopt", "dense", "reference"])
    def test_a_router_is_plain_although_the_configuration_does_not_say_so(self, directory: Path, to: str):
        """It is stored in bfloat16, matches the target Linear and is not in `ignore`."""
        plan = plan_checkpoint(directory, to)

        assert plan.module(f"{LAYER}.mlp.gate").delivered_mode == "plain"
        assert plan.module(f"{LAYER}.mlp.gate").reason == ""

    def test_strict_names_every_expert(self, directory: Path):
        with pytest.raises(PlanError) as caught:
            plan_checkpoint(directory, strict=True)

        assert len(caught.value.faults) == 2 * 4 * 3

    def test_missing_shapes_are_derived(self, directory: Path):
        """69 120 tensors of 16 bytes: repackers leave them out."""
        want = mapped(directory, "dense")
        rewrite(
            directory,
            lambda stored: [stored.pop(name) for name in list(stored) if name.endswith("weight_shape")],
        )

        assert_same(mapped(directory, "dense"), want)


class TestPruned:
    @staticmethod
    def pruned(kept: list[int | None]) -> Callable[[dict[str, Any]], None]:
        def declare(document: dict[str, Any]) -> None:
            sparsity = {"method": "prune", "num_experts": kept}
            document["quantization_config"]["moe_sparsity_config"] = sparsity

        return declare

    def test_experts_pruned_evenly_make_an_ordinary_model(self, tmp_path: Path):
        write(tmp_path, "nvfp4", tiny_config(QWEN, num_experts=3))
        want = plan_checkpoint(tmp_path)
        rewrite_config(tmp_path, self.pruned([3, 3]))

        assert plan_checkpoint(tmp_path) == want

    @pytest.mark.parametrize("kept", [[3, 2], [2, 2], [None, 2]])
    def test_layers_that_differ_are_refused(self, tmp_path: Path, kept: list[int | None]):
        write(tmp_path, "nvfp4", tiny_config(QWEN, num_experts=3))
        rewrite_config(tmp_path, self.pruned(kept))

        fault = faults(tmp_path)[0]

        assert fault.where == "config.json: quantization_config.moe_sparsity_config.num_experts"
        assert "same number of experts" in fault.remedy


def test_the_mapper_delivers_the_specs_that_the_plan_promised(tmp_path: Path) -> None:
    built = write(tmp_path, "nvfp4", edit=fuse_experts)
    plan = plan_checkpoint(tmp_path)

    delivered = CompressedTensorsWeightMapper().map_weights(plan, built.stored)

    assert {name: tuple(tensor.shape) for name, tensor in delivered.items()} == {
        name: spec.shape for name, spec in plan.delivered_specs.items()
    }


@pytest.mark.parametrize(
    ("local", "shape", "rows"),
    [
        ("weight_packed", (2, 8, 4), 4),
        ("weight_scale", (2, 8, 1), 4),
        ("weight_scale", (2, 1), 1),
        ("weight_global_scale", (2, 2), 1),
        ("weight_global_scale", (2, 1), 1),
        # A number for the whole weight that is neither one nor one for each projection belongs to both.
        ("weight_global_scale", (2, 16), 16),
        ("bias", (2, 8), 4),
    ],
)
def test_a_tensor_is_divided_by_what_its_elements_belong_to(local: str, shape: tuple[int, ...], rows: int) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    views = {
        "weight_packed": Whole(name=f"{name}.weight_packed", spec=TensorSpec(DType.U8, (2, 8, 4))),
        local: Whole(name=f"{name}.{local}", spec=TensorSpec(DType.U8, shape)),
    }

    split = split_fused_experts(
        {name: StoredModule(name, views)}, Model.from_config(tiny_config("Qwen3MoeForCausalLM"))
    )

    for expert, leaf in product(range(2), ("gate_proj", "up_proj")):
        assert split[f"model.layers.0.mlp.experts.{expert}.{leaf}"].specs[local].shape[0] == rows


def test_tiles_are_never_divided() -> None:
    """Half of the first axis of marlin-24 is half of the columns."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shapes = {"weight_packed": (2, 8, 4), "scale_packed": (2, 2, 4), "meta": (2, 8, 4)}
    views = {local: Whole(name=f"{name}.{local}", spec=TensorSpec(DType.I32, shape)) for local, shape in shapes.items()}

    split = split_fused_experts(
        {name: StoredModule(name, views)}, Model.from_config(tiny_config("Qwen3MoeForCausalLM"))
    )

    assert {local: spec.shape for local, spec in split["model.layers.0.mlp.experts.1.up_proj"].specs.items()} == {
        local: shape[1:] for local, shape in shapes.items()
    }
