"""What planning asks of a target: its name and what it can hold, as declared data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_ct.schemes import QuantAlgo

__all__ = ["Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A place where weights are delivered.

    `algos` are the modes whose Linear it has; a scheme that none of them holds is dequantized.
    `kv_cache_algos` are the KV-cache modes for which it takes scales.
    `serves` says in a few words who reads the result.
    """

    name: str
    serves: str
    algos: frozenset[QuantAlgo] = frozenset()
    kv_cache_algos: frozenset[str] = frozenset()
