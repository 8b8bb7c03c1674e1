"""Of which kind each layer of a model is, by its config.json.

Configurations describe layers that differ in three ways: a list with an entry for each layer (`layer_types`), a list of
the numbers of some layers (`mlp_only_layers`), or the number of layers at one end (`first_k_dense_replace`). Only keys
that are known to do so are read: any other list or text may have as many entries as the model has layers.
Source: transformers 5.23 `models/*/configuration_*.py`, and where it is named the class in the model's repository.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

__all__ = ["layer_kinds"]

# An entry for each layer. A text has a letter for each: `hybrid_override_pattern` of Nemotron-H.
_EACH = frozenset(
    {
        "layer_types",
        "mlp_layer_types",
        "layers_block_type",
        "hybrid_override_pattern",
        "indexer_types",
        "attention_layers",
        "attn_layers",
        "kv_source_layers",
        "compress_ratios",
        "num_attention_heads_per_layer",
        "num_key_value_heads_per_layer",
        # Sizes that may differ from layer to layer (Gemma 3n, OpenELM).
        "intermediate_size",
        "moe_intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "num_query_heads",
        "num_kv_heads",
        "ffn_multipliers",
        # MiniMax-Text-01, Nemotron-NAS (DeciLM), MiMo and Step in their repositories.
        "attn_type_list",
        "block_configs",
        "moe_layer_freq",
        "hybrid_layer_pattern",
    }
)
# The numbers of the layers that are unlike the others.
_SOME = frozenset(
    {
        "mlp_only_layers",
        "cross_attention_layers",
        "hybrid_layer_ids",
        "full_attn_idxs",
        "attn_layer_indices",
        "moe_layers",
        "ple_layer_ids",
        "local_layer_ids",
        "fullatt_block_indexes",
        "global_attn_indexes",
    }
)
# The layers at the beginning or the end that are unlike the others.
_FIRST = ("first_k_dense_replace", "num_dense_layers", "num_hash_layers", "moe_layer_start_index")
_LAST = ("num_kv_shared_layers",)


def layer_kinds(config: Mapping[str, Any], layers: int) -> tuple[Hashable, ...]:
    """Return the kind of each layer, given the configuration of the text model; equal if it says nothing of layers."""
    marks = list(_marks(config, layers))
    return tuple(tuple(mark[layer] for mark in marks) for layer in range(layers))


def _marks(config: Mapping[str, Any], layers: int) -> Iterator[list[Hashable]]:
    """Yield what each key that describes layers says of each of them."""
    for key, value in config.items():
        if key in _EACH and isinstance(value, (list, tuple, str)) and len(value) == layers:
            yield [repr(entry) for entry in value]
        elif key in _SOME and isinstance(value, list):
            yield [layer in value for layer in range(layers)]
        elif key in _FIRST and isinstance(value, int):
            yield [layer < value for layer in range(layers)]
        elif key in _LAST and isinstance(value, int):
            yield [layer >= layers - value for layer in range(layers)]
