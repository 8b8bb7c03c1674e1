"""examples/build_engine.sh runs against a stand-in for trtllm-build that checks what it is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import tiny_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "build_engine.sh"
# It accepts what trtllm-build needs of a checkpoint directory, and writes an engine directory.
STAND_IN = """#!{python}
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint_dir", type=pathlib.Path, required=True)
parser.add_argument("--output_dir", type=pathlib.Path, required=True)
parser.add_argument("--max_batch_size", type=int, default=0)
given = parser.parse_args()
config = json.loads((given.checkpoint_dir / "config.json").read_text())
# The builder reads no hidden file; convert keeps the list of its own files in one.
names = {{path.name for path in given.checkpoint_dir.iterdir() if not path.name.startswith(".")}}
assert names == {{"config.json"}} | {{f"rank{{i}}.safetensors" for i in range(config["mapping"]["world_size"])}}, names
given.output_dir.mkdir(parents=True)
(given.output_dir / "config.json").write_text(json.dumps({{"max_batch_size": given.max_batch_size}}))
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with trtllm-ct of this tree."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _write(folder / "trtllm-ct", f'#!/bin/sh\nexec "{sys.executable}" -m trtllm_ct "$@"\n')
    return folder


def run(programs: Path, *arguments: object, **sizes: str) -> subprocess.CompletedProcess[str]:
    path = f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | sizes,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_converts_verifies_and_builds(programs: Path, tmp_path: Path) -> None:
    _write(programs / "trtllm-build", STAND_IN.format(python=sys.executable))
    config = tiny_config(hidden=256, heads=4, kv_heads=2, intermediate=512, layers=2)
    made = write_checkpoint(tmp_path / "made", config=config, scheme="int4-g64")

    done = run(programs, made.directory, tmp_path / "work", "--max_batch_size", 8, TP="2", PP="2")

    assert done.returncode == 0, done.stderr
    assert '{"max_batch_size": 8}' in (tmp_path / "work" / "engine" / "config.json").read_text()
    assert f"Run it with: mpirun -n 4 python3 run.py --engine_dir {tmp_path}/work/engine" in done.stdout
    assert "good" in done.stdout


def test_without_trtllm_build_it_says_what_to_use_instead(programs: Path, tmp_path: Path) -> None:
    done = run(programs, tmp_path / "made")

    assert done.returncode == 1
    assert "--to modelopt" in done.stderr


def test_without_a_directory_it_shows_its_usage(programs: Path) -> None:
    assert run(programs).returncode == 2


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
