"""Engine-build checkpoints of real producers: the ranks' parts add up to the golden projections of the source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from engine_files import EngineFiles
from engine_logits import engine_logits
from safetensors.torch import load_file

from trtllm_ct.base.errors import PlanError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = [pytest.mark.shared]

ALGOS: dict[str, str | None] = {
    "fp8-dynamic": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8-static-kv": "FP8",
    "mixtral-w4a16": None,
    "nvfp4": "NVFP4",
    "sparse-bitmask": None,
    "sparse24-fp8": "FP8_PER_CHANNEL_PER_TOKEN",
    "w4a16-g64-asym": "W4A16_AWQ",
    "w4a16-gptq": "W4A16_AWQ",
    "w8a16-channel": "W8A16",
    "w8a8-dynamic": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
}
"""What each eligible checkpoint becomes."""
PERMUTED = {"w4a16-g64-asym": "W4A16_GPTQ", "w4a16-gptq": "W4A16_GPTQ", "w8a16-group": "W8A16_GPTQ"}
"""What those with integers become in the order of a kernel, which one generation of GPUs reads."""
DEQUANTIZED = {"mixtral-w4a16"}
"""Those whose weights this target writes plain although they are quantized."""
SIZES = [Parallel(tensor=tensor, pipeline=pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2)]


FUSED = (("q_proj", "k_proj", "v_proj"),)
JOINED = (*FUSED, ("gate_proj", "up_proj"))
"""The Linears of FP8 that get one scale: in the file, and where the builder has joined gate and up."""


def requantized(source: dict[str, Tensor], name: str, group: tuple[str, ...]) -> Tensor:
    """A part of a fused Linear under the largest scale of its parts, in float64, as the format says."""
    block = name.rpartition(".")[0].rpartition(".")[0]
    scales = [source[f"{block}.{leaf}.weight_scale"].float().reshape(()) for leaf in group]
    largest, scale = max(scales), source[f"{name.removesuffix('.weight')}.weight_scale"].float().reshape(())
    codes = source[name]
    if scale != largest:
        codes = (codes.float() * scale / largest).to(torch.float8_e4m3fn)
    return codes.double() * largest.double()


@pytest.mark.parametrize("parallel", SIZES, ids=lambda sizes: f"tp{sizes.tensor}-pp{sizes.pipeline}")
@pytest.mark.parametrize("name", ALGOS)
def test_the_ranks_add_up_to_the_golden_projections(
    name: str, parallel: Parallel, shared: Path, tmp_path: Path
) -> None:
    source = shared / "checkpoints" / name
    convert_checkpoint(source, tmp_path / "out", to="engine", parallel=parallel)
    files = EngineFiles(tmp_path / "out")

    assert files.algo == ALGOS[name]
    assert_golden(files, source, dequantized=name in DEQUANTIZED)


@pytest.mark.parametrize("parallel", SIZES, ids=lambda sizes: f"tp{sizes.tensor}-pp{sizes.pipeline}")
def test_gate_and_up_that_the_builder_joins_add_up_to_the_requantized_projections(
    parallel: Parallel, shared: Path, tmp_path: Path
) -> None:
    source = shared / "checkpoints" / "fp8-static-kv"
    convert_checkpoint(source, tmp_path / "out", to="engine", parallel=parallel)

    assert_golden(EngineFiles(tmp_path / "out", fused_mlp=True), source)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("parallel", SIZES, ids=lambda sizes: f"tp{sizes.tensor}-pp{sizes.pipeline}")
@pytest.mark.parametrize("name", PERMUTED)
def test_codes_in_the_order_of_a_kernel_add_up_to_the_golden_projections(
    name: str, parallel: Parallel, sm: int, shared: Path, tmp_path: Path
) -> None:
    source = shared / "checkpoints" / name
    convert_checkpoint(source, tmp_path / "out", to="engine", parallel=parallel, sm=sm, untested=True)
    files = EngineFiles(tmp_path / "out", sm=sm)

    assert files.algo == PERMUTED[name]
    assert_golden(files, source)


def assert_golden(files: EngineFiles, source: Path, *, dequantized: bool = False) -> None:
    """The files have the tensors that the loader needs, and all ranks add up to the projections of the source."""
    files.check_tensors()
    weights = files.weights()
    zeros = files.zeros() if files.quantization["has_zero_point"] else {}
    stored = load_file(source / "model.safetensors") if files.algo == "FP8" else {}
    with np.load(source / "golden.npz") as golden:
        projections = {key.removeprefix("proj:"): golden[key] for key in golden.files if key.startswith("proj:")}
    assert projections.keys() == {key for key, weight in weights.items() if weight.ndim == 2}
    for key, projected in projections.items():
        weight, want = weights[key], torch.from_numpy(projected)
        r = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]), dtype=torch.float64)
        leaf = key.removesuffix(".weight").rpartition(".")[2]
        for group in JOINED if files.fused_mlp else FUSED:
            if stored and leaf in group:
                want = requantized(stored, key, group) @ r
        bound = 1e-6 * want.abs().max() + (zeros[key] * 2**-9 @ r.abs() if key in zeros else 0)
        if dequantized:  # each element is rounded once to bfloat16
            bound = bound + weight.abs() * 2**-8 @ r.abs()
        assert bool(((weight @ r - want).abs() <= bound).all()), key


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    "name", ["fp8-dynamic", "nvfp4", "sparse-bitmask", "sparse24-fp8", "w4a16-gptq", "w8a16-channel", "w8a8-dynamic"]
)
def test_a_reader_of_the_files_computes_the_golden_logits(name: str, tensor: int, shared: Path, tmp_path: Path) -> None:
    """Within 0.002 standard deviations, as docs/verification.md has it for exact weights."""
    source = shared / "checkpoints" / name
    convert_checkpoint(source, tmp_path / "out", to="engine", parallel=Parallel(tensor=tensor))
    with np.load(source / "golden.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in ("prompt", "logits")}

    # The golden logits of this one are those of its weights; four bits of inputs would be half a standard deviation.
    files = EngineFiles(tmp_path / "out", exact_inputs=name == "nvfp4")
    logits = engine_logits(files, golden["prompt"])[-8:]

    assert float((logits - golden["logits"]).abs().max() / golden["logits"].std()) < 2e-3


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", ["w4a16-gptq", "w8a16-group"])
def test_a_reader_of_codes_in_the_order_of_a_kernel_computes_the_golden_logits(
    name: str, tensor: int, shared: Path, tmp_path: Path
) -> None:
    source = shared / "checkpoints" / name
    convert_checkpoint(source, tmp_path / "out", to="engine", parallel=Parallel(tensor=tensor), sm=90, untested=True)
    with np.load(source / "golden.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in ("prompt", "logits")}

    logits = engine_logits(EngineFiles(tmp_path / "out", sm=90), golden["prompt"])[-8:]

    assert float((logits - golden["logits"]).abs().max() / golden["logits"].std()) < 2e-3


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", ["w4a16-g64-asym", "mixtral-w4a16"])
def test_zeros_and_experts_that_are_rounded_move_the_logits_little(
    name: str, tensor: int, shared: Path, tmp_path: Path
) -> None:
    """Within 0.02 standard deviations for what is rounded to bfloat16: zeros, and the weights of a mixture."""
    source = shared / "checkpoints" / name
    convert_checkpoint(source, tmp_path / "out", to="engine", parallel=Parallel(tensor=tensor))
    with np.load(source / "golden.npz") as file:
        prompt, want = torch.from_numpy(file["prompt"]), torch.from_numpy(file["logits"])

    logits = engine_logits(EngineFiles(tmp_path / "out"), prompt)[-8:]

    assert float((logits - want).abs().max() / want.std()) < 2e-2


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("fp8-block", "--to modelopt: it serves"),
        ("mixed-fp8-w4", "--to modelopt: it serves"),
        ("mxfp4a16", "--to dense"),
        ("qwen3moe-nvfp4", "--to modelopt"),
        ("w4a16-actorder-group", "--to dense"),
        ("w8a16-group", "--to dense"),
    ],
)
def test_the_others_are_refused_with_the_target_that_serves_them(name: str, instead: str, shared: Path) -> None:
    with pytest.raises(PlanError) as caught:
        plan_checkpoint(shared / "checkpoints" / name, "engine")

    (fault,) = caught.value.faults
    assert instead in fault.remedy
