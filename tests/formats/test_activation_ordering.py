"""Activation ordering by group: `weight_g_idx` gives the group of each column, or stands for contiguous groups."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from on_tensors import Codes, decode, encode
from safetensors.torch import load_file
from stored_weights import (
    Sized,
    assert_fault,
    described,
    exact_values,
    header_faults,
    payload_faults,
    specs_of,
    values,
)
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import ActOrder, QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.formats.plain_codes import INT8
from trtllm_ct.layouts.packing import INT8_PLAIN

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.formats.base import StoredWeight, WeightFormat

GROUPED = QuantArgs(num_bits=4, strategy=Strategy.GROUP, group_size=4, actorder=ActOrder.GROUP)
CONTIGUOUS = [0] * 4 + [1] * 4 + [2] * 4


def stored_weight(
    entry: WeightFormat, index: list[int] | None, *, zero_point: bool = False, seed: int = 0
) -> tuple[StoredWeight, dict[str, Tensor], Codes]:
    """Five rows of twelve random codes in three groups."""
    generator = torch.Generator().manual_seed(seed)
    codes = Codes(
        values=torch.randint(-8, 8, (5, 12), generator=generator, dtype=torch.int8),
        packing=INT8_PLAIN,
        shape=(5, 12),
        scale=torch.rand(5, 3, generator=generator) + 0.5,
        zero_point=torch.randint(-8, 8, (5, 3), generator=generator, dtype=torch.int8) if zero_point else None,
        group_index=None if index is None else torch.tensor(index, dtype=torch.int32),
    )
    args = replace(GROUPED, symmetric=not zero_point)
    tensors = encode(entry, codes, args)
    return described(entry, args, specs_of(tensors), (5, 12)), tensors, codes


def test_worked_bytes() -> None:
    """compressed-tensors 0.6, 0.10 and 0.18 all read these bytes as these values."""
    tensors = {
        "weight_packed": torch.frombuffer(bytearray.fromhex("f0a9cbed98badcfe"), dtype=torch.int32).reshape(2, 1),
        "weight_scale": torch.tensor([[0.5, 1.0], [0.5, 1.0]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([2, 8]),
        "weight_g_idx": torch.tensor([0, 1, 0, 1, 1, 0, 0, 1], dtype=torch.int32),
    }
    weight = described(PACKED_INT, GROUPED, specs_of(tensors), (2, 8))
    assert weight.group_index == "weight_g_idx"
    assert values(weight, tensors).tolist() == [[-4, 7, 0.5, 2, 3, 2, 2.5, 6], [0, 1, 1, 3, 4, 2.5, 3, 7]]


@pytest.mark.parametrize("entry", [PACKED_INT, INT8], ids=lambda entry: entry.name)
@settings(max_examples=25, deadline=None)
@given(index=st.lists(st.integers(0, 2), min_size=12, max_size=12), zero_point=st.booleans(), seed=st.integers(0, 99))
def test_each_column_takes_scale_and_zero_point_of_its_group(
    entry: WeightFormat, index: list[int], zero_point: bool, seed: int
) -> None:
    weight, tensors, codes = stored_weight(entry, index, zero_point=zero_point, seed=seed)
    exact = exact_values(codes.values, codes.scale, codes.zero_point, group_index=index)
    assert torch.equal(values(weight, tensors), exact)
    encoded = encode(entry, decode(weight, tensors), weight.args)
    if index != CONTIGUOUS:
        assert torch.equal(encoded["weight_g_idx"], tensors["weight_g_idx"])


@pytest.mark.parametrize("entry", [PACKED_INT, INT8], ids=lambda entry: entry.name)
@pytest.mark.parametrize("index", [CONTIGUOUS, [-1] * 12, [2] * 11 + [-1]], ids=["k // g", "unfilled", "part filled"])
def test_an_unfilled_or_contiguous_index_leaves_groups_contiguous(entry: WeightFormat, index: list[int]) -> None:
    weight, tensors, codes = stored_weight(entry, index)
    assert "weight_g_idx" in weight.consumed
    assert decode(weight, tensors).group_index is None
    assert torch.equal(values(weight, tensors), exact_values(codes.values, codes.scale, block=(1, 4)))


def test_the_last_group_of_a_contiguous_index_may_be_short() -> None:
    weight, tensors, _ = stored_weight(PACKED_INT, None)
    tensors["weight_g_idx"] = torch.arange(12, dtype=torch.int32) // 5
    ragged = described(PACKED_INT, replace(weight.args, group_size=5), specs_of(tensors), (5, 12))
    assert decode(ragged, tensors).group_index is None


@pytest.mark.parametrize("args", [replace(GROUPED, group_size=12), QuantArgs(num_bits=4, strategy=Strategy.CHANNEL)])
def test_columns_of_one_group_need_no_index(args: QuantArgs) -> None:
    """A target may take such a weight without dequantizing it; the index still counts as consumed."""
    stored = {
        "weight": TensorSpec(DType.I8, (5, 12)),
        "weight_scale": TensorSpec(DType.BF16, (5, 1)),
        "weight_g_idx": TensorSpec(DType.I32, (12,)),
    }
    weight = described(INT8, args, stored)
    assert weight.group_index is None
    assert "weight_g_idx" in weight.consumed


@pytest.mark.parametrize("bad", [(DType.I32, (13,)), (DType.I32, (5,)), (DType.I32, (12, 1)), (DType.BF16, (12,))])
@pytest.mark.parametrize("entry", [PACKED_INT, INT8], ids=lambda entry: entry.name)
def test_an_index_has_one_integer_for_each_column(entry: WeightFormat, bad: Sized) -> None:
    _, tensors, _ = stored_weight(entry, None)
    stored = {**specs_of(tensors), "weight_g_idx": TensorSpec(*bad)}
    (fault,) = header_faults(entry, GROUPED, stored, (5, 12))
    assert_fault(fault, "lin.weight_g_idx", "int32 [12]", str(TensorSpec(*bad)), "download")


@pytest.mark.parametrize("bad", [3, -2, 2**31 - 1])
@pytest.mark.parametrize("entry", [PACKED_INT, INT8], ids=lambda entry: entry.name)
def test_an_index_names_groups_that_exist(entry: WeightFormat, bad: int) -> None:
    weight, tensors, _ = stored_weight(entry, [0, 1, 2, bad, *[0] * 8])
    (fault,) = payload_faults(weight, tensors)
    assert_fault(fault, "lin.weight_g_idx[3]", "from 0 to 2", f"{bad} (1 of 12", "download")


@pytest.mark.shared
def test_the_values_of_a_real_checkpoint(shared: Path) -> None:
    """compressed-tensors 0.10.2 wrote it with random orders; the golden products were computed without this package."""
    directory = shared / "checkpoints" / "w4a16-actorder-group"
    stored, golden = load_file(directory / "model.safetensors"), np.load(directory / "golden.npz")
    args = replace(GROUPED, group_size=128)
    modules = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    assert len(modules) == 28
    for module in modules:
        tensors = {name.rpartition(".")[2]: tensor for name, tensor in stored.items() if name.startswith(f"{module}.")}
        weight = described(PACKED_INT, args, specs_of(tensors), tuple(tensors["weight_shape"].tolist()), ())
        assert decode(weight, tensors).group_index is not None
        columns = weight.shape[1]
        vector = torch.randn(columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
        product = values(weight, tensors) @ vector
        np.testing.assert_allclose(product.numpy(), golden[f"proj:{module}.weight"], rtol=0, atol=1e-6)
