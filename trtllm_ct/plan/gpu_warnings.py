"""Warnings about what an engine computes wrongly on some GPUs, for plans that don't know the GPU."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from trtllm_ct.engine.modes import MODES_BY_ALGO

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.engine.platform import Platform
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["bias_warnings"]


def bias_warnings(modules: Iterable[ModulePlan], platform: Platform | None) -> Iterator[str]:
    """Yield a warning for each mode whose Linears drop a bias on an SM that the plan may be run on.

    If the SM is known, `engine/holdings.py` rules such modes out, and there is nothing to warn of.
    """
    if platform is None or platform.sm is not None:
        return
    affected: Counter[tuple[QuantAlgo, int]] = Counter()
    for module in modules:
        algo = module.layer.quant_algo if module.layer and not module.experts else None
        late = MODES_BY_ALGO[algo].bias_on if algo else {}
        if algo and late and any(delivery.name == f"{module.name}.bias" for delivery in module.deliveries):
            affected.update((algo, sm) for sm, first in late.items() if not platform.release.has(first))
    for (algo, sm), count in affected.items():
        first = MODES_BY_ALGO[algo].bias_on[sm]
        yield (
            f"{algo} Linears of {platform.release.name} drop their bias on SM{sm} GPUs ({count} modules): "
            f"plan for such GPUs with --sm {sm}, or serve with {first.name}"
        )
