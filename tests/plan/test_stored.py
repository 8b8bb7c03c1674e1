from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from on_tensors import SPARSE_BITMASK, view_of

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS, ExpertSlice, StoredModule, Whole, stored_modules

if TYPE_CHECKING:
    from collections.abc import Mapping

SPEC = TensorSpec(DType.BF16, (2, 4))


def catalog(specs: Mapping[str, TensorSpec]) -> Catalog:
    tensors = {name: StoredTensor(name=name, spec=spec, file="x", offset=0) for name, spec in specs.items()}
    return Catalog(source=Folder(Path()), tensors=tensors, files=("x",))


def gathered(specs: Mapping[str, TensorSpec], shape: tuple[int, ...] | None = None) -> dict[str, StoredModule]:
    """The modules of a checkpoint with these tensors; fails on any fault."""
    faults = FaultCollector()
    modules = stored_modules(catalog(specs), lambda name: shape, faults)
    assert faults.faults == []
    return modules


def module(**dtypes: DType) -> StoredModule:
    specs = {local: TensorSpec(dtype, (2, 4)) for local, dtype in dtypes.items()}
    return StoredModule("m", {local: Whole(name=f"m.{local}", spec=spec) for local, spec in specs.items()})


def test_tensors_are_gathered_by_module_in_the_order_of_the_catalog() -> None:
    modules = gathered(dict.fromkeys(("b.0.weight", "a.weight", "b.0.bias", "scale"), SPEC))

    assert list(modules) == ["b.0", "a", ""]
    assert modules["b.0"].specs == {"weight": SPEC, "bias": SPEC}


def test_sources_are_the_names_of_the_file() -> None:
    """Also for a tensor without a module: its name has no dot."""
    names = ("model.norm.weight", "scale")
    modules = gathered(dict.fromkeys(names, SPEC)).values()

    assert [name for entry in modules for name in entry.sources(entry.specs)] == list(names)
    assert [entry.delivered_name(local) for entry in modules for local in entry.specs] == list(names)


class TestViews:
    """Every tensor of a module looks like one stored 2-D tensor, however it is stored."""

    def test_whole_returns_the_stored_tensor_itself(self) -> None:
        stored = {"a.weight": torch.ones(2, 4)}

        assert view_of(Whole(name="a.weight", spec=SPEC), stored).data_ptr() == stored["a.weight"].data_ptr()

    def test_a_slice_of_one_expert_shares_its_memory(self) -> None:
        stored = {"experts.w": torch.arange(24).reshape(2, 4, 3)}
        view = ExpertSlice(name="experts.w", spec=TensorSpec(DType.I64, (2, 3)), expert=1, size=12, rows=(2, 4))

        assert view.sources == ("experts.w",)
        assert view_of(view, stored).tolist() == [[18, 19, 20], [21, 22, 23]]
        assert view_of(view, stored).is_contiguous()
        assert view_of(view, stored).data_ptr() == stored["experts.w"][1, 2].data_ptr()

    def test_a_slice_without_rows_is_all_of_the_expert(self) -> None:
        stored = {"experts.scale": torch.tensor([1.0, 2.0])}
        view = ExpertSlice(name="experts.scale", spec=TensorSpec(DType.F32, ()), expert=1, size=1)

        assert view_of(view, stored).item() == 2

    @pytest.mark.parametrize("stem", ["m", "m.weight"], ids=["since 0.9", "up to 0.8.1"])
    def test_the_pieces_of_a_sparse_tensor_become_the_dense_tensor(self, stem: str) -> None:
        weight = torch.zeros(3, 10, dtype=torch.bfloat16)
        weight[0, 1], weight[2, 9] = 5, -7
        stored = {f"{stem}.{piece}": tensor for piece, tensor in SPARSE_BITMASK.encode(weight).items()}
        specs = {name: TensorSpec(DType.from_torch(t.dtype), tuple(t.shape)) for name, t in stored.items()}

        entry = gathered(specs, (3, 10))["m"]

        assert entry.specs == {"weight": TensorSpec(DType.BF16, (3, 10))}
        assert set(entry.views["weight"].sources) == stored.keys()
        assert entry.views["weight"].stored_bytes == sum(tensor.nbytes for tensor in stored.values())
        assert torch.equal(view_of(entry.views["weight"], stored), weight)

    def test_a_missing_piece_is_a_fault(self) -> None:
        faults = FaultCollector()
        pieces = {"m.compressed": TensorSpec(DType.BF16, (3,)), "m.shape": TensorSpec(DType.I64, (2,))}

        stored_modules(catalog(pieces), lambda name: (3, 10), faults)

        assert [fault.where for fault in faults.faults] == ["m.bitmask"]


def test_an_alias_is_delivered_under_the_name_that_engines_read() -> None:
    views = {"weight": Whole(name="experts.0.gate_proj.weight", spec=SPEC)}
    stored = StoredModule("experts.0.gate_proj", views)

    delivered = stored.delivered_as("experts.0.w1")

    assert delivered.delivered_name("weight") == "experts.0.w1.weight"
    assert delivered.stored_name == "experts.0.gate_proj"
    assert delivered.sources(["weight"]) == ("experts.0.gate_proj.weight",)
    assert stored.delivered_as(stored.name) is stored


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
        ({"compressed": DType.BF16}, False),
        ({"weight_scale": DType.F32}, False),
        ({}, False),
    ],
)
def test_the_dtype_of_the_weight_decides_whether_a_module_is_quantized(
    dtypes: dict[str, DType], quantized: bool
) -> None:
    """A scale beside a plain float weight proves nothing: fake-quantized saves leave it there."""
    assert module(**dtypes).is_quantized is quantized


def test_plain_parameters_are_not_listed_as_quantization_tensors() -> None:
    assert not QUANTIZATION_TENSORS & {"weight", "bias", "inv_freq", "shape"}
