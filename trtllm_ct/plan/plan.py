"""A plan as data: what becomes of every stored tensor and where every delivered tensor comes from.

Everything here is frozen, printable and JSON-able; nothing here reads a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_ct.base.json_form import json_object
from trtllm_ct.engine.parallel import ONE_RANK, Parallel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.base.schemes import QuantAlgo, QuantScheme, TensorSpec
    from trtllm_ct.checkpoint.reader import Run
    from trtllm_ct.config.quantization_config import Transform
    from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
    from trtllm_ct.formats.base import StoredWeight
    from trtllm_ct.plan.ops import Operation
    from trtllm_ct.plan.stored import View

__all__ = ["Delivery", "Fate", "ModulePlan", "Place", "Plan", "Share", "StoredFate"]


class Fate(StrEnum):
    """What becomes of a stored tensor."""

    CONSUMED = "consumed"
    COPIED = "copied"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFate:
    """One stored tensor: `by` names the delivered tensors made from it, `reason` says why it is ignored."""

    name: str
    spec: TensorSpec
    fate: Fate
    by: tuple[str, ...] = ()
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        entry: dict[str, Any] = {"name": self.name, **self.spec.to_dict(), "fate": str(self.fate)}
        if self.by:
            entry["by"] = list(self.by)
        if self.reason:
            entry["reason"] = self.reason
        return entry


class Delivery(NamedTuple):
    """One delivered tensor: the operation that makes it, and the stored tensors by full name that have a part in it."""

    name: str
    operation: Operation
    sources: tuple[str, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape of the delivered tensor."""
        return self.operation.result

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.name,
            **self.spec.to_dict(),
            "operation": self.operation.label,
            "exact": self.operation.exact,
            "sources": list(self.sources),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank's rows go: `count` rows of a delivered tensor, from `first` on, become rows from `at` on."""

    first: int
    count: int
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank reads and makes of a module: rows `begin` to `end` of its weight, by the plan `module`.

    Of what that delivers, `places` says by name where it goes in a tensor of full shape whose other rows nobody
    writes. Tensors in `views` are handed over as they are stored, whole, since that costs nothing; any others as made.
    """

    begin: int
    end: int
    module: ModulePlan
    places: Mapping[str, Place] = field(default_factory=dict)
    views: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """One module: how it is stored, how it is delivered, and why.

    `views` make the module's tensors, by local name, from stored ones; `ignored` says why some of them are left out.
    `weight` and `scheme` are None for a module that is stored plain. `layer` is its mode at the target, None when it is
    delivered plain; `reason` then says why a quantized module was dequantized.
    `native_mode` is the family of the scheme, whatever the target; `note` says what its mode does otherwise than the
    scheme asks. `fused_linear` names the Linear that an engine makes of it and others, whose scalars must agree;
    `experts` names the module of all routed experts that it belongs to. `transforms` are folded into what is
    delivered. In the plan of a rank that has a part of the module, `share` is that part.
    """

    name: str
    class_name: str
    views: Mapping[str, View]
    deliveries: tuple[Delivery, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    weight: StoredWeight | None = None
    scheme: QuantScheme | None = None
    native_mode: QuantAlgo | None = None
    layer: LayerQuantConfig | None = None
    reason: str = ""
    note: str = ""
    fused_linear: str | None = None
    experts: str | None = None
    transforms: tuple[Transform, ...] = ()
    share: Share | None = None

    @property
    def engine_name(self) -> str:
        """The name under which an engine's configuration knows the module: that of all experts for one of them."""
        return self.experts or self.name

    @property
    def dequantized(self) -> bool:
        """Whether a quantized weight is delivered as a plain one."""
        return self.weight is not None and self.layer is None

    @property
    def stored_scheme(self) -> str:
        """Format and scheme for tables; empty for a plain module."""
        if self.weight is None or self.scheme is None:
            return ""
        return f"{self.weight.format.name}: {self.scheme.label()}"

    @property
    def delivered_mode(self) -> str:
        """The algorithm's name with its group size, or `dequantized` or `plain`."""
        if self.layer is None:
            return "dequantized" if self.dequantized else "plain"
        size = f" g{self.layer.group_size}" if self.layer.group_size else ""
        return f"{self.layer.quant_algo}{size}"

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors of the module as stored."""
        return sum([view.stored_bytes for view in self.views.values()])

    @property
    def delivered_bytes(self) -> int:
        """Bytes of all tensors of the module as delivered."""
        return sum([delivery.operation.result.nbytes for delivery in self.deliveries])

    @property
    def runs(self) -> tuple[Run, ...]:
        """What of the stored tensors delivery or its checks need, each tensor once."""
        if self.share is not None:
            return self.share.module.runs
        runs: dict[str, Run] = {}
        for local, view in self.views.items():
            for run in view.runs if local not in self.ignored else ():
                runs[run.name] = run.union(runs.get(run.name, run))
        return tuple(runs.values())

    @property
    def reads(self) -> tuple[str, ...]:
        """The stored tensors, by full name, whose payload delivery or its checks need."""
        return tuple(run.name for run in self.runs)

    def local_tensors(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's tensors by local name, from stored ones by full name; raises `PayloadError`."""
        return {local: view.of(stored) for local, view in self.views.items() if local not in self.ignored}

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the tensors."""
        entry: dict[str, Any] = {
            "name": self.name,
            "class": self.class_name,
            "mode": self.delivered_mode,
            "stored_bytes": self.stored_bytes,
            "delivered_bytes": self.delivered_bytes,
        }
        if self.weight is not None:
            entry |= {
                "scheme": self.stored_scheme,
                "native_mode": str(self.native_mode) if self.native_mode else None,
                "shape": list(self.weight.shape),
            }
        if self.reason:
            entry["reason"] = self.reason
        if self.note:
            entry["note"] = self.note
        return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that loading and converting do, decided from configuration and headers.

    `stored` are all tensors of the checkpoint. `dtype` is the model's dtype at the target; `dense_dtype` that of
    dequantized modules. `parallel` are the sizes whose every slice the modes hold.
    """

    target: str
    architecture: str
    dtype: DType
    dense_dtype: DType
    stored: Mapping[str, TensorSpec]
    modules: tuple[ModulePlan, ...]
    quant_config: QuantConfig
    warnings: tuple[str, ...] = ()
    parallel: Parallel = ONE_RANK

    def deliveries(self) -> Iterator[Delivery]:
        """Every delivered tensor, module by module."""
        for module in self.modules:
            yield from module.deliveries

    def fates(self) -> Iterator[StoredFate]:
        """Every stored tensor once, in the order of the files."""
        makes: dict[str, list[Delivery]] = {}
        for delivery in self.deliveries():
            for source in delivery.sources:
                makes.setdefault(source, []).append(delivery)
        reasons = {
            source: reason
            for module in self.modules
            for local, reason in module.ignored.items()
            for source in module.views[local].sources
        }
        for name, spec in self.stored.items():
            made = makes.get(name, [])
            yield StoredFate(
                name=name,
                spec=spec,
                fate=_fate(name, made),
                by=tuple(delivery.name for delivery in made),
                reason="" if made else reasons.get(name, ""),
            )

    @property
    def delivered_specs(self) -> dict[str, TensorSpec]:
        """Name to dtype and shape of every delivered tensor, in delivery order."""
        return {delivery.name: delivery.spec for delivery in self.deliveries()}

    @property
    def stored_bytes(self) -> int:
        """Bytes of payload in the checkpoint."""
        return sum(spec.nbytes for spec in self.stored.values())

    @property
    def delivered_bytes(self) -> int:
        """Bytes of payload after delivery."""
        return sum(module.delivered_bytes for module in self.modules)

    def module(self, name: str) -> ModulePlan:
        """The plan of one module; raises `KeyError`."""
        return self.by_name[name]

    @property
    def by_name(self) -> Mapping[str, ModulePlan]:
        """Modules by full name."""
        return {module.name: module for module in self.modules}

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with every stored and every delivered tensor."""
        return json_object(
            {
                "target": self.target,
                "architecture": self.architecture,
                "dtype": self.dtype,
                "dense_dtype": self.dense_dtype,
                "parallel": self.parallel,
                "quantization": self.quant_config,
                "modules": self.modules,
                "stored": tuple(self.fates()),
                "delivered": tuple(self.deliveries()),
                "stored_bytes": self.stored_bytes,
                "delivered_bytes": self.delivered_bytes,
                "warnings": self.warnings,
            }
        )


def _fate(name: str, made: list[Delivery]) -> Fate:
    if not made:
        return Fate.IGNORED
    untouched = len(made) == 1 and made[0].name == name and made[0].operation.label == "copy"
    return Fate.COPIED if untouched else Fate.CONSUMED
