"""Files beside the weights that are copied unchanged: tokenizer, chat template, generation config, licence.

Only tokenizer_config.json is written anew where its names are known to transformers 5 alone.

Checkpoints come from strangers, and copies are published. So known kinds of files are carried (`side_patterns.py`), and
others are named and left out unless they are asked for; code is carried only where a configuration names it. Links are
followed inside of the snapshot that they belong to and refused elsewhere: a link to a private key would be copied as a
file.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CatalogError, Fault, FaultCollector
from trtllm_ct.base.regular_files import SIDE_FILE_BYTES, is_present, read_at
from trtllm_ct.checkpoint.folder import MAX_DEPTH
from trtllm_ct.checkpoint.remote_code import named_code
from trtllm_ct.checkpoint.side_patterns import (
    CARRIED,
    START_BYTES,
    TARGET_FILES,
    is_code,
    is_excluded,
    is_known,
    matches_any,
    may_hold,
    starts_as_code,
)
from trtllm_ct.checkpoint.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from trtllm_ct.checkpoint.folder import Folder

__all__ = ["MAX_SIDE_FILES", "NO_SIDE_FILES", "SideFiles", "copy_side_files", "side_bytes", "side_files"]

MAX_SIDE_FILES = 10_000
"""The most side files of a checkpoint; real ones have tens."""

_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFiles:
    """The side files of a checkpoint: relative names, sorted.

    `carried` are copied; `code` are those of them that are code, which whoever loads the copy may run. `left_out` are
    the entries that are not copied and that a user may miss; a folder ends in a slash.
    """

    carried: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


NO_SIDE_FILES = SideFiles()


def side_files(source: Path, carry: Collection[str] = ()) -> SideFiles:
    """Return which side files of `source` are carried, and which are left out.

    `carry` are patterns of further files, see `side_patterns.py`. Raises `CatalogError` with every link that leads out
    of the snapshot, nowhere or in a circle, also where the file would be left out, with folders too deep in each other,
    and with every carried file that is no regular file, has no permission to be read or is too large. Files that the
    target writes itself must not be links out of the snapshot either, because their content would arrive in the target.
    """
    snapshot = Snapshot.of(source)
    walk = _Walk(snapshot=snapshot, carry=tuple(carry), named=named_code(snapshot))
    walk.visit("", ())
    for name in TARGET_FILES:
        if is_present(snapshot.root / name):
            walk.find(name)
    walk.faults.raise_if_any(CatalogError)
    return SideFiles(
        carried=tuple(sorted(walk.carried)),
        code=tuple(sorted(name for name in walk.carried if name in walk.code)),
        left_out=tuple(sorted(walk.left_out)),
    )


def copy_side_files(source: Path, files: SideFiles, out: Folder) -> None:
    """Copy the carried files of `source`, see `side_files`, to `out`.

    Sub-directories are kept, and links are copied as files. Raises `CatalogError` with every file that was replaced in
    the meantime, and for one that can't be read to its end; an error of `out` is an `OSError`.
    """
    snapshot, faults = Snapshot.of(source), FaultCollector()
    for name in files.carried:
        with ExitStack() as stack:
            try:
                descriptor = stack.enter_context(snapshot.open(name, SIDE_FILE_BYTES))
            except OSError as error:
                _add_unusable(snapshot.root / name, f"{error.strerror or error}".lower(), faults)
                continue
            out.copy(name, _chunks(descriptor, snapshot.root / name))
    faults.raise_if_any(CatalogError)


def _chunks(descriptor: int, path: Path) -> Iterator[bytes]:
    """Yield what is left to read of a side file; raises `CatalogError` for a disk that can't deliver it."""
    while True:
        try:
            data = os.read(descriptor, _CHUNK_BYTES)
        except OSError as error:
            expected, found = "a file that can be read to its end", f"{error.strerror or error}".lower()
            remedy = "Check the disk that it is on, or get the file again."
            raise CatalogError(Fault(where=str(path), expected=expected, found=found, remedy=remedy)) from None
        if not data:
            return
        yield data


def side_bytes(source: Path, files: SideFiles) -> int:
    """Return the size of all side files that are carried, in bytes."""
    return sum((source / name).stat().st_size for name in files.carried)


@dataclass(slots=True, kw_only=True)
class _Walk:
    """Collects the side files of a snapshot; `named` is the code that a configuration names."""

    snapshot: Snapshot
    carry: tuple[str, ...]
    named: frozenset[str]
    carried: list[str] = field(default_factory=list)
    code: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)
    faults: FaultCollector = field(default_factory=FaultCollector)

    def visit(self, folder: str, path_down: tuple[Path, ...]) -> None:
        """Collect from a folder of the snapshot; `path_down` are the folders on the way to it, without links."""
        place = self.find(folder) if folder else self.snapshot.root
        if place is None:
            return
        if any(place == above or place in above.parents for above in path_down):
            self._refuse(folder, f"a link to {(self.snapshot.root / folder).readlink()}, which leads in a circle")
            return
        if len(path_down) > MAX_DEPTH:
            self._refuse(folder, f"more than {MAX_DEPTH} folders in each other")
            return
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            self._refuse(folder, f"{error.strerror}".lower())
            return
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if not is_excluded(name, self.carry):
                self._collect(name, (*path_down, place), entry)

    def _collect(self, name: str, path_down: tuple[Path, ...], entry: os.DirEntry[str]) -> None:
        if len(self.carried) > MAX_SIDE_FILES or (entry.is_symlink() and self.find(name) is None):
            return
        if entry.is_dir() and name.isprintable() and self._is_entered(name):
            self.visit(name, path_down)
        elif entry.is_dir() and is_known(name) and "." in entry.name:
            self._refuse(name, "a directory where a file is due")
        elif entry.is_dir() or not self._is_wanted(name):
            self.left_out.append(f"{name}/" if entry.is_dir() else name)
        else:
            self._carry(name)

    def _is_entered(self, folder: str) -> bool:
        """Whether a folder is searched: it may hold known files, or a pattern asks for it or for something in it."""
        return may_hold(folder, (*CARRIED, *self.carry)) or matches_any(folder, self.carry)

    def _is_wanted(self, name: str) -> bool:
        known = is_known(name) and not is_code(name)
        return name.isprintable() and (known or name in self.named or matches_any(name, self.carry))

    def _carry(self, name: str) -> None:
        """Collect a file that is wanted; one that is known by its name may hold code that nobody has asked for."""
        try:
            with self.snapshot.open(name, SIDE_FILE_BYTES) as descriptor:
                start = read_at(descriptor, START_BYTES, 0)
        except OSError as error:
            self._refuse(name, f"{error.strerror or error}".lower())
            return
        is_asked_for = name in self.named or matches_any(name, self.carry)
        if starts_as_code(start) and not is_asked_for:
            self.left_out.append(name)
            return
        if is_code(name) or starts_as_code(start):
            self.code.add(name)
        self.carried.append(name)
        if len(self.carried) > MAX_SIDE_FILES:
            self._refuse(name, f"more than {MAX_SIDE_FILES} files to copy")

    def find(self, name: str) -> Path | None:
        """Return where a file or folder of the snapshot is; adds a fault and returns None if it is outside."""
        path = self.snapshot.root / name
        link = f"a link to {path.readlink()}" if path.is_symlink() else "a link on the way to it"
        try:
            place = self.snapshot.locate(name)
        except OSError as error:
            self._refuse(name, f"{link}: {error.strerror}".lower())
            return None
        if place is None:
            self._refuse(name, f"{link}, which leads out of the checkpoint")
        return place

    def _refuse(self, name: str, found: str) -> None:
        _add_unusable(self.snapshot.root / name, found, self.faults)


def _add_unusable(path: Path, found: str, faults: FaultCollector) -> None:
    remedy = "Put the file itself there if you know what it is and want it copied, otherwise delete it."
    faults.add(where=str(path), expected="a file or a directory of the checkpoint", found=found, remedy=remedy)
