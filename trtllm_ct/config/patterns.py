"""Match `re:` patterns of a checkpoint in bounded time.

Python's `re` may take exponential time for a pattern such as `(.+)+!$`, and can't be interrupted. So a pattern is
parsed first. If the number of ways to match it is small for every name, `re` is used, which is fast. Otherwise all ways
are followed at once: `_ends` maps the set of positions at which a part of the pattern may begin to the set of positions
at which it may end, each as the bits of an integer. A part that this doesn't cover, or too many steps, is an error that
names the pattern.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from math import comb
from time import perf_counter
from typing import Any

from trtllm_ct.base.errors import ConfigError, Fault
from trtllm_ct.base.texts import shortened

__all__ = ["MAX_PATTERNS", "bounded_match"]

_MODULES = ("re._constants", "re._parser") if sys.version_info >= (3, 11) else ("sre_constants", "sre_parse")
codes: Any = import_module(_MODULES[0])
parser: Any = import_module(_MODULES[1])

MAX_PATTERNS = 2000
"""The most patterns of one list; real lists have tens."""

_MAX_CHARACTERS = 20_000
_MAX_WAYS = 5_000_000
_FEW_WAYS = 20_000
_USUAL_LENGTH = 300
_MAX_STEPS = 200_000
_SLOW_SECONDS = 0.002
_MANY = 32
"""A repetition that may occur more often than this counts as unlimited."""

_OPTIONAL = 8
_SINGLE = frozenset({codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN})
_REPEATS = frozenset({codes.MAX_REPEAT, codes.MIN_REPEAT})
# Only Python 3.11 and later have these.
_POSSESSIVE, _ATOMIC = (getattr(codes, name, object()) for name in ("POSSESSIVE_REPEAT", "ATOMIC_GROUP"))
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_NOT_DIGIT: lambda character: not character.isdecimal(),
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_NOT_SPACE: lambda character: not character.isspace(),
    codes.CATEGORY_WORD: lambda character: character.isalnum() or character == "_",
    codes.CATEGORY_NOT_WORD: lambda character: not (character.isalnum() or character == "_"),
}

Match = Callable[[str], bool]


@lru_cache(maxsize=2 * MAX_PATTERNS)
def bounded_match(expression: str) -> Match:
    """Return a function that says whether a regular expression matches at the start of a name.

    Raises `ValueError` for an expression that does not compile or is too long. The function raises `ConfigError` that
    names the expression if matching takes too many steps.
    """
    if len(expression) > _MAX_CHARACTERS:
        raise ValueError(f"it has more than {_MAX_CHARACTERS} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = re.compile(expression)
            parsed = parser.parse(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return _Pattern(expression, compiled, parsed).matches


class _Pattern:
    """One expression; `re` matches it where that is fast, and `_ends` elsewhere."""

    def __init__(self, expression: str, compiled: re.Pattern[str], parsed: Any) -> None:
        self._expression, self._match, self._parsed = expression, compiled.match, parsed
        self._has_flags = bool(compiled.flags & ~re.UNICODE)
        self._unlimited, self._ways = _count_ways(parsed)
        self._may_be_fast = self._ways <= _MAX_WAYS
        self._fast_length = self._longest_within(_FEW_WAYS)

    def matches(self, name: str) -> bool:
        """Whether the expression matches at the start of a name."""
        if len(name) <= self._fast_length:
            return self._match(name) is not None
        if self._may_be_fast and self._ways * comb(len(name) + self._unlimited, self._unlimited) <= _MAX_WAYS:
            started = perf_counter()
            matched = self._match(name) is not None
            self._may_be_fast = perf_counter() - started < _SLOW_SECONDS or self._has_flags
            return matched
        if self._has_flags:
            raise self._refusal("flags, beside repetitions of repetitions")
        return bool(_Search(name, self._refusal).ends(self._parsed, 1))

    def _longest_within(self, ways: int) -> int:
        """Return the length of the longest names for which there are at most so many ways; -1 if there are none."""
        length = -1
        while length < _USUAL_LENGTH and self._ways * comb(length + 1 + self._unlimited, self._unlimited) <= ways:
            length += 1
        return length

    def _refusal(self, found: str) -> ConfigError:
        return ConfigError(
            Fault(
                where=f"the pattern re:{shortened(self._expression, 200)}",
                expected="an expression that can be matched in a bounded number of steps",
                found=found,
                remedy="Write the expression without repetitions of repetitions.",
            )
        )


def _count_ways(parsed: Any) -> tuple[int, int]:
    """Return how many unlimited repetitions an expression has, and how many ways there are to choose everything else.

    A repetition of something that has several ways itself has more ways than are counted: they are too many.
    """
    unlimited, ways = 0, 1
    for code, argument in parsed:
        if code in _REPEATS or code is _POSSESSIVE:
            least, most, inner = argument
            inner_unlimited, inner_ways = _count_ways(inner)
            if most > 1 and (inner_unlimited or inner_ways > 1):
                return 0, _MAX_WAYS + 1
            unlimited += inner_unlimited + (most - least > _MANY)
            ways *= inner_ways * (1 if most - least > _MANY else int(most - least) + 1)
        else:
            for inner in _inner(code, argument):
                inner_unlimited, inner_ways = _count_ways(inner)
                unlimited, ways = unlimited + inner_unlimited, ways * inner_ways
            if code is codes.BRANCH:
                ways *= len(argument[1])
        if ways > _MAX_WAYS or unlimited > _OPTIONAL:
            return 0, _MAX_WAYS + 1
    return unlimited, ways


def _inner(code: Any, argument: Any) -> Iterator[Any]:
    """Yield the expressions inside of a part of an expression; of a group of alternatives, all."""
    if code is codes.BRANCH:
        yield from argument[1]
    elif code is codes.SUBPATTERN:
        yield argument[3]
    elif code in (codes.ASSERT, codes.ASSERT_NOT):
        yield argument[1]
    elif code is _ATOMIC:
        yield argument
    elif code is codes.GROUPREF_EXISTS:
        yield from (item for item in argument[1:] if item is not None)


class _Search:
    """The search for all ways to match an expression in one name."""

    def __init__(self, name: str, refusal: Callable[[str], ConfigError]) -> None:
        self._name, self._refusal = name, refusal
        self._everywhere = (1 << (len(name) + 1)) - 1
        self._masks: dict[Any, int] = {}
        self._steps = 0

    def ends(self, parsed: Any, begins: int) -> int:
        """Return the positions at which an expression may end, given those at which it may begin."""
        for code, argument in parsed:
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise self._refusal(f"more than {_MAX_STEPS} steps for a name of {len(self._name)} characters")
            if not begins:
                return 0
            begins = self._ends_of_part(code, argument, begins)
        return begins

    def _ends_of_part(self, code: Any, argument: Any, begins: int) -> int:
        if code in _SINGLE:
            return (begins & self._mask(code, argument)) << 1
        if code is codes.SUBPATTERN and not argument[1] and not argument[2]:
            return self.ends(argument[3], begins)
        if code is codes.BRANCH:
            found = 0
            for alternative in argument[1]:
                found |= self.ends(alternative, begins)
            return found
        if code in _REPEATS:
            least, most, inner = argument
            return self._ends_of_repeat(least, most, inner, begins)
        if code is codes.AT:
            return begins & self._at(argument)
        if code in (codes.ASSERT, codes.ASSERT_NOT):
            direction, inner = argument
            return self._asserted(direction, inner, begins, wanted=code is codes.ASSERT)
        raise self._refusal(f"a part that refers to others ({code})".lower())

    def _ends_of_repeat(self, least: int, most: int, inner: Any, begins: int) -> int:
        # What matches something moves on, and what may match nothing adds positions: both end within the name.
        for _ in range(min(int(least), len(self._name) + 1)):
            after = self.ends(inner, begins)
            if after == begins:
                break
            begins = after
        found = frontier = begins
        for _ in range(min(int(most) - int(least), len(self._name) + 1)):
            frontier = self.ends(inner, frontier) & ~found
            if not frontier:
                break
            found |= frontier
        return found

    def _asserted(self, direction: int, inner: Any, begins: int, *, wanted: bool) -> int:
        """Return the positions at which an expression matches, or does not match, after or before them."""
        width = inner.getwidth()[0] if direction < 0 else 0
        found = 0
        for position in range(len(self._name) + 1):
            bit = 1 << position
            if begins & bit:
                if direction < 0:
                    matched = position >= width and bool(self.ends(inner, bit >> width) & bit)
                else:
                    matched = bool(self.ends(inner, bit))
                found |= bit if matched == wanted else 0
        return found

    def _at(self, place: Any) -> int:
        last = 1 << len(self._name)
        if place in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
            return 1
        if place is codes.AT_END_STRING:
            return last
        if place is codes.AT_END:
            return last | (last >> 1 if self._name.endswith("\n") else 0)
        words = self._mask(codes.IN, ((codes.CATEGORY, codes.CATEGORY_WORD),))
        boundaries = words ^ (words << 1)
        return boundaries if place is codes.AT_BOUNDARY else self._everywhere & ~boundaries

    def _mask(self, code: Any, argument: Any) -> int:
        """Return the positions of the characters that one part matches."""
        key = (code, tuple(argument) if isinstance(argument, list) else argument)
        if key not in self._masks:
            accepted = {character for character in set(self._name) if _accepts(code, argument, character)}
            bits = "".join("1" if character in accepted else "0" for character in reversed(self._name))
            self._masks[key] = int(f"0{bits}", 2)
        return self._masks[key]


def _accepts(code: Any, argument: Any, character: str) -> bool:
    if code is codes.ANY:
        return character != "\n"
    if code is codes.LITERAL:
        return bool(ord(character) == argument)
    if code is codes.NOT_LITERAL:
        return bool(ord(character) != argument)
    negated = bool(argument) and argument[0][0] is codes.NEGATE
    return negated != any(_in_set(kind, value, character) for kind, value in argument[int(negated) :])


def _in_set(kind: Any, value: Any, character: str) -> bool:
    if kind is codes.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    if kind is codes.CATEGORY:
        return _CATEGORIES[value](character)
    return bool(ord(character) == value)
