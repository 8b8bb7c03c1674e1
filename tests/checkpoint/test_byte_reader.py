"""Bytes of stored tensors, and the pieces in which written ones are remembered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint import writer
from trtllm_ct.checkpoint.byte_reader import ByteReader
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.transfer import PAGE_BYTES, checksum
from trtllm_ct.checkpoint.write_plan import WritePlan
from trtllm_ct.checkpoint.writer import Piece, TensorWriter, create_files, pieces_are_there

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    tensors = {
        "a": torch.arange(10, dtype=torch.int16),
        "none": torch.empty(0, 4),
        "z": torch.arange(256).to(torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return Catalog.from_directory(tmp_path)


class TestOctetReader:
    @pytest.mark.parametrize(("begin", "nbytes"), [(0, 20), (0, 0), (3, 5), (20, 0), (18, 2)])
    def test_runs_of_bytes_are_those_of_the_tensor(self, catalog: Catalog, begin: int, nbytes: int) -> None:
        whole = torch.arange(10, dtype=torch.int16).numpy().tobytes()

        assert ByteReader(catalog).read("a", begin, nbytes) == whole[begin : begin + nbytes]

    def test_they_can_only_be_read(self, catalog: Catalog) -> None:
        assert ByteReader(catalog).read("z", 0, 256).readonly

    def test_windows_outlive_their_reader(self, catalog: Catalog) -> None:
        octets = ByteReader(catalog).read("z", 0, 256)

        assert octets == bytes(range(256))

    def test_an_empty_tensor_has_none(self, catalog: Catalog) -> None:
        assert ByteReader(catalog).read("none", 0, 0) == b""

    @pytest.mark.parametrize("left", [None, 0, 1, -1])
    def test_a_file_that_changed_is_named(self, catalog: Catalog, left: int | None) -> None:
        """Gone, empty, or shorter than its header says."""
        file = catalog.directory / "model.safetensors"
        if left is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:left])

        with pytest.raises(CatalogError) as raised:
            ByteReader(catalog).read("z", 0, 256)

        assert raised.value.faults[0].where == "model.safetensors: z"
        assert "wait until it is complete" in raised.value.faults[0].remedy

    def test_an_unknown_name_is_our_own_bug(self, catalog: Catalog) -> None:
        with pytest.raises(KeyError):
            ByteReader(catalog).read("b", 0, 1)


class TestPieces:
    """However a tensor comes, what is remembered of it is checked as one run."""

    @settings(max_examples=60)
    @given(cuts=st.lists(st.integers(0, 6 * PAGE_BYTES + 100), max_size=6), most=st.integers(1, 4))
    def test_they_are_sums_of_what_was_written(
        self, tmp_path_factory: pytest.TempPathFactory, cuts: list[int], most: int
    ) -> None:
        directory = tmp_path_factory.mktemp("pieces")
        size = 6 * PAGE_BYTES + 100
        octets = memoryview(bytes(i * i % 251 for i in range(size)))
        plan = WritePlan.of({"a": TensorSpec(DType.U8, (size,))}, size)
        create_files(directory, plan)
        with pytest.MonkeyPatch.context() as patch, TensorWriter(directory, plan) as each:
            patch.setattr(writer, "PIECE_BYTES", most * PAGE_BYTES)
            patch.setattr(writer, "CHUNK_BYTES", PAGE_BYTES)
            ends = sorted({*cuts, size} - {0})
            for begin, end in zip([0, *ends], ends, strict=False):
                each.write_bytes("a", octets[begin:end], begin)
            pieces = each.pieces
        begin = plan.places["a"].offset

        assert sum(piece.nbytes for piece in pieces) == size
        assert all(piece.nbytes <= most * PAGE_BYTES for piece in pieces)
        for piece in pieces:
            own = octets[piece.offset - begin : piece.offset - begin + piece.nbytes]
            assert piece.checksum == checksum(own)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "PIECE_BYTES", most * PAGE_BYTES)
            assert pieces_are_there(directory, pieces)

    def test_whole_pages_that_follow_one_another_are_one(self, tmp_path: Path) -> None:
        """Journals of large models stay short."""
        plan = WritePlan.of({"a": TensorSpec(DType.U8, (8 * PAGE_BYTES,))}, 10**6)
        create_files(tmp_path, plan)
        with TensorWriter(tmp_path, plan) as each:
            for page in range(8):
                each.write_bytes("a", memoryview(bytes(PAGE_BYTES)), page * PAGE_BYTES)

            assert len(each.pieces) == 1

    @pytest.mark.parametrize(
        ("file", "offset", "nbytes", "goes_on"),
        [
            ("a", 64 + PAGE_BYTES, 10, True),
            ("b", 64 + PAGE_BYTES, 10, False),
            ("a", 64 + PAGE_BYTES + 1, 10, False),
            ("a", 64, 10, False),
            ("a", 64 + PAGE_BYTES, writer.PIECE_BYTES - PAGE_BYTES, True),
            ("a", 64 + PAGE_BYTES, writer.PIECE_BYTES - PAGE_BYTES + 1, False),
        ],
    )
    def test_what_goes_on_follows_at_once(self, file: str, offset: int, nbytes: int, *, goes_on: bool) -> None:
        piece = Piece(file="a", offset=64, nbytes=PAGE_BYTES, checksum=1)

        assert piece.goes_on(file, offset, nbytes) is goes_on

    def test_behind_half_a_page_another_one_begins(self) -> None:
        piece = Piece(file="a", offset=64, nbytes=PAGE_BYTES + 1, checksum=1)

        assert not piece.goes_on("a", 64 + PAGE_BYTES + 1, 1)
