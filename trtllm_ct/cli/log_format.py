"""The format of warnings on the terminal."""

from __future__ import annotations

import logging

from trtllm_ct.base.texts import printable

__all__ = ["PrintableFormatter"]


class PrintableFormatter(logging.Formatter):
    """Writes control characters as escapes, because names in a warning come from strangers.

    A line break stays one, but no line that it begins looks like one of the program's own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return "\n  ".join(printable(line) for line in super().format(record).split("\n"))
