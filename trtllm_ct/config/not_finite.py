"""Numbers in config.json that are not finite.

JSON has none, but Python's `json` reads and writes `NaN`, `Infinity` and `-Infinity`, reads 1e999 as infinity, and
transformers relies on that: `time_step_limit` of Mamba models has an infinite end. Release 5.23 writes it as
`{"__float__": "Infinity"}` (`configuration_utils.py: _encode_special_floats`). So they are copied under keys that this
package does not use, and named; under those that it uses they are faults (`model_values.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from trtllm_ct.base.texts import printable, shortened

__all__ = ["keys_not_finite", "not_finite_warnings"]

_KNOWN = frozenset({"time_step_limit"})
"""Keys of transformers whose values are infinite by default."""

_SPECIAL = "__float__"

_MOST_NAMED = 5


def keys_not_finite(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the paths of the numbers in a JSON object that are not finite, but those that are known to be so."""
    return tuple(".".join(path) for path in _paths(config, ()))


def not_finite_warnings(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return the warning about numbers that are copied although they are not finite; `keys` are their paths."""
    if not keys:
        return ()
    named = ", ".join(printable(shortened(key)) for key in keys[:_MOST_NAMED])
    more = f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else ""
    found = f"config.json: {named}{more}: not a finite number"
    return (f"{found}; the model may compute NaN from it, and only readers with Python's extensions of JSON read it",)


def _paths(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, float):
        if not isfinite(value):
            yield path
    elif isinstance(value, Mapping):
        if _SPECIAL in value:
            yield path
            return
        for key, inner in value.items():
            if key not in _KNOWN:
                yield from _paths(inner, (*path, str(key)))
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, float | list | Mapping):
                yield from _paths(inner, path)
