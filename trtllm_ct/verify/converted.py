"""Compare a converted directory with its source, tensor by tensor in float64.

The source is dequantized by the codec of its stored format. The converted side is dequantized by the reference engine,
which reads the native layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trtllm_ct.base.errors import CheckpointError, FaultCollector
from trtllm_ct.base.json_form import json_object
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
from trtllm_ct.formats.codecs import NATIVE
from trtllm_ct.plan.ops import LargestScale, Reciprocal
from trtllm_ct.reference.compare import Comparison, compare_native, compare_rounded
from trtllm_ct.reference.directory import read_quant_config
from trtllm_ct.reference.effective_weights import effective_bias, effective_table, effective_weight
from trtllm_ct.reference.linear import ReferenceLinear
from trtllm_ct.reference.stacked_experts import UnstackedReader
from trtllm_ct.verify.shared_scalars import check_fused_scalars, input_multipliers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["TensorCheck", "compare_converted"]

# The conversion and this module sum the same float64 products in different orders. The difference is invisible after
# rounding to a delivered dtype, except for values halfway between two numbers of that dtype.
_FOLD_UNCERTAINTY = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCheck:
    """The comparison of one delivered weight or tensor with the source.

    `kind` is `native` (quantized on both sides), `dequantized` (quantized only in the source) or `plain`.
    """

    name: str
    kind: str
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return json_object({"name": self.name, "kind": self.kind}) | self.comparison.to_dict()


def compare_converted(
    checkpoint: Checkpoint, plan: Plan, converted: Path, faults: FaultCollector
) -> tuple[TensorCheck, ...]:
    """Compare every tensor of a converted directory with the source.

    Tensors that differ, are missing or have no source are added to `faults`. `plan` may be a plan for any target.
    Raises `CheckpointError` when the converted directory can't be read.
    """
    catalog = Catalog.from_directory(converted)
    quant_config = QuantConfig()
    if (converted / "hf_quant_config.json").is_file():
        quant_config = read_quant_config(converted / "hf_quant_config.json", catalog)
    model = checkpoint.model
    fused = frozenset(site.module for site in model.sites(model.place(plan.by_name)) if site.fused)
    with TensorReader(checkpoint.catalog) as source, TensorReader(catalog) as reader:
        delivered = UnstackedReader(reader, catalog, read_json_object(converted / "config.json"))
        inputs = input_multipliers(plan, source)
        comparison = _DirectoryComparison(source, delivered, quant_config, fused, inputs, faults)
        checks = tuple(check for module in plan.modules for check in comparison.check_module(module))
        check_fused_scalars(plan, catalog, reader, quant_config, faults)
    for name in delivered.names:
        if name not in comparison.seen:
            faults.add(
                where=f"{converted}: {name}",
                expected="only tensors that come from the source",
                found="one without a source",
                remedy="Convert again into an empty directory.",
            )
    return checks


class _DirectoryComparison:
    """The comparison of one converted directory with its source.

    `fused` are the modules that engines fuse with
    others to one Linear. `inputs` are the expected values of NVFP4 input scales by module. `seen` collects the names of
    the converted tensors that belong to a module of the plan.
    """

    def __init__(
        self,
        source: TensorReader,
        delivered: UnstackedReader,
        quant_config: QuantConfig,
        fused: frozenset[str],
        inputs: Mapping[str, float],
        faults: FaultCollector,
    ) -> None:
        self._source = source
        self._delivered = delivered
        modules: dict[str, set[str]] = {}
        for name in delivered.names:
            module, _, local = name.rpartition(".")
            modules.setdefault(module, set()).add(local)
        self._modules = {module: frozenset(locals_) for module, locals_ in modules.items()}
        self._quant_config = quant_config
        self._fused = fused
        self._inputs = inputs
        self._faults = faults
        self.seen: set[str] = set()

    def check_module(self, plan: ModulePlan) -> Iterator[TensorCheck]:
        """Check one module: its weight, then every other tensor that is delivered for it."""
        stored = plan.local_tensors({name: self._source.read(name) for name in plan.reads})
        if any(delivery.name == f"{plan.name}.weight" for delivery in plan.deliveries):
            yield from self._check_weight(plan, stored)
        consumed = plan.weight.consumed if plan.weight else ("weight",)
        for delivery in plan.deliveries:
            source = delivery.operation.source
            if source is None or source in consumed:
                continue
            exact = stored[source].double()
            if isinstance(delivery.operation, Reciprocal):
                exact = torch.full_like(exact, self._inputs[plan.name])
            if isinstance(delivery.operation, LargestScale):
                exact = exact.amax()
            if plan.transforms and source == "bias":
                exact = effective_bias(exact, plan.transforms, stored)
            yield from self._check_tensor(delivery.name, exact, _uncertainty(plan))

    def _check_weight(self, plan: ModulePlan, stored: dict[str, Tensor]) -> Iterator[TensorCheck]:
        name = f"{plan.name}.weight"
        # hf_quant_config.json names Linears only; it never names norms and embeddings.
        layer = self._quant_config.layer_config(plan.name) if plan.class_name == "Linear" else None
        tensors = self._read_weight(plan.name, layer)
        if "weight" not in tensors:
            self._report_missing(name)
            return
        exact = _exact_weight(plan, stored)
        if layer is None:
            kind = "plain" if plan.weight is None else "dequantized"
            yield from self._check_unquantized(name, kind, tensors["weight"], exact, _uncertainty(plan))
            return
        mode = MODES_BY_ALGO.get(layer.quant_algo)
        if mode is not None and mode.pre_quant_scale:
            self._check_pre_quant_scale(plan.name, tensors)
        alias = mode.expert_scale_alias if mode is not None and plan.experts else None
        if alias and alias not in self._modules.get(plan.name, frozenset()):
            self._report_missing(f"{plan.name}.{alias}")
        try:
            value = _native_value(plan.name, tensors, layer, exact)
        except CheckpointError as error:
            self._faults.faults.extend(error.faults)
            return
        yield self._record(TensorCheck(name=name, kind="native", comparison=compare_native(value, exact)))

    def _check_pre_quant_scale(self, module: str, tensors: dict[str, Tensor]) -> None:
        """Check that `pre_quant_scale` exists for a Linear that is not fused, and only there.

        Engines require it for a Linear that stands alone, and never read it for a fused Linear.
        """
        name = f"{module}.pre_quant_scale"
        if module not in self._fused and "pre_quant_scale" not in tensors:
            self._report_missing(name)
        if module in self._fused and "pre_quant_scale" in tensors:
            self._faults.add(
                where=name,
                expected="no such tensor, since engines don't read it in a fused Linear",
                found="one that would be lost",
                remedy="Convert again; the weights must do without it.",
            )

    def _check_tensor(self, name: str, source: Tensor, uncertainty: float) -> Iterator[TensorCheck]:
        """Check a bias, an activation scale or a KV scale.

        A scale that the configuration of the converted directory doesn't need may be absent.
        """
        module, _, local = name.rpartition(".")
        delivered = self._modules.get(module, frozenset())
        if local not in delivered:
            if local == "bias" or self._needs_scale(module, local):
                self._report_missing(name)
            return
        self.seen.add(name)
        yield from self._check_unquantized(name, "plain", self._delivered.read(name), source.double(), uncertainty)

    def _needs_scale(self, module: str, local: str) -> bool:
        """Whether the configuration of the converted directory requires this input or KV scale."""
        if local == "input_scale":
            return self._quant_config.layer_config(module) is not None
        return self._quant_config.kv_cache_quant_algo is not None

    def _check_unquantized(
        self, name: str, kind: str, got: Tensor, exact: Tensor, uncertainty: float
    ) -> Iterator[TensorCheck]:
        """Compare an unquantized tensor with the exact values; adds a fault for a quantized dtype or another shape."""
        exact = exact.reshape(got.shape) if exact.numel() == got.numel() == 1 else exact
        if not got.is_floating_point() or got.itemsize == 1 or got.shape != exact.shape:
            self._faults.add(
                where=name,
                expected=f"plain float values {list(exact.shape)}, since hf_quant_config.json gives it no mode",
                found=f"{got.dtype} {list(got.shape)}",
                remedy="Convert again; configuration and weights of this directory don't belong together.",
            )
            return
        comparison = compare_rounded(got, exact, uncertainty=uncertainty)
        yield self._record(TensorCheck(name=name, kind=kind, comparison=comparison))

    def _read_weight(self, module: str, layer: LayerQuantConfig | None) -> dict[str, Tensor]:
        """Read the converted tensors that form a weight, by local name.

        For a quantized module these are all its tensors except biases and KV scales; otherwise only `weight`. A scale
        under a second name is compared with the first and left out.
        """
        delivered = self._modules.get(module, frozenset())
        not_of_weight = {"bias", "k_scale", "v_scale", "e_score_correction_bias"}
        names = delivered - not_of_weight if layer else delivered & {"weight"}
        tensors = {local: self._delivered.read(f"{module}.{local}") for local in names}
        self.seen |= {f"{module}.{local}" for local in names - {"input_scale"}}
        if {"weight_scale", "weight_scale_inv"} <= tensors.keys():
            self._check_second_name(module, tensors["weight_scale"], tensors.pop("weight_scale_inv"))
        return tensors

    def _check_second_name(self, module: str, scale: Tensor, second_scale: Tensor) -> None:
        """Check that both names of an expert's scale, one for each release of the engine, hold the same values."""
        if scale.shape != second_scale.shape or not torch.equal(scale, second_scale):
            self._faults.add(
                where=f"{module}.weight_scale_inv",
                expected="the same values as weight_scale",
                found="others",
                remedy="Convert again; an engine would read either of them.",
            )

    def _record(self, check: TensorCheck) -> TensorCheck:
        """Add a fault if the check failed; return the check."""
        comparison = check.comparison
        if not comparison.good:
            self._faults.add(
                where=f"{check.name}, {comparison.block}",
                expected=f"{comparison.want:.9g}",
                found=f"{comparison.got:.9g}, the worst of {comparison.differing} elements",
                remedy="The converted weight is wrong; convert again, and report it if it stays.",
            )
        return check

    def _report_missing(self, name: str) -> None:
        self._faults.add(
            where=name,
            expected="a tensor made from the source",
            found="no such tensor in the converted directory",
            remedy="Convert again; the directory is not complete.",
        )


def _exact_weight(plan: ModulePlan, stored: Mapping[str, Tensor]) -> Tensor:
    """The dequantized weight of a source module in float64, with its online transforms applied."""
    exact = stored["weight"].double() if plan.weight is None else NATIVE.dequantize(plan.weight, stored, torch.float64)
    if not plan.transforms:
        return exact
    effective = effective_table if plan.class_name == "Embedding" else effective_weight
    return effective(exact, plan.transforms, stored)


def _uncertainty(plan: ModulePlan) -> float:
    """The possible error of a module's exact values, relative to the largest: zero for a module without transforms."""
    return _FOLD_UNCERTAINTY if plan.transforms else 0.0


def _native_value(module: str, tensors: dict[str, Tensor], layer: LayerQuantConfig, exact: Tensor) -> Tensor:
    """The float64 weight that a native Linear multiplies its input with, including `pre_quant_scale`."""
    rows, columns = exact.shape
    linear = ReferenceLinear(tensors, layer=layer, in_features=columns, out_features=rows, name=module)
    value = linear.dequantized_weight(torch.float64)
    if "pre_quant_scale" in tensors:
        value = value * tensors["pre_quant_scale"].double()
    return value
