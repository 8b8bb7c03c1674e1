"""Change JSON documents and bytes at random, in ways that a parser may not expect."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

__all__ = ["mutated_bytes", "mutated_document"]

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 2**31, 2**53, 2**63, 2**64, 10**9, 10**18, -(2**63), 10**400,
    0.5, -0.0, 1e308, float("nan"), float("inf"), "", "1", "0", "\n", "\x1b[2J", "\udcff", "a" * 300, "x" * 100_000,
    "re:(.+)+!$", "re:.*", "re:[", "re:(a|a)*b$", "Linear", "group", "channel", "block", "tensor", "int", "float",
    "static", "model.layers.0.mlp.down_proj", "../x.safetensors", "F32", "BF16", "I64",
    [], {}, [[]], [None], [1, "a"], [1, 2, 3], ["re:(.+)+!$"], [-1], {"a": {}}, {"": None}, [10**9] * 3, [0] * 100,
)  # fmt: skip
"""What a value is replaced with."""


def mutated_document(document: Any, random: Random) -> Any:
    """Return a document with one to three changes: a value is replaced, retyped, dropped, repeated or wrapped."""
    document = deepcopy(document)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            return random.choice(_VALUES)
        owner, key = random.choice(places)
        random.choice(_CHANGES)(owner, key, random)
    return document


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """Return bytes with a few of them changed, removed, inserted or moved."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        place = random.randrange(len(changed) + 1)
        end = min(len(changed), place + random.choice((1, 1, 2, 8, 64)))
        match random.randrange(4):
            case 0:
                changed[place:end] = random.randbytes(end - place)
            case 1:
                del changed[place:end]
            case 2:
                changed[place:place] = random.randbytes(random.choice((1, 2, 8)))
            case _:
                changed[place:end] = random.choice((b'"', b"{", b"[", b"\\u", b"0", b"-", b"\xff", b"\0", b"9" * 30))
    return bytes(changed)


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Return every place of a document: an object with a key, or a list with an index."""
    found, pending = [], [document]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            found += [(value, key) for key in value]
            pending += value.values()
        elif isinstance(value, list):
            found += [(value, index) for index in range(len(value))]
            pending += value
    return found


def _replace(owner: Any, key: Any, random: Random) -> None:
    owner[key] = deepcopy(random.choice(_VALUES))


def _retype(owner: Any, key: Any, random: Random) -> None:
    value = owner[key]
    owner[key] = random.choice((str(value), [value], {"value": value}, value is not None, json.dumps(str(value))))


def _drop(owner: Any, key: Any, _random: Random) -> None:
    del owner[key]


def _deepen(owner: Any, key: Any, random: Random) -> None:
    for _ in range(random.choice((1, 5, 40, 200))):
        owner[key] = {"a": owner[key]} if random.random() < 0.5 else [owner[key]]


def _shift(owner: Any, key: Any, random: Random) -> None:
    if isinstance(owner[key], int) and not isinstance(owner[key], bool):
        owner[key] = random.choice((owner[key] - 1, owner[key] + 1, owner[key] * 2, owner[key] // 2, -owner[key]))
    else:
        _replace(owner, key, random)


def _exchange(owner: Any, key: Any, random: Random) -> None:
    other = random.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    owner[key], owner[other] = owner[other], owner[key]


def _rename(owner: Any, key: Any, random: Random) -> None:
    if isinstance(owner, dict):
        name = random.choice(
            ("", "x" * 1000, "a.b", str(key).upper(), f"{key}2", "\n", "\x1b]0;x", "__metadata__", "0")
        )
        owner[name] = owner.pop(key)
    else:
        owner.insert(key, deepcopy(owner[key]))


_CHANGES: tuple[Callable[[Any, Any, Random], None], ...] = (
    _replace, _replace, _retype, _drop, _deepen, _shift, _exchange, _rename,
)  # fmt: skip
