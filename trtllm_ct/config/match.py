"""Which config group a module belongs to, by exactly the rules of the compressed-tensors library.

A target or ignore entry is one of three kinds (compressed-tensors 0.20 utils/match.py):
`re:PATTERN`, tried against the full dotted module name and anchored at its start only; a full module name;
or the name of the module's class or of one of its bases. There is no suffix, prefix or substring matching, and
names carry no parameter suffix.

When several entries match one module, names win over patterns and patterns over classes; entries of one kind are
tried in the order of their strings, not in that of the config; of two groups with the same entry the last counts.
`ignore` goes before everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig

__all__ = ["Matcher", "compile_pattern", "matches"]

_REGEX = "re:"
_LINEAR = ("Linear",)

Match = Callable[[str], object]


def compile_pattern(pattern: str) -> Match | None:
    """The test of a pattern against full module names; None for an entry that is a plain name.

    Raises `ValueError` for an expression that doesn't compile.
    """
    if not pattern.startswith(_REGEX):
        return None
    try:
        return re.compile(pattern.removeprefix(_REGEX)).match
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error


def matches(name: str, pattern: str, class_names: Iterable[str] = _LINEAR) -> bool:
    """Whether one target or ignore entry means the module of this name and class.

    `class_names` holds the names of the module's class and of its bases.
    """
    match = compile_pattern(pattern)
    if match is not None:
        return match(name) is not None
    return pattern == name or pattern in _all_classes(tuple(class_names))


@lru_cache(maxsize=1024)
def _all_classes(class_names: tuple[str, ...]) -> frozenset[str]:
    # Every module derives from torch.nn.Module, and the library counts vLLM's LinearBase as Linear.
    also = ("Module", "Linear") if "LinearBase" in class_names else ("Module",)
    return frozenset((*class_names, *also))


class _Entries:
    """The entries of `ignore`, or the targets of all groups, sorted by kind for fast look-up."""

    def __init__(self, entries: Collection[str]) -> None:
        # The library sorts by `"re:" in entry`, so a plain name that holds "re:" elsewhere waits among the patterns.
        late = sorted(entry for entry in entries if _REGEX in entry)
        self.plain = frozenset(entry for entry in entries if _REGEX not in entry)
        self.patterns = [
            (entry, compile_pattern(entry) or re.compile(re.escape(entry) + r"\Z").match) for entry in late
        ]
        self._by_classes: dict[frozenset[str], str | None] = {}

    def best(self, module: str, classes: frozenset[str]) -> str | None:
        """The entry that decides about this module, None when no entry matches."""
        if module in self.plain:
            return module
        for entry, match in self.patterns:
            if match(module) is not None:
                return entry
        if classes not in self._by_classes:
            self._by_classes[classes] = min(self.plain & classes, default=None)
        return self._by_classes[classes]


class Matcher:
    """A config's targets and ignore list, compiled once.

    A class target can only be judged with the module's class names: give the class and its bases as
    the producing framework names them. Modules of quantized weights are Linears unless known otherwise.
    """

    def __init__(self, config: QuantizationConfig) -> None:
        self._groups = {target: group for group in config.groups for target in group.targets}
        self._targets = _Entries(self._groups)
        self._ignore = _Entries(config.ignore)

    def is_ignored(self, module: str, class_names: tuple[str, ...] = _LINEAR) -> bool:
        """Whether `ignore` names this module."""
        return self._ignore.best(module, _all_classes(class_names)) is not None

    def scheme_for(self, module: str, class_names: tuple[str, ...] = _LINEAR) -> ConfigGroup | None:
        """The group whose scheme applies to this module, None when it is ignored or not targeted.

        The library applies schemes to Linears and Embeddings, and to attention modules for KV-cache quantization;
        it is the caller's part not to ask for others.
        """
        classes = _all_classes(class_names)
        if self._ignore.best(module, classes) is not None:
            return None
        target = self._targets.best(module, classes)
        return None if target is None else self._groups[target]
