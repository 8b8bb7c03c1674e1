"""Real NVFP4 and MXFP4 checkpoints: every quantized weight is compared with the golden values stored with them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from float_modules import described
from on_tensors import NATIVE, arrays, decode, encode
from safetensors.torch import load_file

from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.config.reader import CompressedTensorsConfigReader
from trtllm_ct.pipeline.payload import check_payload
from trtllm_ct.plan.plan import ModulePlan

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.base.schemes import QuantArgs

pytestmark = pytest.mark.shared

QUANTIZED = {"nvfp4": 4 * 7, "mxfp4a16": 4 * 7, "qwen3moe-nvfp4": 2 * (4 + 4 * 3)}


def weight_arguments(directory: Path) -> QuantArgs:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (group,) = CompressedTensorsConfigReader().read(config["quantization_config"]).groups
    assert group.scheme.weights is not None
    return group.scheme.weights


def quantized_modules(directory: Path) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        module, _, local = name.rpartition(".")
        modules.setdefault(module, {})[local] = tensor
    return {name: tensors for name, tensors in modules.items() if "weight_packed" in tensors}


@pytest.mark.parametrize("checkpoint", QUANTIZED)
def test_every_weight_is_the_golden_one(checkpoint: str, shared: Path) -> None:
    directory = shared / "checkpoints" / checkpoint
    args = weight_arguments(directory)
    modules = quantized_modules(directory)
    with np.load(directory / "golden.npz") as golden:
        wanted = {name: torch.from_numpy(golden[f"proj:{name}.weight"]) for name in modules}
    assert len(modules) == QUANTIZED[checkpoint]
    for name, stored in modules.items():
        weight = described(args, stored)
        values = NATIVE.dequantize(weight, stored, torch.float64)
        columns = values.shape[1]
        probe = torch.randn(columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
        assert (values @ probe - wanted[name]).abs().max() < 1e-6 * wanted[name].abs().max(), name


@pytest.mark.parametrize("checkpoint", QUANTIZED)
def test_every_module_passes_the_guard_and_is_encoded_as_it_was_stored(checkpoint: str, shared: Path) -> None:
    directory = shared / "checkpoints" / checkpoint
    args = weight_arguments(directory)
    for name, stored in quantized_modules(directory).items():
        weight = described(args, stored)
        faults = FaultCollector()
        plan = ModulePlan(name=name, class_name="Linear", views={}, weight=weight)
        check_payload(plan, arrays(stored), faults)
        assert not faults.faults
        encoded = encode(weight.format, decode(weight, stored), args)
        assert encoded.keys() == stored.keys() - {"input_global_scale"}
        for local, tensor in encoded.items():
            assert tensor.dtype is stored[local].dtype
            assert torch.equal(tensor.view(torch.uint8), stored[local].view(torch.uint8)), f"{name}.{local}"
