"""The committed table of modes at every parallel size, compared with the planner."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from golden_parallel import GOLDEN_PARALLEL, parallel_table

from trtllm_ct.engine.target import ENGINES

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.shared


@pytest.mark.parametrize("engine", ENGINES)
def test_every_release_plans_what_the_table_says(shared: Path, engine: str) -> None:
    """No checkpoint has a scheme whose mode depends on the release. To update the table, see `golden_parallel.py`."""
    assert parallel_table(shared / "checkpoints", engine) == json.loads(GOLDEN_PARALLEL.read_text())
