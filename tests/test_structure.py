"""The tree is the architecture: few rooms, each with a map of its files, and no import that runs in a circle.

The order of the folders is held by import-linter (`make lint`).
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trtllm_ct

PACKAGE = Path(trtllm_ct.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES} - {PACKAGE})
MAP_LINE = re.compile(r"^([a-z0-9_]+(?:\.py|/)) +\S", re.MULTILINE)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(source: str, modules: set[str]) -> set[str]:
    """The modules among `modules` that a file imports anywhere: late ones and those for types only count too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # A name may be a submodule, or a name that the package itself defines.
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                found.add(name if name in modules else str(node.module))
    return found & modules


def test_no_imports_form_a_circle() -> None:
    graph = {name: imported(path.read_text(encoding="utf-8"), set(MODULES)) for name, path in MODULES.items()}

    assert sum(map(len, graph.values())) > len(graph)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "late",
    [
        "import a.c",
        "from a import c",
        "from a import CONSTANT, c",
        "from a.c import name",
        "def f():\n    from a.c import name",
        "if TYPE_CHECKING:\n    from a.c import name",
    ],
)
def test_a_circle_of_any_kind_of_import_is_seen(late: str) -> None:
    sources = {"a.b": late, "a.c": "from a.b import other", "a": ""}
    graph = {name: imported(source, set(sources)) for name, source in sources.items()}

    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_the_top_of_the_package_holds_few_rooms() -> None:
    """Beside `__init__.py` and `__main__.py`, whose places Python prescribes."""
    entries = [path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")]

    assert len(entries) <= 14
    assert [name for name in entries if name.endswith(".py")] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_each_folder_has_a_map_of_its_files(folder: Path) -> None:
    """One line each, in `__init__.py`, in reading order."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    listed = MAP_LINE.findall(text)

    there = {path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("__")}
    assert len(listed) == len(set(listed))
    assert set(listed) == there
