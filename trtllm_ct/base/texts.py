"""Text that strangers wrote, made fit for a message: no control characters, and not endless."""

from __future__ import annotations

__all__ = ["MAX_SHOWN", "printable", "shortened"]

MAX_SHOWN = 1500
"""The most characters of one text that a message shows."""


def printable(text: str) -> str:
    r"""Return a text with everything unprintable as an escape: line breaks as `\n`, ESC as `\x1b`.

    Names of files and tensors come from strangers: a line break could forge a line of a report, and an escape sequence
    could change the terminal. Half a surrogate pair, which stands for a byte that is not UTF-8, can't be encoded.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1].replace("\\'", "'") for character in text
    )


def shortened(text: str, most: int = MAX_SHOWN) -> str:
    """Return a text of at most about `most` characters, with the number of those that were left out at its end."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most} characters more)"
