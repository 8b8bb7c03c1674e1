"""`trtllm-ct demo`: inspect, convert, verify and run the checkpoint that comes with this package.

The checkpoint is a Llama model of 3.7 million parameters. It was trained on the text of Python's own documentation
topics and quantized with llm-compressor (W4A16, GPTQ). It is small enough to ship, and the text that it generates is
readable enough to show at a glance that nothing was broken.
"""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import MissingDependencyError
from trtllm_ct.base.packages import PACKAGES
from trtllm_ct.cli import report
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from trtllm_ct.cli.console import StandardConsole

__all__ = ["run_demo"]

_PROMPT = "The import statement combines two operations; it searches for the named module, then it"
_TOKENS = 40
_NEEDS = """\
The demo needs torch and transformers (the extra `reference`), about 1 GB of memory and 10 MB in the temporary
directory; no GPU, no network. It takes a few seconds, most of them to import these two."""
_NEXT = """\
Next, with a checkpoint of your own:
  trtllm-ct inspect DIR                          what it is and how it would be served
  trtllm-ct convert DIR OUT --to modelopt        a directory for stock TensorRT-LLM
  trtllm-ct verify DIR OUT                       proof that OUT holds the same weights
  trtllm-serve OUT                               on a machine with TensorRT-LLM"""


def run_demo(console: StandardConsole) -> None:
    """Run all steps and print the report of each one; raises the error of a step that fails.

    Raises `MissingDependencyError` before the first step if a package is missing that any of them needs.
    """
    console.print(_NEEDS, markup=False, highlight=False)
    for name in ("numba", "llvmlite", "torch", "transformers"):
        if not PACKAGES[name].installed:
            raise MissingDependencyError(PACKAGES[name].fault())
    demo_data = resources.files("trtllm_ct") / "cli" / "demo_data"
    with resources.as_file(demo_data) as source, tempfile.TemporaryDirectory() as work:
        out = Path(work) / "demo-modelopt"
        _heading(console, "1. Inspect: what is it, and what would TensorRT-LLM be given?")
        console.print(report.inspection(inspect_checkpoint(source)))
        _heading(console, "2. Convert to a directory that stock TensorRT-LLM loads")
        console.print(report.conversion(convert_checkpoint(source, out)))
        _heading(console, "3. Verify every weight against the source")
        verified = verify_checkpoint(source, out)
        console.print(report.verification(verified))
        verified.raise_if_bad()
        _heading(console, f"4. Generate {_TOKENS} tokens from the native layouts, on the CPU reference engine")
        from trtllm_ct.reference import generate_text  # needs torch, so it is imported after the check

        generation = generate_text(out, _PROMPT, max_tokens=_TOKENS)
        console.print(f"[bold]{generation.prompt}[/bold]{generation.text}", highlight=False)
        seconds = generation.seconds
        console.print(f"({len(generation.token_ids)} tokens in {seconds:.1f} s)\n", highlight=False)
    console.print(_NEXT, markup=False, highlight=False)


def _heading(console: StandardConsole, text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/bold cyan]", highlight=False)
