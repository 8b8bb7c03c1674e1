"""`cache_shape`: what the KV cache of an engine holds for each token, by the K/V heads of each layer.

Attention caches the outputs of k_proj and v_proj, divided among ranks by heads. Latent attention caches one vector for
all heads, the output of kv_a_proj_with_mqa, whole on every rank. Layers of linear attention and Mamba have a state of
fixed size instead. What is not known to be one of these makes the whole cache unknown.
Source: TensorRT-LLM `_torch/pyexecutor/resource_manager.py` (`KVCacheManager.get_cache_bytes_per_token`,
`get_cache_size_per_token`), read on 2026-11-30.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.plan.engine_files.layout import stages_of
from trtllm_ct.plan.models.shared_attention import layers_of_queries_only, layers_without_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.plan.models.sites import Model, Site

__all__ = ["CacheShape", "cache_shape"]

_MATRIX = 2
_STATES = ("linear_attn", "mixer.in_proj")
"""Paths of modules that keep a state in place of a cache."""
_WITHOUT = ("mixer.up_proj", "mixer.experts", "mixer.shared_experts")
"""Paths of layers without attention, in models that call every part of a layer `mixer`."""


class _LayerCache(NamedTuple):
    """The elements that one layer caches for a token, and the heads by which ranks divide them; None if they don't."""

    elements: int
    heads: int | None = None


_NOTHING = _LayerCache(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What the caches of all layers hold for a token.

    `unknown` says why that is not known; it is empty if it is. `notes` say what is not in the numbers.
    """

    layers: tuple[_LayerCache, ...] = ()
    unknown: str = ""
    notes: tuple[str, ...] = ()

    def rank_bytes(self, itemsize: int, parallel: Parallel) -> int | None:
        """Return the bytes of a token on the rank with most of them, with elements of `itemsize` bytes.

        None if the caches are not known. Heads are repeated if there are more ranks.
        """
        if self.unknown:
            return None
        ranks = 1 if parallel.attention_dp else parallel.tensor
        stages = stages_of(len(self.layers), parallel.pipeline)
        elements = [sum(_on_rank(self.layers[layer], ranks) for layer in stage) for stage in stages]
        return max(elements, default=0) * itemsize


def _on_rank(layer: _LayerCache, ranks: int) -> int:
    if layer.heads is None:
        return layer.elements
    return layer.elements // layer.heads * -(-layer.heads // ranks)


def cache_shape(model: Model, place: tuple[str, str]) -> CacheShape:
    """Return what the caches of a model hold; `place` is what `Model.place` returns."""
    if not model.has_row or model.text.get("is_encoder_decoder"):
        return CacheShape(unknown=f"it is not known which caches the engine's class has for {model.name}")
    layers: dict[int, dict[str, Site]] = defaultdict(dict)
    in_layer = re.compile(re.escape(place[0]) + r"(?:layers|h|blocks|block)\.(\d+)\.(.+)")
    for site in model.sites(place):
        match = None if site.expert else in_layer.fullmatch(site.module)
        if match is not None:
            layers[int(match[1])][match[2]] = site
    reuse = layers_of_queries_only(model.row, model.text, model.layers)
    keys_only = layers_without_values(model.row, model.text)
    caches: list[_LayerCache] = []
    for layer in range(model.layers):
        cache = _NOTHING if layer in reuse else _cache_of(layers[layer], model, keys_are_values=layer in keys_only)
        if cache is None:
            return CacheShape(unknown=f"it is not known what layer {layer} of {model.name} caches")
        caches.append(cache)
    return CacheShape(layers=tuple(caches), notes=tuple(_notes(model, caches)))


def _cache_of(sites: Mapping[str, Site], model: Model, *, keys_are_values: bool) -> _LayerCache | None:
    """Return the cache of a layer with these modules, by their paths in it; None if it is not known."""
    if any(path.startswith("cross_attn") or ".indexer" in path or ".compressor" in path for path in sites):
        return None
    for attention in ("self_attn", "mixer"):
        keys = sites.get(f"{attention}.k_proj")
        values = sites.get(f"{attention}.v_proj", keys if keys_are_values else None)
        if keys is not None and values is not None:
            rows = [site.shape[0] for site in (keys, values) if len(site.shape) == _MATRIX]
            return _LayerCache(sum(rows), keys.heads) if len(rows) == _MATRIX and keys.heads else None
    latent = sites.get("self_attn.kv_a_proj_with_mqa")
    if latent is not None:
        return _LayerCache(latent.shape[0]) if len(latent.shape) == _MATRIX else None
    joined = sites.get("self_attn.qkv_proj")
    if joined is not None and len(joined.parts) == len("qkv"):
        return _LayerCache(sum(joined.parts[1:]), model.sizes["num_key_value_heads"])
    if any(path.startswith((*_STATES, *_WITHOUT)) for path in sites) or "mixer.gate" in sites:
        return _NOTHING
    return None


def _notes(model: Model, caches: list[_LayerCache]) -> Iterator[str]:
    """Yield what is not in the numbers."""
    without = sum(not cache.elements for cache in caches)
    if without:
        yield f"{without} of {len(caches)} layers cache nothing for a token; states of fixed size are not counted"
    for key in ("sliding_window", "attention_chunk_size"):
        window = model.text.get(key)
        if isinstance(window, int) and window > 0 and model.text.get("use_sliding_window") is not False:
            yield f"sequences of more than {window} tokens may need less, in layers that look back no further"
    if model.draft_layers:
        yield "draft layers are not counted"
