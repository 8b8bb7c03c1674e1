"""Enumerations of strings behave alike on every Python that this package runs on."""

from __future__ import annotations

import json
from enum import auto

from trtllm_ct.base.str_enum import StrEnum


class Colour(StrEnum):
    DARK_RED = auto()
    BLUE = "azure"


def test_a_member_is_its_value() -> None:
    assert Colour.BLUE == "azure"
    assert [str(Colour.BLUE), f"{Colour.BLUE:>6}", "".join(Colour)] == ["azure", " azure", "dark_redazure"]
    assert json.loads(json.dumps({Colour.BLUE: Colour.DARK_RED})) == {"azure": "dark_red"}


def test_auto_is_the_name_in_lower_case() -> None:
    assert Colour.DARK_RED.value == "dark_red"


def test_members_can_be_made_from_a_mapping() -> None:
    assert [*StrEnum("Size", {"S": "small"})] == ["small"]
