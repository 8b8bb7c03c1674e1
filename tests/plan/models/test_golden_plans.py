"""Plans of tiny and real checkpoints of every kind of model, compared with the committed digests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from golden_plans import BUILT, GOLDEN, GOLDEN_BUILT, GOLDEN_REAL, TINY, digests, real_checkpoints

if TYPE_CHECKING:
    from pathlib import Path

TABLE = json.loads(GOLDEN.read_text(encoding="utf-8"))
OF_TRANSFORMERS = json.loads(GOLDEN_BUILT.read_text(encoding="utf-8"))
REAL = json.loads(GOLDEN_REAL.read_text(encoding="utf-8"))


def test_the_table_has_every_tiny_checkpoint() -> None:
    assert TABLE.keys() == TINY.keys()


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_checkpoint_has_the_plans_of_the_table(name: str, tmp_path: Path) -> None:
    """Sites, modes, deliveries and slices. To update the table, see `golden_plans.py`."""
    TINY[name](tmp_path)

    assert digests(tmp_path) == TABLE[name]


@pytest.mark.newest_transformers
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_a_model_that_transformers_builds_has_the_plans_of_the_table(name: str, tmp_path: Path) -> None:
    BUILT[name](tmp_path)

    assert digests(tmp_path) == OF_TRANSFORMERS[name]


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_a_real_checkpoint_has_the_plans_of_the_table(name: str, shared: Path) -> None:
    assert digests(real_checkpoints(shared / "checkpoints")[name]) == REAL[name]
