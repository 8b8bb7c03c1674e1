"""Real checkpoints against the answers that their producers' own library gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from trtllm_ct.reference import ReferenceLinear, load_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.reference, pytest.mark.shared]

CHECKPOINTS = [
    "w4a16-gptq",
    "w4a16-g64-asym",
    "w8a16-channel",
    "w8a16-group",
    "fp8-static-kv",
    "fp8-dynamic",
    "mixed-fp8-w4",
]


def load_golden(directory: Path) -> dict[str, torch.Tensor]:
    import numpy as np

    with np.load(directory / "golden.npz") as golden:
        return {name: torch.from_numpy(golden[name]) for name in golden.files}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_logits_tokens_and_weights_are_the_golden_ones(shared: Path, checkpoint: str) -> None:
    directory = shared / "checkpoints" / checkpoint
    golden = load_golden(directory)
    prompt = golden["prompt"][None]

    model: Any = load_model(directory, dtype=torch.float32, quantize_activations=False)

    with torch.no_grad():
        error = (model(prompt).logits[0, -8:] - golden["logits"]).abs().max()
    assert error < 2e-3 * golden["logits"].std()
    assert torch.equal(golden["greedy"], model.generate(prompt, max_new_tokens=24, do_sample=False)[0])
    projections = {name.removeprefix("proj:"): want for name, want in golden.items() if name.startswith("proj:")}
    assert len(projections) == 4 * 7 + 2
    for name, want in projections.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        quantized = isinstance(module, ReferenceLinear)
        weight = module.dequantized_weight(torch.float64) if quantized else module.weight.double()
        columns = weight.shape[1]
        probe = torch.randn(columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
        assert (weight @ probe - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_quantized_activations_stay_near_the_golden_logits(shared: Path, checkpoint: str) -> None:
    """A wrong scale is an error of the size of the logits; rounding to three mantissa bits is a fraction of it."""
    directory = shared / "checkpoints" / checkpoint
    golden = load_golden(directory)

    model: Any = load_model(directory, dtype=torch.float32)

    with torch.no_grad():
        difference = model(golden["prompt"][None]).logits[0, -8:] - golden["logits"]
    spread = golden["logits"].std()
    assert difference.std() < 0.1 * spread
    assert (difference.abs().max() > 0.01 * spread) == ("fp8" in checkpoint)
