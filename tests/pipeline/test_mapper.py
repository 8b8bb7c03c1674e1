"""Delivered tensors, decoded by the engine's rules, have the values that the builder gave the stored tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import oracles
import pytest
import torch
from builders import tiny_config, write_checkpoint

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.pipeline.weight_mapper import CompressedTensorsWeightMapper

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LAYER = "model.layers.0"
FUSED, ALONE = f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"
F32, BF16, U8, I8, FP8 = torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.float8_e4m3fn

Delivered = dict[str, tuple[torch.dtype, tuple[int, ...]]]

# What the engine's Linear reads for a weight of (N, K) = (32, 256), beside `pre_quant_scale`.
LINEARS: dict[str, tuple[str, Delivered]] = {
    "int4-g128": ("W4A16_AWQ", {"weight": (U8, (16, 256)), "weight_scale": (F32, (32, 2))}),
    "int4-g64": ("W4A16_AWQ", {"weight": (U8, (16, 256)), "weight_scale": (F32, (32, 4))}),
    "int4-plain-g64": ("W4A16_AWQ", {"weight": (U8, (16, 256)), "weight_scale": (F32, (32, 4))}),
    "int4-g128-asym": (
        "W4A16_GPTQ",
        {"weight": (U8, (16, 256)), "weight_scale": (F32, (32, 2)), "weight_zero": (F32, (32, 2))},
    ),
    "int4-g64-asym": (
        "W4A16_GPTQ",
        {"weight": (U8, (16, 256)), "weight_scale": (F32, (32, 4)), "weight_zero": (F32, (32, 4))},
    ),
    "int4-channel": ("W4A16", {"weight": (U8, (16, 256)), "weight_scale": (F32, (32,))}),
    "int4-tensor": ("W4A16", {"weight": (U8, (16, 256)), "weight_scale": (F32, (32,))}),
    "int8-channel": ("W8A16", {"weight": (I8, (32, 256)), "weight_scale": (F32, (32,))}),
    "int8-plain-channel": ("W8A16", {"weight": (I8, (32, 256)), "weight_scale": (F32, (32,))}),
    "fp8-tensor-static": (
        "FP8",
        {"weight": (FP8, (32, 256)), "weight_scale": (F32, ()), "input_scale": (F32, ())},
    ),
    "fp8-channel-token": (
        "FP8_PER_CHANNEL_PER_TOKEN",
        {"weight": (FP8, (32, 256)), "weight_scale": (F32, (32,))},
    ),
    "fp8-block": ("FP8_BLOCK_SCALES", {"weight": (FP8, (32, 256)), "weight_scale": (F32, (1, 2))}),
    "nvfp4": (
        "NVFP4",
        {
            "weight": (U8, (32, 128)),
            "weight_scale": (FP8, (32, 16)),
            "weight_scale_2": (F32, ()),
            "input_scale": (F32, ()),
        },
    ),
    "nvfp4a16": (
        "W4A16_NVFP4",
        {"weight": (U8, (32, 128)), "weight_scale": (FP8, (32, 16)), "weight_scale_2": (F32, ())},
    ),
    "mxfp8": ("MXFP8", {"weight": (FP8, (32, 256)), "weight_scale": (U8, (32, 8))}),
    "int4-g32": ("plain", {"weight": (BF16, (32, 256))}),
    "int4-g32-asym": ("plain", {"weight": (BF16, (32, 256))}),
    "int8-g32": ("plain", {"weight": (BF16, (32, 256))}),
    "int8-plain-g32": ("plain", {"weight": (BF16, (32, 256))}),
    "int8-channel-asym": ("plain", {"weight": (BF16, (32, 256))}),
    "int8-plain-channel-asym": ("plain", {"weight": (BF16, (32, 256))}),
}
LINEARS |= dict.fromkeys(("w8a8", "w8a8-static", "int8-plain-tensor", "int6-channel"), LINEARS["int8-channel"])
LINEARS |= dict.fromkeys(("fp8-tensor-token", "fp8-channel-static"), LINEARS["fp8-channel-token"])
LINEARS |= dict.fromkeys(("w4afp8", "int3-g64"), LINEARS["int4-g64"])
LINEARS |= dict.fromkeys(("w4a8", "int2-channel"), LINEARS["int4-channel"])
LINEARS |= dict.fromkeys(
    ("int4-g64-actorder", "fp8-weight-only", "mxfp4", "mxfp4a16", "mxfp6a8", "mxfp8a16"), LINEARS["int4-g32"]
)
NARROW = tiny_config(layers=1, hidden=32, heads=2, intermediate=256, vocabulary=16)
CONFIG = tiny_config(layers=1, hidden=128, intermediate=256, vocabulary=16)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def engine_value(tensors: dict[str, Tensor]) -> Tensor:
    """The weight that a Linear computes with, float64: code * scale + zero."""
    weight, scale = tensors["weight"], tensors.get("weight_scale")
    if scale is None:
        return weight.double()
    codes = weight.double()
    if "weight_scale_2" in tensors:
        codes = E2M1[torch.stack([weight % 16, weight >> 4], dim=2).flatten(1).long()]
        scale = scale.double() * tensors["weight_scale_2"].double()
    elif scale.dtype is U8:
        scale = torch.exp2(scale.double() - 127)
    elif weight.dtype is U8:
        low, high = weight.double() % 16, torch.div(weight, 16, rounding_mode="floor").double()
        nibbles = torch.stack([low, high], dim=1).reshape(-1, weight.shape[1])
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
    shape = (codes.shape[0], codes.shape[1])
    grid = scale.reshape(-1, 1) if scale.dim() == 1 else scale.reshape(-1, scale.shape[-1] if scale.dim() else 1)
    value = codes * oracles.repeat_scale(grid, shape)
    if "weight_zero" in tensors:
        value += oracles.repeat_scale(tensors["weight_zero"], shape)
    return value * tensors.get("pre_quant_scale", torch.ones(1)).double()


def local(tensors: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("scheme", "algo", "delivered"), [(name, *row) for name, row in LINEARS.items()])
def test_every_scheme_is_delivered_exactly(
    scheme: str, algo: str, delivered: Delivered, scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    """Names, dtypes and shapes are the engine's, values are the checkpoint's, and stored tensors are not changed."""
    built = write_checkpoint(tmp_path, config=NARROW, scheme={ALONE: scheme}, scale_dtype=scale_dtype)
    before = {name: tensor.clone() for name, tensor in built.stored.items()}
    plan = plan_checkpoint(tmp_path, "reference")
    module = plan.module(ALONE)
    assert (str(module.layer.quant_algo) if module.layer else "plain") == algo
    got = local(
        CompressedTensorsWeightMapper().map_module(module, {name: built.stored[name] for name in module.reads}), ALONE
    )
    expected = delivered | ({"pre_quant_scale": (BF16, (256,))} if algo == "W4A16_AWQ" else {})
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in got.items()} == expected
    assert all(tensor.is_contiguous() for tensor in got.values())
    want = built.dense[f"{ALONE}.weight"]
    if algo == "plain":
        want = oracles.round_once(want, torch.bfloat16)
        assert torch.equal(engine_value(got), want)
    else:
        # Only the product of a float32 scale and a zero point is rounded, to float32, and the inverse of a divisor.
        assert (engine_value(got) - want).abs().max() <= 1e-6 * want.abs().max()
        if scale_dtype is not torch.float32 and "weight_scale_2" not in got:
            assert torch.equal(engine_value(got), want)
    assert all(torch.equal(built.stored[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("module", [FUSED, ALONE], ids=["fused", "alone"])
def test_only_linears_that_are_not_fused_get_a_pre_quant_scale(module: str, tmp_path: Path) -> None:
    """The engine requires it for these and never reads it for q/k/v and gate/up."""
    built = write_checkpoint(tmp_path, config=CONFIG, scheme="int4-g64")
    plan = plan_checkpoint(tmp_path)
    got = CompressedTensorsWeightMapper().map_weights(plan, built.stored)
    assert (f"{module}.pre_quant_scale" in got) is (module == ALONE)


@pytest.mark.parametrize("scheme", ["fp8-tensor-static", "fp8-channel-token", "int8-plain-channel"])
def test_codes_that_fit_are_neither_read_nor_copied(scheme: str, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=CONFIG, scheme=scheme)
    got = CompressedTensorsWeightMapper().map_weights(plan_checkpoint(tmp_path), built.stored)
    for name in (f"{ALONE}.weight", "model.norm.weight", "lm_head.weight"):
        assert got[name].data_ptr() == built.stored[name].data_ptr()


def test_a_fused_group_of_different_scales_gets_one_mode_without_loss(tmp_path: Path) -> None:
    names = {f"{LAYER}.self_attn.{leaf}_proj": scheme for leaf, scheme in (("q", "int4-g64"), ("k", "int4-g128"))}
    built = write_checkpoint(tmp_path, config=CONFIG, scheme=names | {f"{LAYER}.self_attn.v_proj": "int4-channel"})
    plan = plan_checkpoint(tmp_path)
    assert {plan.module(f"{LAYER}.self_attn.{leaf}_proj").delivered_mode for leaf in "qkv"} == {"W4A16_AWQ g64"}
    for leaf in "qkv":
        module = plan.module(f"{LAYER}.self_attn.{leaf}_proj")
        stored = {name: built.stored[name] for name in module.reads}
        got = local(CompressedTensorsWeightMapper().map_module(module, stored), module.name)
        assert torch.equal(engine_value(got), built.dense[f"{module.name}.weight"])


def test_kv_scales_are_delivered_unchanged_in_the_projections(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=CONFIG, scheme="fp8-tensor-static", kv=True)
    got = CompressedTensorsWeightMapper().map_weights(plan_checkpoint(tmp_path), built.stored)
    for letter in "kv":
        delivered = got[f"{LAYER}.self_attn.{letter}_proj.{letter}_scale"]
        assert (delivered.dtype, tuple(delivered.shape)) == (F32, ())
        assert delivered == built.stored[f"{LAYER}.self_attn.{letter}_scale"]


@pytest.mark.parametrize("target", ["modelopt", "dense", "reference"])
def test_a_plan_delivers_the_specs_that_it_promised(target: str, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=CONFIG, scheme="int4-g64-asym")
    plan = plan_checkpoint(tmp_path, target)
    got = CompressedTensorsWeightMapper().map_weights(plan, built.stored)
    specs = {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in got.items()}
    assert specs == plan.delivered_specs


def test_a_tensor_that_contradicts_the_plan_is_never_delivered(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=CONFIG, scheme="int4-g64")
    module = plan_checkpoint(tmp_path).module("model.norm")
    (delivery,) = module.deliveries
    lying = delivery._replace(operation=replace(delivery.operation, result=TensorSpec(DType.F32, (128,))))
    with pytest.raises(AssertionError, match=r"model.norm.weight: the plan promised float32 \[128\], copy gave"):
        CompressedTensorsWeightMapper().map_module(replace(module, deliveries=(lying,)), built.stored)
