"""Conversions with several workers: same bytes for any executor, all faults at once, resuming after a kill."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import Built, rewrite, tiny_config, write_checkpoint

from trtllm_ct.base.errors import MissingDependencyError, OutputError, PayloadError, UsageError
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.work_folder import JOURNAL, WorkFolder
from trtllm_ct.convert import executors, units
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.convert.coordinate import run_units
from trtllm_ct.convert.executors import open_pool
from trtllm_ct.convert.job import Conversion, Job
from trtllm_ct.convert.journal import Journal, UnitRecord
from trtllm_ct.convert.worker import UnitResult
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.options import PlanOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

# Python packages of MPI install their programs in the same folder as the Python interpreter.
MPIRUN = [shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"), "-n", "2"]
MANY_UNITS = """
from trtllm_ct.convert import units
units.UNIT_BYTES = 1
from trtllm_ct.cli.commands import main
main()
"""
MIXED = {"o_proj": "int8-g32", "down_proj": "int8-channel", "q_proj": "nvfp4", "k_proj": "nvfp4", "v_proj": "nvfp4"}


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    """A small checkpoint with many units: every module, or group of fused modules, is a unit."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    return write_checkpoint(tmp_path / "source", config=tiny_config(layers=4), scheme=MIXED, shards=2, tokenizer=True)


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def stopped_after(count: int, reason: Callable[[], None]) -> Any:
    """Return an `on_start` function that calls `reason` when `count` units are done."""
    remaining = [count]

    def watch(_nbytes: int) -> None:
        remaining[0] -= 1
        if remaining[0] == 0:
            reason()

    return lambda _plan: watch


def interrupt() -> None:
    raise KeyboardInterrupt


class TestExecutors:
    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_the_bytes_are_the_same(self, built: Built, tmp_path: Path, to: str) -> None:
        for workers in (1, 2, 4):
            convert_checkpoint(
                built.directory, tmp_path / str(workers), to=to, workers=workers, max_shard_bytes=100_000
            )

        assert len(names(tmp_path / "1")) > 4
        assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "4")

    def test_tiles_give_the_same_bytes_as_whole_tensors(
        self, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rows that are converted separately give the same tensor."""
        from trtllm_ct.convert import tiles

        for to in ("modelopt", "dense"):
            convert_checkpoint(built.directory, tmp_path / f"{to}-whole", to=to)
        monkeypatch.setattr(tiles, "TILE_BYTES", 512)
        for to in ("modelopt", "dense"):
            convert_checkpoint(built.directory, tmp_path / f"{to}-tiled", to=to)

        assert content(tmp_path / "modelopt-whole") == content(tmp_path / "modelopt-tiled")
        assert content(tmp_path / "dense-whole") == content(tmp_path / "dense-tiled")

    @pytest.mark.mpi
    def test_an_mpi_job_writes_the_same_bytes(self, built: Built, tmp_path: Path) -> None:
        convert_checkpoint(built.directory, tmp_path / "threads")
        command = [*MPIRUN, sys.executable, "-c", MANY_UNITS, "convert", str(built.directory)]

        done = subprocess.run(
            [*command, str(tmp_path / "mpi"), "--to", "modelopt", "--executor", "mpi", "--json"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["delivered_bytes"] > 0  # One document: the other rank prints nothing.
        assert content(tmp_path / "mpi") == content(tmp_path / "threads")

    @pytest.mark.mpi
    def test_a_fault_ends_an_mpi_job_with_one_message(self, built: Built, tmp_path: Path) -> None:
        _spoil(built, "model.layers.1.mlp.down_proj.weight_scale")
        command = [*MPIRUN, sys.executable, "-c", MANY_UNITS, "convert", str(built.directory)]

        done = subprocess.run(
            [*command, str(tmp_path / "mpi"), "--to", "modelopt", "--executor", "mpi"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

        assert done.returncode != 0
        assert done.stderr.count("model.layers.1.mlp.down_proj.weight_scale[0, 0]") == 1
        assert names(tmp_path) == ["source"]

    @pytest.mark.mpi
    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_rank_that_can_not_begin_ends_the_job(self, built: Built, tmp_path: Path, rank: int) -> None:
        """A link that leads elsewhere on one machine: no rank waits for another."""
        code = f"""
import sys
from mpi4py import MPI
if MPI.COMM_WORLD.rank == {rank}:
    sys.argv[sys.argv.index("out")] = {str(built.directory / "inside")!r}
from trtllm_ct.cli.main import main
main()
"""
        command = [*MPIRUN, sys.executable, "-c", code, "convert", str(built.directory), "out", "--to", "dense"]

        done = subprocess.run(
            [*command, "--executor", "mpi"], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path
        )

        assert (done.returncode == 0) == (rank == 1), done.stderr
        assert names(tmp_path) == (["out", "source"] if rank else ["source"])

    @pytest.mark.mpi
    def test_one_program_may_convert_twice(self, built: Built, tmp_path: Path) -> None:
        code = """
import sys
from trtllm_ct.convert import units
from trtllm_ct.convert.convert import convert_checkpoint
units.UNIT_BYTES = 1
for out in ("first", "second"):
    convert_checkpoint("source", out, executor="mpi")
"""
        done = subprocess.run(
            [*MPIRUN, sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path
        )

        assert done.returncode == 0, done.stderr
        assert content(tmp_path / "second") == content(tmp_path / "first")

    def test_a_worker_does_not_take_a_conversion_for_an_earlier_one(self, built: Built, tmp_path: Path) -> None:
        """Both come from the same files and have the same plan; the second writes elsewhere."""
        for name in ("first", "second"):
            (tmp_path / name).mkdir(0o700)
            checkpoint = open_checkpoint(built.directory)
            options = PlanOptions(to="dense")
            job = Job(
                directory=built.directory,
                options=options,
                max_shard_bytes=10**9,
                files=WorkFolder(tmp_path / name),
            )
            conversion = Conversion(job, checkpoint, checkpoint.plan_for(options))

            received = [pickle.loads(pickle.dumps(conversion)) for _ in range(2)]

            assert received[0] is received[1]
            assert received[0].job.files.path == tmp_path / name

    @pytest.mark.parametrize(
        ("addresses", "workers"), [(None, 8), (1 << 50, 8), (8 << 30, 4), (2 << 30, 1), (1 << 20, 1)]
    )
    def test_fewer_threads_start_where_addresses_are_limited(
        self, monkeypatch: pytest.MonkeyPatch, addresses: int | None, workers: int
    ) -> None:
        monkeypatch.setattr(executors, "available_cores", lambda: 8)
        monkeypatch.setattr(executors, "address_limit", lambda: addresses)

        with open_pool() as pool:
            assert pool is not None
            assert pool.workers == workers

    def test_mpi_without_mpi4py_names_it(self, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "mpi4py", None)

        with pytest.raises(MissingDependencyError, match=r"trtllm-ct\[mpi\]"):
            convert_checkpoint(built.directory, tmp_path / "out", executor="mpi")

        assert names(tmp_path) == ["source"]

    @pytest.mark.parametrize(
        ("options", "where"),
        [
            ({"executor": "processes"}, "--executor"),
            ({"workers": 0}, "--workers"),
            ({"executor": "mpi", "workers": 2}, "--workers"),
        ],
        ids=["unknown", "no worker", "workers of mpi"],
    )
    def test_invalid_executors_and_workers_are_refused(
        self, tmp_path: Path, options: dict[str, Any], where: str
    ) -> None:
        with pytest.raises(UsageError) as raised:
            convert_checkpoint(tmp_path / "source", tmp_path / "out", **options)

        assert raised.value.faults[0].where == where


def _spoil(built: Built, *scales: str) -> None:
    def spoil(stored: dict[str, torch.Tensor]) -> None:
        for name in scales:
            stored[name].view(-1)[0] = float("nan")

    rewrite(built.directory, spoil)


class TestFaults:
    @pytest.mark.parametrize("workers", [1, 4])
    def test_all_faults_are_reported_in_plan_order(self, built: Built, tmp_path: Path, workers: int) -> None:
        bad = [f"model.layers.{layer}.mlp.down_proj.weight_scale" for layer in range(4)]
        _spoil(built, *bad)

        with pytest.raises(PayloadError) as raised:
            convert_checkpoint(built.directory, tmp_path / "out", workers=workers)

        assert [fault.where for fault in raised.value.faults] == [f"{name}[0, 0]" for name in bad]
        assert names(tmp_path) == ["source"]

    def test_an_error_of_a_worker_stops_the_rest_and_keeps_the_work(
        self, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A full disk is no fault of the checkpoint: the next run goes on."""
        calls = []

        def full(*_: object, **__: object) -> None:
            calls.append(1)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("trtllm_ct.convert.worker.TensorWriter.write_bytes", full)

        with pytest.raises(OutputError, match=r"room for \d+ bytes, found no space left on device, \d+ bytes free"):
            convert_checkpoint(built.directory, tmp_path / "out", workers=1)

        assert len(calls) < 10
        assert names(tmp_path) == [".out.partial", "source"]


class TestResume:
    """Resuming after a run that was killed or interrupted."""

    @pytest.fixture
    def whole(self, built: Built, tmp_path: Path) -> dict[str, bytes]:
        convert_checkpoint(built.directory, tmp_path / "whole", max_shard_bytes=100_000)
        return content(tmp_path / "whole")

    @pytest.fixture
    def half(self, built: Built, tmp_path: Path) -> Path:
        """The working directory of a run that was interrupted after ten units."""
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(
                built.directory,
                tmp_path / "out",
                max_shard_bytes=100_000,
                workers=1,
                on_start=stopped_after(10, interrupt),
            )
        assert not (tmp_path / "out").exists()
        return tmp_path / ".out.partial"

    def test_finished_units_are_not_converted_again(
        self, built: Built, tmp_path: Path, whole: dict[str, bytes], half: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[int] = []
        _count_converted(monkeypatch, done)

        report = convert_checkpoint(built.directory, tmp_path / "out", max_shard_bytes=100_000)

        assert content(tmp_path / "out") == whole
        assert 0 < report.resumed_bytes < report.plan.delivered_bytes
        assert report.resumed_bytes + sum(done) == report.plan.delivered_bytes
        assert not half.exists()

    def test_damaged_units_are_converted_again(
        self, built: Built, tmp_path: Path, whole: dict[str, bytes], half: Path
    ) -> None:
        """After a crash of the machine, pages may hold zeros, so kept bytes are verified by their checksums."""
        digest = json.loads((half / JOURNAL).read_text().splitlines()[0])["conversion"]
        files = [path.name for path in half.iterdir()]
        journal = Journal(Folder(half), digest, files, kept=files)
        journal.close()
        pieces = [piece for record in journal.records.values() for piece in record.pieces]
        piece = max(pieces, key=lambda candidate: candidate.nbytes)
        with (half / piece.file).open("r+b") as stream:
            stream.seek(piece.offset + piece.nbytes // 2)
            stream.write(bytes([stream.read(1)[0] ^ 1]))

        report = convert_checkpoint(built.directory, tmp_path / "out", max_shard_bytes=100_000)

        assert content(tmp_path / "out") == whole
        assert report.resumed_bytes > 0

    @pytest.mark.parametrize("damage", ["cut line", "an empty journal", "a line of nonsense"])
    def test_a_damaged_journal_does_not_change_the_output(
        self, built: Built, tmp_path: Path, whole: dict[str, bytes], half: Path, damage: str
    ) -> None:
        path = half / JOURNAL
        if damage == "cut line":
            path.write_bytes(path.read_bytes()[:-7])
        elif damage == "an empty journal":
            path.write_bytes(b"")
        else:
            path.write_text(path.read_text() + '{"unit": "seven", "pieces": [[]]}\nnonsense\n')

        convert_checkpoint(built.directory, tmp_path / "out", max_shard_bytes=100_000)

        assert content(tmp_path / "out") == whole

    @pytest.mark.parametrize("change", ["target", "shard size", "source"])
    def test_another_conversion_does_not_resume(self, built: Built, tmp_path: Path, half: Path, change: str) -> None:
        options: dict[str, Any] = {"max_shard_bytes": 100_000}
        if change == "target":
            options["to"] = "dense"
        elif change == "shard size":
            options["max_shard_bytes"] = 10**9
        else:
            rewrite(built.directory, lambda stored: stored["model.embed_tokens.weight"].zero_())

        report = convert_checkpoint(built.directory, tmp_path / "out", **options)

        convert_checkpoint(built.directory, tmp_path / "fresh", **options)
        assert report.resumed_bytes == 0
        assert content(tmp_path / "out") == content(tmp_path / "fresh")

    def test_a_killed_process_leaves_its_files_and_the_next_run_resumes(
        self, built: Built, tmp_path: Path, whole: dict[str, bytes]
    ) -> None:
        program = f"""
import os
from trtllm_ct.convert import units
from trtllm_ct.convert import journal
from trtllm_ct.convert.convert import convert_checkpoint
units.UNIT_BYTES = 1
journal._SECONDS_IN_MEMORY = 0
left = [12]
def watch(nbytes):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
source, out = {str(built.directory)!r}, {str(tmp_path / "out")!r}
convert_checkpoint(source, out, max_shard_bytes=100_000, on_start=lambda _: watch)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        assert done.returncode == -9
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.partial" / JOURNAL).is_file()

        report = convert_checkpoint(built.directory, tmp_path / "out", max_shard_bytes=100_000)

        assert report.resumed_bytes > 0
        assert content(tmp_path / "out") == whole


class TestJournal:
    """When the lines of the journal are written to the file."""

    @pytest.mark.parametrize("seconds", [0, 60])
    def test_a_short_run_writes_no_units_before_it_ends(
        self, tmp_path: Path, seconds: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At the end all lines are written, unless the process was killed; the list of files is there at once."""
        monkeypatch.setattr("trtllm_ct.convert.journal._SECONDS_IN_MEMORY", seconds)
        records = [UnitRecord(unit=number, pieces=()) for number in range(3)]

        with Journal(Folder(tmp_path), "digest", ["model"]) as journal:
            for record in records:
                journal.add(record)
            early = (tmp_path / JOURNAL).read_text().count("\n")
        with Journal(Folder(tmp_path), "digest", ["model"]) as reopened:
            read_records = reopened.records

        assert early == (2 if seconds else 5)
        assert list(read_records.values()) == records

    def test_lines_in_memory_are_written_when_the_time_is_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Journal(Folder(tmp_path), "digest", ["model"]) as journal:
            journal.add(UnitRecord(unit=0, pieces=()))
            monkeypatch.setattr("trtllm_ct.convert.journal._SECONDS_IN_MEMORY", 0)
            journal.add(UnitRecord(unit=1, pieces=()))

            assert (tmp_path / JOURNAL).read_text().count("\n") == 4


def _count_converted(monkeypatch: pytest.MonkeyPatch, done: list[int]) -> None:
    from trtllm_ct.convert import coordinate, worker

    def counted(conversion: Any, number: int, **options: Any) -> Any:
        result = worker.run_unit(conversion, number, **options)
        if not result.resumed:
            done.append(conversion.units[number].nbytes)
        return result

    monkeypatch.setattr(coordinate, "run_unit", counted)


@pytest.mark.parametrize("spoiled", [False, True], ids=["good", "bad"])
@pytest.mark.parametrize("to", ["modelopt", "dense"])
def test_units_leave_no_files_open_and_no_memory_mapped(
    built: Built, tmp_path: Path, to: str, *, spoiled: bool
) -> None:
    """The garbage collector is paused during a conversion, and a large model has thousands of units."""
    if spoiled:
        _spoil(built, *(f"model.layers.{layer}.mlp.down_proj.weight_scale" for layer in range(4)))
    open_files, mapped_files = [], []

    def watch(_nbytes: int) -> None:
        open_files.append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
        mapped_files.append(Path("/proc/self/maps").read_text().count(str(built.directory)))

    with suppress(PayloadError):
        convert_checkpoint(built.directory, tmp_path / "out", to=to, workers=1, on_start=lambda _plan: watch)

    assert len(open_files) > 20
    # At most the files of the running unit, and of a finished unit whose result was not yet processed.
    assert max(mapped_files) <= 8
    assert max(open_files) - open_files[0] <= 8


def test_few_units_are_submitted_at_a_time(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This way a fault stops most units, and few results wait in memory."""
    from trtllm_ct.convert import coordinate

    submitted: list[int] = []
    taken: list[int] = []
    most = [0]

    def counted(_conversion: Any, number: int, **_: Any) -> UnitResult:
        submitted.append(number)
        most[0] = max(most[0], len(submitted) - len(taken))
        return UnitResult(record=UnitRecord(unit=number, pieces=()))

    class Conversion:
        units = tuple(units.Unit(number=number, modules=(), nbytes=1) for number in range(100))
        plan = type("Plan", (), {"modules": ()})

    monkeypatch.setattr(coordinate, "run_unit", counted)
    (tmp_path / "work").mkdir()
    with open_pool("threads", 2) as pool, Journal(Folder(tmp_path / "work"), "digest") as journal:
        assert pool is not None
        run_units(Conversion(), pool, journal, partial(_take, taken))  # type: ignore[arg-type]

    assert sorted(submitted) == list(range(100))
    assert most[0] <= 4 * 2 + 2


def _take(taken: list[int], nbytes: int) -> None:
    taken.append(nbytes)
