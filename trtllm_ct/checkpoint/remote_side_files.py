"""Which side files of a checkpoint far away are fetched, by their names and sizes alone.

What is fetched is then copied, or not, by the code for directories (`side_files.py`), which looks into files. It sees
what a directory has of the files that matter to it: those that may be copied, and the configurations and code of the
top, since a configuration may name code. `left_behind` are the other entries that a report on a directory would name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.regular_files import CODE_BYTES, CONFIGURATION_BYTES
from trtllm_ct.checkpoint.remote_code import CONFIGURATIONS
from trtllm_ct.checkpoint.side_patterns import CARRIED, is_code, is_excluded, is_known, matches_any, may_hold

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = ["fetched_side_files", "left_behind"]


def fetched_side_files(sizes: Mapping[str, int], carry: Collection[str]) -> list[str]:
    """Return the files that may be copied, or decide what is; those that are too large to be copied are among them."""
    return sorted(name for name, nbytes in sizes.items() if _is_fetched(name, nbytes, carry))


def left_behind(sizes: Mapping[str, int], carry: Collection[str]) -> set[str]:
    """Return the entries that are not fetched and that a user may miss; a folder ends in a slash."""
    others = (name for name, nbytes in sizes.items() if not _is_fetched(name, nbytes, carry))
    return {entry for name in others for entry in _reported(name, carry)}


def _is_fetched(name: str, nbytes: int, carry: Collection[str]) -> bool:
    if not name.isprintable():  # Not all such texts can be names of files here.
        return False
    if name in CONFIGURATIONS:
        return nbytes <= CONFIGURATION_BYTES or _is_wanted(name, carry)
    if "/" not in name and name.endswith(".py"):
        return nbytes <= CODE_BYTES or _is_wanted(name, carry)
    return _is_wanted(name, carry)


def _is_wanted(name: str, carry: Collection[str]) -> bool:
    if any(is_excluded(place, carry) for place in _places(name)):
        return False
    return (is_known(name) and not is_code(name)) or matches_any(name, carry)


def _reported(name: str, carry: Collection[str]) -> Iterator[str]:
    """Yield what is reported of a file: the first folder on the way to it that is not looked into, or the file."""
    for place in _places(name):
        if is_excluded(place, carry):
            return
        if place != name and not (may_hold(place, (*CARRIED, *carry)) or matches_any(place, carry)):
            yield f"{place}/"
            return
    yield name


def _places(name: str) -> list[str]:
    """Return the folders on the way to a file, and the file."""
    parts = name.split("/")
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
