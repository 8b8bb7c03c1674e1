"""The few stored values that decide a mode, read before planning, so that planning itself stays pure.

Headers say almost everything. Values decide where writers store what changes nothing: zero points that are all zero,
group indices that are k // group_size; and where parts of one Linear may or may not share a scalar (NVFP4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_ct.plan.stored import ExpertSlice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.plan.stored import View

__all__ = ["NO_PROBE", "Probe", "probe_key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Values by `probe_key`: the full name of the stored tensor, and which part of it where it holds all experts.

    `scalars` are the global scales of NVFP4 (weights and inputs, divisors as stored) that parts of one Linear must
    share. `powers` tell by which powers of two the group scales of NVFP4 can be multiplied and stay exact, from the
    least to the largest, where those scalars are powers of two apart. `zero` are the zero points, of weights that their
    scheme calls symmetric, all of whose elements are zero; `trivial` the group indices that are k // group_size, or
    that were never filled. `shapes` are the numbers in the `shape` pieces of sparse tensors.
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    powers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    zero: frozenset[str] = frozenset()
    trivial: frozenset[str] = frozenset()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


NO_PROBE = Probe()
"""Nothing was read: a plan then takes what holds for all values."""


def probe_key(view: View) -> str:
    """How a probe calls a module's tensor: by its stored name, with expert and rows where those cut it out."""
    name = view.sources[0]
    if not isinstance(view, ExpertSlice):
        return name
    return f"{name}[{view.expert}]" if view.rows is None else f"{name}[{view.expert}, {view.rows[0]}:{view.rows[1]}]"
