"""Containerfile fits the checkout and the installation page; nothing here builds an image."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
KNOWN = {"FROM", "WORKDIR", "COPY", "RUN", "ARG", "ENV", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """Every instruction with its arguments; comments are left out, and continued lines joined."""
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    lines = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines.splitlines() if line.strip()]


def test_every_instruction_is_known_and_the_first_names_a_base() -> None:
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM"
    assert set(names) <= KNOWN


def test_what_is_copied_exists() -> None:
    stages = {words.split(" AS ")[1] for name, words in instructions() if name == "FROM" and " AS " in words}
    for words in (shlex.split(words) for name, words in instructions() if name == "COPY"):
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        else:
            assert all((ROOT / source).exists() for source in words[:-1])


def test_the_wheel_gets_every_file_that_its_metadata_names() -> None:
    copied = {source for name, words in instructions() if name == "COPY" for source in shlex.split(words)[:-1]}
    needed = re.findall(
        r'^readme = "(.+)"$|^license-files = \["(.+)"\]$|^packages = \["([^"]+)"\]$', PROJECT, re.MULTILINE
    )
    assert {name for names in needed for name in names if name} | {"pyproject.toml"} <= copied
    assert len(needed) == 3


def test_the_base_has_a_python_that_is_supported() -> None:
    bases = {words.split()[0] for name, words in instructions() if name == "FROM"}
    (version,) = {re.fullmatch(r"python:(\d\.\d+)-slim", base)[1] for base in bases}  # type: ignore[index]
    assert f'"Programming Language :: Python :: {version}"' in PROJECT


def test_it_starts_the_program_of_the_package() -> None:
    (entry,) = (json.loads(words) for name, words in instructions() if name == "ENTRYPOINT")
    assert f'\n{entry[0]} = "trtllm_ct.' in PROJECT


def test_the_installation_page_shows_how_to_build_it() -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    extras = re.search(r"--build-arg EXTRAS='\[(\w+)\]'", page)
    assert extras is not None
    assert f"\n{extras[1]} = [" in PROJECT
    assert any(name == "ARG" and words.startswith("EXTRAS=") for name, words in instructions())
