"""A stand-in for TensorRT-LLM's PyTorch backend, for tests on machines without a GPU.

`installed("mid")` puts this folder's small `tensorrt_llm` on the import path, as the generation of that name. It
imitates, on the CPU and in float32, what the backend does with a checkpoint from `LLM(...)` to logits. It is as strict
as the backend, and as careless. Every file names the upstream file that it imitates. None of the code comes from
upstream.

For tests only, its `LLM` has `logits(token_ids, draft=False)`, float32 [tokens, vocabulary], and `models`, the modules
of every rank that runs in this process. While a model is loaded, uninitialized memory is NaN, or all ones for integers.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

__all__ = ["GENERATIONS", "GENERATION_OF", "RELEASE_OF", "installed"]

GENERATION_OF = {"stock-1.0": "old", "stock-1.2": "mid", "stock-1.3": "newest"}
"""The generation that imitates each of this project's releases (`trtllm_ct/engine/releases.py`), oldest first.

"old" is 1.0 and 1.1, "mid" early 2026, which release 1.2 most likely is, and "newest" main of September 2026.
"""

GENERATIONS = tuple(GENERATION_OF.values())

RELEASE_OF = {generation: release for release, generation in GENERATION_OF.items()}
"""The release to plan for, so that a plan suits a generation."""

_HERE = str(Path(__file__).parent)


@contextmanager
def installed(
    generation: str = "newest",
    *,
    in_process: bool = True,
    quantize_activations: bool = False,
    gptq: bool = False,
    ct_parser: str | None = None,
    sm: int = 90,
    importers: Sequence[str] = (),
) -> Iterator[ModuleType]:
    """Make `import tensorrt_llm` import the double, yield that module, and undo everything afterwards.

    `in_process` runs all ranks in this process, one loader copy each; otherwise every rank is a spawned process that
    gets pickled arguments and the environment variables named TRTLLM* and TLLM* only.
    `quantize_activations` simulates FP8 activations (per tensor, and per row) instead of computing in float32.
    `gptq` adds the W4A16_GPTQ Linear method (NVIDIA/TensorRT-LLM pull request 19442); newest only.
    `ct_parser` is the compressed-tensors parser: A, B (newest's default) or C; older generations have none.
    `sm` is the compute capability: kernels differ by it, and some don't exist.
    `importers` are modules that import tensorrt_llm; they are imported again inside, and removed afterwards.
    """
    variables = {
        "TLLM_DOUBLE_GENERATION": generation,
        "TLLM_DOUBLE_QUANTIZE_ACTIVATIONS": str(int(quantize_activations)),
        "TLLM_DOUBLE_GPTQ": str(int(gptq)),
        "TLLM_DOUBLE_CT_PARSER": ct_parser or "",
        "TLLM_DOUBLE_SM": str(sm),
        "TLLM_WORKER_USE_SINGLE_PROCESS": str(int(in_process)),
    }
    before = {name: os.environ.get(name) for name in variables}
    hidden = _take_modules(importers)
    threads = torch.get_num_threads()
    # The models of tests are so small that threads only slow them down, on a busy machine a hundred times.
    torch.set_num_threads(1)
    os.environ.update(variables)
    sys.path.insert(0, _HERE)
    try:
        yield importlib.import_module("tensorrt_llm")
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(_HERE)
        _take_modules(importers)
        sys.modules.update(hidden)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _take_modules(importers: Sequence[str]) -> dict[str, ModuleType]:
    """Remove the double and all modules that imported it, so that the next import loads the next generation."""
    roots = ("tensorrt_llm", *importers)
    below = tuple(f"{root}." for root in roots)
    names = [name for name in sys.modules if name in roots or name.startswith(below)]
    return {name: sys.modules.pop(name) for name in names}
