"""What the measurement of docs/hub.md prints, at three layers in place of 61."""

from __future__ import annotations

from extremes.hub import measure, table


def test_a_repository_is_measured_beside_its_directory() -> None:
    """Commit, configuration, index and a header of each of four files, each header from another host."""
    directory, repository, again = measure(layers=3)

    assert (directory.requests, directory.nbytes) == (0, 0)
    assert 11 <= repository.requests <= 12
    assert again.requests <= 2
    assert again.nbytes < repository.nbytes / 100
    assert [line.count("|") for line in table([directory, repository]).splitlines()] == [5] * 4
