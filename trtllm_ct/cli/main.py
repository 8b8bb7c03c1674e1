"""The entry point of the command line: signals are handled before anything that takes time is imported.

The garbage collector pauses from the first import on, and does not run at the end either: it would traverse the objects
of all modules, and of plans with 10^5 of them, to free what the end of the process frees.
"""

from __future__ import annotations

import sys

from trtllm_ct.cli.interrupts import ending_at_once

__all__ = ["main"]


def main() -> None:
    """Run the command line `trtllm-ct`; see `commands.py`."""
    ending_at_once()

    from trtllm_ct.base.collector import collector_paused

    with collector_paused():
        from trtllm_ct.cli.commands import main as run

        try:
            run()
        finally:
            _skip_last_collection()


def _skip_last_collection() -> None:
    """Hide all objects from the collector, which Python runs once more before the process ends.

    Extensions below torch report objects that are never collected as leaks, so not where torch is loaded.
    """
    if "torch" not in sys.modules:
        import gc

        gc.freeze()
