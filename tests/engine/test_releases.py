"""The names of releases: lines, and stable versions."""

from __future__ import annotations

import pytest

from trtllm_ct.base.errors import UsageError
from trtllm_ct.engine.releases import RELEASES, STOCK_1_0, STOCK_1_2, STOCK_1_3, Release, release_named
from trtllm_ct.engine.target import target_named


@pytest.mark.parametrize(
    ("name", "release"),
    [
        *((release.name, release) for release in RELEASES),
        ("1.0", STOCK_1_0),
        ("1.1", STOCK_1_0),
        ("v1.1.0", STOCK_1_0),
        ("1.2", STOCK_1_2),
        ("1.2.1", STOCK_1_2),
        ("1.2.1.post1", STOCK_1_2),
        ("1.3.0", STOCK_1_3),
    ],
)
def test_a_stable_version_is_its_line(name: str, release: Release) -> None:
    assert release_named(name) is release
    assert target_named("modelopt", name) == target_named("modelopt", release.name)


@pytest.mark.parametrize("name", ["", "1", "0.20.0", "1.4", "1.20", "1.3.0rc20", "1.2.1-dev", "stock-1.1", "latest"])
def test_other_texts_name_no_release(name: str) -> None:
    assert release_named(name) is None
    with pytest.raises(UsageError) as caught:
        target_named("modelopt", name)
    (fault,) = caught.value.faults
    assert (fault.where, fault.found) == ("--engine", repr(name))


def test_no_version_belongs_to_two_lines() -> None:
    versions = [version for release in RELEASES for version in release.versions]
    assert len(versions) == len(set(versions)) > 0
