"""The layouts of small floats and of block scales, with bytes and values computed by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from trtllm_ct.base.errors import PlanError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.quant_config import LayerQuantConfig
from trtllm_ct.reference.linear import ReferenceLinear
from trtllm_ct.reference.linear_layouts import unpack_column_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# All sixteen codes in order: byte i holds code 2i (low nibble) and code 2i + 1 (high nibble).
ALL_CODES = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
E2M1 = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]])
FP4 = [QuantAlgo.NVFP4, QuantAlgo.W4A16_NVFP4]
MXFP4 = [QuantAlgo.W4A16_MXFP4, QuantAlgo.W4A8_MXFP4_MXFP8]
MX = [QuantAlgo.MXFP8, *MXFP4]
BLOCKS = LayerQuantConfig(quant_algo=QuantAlgo.FP8_BLOCK_SCALES, group_size=128)


def build(tensors: dict[str, Tensor], algo: QuantAlgo, rows: int, columns: int, **options: Any) -> ReferenceLinear:
    layer = LayerQuantConfig(quant_algo=algo, **options)
    return ReferenceLinear(tensors, layer=layer, out_features=rows, in_features=columns, name="down_proj")


def test_column_pairs_have_the_even_column_in_the_low_nibble() -> None:
    assert torch.equal(torch.arange(16, dtype=torch.uint8)[None], unpack_column_pairs(ALL_CODES))


@pytest.mark.parametrize("algo", FP4)
def test_nvfp4_is_code_times_both_scales(algo: QuantAlgo) -> None:
    tensors = {
        "weight": ALL_CODES.repeat(1, 2),
        "weight_scale": torch.tensor([[1.0, 448.0]]).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.25),
        "input_scale": torch.tensor(1.0),
    }

    weight = build(tensors, algo, 1, 32).dequantized_weight(torch.float32)

    assert torch.equal(torch.cat((E2M1 * 0.25, E2M1 * 112), dim=1), weight)


@pytest.mark.parametrize("algo", MXFP4)
def test_mxfp4_scales_are_exponents(algo: QuantAlgo) -> None:
    """Byte 127 is 1, byte 130 is 8; byte 0 is 2^-127, which is not zero in float32."""
    tensors = {"weight": ALL_CODES.repeat(1, 6), "weight_scale": torch.tensor([[127, 130, 0]], dtype=torch.uint8)}

    weight = build(tensors, algo, 1, 96).dequantized_weight(torch.float32)

    groups = [group.repeat(1, 2) for group in (E2M1, 8 * E2M1, E2M1 * 2.0**-127)]
    assert torch.equal(torch.cat(groups, dim=1), weight)


def test_mxfp8_scales_are_exponents_and_255_is_nan() -> None:
    codes = torch.tensor([[448.0, -1.0] * 32]).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.tensor([[120, 255]], dtype=torch.uint8)}

    weight = build(tensors, QuantAlgo.MXFP8, 1, 64).dequantized_weight(torch.float32)

    assert weight[0, :2].tolist() == [3.5, -(2.0**-7)]
    assert weight[0, 32:].isnan().all()


def blocks(scale: Tensor, name: str = "weight_scale") -> dict[str, Tensor]:
    return {"weight": torch.ones(130, 260).to(torch.float8_e4m3fn), name: scale}


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("axes", [2, 4])
def test_blocks_at_the_edges_are_partial(name: str, axes: int) -> None:
    """130 rows and 260 columns have 2 x 3 blocks of 128; ModelOpt's scale has two more axes of length 1."""
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    stored = scale if axes == 2 else scale[:, None, :, None]

    weight = build(blocks(stored, name), QuantAlgo.FP8_BLOCK_SCALES, 130, 260).dequantized_weight(torch.float32)

    starts = {
        (row, column): weight[row, column].item() for row in (0, 127, 128, 129) for column in (0, 127, 128, 255, 259)
    }
    assert starts == {(row, column): scale[row // 128, column // 128].item() for row, column in starts}


@pytest.mark.parametrize("algo", [*MX, QuantAlgo.FP8_BLOCK_SCALES])
def test_a_scale_may_have_its_second_name_or_both(
    algo: QuantAlgo, random_linear: Callable[..., tuple[LayerQuantConfig, dict[str, Tensor]]]
) -> None:
    _, tensors = random_linear(algo, 4, 64)
    weight, scale = tensors["weight"], tensors["weight_scale"]

    spelled = [
        build({"weight": weight} | dict.fromkeys(names, scale), algo, 4, 64)
        for names in (["weight_scale"], ["weight_scale_inv"], ["weight_scale", "weight_scale_inv"])
    ]

    values = [module.dequantized_weight(torch.float32) for module in spelled]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert set(spelled[2].state_dict()) == {"weight", "weight_scale", "weight_scale_inv"}
    with pytest.raises(PlanError, match=r"weight_scale_inv: expected the values of weight_scale.* found other values"):
        build(tensors | {"weight_scale_inv": scale + 1}, algo, 4, 64)


@pytest.mark.parametrize(
    ("algo", "changes", "where", "found"),
    [
        (QuantAlgo.NVFP4, {"input_scale": None}, "", "no input_scale"),
        (QuantAlgo.NVFP4, {"weight_scale_2": None}, "", "no weight_scale_2"),
        (QuantAlgo.NVFP4, {"weight_scale": torch.ones(4, 4)}, ".weight_scale", "float32 [4, 4]"),
        (QuantAlgo.NVFP4, {"weight_scale_inv": torch.ones(4, 4)}, ".weight_scale_inv", "float32 [4, 4]"),
        (QuantAlgo.W4A16_NVFP4, {"weight_scale_2": torch.ones(4)}, ".weight_scale_2", "float32 [4]"),
        (QuantAlgo.W4A16_NVFP4, {"weight": torch.zeros(4, 32, dtype=torch.int8)}, ".weight", "int8 [4, 32]"),
        (QuantAlgo.MXFP8, {"weight_scale": None}, "", "no weight_scale"),
        (QuantAlgo.MXFP8, {"weight_scale": torch.ones(4, 2)}, ".weight_scale", "float32 [4, 2]"),
        (QuantAlgo.W4A16_MXFP4, {"weight_scale": torch.ones(4, 4, dtype=torch.uint8)}, ".weight_scale", "uint8 [4, 4]"),
        (QuantAlgo.FP8_BLOCK_SCALES, {"weight_scale": torch.ones(1)}, ".weight_scale", "float32 [1]"),
        (QuantAlgo.FP8_BLOCK_SCALES, {"weight_scale": torch.ones(4, 1)}, ".weight_scale", "float32 [4, 1]"),
        (QuantAlgo.FP8_BLOCK_SCALES, {"weight_scale": torch.ones(1, 1, 1)}, ".weight_scale", "float32 [1, 1, 1]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_tensors_that_do_not_fit_are_named(
    algo: QuantAlgo,
    changes: dict[str, Tensor | None],
    where: str,
    found: str,
    random_linear: Callable[..., tuple[LayerQuantConfig, dict[str, Tensor]]],
) -> None:
    _, tensors = random_linear(algo, 4, 64)
    changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}

    with pytest.raises(PlanError) as caught:
        build(changed, algo, 4, 64)

    (fault,) = caught.value.faults
    assert (fault.where, fault.found) == (f"down_proj{where}", found)


def test_a_weight_only_linear_may_have_an_input_scale_and_ignores_it(
    random_linear: Callable[..., tuple[LayerQuantConfig, dict[str, Tensor]]],
) -> None:
    _, tensors = random_linear(QuantAlgo.W4A16_NVFP4, 4, 64)
    x = torch.randn(3, 64)

    with_scale = build(tensors | {"input_scale": torch.tensor(7.0)}, QuantAlgo.W4A16_NVFP4, 4, 64)

    assert torch.equal(build(tensors, QuantAlgo.W4A16_NVFP4, 4, 64)(x), with_scale(x))


@pytest.mark.parametrize(("algo", "size"), [*((algo, 16) for algo in FP4), *((algo, 32) for algo in MX)])
def test_formats_with_a_fixed_group_size_refuse_others(
    algo: QuantAlgo, size: int, random_linear: Callable[..., tuple[LayerQuantConfig, dict[str, Tensor]]]
) -> None:
    _, tensors = random_linear(algo, 4, 64)

    build(tensors, algo, 4, 64, group_size=size)
    build(tensors, algo, 4, 64)
    with pytest.raises(PlanError, match=rf"expected group_size {size}.* found group_size 64"):
        build(tensors, algo, 4, 64, group_size=64)


@pytest.mark.parametrize("algo", [*FP4, *MX])
def test_inputs_must_be_whole_groups(
    algo: QuantAlgo, random_linear: Callable[..., tuple[LayerQuantConfig, dict[str, Tensor]]]
) -> None:
    _, tensors = random_linear(algo, 4, 64)

    with pytest.raises(PlanError, match="in whole numbers"):
        build(tensors, algo, 4, 72)
