"""Conversions that end suddenly: killed, interrupted, out of room, without power, or with a source that changes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import Built, rewrite, tiny_config, write_checkpoint

import trtllm_ct
from trtllm_ct.base.errors import CatalogError, OutputError, TrtllmCtError, UsageError
from trtllm_ct.checkpoint import file_calls
from trtllm_ct.convert import units, worker
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

SUPPORT = Path(__file__).parents[1] / "support"
HARNESS = SUPPORT / "crash_harness.py"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(trtllm_ct.__file__).parents[1]), str(SUPPORT)]),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

FIXED_STEP = 229
"""Every so many endings are tried always: each scene and each kind of ending, at calls from the first to the last."""


def test_no_ending_leaves_anything_that_is_not_whole(pytestconfig: pytest.Config) -> None:
    """Kills, errors and power cuts at the file-system calls of a conversion; see `crash_harness.py`.

    Nothing that is not whole has the final name, the old output stays until the new one is there, no other file is
    touched, and the same command finishes with the same bytes.
    """
    step = 1 if pytestconfig.getoption("--every-call") else FIXED_STEP

    done = subprocess.run(
        [sys.executable, HARNESS, str(step)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["endings"] >= 20
    assert min(found["calls"].values()) > 100


def test_the_harness_sees_what_it_looks_for() -> None:
    """Without syncs, a power cut after the rename leaves an output without its bytes."""
    code = """
import crash_harness
from trtllm_ct.checkpoint.folder import Folder
Folder.sync = lambda _folder: None
crash_harness.report(10**9, names=("overwrite",))
"""

    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert any("damaged output" in complaint for complaint in json.loads(done.stdout)["wrong"])


@pytest.mark.mpi
@pytest.mark.parametrize(("ranks", "fixed_step"), [(2, 401), (3, 997)])
def test_no_ending_of_a_rank_leaves_anything_that_is_not_whole(
    pytestconfig: pytest.Config, ranks: int, fixed_step: int
) -> None:
    """The same on the ranks of an MPI job, those that hand out the work and those that do it."""
    step = 1 if pytestconfig.getoption("--every-call") else fixed_step
    command = [sys.executable, SUPPORT / "mpi_crash_harness.py", str(step), str(ranks)]

    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["endings"] >= 4
    assert all(calls[0] > 100 and min(calls[1:]) > 0 for calls in found["calls"].values())


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _converted(source: Path, out: Path, **options: Any) -> dict[str, bytes]:
    convert_checkpoint(source, out, **options)
    return _content(out)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    return write_checkpoint(tmp_path / "source", config=tiny_config(layers=4), scheme="int8-channel", shards=2)


def _after(count: int, act: Callable[[], object]) -> Any:
    """An `on_start` that calls `act` when `count` units are done."""
    remaining = [count]

    def watch(_nbytes: int) -> None:
        remaining[0] -= 1
        if remaining[0] == 0:
            act()

    return lambda _plan: watch


def _interrupted(source: Path, out: Path, units_done: int = 10) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, out, workers=1, on_start=_after(units_done, interrupt))


def _give_times_of(reference: Path, directory: Path) -> None:
    """Let all files have the sizes and times of those in another directory, as reproducible archives make them."""
    for path in reference.iterdir():
        status = path.stat()
        assert (directory / path.name).stat().st_size == status.st_size
        os.utime(directory / path.name, ns=(status.st_atime_ns, status.st_mtime_ns))


class TestWhatIsResumed:
    """Work of another checkpoint is never kept, however alike the two are."""

    @pytest.fixture
    def twin(self, built: Built, tmp_path: Path) -> Path:
        """A checkpoint with other weights, and the same names, shapes, sizes and times."""
        shutil.copytree(built.directory, tmp_path / "twin")
        rewrite(tmp_path / "twin", lambda stored: [tensor.neg_() for tensor in stored.values() if _is_weight(tensor)])
        _give_times_of(built.directory, tmp_path / "twin")
        return tmp_path / "twin"

    @pytest.mark.parametrize("how", ["another directory", "moved to the same place", "written into the same files"])
    def test_a_twin_of_the_checkpoint_is_converted_anew(
        self, built: Built, twin: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        source = twin
        fresh = _converted(twin, tmp_path / "fresh")
        _interrupted(built.directory, tmp_path / "out")
        if how == "moved to the same place":
            source = built.directory
            shutil.rmtree(source)
            twin.rename(source)
        elif how == "written into the same files":
            source = built.directory
            for path in twin.iterdir():
                status = path.stat()
                (source / path.name).write_bytes(path.read_bytes())
                os.utime(source / path.name, ns=(status.st_atime_ns, status.st_mtime_ns))

        report = convert_checkpoint(source, tmp_path / "out")

        assert report.resumed_bytes == 0
        assert _content(tmp_path / "out") == fresh
        assert "source files that changed; starting anew" in caplog.text

    def test_samples_tell_twins_apart_that_even_have_one_identity(
        self, built: Built, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a file system that shows one inode and change time for all files."""
        monkeypatch.setattr("trtllm_ct.convert.source_files.SourceFile.identity", "")
        fresh = _converted(twin, tmp_path / "fresh")
        _interrupted(built.directory, tmp_path / "out")

        report = convert_checkpoint(twin, tmp_path / "out")

        assert _content(tmp_path / "out") == fresh
        assert report.resumed_bytes < report.plan.delivered_bytes // 10  # Norms are the same in both.

    def test_a_record_of_another_units_bytes_is_not_believed(self, built: Built, tmp_path: Path) -> None:
        """The pieces of a record must be the places of its own tensors, not any that have as many bytes."""
        fresh = _converted(built.directory, tmp_path / "fresh")
        _interrupted(built.directory, tmp_path / "out", units_done=20)
        journal = tmp_path / ".out.partial" / ".trtllm_ct.journal"
        header, files, *lines = journal.read_text().splitlines()
        records = [json.loads(line) for line in lines if line]
        sizes = [sum(piece[2] for piece in record["pieces"]) for record in records]
        first, second = next(
            (one, other)
            for one in range(len(sizes))
            for other in range(one)
            if sizes[one] == sizes[other] and records[one]["pieces"] != records[other]["pieces"]
        )
        records[first]["pieces"] = records[second]["pieces"]
        journal.write_text("\n".join([header, files, *(json.dumps(record) for record in records)]) + "\n")
        for piece in json.loads(lines[first])["pieces"]:
            with (tmp_path / ".out.partial" / piece[0]).open("r+b") as stream:
                stream.seek(piece[1])
                stream.write(bytes(piece[2]))

        convert_checkpoint(built.directory, tmp_path / "out")

        assert _content(tmp_path / "out") == fresh


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_systems_that_can_not_copy_in_the_kernel_write_the_same_and_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    source = write_checkpoint(tmp_path / "source", config=tiny_config(layers=1), scheme="nvfp4").directory
    fresh = _converted(source, tmp_path / "fresh")
    caplog.clear()
    asked = []

    def missing(*_: int) -> int:
        asked.append(code)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(file_calls, "copy_range", missing)

    assert _converted(source, tmp_path / "out") == fresh
    assert asked
    assert caplog.text == ""


def test_a_copied_tensor_that_lost_a_byte_is_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal has no checksum of it: a run that resumes compares it with the source."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    source = write_checkpoint(tmp_path / "source", config=tiny_config(layers=2), scheme="nvfp4").directory
    fresh = _converted(source, tmp_path / "fresh")
    _interrupted(source, tmp_path / "out", units_done=10)
    partial = tmp_path / ".out.partial" / "model.safetensors"
    whole = (tmp_path / "fresh/model.safetensors").read_bytes()
    left = bytearray(partial.read_bytes())
    done = [place for place in range(len(whole) - 64, 0, -64) if whole[place : place + 64] == left[place : place + 64]]
    place = next(place for place in done if any(whole[place : place + 64]))
    left[place] ^= 1
    partial.write_bytes(left)

    report = convert_checkpoint(source, tmp_path / "out")

    assert _content(tmp_path / "out") == fresh
    assert 0 < report.resumed_bytes < report.plan.delivered_bytes


def _is_weight(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[1] > 1


class TestSourceThatChanges:
    """The file is named, whatever happens to it; nothing is left."""

    @pytest.mark.parametrize("workers", [1, 4])
    @pytest.mark.parametrize("scheme", ["int8-channel", "nvfp4"], ids=str)
    def test_a_file_that_shrinks_while_it_is_mapped_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, workers: int
    ) -> None:
        source = write_checkpoint(tmp_path / "source", config=tiny_config(layers=2), scheme=scheme).directory

        def then_shrinking(read: Callable[..., Any]) -> Callable[..., Any]:
            def shrinking(*arguments: Any) -> Any:
                found = read(*arguments)
                os.truncate(source / "model.safetensors", 4096)
                return found

            return shrinking

        for method in ("read", "read_bytes", "read_into"):
            original = getattr(worker.TensorReader, method)
            monkeypatch.setattr(worker.TensorReader, method, then_shrinking(original))

        with pytest.raises(CatalogError, match=r"model\.safetensors: .* found 4096 bytes") as raised:
            convert_checkpoint(source, tmp_path / "out", workers=workers)

        assert {fault.where for fault in raised.value.faults} == {"model.safetensors"}
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize("how", ["in the kernel", "through memory"])
    def test_a_file_that_shrinks_before_it_is_copied_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """The copy ends early in the kernel, and where the system has no such call, when the source is read."""
        source = write_checkpoint(tmp_path / "source", config=tiny_config(layers=2), scheme="nvfp4").directory
        copy = file_calls.copy_range

        def shrinking(*arguments: int) -> int:
            os.truncate(source / "model.safetensors", 4096)
            if how == "through memory":
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            return copy(*arguments)

        monkeypatch.setattr(file_calls, "copy_range", shrinking)

        with pytest.raises(CatalogError, match=r"model\.safetensors: .* found 4096 bytes"):
            convert_checkpoint(source, tmp_path / "out")

        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize("how", ["replaced", "written to", "removed"])
    def test_a_file_that_changes_between_units_is_named(self, built: Built, tmp_path: Path, how: str) -> None:
        shard = built.directory / "model-00002-of-00002.safetensors"

        def change() -> None:
            if how == "replaced":
                shutil.copy2(shard, tmp_path / "copy")
                (tmp_path / "copy").rename(shard)
            elif how == "written to":
                shard.write_bytes(shard.read_bytes())
            else:
                shard.unlink()

        with pytest.raises(CatalogError, match=r"model-00002-of-00002\.safetensors.*changed or vanished"):
            convert_checkpoint(built.directory, tmp_path / "out", workers=1, on_start=_after(2, change))

        assert [path.name for path in tmp_path.iterdir()] == ["source"]


SLOW = """
import sys, time
from trtllm_ct.convert import coordinate, units
units.UNIT_BYTES = 1
run = coordinate.run_unit
def slow(*arguments, **options):
    time.sleep(0.05)
    return run(*arguments, **options)
coordinate.run_unit = slow
from trtllm_ct.cli.main import main
main()
"""


def _start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """A slow conversion that has begun."""
    command = [sys.executable, "-c", SLOW, "convert", str(source), str(out), "--to", "modelopt", *options]
    running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    weights = out.with_name(f".{out.name}.partial") / "model.safetensors"
    while running.poll() is None and not weights.exists():
        time.sleep(0.01)
    return running


class TestSignals:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_one_line_says_how_to_go_on(self, tmp_path: Path, number: signal.Signals, code: int) -> None:
        source = write_checkpoint(tmp_path / "source", config=tiny_config(layers=4)).directory
        running = _start(source, tmp_path / "out")

        running.send_signal(number)
        out, err = running.communicate(timeout=60)

        assert running.returncode == code
        assert (out, err) == ("", f"Interrupted by {number.name}. The same command goes on from here.\n")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "source"]
        convert_checkpoint(source, tmp_path / "out")

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    @pytest.mark.parametrize("module", ["trtllm_ct.cli.commands", "typing", "logging", "typer", "rich.console"])
    def test_while_anything_is_imported_there_is_no_traceback(
        self, module: str, number: signal.Signals, code: int
    ) -> None:
        """Not even where Python ignores errors: in its import system, which runs code when locks are freed."""
        program = f"""
import os, signal, sys
class Freed:
    def __del__(self):
        os.kill(os.getpid(), {number})
class Signal:
    def find_spec(self, name, *_):
        if name == {module!r}:
            Freed()
sys.meta_path.insert(0, Signal())
from trtllm_ct.cli.main import main
main()
"""
        done = subprocess.run(
            [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )

        assert (done.returncode, done.stderr) == (code, f"Interrupted by {number.name}.\n")

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    @pytest.mark.parametrize("again", [0, 0.01])
    def test_a_signal_is_not_lost_in_code_that_can_not_raise(
        self, number: signal.Signals, code: int, again: float
    ) -> None:
        """Nor in the hook that is called for it: at once, the signal comes again before that has returned."""
        program = f"""
import os, time
from trtllm_ct.cli import interrupts
from trtllm_ct.cli.interrupts import ending_on_signals
interrupts._AGAIN_SECONDS = {again}
class Freed:
    def __del__(self):
        os.kill(os.getpid(), {number})
with ending_on_signals():
    Freed()
    time.sleep(20)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )

        assert (done.returncode, done.stderr) == (code, f"Interrupted by {number.name}.\n")

    def test_the_handler_is_there_before_anything_slow_is_imported(self) -> None:
        code = """
import sys
before = set(sys.modules)
import trtllm_ct.cli.main
slow = {"dataclasses", "inspect", "importlib.metadata", "typer", "typing", "re", "contextlib", "threading"}
slow |= {"trtllm_ct.base.packages", "trtllm_ct.cli.commands"}
assert not slow & (set(sys.modules) - before), slow & (set(sys.modules) - before)
"""
        done = subprocess.run([sys.executable, "-S", "-c", code], env=ENVIRONMENT, capture_output=True, check=False)

        assert done.stderr == b""

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_after_the_output_has_its_name_the_line_says_so(self, tmp_path: Path, overwrite: bool) -> None:
        source = write_checkpoint(tmp_path / "source", config=tiny_config(layers=1)).directory
        code = """
import os, signal, sys
from trtllm_ct.checkpoint import output
name = "_remove_old" if "--overwrite" in sys.argv else "_put_in_place"
done = getattr(output, name)
def interrupted(*arguments):
    result = done(*arguments) if name == "_put_in_place" else None
    os.kill(os.getpid(), signal.SIGINT)
    return result
setattr(output, name, interrupted)
from trtllm_ct.cli.main import main
main()
"""
        if overwrite:
            convert_checkpoint(source, tmp_path / "out")
        command = [sys.executable, "-c", code, "convert", source, tmp_path / "out", "--to", "dense"]
        command += ["--overwrite"] if overwrite else []

        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)

        assert done.returncode == 130
        assert done.stderr.startswith("Interrupted by SIGINT. The output is complete.")
        assert (f"{tmp_path}/.out.partial is the old one" in done.stderr) == overwrite
        if overwrite:
            convert_checkpoint(source, tmp_path / "out", overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


class TestTwoAtOnce:
    def test_one_wins_and_the_other_says_so_at_once(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "source", config=tiny_config(layers=4)).directory
        wanted = _converted(source, tmp_path / "wanted")
        running = _start(source, tmp_path / "out", "--no-sync")

        with pytest.raises(UsageError, match="another process that writes there"):
            convert_checkpoint(source, tmp_path / "out")

        running.communicate(timeout=60)
        assert running.returncode == 0
        assert _content(tmp_path / "out") == wanted


class TestFullDisks:
    def test_needed_and_free_bytes_are_compared_before_anything_is_written(
        self, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(file_calls, "free_bytes", lambda _: 1000)
        for name in ("allocate", "truncate", "write", "write_at"):
            monkeypatch.setattr(file_calls, name, lambda *_: pytest.fail("something was written"))

        with pytest.raises(UsageError, match=r"room for \d+ bytes, found 1000 bytes free"):
            convert_checkpoint(built.directory, tmp_path / "out")

        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize(("call", "count"), [("write", 10), ("write_at", 30)], ids=["journal", "weights"])
    def test_a_disk_that_runs_full_is_an_error_with_both_numbers(
        self, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, count: int
    ) -> None:
        monkeypatch.setattr("trtllm_ct.convert.journal._SECONDS_IN_MEMORY", 0)
        done = getattr(file_calls, call)
        remaining = [count]

        def filling(*arguments: Any) -> Any:
            remaining[0] -= 1
            if remaining[0] < 0:
                raise OSError(28, "No space left on device")
            return done(*arguments)

        monkeypatch.setattr(file_calls, call, filling)

        with pytest.raises(OutputError, match=r"room for \d+ bytes, found no space left on device, \d+ bytes free"):
            convert_checkpoint(built.directory, tmp_path / "out")

        monkeypatch.setattr(file_calls, call, done)
        assert convert_checkpoint(built.directory, tmp_path / "out").resumed_bytes > 0

    def test_work_that_fills_the_disk_is_kept_and_gone_on_with(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Side files that are already copied need no further room."""
        monkeypatch.setattr(units, "UNIT_BYTES", 1)
        source = write_checkpoint(tmp_path / "source", config=tiny_config(layers=1), tokenizer=True).directory
        wanted = _converted(source, tmp_path / "wanted")
        with monkeypatch.context() as patch:
            patch.setattr("trtllm_ct.checkpoint.output.write_manifest", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                convert_checkpoint(source, tmp_path / "out")
            patch.setattr(file_calls, "free_bytes", lambda _: 0)
            patch.setattr("trtllm_ct.checkpoint.output.write_manifest", _fill)
            with pytest.raises(OutputError, match="0 bytes free"):
                convert_checkpoint(source, tmp_path / "out")

        report = convert_checkpoint(source, tmp_path / "out")

        assert report.resumed_bytes == report.plan.delivered_bytes
        assert _content(tmp_path / "out") == wanted


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _fill(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


class TestWorkOfAnEarlierRun:
    """A rerun that can't do its work leaves that of the earlier run alone."""

    @pytest.mark.parametrize("what", ["source is gone", "source is empty", "parallel size", "room", "another user"])
    def test_it_is_kept_and_gone_on_with(
        self, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        source, out = built.directory, tmp_path / "out"
        wanted = _converted(source, tmp_path / "wanted")
        _interrupted(source, out)
        options: dict[str, Any] = {}
        with monkeypatch.context() as patch:
            if what in {"source is gone", "source is empty"}:
                source.rename(tmp_path / "away")
                _ = what == "source is empty" and source.mkdir()
            elif what == "parallel size":
                options = {"parallel": Parallel(tensor=7), "strict": True}
            elif what == "room":
                patch.setattr(file_calls, "free_bytes", lambda _: -(10**12))
            else:
                options = {"on_start": _after(1, out.mkdir)}
            with pytest.raises(TrtllmCtError):
                convert_checkpoint(source, out, **options)
        if what in {"source is gone", "source is empty"}:
            _ = what == "source is empty" and source.rmdir()
            (tmp_path / "away").rename(source)

        report = convert_checkpoint(source, out, overwrite=what == "another user")

        assert report.resumed_bytes > 0
        assert _content(out) == wanted
