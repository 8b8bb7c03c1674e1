"""The few stored values that decide a mode, read before planning, so that planning itself stays pure.

Headers say almost everything. Values decide where writers store what changes nothing: zero points that are all zero,
group indices that are k // group_size; and where parts of one Linear may or may not share a scalar (NVFP4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["NO_PROBE", "Probe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Values by the full name of the stored tensor.

    `scalars` are the global scales of NVFP4 (weights and inputs, divisors as stored). `zero` are the zero points, of
    weights that their scheme calls symmetric, all of whose elements are zero; `trivial` the group indices that are
    k // group_size.
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    zero: frozenset[str] = frozenset()
    trivial: frozenset[str] = frozenset()


NO_PROBE = Probe()
"""Nothing was read: a plan then takes what holds for all values."""
