"""The converted side: rows of every native layout, against a slow decoder and the reference engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from delivered_linears import decode_slowly, random_linear

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import PlanError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.layouts.torch_tensors import array_of
from trtllm_ct.reference.linear import ReferenceLinear
from trtllm_ct.reference.linear_layouts import LAYOUTS
from trtllm_ct.verify.native import NativeWeight
from trtllm_ct.verify.native_layouts import NATIVE_LAYOUTS, unpack_row_pairs
from trtllm_ct.verify.source.files import SourceTensor

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray
    from torch import Tensor

    from trtllm_ct.engine.quant_config import LayerQuantConfig

ALGORITHMS = list(LAYOUTS)
SHAPES = [(6, 64), (2, 32), (130, 32)]


@dataclass(frozen=True, kw_only=True)
class InMemory(SourceTensor):
    """A tensor of torch in the place of one in a file."""

    stored: NDArray[Any]

    def rows(self, begin: int, end: int) -> NDArray[Any]:
        return self.stored.reshape(self.shape or (1,))[begin:end]


def in_memory(tensor: Tensor) -> InMemory:
    stored = array_of(tensor)
    return InMemory(dtype=stored.dtype, shape=tuple(tensor.shape), stored=stored.elements)


def native(layer: LayerQuantConfig, tensors: dict[str, Tensor], shape: tuple[int, int]) -> NativeWeight:
    stored = {local: in_memory(tensor) for local, tensor in tensors.items()}
    weight = NativeWeight(name="down_proj", tensors=stored, layer=layer, shape=shape)
    weight.check()
    return weight


def test_every_algorithm_of_the_reference_engine_has_a_layout() -> None:
    assert NATIVE_LAYOUTS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_weights_equal_the_slow_decoder_and_the_reference_engine(algo: QuantAlgo, shape: tuple[int, int]) -> None:
    layer, tensors = random_linear(algo, *shape)
    module = ReferenceLinear(tensors, layer=layer, out_features=shape[0], in_features=shape[1])

    values = native(layer, tensors, shape).coded(0, shape[0]).values()

    assert np.array_equal(values, decode_slowly(algo, tensors).numpy())
    assert np.array_equal(values, module.dequantized_weight(torch.float64).numpy())


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_chunks_of_rows_join_to_the_weight(algo: QuantAlgo) -> None:
    """A chunk begins at an even row, and in a block of scales only with its first row."""
    layer, tensors = random_linear(algo, 260, 32)
    weight = native(layer, tensors, (260, 32))

    chunks = [weight.coded(begin, min(begin + 128, 260)).values() for begin in (0, 128, 256)]

    assert np.array_equal(np.concatenate(chunks), decode_slowly(algo, tensors).numpy())


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_a_scale_may_have_its_second_name(algo: QuantAlgo, name: str) -> None:
    layer, tensors = random_linear(algo, 6, 64)
    renamed = {name if local == "weight_scale" else local: tensor for local, tensor in tensors.items()}
    if any(name in rule.names for rule in LAYOUTS[algo].tensors):
        assert np.array_equal(
            native(layer, renamed, (6, 64)).coded(0, 6).values(), native(layer, tensors, (6, 64)).coded(0, 6).values()
        )
    else:
        with pytest.raises(PlanError):
            native(layer, renamed, (6, 64))


def test_a_pre_quant_scale_multiplies_columns_and_ones_change_nothing() -> None:
    layer, tensors = random_linear(QuantAlgo.W4A16_AWQ, 6, 64)
    ones = tensors | {"pre_quant_scale": torch.ones(64, dtype=torch.bfloat16)}

    factors = native(layer, tensors, (6, 64)).column_factors

    assert factors is not None
    assert np.array_equal(factors, tensors["pre_quant_scale"].double().numpy())
    assert native(layer, ones, (6, 64)).column_factors is None


@pytest.mark.parametrize("columns", [1, 3, 8])
def test_row_pairs_have_the_even_row_in_the_low_nibble(columns: int) -> None:
    packed = np.array([[0x08] * columns, [0x7F] * columns], np.uint8)

    assert unpack_row_pairs(packed).tolist() == [[code] * columns for code in (-8, 0, -1, 7)]


@pytest.mark.parametrize("surplus", ["bias", "weight_zero_point"])
def test_headers_are_held_to_the_rules_of_the_reference_engine(surplus: str) -> None:
    layer, tensors = random_linear(ALGORITHMS[0], 6, 64)

    with pytest.raises(PlanError, match=surplus):
        native(layer, tensors | {surplus: torch.zeros(6)}, (6, 64))


def test_dtypes_are_named_as_torch_names_them() -> None:
    layer, tensors = random_linear(ALGORITHMS[0], 6, 64)

    with pytest.raises(PlanError, match=r"bfloat16 \[6\]"):
        native(layer, tensors | {"weight_scale": tensors["weight_scale"].to(DType.BF16.torch_dtype)}, (6, 64))
