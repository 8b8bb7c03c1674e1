"""docs/why.md is what its script finds now, on the double of the engine and the real checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "generate_why.py"


@pytest.mark.shared
@pytest.mark.reference
def test_the_page_is_what_the_script_would_write(shared: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(shared / "checkpoints"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
