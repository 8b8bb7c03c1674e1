"""Of which kind each layer of a model is, by its config.json.

Configurations describe layers that differ in three ways: a list with an entry for each layer (`layer_types`), a list of
the numbers of some layers (`mlp_only_layers`), or the number of layers at one end (`first_k_dense_replace`). The keys
differ from class to class, so they are recognized by their values. A key that has nothing to do with layers makes the
kinds smaller at worst: fewer layers are then compared with each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

__all__ = ["layer_kinds"]

# transformers 5.23 `models/*/configuration_*.py`: the layers at the beginning or the end that are unlike the others.
_FIRST = ("first_k_dense_replace", "num_dense_layers", "num_hash_layers", "moe_layer_start_index")
_LAST = ("num_kv_shared_layers",)


def layer_kinds(config: Mapping[str, Any], layers: int) -> tuple[Hashable, ...]:
    """Return the kind of each layer, given the configuration of the text model; equal if it says nothing of layers."""
    marks = list(_marks(config, layers))
    return tuple(tuple(mark[layer] for mark in marks) for layer in range(layers))


def _marks(config: Mapping[str, Any], layers: int) -> Iterator[list[Hashable]]:
    """Yield what each key that describes layers says of each of them."""
    for key, value in config.items():
        if isinstance(value, (list, tuple, str)) and len(value) == layers and layers > 1:
            yield [repr(entry) for entry in value]
        elif isinstance(value, list) and value and not key.endswith("token_id"):
            if all(isinstance(entry, int) and 0 <= entry < layers for entry in value):
                yield [layer in value for layer in range(layers)]
        elif isinstance(value, int) and key in _FIRST:
            yield [layer < value for layer in range(layers)]
        elif isinstance(value, int) and key in _LAST:
            yield [layer >= layers - value for layer in range(layers)]
