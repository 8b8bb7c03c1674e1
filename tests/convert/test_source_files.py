"""The files of a source as they were when a conversion was planned, and samples of their bytes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from trtllm_ct.base.errors import CatalogError
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.reader import Run
from trtllm_ct.convert.source_files import sample_hash, source_files

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    save_file({"a": torch.arange(40_000)}, tmp_path / "model.safetensors")
    return Catalog.from_directory(tmp_path)


def test_short_reads_change_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_files(catalog), sample_hash(catalog, [Run("a")])
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, nbytes, offset: pread(descriptor, min(nbytes, 100), offset))

    assert (source_files(catalog), sample_hash(catalog, [Run("a")])) == before


def test_a_named_pipe_in_place_of_a_file_is_refused_and_not_waited_for(catalog: Catalog) -> None:
    file = catalog.directory / "model.safetensors"
    file.unlink()
    os.mkfifo(file)

    for read in (lambda: source_files(catalog), lambda: sample_hash(catalog, [Run("a")])):
        with pytest.raises(CatalogError, match="a named pipe, not a file"):
            read()
