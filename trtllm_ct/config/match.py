"""Find the config group that a module belongs to, by exactly the rules of the compressed-tensors library.

A target or ignore entry has one of three forms (compressed-tensors 0.20 utils/match.py): `re:PATTERN`, which is matched
against the full dotted module name and anchored only at its start; a full module name; or the name of the module's
class or of one of its base classes. There is no suffix, prefix or substring matching, and names have no parameter
suffix.

When several entries match a module, names have priority over patterns, and patterns over classes. Entries of the same
form are tried in the sorted order of their strings, not in the order of the config. When two groups have the same
entry, the last group counts. `ignore` has priority over all targets.
"""

from __future__ import annotations

import re
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.errors import ConfigError, Fault
from trtllm_ct.config.patterns import Match, bounded_match

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig

__all__ = ["Claim", "Kind", "Matcher", "compile_pattern", "matches"]

_REGEX = "re:"
_LINEAR = ("Linear",)

_DIGITS = bytes.maketrans(b"0123456789", b"0000000000")
_SEES_DIGITS = re.compile(r"[0-9]|\(\?P=|\\N")
"""What an expression has that may match one digit and not another one, or asks that two parts are equal."""

_MAX_COMPARISONS = 30_000_000
"""The most comparisons of patterns with names in one configuration; it takes seconds to make them."""


def compile_pattern(pattern: str) -> Match | None:
    """Return a function that matches full module names against a `re:` pattern; None for a plain name.

    Raises `ValueError` for a regular expression that does not compile; see `bounded_match`.
    """
    if not pattern.startswith(_REGEX):
        return None
    return bounded_match(pattern.removeprefix(_REGEX))


def matches(name: str, pattern: str, class_names: Iterable[str] = _LINEAR) -> bool:
    """Whether one target or ignore entry matches the module of this name and class.

    `class_names` holds the names of the module's class and of its base classes.
    """
    match = compile_pattern(pattern)
    if match is not None:
        return match(name)
    return pattern == name or pattern in _all_classes(tuple(class_names))


@lru_cache(maxsize=1024)
def _all_classes(class_names: tuple[str, ...]) -> frozenset[str]:
    """Return the class names together with the classes that the library adds to them."""
    # Every module derives from torch.nn.Module, and the library counts vLLM's LinearBase as Linear.
    added = ("Module", "Linear") if "LinearBase" in class_names else ("Module",)
    return frozenset((*class_names, *added))


class Kind(IntEnum):
    """The form of an entry, those of higher priority first."""

    NAME = 0
    PATTERN = 1
    CLASS = 2


class Claim(NamedTuple):
    """A group that targets a module, and the form of its entry."""

    kind: Kind
    group: ConfigGroup


class _Entries:
    """The entries of `ignore`, or the targets of all groups, sorted by their form for fast look-up."""

    def __init__(self, entries: Collection[str]) -> None:
        # The library sorts by `"re:" in entry`, so a plain name with "re:" inside is tried together with the patterns.
        with_regex_mark = sorted(entry for entry in entries if _REGEX in entry)
        self.plain = frozenset(entry for entry in entries if _REGEX not in entry)
        self.patterns = [
            (entry, compile_pattern(entry) or bounded_match(re.escape(entry) + r"\Z")) for entry in with_regex_mark
        ]
        self.digits_alike = not any(_SEES_DIGITS.search(entry) for entry in with_regex_mark)
        self._comparisons = 0
        self._by_classes: dict[frozenset[str], str | None] = {}

    def best(self, module: str, classes: frozenset[str]) -> str | None:
        """Return the entry that has priority among those that match this module; None when no entry matches."""
        if module in self.plain:
            return module
        self._count_comparisons()
        for entry, match in self.patterns:
            if match(module):
                return entry
        if classes not in self._by_classes:
            self._by_classes[classes] = min(self.plain & classes, default=None)
        return self._by_classes[classes]

    def matching(self, module: str, classes: frozenset[str]) -> list[tuple[Kind, str]]:
        """Return all entries that match this module, with their forms; those of higher priority first."""
        names = [(Kind.NAME, module)] if module in self.plain else []
        self._count_comparisons()
        patterns = [(Kind.PATTERN, entry) for entry, match in self.patterns if match(module)]
        return names + patterns + [(Kind.CLASS, entry) for entry in sorted(self.plain & classes)]

    def _count_comparisons(self) -> None:
        """Count the comparisons with one module; raises `ConfigError` when there are too many."""
        self._comparisons += len(self.patterns)
        if self._comparisons > _MAX_COMPARISONS:
            raise ConfigError(
                Fault(
                    where="config.json: quantization_config",
                    expected=f"at most {_MAX_COMPARISONS} comparisons of patterns with modules",
                    found=f"more, with {len(self.patterns)} patterns, the first of them {self.patterns[0][0]}",
                    remedy="Name modules, which is fast, or use fewer patterns that match more.",
                )
            )


class Matcher:
    """The targets and the ignore list of a config, compiled once.

    An entry that names a class matches by the module's class names: pass the names of its class and base classes, as
    the framework that wrote the checkpoint names them. The default is Linear, the class of modules with quantized
    weights.
    """

    def __init__(self, config: QuantizationConfig) -> None:
        self._groups = {target: group for group in config.groups for target in group.targets}
        self._all_groups = config.groups
        self._targets = _Entries(self._groups)
        self._ignore = _Entries(config.ignore)
        self._digits_alike = self._targets.digits_alike and self._ignore.digits_alike
        self._known: dict[tuple[bytes, tuple[str, ...]], tuple[Claim, ...]] = {}

    def scheme_for(self, module: str, class_names: tuple[str, ...] = _LINEAR) -> ConfigGroup | None:
        """Return the group whose scheme applies to this module; None when it is ignored or not targeted.

        The library applies schemes only to Linears and Embeddings, and to attention modules for KV-cache quantization.
        The caller must not ask for other modules.
        """
        classes = _all_classes(class_names)
        if self._ignore.best(module, classes) is not None:
            return None
        target = self._targets.best(module, classes)
        return None if target is None else self._groups[target]

    def claims(self, module: str, class_names: tuple[str, ...] = _LINEAR) -> tuple[Claim, ...]:
        """Return every group that targets this module, the one that the library takes first; none if it is ignored.

        A group with several matching entries occurs once, with the entry of the highest priority. Where no pattern
        tells digits apart, modules whose names differ in digits only are decided once.
        """
        if not self._digits_alike or module in self._targets.plain or module in self._ignore.plain:
            return self._find_claims(module, class_names)
        # Of bytes: translating a text takes ten times as long.
        key = module.encode("utf-8", "surrogatepass").translate(_DIGITS), class_names
        claims = self._known.get(key)
        if claims is None:
            claims = self._known[key] = self._find_claims(module, class_names)
        return claims

    def _find_claims(self, module: str, class_names: tuple[str, ...]) -> tuple[Claim, ...]:
        """Return what `claims` does."""
        classes = _all_classes(class_names)
        if self._ignore.best(module, classes) is not None:
            return ()
        claims: dict[str, Claim] = {}
        for kind, target in self._targets.matching(module, classes):
            for group in reversed(self._all_groups):
                if target in group.targets:
                    claims.setdefault(group.name, Claim(kind, group))
        return tuple(claims.values())
