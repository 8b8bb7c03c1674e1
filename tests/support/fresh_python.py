"""Python code in a process of its own: for what a process can tell only once, such as what it has imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import trtllm_ct


def run_python(code: str, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run `code` with this package importable, `sys.argv[1:]` and more environment; only success is no error."""
    command = [sys.executable, "-c", dedent(code), *(str(argument) for argument in arguments)]
    done = subprocess.run(
        command,
        cwd=Path(trtllm_ct.__file__).parents[1],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done
