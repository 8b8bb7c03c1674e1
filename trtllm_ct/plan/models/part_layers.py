"""How many layers the parts of a model have by its config.json: towers, and the two stacks of an encoder-decoder.

The number of layers of a text model is in `sizes.py`. Source: transformers 5.23 `models/*/configuration_*.py`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

__all__ = ["PartLayers", "lost_part_layers", "part_layers"]


class PartLayers(NamedTuple):
    """The number of layers of one part of a model, whose name has one of these words as a component."""

    words: frozenset[str]
    number: int


# The words in the name of a tower, and the keys that have its configuration.
_TOWERS = (
    (frozenset({"visual", "vision_tower", "vision_model", "vision_encoder"}), ("vision_config", "vit_config")),
    (frozenset({"audio_tower", "audio_model", "audio_encoder"}), ("audio_config",)),
)
_TOWER_COUNTS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "n_layers")
_ENCODER = frozenset({"encoder"})
_DECODER = frozenset({"decoder"})
_ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers")
# Towers in stages have a number of layers for each of them.
_STAGES = "depths"
_OUTER_LAYER = re.compile(r"((?:.*?\.)?(?:layers|layer|h|blocks|block))\.(\d+)\.")


def part_layers(config: Mapping[str, Any]) -> tuple[PartLayers, ...]:
    """Return the numbers of layers that a parsed config.json states for the parts of a model; none for a text model."""
    stated = [(words, _count(_inner(config, keys), _TOWER_COUNTS)) for words, keys in _TOWERS]
    if config.get("is_encoder_decoder"):
        stated.append((_ENCODER, _count(_inner(config, ("encoder",)) or config, _ENCODER_COUNTS)))
        stated.append((_DECODER, _count(_inner(config, ("decoder",)) or config, _DECODER_COUNTS)))
    return tuple(PartLayers(words, count) for words, count in stated if count)


def lost_part_layers(names: Iterable[str], parts: Collection[PartLayers]) -> Iterator[str]:
    """Yield the layers of parts that config.json counts and that no tensor is in, as `STACK.NUMBER`.

    `names` are those of all tensors. A part without any layers is not stored at all.
    """
    if not parts:
        return
    stacks: dict[str, set[int]] = {}
    for name in names:
        layer = _OUTER_LAYER.match(name)
        if layer is not None:
            stacks.setdefault(layer[1], set()).add(int(layer[2]))
    for part in parts:
        inside = {stack: numbers for stack, numbers in stacks.items() if _is_in(stack, part.words)}
        expected = set(range(part.number))
        if inside and not any(expected <= numbers for numbers in inside.values()):
            largest = max(inside, key=lambda stack: len(inside[stack]))
            yield from (f"{largest}.{number}" for number in sorted(expected - inside[largest]))


def _is_in(stack: str, words: frozenset[str]) -> bool:
    """Whether a stack belongs to a part; the first component that names either stack of an encoder-decoder counts."""
    components = stack.split(".")
    if words in {_ENCODER, _DECODER}:
        return next((name for name in components if name in _ENCODER | _DECODER), "") in words
    return not words.isdisjoint(components)


def _inner(config: Mapping[str, Any], keys: Iterable[str]) -> Mapping[str, Any]:
    """Return the configuration under the first of these keys that has one; empty without any."""
    return next((config[key] for key in keys if isinstance(config.get(key), dict)), {})


def _count(config: Mapping[str, Any], keys: Iterable[str]) -> int:
    """Return the number under the first of these keys that has a positive one; 0 if none has."""
    if _STAGES in config:
        return 0
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)
