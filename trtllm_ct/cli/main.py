"""The entry point of the command line: signals are handled before anything that takes time is imported."""

from __future__ import annotations

from trtllm_ct.cli.interrupts import ending_at_once

__all__ = ["main"]


def main() -> None:
    """Run the command line `trtllm-ct`; see `commands.py`."""
    ending_at_once()
    from trtllm_ct.cli.commands import main as run

    run()
