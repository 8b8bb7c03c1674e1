"""Byte ranges of tensors as a reader maps them, and the pieces in which a writer records the bytes that it wrote."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_tensors import TensorWriter
from safetensors.torch import save_file

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint import output_files, windows, writer
from trtllm_ct.checkpoint import reader as reader_module
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.output_files import Piece, pieces_are_intact
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.checkpoint.transfer import PAGE_BYTES, checksum
from trtllm_ct.checkpoint.write_plan import WritePlan
from trtllm_ct.checkpoint.writer import create_files

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


class TestReadBytes:
    @pytest.mark.parametrize(("begin", "nbytes"), [(0, 20), (0, 0), (3, 5), (20, 0), (18, 2)])
    def test_byte_ranges_equal_the_bytes_of_the_tensor(self, catalog: Catalog, begin: int, nbytes: int) -> None:
        whole = torch.arange(10, dtype=torch.int16).numpy().tobytes()

        assert TensorReader(catalog, in_windows=True).read_bytes("a", begin, nbytes) == whole[begin : begin + nbytes]

    def test_writing_to_a_view_does_not_change_the_file(self, catalog: Catalog) -> None:
        TensorReader(catalog, in_windows=True).read_bytes("z", 0, 256)[7] = 0

        assert TensorReader(catalog, in_windows=True).read_bytes("z", 0, 256) == bytes(range(256))

    def test_views_outlive_their_reader(self, catalog: Catalog) -> None:
        payload = TensorReader(catalog, in_windows=True).read_bytes("z", 0, 256)

        assert payload == bytes(range(256))

    def test_an_empty_tensor_has_no_bytes(self, catalog: Catalog) -> None:
        assert TensorReader(catalog, in_windows=True).read_bytes("none", 0, 0) == b""

    @pytest.mark.parametrize("left", [None, 0, 1, -1])
    def test_a_file_that_changed_is_named_in_the_error(self, catalog: Catalog, left: int | None) -> None:
        """The file is gone, empty, or shorter than its header says."""
        file = catalog.directory / "model.safetensors"
        if left is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:left])

        with pytest.raises(CatalogError) as raised:
            TensorReader(catalog, in_windows=True).read_bytes("z", 0, 256)

        assert raised.value.faults[0].where == "model.safetensors: z"
        assert "wait until it is complete" in raised.value.faults[0].remedy

    def test_windows_of_a_file_hold_every_range(self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ranges begin and end in any window, and a view outlives its window."""
        monkeypatch.setattr(windows, "WINDOW_BYTES", mmap.ALLOCATIONGRANULARITY)
        monkeypatch.setattr(reader_module, "_MAX_OPEN_MAPS", 2)
        size = 5 * mmap.ALLOCATIONGRANULARITY + 7
        payload = bytes(number * number % 251 for number in range(size))
        save_file(
            {"long": torch.frombuffer(bytearray(payload), dtype=torch.uint8)}, catalog.directory / "b.safetensors"
        )
        reader = TensorReader(Catalog.from_directory(catalog.directory), in_windows=True)

        views = [
            (reader.read_bytes("long", begin, end - begin), payload[begin:end])
            for begin in range(0, size, 999)
            for end in (begin + 1, begin + 5000, size)
            if end <= size
        ]

        assert len(reader._maps) == 2
        assert all(view == part for view, part in views)

    @pytest.mark.parametrize(("code", "limit"), [(errno.ENOMEM, "ulimit -v"), (errno.EMFILE, "ulimit -n")])
    def test_a_limit_of_the_process_is_not_called_a_change_of_the_file(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, code: int, limit: str
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(reader_module, "map_file", fail)

        with pytest.raises(CatalogError) as raised:
            TensorReader(catalog, in_windows=True).read_bytes("z", 0, 256)

        assert limit in raised.value.faults[0].remedy
        assert raised.value.faults[0].found == os.strerror(code)

    def test_an_unknown_name_is_a_key_error(self, catalog: Catalog) -> None:
        with pytest.raises(KeyError):
            TensorReader(catalog, in_windows=True).read_bytes("b", 0, 1)


class TestPieces:
    """In whatever parts a tensor is written, its pieces can be checked against the file."""

    @settings(max_examples=60)
    @given(cuts=st.lists(st.integers(0, 6 * PAGE_BYTES + 100), max_size=6), most=st.integers(1, 4))
    def test_checksums_are_those_of_the_bytes_written(
        self, tmp_path_factory: pytest.TempPathFactory, cuts: list[int], most: int
    ) -> None:
        directory = tmp_path_factory.mktemp("pieces")
        size = 6 * PAGE_BYTES + 100
        payload = memoryview(bytes(i * i % 251 for i in range(size)))
        plan = WritePlan.of({"a": TensorSpec(DType.U8, (size,))}, size)
        create_files(Folder(directory), plan)
        with pytest.MonkeyPatch.context() as patch, TensorWriter(Folder(directory), plan) as tensor_writer:
            patch.setattr(output_files, "PIECE_BYTES", most * PAGE_BYTES)
            patch.setattr(writer, "CHUNK_BYTES", PAGE_BYTES)
            ends = sorted({*cuts, size} - {0})
            for begin, end in zip([0, *ends], ends, strict=False):
                tensor_writer.write_bytes("a", payload[begin:end], begin)
            pieces = tensor_writer.pieces
        begin = plan.places["a"].offset

        assert sum(piece.nbytes for piece in pieces) == size
        assert all(piece.nbytes <= most * PAGE_BYTES for piece in pieces)
        for piece in pieces:
            part = payload[piece.offset - begin : piece.offset - begin + piece.nbytes]
            assert piece.checksum == checksum(part)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output_files, "PIECE_BYTES", most * PAGE_BYTES)
            assert pieces_are_intact(Folder(directory), pieces)

    def test_consecutive_whole_pages_become_one_piece(self, tmp_path: Path) -> None:
        """Journals of large models stay short."""
        plan = WritePlan.of({"a": TensorSpec(DType.U8, (8 * PAGE_BYTES,))}, 10**6)
        create_files(Folder(tmp_path), plan)
        with TensorWriter(Folder(tmp_path), plan) as tensor_writer:
            for page in range(8):
                tensor_writer.write_bytes("a", memoryview(bytes(PAGE_BYTES)), page * PAGE_BYTES)

            assert len(tensor_writer.pieces) == 1

    @pytest.mark.parametrize(
        ("file", "offset", "nbytes", "is_continued_by"),
        [
            ("a", 64 + PAGE_BYTES, 10, True),
            ("b", 64 + PAGE_BYTES, 10, False),
            ("a", 64 + PAGE_BYTES + 1, 10, False),
            ("a", 64, 10, False),
            ("a", 64 + PAGE_BYTES, output_files.PIECE_BYTES - PAGE_BYTES, True),
            ("a", 64 + PAGE_BYTES, output_files.PIECE_BYTES - PAGE_BYTES + 1, False),
        ],
    )
    def test_only_bytes_that_follow_directly_extend_a_piece(
        self, file: str, offset: int, nbytes: int, *, is_continued_by: bool
    ) -> None:
        piece = Piece(file="a", offset=64, nbytes=PAGE_BYTES, checksum=1)

        assert piece.is_continued_by(file, offset, nbytes) is is_continued_by

    def test_after_a_partial_page_a_new_piece_begins(self) -> None:
        piece = Piece(file="a", offset=64, nbytes=PAGE_BYTES + 1, checksum=1)

        assert not piece.is_continued_by("a", 64 + PAGE_BYTES + 1, 1)
