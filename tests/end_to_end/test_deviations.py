"""What imitators of the format write otherwise, read as it is meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import rewrite, rewrite_config, write_checkpoint

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor


def wrap_in_base_layer(stored: dict[str, Tensor]) -> None:
    for name in [name for name in stored if "_proj." in name]:
        module, _, local = name.rpartition(".")
        stored[f"{module}.base_layer.{local}"] = stored.pop(name)


def drop_weight_shape(stored: dict[str, Tensor]) -> None:
    for name in [name for name in stored if name.endswith("weight_shape")]:
        del stored[name]


def int32_weight_shape(stored: dict[str, Tensor]) -> None:
    for name in [name for name in stored if name.endswith("weight_shape")]:
        stored[name] = stored[name].to(torch.int32)


def stray_input_scale(stored: dict[str, Tensor]) -> None:
    stored["model.layers.0.self_attn.q_proj.input_scale"] = torch.ones(1)


@pytest.mark.parametrize("edit", [wrap_in_base_layer, drop_weight_shape, int32_weight_shape, stray_input_scale])
@pytest.mark.parametrize("target", ["modelopt", "dense"])
def test_the_weights_are_those_of_the_regular_checkpoint(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], target: str
) -> None:
    built = write_checkpoint(tmp_path / "source", scheme="int4-g64")
    convert_checkpoint(built.directory, tmp_path / "regular", to=target)
    rewrite(built.directory, edit)

    convert_checkpoint(built.directory, tmp_path / "out", to=target)

    assert verify_checkpoint(built.directory, tmp_path / "out").good
    written, regular = (tmp_path / name / "model.safetensors" for name in ("out", "regular"))
    assert written.read_bytes() == regular.read_bytes()


@pytest.mark.parametrize("ignore", [None, []])
def test_ignore_may_be_empty_or_null(tmp_path: Path, ignore: list[str] | None) -> None:
    """lm_head is stored plain, and that decides."""
    built = write_checkpoint(tmp_path / "source", scheme="int4-g64")

    def edit(config: dict[str, dict[str, object]]) -> None:
        config["quantization_config"]["ignore"] = ignore

    rewrite_config(built.directory, edit)

    assert verify_checkpoint(built.directory).good


def test_a_quantized_cache_beside_plain_modules_is_left_to_the_user(tmp_path: Path) -> None:
    """hf_quant_config.json can't say it, so nothing is delivered that stock would silently not use."""
    built = write_checkpoint(tmp_path / "source", scheme="int4-g32", kv=True)

    report = convert_checkpoint(built.directory, tmp_path / "out")

    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert not [name for name in report.plan.delivered_specs if name.endswith(("k_scale", "v_scale"))]
    assert any("KvCacheConfig(dtype='fp8')" in warning for warning in report.plan.warnings)
    assert verify_checkpoint(built.directory, tmp_path / "out").good


def test_the_reference_engine_takes_a_quantized_cache_alone(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", scheme="int4-g32", kv=True)

    assert plan_checkpoint(built.directory, "reference").quant_config.kv_cache_quant_algo == "FP8"
