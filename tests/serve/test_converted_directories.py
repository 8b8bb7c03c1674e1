"""Directories written by `convert --to modelopt` for each release, loaded by the generation that imitates it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import engine_double
import pytest
from fp8_oracle import engine_answers

from trtllm_ct.convert.convert import convert_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.shared, pytest.mark.reference]

# Bounds on logits in standard deviations: for exact modes, and for modules rounded once to bfloat16. The engine
# requantizes the parts of a fused Linear in static FP8; they are compared with an oracle that does the same.
EXACT, ROUNDED = 2e-3, 2e-2
TOLERANCES = {
    "fp8-block": EXACT,
    "fp8-dynamic": EXACT,
    "fp8-static-kv": EXACT,
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


@pytest.mark.values
@pytest.mark.parametrize("name", TOLERANCES)
@pytest.mark.parametrize(("release", "generation"), list(engine_double.GENERATION_OF.items()))
def test_stock_gives_the_golden_logits(shared: Path, tmp_path: Path, name: str, release: str, generation: str) -> None:
    convert_checkpoint(shared / "checkpoints" / name, tmp_path / "out", engine=release)
    golden = engine_answers(shared / "checkpoints" / name)

    with (
        engine_double.installed(generation) as engine,
        engine.LLM(model=str(tmp_path / "out"), skip_tokenizer_init=True) as llm,
    ):
        error = golden.error(llm.logits(golden.prompt))

    assert error < TOLERANCES[name]
