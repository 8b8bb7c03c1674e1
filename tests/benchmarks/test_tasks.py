"""The tasks of timed processes: both sides load the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.shapes import SHAPES
from benchmarks.tasks import TASKS

if TYPE_CHECKING:
    from pathlib import Path

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    TINY.write(directory)
    return directory


def run(task: str, directory: Path, *arguments: object) -> dict[str, Any]:
    facts = TASKS[task](str(directory), *(str(argument) for argument in arguments))
    assert facts["seconds"] > 0
    return facts


def test_load_file_loads_the_stored_bytes(tiny: Path) -> None:
    assert run("load-file", tiny)["weight_bytes"] == TINY.disk_bytes


def test_dense_weights_have_the_planned_size(tiny: Path) -> None:
    facts = run("load-weights", tiny, "dense")

    assert facts["weight_bytes"] == TINY.dense_bytes
    assert facts["mapped_bytes"] == 2 * 2 * 512 * 512 + 5 * 2 * 512  # embedding and head, norms
    assert facts["group_bytes"] == 2 * 2 * 512 * 1024  # gate and up


@pytest.mark.newest_library
@pytest.mark.reference
@pytest.mark.parametrize(
    "task",
    # transformers 4 needs the package accelerate for this.
    ["library-load", pytest.param("transformers-load", marks=pytest.mark.newest_transformers)],
)
@pytest.mark.filterwarnings("ignore")
def test_peers_load_equally_many_bytes(tiny: Path, task: str) -> None:
    assert run(task, tiny)["weight_bytes"] == TINY.dense_bytes


@pytest.mark.newest_library
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_the_librarys_converter_writes_the_same_dense_weights(tiny: Path, tmp_path: Path) -> None:
    run("library-convert", tiny, tmp_path / "out")

    files = (tmp_path / "out").glob("*.safetensors")
    assert TINY.dense_bytes < sum(file.stat().st_size for file in files) < 1.01 * TINY.dense_bytes


def test_the_ranks_of_a_node_fetch_each_byte_once(tiny: Path) -> None:
    """Bytes that one rank fetched are in the page cache for all; on a file system in memory, nothing is fetched."""
    run("node-bytes", tiny, 4)  # brings the program into the page cache; what is fetched of it would count too
    facts = run("node-bytes", tiny, 4)

    stored = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert facts["stored"] == stored
    assert len(facts["ranks"]) == 4
    assert all(stored / 4 < rank["asked"] < stored for rank in facts["ranks"])
    assert sum(rank["asked"] for rank in facts["ranks"]) > stored
    assert sum(rank["fetched"] for rank in facts["ranks"]) < 1.05 * stored


def test_a_rank_reads_slices_of_column_parallel_linears_and_all_of_row_parallel_linears(tiny: Path) -> None:
    cuts = run("rank-bytes", tiny, 4)["cuts"]

    assert sum(group["stored"] for group in cuts.values()) == TINY.disk_bytes
    assert cuts["row"]["read"] == cuts["row"]["stored"]
    assert cuts["column"]["read"] < 0.26 * cuts["column"]["stored"]
    assert cuts["vocabulary"]["read"] == cuts["vocabulary"]["stored"] / 4
