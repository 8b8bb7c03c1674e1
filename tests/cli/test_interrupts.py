"""The handlers of signals are there before anything that takes time is imported."""

from __future__ import annotations

import json

from fresh_python import run_python

MODULES_AT_THE_START = """
import sys
from trtllm_ct.cli import interrupts
from trtllm_ct.cli import main as entry_point

def stop():
    names = sorted(sys.modules)
    import json
    print(json.dumps(names))
    raise SystemExit

entry_point.ending_at_once = stop
entry_point.main()
"""


def test_signals_are_handled_before_modules_that_take_time_are_imported() -> None:
    imported = set(json.loads(run_python(MODULES_AT_THE_START).stdout))

    assert "trtllm_ct.cli.interrupts" in imported
    assert not {"contextlib", "re", "typing", "logging", "trtllm_ct.base", "trtllm_ct.cli.commands"} & imported
