"""Texts for messages: what strangers wrote without control characters and not endless, and numbers of bytes."""

from __future__ import annotations

__all__ = ["MAX_SHOWN", "format_bytes", "printable", "shortened"]

MAX_SHOWN = 1500
"""The most characters of one text that a message shows."""

_UNITS = ("B", "kB", "MB", "GB", "TB")


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


def format_bytes(count: float) -> str:
    """Return a number of bytes as a text such as `2.7 MB`, in decimal units, as disks and file managers do."""
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {_UNITS[-1]}"
