"""Warnings about what an engine computes wrongly, or less exactly, on some GPUs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.engine.platform import sms_in_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.engine.platform import Platform
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["bias_warnings", "requantization_warnings"]


def bias_warnings(modules: Iterable[ModulePlan], platform: Platform | None) -> Iterator[str]:
    """Yield a warning for each mode whose Linears drop a bias on an SM that the plan may be run on.

    If the SM is known, `engine/holdings.py` rules such modes out, and there is nothing to warn of. Nor is there where
    the release has no Linear of the mode on the SM: it stops there before it computes anything.
    """
    if platform is None or platform.sm is not None:
        return
    affected: Counter[tuple[QuantAlgo, int]] = Counter()
    for module in modules:
        algo = module.layer.quant_algo if module.layer and not module.experts else None
        drops = _sms_without_bias(algo, platform) if algo else ()
        if algo and drops and any(delivery.name == f"{module.name}.bias" for delivery in module.deliveries):
            affected.update((algo, sm) for sm in drops)
    for (algo, sm), count in affected.items():
        first = MODES_BY_ALGO[algo].bias_on[sm]
        yield (
            f"{algo} Linears of {platform.release.name} drop their bias on SM{sm} GPUs ({count} modules): "
            f"plan for such GPUs with --sm {sm}, or serve with {first.name}"
        )


def _sms_without_bias(algo: QuantAlgo, platform: Platform) -> tuple[int, ...]:
    """Return the SMs on which a release has a Linear of this mode that drops its bias."""
    mode, release = MODES_BY_ALGO[algo], platform.release
    runs = {sm for sm in mode.bias_on if sm not in mode.linear_on or release.has(mode.linear_on[sm])}
    return tuple(sm for sm, first in mode.bias_on.items() if sm in runs and not release.has(first))


def requantization_warnings(modules: Iterable[ModulePlan], platform: Platform | None) -> Iterator[str]:
    """Yield a warning for each mode whose weights the engine quantizes again on an SM that the plan may be run on."""
    if platform is None:
        return
    counts = Counter(
        module.layer.quant_algo
        for module in modules
        if module.layer is not None and not (module.form and module.form.powers_of_two)
    )
    for algo, count in counts.items():
        mode = MODES_BY_ALGO.get(algo)
        requantized_on = mode.requantized_on if mode is not None else {}
        sms = sorted(sm for sm, first in requantized_on.items() if platform.release.has(first))
        if platform.sm is not None:
            sms = [sm for sm in sms if sm == platform.sm]
        if sms:
            yield (
                f"{algo} on {sms_in_words(sms)}: {platform.release.name} rounds scales up to powers of two while it "
                f"loads weights for DeepGEMM, and quantizes the weights again ({count} modules); --to dense keeps them "
                "as they are"
            )
