"""Plain weights are spelled for the class of transformers: what the engine's class reads has no part in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from trtllm_ct.engine.target import TARGETS
from trtllm_ct.plan.expert_names import spelled
from trtllm_ct.plan.models.class_row import PROJECTION_NAMES
from trtllm_ct.plan.models.class_rows import CLASS_ROWS, TEXT_MODELS
from trtllm_ct.plan.models.expert_spellings import (
    NAMED_EXPERTS,
    NUMBERED,
    NUMBERED_EXPERTS,
    STACKED_EXPERTS,
    UNKNOWN_SPELLING,
    ExpertSpelling,
    StackedExperts,
    spelling_of,
)
from trtllm_ct.plan.models.model_class import Comparison, ModelClass
from trtllm_ct.plan.models.sites import Model

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtllm_ct.plan.models.plain_tensors import PlainTensors

OWNER = "model.layers.0.mlp.experts"
STACKS = StackedExperts(parts={"experts.gate_up_proj": (0, 1), "experts.down_proj": (2,)}, inputs_first=True)
NAMES = [f"{OWNER}.0.gate_proj.weight", "model.layers.0.mlp.shared_experts.0.up_proj.weight", "lm_head.weight"]


class Telling(ModelClass):
    """A class that reads experts in one spelling."""

    def __init__(self, spelling: ExpertSpelling) -> None:
        self.spelling = spelling
        self.asked: list[str] = []

    def compare(self, tensors: PlainTensors) -> Comparison:
        raise NotImplementedError

    def expert_spelling(self, owners: Iterable[str]) -> ExpertSpelling:
        self.asked += owners
        return self.spelling


def model_of(architecture: str, model_type: str) -> Model:
    return Model.from_config({"architectures": [architecture], "model_type": model_type, "num_hidden_layers": 1})


def test_no_model_type_is_in_two_tables() -> None:
    assert len({*NAMED_EXPERTS, *NUMBERED_EXPERTS, *STACKED_EXPERTS}) == sum(
        map(len, (NAMED_EXPERTS, NUMBERED_EXPERTS, STACKED_EXPERTS))
    )


@pytest.mark.parametrize("text_type", [name for name, row in TEXT_MODELS.items() if CLASS_ROWS[row].router])
def test_rows_that_list_modules_spell_experts_as_transformers_does(text_type: str) -> None:
    spelling = spelling_of(text_type)

    assert spelling.known
    assert spelling.stacked is not None or spelling.projections == CLASS_ROWS[TEXT_MODELS[text_type]].projections


@pytest.mark.parametrize("told", [NUMBERED, PROJECTION_NAMES])
def test_the_class_decides_for_plain_weights(told: tuple[str, str, str]) -> None:
    by_class = Telling(ExpertSpelling(projections=told))
    model = model_of("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe")

    dense = spelled(model, NAMES, by_class, TARGETS["dense"])
    native = spelled(model, NAMES, by_class, TARGETS["modelopt"])

    assert dense.projections == told
    assert native.projections == CLASS_ROWS[model.name].projections
    assert set(by_class.asked) == {OWNER}


@pytest.mark.parametrize(
    ("model_type", "known"), [("minimax_m2", NUMBERED), ("hunyuan_v1_moe", PROJECTION_NAMES), ("other", None)]
)
@pytest.mark.parametrize("by_class", [None, Telling(UNKNOWN_SPELLING)])
def test_without_a_class_that_tells_it_the_tables_decide(
    model_type: str, known: tuple[str, str, str] | None, by_class: Telling | None
) -> None:
    model = spelled(model_of("OtherForCausalLM", model_type), NAMES, by_class, TARGETS["dense"])

    assert model.spelling.projections == known
    assert model.projections == (known or PROJECTION_NAMES)


def test_stacks_of_a_class_that_no_table_has_are_those_of_the_class() -> None:
    by_class = Telling(ExpertSpelling(stacked=STACKS))

    assert spelled(model_of("OtherModel", "other"), NAMES, by_class, TARGETS["dense"]).spelling.stacked is STACKS


def test_a_table_says_more_of_stacks_than_the_class() -> None:
    by_class = Telling(ExpertSpelling(stacked=STACKS))

    model = spelled(model_of("GptOssForCausalLM", "gpt_oss"), NAMES, by_class, TARGETS["dense"])

    assert model.spelling.stacked is STACKED_EXPERTS["gpt_oss"]
