"""What target `engine` can't hold is refused before anything is written, with the target that serves it instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite_config, write_checkpoint
from tiny_models import tiny_config

from trtllm_ct.base.errors import PlanError, UsageError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import ONE_RANK, Parallel
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.base.errors import Fault

SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocabulary": 64, "layers": 2}
LINEARS = 14
CONSENT = "--i-know-this-is-untested"
ON_PYTORCH = "Convert with --to modelopt: it serves these modules with their codes"
DEQUANTIZED = "Convert with --to dense, or with --to modelopt, which dequantizes"


def faults_of(
    directory: Path,
    scheme: str | Mapping[str, str],
    *,
    architecture: str = "LlamaForCausalLM",
    parallel: Parallel = ONE_RANK,
    edit: Callable[[dict[str, Tensor]], object] | None = None,
    sm: int | None = None,
    untested: bool = False,
    **more: Any,
) -> list[Fault]:
    built = write_checkpoint(directory, config=tiny_config(architecture, **SIZES | more), scheme=scheme, edit=edit)
    with pytest.raises(PlanError) as caught:
        plan_checkpoint(built.directory, "engine", parallel=parallel, sm=sm, untested=untested)
    return list(caught.value.faults)


@pytest.mark.parametrize(
    ("scheme", "reason", "remedy"),
    [
        ("fp8-block", "the quantization pass has no layer for FP8_BLOCK_SCALES", ON_PYTORCH),
        ("mxfp4", "engines have no MX mode", DEQUANTIZED),
        ("mxfp4a16", "engines have no MX mode", DEQUANTIZED),
        ("mxfp6a8", "engines have no MX mode", DEQUANTIZED),
        ("mxfp8", "engines have no MX mode", DEQUANTIZED),
        ("int4-g32", "groups of 64 and 128 columns only", DEQUANTIZED),
        ("int4-g16", "groups of 64 and 128 columns only", DEQUANTIZED),
        ("int4-g32-asym", "groups of 64 and 128 columns only", DEQUANTIZED),
        ("int4-g64-actorder", "no kernel of engines has a group index", DEQUANTIZED),
        ("int8-g32", "groups of 64 and 128 columns only", DEQUANTIZED),
        ("int8-g64", "W8A16_GPTQ only: its files serve one generation of GPUs", DEQUANTIZED),
        ("int8-channel-asym", "and need --sm and --i-know-this-is-untested", DEQUANTIZED),
        ("w8a8-static-asym", "no layer of the engine computes with such weights on int8 tensor asymmetric", ON_PYTORCH),
        ("w4a8", "W4A8_AWQ needs a static scale of the input", ON_PYTORCH),
        ("w4afp8", "W4A8_AWQ needs a static scale of the input", ON_PYTORCH),
        ("fp8-weight-only", "no layer of the engine computes with such weights on 16-bit inputs", DEQUANTIZED),
        ("fp8-channel-static", "no layer of the engine computes with such weights on fp8 tensor inputs", ON_PYTORCH),
        ("nvfp4a16", "NVFP4 Linears of engines need a static input_global_scale", DEQUANTIZED),
    ],
)
def test_a_scheme_without_a_form_in_engines(scheme: str, reason: str, remedy: str, tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, scheme)

    assert fault.where == f"model.layers.0.self_attn.q_proj and {LINEARS - 1} more"
    assert reason in fault.found
    assert fault.remedy.startswith(remedy)


@pytest.mark.parametrize("scheme", ["fp8-channel-token", "w8a8"])
def test_modes_that_replace_the_attention_of_qwen3(scheme: str, tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, scheme, architecture="Qwen3ForCausalLM")

    assert fault.where == "model.layers.0.self_attn.q_norm and 3 more"
    assert "norms of queries and keys" in fault.found


@pytest.mark.parametrize("scheme", ["fp8-channel-token", "w8a8"])
def test_single_plain_linears_beside_modes_that_replace_whole_modules(scheme: str, tmp_path: Path) -> None:
    quantized = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")

    (fault,) = faults_of(tmp_path, dict.fromkeys(quantized, scheme))

    assert fault.where == "model.layers.0.self_attn.o_proj and 1 more"
    assert "replaces whole attention and MLP modules" in fault.found


def test_a_mode_that_replaces_whole_modules_beside_another(tmp_path: Path) -> None:
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "fp8-channel-token")
    mlp = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g128")

    (fault,) = faults_of(tmp_path, attention | mlp)

    assert "FP8_PER_CHANNEL_PER_TOKEN alone: it replaces whole modules" in fault.expected
    assert fault.found == "W4A16_AWQ and FP8_PER_CHANNEL_PER_TOKEN"
    assert fault.remedy.startswith(ON_PYTORCH)


def test_all_reasons_come_at_once(tmp_path: Path) -> None:
    scheme = {"o_proj": "int4-g32", "down_proj": "fp8-block", "up_proj": "mxfp8"}

    faults = faults_of(tmp_path, scheme, hidden_act="gelu", rope_parameters={"rope_type": "longrope", "factor": 2.0})

    assert [fault.where for fault in faults] == [
        "model.layers.0.self_attn.o_proj and 1 more",
        "model.layers.0.mlp.up_proj and 1 more",
        "model.layers.0.mlp.down_proj and 1 more",
        "config.json: rope_type",
        "config.json: hidden_act",
    ]


@pytest.mark.parametrize("scheme", ["int4-g128", "int8-channel"])
def test_sizes_that_the_layers_of_the_engine_would_pad(scheme: str, tmp_path: Path) -> None:
    faults = faults_of(tmp_path, scheme, parallel=Parallel(tensor=4), intermediate=384)

    assert {fault.expected for fault in faults} <= {
        f"sizes that the layers of {algo} have without padding" for algo in ("W4A16_AWQ", "W8A16")
    }
    assert any(
        "384 rows in all ranks together, no multiple of 256 (tensor parallel 4)" in fault.found for fault in faults
    )


def test_nvfp4_parts_of_qkv_without_a_common_scale(tmp_path: Path) -> None:
    def unequal(stored: dict[str, Tensor]) -> None:
        for name, tensor in stored.items():
            if name.endswith(("k_proj.weight_global_scale", "up_proj.weight_global_scale")):
                stored[name] = tensor * 1.3

    faults = faults_of(tmp_path, "nvfp4", edit=unequal)

    assert faults
    assert all("the parts of qkv_proj share no scalar: weight_global_scale" in fault.found for fault in faults)


def test_nvfp4_columns_that_ranks_divide_within_a_group(tmp_path: Path) -> None:
    """352 columns are 22 groups of 16: two ranks have eleven each, and four can't divide them."""
    faults = faults_of(tmp_path, "nvfp4", parallel=Parallel(tensor=4), intermediate=352)

    assert any("352 columns, no multiple of 64" in fault.found for fault in faults)


@pytest.mark.parametrize("scheme", ["fp8-tensor-static", "w8a8-static", "nvfp4"])
def test_a_static_input_scale_that_is_not_there(scheme: str, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj." + ("input_global_scale" if scheme == "nvfp4" else "input_scale")

    faults = faults_of(tmp_path, scheme, edit=lambda stored: stored.pop(name))

    assert [fault.where for fault in faults] == [name]
    assert "the static scale of the module's input" in faults[0].expected


@pytest.mark.parametrize("key", ["max_position_embeddings", "num_experts_per_tok"])
def test_a_number_that_engines_need_and_that_is_none(key: str, tmp_path: Path) -> None:
    faults = faults_of(tmp_path, "dense", architecture="MixtralForCausalLM", **{key: 0})

    assert [(fault.where, fault.expected) for fault in faults] == [(f"config.json: {key}", "a positive integer")]


def test_a_negative_epsilon(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, "dense", rms_norm_eps=-1e-6)

    assert fault.where == "config.json: rms_norm_eps"


def test_heads_that_ranks_can_not_share(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, "dense", parallel=Parallel(tensor=3))

    assert {"config.json: num_attention_heads", "config.json: num_key_value_heads"} <= {fault.where for fault in faults}


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Phi3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_classes_whose_names_in_engines_are_not_known(architecture: str, tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, "dense", architecture=architecture)

    assert (fault.where, fault.found) == ("config.json: architectures", architecture)


def test_a_bias_that_the_class_of_the_engine_leaves_out(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, "dense", architecture="Qwen3ForCausalLM", attention_bias=True)

    assert {fault.where.rpartition(".")[0].rpartition(".")[2] for fault in faults} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip


class TestQuantizedMixtures:
    """Mixtral is written with dense tensors, whatever its scheme: a deviation of each module, which may be refused."""

    SCHEMES = ("int4-g64", "int4-g32", "fp8-tensor-static", "fp8-channel-token", "fp8-block", "w8a8", "nvfp4")
    REASON = "this target writes models with experts as dense tensors, attention included"
    LINEARS = 2 * (4 + 4 * 3)

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_every_module_is_a_deviation(self, scheme: str, tmp_path: Path) -> None:
        built = write_checkpoint(tmp_path, config=tiny_config("MixtralForCausalLM", **SIZES), scheme=scheme)

        plan = plan_checkpoint(built.directory, "engine")

        assert plan.build_config is not None
        assert plan.build_config["quantization"]["quant_algo"] is None
        assert [module.reason for module in plan.modules if module.scheme is not None] == [self.REASON] * self.LINEARS

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_strict_refuses_each_of_them_before_anything_is_written(self, scheme: str, tmp_path: Path) -> None:
        config = tiny_config("MixtralForCausalLM", **SIZES)
        built = write_checkpoint(tmp_path / "source", config=config, scheme=scheme)

        with pytest.raises(PlanError) as caught:
            convert_checkpoint(built.directory, tmp_path / "out", to="engine", strict=True)

        assert len(caught.value.faults) == self.LINEARS
        assert all(self.REASON in fault.found for fault in caught.value.faults)
        assert not (tmp_path / "out").exists()


class TestBiasesThatTheLoaderZeroes:
    """W4A16_AWQ adds them in the kernel; the loader zeroes those of plain Linears too, which are added afterwards."""

    SCHEME = dict.fromkeys([f"{part}_proj" for part in ("q", "k", "v", "gate", "up", "down")], "int4-g64")

    def test_a_plain_linear_with_such_a_bias(self, tmp_path: Path) -> None:
        (fault,) = faults_of(tmp_path, self.SCHEME, parallel=Parallel(tensor=2), attention_bias=True)

        assert fault.where == "model.layers.0.self_attn.o_proj.bias and 1 more"
        assert "the loader sets it to zero on all ranks but the first" in fault.found

    def test_one_rank_has_all_of_it(self, tmp_path: Path) -> None:
        config = tiny_config(**SIZES, attention_bias=True)
        built = write_checkpoint(tmp_path, config=config, scheme=self.SCHEME)

        assert plan_checkpoint(built.directory, "engine").build_config is not None


def test_plain_linears_that_differ_between_pipeline_stages(tmp_path: Path) -> None:
    names = [f"{part}_proj" for part in ("q", "k", "v", "gate", "up", "down")]
    scheme = dict.fromkeys(names, "int4-g64") | {"model.layers.1.self_attn.o_proj": "int4-g64"}

    (fault,) = faults_of(tmp_path, scheme, parallel=Parallel(pipeline=2))

    assert fault.where == "model.layers.0.self_attn.o_proj"
    assert "transformer.layers.0.attention.dense plain in every pipeline stage" in fault.expected


def test_a_quantized_cache_without_stored_scales(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=tiny_config(**SIZES), scheme="dense", kv=True, edit=_without_cache_scales)
    rewrite_config(
        built.directory, lambda config: config["quantization_config"]["kv_cache_scheme"].update(dynamic=True)
    )

    with pytest.raises(PlanError, match=r"kv_cache_scheme: expected stored scales of the FP8 cache .* in layer 0, 1"):
        plan_checkpoint(built.directory, "engine")


def _without_cache_scales(stored: dict[str, Tensor]) -> None:
    for name in [name for name in stored if name.endswith(("k_scale", "v_scale"))]:
        del stored[name]


class TestAllAtOnce:
    """What is refused of sizes, options and the cache doesn't hide what is refused of schemes, nor the other way."""

    def faults(self, tmp_path: Path, *, cache: dict[str, Any] | None = None, **options: Any) -> list[str]:
        edit = _without_cache_scales if cache and cache.get("dynamic") else None
        config = tiny_config(**SIZES)
        write_checkpoint(tmp_path, config=config, scheme="fp8-block", kv=cache is not None, edit=edit)
        rewrite_config(
            tmp_path, lambda config: cache and config["quantization_config"]["kv_cache_scheme"].update(cache)
        )
        with pytest.raises(PlanError) as caught:
            plan_checkpoint(tmp_path, "engine", **options)
        return [fault.where for fault in caught.value.faults]

    BLOCKS = "model.layers.0.self_attn.q_proj and 13 more"

    def test_a_cache_with_zero_points(self, tmp_path: Path) -> None:
        assert self.faults(tmp_path, cache={"symmetric": False}) == ["kv_cache_scheme", self.BLOCKS]

    def test_a_cache_without_scales(self, tmp_path: Path) -> None:
        cache = {"dynamic": True, "strategy": "token"}
        assert self.faults(tmp_path, cache=cache) == [self.BLOCKS, "kv_cache_scheme"]

    def test_expert_parallelism(self, tmp_path: Path) -> None:
        assert self.faults(tmp_path, parallel=Parallel(tensor=2, expert=2)) == ["--ep", self.BLOCKS]

    def test_an_option_of_the_other_backend(self, tmp_path: Path) -> None:
        assert self.faults(tmp_path, dense_o_proj=True) == ["--dense-o-proj", self.BLOCKS]

    def test_all_of_these(self, tmp_path: Path) -> None:
        cache = {"dynamic": True, "strategy": "token", "symmetric": False}
        options = {"dense_o_proj": True, "parallel": Parallel(tensor=2, expert=2)}

        faults = self.faults(tmp_path, cache=cache, **options)

        assert faults == ["--ep", "--dense-o-proj", "kv_cache_scheme", self.BLOCKS, "kv_cache_scheme"]

    def test_scales_of_one_layer_and_a_lost_projection(self, tmp_path: Path) -> None:
        """The scales of layer 0 are stored: only its projection is lost."""

        def edit(stored: dict[str, Tensor]) -> None:
            for name in [name for name in stored if name.startswith("model.layers.1") and "_scale" in name]:
                if name.endswith(("k_scale", "v_scale")):
                    del stored[name]
            del stored["model.layers.0.self_attn.k_proj.weight"]

        built = write_checkpoint(tmp_path, config=tiny_config(**SIZES), scheme="fp8-tensor-static", kv=True, edit=edit)
        cache = {"dynamic": True, "strategy": "token"}
        rewrite_config(tmp_path, lambda config: config["quantization_config"]["kv_cache_scheme"].update(cache))

        with pytest.raises(PlanError) as caught:
            plan_checkpoint(built.directory, "engine")

        found = {fault.where: fault.found for fault in caught.value.faults}
        assert found["kv_cache_scheme"] == "none in layer 1"
        assert any("layers.0.self_attn.k_proj" in where for where in found)


class TestConsent:
    """Codes in the order of a kernel are written only for an SM whose order is described, and only on request."""

    @pytest.mark.parametrize("sm", [None, 70, 86, 100, 103, 120])
    def test_another_sm_is_refused_before_anything_is_written(self, sm: int | None, tmp_path: Path) -> None:
        built = write_checkpoint(tmp_path / "source", config=tiny_config(**SIZES), scheme="int4-g64")

        with pytest.raises(UsageError, match=r"--sm: expected 80 or 89 or 90"):
            convert_checkpoint(built.directory, tmp_path / "out", to="engine", sm=sm, untested=True)

        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("target", ["modelopt", "dense", "tensorrt_llm", "reference"])
    def test_another_target_is_refused(self, target: str, tmp_path: Path) -> None:
        built = write_checkpoint(tmp_path, config=tiny_config(**SIZES), scheme="int4-g64")

        with pytest.raises(UsageError, match=f"--to with {CONSENT}: expected engine"):
            plan_checkpoint(built.directory, target, sm=90, untested=True)

    @pytest.mark.parametrize("sm", [80, 90])
    @pytest.mark.parametrize(
        ("scheme", "reason"),
        [
            ("int4-g32", "groups of 64 and 128 columns only"),
            ("int8-g32", "groups of 64 and 128 columns only"),
            ("int4-g64-actorder", "no kernel of engines has a group index"),
            ("w4afp8", "W4A8_AWQ needs a static scale of the input"),
        ],
    )
    def test_what_no_kernel_holds_stays_refused(self, scheme: str, reason: str, sm: int, tmp_path: Path) -> None:
        (fault,) = faults_of(tmp_path, scheme, sm=sm, untested=True)

        assert reason in fault.found

    def test_rows_that_ranks_divide_within_a_bundle(self, tmp_path: Path) -> None:
        """A bundle of four rows is one piece of the file; ranks and parts of qkv must have whole ones."""
        sizes = {"hidden": 192, "heads": 30, "kv_heads": 1, "head_dim": 6}
        scheme = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "int4-g64")

        (fault,) = faults_of(tmp_path, scheme, sm=80, untested=True, **sizes)

        assert fault.found == "6 rows on each rank, no multiple of 4"
        assert plan_checkpoint(tmp_path, "engine", sm=90, untested=True).build_config is not None


def test_expert_parallelism(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, "dense", architecture="MixtralForCausalLM", parallel=Parallel(tensor=2, expert=2))

    assert [fault.where for fault in faults] == ["--ep"]


def test_a_float32_model_needs_a_dtype(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, "dense", dtype="float32")

    assert (fault.where, fault.found) == ("config.json: dtype", "float32")


@pytest.mark.parametrize(
    ("schemes", "found"),
    [
        ({"gate_proj": "fp8-tensor-static", "o_proj": "fp8-tensor-static"}, "FP8 and a plain Linear"),
        ({"up_proj": "w8a8-static", "o_proj": "w8a8-static"}, "a plain Linear and W8A8_SQ_PER_CHANNEL"),
        ({"gate_proj": "fp8-tensor-static", "up_proj": "int4-g64"}, "FP8 and W4A16_AWQ"),
    ],
)
def test_gate_and_up_in_different_modes(schemes: dict[str, str], found: str, tmp_path: Path) -> None:
    """The builder joins them by the mode of the first alone: codes would become numbers without a scale."""
    faults = faults_of(tmp_path, schemes)

    assert [fault.found for fault in faults] == [found] * 2
    assert {fault.expected for fault in faults} == {"gate_proj and up_proj in one mode, since trtllm-build joins them"}


def test_other_refusals_come_with_a_scheme_without_a_form(tmp_path: Path) -> None:
    """Qwen3's norms of heads, which row-wise modes leave out, beside blocks, which no mode holds."""
    schemes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "fp8-channel-token")
    faults = faults_of(tmp_path, schemes | {"o_proj": "fp8-block"}, architecture="Qwen3ForCausalLM", head_dim=64)

    found = " / ".join(fault.found for fault in faults)
    assert "FP8_BLOCK_SCALES" in found
    assert "norms of queries and keys" in found


def test_a_cache_with_zero_points(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=tiny_config(**SIZES), scheme="int8-channel", kv=True)
    scheme = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    rewrite_config(tmp_path, lambda config: config["quantization_config"].update(kv_cache_scheme=scheme))

    with pytest.raises(PlanError) as caught:
        plan_checkpoint(built.directory, "engine")

    assert "a symmetric KV cache" in caught.value.faults[0].expected
