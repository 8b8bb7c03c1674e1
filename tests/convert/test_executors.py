"""Signals end an MPI job: no rank waits for one that is gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders import tiny_config, write_checkpoint

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "mpirun"

COMMAND = """
import os, signal, subprocess, sys, time
from trtllm_ct.cli import interrupts
from trtllm_ct.convert import coordinate, executors, units, worker

units.UNIT_BYTES = 1
RANK = os.environ.get("PMI_RANK") or os.environ.get("PMIX_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]


def before(module, name, action):
    call = getattr(module, name)

    def wrapped(*arguments, **options):
        action()
        return call(*arguments, **options)

    setattr(module, name, wrapped)


sent = []


def interrupt():
    if sent:  # A second signal ends a process at once.
        return
    sent.append(True)
    os.kill(os.getpid(), signal.NUMBER)
    time.sleep(0.1)


def interrupt_later():  # by another process: threads don't run while MPI waits
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -{signal.NUMBER:d} {os.getpid()}"])


def never_come():
    time.sleep(1000)


ACTIONS
from trtllm_ct.cli.main import main
main()
"""

MOMENTS = {
    "while it imports": ("before(interrupts.ending_on_signals, '__enter__', interrupt)", ""),
    "before MPI starts": ("before(executors, '_mpi_pool', interrupt)", ""),
    "while MPI waits for the other rank": (
        "before(executors, '_mpi_pool', interrupt_later)",
        "before(executors, '_mpi_pool', never_come)",
    ),
    "in a unit": ("before(worker, '_sample', interrupt)\n    before(coordinate, 'wait', interrupt)", ""),
}


@pytest.mark.mpi
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_to_one_rank_ends_the_job(tmp_path: Path, moment: str, rank: int, number: str) -> None:
    write_checkpoint(tmp_path / "source", config=tiny_config(layers=2), scheme="int8-g32")
    action, other = MOMENTS[moment]
    actions = f"if RANK == '{rank}':\n    {action}\nelse:\n    {other or 'pass'}"
    code = COMMAND.replace("NUMBER", number).replace("ACTIONS", actions)
    command = [MPIRUN, "-n", "2", sys.executable, "-c", code, "convert", "source", "out", "--executor", "mpi"]

    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as job:
        try:
            _, stderr = job.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            pytest.fail("a rank waits for the other")

    assert job.returncode != 0
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()
    if "waits" not in moment:  # MPI itself is a library that no handler in Python interrupts.
        assert f"Interrupted by {number}." in stderr
