"""The errors for files that can't be read although their headers were, and what helps."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CatalogError, Fault

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.catalog import StoredTensor

__all__ = ["file_changed", "read_error"]

_CAUSES = {
    errno.EIO: "Check the disk that the file is on, or get the file again.",
    errno.ENOMEM: "Raise the limit of address space of this process (`ulimit -v`), or of its memory.",
    errno.EMFILE: "Raise the limit of open files of this process (`ulimit -n`).",
    errno.ENFILE: "Too many files are open on this machine: end other programs, or raise the system's limit.",
}
"""What helps when a file is as it was, but can't be read or mapped."""


def read_error(tensor: StoredTensor, error: OSError) -> CatalogError:
    """Return the error for a file that can't be read or mapped.

    It changed, a limit of this process is reached, or the disk fails.
    """
    code = getattr(error, "errno", None)
    if code not in _CAUSES:
        return file_changed(tensor, str(error))
    return CatalogError(
        Fault(
            where=f"{tensor.file}: {tensor.name}",
            expected=f"that {tensor.spec.nbytes} bytes at byte {tensor.offset} can be read",
            found=str(error.args[1]),
            remedy=_CAUSES[code],
        )
    )


def file_changed(tensor: StoredTensor, found: str) -> CatalogError:
    """Return the error for a file that no longer matches the header that was read from it."""
    return CatalogError(
        Fault(
            where=f"{tensor.file}: {tensor.name}",
            expected=f"{tensor.spec.nbytes} bytes at byte {tensor.offset}, as when the header was read",
            found=found,
            remedy="The file changed or vanished while it was in use: wait until it is complete and start again.",
        )
    )
