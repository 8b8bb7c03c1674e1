"""Files that are changed at random are read, or refused by an error that says what is wrong; never anything else.

The cases are always the same; `python -m fuzz.run`, with tests/ and tests/support/ on the path, runs others and more.
"""

from __future__ import annotations

import pytest
from fuzz.run import MAX_SECONDS, run_cases
from fuzz.subjects import SUBJECTS, make_subjects

CASES = 20_000


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory):
    return {subject.name: subject for subject in make_subjects(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.parametrize("name", SUBJECTS)
def test_whatever_a_file_holds_is_read_or_refused(subjects, name: str) -> None:
    figures = run_cases((subjects[name],), CASES, seed=1)

    assert figures.escapes == []
    assert sum(figures.outcomes.values()) == round(CASES * SUBJECTS[name])
    assert figures.slowest < MAX_SECONDS
    assert figures.grown_megabytes < 1000


def test_nearly_all_kinds_of_outcomes_occur(subjects) -> None:
    """Otherwise the changes would be too small, or so large that nothing is read any more."""
    outcomes = run_cases(tuple(subjects.values()), 1000, seed=2).outcomes

    assert {"header: read", "header: CatalogError", "index: read", "config: read", "config: ConfigError"} <= set(
        outcomes
    )
