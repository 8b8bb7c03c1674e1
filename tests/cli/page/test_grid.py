"""Modules in rows of layers and columns of paths."""

from __future__ import annotations

import pytest

from trtllm_ct.cli.page.grid import grids_of, table_of


def test_layers_are_rows_and_experts_share_a_column() -> None:
    names = ["model.embed", "model.layers.0.q", "model.layers.0.mlp.experts.0.up", "model.layers.0.mlp.experts.1.up"]

    (grid,), others = grids_of((name, at) for at, name in enumerate([*names, "model.layers.10.q", "model.layers.2.q"]))

    assert others == [("model.embed", 0)]
    assert grid.prefix == "model.layers"
    assert grid.rows == {0: {"q": [1], "mlp.experts.*.up": [2, 3]}, 10: {"q": [4]}, 2: {"q": [5]}}
    assert grid.columns == ["q", "mlp.experts.*.up"]


def test_each_stack_of_layers_is_a_grid_of_its_own() -> None:
    grids, others = grids_of((name, 0) for name in ("layers.0.a", "visual.blocks.0.a", "visual.merger.0", "0.a"))

    assert [(grid.prefix, list(grid.rows)) for grid in grids] == [("layers", [0]), ("visual.blocks", [0]), ("", [0])]
    assert others == [("visual.merger.0", 0)]


def test_columns_of_one_part_are_together() -> None:
    (grid,), _ = grids_of((name, 0) for name in ("l.0.linear.in", "l.0.mlp.up", "l.1.attn.q", "l.1.linear.out"))

    assert grid.columns == ["linear.in", "linear.out", "mlp.up", "attn.q"]


@pytest.mark.parametrize("name", ["l.0.<b>", "<b>.0.x"])
def test_rows_are_sorted_and_names_are_escaped(name: str) -> None:
    (grid,), _ = grids_of([("l.10.a" if name.startswith("l") else "<b>.10.a", 1), (name, 2)])

    html = table_of(grid, lambda entries: f"data-n={entries[0]}>x", "numbers")

    assert html.index("<th scope=row>0</th>") < html.index("<th scope=row>10</th>")
    assert html.count("<td class=no></td>") == 2
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
