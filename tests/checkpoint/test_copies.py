"""Tensors copied from file to file: every byte arrives, whatever the system can do, and faults name the file."""

from __future__ import annotations

import errno
import os
from threading import Lock
from typing import TYPE_CHECKING, Any

import pytest

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint import copies, file_calls
from trtllm_ct.checkpoint.copies import Copied, Stretch, copy_stretch, is_same, stretches
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.header import StoredTensor
from trtllm_ct.checkpoint.open_files import OpenFiles
from trtllm_ct.checkpoint.output_files import copies_are_intact
from trtllm_ct.checkpoint.write_plan import StackPart, WritePlan
from trtllm_ct.checkpoint.writer import TensorWriter, create_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NO_CALL = [errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EIO, errno.ENOSPC]
REAL = file_calls.copy_range
SIZES = [0, 1, 4096, 300_001]
PAYLOAD = bytes(range(251)) * 1300


def stored(name: str, offset: int, nbytes: int, file: str = "source") -> StoredTensor:
    return StoredTensor(name=name, spec=TensorSpec(DType.U8, (nbytes,)), file=file, offset=offset)


def stretch(nbytes: int, begin: int = 5, offset: int = 9) -> Stretch:
    tensor = stored("a", begin, nbytes)
    return Stretch(source="source", begin=begin, file="target", offset=offset, nbytes=nbytes, stored=(tensor,))


def failing(code: int) -> Callable[..., int]:
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def short(source: int, begin: int, target: int, offset: int, nbytes: int) -> int:
    return REAL(source, begin, target, offset, min(nbytes, 70_000))


def nothing(*_: int) -> int:
    return 0


CALLS: dict[str, Callable[..., int]] = {
    "as it is": REAL,
    "short": short,
    "nothing": nothing,
    **{errno.errorcode[code]: failing(code) for code in NO_CALL},
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the system does when it is asked to copy: all, less, nothing, or an error."""
    monkeypatch.setattr(file_calls, "copy_range", CALLS[request.param])
    return str(request.param)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A source with `PAYLOAD`, and an empty target."""
    (tmp_path / "source").write_bytes(PAYLOAD)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield source, target
    os.close(source)
    os.close(target)


@pytest.mark.usefixtures("call")
@pytest.mark.parametrize("piece", [1, 4096, 2**24], ids=str)
@pytest.mark.parametrize("nbytes", SIZES)
def test_every_byte_arrives(files: tuple[int, int], nbytes: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = min(nbytes, 100 * piece)
    monkeypatch.setattr(copies, "_COPY_BYTES", piece)
    source, target = files

    copy_stretch(stretch(nbytes), source, target, Lock())

    assert os.pread(target, 10**6, 9) == PAYLOAD[5 : 5 + nbytes]
    assert is_same(stretch(nbytes), source, target)


@pytest.mark.usefixtures("call")
def test_a_source_that_ends_too_early_is_named(files: tuple[int, int]) -> None:
    source, target = files
    os.truncate(f"/proc/self/fd/{source}", 1000)

    with pytest.raises(CatalogError, match=r"source: a: .* found a file that ends before byte 300005") as raised:
        copy_stretch(stretch(300_000), source, target, Lock())

    assert "changed or vanished" in str(raised.value)


def test_the_tensor_at_fault_is_named_among_neighbours(files: tuple[int, int]) -> None:
    source, target = files
    os.truncate(f"/proc/self/fd/{source}", 150)
    both = stretch(100, begin=0).continued_by(
        Stretch(source="source", begin=100, file="target", offset=109, nbytes=100, stored=(stored("b", 100, 100),))
    )

    with pytest.raises(CatalogError, match="source: b:"):
        copy_stretch(both, source, target, Lock())


def test_a_source_that_can_not_be_read_is_named(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_calls, "copy_range", failing(errno.EIO))
    monkeypatch.setattr(file_calls, "read_at", failing(errno.EIO))

    with pytest.raises(CatalogError, match=r"source: a: .*Check the disk"):
        copy_stretch(stretch(10), *files, Lock())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_target_that_can_not_be_written_is_no_fault_of_the_source(
    files: tuple[int, int], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_calls, "copy_range", failing(code))
    monkeypatch.setattr(file_calls, "write_at", failing(code))

    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        copy_stretch(stretch(10), *files, Lock())

    assert raised.value.errno == code


def test_the_call_is_made_with_the_lock_of_the_file(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    lock, held = Lock(), list[bool]()

    def seen(*arguments: int) -> int:
        held.append(lock.locked())
        return REAL(*arguments)

    monkeypatch.setattr(file_calls, "copy_range", seen)
    copy_stretch(stretch(4096), *files, lock)

    assert held == [True]
    assert not lock.locked()


@pytest.mark.parametrize("place", [0, 2**20 - 1, 2**20, 1_200_000])
def test_a_changed_byte_is_no_copy(tmp_path: Path, place: int) -> None:
    """Also behind what is compared at once."""
    (tmp_path / "source").write_bytes(bytes(1_200_001))
    content = bytearray(1_200_001)
    content[place] = 1
    (tmp_path / "target").write_bytes(content)
    whole = stretch(1_200_001, begin=0, offset=0)

    with OpenFiles(tmp_path) as sources:
        assert not copies_are_intact(Folder(tmp_path), [whole], sources)
        (tmp_path / "target").write_bytes(bytes(1_200_001))
        assert copies_are_intact(Folder(tmp_path), [whole], sources)


@pytest.mark.parametrize("lost", ["source", "target"])
@pytest.mark.parametrize("how", ["removed", "short"])
def test_a_file_that_is_gone_or_short_is_no_copy(tmp_path: Path, lost: str, how: str) -> None:
    for name in ("source", "target"):
        (tmp_path / name).write_bytes(bytes(100))
    (tmp_path / lost).unlink()
    if how == "short":
        (tmp_path / lost).write_bytes(bytes(99))

    with OpenFiles(tmp_path) as sources:
        assert not copies_are_intact(Folder(tmp_path), [stretch(100, begin=0, offset=0)], sources)


def test_neighbours_in_both_files_are_one_stretch() -> None:
    copied = [
        Copied("third", stored("c", 50, 10)),
        Copied("second", stored("b", 30, 20)),
        Copied("part", stored("d", 100, 40), first=20),
        Copied("empty", stored("e", 60, 0)),
        Copied("other", stored("f", 60, 8, file="another")),
        Copied("first", stored("a", 10, 20)),
    ]
    places = {
        "first": stored("first", 8, 20, "out"),
        "second": stored("second", 28, 20, "out"),
        "third": stored("third", 48, 10, "out"),
        "empty": stored("empty", 58, 0, "out"),
        "other": stored("other", 58, 8, "out"),
        "part": stored("part", 70, 20, "out"),
    }

    found = stretches(copied, places)

    assert [(one.source, one.begin, one.file, one.offset, one.nbytes) for one in found if one.nbytes] == [
        ("source", 10, "out", 8, 50),
        ("another", 60, "out", 58, 8),
        ("source", 120, "out", 70, 20),
    ]
    assert [tensor.name for tensor in found[0].stored if tensor.spec.nbytes] == ["a", "b", "c"]


class TestWriter:
    @pytest.fixture
    def plan(self, tmp_path: Path) -> WritePlan:
        """Three tensors, one of them a line of a stacked one."""
        specs = {name: TensorSpec(DType.U8, (4, 64)) for name in ("a", "b", "line")}
        plan = WritePlan.of(specs, 10**6, {"line": StackPart(stack="stack", line=0, lines=4)})
        create_files(Folder(tmp_path), plan)
        (tmp_path / "source").write_bytes(PAYLOAD[:4096])
        return plan

    @pytest.mark.usefixtures("call")
    def test_copied_tensors_are_complete_and_need_no_checksum(self, plan: WritePlan, tmp_path: Path) -> None:
        copied = [Copied("a", stored("x", 7, 256)), Copied("b", stored("y", 700, 512), first=100)]

        with TensorWriter(Folder(tmp_path), plan) as writer, OpenFiles(tmp_path) as sources:
            writer.copy(copied, sources)

            assert writer.is_complete("a")
            assert writer.is_complete("b")
            assert not writer.is_complete("line")
            assert writer.pieces == []
        written = (tmp_path / plan.files[0].name).read_bytes()
        for name, begin in (("a", 7), ("b", 800)):
            assert written[plan.places[name].offset :][:256] == PAYLOAD[begin : begin + 256]

    def test_what_was_written_is_not_copied(self, plan: WritePlan, tmp_path: Path) -> None:
        with TensorWriter(Folder(tmp_path), plan) as writer, OpenFiles(tmp_path) as sources:
            writer.write_bytes("a", memoryview(bytes(3)), 10)

            with pytest.raises(ValueError, match="a was written before"):
                writer.copy([Copied("a", stored("x", 0, 256))], sources)

    def test_what_was_copied_is_not_written(self, plan: WritePlan, tmp_path: Path) -> None:
        with TensorWriter(Folder(tmp_path), plan) as writer, OpenFiles(tmp_path) as sources:
            writer.copy([Copied("a", stored("x", 0, 256))], sources)

            with pytest.raises(ValueError, match="a was written before"):
                writer.write_bytes("a", memoryview(bytes(3)), 10)

    @pytest.mark.parametrize("name", ["line", "unknown"])
    def test_lines_and_unknown_tensors_have_no_place(self, plan: WritePlan, tmp_path: Path, name: str) -> None:
        with (
            TensorWriter(Folder(tmp_path), plan) as writer,
            OpenFiles(tmp_path) as sources,
            pytest.raises(ValueError, match=f"{name} has no place of its own"),
        ):
            writer.copy([Copied(name, stored("x", 0, 256))], sources)

    def test_a_source_that_is_gone_is_named(self, plan: WritePlan, tmp_path: Path) -> None:
        (tmp_path / "source").unlink()

        with (
            TensorWriter(Folder(tmp_path), plan) as writer,
            OpenFiles(tmp_path) as sources,
            pytest.raises(CatalogError, match=r"source: x: .*changed or vanished"),
        ):
            writer.copy([Copied("a", stored("x", 0, 256))], sources)
