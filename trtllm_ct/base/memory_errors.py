"""`memory_errors`: memory or addresses that a process may not have, as `LimitError`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, LimitError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["memory_errors"]

_WORDS = ("allocate memory", "not enough memory", "out of memory", "can't start new thread")
"""What torch, Python and CUDA say in a `RuntimeError`; a thread needs addresses for its stack."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise `LimitError` for an allocation inside that fails."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = f"{error}" or "no memory left"
        if not isinstance(error, MemoryError) and not any(words in text.lower() for words in _WORDS):
            raise
        expected = "memory and addresses for the tensors that are worked on"
        remedy = "Raise its limits (`ulimit -v`, those of its container), or give fewer --workers and try again."
        fault = Fault(where="this process", expected=expected, found=text.partition("\n")[0], remedy=remedy)
        raise LimitError(fault) from None
