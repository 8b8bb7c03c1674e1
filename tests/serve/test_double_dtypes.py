"""The dtypes of a model that each mode's kernels take: the table of modes and the double agree, and conversions too."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from engine_modules import linear
from multimodal import write_multimodal

import trtllm_ct
from trtllm_ct.base.dtypes import DType
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.kernels import missing_kernel
from trtllm_ct.engine.modes import LINEAR_MODES
from trtllm_ct.engine.platform import SMS, Platform
from trtllm_ct.engine.releases import release_named
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FLOATS = (DType.BF16, DType.F16, DType.F32)
REFUSALS = (AssertionError, NotImplementedError, RuntimeError)


def refuses(module: Any) -> bool:
    """Whether the Linear stops at its first forward."""
    module.alpha_value = 1.0
    try:
        module.quant_method.apply(module, torch.zeros(1, module.in_features), None)
    except REFUSALS:
        return True
    return False


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_the_kernels_of_every_mode_take_the_dtypes_of_the_table(generation: str, sm: int) -> None:
    release = release_named(engine_double.RELEASE_OF[generation])
    assert release is not None
    platform = Platform(release=release, sm=sm)
    since = {False: "linear_since", True: "experts_since"}
    of_linears, of_experts = (
        [
            mode
            for mode in LINEAR_MODES
            if not mode.plug_in
            and release.has(getattr(mode, since[expert]))
            and not missing_kernel(mode, platform, expert=expert)
        ]
        for expert in (False, True)
    )
    with engine_double.installed(generation, sm=sm):
        from tensorrt_llm._torch.modules.fused_moe.interface import _CUTLASS

        for mode in of_linears:
            # Norms refuse float32 before any Linear does; Linears of the FP8 modes would take it.
            for dtype in FLOATS[:2]:
                module = linear(str(mode.algo), dtype=dtype.torch_dtype)
                assert refuses(module) is (dtype not in mode.dtypes_on(sm, expert=False)), (mode.algo, dtype)
        for mode in of_experts:
            taken = {DType.from_torch(dtype) for dtype in _CUTLASS[mode.algo].dtypes}
            assert taken == mode.dtypes_on(sm, expert=True), mode.algo


def block_model(directory: Path, dtype: str, *, mixture: bool = False) -> Path:
    """Write a checkpoint with FP8 block scales and a model of this dtype."""
    more: dict[str, Any] = {"architecture": "LlamaForCausalLM"}
    if mixture:
        more = {"architecture": "Qwen3MoeForCausalLM", "num_experts": 2, "moe_intermediate_size": 256}
    config = tiny_config(hidden=256, heads=4, kv_heads=4, intermediate=256, head_dim=64, dtype=dtype, **more)
    write_checkpoint(directory, config=config, scheme="fp8-block")
    return directory


def logits(generation: str, directory: Path) -> Tensor:
    with (
        engine_double.installed(generation) as engine,
        engine.LLM(model=str(directory), skip_tokenizer_init=True) as llm,
    ):
        found: Tensor = llm.logits(list(range(6)))
    return found


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize(
    ("stored", "asked", "computed", "kept"),
    [
        ("bfloat16", "auto", "bfloat16", True),
        ("float16", "auto", "float16", False),
        ("float16", "bfloat16", "bfloat16", True),
        ("bfloat16", "float16", "float16", False),
        ("float32", "auto", "bfloat16", True),
        ("float32", "float32", "bfloat16", True),
        ("float32", "float16", "float16", False),
    ],
)
def test_fp8_blocks_are_kept_where_the_model_computes_in_bfloat16(
    tmp_path: Path, generation: str, stored: str, asked: str, computed: str, kept: bool, mixture: bool
) -> None:
    release, source = engine_double.RELEASE_OF[generation], block_model(tmp_path / "in", stored, mixture=mixture)
    plan = inspect_checkpoint(source, "modelopt", engine=release).plan
    convert_checkpoint(source, tmp_path / "out", dtype=asked, engine=release)

    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == computed
    assert (tmp_path / "out/hf_quant_config.json").is_file() is kept
    assert verify_checkpoint(source, tmp_path / "out").faults == ()
    assert logits(generation, tmp_path / "out").isfinite().all()
    if (stored, asked) == ("float16", "auto"):
        assert plan is not None
        reasons = {module.reason for module in plan.modules if module.dequantized}
        assert all("the model's dtype is float16 (--dtype bfloat16 changes it)" in reason for reason in reasons)


@pytest.mark.parametrize("to", ["modelopt", "tensorrt_llm"])
@pytest.mark.parametrize(("dtype", "said"), [("float32", 1), ("bfloat16", 0), ("float16", 0)])
def test_a_float32_model_is_delivered_in_bfloat16_with_a_warning(
    tmp_path: Path, to: str, dtype: str, said: int
) -> None:
    report = inspect_checkpoint(block_model(tmp_path / "in", dtype), to)

    warnings = [text for text in report.warnings if text.startswith("dtype of the model")]
    assert len(warnings) == said
    if said:
        assert "config.json says float32" in warnings[0]
        assert "delivered as bfloat16" in warnings[0]


@pytest.mark.usefixtures("sidecar_cache")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_a_loaded_model_has_the_planned_dtype(tmp_path: Path, generation: str, dtype: str) -> None:
    source = block_model(tmp_path / "in", dtype)
    with (
        engine_double.installed(generation, importers=[BINDINGS]),
        trtllm_ct.LLM(source, skip_tokenizer_init=True) as llm,
    ):
        model = llm.models[0]
        linear = model.model.layers[0].self_attn.o_proj
        algo = "FP8_BLOCK_SCALES" if dtype == "float32" else None
        assert model.model_config.torch_dtype is (torch.bfloat16 if algo else torch.float16)
        assert linear.quant_algo == algo
        assert llm.logits(list(range(6))).isfinite().all()


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_a_class_that_computes_in_bfloat16_only_gets_such_a_model(tmp_path: Path, generation: str) -> None:
    text = tiny_config("Gemma3ForCausalLM", hidden=256, heads=4, kv_heads=4, intermediate=256, head_dim=64)
    source, name = tmp_path / "in", "Gemma3ForConditionalGeneration"
    body, kinds = "model.language_model.", ("gemma3", "gemma3_text")
    text = {**text, "dtype": "float16", "torch_dtype": "float16"}
    write_multimodal(source, body, text=text, architecture=name, kinds=kinds, scheme="fp8-block", vision={})
    release = engine_double.RELEASE_OF[generation]

    report = inspect_checkpoint(source, "modelopt", engine=release)
    convert_checkpoint(source, tmp_path / "out", engine=release)

    assert report.plan is not None
    assert report.plan.dtype is DType.BF16
    assert any(f"{name} of the engine computes in bfloat16" in warning for warning in report.warnings)
    assert (tmp_path / "out/hf_quant_config.json").is_file()
    assert logits(generation, tmp_path / "out").isfinite().all()
