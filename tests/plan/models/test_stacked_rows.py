"""The rows of Llama 4 and Gemma 4: what plans make of stacks, of keys that are values, and of layers without keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import fp8_weights, rewrite, rewrite_config
from stacked_models import STACKED, write_stacked
from stored_schemes import SCHEMES, Writer

from trtllm_ct.base.errors import PlanError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.reference import load_model
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from builders import Built
    from torch import Tensor

    from trtllm_ct.plan.plan import Plan

# The models are built as transformers 5 builds them.
pytestmark = [pytest.mark.reference, pytest.mark.newest_transformers]

LLAMA, GEMMA, SHARED, UNIFIED = STACKED
EXPERTS = "language_model.model.layers.1.feed_forward.experts"
BODY = "model.language_model.layers"


def written(directory: Path, name: str, scheme: str | Mapping[str, str], **more: Any) -> Built:
    directory.mkdir(exist_ok=True)
    return write_stacked(directory, name, scheme, **more)


def plan_of(directory: Path, name: str, scheme: str | Mapping[str, str], **more: Any) -> Plan:
    return plan_checkpoint(written(directory, name, scheme, **more).directory, engine="stock-1.3")


def delivered(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {delivery.name: delivery.sources for module in plan.modules for delivery in module.deliveries}


def quantized(name: str, scheme: str, rows: int, columns: int) -> dict[str, Tensor]:
    tensors, _ = Writer(torch.bfloat16, torch.Generator().manual_seed(1)).store(SCHEMES[scheme], (rows, columns))
    return {f"{name}.{local}": tensor for local, tensor in tensors.items()}


@pytest.mark.parametrize("scheme", ["fp8-tensor-static", "nvfp4", "int4-g128"])
def test_experts_of_llama_4_are_dequantized_into_stacks_and_excluded_by_both_names(tmp_path: Path, scheme: str) -> None:
    plan = plan_of(tmp_path, LLAMA, scheme)

    assert {part.stack for part in plan.stacks.values()} == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    assert "plain" in plan.module(f"{EXPERTS}.0.gate_proj").reason
    assert {EXPERTS, EXPERTS.removeprefix("language_model.")} <= {*plan.quant_config.exclude_modules}


def test_stacks_of_llama_4_stay_as_they_are(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LLAMA, {"self_attn.o_proj": "nvfp4"})

    assert not plan.stacks
    assert {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"} <= delivered(plan).keys()
    assert EXPERTS in plan.quant_config.exclude_modules


def test_llama_4_gets_entries_although_all_its_modules_have_one_mode(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LLAMA, "nvfp4")

    assert plan.quant_config.quant_algo == QuantAlgo.MIXED_PRECISION
    assert {layer.quant_algo for layer in plan.quant_config.quantized_layers.values()} == {QuantAlgo.NVFP4}
    assert "model.layers.1.feed_forward.shared_expert.down_proj" in plan.quant_config.quantized_layers


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8-channel-token", "int4-g128"])
def test_keys_are_delivered_as_values_where_nothing_else_is(tmp_path: Path, scheme: str) -> None:
    plan = plan_of(tmp_path, UNIFIED, scheme)
    names = delivered(plan)

    for layer, copied in enumerate([False, True, False, True]):
        keys, values = (f"{BODY}.{layer}.self_attn.{letter}_proj" for letter in "kv")
        of_keys = {name: sources for name, sources in names.items() if name.startswith(keys)}
        of_values = {name: sources for name, sources in names.items() if name.startswith(values)}
        assert {name.replace(".k_proj.", ".v_proj.") for name in of_keys} == of_values.keys()
        assert plan.module(values).delivered_mode == plan.module(keys).delivered_mode
        assert (
            all(sources == of_values[name.replace(".k_proj.", ".v_proj.")] for name, sources in of_keys.items())
            == copied
        )


def test_a_stored_v_proj_is_not_replaced(tmp_path: Path) -> None:
    built = written(tmp_path, UNIFIED, "fp8-channel-token")
    values = f"{BODY}.1.self_attn.v_proj"
    rewrite(built.directory, lambda stored: stored.update(quantized(values, "fp8-channel-token", 256, 256)))
    rewrite_config(
        built.directory,
        lambda config: config["quantization_config"]["config_groups"]["group_0"]["targets"].append(values),
    )

    names = delivered(plan_checkpoint(built.directory, engine="stock-1.3"))

    assert names[f"{values}.weight"] == (f"{values}.weight",)


def test_a_sliding_layer_must_have_values(tmp_path: Path) -> None:
    built = written(
        tmp_path,
        UNIFIED,
        "fp8-channel-token",
        num_hidden_layers=6,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    )
    lost = f"{BODY}.0.self_attn.v_proj"
    assert not inspect_checkpoint(built.directory, "dense").problems

    rewrite(built.directory, lambda stored: [stored.pop(name) for name in list(stored) if name.startswith(lost)])

    with pytest.raises(PlanError, match=r"layers\.0\.self_attn\.v_proj"):
        plan_checkpoint(built.directory, engine="stock-1.3")


def test_queries_of_layers_that_share_keys_are_plain_whatever_is_stored_of_their_keys(tmp_path: Path) -> None:
    built = written(tmp_path, SHARED, "fp8-channel-token")
    names = [f"{BODY}.{layer}.self_attn.{letter}_proj" for layer, size in ((2, 1), (3, 2)) for letter in "kv"]
    for name in names:
        rows = 512 if ".3." in name else 256
        rewrite(
            built.directory,
            lambda stored, name=name, rows=rows: stored.update(quantized(name, "fp8-channel-token", rows, 256)),
        )
    rewrite_config(
        built.directory,
        lambda config: config["quantization_config"]["config_groups"]["group_0"]["targets"].extend(names),
    )

    plan = plan_checkpoint(built.directory, engine="stock-1.3")

    queries = [plan.module(f"{BODY}.{layer}.self_attn.q_proj").layer for layer in range(4)]
    assert [layer is not None for layer in queries] == [True, True, False, False]
    assert all(plan.module(name).layer is None for name in names)
    assert plan.module(f"{BODY}.3.self_attn.o_proj").layer is not None


@pytest.mark.parametrize(
    ("scheme", "algo", "of_output"),
    [
        ("int4-channel", QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16),
        ("int4-g128", QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_AWQ),
        ("int8-channel", QuantAlgo.W8A16, QuantAlgo.W8A16),
        ("nvfp4", QuantAlgo.NVFP4, QuantAlgo.NVFP4),
    ],
)
def test_attention_of_gemma_4_gets_modes_whose_rows_show_the_heads(
    tmp_path: Path, scheme: str, algo: QuantAlgo, of_output: QuantAlgo
) -> None:
    plan = plan_of(tmp_path, UNIFIED, scheme)

    assert {plan.module(f"{BODY}.1.self_attn.{letter}_proj").layer.quant_algo for letter in "qkv"} == {algo}
    assert plan.module(f"{BODY}.1.self_attn.o_proj").layer.quant_algo == of_output


@pytest.mark.parametrize(("scheme", "kept"), [("nvfp4", True), ("fp8-tensor-static", False), ("fp8-block", False)])
def test_experts_of_gemma_4_keep_the_mode_that_is_known_to_be_served(tmp_path: Path, scheme: str, kept: bool) -> None:
    plan = plan_of(tmp_path, GEMMA, scheme)
    name = "model.layers.0.moe.experts"
    expert = plan.module(f"{name}.3.w1")

    assert (expert.layer is not None) == kept
    assert kept or "GELU" in expert.reason
    assert (name in plan.quant_config.exclude_modules) == (not kept)
    assert f"{name}.3.w2.weight" in delivered(plan)


def test_a_head_that_the_class_never_loads_is_a_problem(tmp_path: Path) -> None:
    built = written(tmp_path, UNIFIED, "fp8-channel-token")
    assert not inspect_checkpoint(built.directory, engine="stock-1.3").problems

    rewrite(built.directory, lambda stored: stored.update({"lm_head.weight": torch.ones(96, 256).bfloat16()}))
    rewrite_config(built.directory, lambda config: config.update(tie_word_embeddings=False))

    problem = inspect_checkpoint(built.directory, engine="stock-1.3").problems[0]
    assert "a head of its own" in problem.found


@pytest.mark.parametrize("name", [UNIFIED, SHARED])
def test_scales_of_the_cache_are_delivered_for_keys_and_values(tmp_path: Path, name: str) -> None:
    built = written(tmp_path / "in", name, "fp8-channel-token")
    layers = range(4 if name == UNIFIED else 2)
    scales = {
        f"{BODY}.{layer}.self_attn.{letter}_scale": torch.tensor([0.01 * (layer + 1)]).bfloat16()
        for layer in layers
        for letter in "kv"
    }
    rewrite(built.directory, lambda stored: stored.update(scales))
    rewrite_config(
        built.directory, lambda config: config["quantization_config"].update(kv_cache_scheme=fp8_weights("tensor"))
    )

    convert_checkpoint(built.directory, tmp_path / "out", engine="stock-1.3")

    names = delivered(plan_checkpoint(built.directory, engine="stock-1.3"))
    assert {f"{BODY}.{layer}.self_attn.{letter}_proj.{letter}_scale" for layer in layers for letter in "kv"} <= {*names}
    assert verify_checkpoint(built.directory, tmp_path / "out").good
    if name == UNIFIED:
        load_model(tmp_path / "out", dtype=torch.float32)
    else:
        with pytest.raises(PlanError, match="those of earlier ones"):
            load_model(tmp_path / "out", dtype=torch.float32)


def test_verification_finds_values_that_are_not_the_keys(tmp_path: Path) -> None:
    built = written(tmp_path / "in", UNIFIED, "fp8-channel-token")
    out = tmp_path / "out"
    convert_checkpoint(built.directory, out, engine="stock-1.3")
    values = f"{BODY}.1.self_attn.v_proj.weight_scale"

    rewrite(out, lambda stored: stored.update({values: stored[values] * 2}))

    report = verify_checkpoint(built.directory, out)
    assert not report.good
    assert "layers.1.self_attn.v_proj" in str(report.faults[0])
