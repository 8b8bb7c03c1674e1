"""Shell completion as docs/command-line.md describes it: the lines for a shell, and what they ask for on Tab."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = "import sys; sys.argv = ['trtllm-ct']; from trtllm_ct.cli.main import main; main()"
"""What the installed script does; its name decides that of the variables."""


def answer(asked: str, **words: str) -> str:
    environment = os.environ | words | {"_TRTLLM_CT_COMPLETE": asked}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_the_lines_for_a_shell_ask_this_program(shell: str) -> None:
    lines = answer(f"source_{shell}")
    assert "trtllm-ct" in lines
    assert f"complete_{shell}" in lines


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trtllm-ct in", {"inspect"}),
        ("trtllm-ct convert --to ", {"modelopt", "dense", "engine"}),
        ("trtllm-ct verify --ht", {"--html"}),
    ],
)
def test_commands_options_and_values_are_completed(line: str, expected: set[str]) -> None:
    found = answer("complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(line.split(" ")) - 1))
    assert set(found.split()) == expected
