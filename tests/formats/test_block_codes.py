"""float8 codes with one scale per block of rows and columns; blocks at the edge of the weight may be cut off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from on_tensors import Codes, decode, encode
from safetensors.torch import load_file
from stored_weights import assert_fault, described, exact_values, header_faults, payload_faults, specs_of, values

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import NumberType, QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats import format_for
from trtllm_ct.formats.plain_codes import FLOAT8, INT8
from trtllm_ct.layouts.packing import INT8_PLAIN

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.formats.base import WeightFormat


def blocks(rows: int, columns: int, number: NumberType = NumberType.FLOAT) -> QuantArgs:
    return QuantArgs(num_bits=8, type=number, strategy=Strategy.BLOCK, block_structure=(rows, columns))


WEIGHT = TensorSpec(DType.F8_E4M3, (300, 200))
LARGE = blocks(128, 128)


def test_worked_bytes() -> None:
    """Bytes of compressed-tensors 0.20: 1 to 15 in blocks of 2 x 2, with blocks cut off at the last row and column."""
    raw = bytearray.fromhex("38404c505a4c4e5859624b4c55565f")
    tensors = {
        "weight": torch.frombuffer(raw, dtype=torch.float8_e4m3fn).reshape(3, 5),
        "weight_scale": torch.tensor([[1, 0.5, 0.25], [2, 1, 0.5]], dtype=torch.bfloat16),
    }
    weight = described(FLOAT8, blocks(2, 2), specs_of(tensors), (3, 5))
    assert torch.equal(values(weight, tensors), torch.arange(1.0, 16.0, dtype=torch.float64).reshape(3, 5))


@pytest.mark.parametrize("entry", [FLOAT8, INT8], ids=["fp8", "int8"])
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**31),
)
def test_each_element_takes_the_scale_of_its_block(
    entry: WeightFormat, shape: tuple[int, int], block: tuple[int, int], seed: int
) -> None:
    """Holds for any shape and block, also a block larger than the weight; encoding inverts decoding."""
    is_float = entry is FLOAT8
    args = blocks(*block, NumberType.FLOAT if is_float else NumberType.INT)
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    codes = Codes(
        values=integers.float().to(torch.float8_e4m3fn) if is_float else integers,
        packing=None if is_float else INT8_PLAIN,
        shape=shape,
        scale=torch.rand(grid, generator=generator) + 0.5,
    )
    tensors = encode(entry, codes, args)
    weight = described(entry, args, specs_of(tensors), shape)
    assert torch.equal(values(weight, tensors), exact_values(codes.values.float(), codes.scale, block=block))
    encoded = encode(entry, decode(weight, tensors), args)
    assert all(torch.equal(encoded[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)


@pytest.mark.parametrize("form", [(3, 2), (3, 1, 2, 1), (1, 3, 2), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_block_scales_come_in_several_shapes_and_under_two_names(
    form: tuple[int, ...], name: str, dtype: torch.dtype
) -> None:
    scale = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=dtype)
    tensors = {"weight": torch.ones(300, 200).to(torch.float8_e4m3fn), name: scale.reshape(form)}
    stored = specs_of(tensors)
    assert format_for(LARGE, stored) is FLOAT8
    weight = described(FLOAT8, LARGE, stored, (300, 200))
    assert (weight.scale, weight.consumed) == (name, ("weight", name))
    assert values(weight, tensors)[::128, ::128].tolist() == [[1, 2], [3, 4], [5, 6]]


def test_a_scale_under_its_second_name_is_checked_like_the_first() -> None:
    tensors = {"weight": torch.ones(3, 2).to(torch.float8_e4m3fn), "weight_scale_inv": torch.tensor([[1.0], [-1.0]])}
    weight = described(FLOAT8, blocks(2, 2), specs_of(tensors))
    (fault,) = payload_faults(weight, tensors)
    assert_fault(fault, "lin.weight_scale_inv[1, 0]", "not negative", "-1", "quantize it again")


@pytest.mark.parametrize("form", [(2, 3), (3, 3), (6,), (1, 3, 1, 3), (300, 1)], ids=str)
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_a_scale_of_other_blocks_is_a_fault(form: tuple[int, ...], name: str) -> None:
    """This includes a transposed scale, which has the right number of elements."""
    stored = {"weight": WEIGHT, name: TensorSpec(DType.F32, form)}
    (fault,) = header_faults(FLOAT8, LARGE, stored, (300, 200))
    assert_fault(
        fault, f"lin.{name}", "[3, 2] for strategy block 128x128 over [300, 200]", str(list(form)), "block_structure"
    )


@pytest.mark.parametrize("dtype", [DType.U8, DType.F8_E8M0])
def test_scales_that_are_powers_of_two_belong_to_mxfp8_under_either_name(dtype: DType) -> None:
    stored = {"weight": WEIGHT, "weight_scale_inv": TensorSpec(dtype, (3, 2))}
    assert not FLOAT8.accepts(LARGE, stored)


@pytest.mark.shared
def test_the_values_of_a_real_checkpoint(shared: Path) -> None:
    """llm-compressor wrote it; the golden products were computed without this package."""
    directory = shared / "checkpoints" / "fp8-block"
    stored, golden = load_file(directory / "model.safetensors"), np.load(directory / "golden.npz")
    modules = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
    assert len(modules) == 28
    for module in modules:
        tensors = {local: stored[f"{module}.{local}"] for local in ("weight", "weight_scale")}
        weight = described(FLOAT8, LARGE, specs_of(tensors), None, (0, 19, 0))
        columns = weight.shape[1]
        vector = torch.randn(columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
        product = values(weight, tensors) @ vector
        np.testing.assert_allclose(product.numpy(), golden[f"proj:{module}.weight"], rtol=0, atol=1e-6)
