"""Linears that the engine's model class cuts by rows get only modes whose tensors can be cut that way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import tiny_config, write_checkpoint
from safetensors.torch import load_file

from trtllm_ct import convert_checkpoint, verify_checkpoint
from trtllm_ct.engine.modes import LINEAR_MODES, ScaleForm
from trtllm_ct.engine.releases import RELEASES, Release
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

CUT = ("model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj")
UNCUT = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")
# The modes of the fused Linears by release; the other Linears have the mode of the newest release that is named.
MODES = {
    "fp8-tensor-static": ("FP8", "FP8", "FP8"),
    "fp8-channel-token": ("dequantized", "dequantized", "FP8_PER_CHANNEL_PER_TOKEN"),
    "fp8-block": ("dequantized", "dequantized", "dequantized"),
    "nvfp4": ("NVFP4 g16", "NVFP4 g16", "NVFP4 g16"),
    "nvfp4a16": ("dequantized", "dequantized", "W4A16_NVFP4 g16"),
    "mxfp8": ("dequantized", "dequantized", "MXFP8 g32"),
    "int4-g64": ("dequantized", "dequantized", "dequantized"),
    "int4-channel": ("dequantized", "dequantized", "dequantized"),
    "int8-channel": ("dequantized", "dequantized", "dequantized"),
    "w8a8": ("dequantized", "dequantized", "dequantized"),
}


def write_phi3(directory: Path, scheme: str) -> None:
    write_checkpoint(directory, config=tiny_config("Phi3ForCausalLM", hidden=128, pad_token_id=0), scheme=scheme)


@pytest.mark.parametrize("to", ["modelopt", "tensorrt_llm"])
@pytest.mark.parametrize(("at", "release"), list(enumerate(RELEASES)))
@pytest.mark.parametrize("scheme", MODES)
def test_the_mode_of_a_fused_linear(tmp_path: Path, scheme: str, at: int, release: Release, to: str) -> None:
    write_phi3(tmp_path, scheme)

    plan = plan_checkpoint(tmp_path, to, engine=release.name)

    assert {plan.module(name).delivered_mode for name in CUT} == {MODES[scheme][at]}
    for name in CUT:
        module = plan.module(name)
        if module.dequantized and plan.module(UNCUT[0]).layer is not None:
            assert "cuts this Linear by rows" in module.reason
            assert str(plan.module(UNCUT[0]).layer.quant_algo) in module.reason
            assert name in plan.quant_config.exclude_modules


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_what_is_cut_has_a_row_of_scales_for_each_row_of_codes(tmp_path: Path, release: Release) -> None:
    for number, scheme in enumerate(MODES):
        write_phi3(tmp_path / str(number), scheme)
        specs = plan_checkpoint(tmp_path / str(number), engine=release.name).delivered_specs
        for name in CUT:
            rows, scale = specs[f"{name}.weight"].shape[0], specs.get(f"{name}.weight_scale")
            assert rows == {CUT[0]: 256, CUT[1]: 256}[name]
            assert scale is None or scale.shape == () or (len(scale.shape) == 2 and scale.shape[0] == rows)


@pytest.mark.parametrize("to", ["dense", "reference"])
def test_other_targets_are_not_affected(tmp_path: Path, to: str) -> None:
    write_phi3(tmp_path, "fp8-channel-token")

    module = plan_checkpoint(tmp_path, to).module(CUT[0])

    assert "cuts" not in module.reason
    assert (module.layer is None) == (to == "dense")


def test_row_scales_are_a_column_only_where_the_class_cuts(tmp_path: Path) -> None:
    write_phi3(tmp_path / "in", "fp8-channel-token")

    convert_checkpoint(tmp_path / "in", tmp_path / "out", engine="stock-1.3")

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(tmp_path / "in" / "model.safetensors")
    for name in CUT:
        assert tensors[f"{name}.weight_scale"].shape == (256, 1)
        assert torch.equal(tensors[f"{name}.weight_scale"], source[f"{name}.weight_scale"].float().reshape(-1, 1))
    for name in UNCUT:
        assert tensors[f"{name}.weight_scale"].dim() == 1
    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").good


@pytest.mark.parametrize("mode", LINEAR_MODES, ids=lambda mode: str(mode.algo))
def test_packed_rows_and_block_scales_are_never_cut(mode: object) -> None:
    for release in RELEASES:
        if mode.packing is not None or mode.scale in {ScaleForm.BLOCK, ScaleForm.GROUP}:
            assert not mode.cut_by_rows(release)
