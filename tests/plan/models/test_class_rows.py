"""Rows of the engine's model classes: what they name, and what plans make of them."""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
import torch
from class_models import CLASSES, write_class
from stored_schemes import SCHEMES, Writer

from trtllm_ct.base.errors import PlanError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.convert.sizes import ConvertedDirectory
from trtllm_ct.engine.model_classes import MODEL_CLASSES, WRAPPERS
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
from trtllm_ct.plan.models.class_row import entry_of
from trtllm_ct.plan.models.class_rows import CLASS_ROWS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.plan.plan import Plan

NEXT, DENSE_35, MOE_35 = "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"
VISION_35 = "Qwen3_5ForConditionalGeneration"
LINEAR = "model.layers.0.linear_attn"


def quantized(name: str, scheme: str, rows: int, columns: int) -> dict[str, Tensor]:
    """The tensors of one module that is stored by a scheme."""
    writer = Writer(torch.bfloat16, torch.Generator().manual_seed(1))
    tensors, _ = writer.store(SCHEMES[scheme], (rows, columns))
    return {f"{name}.{local}": tensor for local, tensor in tensors.items()}


def plan_of(directory: Path, name: str, scheme: str = "fp8-channel-token", **options: Any) -> Plan:
    write_class(directory, name, scheme, **options)
    return plan_checkpoint(directory, engine="stock-1.3")


# transformers has these classes, and no release of the engine: their checkpoints become plain weights.
UNSERVED = {"GraniteForCausalLM", "Gemma2ForCausalLM", "DeepseekV2ForCausalLM"}


def test_a_row_is_about_a_class_of_some_release() -> None:
    assert CLASS_ROWS.keys() - MODEL_CLASSES.keys() == UNSERVED


@pytest.mark.parametrize("name", [name for name, row in CLASS_ROWS.items() if row.leaves])
def test_the_sizes_of_every_module_that_a_row_lists_have_names(name: str) -> None:
    row = CLASS_ROWS[name]
    lists = [(leaves.attention, leaves.mlp, leaves.shared, leaves.norms) for leaves in row.leaves]
    paths = {path for paths in lists for path in chain(*paths)}

    assert [path for path in sorted(paths) if entry_of(row.shapes, path) is None] == []


@pytest.mark.parametrize("name", CLASS_ROWS)
def test_every_limit_says_where_it_is_from(name: str) -> None:
    for limit in CLASS_ROWS[name].limits:
        assert re.search(r"`[\w/]+\.py`", limit.source)
        assert re.search(r"\b[0-9a-f]{8}\b", limit.source)


@pytest.mark.parametrize("name", [name for name in CLASSES if "Conditional" in name])
def test_a_class_that_wraps_a_text_model_has_its_prefixes(name: str) -> None:
    assert name in WRAPPERS


def test_a_release_without_the_class_is_a_problem_that_names_the_one_that_has_it(tmp_path: Path) -> None:
    write_class(tmp_path, NEXT)

    assert "stock-1.2" in inspect_checkpoint(tmp_path, engine="stock-1.0").problems[0].found
    assert not inspect_checkpoint(tmp_path, engine="stock-1.2").problems


@pytest.mark.parametrize(
    ("name", "scheme", "kept"),
    [
        (NEXT, "fp8-channel-token", True),
        (NEXT, "nvfp4", True),
        (NEXT, "int8-channel", True),
        (NEXT, "int4-g128", False),
        (NEXT, "fp8-block", False),
        (DENSE_35, "fp8-channel-token", False),
        (DENSE_35, "int4-g128", False),
        (MOE_35, "nvfp4", False),
    ],
)
def test_projections_of_linear_attention_keep_the_modes_that_every_release_reads(
    tmp_path: Path, name: str, scheme: str, kept: bool
) -> None:
    plan = plan_of(tmp_path, name, scheme)
    modules = [module for module in plan.modules if ".linear_attn.in_proj" in module.name]

    assert len(modules) == (2 if name == NEXT else 4)
    assert [module.layer is not None for module in modules] == [kept] * len(modules)
    why = "rearranges the rows" if name == NEXT else "reads this Linear plain"
    assert kept or all(why in module.reason for module in modules)
    assert plan.module(f"{LINEAR}.out_proj").layer is not None


def test_a_plain_convolution_is_excluded_by_name_beside_one_mode(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, NEXT)

    assert plan.quant_config.layer is not None
    assert f"{LINEAR}.conv1d" in plan.quant_config.exclude_modules


def test_entries_have_the_names_inside_of_the_class(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, VISION_35, others={"down_proj": "int8-channel"})
    entries, excluded = plan.quant_config.quantized_layers, plan.quant_config.exclude_modules

    assert plan.quant_config.quant_algo == QuantAlgo.MIXED_PRECISION
    assert "model.layers.0.mlp.mlp.down_proj" in entries
    assert {f"{LINEAR}.in_proj_qkvz", f"{LINEAR}.in_proj_ba", f"{LINEAR}.conv1d"} <= {*excluded}
    assert not any("in_proj" in name for name in entries)


def test_a_quantized_head_is_plain_in_a_class_that_excludes_it(tmp_path: Path) -> None:
    def edit(stored: dict[str, Tensor]) -> None:
        del stored["lm_head.weight"]
        stored |= quantized("lm_head", "nvfp4", 96, 256)

    heads = {name: plan_of(tmp_path / name, name, "nvfp4", edit=edit).module("lm_head") for name in (NEXT, DENSE_35)}

    assert heads[NEXT].layer is not None
    assert heads[DENSE_35].layer is None


def test_a_quantized_part_beside_the_text_model_is_plain(tmp_path: Path) -> None:
    def edit(stored: dict[str, Tensor]) -> None:
        del stored["model.visual.blocks.0.attn.qkv.weight"]
        stored |= quantized("model.visual.blocks.0.attn.qkv", "fp8-channel-token", 24, 16)

    plan = plan_of(tmp_path, VISION_35, edit=edit)

    assert plan.module("model.visual.blocks.0.attn.qkv").layer is None
    assert "model.visual.blocks.0.attn.qkv" in plan.quant_config.exclude_modules


@pytest.mark.parametrize("scheme", [None, "fp8-channel-token"])
def test_draft_layers_are_plain_and_excluded_under_the_number_that_the_class_gives_them(
    tmp_path: Path, scheme: str | None
) -> None:
    name = "mtp.layers.0.self_attn.o_proj"
    weight = {f"{name}.weight": torch.randn(256, 512).bfloat16()}

    plan = plan_of(
        tmp_path,
        NEXT,
        edit=lambda stored: stored.update(quantized(name, scheme, 256, 512) if scheme else weight),
    )

    assert plan.module(name).layer is None
    assert [delivery.name for delivery in plan.module(name).deliveries] == [f"{name}.weight"]
    assert {name, "model.layers.2.self_attn.o_proj"} <= {*plan.quant_config.exclude_modules}


def test_plain_stacks_of_experts_are_split_for_the_engine_only(tmp_path: Path) -> None:
    def edit(stored: dict[str, Tensor]) -> None:
        experts = "model.layers.1.mlp.experts"
        for key in [key for key in stored if key.startswith(f"{experts}.")]:
            del stored[key]
        stored[f"{experts}.gate_up_proj"] = torch.randn(4, 1024, 256).bfloat16()
        stored[f"{experts}.down_proj"] = torch.randn(4, 256, 512).bfloat16()

    write_class(tmp_path, MOE_35, edit=edit)
    delivered = {to: plan_checkpoint(tmp_path, to, engine="stock-1.3").delivered_specs for to in ("modelopt", "dense")}

    assert delivered["modelopt"]["model.layers.1.mlp.experts.3.up_proj.weight"].shape == (512, 256)
    assert "model.layers.1.mlp.experts.gate_up_proj" not in delivered["modelopt"]
    assert delivered["dense"]["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 1024, 256)


def test_ranks_must_be_able_to_divide_the_heads_of_linear_attention(tmp_path: Path) -> None:
    write_class(tmp_path, NEXT)
    checkpoint = open_checkpoint(tmp_path)

    with pytest.raises(PlanError) as raised:
        checkpoint.plan("tensorrt_llm", parallel=Parallel(tensor=8))

    assert any("linear_num_key_heads" in fault.where for fault in raised.value.faults)


@pytest.mark.parametrize("scheme", ["int4-g128", "fp8-block"])
def test_a_converted_directory_knows_its_modules_and_the_sizes_that_it_holds(tmp_path: Path, scheme: str) -> None:
    write_class(tmp_path / "in", DENSE_35, scheme)
    plan = convert_checkpoint(tmp_path / "in", tmp_path / "out", engine="stock-1.3").plan

    converted = ConvertedDirectory.open(tmp_path / "out")

    assert converted is not None
    assert converted.modules == sum(module.layer is not None for module in plan.modules)
    assert converted.faults(Parallel()) == ()
    # k_proj has two heads of 64 rows, which one block has in common; groups of four ranks hold 128 columns each.
    assert bool(converted.faults(Parallel(tensor=2))) == (scheme == "fp8-block")
