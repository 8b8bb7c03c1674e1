"""docs/every-class.md is what its script makes of docs/every-class.json, and a run writes that file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tally import Tally, noted

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "generate_every_class.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_every_class", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_would_write(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--check"])

    with pytest.raises(SystemExit) as stopped:
        script.main()

    assert stopped.value.code == 0


def test_every_outcome_is_counted_and_each_that_is_not_exact_has_its_reason(script: ModuleType) -> None:
    document = {
        "packages": {"transformers": "5.0"},
        "classes": ["A", "B", "C", "D"],
        "outcomes": {
            "A": {"fp8": ["exact", ""], "int4": ["exact", ""]},
            "B": {"fp8": ["inspect", "B.x: lost"], "int4": ["exact", ""]},
            "C": {"fp8": ["not built", "one | two"], "int4": ["not built", "one | two"]},
            "Tower": {"fp8": ["values", "['w']"]},
        },
    }

    page = script.page(document)

    assert "| `fp8` | 4 | 1 | 1 | 0 | 1 | 1 | 1 | 0 |" in page
    assert "| `int4` | 3 | 0 | 2 | 0 | 0 | 0 | 1 | 0 |" in page
    assert "| `B` | `fp8` | refused | `B.x: lost` |" in page
    assert r"| `C` | `fp8`, `int4` | not built | `one \| two` |" in page
    assert "| `Tower` | `fp8` | failed | `['w']` |" in page
    assert page.endswith("`A`.\n\nNot tried: `D`.\n")


def report(when: str, *properties: tuple[str, object]) -> Any:
    return SimpleNamespace(when=when, user_properties=list(properties))


@pytest.mark.reference
@pytest.mark.library
def test_the_file_keeps_what_other_runs_wrote_for_the_same_releases(tmp_path: Path) -> None:
    path = tmp_path / "tally.json"
    first = Tally(path)
    first.pytest_runtest_logreport(report("setup", noted("A", "fp8", "values", "", tmp_path)))
    first.pytest_runtest_logreport(report("call", noted("A", "fp8", "exact", "", tmp_path), ("other", 1)))
    why = f"{tmp_path}/source/config.json:\n expected " + "much " * 100
    Tally(path).pytest_runtest_logreport(report("call", noted("B", "fp8", "refused", why, tmp_path)))

    document = json.loads(path.read_text())

    assert document["outcomes"]["A"] == {"fp8": ["exact", ""]}
    result, reason = document["outcomes"]["B"]["fp8"]
    assert (result, reason[:28]) == ("refused", "source/config.json: expected")
    assert reason.endswith("much ...")

    path.write_text(json.dumps(document | {"packages": {"transformers": "0"}}))
    Tally(path).pytest_runtest_logreport(report("call", noted("B", "fp8", "exact", "", tmp_path)))

    assert json.loads(path.read_text())["outcomes"] == {"B": {"fp8": ["exact", ""]}}
