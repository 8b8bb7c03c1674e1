"""docs/why.md is up to date: its script writes the same page from the double of the engine and the real checkpoints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "generate_why.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, sidecar_cache: Path) -> ModuleType:
    """The script in this process, as a new one would import torch and transformers again; what it sets is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("generate_why", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.shared
@pytest.mark.reference
@pytest.mark.filterwarnings("default")
def test_the_page_is_what_the_script_would_write(
    script: ModuleType, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(shared / "checkpoints"), "--check"])

    with pytest.raises(SystemExit) as stopped:
        script.main()

    assert stopped.value.code == 0
