"""What tests of serving start from: an engine of each generation, and a cache that no other test sees."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import engine_double
import pytest

from trtllm_ct.serve import leases, sidecar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["BINDINGS", "engine", "let_go_of_sidecars", "mid", "newest", "old", "sidecar_cache"]

BINDINGS = "trtllm_ct.serve.bindings"
"""Our module that imports the engine: it is imported anew for each double."""


def let_go_of_sidecars() -> None:
    """As if every process that used one had ended."""
    while leases._held:
        os.close(leases._held.popitem()[1])


@pytest.fixture
def sidecar_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own for each test, and no leases or records of other tests."""
    monkeypatch.setenv("TRTLLM_CT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sidecar, "_known", {})
    monkeypatch.setattr(leases, "_held", {})
    yield tmp_path / "cache"
    let_go_of_sidecars()


@pytest.fixture(params=engine_double.GENERATIONS)
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    with engine_double.installed(request.param, importers=[BINDINGS]) as module:
        yield module


@pytest.fixture
def newest() -> Iterator[Any]:
    with engine_double.installed("newest", importers=[BINDINGS]) as module:
        yield module


@pytest.fixture
def old() -> Iterator[Any]:
    with engine_double.installed("old", importers=[BINDINGS]) as module:
        yield module


@pytest.fixture
def mid() -> Iterator[Any]:
    with engine_double.installed("mid", importers=[BINDINGS]) as module:
        yield module
