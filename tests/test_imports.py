"""What importing costs: nothing heavy until it is needed, and never the engine."""

from __future__ import annotations

import ast
import json
import pkgutil
from pathlib import Path

import pytest
from builders import tiny_config, write_checkpoint
from fresh_python import run_python

import trtllm_ct

ENGINE_FILE = "trtllm_ct.serve.bindings"
HEAVY = (
    "torch",
    "transformers",
    "tensorrt_llm",
    "compressed_tensors",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "fsspec",
    "pydantic",
    "rich",
)
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(trtllm_ct.__path__, "trtllm_ct.") if not info.name.endswith("__main__")
)


def loaded_after(code: str, *arguments: object) -> set[str]:
    """Which of the heavy packages a fresh process has imported after `code`."""
    report = f"import json, sys\n{code}\nprint()\nprint(json.dumps(sorted(set({HEAVY!r}) & sys.modules.keys())))"
    return set(json.loads(run_python(report, *arguments).stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded_after("import trtllm_ct; dir(trtllm_ct)") == set()


@pytest.mark.parametrize(
    "code",
    [
        "trtllm_ct.FormatDetector().detect(sys.argv[1])",
        "trtllm_ct.inspect_checkpoint(sys.argv[1]).to_dict()",
        "trtllm_ct.plan_checkpoint(sys.argv[1]).to_dict()",
        "trtllm_ct.CompressedTensorsConfigLoader().load(sys.argv[1])",
        "trtllm_ct.to_quant_config(trtllm_ct.CompressedTensorsConfigReader().read(sys.argv[1]))",
    ],
)
def test_what_reads_headers_only_never_imports_torch(tmp_path: Path, code: str) -> None:
    write_checkpoint(tmp_path, scheme={"q_proj": "int4-g64", "down_proj": "fp8-tensor-static"}, kv=True)

    assert loaded_after(f"import trtllm_ct; {code}", tmp_path) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "DIR"],
        ["inspect", "DIR", "--modules"],
        ["plan", "DIR", "--to", "modelopt"],
    ],
    ids=" ".join,
)
def test_commands_that_read_headers_only_import_nothing_heavy_but_what_prints(
    tmp_path: Path, arguments: list[str]
) -> None:
    assert loaded_after_command(tmp_path, arguments) == {"rich"}


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["version"], ["inspect", "DIR", "--modules", "--json"], ["plan", "DIR", "--json"]],
    ids=" ".join,
)
def test_what_prints_is_imported_for_tables_only(tmp_path: Path, arguments: list[str]) -> None:
    assert loaded_after_command(tmp_path, arguments) == set()


@pytest.mark.parametrize(
    "arguments",
    [["convert", "DIR", "OUT"], ["convert", "DIR", "OUT", "--to", "dense", "--strict"], ["verify", "DIR"]],
    ids=" ".join,
)
def test_commands_that_read_weights_import_nothing_heavy_but_numpy(tmp_path: Path, arguments: list[str]) -> None:
    assert loaded_after_command(tmp_path, arguments) <= {"numpy", "rich"}


def test_a_conversion_writes_its_first_byte_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source")
    code = f"""
import os
def write(*arguments):
    global at_first
    at_first = at_first if at_first is not None else sorted(set({HEAVY!r}) & sys.modules.keys())
    return pwrite(*arguments)
at_first, pwrite, os.pwrite = None, os.pwrite, write
sys.argv = ["trtllm-ct", "convert", {str(tmp_path / "source")!r}, {str(tmp_path / "out")!r}, "--json"]
from trtllm_ct.cli.main import main
try: main()
finally: print(at_first, file=sys.stderr)
"""

    assert run_python(f"import sys\n{code}").stderr.splitlines()[-1] == "[]"


def loaded_after_command(folder: Path, arguments: list[str]) -> set[str]:
    """Which of the heavy packages a command imports, with a checkpoint in place of DIR and a new directory for OUT."""
    names = {"DIR": str(folder / "source"), "OUT": str(folder / "out")}
    write_checkpoint(folder / "source")
    argv = ["trtllm-ct", *(names.get(argument, argument) for argument in arguments)]
    call = "from trtllm_ct.cli.commands import main\ntry: main()\nexcept SystemExit as stop: assert not stop.code"
    return loaded_after(f"sys.argv = {argv!r}\n{call}")


BLOCKED = """
import importlib.abc

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError("torch is imported")

sys.meta_path.insert(0, NoTorch())
import trtllm_ct
"""


@pytest.mark.parametrize("scheme", ["int4-g64-asym", "int4-g64-actorder", "fp8-block", "nvfp4", "mxfp6a8", "w8a8"])
def test_converting_and_verifying_never_import_torch(tmp_path: Path, scheme: str) -> None:
    """Neither do inspection and planning, in the same process."""
    write_checkpoint(tmp_path / "source", scheme=scheme, config=tiny_config(hidden=128, intermediate=256), kv=True)
    code = BLOCKED + (
        "source = sys.argv[1]\n"
        "trtllm_ct.inspect_checkpoint(source); trtllm_ct.plan_checkpoint(source)\n"
        "for to in ('modelopt', 'dense'):\n"
        "    trtllm_ct.convert_checkpoint(source, f'{source}-{to}', to=to)\n"
        "    assert trtllm_ct.verify_checkpoint(source, f'{source}-{to}').good\n"
    )

    assert loaded_after(code, tmp_path / "source") == {"numpy"}


def test_every_module_can_be_imported_and_none_imports_the_engine_or_the_library() -> None:
    """Transformers and compressed-tensors too are imported only by calls that need them."""
    imports = "\n".join(f"import {name}" for name in MODULES if name != ENGINE_FILE)

    assert loaded_after(imports) <= {"torch", "numpy", "rich"}


def test_importing_what_converts_and_verifies_imports_no_torch() -> None:
    """Only files of the folders `serve` and `reference` may import it when they are imported."""
    names = [name for name in MODULES if name.split(".")[1] not in {"serve", "reference"}]

    assert "torch" not in loaded_after("\n".join(f"import {name}" for name in names))


@pytest.mark.parametrize("name", MODULES)
def test_one_file_imports_the_engine(name: str) -> None:
    """Late imports, inside functions, count as well."""
    tree = ast.parse(source_of(name))
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]

    assert any(each.partition(".")[0] == "tensorrt_llm" for each in imported) == (name == ENGINE_FILE)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert source_of(name).startswith('"""')


def source_of(name: str) -> str:
    path = Path(trtllm_ct.__file__).parent.joinpath(*name.split(".")[1:])
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
