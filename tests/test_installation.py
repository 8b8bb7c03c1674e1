"""What pyproject.toml asks for fits beside the engine's releases; the files in constraints/ say what was tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
RELEASES = sorted(path.stem for path in (ROOT / "constraints").glob("tensorrt-llm-*.txt"))
EXTRAS = ("compressed-tensors", "reference", "fsspec", "mpi")
# What pip takes for each pinned range.
TAKEN = {
    "tensorrt-llm-1.0": {"torch": "2.7.1", "numpy": "1.26.4", "transformers": "4.55.0"},
    "tensorrt-llm-1.1": {"torch": "2.9.0", "numpy": "1.26.4", "transformers": "4.56.0"},
    "tensorrt-llm-1.2": {"torch": "2.9.1", "numpy": "1.26.4", "transformers": "4.57.3"},
    "tensorrt-llm-1.3": {"torch": "2.10.0", "numpy": "2.3.5", "transformers": "4.57.3"},
}


def block(name: str) -> list[Requirement]:
    """The requirements of a list in pyproject.toml."""
    listed = re.search(rf"(?ms)^{name} = \[(.*?)\]", PYPROJECT)
    assert listed is not None, name
    return [Requirement(text) for text in re.findall(r'"([^"]+)"', listed[1])]


def constraints(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    listed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in listed}


REQUIRED = [*block("dependencies"), *(requirement for extra in EXTRAS for requirement in block(extra))]


@pytest.mark.parametrize("release", RELEASES)
def test_nothing_asks_for_more_than_a_release_pins(release: str) -> None:
    pins, taken = constraints(release), TAKEN[release]

    assert pins.keys() == taken.keys()
    for name, version in taken.items():
        assert pins[name].specifier.contains(version)
        for requirement in (requirement for requirement in REQUIRED if requirement.name == name):
            assert requirement.specifier.contains(version), f"{requirement} beside {release}"


def test_the_lowest_environment_has_the_lower_bounds() -> None:
    lowest = {name: str(pin.specifier).removeprefix("==") for name, pin in constraints("lowest").items()}
    bounds = {}
    for requirement in REQUIRED:
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        bounds[requirement.name] = bound

    assert lowest.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", lowest[name]), name


def test_the_page_has_a_line_for_each_release() -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")

    for release in RELEASES:
        assert f"`make test-beside RELEASE={release.removeprefix('tensorrt-llm-')}`" in page
