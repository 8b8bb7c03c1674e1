"""The changes that a page of docs/ shows, made in a copy of the package.

A page shows a new file as a ```python block whose first line is a comment with its path, and a change as a ```diff
block: `--- path` first, then lines that are kept, removed and added. Its table of files names all of them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from os import environ, pathsep
from pathlib import Path

import trtllm_ct

__all__ = ["apply_page", "copy_of_package", "listed_files", "run_in"]

ROOT = Path(trtllm_ct.__file__).parents[1]
_COPIED = ("docs/support-matrix.md", "docs/generate_support_matrix.py")
_FENCE = re.compile(r"^```(python|diff)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NEW_FILE = re.compile(r"# ((?:trtllm_ct|docs)/[\w/.-]+)\n")
_ROW = re.compile(r"^\| `([\w.-]+/[\w/.-]+)` \|", re.MULTILINE)


def copy_of_package(place: Path) -> Path:
    """The package and what `make docs` needs, copied to a new folder.

    With bytecode and compiled loops, which stay valid for files that no page changes, and without files that another
    process has not finished.
    """
    unfinished = shutil.ignore_patterns("*.pyc.*", "*.o.*")
    shutil.copytree(ROOT / "trtllm_ct", place / "trtllm_ct", ignore=unfinished)
    for name in _COPIED:
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    return place


def listed_files(page: Path) -> set[str]:
    """The paths in the table of files of a page."""
    return set(_ROW.findall(page.read_text(encoding="utf-8")))


def apply_page(page: Path, root: Path) -> set[str]:
    """Make every change of a page below `root`; returns the paths that were written."""
    written = set()
    for language, text in _FENCE.findall(page.read_text(encoding="utf-8")):
        new = _NEW_FILE.match(text)
        if language == "diff":
            written.add(_apply_diff(text, root))
        elif new:
            assert not (root / new[1]).exists(), f"{new[1]} exists"
            (root / new[1]).write_text(text[new.end() :].lstrip("\n"), encoding="utf-8")
            written.add(new[1])
    return written


def run_in(root: Path, code: str, *arguments: object) -> str:
    """Run a program in a fresh process that imports the copy in `root`; returns its standard output."""
    paths = (root, ROOT / "tests" / "support", ROOT / "tests")
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(argument) for argument in arguments)],
        cwd=root,
        env=environ | {"PYTHONPATH": pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _apply_diff(text: str, root: Path) -> str:
    header, _, body = text.partition("\n")
    path = header.removeprefix("--- ").strip()
    file = root / path
    content = file.read_text(encoding="utf-8")
    for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE):
        lines = hunk.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in {" ", "-", ""})
        after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in {" ", "+", ""})
        assert content.count(before) == 1, f"{path}: these lines are not there once:\n{before}"
        content = content.replace(before, after)
    file.write_text(content, encoding="utf-8")
    return path
