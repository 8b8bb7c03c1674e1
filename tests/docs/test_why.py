"""docs/why.md is up to date: its script writes the same page from the double of the engine and the real checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "generate_why.py"


@pytest.mark.shared
@pytest.mark.reference
def test_the_page_is_what_the_script_would_write(shared: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(shared / "checkpoints"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stdout + result.stderr
