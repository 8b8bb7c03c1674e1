"""The scales of inputs and of the KV cache that a source promises, by what they mean.

`input_scale` multiplies; `input_global_scale` of NVFP4 divides, so its reciprocal is delivered. Scales of the KV cache
have had several names; each multiplies the stored value of a key or a value. An engine has one for all heads of a
layer, so for several the largest counts: under it no head is clipped.
Source: compressed-tensors 0.5 and 0.20 `quantization/lifecycle/initialize.py`, vLLM 0.33
`model_loader/weight_utils.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import frexp, isfinite
from typing import TYPE_CHECKING

from trtllm_ct.verify.source.decoders import has_weight
from trtllm_ct.verify.source.names import OTHER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.verify.source.modules import Module, Modules

__all__ = ["KvScale", "attention_of", "cache_tensors", "input_multipliers", "kv_scales"]

# What models call their attention.
_ATTENTION = re.compile(r"(?:.*\.)?(?:self_attn|mixer)(?=\.|$)")
# Module -> local name -> the parts of the cache that the scale is for. A name further down counts less.
_HOLDERS: Mapping[str, Mapping[str, str]] = {
    "self_attn": {"k_scale": "k", "v_scale": "v", "kv_scale": "kv"},
    "mixer": {"k_scale": "k", "v_scale": "v", "kv_scale": "kv"},
    "k_proj": {"k_scale": "k", "output_scale": "k"},
    "v_proj": {"v_scale": "v", "output_scale": "v"},
    "qkv_proj": {"k_scale": "k", "v_scale": "v"},
    "k_cache": {"scale": "k"},
    "v_cache": {"scale": "v"},
}
# Layers that draft tokens, under a name of their own.
_DRAFTS = f"{OTHER}mtp"
_PREFERENCE = ("k_scale", "v_scale", "scale", "kv_scale", "output_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvScale:
    """The scale of the keys or the values of one attention module; `value` is the largest of all heads."""

    name: str
    value: float


def attention_of(module: str) -> str:
    """Return the name or the key of the attention that a module is or belongs to; empty if there is none."""
    found = _ATTENTION.match(module)
    return found[0] if found else ""


def cache_tensors(module: Module) -> frozenset[str]:
    """Return the local names of a module's tensors that belong to the KV cache."""
    return frozenset(_HOLDERS.get(module.key.rpartition(".")[2], {})) & module.tensors.keys()


def kv_scales(modules: Modules) -> dict[tuple[str, str], KvScale]:
    """Return the scales of the KV cache by (key of the attention module, `k` or `v`).

    Engines read them under the names of the projections of K and V, so a scale without such a projection promises
    nothing. Towers have no cache; draft layers have one.
    """
    best: dict[tuple[str, str], tuple[int, Module, str]] = {}
    for module in modules.by_key.values():
        attention = attention_of(module.key)
        if not attention or (module.key.startswith(OTHER) and not module.key.startswith(_DRAFTS)):
            continue
        keys = f"{attention}.k_proj"
        values = keys if modules.names.values_key(keys) else f"{attention}.v_proj"
        if not (_has_projection(modules, keys) and _has_projection(modules, values)):
            continue
        for local, letters in _HOLDERS.get(module.key.rpartition(".")[2], {}).items():
            for letter in letters if local in module.tensors else "":
                ranked = (_PREFERENCE.index(local), module, local)
                known = best.get((attention, letter), ranked)
                best[attention, letter] = min(ranked, known, key=lambda entry: entry[0])
    scales = {}
    for place, (_, module, local) in best.items():
        numbers = module.tensors[local].all_numbers()
        scales[place] = KvScale(name=f"{module.name}.{local}", value=float(numbers.max()))
    return scales


def _has_projection(modules: Modules, key: str) -> bool:
    """Whether the source has the weight of a projection."""
    module = modules.by_key.get(key)
    return module is not None and has_weight(module.tensors)


def input_multipliers(modules: Modules) -> dict[str, float]:
    """Return the value that the `input_scale` of each NVFP4 module must have, by key.

    It is 1 / `input_global_scale`, or 0 where that is 0 or infinite, as for an expert that calibration never reached.
    Modules that share scalars have the largest of all of them where the own one is 0 or a power of two below.
    """
    own: dict[str, float] = {}
    linears: dict[str, list[str]] = {}
    for key, module in modules.by_key.items():
        tensor = module.tensors.get("input_global_scale")
        if tensor is not None:
            numbers = tensor.all_numbers().flatten()
            divisor = float(numbers[module.part if numbers.size == module.parts else 0])
            own[key] = 1 / divisor if divisor and isfinite(divisor) else 0.0
            linears.setdefault(modules.names.sharing_scalars(key), []).append(key)
    return {key: _shared(own[key], [own[member] for member in keys]) for keys in linears.values() for key in keys}


def _shared(own: float, members: list[float]) -> float:
    """Return the value that one member must have: the largest, or its own if they are not powers of two apart."""
    largest = max(members)
    return largest if own == 0 or frexp(own)[0] == frexp(largest)[0] else own
