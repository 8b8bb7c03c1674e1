"""The double, compared with directories that ModelOpt wrote and with what stock TensorRT-LLM does with them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from installed_transformers import in_dtype
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.shared, pytest.mark.reference]

TOKENS = list(range(3, 43))
FUSED = [("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))]
Module = dict[str, Tensor]

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def bfloat16(scale: Tensor) -> Tensor:
    return scale.bfloat16().float()


def row_pairs(packed: Tensor) -> Tensor:
    """Unpack int4: row i holds row 2i in the low nibble and row 2i + 1 in the high nibble."""
    rows = torch.empty(2 * packed.shape[0], packed.shape[1], dtype=torch.int32)
    rows[0::2], rows[1::2] = (packed & 15).int(), (packed >> 4).int()
    return (rows - 16 * (rows > 7).int()).float()


def column_pairs(packed: Tensor) -> Tensor:
    columns = torch.empty(packed.shape[0], 2 * packed.shape[1])
    columns[:, 0::2], columns[:, 1::2] = E2M1[(packed & 15).long()], E2M1[(packed >> 4).long()]
    return columns


def by_group(scale: Tensor, size: int) -> Tensor:
    return scale.float().repeat_interleave(size, dim=1)


def awq(module: Module, scale: Tensor) -> Tensor:
    weight = row_pairs(module["weight"]) * by_group(scale, 128)
    return weight * module["pre_quant_scale"].float() if "pre_quant_scale" in module else weight


def float16_divided(module: Module) -> Tensor:
    second = module["weight_scale_2"]
    return (module["weight_scale"].half().float() / second).half().float()


def rounded_products(module: Module) -> Tensor:
    """The kernel rounds each product of a code and its divided scale to e4m3."""
    products = row_pairs(module["weight"]) * by_group(float16_divided(module), 128)
    weight = products.half().to(torch.float8_e4m3fn).float() * module["weight_scale_2"]
    return weight * module["pre_quant_scale"].float() if "pre_quant_scale" in module else weight


WEIGHTS: dict[str, Callable[[Module], Tensor]] = {
    "FP8_DEFAULT_CFG": lambda m: m["weight"].float() * m["weight_scale"],
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": lambda m: m["weight"].float() * m["weight_scale"][:, None],
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": lambda m: (
        m["weight"].float() * by_group(m["weight_scale"][:, 0, :, 0], 128).repeat_interleave(128, dim=0)
    ),
    "INT8_WEIGHT_ONLY_CFG": lambda m: m["weight"].float() * bfloat16(m["weight_scale"])[:, None],
    "INT4_AWQ_CFG": lambda m: awq(m, bfloat16(m["weight_scale"])),
    "W4A8_AWQ_BETA_CFG": rounded_products,
    "NVFP4_DEFAULT_CFG": lambda m: column_pairs(m["weight"]) * by_group(m["weight_scale"], 16) * m["weight_scale_2"],
    "W4A16_NVFP4_CFG": lambda m: column_pairs(m["weight"]) * by_group(m["weight_scale"], 16) * m["weight_scale_2"],
    "MXFP8_DEFAULT_CFG": lambda m: m["weight"].float() * by_group(2.0 ** (m["weight_scale"].float() - 127), 32),
}
"""Return the dequantized weights of a directory after the engine rounds scales: to bf16, for W4A8 to float16."""
BLOCKS = "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"
ONLY_NEWEST = {"W4A16_NVFP4_CFG", "MXFP8_DEFAULT_CFG"}
LOADED = [
    (generation, export)
    for export in WEIGHTS
    for generation in engine_double.GENERATIONS
    if generation == "newest" or export not in ONLY_NEWEST
]


def dense_logits(directory: Path, weight_of: Callable[[Module], Tensor]) -> Tensor:
    """Return the logits of a plain transformers model with the dequantized weights."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = load_file(directory / "model.safetensors")
    modules: dict[str, Module] = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    dense = {
        f"{name}.weight": weight_of(module) if "weight_scale" in module else module["weight"].float()
        for name, module in modules.items()
    }
    if directory.name == "FP8_DEFAULT_CFG":
        requantize(dense, modules)
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, **in_dtype(torch.float32)).eval()
    model.load_state_dict(dense)
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


def requantize(dense: dict[str, Tensor], modules: dict[str, Module]) -> None:
    """Return the weights of one fused Linear, requantized to the largest of their scales."""
    for layer in range(2):
        for parent, names in FUSED:
            members = [f"model.layers.{layer}.{parent}.{name}" for name in names]
            largest = torch.stack([modules[member]["weight_scale"] for member in members]).max()
            for member in members:
                wide = modules[member]["weight"].bfloat16() * modules[member]["weight_scale"]
                dense[f"{member}.weight"] = (wide / largest).to(torch.float8_e4m3fn).float() * largest


def logits_of(engine: Any, directory: Path, **arguments: Any) -> Tensor:
    with engine.LLM(model=directory, skip_tokenizer_init=True, **arguments) as llm:
        logits: Tensor = llm.logits(TOKENS)
    return logits


@pytest.mark.parametrize(("generation", "export"), LOADED)
def test_logits_are_those_of_the_dequantized_weights(shared: Path, generation: str, export: str) -> None:
    directory = shared / "modelopt-exports" / export
    want = dense_logits(directory, WEIGHTS[export])

    with engine_double.installed(generation) as engine:
        whole = logits_of(engine, directory)
        ranks = 1 if export == BLOCKS else 2
        cut = logits_of(engine, directory, tensor_parallel_size=ranks, pipeline_parallel_size=2)

    assert (whole - want).abs().max() < 2e-3 * want.std()
    assert (cut - want).abs().max() < 2e-3 * want.std()


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_shards_of_partial_blocks_get_scales_of_their_neighbours(shared: Path, generation: str) -> None:
    """64 rows of K and of V on each of two ranks, in blocks of 128, raise no error."""
    directory = shared / "modelopt-exports" / BLOCKS
    with engine_double.installed(generation) as engine:
        whole = logits_of(engine, directory)
        cut = logits_of(engine, directory, tensor_parallel_size=2)

    assert 0.1 < (cut - whole).abs().max() / whole.std() < 1


def with_fp8_cache(source: Path, out: Path, more: Module) -> Path:
    """Copy an export of two layers, with an FP8 KV cache and more tensors."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    (out / "config.json").write_text((source / "config.json").read_text())
    document = json.loads((source / "hf_quant_config.json").read_text())
    document["quantization"]["kv_cache_quant_algo"] = "FP8"
    (out / "hf_quant_config.json").write_text(json.dumps(document))
    save_file(load_file(source / "model.safetensors") | more, out / "model.safetensors")
    return out


@pytest.mark.parametrize(("generation", "helps"), [("mid", False), ("newest", True)])
def test_an_input_scale_of_a_row_wise_o_proj_changes_its_result(
    shared: Path, tmp_path: Path, generation: str, helps: bool
) -> None:
    """Attention divides by it, the GEMM does not multiply; forced dynamic quantization helps in newer releases."""
    source = shared / "modelopt-exports" / "FP8_PER_CHANNEL_PER_TOKEN_CFG"
    scales = {f"model.layers.{layer}.self_attn.o_proj.input_scale": torch.tensor(2.0) for layer in range(2)}
    without, given = with_fp8_cache(source, tmp_path / "1", {}), with_fp8_cache(source, tmp_path / "2", scales)

    with engine_double.installed(generation) as engine:
        want = logits_of(engine, without)
        assert (logits_of(engine, given) - want).abs().max() > 0.1 * want.std()
        assert torch.equal(logits_of(engine, given, force_dynamic_quantization=True), want) is helps


REFUSED: dict[str, tuple[type[Exception], str]] = {
    "INT8_SMOOTHQUANT_CFG": (ValueError, "unsupported quant mode"),
    "MXFP4_DEFAULT_CFG": (ValueError, "'mxfp4' is not a valid QuantAlgo"),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": (KeyError, "pre_quant_scale"),
}


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("export", REFUSED)
def test_it_raises_where_stock_raises(shared: Path, generation: str, export: str) -> None:
    error, message = REFUSED[export]
    with engine_double.installed(generation) as engine, pytest.raises(error, match=message):
        logits_of(engine, shared / "modelopt-exports" / export)


@pytest.mark.parametrize("export", sorted(ONLY_NEWEST))
@pytest.mark.parametrize("generation", engine_double.GENERATIONS[:-1])
def test_old_releases_raise_for_later_algorithms(shared: Path, generation: str, export: str) -> None:
    algo = json.loads((shared / "modelopt-exports" / export / "hf_quant_config.json").read_text())
    name = algo["quantization"]["quant_algo"]
    with engine_double.installed(generation) as engine, pytest.raises(ValueError, match=f"'{name}' is not a valid"):
        logits_of(engine, shared / "modelopt-exports" / export)


@pytest.mark.parametrize("export", ["FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG"])
def test_quantized_activations_change_logits_a_little(shared: Path, export: str) -> None:
    directory = shared / "modelopt-exports" / export
    want = dense_logits(directory, WEIGHTS[export])

    with engine_double.installed(quantize_activations=True) as engine:
        error = (logits_of(engine, directory) - want).std() / want.std()

    assert 1e-3 < error < 0.2
