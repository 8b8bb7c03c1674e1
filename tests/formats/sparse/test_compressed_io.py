from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from on_tensors import SPARSE_BITMASK
from safetensors.torch import load_file, save_file
from torch import Tensor

from trtllm_ct.base.errors import CatalogError, PayloadError, UsageError
from trtllm_ct.formats.sparse.compressed_io import load_compressed, save_compressed

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.formats.sparse.pieces import Generation

CASES: list[tuple[str, Generation]] = [
    ("dense", "0.9"),
    ("dense", "0.4"),
    ("sparse-bitmask", "0.9"),
    ("sparse-bitmask", "0.4"),
    ("sparse-24-bitmask", "0.9"),
]
PIECES = ["bitmask", "compressed", "row_offsets", "shape"]

SPARSE = torch.tensor([[0, 1, 0, 2, 0, 0, 0, 3.0], [4, 0, 0, 0, 0, 5, 0, 0]]).to(torch.bfloat16)
FULL = torch.arange(1, 19).view(2, 9).to(torch.bfloat16)
NORM = torch.tensor([1.0, 0, 2])
BIAS = torch.tensor([0.0, 7])
SCALAR = torch.tensor(2.0)


def model() -> dict[str, Tensor]:
    return {"lin.weight": SPARSE, "lin.bias": BIAS, "norm.weight": NORM, "head.weight": FULL, "scale": SCALAR}


def assert_same(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def stored_names(path: Path) -> list[str]:
    return sorted(load_file(path))


@pytest.mark.parametrize(("name", "generation"), CASES)
def test_saved_tensors_are_loaded(tmp_path: Path, name: str, generation: Generation) -> None:
    """They are loaded from the file and from its directory; saving leaves no other file there."""
    path = tmp_path / "model.safetensors"

    save_compressed(model(), path, name, generation=generation)

    assert_same(dict(load_compressed(path)), model())
    assert_same(dict(load_compressed(str(tmp_path))), model())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "generation", "sparse", "plain"),
    [
        ("dense", "0.9", [], ["head.weight", "lin.bias", "lin.weight", "norm.weight", "scale"]),
        ("sparse-bitmask", "0.9", ["head", "lin", "norm"], ["lin.bias", "scale"]),
        ("sparse-bitmask", "0.4", ["head.weight", "lin.bias", "lin.weight", "norm.weight"], ["scale"]),
    ],
)
def test_names_in_the_file(
    tmp_path: Path, name: str, generation: Generation, sparse: list[str], plain: list[str]
) -> None:
    path = tmp_path / "model.safetensors"
    save_compressed(model(), path, name, generation=generation)
    assert stored_names(path) == sorted([f"{stem}.{piece}" for stem in sparse for piece in PIECES] + plain)


def test_weights_that_are_not_2_of_4_stay_plain(tmp_path: Path) -> None:
    """The library dropped all but two of four values; here no value is lost."""
    path = tmp_path / "model.safetensors"
    save_compressed(model(), path, "sparse-24-bitmask")
    assert stored_names(path) == [
        "head.weight",
        "lin.bias",
        "lin.bitmask",
        "lin.compressed",
        "lin.shape",
        "norm.weight",
        "scale",
    ]


def test_codes_of_a_quantized_weight_stay_codes(tmp_path: Path) -> None:
    tensors = {"lin.weight": SPARSE.to(torch.float8_e4m3fn), "lin.weight_scale": torch.ones(2, 1)}
    path = tmp_path / "model.safetensors"

    save_compressed(tensors, path, "sparse-24-bitmask")

    loaded = dict(load_compressed(path))
    assert loaded["lin.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(loaded["lin.weight"].view(torch.uint8), tensors["lin.weight"].view(torch.uint8))
    assert torch.equal(loaded["lin.weight_scale"], tensors["lin.weight_scale"])


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20)), min_size=1, max_size=4),
    st.sampled_from(CASES),
    st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None)
def test_tensors_of_any_shape_are_loaded(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, int]],
    case: tuple[str, Generation],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"m.{index}.weight": torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.4)
        for index, shape in enumerate(shapes)
    }
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    save_compressed(tensors, path, case[0], generation=case[1])
    assert_same(dict(load_compressed(path)), tensors)


def test_a_shape_of_either_integer_gives_the_exact_columns(tmp_path: Path) -> None:
    """13 columns have as many bytes of bits as 16."""
    tensors = {"lin.weight": torch.arange(26, dtype=torch.float32).view(2, 13) % 3}
    path = tmp_path / "model.safetensors"
    save_compressed(tensors, path, "sparse-bitmask")
    pieces = load_file(path)
    save_file(pieces | {"lin.shape": pieces["lin.shape"].to(torch.int32)}, path)

    assert_same(dict(load_compressed(path)), tensors)


def test_minus_zero_becomes_zero(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_compressed({"lin.weight": torch.tensor([[-0.0, 1.0]])}, path, "sparse-bitmask")
    assert str(dict(load_compressed(path))["lin.weight"].tolist()) == "[[0.0, 1.0]]"


def test_views_and_parameters_are_saved_by_value(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(SPARSE.float().T)
    path = tmp_path / "model.safetensors"
    for name in ("dense", "sparse-bitmask"):
        save_compressed({"lin.weight": weight}, path, name)
        assert torch.equal(dict(load_compressed(path))["lin.weight"], weight)


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_compressed({"old": NORM}, path)
    save_compressed({"new": BIAS}, path)
    assert_same(dict(load_compressed(path)), {"new": BIAS})


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_compressed({"old": NORM}, path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trtllm_ct.checkpoint.writer.ShardedWriter.write", full)
    with pytest.raises(UsageError, match="no space left on device"):
        save_compressed({"new": BIAS}, path)

    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(dict(load_compressed(path)), {"old": NORM})


@pytest.mark.parametrize(
    ("tensors", "name", "generation", "message"),
    [
        ({}, "dense", "0.9", "tensors: expected at least one tensor, found none"),
        (
            model(),
            "pack-quantized",
            "0.9",
            "format: expected a format without arguments, found 'pack-quantized'. Choose",
        ),
        (model(), "sparse-bitmask", "0.6", "generation: expected 0.4 or 0.9, found '0.6'"),
        (model(), "sparse-24-bitmask", "0.4", "generation: expected 0.9 for sparse-24-bitmask, found 0.4"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "dense", "0.9", "a: expected a dtype that safetensors has"),
        ({"__metadata__": NORM}, "dense", "0.9", "__metadata__: expected a name for a tensor"),
        ({"a.weight": NORM, "a.shape": NORM}, "sparse-bitmask", "0.9", "a.shape: expected each name once"),
        ({"a": NORM}, "sparse-bitmask", "0.4", "a: expected a name that reading gives back"),
        ({"a.bias.weight": NORM, "b.weight": NORM}, "sparse-bitmask", "0.9", "a.bias.weight: expected a name that"),
    ],
    ids=[
        "nothing",
        "quantized format",
        "generation",
        "2:4 before 0.9",
        "dtype",
        "reserved name",
        "clash",
        "early name",
        "late name",
    ],
)
def test_tensors_that_can_not_be_saved(
    tmp_path: Path, tensors: dict[str, Tensor], name: str, generation: Generation, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        save_compressed(tensors, tmp_path / "model.safetensors", name, generation=generation)
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["missing/model.safetensors", "."])
def test_paths_that_can_not_be_written(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match="a place for a file"):
        save_compressed(model(), tmp_path / place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["nowhere", "nowhere.safetensors", "empty"])
def test_paths_that_can_not_be_read(tmp_path: Path, place: str) -> None:
    """The call itself raises the error, before the first iteration."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogError):
        load_compressed(tmp_path / place)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04 no safetensors")
    with pytest.raises(CatalogError, match="no safetensors file"):
        load_compressed(tmp_path / "model.safetensors")


def test_a_piece_that_is_missing(tmp_path: Path) -> None:
    pieces = {f"lin.{name}": tensor for name, tensor in SPARSE_BITMASK.encode(SPARSE).items()}
    del pieces["lin.bitmask"]
    save_file(pieces, tmp_path / "model.safetensors")
    with pytest.raises(CatalogError, match=r"lin\.bitmask: expected a tensor beside lin\.\w+, found none"):
        load_compressed(tmp_path)


@pytest.mark.parametrize(
    "shape", [torch.tensor([2, 3]), torch.tensor([2, -8]), torch.tensor([2, 17]), torch.tensor([8, 2])], ids=str
)
def test_a_shape_that_contradicts_the_bitmask(tmp_path: Path, shape: Tensor) -> None:
    """Headers can't disprove a shape that ends within the last byte of a row; the values do."""
    dense = torch.ones((2, 8))
    pieces = {f"lin.{name}": tensor for name, tensor in SPARSE_BITMASK.encode(dense).items()}
    save_file(pieces | {"lin.shape": shape}, tmp_path / "model.safetensors")
    with pytest.raises((PayloadError, CatalogError)):
        dict(load_compressed(tmp_path))


def test_pieces_may_lie_in_several_files(tmp_path: Path) -> None:
    pieces = {f"lin.{name}": tensor for name, tensor in SPARSE_BITMASK.encode(SPARSE).items()}
    for number, (name, tensor) in enumerate(pieces.items(), start=1):
        save_file({name: tensor}, tmp_path / f"model-{number:05d}-of-00004.safetensors")
    assert_same(dict(load_compressed(tmp_path)), {"lin.weight": SPARSE})


@pytest.mark.shared
@pytest.mark.parametrize("checkpoint", ["sparse-bitmask", "sparse24-fp8"])
def test_real_files_have_the_names_of_a_plain_model(shared: Path, checkpoint: str) -> None:
    directory = shared / "checkpoints" / checkpoint
    with np.load(directory / "golden.npz") as golden:
        matrices = {name.removeprefix("proj:") for name in golden.files if name.startswith("proj:")}

    loaded = dict(load_compressed(directory))

    assert matrices <= loaded.keys()
    assert {name.rpartition(".")[2] for name in loaded} <= {"weight", "weight_scale"}
    assert all(loaded[name].dim() == 2 for name in matrices)


@pytest.mark.shared
@pytest.mark.parametrize("checkpoint", ["sparse-bitmask", "sparse24-fp8"])
def test_saving_a_real_file_again_gives_its_pieces(shared: Path, checkpoint: str, tmp_path: Path) -> None:
    """The pieces are byte for byte those that the library wrote."""
    directory = shared / "checkpoints" / checkpoint
    original = load_file(directory / "model.safetensors")
    path = tmp_path / "model.safetensors"
    name = "sparse-bitmask" if checkpoint == "sparse-bitmask" else "sparse-24-bitmask"

    save_compressed(dict(load_compressed(directory)), path, name)

    again = load_file(path)
    pieces = [name for name in original if name.rpartition(".")[2] in PIECES]
    assert len(pieces) == 28 * (4 if checkpoint == "sparse-bitmask" else 3)
    for piece in pieces:
        assert again[piece].dtype == original[piece].dtype
        assert torch.equal(again[piece].view(torch.uint8), original[piece].view(torch.uint8)), piece
