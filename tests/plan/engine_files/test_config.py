"""config.json of an engine-build checkpoint: every key that the engine reads, and no key that it would refuse."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import rewrite_config, write_checkpoint
from engine_files import MAPPING_KEYS, QUANTIZATION_KEYS
from engine_sources import with_shared_globals
from installed_transformers import has_newest_transformers, typed_config
from tiny_models import tiny_config

from trtllm_ct.base.errors import CatalogError, ConfigError, PlanError, UsageError
from trtllm_ct.base.version import __version__
from trtllm_ct.engine.parallel import ONE_RANK, Parallel
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan.engine_files.layout import stages_of
from trtllm_ct.plan.models.build_classes import BUILD_CLASSES

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


def test_a_missing_base_is_the_default_of_the_class(tmp_path: Path) -> None:
    rope = {"rope_parameters": None}
    assert config_of(tmp_path / "llama", "dense", **rope)["rotary_base"] == 10000.0
    mixtral = config_of(tmp_path / "mixtral", "dense", architecture="MixtralForCausalLM", **rope)
    assert mixtral["rotary_base"] == 1e6


KEYS = [
    "max_position_embeddings", "rms_norm_eps", "hidden_act", "num_key_value_heads", "head_dim", "intermediate_size",
    "attention_bias", "mlp_bias", "tie_word_embeddings", "rope_theta", "rope_parameters", "rope_scaling",
    "num_experts_per_tok", "sliding_window", "use_sliding_window", "original_max_position_embeddings", "dtype",
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "partial_rotary_factor",
]  # fmt: skip
"""What target `engine` reads of a source's config.json, beside the architecture."""
NULLABLE = {"rotary_scaling"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of two classes each."""
    made = {}
    for architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        directory = tmp_path_factory.mktemp(architecture)
        write_checkpoint(directory, config=tiny_config(architecture, **SIZES), scheme="dense")
        made[architecture] = directory
    return made


@pytest.mark.parametrize("value", ["missing", None, True, False, "8", "", [8, 8], 0, -1, 1.5, {}], ids=repr)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "MixtralForCausalLM"])
def test_every_value_of_a_source_becomes_one_of_its_kind_or_a_fault(
    architecture: str, key: str, value: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Nothing else: no null, no boolean for a number, and no error that is not ours."""
    for path in sources[architecture].iterdir():
        if path.name == "config.json":
            shutil.copy(path, tmp_path)
        else:
            (tmp_path / path.name).hardlink_to(path)

    def edit(config: dict[str, Any]) -> None:
        config[key] = value
        if value == "missing":
            del config[key]

    rewrite_config(tmp_path, edit)
    try:
        config = plan_checkpoint(tmp_path, "engine").build_config
    except (ConfigError, PlanError, CatalogError):
        return
    assert config is not None
    for name, want in LLAMA.items():
        if name not in {"producer", "quantization", "mapping", *NULLABLE}:
            is_number = isinstance(want, int | float) and not isinstance(want, bool)
            kinds = (int, float) if isinstance(want, float) else (type(want),)
            assert isinstance(config[name], kinds), (name, config[name])
            assert not is_number or config[name] >= 0
    assert config["max_position_embeddings"] > 0
    assert config["rotary_base"] > 0


@pytest.mark.parametrize("null", [False, True], ids=["missing", "null"])
@pytest.mark.parametrize("architecture", BUILD_CLASSES)
def test_what_a_source_leaves_out_is_the_default_of_its_class(architecture: str, null: bool, tmp_path: Path) -> None:
    if not has_newest_transformers():
        return
    keys = ("max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_parameters", "num_experts_per_tok")
    built = write_checkpoint(tmp_path, config=tiny_config(architecture, **SIZES), scheme="dense")

    def edit(config: dict[str, Any]) -> None:
        for key in keys:
            config.pop(key, None)
            config.update({key: None} if null else {})

    rewrite_config(tmp_path, edit)
    model_type = built.config["model_type"]

    config = plan_checkpoint(built.directory, "engine").build_config

    assert config is not None
    default = typed_config(model_type)
    assert config["max_position_embeddings"] == default.max_position_embeddings
    assert config["norm_epsilon"] == default.rms_norm_eps
    assert config["rotary_base"] == default.rope_parameters["rope_theta"]
    assert default.hidden_act == "silu"
    assert config.get("moe", {}).get("top_k") == getattr(default, "num_experts_per_tok", None)
    defaults = BUILD_CLASSES[architecture].defaults
    for key in ("use_sliding_window", "max_window_layers"):
        assert defaults.get(key, default.__dict__.get(key)) == default.__dict__.get(key)
    # Classes with such a switch forget the window while it is off.
    windowed = typed_config(model_type, **({"use_sliding_window": True} if "use_sliding_window" in defaults else {}))
    assert defaults.get("sliding_window") == windowed.__dict__.get("sliding_window")


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


SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = {"sliding_window": 64, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("architecture", "more", "sizes"),
    [
        ("MistralForCausalLM", {"max_position_embeddings": 8192}, [4096]),
        ("MistralForCausalLM", {"max_position_embeddings": 8192, "sliding_window": 8192}, []),
        ("MistralForCausalLM", {"sliding_window": 64, "use_sliding_window": False}, [64]),
        ("MistralForCausalLM", {"sliding_window": 64, "max_window_layers": 3}, [64]),
        ("MixtralForCausalLM", {}, []),
        ("MixtralForCausalLM", {"sliding_window": 64}, [64]),
        ("LlamaForCausalLM", {}, []),
        ("LlamaForCausalLM", WINDOW, []),
        ("Qwen2ForCausalLM", {"sliding_window": 64}, []),
        ("Qwen2ForCausalLM", WINDOW, []),
        ("Qwen2ForCausalLM", {**WINDOW, "max_window_layers": 0}, [64]),
        ("Qwen2ForCausalLM", {**WINDOW, "max_window_layers": 2}, [256, 256, 64]),
        ("Qwen3ForCausalLM", {**WINDOW, "max_window_layers": 3}, []),
        ("Qwen3ForCausalLM", {**WINDOW, "layer_types": [SLIDING, FULL, SLIDING]}, [64, 256, 64]),
        ("Qwen3ForCausalLM", {**WINDOW, "layer_types": [SLIDING] * 3, "max_window_layers": 3}, [64]),
        ("Qwen2ForCausalLM", {"layer_types": [FULL] * 3, "use_sliding_window": False}, []),
    ],
)
def test_windows_are_those_that_the_class_gives_its_layers(
    architecture: str, more: dict[str, Any], sizes: list[int], tmp_path: Path
) -> None:
    plan = planned(tmp_path, "dense", architecture=architecture, **{"layers": 3, **more})

    option = ["--max_attention_window_size", *map(str, sizes)] if sizes else []
    assert plan.run_options == tuple(option)
    warnings = [warning for warning in plan.warnings if warning.startswith("sliding_window")]
    assert len(warnings) == bool(sizes)
    assert not sizes or " ".join(option) in warnings[0]


@pytest.mark.parametrize(
    ("scheme", "kv", "plain", "needed"),
    [
        ("fp8-tensor-static", True, True, True),
        ("fp8-tensor-static", True, False, False),
        ("fp8-tensor-static", False, True, False),
        ("nvfp4", True, True, True),
        ("int4-g64", True, True, False),
    ],
)
def test_attention_in_fp8_is_turned_off_where_it_has_no_scale(
    scheme: str, kv: bool, plain: bool, needed: bool, tmp_path: Path
) -> None:
    names = [f"{letter}_proj" for letter in ("q", "k", "v", "gate", "up", "down", *([] if plain else ["o"]))]
    built = write_checkpoint(
        tmp_path, config=tiny_config(**SIZES), scheme=dict.fromkeys(names, scheme), kv=kv, edit=with_shared_globals
    )

    plan = plan_checkpoint(built.directory, "engine")

    both = ("--use_paged_context_fmha", "disable", "--use_fp8_context_fmha", "disable")
    assert plan.build_options == (both if needed else ())
    assert any("computes attention of prompts in FP8" in warning for warning in plan.warnings) is needed


@pytest.mark.parametrize("name", ["linear", "yarn", "dynamic", "llama3"])
def test_the_builder_is_told_where_the_rotary_table_ends(name: str, tmp_path: Path) -> None:
    original = {"original_max_position_embeddings": 64} if name in {"yarn", "llama3"} else {}
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if name == "llama3" else {}
    rope = {"rope_type": name, "factor": 4.0, **original, **bands}

    plan = planned(tmp_path, "dense", rope_parameters=rope)

    assert plan.build_options == (("--max_seq_len", "256") if name in {"linear", "yarn"} else ())


def test_what_is_not_known_of_a_class_is_said(tmp_path: Path) -> None:
    qwen3 = planned(tmp_path / "3", "dense", architecture="Qwen3ForCausalLM").warnings
    qwen2 = planned(tmp_path / "2", "dense", architecture="Qwen2ForCausalLM").warnings

    assert any("trtllm-build knows Qwen3 is not established" in warning for warning in qwen3)
    assert not any("not established" in warning for warning in qwen2)


def test_the_gpus_of_nvfp4_are_named(tmp_path: Path) -> None:
    assert any("Blackwell" in warning for warning in planned(tmp_path, "nvfp4").warnings)


def test_a_window_of_null_is_none(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=tiny_config("MistralForCausalLM", **SIZES), scheme="dense")
    rewrite_config(tmp_path, lambda config: config.update(sliding_window=None, max_position_embeddings=8192))

    warnings = plan_checkpoint(built.directory, "engine").warnings

    assert not any(warning.startswith("sliding_window") for warning in warnings)


class TestRoundedTensors:
    """What becomes narrower in an engine is announced like every other deviation, with its bound."""

    SCALES = "scales are rounded from float32 to bfloat16: by at most 2^-8 of themselves"
    ZEROS = "zeros, -(zero point) * scale, are rounded to bfloat16: by at most 2^-8 of themselves"

    @pytest.mark.parametrize(
        ("scheme", "scale_dtype", "want"),
        [
            ("int4-g64", torch.float32, SCALES),
            ("int4-g64", torch.bfloat16, ""),
            ("int4-g64-asym", torch.float32, f"{SCALES}; {ZEROS}"),
            ("int4-g64-asym", torch.bfloat16, ZEROS),
            ("int8-channel", torch.float32, SCALES),
            ("int8-channel", torch.float16, SCALES.replace("float32", "float16")),
            ("fp8-channel-token", torch.float32, ""),
            ("w8a8", torch.float32, ""),
            ("nvfp4", None, ""),
            ("fp8-tensor-static", torch.float32, None),
        ],
    )
    def test_scales_and_zeros(
        self, scheme: str, scale_dtype: torch.dtype | None, want: str | None, tmp_path: Path
    ) -> None:
        built = write_checkpoint(tmp_path, config=tiny_config(**SIZES), scheme=scheme, scale_dtype=scale_dtype)

        deviations = {deviation.note for deviation in plan_checkpoint(built.directory, "engine").deviations}

        if want is None:
            (note,) = deviations
            assert note.startswith("qkv has one weight scale")
        else:
            assert deviations == ({want} if want else set())

    def test_in_float16(self, tmp_path: Path) -> None:
        config = tiny_config(**SIZES, dtype="float16")
        built = write_checkpoint(tmp_path, config=config, scheme="int4-g64", scale_dtype=torch.float32)

        (deviation,) = plan_checkpoint(built.directory, "engine").deviations

        assert deviation.note == "scales are rounded from float32 to float16: by at most 2^-11 of themselves"
        assert deviation.modules == 14

    @pytest.mark.parametrize(("scheme", "rounds"), [("int4-g64", False), ("int4-g64-asym", True)])
    def test_zeros_of_a_kernels_order(self, scheme: str, rounds: bool, tmp_path: Path) -> None:
        built = write_checkpoint(tmp_path, config=tiny_config(**SIZES), scheme=scheme)

        plan = plan_checkpoint(built.directory, "engine", sm=90, untested=True)

        assert {deviation.note for deviation in plan.deviations} == ({self.ZEROS} if rounds else set())


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
