"""What is converted or prepared for a release computes the stored weights on the generation that imitates it.

The promises here are about what only some releases do: biases that weight-only Linears drop, experts whose kernel is a
child with a configuration of its own, scalars that must be equal bit by bit.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import Built, tiny_config, write_checkpoint
from class_models import write_class
from engine_fixtures import BINDINGS
from plain_model import deviation, plain_logits

import trtllm_ct
from trtllm_ct import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("sidecar_cache")]

TOKENS = list(range(5, 25))
ROUNDED = 2e-2
"""The bound in standard deviations of the logits for weights that were rounded to bfloat16 once."""
QWEN2 = tiny_config("Qwen2ForCausalLM", hidden=128)
QWEN3_MOE = tiny_config("Qwen3MoeForCausalLM", hidden=128, intermediate=256, moe_intermediate_size=128)
WAYS = ["converted", "served"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")


def logits_of(way: str, generation: str, directory: Path, out: Path, tensor: int = 1) -> Tensor:
    """Return logits of the double, after a conversion for its release, or through this package's `LLM`."""
    if way == "converted":
        release = engine_double.RELEASE_OF[generation]
        convert_checkpoint(directory, out, engine=release, parallel=Parallel(tensor=tensor))
    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        make = engine.LLM if way == "converted" else trtllm_ct.LLM
        model = out if way == "converted" else directory
        with make(model=model, skip_tokenizer_init=True, tensor_parallel_size=tensor) as llm:
            logits: Tensor = llm.logits(TOKENS)
    return logits


def expected(built: Built) -> Tensor:
    return plain_logits(built.config, built.dense, TOKENS)


@pytest.mark.pairs
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize(
    "scheme",
    [
        "int8-channel",
        "int8-plain-channel",
        "w8a8",
        "int4-channel",
        "int4-g64",
        "fp8-channel-token",
        "fp8-block",
        "nvfp4",
    ],
)
def test_a_linear_with_a_bias_keeps_it(tmp_path: Path, way: str, generation: str, scheme: str) -> None:
    """PR #12317: W8A16 and W4A16 returned the GEMM without the bias until March 2026."""
    built = write_checkpoint(tmp_path / "model", config=QWEN2, scheme=scheme)

    logits = logits_of(way, generation, built.directory, tmp_path / "out")

    assert deviation(logits, expected(built)) < ROUNDED


@pytest.mark.pairs
@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize(
    "scheme", ["int8-channel", "int4-channel", "int4-g64", "int4-g128", "fp8-channel-token", "fp8-block", "nvfp4"]
)
def test_ranks_hold_their_slices(tmp_path: Path, generation: str, scheme: str, tensor: int) -> None:
    """Two K/V heads of 96 rows: on two ranks a slice ends within a block, on four ranks heads are repeated.

    Engines repeat the elements of a bias and not its heads, so a model with biases is refused on four ranks.
    """
    architecture = "Qwen2ForCausalLM" if tensor == 2 else "LlamaForCausalLM"
    config = tiny_config(architecture, hidden=384, heads=4, intermediate=768, layers=1)
    built = write_checkpoint(tmp_path / "model", config=config, scheme=scheme)

    logits = logits_of("converted", generation, built.directory, tmp_path / "out", tensor)

    assert deviation(logits, expected(built)) < ROUNDED


@pytest.mark.pairs
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize(
    "schemes",
    [
        {"attention": "int4-g64", "experts": "int4-g64"},
        {"attention": "int4-g64", "experts": "dense"},
        {"attention": "dense", "experts": "fp8-block"},
        {"attention": "int4-g64", "experts": "fp8-block"},
        {"attention": "int8-channel", "experts": "nvfp4"},
        {"attention": "fp8-block", "experts": "nvfp4"},
        {"attention": "fp8-channel-token", "experts": "fp8-channel-token"},
    ],
    ids=lambda schemes: " ".join(schemes.values()),
)
def test_experts_get_the_mode_that_is_planned_for_them(
    tmp_path: Path, way: str, generation: str, schemes: dict[str, str]
) -> None:
    """Early in 2026 the kernel of experts is `<experts>.backend`, and keeps the global configuration."""
    scheme = dict.fromkeys(ATTENTION, schemes["attention"]) | dict.fromkeys(EXPERTS, schemes["experts"])
    built = write_checkpoint(tmp_path / "model", config=QWEN3_MOE, scheme=scheme)

    logits = logits_of(way, generation, built.directory, tmp_path / "out")

    assert deviation(logits, expected(built)) < ROUNDED


@pytest.mark.pairs
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("name", ["weight_global_scale", "input_global_scale"])
@pytest.mark.parametrize("leaf", ["k_proj", "up_proj"])
def test_scalars_of_a_fused_linear_that_differ_in_the_last_bit(
    tmp_path: Path, way: str, generation: str, name: str, leaf: str
) -> None:
    """Releases before September 2026 compare them with `==`; the builder gives all modules the same ones."""

    def nudge(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(f"{leaf}.{name}")]:
            tensors[key] = torch.nextafter(tensors[key], torch.tensor(torch.inf))

    config = tiny_config("LlamaForCausalLM", hidden=128)
    built = write_checkpoint(tmp_path / "model", config=config, scheme="nvfp4", edit=nudge)

    logits = logits_of(way, generation, built.directory, tmp_path / "out")

    assert deviation(logits, expected(built)) < ROUNDED


# Attention's output.

NO_SCALE = {"FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES"}
"""Modes of o_proj that have no static scale, so that attention would write its output with a scale of 1."""


def has_fixed_scale(llm: Any) -> bool:
    """Whether attention of any layer writes FP8 values with a scale of 1."""
    attention = [module for model in llm.models for module in model.modules() if hasattr(module, "quantizes_output")]
    assert attention
    return any(module.quantizes_output and module.o_proj.quant_algo in NO_SCALE for module in attention)


def served(directory: Path, caplog: pytest.LogCaptureFixture, **arguments: Any) -> tuple[Any, list[str]]:
    """Return this package's `LLM`, and its warnings about o_proj."""
    caplog.clear()
    llm = trtllm_ct.LLM(directory, skip_tokenizer_init=True, **arguments)
    assert llm.logits(TOKENS).isfinite().all()
    loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return llm, [message for message in loud if "o_proj" in message]


@pytest.mark.pairs
@pytest.mark.parametrize("cache", [None, "checkpoint", "user"])
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("scheme", ["fp8-channel-token", "fp8-block", "fp8-tensor-static", "nvfp4", "int4-g64"])
def test_a_fixed_scale_of_attention_is_avoided_or_said_and_nothing_else(
    tmp_path: Path, generation: str, scheme: str, cache: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, an argument that is forced and a fixed scale each happen only with a quantized KV cache."""
    config = tiny_config(hidden=256, heads=2)
    built = write_checkpoint(tmp_path / "model", config=config, scheme=scheme, kv=cache == "checkpoint")
    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        more = {"kv_cache_config": engine.KvCacheConfig(dtype="fp8")} if cache == "user" else {}
        llm, warnings = served(built.directory, caplog, **more)
        dense, no_warnings = served(built.directory, caplog, dense_o_proj=True, **more)

        matters = cache is not None and scheme in {"fp8-channel-token", "fp8-block"}
        assert has_fixed_scale(llm) is bool(warnings)
        assert llm.args.force_dynamic_quantization is (matters and generation == "newest")
        assert bool(warnings) is (matters and generation != "newest")
        assert not has_fixed_scale(dense)
        assert not no_warnings


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_the_cache_that_a_user_asks_for_reaches_layers_of_a_mixed_model(
    tmp_path: Path, generation: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Early releases set it in the global configuration only, and attention then writes past the end of the cache."""
    scheme = {"q_proj": "int4-g64", "k_proj": "int4-g64", "v_proj": "int4-g64", "down_proj": "int8-channel"}
    built = write_checkpoint(tmp_path / "model", config=tiny_config(hidden=128), scheme=scheme)
    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        llm, _ = served(built.directory, caplog, kv_cache_config=engine.KvCacheConfig(dtype="fp8"))
        logits = llm.logits(TOKENS)

    assert deviation(logits, expected(built)) < ROUNDED


@pytest.mark.parametrize("generation", ["mid", "newest"])
def test_attention_with_a_gate_never_quantizes_its_output(
    tmp_path: Path, generation: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`Attention._use_quantize_output` is false with `attn_output_gate`: no warning, and no argument is forced."""
    write_class(tmp_path / "model", "Qwen3NextForCausalLM", "fp8-channel-token", kv=True)
    with engine_double.installed(generation, importers=[BINDINGS]):
        llm = trtllm_ct.LLM(tmp_path / "model", skip_tokenizer_init=True)

        assert not any(getattr(module, "quantizes_output", False) for module in llm.models[0].modules())
        assert llm.args.force_dynamic_quantization is False
    assert not [record for record in caplog.records if "quantizes" in record.getMessage() and "o_proj" in str(record)]


@pytest.mark.pairs
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("inner", [192, 256, 320])
def test_experts_in_blocks_are_kept_only_where_gate_and_up_are_whole_blocks(
    tmp_path: Path, way: str, generation: str, sm: int, inner: int
) -> None:
    """The scales of gate and up lie in one tensor of 2 * inner / 128 rows; a partial block would not fit."""
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, heads=4, intermediate=256, moe_intermediate_size=inner)
    built = write_checkpoint(tmp_path / "model", config=config, scheme="fp8-block")
    release = engine_double.RELEASE_OF[generation]
    plan = convert_checkpoint(tmp_path / "model", tmp_path / "out", engine=release, sm=sm).plan
    with engine_double.installed(generation, importers=[BINDINGS], sm=sm) as engine:
        if way == "converted":
            logits = engine.LLM(model=tmp_path / "out", skip_tokenizer_init=True).logits(TOKENS)
        else:
            logits = trtllm_ct.LLM(tmp_path / "model", skip_tokenizer_init=True).logits(TOKENS)

    kept = {module.layer is not None for module in plan.modules if module.experts}
    assert kept == {inner % 128 == 0}
    assert deviation(logits, expected(built)) < ROUNDED


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_no_gpu_is_named_for_experts_that_none_holds(tmp_path: Path, architecture: str) -> None:
    sizes = {"moe_intermediate_size": 192} if architecture.startswith("Qwen") else {}
    config = tiny_config(architecture, hidden=256, heads=4, intermediate=192, **sizes)
    write_checkpoint(tmp_path, config=config, scheme="fp8-block")

    reasons = {module.reason for module in trtllm_ct.plan_checkpoint(tmp_path).modules if module.experts}

    assert all("--sm" not in reason for reason in reasons)
    assert any("out % 128 == 0 in each of" in reason for reason in reasons)
