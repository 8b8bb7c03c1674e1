from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from on_tensors import NATIVE, Codes, arrays, encode, on_tensors, run
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PayloadError
from trtllm_ct.base.schemes import QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.formats.plain_codes import INT8
from trtllm_ct.layouts import packing as packing_layout
from trtllm_ct.layouts.packing import INT4_ROW_PAIRS, INT8_PLAIN
from trtllm_ct.plan.ops import (
    AdditiveZero,
    Cast,
    Copy,
    Dequantize,
    ModuleTensors,
    Ones,
    Operation,
    Reciprocal,
    Reinterpret,
    Repack,
    WidenScale,
)

if TYPE_CHECKING:
    from trtllm_ct.formats.base import StoredWeight, WeightFormat
    from trtllm_ct.layouts.stored_array import StoredTensors

unpack_codes = on_tensors(packing_layout.unpack_codes)

ARGS = QuantArgs(num_bits=4, strategy=Strategy.GROUP, group_size=8)
SHAPE = (4, 16)
GRID = (4, 2)


def plain_codes() -> Tensor:
    return torch.arange(64, dtype=torch.int8).reshape(SHAPE) % 16 - 8


def quantized_module(
    entry: WeightFormat = PACKED_INT, *, scale: float = 0.5, zero_point: int | None = None, codes: Tensor | None = None
) -> ModuleTensors:
    """A weight [4, 16] in groups of 8 whose scales are all alike."""
    stored = encode(
        entry,
        Codes(
            values=plain_codes() if codes is None else codes,
            packing=INT8_PLAIN,
            shape=SHAPE,
            scale=torch.full(GRID, scale),
            zero_point=None if zero_point is None else torch.full(GRID, zero_point, dtype=torch.int8),
        ),
        ARGS,
    )
    specs = {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in stored.items()}
    weight = entry.describe("lin", ARGS, specs, SHAPE, FaultCollector())
    return ModuleTensors(arrays(stored), weight, NATIVE.entry)


def plain_module(**stored: Tensor) -> ModuleTensors:
    return ModuleTensors(arrays(stored), None, NATIVE.entry)


def test_copy_returns_the_stored_tensor() -> None:
    bias = torch.randn(3)
    operation = Copy(result=TensorSpec(DType.F32, (3,)), source="bias")
    assert run(operation, "lin.bias", plain_module(bias=bias)).data_ptr() == bias.data_ptr()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_cast_rounds_once(stored: torch.dtype) -> None:
    tensor = torch.tensor([1 + 2**-11 + 2**-40, 0.1, -0.0, math.nan, math.inf], dtype=torch.float64).to(stored)
    cast = run(Cast(result=TensorSpec(DType.F16, (5,)), source="weight"), "norm.weight", plain_module(weight=tensor))
    exact = tensor.double()
    first = 1 + 2**-10 if exact[0] > 1 + 2**-11 else 1.0
    assert cast.dtype is torch.float16
    assert cast[0] == first
    assert cast[3].isnan()
    assert cast[4].isposinf()


def test_cast_refuses_values_that_become_infinite() -> None:
    """Elements that were infinite before are accepted; the first one that overflows is named with its value."""
    tensor = torch.tensor([[1.0, math.inf], [2.0, -70000.0]])
    operation = Cast(result=TensorSpec(DType.F16, (2, 2)), source="weight")
    with pytest.raises(PayloadError) as caught:
        run(operation, "norm.weight", plain_module(weight=tensor))
    (fault,) = caught.value.faults
    assert fault.where == "norm.weight[1, 1]"
    assert "float16" in fault.expected
    assert fault.found == "-70000"
    assert "--dtype bfloat16" in fault.remedy


@pytest.mark.parametrize("entry", [PACKED_INT, INT8], ids=["words", "plain"])
def test_repack_moves_codes_bit_for_bit(entry: WeightFormat) -> None:
    operation = Repack(result=TensorSpec(DType.U8, (2, 16)), packing=INT4_ROW_PAIRS)
    pairs = run(operation, "lin.weight", quantized_module(entry))
    assert torch.equal(unpack_codes(pairs, INT4_ROW_PAIRS, SHAPE), plain_codes())


@pytest.mark.parametrize("code", [8, -9, 127, -128])
def test_repack_refuses_codes_that_are_too_wide(code: int) -> None:
    codes = plain_codes()
    codes[3, 3] = code
    operation = Repack(result=TensorSpec(DType.U8, (2, 16)), packing=INT4_ROW_PAIRS)
    with pytest.raises(PayloadError, match=r"lin.weight: expected codes of 4 bits, from -8 to 7, found .*num_bits"):
        run(operation, "lin.weight", quantized_module(INT8, codes=codes))


@pytest.mark.parametrize("stored", [(), (1,), (1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (4, 2)], ids=str)
def test_widen_scale_reads_the_one_element_of_its_source_whatever_its_shape(
    stored: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    operation = WidenScale(result=TensorSpec(DType.F32, shape), source="input_scale")
    scale = torch.full(stored, 2.0, dtype=torch.bfloat16)
    widened = run(operation, "lin.input_scale", plain_module(input_scale=scale))
    assert torch.equal(widened, torch.full(shape, 2.0))
    assert widened.dtype is torch.float32


@pytest.mark.parametrize(("shape", "values"), [(GRID, [[0.5, 0.5]] * 4), ((4, 4), [[0.5] * 4] * 4)], ids=str)
def test_widen_scale_without_a_source_reads_the_scale_of_the_weight(
    shape: tuple[int, int], values: list[list[float]]
) -> None:
    """Repeated where the Linear reads smaller groups."""
    operation = WidenScale(result=TensorSpec(DType.F32, shape))
    assert run(operation, "lin.weight_scale", quantized_module()).tolist() == values


@pytest.mark.parametrize("stored", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize(("divisor", "multiplier"), [(4.0, 0.25), (2688.0, 1 / 2688), (3.0, 1 / 3), (0.0, 0.0)])
def test_reciprocal_turns_a_divisor_into_a_multiplier(
    stored: tuple[int, ...], divisor: float, multiplier: float
) -> None:
    """Rounded once, to float32. The 0 of an expert that saw no data stays 0, where 1 / 0 would spoil all experts."""
    operation = Reciprocal(result=TensorSpec(DType.F32, ()), source="weight_global_scale")
    module = plain_module(weight_global_scale=torch.full(stored, divisor))
    got = run(operation, "lin.weight_scale_2", module)
    assert torch.equal(got, torch.tensor(multiplier, dtype=torch.float64).to(torch.float32))
    assert got.shape == ()


def test_reinterpret_copies_no_byte() -> None:
    """E4M3 scales that a writer stored as bytes; memory is shared, values are those of the bits."""
    stored = torch.tensor([[0x38, 0x40], [0x08, 0x7E]], dtype=torch.uint8)
    operation = Reinterpret(result=TensorSpec(DType.F8_E4M3, (2, 2)), source="weight_scale")
    got = run(operation, "lin.weight_scale", plain_module(weight_scale=stored))
    assert got.dtype is torch.float8_e4m3fn
    assert got.double().tolist() == [[1.0, 2.0], [2**-6, 448.0]]
    assert got.data_ptr() == stored.data_ptr()


@pytest.mark.parametrize(("zero_point", "offset"), [(3, -1.5), (-8, 4.0), (0, 0.0), (None, 0.0)])
def test_additive_zero_is_zero_where_no_zero_point_is_stored(zero_point: int | None, offset: float) -> None:
    operation = AdditiveZero(result=TensorSpec(DType.F32, (4, 4)))
    zero = run(operation, "lin.weight_zero", quantized_module(zero_point=zero_point))
    assert zero.shape == (4, 4)
    assert zero.unique().tolist() == [offset]
    assert not zero.signbit().any() or offset < 0


def test_ones_have_the_dtype_of_the_model() -> None:
    ones = run(Ones(result=TensorSpec(DType.BF16, (16,))), "lin.pre_quant_scale", plain_module())
    assert ones.dtype is torch.bfloat16
    assert ones.tolist() == [1.0] * 16


@pytest.mark.parametrize("entry", [PACKED_INT, INT8], ids=["words", "plain"])
def test_dequantize_gives_plain_weights(entry: WeightFormat) -> None:
    operation = Dequantize(result=TensorSpec(DType.BF16, SHAPE))
    values = run(operation, "lin.weight", quantized_module(entry, zero_point=2))
    assert torch.equal(values, (plain_codes() - 2) * torch.tensor(0.5, dtype=torch.bfloat16))


def test_dequantize_refuses_values_that_become_infinite() -> None:
    operation = Dequantize(result=TensorSpec(DType.F16, SHAPE))
    with pytest.raises(PayloadError, match=r"lin.weight\[0, 0\]: expected a value within the range of float16"):
        run(operation, "lin.weight", quantized_module(scale=30000.0))


def test_a_module_decodes_its_weight_at_most_once() -> None:
    class Counting:
        decoded = 0

        def decode(self, weight: StoredWeight, stored: StoredTensors) -> Any:
            self.decoded += 1
            return weight.format.decode(weight, stored)

    module, codec = quantized_module(zero_point=1), Counting()
    counted = ModuleTensors(module.stored, module.weight, codec)
    run(Repack(result=TensorSpec(DType.U8, (2, 16)), packing=INT4_ROW_PAIRS), "lin.weight", counted)
    run(AdditiveZero(result=TensorSpec(DType.F32, GRID)), "lin.weight_zero", counted)
    assert codec.decoded == 1


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (Copy(result=TensorSpec(DType.F32, ())), "copy needs a source"),
        (Repack(result=TensorSpec(DType.I8, ()), packing=INT8_PLAIN), "only a quantized module has codes"),
    ],
    ids=["no source", "no codes"],
)
def test_an_inconsistent_plan_raises_an_assertion_error(operation: Operation, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        run(operation, "lin.weight", plain_module())


def test_labels_are_unique_and_loss_is_declared() -> None:
    operations = (AdditiveZero, Cast, Copy, Dequantize, Ones, Reciprocal, Reinterpret, Repack, WidenScale)
    assert len({operation.label for operation in operations}) == len(operations)
    assert {operation.label for operation in operations if not operation.exact} == {"cast", "dequantize"}
