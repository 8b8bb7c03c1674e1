"""The notebook in examples/: its code cells run in order, and print what it shows.

With TRTLLM_CT_WRITE_DOCS set (`make docs`) what they print is written into the notebook instead of compared.
"""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "from_checkpoint_to_text.ipynb"
WRITE = "TRTLLM_CT_WRITE_DOCS"


def read() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown(text: str) -> list[dict[str, Any]]:
    """What a cell that prints a text has as its outputs."""
    return [{"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}] if text else []


@pytest.mark.reference
def test_the_cells_print_what_the_notebook_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = read()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), 1):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        if os.environ.get(WRITE):
            cell |= {"execution_count": number, "outputs": shown(printed.getvalue())}
        else:
            assert cell["outputs"] == shown(printed.getvalue()), f"cell {number}"
    assert list(tmp_path.iterdir()) == []
    if os.environ.get(WRITE):
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_it_is_a_notebook_that_was_run_from_top_to_bottom() -> None:
    notebook = read()
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.parametrize("step", ["inspect", "plan", "convert", "verify", "generate"])
def test_it_has_every_step(step: str) -> None:
    titles = ["".join(cell["source"]).splitlines()[0] for cell in read()["cells"] if cell["cell_type"] == "markdown"]
    assert f"## {step.capitalize()}" in titles
