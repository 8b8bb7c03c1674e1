"""The histogram of a verification counts the relative errors that `--json` lists."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

from trtllm_ct.cli.page.histogram import histogram

if TYPE_CHECKING:
    from pathlib import Path


def rows_of(html: str) -> list[tuple[str, int]]:
    """The bins of a histogram, each with its count."""
    found = re.findall(r'<th scope=row>([^<]*)</th>.*?<data value="(\d+)"', html)
    return [(name, int(count)) for name, count in found]


def check(error: float | str, kind: str = "requantized") -> dict[str, Any]:
    return {"kind": kind, "relative_error": error} if kind == "requantized" else {"kind": kind}


def test_each_error_is_in_its_bin_and_other_tensors_in_none() -> None:
    checks = [check(0.1), check(0.051), check(0.05), check(0.2), check(0.0, "native")]

    rows = rows_of(histogram(checks))

    assert [(name, count) for name, count in rows if count] == [
        ("5.00% to 6.00%", 2),
        ("10.00% to 11.00%", 1),
        ("19.00% to 20.00%", 1),
    ]
    assert len(rows) == 15  # from the first to the last, with those between them


@pytest.mark.parametrize(
    ("errors", "rows"),
    [
        ([], []),
        ([0.0, 0.0], [("0.00% to 0.00%", 2)]),
        (["inf", "nan", "inf"], [("inf", 2), ("nan", 1)]),
        (["inf", 0.0], [("0.00% to 0.00%", 1), ("inf", 1)]),
    ],
)
def test_weights_without_an_error_and_those_without_a_number(errors: list[Any], rows: list[tuple[str, int]]) -> None:
    assert rows_of(histogram([check(error) for error in errors])) == rows


def test_the_page_counts_what_the_document_lists(tmp_path: Path) -> None:
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=128)
    experts = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g32")
    built = write_checkpoint(tmp_path / "in", config=config, scheme=experts)
    run_cli("convert", built.directory, tmp_path / "out", "--requantize", "experts=fp8-block")

    done = run_cli("verify", built.directory, tmp_path / "out", "--html", tmp_path / "page.html", "--json")

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    section = page[page.index("Relative errors of requantized weights") :]
    section = section[: section.index("</section>")]
    errors = [one["relative_error"] for one in done.document["checks"] if one["kind"] == "requantized"]
    rows = rows_of(section)
    assert sum(count for _, count in rows) == len(errors) == 24
    step = max(errors) / 20
    for name, count in rows:
        least, most = (float(bound.rstrip("%")) / 100 for bound in name.split(" to "))
        inside = [error for error in errors if least - 5e-5 <= error <= most + 5e-5]
        assert abs(most - least - step) < 1e-4
        assert count <= len(inside)


def test_a_page_without_requantized_weights_has_none(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "in", config=tiny_config(), scheme="int8-channel")
    run_cli("convert", built.directory, tmp_path / "out")

    run_cli("verify", built.directory, tmp_path / "out", "--html", tmp_path / "page.html")

    assert "Relative errors of requantized weights" not in (tmp_path / "page.html").read_text(encoding="utf-8")
