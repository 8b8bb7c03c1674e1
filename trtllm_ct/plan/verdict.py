"""`verdict`: one sentence about a plan, for people who read no further, and what costs most."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from trtllm_ct.base.texts import format_bytes
from trtllm_ct.engine.parallel import ONE_RANK

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["costliest", "family_note", "gpus_text", "largest_cost", "rank_text", "verdict"]

_NOTABLE = 1.05
"""Modules that grow by less than this factor are not named as a cost."""


def verdict(plan: Plan, problems: Collection[object] = ()) -> str:
    """Return one sentence: whether the target serves the result, how many modules keep their codes, and the bytes.

    `problems` say why the engine can't serve it; only whether there are any matters here.
    """
    modes = _modes([module for module in plan.modules if module.weight is not None])
    # A plan for `dense` has no problems of its own: these are of the target that was asked for.
    instead = "planned for target dense instead; " if plan.target == "dense" else f"{_reader(plan)} can't serve it; "
    served = instead if problems else ""
    text = f"{served}{modes}; {_bytes(plan.stored_bytes, plan.delivered_bytes)}."
    return text[0].upper() + text[1:]


def largest_cost(plan: Plan) -> str:
    """Return a sentence about the modules of `costliest`; empty if there are none."""
    modules = costliest(plan)
    if not modules:
        return ""
    what = "modules of routed experts" if modules[0].experts is not None else "modules"
    more = format_bytes(_growth(modules))
    return f"{len(modules)} dequantized {what} cost most, {more} more: {modules[0].reason}"


def costliest(plan: Plan) -> Sequence[ModulePlan]:
    """Return the dequantized modules that need the most additional bytes; empty if none need notably more.

    Modules that are dequantized for one reason are counted together.
    """
    by_reason: dict[tuple[bool, str], list[ModulePlan]] = defaultdict(list)
    for module in plan.modules:
        if module.dequantized and module.reason:
            by_reason[module.experts is not None, module.reason].append(module)
    modules = max(by_reason.values(), key=_growth, default=[])
    stored = sum([module.stored_bytes for module in modules])
    return modules if _growth(modules) >= (_NOTABLE - 1) * stored > 0 else []


def family_note(plan: Plan) -> str:
    """Return a sentence about modules whose mode has another name than the family of their scheme; empty if none."""
    pairs = {
        (str(module.native_mode), str(module.layer.quant_algo))
        for module in plan.modules
        if module.keeps_codes and module.native_mode and module.layer and module.native_mode != module.layer.quant_algo
    }
    if not pairs:
        return ""
    names = ", ".join(f"{family} as {mode}" for family, mode in sorted(pairs))
    return (
        f"{names}: the scheme family says how weights were quantized; the mode names the Linear of the engine, which "
        "holds the same values"
    )


def gpus_text(plan: Plan) -> str:
    """Return the GPUs whose kernels have every mode, and what others lack.

    Empty if all have them, if the SM was asked for, and for a target that no release reads.
    """
    return f"GPUs: {plan.gpus}" if plan.gpus and plan.gpus.lacking and plan.sm is None else ""


def rank_text(plan: Plan) -> str:
    """Return a sentence about the weights of one rank at the parallel sizes of a plan; empty for a single rank."""
    if plan.parallel == ONE_RANK:
        return ""
    names = {"tensor": "tp", "pipeline": "pp", "expert": "ep"}
    sizes = ", ".join(f"{short} {getattr(plan.parallel, name)}" for name, short in names.items())
    return f"weights of one rank at {sizes}: {format_bytes(plan.rank_bytes)}, where ranks differ the largest"


def _growth(modules: Iterable[ModulePlan]) -> int:
    """Return how many bytes modules need more in the engine than on disk."""
    return sum([module.delivered_bytes - module.stored_bytes for module in modules])


def _reader(plan: Plan) -> str:
    """Return what reads the result."""
    return f"TensorRT-LLM ({plan.engine})" if plan.target in {"modelopt", "tensorrt_llm"} else f"target {plan.target}"


def _modes(quantized: Sequence[ModulePlan]) -> str:
    """Return how many quantized modules keep their codes, and in which modes."""
    if not quantized:
        return "nothing is quantized"
    dequantized = [module for module in quantized if module.dequantized]
    rounded = [module for module in quantized if module.form is not None and not module.keeps_codes]
    kept = [module for module in quantized if module.keeps_codes]
    fates = [
        (kept, f"keep their codes in {_mode_names(kept)}"),
        (dequantized, "are dequantized"),
        (rounded, f"are rounded to {_mode_names(rounded)}"),
    ]
    (first, what), *others = [(modules, text) for modules, text in fates if modules]
    if not others:
        return f"all {len(first)} quantized modules {what}"
    rest = "".join(f", {len(modules)} {text}" for modules, text in others)
    return f"{len(first)} of {len(quantized)} quantized modules {what}{rest}"


def _mode_names(modules: Sequence[ModulePlan]) -> str:
    return ", ".join(sorted({module.delivered_mode for module in modules}))


def _bytes(stored: int, delivered: int) -> str:
    now, after = format_bytes(stored), format_bytes(delivered)
    factor = delivered / max(stored, 1)
    if now == after:
        return f"{now} stay {now}"
    return f"{now} become {after} ({factor:.2f} x)"
