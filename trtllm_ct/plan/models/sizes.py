"""The sizes in a config.json, under the names that the rows of model classes use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_ct.plan.models.class_defaults import EXPERT_COUNTS
from trtllm_ct.plan.models.class_row import entry_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.models.class_row import ClassRow, Leaves

__all__ = ["dense_layers_of", "leaves_of", "nested_text_config", "sizes_of", "stated_sizes"]

# The keys under which the configuration of a larger model has that of its text model.
_TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
# The keys that configuration classes have used for a number.
_STATED = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_kv_heads": ("num_key_value_heads",),
    "vocabulary": ("vocab_size",),
    "experts": EXPERT_COUNTS,
}
_TAKE_ORIGINAL = "Take config.json from the model that was quantized."
# The keys that have the kind of each layer: configuration classes of such models count these.
_KINDS = ("layers_block_type", "layer_types", "hybrid_override_pattern")


def sizes_of(config: Mapping[str, Any], row: ClassRow, faults: FaultCollector) -> dict[str, int]:
    """Return the sizes that a row which lists the modules of a layer uses by name; adds a fault for each missing one.

    Sizes such as `heads` and `kv_heads` are numbers of elements (heads times head_dim), not of heads; numbers have the
    names that they have in config.json.
    """
    hidden = _size(config, "hidden_size", faults)
    heads = _size(config, "num_attention_heads", faults)
    kv_heads = _size(config, "num_key_value_heads", faults, default=heads)
    head_dim = _size(config, "head_dim", faults, default=hidden // heads if heads else 0)
    if heads and hidden and not head_dim and config.get("head_dim") is None:
        expected, found = "at least one element for each of the attention heads", f"{hidden} for {heads} heads"
        faults.add(where="config.json: hidden_size", expected=expected, found=found, remedy=_TAKE_ORIGINAL)
    intermediate = _size(config, "intermediate_size", faults)
    sizes = {
        "layers": _size(config, "num_hidden_layers", faults),
        "vocabulary": _size(config, "vocab_size", faults),
        "draft_layers": _size(config, "num_nextn_predict_layers", faults, default=0, least=0),
        "experts": 0,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "one": 1,
        "hidden": hidden,
        "intermediate": intermediate,
        "heads": heads * head_dim,
        "kv_heads": kv_heads * head_dim,
        "head_dim": head_dim,
        "qkv": (heads + 2 * kv_heads) * head_dim,
        "gate_up": 2 * intermediate,
    }
    if row.router:
        sizes |= _expert_sizes(config, intermediate, faults)
    if any("kv_lora_rank" in shape for shape in row.shapes.values()):
        sizes |= _latent_sizes(config, heads, faults)
    return sizes


def leaves_of(row: ClassRow, sizes: Mapping[str, int]) -> Leaves | None:
    """Return the first list of a row whose sizes are all given, otherwise the last one; None if it has no list."""
    for leaves in row.leaves[:-1]:
        if all(name in sizes for path in leaves.attention for name in entry_of(row.shapes, path) or ()):
            return leaves
    return row.leaves[-1] if row.leaves else None


def _expert_sizes(config: Mapping[str, Any], intermediate: int, faults: FaultCollector) -> dict[str, int]:
    """Return the number of routed experts and the intermediate sizes of routed and shared experts."""
    key = next((key for key in EXPERT_COUNTS if config.get(key) is not None), " or ".join(EXPERT_COUNTS))
    inner = _size(config, "moe_intermediate_size", faults, default=intermediate)
    shared = inner * _size(config, "n_shared_experts", faults, default=1)
    return {
        "experts": _size(config, key, faults),
        "moe_intermediate": inner,
        "shared_intermediate": _size(config, "shared_expert_intermediate_size", faults, default=shared),
    }


def _latent_sizes(config: Mapping[str, Any], heads: int, faults: FaultCollector) -> dict[str, int]:
    """Return the sizes of multi-head latent attention (DeepSeek).

    Queries and keys have a part with rotary positions (rope) and one without (nope).
    """
    keys = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    rank, nope, rope, value = (_size(config, key, faults) for key in keys)
    sizes = {
        "kv_lora_rank": rank,
        "kv_a": rank + rope,
        "kv_b": heads * (nope + value),
        "mla_queries": heads * (nope + rope),
        "mla_values": heads * value,
    }
    return sizes | ({"q_lora_rank": _size(config, "q_lora_rank", faults)} if config.get("q_lora_rank") else {})


def nested_text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of the text model inside of a larger model; None if there is none."""
    nested = (config.get(key) for key in _TEXT_KEYS)
    inner = next((value for value in nested if isinstance(value, dict) and value), None)
    return None if inner is None else nested_text_config(inner) or dict(inner)


def stated_sizes(config: Mapping[str, Any], keys: Iterable[str] = ()) -> dict[str, int]:
    """Return the sizes that a config.json states, for a model whose other sizes are in the headers.

    `keys` are further keys, whose numbers are returned under their own names. A number that is not stated is 0, or
    1 for those of heads.
    """
    numbers = {name: _stated(config, keys) for name, keys in _STATED.items()}
    kinds = (config.get(key) for key in _KINDS)
    numbers["layers"] = numbers["layers"] or next((len(value) for value in kinds if isinstance(value, (list, str))), 0)
    heads = numbers.pop("num_heads") or 1
    head_dim = _stated(config, ("head_dim",)) or _stated(config, ("hidden_size", "n_embd")) // heads or 1
    kv_heads = numbers.pop("num_kv_heads") or heads
    numbers |= {key: _stated(config, (key,)) for key in ("num_attention_heads", *keys)}
    numbers["draft_layers"] = _stated(config, ("num_nextn_predict_layers",))
    return numbers | {"head_dim": head_dim, "heads": heads * head_dim, "kv_heads": kv_heads * head_dim}


def _stated(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """Return the number under the first of these keys that has a positive one; 0 if none has."""
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)


def dense_layers_of(config: Mapping[str, Any], layers: int) -> frozenset[int]:
    """Return the numbers of the layers without routed experts in a model that has some.

    In DeepSeek these are the first `first_k_dense_replace` layers. In Qwen they are listed (`mlp_only_layers`), or only
    every n-th layer has experts (`decoder_sparse_step`).
    """
    step = config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1
    offset = 1 if config.get("decoder_sparse_step") else 0
    dense = config.get("first_k_dense_replace")
    first = dense if isinstance(dense, int) else 0
    mlp_only = config.get("mlp_only_layers")
    listed = set(mlp_only) if isinstance(mlp_only, list) else set()
    period = step if isinstance(step, int) and step > 0 else 1
    return frozenset(
        layer for layer in range(layers) if layer < first or layer in listed or (layer + offset) % period != 0
    )


def _size(
    config: Mapping[str, Any], key: str, faults: FaultCollector, *, default: int | None = None, least: int = 1
) -> int:
    """Return the size under a key, or `default` if it is absent or null; adds a fault if it is below `least`."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    faults.add(
        where=f"config.json: {key}",
        expected="a positive integer" if least else "a count",
        found=repr(value),
        remedy=_TAKE_ORIGINAL,
    )
    return 0
