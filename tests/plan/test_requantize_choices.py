"""The choices that a plan lists are what the same options then make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint

from trtllm_ct.engine.calibration import Calibration
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.engine.requantization import FORMS, Requantize
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from builders import Built

EXPERTS = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g32")
PLACES: list[dict[str, Any]] = [
    {"engine": "stock-1.2"},
    {"engine": "stock-1.2", "sm": 90},
    {"engine": "stock-1.3", "sm": 100},
    {"engine": "stock-1.3", "parallel": Parallel(tensor=2)},
    {"engine": "stock-1.3", "sm": 100, "parallel": Parallel(tensor=2, expert=2)},
    {"engine": "stock-1.0", "sm": 100},
]


@pytest.fixture
def mixture(tmp_path: Path) -> Built:
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=256, layers=4)
    return write_checkpoint(tmp_path, config=config, scheme=EXPERTS | {"o_proj": "int4-g32", "q_proj": "int4-g128"})


def asked(built: Built, words: str) -> Requantize:
    """What words ask for, with a scale for each module if they ask for a form that reads scales."""
    requantize = Requantize.parse(words)
    if not requantize.reads_calibration:
        return requantize
    return replace(requantize, calibration=Calibration(scales={name.rpartition(".")[0]: 0.5 for name in built.dense}))


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_each_choice_is_what_its_option_makes_of_the_plan(mixture: Built, place: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(mixture.directory)
    plan = checkpoint.plan(**place)

    assert plan.choices
    for choice in plan.choices:
        made = checkpoint.plan(**place, requantize=asked(mixture, f"{choice.what}={choice.form.name}"))
        rounded = [module for module in made.modules if module.form]
        assert len(rounded) == choice.modules
        assert {str(module.layer.quant_algo) for module in rounded if module.layer} == {choice.mode}
        assert made.delivered_bytes - plan.delivered_bytes == choice.coded_bytes - choice.dense_bytes
        assert plan.rank_bytes_with(choice) == pytest.approx(made.rank_bytes, rel=0.002)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_no_other_option_changes_the_plan(mixture: Built, place: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(mixture.directory)
    listed = {f"{choice.what}={choice.form.name}" for choice in checkpoint.plan(**place).choices}

    for words in {f"{what}={form}" for what in ("experts", "linears") for form in FORMS}:
        made = checkpoint.plan(**place, requantize=asked(mixture, words))
        assert bool(made.requantized) == (words in listed)


def test_a_plan_without_dequantized_modules_has_no_choices(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path, config=tiny_config(hidden=128), scheme="int4-g128")

    assert open_checkpoint(built.directory).plan().choices == ()


def test_targets_without_kernels_have_no_choices(mixture: Built) -> None:
    assert open_checkpoint(mixture.directory).plan("dense").choices == ()


@pytest.mark.parametrize("sm", [None, 89, 90, 100])
def test_codes_in_groups_of_128_can_stay_where_the_kernel_of_experts_is_exact(tmp_path: Path, sm: int | None) -> None:
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=256)
    built = write_checkpoint(tmp_path, config=config, scheme=dict.fromkeys(EXPERTS, "int4-g128"))
    checkpoint = open_checkpoint(built.directory)

    choices = [choice for choice in checkpoint.plan(sm=sm).choices if choice.form.name == "w4a8-awq"]

    assert len(choices) == (sm == 90)
    made = checkpoint.plan(sm=sm, requantize=asked(built, "experts=w4a8-awq"))
    for choice in choices:
        assert (choice.mode, choice.modules, choice.to_dict()["needs_calibration"]) == ("W4A8_AWQ", 24, True)
        before = checkpoint.plan(sm=sm)
        assert made.delivered_bytes - before.delivered_bytes == choice.coded_bytes - choice.dense_bytes
    assert sum(module.keeps_codes for module in made.modules) == (24 if sm == 90 else 0)


@pytest.mark.parametrize(
    ("scheme", "words", "said"),
    [
        ("int4-g128", "linears=nvfp4", ["linears=nvfp4 changes nothing: no linears would be dequantized"]),
        ("int4-g32", "experts=nvfp4", ["experts=nvfp4 changes nothing: no experts would be dequantized"]),
        ("int4-g32", "all=nvfp4", []),
        ("int4-g32", "linears=fp8-block,experts=mxfp4", ["experts=mxfp4 changes nothing: no experts would"]),
        ("dense", "all=nvfp4", ["all=nvfp4 changes nothing: no experts or linears would be dequantized"]),
    ],
)
def test_a_form_that_no_module_gets_is_said(tmp_path: Path, scheme: str, words: str, said: list[str]) -> None:
    source = write_checkpoint(tmp_path, config=tiny_config(hidden=256, intermediate=256), scheme=scheme).directory

    plan = plan_checkpoint(source, engine="stock-1.3", sm=100, requantize=words)

    found = [text for text in plan.warnings if "changes nothing" in text]
    assert len(found) == len(said)
    assert all(text.startswith(f"--requantize {start}") for text, start in zip(found, said, strict=True))


def test_the_reason_is_said_where_no_kernel_holds_the_form(mixture: Built) -> None:
    plan = plan_checkpoint(mixture.directory, engine="stock-1.0", sm=90, requantize="experts=nvfp4")

    [text] = [text for text in plan.warnings if "changes nothing" in text]
    assert "not requantized to nvfp4: " in text
