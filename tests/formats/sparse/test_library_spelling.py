"""The functions for sparse files as compressed-tensors 0.9 documented them, and files exchanged with that library.

With one of its releases 0.9 to 0.14 in front of the path, for example `PYTHONPATH=FOLDER`, the tests marked
`sparse_library` run too; `constraints/lowest.txt` pins such a release.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trtllm_ct
from trtllm_ct import BitmaskConfig, load_compressed, save_compressed, save_compressed_model
from trtllm_ct.base.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

TWO_OF_FOUR = torch.tensor([[0, 1.5, 0, -2], [torch.inf, 0, 3, 0], [0, 0, 0, 7], [0, 0, 0, 0]]).repeat(2, 4)
UNSTRUCTURED = torch.tensor([[0, 1, torch.nan, -torch.inf, 5, 6, 7, 0, 0, 9, 0, 11, 12], [0] * 13])
BIAS = torch.tensor([0.0, 4, 0])
TENSORS = {
    "a.proj.weight": UNSTRUCTURED,
    "b.weight": UNSTRUCTURED[:1].to(torch.bfloat16),
    "a.proj.bias": BIAS,
    "tensor_1": UNSTRUCTURED.clone(),
}
"""A sparse weight, one of a single row in another dtype, a bias, and a tensor that is no weight."""


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_the_documented_example_of_tensors(tmp_path: Path) -> None:
    compression_config = BitmaskConfig()
    tensors = {"tensor_1": torch.tensor([[0.0, 0, 0], [1, 1, 1]])}
    path = str(tmp_path / "model.safetensors")

    save_compressed(tensors, path, compression_format=compression_config.format)

    assert_equal(dict(load_compressed(path, compression_config=compression_config)), tensors)


def test_the_documented_example_of_a_model(tmp_path: Path) -> None:
    """A tensor with two names, as a tied head, is stored under both."""
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    model[0].weight = model[1].weight
    config = BitmaskConfig()
    path = str(tmp_path / "compressed_model.safetensors")

    save_compressed_model(model, path, compression_format=config.format)

    assert_equal(dict(load_compressed(path, config)), model.state_dict())


def test_the_configuration_takes_the_arguments_of_the_library() -> None:
    config = BitmaskConfig(global_sparsity=0.5, sparsity_structure="2:4", targets=["Linear"], ignore=["lm_head"])
    assert config.format == "sparse-bitmask"


@pytest.mark.parametrize("arguments", [{}, {"compression_format": None}, {"format": None}, {"format": "dense"}])
def test_tensors_are_stored_plain_unless_a_format_is_given(tmp_path: Path, arguments: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    save_compressed({"a.weight": UNSTRUCTURED}, path, **arguments)
    assert list(trtllm_ct.Catalog.from_directory(tmp_path).tensors) == ["a.weight"]


def test_two_formats_for_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format: expected 'dense', as compression_format, found 'sparse-bitmask'"):
        save_compressed({"a": BIAS}, tmp_path / "m.safetensors", compression_format="dense", format="sparse-bitmask")


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        ("sparse-bitmask", "dense", "expected format 'sparse-bitmask', as which b.weight is stored, found 'dense'"),
        ("sparse-bitmask", "sparse-24-bitmask", "expected format 'sparse-bitmask', as which b.weight"),
        ("sparse-24-bitmask", "sparse-bitmask", "expected format 'sparse-24-bitmask', as which b.weight"),
        ("dense", "pack-quantized", "expected format dense or sparse-bitmask or sparse-24-bitmask, found"),
    ],
)
def test_a_configuration_of_another_format_is_refused(tmp_path: Path, stored: str, asked: str, message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_compressed({"b.weight": TWO_OF_FOUR}, path, stored)
    with pytest.raises(UsageError, match=message):
        load_compressed(path, SimpleNamespace(format=asked))


def test_a_configuration_fits_files_without_sparse_tensors(tmp_path: Path) -> None:
    """The library reads them too: a weight that a format can't hold is stored plain."""
    path = tmp_path / "model.safetensors"
    save_compressed({"b.weight": UNSTRUCTURED}, path)
    assert_equal(dict(load_compressed(path, BitmaskConfig())), {"b.weight": UNSTRUCTURED})


def test_the_extra_state_of_a_module_is_no_tensor(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> int:
            return 3

    with pytest.raises(UsageError, match="_extra_state: expected a tensor, found int"):
        save_compressed_model(Counting(4, 4), tmp_path / "m.safetensors", "sparse-bitmask")


@pytest.mark.sparse_library
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("compression_format", "config_class"), [("dense", "DenseSparsityConfig"), ("sparse-bitmask", "BitmaskConfig")]
)
class TestFilesOfTheLibrary:
    """Files of either side are read by the other, with the configuration of the library."""

    def test_the_library_reads_ours(self, tmp_path: Path, compression_format: str, config_class: str) -> None:
        library = importlib.import_module("compressed_tensors")
        path = tmp_path / "model.safetensors"

        save_compressed(TENSORS, path, compression_format=compression_format)

        config = getattr(library, config_class)()
        assert_equal(dict(library.load_compressed(str(path), compression_config=config)), TENSORS)

    def test_ours_reads_those_of_the_library(self, tmp_path: Path, compression_format: str, config_class: str) -> None:
        library = importlib.import_module("compressed_tensors")
        path = tmp_path / "model.safetensors"

        library.save_compressed(TENSORS, str(path), compression_format=compression_format)

        config = getattr(library, config_class)()
        assert_equal(dict(load_compressed(path, compression_config=config)), TENSORS)

    def test_a_model_has_the_same_pieces(self, tmp_path: Path, compression_format: str, config_class: str) -> None:
        library = importlib.import_module("compressed_tensors")
        model = nn.Linear(16, 8)
        model.weight.data = TWO_OF_FOUR.clone()
        ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"

        save_compressed_model(model, ours, compression_format=compression_format)
        library.save_compressed_model(model, str(theirs), compression_format=compression_format)

        assert_equal(load_file(ours), load_file(theirs))
        config = getattr(library, config_class)()
        assert_equal(dict(library.load_compressed(str(ours), config)), dict(model.state_dict()))


@pytest.mark.sparse_library
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_2_of_4_files_have_the_pieces_of_the_library(tmp_path: Path) -> None:
    """Its `save_compressed` fails for this format, and 0.9.0 can't read it, so pieces are compared."""
    library = importlib.import_module("compressed_tensors")
    compressors = importlib.import_module("compressed_tensors.compressors")
    name, tensors = "sparse-24-bitmask", {"b.weight": TWO_OF_FOUR, "b.bias": BIAS}
    compressor = compressors.BaseCompressor.load_from_registry(name, config=library.Sparse24BitMaskConfig())
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"

    save_compressed(tensors, ours, compression_format=name)
    save_file(compressor.compress(tensors), theirs)

    assert_equal(load_file(ours), load_file(theirs))
    assert_equal(dict(load_compressed(theirs, library.Sparse24BitMaskConfig())), tensors)
