"""int4 experts with static FP8 activations on the double: kept as W4A8_AWQ where the engine's kernel is exact."""

from __future__ import annotations

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
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("sidecar_cache")

SCHEME = {"gate_proj": "int4-g128-fp8-static", "up_proj": "int4-g128-fp8-static", "down_proj": "int4-g128-fp8-static"}
SCHEME |= {"w1": "int4-g128-fp8-static", "w2": "int4-g128-fp8-static", "w3": "int4-g128-fp8-static"}
NAMES = {
    "Qwen3MoeForCausalLM": ("mlp.experts", ("up_proj", "gate_proj", "down_proj")),
    "MixtralForCausalLM": ("block_sparse_moe.experts", ("w3", "w1", "w2")),
}
SIZES = [(1, 1), (2, 1), (2, 2)]
"""Tensor and expert parallel sizes."""


def write(directory: Path, architecture: str, **more: Any) -> Built:
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 256}
    experts = {} if architecture == "MixtralForCausalLM" else {"moe_intermediate_size": 256}
    config = tiny_config(architecture, **sizes, **experts)
    return write_checkpoint(directory, config=config, scheme=SCHEME, **more)


def experts_of(model: Any, architecture: str) -> Iterator[tuple[str, Tensor, int, Any]]:
    """Yield the name of each expert's projection, its weight on this rank, the cut axis, and the kernel's module."""
    _, (up_name, gate_name, down_name) = NAMES[architecture]
    for name, module in model.named_modules():
        if not hasattr(module, "expert_ids"):
            continue
        for at, expert in enumerate(module.expert_ids):
            up, gate = module.quant_method.dequantize(module, "w3_w1", at).chunk(2)
            down = module.quant_method.dequantize(module, "w2", at)
            around = f"{name.removesuffix('.backend')}.{expert}"
            yield f"{around}.{up_name}", up, 0, module
            yield f"{around}.{gate_name}", gate, 0, module
            yield f"{around}.{down_name}", down, 1, module


def wrong(model: Any, architecture: str, dense: Mapping[str, Tensor]) -> list[str]:
    """Return the projections whose values are not exactly this rank's slice of the stored ones, bit for bit."""
    found = {}
    for name, weight, dim, module in experts_of(model, architecture):
        assert str(module.quant_config.quant_algo) == "W4A8_AWQ"
        exact = dense[f"{name}.weight"].chunk(module.mapping.moe_tp_size, dim=dim)[module.mapping.moe_tp_rank]
        found[name] = torch.equal(weight.double(), exact.double())
    assert found
    return [name for name, right in found.items() if not right]


@pytest.mark.pairs
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize("generation", ["mid", "newest"])
def test_experts_hold_exactly_the_stored_values_on_sm90(
    tmp_path: Path, generation: str, architecture: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, out = write(tmp_path / "in", architecture), tmp_path / "out"
    tensor, expert = sizes
    release = engine_double.RELEASE_OF[generation]
    report = convert_checkpoint(
        built.directory, out, engine=release, sm=90, parallel=Parallel(tensor=tensor, expert=expert)
    )
    assert verify_checkpoint(built.directory, out).good
    assert {module.delivered_mode for module in report.plan.modules if module.experts} == {"W4A8_AWQ g128"}

    more = {"skip_tokenizer_init": True, "tensor_parallel_size": tensor, "moe_expert_parallel_size": expert}
    with engine_double.installed(generation, sm=90, importers=[BINDINGS]) as engine:
        monkeypatch.setattr(import_module(BINDINGS), "_sm_of_gpu", lambda: 90)
        for stock in (True, False):
            llm = engine.LLM(model=str(out), **more) if stock else trtllm_ct.LLM(built.directory, **more)
            with llm:
                assert len(llm.models) == tensor
                for model in llm.models:
                    assert wrong(model, architecture, built.dense) == []


def test_tensors_are_those_that_modelopt_writes(tmp_path: Path) -> None:
    built, out = write(tmp_path / "in", "Qwen3MoeForCausalLM"), tmp_path / "out"
    convert_checkpoint(built.directory, out, sm=90)

    expert = "model.layers.0.mlp.experts.3.down_proj"
    tensors = load_file(next(out.glob("*.safetensors")))
    written = {name.removeprefix(f"{expert}."): tensor for name, tensor in tensors.items() if name.startswith(expert)}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()} == {
        "weight": (torch.uint8, (128, 256)),
        "weight_scale": (torch.float32, (256, 2)),
        "weight_scale_2": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
        "pre_quant_scale": (torch.bfloat16, (256,)),
    }
    assert written["weight_scale_2"] == 1
    assert written["pre_quant_scale"].eq(1).all()
    assert torch.equal(written["input_scale"], built.stored[f"{expert}.input_scale"].float().reshape([]))


@pytest.mark.parametrize("sm", [None, 89, 100, 120])
def test_experts_are_dequantized_where_the_kernel_rounds_or_is_missing(tmp_path: Path, sm: int | None) -> None:
    write(tmp_path / "in", "Qwen3MoeForCausalLM")

    plan = plan_checkpoint(tmp_path / "in", sm=sm)

    assert {module.delivered_mode for module in plan.modules if module.experts} == {"dequantized"}


def test_the_double_rounds_on_sm89(tmp_path: Path) -> None:
    """The mode of another SM is refused by this package; stock would load it and compute with rounded weights."""
    built, out = write(tmp_path / "in", "Qwen3MoeForCausalLM"), tmp_path / "out"
    convert_checkpoint(built.directory, out, sm=90)

    with (
        engine_double.installed("mid", sm=89) as engine,
        engine.LLM(model=str(out), skip_tokenizer_init=True) as llm,
    ):
        assert wrong(llm.models[0], "Qwen3MoeForCausalLM", built.dense) != []


@pytest.mark.parametrize("release", ["stock-1.0", "stock-1.2", "stock-1.3"])
def test_experts_of_deepseek_are_dequantized_since_their_class_reads_another_layout(
    tmp_path: Path, release: str
) -> None:
    sizes = {"head_dim": None, "num_key_value_heads": 4, "moe_intermediate_size": 128}
    config = tiny_config("DeepseekV3ForCausalLM", hidden=128, **sizes)
    write_checkpoint(tmp_path / "in", config=config, scheme=dict.fromkeys(SCHEME, "int4-g128-fp8-static"))

    plan = plan_checkpoint(tmp_path / "in", engine=release, sm=90)

    experts = [module for module in plan.modules if module.experts]
    assert {module.delivered_mode for module in experts} == {"dequantized"}
    if release != "stock-1.0":
        assert "W4A8_AWQ" in experts[0].reason
        assert "in another layout" in experts[0].reason


def test_scales_of_another_dtype_are_dequantized(tmp_path: Path) -> None:
    """The engine rounds them to bfloat16."""
    write(tmp_path / "in", "Qwen3MoeForCausalLM", scale_dtype=torch.float16)

    plan = plan_checkpoint(tmp_path / "in", sm=90)

    experts = [module for module in plan.modules if module.experts]
    assert {module.delivered_mode for module in experts} == {"dequantized"}
    assert experts[0].reason.endswith("W4A8_AWQ rounds scales to bfloat16, and these are float16")
