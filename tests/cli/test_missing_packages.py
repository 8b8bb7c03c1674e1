"""Each command on a machine that lacks a package: it works without it, or names the package and how to install it."""

from __future__ import annotations

import importlib.metadata
import json
import re
from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint
from fresh_python import run_python

from trtllm_ct.base.packages import PACKAGES
from trtllm_ct.convert.convert import convert_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

BLOCKED = sorted(PACKAGES.keys() - {"tensorrt_llm"})
NEEDS_NO_TENSORS = {"version", "inspect", "plan", "doctor", "doctor DIR", "cache list", "cache clear"}
RUN_ALL = """
    import json, sys
    from pathlib import Path

    folder = Path(sys.argv[1])
    sys.modules[sys.argv[2]] = None
    sys.path[:0] = ["tests/support"]
    from command_line import run_cli

    DIR, OUT = folder / "DIR", folder / "OUT"
    COMMANDS = {
        "version": ["version"],
        "inspect": ["inspect", DIR, "--json"],
        "plan": ["plan", DIR, "--to", "modelopt", "--json"],
        "doctor": ["doctor", "--json"],
        "doctor DIR": ["doctor", DIR, "--json"],
        "cache list": ["cache", "list", "--json"],
        "cache clear": ["cache", "clear", "--json"],
        "convert": ["convert", DIR, folder / "native", "--to", "modelopt", "--json"],
        "convert to dense": ["convert", DIR, folder / "dense", "--to", "dense", "--json"],
        "convert with mpi": ["convert", DIR, folder / "mpi", "--to", "dense", "--executor", "mpi", "--json"],
        "verify DIR": ["verify", DIR, "--json"],
        "verify": ["verify", DIR, OUT, "--json"],
        "generate": ["generate", DIR, "--prompt", "a", "--max-tokens", "1", "--json"],
        "demo": ["demo"],
    }
    results = {}
    for name, arguments in COMMANDS.items():
        try:
            done = run_cli(*arguments)
        except Exception as error:
            results[name] = [None, f"{type(error).__name__}: {error}"]
        else:
            results[name] = [done.code, done.out + done.err]
    print()
    print(json.dumps(results))
"""


@pytest.mark.reference
@pytest.mark.mpi
@pytest.mark.parametrize("package", BLOCKED)
def test_every_command_works_or_names_the_package(tmp_path: Path, package: str) -> None:
    scheme = {"o_proj": "int4-g64", "down_proj": "nvfp4"}
    config = tiny_config(layers=1, hidden=128, intermediate=128)
    source = write_checkpoint(tmp_path / "DIR", config=config, scheme=scheme, tokenizer=True).directory
    convert_checkpoint(source, tmp_path / "OUT", to="modelopt")

    done = run_python(RUN_ALL, tmp_path, package, TRTLLM_CT_CACHE=tmp_path / "cache")

    results: dict[str, tuple[int | None, str]] = json.loads(done.stdout.splitlines()[-1])
    for command, (code, output) in results.items():
        assert code in {0, 2}, f"{command} without {package}: {output}"
        if code == 2:
            assert command not in NEEDS_NO_TENSORS, output
            assert PACKAGES[package].remedy in " ".join(output.split()), command
        elif command == "demo":
            assert "The demo needs torch and transformers" in output
    for command in ("verify DIR", "verify"):
        assert (results[command][0] == 2) == (package == "numpy"), results[command]
    converting = {command for command in results if command.startswith("convert")}
    assert converting
    if package == "torch":
        assert {results[command][0] for command in converting} == {0}


@pytest.mark.parametrize(
    "call",
    [
        "CompressedTensorsWeightLoader().load_weights(sys.argv[1])",
        "CompressedTensorsWeightLoader().load_weights(sys.argv[1], layout='stored')",
        "CompressedTensorsWeightLoader(decompressor='library').load_weights(sys.argv[1], layout='dense')",
        "CompressedTensorsWeightLoader().stream(sys.argv[1]).__next__()",
        "CompressedTensorsWeightLoader().stream(sys.argv[1], layout='stored').__next__()",
    ],
)
def test_functions_raise_the_error_of_the_package(tmp_path: Path, call: str) -> None:
    config = tiny_config(layers=1, hidden=128, intermediate=128)
    source = write_checkpoint(tmp_path / "DIR", config=config, scheme={"down_proj": "nvfp4"}).directory

    done = run_python(
        f"""
        import sys
        sys.modules["torch"] = None
        import trtllm_ct
        from trtllm_ct.base.errors import MissingDependencyError
        try:
            trtllm_ct.{call}
        except MissingDependencyError as error:
            print(error)
        """,
        source,
        tmp_path / "OUT",
    )

    assert "torch: expected the package" in done.stdout


@pytest.mark.reference
@pytest.mark.parametrize("package", ["huggingface_hub", "numpy", "torch", "transformers"])
@pytest.mark.parametrize(
    "call",
    [
        "from trtllm_ct import LLM; LLM(sys.argv[2])",
        "from trtllm_ct import LLM; LLM('publisher/model')",
        "from trtllm_ct.reference import ReferenceLLM; ReferenceLLM(sys.argv[2])",
        "from trtllm_ct import verify_checkpoint; verify_checkpoint(sys.argv[2])",
    ],
)
def test_functions_that_serve_or_check_name_a_missing_package_or_do_without(
    tmp_path: Path, call: str, package: str
) -> None:
    config = tiny_config(layers=1, hidden=128, intermediate=128)
    write_checkpoint(tmp_path / "DIR", config=config, scheme={"down_proj": "nvfp4"}, tokenizer=True)

    done = run_python(
        f"""
        import sys
        sys.modules[sys.argv[1]] = None
        from trtllm_ct.base.errors import TrtllmCtError
        try:
            {call}
        except TrtllmCtError as error:
            print(error)
        print("done")
        """,
        package,
        tmp_path / "DIR",
        HF_HUB_OFFLINE="1",
    )

    assert done.stdout.endswith("done\n"), done.stderr
    if package == "huggingface_hub" and "publisher/model" in call:
        assert "publisher/model" in done.stdout
        assert "Check the path, if it is that of a directory" in done.stdout
        assert PACKAGES[package].remedy in done.stdout


def test_remedies_name_extras_that_exist() -> None:
    extras = set(importlib.metadata.metadata("trtllm-ct").get_all("Provides-Extra") or ())

    for package in PACKAGES.values():
        assert set(re.findall(r"trtllm-ct\[([\w-]+)\]", package.remedy)) <= extras
        assert package.remedy.strip()


def test_the_engine_is_never_installed_from_the_default_index() -> None:
    """The package of this name there holds no engine."""
    assert "pip install" not in PACKAGES["tensorrt_llm"].remedy
    assert "NVIDIA" in PACKAGES["tensorrt_llm"].remedy
