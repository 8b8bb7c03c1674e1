"""The row of a class, applied to names of modules."""

from __future__ import annotations

import pytest

from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_row import CUTS, DEFAULT_ROW, PROJECTION_NAMES, ClassRow, entry_of
from trtllm_ct.plan.models.class_rows import CLASS_ROWS
from trtllm_ct.plan.models.site_rules import SiteRules

ATTENTION, MLP = "model.layers.3.self_attn", "model.layers.3.mlp"
SHAPE = (64, 64)
LATENT = SiteRules(CLASS_ROWS["DeepseekV3ForCausalLM"])


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("model.layers.0.mlp.gate", "router"),
        ("mlp.gate", "router"),
        ("gate", "any gate"),
        ("model.layers.0.other.gate", "any gate"),
        ("model.layers.0.mlp.shared_gate", None),
        ("gate.weight", None),
        ("", None),
    ],
)
def test_the_longest_path_that_a_name_ends_with_counts(name: str, entry: str | None) -> None:
    assert entry_of({"gate": "any gate", "mlp.gate": "router"}, name) == entry


@pytest.mark.parametrize("path", ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj", "g_proj"])
def test_every_linear_of_attention_is_whole_under_attention_data_parallelism(path: str) -> None:
    """Whatever its name: the low-rank projections of DeepSeek, and gates of the output."""
    for row in (LATENT.row, DEFAULT_ROW):
        assert SiteRules(row).linear(f"{ATTENTION}.{path}", SHAPE).attention
        assert not SiteRules(row).linear(f"{MLP}.{path.replace('o_proj', 'up_proj')}", SHAPE).attention


def test_mixers_are_parts_of_attention_too() -> None:
    rules = SiteRules(ClassRow(mixers=("linear_attn",)))

    assert rules.linear("model.layers.0.linear_attn.out_proj", SHAPE).attention
    assert not SiteRules(DEFAULT_ROW).linear("model.layers.0.linear_attn.out_proj", SHAPE).attention


def test_parts_of_one_linear_are_in_one_group() -> None:
    rules = SiteRules(ClassRow(fused={"qkv_proj": ("q_proj", "self_attn.gate_proj"), "gate_up": ("gate_proj", "up")}))

    sites = {
        name: rules.linear(f"model.layers.0.{name}", SHAPE) for name in ("self_attn.q_proj", "self_attn.gate_proj")
    }
    assert {site.mode_group for site in sites.values()} == {"model.layers.0.self_attn.qkv_proj"}
    assert rules.linear("model.layers.0.mlp.gate_proj", SHAPE).shares == "model.layers.0.mlp.gate_up"
    assert rules.linear("model.layers.0.mlp.down_proj", SHAPE).mode_group is None


def test_the_last_of_the_linears_that_a_class_joins_is_not_fused() -> None:
    first, last = (LATENT.linear(f"{ATTENTION}.{leaf}", SHAPE) for leaf in ("q_a_proj", "kv_a_proj_with_mqa"))

    assert first.mode_group == last.mode_group == last.module
    assert (first.class_joins, first.fused) == (True, True)
    assert (last.class_joins, last.fused) == (True, False)


def test_a_linear_that_a_class_splits_is_cut_by_the_class() -> None:
    rules = SiteRules(CLASS_ROWS["Phi3ForCausalLM"])

    assert rules.linear(f"{ATTENTION}.qkv_proj", SHAPE).class_cuts
    assert not rules.linear(f"{ATTENTION}.o_proj", SHAPE).class_cuts


@pytest.mark.parametrize("name", [name for name, row in CLASS_ROWS.items() if row.router])
def test_routers_are_plain_in_every_class(name: str) -> None:
    row = CLASS_ROWS[name]

    site = SiteRules(row).linear(f"model.layers.3.{row.router}", SHAPE)
    assert (site.plain, site.cut) == (True, Cut.NONE)


@pytest.mark.parametrize(("projection", "cut"), [(0, Cut.COLUMN), (1, Cut.COLUMN), (2, Cut.ROW)])
def test_experts_have_the_names_of_the_class_and_are_found_under_those_of_the_files(projection: int, cut: Cut) -> None:
    rules, experts = SiteRules(ClassRow(projections=("w1", "w3", "w2"))), f"{MLP}.experts"

    site = rules.expert(experts, 7, projection, SHAPE)
    assert site.module == f"{experts}.7.{('w1', 'w3', 'w2')[projection]}"
    assert site.aliases == (f"{experts}.7.{PROJECTION_NAMES[projection]}",)
    assert (site.cut, site.mode_group, site.expert) == (cut, experts, True)
    assert site.shares == (None if projection == 2 else f"{experts}.7.gate_up")


def test_experts_keep_their_names_if_those_of_the_class_are_not_known() -> None:
    site = SiteRules(DEFAULT_ROW).expert("experts", "0", 1, SHAPE, stored="w3")

    assert (site.module, site.aliases) == ("experts.0.w3", ())


def test_cuts_name_the_rows_of_the_class() -> None:
    rules = SiteRules(ClassRow(cuts={**CUTS, "special.q_proj": Cut.NONE}))

    assert rules.linear(f"{ATTENTION}.q_proj", SHAPE).cut is Cut.COLUMN
    assert rules.linear("model.layers.0.special.q_proj", SHAPE).cut is Cut.NONE
