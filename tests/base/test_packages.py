"""Releases of packages: what is too old is told by numbers, and what can't be told passes."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from trtllm_ct.base.packages import PACKAGES, Package

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.mark.parametrize(
    ("release", "outdated"),
    [
        ("0.8.1", True),
        ("0.8", True),
        ("0.8.0.1", True),
        ("0.9", False),
        ("0.9.0a20260101", False),
        ("0.9.0", False),
        ("0.20.0", False),
        ("1.0", False),
    ],
)
def test_a_release_is_compared_by_its_numbers(monkeypatch: pytest.MonkeyPatch, release: str, outdated: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: release)

    assert PACKAGES["compressed_tensors"].outdated == (release if outdated else "")


def test_what_is_not_installed_is_not_outdated() -> None:
    assert Package(name="not_a_package", use="", remedy="", oldest="1.0").outdated == ""


def test_a_package_without_a_bound_is_never_outdated() -> None:
    assert PACKAGES["numpy"].outdated == ""


def test_bounds_are_those_of_the_extras() -> None:
    """What pip installs with an extra is never called too old."""
    requirements = PYPROJECT.read_text(encoding="utf-8").replace("-", "_")

    for package in PACKAGES.values():
        if package.oldest:
            assert re.findall(rf'"{package.name}>=([\d.]+)', requirements) == [package.oldest]
