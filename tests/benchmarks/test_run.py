"""The whole benchmark on a tiny checkpoint: its results, output, documentation page and refusals."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from command_line import run_cli

from benchmarks import cases, page
from benchmarks.__main__ import main
from benchmarks.cases import Table
from benchmarks.page import PAGE, write_page
from benchmarks.results import Clock, Measurement, Point, Report, Sample, Series, Side
from benchmarks.run import run_bench
from benchmarks.shapes import SHAPES
from benchmarks.tables import Grid, grids, markdown
from trtllm_ct.base.errors import MissingDependencyError, UsageError

DOCS = Path(__file__).resolve().parents[2] / "docs"
FREE = namedtuple("FREE", "total used free")  # noqa: PYI024 (as shutil.disk_usage gives it)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON document of a whole benchmark; peers that take seconds to import have separate tests."""
    options = ("--table", "load,convert,headers", "--against", "cp,convert,load_file", "--runs", 1, "--json")
    done = run_cli("--shape", "tiny", *options, main=main)
    assert done.code == 0
    return done.document


def test_every_case_of_the_shape_was_measured(document: dict[str, Any]) -> None:
    assert document["kind"] == "bench"
    assert [(each["case"], each["shape"]) for each in document["measurements"]] == [
        ("import", ""),
        ("load-native", "tiny"),
        ("load-dense", "tiny"),
        ("rank", "tiny"),
        ("node", "tiny"),
        ("convert-modelopt", "tiny"),
        ("convert-dense", "tiny"),
        ("verify", "tiny"),
        ("inspect", "tiny"),
    ]
    for each in document["measurements"]:
        assert each["ours"]["failure"] == ""
        assert each["ours"]["seconds"] > 0


def test_peers_were_measured(document: dict[str, Any]) -> None:
    peers = {each["case"]: {side["name"]: side for side in each["peers"]} for each in document["measurements"]}

    assert peers["load-native"].keys() == {"load_file"}
    assert peers["convert-modelopt"].keys() == {"cp"}
    assert peers["verify"].keys() == {"convert"}
    for each in document["measurements"]:
        for side in each["peers"]:
            assert (side["failure"], each["ratios"][side["name"]] > 0) == ("", True)


def test_memory_and_bytes_were_counted(document: dict[str, Any]) -> None:
    found = {each["case"]: each["ours"] for each in document["measurements"]}

    assert found["convert-modelopt"]["peak_anonymous_bytes"] > 1e7
    facts = found["load-native"]["facts"]
    assert facts["held_bytes"] > facts["before_bytes"] > 1e7
    column = found["rank"]["facts"]["cuts"]["column"]
    assert column["read"] == pytest.approx(column["stored"] / 4, rel=1e-3)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    run_bench(shapes=["tiny"], tables=["headers"], runs=1)

    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_the_user_is_measured_and_left_alone(tmp_path: Path) -> None:
    SHAPES["tiny"].write(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    report = run_bench(tmp_path, tables=["headers"], runs=1)

    assert [(each.case, each.shape) for each in report.measurements] == [("import", ""), ("inspect", "DIR")]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_peer_that_is_not_installed_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.importlib.util, "find_spec", lambda _name: None)

    report = run_bench(shapes=["tiny"], tables=["headers"], runs=1)

    assert report.skipped["load_file"] == "safetensors not installed"
    assert set(report.skipped) == {"load_file", "library", "transformers"}


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--shape", "2b"], "'2b'"),
        (["--against", "mv"], "'mv'"),
        (["--table", "loading"], "'loading'"),
        (["--runs", "0"], "expected at least 1"),
        (["DIR", "--shape", "1b"], "Leave --shape out"),
        (["--write-docs", "no-such-folder"], "no such file"),
    ],
)
def test_invalid_arguments_are_refused(arguments: list[str], found: str) -> None:
    done = run_cli(*arguments, main=main)

    assert done.code == 2
    assert found in done.err_words


def test_a_disk_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: FREE(0, 0, 1000))

    with pytest.raises(UsageError, match="Set TMPDIR"):
        run_bench(shapes=["8b"])


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        page.require_page(DOCS)


def report() -> Report:
    """Return a report with made-up numbers, to test its output."""

    def side(name: str, seconds: float) -> Side:
        sample = Sample(
            process_seconds=seconds,
            call_seconds=seconds / 2,
            user_seconds=seconds / 4,
            system_seconds=seconds / 3,
            peak_anonymous=123_000_000,
        )
        return Side(name=name, clock=Clock.PROCESS, samples=(sample,))

    measured = Measurement(
        case="convert-modelopt",
        shape="8b",
        size=5_700_000_000,
        moved_bytes=6_000_000_000,
        ours=side("ours", 6.0),
        peers=(side("cp", 5.0),),
        skipped={"library": "compressed_tensors not installed"},
    )
    points = tuple(Point(size=size * 10**9, seconds=size + 1.0) for size in (1, 2, 3, 4))
    return Report(
        machine={"cores": "2"},
        runs=1,
        skipped={"library": "compressed_tensors not installed"},
        measurements=(measured,),
        findings=(),
        series=(Series(table="convert", label="convert-modelopt", points=points),),
    )


def test_a_table_is_markdown() -> None:
    assert markdown(Grid(columns=("a", "b"), rows=(("c", "1"),))) == "| a | b |\n| --- | ---: |\n| c | 1 |\n"


def test_every_row_has_a_cell_in_each_column() -> None:
    for grid in grids(report(), Table.CONVERT):
        assert {len(row) for row in grid.rows} == {len(grid.columns)}


def test_both_sides_and_skipped_peers_have_a_row() -> None:
    rows = next(grids(report(), Table.CONVERT)).rows

    assert [(row[1], row[2], row[5], row[6], row[7], *row[9:11]) for row in rows] == [
        ("8b, 5.7 GB", "ours", "6.00 s", "", "1.00 GB/s", "1.50 s", "2.00 s"),
        ("8b, 5.7 GB", "cp", "5.00 s", "1.20 x", "1.20 GB/s", "1.25 s", "1.67 s"),
        ("8b, 5.7 GB", "library", "", "", "", "", ""),
    ]


def test_the_least_squares_line() -> None:
    line = report().series[0]

    assert line.line == pytest.approx((1.0, 1e-9))
    assert line.deviation == pytest.approx(0)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    pytest.importorskip("matplotlib")
    shutil.copy(DOCS / PAGE, tmp_path)
    return tmp_path


def test_the_page_gets_the_measured_tables_and_keeps_other_text(docs: Path) -> None:
    before = (docs / PAGE).read_text(encoding="utf-8")
    page.require_page(docs)

    write_page(report(), docs, "python -m benchmarks --shape 8b")

    after = (docs / PAGE).read_text(encoding="utf-8")
    assert outside(after) == outside(before)
    assert "python -m benchmarks --shape 8b\n" in after
    assert "| 1.20 x |" in after
    assert "(performance/convert.svg)" in after


def test_the_same_numbers_give_the_same_page_and_plot(docs: Path) -> None:
    def written() -> list[bytes]:
        write_page(report(), docs, "python -m benchmarks")
        return [(docs / PAGE).read_bytes(), (docs / "performance" / "convert.svg").read_bytes()]

    assert written() == written()
    assert b"<svg" in written()[1]


def outside(text: str) -> list[str]:
    """Return the page without the text between markers."""
    kept: list[str] = []
    inside = False
    for line in text.splitlines():
        inside = inside and "end -->" not in line
        if not inside:
            kept.append(line)
        inside = inside or "begin -->" in line
    return kept
