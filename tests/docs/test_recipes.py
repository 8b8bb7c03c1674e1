"""The table of recipes in README.md is what `plan` says about tiny checkpoints of these schemes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "generate_recipes.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_recipes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_the_table_is_what_plan_says(script: ModuleType) -> None:
    """`make docs` writes it anew."""
    assert script.README.read_text(encoding="utf-8") == script.content()


MODULES = [
    {"name": "plain", "mode": "plain", "stored_bytes": 1000, "delivered_bytes": 1000},
    {"name": "a", "mode": "W4A16_AWQ g128", "scheme": "int4", "stored_bytes": 10, "delivered_bytes": 10},
    {"name": "b", "mode": "W8A16", "scheme": "int8", "stored_bytes": 30, "delivered_bytes": 50},
]


def test_plain_modules_do_not_count(script: ModuleType) -> None:
    outcome = script.Outcome.of({"modules": MODULES, "problems": []})
    assert outcome == script.Outcome(modes=("W4A16_AWQ", "W8A16"), factor=1.5, deviates=False, native=True)


@pytest.mark.parametrize("problems", [[], [{"where": "the class"}]])
def test_a_dequantized_module_or_a_problem_is_not_native(script: ModuleType, problems: list[object]) -> None:
    lost = {"name": "c", "mode": "dequantized", "scheme": "int4", "stored_bytes": 1, "delivered_bytes": 4}
    document = {"modules": MODULES if problems else [*MODULES, lost], "problems": problems}
    assert not script.Outcome.of(document).native


def test_a_note_is_a_deviation(script: ModuleType) -> None:
    noted = {**MODULES[2], "note": "activations stay in 16 bits"}
    assert script.Outcome.of({"modules": [noted], "problems": []}).deviates


@pytest.mark.parametrize(
    ("served", "text"),
    [
        ({"stock-1.0": (89, 90, 100, 120), "stock-1.2": (89, 90, 100, 120), "stock-1.3": (89, 90, 100, 120)}, "all"),
        ({"stock-1.0": (90,), "stock-1.2": (90,), "stock-1.3": (90,)}, "all: 90"),
        ({"stock-1.2": (90,), "stock-1.3": (89, 90, 100, 120)}, "1.2: 90; 1.3: all"),
        ({"stock-1.3": (100, 120)}, "1.3: 100, 120"),
    ],
)
def test_releases_with_the_same_gpus_stand_together(
    script: ModuleType, served: dict[str, tuple[int, ...]], text: str
) -> None:
    assert script.places([(engine, sm) for engine, sms in served.items() for sm in sms]) == text
