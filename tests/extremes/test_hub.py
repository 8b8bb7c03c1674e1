"""What the measurements of docs/hub.md print, at three layers in place of 61, and of a tiny model."""

from __future__ import annotations

from extremes.hub import convert_table, measure, measure_convert, table

from benchmarks.shapes import LlamaShape


def test_a_repository_is_measured_beside_its_directory() -> None:
    """Commit, configuration, index and a header of each of four files, each header from another host."""
    directory, repository, again = measure(layers=3)

    assert (directory.requests, directory.nbytes) == (0, 0)
    assert 11 <= repository.requests <= 12
    assert again.requests <= 2
    assert again.nbytes < repository.nbytes / 100
    assert [line.count("|") for line in table([directory, repository]).splitlines()] == [5] * 4


def test_conversions_of_a_repository_are_measured_beside_its_directory() -> None:
    tiny = LlamaShape(
        name="tiny", hidden=512, intermediate=1024, layers=2, heads=8, kv_heads=4, vocabulary=512, shard_bytes=10**6
    )
    runs = measure_convert(tiny, 1e9)

    directory, whole, *parts = runs
    assert (directory.nbytes, directory.most) == (0, 0)
    assert all(part.most < whole.nbytes for part in parts)
    assert all(0 <= whole.nbytes - part.nbytes < 10**6 for part in parts)  # the headers were read before
    assert len({part.nbytes for part in parts}) == 1
    assert [line.count("|") for line in convert_table(runs).splitlines()] == [5] * 6
