"""The path of a directory is in a report once, above the faults in its files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from builders import rewrite, tiny_config, write_checkpoint
from command_line import run_cli
from rich.console import Console

from trtllm_ct.base.errors import CatalogError, Fault
from trtllm_ct.cli import lines


def printed(renderable: object) -> str:
    console = Console(width=300, no_color=True)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def fault(where: str, found: str = "text") -> Fault:
    return Fault(where=where, expected="JSON", found=found, remedy="Download it again.")


def test_files_of_one_directory_in_an_error(tmp_path: Path) -> None:
    names = ("config.json", "tokenizer.json", "generation_config.json")
    text = printed(lines.failure(CatalogError(*(fault(f"{tmp_path}/{name}", name) for name in names))))

    assert text.count(str(tmp_path)) == 1
    assert text.splitlines()[0] == f"In {tmp_path}:"
    assert [line for line in text.splitlines() if line in names] == [*names]


@pytest.mark.parametrize("where", ["/model/config.json", "model.norm.weight", "/", "config.json: dtype"])
def test_a_single_place_stays_as_it_is(where: str) -> None:
    assert printed(lines.failure(CatalogError(fault(where)))).splitlines()[0] == where


def test_other_directories_keep_their_paths() -> None:
    text = printed(lines.faults([fault("/model/a.json"), fault("/models/b.json", "b")], [Path("/model"), None]))

    assert [line for line in text.splitlines() if ".json" in line] == ["a.json", "/models/b.json"]


@pytest.mark.parametrize("command", ["verify", "doctor", "inspect"])
def test_reports_of_commands(tmp_path: Path, command: str) -> None:
    """Files that were damaged after a conversion."""
    source = write_checkpoint(tmp_path / "in", config=tiny_config(hidden=128), scheme="int4-g64").directory
    out = tmp_path / "out"
    assert run_cli("convert", source, out).code == 0
    rewrite(out, lambda stored: stored["model.norm.weight"].neg_())
    (out / "hf_quant_config.json").write_text("{")
    (source / "generation_config.json").write_text("{")
    places = {"verify": [source, out], "doctor": [out], "inspect": [out]}[command]

    done = run_cli(command, *places)

    assert (done.out + done.err).count(str(out)) == 1
    assert os.fspath(source) not in done.out + done.err or command == "verify"
