from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from installed_transformers import in_dtype
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trtllm_ct.base.errors import CatalogError, ConfigError, DetectionError, PlanError
from trtllm_ct.config.detect import Detection, FormatDetector
from trtllm_ct.reference import ReferenceLinear, load_model
from trtllm_ct.reference.directory import read_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.reference

EXPORTS = [
    "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "INT4_AWQ_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_WEIGHT_ONLY_CFG",
    "NVFP4_DEFAULT_CFG",
    "W4A16_NVFP4_CFG",
    "MXFP8_DEFAULT_CFG",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
]
TOKENS = torch.arange(3, 23)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def quantize_gates(directory: Path, **quantization: Any) -> None:
    """Turn an unquantized directory into a ModelOpt directory with gate_proj in int8, one scale per row."""
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("gate_proj.weight")]:
        scale = tensors[name].abs().amax(1).float() / 127
        tensors[f"{name}_scale"] = scale
        tensors[name] = (tensors[name] / scale[:, None]).round().to(torch.int8)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W8A16"} | quantization}
    (directory / "hf_quant_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "patterns",
    [
        ["lm_head", "*self_attn*", "*.up_proj", "*.down_proj"],
        ["lm_head", "model.layers.?.self_attn", "model.layers.*.mlp.[ud]*"],
        ["lm_head", *(f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn", "mlp.up_proj", "mlp.down_proj"))],
    ],
    ids=["globs", "parents", "names"],
)  # fmt: skip
def test_exclude_modules_are_patterns_for_a_module_or_its_parents(
    save_tiny: Callable[..., Path], patterns: list[str]
) -> None:
    directory = save_tiny("llama")
    quantize_gates(directory, exclude_modules=patterns)

    model = load_model(directory)

    quantized = {name for name, module in model.named_modules() if isinstance(module, ReferenceLinear)}
    assert quantized == {f"model.layers.{layer}.mlp.gate_proj" for layer in range(2)}


def test_tensors_prove_what_the_configuration_says(save_tiny: Callable[..., Path]) -> None:
    """A pattern that excludes too many or too few modules is a fault."""
    directory = save_tiny("llama")
    quantize_gates(directory, exclude_modules=["lm_head", "*self_attn*", "*.up_proj"])

    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.down_proj: expected tensors weight, weight_scale"):
        load_model(directory)

    content = {"quantization": {"quant_algo": "W8A16", "exclude_modules": ["*"]}}
    (directory / "hf_quant_config.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"gate_proj\.weight_scale: expected weight and bias only"):
        load_model(directory)


def test_modelopts_name_for_block_scales_is_read(save_tiny: Callable[..., Path]) -> None:
    """`fp8_pb_wo` is what ModelOpt writes for FP8_BLOCK_SCALES, and the engine reads it in any case."""
    directory = save_tiny("llama")
    quantize_gates(directory, quant_algo="FP8_pb_wo", exclude_modules=["lm_head"])

    with pytest.raises(PlanError, match="for FP8_BLOCK_SCALES"):
        load_model(directory)


def test_single_layers_may_be_quantized(save_tiny: Callable[..., Path]) -> None:
    directory = save_tiny("qwen2")
    layers = {f"model.layers.{layer}.mlp.gate_proj": {"quant_algo": "W8A16"} for layer in range(2)}
    quantize_gates(directory, quant_algo="MIXED_PRECISION", quantized_layers=layers)

    model = load_model(directory)

    assert isinstance(model.get_submodule("model.layers.1.mlp.gate_proj"), ReferenceLinear)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            {"quantization": {"quant_algo": "W4A8_QSERVE_PER_GROUP"}},
            "'W4A8_QSERVE_PER_GROUP' is not a valid QuantAlgo",
        ),
        ({"quantization": {"quant_algo": 8}}, "8 is not a valid QuantAlgo"),
        ({"quantization": {"quantized_layers": {"lm_head": {}}}}, "KeyError"),
        ({"quantization": None}, "NoneType"),
        ({"producer": {"name": "modelopt"}}, "'quantization'"),
    ],
)
def test_an_invalid_configuration_is_refused(
    save_tiny: Callable[..., Path], content: dict[str, Any], found: str
) -> None:
    directory = save_tiny("llama")
    (directory / "hf_quant_config.json").write_text(json.dumps(content))

    with pytest.raises(ConfigError, match=rf"hf_quant_config\.json: expected .*W4A16.* found .*{found}"):
        load_model(directory)


def test_modelopt_without_hf_quant_config_is_refused(save_tiny: Callable[..., Path]) -> None:
    directory = save_tiny("llama")
    config = json.loads((directory / "config.json").read_text()) | {"quantization_config": {"quant_method": "modelopt"}}
    (directory / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=r"hf_quant_config\.json"):
        load_model(directory)


def test_other_methods_are_refused_by_name(save_tiny: Callable[..., Path]) -> None:
    directory = save_tiny("llama")
    config = json.loads((directory / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (directory / "config.json").write_text(json.dumps(config))

    with pytest.raises(DetectionError, match="an AutoGPTQ checkpoint"):
        load_model(directory)


@pytest.mark.parametrize(("missing", "error"), [("config.json", DetectionError), ("model.safetensors", CatalogError)])
def test_missing_files_raise_errors_of_this_package(
    save_tiny: Callable[..., Path], missing: str, error: type[Exception]
) -> None:
    directory = save_tiny("llama")
    (directory / missing).unlink()

    with pytest.raises(error):
        load_model(directory)


def test_a_loaded_model_outlives_its_directory(save_tiny: Callable[..., Path]) -> None:
    directory = save_tiny("llama")
    model = load_model(directory)
    before = logits(model)
    shutil.rmtree(directory)

    assert torch.equal(before, logits(model))


def test_compressed_tensors_directories_come_through_their_target(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bridge is called once, for that method only, with the directory, the compute dtype and the detection."""
    directory = save_tiny("llama")
    source = read_directory(directory, dtype=torch.float32)
    config = json.loads((directory / "config.json").read_text())
    marked = config | {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}
    (directory / "config.json").write_text(json.dumps(marked))
    calls = []

    @dataclass(frozen=True)
    class Delivered:
        config: dict[str, Any]
        quant_config: None
        tensors: Any

    def deliver(directory: Path, *, dtype: torch.dtype, detection: Detection) -> Delivered:
        calls.append((directory, dtype, detection))
        return Delivered(config, None, source.tensors)

    bridge = ModuleType("trtllm_ct.reference.bridge")
    bridge.deliver = deliver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trtllm_ct.reference.bridge", bridge)

    model = load_model(directory, dtype=torch.float32)

    assert calls == [(directory, torch.float32, FormatDetector().detect(directory))]
    assert logits(model).isfinite().all()


@pytest.mark.shared
@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modelopt_exports_load_as_delivered(shared: Path, export: str, dtype: torch.dtype) -> None:
    directory = shared / "modelopt-exports" / export

    model = load_model(directory, dtype=dtype)

    assert logits(model).isfinite().all()
    state = model.state_dict()
    with safe_open(directory / "model.safetensors", "pt") as stored:
        assert state.keys() == set(stored.keys())
        for name in stored.keys():  # noqa: SIM118 - no mapping
            tensor = stored.get_tensor(name)
            module = model.get_submodule(name.rpartition(".")[0])
            wanted = tensor if isinstance(module, ReferenceLinear) else tensor.to(dtype)
            assert state[name].dtype == wanted.dtype
            assert torch.equal(wanted.double(), state[name].double())


@pytest.mark.shared
def test_modelopt_exports_agree_with_each_other(shared: Path) -> None:
    """All exports come from one model, so their logits differ by quantization only."""
    results = [logits(load_model(shared / "modelopt-exports" / export, dtype=torch.float32)) for export in EXPORTS]

    for result in results[1:]:
        assert (result - results[0]).std() < 0.25 * results[0].std()


def unpack_nibbles(packed: Any, axis: int) -> Any:
    """Unpack the nibbles of each byte, the low one first, to neighbours along an axis."""
    import numpy as np

    low_and_high = np.stack((packed & 15, packed >> 4), axis + 1)
    return low_and_high.reshape([size * (2 if index == axis else 1) for index, size in enumerate(packed.shape)])


def decode_int4(stored: dict[str, Any]) -> Any:
    codes = unpack_nibbles(stored["weight"], 0).astype(int)
    codes[codes > 7] -= 16
    groups = codes.reshape(*stored["weight_scale"].shape, -1)
    return (groups * stored["weight_scale"][..., None]).reshape(codes.shape)


def decode_nvfp4(stored: dict[str, Any]) -> Any:
    import numpy as np

    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = unpack_nibbles(stored["weight"], 1)
    values = np.where(codes > 7, -magnitudes[codes & 7], magnitudes[codes & 7])
    return values * np.kron(stored["weight_scale"], np.ones((1, 16))) * stored["weight_scale_2"]


def decode_mxfp8(stored: dict[str, Any]) -> Any:
    import numpy as np

    return stored["weight"] * np.kron(2.0 ** (stored["weight_scale"].astype(int) - 127), np.ones((1, 32)))


def decode_blocks(stored: dict[str, Any]) -> Any:
    import numpy as np

    return stored["weight"] * np.kron(stored["weight_scale"].squeeze((1, 3)), np.ones((128, 128)))


DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": decode_int4,
    "NVFP4_DEFAULT_CFG": decode_nvfp4,
    "W4A16_NVFP4_CFG": decode_nvfp4,
    "MXFP8_DEFAULT_CFG": decode_mxfp8,
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": decode_blocks,
}


@pytest.mark.shared
@pytest.mark.parametrize("export", DECODERS)
def test_exports_equal_an_independent_decoding(shared: Path, export: str) -> None:
    """Weights are decoded with numpy in float64 and rounded once; the logits are those of a model of plain Linears."""
    from transformers import AutoModelForCausalLM

    directory = shared / "modelopt-exports" / export
    stored = load_file(directory / "model.safetensors")
    model: Any = load_model(directory, dtype=torch.float32, quantize_activations=False)
    dense = {name: tensor.float() for name, tensor in stored.items() if f"{name}_scale" not in stored}
    for name in [name for name in stored if f"{name}_scale" in stored]:
        tensors = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.startswith(name)}
        arrays = {
            key: tensor.numpy() if tensor.dtype == torch.uint8 else tensor.double().numpy()
            for key, tensor in tensors.items()
        }
        dense[name] = torch.from_numpy(DECODERS[export](arrays)).float()
        assert torch.equal(dense[name], model.get_submodule(name[:-7]).dequantized_weight(torch.float32))

    model.config.name_or_path = ""
    plain = AutoModelForCausalLM.from_config(model.config, **in_dtype(torch.float32))
    plain.load_state_dict({name: tensor for name, tensor in dense.items() if not name.endswith(("_scale", "_scale_2"))})
    assert torch.equal(logits(plain.eval()), logits(model))


@pytest.mark.shared
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_base_checkpoint_equals_transformers(shared: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    directory = shared / "checkpoints" / "_base"
    want: Any = AutoModelForCausalLM.from_pretrained(directory, **in_dtype(dtype))
    got: Any = load_model(directory, dtype=dtype)

    assert torch.equal(logits(want), logits(got))
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(want.generate(TOKENS, **options), got.generate(TOKENS, **options))
