"""Target `engine`: several modes in one model, of which quant_cfg.json says which Linear has which."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from builders import write_checkpoint
from engine_files import EngineFiles
from engine_sources import with_shared_globals
from tiny_models import tiny_config

from trtllm_ct.base.errors import PlanError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocabulary": 97, "layers": 3}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FOUR = Parallel(tensor=4)
FUSED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
TWO_BY_TWO = Parallel(tensor=2, pipeline=2)


def of_parts(attention: str, mlp: str) -> dict[str, str]:
    return dict.fromkeys(ATTENTION, attention) | dict.fromkeys(MLP, mlp)


@pytest.mark.parametrize("parallel", [FOUR, TWO_BY_TWO], ids=str)
@pytest.mark.parametrize(
    ("attention", "mlp", "algos"),
    [
        ("int4-g128", "fp8-tensor-static", ("W4A16_AWQ", "FP8")),
        ("fp8-tensor-static", "int4-g64", ("FP8", "W4A16_AWQ")),
        ("w8a8-static", "int4-g64", ("W8A8_SQ_PER_CHANNEL", "W4A16_AWQ")),
        ("int4-g64", "w8a8-static", ("W4A16_AWQ", "W8A8_SQ_PER_CHANNEL")),
        ("w8a8-static", "fp8-tensor-static", ("W8A8_SQ_PER_CHANNEL", "FP8")),
    ],
)
def test_each_linear_has_the_weights_of_the_source(
    attention: str, mlp: str, algos: tuple[str, str], parallel: Parallel, tmp_path: Path
) -> None:
    built = write_checkpoint(tmp_path / "source", config=tiny_config(**SIZES), scheme=of_parts(attention, mlp), kv=True)
    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=parallel)

    files = EngineFiles(tmp_path / "out")

    files.check_tensors()
    assert files.cache == "FP8"
    layer = "transformer.layers.0."
    assert [files.block(layer + name)["quant_algo"] for name in ("attention.dense", "mlp.fc")] == [*algos]
    weights = files.weights()
    assert weights.keys() == built.dense.keys()
    for name, want in built.dense.items():
        if not (attention == "fp8-tensor-static" and name.endswith(FUSED)):
            assert bool(((weights[name] - want).abs() <= 1e-6 * want.abs().amax(-1, keepdim=True)).all()), name
    assert verify_checkpoint(built.directory, tmp_path / "out").good


@pytest.mark.parametrize("other", ["int4-g64", "int4-g64-asym", "fp8-tensor-static"])
def test_nvfp4_beside_another_mode_is_verified(other: str, tmp_path: Path) -> None:
    built = write_checkpoint(
        tmp_path / "source", config=tiny_config(**SIZES), scheme=of_parts(other, "nvfp4"), edit=with_shared_globals
    )
    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=Parallel(tensor=2))

    EngineFiles(tmp_path / "out").check_tensors()
    report = verify_checkpoint(built.directory, tmp_path / "out")
    assert report.good, report.faults


def test_the_two_files_have_exactly_these_keys(tmp_path: Path) -> None:
    scheme = of_parts("fp8-tensor-static", "int4-g64") | {"o_proj": "dense"}
    built = write_checkpoint(tmp_path / "source", config=tiny_config(**SIZES | {"layers": 1}), scheme=scheme)
    convert_checkpoint(built.directory, tmp_path / "out", to="engine")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    fp8 = {"quant_algo": "FP8", "group_size": 128, "has_zero_point": False, "pre_quant_scale": False}
    awq = {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True}
    assert config["quantization"] == {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    assert json.loads((tmp_path / "out" / "quant_cfg.json").read_text()) == {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "quantized_layers": {
            "transformer.layers.0.attention.qkv": fp8,
            "transformer.layers.0.mlp.fc": awq,
            "transformer.layers.0.mlp.gate": awq,
            "transformer.layers.0.mlp.proj": awq,
        },
    }


def test_the_form_is_marked_as_derived(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=tiny_config(**SIZES), scheme=of_parts("fp8-tensor-static", "int4-g64"))

    warnings = plan_checkpoint(built.directory, "engine").warnings

    assert any("(derived)" in warning and "MIXED_PRECISION" in warning for warning in warnings)
    assert any("stops with a TypeError for MIXED_PRECISION" in warning for warning in warnings)


def test_a_bias_of_a_plain_linear_is_left_alone_by_the_loader(tmp_path: Path) -> None:
    """It changes the tensors of each Linear by that Linear's own mode."""
    scheme = of_parts("fp8-tensor-static", "int4-g64") | {"o_proj": "dense"}
    config = tiny_config(**SIZES, attention_bias=True, mlp_bias=True)
    built = write_checkpoint(tmp_path / "source", config=config, scheme=scheme)
    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=FOUR)

    weights = EngineFiles(tmp_path / "out").weights()

    for name in (name for name in built.dense if name.endswith(".bias")):
        assert bool(((weights[name] - built.dense[name]).abs() <= 1e-6).all()), name


def faults_of(tmp_path: Path, scheme: dict[str, str], **options: Any) -> list[Any]:
    built = write_checkpoint(tmp_path, config=tiny_config(**SIZES), scheme=scheme)
    with pytest.raises(PlanError) as caught:
        plan_checkpoint(built.directory, "engine", **options)
    return list(caught.value.faults)


@pytest.mark.parametrize("other", ["fp8-channel-token", "w8a8", "int8-channel"])
def test_modes_that_are_set_up_for_the_whole_engine_stand_alone(other: str, tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, of_parts(other, "int4-g64"))

    assert "no mode can be beside it" in fault.expected
    assert "modelopt" in fault.remedy


def test_codes_in_the_order_of_a_kernel_stand_alone(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, of_parts("fp8-tensor-static", "int4-g64"), sm=90, untested=True)

    assert fault.found == "W4A16_GPTQ and FP8"


def test_parts_of_a_fused_linear_have_one_mode(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, of_parts("int4-g64", "int4-g64") | {"v_proj": "fp8-tensor-static"})

    assert {(fault.expected, fault.found) for fault in faults} == {
        ("one mode for all parts of a fused Linear", "W4A16_AWQ and FP8")
    }


def test_one_configuration_serves_all_pipeline_stages(tmp_path: Path) -> None:
    scheme = of_parts("int4-g64", "int4-g64") | {"model.layers.2.mlp.down_proj": "fp8-tensor-static"}

    (fault,) = faults_of(tmp_path, scheme, parallel=Parallel(pipeline=2))

    assert "transformer.layers.0.mlp.proj in one mode in every pipeline stage" in fault.expected
