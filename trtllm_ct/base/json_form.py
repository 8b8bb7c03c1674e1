"""`json_form`: values of this package as JSON, by one rule for all reports and records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any

from trtllm_ct.base.dtypes import DType

__all__ = ["fields_form", "json_form", "json_object"]

_PLAIN = frozenset({str, int, bool, type(None)})


def json_form(value: Any) -> Any:
    """Return a value as what `json.dumps` takes.

    A dtype becomes its torch name, a path or another enumeration a string, a tuple a list, a set a sorted list, and any
    other object what its `to_dict` returns. A number that is not finite becomes `nan`, `inf` or `-inf`, as JSON has no
    such numbers. Raises `TypeError` for any other object without `to_dict`.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): json_form(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_form(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json_form(item) for item in value)
    if isinstance(value, DType):
        return value.torch_name
    if isinstance(value, Path | Enum):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def json_object(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of an object, each in its JSON form."""
    return {name: json_form(value) for name, value in members.items()}


def fields_form(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name, each in its JSON form."""
    return json_object({field.name: getattr(value, field.name) for field in fields(value)})
