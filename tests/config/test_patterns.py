"""Patterns are matched as Python's `re` matches them, in bounded time."""

from __future__ import annotations

import re
import time
from random import Random

import pytest

from trtllm_ct.base.errors import ConfigError
from trtllm_ct.config import patterns
from trtllm_ct.config.patterns import bounded_match

NAME = "model.layers.10.self_attn.q_proj"
CATASTROPHIC = [
    "(.+)+!$", "(.*)*!$", r"(\w+\.?)+!$", "(a|a)*b$", "(a|aa)+$!", "(x+x+)+y", "((((.*)*)*)*)*!$", "(a?){30}a{30}!$",
    "a?" * 30 + "a" * 30 + "!", "(a|b|ab)*c$", ".*" * 8 + "!", "(?=(.+)+!)a", "(?:(?:a{1,50}){1,50}){1,50}!",
]  # fmt: skip


@pytest.mark.parametrize("expression", CATASTROPHIC)
@pytest.mark.parametrize("name", ["a" * 60, "x" * 60, NAME, "a" * 5000, "model.layers." * 20])
def test_no_pattern_takes_long(expression: str, name: str) -> None:
    started = time.process_time()
    try:
        matched = bounded_match(expression)(name)
    except ConfigError as error:
        assert f"re:{expression[:100]}" in str(error)  # noqa: PT017 (some of them match)
    else:
        assert isinstance(matched, bool)
    assert time.process_time() - started < 2


ATOMS = [
    "a",
    "b",
    ".",
    "[ab]",
    "[^a]",
    r"\d",
    r"\w",
    r"\W",
    r"\b",
    r"\B",
    "^",
    "$",
    "(?=a)",
    "(?!b)",
    "(?<=a)",
    "(?<!b)",
]


def some_expression(random: Random, depth: int) -> str:
    kind = random.randrange(5) if depth else 0
    if kind == 0:
        return random.choice(ATOMS)
    inner = some_expression(random, depth - 1)
    if kind == 1:
        return inner + some_expression(random, depth - 1)
    if kind == 2:
        return f"(?:{inner}|{some_expression(random, depth - 1)})"
    if kind == 3:
        return f"({inner}){random.choice(['*', '+', '?', '{2}', '{1,3}', '*?', '{2,}'])}"
    return f"({inner})"


def test_all_ways_at_once_are_the_ways_of_re(monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("_MAX_WAYS", "_FEW_WAYS"):
        monkeypatch.setattr(patterns, bound, -1)  # so that `re` is never used
    random = Random(5)
    compared = 0
    for _ in range(3000):
        expression = some_expression(random, 4)
        name = "".join(random.choice("ab1.\n") for _ in range(1 + random.randrange(6)))
        try:
            expected = re.match(expression, name) is not None
        except re.error:
            continue
        assert bounded_match.__wrapped__(expression)(name) is expected, (expression, name)
        compared += 1
    assert compared > 2000


@pytest.mark.parametrize(
    "expression", ["(?i)(A+)+b", r"(a+)+\1!", "(?s)(.+)+!$", "a" * 30_000, "(?:a|b" + "|c" * 20_000 + ")"]
)
def test_what_is_not_covered_is_an_error_that_names_the_pattern(expression: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=r"pattern|characters"):
        bounded_match(expression)("a" * 3000)


@pytest.mark.parametrize(
    "expression", [r".*layers\.\d+\.self_attn\.(q|k|v)_proj$", "(?i)MODEL.*", r"(\w)odel\.\w+", ".*"]
)
def test_usual_patterns_match_by_re(expression: str) -> None:
    assert bounded_match(expression)(NAME) is (re.match(expression, NAME) is not None)
