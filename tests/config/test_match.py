"""Matching: which modules an entry matches, and which of several entries decides."""

from __future__ import annotations

import pytest

from trtllm_ct.base.schemes import QuantScheme
from trtllm_ct.config.match import Matcher, matches
from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig

Q_PROJ = "model.layers.0.self_attn.q_proj"


def matcher(groups: dict[str, tuple[str, ...]], ignore: tuple[str, ...] = ()) -> Matcher:
    found = tuple(ConfigGroup(name=name, targets=targets, scheme=QuantScheme()) for name, targets in groups.items())
    return Matcher(QuantizationConfig(groups=found, ignore=ignore))


def chosen(groups: dict[str, tuple[str, ...]], module: str = Q_PROJ) -> str | None:
    group = matcher(groups).scheme_for(module)
    return group.name if group else None


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("mlp.gate_proj", "re:mlp", True),  # anchored at the start only, not a full match
        ("mlp.gate_proj", "re:gate", False),  # and not a search
        ("mlp.gate_proj", "re:.*gate", True),  # a known trap: this means mlp.gate_proj too
        ("mlp.gate_proj", "re:.*gate$", False),
        ("mlp.gate_proj", "re:.*GATE", False),
        ("mlp.gate_proj", "mlp.gate_proj", True),
        ("mlp.gate_proj", "mlp", False),  # a parent says nothing about its children
        ("mlp.gate_proj", "gate_proj", False),  # nor does a suffix
        ("mlp.gate_proj", "mlp.gate_proj.weight", False),
        ("mlp.gate_proj", "Linear", True),
        ("mlp.gate_proj", "linear", False),
        ("mlp.gate_proj", "Module", True),
        ("mlp.gate_proj", "re:Linear", False),  # an expression is never tried against class names
        ("mlp.gate_proj", "re:", True),
        ("mlp.gate_proj", "", False),
        ("", "re:.*", True),
    ],
)
def test_which_modules_an_entry_matches(name, pattern, expected):
    assert matches(name, pattern) is expected
    assert (matcher({"group": (pattern,)}).scheme_for(name) is not None) is expected
    assert (matcher({"all": ("re:",)}, ignore=(pattern,)).scheme_for(name) is None) is expected


def test_class_names_are_those_of_the_module_and_its_bases():
    assert matches("x", "Embedding", ("Embedding",))
    assert not matches("x", "Linear", ("Embedding",))
    assert matches("x", "Linear", ("RowParallelLinear", "LinearBase"))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"pattern": ("re:.*",), "class": ("Linear",), "name": (Q_PROJ,)}, "name"),
        ({"class": ("Linear",), "pattern": ("re:.*",)}, "pattern"),
        ({"narrow": ("re:.*q_proj",), "wide": ("re:.*proj",)}, "wide"),  # "re:.*proj" sorts before "re:.*q_proj"
        ({"wide": ("re:.*proj",), "narrow": ("re:.*q_proj",)}, "wide"),
        ({"linear": ("Linear",), "module": ("Module",)}, "linear"),
        ({"one": ("Linear",), "two": ("Linear",)}, "two"),
        ({"one": ("Linear", "re:.*mlp"), "two": ("Conv1d",)}, "one"),
        ({"one": ("Conv1d",)}, None),
        ({}, None),
    ],
)
def test_which_of_several_groups_decides(groups, expected):
    assert chosen(groups) == expected


@pytest.mark.parametrize("ignore", [Q_PROJ, "re:.*q_proj$", "Linear", "Module"])
def test_ignore_has_priority_over_the_most_exact_target(ignore):
    judge = matcher({"group": (Q_PROJ,)}, ignore=("lm_head", ignore))
    assert judge.scheme_for(Q_PROJ) is None


def test_a_plain_name_that_holds_the_prefix_elsewhere_stays_a_name():
    assert matches("core:x", "core:x")
    assert not matches("core:xy", "core:x")
    assert chosen({"name": ("core:x",)}, "core:x") == "name"
    assert chosen({"name": ("core:x",)}, "core:xy") is None
