"""The tables of the benchmark: every figure has a case, and every task and kernel is used."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

from benchmarks.cases import CASES, DIRECTORY, NO_SHAPE, PEERS, SWEEPS, Peer, Place, Table, table_of
from benchmarks.figures import FIGURES, Metric, find
from benchmarks.kernels import KERNELS, time_kernels
from benchmarks.results import Clock, Measurement, Sample, Side
from benchmarks.shapes import SHAPES
from benchmarks.tasks import TASKS

if TYPE_CHECKING:
    from pathlib import Path

BY_NAME = {case.name: case for case in CASES}


def test_names_are_unique() -> None:
    names = [case.name for case in (*CASES, *KERNELS)]

    assert len(set(names)) == len(names)


def test_every_figure_uses_a_case_that_measures_it() -> None:
    for figure in FIGURES:
        if table_of(figure.case) is Table.KERNELS:
            assert figure.case in {kernel.name for kernel in KERNELS}
            assert (figure.peer, figure.shape) == ("memcpy", NO_SHAPE)
        else:
            case = BY_NAME[figure.case]
            assert figure.shape in case.shapes
            assert (figure.peer in case.peers) == (figure.metric is Metric.RATIO)


def test_every_kernel_has_its_limit() -> None:
    assert {kernel.name for kernel in KERNELS} == {figure.case for figure in FIGURES if figure.peer == "memcpy"}


def test_limits() -> None:
    limits = {(figure.case, figure.shape, figure.metric, figure.peer): figure.limit for figure in FIGURES}

    assert limits["int4-repack", "", Metric.RATIO, "memcpy"] == 1.2
    assert limits["dequantize", "", Metric.RATIO, "memcpy"] == 3
    assert {
        limits[name, "", Metric.RATIO, "memcpy"] for name in ("int8-rebias", "zero-points", "fp8-rows", "nvfp4")
    } == {1.5}
    assert limits["load-native", "1b", Metric.RATIO, "load_file"] == 1.6
    assert limits["convert-modelopt", "8b", Metric.RATIO, "cp"] == 1.15
    assert {limits["convert-modelopt", f"8b-{codes}", Metric.RATIO, "cp"] for codes in ("fp8", "nvfp4")} == {1.05}
    assert limits["convert-dense", "8b", Metric.RATIO, "cp"] == 1.15
    assert limits["convert-dense", "8b", Metric.RATIO, "library"] == 0.2
    assert {
        limits[f"convert-{to}", name, Metric.PEAK, ""] for to in ("modelopt", "dense") for name in ("1b", "8b")
    } == {700}
    assert limits["load-native", "1b", Metric.BEYOND_RESULT, ""] == 1
    assert limits["rank", "1b", Metric.COLUMN_SHARE, ""] == 26
    assert limits["node", "1b", Metric.NODE_SHARE, ""] == 101
    assert limits["inspect", "kimi-k2", Metric.SECONDS, ""] == 4
    assert limits["inspect", "8b", Metric.SECONDS, ""] == 1
    assert limits["import", "", Metric.SECONDS, ""] == 0.15
    assert limits["verify", "1b", Metric.RATIO, "convert"] == 3
    assert limits["verify", "1b", Metric.PEAK, ""] == 300
    assert len(limits) == len(FIGURES) == 24


def test_shapes_and_peers_of_cases_are_known() -> None:
    for case in CASES:
        assert case.shapes <= {*SHAPES, DIRECTORY, NO_SHAPE}
        assert case.peers.keys() <= PEERS.keys()
    assert {peer for case in CASES for peer in case.peers} == PEERS.keys()


def test_every_task_is_used(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"123")
    place = Place(source=tmp_path, work=tmp_path, tensors=1, stored_bytes=3, bytes_of={"dense": 7})
    jobs = [make(place) for case in CASES for make in (case.ours, *case.peers.values())]
    words = {word for job in jobs for command in job.commands for word in command}

    assert words >= TASKS.keys() - {"kernels"}


def test_sweeps_are_of_four_sizes_and_every_table_has_one() -> None:
    assert all(len(set(sweep.layers)) == 4 and sweep.shape in BY_NAME[sweep.case].shapes for sweep in SWEEPS)
    assert {table_of(sweep.case) for sweep in SWEEPS} == set(Table) - {Table.KERNELS}


def test_cp_writes_as_many_bytes_as_the_conversion(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model-1.safetensors").write_bytes(b"abcdef")
    (source / "model-2.safetensors").write_bytes(b"ghi")
    place = Place(source=source, work=tmp_path, tensors=1, stored_bytes=9, bytes_of={"dense": 20})

    job = BY_NAME["convert-dense"].peers["cp"](place)

    assert [command[0] for command in job.commands] == ["mkdir", "cp", "cp", "cp", "cp", "dd"]
    assert "count=2B" in job.commands[-1]


def test_a_peer_that_is_not_installed_is_named() -> None:
    peer = Peer(name="nobody", needs=("json", "no_such_package"), program="no-such-program")

    assert peer.missing == "no_such_package and no-such-program"
    assert importlib.util.find_spec("no_such_package") is None


def test_kernels_and_memcpy_have_equally_many_samples() -> None:
    timed = time_kernels(64, 2048, 2)

    assert timed.keys() == {kernel.name for kernel in KERNELS}
    for found in timed.values():
        assert len(found["ours"]) == len(found["memcpy"]) == 2
        assert min(*found["ours"], *found["memcpy"]) > 0


def side(name: str, seconds: float, **facts: object) -> Side:
    sample = Sample(process_seconds=seconds, peak_anonymous=800_000_000, facts=facts)
    return Side(name=name, clock=Clock.PROCESS, samples=(sample,))


def convert_of_8b(*peers: Side, **skipped: str) -> Measurement:
    return Measurement(
        case="convert-modelopt", shape="8b", size=1, moved_bytes=1, ours=side("ours", 3.0), peers=peers, skipped=skipped
    )


@pytest.mark.parametrize(("seconds", "reached"), [(2.0, False), (2.75, True)])
def test_a_ratio_is_compared_with_its_limit(seconds: float, reached: bool) -> None:
    found = find([convert_of_8b(side("cp", seconds))], [Table.CONVERT], ["8b"])[0]

    assert found.value == 3.0 / seconds
    assert found.reached is reached


def test_memory_is_compared_with_its_limit() -> None:
    found = find([convert_of_8b()], [Table.CONVERT], ["8b"])
    peak = next(each for each in found if each.unit == "MB" and each.value is not None)

    assert (peak.value, peak.reached) == (800, False)


def test_a_figure_that_was_not_measured_has_a_reason() -> None:
    found = find([convert_of_8b(cp="cp not installed")], [Table.CONVERT], ["8b"])[0]

    assert (found.value, found.reached, found.note) == (None, None, "cp: cp not installed")


def test_an_inspect_that_imports_torch_does_not_reach_its_figure() -> None:
    ours = side("ours", 1.0, torch_imported=True)
    measured = Measurement(case="inspect", shape="kimi-k2", size=1, moved_bytes=None, ours=ours)
    found = find([measured], [Table.HEADERS], ["kimi-k2"])[0]

    assert (found.value, found.note) == (None, "torch was imported")


def test_memory_beyond_the_result_excludes_earlier_and_delivered_memory() -> None:
    facts = {"before_bytes": 100, "weight_bytes": 900, "mapped_bytes": 200, "group_bytes": 40}
    sample = Sample(call_seconds=1.0, peak_anonymous=100 + 700 + 60, facts=facts)
    ours = Side(name="ours", clock=Clock.CALL, samples=(sample,))
    measured = Measurement(case="load-native", shape="1b", size=1, moved_bytes=900, ours=ours)

    found = next(each for each in find([measured], [Table.LOAD], ["1b"]) if each.value is not None)

    assert (found.value, found.unit, found.reached) == (1.5, "x", False)


def test_the_figure_of_a_peer_that_was_not_requested_is_unknown() -> None:
    found = find([convert_of_8b()], [Table.CONVERT], ["8b"])[0]

    assert (found.value, found.note) == (None, "cp: not asked for")
