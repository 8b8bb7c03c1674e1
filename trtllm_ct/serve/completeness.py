"""The tensors that the engine reads in each mode, and the check that a rank got all of them and nothing else.

The engine skips a module without tensors, and never reports a tensor that it did not read. A wrong tensor name would
therefore leave memory uninitialised without any error. To catch that, this file lists the names a second time, taken
from the engine's source and independently of `plan/deliver.py`. The loaded tensors are compared with this list.
Sources: TensorRT-LLM `_torch/modules/linear.py` (the load methods of each LinearMethod), `fused_moe/quantization.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import FaultCollector, LoadError
from trtllm_ct.base.schemes import QuantAlgo

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from trtllm_ct.engine.parallel import Rank
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["EXPERT_READS", "LINEAR_READS", "Reads", "prove_complete", "refuse_missing_modules"]

_REPORT = "This is a fault of trtllm-ct, and loading was stopped before it could show in the text; please report it."
_KV_SCALES = frozenset({"k_scale", "v_scale"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """The tensors of a module that the engine reads in one mode, by their name within the module.

    `required` tensors are always read.
    `alone` tensors are required by a Linear that the engine does not fuse with others, and are not read by a fused one.
    `optional` tensors are read if they are present.
    `aliases` are second names of required tensors, which some releases read instead.
    """

    required: frozenset[str]
    alone: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset({"bias"})
    aliases: frozenset[str] = frozenset()

    def demanded(self, module: ModulePlan) -> frozenset[str]:
        """Return the names of the tensors that a module must have."""
        return self.required if module.fused_linear else self.required | self.alone

    def known(self, module: ModulePlan) -> frozenset[str]:
        """Return the names of all tensors that a module may have."""
        return self.demanded(module) | self.optional | self.aliases


_CODES_AND_SCALE = frozenset({"weight", "weight_scale"})
_BIAS = frozenset({"bias"})
_SECOND_NAME = frozenset({"weight_scale_inv"})

PLAIN_READS = Reads(required=frozenset({"weight"}))
LINEAR_READS: Mapping[QuantAlgo, Reads] = {
    QuantAlgo.FP8: Reads(required=_CODES_AND_SCALE, optional=_BIAS | _KV_SCALES | {"input_scale"}),
    # No input_scale: the engine's attention would divide by it, and the GEMM would not multiply by it.
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.FP8_BLOCK_SCALES: Reads(required=_CODES_AND_SCALE),
    # Without an input_scale, the engine's parameter for it would stay uninitialised.
    QuantAlgo.NVFP4: Reads(required=_CODES_AND_SCALE | {"weight_scale_2", "input_scale"}, optional=_BIAS | _KV_SCALES),
    QuantAlgo.W4A16_NVFP4: Reads(required=_CODES_AND_SCALE | {"weight_scale_2"}, optional=_BIAS | _KV_SCALES),
    QuantAlgo.MXFP8: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.W4A8_MXFP4_MXFP8: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.W8A16: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.W4A16: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.W4A16_AWQ: Reads(required=_CODES_AND_SCALE, alone=frozenset({"pre_quant_scale"})),
    QuantAlgo.W4A16_GPTQ: Reads(required=_CODES_AND_SCALE | {"weight_zero"}),
}
"""The tensors that Linears read. KV-cache scales are stored in k_proj and v_proj, and only some modes read them."""

EXPERT_READS: Mapping[QuantAlgo, Reads] = {
    QuantAlgo.FP8: Reads(required=_CODES_AND_SCALE | {"input_scale"}),
    QuantAlgo.FP8_BLOCK_SCALES: Reads(required=_CODES_AND_SCALE, aliases=_SECOND_NAME),
    QuantAlgo.NVFP4: Reads(required=_CODES_AND_SCALE | {"weight_scale_2", "input_scale"}),
    QuantAlgo.W4A16_NVFP4: Reads(required=_CODES_AND_SCALE | {"weight_scale_2"}),
    QuantAlgo.MXFP8: Reads(required=_CODES_AND_SCALE, aliases=_SECOND_NAME),
    QuantAlgo.W4A16_MXFP4: Reads(required=_CODES_AND_SCALE, aliases=_SECOND_NAME),
    QuantAlgo.W4A8_MXFP4_MXFP8: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.W8A16: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.W4A8_AWQ: Reads(
        required=_CODES_AND_SCALE | {"weight_scale_2", "input_scale", "pre_quant_scale"},
    ),
}
"""The tensors that routed experts read."""

JOINED_READS: Mapping[QuantAlgo, Reads] = {
    QuantAlgo.FP8_BLOCK_SCALES: Reads(
        required=frozenset({"weight", "weight_scale_inv"}), optional=frozenset({"weight_scale"})
    )
}
"""The tensors of the Linears that `_torch/models/modeling_deepseekv3.py` joins into `kv_a_proj_with_mqa` itself."""
_JOINED = ("q_a_proj", "kv_a_proj_with_mqa")


def prove_complete(plan: Plan, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Check the loaded tensors of a rank against its plan and against what the engine reads.

    Returns the names of the loaded KV-cache scales that the engine does not read in the mode of their module.
    Raises `LoadError` with a fault for every tensor that is missing, has another dtype or shape than planned, is not
    in the plan, is delivered by more than one module, or is not read by the engine.
    """
    faults = FaultCollector()
    specs = plan.delivered_specs
    for name, spec in specs.items():
        tensor = weights.get(name)
        if tensor is None:
            faults.add(where=name, expected=str(spec), found="no such tensor among those loaded", remedy=_REPORT)
        elif tensor.dtype != spec.dtype.torch_dtype or tuple(tensor.shape) != spec.shape:
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            faults.add(where=name, expected=str(spec), found=found, remedy=_REPORT)
    for name in sorted(weights.keys() - specs.keys()):
        faults.add(where=name, expected="a tensor of the plan", found="one that it doesn't have", remedy=_REPORT)
    for name, times in Counter(delivery.name for delivery in plan.deliveries()).items():
        if times > 1:
            faults.add(where=name, expected="one module that delivers it", found=f"{times} of them", remedy=_REPORT)
    unread = tuple(_unread_scales(plan, weights, faults))
    faults.raise_if_any(LoadError)
    return unread


def refuse_missing_modules(whole_plan: Plan, rank_plan: Plan, model: Model, rank: Rank) -> None:
    """Raise `LoadError` when the plan of a rank lacks a module that the rank computes with.

    `whole_plan` is the plan of the whole model, `rank_plan` the plan of the rank. A module may be absent from
    `rank_plan` only if it delivers nothing, if its layer belongs to another pipeline stage, or if its expert belongs to
    another rank. The error has one fault per missing module.
    """
    faults = FaultCollector()
    layers = re.compile(re.escape(model.place(whole_plan.by_name)[0]) + r"layers\.(\d+)\.")
    present = {module.name for module in rank_plan.modules}
    for module in whole_plan.modules:
        if module.name in present or not module.deliveries:
            continue
        layer = layers.match(module.name)
        on_other_stage = layer is not None and rank.layers is not None and int(layer[1]) not in rank.layers
        if not on_other_stage and _has_expert(module, model, rank):
            faults.add(
                where=module.name,
                expected=f"a part in the plan of rank {rank.tensor} of stage {rank.pipeline}, which computes with it",
                found="none",
                remedy=_REPORT,
            )
    faults.raise_if_any(LoadError)


def _has_expert(module: ModulePlan, model: Model, rank: Rank) -> bool:
    """Whether the module belongs to an expert of this rank; true for every module outside the routed experts."""
    if module.experts is None:
        return True
    experts_per_rank = model.sizes["experts"] // rank.parallel.expert
    return int(module.name.removeprefix(f"{module.experts}.").partition(".")[0]) // experts_per_rank == rank.expert


def _unread_scales(plan: Plan, weights: Mapping[str, Tensor], faults: FaultCollector) -> Iterator[str]:
    """Yield the names of KV-cache scales that the engine does not read in the mode of their module.

    Adds a fault for every tensor that a quantized module lacks, and for any other tensor that its mode does not read.
    In modules that the checkpoint stores unquantized, only KV-cache scales are looked at.
    """
    loaded: dict[str, set[str]] = {}
    for name in weights:
        module_name, _, tensor_name = name.rpartition(".")
        loaded.setdefault(module_name, set()).add(tensor_name)
    for module in plan.modules:
        tensor_names = loaded.get(module.name, set())
        if module.weight is None:
            yield from (f"{module.name}.{name}" for name in sorted(tensor_names & _KV_SCALES))
            continue
        reads = _reads_of(module)
        for name in sorted(reads.demanded(module) - tensor_names):
            _add_fault(module, name, "one, which it reads", "none", faults)
        for name in sorted(tensor_names - reads.known(module)):
            if name in _KV_SCALES:
                yield f"{module.name}.{name}"
            else:
                _add_fault(module, name, "none, as it reads none", "one", faults)


def _reads_of(module: ModulePlan) -> Reads:
    if module.layer is None:
        return PLAIN_READS
    joined = module.name.endswith(_JOINED)
    table = EXPERT_READS if module.experts else JOINED_READS if joined else LINEAR_READS
    return table[module.layer.quant_algo]


def _add_fault(module: ModulePlan, tensor_name: str, expected: str, found: str, faults: FaultCollector) -> None:
    reader = "expert" if module.experts else "Linear"
    where = f"{module.name}.{tensor_name}"
    faults.add(where=where, expected=f"{expected} ({module.delivered_mode} {reader})", found=found, remedy=_REPORT)
