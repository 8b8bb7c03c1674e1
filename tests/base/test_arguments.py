"""Arguments of a wrong type are refused by name, and one text is one text."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from trtllm_ct.base.arguments import FLAG, check_arguments, path_of, texts_of, whole_number
from trtllm_ct.base.errors import UsageError


@pytest.mark.parametrize(
    ("value", "texts"),
    [("a*", ("a*",)), (["a", "b"], ("a", "b")), (iter(["a"]), ("a",)), ({"a": 1}, ("a",)), ((), ()), ("", ("",))],
)
def test_one_text_counts_as_one(value: Any, texts: tuple[str, ...]) -> None:
    assert texts_of("carry", value) == texts


@pytest.mark.parametrize("value", [None, 3, b"a", [b"a"], ["a", None], Path("a"), [Path("a")]])
def test_what_is_no_text_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UsageError, match="carry: expected a text"):
        texts_of("carry", value)


@pytest.mark.parametrize("value", ["a/b", Path("a/b"), PurePosixPath("a/b")])
def test_a_path_is_text_or_a_path(value: Any) -> None:
    assert path_of("out", value) == Path("a/b")


@pytest.mark.parametrize("value", [None, 3, b"a", ["a"], {}, True])
def test_what_is_no_path_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UsageError, match="out: expected a path"):
        path_of("out", value)


def test_all_wrong_values_are_named_at_once() -> None:
    checks = {"sm": whole_number().or_none(), "strict": FLAG, "workers": whole_number()}

    check_arguments(checks, {"sm": None, "strict": False, "workers": 2, "other": object()})
    with pytest.raises(UsageError) as caught:
        check_arguments(checks, {"sm": "90", "strict": 1, "workers": True})

    assert [(fault.where, fault.found) for fault in caught.value.faults] == [
        ("sm", "'90'"),
        ("strict", "1"),
        ("workers", "True"),
    ]
