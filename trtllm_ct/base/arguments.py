"""Arguments of public functions: what has a wrong type is a `UsageError` that names the argument.

Python checks no types, so a wrong one would be an error somewhere below, in words that mean nothing to the caller, or
would mean something else: a text is a sequence of its letters.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, FaultCollector, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FLAG", "HF_CONFIG", "Check", "check_arguments", "instance_of", "path_of", "texts_of", "whole_number"]

_REMEDY = "Give what is expected, or leave it out."


@dataclass(frozen=True, slots=True)
class Check:
    """What an argument has to be, in words and as a function, and what to do about another value."""

    expected: str
    accepts: Callable[[object], bool]
    remedy: str = _REMEDY

    def or_none(self) -> Check:
        """Return the check that accepts None too."""
        return Check(f"{self.expected}, or None", lambda value: value is None or self.accepts(value), self.remedy)


def instance_of(expected: str, *kinds: type, remedy: str = _REMEDY) -> Check:
    """Return the check for instances of some types."""
    return Check(expected, lambda value: isinstance(value, kinds), remedy)


def whole_number(expected: str = "a whole number", remedy: str = _REMEDY) -> Check:
    """Return the check for integers; True and False are none."""
    return Check(expected, lambda value: isinstance(value, int) and not isinstance(value, bool), remedy)


FLAG = instance_of("True or False", bool)
HF_CONFIG = instance_of("a parsed config.json, a dictionary", Mapping, remedy="Read it with json.loads.")


def check_arguments(checks: Mapping[str, Check], values: Mapping[str, object]) -> None:
    """Raise `UsageError` with a fault for each value that is not what the check of its name accepts."""
    faults = FaultCollector()
    for name, check in checks.items():
        if name in values and not check.accepts(values[name]):
            faults.add(where=name, expected=check.expected, found=repr(values[name]), remedy=check.remedy)
    faults.raise_if_any(UsageError)


def path_of(name: str, value: object) -> Path:
    """Return the path that an argument gives; raises `UsageError` for what is none, such as None."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(path, str):
        return Path(path)
    raise UsageError(Fault(where=name, expected="a path, as text or Path", found=repr(value), remedy="Give a path."))


def texts_of(name: str, value: object) -> tuple[str, ...]:
    """Return the texts that an argument gives: one, or any number of them in a list or the like.

    Raises `UsageError` for anything else.
    """
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if all(isinstance(text, str) for text in texts):
        return texts
    raise UsageError(
        Fault(
            where=name, expected="a text, or a list of them", found=repr(value), remedy="Give texts, or leave it out."
        )
    )
