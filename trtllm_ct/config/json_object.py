"""Typed access to one JSON object of the quantization block; every fault names its JSON path.

Null is valid exactly where the default is None. A getter that reads an invalid value records a fault and returns the
default, so that one pass reports all faults of a block.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.str_enum import StrEnum
from trtllm_ct.base.texts import printable, shortened
from trtllm_ct.config.match import compile_pattern
from trtllm_ct.config.patterns import MAX_PATTERNS

__all__ = ["Findings", "JsonObject", "shown"]

Choice = TypeVar("Choice", bound=StrEnum)

_MAX_SHOWN_CHARACTERS = 80
_MAX_NAMED = 20
_CORRECT_VALUE = "Correct the value, or quantize again with a current llm-compressor."


def shown(value: object) -> str:
    """Return a value as JSON text, cut to a length that fits a message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[: _MAX_SHOWN_CHARACTERS - 3] + "..."


@dataclass(frozen=True, slots=True)
class Findings:
    """The faults and warnings of reading one block."""

    collector: FaultCollector = field(default_factory=FaultCollector)
    warnings: list[str] = field(default_factory=list)

    @property
    def fault_count(self) -> int:
        """The number of faults recorded so far."""
        return len(self.collector.faults)


@dataclass(frozen=True, slots=True)
class JsonObject:
    """One JSON object of a block.

    `raw` is its content, and `where` its path, such as `config.json: quantization_config.config_groups`. All objects of
    a block share their `findings`.
    """

    raw: Mapping[str, Any]
    where: str
    findings: Findings

    def path(self, key: str) -> str:
        """Return the JSON path of `key`."""
        return f"{self.where}.{key}"

    def fault(self, key: str, *, expected: str, remedy: str = _CORRECT_VALUE) -> None:
        """Record that the value of `key` is not what is expected."""
        found = shown(self.raw[key]) if key in self.raw else "nothing"
        self.findings.collector.add(where=self.path(key), expected=expected, found=found, remedy=remedy)

    def warn(self, message: str) -> None:
        """Record a warning about something that is accepted but may surprise the user."""
        self.findings.warnings.append(printable(shortened(f"{self.where}: {message}")))

    def integer(self, key: str, default: int | None) -> int | None:
        """Return an integer; 4.0 is read as 4, because some JSON writers have no integers."""
        value = self.raw.get(key, default)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if value is default or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        self.fault(key, expected="an integer")
        return default

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return true or false; numbers and strings are faults."""
        value = self.raw.get(key, default)
        if isinstance(value, bool):
            return value
        self.fault(key, expected="true or false")
        return default

    def choice(self, key: str, choices: type[Choice], default: Choice | None) -> Choice | None:
        """Return the member of an enumeration that has this value; upper and lower case are equal."""
        value = self.raw.get(key, default)
        if value is None and default is None:
            return None
        by_value: dict[str, Choice] = {str(choice): choice for choice in choices}
        if isinstance(value, str) and value.lower() in by_value:
            return by_value[value.lower()]
        self.fault(key, expected=f"one of {', '.join(by_value)}")
        return default

    def required_choice(self, key: str, choices: type[Choice]) -> Choice | None:
        """Return the member of an enumeration; None when a fault was recorded, as for a key that is null or absent."""
        if self.raw.get(key) is not None:
            return self.choice(key, choices, None)
        self.fault(key, expected=f"one of {', '.join(choices)}")
        return None

    def hint(self, key: str) -> str | None:
        """Return a string that loading does not depend on; a value of another type is ignored with a warning."""
        value = self.raw.get(key)
        if value is None or isinstance(value, str):
            return value
        self.warn(f"{key} is {shown(value)} and not a string; it is ignored")
        return None

    def dtype(self, key: str) -> str | None:
        """Read the torch name of a dtype, with or without the `torch.` prefix, and return it without the prefix."""
        value = self.raw.get(key)
        if value is None:
            return None
        try:
            return DType.from_torch(value).torch_name
        except KeyError:
            self.fault(key, expected="the name of a torch dtype, such as torch.float8_e4m3fn")
            return None

    def patterns(self, key: str) -> tuple[str, ...]:
        """Return a list of module names, class names and `re:` patterns.

        A single string counts as a list of one, and null as an empty list. An invalid regular expression is a fault.
        """
        value = self.raw.get(key)
        names = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            self.fault(key, expected="a list of strings")
            return ()
        if sum(name.startswith("re:") for name in names) > MAX_PATTERNS:
            self.fault(key, expected=f"at most {MAX_PATTERNS} patterns in one list")
            return ()
        for index, name in enumerate(names):
            self._check_pattern(f"{key}[{index}]", name)
        return tuple(names)

    def _check_pattern(self, key: str, name: str) -> None:
        try:
            compile_pattern(name)
        except ValueError as error:
            self.findings.collector.add(
                where=self.path(key),
                expected="a regular expression after `re:`",
                found=f"{shown(name)}, which does not compile: {error}",
                remedy="Correct the expression; it must match from the start of the full module name.",
            )

    def child(self, key: str) -> JsonObject | None:
        """Return the object under `key`; None when it is null or absent."""
        value = self.raw.get(key)
        if value is None:
            return None
        if isinstance(value, Mapping):
            return JsonObject(value, self.path(key), self.findings)
        self.fault(key, expected="a JSON object")
        return None

    def children(self, key: str) -> list[JsonObject]:
        """Return the objects of the list under `key`; an empty list when it is null or absent."""
        value = self.raw.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            self.fault(key, expected="a list of JSON objects")
            return []
        return [JsonObject(item, f"{self.path(key)}[{index}]", self.findings) for index, item in enumerate(value)]

    def warn_unknown(self, known: Iterable[str], silent: Collection[str] = ()) -> None:
        """Warn about keys that are neither in `known` nor in `silent`, the keys that never affect loading."""
        known = tuple(known)
        unknown = [key for key in self.raw if key not in known and key not in silent]
        if unknown:
            named = ", ".join(_with_suggestion(key, known) for key in unknown[:_MAX_NAMED])
            named += f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
            self.warn(f"unknown keys, which have no effect: {named}; known are {', '.join(known)}")


def _with_suggestion(key: str, known: tuple[str, ...]) -> str:
    if len(key) > _MAX_SHOWN_CHARACTERS:  # comparing takes time with the square of the length
        return shown(key)
    close = get_close_matches(key, known, n=1)
    return f"{key!r} (did you mean {close[0]!r}?)" if close else repr(key)
