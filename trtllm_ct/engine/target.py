"""Targets: the places where weights are delivered, with the capabilities that each of them is planned for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.releases import DEFAULT_ENGINE, ENGINES, Capabilities

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DENSE", "MODELOPT", "REFERENCE", "TARGETS", "TENSORRT_LLM", "Target", "target_named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A place where weights are delivered, with the capabilities that it is planned for.

    `serves` says in a few words who reads the result. `newer` are capabilities that a later release adds, named in
    reasons. `repeats_kv_scales` says whether scales of K and V are delivered once for each rank where ranks outnumber
    heads: engines repeat the codes, and of scales those of NVFP4 alone.
    """

    name: str
    serves: str
    capabilities: Capabilities
    newer: tuple[Capabilities, ...] = ()
    repeats_kv_scales: bool = False

    @property
    def holds_codes(self) -> bool:
        """Whether anything is delivered quantized."""
        return bool(self.capabilities.linear)

    def algos(self, *, expert: bool) -> frozenset[QuantAlgo]:
        """The modes that a module may be delivered in."""
        return self.capabilities.experts if expert else self.capabilities.linear


def _newer(engine: str) -> tuple[Capabilities, ...]:
    """The sets that come after one."""
    names = list(ENGINES)
    return tuple(ENGINES[later] for later in names[names.index(engine) + 1 :])


def _with_additive_zeros(stock: Capabilities) -> Capabilities:
    """A set with the Linear for asymmetric int4 that this package gives the engine where it has none."""
    return replace(stock, linear=stock.linear | {QuantAlgo.W4A16_GPTQ})


_NOTHING = Capabilities(name="plain", source="plain weights need no capability")
_NEWEST = list(ENGINES.values())[-1]
_EVERYTHING = Capabilities(
    name="reference",
    source="trtllm_ct.reference.linear_layouts: LAYOUTS",
    linear=_NEWEST.linear | {QuantAlgo.W4A16_GPTQ},
    experts=_NEWEST.experts,
    kv_cache=_NEWEST.kv_cache,
    kv_cache_alone=True,
)

MODELOPT = Target(
    name="modelopt",
    serves="stock TensorRT-LLM, PyTorch backend, without a plug-in",
    capabilities=ENGINES[DEFAULT_ENGINE],
    newer=_newer(DEFAULT_ENGINE),
)
TENSORRT_LLM = Target(
    name="tensorrt_llm",
    serves="TensorRT-LLM, PyTorch backend, loaded by this package",
    capabilities=_with_additive_zeros(ENGINES[DEFAULT_ENGINE]),
    newer=tuple(map(_with_additive_zeros, _newer(DEFAULT_ENGINE))),
    repeats_kv_scales=True,
)
DENSE = Target(name="dense", serves="anything that reads plain Hugging Face weights", capabilities=_NOTHING)
REFERENCE = Target(name="reference", serves="the CPU reference engine of this package", capabilities=_EVERYTHING)

TARGETS: Mapping[str, Target] = {target.name: target for target in (MODELOPT, TENSORRT_LLM, DENSE, REFERENCE)}


def target_named(name: str, engine: str = DEFAULT_ENGINE, *, additive_zeros: bool = True) -> Target:
    """The entry of `TARGETS`; those for TensorRT-LLM with the capability set `engine` of `ENGINES`.

    `additive_zeros` says whether target `tensorrt_llm` may have a Linear for asymmetric int4 (`W4A16_GPTQ`).
    Raises `UsageError` that lists the names.
    """
    _require("target", name, TARGETS)
    _require("--engine", engine, ENGINES)
    target = TARGETS[name]
    if target not in (MODELOPT, TENSORRT_LLM):
        return target
    sets = (ENGINES[engine], *_newer(engine))
    if target is TENSORRT_LLM and additive_zeros:
        sets = tuple(map(_with_additive_zeros, sets))
    return replace(target, capabilities=sets[0], newer=sets[1:])


def _require(where: str, name: str, names: Mapping[str, object]) -> None:
    if name not in names:
        raise UsageError(Fault(where=where, expected=" or ".join(names), found=repr(name), remedy="Name one of these."))
