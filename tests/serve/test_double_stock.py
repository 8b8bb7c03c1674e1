"""How stock TensorRT-LLM without a plug-in handles compressed-tensors directories, per checkpoint and release."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.shared

WEIGHT_ONLY = (TypeError, "'NoneType' object is not subscriptable")
"""The error of the parser, which reads the strategy of activations also where there are none."""
MISSING = (AssertionError, "^weight$")
"""The error of a fused Linear that finds no `weight`, because its tensors have compressed-tensors names."""

NEWEST: dict[str, tuple[type[Exception], str]] = {
    "fp8-static-kv": (ValueError, "Unsupported weights_quant_strategy: tensor"),
    "mixed-fp8-w4": MISSING,
    "mixtral-w4a16": WEIGHT_ONLY,
    "mxfp4a16": (ValueError, "unsupported quant mode"),
    "nvfp4": MISSING,
    "qwen3moe-nvfp4": MISSING,
    "sparse-bitmask": (ValueError, "config_groups is not set"),
    "sparse24-fp8": MISSING,
    "w4a16-actorder-group": WEIGHT_ONLY,
    "w4a16-g64-asym": WEIGHT_ONLY,
    "w4a16-gptq": WEIGHT_ONLY,
    "w8a16-channel": WEIGHT_ONLY,
    "w8a16-group": WEIGHT_ONLY,
}
RIGHT = ["fp8-block", "fp8-dynamic"]


def error_of(engine: Any, directory: Path) -> float:
    """Return the largest difference from the golden logits, in standard deviations of the golden logits."""
    import numpy as np

    with np.load(directory / "golden.npz") as golden:
        prompt, want = golden["prompt"].tolist(), torch.from_numpy(golden["logits"])
    with engine.LLM(model=directory, skip_tokenizer_init=True) as llm:
        return float((llm.logits(prompt)[-8:] - want).abs().max() / want.std())


@pytest.mark.parametrize("checkpoint", sorted(NEWEST))
def test_the_newest_release_refuses(shared: Path, checkpoint: str) -> None:
    error, message = NEWEST[checkpoint]
    with engine_double.installed("newest") as engine, pytest.raises(error, match=message):
        error_of(engine, shared / "checkpoints" / checkpoint)


@pytest.mark.parametrize("checkpoint", RIGHT)
def test_the_newest_release_loads(shared: Path, checkpoint: str) -> None:
    with engine_double.installed("newest") as engine:
        assert error_of(engine, shared / "checkpoints" / checkpoint) < 2e-3


def test_int8_weights_are_quietly_rounded_to_fp8(shared: Path) -> None:
    """It loads and runs without any warning."""
    with engine_double.installed("newest") as engine:
        assert 0.02 < error_of(engine, shared / "checkpoints" / "w8a8-dynamic") < 1


@pytest.mark.parametrize("checkpoint", sorted({*NEWEST, *RIGHT, "w8a8-dynamic"}))
@pytest.mark.parametrize("generation", engine_double.GENERATIONS[:-1])
def test_old_releases_refuse_every_compressed_tensors_block(shared: Path, generation: str, checkpoint: str) -> None:
    with (
        engine_double.installed(generation) as engine,
        pytest.raises(NotImplementedError, match="Unsupported quantization_config"),
    ):
        error_of(engine, shared / "checkpoints" / checkpoint)


def test_the_first_parser_read_activations_of_mxfp4_too(shared: Path) -> None:
    with engine_double.installed("newest", ct_parser="A") as engine, pytest.raises(TypeError):
        error_of(engine, shared / "checkpoints" / "mxfp4a16")
