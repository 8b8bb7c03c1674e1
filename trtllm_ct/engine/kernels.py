"""Whether the kernel of a mode exists on a platform, takes the model's dtype, and adds a bias there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.engine.platform import SMS, sms_in_words

if TYPE_CHECKING:
    from trtllm_ct.engine.linear_mode import LinearMode
    from trtllm_ct.engine.platform import Platform

__all__ = ["dropped_bias", "gpu_problem", "missing_kernel", "refused_dtype"]


def missing_kernel(mode: LinearMode, platform: Platform, *, expert: bool) -> str | None:
    """Return why the mode does not run on the SM, or not exactly; None if it does, or if the SM need not be known."""
    first_on = mode.experts_on if expert else mode.linear_on
    rounds_on = mode.experts_round_on if expert else mode.linear_rounds_on
    kernel = "expert kernel" if expert else "Linear"
    if platform.sm is None:
        if not mode.known_sm:
            return None
        runs_on = [sm for sm in SMS if sm not in first_on or platform.release.has(first_on[sm])]
        exact_on = [sm for sm in runs_on if sm not in rounds_on]
        if exact_on:
            unrounded = " that does not round weights" if exact_on != runs_on else ""
            return f"{mode.algo} has a{'n' * expert} {kernel}{unrounded} on {sms_in_words(exact_on)} only"
    if platform.sm is None or platform.sm in rounds_on:
        where = f" on SM{platform.sm}" if platform.sm else ""
        return f"{mode.algo} has a{'n' * expert} {kernel} that rounds weights to fp8{where}"
    first = first_on.get(platform.sm, platform.release)
    if platform.release.has(first):
        return None
    return f"{mode.algo} has no {kernel} on SM{platform.sm}" + (f" before {first.name}" if first else "")


def refused_dtype(mode: LinearMode, dtype: DType, platform: Platform, *, expert: bool) -> str | None:
    """Return why the mode doesn't compute on the activations of a model of this dtype; None if it does.

    Where the SM decides and is not known, the kernels of all SMs must take the dtype.
    """
    taken = mode.dtypes_on(platform.sm, expert=expert)
    if dtype in taken:
        return None
    names = " and ".join(sorted(other.torch_name for other in taken))
    refusing = [sm for sm in SMS if dtype not in mode.dtypes_on(sm, expert=expert)]
    where = f" on {sms_in_words(refusing)}" if len(refusing) < len(SMS) else ""
    remedy = " (--dtype bfloat16 changes it)" if DType.BF16 in taken else ""
    return f"{mode.algo} takes {names} activations only{where}, and the model's dtype is {dtype.torch_name}{remedy}"


def dropped_bias(mode: LinearMode, platform: Platform) -> str | None:
    """Return why the mode's Linear does not add its bias; None if it does.

    Where the SM decides and is not known, the mode counts as one that adds it; the plan then has a warning.
    """
    firsts = ((mode.bias_since, ""), (mode.bias_on.get(platform.sm or 0), f" on SM{platform.sm}"))
    for first, where in firsts:
        if first is not None and not platform.release.has(first):
            return f"{mode.algo} of {platform.release.name} drops the bias{where}; {first.name} adds it"
    return None


def gpu_problem(mode: LinearMode, columns: int, platform: Platform, *, dtype: DType, expert: bool, bias: bool) -> str:
    """Return why a module with `columns` (K) that is delivered in a mode can't be served on a GPU of a known SM.

    Empty if it can. `dtype` is that of the model, and `bias` says that the module has a bias.
    """
    problem = missing_kernel(mode, platform, expert=expert) or refused_dtype(mode, dtype, platform, expert=expert)
    if problem is None and bias and not expert:
        problem = dropped_bias(mode, platform)
    multiple = mode.columns_on(platform.sm)
    if problem is None and columns % multiple:
        problem = f"{mode.algo} needs in % {multiple} == 0 on SM{platform.sm}"
    return problem or ""
