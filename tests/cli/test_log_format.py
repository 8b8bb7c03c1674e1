"""Warnings name what strangers called their tensors and files."""

from __future__ import annotations

import logging

import pytest

from trtllm_ct.cli.log_format import PrintableFormatter


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layers.0.weight: 3 rows", "layers.0.weight: 3 rows"),
        ("\x1b]0;title\x07\x1b[31mred", "\\x1b]0;title\\x07\\x1b[31mred"),
        ("first\nConverted to OUT", "first\n  Converted to OUT"),
        ("caret\rback", "caret\\rback"),
        ("\udcff", "\\udcff"),
    ],
)
def test_a_name_neither_steers_the_terminal_nor_forges_a_line(text: str, shown: str) -> None:
    record = logging.LogRecord("trtllm_ct", logging.WARNING, "", 0, "%s", (text,), None)

    assert PrintableFormatter("%(message)s").format(record) == shown
