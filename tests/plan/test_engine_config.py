"""TensorRT-LLM's QuantConfig of a plan: one mode, or an entry for each module, with names instead of patterns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import (
    SCHEMES,
    config_group,
    fp8_inputs,
    fp8_weights,
    int_weights,
    quantization_block,
    tiny_config,
    write_checkpoint,
)

from trtllm_ct.base.errors import ConfigError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.config.reader import CompressedTensorsConfigReader
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
from trtllm_ct.engine.target import DENSE, ENGINES, MODELOPT, REFERENCE, target_named
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan.engine_config import engine_config_of_scheme

if TYPE_CHECKING:
    from pathlib import Path

AWQ = LayerQuantConfig(quant_algo=QuantAlgo.W4A16_AWQ, group_size=64, pre_quant_scale=True)
FP8 = LayerQuantConfig(quant_algo=QuantAlgo.FP8)


def planned(tmp_path: Path, scheme: Any, to: str = "modelopt", **options: Any) -> QuantConfig:
    write_checkpoint(tmp_path, config=tiny_config(hidden=64, layers=1), scheme=scheme, **options)
    return plan_checkpoint(tmp_path, to).quant_config


class TestOfPlan:
    def test_one_mode_for_all_with_plain_modules_excluded_by_name(self, tmp_path):
        assert planned(tmp_path, "int4-g64") == QuantConfig(
            layer=AWQ, exclude_modules=("model.embed_tokens", "lm_head")
        )

    def test_zero_points_are_in_the_configuration_if_the_target_has_them(self, tmp_path):
        config = planned(tmp_path, "int4-g64-asym", to="reference")

        assert config.layer == LayerQuantConfig(
            quant_algo=QuantAlgo.W4A16_GPTQ, group_size=64, has_zero_point=True, pre_quant_scale=False
        )

    def test_modes_without_groups_have_no_group_size(self, tmp_path):
        """Not the -1 or 128 that a reader might take for a promise."""
        assert planned(tmp_path, "int8-channel").to_dict() == {
            "quant_algo": "W8A16",
            "kv_cache_quant_algo": None,
            "exclude_modules": ["model.embed_tokens", "lm_head"],
        }

    def test_modules_of_one_mode_beside_plain_ones_stay_one_mode(self, tmp_path):
        config = planned(tmp_path, {"o_proj": "int4-g64", "down_proj": "int4-g64"})

        assert config.layer == AWQ
        assert config.exclude_modules == (
            "model.embed_tokens",
            *(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
            *(f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj")),
            "lm_head",
        )

    def test_several_modes_give_one_entry_for_each_module(self, tmp_path):
        config = planned(tmp_path, {"o_proj": "int4-g64", "down_proj": "fp8-tensor-static"}, kv=True)

        assert config.quant_algo is QuantAlgo.MIXED_PRECISION
        assert config.quantized_layers == {"model.layers.0.self_attn.o_proj": AWQ, "model.layers.0.mlp.down_proj": FP8}
        assert config.kv_cache_quant_algo == "FP8"
        assert config.layer is config.group_size is None

    def test_two_group_sizes_are_two_modes(self, tmp_path):
        write_checkpoint(
            tmp_path, config=tiny_config(hidden=128, layers=1), scheme={"o_proj": "int4-g64", "down_proj": "int4-g128"}
        )

        layers = plan_checkpoint(tmp_path).quant_config.quantized_layers

        assert {layer.group_size for layer in layers.values()} == {64, 128}

    def test_dequantized_modules_are_excluded_by_name(self, tmp_path):
        config = planned(tmp_path, {"o_proj": "int4-g64", "down_proj": "int4-g32"})

        assert config.layer == AWQ
        assert "model.layers.0.mlp.down_proj" in config.exclude_modules

    @pytest.mark.parametrize(("scheme", "to"), [("int4-g32", "modelopt"), ("int4-g64", "dense"), ("dense", "modelopt")])
    def test_without_a_quantized_module_the_configuration_is_empty(self, tmp_path, scheme, to):
        assert planned(tmp_path, scheme, to=to) == QuantConfig()

    def test_patterns_of_ignore_become_names(self, tmp_path):
        """Releases match patterns differently, and old ones quantize modules that a `re:` entry should keep plain."""
        group = config_group(int_weights(4, group_size=64), targets=["Linear"])
        block = quantization_block({"group_0": group}, ignore=["re:.*attn.*", "lm_head"])
        write_checkpoint(
            tmp_path,
            config=tiny_config(layers=1, quantization_config=block),
            scheme=dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g64"),
        )

        excluded = plan_checkpoint(tmp_path).quant_config.exclude_modules

        assert "model.layers.0.self_attn.q_proj" in excluded
        assert not [name for name in excluded if set(name) & set("*?[]:^$")]


# By the name of a scheme: what stock releases hold, and what the newest one adds.
ALGORITHMS = {
    "w8a8": "W8A16",
    "w8a8-static-asym": "W8A16",
    "int8-plain-tensor": "W8A16",
    "w4afp8": "W4A16_AWQ",
    "int3-g64": "W4A16_AWQ",
    "int4-g64-actorder": None,
    "fp8-block": "FP8_BLOCK_SCALES",
    "nvfp4": "NVFP4",
    "mxfp4a16": None,
    "mxfp6a8": None,
    "mxfp8a16": None,
}
NEWEST = {"nvfp4a16": "W4A16_NVFP4", "mxfp8": "MXFP8"}


class TestOfScheme:
    """A configuration without its tensors."""

    @staticmethod
    def engine(*groups: dict[str, Any], to: str = "modelopt", **block: Any) -> QuantConfig:
        named = {f"group_{i}": group for i, group in enumerate(groups)}
        config = CompressedTensorsConfigReader().read(quantization_block(named, **block))
        return engine_config_of_scheme(config, target_named(to))

    @pytest.mark.parametrize("target", [MODELOPT, REFERENCE])
    def test_the_short_form_of_the_documentation_is_int4_in_groups(self, target):
        block = {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": {"num_bits": 4, "group_size": 128, "targets": ["weight"]}},
        }

        config = engine_config_of_scheme(CompressedTensorsConfigReader().read(block), target)

        assert config == QuantConfig(
            layer=LayerQuantConfig(quant_algo=QuantAlgo.W4A16_AWQ, group_size=128, pre_quant_scale=True)
        )

    @pytest.mark.parametrize(
        ("group", "to", "algo"),
        [
            (config_group(int_weights(4, "channel")), "modelopt", "W4A16"),
            (config_group(int_weights(8, "channel")), "modelopt", "W8A16"),
            (config_group(int_weights(8, group_size=128)), "modelopt", None),
            (config_group(int_weights(4, group_size=128, symmetric=False)), "modelopt", None),
            (config_group(int_weights(4, group_size=128, symmetric=False)), "reference", "W4A16_GPTQ"),
            (config_group(fp8_weights(), fp8_inputs()), "modelopt", "FP8"),
            (config_group(fp8_weights("channel"), fp8_inputs("token")), "modelopt", "FP8_PER_CHANNEL_PER_TOKEN"),
            (config_group(fp8_weights(), fp8_inputs("token")), "modelopt", "FP8_PER_CHANNEL_PER_TOKEN"),
            (config_group(fp8_weights()), "modelopt", None),
            (config_group(fp8_weights(), fp8_inputs()), "dense", None),
            *((SCHEMES[name].group, "modelopt", algo) for name, algo in ALGORITHMS.items()),
            *((SCHEMES[name].group, "reference", algo) for name, algo in (ALGORITHMS | NEWEST).items()),
            *((SCHEMES[name].group, "dense", None) for name in ALGORITHMS | NEWEST),
        ],
    )
    def test_the_mode_is_one_that_the_target_has(self, group, to, algo):
        assert self.engine(group, to=to).quant_algo == algo

    @pytest.mark.parametrize("name", NEWEST)
    def test_the_newest_engine_adds_modes(self, name):
        config = CompressedTensorsConfigReader().read(quantization_block({"group_0": SCHEMES[name].group}))

        found = {
            engine: engine_config_of_scheme(config, target_named("modelopt", engine)).quant_algo for engine in ENGINES
        }
        assert found == {"stock-1.0": None, "stock-1.2": None, "stock-1.3": NEWEST[name]}

    def test_groups_of_one_mode_are_one_mode(self):
        same = config_group(int_weights(8, "channel"))

        assert self.engine(same, same | {"targets": ["lm_head"]}).quant_algo is QuantAlgo.W8A16

    def test_configurations_that_need_module_names_are_refused_with_all_faults(self):
        with pytest.raises(ConfigError) as caught:
            self.engine(
                config_group(int_weights(8, "channel")), config_group(fp8_weights(), fp8_inputs()), ignore=["re:.*mlp"]
            )

        found = {fault.where.rpartition(".")[2]: fault.found for fault in caught.value.faults}
        assert found == {"config_groups": "groups of 2 different modes", "ignore": "patterns (re:.*mlp)"}

    @pytest.mark.parametrize(("target", "algo"), [(MODELOPT, "FP8"), (DENSE, None)])
    def test_a_quantized_kv_cache_is_in_the_configuration_if_the_target_has_one(self, target, algo):
        assert (
            self.engine(config_group(fp8_weights(), fp8_inputs()), to=target.name, kv=True).kv_cache_quant_algo == algo
        )

    @pytest.mark.parametrize(
        ("scheme", "algo"),
        [
            (fp8_weights("tensor", type="int"), None),
            (fp8_weights("attn_head"), "FP8"),
            (fp8_weights("tensor", dynamic=True), "FP8"),
        ],
    )
    def test_a_cache_that_the_target_does_not_have_is_left_out(self, scheme, algo):
        config = self.engine(config_group(fp8_weights(), fp8_inputs()), kv_cache_scheme=scheme)

        assert config.kv_cache_quant_algo == algo

    def test_a_group_that_targets_only_attention_is_the_scheme_of_the_cache(self):
        attention = config_group(None, fp8_weights(), targets=["LlamaAttention"])

        assert self.engine(config_group(fp8_weights(), fp8_inputs()), attention).kv_cache_quant_algo == "FP8"
