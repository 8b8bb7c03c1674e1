from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unfolded_names import unfold

from trtllm_ct.cli.folding import fold_names

PATHS = st.lists(st.sampled_from(["layers", "mlp", "experts", "0", "1", "2", "3", "10"]), min_size=1, max_size=5).map(
    ".".join
)


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([], ()),
        (["lm_head"], ("lm_head",)),
        (["layers.3.mlp"], ("layers.3.mlp",)),
        ([f"layers.{i}.mlp" for i in range(32)], ("layers.{0..31}.mlp",)),
        ([f"layers.{i}.mlp" for i in (7, 0, 1, 2)], ("layers.{0..2,7}.mlp",)),
        ([f"layers.{i}.mlp" for i in (1, 3)], ("layers.{1,3}.mlp",)),
        ([f"layers.{i}.mlp" for i in (9, 11, 10)], ("layers.{9..11}.mlp",)),
        ([f"layers.{i}.mlp" for i in range(3, 60, 4)], ("layers.{3..59..4}.mlp",)),
        ([f"layers.{i}.mlp" for i in range(60) if i % 4 != 3], ("layers.{0..56..4,1..57..4,2..58..4}.mlp",)),
        ([f"layers.{i}.mlp" for i in (0, 2, 4, 7)], ("layers.{0,2,4,7}.mlp",)),
        (["layers.0.a", "layers.0.b"], ("layers.0.a", "layers.0.b")),
        (["b.0", "a.0", "b.1", "a.1"], ("b.{0..1}", "a.{0..1}")),
        (["layers.0.q, row 3, columns 0-127"], ("layers.0.q, row 3, columns 0-127",)),
        (["w1", "w2"], ("w1", "w2")),
        (
            [f"layers.{layer}.experts.{expert}.up" for layer in range(2) for expert in range(4)],
            ("layers.{0..1}.experts.{0..3}.up",),
        ),
        (
            ["layers.0.experts.0.up", "layers.0.experts.1.up", "layers.1.experts.0.up"],
            ("layers.0.experts.{0..1}.up", "layers.1.experts.0.up"),
        ),
    ],
)
def test_names_that_differ_in_one_number_become_one(names: list[str], folded: tuple[str, ...]) -> None:
    assert fold_names(names) == folded


@settings(max_examples=200)
@given(st.lists(PATHS, max_size=12))
def test_folded_names_stand_for_exactly_the_given_names(names: list[str]) -> None:
    folded = fold_names(names)

    assert sorted({unfolded for name in folded for unfolded in unfold(name)}) == sorted(set(names))
