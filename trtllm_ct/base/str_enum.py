"""`StrEnum` for Python 3.10, which the engine's releases up to 1.2 run on; newer Pythons have it in `enum`."""

from __future__ import annotations

import sys

__all__ = ["StrEnum"]

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):
        """An enumeration of strings: a member prints as its value, and `auto()` is the name in lower case."""

        def __str__(self) -> str:
            return str.__str__(self)

        def __format__(self, specification: str) -> str:
            return str.__format__(self, specification)

        @staticmethod
        def _generate_next_value_(name: str, start: int, count: int, last_values: list[str]) -> str:  # noqa: ARG004
            return name.lower()
