"""One rule by which reports and records become JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault
from trtllm_ct.base.json_form import fields_form, from_fields, json_form, json_object
from trtllm_ct.base.schemes import QuantAlgo, TensorSpec

FAULT = Fault(where="here", expected="a", found="b", remedy="c")


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (None, None),
        (True, True),
        (0, 0),
        (0.5, 0.5),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("text", "text"),
        (Path("a/b"), "a/b"),
        (QuantAlgo.FP8, "FP8"),
        (DType.BF16, "bfloat16"),
        ((1, (2, 3)), [1, [2, 3]]),
        ({"b", "a"}, ["a", "b"]),
        (MappingProxyType({QuantAlgo.FP8: (1,)}), {"FP8": [1]}),
        (TensorSpec(DType.F32, (2,)), {"dtype": "float32", "shape": [2]}),
        ([FAULT], [{"where": "here", "expected": "a", "found": "b", "remedy": "c"}]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_become_what_json_knows(value: Any, form: Any) -> None:
    assert json_form(value) == form
    assert json.loads(json.dumps(json_form(value))) == form


def test_an_enumeration_is_a_plain_string() -> None:
    assert type(json_form(QuantAlgo.FP8)) is str


def test_an_object_without_a_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        json_form([object()])


@dataclass(frozen=True)
class Report:
    path: Path
    dtype: DType | None = None


def test_a_dataclass_is_its_fields_by_name() -> None:
    assert fields_form(Report(Path("a"))) == {"path": "a", "dtype": None}


def test_empty_optional_members_are_left_out() -> None:
    assert json_object({"empty": ()}, optional={"reason": "", "by": (DType.BF16,), "note": None}) == {
        "empty": [],
        "by": ["bfloat16"],
    }


@pytest.mark.parametrize("dtype", [DType.F16, None])
def test_a_dataclass_is_read_back_from_its_fields(dtype: DType | None) -> None:
    report = Report(Path("a"), dtype)

    assert from_fields(Report, fields_form(report), path=Path, dtype=DType.from_torch) == report


@pytest.mark.parametrize(
    ("entry", "error"), [({}, KeyError), ({"path": "a", "shape": [1]}, TypeError)], ids=["missing", "unknown"]
)
def test_fields_that_are_missing_or_unknown_are_refused(entry: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="path" if error is KeyError else "shape"):
        from_fields(Report, entry)
