"""Directories that `convert --to modelopt` made, loaded as stock TensorRT-LLM of both generations loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import engine_double
import pytest
import torch

from trtllm_ct.convert import convert_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.shared, pytest.mark.reference]

# Logits in standard deviations: exact modes, modules rounded once to bfloat16, and per-tensor FP8, whose parts the
# engine itself requantizes to the largest scale of a fused Linear: 0.097 was measured, and the bound proves only that
# nothing worse happens.
EXACT, ROUNDED, REQUANTIZED = 2e-3, 2e-2, 2e-1
TOLERANCES = {
    "fp8-block": EXACT,
    "fp8-dynamic": EXACT,
    "fp8-static-kv": REQUANTIZED,
    "mixed-fp8-w4": EXACT,
    "mixtral-w4a16": ROUNDED,
    "mxfp4a16": EXACT,
    "nvfp4": EXACT,
    "qwen3moe-nvfp4": EXACT,
    "sparse-bitmask": EXACT,
    "sparse24-fp8": EXACT,
    "w4a16-actorder-group": ROUNDED,
    "w4a16-g64-asym": ROUNDED,
    "w4a16-gptq": EXACT,
    "w8a16-channel": EXACT,
    "w8a16-group": ROUNDED,
    "w8a8-dynamic": EXACT,
}
# Row-wise scales of [N, 1] and whatever else the old one refuses is gone after conversion, so both take all of them.
GENERATIONS = engine_double.GENERATIONS


@pytest.mark.parametrize("name", TOLERANCES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_stock_gives_the_golden_logits(shared: Path, tmp_path: Path, name: str, generation: str) -> None:
    import numpy as np

    convert_checkpoint(shared / "checkpoints" / name, tmp_path / "out")
    with np.load(shared / "checkpoints" / name / "golden.npz") as golden:
        prompt, expected = golden["prompt"].tolist(), torch.from_numpy(golden["logits"])

    with (
        engine_double.installed(generation) as engine,
        engine.LLM(model=str(tmp_path / "out"), skip_tokenizer_init=True) as llm,
    ):
        logits = llm.logits(prompt)[-8:]

    assert float((logits - expected).abs().max() / expected.std()) < TOLERANCES[name]
