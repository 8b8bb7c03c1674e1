"""Texts of strangers in messages: printable and not endless."""

from __future__ import annotations

import pytest

from trtllm_ct.base.errors import MOST_FAULTS, ConfigError, Fault, FaultCollector
from trtllm_ct.base.texts import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä 漢", "plain ä 漢"),
        ("a\nb", r"a\nb"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\udcff", r"\udcff"),
        ("\u202e", r"\u202e"),
        ("\x9b1m'", r"\x9b1m'"),
        ("back\\slash\n", "back\\slash\\n"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode()


def test_every_text_of_a_fault_is_fit_for_a_message() -> None:
    fault = Fault(where="\n" * 10**6, expected="x" * 10**6, found="\x1b", remedy="a\x07")

    assert len(str(fault)) < 10_000
    assert str(fault).isprintable()


def test_very_many_faults_are_counted() -> None:
    faults = FaultCollector()
    for number in range(MOST_FAULTS + 5):
        faults.add(where=str(number), expected="a", found="b", remedy="c")

    with pytest.raises(ConfigError) as caught:
        faults.raise_if_any(ConfigError)

    assert len(caught.value.faults) == MOST_FAULTS + 1
    assert "5 more" in str(caught.value)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_text_of_a_fault_is_shown_in_quotes(name: str) -> None:
    """A tensor may have an empty name."""
    fault = Fault(where=name, expected="a tensor", found="none", remedy="Look.")

    assert fault.where == repr(name)
