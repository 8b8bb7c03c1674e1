"""Bytes between files and memory: all of them arrive in their places, and the checksum changes when they do not."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trtllm_ct.checkpoint import transfer
from trtllm_ct.checkpoint.transfer import CHUNK_BYTES, checksum, preallocate, read_into, write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
LENGTHS = [0, 1, 7, 8, 9, PAGE - 1, PAGE, PAGE + 1, PAGE + 8, 3 * PAGE + 13]


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """An empty file, open for reading and writing."""
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def content(descriptor: int) -> bytes:
    return Path(f"/proc/self/fd/{descriptor}").read_bytes()


def varied(nbytes: int, seed: int = 1) -> bytes:
    """Bytes without a pattern, no word of them zero."""
    import random

    return random.Random(seed).randbytes(nbytes).replace(b"\0", b"\1")


def slow_checksum(payload: bytes) -> int:
    """Compute the checksum word by word, by its definition: page sums times 1, 3, 5, ...; the rest counts as a page."""
    words = [int.from_bytes(payload[place : place + 8], "little") for place in range(0, len(payload), 8)]
    whole_pages = len(payload) // PAGE
    return sum(word * (2 * min(place // 512, whole_pages) + 1) for place, word in enumerate(words)) % 2**64


class TestChecksum:
    @pytest.mark.parametrize("nbytes", LENGTHS)
    def test_it_is_the_weighted_sum_of_the_words(self, nbytes: int) -> None:
        """The bytes of a last word that is not whole count as one with zeros on top."""
        payload = varied(nbytes)

        assert checksum(memoryview(payload)) == slow_checksum(payload)
        assert 0 <= checksum(memoryview(payload)) < 2**64

    @settings(max_examples=40, deadline=None)
    @given(head=st.binary(max_size=40), pages=st.integers(0, 4), octet=st.integers(0, 255), tail=st.binary(max_size=30))
    def test_any_bytes_have_the_checksum_of_the_slow_reference(
        self, head: bytes, pages: int, octet: int, tail: bytes
    ) -> None:
        """All ones too, whose sums pass 64 bits many times."""
        payload = head + bytes([octet]) * (pages * PAGE) + tail

        assert checksum(memoryview(payload)) == slow_checksum(payload)

    def test_it_is_the_same_on_every_machine(self) -> None:
        """A journal of one process is read by another: the numbers must never change."""
        assert checksum(memoryview(b"")) == 0
        assert checksum(memoryview(b"\1\2\3")) == 0x030201
        assert checksum(memoryview(bytes(7) + b"\x80\1")) == 2**63 + 1
        assert checksum(memoryview((b"\1" + bytes(PAGE - 1)) * 3)) == 1 + 3 + 5

    @settings(max_examples=60, deadline=None)
    @given(nbytes=st.sampled_from(LENGTHS[1:]), data=st.data())
    def test_a_flipped_bit_changes_the_checksum(self, nbytes: int, data: st.DataObject) -> None:
        """Any bit, the last one of an odd length included."""
        payload = bytearray(varied(nbytes))
        before = checksum(memoryview(payload))
        place = data.draw(st.one_of(st.just(8 * nbytes - 1), st.integers(0, 8 * nbytes - 1)))
        payload[place // 8] ^= 1 << place % 8

        assert checksum(memoryview(payload)) != before

    @pytest.mark.parametrize("lost", range(5))
    @pytest.mark.parametrize("rest", [0, 1, 100])
    def test_a_lost_page_changes_the_checksum(self, lost: int, rest: int) -> None:
        """A crash leaves zeros where a page was not written."""
        payload = varied(5 * PAGE + rest)
        torn = payload[: lost * PAGE] + bytes(PAGE) + payload[(lost + 1) * PAGE :]

        assert checksum(memoryview(torn)) != checksum(memoryview(payload))

    @pytest.mark.parametrize(("one", "other"), [(0, 1), (0, 3), (1, 3), (2, 3)])
    def test_swapped_pages_change_the_checksum(self, one: int, other: int) -> None:
        """Also pages of equal bytes, all but one."""
        for fill in (varied(4 * PAGE), b"".join(bytes([number]) + bytes(PAGE - 1) for number in range(4))):
            pages = [fill[place : place + PAGE] for place in range(0, 4 * PAGE, PAGE)]
            pages[one], pages[other] = pages[other], pages[one]

            assert checksum(memoryview(b"".join(pages))) != checksum(memoryview(fill))

    def test_a_page_written_twice_changes_the_checksum(self) -> None:
        payload = varied(4 * PAGE)

        assert checksum(memoryview(payload[:PAGE] * 2 + payload[2 * PAGE :])) != checksum(memoryview(payload))

    @settings(max_examples=60, deadline=None)
    @given(order=st.permutations(range(5)))
    def test_any_other_order_of_pages_changes_the_checksum(self, order: list[int]) -> None:
        assume(order != sorted(order))
        payload = varied(5 * PAGE)
        moved = b"".join(payload[page * PAGE : (page + 1) * PAGE] for page in order)

        assert checksum(memoryview(moved)) != checksum(memoryview(payload))

    def test_the_checksum_does_not_depend_on_the_place_in_memory(self) -> None:
        """Payloads begin at any byte of a buffer."""
        payload = varied(2 * PAGE + 5)
        for shift in range(1, 9):
            assert checksum(memoryview(bytes(shift) + payload)[shift:]) == checksum(memoryview(payload))

    @pytest.mark.parametrize("kind", [bytes, bytearray], ids=["read-only", "writable"])
    def test_memory_is_only_read(self, kind: Callable[[bytes], bytes | bytearray]) -> None:
        payload = kind(varied(PAGE + 3))

        checksum(memoryview(payload))

        assert payload == varied(PAGE + 3)

    @pytest.mark.parametrize("rest", [0, 1, 8, PAGE - 1])
    @pytest.mark.parametrize("cuts", [[0], [1], [1, 2], [2, 2, 3]])
    def test_checksums_of_parts_add_up(self, cuts: list[int], rest: int) -> None:
        """Where they were cut between pages; a part may be empty."""
        payload = memoryview(varied(4 * PAGE + rest))
        ends = [*cuts, 5]
        parts = [
            checksum(payload[begin * PAGE : end * PAGE], begin) for begin, end in zip([0, *cuts], ends, strict=True)
        ]

        assert sum(parts) % 2**64 == checksum(payload)


class TestWriteAll:
    @pytest.mark.parametrize("nbytes", [0, 1, 9, 10, 11, 35])
    @pytest.mark.parametrize("most", [1, 3, 10, 100])
    def test_all_bytes_are_written_when_the_system_accepts_few_at_once(
        self, descriptor: int, nbytes: int, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At most a block is passed at once, and the bytes before and after stay as they were."""
        offered = []
        pwrite = os.pwrite

        def stingy(descriptor: int, payload: memoryview, offset: int) -> int:
            offered.append(len(payload))
            return pwrite(descriptor, payload[:most], offset)

        os.pwrite(descriptor, b"." * 50, 0)
        monkeypatch.setattr(os, "pwrite", stingy)
        monkeypatch.setattr(transfer, "WRITE_BYTES", 10)

        write_all(descriptor, memoryview(varied(nbytes)), 6)

        assert content(descriptor) == b"." * 6 + varied(nbytes) + b"." * (44 - nbytes)
        assert max(offered, default=0) <= 10

    def test_the_file_position_is_not_moved(self, descriptor: int) -> None:
        """Several writers share a descriptor only when none of them moves it."""
        write_all(descriptor, memoryview(b"abc"), 2)

        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
        assert content(descriptor) == b"\0\0abc"

    def test_a_full_disk_is_an_error(self, descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)

        with pytest.raises(OSError, match="No space left"):
            write_all(descriptor, memoryview(b"abc"), 0)


class TestReadInto:
    @pytest.mark.parametrize("most", [1, 7, 10**6])
    @pytest.mark.parametrize(("offset", "nbytes"), [(0, 100), (3, 0), (3, 1), (7, 93), (99, 1)])
    def test_short_reads_are_continued(
        self, descriptor: int, offset: int, nbytes: int, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file system may return fewer bytes than were requested."""
        os.pwrite(descriptor, varied(100), 0)
        preadv = os.preadv

        def stingy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            return preadv(descriptor, [buffers[0][:most]], offset)

        monkeypatch.setattr(os, "preadv", stingy)
        payload = bytearray(nbytes)

        assert read_into(descriptor, memoryview(payload), offset) == nbytes
        assert payload == varied(100)[offset : offset + nbytes]

    @pytest.mark.parametrize(("offset", "held"), [(0, 10), (4, 6), (9, 1), (10, 0), (50, 0)])
    def test_fewer_bytes_are_read_at_the_end_of_the_file(self, descriptor: int, offset: int, held: int) -> None:
        """The rest of the buffer stays as it was."""
        os.pwrite(descriptor, varied(10), 0)
        payload = bytearray(b"." * 20)

        assert read_into(descriptor, memoryview(payload), offset) == held
        assert payload == varied(10)[offset:] + b"." * (20 - held)

    def test_a_file_that_cannot_be_read_is_an_error_and_no_end_of_file(self, tmp_path: Path) -> None:
        descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
        try:
            with pytest.raises(OSError, match="Bad file descriptor"):
                read_into(descriptor, memoryview(bytearray(1)), 0)
        finally:
            os.close(descriptor)

    def test_bytes_written_are_read_back(self, descriptor: int) -> None:
        """More than a chunk, an odd number of bytes, at an odd place."""
        payload = varied(PAGE) * (CHUNK_BYTES // PAGE) + varied(PAGE + 13)
        write_all(descriptor, memoryview(payload), 7)
        back = bytearray(len(payload))

        assert read_into(descriptor, memoryview(back), 7) == len(payload)
        assert back == payload


class FakeLibrary:
    """A C library whose `fallocate` fails with these codes, one after the other, then succeeds."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.calls: list[tuple[int, int, int, int]] = []

    def fallocate(self, descriptor: int, mode: int, offset: ctypes.c_int64, nbytes: ctypes.c_int64) -> int:
        self.calls.append((descriptor, mode, offset.value, nbytes.value))
        if not self.codes:
            return 0
        ctypes.set_errno(self.codes.pop(0))
        return -1


class TestPreallocate:
    @pytest.fixture
    def library(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        def use(library: Any) -> Any:
            monkeypatch.setattr(ctypes, "CDLL", lambda name, *, use_errno: library)
            return library

        return use

    @pytest.mark.parametrize("nbytes", [0, 1, PAGE, 3 * PAGE + 5])
    def test_a_new_file_has_its_size_and_zeros(self, descriptor: int, nbytes: int) -> None:
        preallocate(descriptor, nbytes)

        assert content(descriptor) == bytes(nbytes)

    def test_bytes_that_are_there_stay(self, descriptor: int) -> None:
        os.pwrite(descriptor, b"header", 0)

        preallocate(descriptor, 10)

        assert content(descriptor) == b"header" + bytes(4)

    def test_sizes_beyond_32_bits_are_passed_on(self, descriptor: int, library: Callable[..., Any]) -> None:
        fake = library(FakeLibrary())

        preallocate(descriptor, 5 * 2**30)

        assert fake.calls == [(descriptor, 0, 0, 5 * 2**30)]

    @pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL], ids=errno.errorcode.get)
    def test_where_blocks_cannot_be_reserved_the_size_is_set(
        self, descriptor: int, library: Callable[..., Any], code: int
    ) -> None:
        fake = library(FakeLibrary(code))

        preallocate(descriptor, 100)

        assert content(descriptor) == bytes(100)
        assert len(fake.calls) == 1

    def test_a_library_without_fallocate_is_accepted(self, descriptor: int, library: Callable[..., Any]) -> None:
        library(object())

        preallocate(descriptor, 100)

        assert content(descriptor) == bytes(100)

    def test_no_call_is_made_for_zero_bytes(self, descriptor: int, library: Callable[..., Any]) -> None:
        """The system refuses to reserve zero bytes."""
        fake = library(FakeLibrary(errno.EBADF))

        preallocate(descriptor, 0)

        assert content(descriptor) == b""
        assert fake.calls == []

    def test_an_interrupted_call_is_made_again(self, descriptor: int, library: Callable[..., Any]) -> None:
        fake = library(FakeLibrary(errno.EINTR, errno.EINTR))

        preallocate(descriptor, 100)

        assert len(fake.calls) == 3

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF], ids=errno.errorcode.get)
    def test_a_full_disk_is_noticed_before_the_work(
        self, descriptor: int, library: Callable[..., Any], code: int
    ) -> None:
        """It is not mistaken for a file system that can't reserve blocks: the file stays as it was."""
        library(FakeLibrary(code))

        with pytest.raises(OSError, match=os.strerror(code)) as raised:
            preallocate(descriptor, 100)

        assert raised.value.errno == code
        assert content(descriptor) == b""

    def test_a_real_failure_has_the_code_of_the_system(self) -> None:
        with pytest.raises(OSError, match="Bad file descriptor") as raised:
            preallocate(2**20 + 3, 100)

        assert raised.value.errno == errno.EBADF
