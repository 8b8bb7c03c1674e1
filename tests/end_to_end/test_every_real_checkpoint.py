"""All sixteen checkpoints of real producers: converted, they give the golden projections, logits and tokens.

The golden answers were computed from the stored codes by the compressed-tensors library or by a script of its own,
without this package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from kept_weights import with_kept_weights
from safetensors.torch import load_file

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.quant_config import QuantConfig
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.reference import ReferenceLinear, load_model
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.plan.plan import Plan

pytestmark = [pytest.mark.shared, pytest.mark.reference]

# What becomes of the quantized Linears of each at stock TensorRT-LLM.
MODES: dict[str, set[str]] = {
    "fp8-block": {"FP8_BLOCK_SCALES g128"},
    "fp8-dynamic": {"FP8_PER_CHANNEL_PER_TOKEN"},
    "fp8-static-kv": {"FP8"},
    "mixed-fp8-w4": {"FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ g128"},
    "mixtral-w4a16": {"W4A16_AWQ g128", "dequantized"},
    "mxfp4a16": {"dequantized"},
    "nvfp4": {"NVFP4 g16"},
    "qwen3moe-nvfp4": {"NVFP4 g16"},
    "sparse-bitmask": set(),
    "sparse24-fp8": {"FP8_PER_CHANNEL_PER_TOKEN"},
    "w4a16-actorder-group": {"dequantized"},
    "w4a16-g64-asym": {"dequantized"},
    "w4a16-gptq": {"W4A16_AWQ g128"},
    "w8a16-channel": {"W8A16"},
    "w8a16-group": {"dequantized"},
    "w8a8-dynamic": {"W8A16"},
}
CONVERSIONS = [("modelopt", "auto"), ("modelopt", "float32"), ("dense", "auto"), ("dense", "float32")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """A source with its plan, its conversions by target and dtype, and its golden answers."""

    name: str
    source: Path
    plan: Plan
    converted: dict[tuple[str, str], Path]
    golden: dict[str, Tensor]


@pytest.fixture(scope="module", params=MODES)
def real(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    import numpy as np

    source = shared / "checkpoints" / request.param
    work = tmp_path_factory.mktemp(request.param)
    converted = {}
    for to, dtype in CONVERSIONS:
        converted[to, dtype] = work / f"{to}-{dtype}"
        report = convert_checkpoint(source, converted[to, dtype], to=to, dtype=dtype)
        if (to, dtype) == CONVERSIONS[0]:
            plan = report.plan
    with np.load(source / "golden.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    return Real(name=request.param, source=source, plan=plan, converted=converted, golden=golden)


def weights(real: Real, directory: Path) -> dict[str, Tensor]:
    """The float64 weight that each converted Linear multiplies with, by the name of its golden projection."""
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    stored: dict[str, dict[str, Tensor]] = {}
    for name, tensor in [item for tensors in files for item in tensors.items()]:
        module, _, local = name.rpartition(".")
        stored.setdefault(module, {})[local] = tensor
    path = directory / "hf_quant_config.json"
    config = QuantConfig()
    if path.exists():
        config = QuantConfig.from_dict(json.loads(path.read_text())["quantization"])
    return {
        name: _weight(real, name.removeprefix("proj:").removesuffix(".weight"), stored, config)
        for name in real.golden
        if name.startswith("proj:")
    }


def _weight(real: Real, module: str, stored: dict[str, dict[str, Tensor]], config: QuantConfig) -> Tensor:
    tensors = {local: tensor for local, tensor in stored[module].items() if local not in {"bias", "k_scale", "v_scale"}}
    planned = real.plan.module(module).weight
    layer = config.layer_config(module)
    if planned is None or layer is None:
        return tensors["weight"].double()
    rows, columns = planned.shape
    linear = ReferenceLinear(tensors, layer=layer, in_features=columns, out_features=rows)
    weight = linear.dequantized_weight(torch.float64)
    return weight * tensors["pre_quant_scale"].double() if "pre_quant_scale" in tensors else weight


def projection_error(golden: Tensor, weight: Tensor) -> float:
    columns = weight.shape[1]
    direction = torch.randn(columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
    return float(((weight @ direction) - golden).abs().max() / golden.abs().max())


def answers(directory: Path, golden: dict[str, Tensor]) -> tuple[float, list[int], float]:
    """Error of the logits in standard deviations, the tokens, and the smallest margin of a golden first choice."""
    model = with_kept_weights(load_model(directory, dtype=torch.float32, quantize_activations=False))
    prompt = golden["prompt"][None]
    with torch.inference_mode():
        logits = model(prompt).logits[0, -8:]
        tokens = model.generate(prompt, max_new_tokens=24, do_sample=False)[0].tolist()
        whole = model(golden["greedy"][None]).logits[0, prompt.shape[1] - 1 : -1]
    best = whole.topk(2, dim=-1).values
    margin = float((best[:, 0] - best[:, 1]).min())
    spread = golden["logits"].std()
    return float((logits - golden["logits"]).abs().max() / spread), tokens, margin / float(spread)


def test_inspection_names_the_modes_and_finds_no_problem(real: Real) -> None:
    found = inspect_checkpoint(real.source)

    assert found.problems == ()
    assert {row.delivered_mode for row in found.rows() if row.stored_scheme != "plain"} == MODES[real.name]


@pytest.mark.parametrize("conversion", CONVERSIONS, ids="-".join)
def test_every_conversion_is_verified(real: Real, conversion: tuple[str, str]) -> None:
    verify_checkpoint(real.source, real.converted[conversion]).raise_if_bad()


@pytest.mark.parametrize("conversion", CONVERSIONS, ids="-".join)
def test_projections_are_the_golden_ones(real: Real, conversion: tuple[str, str]) -> None:
    """To 1e-6 where native or in float32, and within 4e-3 where rounded once to bfloat16."""
    for name, weight in weights(real, real.converted[conversion]).items():
        module = real.plan.module(name.removeprefix("proj:").removesuffix(".weight"))
        rounded = conversion[1] == "auto" and (conversion[0] == "dense" or module.dequantized)
        error = projection_error(real.golden[name], weight)
        assert error < (4e-3 if rounded else 1e-6), name


@pytest.mark.parametrize("conversion", CONVERSIONS, ids="-".join)
def test_logits_and_tokens_are_the_golden_ones(real: Real, conversion: tuple[str, str]) -> None:
    """Within 2e-3 of a standard deviation from exact weights, 2e-2 from rounded ones.

    Tokens are equal unless weights are rounded and two candidates lie closer together than twice the error. The
    sources themselves: tests/reference/test_golden.py.
    """
    error, tokens, margin = answers(real.converted[conversion], real.golden)

    assert error < (2e-2 if conversion[1] == "auto" else 2e-3)
    if conversion[1] == "float32" or margin > 2 * error:
        assert tokens == real.golden["greedy"].tolist()
