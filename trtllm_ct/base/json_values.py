"""Values of JSON: how many a text may hold, known before it is parsed, and which are finite numbers.

Python's parser needs up to 90 bytes for a value that has three in the text, such as an empty list.
"""

from __future__ import annotations

import sys

__all__ = ["CONFIGURATION_VALUES", "INDEX_VALUES", "is_finite_number", "require_few_values"]

CONFIGURATION_VALUES = 1_000_000
"""The most values of a configuration. One that lists all experts of Kimi-K2 has 280,000."""

INDEX_VALUES = 4_000_000
"""The most values of an index; one of 10^6 tensors has as many."""


def require_few_values(text: bytes, most: int) -> None:
    """Raise `ValueError` for a JSON text of more than `most` values.

    Each value but the first of a list or an object follows a comma, so commas and opening brackets are counted. Those
    in strings count too.
    """
    if len(text) <= most:  # each value has a character; counting takes as long as reading the file
        return
    count = text.count(b",") + text.count(b"[") + text.count(b"{")
    if count > most:
        raise ValueError(f"{count} values, where at most {most} are read")


def is_finite_number(value: object) -> bool:
    """Whether a value is a number that a float holds; true and false are none.

    Integers in JSON have any number of digits, and the largest of them overflow wherever a float is computed from them.
    """
    # NaN is not less than anything, and Python compares integers with floats exactly.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
