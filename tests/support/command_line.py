"""The command line, run in this process: exit code, stdout and stderr of `trtllm-ct ARGUMENTS`."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from trtllm_ct.cli.commands import main

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a run left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Stdout as one JSON document, as strict readers take it: without NaN and Infinity."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def err_words(self) -> str:
        """Stderr without its line breaks."""
        return " ".join(self.err.split())


def run_cli(*arguments: object, main: Callable[[], None] = main) -> Done:
    """What `main` leaves when it is called with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["trtllm-ct", *(str(argument) for argument in arguments)]
    code: Any = 0
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return Done(code=code or 0, out=out.getvalue(), err=err.getvalue())
