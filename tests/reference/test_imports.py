from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trtllm_ct.reference

SOURCES = sorted(Path(trtllm_ct.reference.__path__[0]).glob("*.py"))


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, trtllm_ct.reference; print(*{'torch', 'transformers'} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == ""


def test_all_public_names_resolve() -> None:
    assert all(getattr(trtllm_ct.reference, name).__name__ == name for name in trtllm_ct.reference.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="load_modell"):
        trtllm_ct.reference.load_modell  # noqa: B018


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_reference_shares_no_code_with_what_it_proves(source: Path) -> None:
    """It may import vocabulary, file readers and configurations; only the bridge may import the pipeline."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    folders = {name.split(".")[1] for name in imported if name.startswith("trtllm_ct.")}

    vocabulary = {"base", "engine", "reference"}
    files = {"checkpoint", "config"}
    # `layouts/torch_tensors.py` only makes tensors over the memory of arrays.
    assert {name for name in imported if name.startswith("trtllm_ct.layouts")} <= {"trtllm_ct.layouts.torch_tensors"}
    extra = {
        "directory": files | {"layouts"},
        "bridge": {"config", "layouts", "pipeline"},
        "effective_weights": {"config"},
    }
    assert folders <= vocabulary | extra.get(source.stem, set())
