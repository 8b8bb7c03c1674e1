"""README and docs/ say what is true: every example runs, links lead somewhere, tables are those of the code.

Examples of a page run in order, in a folder where `DIR` is the bundled checkpoint and `TEXT` a text: ```python blocks
share one namespace, and each line of a ```bash block is a command. A block after a comment `<!-- not run: why -->` is
left out; ```text, ```json and ```diff are no code.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_line import run_cli

import trtllm_ct

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
LANGUAGES = {"python", "bash", "json", "text", "diff"}
NEEDS_TRANSFORMERS = ("trtllm-ct generate", "trtllm-ct perplexity", "trtllm-ct calibrate", "trtllm_ct.reference")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n\Z")
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
HOSTED = re.compile(
    r"https://(?:github\.com/trtllm-ct/trtllm-ct/(?:blob|tree)|raw\.githubusercontent\.com/trtllm-ct/trtllm-ct)/main/"
)
"""Where files of this repository are, for pages that are shown without it."""
SECOND_SENTENCE = re.compile(r"(?<!^\d)(?<!^\d\d)[.!?] +[A-Z`\[]")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(content):
        excluded = NOT_RUN.search(content[: fence.start()]) is not None
        runs = fence[1] in {"python", "bash"} and not excluded
        yield Block(language=fence[1], text=fence[2], line=content[: fence.start(2)].count("\n") + 1, runs=runs)


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines outside fences and tables."""
    blanked = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text(encoding="utf-8"))
    return ((number, line) for number, line in enumerate(blanked.splitlines(), 1) if not line.startswith("|"))


def with_examples() -> Iterator[Any]:
    for page in PAGES:
        if any(block.runs for block in blocks(page)):
            heavy = any(word in page.read_text(encoding="utf-8") for word in NEEDS_TRANSFORMERS)
            yield pytest.param(page, id=name(page), marks=[pytest.mark.reference] if heavy else [])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the bundled checkpoint as `DIR`, and the licence as `TEXT`."""
    shutil.copytree(Path(trtllm_ct.__file__).parent / "cli" / "demo_data", tmp_path / "DIR")
    shutil.copy(ROOT / "LICENSE", tmp_path / "TEXT")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", list(with_examples()))
def test_examples_run(page: Path, folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "example"}
    for block in blocks(page):
        if block.runs and block.language == "python":
            # Empty lines in front make line numbers in tracebacks those of the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
        elif block.runs:
            for command in block.text.splitlines():
                run(shlex.split(command, comments=True))


def run(words: list[str]) -> None:
    """A command of a page; ours in this process, as a new one would import torch again."""
    if words[0] == "trtllm-ct":
        done = run_cli(*words[1:])
        assert done.code == 0, f"{shlex.join(words)}\n{done.out}{done.err}"
    else:
        subprocess.run(words, check=True, capture_output=True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_fence_names_its_language(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    assert content.count("\n```") == 2 * len(FENCE.findall(content))
    assert {block.language for block in blocks(page)} <= LANGUAGES
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Links of tables too; those to other hosts are not followed, but those to files of this repository are."""
    content = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in LINK.findall(content):
        hosted = HOSTED.match(target)
        if "://" in target and not hosted:
            continue
        found = ROOT / target[hosted.end() :] if hosted else (page.parent / target).resolve() if target else page
        assert found.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(found), f"{name(page)} links to {target}#{anchor}"


def test_links_of_the_readme_lead_somewhere_wherever_it_is_shown() -> None:
    """On the page of a package index, for instance, which has no other file."""
    targets = [target for target, _ in LINK.findall(README.read_text(encoding="utf-8"))]
    assert targets
    assert [target for target in targets if not HOSTED.match(target)] == []


def test_the_readme_fits_on_a_screen_and_names_what_people_look_for() -> None:
    content = README.read_text(encoding="utf-8")
    around = re.sub(r"<!-- recipes: begin -->.*<!-- recipes: end -->", "", content, flags=re.DOTALL)
    assert around.count("\n") <= 60
    for words in (
        "inspect ORG/NAME",
        "--html",
        "compare",
        "--requantize",
        "perplexity",
        "pip install",
        "uvx trtllm-ct",
    ):
        assert words in content


def anchors(page: Path) -> set[str]:
    """The names that headings get: lower case, punctuation dropped, dashes for spaces."""
    headings = (line.lstrip("#").strip().lower() for _, line in prose(page) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    listed = {(index.parent / target).resolve() for target, _ in LINK.findall(index.read_text(encoding="utf-8"))}
    assert listed == set((ROOT / "docs").rglob("*.md")) - {index}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_one_sentence_a_line(page: Path) -> None:
    """So that a changed sentence is a changed line."""
    assert [f"{name(page)}:{number}" for number, line in prose(page) if SECOND_SENTENCE.search(line)] == []


def test_the_file_tree_of_the_architecture_is_the_package() -> None:
    page = ROOT / "docs" / "architecture.md"
    tree = next(block.text for block in blocks(page) if block.text.startswith("trtllm_ct/"))
    listed = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    package = Path(trtllm_ct.__file__).parent
    there = {path.name + "/" * path.is_dir() for path in package.iterdir() if not path.name.startswith("__")}
    assert listed == there - {"py.typed"}


def test_the_support_matrix_is_what_the_tables_say() -> None:
    """`make docs` writes it anew."""
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "docs" / "generate_support_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    matrix = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = matrix  # dataclasses look their module up
    spec.loader.exec_module(matrix)

    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page()
