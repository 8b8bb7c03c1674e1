"""config.json of an engine-build checkpoint: every key that the engine reads, and no key that it would refuse."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from builders import write_checkpoint
from engine_files import MAPPING_KEYS, QUANTIZATION_KEYS
from tiny_models import tiny_config

from trtllm_ct.base.errors import FaultCollector, PlanError, UsageError
from trtllm_ct.base.version import __version__
from trtllm_ct.engine.parallel import ONE_RANK, Parallel
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan.engine_files.layout import stages_of
from trtllm_ct.plan.engine_files.rope import rope_of

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.plan import Plan

SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocabulary": 97, "layers": 2}
LLAMA = {
    "producer": {"name": "trtllm-ct", "version": __version__},
    "architecture": "LlamaForCausalLM",
    "dtype": "bfloat16",
    "logits_dtype": "float32",
    "vocab_size": 97,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_size": 64,
    "intermediate_size": 512,
    "hidden_act": "silu",
    "norm_epsilon": 1e-6,
    "position_embedding_type": "rope_gpt_neox",
    "max_position_embeddings": 256,
    "rotary_base": 10000.0,
    "rotary_scaling": None,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "tie_word_embeddings": False,
    "disable_weight_only_quant_plugin": False,
    "quantization": {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": None,
    },
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    "attn_bias": False,
    "mlp_bias": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def planned(
    directory: Path, scheme: str = "int4-g64", parallel: Parallel = ONE_RANK, *, kv: bool = False, **more: Any
) -> Plan:
    config = tiny_config(more.pop("architecture", "LlamaForCausalLM"), **SIZES | more)
    built = write_checkpoint(directory, config=config, scheme=scheme, kv=kv)
    return plan_checkpoint(built.directory, "engine", parallel=parallel)


def config_of(directory: Path, scheme: str = "int4-g64", **more: Any) -> dict[str, Any]:
    config = planned(directory, scheme, **more).build_config
    assert config is not None
    assert config["quantization"].keys() == QUANTIZATION_KEYS
    assert config["mapping"].keys() <= MAPPING_KEYS
    return dict(config)


def test_a_llama_has_exactly_these_keys(tmp_path: Path) -> None:
    assert config_of(tmp_path) == LLAMA


def test_the_sizes_of_parallelism_are_in_the_mapping_and_never_a_rank(tmp_path: Path) -> None:
    config = config_of(tmp_path, "dense", parallel=Parallel(tensor=2, pipeline=2))

    assert config["mapping"] == {"world_size": 4, "tp_size": 2, "pp_size": 2}
    assert config["quantization"]["quant_algo"] is None


@pytest.mark.parametrize(
    ("architecture", "want"),
    [
        ("MistralForCausalLM", {"attn_bias": False, "mlp_bias": False, "hidden_act": "silu"}),
        ("Qwen2ForCausalLM", {"attn_bias": True, "qwen_type": "qwen2", "seq_length": 8192, "use_logn_attn": False}),
        ("Qwen3ForCausalLM", {"attn_bias": False, "qwen_type": "qwen3", "num_labels": 1, "decoder_sparse_step": 1}),
        (
            "MixtralForCausalLM",
            {"hidden_act": "swiglu", "moe": {"num_experts": 4, "top_k": 2, "normalization_mode": 1}},
        ),
    ],
)
def test_each_class_has_its_own_keys(architecture: str, want: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tmp_path, "dense", architecture=architecture)

    assert {key: config[key] for key in want} == want
    assert config["architecture"] == architecture


def test_qwen_has_every_key_that_its_class_reads(tmp_path: Path) -> None:
    config = config_of(tmp_path, "dense", architecture="Qwen3ForCausalLM")

    assert {
        "qwen_type",
        "seq_length",
        "use_logn_attn",
        "tie_word_embeddings",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "mlp_only_layers",
        "decoder_sparse_step",
        "num_labels",
    } <= config.keys()


def test_experts_are_divided_by_tensor_parallelism(tmp_path: Path) -> None:
    config = config_of(tmp_path, "dense", architecture="MixtralForCausalLM", parallel=Parallel(tensor=2))

    assert config["mapping"] | {"moe_tp_size": 2, "moe_ep_size": 1} == config["mapping"]


@pytest.mark.parametrize(
    ("scheme", "want"),
    [
        ("int4-g64-asym", {"quant_algo": "W4A16_AWQ", "has_zero_point": True, "pre_quant_scale": False}),
        ("int4-channel", {"quant_algo": "W4A16_AWQ", "group_size": 128}),
        ("fp8-tensor-static", {"quant_algo": "FP8", "group_size": 128, "pre_quant_scale": False}),
        ("nvfp4", {"quant_algo": "NVFP4", "group_size": 16}),
        ("w8a8", {"quant_algo": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"}),
    ],
)
def test_each_algorithm_has_its_flags(scheme: str, want: dict[str, Any], tmp_path: Path) -> None:
    quantization = config_of(tmp_path, scheme)["quantization"]

    assert quantization | want == quantization


def test_only_plain_int8_disables_the_plug_in(tmp_path: Path) -> None:
    assert config_of(tmp_path / "int8", "int8-channel")["disable_weight_only_quant_plugin"] is True
    assert config_of(tmp_path / "fp8", "fp8-channel-token")["disable_weight_only_quant_plugin"] is False


def test_biases_follow_the_source(tmp_path: Path) -> None:
    config = config_of(tmp_path, attention_bias=True)

    assert (config["attn_bias"], config["mlp_bias"]) == (True, False)


class TestRope:
    @pytest.mark.parametrize(
        "scaling",
        [
            {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
            LLAMA3,
        ],
        ids=lambda scaling: str(scaling.get("rope_type", scaling.get("type"))),
    )
    def test_both_spellings_give_the_same(self, scaling: dict[str, Any]) -> None:
        faults = FaultCollector()
        old = rope_of({"rope_theta": 500000.0, "rope_scaling": scaling}, 10000.0, faults)
        new = rope_of({"rope_parameters": {"rope_theta": 500000.0, **scaling}}, 10000.0, faults)

        assert not faults.faults
        assert old == new
        assert (old.base, old.scaling) == (500000.0, scaling)

    def test_what_no_converter_writes_is_named(self) -> None:
        text = {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 8192}
        rope = rope_of(text, 10000.0, FaultCollector())

        assert rope.derived == "rotary_scaling of type yarn"

    @pytest.mark.parametrize(
        ("text", "length"),
        [
            ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 512),
            ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 1024}, 1024),
            ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 32768),
            ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 0.1 * math.log(4) + 1}}, 32768),
        ],
    )
    def test_yarn_always_has_its_original_length(self, text: dict[str, Any], length: int) -> None:
        """Engines take 4,096 without one, transformers what the model has."""
        faults = FaultCollector()
        rope = rope_of(text | {"max_position_embeddings": 32768}, 10000.0, faults)

        assert not faults.faults
        assert rope.scaling is not None
        assert rope.scaling["original_max_position_embeddings"] == length

    @pytest.mark.parametrize("more", [{"attention_factor": 1.0}, {"truncate": False}, {"mscale": 0.7}])
    def test_what_engines_do_not_read_of_yarn_is_refused(self, more: dict[str, Any]) -> None:
        faults = FaultCollector()
        block = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096} | more
        rope_of({"rope_scaling": block}, 10000.0, faults)

        assert [fault.found for fault in faults.faults] == [*more]

    def test_a_base_in_the_block_of_the_scaling_counts(self) -> None:
        rope = rope_of({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}}, 1e4, FaultCollector())

        assert (rope.base, rope.scaling) == (5e5, {"type": "linear", "factor": 2.0})

    def test_a_missing_base_is_the_default_of_the_class(self, tmp_path: Path) -> None:
        rope = {"rope_parameters": None}
        assert config_of(tmp_path / "llama", "dense", **rope)["rotary_base"] == 10000.0
        mixtral = config_of(tmp_path / "mixtral", "dense", architecture="MixtralForCausalLM", **rope)
        assert mixtral["rotary_base"] == 1e6

    @pytest.mark.parametrize(
        "text",
        [
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {**LLAMA3}},
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            {"partial_rotary_factor": 0.5},
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ],
    )
    def test_contradictions_and_other_kinds_are_faults(self, text: dict[str, Any]) -> None:
        faults = FaultCollector()
        rope_of(text, 10000.0, faults)

        assert len(faults.faults) == 1


def test_what_follows_from_the_source_alone_is_marked_in_a_warning(tmp_path: Path) -> None:
    exercised = planned(tmp_path / "awq").warnings
    derived = planned(
        tmp_path / "zeros", "int4-g64-asym", rope_parameters={"rope_type": "yarn", "factor": 2.0}
    ).warnings

    assert any("no engine was built from it here" in warning for warning in exercised)
    assert not any("(derived)" in warning for warning in exercised)
    assert (
        "(derived) no converter of TensorRT-LLM writes this: W4A16_AWQ with zero points and without pre_quant_scale; "
        "rotary_scaling of type yarn"
    ) in derived


def test_the_form_of_codes_that_would_be_called_gptq_is_named(tmp_path: Path) -> None:
    note = "int4 codes are written as W4A16_AWQ, for every GPU: a file of W4A16_GPTQ serves one generation of GPUs"

    assert note in planned(tmp_path / "int4").warnings
    assert note not in planned(tmp_path / "fp8", "fp8-channel-token").warnings


def test_a_sliding_window_is_left_to_the_run(tmp_path: Path) -> None:
    warnings = planned(tmp_path, "dense", architecture="MistralForCausalLM", sliding_window=64).warnings

    assert any("sliding_window 64 is no part of an engine" in warning for warning in warnings)


def test_releases_without_the_backend_are_refused(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=tiny_config(**SIZES), scheme="dense")

    with pytest.raises(UsageError, match=r"--engine: expected stock-1\.0 or stock-1\.2, found 'stock-1\.3'"):
        plan_checkpoint(built.directory, "engine", engine="stock-1.3")


def test_dense_o_proj_is_refused(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=tiny_config(**SIZES), scheme="dense")

    with pytest.raises(PlanError, match="--dense-o-proj"):
        plan_checkpoint(built.directory, "engine", dense_o_proj=True)


@pytest.mark.parametrize(
    ("layers", "stages", "want"),
    [(4, 1, [4]), (4, 2, [2, 2]), (5, 2, [3, 2]), (7, 4, [2, 2, 2, 1]), (3, 3, [1, 1, 1])],
)
def test_the_first_stages_have_one_more_layer(layers: int, stages: int, want: list[int]) -> None:
    ranges = stages_of(layers, stages)

    assert [len(stage) for stage in ranges] == want
    assert [layer for stage in ranges for layer in stage] == list(range(layers))
