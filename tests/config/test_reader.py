"""The reader: every spelling of a block becomes one typed value, and invalid blocks are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.base.errors import ConfigError, DetectionError
from trtllm_ct.base.schemes import CompressionFormat, NumberType, QuantArgs, QuantScheme, Strategy
from trtllm_ct.config.detect import FormatDetector
from trtllm_ct.config.quantization_config import (
    ConfigGroup,
    ExpertSparsity,
    QuantizationConfig,
    SparsityConfig,
    Transform,
)
from trtllm_ct.config.reader import CompressedTensorsConfigReader

INT4 = {"num_bits": 4, "group_size": 128}
BLOCK = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
}
# Any key with any value, at any depth, and often a value that is right somewhere.
KEYS = (*BLOCK, "kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config", "ignore", "version")
INNER_KEYS = ("targets", "weights", "format", "type", "num_bits", "group_size", "strategy", "apply", "FP8", "dynamic")
WORDS = ("Linear", "re:(", "float", "token", "block", "local", "hadamard", "dense", "")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 129) | st.floats() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER_KEYS), inner, max_size=5),
    max_leaves=12,
)


def read(block: dict[str, object]) -> QuantizationConfig:
    return CompressedTensorsConfigReader().read(block)


def read_group(group: object, name: str = "group_0", **block: object) -> ConfigGroup:
    (found,) = read({"config_groups": {name: group}, **block}).groups
    return found


def faults(block: dict[str, object]) -> dict[str, str]:
    """Path under the block, and expectation, of every fault."""
    with pytest.raises(ConfigError) as caught:
        read(block)
    return {fault.where.removeprefix("quantization_config."): fault.expected for fault in caught.value.faults}


class TestSources:
    @pytest.mark.parametrize(
        ("source", "origin"),
        [
            (BLOCK, "quantization_config"),
            ({"config_groups": BLOCK["config_groups"], "format": "pack-quantized"}, "quantization_config"),
            ({"quantization_config": BLOCK, "sparsity_config": {}}, "quantization_config"),
            ({"quantization_config": BLOCK}, "config.json: quantization_config"),
            ({"compression_config": BLOCK}, "config.json: compression_config"),
            ({"text_config": {"quantization_config": BLOCK}}, "config.json: text_config.quantization_config"),
        ],
    )
    def test_a_block_reads_the_same_in_every_wrapping(self, source, origin):
        config = read(source)
        assert config.origin == origin
        assert config.groups == read(BLOCK).groups
        assert config.format is CompressionFormat.PACK_QUANTIZED

    @pytest.mark.parametrize("as_type", [str, Path])
    def test_the_modifiers_are_read_from_a_directory(self, tmp_path, as_type):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": BLOCK}))
        assert CompressedTensorsConfigReader().read(as_type(tmp_path)).modifiers == ()
        (tmp_path / "recipe.yaml").write_text("default_stage:\n  default_modifiers:\n    AWQModifier:\n      n: 1\n")
        config = CompressedTensorsConfigReader().read(as_type(tmp_path))
        assert config.modifiers == ("AWQModifier",)
        assert config.origin == "config.json: quantization_config"

    @pytest.mark.parametrize(
        "source",
        [
            {"quant_method": "gptq", "bits": 4},
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            {"producer": {"name": "modelopt"}, "config_groups": {}},
            {"model_type": "llama"},
            {},
        ],
    )
    def test_other_methods_are_refused(self, source):
        with pytest.raises(DetectionError, match="not compressed-tensors"):
            read(source)

    @pytest.mark.parametrize(
        ("recipe", "names"),
        [
            ("GPTQModifier:\n  a: 1", ("GPTQModifier",)),
            ("  - AWQModifier:\n      x: 1\n  - QuantizationModifier:", ("AWQModifier", "QuantizationModifier")),
            ("m: {AWQModifier: {a: 1}, 'GPTQModifier': {}}", ("AWQModifier", "GPTQModifier")),
            ("AWQModifier: 1\nAWQModifier: 2", ("AWQModifier",)),
            ("# AWQModifier:\nGPTQModifier: # AWQModifier: no", ("GPTQModifier",)),
            ("note: AWQModifier was tried\nclass: x.AWQModifier", ()),
            ("default_modifiers:\nModifiers:\nMyModifierList:", ()),
            ("ignore: ['re:.*#x']\nGPTQModifier:\r\n", ("GPTQModifier",)),
            ("", ()),
        ],
    )
    def test_modifiers_are_mapping_keys_outside_comments(self, tmp_path, recipe, names):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": BLOCK}))
        (tmp_path / "recipe.yaml").write_text(recipe)
        assert CompressedTensorsConfigReader().read(tmp_path).modifiers == names


class TestGroups:
    def test_the_short_form_of_the_tensorrt_llm_documentation(self):
        config = read(
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {"group_0": {"num_bits": 4, "group_size": 128, "targets": ["weight"]}},
            }
        )
        weights = QuantArgs(num_bits=4, strategy=Strategy.GROUP, group_size=128)
        scheme = QuantScheme(weights=weights, format=CompressionFormat.INT_QUANTIZED)
        assert config.groups == (ConfigGroup(name="group_0", targets=("Linear",), scheme=scheme),)
        assert config.warnings == ()

    def test_endless_groups_are_one_fault(self):
        group = {"targets": ["Linear"], "weights": INT4}
        assert set(faults({"config_groups": {f"group_{number}": group for number in range(10_001)}})) == {
            "config_groups"
        }

    def test_faults_of_the_short_form_name_the_group(self):
        block = {"config_groups": {"group_0": {"num_bits": 40, "targets": ["weight"], "bits": 4}}}
        assert set(faults(block)) == {"config_groups.group_0.num_bits"}

    @pytest.mark.parametrize(
        ("declared", "whole", "expected"),
        [
            ("float-quantized", "pack-quantized", "float-quantized"),
            (None, "pack-quantized", "pack-quantized"),
            (None, "mixed-precision", None),
            ("float-quantized", "mixed-precision", "float-quantized"),
            (None, None, None),
            (None, "dense", "dense"),
            (None, "fakequant", "fakequant"),
            (None, "marlin-24", "marlin-24"),
        ],
    )
    def test_the_format_of_the_group_has_priority_over_that_of_the_checkpoint(self, declared, whole, expected):
        group = read_group({"targets": ["Linear"], "weights": INT4, "format": declared}, format=whole)
        assert group.scheme.format == expected

    def test_a_preset_name_may_stand_for_the_arguments(self):
        group = read_group(["re:.*mlp.*", "weight"], name="fp8_dynamic", format="float-quantized")
        assert group.targets == ("re:.*mlp.*", "Linear")
        assert group.scheme.label() == "fp8 channel, input fp8 token dynamic"
        assert group.scheme.format is CompressionFormat.FLOAT_QUANTIZED

    @pytest.mark.parametrize(("version", "warnings"), [("0.14.0", 0), (None, 1), ("unreleased", 1)])
    def test_a_preset_of_unknown_age_is_warned_of(self, version, warnings):
        config = read({"config_groups": {"W8A16": ["Linear"]}, "version": version})
        assert len(config.warnings) == warnings
        assert all("int8 channel" in text and "int8 group 128" in text for text in config.warnings)

    def test_a_group_that_shares_its_name_with_a_preset_keeps_its_own_arguments(self):
        group = read_group({"targets": ["Linear"], "weights": {"group_size": 32, "num_bits": 4}}, name="W4A16")
        assert group.scheme.label() == "int4 group 32"

    def test_attention_groups_have_no_weights(self):
        group = read_group({"targets": ["LlamaAttention"], "weights": None, "input_activations": {"type": "float"}})
        assert group.scheme.label() == "weights unquantized, input fp8 tensor"

    def test_one_target_may_be_a_string(self):
        assert read_group({"targets": "Linear", "weights": INT4}).targets == ("Linear",)

    def test_a_single_group_without_targets_means_every_linear_with_a_warning(self):
        config = read({"config_groups": {"g": {"weights": INT4}}})
        assert config.groups[0].targets == ("Linear",)
        assert "declares no targets" in config.warnings[0]

    def test_a_target_of_two_groups_is_warned_of(self):
        groups = {name: {"targets": ["Linear"], "weights": INT4} for name in ("one", "two")}
        (warning,) = read({"config_groups": groups}).warnings
        assert "one and two both target 'Linear'; the last one that fits the tensors counts" in warning

    def test_an_empty_target_list_is_warned_of(self):
        (warning,) = read({"config_groups": {"g": {"targets": [], "weights": INT4}}}).warnings
        assert "applies to no module" in warning

    @pytest.mark.parametrize(
        ("groups", "path"),
        [
            ({"a": {"weights": INT4}, "b": {"targets": ["Linear"]}}, "config_groups.a.targets"),
            ({"a": ["Linear"]}, "config_groups.a"),
            ({"a": None}, "config_groups.a"),
            ({"FP8": [1]}, "config_groups.FP8"),
            ({"FP8": None, "a": {"targets": ["Linear"]}}, "config_groups.FP8"),
            ({"FP8": 8}, "config_groups.FP8"),
            ({"a": {"targets": [1]}}, "config_groups.a.targets"),
            ({"a": {"targets": {"Linear": 1}}}, "config_groups.a.targets"),
            ({"a": {"targets": ["Linear", "re:(mlp"]}}, "config_groups.a.targets[1]"),
            ({"a": {"targets": ["Linear"], "weights": [4]}}, "config_groups.a.weights"),
            ({"a": {"targets": ["Linear"], "format": "mixed-precision"}}, "config_groups.a.format"),
            ({"a": {"targets": ["Linear"], "format": "int4"}}, "config_groups.a.format"),
            ([{"targets": ["Linear"]}], "config_groups"),
            (None, "config_groups"),
        ],
    )
    def test_faulty_groups_are_named(self, groups, path):
        assert set(faults({"quant_method": "compressed-tensors", "config_groups": groups})) == {path}


class TestBlock:
    def test_optional_parts_default_to_nothing(self):
        config = read({**BLOCK, "ignore": None, "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}})
        assert config == read(BLOCK)
        assert (config.ignore, config.kv_cache_scheme, config.sparsity, config.transforms) == ((), None, None, ())
        assert (config.version, config.quantization_status) == (None, None)

    def test_everything_at_once(self):
        config = read(
            {
                **BLOCK,
                "ignore": ["lm_head", "re:.*gate$"],
                "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head"},
                "quantization_status": "frozen",
                "version": "0.14.0",
                "global_compression_ratio": 1.3,
                "run_compressed": True,
            }
        )
        assert config.ignore == ("lm_head", "re:.*gate$")
        assert config.kv_cache_scheme == QuantArgs(num_bits=8, type=NumberType.FLOAT, strategy=Strategy.ATTN_HEAD)
        assert (config.quantization_status, config.version, config.warnings) == ("frozen", "0.14.0", ())

    def test_unknown_keys_are_warned_of_with_a_suggestion(self):
        groups = {"g": {"targets": ["Linear"], "weights": {**INT4, "gruop_size": 64}, "note": 1}}
        config = read({**BLOCK, "config_groups": groups, "ignored_layers": [], "provider": "me"})
        warnings = "\n".join(config.warnings)
        assert (
            "quantization_config: unknown keys, which have no effect: 'ignored_layers' (did you mean 'ignore'?)"
            in warnings
        )
        assert "'provider'; known are quant_method, version, format" in warnings
        assert "config_groups.g: unknown keys, which have no effect: 'note'" in warnings
        assert "'gruop_size' (did you mean 'group_size'?); known are num_bits, type" in warnings

    def test_hints_of_another_type_are_ignored_with_a_warning(self):
        config = read({**BLOCK, "version": 0.14, "quantization_status": ["compressed"]})
        assert (config.version, config.quantization_status) == (None, None)
        assert len(config.warnings) == 2

    def test_all_faults_are_raised_together_with_remedies(self):
        block = {
            "format": "packed",
            "ignore": ["re:["],
            "kv_cache_scheme": {"strategy": "channel"},
            "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 99, "strategy": "row"}}},
        }
        with pytest.raises(ConfigError) as caught:
            read(block)
        assert [fault.where.removeprefix("quantization_config.") for fault in caught.value.faults] == [
            "format",
            "config_groups.g.weights.num_bits",
            "config_groups.g.weights.strategy",
            "ignore[0]",
            "kv_cache_scheme.strategy",
        ]
        assert all(fault.remedy.endswith(".") for fault in caught.value.faults)
        assert "pack-quantized" in caught.value.faults[0].expected

    def test_faults_of_a_directory_name_the_file(self, tmp_path):
        groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 99}}}
        block = {"quant_method": "compressed-tensors", "config_groups": groups}
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": block}}))
        with pytest.raises(ConfigError) as caught:
            CompressedTensorsConfigReader().read(tmp_path)
        where = "config.json: text_config.quantization_config.config_groups.group_0.weights.num_bits"
        assert caught.value.faults[0].where == where

    def test_long_values_are_cut_in_messages(self):
        with pytest.raises(ConfigError) as caught:
            read({**BLOCK, "format": "x" * 1000})
        assert len(caught.value.faults[0].found) == 80

    @settings(max_examples=200, deadline=None)
    @given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6))
    def test_no_json_makes_the_reader_crash(self, block):
        """Whatever a block contains, it is either read or refused with a path."""
        block.pop("quant_method", None)
        try:
            read({"config_groups": None, **block})
        except ConfigError as error:
            refused = error.faults
        else:
            refused = ()
        assert all(fault.where.startswith("quantization_config.") for fault in refused)


class TestSparsity:
    def test_a_sparse_only_block_has_no_groups(self):
        config = read({"sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]}})
        assert config.groups == ()
        assert config.sparsity == SparsityConfig(
            format=CompressionFormat.SPARSE_BITMASK, targets=("Linear",), ignore=("lm_head",)
        )

    def test_null_targets_and_spelling_of_the_structure(self):
        sparsity = {"format": "sparse-24-bitmask", "targets": None, "sparsity_structure": "Unstructured"}
        config = read({**BLOCK, "sparsity_config": {**sparsity, "registry_requires_subclass": False}})
        assert config.sparsity == SparsityConfig(
            format=CompressionFormat.SPARSE_24_BITMASK, sparsity_structure="unstructured"
        )
        assert config.warnings == ()

    def test_dense_zeros_need_no_decoding(self):
        assert read({"sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}}).sparsity is None

    @pytest.mark.parametrize("sparsity", [{"format": "sparse-48"}, {"format": "pack-quantized"}, {"targets": []}])
    def test_an_unknown_sparse_format_is_a_fault(self, sparsity):
        assert set(faults({**BLOCK, "sparsity_config": sparsity})) == {"sparsity_config.format"}

    def test_pruned_experts(self):
        counts = [None, 129, 128]
        config = read({**BLOCK, "moe_sparsity_config": {"method": "prune", "num_experts": counts}})
        assert config.expert_sparsity == ExpertSparsity(method="prune", num_experts=(None, 129, 128))

    @pytest.mark.parametrize(
        ("experts", "key"),
        [
            ({"method": "merge", "num_experts": [1]}, "method"),
            ({"num_experts": [1]}, "method"),
            ({"method": "prune", "num_experts": [1.5]}, "num_experts"),
            ({"method": "novice"}, "num_experts"),
        ],
    )
    def test_unknown_expert_sparsity_is_a_fault(self, experts, key):
        assert set(faults({**BLOCK, "moe_sparsity_config": experts})) == {f"moe_sparsity_config.{key}"}


class TestTransforms:
    def test_one_transform_per_place_with_defaults(self):
        places = [
            {"targets": ["Linear"], "location": "weight_input", "inverse": True, "ignore": "lm_head"},
            {"targets": "re:.*down_proj$", "location": "INPUT"},
        ]
        scheme = {"type": "hadamard", "apply": places, "head_dim": 64, "requires_grad": False, "randomize": False}
        config = read(
            {**BLOCK, "transform_config": {"config_groups": {"R4": {**scheme, "precision": "torch.float64"}}}}
        )
        common = {"name": "R4", "type": "hadamard", "head_dim": 64, "precision": "float64"}
        folded = Transform(location="weight_input", targets=("Linear",), ignore=("lm_head",), inverse=True, **common)
        assert config.transforms == (folded, Transform(location="input", targets=("re:.*down_proj$",), **common))
        assert config.warnings == ()

    def test_a_transform_without_places_does_nothing(self):
        config = read({**BLOCK, "transform_config": {"config_groups": {"R1": {"type": "random-matrix"}}}})
        assert config.transforms == ()

    @pytest.mark.parametrize(
        ("transforms", "path"),
        [
            ({"groups": {}}, "config_groups"),
            ({"config_groups": {"R": {"type": "fourier"}}}, "config_groups.R.type"),
            ({"config_groups": {"R": {}}}, "config_groups.R.type"),
            ({"config_groups": {"R": []}}, "config_groups.R"),
            ({"config_groups": {"R": {"type": "hadamard", "apply": {}}}}, "config_groups.R.apply"),
            (
                {"config_groups": {"R": {"type": "hadamard", "apply": [{"location": "bias"}]}}},
                "config_groups.R.apply[0].location",
            ),
        ],
    )
    def test_unknown_transforms_are_faults(self, transforms, path):
        assert set(faults({**BLOCK, "transform_config": transforms})) == {f"transform_config.{path}"}


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "labels", "modifiers"),
    [
        ("w4a16-gptq", ["int4 group 128"], ("GPTQModifier",)),
        ("w4a16-g64-asym", ["int4 group 64 asymmetric"], ("QuantizationModifier",)),
        ("w4a16-actorder-group", ["int4 group 128 actorder group"], ()),
        ("w8a16-channel", ["int8 channel"], ("QuantizationModifier",)),
        ("w8a8-dynamic", ["int8 channel, input int8 token dynamic"], ("QuantizationModifier",)),
        ("fp8-static-kv", ["fp8 tensor, input fp8 tensor"], ("QuantizationModifier",)),
        ("mixed-fp8-w4", ["fp8 channel, input fp8 token dynamic", "int4 group 128"], ("QuantizationModifier",)),
        ("nvfp4", ["fp4 tensor_group 16, input fp4 tensor_group 16 dynamic local"], ("QuantizationModifier",)),
        ("sparse-bitmask", [], ()),
        ("sparse24-fp8", ["fp8 channel, input fp8 token dynamic"], ()),
    ],
)
def test_real_checkpoints_read_without_a_warning(shared, name, labels, modifiers):
    config = CompressedTensorsConfigReader().read(shared / "checkpoints" / name)
    assert [group.scheme.label() for group in config.groups] == labels
    assert (config.modifiers, config.warnings) == (modifiers, ())


def test_a_detection_of_a_dictionary_is_read_without_a_directory() -> None:
    block = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"]}}}
    detection = FormatDetector().detect_config({"quantization_config": block})

    config = CompressedTensorsConfigReader().read(detection)

    assert (config.directory, config.origin) == (None, "config.json: quantization_config")
