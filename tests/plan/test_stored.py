from __future__ import annotations

from pathlib import Path

import pytest

from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor
from trtllm_ct.dtypes import DType
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS, StoredModule, stored_modules
from trtllm_ct.schemes import TensorSpec

SPEC = TensorSpec(DType.BF16, (2, 4))


def catalog(*names: str) -> Catalog:
    tensors = {name: StoredTensor(name=name, spec=SPEC, file="x", offset=0) for name in names}
    return Catalog(directory=Path(), tensors=tensors, files=("x",))


def module(**dtypes: DType) -> StoredModule:
    return StoredModule("m", {local: TensorSpec(dtype, (2, 4)) for local, dtype in dtypes.items()})


def test_tensors_are_gathered_by_module_in_the_order_of_the_catalog() -> None:
    modules = stored_modules(catalog("b.0.weight", "a.weight", "b.0.bias", "scale"))

    assert list(modules) == ["b.0", "a", ""]
    assert list(modules["b.0"].specs) == ["weight", "bias"]


def test_full_names_are_those_of_the_file() -> None:
    """Also for a tensor without a module: its name has no dot."""
    names = ("model.norm.weight", "scale")
    modules = stored_modules(catalog(*names))

    assert [name for entry in modules.values() for name in entry.full_names(entry.specs)] == list(names)


@pytest.mark.parametrize(
    ("dtypes", "quantized"),
    [
        ({"weight": DType.BF16}, False),
        ({"weight": DType.F16, "weight_scale": DType.F32}, False),
        ({"weight": DType.F32, "weight_scale": DType.F32, "weight_zero_point": DType.I8}, False),
        ({"weight": DType.F64}, False),
        ({"weight": DType.I8}, True),
        ({"weight": DType.U8}, True),
        ({"weight": DType.F8_E4M3}, True),
        ({"weight": DType.F8_E5M2}, True),
        ({"weight_packed": DType.I32}, True),
        ({"weight": DType.BF16, "weight_packed": DType.I32}, True),
        ({"compressed": DType.BF16}, True),
        ({"weight_scale": DType.F32}, False),
        ({}, False),
    ],
)
def test_the_dtype_of_the_weight_decides_whether_a_module_is_quantized(
    dtypes: dict[str, DType], quantized: bool
) -> None:
    """A scale beside a plain float weight proves nothing: fake-quantized saves leave it there."""
    assert module(**dtypes).is_quantized is quantized


def test_plain_parameters_are_no_quantization_tensors() -> None:
    assert not QUANTIZATION_TENSORS & {"weight", "bias", "inv_freq", "shape", "meta"}
