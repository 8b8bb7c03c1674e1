"""What a model class asks of all modules together: one mode, or early Linears that follow the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import DENSE, tiny_config, write_checkpoint
from decoder_models import write_decoder

from trtllm_ct import inspect_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.plan import Plan

pytestmark = pytest.mark.reference

MLP = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "fp8-channel-token")


def plan_of(directory: Path, name: str, schemes: Any, target: str = "modelopt") -> Plan:
    write_decoder(directory, name, schemes)
    engine = {"engine": "stock-1.3"} if target == "modelopt" else {}
    return inspect_checkpoint(directory, target, **engine).plan


def modes(plan: Plan) -> set[str]:
    return {str(module.layer.quant_algo) for module in plan.modules if module.layer is not None}


@pytest.mark.parametrize("name", ["Glm4MoeForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"])
def test_a_class_that_refuses_mixed_precision_gets_the_mode_that_most_weights_have(tmp_path: Path, name: str) -> None:
    schemes = {"o_proj": "int4-g128", "mlp.down_proj": "fp8-channel-token", "shared_experts.up_proj": "int4-g128"}
    plan = plan_of(tmp_path, name, schemes)
    assert plan.quant_config.layer is not None
    assert not plan.quant_config.quantized_layers
    assert modes(plan) == {"W4A16_AWQ"}
    down = plan.module("model.layers.0.mlp.down_proj")
    assert "one mode for the whole model, and most of it is W4A16_AWQ" in down.reason
    assert down.name in plan.quant_config.exclude_modules


def test_any_other_class_keeps_both_modes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "SeedOssForCausalLM", {"o_proj": "int4-g128", "mlp.down_proj": "fp8-channel-token"})
    assert modes(plan) == {"W4A16_AWQ", "FP8_PER_CHANNEL_PER_TOKEN"}
    assert len(plan.quant_config.quantized_layers) == 4


def test_the_reference_engine_takes_all_modes(tmp_path: Path) -> None:
    schemes = {"o_proj": "int4-g128", "mlp.down_proj": "fp8-channel-token"}
    assert len(modes(plan_of(tmp_path, "Glm4MoeForCausalLM", schemes, "reference"))) == 2


def test_groups_that_do_not_divide_a_part_of_fewer_ranks_are_refused(tmp_path: Path) -> None:
    """The class asserts that the global group size divides it, whether it is quantized or not."""
    schemes = {"o_proj": "int4-g128"}
    plan = plan_of(tmp_path, "Glm4MoeForCausalLM", schemes)
    assert modes(plan) == {"W4A16_AWQ"}
    uneven = write_decoder(tmp_path / "uneven", "Glm4MoeForCausalLM", schemes, intermediate_size=448)
    plan = inspect_checkpoint(uneven.directory, "modelopt", engine="stock-1.3").plan
    assert modes(plan) == set()
    o_proj = plan.module("model.layers.0.self_attn.o_proj")
    assert o_proj.reason == "the engine's class asks for whole groups of 128 in 448 rows"


@pytest.mark.parametrize(
    ("name", "early"), [("Cohere2ForCausalLM", "mlp.down_proj"), ("LagunaForCausalLM", "self_attn.g_proj")]
)
class TestEarlyLinears:
    """They are allocated in the global mode, before entries and exclusions count."""

    def test_in_a_model_of_one_mode_they_have_it(self, tmp_path: Path, name: str, early: str) -> None:
        plan = plan_of(tmp_path, name, "nvfp4")
        assert plan.quant_config.layer is not None
        assert plan.module(f"model.layers.0.{early}").layer == plan.quant_config.layer

    @pytest.mark.parametrize("schemes", [{"o_proj": "fp8-channel-token"}, {"o_proj": "int4-g128", **MLP}])
    def test_otherwise_they_are_plain_beside_entries_for_all_others(
        self, tmp_path: Path, name: str, early: str, schemes: dict[str, str]
    ) -> None:
        plan = plan_of(tmp_path, name, schemes)
        assert plan.quant_config.layer is None
        assert "model.layers.0.self_attn.o_proj" in plan.quant_config.quantized_layers
        assert plan.module(f"model.layers.0.{early}").layer is None
        assert f"model.layers.0.{early}" in plan.quant_config.exclude_modules


LAYER_1 = "model.layers.1"
SWITCH = "EAGER_FUSION_DISABLED=1"


class TestInputScalesOfPlainLinears:
    """Some classes quantize an input together with the all-reduce of ranks: by the mode of the model, not of a Linear.

    TensorRT-LLM `_torch/models/modeling_llama.py: LlamaDecoderLayer.forward` (3a5901cd): `gate_up_proj.input_scale` in
    FP8 and NVFP4, and three results for the next attention in NVFP4, if the hidden size is above 4096.
    """

    def llama(self, directory: Path, scheme: str, plain: str, hidden: int = 4224) -> Plan:
        config = tiny_config(hidden=hidden, heads=2, kv_heads=2, intermediate=128, head_dim=32)
        schemes = {f"{part}_proj": scheme for part in ("q", "k", "v", "o", "gate", "up", "down")}
        schemes[f"{LAYER_1}.{plain}"] = DENSE
        write_checkpoint(directory, config=config, scheme=schemes)
        return inspect_checkpoint(directory).plan

    @pytest.mark.parametrize(
        ("scheme", "plain"),
        [("fp8-tensor-static", "mlp.gate_proj"), ("nvfp4", "mlp.up_proj"), ("nvfp4", "self_attn.q_proj")],
    )
    def test_llama_gets_entries_if_a_scale_would_be_missing(self, tmp_path: Path, scheme: str, plain: str) -> None:
        plan = self.llama(tmp_path, scheme, plain)
        assert len(modes(plan)) == 1
        assert plan.quant_config.layer is None
        assert f"{LAYER_1}.mlp.down_proj" in plan.quant_config.quantized_layers
        assert f"{LAYER_1}.{plain}" in plan.quant_config.exclude_modules
        assert not any(SWITCH in warning for warning in plan.warnings)

    @pytest.mark.parametrize(
        ("scheme", "plain", "hidden"),
        [
            ("fp8-tensor-static", "self_attn.q_proj", 4224),
            ("fp8-channel-token", "mlp.gate_proj", 4224),
            ("nvfp4", "mlp.down_proj", 4224),
            ("nvfp4", "mlp.gate_proj", 4096),
        ],
    )
    def test_llama_needs_none_where_it_reads_no_such_scale(
        self, tmp_path: Path, scheme: str, plain: str, hidden: int
    ) -> None:
        assert self.llama(tmp_path, scheme, plain, hidden).quant_config.layer is not None

    @pytest.mark.parametrize(
        ("name", "variable"),
        [
            ("DeepseekV32ForCausalLM", "TRTLLM_DEEPSEEK"),
            ("GlmMoeDsaForCausalLM", "TRTLLM_DEEPSEEK"),
            ("Glm4MoeForCausalLM", "TRTLLM_GLM"),
        ],
    )
    def test_a_class_that_refuses_entries_needs_an_environment_variable(
        self, tmp_path: Path, name: str, variable: str
    ) -> None:
        plan = plan_of(tmp_path / "plain", name, {"o_proj": "nvfp4"})
        (warning,) = (text for text in plan.warnings if SWITCH in text)
        assert f"{variable}_{SWITCH}" in warning
        assert "2 plain Linears (model.layers.0.mlp.gate_proj, ...)" in warning
        quantized = plan_of(tmp_path / "nvfp4", name, "nvfp4")
        assert not any(SWITCH in text for text in quantized.warnings)
