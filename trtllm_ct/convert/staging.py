"""The parts of a conversion that only a source far away needs: its working folder, its room, its side files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from trtllm_ct.base.errors import CatalogError, Fault, FaultCollector, UsageError
from trtllm_ct.base.regular_files import SIDE_FILE_BYTES
from trtllm_ct.base.texts import format_bytes
from trtllm_ct.checkpoint.folder import MAX_DEPTH
from trtllm_ct.checkpoint.opening import open_source
from trtllm_ct.checkpoint.remote_side_files import fetched_side_files, left_behind
from trtllm_ct.checkpoint.side_files import MAX_SIDE_FILES
from trtllm_ct.checkpoint.staged import Staged
from trtllm_ct.convert.shards import AllThere, BoundedShards
from trtllm_ct.convert.stays import Need, smallest_room

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from trtllm_ct.checkpoint.folder import Folder
    from trtllm_ct.checkpoint.remote import RemoteFolder
    from trtllm_ct.checkpoint.side_files import SideFiles
    from trtllm_ct.checkpoint.source import Source
    from trtllm_ct.convert.job import Conversion
    from trtllm_ct.convert.shards import DownloadStarted, Shards

__all__ = ["KEEP_BYTES", "fetch_side_files", "shards_of", "side_file_names", "staged_source", "with_left_behind"]

KEEP_BYTES = 20 * 10**9
"""The bytes of downloaded files that are kept at a time, if no unit needs more and no other number is asked for.

Shards have up to 5 GB each, as most libraries write them: two that a module may lie across while it is converted, and
two that are fetched meanwhile.
"""

_TOO_LARGE = "Leave such files out of --carry, or download the checkpoint and delete them there."


def staged_source(place: str | Path, work: Folder, executor: str) -> Source:
    """Return the source that `place` names; what is far away is downloaded into the working directory `work`.

    Raises what `open_source` raises, and `UsageError` for a place far away with an executor of several machines.
    """
    source = open_source(place)
    if source.folder is not None:
        return source
    if executor == "mpi":
        raise UsageError(
            Fault(
                where="--executor",
                expected=f"threads, as the files of {source.place} are downloaded for one process",
                found=repr(executor),
                remedy="Leave it out; or download the checkpoint, such as by hf download, and give the directory.",
            )
        )
    # Every source without a folder is one.
    return Staged(cast("RemoteFolder", source), work)


def shards_of(conversion: Conversion, keep: int | None, on_download: DownloadStarted) -> Shards:
    """Return what lends source files to the units of a conversion, with `keep` bytes of downloads at a time.

    Raises `UsageError` if a unit needs more.
    """
    source = conversion.checkpoint.source
    if not isinstance(source, Staged):
        return AllThere()
    reads = [frozenset(file.name for file in conversion.files_of(unit)) for unit in conversion.units]
    sizes = {name: source.download_bytes(name) for name in conversion.source_files}
    needed = smallest_room([Need(number, files) for number, files in enumerate(reads)], sizes)
    if keep is not None and keep < needed:
        raise UsageError(
            Fault(
                where="--keep",
                expected=f"at least {needed} bytes, which the shards of one module take ({format_bytes(needed)})",
                found=f"{keep} bytes",
                remedy=f"Give --keep {needed} or more, or leave it out.",
            )
        )
    room = max(KEEP_BYTES, needed) if keep is None else keep
    return BoundedShards(source, reads, sizes, min(room, sum(sizes.values())), on_download)


def side_file_names(source: Source, carry: Collection[str]) -> list[str]:
    """Return the side files that are fetched of a source far away; none of a directory, which has them."""
    return fetched_side_files(source.remote.transport.sizes, carry) if isinstance(source, Staged) else []


def fetch_side_files(source: Source, names: Collection[str]) -> None:
    """Put side files into the folder of a source far away.

    Raises `HubError`, `OutputError`, and `CatalogError` if they are too many, too large or too deep to be copied.
    """
    if not isinstance(source, Staged):
        return
    faults = FaultCollector()
    if len(names) > MAX_SIDE_FILES:
        expected, found = f"at most {MAX_SIDE_FILES} side files", f"{len(names)} of them"
        faults.add(where=source.place, expected=expected, found=found, remedy=_TOO_LARGE)
    for name in names:
        size, depth = source.remote.size(name), name.count("/")
        if size > SIDE_FILE_BYTES:
            expected, found = f"a side file of at most {SIDE_FILE_BYTES} bytes", f"{size} bytes"
            faults.add(where=source.where(name), expected=expected, found=found, remedy=_TOO_LARGE)
        if depth >= MAX_DEPTH:  # One more is the folder of downloads.
            expected, found = f"a side file in at most {MAX_DEPTH - 1} folders in each other", f"{depth} of them"
            faults.add(where=source.where(name), expected=expected, found=found, remedy=_TOO_LARGE)
    faults.raise_if_any(CatalogError)
    for name in names:
        source.fetch_side_file(name)


def with_left_behind(source: Source, side: SideFiles, carry: Collection[str]) -> SideFiles:
    """Return side files with the entries of a source far away that were not even fetched."""
    if not isinstance(source, Staged):
        return side
    left_out = {*side.left_out, *left_behind(source.remote.transport.sizes, carry)}
    return replace(side, left_out=tuple(sorted(left_out)))
