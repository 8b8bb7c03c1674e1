"""Load reports: their counts, their JSON form, and that each one is logged once."""

from __future__ import annotations

import json
import logging
import math
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
from builders import Built, tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel, Rank
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.serve.load_report import LoadReport, peak_memory
from trtllm_ct.serve.rank_weights import load_rank_weights
from trtllm_ct.serve.session import REPORTS, LoadSession
from trtllm_ct.serve.sidecar import Sidecar, make_sidecar

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = tiny_config(hidden=128, intermediate=256)
MIXED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "int8-plain-channel"),
    "o_proj": "int4-g64",
    "down_proj": "int4-g32",
}


@pytest.fixture(autouse=True)
def folder(sidecar_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has its own cache, and writes no reports unless it asks for them."""
    monkeypatch.delenv(REPORTS, raising=False)
    return tmp_path / "reports" / "deep"


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return write_checkpoint(tmp_path / "model", config=CONFIG, scheme="int8-plain-channel", shards=2)


def sidecar_of(built: Built, **sizes: int) -> Sidecar:
    return Sidecar.open(make_sidecar(built.directory, PlanOptions(to="tensorrt_llm", parallel=Parallel(**sizes))))


# Counts.


def test_bytes_of_files_and_tensors_are_counted(built: Built) -> None:
    """Every stored tensor of this scheme is needed, each once."""
    weights, report = load_rank_weights(sidecar_of(built), Rank())

    assert report.bytes_read == sum(tensor.nbytes for tensor in built.stored.values())
    assert report.bytes_delivered == sum(tensor.nbytes for tensor in weights.values())
    assert report.tensors == len(weights)
    assert report.source == str(built.directory)
    assert report.gigabytes_per_second == report.bytes_read / report.seconds / 1e9
    assert report.seconds > 0
    assert report.peak_memory > report.bytes_delivered


def test_modes_and_reasons_are_counted(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "model", config=CONFIG, scheme=MIXED, kv=True)

    _, report = load_rank_weights(sidecar_of(built), Rank())

    assert report.modes == {"W8A16": 6, "W4A16_AWQ g64": 2}
    ((reason, count),) = report.dequantized.items()
    assert count == 2
    assert reason.startswith("W4A16_AWQ holds groups of 64 or 128")
    assert set(report.unread) == {
        f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale" for layer in range(2) for letter in "kv"
    }


def test_a_plain_rank_counts_no_modes(tmp_path: Path) -> None:
    """The last pipeline stage of a model whose only quantized layer is in the first stage."""
    config = tiny_config(hidden=128, layers=2)
    built = write_checkpoint(tmp_path / "model", config=config, scheme={"model.layers.0.mlp.down_proj": "int4-g64"})
    parallel = Parallel(pipeline=2)

    _, report = load_rank_weights(sidecar_of(built, pipeline=2), Rank(parallel=parallel, pipeline=1, layers=(1,)))

    assert (report.modes, report.dequantized) == ({}, {})
    assert "no quantized modules; " in str(report)


def test_ranks_have_the_engines_numbers(built: Built) -> None:
    sizes = {"tensor": 2, "pipeline": 2}
    sidecar, parallel = sidecar_of(built, **sizes), Parallel(**sizes)
    with engine_double.installed("newest"):
        mapping = import_module("tensorrt_llm.mapping").Mapping
        mappings = [mapping(world_size=4, rank=rank, tp_size=2, pp_size=2) for rank in range(4)]

    reports = [load_rank_weights(sidecar, Rank.from_mapping(each, 2))[1] for each in mappings]

    assert sidecar.options.parallel == parallel
    assert [report.rank for report in reports] == [0, 1, 2, 3]
    assert {sum(report.modes.values()) for report in reports} == {7}
    assert all(report.bytes_read < sum(tensor.nbytes for tensor in built.stored.values()) for report in reports)


# Peak memory.


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int) -> None:
    fake = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5 + who))
    monkeypatch.setitem(sys.modules, "resource", fake)
    monkeypatch.setattr(sys, "platform", platform)

    assert peak_memory() == 5 * unit


def test_peak_memory_is_zero_without_the_resource_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)

    assert peak_memory() == 0


def test_peak_memory_covers_the_memory_of_this_process() -> None:
    held = bytearray(b"x" * (64 << 20))

    assert peak_memory() > len(held)


# JSON and text.

COUNTS = st.integers(0, 10**15)
NAMES = st.text(max_size=12)
LOADS = st.builds(
    LoadReport,
    source=NAMES,
    rank=st.integers(0, 63),
    modes=st.dictionaries(NAMES, COUNTS, max_size=3),
    dequantized=st.dictionaries(NAMES, COUNTS, max_size=3),
    modules=COUNTS,
    tensors=COUNTS,
    bytes_read=COUNTS,
    bytes_delivered=COUNTS,
    seconds=st.just(0.0) | st.floats(1e-9, 1e6),
    peak_memory=COUNTS,
    unread=st.lists(NAMES, max_size=3).map(tuple),
    warnings=st.lists(NAMES, max_size=3).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(LOADS)
def test_a_report_survives_json(report: LoadReport) -> None:
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))

    rate = document.pop("gigabytes_per_second")
    assert math.isclose(rate * report.seconds * 1e9, report.bytes_read if report.seconds else 0.0)
    tuples = {name: tuple(document[name]) for name in ("unread", "warnings")}
    assert LoadReport(**{**document, **tuples}) == report


def test_it_reads_as_one_line() -> None:
    report = LoadReport(
        source="/models/demo",
        rank=0,
        modes={"W4A16_AWQ g64": 28, "FP8": 2},
        dequantized={"one reason": 3, "another": 1},
        modules=40,
        tensors=99,
        bytes_read=4_000_000_000,
        bytes_delivered=5_000_000_000,
        seconds=2.0,
        peak_memory=6_120_000_000,
    )

    assert str(report) == (
        "/models/demo: 28 x W4A16_AWQ g64, 2 x FP8, 4 dequantized; 99 tensors of 40 modules, 4.000 GB read in 2.00 s "
        "(2.00 GB/s), peak memory 6.12 GB"
    )


def test_without_a_measured_time_the_rate_is_zero() -> None:
    report = LoadReport(
        source="",
        rank=0,
        modes={},
        dequantized={},
        modules=0,
        tensors=0,
        bytes_read=7,
        bytes_delivered=0,
        seconds=0.0,
        peak_memory=0,
    )

    assert report.gigabytes_per_second == 0.0
    assert "(0.00 GB/s)" in str(report)


# The log.


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines of this package in the engine's log, which is the log that users of its workers see."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "tensorrt_llm" and record.getMessage().startswith("trtllm-ct: ")
    ]


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_only_rank_0_logs_the_report_and_only_once(
    engine: Any, built: Built, caplog: pytest.LogCaptureFixture, sizes: tuple[int, int]
) -> None:
    caplog.set_level(logging.INFO, "tensorrt_llm")
    made = make_sidecar(
        built.directory, PlanOptions(to="tensorrt_llm", parallel=Parallel(tensor=sizes[0], pipeline=sizes[1]))
    )
    loader = import_module(BINDINGS).CompressedTensorsCheckpointLoader()
    arguments = {"tensor_parallel_size": sizes[0], "pipeline_parallel_size": sizes[1]}

    engine.LLM(model=str(made), checkpoint_loader=loader, skip_tokenizer_init=True, **arguments)

    (line,) = lines(caplog)
    assert line.startswith(f"trtllm-ct: {built.directory}: {14 // sizes[1]} x W8A16; ")


def test_warnings_of_the_plan_are_logged_with_the_report(
    engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tensorrt_llm")
    built = write_checkpoint(tmp_path / "model", config=CONFIG, scheme="int4-g32", kv=True)
    made = make_sidecar(built.directory, PlanOptions(to="tensorrt_llm"))
    loader = import_module(BINDINGS).CompressedTensorsCheckpointLoader()

    engine.LLM(model=str(made), checkpoint_loader=loader, skip_tokenizer_init=True)

    _, warning = lines(caplog)
    assert warning.startswith(f"trtllm-ct: {built.directory}: KV cache: no module is delivered quantized")
    assert loader.report is not None
    assert list(loader.report.warnings) == [warning.removeprefix(f"trtllm-ct: {built.directory}: ")]


def test_the_engines_own_loads_are_not_reported(
    engine: Any, built: Built, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tensorrt_llm")
    convert_checkpoint(built.directory, tmp_path / "dense", to="dense")
    loader = import_module(BINDINGS).CompressedTensorsCheckpointLoader()

    engine.LLM(model=str(tmp_path / "dense"), checkpoint_loader=loader, skip_tokenizer_init=True)

    assert lines(caplog) == []
    assert (loader.report, loader.reports) == (None, {})


# Report files.


def test_every_rank_writes_its_report(built: Built, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPORTS, str(folder))
    made = make_sidecar(built.directory, PlanOptions(to="tensorrt_llm", parallel=Parallel(tensor=2, pipeline=2)))
    with engine_double.installed("newest"):
        mapping = import_module("tensorrt_llm.mapping").Mapping
    left = {}
    for rank in range(4):
        session = LoadSession()
        session.load(made, mapping(world_size=4, rank=rank, tp_size=2, pp_size=2))
        left[f"{made.name}-rank-{rank}.json"] = session.reports[str(made)].to_dict()

    assert {path.name: json.loads(path.read_text()) for path in folder.iterdir()} == left


def test_a_later_load_replaces_the_report(built: Built, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPORTS, str(folder))
    made, session = make_sidecar(built.directory, PlanOptions(to="tensorrt_llm")), LoadSession()

    for _ in range(2):
        session.load(made)

    (path,) = folder.iterdir()
    assert json.loads(path.read_text()) == session.reports[str(made)].to_dict()


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_environment_variable_no_report_is_written(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is not None:
        monkeypatch.setenv(REPORTS, value)
    monkeypatch.chdir(tmp_path)

    LoadSession().load(make_sidecar(built.directory, PlanOptions(to="tensorrt_llm")))

    assert list(tmp_path.rglob("*rank*")) == []


def test_a_directory_that_cannot_be_written_only_causes_a_warning(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(REPORTS, str(tmp_path / "file"))

    weights = LoadSession().load(make_sidecar(built.directory, PlanOptions(to="tensorrt_llm")))

    assert weights
    (line,) = caplog.messages
    assert line.startswith(str(tmp_path / "file"))
    assert "the load report could not be written: " in line
