from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from trtllm_ct.base.errors import PlanError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.quant_config import LayerQuantConfig
from trtllm_ct.reference.activations import (
    quantize_mxfp8,
    quantize_nvfp4,
    quantize_per_block,
    quantize_per_tensor,
    quantize_per_token,
)
from trtllm_ct.reference.linear import ReferenceLinear
from trtllm_ct.reference.linear_layouts import LAYOUTS, unpack_row_pairs

AWQ = LayerQuantConfig(quant_algo=QuantAlgo.W4A16_AWQ, group_size=8)
GPTQ = LayerQuantConfig(quant_algo=QuantAlgo.W4A16_GPTQ, group_size=8, has_zero_point=True)
CODES = torch.tensor(
    [
        [-8, -7, -6, -5, -4, -3, -2, -1],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [7, -8, 0, 1, -1, 2, -2, 3],
        [1, 1, 1, 1, -1, -1, -1, -1],
    ],
    dtype=torch.int8,
)
ROW_PAIRS = torch.tensor(
    [
        [0x08, 0x19, 0x2A, 0x3B, 0x4C, 0x5D, 0x6E, 0x7F],
        [0x17, 0x18, 0x10, 0x11, 0xFF, 0xF2, 0xFE, 0xF3],
    ],
    dtype=torch.uint8,
)

SHAPE = (6, 64)
ONLY_IN_ENGINES = {
    QuantAlgo.W8A8_SQ_PER_CHANNEL,
    QuantAlgo.W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN,
    QuantAlgo.W8A16_GPTQ,
}
"""Modes of engine-build checkpoints: the PyTorch backend has no such Linears."""

RandomLinear = Callable[..., tuple[LayerQuantConfig, dict[str, Tensor]]]
Decode = Callable[[QuantAlgo, dict[str, Tensor]], Tensor]


def build(
    tensors: dict[str, Tensor], layer: LayerQuantConfig, shape: tuple[int, int], **options: Any
) -> ReferenceLinear:
    return ReferenceLinear(
        tensors, layer=layer, out_features=shape[0], in_features=shape[1], name="layers.3.mlp.down_proj", **options
    )


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("container", [torch.uint8, torch.int8])
def test_row_pairs_have_the_even_row_in_the_low_nibble(container: torch.dtype) -> None:
    assert torch.equal(CODES, unpack_row_pairs(ROW_PAIRS.view(container)))


def test_an_additive_zero_equals_a_zero_point_times_the_scale() -> None:
    """(code - zero point) * scale == code * scale + weight_zero, with numbers worked out by hand."""
    zero_points = torch.tensor([[3.0], [-8.0], [0.0], [7.0]])
    scale = torch.tensor([[0.5], [0.25], [1.0], [2.0]])
    weight_zero = torch.tensor([[-1.5], [2.0], [0.0], [-14.0]])

    module = build({"weight": ROW_PAIRS, "weight_scale": scale, "weight_zero": weight_zero}, GPTQ, (4, 8))

    assert torch.equal((CODES - zero_points) * scale, module.dequantized_weight(torch.float32))


def test_the_table_has_every_algorithm_of_a_single_module() -> None:
    assert set(LAYOUTS) == set(QuantAlgo) - {QuantAlgo.MIXED_PRECISION} - ONLY_IN_ENGINES


@pytest.mark.parametrize("algo", LAYOUTS)
def test_weights_equal_the_slow_decoder(algo: QuantAlgo, random_linear: RandomLinear, decode_slowly: Decode) -> None:
    layer, tensors = random_linear(algo, *SHAPE)

    module = build(tensors, layer, SHAPE)

    want = decode_slowly(algo, tensors)
    assert torch.equal(want, module.dequantized_weight(torch.float64))
    # The error of one float32 multiplication, and for GPTQ of one addition of a number of the same size.
    assert torch.allclose(module.dequantized_weight(torch.float32).double(), want, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("algo", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_are_the_float32_weights_rounded_once(
    algo: QuantAlgo, dtype: torch.dtype, random_linear: RandomLinear
) -> None:
    layer, tensors = random_linear(algo, *SHAPE)
    module = build(tensors, layer, SHAPE)

    assert torch.equal(module.dequantized_weight(torch.float32).to(dtype), module.dequantized_weight(dtype))


@pytest.mark.parametrize("algo", LAYOUTS)
def test_output_is_input_times_weight_plus_bias(
    algo: QuantAlgo, random_linear: RandomLinear, decode_slowly: Decode
) -> None:
    layer, tensors = random_linear(algo, *SHAPE)
    bias = torch.randn(6, dtype=torch.bfloat16)
    x = torch.randn(2, 3, SHAPE[1], dtype=torch.float64)

    module = build(tensors | {"bias": bias}, layer, SHAPE, bias=True, quantize_activations=False)

    scaled = x * tensors.get("pre_quant_scale", torch.ones(SHAPE[1])).double()
    assert torch.allclose(linear(scaled, decode_slowly(algo, tensors), bias.double()), module(x), rtol=1e-12)


@pytest.mark.parametrize(
    ("algo", "quantize"),
    [
        (QuantAlgo.FP8, lambda x, tensors: quantize_per_tensor(x, tensors["input_scale"])),
        (QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN, lambda x, _: quantize_per_token(x)),
        (QuantAlgo.FP8_BLOCK_SCALES, lambda x, _: quantize_per_block(x)),
        (QuantAlgo.NVFP4, lambda x, tensors: quantize_nvfp4(x, tensors["input_scale"])),
        (QuantAlgo.MXFP8, lambda x, _: quantize_mxfp8(x)),
    ],
)
def test_float_inputs_are_quantized_unless_switched_off(
    algo: QuantAlgo, quantize: Callable[[Tensor, dict[str, Tensor]], Tensor], random_linear: RandomLinear
) -> None:
    layer, tensors = random_linear(algo, *SHAPE)
    x = torch.randn(3, SHAPE[1])

    simulated, plain = (build(tensors, layer, SHAPE, quantize_activations=flag) for flag in (True, False))

    assert torch.equal(plain(quantize(x, tensors)), simulated(x))
    assert not torch.equal(plain(x), simulated(x))


def test_fp8_without_input_scale_takes_the_scale_of_the_input(random_linear: RandomLinear) -> None:
    layer, tensors = random_linear(QuantAlgo.FP8, 6, 8)
    del tensors["input_scale"]
    x = torch.randn(3, 8)

    module = build(tensors, layer, (6, 8))

    assert torch.equal(linear(quantize_per_tensor(x, None), module.dequantized_weight(torch.float32)), module(x))


@pytest.mark.parametrize("algo", LAYOUTS)
@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), copy.deepcopy],
    ids=["half", "bfloat16", "double", "deepcopy"],
)
def test_delivered_tensors_outlive_casts(
    algo: QuantAlgo, cast: Callable[[ReferenceLinear], ReferenceLinear], random_linear: RandomLinear
) -> None:
    """A cast of the model does not change codes and scales."""
    layer, tensors = random_linear(algo, *SHAPE)

    state = cast(build(tensors, layer, SHAPE)).state_dict()

    assert list(state) == list(tensors)
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(as_bytes(tensor), as_bytes(state[name]))


def test_delivered_tensors_are_not_copied(random_linear: RandomLinear) -> None:
    layer, tensors = random_linear(QuantAlgo.W4A16_AWQ, 6, 8)

    module = build(tensors, layer, (6, 8))

    assert all(module.get_buffer(name) is tensor for name, tensor in tensors.items())


def test_a_scalar_scale_may_have_an_axis(random_linear: RandomLinear) -> None:
    layer, tensors = random_linear(QuantAlgo.FP8, 6, 8)
    flat = tensors | {"weight_scale": tensors["weight_scale"].reshape(1)}

    scalar, vector = build(tensors, layer, (6, 8)), build(flat, layer, (6, 8))

    assert torch.equal(scalar.dequantized_weight(torch.float32), vector.dequantized_weight(torch.float32))


@pytest.mark.parametrize(
    ("algo", "changes", "where", "found"),
    [
        (QuantAlgo.W4A16_AWQ, {"weight_scale": None}, "", "no weight_scale"),
        (QuantAlgo.W4A16_GPTQ, {"weight_zero": None}, "", "no weight_zero"),
        (QuantAlgo.W4A16_AWQ, {"weight_zero": torch.zeros(6, 2)}, ".weight_zero", "float32 [6, 2]"),
        (QuantAlgo.W8A16, {"bias": torch.zeros(6)}, ".bias", "float32 [6]"),
        (QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN, {"input_scale": torch.ones(())}, ".input_scale", "float32 []"),
        (QuantAlgo.W8A16, {"weight": torch.zeros(6, 8, dtype=torch.uint8)}, ".weight", "uint8 [6, 8]"),
        (QuantAlgo.FP8, {"weight": torch.zeros(6, 8, dtype=torch.int8)}, ".weight", "int8 [6, 8]"),
        (QuantAlgo.FP8, {"weight": torch.zeros(6, 8)}, ".weight", "float32 [6, 8]"),
        (QuantAlgo.W8A16, {"weight_scale": torch.ones(6, dtype=torch.bfloat16)}, ".weight_scale", "bfloat16 [6]"),
        (QuantAlgo.W8A16, {"weight_scale": torch.ones(6, 1)}, ".weight_scale", "float32 [6, 1]"),
        (QuantAlgo.W8A16, {"weight_scale": torch.ones(1)}, ".weight_scale", "float32 [1]"),
        (QuantAlgo.FP8, {"weight_scale": torch.ones(6)}, ".weight_scale", "float32 [6]"),
        (QuantAlgo.W4A16, {"weight": torch.zeros(6, 8, dtype=torch.uint8)}, ".weight", "uint8 [6, 8]"),
        (QuantAlgo.W4A16_AWQ, {"weight_scale": torch.ones(6, 1)}, ".weight_scale", "float32 [6, 1]"),
        (QuantAlgo.W4A16_AWQ, {"pre_quant_scale": torch.ones(6)}, ".pre_quant_scale", "float32 [6]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_tensors_that_do_not_fit_are_named(
    algo: QuantAlgo, changes: dict[str, Tensor | None], where: str, found: str, random_linear: RandomLinear
) -> None:
    layer, tensors = random_linear(algo, 6, 8)
    changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}

    with pytest.raises(PlanError) as caught:
        build(changed, layer, (6, 8))

    (fault,) = caught.value.faults
    assert (fault.where, fault.found) == (f"layers.3.mlp.down_proj{where}", found)
    assert fault.remedy.endswith(".")


@pytest.mark.parametrize("group_size", [None, 0, 3, 16], ids=str)
def test_group_sizes_must_divide_the_inputs(group_size: int | None, random_linear: RandomLinear) -> None:
    _, tensors = random_linear(QuantAlgo.W4A16_AWQ, 6, 8)
    layer = LayerQuantConfig(quant_algo=QuantAlgo.W4A16_AWQ, group_size=group_size)

    with pytest.raises(PlanError, match="group_size in quant_config"):
        build(tensors, layer, (6, 8))


def test_odd_rows_have_no_pairs() -> None:
    tensors = {"weight": torch.zeros(3, 8, dtype=torch.uint8), "weight_scale": torch.ones(7)}

    with pytest.raises(PlanError, match=r"N/2, K"):
        build(tensors, LayerQuantConfig(quant_algo=QuantAlgo.W4A16), (7, 8))


def test_all_faults_of_a_module_are_raised_together() -> None:
    tensors = {"weight": torch.zeros(6, 8), "weight_scale": torch.ones(5), "g_idx": torch.zeros(8)}

    with pytest.raises(PlanError) as caught:
        build(tensors, LayerQuantConfig(quant_algo=QuantAlgo.W8A16), (6, 8), bias=True)

    assert [fault.where.removeprefix("layers.3.mlp.down_proj") for fault in caught.value.faults] == [
        "",
        ".g_idx",
        ".weight",
        ".weight_scale",
    ]


def test_an_algorithm_without_a_row_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="quant_algo MIXED_PRECISION"):
        build({}, LayerQuantConfig(quant_algo=QuantAlgo.MIXED_PRECISION), (6, 8))


@pytest.mark.parametrize("columns", [8, 4])
def test_one_group_covers_the_row(columns: int) -> None:
    layer = LayerQuantConfig(quant_algo=QuantAlgo.W4A16_AWQ, group_size=columns)
    tensors = {
        "weight": ROW_PAIRS[:, :columns].contiguous(),
        "weight_scale": torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
    }

    module = build(tensors, layer, (4, columns))

    assert torch.equal(CODES[:, :columns] * tensors["weight_scale"], module.dequantized_weight(torch.float32))
