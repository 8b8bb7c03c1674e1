"""Targets: the places where weights are delivered, with the capabilities that each of them is planned for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.engine.modes import LINEAR_MODES
from trtllm_ct.engine.releases import DEFAULT_ENGINE, RELEASES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.engine.releases import Release

__all__ = [
    "DENSE",
    "DIRECTORY_TARGETS",
    "ENGINES",
    "MODELOPT",
    "REFERENCE",
    "TARGETS",
    "TENSORRT_LLM",
    "Capabilities",
    "Target",
    "target_named",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one line of an engine's releases holds; facts with their source, never guesses.

    `linear` are the modes of its Linears, `experts` those of its routed experts, `kv_cache` the modes of its KV cache;
    `kv_cache_alone` says whether one of these can be had without any quantized module.
    """

    name: str
    source: str
    linear: frozenset[QuantAlgo] = frozenset()
    experts: frozenset[QuantAlgo] = frozenset()
    kv_cache: frozenset[str] = frozenset()
    kv_cache_alone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A place where weights are delivered, with the capabilities that it is planned for.

    `serves` says in a few words which program reads the result. `newer` are the capabilities of later releases, which
    reasons mention. `repeats_kv_scales` says whether scales of K and V are delivered once for each rank where ranks
    outnumber heads; engines repeat the codes, but the scales in some modes only. `directory` marks a target that
    `convert_checkpoint` writes.
    """

    name: str
    serves: str
    capabilities: Capabilities
    newer: tuple[Capabilities, ...] = ()
    repeats_kv_scales: bool = False
    directory: bool = False

    @property
    def holds_codes(self) -> bool:
        """Whether anything is delivered quantized."""
        return bool(self.capabilities.linear)

    def algos(self, *, expert: bool) -> frozenset[QuantAlgo]:
        """The modes that a module may be delivered in."""
        return self.capabilities.experts if expert else self.capabilities.linear


def _capabilities(release: Release) -> Capabilities:
    """The modes that a release or one before it introduced."""
    until = RELEASES[: RELEASES.index(release) + 1]
    return Capabilities(
        name=release.name,
        source=release.source,
        linear=frozenset(mode.algo for mode in LINEAR_MODES if mode.linear_since in until),
        experts=frozenset(mode.algo for mode in LINEAR_MODES if mode.experts_since in until),
        kv_cache=release.kv_cache,
    )


ENGINES: Mapping[str, Capabilities] = {release.name: _capabilities(release) for release in RELEASES}
"""Capability sets of stock TensorRT-LLM by name, oldest first."""

_PLUG_INS = frozenset(mode.algo for mode in LINEAR_MODES if mode.plug_in)


def _newer(engine: str) -> tuple[Capabilities, ...]:
    """The capability sets that come after one."""
    names = list(ENGINES)
    return tuple(ENGINES[later] for later in names[names.index(engine) + 1 :])


def _with_plug_ins(stock: Capabilities) -> Capabilities:
    """A set with the Linears that this package gives the engine where it has none."""
    return replace(stock, linear=stock.linear | _PLUG_INS)


_NOTHING = Capabilities(name="plain", source="plain weights need no capability")
_EVERYTHING = replace(
    _with_plug_ins(ENGINES[RELEASES[-1].name]),
    name="reference",
    source="trtllm_ct.reference.linear_layouts: LAYOUTS",
    kv_cache_alone=True,
)

MODELOPT = Target(
    name="modelopt",
    serves="stock TensorRT-LLM, PyTorch backend, without a plug-in",
    capabilities=ENGINES[DEFAULT_ENGINE],
    newer=_newer(DEFAULT_ENGINE),
    directory=True,
)
TENSORRT_LLM = Target(
    name="tensorrt_llm",
    serves="TensorRT-LLM, PyTorch backend, loaded by this package",
    capabilities=_with_plug_ins(ENGINES[DEFAULT_ENGINE]),
    newer=tuple(map(_with_plug_ins, _newer(DEFAULT_ENGINE))),
    repeats_kv_scales=True,
)
DENSE = Target(
    name="dense",
    serves="anything that reads plain Hugging Face weights",
    capabilities=_NOTHING,
    directory=True,
)
REFERENCE = Target(name="reference", serves="the CPU reference engine of this package", capabilities=_EVERYTHING)

TARGETS: Mapping[str, Target] = {target.name: target for target in (MODELOPT, TENSORRT_LLM, DENSE, REFERENCE)}
DIRECTORY_TARGETS = tuple(name for name, target in TARGETS.items() if target.directory)
"""The names of those that `convert_checkpoint` writes."""


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
        sets = tuple(map(_with_plug_ins, sets))
    return replace(target, capabilities=sets[0], newer=sets[1:])


def _require(where: str, name: str, names: Mapping[str, object]) -> None:
    if name not in names:
        raise UsageError(Fault(where=where, expected=" or ".join(names), found=repr(name), remedy="Name one of these."))
