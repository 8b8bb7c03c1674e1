"""Whether the model that the engine built is the one that was planned: the last look before its weights are loaded.

Names decide what the engine quantizes and what it loads, and a name that matches nothing is no error there. So each
Linear of the plan is looked up in the model as the engine will do it, and the two must agree on its mode.
Nothing here imports the engine: a model is what has `named_modules`, a mapper what has `mapping`.
Source: TensorRT-LLM `_torch/models/modeling_utils.py` (apply_layerwise_quant_config, _load_weights_impl_v2).
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import FaultCollector, LoadError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["NO_MODEL_CHECK", "check_model"]

NO_MODEL_CHECK = "TRTLLM_CT_NO_MODEL_CHECK"
"""Environment variable: 1 makes warnings of what `check_model` finds."""

_GENERIC_LOOP = "modeling_utils"
_NO_MODES = frozenset({"None", "NO_QUANT", "MIXED_PRECISION"})
_REMEDY = (
    "The text would be wrong; convert the checkpoint instead (trtllm-ct convert --to dense), or set "
    f"{NO_MODEL_CHECK}=1 when you know that this model loads these modules by itself."
)

logger = logging.getLogger("trtllm_ct")


def check_model(model: Any, fused: Mapping[str, Sequence[str]], plan: Plan) -> None:
    """Hold a rank's plan against the model that the engine built for that rank.

    `fused` are the parts of fused Linears by the leaf of their name, as the engine's weight mapper has them.
    Raises `LoadError` with a fault for every Linear of another mode than planned, and for every quantized one that the
    model doesn't have; a model with a loading loop of its own may have such ones under another name, so there they are
    logged.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    around = {part: leaf for leaf, parts in fused.items() for part in parts}
    faults, absent = FaultCollector(), FaultCollector()
    for module in plan.modules:
        if module.class_name != "Linear" or not module.deliveries:
            continue
        name = _name_in(modules, module, around)
        if name is None:
            _add_absent(module, absent)
        else:
            _compare(module, name, modules[name], faults)
    own_loop = not type(model).load_weights.__module__.endswith(_GENERIC_LOOP)
    if own_loop:
        _log(absent)
    else:
        faults.faults += absent.faults
    if os.environ.get(NO_MODEL_CHECK, "") in {"", "0"}:
        faults.raise_if_any(LoadError)
    _log(faults)


def _name_in(modules: Mapping[str, Any], module: ModulePlan, around: Mapping[str, str]) -> str | None:
    """The engine's name of the module that takes a Linear: its own, that of a fused one, or that of all experts."""
    if module.engine_name in modules:
        return module.engine_name
    prefix, _, leaf = module.name.rpartition(".")
    fused = f"{prefix}.{around.get(leaf, leaf)}"
    return fused if fused in modules else None


def _add_absent(module: ModulePlan, absent: FaultCollector) -> None:
    if module.layer is not None:
        absent.add(
            where=module.name,
            expected=f"a module of TensorRT-LLM's model that loads it ({module.delivered_mode})",
            found="none of that name, so that its tensors would stay unread",
            remedy=_REMEDY,
        )


def _compare(module: ModulePlan, name: str, engine: Any, faults: FaultCollector) -> None:
    """One mode in the plan and in the engine; modules that have none to ask for are left out."""
    if not hasattr(engine, "quant_config"):
        return
    algo = str(getattr(engine.quant_config, "quant_algo", None))
    found = None if algo in _NO_MODES else algo
    planned = str(module.layer.quant_algo) if module.layer else None
    if found != planned:
        faults.add(
            where=module.name,
            expected=f"{planned or 'a plain Linear'}, as it is delivered",
            found=f"{found or 'a plain Linear'} in TensorRT-LLM's {name}",
            remedy=_REMEDY,
        )


def _log(faults: FaultCollector) -> None:
    for fault in faults.faults:
        logger.warning("%s", fault)
