"""Real checkpoints give the results that the libraries of their producers give."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kept_weights import with_kept_weights
from safetensors.torch import load_file

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
from trtllm_ct.reference import ReferenceLinear, build_model, load_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = [pytest.mark.reference, pytest.mark.shared]

CHECKPOINTS = [
    *("w4a16-gptq", "w4a16-g64-asym", "w4a16-actorder-group", "w8a16-channel", "w8a16-group", "w8a8-dynamic"),
    *("fp8-static-kv", "fp8-dynamic", "fp8-block", "mixed-fp8-w4", "nvfp4", "mxfp4a16"),
    *("sparse-bitmask", "sparse24-fp8", "mixtral-w4a16", "qwen3moe-nvfp4"),
]
# The largest change of the logits by quantized activations, as a fraction of their standard deviation. All other
# checkpoints have unquantized activations.
MAX_CHANGE = {"fp8": 0.1, "nvfp4": 0.25}


def load_golden(directory: Path) -> dict[str, torch.Tensor]:
    import numpy as np

    with np.load(directory / "golden.npz") as golden:
        return {name: torch.from_numpy(golden[name]) for name in golden.files}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_logits_tokens_and_weights_are_the_golden_ones(shared: Path, checkpoint: str) -> None:
    directory = shared / "checkpoints" / checkpoint
    golden = load_golden(directory)
    prompt = golden["prompt"][None]

    model = with_kept_weights(load_model(directory, dtype=torch.float32, quantize_activations=False))

    with torch.no_grad():
        error = (model(prompt).logits[0, -8:] - golden["logits"]).abs().max()
    assert error < 2e-3 * golden["logits"].std()
    assert torch.equal(golden["greedy"], model.generate(prompt, max_new_tokens=24, do_sample=False)[0])
    projections = {name.removeprefix("proj:"): want for name, want in golden.items() if name.startswith("proj:")}
    assert len(projections) >= 4 * 7 + 2
    modules = dict(model.named_modules())
    for name, want in projections.items():
        path = name.removesuffix(".weight")
        # transformers 5 calls the experts' module of a layer otherwise.
        module = modules[path if path in modules else path.replace(".block_sparse_moe.", ".mlp.")]
        quantized = isinstance(module, ReferenceLinear)
        weight = module.dequantized_weight(torch.float64) if quantized else module.weight.double()
        columns = weight.shape[1]
        probe = torch.randn(columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
        assert (weight @ probe - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_quantized_activations_stay_near_the_golden_logits(shared: Path, checkpoint: str) -> None:
    """A wrong scale causes an error as large as the logits; rounding to three mantissa bits causes a fraction of it."""
    directory = shared / "checkpoints" / checkpoint
    golden = load_golden(directory)

    model: Any = load_model(directory, dtype=torch.float32)

    with torch.no_grad():
        difference = model(golden["prompt"][None]).logits[0, -8:] - golden["logits"]
    spread = golden["logits"].std()
    limit = next((fraction for name, fraction in MAX_CHANGE.items() if name in checkpoint), None)
    if limit is None:
        assert difference.abs().max() < 2e-3 * spread
    else:
        assert 0.01 * spread < difference.std() < limit * spread


def build(directory: Path, tensors: dict[str, Tensor], quant_config: QuantConfig | None = None) -> Any:
    config = json.loads((directory / "config.json").read_text())
    return build_model(
        config, quant_config, tensors.items(), dtype=torch.float32, quantize_activations=False, name=str(directory)
    )


def assert_golden(model: Any, directory: Path) -> None:
    golden = load_golden(directory)
    with torch.no_grad():
        error = (model(golden["prompt"][None]).logits[0, -8:] - golden["logits"]).abs().max()
    assert error < 2e-3 * golden["logits"].std()


def test_nvfp4_experts_give_the_golden_logits(shared: Path) -> None:
    """Codes and group scales are the producer's, under the engine's names; global scales are inverted."""
    directory = shared / "checkpoints" / "qwen3moe-nvfp4"
    local_names = {
        "weight_packed": "weight",
        "weight_global_scale": "weight_scale_2",
        "input_global_scale": "input_scale",
    }
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        module, _, local = name.rpartition(".")
        delivered = 1 / tensor if local.endswith("global_scale") else tensor
        tensors[f"{module}.{local_names.get(local, local)}"] = delivered
    modules = [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith("weight_scale_2")]
    nvfp4 = LayerQuantConfig(quant_algo=QuantAlgo.NVFP4, group_size=16)

    model = build(directory, tensors, QuantConfig(quantized_layers=dict.fromkeys(modules, nvfp4)))

    assert_golden(model, directory)
    assert sum(isinstance(module, ReferenceLinear) for module in model.modules()) == 2 * (4 + 4 * 3)


def test_experts_by_the_producers_names_give_the_golden_logits(shared: Path) -> None:
    """Mixtral with gate_proj, up_proj and down_proj; eight codes per int32, lowest first, offset 8, groups of 128."""
    directory = shared / "checkpoints" / "mixtral-w4a16"
    stored = load_file(directory / "model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}
    for name in [name for name in stored if name.endswith("_packed")]:
        codes = torch.stack([(stored[name] >> 4 * i & 15) - 8 for i in range(8)], dim=-1).flatten(1)
        scale = stored[name.replace("_packed", "_scale")].float()
        tensors[name.removesuffix("_packed")] = codes * scale.repeat_interleave(128, dim=1)

    assert_golden(build(directory, tensors), directory)
