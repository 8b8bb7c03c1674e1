"""What planning asks of a target: its name and what it can hold, as declared data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_ct.schemes import QuantAlgo

__all__ = ["Capabilities", "Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one line of an engine's releases holds; facts with their source, never guesses.

    `linear` are the modes of its Linears, `experts` those of its routed experts, `kv_cache` the KV-cache modes;
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
