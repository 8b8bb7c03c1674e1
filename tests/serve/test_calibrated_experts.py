"""Experts with 16-bit inputs in modes with static scales of inputs, which a calibration gives, on the double."""

from __future__ import annotations

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import Built, tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from safetensors.torch import load_file

import trtllm_ct
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.calibration import asked_requantization, write_calibration
from trtllm_ct.reference import load_model
from trtllm_ct.serve.sidecar import Sidecar
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("sidecar_cache")

NAMES = {
    "Qwen3MoeForCausalLM": ("mlp.experts", ("up_proj", "gate_proj", "down_proj")),
    "MixtralForCausalLM": ("block_sparse_moe.experts", ("w3", "w1", "w2")),
}
SIZES = [(1, 1), (2, 1), (2, 2)]
"""Tensor and expert parallel sizes."""
PLACES = [
    ("w4a8-awq", "mid", 90),
    ("w4a8-awq", "newest", 90),
    ("nvfp4-w4a4", "old", 100),
    ("nvfp4-w4a4", "mid", 100),
    ("nvfp4-w4a4", "newest", 100),
]
MODES = {"w4a8-awq": "W4A8_AWQ", "nvfp4-w4a4": "NVFP4"}
TOKENS = [5, 17, 3, 42, 8, 66, 90, 2]


def write(directory: Path, architecture: str = "Qwen3MoeForCausalLM", **more: Any) -> Built:
    """A mixture whose experts have int4 codes in groups of 128, and 16-bit inputs."""
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 256}
    experts = {} if architecture == "MixtralForCausalLM" else {"moe_intermediate_size": 256}
    names = NAMES[architecture][1]
    config = tiny_config(architecture, **sizes, **experts)
    return write_checkpoint(directory, config=config, scheme=dict.fromkeys(names, "int4-g128"), **more)


def calibrated(built: Built, path: Path) -> dict[str, float]:
    """Write another scale for each projection of each expert, and return them."""
    experts = [name.rpartition(".")[0] for name in built.dense if ".experts." in name]
    scales = {name: 2.0**-6 * (1 + position / 64) for position, name in enumerate(experts)}
    write_calibration(path, scales)
    return scales


def shared(scales: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """The scales that kernels get: gate and up have one input, and the larger scale of both."""
    up, gate, down = names
    largest = {}
    for name, scale in scales.items():
        around, _, leaf = name.rpartition(".")
        largest[name] = scale if leaf == down else max(scales[f"{around}.{up}"], scales[f"{around}.{gate}"])
    return largest


def kernels(model: Any) -> dict[str, Any]:
    return {
        name.removesuffix(".backend"): module for name, module in model.named_modules() if hasattr(module, "expert_ids")
    }


def weights_of(model: Any, names: tuple[str, ...]) -> dict[str, tuple[Tensor, int, Any]]:
    """Each projection on this rank: its weight, the axis that ranks cut, and the kernel's module."""
    up_name, gate_name, down_name = names
    found = {}
    for name, module in kernels(model).items():
        for at, expert in enumerate(module.expert_ids):
            up, gate = module.quant_method.dequantize(module, "w3_w1", at).chunk(2)
            found[f"{name}.{expert}.{up_name}"] = up, 0, module
            found[f"{name}.{expert}.{gate_name}"] = gate, 0, module
            found[f"{name}.{expert}.{down_name}"] = module.quant_method.dequantize(module, "w2", at), 1, module
    return found


def input_scales_of(model: Any, form: str, names: tuple[str, ...]) -> dict[str, float]:
    """The scale that the kernel divides the input of each projection by; NVFP4 has one for all experts of a layer."""
    up, gate, down = names
    found = {}
    for name, module in kernels(model).items():
        for at, expert in enumerate(module.expert_ids):
            for part, leaves in (("w3_w1", (up, gate)), ("w2", (down,))):
                scale = getattr(module, f"{part}_input_scale")
                value = float(scale.reshape(-1)[at] if form == "w4a8-awq" else scale)
                found |= {f"{name}.{expert}.{leaf}": value for leaf in leaves}
    return found


@pytest.mark.pairs
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize(("form", "generation", "sm"), PLACES)
def test_each_rank_holds_the_weights_and_scales_of_the_directory(
    tmp_path: Path,
    form: str,
    generation: str,
    sm: int,
    architecture: str,
    sizes: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W4A8_AWQ holds exactly the stored values; NVFP4 holds what `verify` measured, whose scales are those given."""
    built, out, file = write(tmp_path / "in", architecture), tmp_path / "out", tmp_path / "scales"
    names, scales = NAMES[architecture][1], calibrated(built, file)
    asked, release = asked_requantization(f"experts={form}", file), engine_double.RELEASE_OF[generation]
    tensor, expert = sizes
    parallel = Parallel(tensor=tensor, expert=expert)
    report = convert_checkpoint(built.directory, out, engine=release, sm=sm, parallel=parallel, requantize=asked)
    assert {str(one.layer.quant_algo) for one in report.plan.modules if one.experts and one.layer} == {MODES[form]}
    assert verify_checkpoint(built.directory, out, requantize=asked).good
    exact = built.dense if form == "w4a8-awq" else numbers_of(out, NAMES[architecture][0])

    more = {"skip_tokenizer_init": True, "tensor_parallel_size": tensor, "moe_expert_parallel_size": expert}
    given = shared(scales, names)
    with engine_double.installed(generation, sm=sm, importers=[BINDINGS]) as engine:
        monkeypatch.setattr(import_module(BINDINGS), "_sm_of_gpu", lambda: sm)
        for stock in (True, False):
            llm = (
                engine.LLM(model=str(out), **more)
                if stock
                else trtllm_ct.LLM(built.directory, requantize=f"experts={form}", calibration=file, **more)
            )
            with llm:
                assert len(llm.models) == tensor
                for model in llm.models:
                    held = weights_of(model, names)
                    assert held
                    for name, (weight, dim, module) in held.items():
                        part = exact[f"{name}.weight"].chunk(module.mapping.moe_tp_size, dim=dim)
                        assert torch.equal(weight.double(), part[module.mapping.moe_tp_rank].double()), name
                    for name, value in input_scales_of(model, form, names).items():
                        assert value == expected_scale(form, name, given), name


def expected_scale(form: str, name: str, given: dict[str, float]) -> float:
    if form == "w4a8-awq":
        return float(torch.tensor(given[name]).bfloat16())
    layer, _, leaf = name.rpartition(".")
    experts = layer.rpartition(".")[0]
    alike = [scale for other, scale in given.items() if other.startswith(f"{experts}.") and other.endswith(f".{leaf}")]
    return float(torch.tensor(max(alike) / 6))


def numbers_of(directory: Path, experts: str) -> dict[str, Tensor]:
    """The weights of the experts of a converted directory, decoded by the reference engine, in float32."""
    model = load_model(directory, dtype=torch.float32)
    return {
        f"{name}.weight".replace(".mlp.experts.", f".{experts}."): module.dequantized_weight(torch.float32)  # type: ignore[operator]
        for name, module in model.named_modules()
        if hasattr(module, "dequantized_weight") and ".experts." in name
    }


def test_the_tensors_are_those_of_a_checkpoint_that_was_stored_with_static_inputs(tmp_path: Path) -> None:
    """A directory from weight-only experts and their scales equals one from a source that has the scales itself."""
    names = NAMES["Qwen3MoeForCausalLM"][1]
    static = write_checkpoint(
        tmp_path / "static",
        config=tiny_config("Qwen3MoeForCausalLM", hidden=256, heads=4, kv_heads=2, moe_intermediate_size=256),
        scheme=dict.fromkeys(names, "int4-g128-fp8-static"),
    )
    scales = {
        name.removesuffix(".input_scale"): float(tensor.float())
        for name, tensor in static.stored.items()
        if name.endswith("input_scale")
    }
    built = write(tmp_path / "in")
    write_calibration(tmp_path / "scales", scales)
    asked = asked_requantization("experts=w4a8-awq", tmp_path / "scales")
    convert_checkpoint(static.directory, tmp_path / "want", sm=90)
    convert_checkpoint(built.directory, tmp_path / "got", sm=90, requantize=asked)

    want, got = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("want", "got"))
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in want.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in got.items()} == specs
    given = shared(scales, names)
    for name, tensor in got.items():
        module, _, local = name.rpartition(".")
        if local == "input_scale":
            assert float(tensor) == given[module], name
        elif local in {"weight_scale_2", "pre_quant_scale"}:
            assert torch.equal(tensor, want[name]), name
    configs = [json.loads((tmp_path / name / "hf_quant_config.json").read_text()) for name in ("want", "got")]
    assert configs[0]["quantization"] == configs[1]["quantization"]
    assert configs[1]["planned_for"]["requantized"] == {"experts": "w4a8-awq"}


@pytest.mark.shared
@pytest.mark.parametrize(
    ("form", "sm", "export"), [("w4a8-awq", 90, "W4A8_AWQ_BETA_CFG"), ("nvfp4-w4a4", 100, "NVFP4_DEFAULT_CFG")]
)
def test_names_and_dtypes_are_those_of_real_exports(
    tmp_path: Path, shared: Path, form: str, sm: int, export: str
) -> None:
    """The tensors of an expert's down projection are those that ModelOpt writes for that of an MLP."""
    built = write(tmp_path / "in")
    calibrated(built, tmp_path / "scales")
    asked = asked_requantization(f"experts={form}", tmp_path / "scales")
    convert_checkpoint(built.directory, tmp_path / "out", sm=sm, requantize=asked)

    def described(directory: Path, module: str) -> dict[str, tuple[torch.dtype, int]]:
        tensors = load_file(directory / "model.safetensors")
        named = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items() if module in name}
        return {local: (tensor.dtype, tensor.dim()) for local, tensor in named.items()}

    real = described(shared / "modelopt-exports" / export, "model.layers.0.mlp.down_proj")
    assert described(tmp_path / "out", "model.layers.0.mlp.experts.1.down_proj") == real


@pytest.mark.reference
@pytest.mark.parametrize(("form", "generation", "sm"), PLACES[1::3])
def test_the_reference_engine_computes_what_the_double_does(
    tmp_path: Path, form: str, generation: str, sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, file = write(tmp_path / "in"), tmp_path / "scales"
    write_calibration(file, dict.fromkeys(calibrated(built, tmp_path / "other"), 2.0**-5))
    asked = asked_requantization(f"experts={form}", file)
    release = engine_double.RELEASE_OF[generation]
    convert_checkpoint(built.directory, tmp_path / "out", engine=release, sm=sm, requantize=asked)

    with engine_double.installed(generation, sm=sm, importers=[BINDINGS]) as engine:
        monkeypatch.setattr(import_module(BINDINGS), "_sm_of_gpu", lambda: sm)
        got = engine.LLM(model=str(tmp_path / "out"), skip_tokenizer_init=True).logits(TOKENS)

    model = load_model(tmp_path / "out", dtype=torch.float32, quantize_activations=False)
    with torch.no_grad():
        want = model(torch.tensor([TOKENS])).logits[0]
    assert float((got - want).abs().max() / want.std()) < 2e-3


def test_a_prepared_directory_remembers_the_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, file = write(tmp_path / "in"), tmp_path / "scales"
    scales = calibrated(built, file)
    with engine_double.installed("mid", sm=90, importers=[BINDINGS]):
        monkeypatch.setattr(import_module(BINDINGS), "_sm_of_gpu", lambda: 90)
        one = trtllm_ct.prepare(built.directory, requantize="experts=w4a8-awq", calibration=file)
        write_calibration(tmp_path / "others", {name: 2 * scale for name, scale in scales.items()})
        other = trtllm_ct.prepare(built.directory, requantize="experts=w4a8-awq", calibration=tmp_path / "others")

    assert one != other
    assert Sidecar.open(one).options.requantize.calibration.scales == scales
