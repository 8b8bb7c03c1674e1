"""The few stored values that decide a mode. They are read before planning, so that planning itself reads nothing.

Almost every decision follows from headers alone. Values decide in three cases: where a stored tensor may change nothing
(zero points that are all zero, group indices that equal k // group_size), where the parts of one fused Linear must
share a scalar (NVFP4), and where a head is stored that config.json ties to the embeddings.
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
    """The probed values, each under the key that `probe_key` gives for its tensor.

    `scalars` are the global scales of NVFP4, of weights and of inputs, that the parts of one fused Linear must share;
    they are divisors, as stored. `powers` are the least and the greatest power of two by which NVFP4 group scales can
    be multiplied exactly; they are probed where the global scales of the parts are powers of two apart.
    `zero` names the zero points that are all zero, of weights that their scheme calls symmetric. `trivial` names the
    group indices that equal k // group_size or that were never filled. `shapes` are the numbers in the `shape` pieces
    of sparse tensors. `head_is_table` says that a stored head has the bytes of the embeddings that it is tied to.
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    powers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    zero: frozenset[str] = frozenset()
    trivial: frozenset[str] = frozenset()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    head_is_table: bool = False


NO_PROBE = Probe()
"""The probe of a plan for which nothing was read: the plan then makes only decisions that hold for all values."""


def probe_key(view: View) -> str:
    """Return the key of a module's tensor in a probe.

    It is the full name of the stored tensor, followed by expert and rows if the view is a part of a tensor of all
    experts.
    """
    name = view.sources[0]
    if not isinstance(view, ExpertSlice):
        return name
    return f"{name}[{view.expert}]" if view.rows is None else f"{name}[{view.expert}, {view.rows[0]}:{view.rows[1]}]"
