"""Values of this package as JSON and back, by one rule for all reports and records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from trtllm_ct.base.dtypes import DType

__all__ = ["fields_form", "from_fields", "json_form", "json_object"]

_PLAIN = frozenset({str, int, bool, type(None)})

T = TypeVar("T")


def json_form(value: Any) -> Any:
    """Return a value as what `json.dumps` takes.

    A dtype becomes its torch name, a path or another enumeration a string, a tuple a list, a set a sorted list, and any
    other object what its `to_dict` returns. A number that is not finite becomes `nan`, `inf` or `-inf`, as JSON has no
    such numbers. Raises `TypeError` for any other object without `to_dict`.
    """
    kind = type(value)
    return value if kind in _PLAIN else _FORM_OF[kind](value)


def json_object(members: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the members of an object, each in its JSON form, and those of `optional` that are not empty."""
    entry = dict(members)
    if optional:
        entry |= {name: value for name, value in optional.items() if value}
    for name, value in entry.items():
        kind = type(value)
        if kind not in _PLAIN:
            entry[name] = _FORM_OF[kind](value)
    return entry


def fields_form(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name, each in its JSON form."""
    return json_object({field.name: getattr(value, field.name) for field in fields(value)})


def from_fields(kind: type[T], entry: Mapping[str, Any], **readers: Callable[[Any], Any]) -> T:
    """Return the dataclass of which `entry` is the `fields_form`.

    `readers` turn the JSON form of the fields that they are named after into their values; null stays None. Raises
    `KeyError` for a field that is missing, `TypeError` for one that is unknown, and what the readers raise.
    """
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in entry and field.default is MISSING and field.default_factory is MISSING:
            raise KeyError(field.name)
    return kind(
        **{
            name: readers[name](value) if name in readers and value is not None else value
            for name, value in entry.items()
        }
    )


def _list(value: Iterable[Any]) -> list[Any]:
    # Most lists of a report hold plain values only: shapes and names.
    return list(value) if _PLAIN.issuperset(map(type, value)) else [json_form(item) for item in value]


_FORMS: tuple[tuple[tuple[type, ...], Callable[[Any], Any]], ...] = (
    ((float,), lambda value: value if isfinite(value) else str(value)),
    ((Mapping,), lambda value: {str(key): json_form(item) for key, item in value.items()}),
    ((list, tuple), _list),
    ((set, frozenset), lambda value: sorted(json_form(item) for item in value)),
    ((DType,), lambda value: value.torch_name),
    ((Path, Enum), str),
)
"""The JSON forms of values without `to_dict`. The first entry whose types include the value's type decides."""


class _FormOfType(dict[type, Callable[[Any], Any]]):
    """The JSON form of each type, looked up once: a large model's report has millions of values of few types."""

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        form: Callable[[Any], Any] | None = getattr(kind, "to_dict", None)
        if form is None:
            form = next((form for kinds, form in _FORMS if issubclass(kind, kinds)), None)
        if form is None:
            raise TypeError(f"{kind.__name__} has no JSON form")
        self[kind] = form
        return form


_FORM_OF = _FormOfType()
