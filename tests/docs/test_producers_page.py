"""docs/producers.md lists every row of the table, with the very words of its warning."""

from __future__ import annotations

from pathlib import Path

from trtllm_ct.plan.producers import PRODUCERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "producers.md"


def test_every_row_is_on_the_page_and_no_other() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]

    assert [(row[0].strip("|` "), row[-1].removesuffix(" |")) for row in rows] == [
        (producer.name, producer.warning) for producer in PRODUCERS
    ]
