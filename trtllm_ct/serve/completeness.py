"""What the engine reads, mode by mode, and the proof that a rank was delivered all of it and nothing else.

The engine skips a module that finds no tensors, and never reports a tensor that nobody read: a wrong name leaves
uninitialised memory and no error. So the names are written down here once more, from the engine's source and apart from
`plan/deliver.py`, and what was really delivered is held against them.
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
    """The tensors of a module that the engine reads in one mode, by local name.

    `required` are always read, `alone` only by a Linear that the engine doesn't make one with others, which demands
    them. `optional` may be absent. `aliases` are second names of required ones, for releases that read those.
    """

    required: frozenset[str]
    alone: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset({"bias"})
    aliases: frozenset[str] = frozenset()

    def demanded(self, module: ModulePlan) -> frozenset[str]:
        """What one module must have."""
        return self.required if module.fused_linear else self.required | self.alone

    def known(self, module: ModulePlan) -> frozenset[str]:
        """What one module may have."""
        return self.demanded(module) | self.optional | self.aliases


_CODES_AND_SCALE = frozenset({"weight", "weight_scale"})
_BIAS = frozenset({"bias"})
_SECOND_NAME = frozenset({"weight_scale_inv"})

PLAIN_READS = Reads(required=frozenset({"weight"}))
LINEAR_READS: Mapping[QuantAlgo, Reads] = {
    QuantAlgo.FP8: Reads(required=_CODES_AND_SCALE, optional=_BIAS | _KV_SCALES | {"input_scale"}),
    # An input scale would be read, and make attention divide by what the GEMM doesn't multiply with.
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.FP8_BLOCK_SCALES: Reads(required=_CODES_AND_SCALE),
    # Without an input scale its memory would stay uninitialised.
    QuantAlgo.NVFP4: Reads(required=_CODES_AND_SCALE | {"weight_scale_2", "input_scale"}, optional=_BIAS | _KV_SCALES),
    QuantAlgo.W4A16_NVFP4: Reads(required=_CODES_AND_SCALE | {"weight_scale_2"}, optional=_BIAS | _KV_SCALES),
    QuantAlgo.MXFP8: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.W8A16: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.W4A16: Reads(required=_CODES_AND_SCALE),
    QuantAlgo.W4A16_AWQ: Reads(required=_CODES_AND_SCALE, alone=frozenset({"pre_quant_scale"})),
    QuantAlgo.W4A16_GPTQ: Reads(required=_CODES_AND_SCALE | {"weight_zero"}),
}
"""What Linears read. Tensors of the KV cache lie beside k and v, and only some modes read them."""

EXPERT_READS: Mapping[QuantAlgo, Reads] = {
    QuantAlgo.FP8: Reads(required=_CODES_AND_SCALE | {"input_scale"}),
    QuantAlgo.FP8_BLOCK_SCALES: Reads(required=_CODES_AND_SCALE, aliases=_SECOND_NAME),
    QuantAlgo.NVFP4: Reads(required=_CODES_AND_SCALE | {"weight_scale_2", "input_scale"}),
    QuantAlgo.W4A16_NVFP4: Reads(required=_CODES_AND_SCALE | {"weight_scale_2"}),
    QuantAlgo.MXFP8: Reads(required=_CODES_AND_SCALE, aliases=_SECOND_NAME),
    QuantAlgo.W4A16_MXFP4: Reads(required=_CODES_AND_SCALE, aliases=_SECOND_NAME),
    QuantAlgo.W8A16: Reads(required=_CODES_AND_SCALE),
}
"""What routed experts read."""


def prove_complete(plan: Plan, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Hold what was delivered against a rank's plan and against what the engine reads.

    Returns the names of tensors that are delivered for the sake of other modes or releases and not read in this one.
    Raises `LoadError` with a fault for every tensor that is missing, of another dtype or shape, or read by nobody.
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
    unread = tuple(_unread(plan, weights, faults))
    faults.raise_if_any(LoadError)
    return unread


def refuse_missing_modules(whole: Plan, own: Plan, model: Model, rank: Rank) -> None:
    """Raise `LoadError` for every module that a rank's plan lacks though the rank has its layer and its expert."""
    faults = FaultCollector()
    layers = re.compile(re.escape(model.place(whole.by_name)[0]) + r"layers\.(\d+)\.")
    there = {module.name for module in own.modules}
    for module in whole.modules:
        if module.name in there or not module.deliveries:
            continue
        layer = layers.match(module.name)
        elsewhere = layer is not None and rank.layers is not None and int(layer[1]) not in rank.layers
        if not elsewhere and _has_expert(module, model, rank):
            faults.add(
                where=module.name,
                expected=f"a part in the plan of rank {rank.tensor} of stage {rank.pipeline}, which computes with it",
                found="none",
                remedy=_REPORT,
            )
    faults.raise_if_any(LoadError)


def _has_expert(module: ModulePlan, model: Model, rank: Rank) -> bool:
    """Whether the rank has this module's expert; every rank has what is no routed expert."""
    if module.experts is None:
        return True
    experts = model.architecture.experts
    count = model.sizes[experts.count] // rank.parallel.expert if experts else 1
    return int(module.name.removeprefix(f"{module.experts}.").partition(".")[0]) // count == rank.expert


def _unread(plan: Plan, weights: Mapping[str, Tensor], faults: FaultCollector) -> Iterator[str]:
    """Compare the local names that each quantized module got with what its mode reads; plain ones read no scales."""
    found: dict[str, set[str]] = {}
    for name in weights:
        owner, _, local = name.rpartition(".")
        found.setdefault(owner, set()).add(local)
    for module in plan.modules:
        locals_ = found.get(module.name, set())
        if module.weight is None:
            yield from (f"{module.name}.{local}" for local in sorted(locals_ & _KV_SCALES))
            continue
        reads = _reads_of(module)
        for local in sorted(reads.demanded(module) - locals_):
            _not_read(module, local, "one, which it reads", "none", faults)
        for local in sorted(locals_ - reads.known(module)):
            if local in _KV_SCALES:
                yield f"{module.name}.{local}"
            else:
                _not_read(module, local, "none, as it reads none", "one", faults)


def _reads_of(module: ModulePlan) -> Reads:
    if module.layer is None:
        return PLAIN_READS
    table = EXPERT_READS if module.experts else LINEAR_READS
    return table[module.layer.quant_algo]


def _not_read(module: ModulePlan, local: str, expected: str, found: str, faults: FaultCollector) -> None:
    kind = "expert" if module.experts else "Linear"
    where = f"{module.name}.{local}"
    faults.add(where=where, expected=f"{expected} ({module.delivered_mode} {kind})", found=found, remedy=_REPORT)
