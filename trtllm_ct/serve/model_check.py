"""Checks that the model that the engine built matches the plan, before weights are loaded into it.

The engine decides by module names what it quantizes and what it loads, and silently ignores a name that matches
nothing. So each Linear of the plan is looked up in the model in the same way as the engine does it, and plan and model
must agree on its mode. And each parameter of the model must be in the plan: what no tensor is copied to keeps whatever
its memory held.
This module does not import the engine. It needs `named_modules` of a model and `mapping` of a weight mapper.
Sources: TensorRT-LLM `_torch/models/modeling_utils.py` (apply_layerwise_quant_config, _load_weights_impl_v2),
`modeling_qwen3vl.py` and other wrappers (`self.llm`), `_torch/modules/fused_moe/configurable_moe.py` (`self.backend`).
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import FaultCollector, LoadError
from trtllm_ct.plan.models.places import name_variants

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["NO_MODEL_CHECK", "check_model"]

NO_MODEL_CHECK = "TRTLLM_CT_NO_MODEL_CHECK"
"""Environment variable: with 1, `check_model` logs warnings instead of raising."""

_GENERIC_LOOP = "modeling_utils"
_TEXT_MODEL = "llm"
_WRAPPED = "backend"
_NO_MODES = frozenset({"None", "NO_QUANT", "MIXED_PRECISION"})
# The local names of parameters that checkpoints have. Others, such as workspaces, the engine fills itself.
_STORED = frozenset(
    {"weight", "bias", "A_log", "D", "dt_bias", "sinks", "e_score_correction_bias", "layer_scalar", "per_expert_scale"}
)
_REMEDY = (
    "The text would be wrong; convert the checkpoint instead (trtllm-ct convert --to dense), or set "
    f"{NO_MODEL_CHECK}=1 when you know that this model loads these modules by itself."
)

logger = logging.getLogger("trtllm_ct")


def check_model(
    model: Any, fused: Mapping[str, Sequence[str]], plan: Plan, inner: Sequence[tuple[str, str]] = ()
) -> None:
    """Check a rank's plan against the model that the engine built for that rank.

    `fused` maps the last component of a fused Linear's name to the names of its parts, as the engine's weight mapper
    has it; for instance `qkv_proj` to `q_proj`, `k_proj` and `v_proj`. `inner` are the pairs of `ClassRow.inner`.
    Raises `LoadError` with a fault for every Linear whose mode differs from the plan, for every quantized Linear that
    the model doesn't have, and for every parameter of the model that nothing in the plan is copied to. If the model
    class has its own loading loop, it may hold a missing Linear under another name; missing Linears are then only
    logged, and parameters are not looked at. `TRTLLM_CT_NO_MODEL_CHECK=1` turns all these errors into warnings.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    fused_of = {part: fused_leaf for fused_leaf, parts in fused.items() for part in parts}
    faults, absent = FaultCollector(), FaultCollector()
    for module in plan.modules:
        if module.class_name != "Linear" or not module.deliveries:
            continue
        name = _engine_name(modules, module, fused_of, inner)
        if name is None:
            _add_absent(module, absent)
        else:
            _compare_modes(module, name, modules[name], faults)
    has_own_loop = not type(model).load_weights.__module__.endswith(_GENERIC_LOOP)
    if has_own_loop:
        _log(absent)
    else:
        faults.faults += absent.faults
        _refuse_unwritten(modules, _written(modules, plan, fused_of, inner), faults)
    if os.environ.get(NO_MODEL_CHECK, "") in {"", "0"}:
        faults.raise_if_any(LoadError)
    _log(faults)


def _engine_name(
    modules: Mapping[str, Any], module: ModulePlan, fused_of: Mapping[str, str], inner: Sequence[tuple[str, str]]
) -> str | None:
    """Return the name of the engine's module that loads a Linear; None if the model has no such module.

    This is the module's own name, that of the module of all experts for a routed expert, the one that `inner` gives it,
    or that of the fused Linear that it is a part of: by the engine's mapper or, for Linears that a model class joins
    itself, by the plan. A class that wraps a text model has it as `llm`, whatever its prefix in the files is. Of
    experts that are wrapped (ConfigurableMoE), the child `backend` has the weights.
    """
    own = (module.name, *(re.sub(pattern, replacement, module.name) for pattern, replacement in inner))
    parts = (name.rpartition(".") for name in own)
    fused = (*(f"{prefix}.{fused_of.get(leaf, leaf)}" for prefix, _, leaf in parts), module.fused_linear or module.name)
    unwrapped = (module.engine_name, *own[1:], *fused)
    in_text_model = (f"{_TEXT_MODEL}.{variant}" for name in unwrapped for variant in name_variants(name))
    built = next((name for name in (*unwrapped, *in_text_model) if name in modules), None)
    return f"{built}.{_WRAPPED}" if f"{built}.{_WRAPPED}" in modules else built


def _add_absent(module: ModulePlan, absent: FaultCollector) -> None:
    if module.layer is not None:
        absent.add(
            where=module.name,
            expected=f"a module of TensorRT-LLM's model that loads it ({module.delivered_mode})",
            found="none of that name, so that its tensors would stay unread",
            remedy=_REMEDY,
        )


def _written(
    modules: Mapping[str, Any], plan: Plan, fused_of: Mapping[str, str], inner: Sequence[tuple[str, str]]
) -> dict[str, set[str]]:
    """Return the local names of the tensors that the engine copies to each of its modules, by the module's name.

    A class may hold a tensor in a module of the tensor's whole name, whose parameter has the last part of it too:
    `_EScoreCorrectionBiasHolder` of MiniMax-M2 and M3 (`modeling_minimaxm3.py`, pull request 11119).
    """
    written: dict[str, set[str]] = {}
    for module in plan.modules:
        name = _engine_name(modules, module, fused_of, inner) if module.deliveries else None
        if name is not None:
            for local in {delivery.name.rpartition(".")[2] for delivery in module.deliveries}:
                holder = f"{name}.{local}"
                written.setdefault(holder if holder in modules else name, set()).add(local)
    return written


def _refuse_unwritten(modules: Mapping[str, Any], written: Mapping[str, set[str]], faults: FaultCollector) -> None:
    """Add a fault for each parameter of the engine's model that no tensor of the plan is copied to.

    A parameter that two modules share needs one tensor. Scales that a Linear derives, and parameters under names that
    no checkpoint has, are the engine's own.
    """
    known = {
        id(parameter)
        for name, locals_ in written.items()
        for local, parameter in _parameters(modules[name])
        if local in locals_
    }
    for name, module in modules.items():
        if hasattr(module, "quant_config") and name in written:
            missing = {local for local, _ in _parameters(module) if local == "bias"} - written[name]
        else:
            missing = {local for local, _ in _parameters(module) if local in _STORED} - written.get(name, set())
        for local, parameter in _parameters(module):
            if local in missing and id(parameter) not in known and parameter.numel():
                faults.add(
                    where=f"{name}.{local}",
                    expected="a tensor of the checkpoint for each parameter that TensorRT-LLM's model has",
                    found="none, so that it would keep whatever its memory held",
                    remedy=_REMEDY,
                )


def _parameters(module: Any) -> tuple[tuple[str, Any], ...]:
    """Return the parameters of a module itself by local name; none for what is no module of torch."""
    named = getattr(module, "named_parameters", None)
    return tuple(named(recurse=False, remove_duplicate=False)) if named is not None else ()


def _compare_modes(module: ModulePlan, name: str, engine_module: Any, faults: FaultCollector) -> None:
    """Add a fault if plan and engine differ in the mode of a module; skip engine modules without `quant_config`."""
    if not hasattr(engine_module, "quant_config"):
        return
    algo = str(getattr(engine_module.quant_config, "quant_algo", None))
    built = None if algo in _NO_MODES else algo
    planned = str(module.layer.quant_algo) if module.layer else None
    if built != planned:
        faults.add(
            where=module.name,
            expected=f"{planned or 'a plain Linear'}, as it is delivered",
            found=f"{built or 'a plain Linear'} in TensorRT-LLM's {name}",
            remedy=_REMEDY,
        )


def _log(faults: FaultCollector) -> None:
    for fault in faults.faults:
        logger.warning("%s", fault)
