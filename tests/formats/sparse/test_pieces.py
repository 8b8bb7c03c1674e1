"""Sparsity as a layer: which tensors are stored in pieces, how the pieces are named, and real sparse files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from on_tensors import SPARSE_24_BITMASK, SPARSE_BITMASK, TensorReader, restore, tensors
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, FaultCollector
from trtllm_ct.base.schemes import CompressionFormat, TensorSpec
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.formats.sparse.pieces import SPARSE_FORMATS, Generation, SparseTensor, find_sparse, stem_of
from trtllm_ct.layouts.torch_tensors import array_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trtllm_ct.formats.sparse.base import SparseFormat

MATRIX = torch.tensor([[0, 1, 0, 2, 0, 0, 0, 3.0], [4, 0, 0, 0, 0, 5, 0, 0]]).to(torch.bfloat16)
VECTOR = torch.tensor([1.0, 0, 2])


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape))


def stored_as(stem: str, dense: Tensor, entry: SparseFormat = SPARSE_BITMASK) -> dict[str, Tensor]:
    pieces = tensors(getattr(entry, "entry", entry).encode(array_of(dense)))
    return {f"{stem}.{piece}": tensor for piece, tensor in pieces.items()}


def find(
    stored: dict[str, Tensor], expected: Callable[[str], tuple[int, ...] | None] = lambda name: None
) -> tuple[dict[str, SparseTensor], list[Fault]]:
    faults = FaultCollector()
    specs = {name: spec_of(tensor) for name, tensor in stored.items()}
    return find_sparse(specs, expected, faults), faults.faults


def restored(sparse: SparseTensor, stored: dict[str, Tensor]) -> Tensor:
    return restore(sparse, {piece: stored[name] for piece, name in sparse.parts.items()})


def test_names_since_0_9_mean_the_weight_of_a_module() -> None:
    stored = {**stored_as("m.0.lin", MATRIX), "m.0.lin.bias": VECTOR, "m.0.lin.weight_scale": VECTOR}

    sparse_tensors, faults = find(stored)

    assert not faults
    assert list(sparse_tensors) == ["m.0.lin.weight"]
    sparse = sparse_tensors["m.0.lin.weight"]
    assert sparse.kind is CompressionFormat.SPARSE_BITMASK
    assert sparse.spec == TensorSpec(DType.BF16, (2, 8))
    assert sparse.parts == {piece: f"m.0.lin.{piece}" for piece in ("shape", "compressed", "bitmask", "row_offsets")}
    assert torch.equal(restored(sparse, stored), MATRIX)


def test_names_before_0_9_are_those_of_tensors() -> None:
    """Norms, biases and parameters that are no module's weight were stored in pieces like everything else."""
    names = ["m.embed.weight", "m.0.lin.weight", "m.0.lin.bias", "m.0.lin.weight_scale", "m.0.mixer.A_log", "m.D"]
    dense = {name: VECTOR if index % 2 else MATRIX for index, name in enumerate(names)}
    stored = {full: tensor for name in names for full, tensor in stored_as(name, dense[name]).items()}

    sparse_tensors, faults = find(stored, lambda name: tuple(dense[name].shape))

    assert not faults
    assert list(sparse_tensors) == names
    for name, sparse in sparse_tensors.items():
        assert torch.equal(restored(sparse, stored), dense[name])


def test_both_sparse_formats_in_one_file() -> None:
    stored = {**stored_as("a", MATRIX), **stored_as("b", MATRIX, SPARSE_24_BITMASK)}

    sparse_tensors, faults = find(stored)

    assert not faults
    assert {name: sparse.kind for name, sparse in sparse_tensors.items()} == {
        "a.weight": CompressionFormat.SPARSE_BITMASK,
        "b.weight": CompressionFormat.SPARSE_24_BITMASK,
    }
    for sparse in sparse_tensors.values():
        assert torch.equal(restored(sparse, stored), MATRIX)


@pytest.mark.parametrize("entry", SPARSE_FORMATS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_codes_of_a_quantized_weight_are_restored_as_codes(entry: SparseFormat, dtype: torch.dtype) -> None:
    codes = MATRIX.to(dtype)
    stored = {**stored_as("lin", codes, entry), "lin.weight_scale": torch.ones(2, 1)}

    sparse_tensors, _ = find(stored)

    assert list(sparse_tensors) == ["lin.weight"]
    dense = restored(sparse_tensors["lin.weight"], stored)
    assert dense.dtype == dtype
    assert torch.equal(dense.view(torch.uint8), codes.view(torch.uint8))


def test_the_expected_shape_is_looked_up_by_the_dense_name() -> None:
    asked: list[str] = []

    def expected(name: str) -> tuple[int, ...]:
        asked.append(name)
        return (2, 5)

    sparse_tensors, _ = find(stored_as("lin", MATRIX[:, :5]), expected)

    assert asked == ["lin.weight"]
    assert sparse_tensors["lin.weight"].spec.shape == (2, 5)


@pytest.mark.parametrize(
    "names",
    [
        ["m.shape", "m.weight"],
        ["m.compressed", "m.weight"],
        ["m.meta", "m.shape"],
        ["m.bitmask"],
        ["bitmask", "compressed", "shape"],
        ["a.shape", "b.compressed", "c.bitmask"],
        [],
    ],
    ids=str,
)
def test_common_words_alone_are_no_pieces(names: list[str]) -> None:
    """A model may use these names for its own tensors."""
    assert find(dict.fromkeys(names, VECTOR)) == ({}, [])


@pytest.mark.parametrize("missing", ["shape", "compressed", "bitmask"])
def test_a_missing_piece_is_named(missing: str) -> None:
    stored = stored_as("m.lin", MATRIX)
    del stored[f"m.lin.{missing}"]

    sparse_tensors, (fault,) = find(stored)

    assert not sparse_tensors
    assert fault.where == f"m.lin.{missing}"
    assert fault.found == "none"
    assert "download" in fault.remedy


def test_a_tensor_that_is_stored_plain_too() -> None:
    stored = {**stored_as("m.lin", MATRIX), "m.lin.weight": MATRIX}

    sparse_tensors, (fault,) = find(stored)

    assert not sparse_tensors
    assert str(fault).startswith("m.lin.weight: expected it once, found it plain and in pieces, as m.lin.compressed")


@pytest.mark.parametrize("shape", [(), (2, 3, 2)], ids=str)
def test_values_of_an_unknown_rank(shape: tuple[int, ...]) -> None:
    stored = stored_as("m.lin", MATRIX) | {"m.lin.compressed": torch.ones(shape)}
    sparse_tensors, (fault,) = find(stored)
    assert not sparse_tensors
    assert fault.expected == "values in one or two dimensions"


def test_faults_of_all_tensors_are_gathered() -> None:
    stored = {
        **stored_as("a", MATRIX),
        "a.bitmask": torch.zeros(2, 1),
        **stored_as("b", MATRIX, SPARSE_24_BITMASK),
        "b.bitmask": torch.zeros((9, 1), dtype=torch.uint8),
        **stored_as("c", MATRIX),
    }
    sparse_tensors, faults = find(stored)
    assert list(sparse_tensors) == ["c.weight"]
    assert [fault.where for fault in faults] == ["a.bitmask", "b.bitmask"]


@pytest.mark.parametrize(
    ("name", "generation", "stem"),
    [
        ("m.lin.weight", "0.9", "m.lin"),
        ("m.lin.weight", "0.4", "m.lin.weight"),
        ("m.lin.bias", "0.4", "m.lin.bias"),
    ],
)
def test_stems_by_generation(name: str, generation: Generation, stem: str) -> None:
    assert stem_of(name, generation) == stem


def dense_weights(directory: Path) -> dict[str, Tensor]:
    """Every matrix of a checkpoint in float64: restored, and multiplied by its row scales if it has any."""
    catalog = Catalog.from_directory(directory)
    faults = FaultCollector()
    specs = {name: tensor.spec for name, tensor in catalog.tensors.items()}
    sparse_tensors = find_sparse(specs, lambda name: None, faults)
    assert not faults.faults
    with TensorReader(catalog) as reader:
        weights = {name: reader.read(name).double() for name in specs if name.endswith(".weight")}
        for name, sparse in sparse_tensors.items():
            weights[name] = restore(sparse, {piece: reader.read(part) for piece, part in sparse.parts.items()}).double()
            if f"{name}_scale" in catalog:
                weights[name] *= reader.read(f"{name}_scale").double()
    return {name: weight for name, weight in weights.items() if weight.dim() == 2}


@pytest.mark.shared
@pytest.mark.parametrize("checkpoint", ["sparse-bitmask", "sparse24-fp8"])
def test_real_files_hold_the_golden_weights(shared: Path, checkpoint: str) -> None:
    directory = shared / "checkpoints" / checkpoint
    with np.load(directory / "golden.npz") as archive:
        golden = {name[5:]: torch.from_numpy(archive[name]) for name in archive.files if name.startswith("proj:")}

    weights = dense_weights(directory)

    assert weights.keys() == golden.keys()
    for name, want in golden.items():
        columns = weights[name].shape[1]
        probe = torch.randn(columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
        assert (weights[name] @ probe - want).abs().max() < 1e-6 * want.abs().max(), name
