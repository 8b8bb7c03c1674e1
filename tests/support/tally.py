"""The tally of a run with `--tally FILE`: what became of the model of each class, from which a page of docs is made.

A test notes an outcome as the property `outcome`: the class, the scheme, the result and why. The file keeps what it
had of other classes, so a run may be done in parts. It begins anew for other releases of transformers and of
compressed-tensors.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

__all__ = ["Tally", "noted", "pytest_configure"]

_PACKAGES = ("transformers", "compressed-tensors")


def noted(name: str, scheme: str, result: str, why: str, folder: Path) -> tuple[str, list[str]]:
    """Return the property for an outcome; a reason is one line of at most 200 characters, without the test's folder."""
    line = " ".join(why.replace(f"{folder}/", "").split())
    return "outcome", [name, scheme, result, line if len(line) <= 200 else f"{line[:200].rpartition(' ')[0]} ..."]


class Tally:
    """Writes each outcome to a file as soon as its test has ended: an interrupted run keeps its part."""

    def __init__(self, path: Path) -> None:
        from tiny_classes import class_names

        self._path = path
        self._packages = {package: version(package) for package in _PACKAGES}
        self._classes = sorted(class_names())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, value in report.user_properties if report.when == "call" else ():
            if key == "outcome" and isinstance(value, (list, tuple)):
                name, scheme, result, why = value
                outcomes = self._outcomes()
                outcomes.setdefault(name, {})[scheme] = [result, why]
                self._write({name: dict(sorted(each.items())) for name, each in sorted(outcomes.items())})

    def _outcomes(self) -> dict[str, dict[str, list[str]]]:
        """Return what the file has of these releases; another run may have written to it meanwhile."""
        before: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        known: dict[str, dict[str, list[str]]] = before.get("outcomes", {})
        return known if before.get("packages") == self._packages else {}

    def _write(self, outcomes: dict[str, dict[str, list[str]]]) -> None:
        document = {"packages": self._packages, "classes": self._classes, "outcomes": outcomes}
        self._path.write_text(f"{json.dumps(document, indent=1)}\n", encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--tally")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Tally(Path(path)))
