"""Checkpoints of real producers, converted: every promise of the README on files that this project did not write."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from builders import exact_values, write_checkpoint
from oracles import unpack
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Packing
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.quant_config import QuantConfig
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.reference import ReferenceLinear
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.shared

# What becomes of the Linears of each at stock TensorRT-LLM: mode to number of modules.
MODES = {
    "w4a16-gptq": {"W4A16_AWQ g128": 28},
    "w4a16-g64-asym": {"dequantized": 28},
    "w8a16-channel": {"W8A16": 28},
    "w8a16-group": {"dequantized": 28},
    "fp8-static-kv": {"FP8": 28},
    "fp8-dynamic": {"FP8_PER_CHANNEL_PER_TOKEN": 28},
    "mixed-fp8-w4": {"FP8_PER_CHANNEL_PER_TOKEN": 16, "W4A16_AWQ g128": 12},
}
CONVERSIONS = [(to, dtype) for to in ("modelopt", "dense") for dtype in ("auto", "float32")]
# ModelOpt's configuration, the scheme of compressed-tensors that holds the same kind of weight, and the first releases
# of the engine that have its mode.
EXPORTS = {
    "FP8_DEFAULT_CFG": ("fp8-tensor-static", "stock-1.0"),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": ("fp8-channel-token", "stock-1.0"),
    "INT4_AWQ_CFG": ("int4-g128", "stock-1.0"),
    "INT8_WEIGHT_ONLY_CFG": ("int8-channel", "stock-1.0"),
    "NVFP4_DEFAULT_CFG": ("nvfp4", "stock-1.0"),
    "W4A16_NVFP4_CFG": ("nvfp4a16", "stock-1.3"),
    "MXFP8_DEFAULT_CFG": ("mxfp8", "stock-1.3"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """A source, its conversions by target and dtype, its golden answers, and the exact value of every weight."""

    name: str
    source: Path
    converted: dict[tuple[str, str], Path]
    golden: dict[str, Tensor]
    exact: dict[str, Tensor]


@pytest.fixture(scope="module", params=MODES)
def real(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    import numpy as np

    source = shared / "checkpoints" / request.param
    work = tmp_path_factory.mktemp(request.param)
    converted = {}
    for to, dtype in CONVERSIONS:
        converted[to, dtype] = work / f"{to}-{dtype}"
        convert_checkpoint(source, converted[to, dtype], to=to, dtype=dtype)
    with np.load(source / "golden.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    return Real(name=request.param, source=source, converted=converted, golden=golden, exact=exact_weights(source))


def exact_weights(source: Path) -> dict[str, Tensor]:
    """Every matrix in float64, decoded without this package: slow unpacking, then exact products."""
    stored = load_file(source / "model.safetensors")
    weights = {}
    for name, tensor in stored.items():
        module, _, local = name.rpartition(".")
        if local == "weight_packed":
            rows, columns = (int(size) for size in stored[f"{module}.weight_shape"])
            bits = tensor.shape[1] * 32 // columns
            codes = torch.from_numpy(unpack(tensor, words(bits, axis=1), (rows, columns)))
            scale, zero = stored[f"{module}.weight_scale"], stored.get(f"{module}.weight_zero_point")
            if zero is not None:
                zero = torch.from_numpy(unpack(zero, words(bits, axis=0), (rows, scale.shape[1])))
            weights[f"{module}.weight"] = exact_values(codes, scale, zero)
        elif local == "weight" and tensor.dtype is torch.float8_e4m3fn:
            weights[name] = exact_values(tensor, stored[f"{module}.weight_scale"], None)
        elif local == "weight" and tensor.dim() == 2:
            weights[name] = tensor.double()
    return weights


def words(bits: int, *, axis: int) -> Packing:
    return Packing(bits=bits, container=DType.I32, axis=1 if axis else 0, offset_binary=True)


def delivered_weights(directory: Path) -> dict[str, tuple[Tensor, bool]]:
    """Every matrix of a converted directory as its Linear multiplies with it, and whether it is native."""
    tensors = load_file(directory / "model.safetensors")
    told = QuantConfig()
    if (directory / "hf_quant_config.json").exists():
        document = json.loads((directory / "hf_quant_config.json").read_text())
        told = QuantConfig.from_dict(document["quantization"])
    weights = {}
    for name in [name for name in tensors if name.endswith(".weight") and tensors[name].dim() == 2]:
        module = name.removesuffix(".weight")
        layer = told.layer_config(module)
        if layer is None:
            weights[name] = tensors[name], False
            continue
        parts = {full.removeprefix(f"{module}."): tensors[full] for full in tensors if full.startswith(f"{module}.")}
        parts = {local: part for local, part in parts.items() if local not in {"k_scale", "v_scale"}}
        rows, columns = parts["weight"].shape
        rows *= 2 if parts["weight"].dtype is torch.uint8 else 1
        linear = ReferenceLinear(parts, layer=layer, out_features=rows, in_features=columns, name=module)
        weights[name] = linear.dequantized_weight(torch.float64), True
    return weights


def projection_error(weight: Tensor, want: Tensor) -> float:
    """Max |got - want| / max |want| of the product with the vector that the goldens were made with."""
    columns = weight.shape[1]
    probe = torch.randn(columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
    return float((weight.double() @ probe - want).abs().max() / want.abs().max())


def is_rounded_once(got: Tensor, exact: Tensor) -> bool:
    """Whether no neighbour of any element is nearer to the exact value, and ties went to the even one."""
    integer = {2: torch.int16, 4: torch.int32}[got.itemsize]
    bits = got.contiguous().view(integer)
    distance = (got.double() - exact).abs()
    for step in (-1, 1):
        neighbour = (bits + step).view(got.dtype).double()
        other = (neighbour - exact).abs()
        if bool(((other < distance) | ((other == distance) & (bits & 1 == 1))).any()):
            return False
    return True


def test_inspection_finds_the_modes_and_no_problem(real: Real) -> None:
    found = inspect_checkpoint(real.source)

    assert (found.problems, found.detection.method) == ((), "compressed-tensors")
    assert found.plan is not None
    quantized = Counter(module.delivered_mode for module in found.plan.modules if module.weight is not None)
    assert quantized == MODES[real.name]
    assert found.plan.quant_config.kv_cache_quant_algo == ("FP8" if real.name == "fp8-static-kv" else None)


@pytest.mark.parametrize("conversion", CONVERSIONS, ids="-".join)
def test_every_conversion_is_verified(real: Real, conversion: tuple[str, str]) -> None:
    report = verify_checkpoint(real.source, real.converted[conversion])

    assert report.good
    assert {check.name for check in report.checks} >= real.exact.keys()


def test_the_goldens_are_those_of_the_exact_weights(real: Real) -> None:
    """So that a fault of the oracle is not taken for one of the conversion."""
    projections = {name.removeprefix("proj:") for name in real.golden if name.startswith("proj:")}
    assert projections == real.exact.keys()
    assert all(projection_error(real.exact[name], real.golden[f"proj:{name}"]) < 1e-6 for name in projections)


@pytest.mark.parametrize("conversion", CONVERSIONS, ids="-".join)
def test_weights_are_exact_where_native_and_rounded_once_where_not(real: Real, conversion: tuple[str, str]) -> None:
    delivered = delivered_weights(real.converted[conversion])
    assert delivered.keys() == real.exact.keys()

    for name, (weight, native) in delivered.items():
        error = projection_error(weight, real.golden[f"proj:{name}"])
        if native:
            assert weight.dtype is torch.float64
            assert torch.equal(weight, real.exact[name])
        else:
            assert is_rounded_once(weight, real.exact[name])
        assert error < (1e-6 if native or weight.dtype is torch.float32 else 4e-3)


def test_dequantized_modules_have_the_dtype_asked_for(real: Real) -> None:
    for (_, dtype), directory in real.converted.items():
        linears = {name: entry for name, entry in delivered_weights(directory).items() if "_proj" in name}
        dequantized = {weight.dtype for weight, native in linears.values() if not native}
        assert dequantized <= {torch.float32 if dtype == "float32" else torch.bfloat16}


@pytest.mark.parametrize("export", EXPORTS)
def test_names_dtypes_and_shapes_are_modelopts(shared: Path, tmp_path: Path, export: str) -> None:
    """One model of the same sizes, quantized here and there: the two directories list the same tensors."""
    theirs = shared / "modelopt-exports" / export
    config = json.loads((theirs / "config.json").read_text())
    del config["quantization_config"]
    scheme, engine = EXPORTS[export]
    write_checkpoint(tmp_path / "source", config=config, scheme=scheme)
    convert_checkpoint(tmp_path / "source", tmp_path / "out", engine=engine)

    assert listing(tmp_path / "out") == listing(theirs)
    ours, quantization = (
        json.loads((directory / "hf_quant_config.json").read_text()) for directory in (tmp_path / "out", theirs)
    )
    assert ours["producer"] == quantization["producer"]
    for document in (ours, quantization):
        document["quantization"]["exclude_modules"].sort()
    assert ours["quantization"] == quantization["quantization"]


def test_block_scales_differ_from_modelopts_in_axes_of_one_only(shared: Path, tmp_path: Path) -> None:
    """Engines squeeze ModelOpt's four axes; two are what they compute with."""
    theirs = shared / "modelopt-exports" / "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"
    config = json.loads((theirs / "config.json").read_text())
    del config["quantization_config"]
    write_checkpoint(tmp_path / "source", config=config, scheme="fp8-block")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")

    squeezed = {
        name: (dtype, [shape[0], shape[2]] if len(shape) == 4 else shape)
        for name, (dtype, shape) in listing(theirs).items()
    }
    assert listing(tmp_path / "out") == squeezed


def listing(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """Name to dtype and shape of every tensor, by the safetensors library."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {name: (entry.get_dtype(), entry.get_shape()) for name, entry in slices.items()}
