"""The operations for the files of ranks: joint scales are the largest, slices are contiguous, rounding happens once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from on_tensors import arrays, run

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import PayloadError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.layouts.torch_tensors import array_of
from trtllm_ct.plan.ops import Copy
from trtllm_ct.plan.rank_ops import (
    LargestOf,
    LargestReciprocal,
    Padding,
    Requantize,
    RoundScale,
    RoundZero,
    Slice,
    WidenCastScale,
)

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_ct.plan.ops import ModuleTensors, Operation

SCALAR = TensorSpec(DType.F32, ())
CODES = torch.tensor([[448.0, -2.0], [0.5, -448.0]]).to(torch.float8_e4m3fn)
STORED_CODES = array_of(CODES)


def module(scale: Tensor | None = None, zero_point: Tensor | None = None, **stored: Tensor) -> ModuleTensors:
    """Tensors by local name, and a decoded weight with `CODES`."""
    codes = SimpleNamespace(
        values=STORED_CODES,
        scale=None if scale is None else array_of(scale),
        zero_point=None if zero_point is None else array_of(zero_point),
        zero_point_packing=None,
    )
    return cast("Any", SimpleNamespace(stored=arrays(stored), codes=codes, first_row=0))


def test_the_largest_of_several_scales_of_any_shape() -> None:
    scales = {"a": torch.tensor([0.5]), "b": torch.tensor([[0.25], [2.0]]).bfloat16(), "c": torch.tensor(1.0)}

    largest = run(LargestOf(result=SCALAR, scales=("a", "b", "c")), "x", module(**scales))

    assert (largest.dtype, largest.shape, largest.item()) == (torch.float32, (), 2.0)


@pytest.mark.parametrize("operation", [LargestOf, LargestReciprocal, Requantize, RoundScale, RoundZero])
def test_what_may_change_a_number_is_not_called_exact(operation: type[Operation]) -> None:
    assert not operation.exact


@pytest.mark.parametrize("operation", [Copy, Slice, Padding])
def test_what_only_moves_numbers_is_exact(operation: type[Operation]) -> None:
    assert operation.exact


def test_the_largest_multiplier_belongs_to_the_smallest_divisor() -> None:
    divisors = {"a": torch.tensor([3.0]), "b": torch.tensor([7.0])}

    largest = run(LargestReciprocal(result=SCALAR, scales=("a", "b")), "x", module(**divisors))

    assert largest.item() == torch.tensor(1 / 3, dtype=torch.float32).item()


class TestRequantize:
    RESULT = TensorSpec(DType.F8_E4M3, (2, 2))

    def run(self, own: float, *others: float) -> Tensor:
        scales = {f"s{number}": torch.tensor([scale]) for number, scale in enumerate((own, *others))}
        operation = Requantize(result=self.RESULT, scales=tuple(scales))
        return run(operation, "x", module(scale=torch.tensor([[own]]), **scales))

    def test_codes_under_the_largest_scale_are_the_stored_ones(self) -> None:
        assert self.run(0.5, 0.25, 0.5).data_ptr() == CODES.data_ptr()

    def test_other_codes_are_rounded_to_it_once(self) -> None:
        made = self.run(0.3, 0.5)

        scale, largest = torch.tensor(0.3), torch.tensor(0.5)
        assert torch.equal(made.float(), (CODES.float() * scale / largest).to(torch.float8_e4m3fn).float())
        assert made.float().abs().max() < 448


def test_scales_and_zeros_are_rounded_once_and_zero_is_positive() -> None:
    scale = torch.tensor([[1 + 2**-8], [1 + 3 * 2**-9]])
    result = TensorSpec(DType.BF16, (2, 1))

    rounded = run(RoundScale(result=TensorSpec(DType.BF16, (2,))), "x", module(scale=scale))
    zero = run(
        RoundZero(result=result), "x", module(scale=scale, zero_point=torch.tensor([[0], [-3]], dtype=torch.int8))
    )

    assert rounded.tolist() == [1.0, 1 + 2**-7]  # ties go to the even neighbour
    assert zero.flatten().tolist() == [0.0, 3.015625]
    assert not zero[0].signbit().any()


def test_a_scale_beyond_the_dtype_is_an_error() -> None:
    with pytest.raises(PayloadError, match="float16"):
        run(RoundScale(result=TensorSpec(DType.F16, (1,))), "x", module(scale=torch.tensor([[1e5]])))


@pytest.mark.parametrize("wrong", [1e5, 3e-9])
def test_a_scale_that_a_loader_casts_keeps_its_value_or_is_an_error(wrong: float) -> None:
    operation = WidenCastScale(result=TensorSpec(DType.F32, (2, 1)), cast=DType.F16)

    scale = torch.tensor([[0.1], [0.0]])
    assert torch.equal(run(operation, "x", module(scale=scale)), scale)
    with pytest.raises(PayloadError, match="float16"):
        run(operation, "x", module(scale=torch.tensor([[0.1], [wrong]])))


@pytest.mark.parametrize(("axis", "want"), [(0, [[3, 4, 5]]), (1, [[1, 2], [4, 5]])])
def test_a_slice_is_a_contiguous_part(axis: Any, want: list[list[int]]) -> None:
    whole = Copy(result=TensorSpec(DType.I8, (2, 3)), source="weight")
    stored = torch.arange(6, dtype=torch.int8).reshape(2, 3)

    operation = Slice.of(whole, axis, 1, 2 + axis)
    part = run(operation, "x", module(weight=stored))

    assert part.tolist() == want
    assert part.is_contiguous()
    assert operation.result == TensorSpec(DType.I8, tuple(part.shape))
    assert (operation.made, operation.source, operation.same_bytes) == (whole, "weight", False)


def test_padding_is_zero() -> None:
    padding = run(Padding(result=TensorSpec(DType.BF16, (3, 2))), "x", module())

    assert (padding.dtype, padding.shape, padding.any().item()) == (torch.bfloat16, (3, 2), False)


def test_a_scale_that_would_become_zero_is_an_error() -> None:
    """The weights of its row would be zeros, without a message."""
    operation = RoundScale(result=TensorSpec(DType.F16, (2, 1)))

    with pytest.raises(PayloadError) as caught:
        run(operation, "x.weight_scale", module(scale=torch.tensor([[3e-9], [0.5]])))

    assert "1 that become zero" in caught.value.faults[0].found
    zero = run(operation, "x.weight_scale", module(scale=torch.tensor([[0.0], [0.5]])))
    assert zero.tolist() == [[0.0], [0.5]]
